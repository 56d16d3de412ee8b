"""The file of one task's examples: how hard they are, and what models said about them.

A safetensors file with these tensors, of which either ``scores`` or ``seeds`` and ``labels`` must be there:

- ``scores``: ``(examples,)``, EL2N, higher is harder.
- ``seeds``: ``(seeds, examples, classes)``, the logits of models early in fine-tuning, one for each seed.
- ``labels``: ``(examples,)`` int64.
- ``expert``, ``merged``, ``early``: ``(examples, classes)``, the logits of the expert at its end, of its
  merge, and of an early checkpoint of it.
- ``ids``: ``(examples,)`` int64, by which the output names the examples (default: 0, 1, …).

Logarithms of probabilities serve as logits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.analysis.difficulty import (
    Memorisation,
    Scores,
    by_bin,
    difficulty_bins,
    el2n,
    forgotten,
    memorisation,
)
from merge_callback.snapshots.files import replacing
from merge_callback.snapshots.mapped_tensors import map_safetensors
from merge_callback.snapshots.safetensors_file import tensors_header, write_file

_LOGITS = ("expert", "merged", "early")
_KNOWN = ("scores", "seeds", "labels", "ids", *_LOGITS)


@dataclass(frozen=True)
class Examples:
    """One task's examples, all in the same order.

    Args:
        ids: ``(examples,)`` int64.
        scores: ``(examples,)`` fp32, higher is harder.
        labels: ``(examples,)`` int64, or ``None`` if there are no logits either.
        logits: ``(examples, classes)`` of those of ``expert``, ``merged`` and ``early`` that are known.
    """

    ids: Tensor
    scores: Tensor
    labels: Tensor | None
    logits: Mapping[str, Tensor]

    @property
    def bins(self) -> Tensor:
        """The bin of each example, from 1 (the easiest) to 10."""
        return difficulty_bins(self.scores)

    @property
    def forgotten(self) -> Tensor | None:
        """Whether the expert has each example right and the merge has it wrong, if both are known."""
        if self.labels is None or not {"expert", "merged"} <= self.logits.keys():
            return None
        return forgotten(self.logits["expert"], self.logits["merged"], self.labels)

    @property
    def memorisation(self) -> Memorisation | None:
        """What training changed between the early checkpoint and the expert, if both are known."""
        if self.labels is None or not {"expert", "early"} <= self.logits.keys():
            return None
        return memorisation(self.logits["early"], self.logits["expert"], self.labels)

    def by_example(self) -> dict[str, Tensor]:
        """All measures of each example that can be told, ``(examples,)`` each."""
        found = {"el2n": self.scores}
        for name in ("expert", "merged"):
            if self.labels is not None and name in self.logits:
                found[f"{name}_right"] = self.logits[name].argmax(-1) == self.labels
        if (lost := self.forgotten) is not None:
            found["forgotten"] = lost
        if (change := self.memorisation) is not None:
            found |= change._asdict()
        return found

    def by_bin(self) -> dict[str, Tensor]:
        """The mean of each measure over each of the ten bins, ``(10,)`` fp64 each."""
        bins = self.bins
        return {name: by_bin(values, bins) for name, values in self.by_example().items()}


def save_examples(
    path: str | os.PathLike[str],
    scores: Scores,
    ids: Tensor,
    labels: Tensor,
    *,
    expert: Tensor | None = None,
    merged: Tensor | None = None,
    early: Tensor | None = None,
) -> None:
    """Writes the scores of `El2n`, and what models said, to a file that ``merge-callback difficulty`` reads.

    Args:
        path: a safetensors file; is replaced if it is there.
        scores: what ``El2n.compute()`` returned.
        ids: ``(rows,)`` int64, which example each row of the following is of; each id at most once.
        labels: ``(rows,)`` int64.
        expert: logits of the expert at its end, ``(rows, classes)``.
        merged: of its merge.
        early: of an early checkpoint of it.

    Raises:
        ValueError: if an example that has a score has no row, or two, or a shape or a label does not fit.
        OSError: if the file can't be written.
    """
    given = {"expert": expert, "merged": merged, "early": early}
    order = ids.cpu().argsort(stable=True)
    known = ids.cpu()[order]
    place = torch.searchsorted(known, scores.ids.cpu()).clamp(max=max(len(known) - 1, 0))
    if not len(known) or not torch.equal(known[place], scores.ids.cpu()):
        raise ValueError("ids: an example that has a score has no row")
    if bool((known[1:] == known[:-1]).any()):
        raise ValueError(f"ids: {int(known[1:][known[1:] == known[:-1]][0])} occurs twice")
    rows = order[place]
    tensors = {"ids": scores.ids, "scores": scores.scores, "labels": labels}
    tensors |= {name: logits for name, logits in given.items() if logits is not None}
    for name in tensors.keys() - {"ids", "scores"}:
        if len(tensors[name]) != len(ids):
            raise ValueError(f"{name}: has {len(tensors[name])} rows, and there are {len(ids)} ids")
        tensors[name] = tensors[name][rows.to(tensors[name].device)]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _checked(tensors)
    with replacing(Path(path)) as made:
        write_file(made, tensors_header(tensors), tensors.values(), {})


def read_examples(path: Path) -> Examples:
    """Reads such a file.

    Raises:
        ValueError: if it is no such file; says what does not fit.
        OSError: if it can't be read.
    """
    try:
        return _checked(map_safetensors(path)[0])
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _checked(tensors: Mapping[str, Tensor]) -> Examples:
    """The examples that tensors tell of.

    Raises:
        ValueError: if they don't fit each other.
    """
    if strange := tensors.keys() - {*_KNOWN}:
        raise ValueError(f"{min(strange)!r} is not one of {', '.join(_KNOWN)}")
    labels, seeds = tensors.get("labels"), tensors.get("seeds")
    logits = {name: tensors[name] for name in _LOGITS if name in tensors}
    if "scores" not in tensors and (seeds is None or labels is None):
        raise ValueError("holds no scores, nor seeds and labels to compute them from")
    if logits and labels is None:
        raise ValueError(f"holds {min(logits)}, but no labels")
    known = tensors["scores"] if labels is None else labels
    count = known.numel()
    shapes: dict[str, tuple[int | None, ...]] = dict.fromkeys(_LOGITS, (count, None))
    shapes |= {"seeds": (None, count, None), **dict.fromkeys(("scores", "labels", "ids"), (count,))}
    for name, tensor in tensors.items():
        _check(name, tensor, shapes[name])
    for name in tensors.keys() - {"scores", "labels", "ids"} if labels is not None else ():
        classes = tensors[name].shape[-1]
        if classes < 2 or not 0 <= int(known.min()) <= int(known.max()) < classes:
            raise ValueError(f"labels: must lie in 0 … {classes - 1}, by the {classes} classes of {name}")
    scores = tensors.get("scores")
    if scores is None and seeds is not None and labels is not None:
        scores = torch.stack([el2n(each, labels) for each in seeds]).mean(0)
    assert scores is not None  # checked above
    difficulty_bins(scores)
    return Examples(tensors.get("ids", torch.arange(count)), scores.float(), labels, logits)


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    fits = tensor.dim() == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits or 0 in tensor.shape:
        told = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: is {list(tensor.shape)}, expected [{told}]")
    is_whole = name in ("labels", "ids")
    if tensor.dtype != torch.int64 if is_whole else not tensor.is_floating_point():
        raise ValueError(f"{name}: is {tensor.dtype}, expected {'int64' if is_whole else 'floating point'}")
    if not is_whole and bool((tensor.isnan() | tensor.isposinf()).any()):
        raise ValueError(f"{name}: holds NaN or Inf")
