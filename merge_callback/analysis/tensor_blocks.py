"""Reads tensors of several checkpoints side by side, in blocks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from merge_callback.sharding.live import as_real

BLOCK = 1 << 16
"""Elements of each checkpoint read at once: in fp64, ten checkpoints take 5 MiB."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread in this context; also a decorator.

    Blocks this small gain nothing from a second thread, and if another process occupies its core, every block
    waits for it: on a busy two-core machine ten checkpoints took 16 s instead of 1.5 s.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_reals(checkpoints: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The tensors of checkpoints; complex numbers as pairs of real ones."""
    return [{name: as_real(tensor) for name, tensor in checkpoint.items()} for checkpoint in checkpoints]


def shared_names(checkpoints: Sequence[Mapping[str, Tensor]], labels: Sequence[object]) -> list[str]:
    """The names of the floating-point tensors, in the first checkpoint's order; shapes must be the same.

    Args:
        checkpoints: tensors by name.
        labels: names of the checkpoints in errors.

    Raises:
        ValueError: for a tensor that a checkpoint lacks or has in another shape or kind of dtype, or if
            there is no floating-point tensor at all. The tensor and the checkpoint are named.
    """
    first = checkpoints[0]
    for other, label in zip(checkpoints[1:], labels[1:], strict=True):
        for name in sorted(first.keys() ^ other.keys()):
            having, lacking = (labels[0], label) if name in first else (label, labels[0])
            raise ValueError(
                f"tensor {name!r} is in {having} but not in {lacking}; compare checkpoints of one model only"
            )
        for name, tensor in first.items():
            _check_alike(f"tensor {name!r}", (tensor, labels[0]), (other[name], label))
    names = [name for name, tensor in first.items() if tensor.is_floating_point()]
    if not names:
        raise ValueError("the checkpoints have no floating-point tensor to compare")
    return names


def side_by_side(
    tensors: Sequence[Tensor], block: int = BLOCK, begin: int = 0, end: int | None = None
) -> Iterator[Tensor]:
    """Reads one tensor of every checkpoint, ``block`` elements at a time.

    fp64 costs no time here (the blocks stay in cache) and makes every difference of fp32 numbers exact to
    2^-53, so that sums depend only on the checkpoints.

    Args:
        tensors: N tensors of one shape, any floating-point dtypes, contiguous or not.
        block: elements per block; bounds the memory used.
        begin: the first element to read.
        end: one past the last element to read; default: the tensor's size.

    Yields:
        fp64 ``(N, ≤ block)`` in row-major order of the elements. The next block overwrites it.
    """
    end = tensors[0].numel() if end is None else end
    buffer = torch.empty(len(tensors), min(end - begin, block), dtype=torch.float64)
    for start in range(begin, end, block):
        stop = min(start + block, end)
        piece = buffer[:, : stop - start]
        for row, tensor in zip(piece, tensors, strict=True):
            row.copy_(_slice(tensor.detach(), start, stop))
        yield piece


def _slice(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``start`` … ``stop`` in row-major order."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    # reshape(-1) would copy all of it: a checkpoint may hold a transposed tensor of any size.
    return tensor.take(torch.arange(start, stop))


def _check_alike(what: str, first: tuple[Tensor, object], other: tuple[Tensor, object]) -> None:
    (a, in_first), (b, in_other) = first, other
    if a.shape != b.shape:
        raise ValueError(
            f"{what}: shape {tuple(a.shape)} in {in_first}, but {tuple(b.shape)} in {in_other}; compare "
            "checkpoints of one model only"
        )
    if a.is_floating_point() != b.is_floating_point():
        raise ValueError(f"{what} is {a.dtype} in {in_first}, but {b.dtype} in {in_other}")
