"""Methods on task vectors: what each snapshot adds to an initial model.

θ_init is the oldest snapshot and the task vectors are ``τ_i = θ_i − θ_1``, i = 2 … N; or θ_init is another
model (``base``), and there is a τ_i for each snapshot.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from merge_callback.merging.method import Inputs, LinearMethod, Need, Trajectory, register_method
from merge_callback.reduce import accumulator_dtype, one_pass, ranges

_DEVICE_BLOCK = 1 << 22  # on other devices launches are expensive and memory is fast

_HELD = 1 << 22  # largest θ_init that is held widened, in elements: 16 MiB


@register_method(
    "task_arithmetic", reference="Practical Guidelines (ACL 2026), section 3.3; [LIM] section 2.1"
)
@dataclass(frozen=True)
class TaskArithmetic(LinearMethod):
    """``θ_init + λ Σ w_i τ_i``; a weighted sum. By default the mean of θ_2 … θ_N.

    Args:
        scale: λ.
        normalize: ``w_i = 1/(number of task vectors)``; ``False``: 1, the plain sum, which overshoots on the
            snapshots of one run.

    Raises:
        ValueError: for a ``scale`` that is not finite.
    """

    needs: ClassVar[tuple[Need, ...]] = ("task vectors",)

    scale: float = 1.0
    normalize: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"task_arithmetic: scale={self.scale} must be a finite number")
        if not self.normalize:
            warn_of_plain_sum("task_arithmetic")

    def raw_weights(self, positions: Sequence[float]) -> list[float]:
        """The weights of the snapshots; the first one is θ_init."""
        return self._weights(len(positions) - 1)

    def task_vector_weights(self, positions: Sequence[float]) -> list[float]:
        """λ w_i of every snapshot."""
        return self._weights(len(positions))[1:]

    def merge(self, inputs: Inputs, out: Tensor, trajectory: Trajectory, survey: Any = None) -> None:
        """The weighted sum, including the base if one is given."""
        if inputs.base is None:
            return super().merge(inputs, out, trajectory)
        one_pass([inputs.base, *inputs.tensors], self._weights(len(inputs.tensors)), out)

    def _weights(self, count: int) -> list[float]:
        """The weights of θ_init and ``count`` snapshots."""
        each = self.scale / count if self.normalize and count else self.scale
        return [1.0 - count * each, *[each] * count]


class TaskVectors:
    """The task vectors of one tensor, formed block by block; none is ever held as a whole.

    Args:
        inputs: the tensor of every snapshot, and of the base if there is one.
        hold: whether to widen θ_init once, if it is small; else it is widened block by block in every pass.
    """

    def __init__(self, inputs: Inputs, hold: bool = False) -> None:
        own = inputs.base is None
        self.initial = inputs.tensors[0] if inputs.base is None else inputs.base
        self.others = inputs.tensors[1:] if own else inputs.tensors
        self.size, self.device = self.initial.numel(), self.initial.device
        self.dtype = accumulator_dtype(inputs.tensors[0])
        if hold and self.size <= _HELD:
            self.initial = self.initial.to(self.dtype)
        self._own = own
        self.shard, self.whole_size = inputs.shard, inputs.whole_size
        block = (2 if torch.get_num_threads() == 1 else 1) * ranges.BLOCK
        self._block = block if self.device.type == "cpu" else _DEVICE_BLOCK

    def __len__(self) -> int:
        return len(self.others)

    def steps(self, trajectory: Trajectory) -> Sequence[int]:
        """The steps of the snapshots that have a task vector."""
        return trajectory.steps[1:] if self._own else trajectory.steps

    def scratch(self, size: int | None = None) -> Tensor:
        """A buffer for one block, or less, in the dtype of the computation."""
        room = min(self._block, self.size if size is None else size)
        return torch.empty(room, dtype=self.dtype, device=self.device)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The bounds of the blocks of the elements ``start`` to ``stop``."""
        return ((begin, min(begin + self._block, stop)) for begin in range(start, stop, self._block))

    def initial_block(self, begin: int, end: int, scratch: Tensor) -> Tensor:
        """θ_init from ``begin`` to ``end``, in the dtype of the computation; may use ``scratch``."""
        here = self.initial[begin:end]
        return here if here.dtype == self.dtype else scratch[: end - begin].copy_(here)

    def block(self, which: int, begin: int, end: int, initial: Tensor, scratch: Tensor) -> Tensor:
        """One task vector from ``begin`` to ``end``, in ``scratch``; ``initial`` is θ_init there."""
        theta, difference = self.others[which][begin:end], scratch[: end - begin]
        if theta.dtype == self.dtype:
            return torch.sub(theta, initial, out=difference)
        return difference.copy_(theta).sub_(initial)

    def blocks(self, which: int, start: int, stop: int) -> Iterator[Tensor]:
        """One task vector from ``start`` to ``stop``; a block is valid until the next, and may be changed."""
        initial, difference = self.scratch(stop - start), self.scratch(stop - start)
        for begin, end in self.spans(start, stop):
            yield self.block(which, begin, end, self.initial_block(begin, end, initial), difference)

    def sample(self, which: int, starts: range, length: int) -> Iterator[Tensor]:
        """``length`` elements of one task vector from each start on; of the last one what there is."""
        # On a CPU no more at once than PyTorch takes in the calling thread; see ``ranges.BLOCK``.
        few = max(1, ranges.BLOCK // length) if self.device.type == "cpu" else len(starts)
        for some in (starts[i : i + few] for i in range(0, len(starts), few)):
            theta, initial = (_runs(flat, some, length) for flat in (self.others[which], self.initial))
            yield theta.to(self.dtype).sub(initial.to(self.dtype))


def _runs(flat: Tensor, starts: range, length: int) -> Tensor:
    """Runs of elements, one after the other; two operations for any number of them."""
    if not isinstance(flat, Tensor):  # a `Decoded` is only read where it is sliced
        return torch.cat([flat[start : start + length] for start in starts])
    rest = flat[starts[-1] :][:length]
    if len(starts) == 1:
        return rest
    return torch.cat([flat[starts[0] : starts[-1]].unfold(0, length, starts.step).reshape(-1), rest])


def warn_of_plain_sum(name: str) -> None:
    """Warns; to be called from the ``__post_init__`` of a method with ``normalize=False``."""
    warnings.warn(
        f"{name}: the plain sum of one run's task vectors overshoots, because they overlap; "
        "use normalize=True, or a small scale",
        stacklevel=4,
    )
