"""Every number the callback logs: one table, for the code that logs and for the page that explains."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Metric:
    """What is known of one logged number.

    Args:
        name: as loggers and ``callback_metrics`` have it; ``<name>`` stands for a metric of the validation.
        meaning: one sentence.
        logged: at which steps.
        unit: of the value.
    """

    name: str
    meaning: str
    logged: str
    unit: str

    def matches(self, name: str) -> bool:
        """Whether this is the metric called ``name``."""
        return fnmatchcase(name, self.name.replace("<name>", "*"))


MERGED, GAIN = "merged/", "merge_gain/"
"""Before the name of a validation metric."""

MERGED_EVAL = "merged_"
"""Before the name of an evaluation's metric in the Hugging Face Trainer, which begins with ``eval_``."""

DIVERSITY_RMS, DIVERSITY_CHANGE = "merge/diversity_rms", "merge/diversity_change"
PHASE, LR_RATIO, TOKENS, WINDOW = "merge/phase", "merge/lr_ratio", "merge/tokens", "merge/window"
IS_SPIKING, RESTORES, SCORE = "merge_spike/is_spiking", "merge_spike/restores", "merge_spike/score"
BASELINE, THRESHOLD = "merge_spike/baseline", "merge_spike/threshold"
LR_FACTOR = "merge_spike/lr_factor"

SPIKE_TEXT = "merge_spike/events"
"""The tag of the texts that a logger shows of spikes and restores."""

_VALIDATION, _SNAPSHOT, _STEP = "after a validation", "at a snapshot", "every `log_every_n_steps`"

METRICS: tuple[Metric, ...] = (
    Metric(
        f"{MERGED}<name>",
        "Every metric of your validation, of the merged weights. Before there is a merge, the live value.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        f"{MERGED_EVAL}eval_<name>",
        "The same, as the Hugging Face Trainer names it.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        f"{GAIN}<name>",
        "How much better the merge scores than the live weights; positive is always better.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        DIVERSITY_RMS,
        "RMS distance between the newest snapshot and the one `diversity_lag` before it. Gains follow it.",
        _SNAPSHOT,
        "that of the weights",
    ),
    Metric(
        DIVERSITY_CHANGE,
        "Change of the diversity since its first value; near -100 merging has nothing left to gain.",
        _SNAPSHOT,
        "per cent",
    ),
    Metric(PHASE, "The learning-rate phase: 0 warmup, 1 stable, 2 decay.", _SNAPSHOT, "0, 1 or 2"),
    Metric(LR_RATIO, "The learning rate that was applied, over its peak.", _SNAPSHOT, "ratio"),
    Metric(TOKENS, "Tokens seen by all ranks; only if batches hold tokens.", _SNAPSHOT, "tokens"),
    Metric(WINDOW, "Snapshots in the window.", _SNAPSHOT, "snapshots"),
    Metric(
        IS_SPIKING,
        "1 while the newest loss speaks against the weights, else 0.",
        _STEP,
        "0 or 1",
    ),
    Metric(RESTORES, "Restores so far.", _STEP, "restores"),
    Metric(
        SCORE,
        "Share of the last 10,000 steps whose loss lies 7 standard deviations or more off the mean of the "
        "1,000 before.",
        _STEP,
        "ratio",
    ),
    Metric(BASELINE, "Median of the last 128 clean losses.", _STEP, "that of the loss"),
    Metric(THRESHOLD, "The loss above which a step is an outlier.", _STEP, "that of the loss"),
    Metric(
        LR_FACTOR,
        "What the learning rate is multiplied by since a restore; logged after the first one.",
        _STEP,
        "ratio",
    ),
)
"""All of them, in the order of the page."""


def described(name: str) -> Metric | None:
    """What is known of a logged number; None if it is not one of ours."""
    return next((metric for metric in METRICS if metric.matches(name)), None)
