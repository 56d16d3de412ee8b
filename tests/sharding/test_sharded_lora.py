"""LoRA factors that several ranks share out are merged and restored by their products, as by one process."""

import pytest
import torch
from adapted import Adapted
from distributed_runs import UnevenModule, run_jobs
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_runs import merged_fit, published
from spiking_runs import BURST, EVERY, FIRES, RULES, Batches, Line
from torch import nn
from torch.distributed.fsdp import fully_shard
from training_runs import assert_same_bits, seed

from merge_callback import SpikeOptions, load_merge

pytestmark = pytest.mark.slow

MERGES = [("ddp", "sma"), ("ddp", "ties"), ("fsdp2", "sma"), ("fsdp2", "ties"), ("fsdp1", "sma")]


def merging(strategy, folder, method):
    module = UnevenModule()
    for layer in module.features:
        layer.up = Adapted(layer.up, 3)
    merged_fit(strategy, folder, module=module, method=method)


class AdaptedLine(Line):
    def __init__(self):
        seed()
        super().__init__(lr=0.005)
        self.net[2] = Adapted(nn.Linear(8, 6), 3)
        self.net.append(nn.Linear(6, 1))

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net)

    def train_dataloader(self):
        return Batches(bad=BURST)


def restoring(strategy, folder):
    spike = SpikeOptions(**RULES, cooldown=1000)
    trainer = {"max_steps": FIRES + 2, "every": 1}
    outcome = merged_fit(
        strategy,
        folder,
        module=AdaptedLine(),
        spike=spike,
        every_n_steps=EVERY,
        window=10,
        count_tokens=None,
        trainer=trainer,
    )
    return outcome.run.weights, outcome.told


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the merging runs, and the weights of the restored ones."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = {
        f"{strategy} {method}": (
            merging,
            {"strategy": strategy, "folder": folder / f"{strategy} {method}", "method": method},
        )
        for strategy, method in MERGES
    }
    for strategy in ("ddp", "fsdp2"):
        jobs[strategy] = restoring, {"strategy": strategy, "folder": folder / strategy}
    weights = run_jobs(2, jobs, timeout=300)
    for method in ("sma", "ties"):
        merging("alone", folder / f"alone {method}", method)
    weights["alone"] = [restoring("alone", folder / "alone")]
    return folder, weights


@pytest.mark.parametrize(("strategy", "method"), MERGES)
def test_ranks_publish_the_products_that_one_process_does(strategy, method, runs):
    folder, _ = runs
    found, expected = (folder / f"{name} {method}" for name in (strategy, "alone"))
    assert_same_bits(load_merge(found / "merges" / "latest"), load_merge(expected / "merges" / "latest"))
    records = [[*published(path).values()][-1]["lora"] for path in (found, expected)]
    assert records == [{"products": 2}] * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_restore_on_ranks_is_that_of_one_process(strategy, runs):
    _, weights = runs
    ((alone, _),) = weights["alone"]
    (first, told), (second, _) = weights[strategy]
    assert any("restored the sma of the snapshots of steps 60, 65, 70" in line for line in told)
    torch.testing.assert_close(first[FIRES], alone[FIRES], rtol=1e-5, atol=1e-6)
    assert_same_bits(first[FIRES], second[FIRES])
