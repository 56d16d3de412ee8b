"""One rank over NCCL: what is sent, and fits under DDP and FSDP2."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from benchmarks.gpu_check import clock
from benchmarks.gpu_check.checks import Outcome, Section
from benchmarks.gpu_check.machines import Machine
from benchmarks.gpu_check.runs import Classifier, Fit, deterministic, first_difference, fit, folder
from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.sharding import Ranks
from merge_callback.signals.step_statistics import StepStatistics

SECTION = Section("distributed", 50)

STEPS, EVERY = 16, 4


@contextmanager
def alone(machine: Machine) -> Iterator[None]:
    """Within, there is a process group with this process alone; Lightning takes it as it is."""
    backend = "gloo" if machine.is_dry else "cpu:gloo,cuda:nccl"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0", RANK="0", WORLD_SIZE="1"
    )
    dist.init_process_group(backend, rank=0, world_size=1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@SECTION.check("statistics of a step, summed over the ranks", "the numbers of the step before; no wait", 8)
def statistics(machine: Machine) -> Outcome:
    with alone(machine):
        summed, spent, waits = StepStatistics(Ranks(dist.group.WORLD), device=machine.device), [], list[str]()
        loss = torch.zeros((), device=machine.device)
        for step in range(1, 30):
            loss.fill_(step / 2)
            with machine.waits() as found:
                spent.append(-time.perf_counter())
                for divided_by in (2, 2):
                    summed.add_loss({"loss": loss}, divided_by)
                summed.add_tokens(5)
                seen = summed.end_step(step, None)
                spent[-1] += time.perf_counter()
            waits += found if step > 2 else []
            if seen is not None:
                expected = (step - 1, step - 1.0, 5)
                assert (seen.step, seen.loss, seen.tokens) == expected, f"{seen} is not {expected}"
        summed.close()
    return Outcome(f"{1e6 * clock.median(spent):.0f} µs a step; waits: {waits[:3] or 'none'}", not waits)


class Sharded(Classifier):
    """Sharded over one rank."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def the_same(machine: Machine, module: type[Classifier], strategy: Any) -> Outcome:
    """Trains without and with the callback; each fit has a process group and a strategy of its own."""

    def train(*callbacks: CheckpointMergeCallback) -> Fit:
        with alone(machine), deterministic():
            made = fit(
                machine, *callbacks, module=module, steps=STEPS, validates=True, val_check_interval=8,
                strategy=strategy(),
            )  # fmt: skip
            whole = {
                n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in made.module.state_dict().items()
            }
        made.weights = {name: tensor.detach().cpu() for name, tensor in whole.items()}
        return made

    with folder() as path:
        expected = train()
        found = train(CheckpointMergeCallback(every_n_steps=EVERY, window=3, method="sma", dirpath=path))
        merge = load_merge(path / "latest")
    assert found.losses == expected.losses, "the losses differ"
    if name := first_difference(found.weights, expected.weights):
        raise AssertionError(f"the weights differ at the end: {name}")
    assert merge.keys() == found.weights.keys(), f"the merge has {sorted(merge)}"
    return Outcome(f"{len(found.losses)} losses, {len(found.weights)} tensors")


SAME = "losses and weights as without it, bit for bit"


@SECTION.check("DDP", SAME, 10)
def ddp(machine: Machine) -> Outcome:
    return the_same(machine, Classifier, DDPStrategy)


@SECTION.check("FSDP2", SAME, 10)
def fsdp2(machine: Machine) -> Outcome:
    return the_same(machine, Sharded, lambda: ModelParallelStrategy(1, 1))
