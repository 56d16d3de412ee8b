"""What a checkpoint holds beside the weights: the state of optimizers, schedulers, generators, metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from merge_callback.checkpoints.checkpoint import Checkpoint

_OPTIMIZER = r"(\w+_)?optim(s|izers?)?(_states?)?(_state_dict)?(_\d+)?"
_CONTAINER = re.compile(
    rf"{_OPTIMIZER}|(lr_|opt_param_)?schedulers?(_state_dict)?(_\d+)?|trainer_state|train_state|loops|callbacks"
    r"|data_?loaders?|dataset_state|(grad_|loss_)?scaler|amp|(\w+_)?metrics|(\w+_)?rng(_\w+)?|param_groups"
)
"""Keys of nested state that hold no weights, whatever lies under them."""

_IN_OPTIMIZER = re.compile(
    rf"(.+\.)?{_OPTIMIZER}\.(\w+\.)?(state|param_groups|param_state|base_state|distributed|fp32_\w+|inner_state)"
    r"(\..+)?"
)
_GENERATOR = re.compile(r"(.+[./])?(\w+_)?rng(_\w+)?([./].+)?")
_MOMENTS = (
    r"(max_)?exp_avg(_sq|_slow|_fast|_diff|_inf|_res|_lr_\d)*(_row|_col)?|exp_inf|momentum_buffer|square_avg"
    r"|grad_avg|acc_delta|accumulator|sum_grad_sq|fp32_param|fp32_from_\w+|fp32_master\w*|master_(param|weight)s?"
    r"|main_params?|param_state"
)
_MOMENT = re.compile(_MOMENTS)
_MASTER = re.compile(r"optim|master|main|fp32|float32|state|param|grad|moment")
_COPIES = re.compile(r"(\w+_)?(ema|swa|avg|averaged?|average|teacher|target|momentum|student|shadow)(_\w+)?")
"""What a second model within a model is called: it is a part of it, to be merged as the first."""


def is_container(key: object) -> bool:
    """Whether a key of nested state is named like what a trainer keeps beside the weights."""
    return _CONTAINER.fullmatch(str(key).lower()) is not None


def training_state(names: Mapping[str, torch.dtype | None]) -> set[str]:
    """Those of flat names that tell, at any prefix, the state of an optimizer or of a generator.

    It takes more than one word to tell: a module may be called ``optimizer``. They are

    - what lies in the ``state`` or ``param_groups`` of an optimizer, or of another tensor here;
    - moments and master copies (``exp_avg``, ``fp32_param``, …) below an optimizer, or of a tensor here;
    - what an optimizer has of another tensor by its name (``optimizer.layer.weight``);
    - bytes below a generator's name (``rng_state``, ``rng.0.torch``).

    Args:
        names: of all tensors, with their dtypes.
    """
    suffixes = _suffixes(name for name in names if _moment(name) is None and not _optimizers(name))
    return {name for name, dtype in names.items() if _is_state(name, dtype, suffixes)}


def without_training_state(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of weights alone, if its names are flat.

    Raises:
        ValueError: if nothing is left, or ``check_no_repeats`` finds a copy.
    """
    state = training_state({name: tensor.dtype for name, tensor in checkpoint.tensors.items()})
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in state}
    if not kept:
        raise ValueError(f"{checkpoint.path}: {only_state(state)}")
    check_no_repeats(checkpoint.path, {name: tensor.shape for name, tensor in kept.items()})
    tied = {alias: name for alias, name in checkpoint.tied.items() if name in kept}
    return replace(checkpoint, tensors=kept, tied=tied, training_state=sorted(state))


def only_state(names: Iterable[str]) -> str:
    """What is wrong with a checkpoint that has nothing but such names."""
    shown = ", ".join(list(names)[:3])
    return f"holds only training state ({shown} …); give a checkpoint that has the model"


def check_no_repeats(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    """Makes sure that no prefix holds a second copy of all weights.

    A copy that a model keeps of itself, which is called so (``ema``, ``teacher``, …), is a part of it.

    Raises:
        ValueError: if one does.
    """
    sized = {name: shape for name, shape in shapes.items() if shape.numel() > 1}
    repeats: Counter[str] = Counter()
    for name, shape in sized.items():
        parts = name.split(".")
        for cut in range(1, len(parts)):
            repeats[".".join(parts[:cut])] += sized.get(".".join(parts[cut:])) == shape
    for prefix, count in repeats.items():
        under = sum(name.startswith(f"{prefix}.") for name in sized) if count else -1
        a_part = any(_COPIES.fullmatch(part) for part in prefix.lower().split("."))
        telling = count > 1 or _MASTER.search(prefix.lower())  # "0.weight" and "1.0.weight" are a network
        if count == under == len(sized) - under and telling and not a_part:
            raise ValueError(
                f"{path}: holds every weight twice, the second time under {prefix!r}, maybe as "
                f"an optimizer's copy; take that one with --state-key {prefix}, or save the weights alone"
            )


def _is_state(name: str, dtype: torch.dtype | None, suffixes: Collection[str]) -> bool:
    if _IN_OPTIMIZER.fullmatch(name):
        return True
    if _GENERATOR.fullmatch(name) and dtype in (torch.uint8, torch.int64):
        return True
    parts = name.split(".")
    states = [i for i, part in enumerate(parts) if part in ("state", "param_groups")]
    if any(".".join(parts[i + 1 : -1]) in suffixes for i in states):  # as torch flattens an optimizer's state
        return True
    below = _optimizers(name)
    if (at := _moment(name)) is not None:
        rest = parts[:at] + parts[at + 1 :]
        return bool(below) or any(".".join(rest[i:]) in suffixes for i in range(len(rest)))
    first = below[0] + 1 if below else len(parts)
    return any(".".join(parts[i:]) in suffixes for i in range(first, len(parts) - 1))


def _optimizers(name: str) -> list[int]:
    """Which parts of a name, but its last, are called like an optimizer."""
    return [i for i, part in enumerate(name.split(".")[:-1]) if re.fullmatch(_OPTIMIZER, part)]


def _moment(name: str) -> int | None:
    """Which part of a name is that of a moment, or of a master copy."""
    return next((i for i, part in enumerate(name.split(".")) if _MOMENT.fullmatch(part)), None)


def _suffixes(names: Iterable[str]) -> set[str]:
    """The names, and what is left of each without its first parts, of two parts or more."""
    found = set()
    for name in names:
        parts = name.split(".")
        found |= {name, *(".".join(parts[i:]) for i in range(1, len(parts) - 1))}
    return found
