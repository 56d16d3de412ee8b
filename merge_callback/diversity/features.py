"""Runs a model on a probe batch, and takes its logits and the activations of its layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merge_callback.diversity.functional import Features
from merge_callback.sharding.live import as_real

_MOST = 4096  # elements of a feature map that count, and positions times classes of logits that are a map
_MOST_ROWS = 64


@dataclass(frozen=True)
class Call:
    """The arguments of a module's ``forward``, made of a batch.

    Args:
        args: positional ones.
        kwargs: by name.
        mask: the batch's ``attention_mask``, ``(sequences, tokens)``, if it has one.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, batch: Any) -> Call:
        """Finds out how ``module`` takes a batch.

        A mapping is passed by the names of its entries that ``forward`` takes; of a tuple or list, as many of
        the first items as ``forward`` requires (one of ``(inputs, labels)``); everything else is its only
        argument. So is any batch if the only argument that is required is called ``batch``.
        """
        required, named, takes_any = _parameters(getattr(module, "_orig_mod", module))
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if required != ["batch"]:
            if isinstance(batch, Mapping):
                kwargs = {key: value for key, value in batch.items() if takes_any or key in named}
                if kwargs and kwargs.keys() >= {*required}:
                    return cls((), kwargs, mask)
            elif isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
                return cls(tuple(batch[: max(1, len(required))]), {}, None)
        return cls((batch,), {}, mask)

    def moved(self, device: torch.device | str) -> Call:
        """A copy on a device, which a forward pass may write to."""
        copied: Call = each_tensor(partial(_copied_to, device), self)
        return copied


def layers_of(parts: Mapping[str, nn.Module], patterns: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The layers whose activations are compared.

    By default the blocks of the stack that holds the most parameters: of a ``ModuleList``, or of a
    ``Sequential`` whose parts are all of one class, that lies in no other. Without such a stack, the parts of
    the model that hold parameters.

    Args:
        parts: all modules of the model by name; ``""`` is the model.
        patterns: ``fnmatch`` patterns of names.

    Raises:
        ValueError: if a pattern matches no module.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parts):
            raise ValueError(
                f"layers={list(patterns)!r}: {pattern!r} matches no module of this model; names look like "
                f"{[name for name in parts if name][-1:]}"
            )
    if patterns:
        return {name: part for name, part in parts.items() if any(fnmatchcase(name, p) for p in patterns)}
    stacks = {name: part for name, part in parts.items() if name and _is_stack(part)}
    outermost = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    name = max(outermost, key=lambda name: _numel(stacks[name]), default="")
    children = _children(parts, name)
    while not outermost and len(children) == 1:
        (name,) = children
        children = _children(parts, name)
    return children or {name: parts[name]}


@torch.no_grad()
def features_of(call: Callable[..., Any], arguments: Call, layers: Mapping[str, nn.Module]) -> Features:
    """Calls a model once, and takes its logits and the outputs of its layers.

    Of a tensor of three dimensions (sequences, tokens, features) that is the final token of each sequence:
    the last one that the attention mask does not hide. Of logits with more dimensions it is the classes
    (dimension 1) at evenly spread positions, of other activations evenly spread elements.

    Args:
        call: the model; in evaluation mode.
        arguments: on its device.
        layers: modules of the model. One that is not called has no activations; of one that is called several
            times it is the last.

    Raises:
        TypeError: if the model returns no floating-point tensor.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if (tensor := next(_floats(output), None)) is not None:
            found[name] = _activations(tensor, arguments.mask)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(partial(keep, name)))
        logits = _logits(call(*arguments.args, **arguments.kwargs))
    return Features(
        _positions(logits, arguments.mask), {name: found[name] for name in layers if name in found}
    )


def each_tensor(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A value with ``function`` applied to the tensors in its containers; mappings become dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Call):
        return Call(*(each_tensor(function, part) for part in (value.args, value.kwargs, value.mask)))
    if isinstance(value, Mapping):
        return {key: each_tensor(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [each_tensor(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _copied_to(device: torch.device | str, tensor: Tensor) -> Tensor:
    return tensor.detach().to(device, copy=True)


def _parameters(module: nn.Module) -> tuple[list[str], set[str], bool]:
    """The names that ``forward`` requires, all that it takes, and whether it takes any."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code
        return [], set(), True
    kinds = inspect.Parameter
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)]
    required = [p.name for p in positional if p.default is kinds.empty]
    return required, {p.name for p in named}, any(p.kind is kinds.VAR_KEYWORD for p in parameters)


def _is_stack(part: nn.Module) -> bool:
    kinds = {type(child) for child in part.children()}
    if isinstance(part, nn.Sequential):
        return len(part) > 1 and len(kinds) == 1
    return isinstance(part, nn.ModuleList) and len(part) > 0


def _children(parts: Mapping[str, nn.Module], name: str) -> dict[str, nn.Module]:
    """The direct parts of a module that hold parameters."""
    depth, start = name.count(".") + 1 if name else 0, f"{name}." if name else ""
    return {
        other: part
        for other, part in parts.items()
        if other
        and other.startswith(start)
        and other.count(".") == depth
        and any(True for _ in part.parameters())
    }


def _numel(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _floats(output: Any) -> Iterator[Tensor]:
    """The floating-point or complex tensors in a module's output, in their order."""
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
    elif isinstance(output, Mapping):
        yield from _floats(list(output.values()))
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _floats(item)


def _logits(output: Any) -> Tensor:
    """A model's logits: what it calls so, or else the largest tensor that it returns."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = [named] if isinstance(named, Tensor) else [*_floats(output)]
    if not found:
        raise TypeError(
            f"the model returns a {type(output).__name__} without floating-point tensors, not logits"
        )
    return max(found, key=Tensor.numel)


def _positions(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits as ``(sequences, positions, classes)``."""
    logits = _whole(logits)
    if logits.ndim == 3:
        logits = _final_token(logits, mask)
    elif logits.ndim > 3:
        maps = logits.movedim(1, -1).flatten(1, -2)
        return _kept(maps[:, :: _step(maps.shape[1], max(1, _MOST // maps.shape[2]))])
    return _kept(logits.reshape(len(logits) if logits.ndim else 1, 1, -1))


def _activations(tensor: Tensor, mask: Tensor | None) -> Tensor:
    tensor = _whole(tensor)
    if tensor.ndim == 3:
        return _kept(_final_token(tensor, mask))
    rows = tensor.reshape(len(tensor) if tensor.ndim else 1, -1)
    return _kept(rows[:: _step(len(rows), _MOST_ROWS), :: _step(rows.shape[1], _MOST)])


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that several ranks may hold; they all ask."""
    return as_real(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def _final_token(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """``(sequences, features)``: the last of the tokens, or the last that the mask does not hide."""
    if mask is None or mask.shape != tensor.shape[:2]:
        return tensor[:, -1]
    last = (mask.ne(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    return tensor[torch.arange(len(tensor), device=tensor.device), last.to(tensor.device)]


def _step(count: int, most: int) -> int:
    """The step at which at most so many of ``count`` are met, evenly spread."""
    return max(1, math.ceil(count / most))


def _kept(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True)
