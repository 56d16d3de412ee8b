"""Tensors that no snapshot can hold: their bytes mean something only to a class or format of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merge_callback.checks import matches_any
from merge_callback.snapshots.layout import DTYPE_NAMES

LOADING = "load a merge with model.load_state_dict({**model.state_dict(), **load_merge(path)})"
"""How a merge is loaded that lacks something of the model, into one that has it."""

_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class Unfit:
    """Why a tensor can't be in a snapshot, and whether it trains."""

    reason: str
    trains: bool


def why_unfit(tensor: Tensor) -> str:
    """Why no snapshot can hold a live tensor; empty if one can.

    A subclass of ``Tensor`` or ``Parameter`` that only adds attributes or methods is like any other, and so
    is a DTensor whose local part is.
    """
    kind = type(tensor)
    if kind in _PLAIN and tensor.dtype in DTYPE_NAMES and _is_dense(tensor) and not tensor.is_complex():
        return ""  # most are, and there may be 20,000
    if kind.__name__ == "DTensor" and hasattr(tensor, "to_local"):
        return why_unfit(tensor._local_tensor)  # type: ignore[attr-defined]
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype})"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}"
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is of the class {kind.__name__}, which alone can read its values"
    if kind not in _PLAIN and isinstance(tensor, nn.Parameter) and _holds_codes(tensor):
        codes = f"{tensor.dtype} codes mean nothing without what it has beside them"
        return f"is of the class {kind.__name__}, whose {codes}"
    if tensor.is_complex():
        if tensor.is_conj():
            return "is lazily conjugated"
        return "" if tensor.dtype == torch.complex64 else _other_dtype(tensor)
    return "" if tensor.dtype in DTYPE_NAMES else _other_dtype(tensor)


def check_unfit(unfit: Mapping[str, Unfit], exclude: Sequence[str]) -> str:
    """Makes sure that what can't be in a snapshot may be left out: it is excluded, and does not train.

    Returns:
        One line that says what is left out; empty if nothing is.

    Raises:
        ValueError: if one may not; the tensors are named, and what to do.
    """
    training = [name for name, found in unfit.items() if found.trains]
    asked = [name for name in unfit if not matches_any(name, exclude)]
    left_out = f"leave out what does not train with exclude={_patterns(asked)}"
    remedies = (
        (training, "it trains, so it can't be left out: train a plain, dense tensor instead"),
        (asked, f"{left_out}, or register it with persistent=False"),
    )
    for names, remedy in remedies:
        if names:
            reason = f"tensor {_told(names)} {unfit[names[0]].reason}, which snapshots can't hold"
            raise ValueError(f"{reason}; {remedy}")
    if not unfit:
        return ""
    names = list(unfit)
    return (
        f"merge: no snapshot or merge has the excluded {_told(names)}: it {unfit[names[0]].reason}; {LOADING}"
    )


def is_plain_array(tensor: Tensor) -> bool:
    """Whether a tensor can be copied and written to like any other, whatever its dtype."""
    return type(tensor) in _PLAIN and _is_dense(tensor) and not tensor.is_quantized


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _holds_codes(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _other_dtype(tensor: Tensor) -> str:
    wider = torch.complex64 if tensor.is_complex() else torch.float32
    known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
    return f"has dtype {tensor.dtype} (known are {known}; keep it as {wider})"


def _told(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _patterns(names: Sequence[str]) -> list[str]:
    """Patterns that match these names; few, if they differ by numbers only."""
    return list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in name.split(".")) for name in names))
