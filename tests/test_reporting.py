"""Advice to the user, and which way a metric improves."""

from types import SimpleNamespace

import pytest

from merge_callback.training.lr_phase import Phase
from merge_callback.training.reporting import advice, lower_is_better


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
    ("name", "mode"),
    [
        ("val_loss", "min"),
        ("val/loss", "min"),
        ("valid_nll/dataloader_idx_0", "min"),
        ("perplexity", "min"),
        ("val_crossentropy", "min"),
        ("bits_error", "min"),
        ("val_acc", "max"),
        ("accuracy", "max"),
        ("f1", "max"),
        ("glossary_hits", "max"),
    ],
)
def test_names_tell_which_way_a_metric_improves(name, mode):
    assert lower_is_better(name, SimpleNamespace(callbacks=[]), {}) == (mode == "min")


def test_a_monitor_with_a_mode_knows_better_than_the_name():
    monitor = SimpleNamespace(monitor="merged/weird_loss_score", mode="max")
    assert not lower_is_better("weird_loss_score", SimpleNamespace(callbacks=[monitor]), {})
