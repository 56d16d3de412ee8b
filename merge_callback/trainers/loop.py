"""``CheckpointMerger``: merges checkpoints in a training loop of your own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from merge_callback.engine.candidates import Tried
from merge_callback.engine.merged_weights import merged_weights
from merge_callback.engine.metric_names import said_lower, sounds_lower
from merge_callback.engine.results import RunResults
from merge_callback.engine.session import MergeSession
from merge_callback.engine.validations import Scored, gains
from merge_callback.messages import info, warn
from merge_callback.metrics import GAIN, MERGED
from merge_callback.options import Options
from merge_callback.signals.host import report
from merge_callback.snapshots.live_merge import HalfRestoredError
from merge_callback.snapshots.merge import Merge
from merge_callback.trainers.loop_host import ComputeLoss, LoopHost

log = logging.getLogger(__name__)

_NOT_HERE = (
    "evaluate",
    "evaluate_with",
    "evaluate_batches",
    "base",
    "experts",
)  # options of loops that validate by themselves


class CheckpointMerger(RunResults):
    """Keeps a rolling window of weight snapshots in a plain training loop, merges them, and rescues the run.

    It does what ``CheckpointMergeCallback`` does under Lightning, and takes the same options. It works with
    plain PyTorch on one device, DDP, FSDP and ``fully_shard``, and with what Fabric's ``setup`` and
    Accelerate's ``prepare`` return. All ranks make one and call it at the same places.

    Example::

        with CheckpointMerger(model, optimizer, every_n_steps=1000, total_steps=100_000) as merger:
            for batch in data:
                loss = model(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                merger.step(loss=loss, tokens=batch.numel())

    Args:
        model: as the loop calls it: wrapped, moved to its device, and with its weights loaded.
        optimizer: that trains it, or several. A ``torch.optim.Optimizer``, which may be wrapped.
        total_steps: optimizer steps of the whole run, if it has an end: the plan and the phase of the
            learning rate are then known better.
        log: takes ``(metrics, step)`` on the first rank: ``fabric.log_dict``, ``accelerator.log``,
            ``wandb.log``; or a TensorBoard ``SummaryWriter``. The newest values are in ``metrics`` anyway.
        compute_loss: gives the training loss of a batch that ``step`` was told of. With it, weights are
            tried on the very batch that raised an alarm before a run is restored; without, the losses alone
            decide.
        scaler: of fp16 training.
        log_every: optimizer steps between the logs of what is known of spikes.
        **options: those of ``CheckpointMergeCallback``, except for those about validations. The
            default ``dirpath`` is ``merges`` in the current folder.

    Attributes:
        metrics: the newest value of everything that is logged.
        should_stop: whether ``spike.on_spike`` has asked to end the run.

    ``window``, ``latest``, ``best``, ``history`` and ``merge()`` show what there is, while the run goes on
    and afterwards.

    Raises:
        TypeError: for a name that is not an option's.
        ValueError: for an option that makes no sense, here or at the first optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        total_steps: int | None = None,
        log: Any = None,
        compute_loss: ComputeLoss | None = None,
        scaler: GradScaler | None = None,
        log_every: int = 50,
        **options: Any,
    ) -> None:
        for name in _NOT_HERE:
            if name in options:
                raise TypeError(f"{name!r} is for trainers that validate; here use merged_weights()")
        self.options = Options.resolve(**options)
        if self.options.probe and self.options.probe.is_validation:
            raise ValueError(f"probe={options['probe']!r}: the loop's validation is its own; pass a batch")
        self._host = LoopHost(model, optimizer, total_steps, log, compute_loss, scaler, log_every)
        self._session: MergeSession | None = None
        self._state: dict[str, Any] = {}
        self._is_begun = self._is_swapped = False
        self._has_stepped = False  # whether an optimizer was seen to step since the last call of ``step``
        self._told: set[str] = set()
        self._shown: dict[str, Merge] = {}  # the merges that were validated since the last step
        self._handles = [o.register_step_pre_hook(self._before_step) for o in self._host.optimizers]

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of everything that is logged."""
        return self._host.metrics

    @property
    def should_stop(self) -> bool:
        """Whether ``spike.on_spike`` has asked to end the run."""
        return self._host.should_stop

    def step(
        self,
        loss: Tensor | float | None = None,
        tokens: int | Tensor | None = None,
        *,
        batch: Any = None,
        grad_norm: Tensor | float | None = None,
        scalars: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Ends an optimizer step: to be called after each ``optimizer.step()``, on all ranks.

        Nothing waits for a device here: what is a tensor is read one step later.

        Args:
            loss: mean training loss of this rank's batches of the step; not divided for accumulation.
            tokens: in these batches; default: those of ``batch``, if they can be counted.
            batch: that the step was taken with, for ``compute_loss``.
            grad_norm: global 2-norm of the gradients before clipping, as ``clip_grad_norm_`` returns it. By
                default it is computed from the gradients as the optimizer sees them.
            scalars: further numbers, for ``spike.watch``.

        Raises:
            RuntimeError: within ``merged_weights``.
            ValueError: at the first step, if an option does not fit the model, or tokens can't be counted.
            TrainingDivergedError: if the run is to stop after a spike.
        """
        self._refuse_within_merge("step()")
        if (session := self._begin()) is None:
            return
        if session.progress.clock.countable is None and batch is None and tokens is None:
            if self.options.unit == "tokens":
                raise ValueError(
                    f"every_n_tokens={self.options.every} needs step(tokens=…), or step(batch=…) to count "
                    "them; or give the interval in steps with every_n_steps="
                )
            session.progress.clock.countable = False
        if not self._has_stepped:  # it is stepped in some other way, such as in hooks of the backward pass
            for optimizer in self._host.optimizers:
                session.note_step(optimizer)
        self._has_stepped, self._shown = False, {}
        self._host.steps_taken += 1
        self._host.scalars = dict(scalars or {})
        session.begin_batch(batch, self._host.steps_taken - 1, tokens)
        if grad_norm is not None and self.options.spike.grad_norm:
            session.progress.statistics.set_gradient_norm(grad_norm)
        if session.end_batch(loss, 1, batch, tokens):
            self._session = session = session.follow_model()
            if session is not None:
                session.take_snapshot()

    @property
    def candidates(self) -> list[str]:
        """The names of the merges to validate: by ``method``, and by ``candidates``; empty without a merge.

        Example::

            scores = {}
            for name in merger.candidates:
                with merger.merged_weights(name):
                    scores[name] = validate(model)
            merger.log_validation(validate(model), candidates=scores)
        """
        if self._session is None or not (default := self._session.merger.default):
            return []
        return [default, *self._session.pipeline.candidates.names]

    @contextmanager
    def merged_weights(self, name: str | None = None) -> Iterator[Merge | None]:
        """Within, the model has the merged weights: for a validation, say. All ranks enter together.

        Afterwards the live weights, the buffers and the random generators are as they were, bit for bit.

        Args:
            name: of one of the ``candidates``; by default it is the merge by ``method``.

        Yields:
            The merge: its ``step``, ``phase`` and the ``weights`` of its snapshots. ``None`` while there is
            nothing to merge: then the model keeps its weights.

        Raises:
            ValueError: for a name that no candidate has.
        """
        merge = None
        if self._session:
            merge = self._session.candidate(name) if name else self._session.current_merge()
        if merge is None or self._session is None:
            yield None
            return
        self._is_swapped, self._shown[merge.name] = True, merge
        try:
            with merged_weights(self._host, merge.arena, self._session.sharding):
                yield merge
        finally:
            self._is_swapped = False

    def log_validation(
        self,
        live: Mapping[str, Any],
        merged: Mapping[str, Any] | None = None,
        *,
        candidates: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Logs what a validation has found: ``merged/<name>``, and ``merge_gain/<name>``.

        A gain is positive if the merge is better, whichever way the metric improves: ``lower_is_better`` and
        ``higher_is_better`` tell, or a name that is a standard term. Of several candidates the best one is
        ``merged/<name>``, and is published; the others are ``merged/<candidate>/<name>``. All ranks call it.

        Args:
            live: what the live weights score, by name.
            merged: what the merged weights score.
            candidates: in place of that, what each of the ``candidates`` scores, by its name.
        """
        if candidates and self._session is not None:
            if unknown := sorted(candidates.keys() - self._shown.keys()):
                warn(
                    f"merge: log_validation() leaves out the scores of {', '.join(unknown)}: since the last "
                    f"step, merged_weights() has shown {', '.join(self._shown) or 'no merge'}"
                )
            if known := {name: candidates[name] for name in candidates if name in self._shown}:
                self._compare(self._session, live, known)
                return
        found = {name: float(value) for name, value in (merged or {}).items()}
        lower = self._lower_is_better(found)
        values = {f"{MERGED}{name}": value for name, value in found.items()}
        shown = next(reversed(self._shown.values()), None)
        if self._session is None or shown is None:
            report(self._host, values | gains(live, found, lower))
            return
        newest = shown.snapshots[-1]
        self._session.note_validation(live, Scored(found, values, lower, newest.step, newest))

    def _compare(
        self, session: MergeSession, live: Mapping[str, Any], candidates: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Logs what several merges score, and chooses the best."""
        tried = {n: Tried.of(self._shown[n], candidates[n]) for n in self.candidates if n in candidates}
        newest = self._shown[next(iter(tried))].snapshots[-1]
        lower = self._lower_is_better(next(iter(candidates.values())))
        found = session.pipeline.candidates.judge(newest.step, tried, live, live, lower, newest.phase)
        shown, numbers = found.logged(lambda name, metric: f"{MERGED}{name}/{metric}")
        shown |= {f"{MERGED}{name}": value for name, value in found.metrics.items()}
        session.note_validation(
            live, Scored(found.metrics, shown, lower, newest.step, newest, numbers, compared=found)
        )

    def _lower_is_better(self, names: Iterable[str]) -> dict[str, bool | None]:
        """Whether lower is better, by metric; says once of which that is not known, and the remedy."""
        options, lower = self.options, dict[str, bool | None]()
        for name in names:
            said = said_lower(name, options.lower_is_better, options.higher_is_better)
            lower[name] = sounds_lower(name) if said is None else said
            if lower[name] is None and name not in self._told:
                self._told.add(name)
                info(
                    f"merge: no {GAIN}{name} is logged: whether lower or higher is better is not known; "
                    f"say so with lower_is_better={[name]}, or with higher_is_better="
                )
        return lower

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as primitives; the snapshots stay in the window's files.

        To be saved with each of the run's checkpoints. All ranks call it, and the first one's is saved.

        Raises:
            HalfRestoredError: if a restore failed half way, so that the weights must not be saved.
        """
        self._refuse_within_merge("state_dict()")
        if self._session is None:
            return self._state
        if self._session.is_half_restored:
            raise HalfRestoredError("a restore failed half way; resume from an earlier checkpoint")
        return self._session.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``, with the model and optimizers of the same checkpoint.

        Raises:
            RuntimeError: after the first optimizer step.
        """
        if self._is_begun:
            raise RuntimeError("load_state_dict() has to come before the first optimizer step")
        self._state = dict(state)
        self._host.steps_taken = self._state.get("step", 0)

    def close(self) -> None:
        """Publishes the last merge, and gives the run's folder back. All ranks call it, at the end."""
        self._end(MergeSession.finish)

    def __enter__(self) -> CheckpointMerger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(MergeSession.finish if kind is None else MergeSession.close)

    def _end(self, end: Callable[[MergeSession], None]) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._session is not None:
            session, self._session = self._session, None
            end(session)
            self._state = session.state_dict()

    def _run(self) -> tuple[MergeSession | None, Mapping[str, Any]]:
        return self._session, self._state

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._refuse_within_merge("an optimizer step")
        self._has_stepped = True
        if session := self._begin():
            session.note_step(optimizer)

    def _refuse_within_merge(self, what: str) -> None:
        if self._is_swapped:
            raise RuntimeError(f"{what} within merged_weights(): the model holds a merge there")

    def _begin(self) -> MergeSession | None:
        """The session; it begins with the first optimizer step, when the model is what it will be."""
        if not self._is_begun:
            self._session = MergeSession.begin(self.options, self._host, self._state)
            self._is_begun = True
        return self._session
