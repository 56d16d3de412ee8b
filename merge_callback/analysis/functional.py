"""Functional diversity of checkpoint files: how far what they compute on a probe batch lies apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merge_callback.diversity.features import Call, features_of, layers_of
from merge_callback.diversity.functional import Features, functional_distances
from merge_callback.sharding.live import local, overwrite
from merge_callback.snapshots.capture import ModelTensors, clean_name


def pairwise_functional(
    model: nn.Module,
    batch: Any,
    checkpoints: Sequence[Mapping[str, Tensor]],
    layers: Sequence[str] = (),
    labels: Sequence[object] | None = None,
) -> dict[str, Tensor]:
    """The functional distances of all pairs of checkpoints; each of them is loaded once.

    Args:
        model: takes the weights of each checkpoint in turn, on its own device; it is left in evaluation mode
            with the last one's.
        batch: on the same device: a tensor, a mapping by the names that ``forward`` takes, or a tuple whose
            first items it takes.
        checkpoints: N of them, oldest first: tensors by the model's names, or by these after a common prefix.
        layers: patterns of the layers whose activations are compared; default: see ``layers_of``.
        labels: names of the checkpoints in errors, e.g. their paths; default: ``checkpoint 1`` ….

    Returns:
        fp64 ``(N, N)``, symmetric and 0 on the diagonal, by ``"logits"``, ``"probabilities"`` (of a pair the
        divergence of the newer from the older) and ``"activations"``.

    Raises:
        ValueError: for a checkpoint that lacks a tensor of the model, or has it in another shape.
    """
    chosen = layers_of({clean_name(name): part for name, part in model.named_modules()}, layers)
    call, found = Call.of(model, batch), list[Features]()
    model.eval()
    for i, checkpoint in enumerate(checkpoints):
        _load(model, checkpoint, labels[i] if labels else f"checkpoint {i + 1}")
        found.append(features_of(model, call, chosen).cpu())
    count = len(found)
    matrices: dict[str, Tensor] = {}
    for i in range(count):
        for j in range(i):
            for name, value in functional_distances(found[j], found[i]).items():
                matrix = matrices.setdefault(name, torch.zeros(count, count, dtype=torch.float64))
                matrix[i, j] = matrix[j, i] = value
    return matrices


@torch.no_grad()
def _load(model: nn.Module, checkpoint: Mapping[str, Tensor], label: object) -> None:
    """Copies a checkpoint's weights into a model, cast to its dtypes."""
    live = ModelTensors.of(model)
    names = {name: [name, *(a for a, kept in live.tied.items() if kept == name)] for name in live.tensors}
    known = {clean_name(name): tensor for name, tensor in checkpoint.items()}
    prefix = _prefix(next(iter(names.values()), []), known)
    for name, tensor in live.tensors.items():
        kept = next((known[prefix + alias] for alias in names[name] if prefix + alias in known), None)
        if kept is None:
            raise ValueError(
                f"{label}: has no tensor {prefix + name!r} of the probe's "
                f"{type(model).__name__}; its names look like {next(iter(known), None)!r}"
            )
        kept = local(kept)
        if kept.shape != tensor.shape:
            raise ValueError(
                f"{label}: tensor {prefix + name!r} has the shape {tuple(kept.shape)}, the probe's "
                f"model expects {tuple(tensor.shape)}"
            )
        overwrite(tensor, kept)


def _prefix(aliases: Sequence[str], known: Mapping[str, Tensor]) -> str:
    """What a checkpoint puts before the model's names; empty if nothing, or if that is not known."""
    if any(alias in known for alias in aliases):
        return ""
    ends = (name.removesuffix(alias) for alias in aliases for name in known if name.endswith(f".{alias}"))
    return next(ends, "")
