"""Advice to the user, and which way a metric improves."""

from types import SimpleNamespace

import pytest

from merge_callback.engine.advice import advice
from merge_callback.signals.lr_phase import Phase
from merge_callback.trainers.lightning.metric_direction import MetricDirections


def test_the_decay_is_announced_once_per_segment():
    given = []
    assert "since step 4200" in advice(Phase.DECAY, 4200, None, given)
    assert advice(Phase.DECAY, 4200, None, given) is None
    assert "since step 9000" in advice(Phase.DECAY, 9000, None, given)


def test_spent_diversity_is_announced_once():
    given = []
    assert advice(Phase.STABLE, 0, -80.0, given) is None
    assert "93 % closer" in advice(Phase.STABLE, 0, -93.0, given)
    assert advice(Phase.STABLE, 0, -95.0, given) is None


@pytest.mark.parametrize("phase", [Phase.WARMUP, Phase.STABLE])
def test_there_is_no_advice_while_merging_pays(phase):
    assert advice(phase, 0, None, []) is None
    assert advice(phase, 0, 5.0, []) is None


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
