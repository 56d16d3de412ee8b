"""The evaluation of a Hugging Face ``Trainer``, run again with the merged weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

from transformers import Trainer

from merge_callback.engine.advice import gains, report_scores
from merge_callback.engine.events import record_validation
from merge_callback.engine.merged_weights import merged_weights
from merge_callback.engine.metric_names import said_lower, sounds_lower
from merge_callback.engine.random_state import RandomState
from merge_callback.engine.session import MergeSession
from merge_callback.messages import info
from merge_callback.metrics import GAIN, MERGED_EVAL
from merge_callback.options import Options
from merge_callback.recovery.deferred_signals import DeferredSignals
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

    def run_live(self, present: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the trainer's ``evaluation_loop``, and notes it."""
        named = {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
        dataloader, prefix = named["dataloader"], named.get("metric_key_prefix", "eval")
        random = RandomState([dataloader])
        output = present(*args, **kwargs)
        run = partial(present, *args, **kwargs)
        self._host.evaluated = Evaluated(run, dataloader, prefix, random, _measured(output.metrics))
        return output

    def update(self, session: MergeSession, metrics: dict[str, float]) -> None:
        """Adds what the merge scores to the metrics of the evaluation that has just ended.

        An evaluation of the merge that fails is reported; the run goes on. Afterwards there is a merged value
        of what the merge was evaluated for, and of nothing else. Until there is a merge, it is the model.

        Raises:
            HalfRestoredError: if the live weights could not be put back, on any rank.
        """
        evaluated, merge = self._host.evaluated, session.current_merge()
        if evaluated is None:
            return
        prefix = evaluated.prefix
        is_new = merge is not None and merge.step != self._found.get(prefix, (-1, {}))[0]
        if merge is None or not is_new or not self._evaluate(session, merge, evaluated):
            record_validation(self._host, evaluated.metrics)
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

    def _evaluate(self, session: MergeSession, merge: Merge, evaluated: Evaluated) -> bool:
        """Whether that succeeded; the scores are recorded then."""
        ranks, problem, prefix, seconds = session.ranks, None, evaluated.prefix, -time.monotonic()
        try:
            found = self._with(merge, session, evaluated)
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
            self._found.pop(prefix, None)
            self._failed.add(prefix)
            return False
        seconds += time.monotonic()
        self._failed.discard(prefix)
        self._found[prefix] = (merge.step, {_merged(name): value for name, value in found.items()})
        gained = self._gains(evaluated.metrics, found, prefix)
        report_scores(self._host, self._found[prefix][1], gained)
        record_validation(self._host, evaluated.metrics, found, gained, merge.step, seconds)
        return True

    def _with(self, merge: Merge, session: MergeSession, evaluated: Evaluated) -> dict[str, float]:
        """The metrics of the merge, by the names of the live ones."""
        host = self._host
        with (
            DeferredSignals() as signals,
            host.undisturbed([evaluated.dataloader]),
            signals.let_through(),
            merged_weights(host, merge, session.sharding),
        ):
            evaluated.random.restore()
            output = evaluated.run()
        return _measured(output.metrics)

    def _gains(self, live: Mapping[str, float], merged: Mapping[str, float], prefix: str) -> dict[str, float]:
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
        return gains(live, merged, lower)

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
