"""Modules and data as others write them, and runs of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos import LightningTransformer, Transformer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training_runs import (
    Classifier,
    Probe,
    loader,
    rows,
    seed,
    train,
)

from merge_callback import CheckpointMergeCallback

VOCABULARY = 64


# Modules


class ConvNet(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4)
        ).to(memory_format=torch.channels_last)


class Compilable(Classifier):
    """Dynamo of torch 2.13 breaks on ``self.log``, with or without the callback."""

    @torch.compiler.disable
    def log(self, *args, **kwargs) -> None:
        super().log(*args, **kwargs)


class CompiledInside(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")


class Frozen(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class ConstantBuffers(Classifier):
    """Buffers of every kind that training leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.randn(3), persistent=False)
        self.register_buffer("ones", torch.ones(5))
        self.register_buffer("table", torch.randn(4, 3, dtype=torch.float64))
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("absent", None)
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scalar * super().forward(x) + self.cache.sum() + self.table.sum().float()


class Tied(Classifier):
    """An autoencoder-like pair of layers that share their weight, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 8), nn.Linear(8, 8)
        self.decode.weight = self.encode.weight
        self.again = self.net[0]

    def forward(self, x):
        return self.again(self.decode(self.encode(x)).relu())[:, :4]


class ManyDtypes(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Linear(4, 4).double())
        self.net.append(nn.Linear(4, 4).bfloat16())

    def forward(self, x):
        x = self.net[:3](x)
        return self.net[4](self.net[3](x.double()).bfloat16()).float()


class Parametrised(Classifier):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.net[0])
        nn.utils.parametrizations.spectral_norm(self.net[2])


class Manual(Classifier):
    """One optimizer, stepped by hand on every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


class GAN(LightningModule):
    """Generator and discriminator, each with an optimizer, which take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(4, 8), nn.Linear(8, 1)

    def loss(self, real):
        fake = self.generator(torch.randn(len(real), 4))
        return (self.discriminator(fake) - self.discriminator(real)).tanh().mean()

    def training_step(self, batch, batch_idx):
        losses = {}
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            self.toggle_optimizer(optimizer)
            loss = sign * self.loss(batch[0])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            losses[str(sign)] = loss.detach()
        return losses

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.generator.parameters(), lr=0.3),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.05),
        )


class LanguageModel(LightningModule):
    """Wraps a Hugging Face model the way everybody does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def llama(**options) -> LanguageModel:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{**TINY, **options})
    return LanguageModel(transformers.LlamaForCausalLM(config))


def mixtral(**options) -> LanguageModel:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        **TINY, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, **options
    )
    return LanguageModel(transformers.MixtralForCausalLM(config))


class BagOfTokens(LanguageModel):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(VOCABULARY, 4))

    def training_step(self, batch, batch_idx):
        return self.model(batch["input_ids"]).sum(1).square().mean()


TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


class DemoTransformer(LightningTransformer):
    def __init__(self) -> None:
        super().__init__(vocab_size=VOCABULARY)
        self.model = Transformer(vocab_size=VOCABULARY, ninp=16, nhid=16, nlayers=1)

    def prepare_data(self) -> None:
        """Downloads nothing: the tokens are made here."""


# Data


def tokens(count: int = 64, length: int = 8) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def token_dicts(**options) -> DataLoader:
    return DataLoader([{"input_ids": row} for row in tokens()], batch_size=4, **options)


def token_pairs(**options) -> DataLoader:
    return DataLoader(TensorDataset(tokens(), tokens().roll(-1, 1)), batch_size=4, **options)


class Endless(IterableDataset):
    """Rows without a length and without an end."""

    def __iter__(self):
        while True:
            yield from rows()


class Stream(IterableDataset):
    """Rows without a length, but with an end."""

    def __iter__(self):
        yield from rows()


def text_data():
    return token_dicts(shuffle=True), token_dicts()


def row_data():
    return loader(shuffle=True), loader(16)


# Cases


@dataclass(frozen=True)
class Case:
    """A module, its data and what is set on trainer and callback; ``fitted`` is what fit is given."""

    make: Callable[[], LightningModule]
    data: Callable[[], tuple[Any, Any]] = row_data
    trainer: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    probe: Callable[[], Probe] = Probe
    fitted: Callable[[LightningModule], Any] = lambda module: module
    fresh: Callable[[], LightningModule] | None = None
    stance: str = "default"


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop |= trainer.global_step >= self.step


def tokens_so_far(trainer, probe: Probe) -> int:
    return sum(batch["input_ids"].numel() for batch in probe.batches)


