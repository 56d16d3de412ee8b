"""Reads and overwrites the local part of a live model's tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """A DTensor's local part, which shares its memory; any other tensor itself. Complex ones ``as_real``."""
    return as_real(tensor.to_local() if hasattr(tensor, "to_local") else tensor)  # its class is costly


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real and imaginary parts, in its own memory; any other tensor itself."""
    is_pairs = tensor.is_complex() and tensor.layout == torch.strided
    return torch.view_as_real(tensor) if is_pairs else tensor


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """The device that most bytes of live tensors lie on.

    It need not be the one that training computes on: FSDP may keep its shards in host memory.
    """
    held = Counter[torch.device]()
    for tensor in tensors:
        held[tensor.device] += tensor.nbytes
    return max(held, key=held.__getitem__, default=torch.device("cpu"))


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Overwrites a live tensor in place with ``values`` of the same shape, casting to its dtype."""
    distinct = _distinct(tensor)
    with torch.inference_mode(tensor.is_inference()):  # e.g. a buffer made in a validation before the fit
        tensor[distinct].copy_(values[distinct])


def _distinct(tensor: Tensor) -> tuple[slice, ...]:
    """Selects each memory location of an expanded tensor once, since it can't be written to as a whole."""
    return tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
