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


_VALIDATION, _SNAPSHOT, _STEP = "after a validation", "at a snapshot", "every `log_every_n_steps`"

METRICS: tuple[Metric, ...] = (
    Metric(
        "merged/<name>",
        "Every metric of your validation, of the merged weights. Before there is a merge, the live value.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        "merged_eval_<name>",
        "The same, as the Hugging Face Trainer names it.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        "merge/gain/<name>",
        "How much better the merge scores than the live weights; positive is always better.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        "merge/diversity_rms",
        "RMS distance between the newest snapshot and the one `diversity_lag` before it. Gains follow it.",
        _SNAPSHOT,
        "that of the weights",
    ),
    Metric(
        "merge/diversity_change",
        "Change of the diversity since its first value; near -100 merging has nothing left to gain.",
        _SNAPSHOT,
        "per cent",
    ),
    Metric(
        "merge/diversity_logits",
        "Cosine distance of the logits on the probe batch, at the final token, between the same two "
        "snapshots. With `probe=`.",
        _SNAPSHOT,
        "0 to 2",
    ),
    Metric(
        "merge/diversity_probabilities",
        "KL divergence of the newer snapshot's probabilities from the older one's, likewise.",
        _SNAPSHOT,
        "nats",
    ),
    Metric(
        "merge/diversity_activations",
        "Cosine distance of the activations, likewise, averaged over the layers.",
        _SNAPSHOT,
        "0 to 2",
    ),
    Metric("merge/phase", "The learning-rate phase: 0 warmup, 1 stable, 2 decay.", _SNAPSHOT, "0, 1 or 2"),
    Metric("merge/lr_ratio", "The learning rate that was applied, over its peak.", _SNAPSHOT, "ratio"),
    Metric("merge/tokens", "Tokens seen by all ranks; only if batches hold tokens.", _SNAPSHOT, "tokens"),
    Metric("merge/window", "Snapshots in the window.", _SNAPSHOT, "snapshots"),
    Metric(
        "merge/spike",
        "1 while the newest loss speaks against the weights, else 0.",
        _STEP,
        "0 or 1",
    ),
    Metric("merge/restores", "Restores so far.", _STEP, "restores"),
    Metric(
        "merge/spike_score",
        "Share of the last 10,000 steps whose loss lies 7 standard deviations or more off the mean of the "
        "1,000 before.",
        _STEP,
        "ratio",
    ),
    Metric("merge/loss_baseline", "Median of the last 128 clean losses.", _STEP, "that of the loss"),
    Metric("merge/loss_threshold", "The loss above which a step is an outlier.", _STEP, "that of the loss"),
    Metric(
        "merge/lr_factor",
        "What the learning rate is multiplied by since a restore; logged after the first one.",
        _STEP,
        "ratio",
    ),
)
"""All of them, in the order of the page."""


def described(name: str) -> Metric | None:
    """What is known of a logged number; None if it is not one of ours."""
    return next((metric for metric in METRICS if metric.matches(name)), None)
