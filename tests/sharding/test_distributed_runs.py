"""Training on several ranks is the training of one process: all other tests of several ranks stand on it."""

import pytest
import torch
import torch.distributed as dist
from distributed_runs import RankError, UnevenModule, fit, run_jobs, run_ranks
from training_runs import assert_same_bits

STRATEGIES = ["ddp", "fsdp2", "fsdp2_tp", "fsdp1"]


def train(strategy, share):
    return fit(strategy, UnevenModule(share), val_check_interval=4)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request):
    jobs = {
        (strategy, share): (train, {"strategy": strategy, "share": share})
        for strategy in STRATEGIES
        for share in (False, True)
    }
    return run_jobs(request.param, jobs)


@pytest.fixture(scope="module")
def alone():
    return train("alone", share=False)


def averages(weights):
    """The running means: each rank has those of its own batches."""
    return {name: tensor for name, tensor in weights.items() if name.endswith("mean")}


def trained(weights):
    return {name: tensor for name, tensor in weights.items() if name not in averages(weights)}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1"])
def test_ranks_that_see_the_same_batches_train_bitwise_like_one_process(runs, alone, strategy):
    for rank in runs[strategy, False]:
        assert rank.losses == alone.losses
        assert rank.validations == alone.validations
        assert_same_bits(rank.weights, alone.weights)


def test_a_layer_split_over_ranks_rounds_its_sums_differently(runs, alone):
    for rank in runs["fsdp2_tp", False]:
        assert rank.losses == pytest.approx(alone.losses, rel=1e-6)
        torch.testing.assert_close(rank.weights, alone.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_that_share_the_batches_train_like_one_process(runs, alone, strategy):
    ranks = runs[strategy, True]
    losses = torch.tensor([rank.losses for rank in ranks]).mean(0)
    # The mean over the ranks' means rounds differently from the mean over the batch, and steps add up.
    torch.testing.assert_close(losses, torch.tensor(alone.losses), rtol=1e-5, atol=0)
    for rank in ranks:
        assert_same_bits(trained(rank.final), trained(ranks[0].final))
        torch.testing.assert_close(trained(rank.final), trained(alone.final), rtol=1e-5, atol=1e-6)


def test_buffers_of_ranks_that_share_the_batches_differ(runs):
    first, *_, last = runs["fsdp2", True]
    assert len(averages(first.final)) == 2
    for name, tensor in averages(first.final).items():
        assert not torch.equal(tensor, averages(last.final)[name])


def fail_on_the_last_rank():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("on purpose")
    dist.barrier()


def test_a_rank_that_fails_is_quoted_and_the_others_are_not_waited_for():
    with pytest.raises(RankError, match="ValueError: on purpose"):
        run_ranks(2, fail_on_the_last_rank)
