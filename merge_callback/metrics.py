"""Every number the callback logs: one table, for the code that logs and for the page that explains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Metric:
    """What is known of one logged number.

    Args:
        name: as loggers and ``callback_metrics`` have it; ``<name>`` stands for a metric of the validation,
            ``<sibling>`` for the name of an expert, ``<candidate>`` for that of a candidate.
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
        return fnmatchcase(name, re.sub("<.*?>", "*", self.name))


MERGED, GAIN = "merged/", "merge_gain/"
"""Before the name of a validation metric."""

EXPERTS = "merge_experts/"
"""Before the numbers of the merge of an expert with its siblings."""

FORECAST, FORECAST_ERROR = "merge/forecast/", "merge/forecast_error/"
"""Before the name of a validation metric that is forecast."""

MERGED_EVAL = "merged_"
"""Before the name of an evaluation's metric in the Hugging Face Trainer, which begins with ``eval_``."""

DIVERSITY = "merge/diversity_"
"""Before the name of a distance between snapshots."""

DIVERSITY_RMS, DIVERSITY_CHANGE = f"{DIVERSITY}rms", f"{DIVERSITY}change"
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
        f"{MERGED}<candidate>/<name>",
        "The same of each candidate, with `candidates=`, on `evaluate_batches` if that is given; "
        "`merged/<name>` is the best one's.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        f"{MERGED_EVAL}<candidate>_eval_<name>",
        "The same, as the Hugging Face Trainer names it.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        f"{GAIN}<candidate>/<name>",
        "How much better a candidate scores than the live weights on the same batches.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        f"{EXPERTS}scale",
        "λ of the best merge with the other experts, with `experts=`.",
        _VALIDATION,
        "factor",
    ),
    Metric(
        f"{EXPERTS}density",
        "The share of each task vector that this merge keeps, if its method has one.",
        _VALIDATION,
        "ratio",
    ),
    Metric(
        f"{EXPERTS}evaluated",
        "Merges that were validated to find the best.",
        _VALIDATION,
        "merges",
    ),
    Metric(
        f"{EXPERTS}<sibling>/sign_conflict",
        "Entries with opposite signs among the largest 20 % of this expert's or a sibling's task vector.",
        _VALIDATION,
        "per cent",
    ),
    Metric(
        f"{EXPERTS}<sibling>/overlap",
        "Entries among the largest 20 % of both.",
        _VALIDATION,
        "per cent",
    ),
    Metric(
        f"{EXPERTS}<sibling>/magnitude_ratio",
        "The larger over the smaller magnitude of these entries, on average.",
        _VALIDATION,
        "ratio",
    ),
    Metric(
        f"{EXPERTS}variance",
        "The mean square of all experts' largest 20 %.",
        _VALIDATION,
        "that of the weights, squared",
    ),
    Metric(
        f"{FORECAST}<name>",
        "A forecast: what the live weights would score after a decay over a quarter of the steps so far. "
        "Only in the stable phase, once the last five gains are level.",
        _VALIDATION,
        "that of the metric",
    ),
    Metric(
        f"{FORECAST_ERROR}<name>",
        "Two standard deviations of the forecast's error, as measured on small language models.",
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
        "Change of the diversity since its first value. Only in the decay does its fall say that gains end.",
        _SNAPSHOT,
        "per cent",
    ),
    Metric(
        f"{DIVERSITY}logits",
        "Cosine distance of the logits on the probe batch, at the final token, between the same two "
        "snapshots. With `probe=`.",
        _SNAPSHOT,
        "0 to 2",
    ),
    Metric(
        f"{DIVERSITY}probabilities",
        "KL divergence of the newer snapshot's probabilities from the older one's, likewise.",
        _SNAPSHOT,
        "nats",
    ),
    Metric(
        f"{DIVERSITY}activations",
        "Cosine distance of the activations, likewise, averaged over the layers.",
        _SNAPSHOT,
        "0 to 2",
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
