"""Whether lower or higher is better for a metric, judged by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_callback.checks import matches_any

_LOWER = re.compile(
    r"loss(es)?|errors?|err|ce|bce|xent|crossentropy|nll|perplexity|ppl|bp[bct]|bits_|n?r?mse|r?msle"
    r"|rmsd|mae|s?mape|mdape|w?mape|wape|mase|[wce]er|fid|kid|kld?|divergence|distance|brier|crps|pinball"
    r"|(a|sm)?ece|mce|au(g)?rc|lpips|hausdorff|hd95|chamfer|(min)?[af]de|epe|hinge|logloss|fpr95|regret"
)
_HIGHER = re.compile(
    r"acc|accuracy|au(c|roc|prc|prg)|f1|f1score|fbeta|m?iou|jaccard|jaccardindex|r2|r2score|psnr|ssim|(sacre)?bleu"
    r"|rouge|meteor|map|recall|precision|spearman|pearson|kendall|reward|ndcg|mrr|dice|mcc|kappa|likelihood"
    r"|sensitivity|specificity"
)
_TURNED = re.compile(
    r"neg|negative|negated|minus|inv|inverse|inverted|without|no|free|vs|ratio|gain"
    r"|gap|drop|std|var|variance|delta|change|count|weight|coef|coeff|coefficient|scale|threshold"
)
_FIXED = {
    "negative_log_likelihood": "nll",
    "neg_log_likelihood": "nll",
    "bits_per": "bits_",
    "cross_entropy": "ce",
}
"""Terms of several words, each with a single word that means the same."""


def said_lower(name: str, lower: Sequence[str], higher: Sequence[str]) -> bool | None:
    """Whether lower is better according to ``fnmatch`` patterns; ``None`` if none matches."""
    if matches_any(name, lower):
        return True
    return False if matches_any(name, higher) else None


def sounds_lower(name: str) -> bool | None:
    """Whether lower is better for a standard metric name; ``None`` for any other name.

    >>> sounds_lower("val_rmse"), sounds_lower("val/MulticlassAccuracy"), sounds_lower("elbo_validation")
    (True, False, None)
    """
    split, words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name), list[str]()
    for text in (name.lower(), split.lower()):  # SmECE, and MeanSquaredError
        for term, word in _FIXED.items():
            text = text.replace(term, f"{word} ")
        words += re.findall(r"[a-z0-9]+_?(?= )|[a-z0-9]+", text)
    words += [word.rstrip("0123456789") for word in words]
    words += [end for word in words for end in ("loss", "error", "crossentropy") if word.endswith(end)]
    lower, higher, turned = (any(map(p.fullmatch, words)) for p in (_LOWER, _HIGHER, _TURNED))
    lost = re.search(r"(loss(es)?|errors?)$", name.lower()) is not None  # a dice_loss is a loss
    return None if turned or (lower == higher and not lost) else lower