CASES = {
    "boring": Case(BoringModel, data=lambda: (None, None)),
    "demo transformer": Case(DemoTransformer, data=lambda: (token_pairs(shuffle=True), None)),
    "llama": Case(llama, text_data),
    "mixtral": Case(mixtral, text_data),
    "llama, bf16-true": Case(llama, text_data, {"precision": "bf16-true"}),
    "llama, compiled inside": Case(
        # Wrapped, but not run through the compiler, which would take five seconds.
        lambda: LanguageModel(torch.compile(llama().model)),
        text_data,
        fresh=llama,
        stance="force_eager",
    ),
    "batch norm": Case(ConvNet),
    "compiled": Case(Compilable, fitted=lambda m: torch.compile(m, backend="aot_eager")),
    "compiled inside": Case(CompiledInside, fresh=Classifier),
    "accumulation": Case(Classifier, trainer={"accumulate_grad_batches": 3, "max_epochs": 3}),
    "accumulation, tokens": Case(
        # 32 tokens a batch, 96 a step: most of the boundaries fall inside an accumulation.
        BagOfTokens,
        text_data,
        {"accumulate_grad_batches": 3, "max_epochs": 2},
        {"every_n_steps": None, "every_n_tokens": 160},
        lambda: Probe(160, tokens_so_far),
    ),
    "accumulation, validation inside": Case(
        Classifier, trainer={"accumulate_grad_batches": 4, "max_epochs": 4, "val_check_interval": 3}
    ),
    "manual": Case(Manual),
    "gan": Case(
        GAN, trainer={"max_steps": 36}, callback={"every_n_steps": 3}, probe=lambda: Probe(3)
    ),  # two steps a batch: snapshots come at 4, 6, 10, 12, …
    "bf16-true": Case(Classifier, trainer={"precision": "bf16-true"}),
    "64-true": Case(Classifier, trainer={"precision": "64-true"}),
    "bf16-mixed": Case(Classifier, trainer={"precision": "bf16-mixed"}),
    "frozen": Case(Frozen),
    "constant buffers": Case(ConstantBuffers),
    "tied": Case(Tied),
    "many dtypes": Case(ManyDtypes),
    "parametrised": Case(Parametrised),
    "epochs": Case(Classifier, trainer={"max_epochs": 3}),
    "iterable": Case(
        Classifier, lambda: (DataLoader(Stream(), 8), DataLoader(Stream(), 8)), {"max_epochs": 2}
    ),
    "endless": Case(
        Classifier,
        lambda: (DataLoader(Endless(), 8), loader(16)),
        {"max_steps": -1, "max_epochs": -1, "callbacks": lambda: [StopAt(12)], "val_check_interval": 5},
    ),
    "barebones": Case(Classifier, trainer={"barebones": True}),
    "gradients clipped": Case(Classifier, trainer={"gradient_clip_val": 0.1}),
    "cpu": Case(ConvNet, callback={"storage": "cpu"}),
    "cpu, not durable": Case(ConvNet, callback={"durable": False}),
    "device": Case(ConvNet, callback={"storage": "device"}),
}


@dataclass
class Run:
    case: Case
    plain: Probe
    probe: Probe
    plain_weights: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    folder: Path

    @property
    def wraps_pretrained(self) -> bool:
        return (self.folder / "latest" / "config.json").exists()

    def recorded(self, steps: list[int]) -> list[dict[str, torch.Tensor]]:
        """The probe's weights at ``steps``, by their published names."""
        prefix = "model." if self.wraps_pretrained else ""
        return [
            {name.removeprefix(prefix): tensor for name, tensor in self.probe.weights[step].items()}
            for step in steps
        ]


def fit(case: Case, *callbacks: Callback) -> tuple[Probe, LightningModule]:
    seed()
    torch.compiler.reset()
    module, probe = case.make(), case.probe()
    options = dict(case.trainer)
    more = options.pop("callbacks", list)()
    (data, val) = case.data()
    with torch.compiler.set_stance(case.stance):
        train(case.fitted(module), *callbacks, probe, *more, data=data, val=val, **options)
    return probe, module


# What is left out of a merge


def merged_run(module, folder, data=None, val=None, steps=12, callbacks=(), **options) -> Probe:
    seed()
    data = loader() if data is None else data  # a loader is false where it has no length
    probe = Probe()
    callback = CheckpointMergeCallback(
        **{"window": 3, "every_n_steps": 2, "dirpath": folder, "evaluate": False, **options}
    )
    train(module, probe, callback, *callbacks, data=data, val=val, max_steps=steps)
    return probe
