"""The evaluation of a Hugging Face ``Trainer``, run again with the merged weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any

from transformers import Trainer

from merge_callback.engine.candidates import Scores
from merge_callback.engine.expert_merge import ExpertMerge
from merge_callback.engine.kept_state import kept_weights
from merge_callback.engine.merged_weights import merged_weights
from merge_callback.engine.metric_names import said_lower, sounds_lower
from merge_callback.engine.random_state import RandomState
from merge_callback.engine.session import MergeSession
from merge_callback.engine.validations import Scored
from merge_callback.messages import info
from merge_callback.metrics import GAIN, MERGED_EVAL
from merge_callback.options import Options
from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.live_merge import HalfRestoredError
from merge_callback.snapshots.merge import Merge
from merge_callback.trainers.transformers.host import Evaluated, TransformersHost

log = logging.getLogger(__name__)

_PARAMETERS = [*signature(Trainer.evaluation_loop).parameters][1:]


class MergedEvaluation:
    """Evaluates each merge once, and puts ``merged_eval_…`` beside ``eval_…``.

    Args:
        host: the training.
        options: of the merging.
    """

    def __init__(self, host: TransformersHost, options: Options) -> None:
        self._host, self._options = host, options
        self._found: dict[str, tuple[int, dict[str, float]]] = {}  # by prefix: the merge's step, its metrics
        self._failed: set[str] = set()
        self._told: set[str] = set()
        self._noted: dict[str, Any] = {}  # for ``History.add_validation``

    def run_live(self, present: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the trainer's ``evaluation_loop``, and notes it."""
        named = {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
        dataloader, prefix = named["dataloader"], named.get("metric_key_prefix", "eval")
        random = RandomState([dataloader])
        output = present(*args, **kwargs)

        def run(batches: int | None = None) -> Any:
            if batches is None:
                return present(*args, **kwargs)
            return present(**{**named, "dataloader": _First(dataloader, batches)})

        self._host.evaluated = Evaluated(run, dataloader, prefix, random, _measured(output.metrics))
        return output

    def update(self, session: MergeSession, metrics: dict[str, float]) -> None:
        """Adds what the merge scores to the metrics of the evaluation that has just ended.

        An evaluation of the merge that fails is reported; the run goes on. Afterwards there is a merged value
        of what the merge was evaluated for, and of nothing else. Until there is a merge, it is the model.

        Raises:
            HalfRestoredError: if the live weights could not be put back, on any rank.
        """
        merge = None if session.experts else session.current_merge()
        if (evaluated := self._host.evaluated) is None:
            return
        prefix = evaluated.prefix
        scored = None
        if session.experts:
            scored = self._evaluate_experts(session, session.experts, evaluated)
        elif merge is not None and merge.step != self._found.get(prefix, (-1, {}))[0]:
            seconds = -time.monotonic()
            if session.pipeline.candidates.names:
                scored = self._compare(session, merge, evaluated)
            elif (found := self._evaluate(merge.arena, session, evaluated)) is not None:
                scored = self._scored(found, prefix, merge.step)
            if scored is not None:
                scored = replace(scored, newest=merge.snapshots[-1], seconds=seconds + time.monotonic())
            else:
                self._found.pop(prefix, None)
                self._failed.add(prefix)
        if scored is not None:
            self._failed.discard(prefix)
            self._found[prefix] = scored.step, dict(scored.shown)
        session.note_validation(evaluated.metrics, scored)
        if prefix in self._found:
            metrics |= self._found[prefix][1]
        elif prefix not in self._failed:
            metrics |= {_merged(name): value for name, value in evaluated.metrics.items()}
        best = self._best
        if (live := _live(best, prefix)) in evaluated.metrics:  # a key that is missing would end the run
            metrics[best] = metrics.get(_merged(live), math.nan)

    def state_dict(self) -> dict[str, Any]:
        """The last merges that were evaluated and their metrics, as primitives."""
        return {prefix: [step, dict(metrics)] for prefix, (step, metrics) in self._found.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self._found = {prefix: (step, dict(metrics)) for prefix, (step, metrics) in state.items()}

    def _evaluate_experts(
        self, session: MergeSession, experts: ExpertMerge, evaluated: Evaluated
    ) -> Scored | None:
        """What the best merge of the live weights with finished experts scores; a failure is logged."""
        prefix, seconds = evaluated.prefix, -time.monotonic()
        lower = {name: self._lower_is_better(name, prefix) for name in evaluated.metrics}
        wanted = [_live(self._best, prefix) or self._best]
        try:
            evaluate = partial(self._evaluate, session=session, evaluated=evaluated)
            found = experts.validate(session.live(), evaluate, lower, wanted)
        except Exception as error:
            if isinstance(error, HalfRestoredError) or DeferredSignals.has_raised(error):
                raise
            log.exception("merge: the merge with the other experts failed; training goes on")
            self._found.pop(prefix, None)
            self._failed.add(prefix)
            return None
        if found is None:
            self._found.pop(prefix, None)
            self._failed.add(prefix)
            return None
        scored = self._scored(found[0], prefix, session.progress.step)
        return replace(scored, numbers=found[1], seconds=seconds + time.monotonic())

    def _compare(self, session: MergeSession, merge: Merge, evaluated: Evaluated) -> Scored | None:
        """What the best of a merge and the candidates scores, and what the others do."""

        def evaluate(merge: Merge | None, batches: int | None) -> dict[str, float] | None:
            return self._evaluate(merge.arena if merge else None, session, evaluated, batches)

        def lower(found: Scores) -> dict[str, bool | None]:
            return self._directions(found, evaluated.prefix)

        compared = session.compare(merge, evaluate, evaluated.metrics, lower)
        if compared is None:
            return None
        shown, numbers = compared.logged(lambda name, metric: f"{MERGED_EVAL}{name}_{metric}")
        scored = self._scored(compared.metrics, evaluated.prefix, compared.step)
        return replace(scored, shown={**shown, **scored.shown}, numbers=numbers, compared=compared)

    def _evaluate(
        self,
        merged: Arena | None,
        session: MergeSession,
        evaluated: Evaluated,
        batches: int | None = None,
    ) -> dict[str, float] | None:
        """The metrics of a merge, by the names of the live ones; ``None`` if it failed, which is logged.

        Args:
            merged: its weights; ``None`` for the live ones.
            session: the run's.
            evaluated: the evaluation.
            batches: that it is evaluated on; ``None`` for all.
        """
        ranks, problem = session.ranks, None
        try:
            found = self._with(merged, session, evaluated, batches)
        except Exception as error:
            if DeferredSignals.has_raised(error):
                raise
            problem = error
        try:
            ranks.agree(problem)
        except Exception:
            if any(ranks.exchange(isinstance(problem, HalfRestoredError))):
                raise HalfRestoredError("after a merged evaluation the live weights are lost") from problem
            log.exception("merge: evaluation with the merged weights failed; the live weights are back")
            return None
        return found

    def _scored(self, found: Mapping[str, float], prefix: str, step: int) -> Scored:
        shown = {_merged(name): value for name, value in found.items()}
        return Scored(found, shown, self._directions(found, prefix), step)

    def _with(
        self, merged: Arena | None, session: MergeSession, evaluated: Evaluated, batches: int | None
    ) -> dict[str, float]:
        host = self._host
        weights: AbstractContextManager[Any] = (
            kept_weights(host.module, host.root, host.spare)
            if merged is None
            else merged_weights(host, merged, session.sharding)
        )
        with (
            DeferredSignals() as signals,
            host.undisturbed([evaluated.dataloader]),
            signals.let_through(),
            weights,
        ):
            evaluated.random.restore()
            output = evaluated.run(batches)
        return _measured(output.metrics)

    def _directions(self, merged: Scores, prefix: str) -> dict[str, bool | None]:
        """Whether lower is better, by metric; reports once of which that is not known, and the remedy."""
        lower = {name: self._lower_is_better(name, prefix) for name in merged}
        unknown = sorted(
            name for name, is_lower in lower.items() if is_lower is None and name not in self._told
        )
        if unknown:
            self._told.update(unknown)
            info(
                f"merge: no {GAIN}… is logged for {', '.join(unknown)}: whether lower or higher is "
                f"better is not known; say so with lower_is_better={unknown[:1]}, or with higher_is_better="
            )
        return lower

    def _lower_is_better(self, name: str, prefix: str) -> bool | None:
        said = said_lower(name, self._options.lower_is_better, self._options.higher_is_better)
        if said is None and name in (self._best, _live(self._best, prefix)):
            return not self._host.trainer.args.greater_is_better
        return sounds_lower(name.removeprefix(f"{prefix}_")) if said is None else said

    @property
    def _best(self) -> str:
        """The metric that the trainer looks for, by the name it gives it."""
        name = self._host.trainer.args.metric_for_best_model or ""
        return name if not name or name.startswith("eval_") else f"eval_{name}"


class _First:
    """The first batches of a data loader."""

    def __init__(self, dataloader: Any, batches: int) -> None:
        self._dataloader, self._batches = dataloader, batches

    def __iter__(self) -> Iterator[Any]:
        return islice(self._dataloader, self._batches)

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "__len__"):  # the number of examples is another one
            raise AttributeError(name)
        return getattr(self._dataloader, name)


def _measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation that are numbers, without how long it took."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if not name.endswith("_model_preparation_time")}


def _merged(name: str) -> str:
    return f"{MERGED_EVAL}{name}"


def _live(name: str, prefix: str) -> str:
    """The live metric behind the merged one that the trainer looks for; empty for any other.

    >>> _live("eval_merged_loss", "eval"), _live("eval_merged_eval_loss", "eval"), _live("eval_loss", "eval")
    ('eval_loss', 'eval_loss', '')
    """
    if name.startswith(f"eval_merged_{prefix}_"):
        return name.removeprefix("eval_merged_")
    start = f"{prefix}_merged_"
    return f"{prefix}_{name.removeprefix(start)}" if name.startswith(start) else ""
