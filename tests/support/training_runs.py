"""Small real fits, with and without the callback, and a probe that records what training did."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
BAREBONES = {"accelerator": "cpu", "devices": 1, "barebones": True}


def seed(value: int = 0) -> None:
    """Seeds every global generator (``seed_everything`` prints, and sets environment variables)."""
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def train(module, *callbacks: Callback, data=None, val=None, ckpt_path=None, **options) -> Trainer:
    """Fits on the CPU, quietly, for 12 steps unless told otherwise."""
    quiet = BAREBONES if options.pop("barebones", False) else QUIET
    limit = {} if {"max_steps", "max_epochs", "max_time"} & options.keys() else {"max_steps": 12}
    trainer = Trainer(**{**quiet, **limit, **options, "callbacks": list(callbacks)})
    with one_thread():
        trainer.fit(module, data, val, ckpt_path=ckpt_path)
    return trainer


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small train ten times faster where no threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Probe(Callback):
    """Records what every batch returned, and the weights whenever ``every`` more of ``count`` have passed."""

    def __init__(self, every: int = 2, count: Callable[[Trainer, "Probe"], int] | None = None) -> None:
        self.every = every
        self.count = count or (lambda trainer, probe: trainer.global_step)
        self.outputs: list[object] = []
        self.batches: list[object] = []
        self.weights: dict[int, dict[str, Tensor]] = {}
        self._passed = self._step = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.outputs.append(torch.utils._pytree.tree_map_only(Tensor, torch.clone, outputs))
        self.batches.append(batch)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        before, self._passed = self._passed, self.count(trainer, self)
        if self._passed // self.every > before // self.every:
            self.weights[self._step] = weights_of(pl_module)


def is_beside(trainer: Trainer) -> bool:
    """Whether what runs now is a merged validation, or a trial: callbacks hear nothing of it."""
    return any(vars(callback).get("on_train_start", "") is None for callback in trainer.callbacks)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, by the names of the module that nobody has compiled."""
    return {name.replace("_orig_mod.", ""): t.clone() for name, t in module.state_dict().items()}


def mean_of(snapshots: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of floating-point tensors in fp64, cast back once; the newest of all others."""
    newest = snapshots[-1]
    return {
        name: torch.stack([s[name].double() for s in snapshots]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in newest.items()
    }


def assert_same_bits(found, expected) -> None:
    """Two trees of tensors are equal bit for bit, in structure, dtype and value."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_bits(found[name], value)
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a, b)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def assert_mean(found: dict[str, Tensor], snapshots: list[dict[str, Tensor]]) -> None:
    """``found`` is the mean of ``snapshots`` to the rounding of fp32 sums (and of one cast, for bf16)."""
    expected = mean_of(snapshots)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor)
            continue
        # A few fp32 roundings, relative to the largest summand (summands may cancel). A narrower dtype
        # adds its one cast: a sum that differs in its last fp32 bit may round to the neighbour.
        scale = max(float(s[name].abs().max()) for s in snapshots) if tensor.numel() else 0.0
        narrow = 0.0 if tensor.dtype == torch.float32 else torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(found[name], tensor, rtol=narrow, atol=4e-7 * scale, msg=name)


def rows(count: int = 64, width: int = 8, classes: int = 4) -> TensorDataset:
    """Learnable features and labels, always the same."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, width, generator=generator)
    return TensorDataset(x, x[:, :classes].argmax(1))


def loader(count: int = 64, batch_size: int = 8, **options) -> DataLoader:
    return DataLoader(rows(count), batch_size=batch_size, **options)


def emissions(folder: Path) -> list[Path]:
    """Every published merge below ``folder``, oldest first."""
    return sorted(path.parent for path in folder.glob("step=*/merge.json"))


class Classifier(LightningModule):
    """A linear classifier with dropout; subclasses change one thing."""

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 4))
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)
