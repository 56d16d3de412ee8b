"""Which way a metric improves."""

from types import SimpleNamespace

import pytest

from merge_callback.trainers.lightning.metric_direction import MetricDirections


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        ("val_loss", True),
        ("val/loss", True),
        ("valid_nll/dataloader_idx_0", True),
        ("perplexity", True),
        ("val_crossentropy", True),
        ("bits_error", True),
        ("val_sMAPE", True),
        ("val/cal/SmECE", True),
        ("negative_log_likelihood", True),
        ("val_acc", False),
        ("F1Score", False),
        ("log_likelihood", False),
        ("glossary_hits", None),
        ("elbo_validation", None),
        ("neg_mean_squared_error", None),  # as scikit-learn has it: higher is better
        ("accuracy_bits_error", True),
        ("error_rate_accuracy", None),
        ("val_cost", None),
    ],
)
def test_only_standard_terms_tell_which_way_a_metric_improves(name, lower):
    assert MetricDirections().lower_is_better(name, SimpleNamespace(callbacks=[]), {}) is lower


def test_a_monitor_with_a_mode_knows_better_than_the_name():
    monitor = SimpleNamespace(monitor="merged/weird_loss_score", mode="max")
    assert (
        MetricDirections().lower_is_better("weird_loss_score", SimpleNamespace(callbacks=[monitor]), {})
        is False
    )


def test_options_know_better_than_a_monitor():
    monitor = SimpleNamespace(monitor="val_score", mode="max")
    told = MetricDirections(lower=["*_score"], higher=["val_loss"])
    trainer = SimpleNamespace(callbacks=[monitor])
    assert told.lower_is_better("val_score", trainer, {}) is True
    assert told.lower_is_better("val_loss", trainer, {}) is False
