"""Advice: what a run's own numbers, and the papers' at its scale, suggest. Each line says why.

A rule looks at what is known when a snapshot is in the window, or when a merge was validated, and has a line
or none. A line comes once in each segment of the learning rate, and one at a time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

from merge_callback.engine.forecast import SNAPSHOTS
from merge_callback.engine.validations import Validations
from merge_callback.snapshots.snapshot import Snapshot

_PMA, _PG = "Model Merging in Pre-training of LLMs", "Practical Guidelines for Model Merging"
_NS = "Nemotron 3 Super, arXiv 2604.12374, §2.5"

_USUAL = 20
"""Snapshots of the stable phase whose median diversity is the usual one."""

_SPENT = 0.1
"""Share of the usual diversity below which the merge and the live weights are the same."""

_FEW = 5
"""So many snapshots are few."""

_SPACING = {7e9: 4e9, 13e9: 8e9, 100e9: 80e9}
"""Tokens between the snapshots by a mixture of experts' total number of parameters ([PMA] §4.3)."""

_LARGE_BUDGET = 1e12
"""Tokens of a run from which on the figures of the largest public runs may be compared."""


@dataclass(frozen=True)
class Seen:
    """What a rule looks at. Spans reach from the oldest to the newest snapshot of the merge.

    ``share`` is the span's share of the training since the segment began; ``gains`` are those of the last
    validated merges of the segment in ``metric``, ``usual_gains`` the last three of the stable phase before.
    ``diversity`` is relative to the median of that phase. Tokens, and what follows from them, are ``None``
    unless they are counted.
    """

    step: int
    phase: str
    since: int
    window: int
    merged: int
    span: int
    share: float
    parameters: int
    metric: str = ""
    gains: Sequence[float] = ()
    usual_gains: Sequence[float] = ()
    diversity: float | None = None
    every_tokens: float | None = None
    span_tokens: float | None = None
    budget: float | None = None


def fading(seen: Seen) -> str | None:
    """The decay has brought the snapshots together: gains shrink."""
    if seen.phase != "decay" or seen.diversity is None or not _SPENT < seen.diversity <= 0.5:
        return None
    if seen.usual_gains and min(seen.usual_gains) <= 0:
        return None  # what did not gain has nothing to lose
    return (
        f"the learning rate decays since step {seen.since:,}, and the snapshots lie "
        f"{1 - seen.diversity:.0%} closer together than before: expect smaller gains from here on. The gain "
        f"follows that distance ({_PG}, Fig. 3; Tab. 2 has +1.6 points in the stable phase, +0.1 to +0.5 in "
        "the decay)"
    )


def spent(seen: Seen) -> str | None:
    """Near the end of a decay, merge and live weights are the same."""
    if seen.phase != "decay" or seen.diversity is None or seen.diversity > _SPENT:
        return None
    small = max(seen.usual_gains, default=0.0) / 5
    if seen.metric and not (seen.gains and abs(seen.gains[-1]) <= small):
        return None  # in a short decay a long window still lags
    return (
        f"the snapshots lie {1 - seen.diversity:.0%} closer together than before the decay: until the "
        f"learning rate rises again, a merge scores about what the live weights do ({_PG}, Fig. 3)"
    )


def lagging(seen: Seen) -> str | None:
    """The loss falls faster than the window can follow."""
    last = seen.gains[-3:]
    if seen.phase != "stable" or len(last) < 3 or max(last) >= 0 or seen.merged <= 3:
        return None
    return (
        f"the last three merges scored worse than the live weights ({seen.metric}: by "
        f"{-statistics.mean(last):.3g} on average): their snapshots span {seen.span:,} steps, "
        f"{seen.share:.0%} of this phase so far. While the loss falls fast, fewer snapshots (window=) or a "
        f"shorter interval lag less ({_PMA}, Fig. 5: early in training, many or distant ones hurt)"
    )


def few(seen: Seen) -> str | None:
    """Late in the stable phase more snapshots average more noise away."""
    if seen.phase != "stable" or not 1 < seen.merged == seen.window <= _FEW:
        return None
    share_of_ten = seen.share * 9 / (seen.merged - 1)
    if share_of_ten > 0.15 or (seen.gains and min(seen.gains[-3:]) <= 0):
        return None
    return (
        f"window={seen.window}: a merge of ten snapshots would average more noise away, and span no more "
        f"than {share_of_ten:.0%} of this phase so far ({_PMA}, Fig. 5: late in training 15 beat 3 by about "
        "a point)"
    )


def spacing(seen: Seen) -> str | None:
    """The interval does not suit the size of the model."""
    if seen.every_tokens is None or seen.phase != "stable" or seen.parameters < min(_SPACING):
        return None
    like = min(_SPACING, key=lambda size: abs(math.log(seen.parameters / size)))
    if 0.25 <= seen.every_tokens / _SPACING[like] <= 4:
        return None
    return (
        f"a snapshot every {_in_tokens(seen.every_tokens)} tokens; with {_SPACING[like] / 1e9:.0f}B a "
        f"mixture of experts of {like / 1e9:.0f}B parameters merged best: the interval grows with the model "
        f"({_PMA}, §4.3: 4B for 0.7B/7B, 8B for 1.3B/13B, 80B for 10B/100B)"
    )


def share_of_budget(seen: Seen) -> str | None:
    """The window is much shorter or longer than those of the largest public run."""
    if seen.budget is None or seen.span_tokens is None or seen.budget < _LARGE_BUDGET:
        return None
    share = seen.span_tokens / seen.budget
    if seen.phase != "stable" or seen.merged < seen.window or 0.0025 <= share <= 0.04:
        return None
    return (
        f"the window spans {_in_tokens(seen.span_tokens)} tokens, {share:.2%} of the run's; {_NS}, merged "
        "125B to 500B of 25T, which is 0.5 to 2 %"
    )


