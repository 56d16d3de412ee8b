"""Which tensors Triton's kernels take; all others are left to PyTorch's own operations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

NARROW = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Floating-point dtypes that are summed in fp32."""


def triton_serves(*tensors: Tensor, dtypes: Collection[torch.dtype] = NARROW) -> bool:
    """Whether Triton's kernels take these tensors: contiguous ones of certain dtypes on one CUDA device.

    The environment variable ``MERGE_CALLBACK_TRITON=0`` turns the kernels off.

    Args:
        *tensors: at least one.
        dtypes: that the kernel takes. fp64 is not among them: it is summed in fp64, by PyTorch.
    """
    device = tensors[0].device
    fit = all(t.device == device and t.dtype in dtypes and t.is_contiguous() for t in tensors)
    return device.type == "cuda" and fit and _switched_on() and _runs_on(device)


def _switched_on() -> bool:
    # The interpreter reads host memory: an address on a device would end the process.
    interpreted = os.environ.get("TRITON_INTERPRET", "0") != "0"
    return os.environ.get("MERGE_CALLBACK_TRITON", "1") != "0" and not interpreted


@lru_cache
def _runs_on(device: torch.device) -> bool:
    """Tries one small merge: Triton may be missing, too old, without a C compiler, or the device too old."""
    if find_spec("triton") is None:
        return False
    try:
        from merge_callback.reduce import triton_kernels

        ones, out = torch.ones(1, device=device), torch.empty(1, device=device)
        triton_kernels.one_pass([ones], [1.0], out, [1.0], [1])
    except Exception as error:
        warnings.warn(
            f"Triton does not run on {device} ({error!r}); merges there take PyTorch's operations instead, "
            "which read the snapshots block by block",
            stacklevel=2,
        )
        return False
    return True
