"""Functional diversity on several ranks: one batch, the same numbers on all, and nothing is disturbed."""

import pytest
import torch
from distributed_runs import UnevenModule, run_jobs
from sharded_runs import merged_fit
from torch.distributed.fsdp import FSDPModule
from training_runs import assert_same_bits, is_beside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the processes start under the first test

STRATEGIES = ["ddp", "fsdp2", "fsdp1"]
TOKENS = torch.arange(10) % 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder):
    """The outcomes of both ranks by strategy and what the probe is."""
    jobs = {}
    for strategy in STRATEGIES:
        place = str(folder / f"{strategy}-failing")
        jobs[strategy, "failing"] = (failing_fit, {"strategy": strategy, "folder": place})
        for name, options in {
            "given": {"probe": TOKENS},
            "without": {},
            "refused": {"probe": {"image": TOKENS}},
        }.items():
            place = str(folder / f"{strategy}-{name}")
            jobs[strategy, name] = (merged_fit, {"strategy": strategy, "folder": place, **options})
    jobs["older", "refused"] = (
        in_older_torch,
        {**jobs["fsdp2", "refused"][1], "folder": str(folder / "older")},
    )
    jobs["older", "without"] = jobs["fsdp2", "without"]
    return run_jobs(2, jobs, timeout=500)


class Failing(UnevenModule):
    """Can't be validated with merged weights: its forward pass fails half way."""

    def forward(self, tokens):
        if is_beside(self.trainer):
            self.features(self.embedding(tokens))
            raise RuntimeError("on purpose")
        return super().forward(tokens)


def failing_fit(**options):
    return merged_fit(module=Failing(), **options)


def in_older_torch(**options):
    """A fit in which FSDP2 has no function of its own that ends a cut-off forward pass."""
    kept = FSDPModule.reset_iter_state
    del FSDPModule.reset_iter_state
    try:
        return merged_fit(**options)
    finally:
        FSDPModule.reset_iter_state = kept


@pytest.fixture(scope="module")
def alone(folder):
    return merged_fit("alone", folder / "alone", probe=TOKENS)


def functional(outcome):
    kinds = ("logits", "probabilities", "activations")
    return {name: v for name, v in outcome.metrics.items() if name.endswith(kinds)}


@pytest.mark.parametrize(
    ("strategy", "probe"),
    [*((strategy, probe) for strategy in STRATEGIES for probe in ("given", "refused")), ("older", "refused")],
)
def test_training_is_bit_for_bit_what_it_is_without(strategy, probe, runs):
    for with_probe, without in zip(runs[strategy, probe], runs[strategy, "without"], strict=True):
        assert with_probe.run.losses == without.run.losses
        assert with_probe.run.validations == without.run.validations
        assert_same_bits(with_probe.run.weights, without.run.weights)
        assert not with_probe.differ
        assert not with_probe.replaced


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_log_what_one_process_measures(strategy, runs, alone):
    first, second = map(functional, runs[strategy, "given"])
    assert first == second
    assert len(first) == 12  # 6 snapshots, 2 of which have none before them
    # The layers' matrices are multiplied in parts of another size.
    assert first == pytest.approx(functional(alone), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_one_rank_can_not_measure_ends_it_on_all(strategy, runs):
    first, second = runs[strategy, "refused"]
    assert not functional(first) | functional(second)
    assert sum("functional diversity is not measured" in line for line in first.told) == 1


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_a_merged_validation_that_fails_in_the_forward_pass_leaves_the_model_fit_to_train(strategy, runs):
    for failing, without in zip(runs[strategy, "failing"], runs[strategy, "without"], strict=True):
        assert failing.run.losses == without.run.losses
        assert_same_bits(failing.run.weights, without.run.weights)
        assert not any("merged/" in name for name in failing.metrics)