def long_decay(seen: Seen) -> str | None:
    """In a long decay, a long window loses."""
    if seen.phase != "decay" or seen.span_tokens is None or seen.span_tokens < 1e12:
        return None
    return (
        f"the window spans {_in_tokens(seen.span_tokens)} tokens of the decay; in the decay of {_NS}, "
        "windows of 1T to 1.5T did not beat the decayed checkpoints, one of 500B did"
    )


RULES: Sequence[Callable[[Seen], str | None]] = (
    spent,
    fading,
    long_decay,
    lagging,
    few,
    spacing,
    share_of_budget,
)
"""All of them; of several lines at once the first one is told, and the next one at the next occasion."""

_ONCE = (few, spacing, share_of_budget)
"""These depend on the options and the model, so they are told once in a run."""


class Advice:
    """The advice of one run, and the validations that it is based on.

    Args:
        window: number of snapshots that are kept.
        parameters: number of parameters that train, on all ranks.
        total_steps: optimizer steps of the whole run; ``None`` if it has no end.
    """

    def __init__(self, window: int, parameters: int, total_steps: int | None) -> None:
        self._window, self._parameters, self._total_steps = window, parameters, total_steps
        self.validations = Validations()
        self.given: list[str] = []  # rules, with the segments that they gave a line in
        self._usual: list[float] = []  # diversities of the last stable segment
        self._usual_at = (0, 0)  # when that began, and the steps between the two of a pair
        self._usual_gains: list[float] = []  # the last three of the stable phase
        self._seen: Seen | None = None
        self._phase = ""  # of the newest snapshot

    def after_snapshot(
        self,
        newest: Snapshot,
        segment: Sequence[Snapshot],
        diversity: Mapping[str, Any] | None,
    ) -> str | None:
        """A line for the user, if there is one, when a snapshot is in the window.

        Args:
            newest: the snapshot.
            segment: the snapshots that are merged, oldest first.
            diversity: of the newest pair.
        """
        self._phase = newest.phase
        if len(segment) < 2:
            return None
        first, before, last = segment[0], segment[-2], segment[-1]
        span = last.step - first.step
        self._seen = Seen(
            step=last.step,
            phase=last.phase,
            since=last.since,
            window=self._window,
            merged=len(segment),
            span=span,
            share=span / max(1, last.lr_step - last.since),
            parameters=self._parameters,
            diversity=self._relative(segment, diversity),
        )
        if last.tokens is not None and before.tokens is not None and first.tokens is not None:
            self._seen = replace(
                self._seen,
                every_tokens=last.tokens - before.tokens,
                span_tokens=last.tokens - first.tokens,
                budget=last.tokens / last.step * self._total_steps if self._total_steps else None,
            )
        return self._line()

    def after_validation(
        self,
        newest: Snapshot,
        live: Mapping[str, SupportsFloat],
        merged: Mapping[str, SupportsFloat],
        lower: Mapping[str, bool | None],
    ) -> tuple[dict[str, float], str | None]:
        """What is logged of a validation besides the merged metrics, and a line for the user, if any.

        Args:
            newest: the newest snapshot of the merge.
            live: what the live weights score.
            merged: what the merged weights score.
            lower: whether lower is better, by metric; ``None`` if that is not known.
        """
        logged = self.validations.note(newest, live, merged, lower)
        if newest.phase == "stable":
            self._usual_gains = self.validations.last_gains((newest.phase, newest.since))[-3:]
        seen, is_stable = self._seen, self._phase == newest.phase == "stable"
        if seen and is_stable and seen.step == newest.step and seen.merged >= SNAPSHOTS:
            logged |= self.validations.forecasts(merged, lower)
        return logged, self._line()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as primitives."""
        return {
            "given": list(self.given),
            "usual": list(self._usual),
            "usual_at": list(self._usual_at),
            "usual_gains": list(self._usual_gains),
            "validations": self.validations.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.given, self._usual = list(state["given"]), list(state["usual"])
        self._usual_at = (state["usual_at"][0], state["usual_at"][1])
        self._usual_gains = list(state["usual_gains"])
        self.validations.load_state_dict(state["validations"])

    def _relative(self, segment: Sequence[Snapshot], diversity: Mapping[str, Any] | None) -> float | None:
        """The diversity over its median in the stable phase, in the decay; notes it in the stable phase."""
        if diversity is None or diversity["steps"][0] < segment[0].step:
            return None  # the pair is of two segments
        apart, since = diversity["steps"][1] - diversity["steps"][0], segment[-1].since
        is_as_usual = 0.8 <= apart / max(1, self._usual_at[1]) <= 1.25
        if segment[-1].phase != "stable":
            usual = statistics.median(self._usual) if is_as_usual and len(self._usual) > 2 else 0.0
            return diversity["rms"] / usual if usual > 0 else None
        if since != self._usual_at[0] or not is_as_usual:
            self._usual, self._usual_at = [], (since, apart)
        self._usual = [*self._usual[1 - _USUAL :], diversity["rms"]]
        return None

    def _line(self) -> str | None:
        """The first rule's line that was not given yet."""
        if self._seen is None:
            return None
        seen = replace(
            self._seen,
            metric=self.validations.metric,
            gains=self.validations.last_gains((self._seen.phase, self._seen.since)),
            usual_gains=self._usual_gains,
        )
        for rule in RULES:
            key = rule.__name__ if rule in _ONCE else f"{rule.__name__} {seen.phase} {seen.since}"
            if key not in self.given and (line := rule(seen)):
                self.given.append(key)
                return f"merge: {line}"
        return None


def _in_tokens(count: float) -> str:
    """A number of tokens for people: 4B, 1.2T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}"
