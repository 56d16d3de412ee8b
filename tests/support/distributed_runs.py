"""Real processes on CPU over gloo, and one small module to train in them under every strategy.

A test file starts each number of ranks once, with all it wants to know, and looks at what comes back::

    @pytest.fixture(scope="module")
    def two_ranks():
        return run_jobs(2, {name: (train, {"strategy": name}) for name in ("ddp", "fsdp2", "fsdp1")})

    def train(strategy):  # runs in every rank; has to be a function of a module in ``tests``
        return fit(strategy, UnevenModule())

``fit("alone", …)`` is the same training in the process of the test itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import distributed_worker
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import Forked
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader
from training_runs import QUIET, one_thread, seed

Job = tuple[Callable[..., Any], Mapping[str, Any]]
"""A function that every rank calls, and its keyword arguments; both are pickled."""


FSDP2_ON_CPUS = hasattr(torch.cpu.Stream, "record_event")


class RankError(AssertionError):
    """A rank failed or took too long; the message holds what each of them printed."""


def run_ranks(nprocs: int, function: Callable[..., Any], timeout: float = 200, **options: Any) -> list[Any]:
    """What ``function(**options)`` returned, by rank."""
    return run_jobs(nprocs, {function.__name__: (function, options)}, timeout)[function.__name__]


def run_jobs(nprocs: int, jobs: Mapping[str, Job], timeout: float = 200) -> dict[str, list[Any]]:
    """Runs all jobs one after another in the same ``nprocs`` processes; results by job, then by rank."""
    with TemporaryDirectory() as folder:
        torch.save(dict(jobs), Path(folder, "jobs"))
        status = _run_worker(nprocs, folder, timeout)
        if status != 0:
            failure = _failure(Path(folder), f"timeout={timeout} s" if status is None else "failed")
            if not FSDP2_ON_CPUS and "fully_shard" in failure:
                pytest.skip("torch 2.6 has no FSDP2 on CPUs")
            raise RankError(failure)
        results = [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=False) for rank in range(nprocs)]
    return {name: [result[name] for result in results] for name in jobs}


def _failure(folder: Path, what: str) -> str:
    """What happened, in a line; then the end of what each rank printed."""
    logs = {log.stem: log.read_text().splitlines() for log in sorted(folder.glob("*.log"))}
    *_, last = ["", *logs.pop("worker", [])]
    jobs = {rank: [line for line in lines if line.startswith("job ")] for rank, lines in logs.items()}
    where = ", ".join(f"{rank} in {found[-1] if found else 'no job'}" for rank, found in jobs.items())
    ends = [f"--- {rank}\n" + "\n".join(lines[-25:]) for rank, lines in logs.items()]
    return "\n".join([f"{what}; {last}; {where}", *ends])


def _run_worker(nprocs: int, folder: str, timeout: float) -> int | None:
    """Returns the exit status; None where the ranks took too long. None of them is left behind."""
    worker = Forked(distributed_worker.main, nprocs, Path(folder), log=Path(folder, "worker.log"))
    try:
        return worker.wait(timeout)
    finally:
        worker.kill()


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on CPUs, where Lightning refuses ``FSDPStrategy`` itself and names no device to FSDP."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        device, policy = torch.device("cpu"), self.sharding_strategy
        return FullyShardedDataParallel(model, device_id=device, sharding_strategy=policy, **self.kwargs)


@dataclass
class Run:
    """What a fit did, as this rank saw it; full tensors, none of them sharded."""

    losses: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """State dicts by step, under the module's own names."""

    @property
    def final(self) -> dict[str, Tensor]:
        """The weights at the end."""
        return self.weights[max(self.weights)]


