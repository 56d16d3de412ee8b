"""Methods on task vectors: what each snapshot adds to an initial model.

θ_init is the oldest snapshot and the task vectors are ``τ_i = θ_i − θ_1``, i = 2 … N; or θ_init is another
model (``base``), and there is a τ_i for each snapshot.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from merge_callback.merging.method import Inputs, LinearMethod, Need, Trajectory, register_method
from merge_callback.reduce import accumulator_dtype, one_pass

BLOCK = 1 << 15
"""Elements worked on at once, on a CPU: a dozen fp32 blocks stay in the second-level cache. It is also the
most that PyTorch leaves to the calling thread (its grain size): a larger block would start its own team of
OpenMP threads, which wait for each other at every operation (on two shared cores: 1.8 times as long). Where
PyTorch has a single thread, twice as many are a tenth faster: Python is called half as often."""

_DEVICE_BLOCK = 1 << 22  # elsewhere: launches are dear, memory is fast

_THREADS = 4  # more would wait for Python between operations that take microseconds

_SHARE = 1 << 18  # elements below which starting a thread costs more than it saves

_HELD = 1 << 22  # elements of a θ_init that is kept widened: 16 MiB

T = TypeVar("T")


@register_method(
    "task_arithmetic", reference="Practical Guidelines (ACL 2026), section 3.3; [LIM] section 2.1"
)
@dataclass(frozen=True)
class TaskArithmetic(LinearMethod):
    """``θ_init + λ Σ w_i τ_i``; a weighted sum. By default the mean of θ_2 … θ_N.

    Args:
        scale: λ.
        normalize: ``w_i = 1/(number of task vectors)``; ``False``: 1, the plain sum, which on the snapshots
            of one run overshoots.

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
        """Those of the snapshots, the first of them being θ_init."""
        return self._weights(len(positions) - 1)

    def merge(self, inputs: Inputs, out: Tensor, trajectory: Trajectory, survey: Any = None) -> None:
        """The weighted sum, of the base as well where one is given."""
        if inputs.base is None:
            return super().merge(inputs, out, trajectory)
        one_pass([inputs.base, *inputs.tensors], self._weights(len(inputs.tensors)), out)

    def _weights(self, count: int) -> list[float]:
        """Of θ_init and ``count`` snapshots."""
        each = self.scale / count if self.normalize and count else self.scale
        return [1.0 - count * each, *[each] * count]


class TaskVectors:
    """The task vectors of one tensor, formed block by block: none is ever held whole.

    Args:
        inputs: the tensor of every snapshot, and of the base where there is one.
        hold: whether to widen θ_init once, if it is small; else that is done in every block of every pass.
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
        block = 2 * BLOCK if torch.get_num_threads() == 1 else BLOCK
        self._block = block if self.device.type == "cpu" else _DEVICE_BLOCK

    def __len__(self) -> int:
        return len(self.others)

    def steps(self, trajectory: Trajectory) -> Sequence[int]:
        """The steps of the snapshots that have a task vector."""
        return trajectory.steps[1:] if self._own else trajectory.steps

    def scratch(self, size: int | None = None) -> Tensor:
        """Room for one block, or less, in the dtype that is computed in."""
        room = min(self._block, self.size if size is None else size)
        return torch.empty(room, dtype=self.dtype, device=self.device)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where the blocks of the elements ``start`` to ``stop`` begin and end."""
        return ((begin, min(begin + self._block, stop)) for begin in range(start, stop, self._block))

    def initial_block(self, begin: int, end: int, scratch: Tensor) -> Tensor:
        """θ_init from ``begin`` to ``end``, in the dtype that is computed in; it may lie in ``scratch``."""
        here = self.initial[begin:end]
        return here if here.dtype == self.dtype else scratch[: end - begin].copy_(here)

    def block(self, which: int, begin: int, end: int, initial: Tensor, scratch: Tensor) -> Tensor:
        """One task vector from ``begin`` to ``end``, in ``scratch``; ``initial`` is θ_init there."""
        theta, difference = self.others[which][begin:end], scratch[: end - begin]
        if theta.dtype == self.dtype:
            return torch.sub(theta, initial, out=difference)
        return difference.copy_(theta).sub_(initial)

    def blocks(self, which: int, start: int, stop: int) -> Iterator[Tensor]:
        """One task vector from ``start`` to ``stop``; each block holds until the next, and may be changed."""
        initial, difference = self.scratch(stop - start), self.scratch(stop - start)
        for begin, end in self.spans(start, stop):
            yield self.block(which, begin, end, self.initial_block(begin, end, initial), difference)


def in_ranges(size: int, device: torch.device, job: Callable[[int, int], T]) -> list[T]:
    """Splits ``size`` elements into one range a thread and runs ``job(start, stop)`` on each of them.

    The threads are PyTorch's number at most; it is what it was before, for the caller and for all others. The
    split depends on it: what ``job`` returns or writes must not depend on where it begins.

    Returns:
        What each returned, in the order of the elements.
    """
    most = min(torch.get_num_threads(), _THREADS) if device.type == "cpu" else 1
    threads = max(1, min(most, size // _SHARE))
    share = math.ceil(size / threads / BLOCK) * BLOCK if threads > 1 else size
    inference = torch.is_inference_mode_enabled()  # this one and no_grad are the thread's own

    def run(start: int) -> T:
        with torch.inference_mode(inference), torch.no_grad():
            return job(start, min(start + share, size))

    if threads == 1:
        return [run(0)]
    with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
        return list(pool.map(run, range(0, size, share)))


def warn_of_plain_sum(name: str) -> None:
    """Called from the ``__post_init__`` of a method whose ``normalize`` is off."""
    warnings.warn(
        f"{name}: the plain sum of the task vectors of one run overshoots: they overlap; "
        "use normalize=True, or a small scale",
        stacklevel=4,
    )