def fit(strategy: str, module: LightningModule, *callbacks: Callback, every: int = 4, **options: Any) -> Run:
    """Trains ``module`` for 12 steps unless told otherwise, and notes its weights ``every`` so many steps.

    Args:
        strategy: one of ``STRATEGIES``.
        module: made after ``seed()``, so that it begins with the same weights on all ranks.
        *callbacks: put before the one that notes the weights.
        every: steps between the weights that are noted; the last step's always are.
        **options: the trainer's; also its fit's ``ckpt_path``, and as ``data`` a data module.
    """
    run = Run()
    devices = 1 if strategy == "alone" else dist.get_world_size()
    limit = {} if {"max_steps", "max_epochs"} & options.keys() else {"max_steps": 12}
    given = {
        **QUIET,
        "devices": devices,
        "strategy": STRATEGIES[strategy](),
        "use_distributed_sampler": False,
        **limit,
        **options,
    }
    data, resume_from = given.pop("data", None), given.pop("ckpt_path", None)
    trainer = Trainer(**given, callbacks=[*callbacks, _Notes(run, every)])
    seed()
    with one_thread():
        trainer.fit(module, datamodule=data, ckpt_path=resume_from)
    return run


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict, gathered from all ranks, on all ranks; a collective call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    return {name: tensor.clone() for name, tensor in get_model_state_dict(module, options=options).items()}


class _Notes(Callback):
    def __init__(self, run: Run, every: int) -> None:
        self.run, self.every = run, every

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.run.losses.append(float(outputs["loss"]))
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.run.weights[trainer.global_step] = full_weights(trainer.strategy.model)

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.run.validations.append(float(trainer.callback_metrics["val_loss"]))


class Features(nn.Module):
    """Two layers, a running mean that only evaluation uses, as BatchNorm's, and a count of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)
        self.scale = nn.Parameter(torch.full((1,), 0.5))  # FSDP takes no tensor without dimensions
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.batches += 1
        else:
            x = x - 0.1 * self.mean
        return self.scale * x + self.down(self.up(x).relu())


class UnevenModule(LightningModule):
    """Tensors that two or four ranks can't share evenly; tied, frozen and integer ones among them.

    Args:
        share: whether each rank takes its share of every batch, as in real training. Otherwise all take the
            whole batch: then the mean of the ranks' gradients is bitwise the gradient of one process.
        optimizer: made from the parameters.
    """

    def __init__(self, share: bool = False, optimizer: Callable[..., Any] | None = None) -> None:
        super().__init__()
        seed()
        self.share = share
        self.optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
        self.embedding = nn.Embedding(13, 6)
        self.features = nn.Sequential(Features(), Features())
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.head = nn.Linear(6, 13)
        self.head.weight = self.embedding.weight

    def configure_model(self) -> None:
        """Shards the module under ``ModelParallelStrategy``, which asks for it."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self, self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(self.features(self.embedding(tokens))))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, 0]), batch[:, 1])

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])

    def train_dataloader(self) -> DataLoader:
        return self._batches(key=1, count=12)

    def val_dataloader(self) -> DataLoader:
        return self._batches(key=2, count=3)

    def _batches(self, key: int, count: int) -> DataLoader:
        """Pairs of a token and the one to predict."""
        tokens = torch.randint(13, (count, 32), generator=torch.Generator().manual_seed(key))
        batches = torch.stack([tokens, (3 * tokens + 1) % 13], -1)
        # The ranks that split a tensor between them have to see the same batch.
        place = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
        mine = batches[:, place["rank"] :: place["num_replicas"]] if self.share else batches
        return DataLoader(mine, batch_size=None)


def shard(module: UnevenModule, data: Any, tensor: Any) -> None:
    """Splits the layers' matrices over ``tensor``, if that is more than one rank, then all over ``data``."""
    for layer in module.features:
        if tensor.size() > 1:
            plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
            parallelize_module(layer, tensor, plan)
        fully_shard(layer, mesh=data)
    fully_shard(module, mesh=data)


STRATEGIES: dict[str, Callable[[], str | Strategy]] = {
    "alone": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda: ModelParallelStrategy(dist.get_world_size(), 1, process_group_backend="gloo"),
    "fsdp2_tp": lambda: ModelParallelStrategy(dist.get_world_size() // 2, 2, process_group_backend="gloo"),
    "fsdp1": lambda: CPUFSDPStrategy(process_group_backend="gloo", auto_wrap_policy={Features}),
}
"""By name; ``fsdp2_tp`` splits tensors in two, and shards over the rest of the ranks."""
