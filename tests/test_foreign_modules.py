"""The callback beside modules and trainers nobody here wrote: it changes nothing; its merge is the mean."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos import LightningTransformer, Transformer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training_runs import (
    Classifier,
    Probe,
    assert_mean,
    assert_same_bits,
    emissions,
    loader,
    mean_of,
    rows,
    seed,
    train,
    weights_of,
)

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.merging.linear import Weighted

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


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory) -> Run:
    """Two fits of one case, without and with the callback."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("merges")
    options = {"window": 3, "every_n_steps": 2, "dirpath": folder, **case.callback}
    plain, module = fit(case)
    probe, other = fit(case, CheckpointMergeCallback(**options))
    return Run(case, plain, probe, weights_of(module), weights_of(other), folder)


def test_training_with_the_callback_is_bitwise_training_without_it(run):
    assert len(run.plain.outputs) >= 12
    assert_same_bits(run.probe.outputs, run.plain.outputs)
    assert_same_bits(run.weights, run.plain_weights)


def test_the_merge_is_the_mean_of_the_newest_snapshots(run):
    record = json.loads((run.folder / "latest" / "merge.json").read_text())
    newest = list(run.probe.weights)[-3:]
    assert [s["step"] for s in record["snapshots"]] == newest
    assert_mean(load_merge(run.folder / "latest"), run.recorded(newest))
    older, newer = run.recorded(newest)[::2]
    assert any(not torch.equal(older[name], newer[name]) for name in newer)


def test_every_emission_is_the_mean_of_what_it_lists(run):
    published = emissions(run.folder)
    assert len(published) == 3
    for folder in published:
        steps = [s["step"] for s in json.loads((folder / "merge.json").read_text())["snapshots"]]
        assert_mean(load_merge(folder), run.recorded(steps))


def test_the_emission_loads_into_a_fresh_module_under_its_own_names(run):
    merged = load_merge(run.folder / "latest")
    module = (run.case.fresh or run.case.make)()
    target = module.model if run.wraps_pretrained else module
    target.to({"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(run.case.trainer.get("precision")))
    target.load_state_dict(merged, strict=True)
    assert not [name for name in merged if "_orig_mod" in name]
    assert_same_bits(weights_of(target), merged)


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


def test_frozen_parameters_are_copied_and_count_for_no_diversity(tmp_path):
    module = Frozen()
    before = weights_of(module)
    probe = merged_run(module, tmp_path)
    merged = load_merge(tmp_path / "latest")
    for name in ("net.0.weight", "net.0.bias"):
        assert torch.equal(merged[name], before[name])
    older, newer = list(probe.weights.values())[-3], list(probe.weights.values())[-1]
    trained = [name for name in older if not name.startswith("net.0")]
    distances = [(older[n] - newer[n]).double().square().mean().sqrt() for n in trained]
    record = json.loads((tmp_path / "latest" / "merge.json").read_text())
    # fp32 differences, summed in fp64 here and there
    assert record["diversity"]["rms"] == pytest.approx(float(sum(distances) / len(distances)), rel=1e-6)


@pytest.mark.parametrize("storage", ["disk", "cpu", "device"])
def test_excluded_names_are_copied_from_the_newest_snapshot(storage, tmp_path):
    probe = merged_run(ConvNet(), tmp_path, storage=storage, exclude=["*.bias", "net.2.running_*"])
    newest = list(probe.weights.values())
    merged, expected = load_merge(tmp_path / "latest"), mean_of(newest[-3:])
    copied = [name for name in merged if name.endswith(".bias") or ".running_" in name]
    assert len(copied) == 5
    for name, tensor in merged.items():
        assert torch.equal(tensor, newest[-1][name]) == (name in copied or not tensor.is_floating_point())
    assert_mean(
        {n: t for n, t in merged.items() if n not in copied},
        [{n: s[n] for n in expected if n not in copied} for s in newest[-3:]],
    )


def test_a_tied_tensor_is_excluded_under_any_of_its_names(tmp_path):
    probe = merged_run(Tied(), tmp_path, exclude=["decode.weight"])
    merged = load_merge(tmp_path / "latest")
    assert torch.equal(merged["encode.weight"], list(probe.weights.values())[-1]["encode.weight"])


@pytest.mark.parametrize("storage", ["disk", "cpu", "device"])
def test_narrow_snapshots_are_merged_into_the_models_dtype(storage, tmp_path):
    probe = merged_run(ConvNet(), tmp_path, storage=storage, snapshot_dtype="bf16")
    trained = dict(ConvNet().named_parameters())
    rounded = [
        {n: t.bfloat16().float() if n in trained else t for n, t in snapshot.items()}
        for snapshot in list(probe.weights.values())[-3:]
    ]
    assert_mean(load_merge(tmp_path / "latest"), rounded)


def test_constant_buffers_keep_their_bits_in_a_merge(tmp_path):
    # Ten times a tenth is not one in fp32, but a mask of ones that is compared with 1 must stay one.
    module = ConstantBuffers()
    before = weights_of(module)
    merged_run(module, tmp_path, window=10, steps=20)
    merged = load_merge(tmp_path / "latest")
    for name in ("ones", "table", "mask", "nothing"):
        assert torch.equal(merged[name], before[name]), name


def test_a_buffer_of_minus_infinities_does_not_stop_the_merging(tmp_path):
    class Masked(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("causal", torch.full((4, 4), -torch.inf).triu(1))

    module = Masked()
    merged_run(module, tmp_path)
    merged = load_merge(tmp_path / "latest")
    assert torch.equal(merged["causal"], module.causal)
    record = json.loads((tmp_path / "latest" / "merge.json").read_text())
    assert 0 < record["diversity"]["rms"] < 1  # and not NaN


class TogglingGAN(GAN):
    """Freezes the discriminator for the generator's turn, which comes last: the style of pix2pix."""

    def training_step(self, batch, batch_idx):
        generate, discriminate = self.optimizers()
        for optimizer, trained, sign in ((discriminate, True, -1), (generate, False, 1)):
            self.discriminator.requires_grad_(trained)
            optimizer.zero_grad()
            self.manual_backward(sign * self.loss(batch[0]))
            optimizer.step()


def test_what_is_frozen_for_the_moment_only_is_averaged(tmp_path):
    probe = merged_run(TogglingGAN(), tmp_path)
    assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])


class Unfreezing(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        pl_module.net[0].requires_grad_(trainer.global_step >= 4)


def test_parameters_unfrozen_during_the_run_are_averaged_from_then_on(tmp_path):
    module = Frozen()
    probe = merged_run(module, tmp_path, callbacks=[Unfreezing()])
    assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])


# Loading by other libraries


def test_safetensors_loads_a_tied_emission(tmp_path):
    probe = merged_run(Tied(), tmp_path)
    fresh = Tied()
    missing, unexpected = load_model(fresh, tmp_path / "latest" / "model.safetensors")
    assert not missing
    assert not unexpected
    assert_mean(weights_of(fresh), list(probe.weights.values())[-3:])


@pytest.mark.parametrize(("make", "max_shard_size"), [(llama, "5GB"), (mixtral, "3KB")])
def test_from_pretrained_gives_the_merged_model(make, max_shard_size, tmp_path):
    transformers = pytest.importorskip("transformers")
    merged_run(make(), tmp_path, data=token_dicts(shuffle=True), max_shard_size=max_shard_size)
    folder = tmp_path / "latest"
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_size == "3KB")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = make().model
    expected.load_state_dict(load_merge(folder))
    batch = tokens()[:4]
    assert torch.equal(model.eval()(batch).logits, expected.eval()(batch).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected.save_pretrained(tmp_path / "saved")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text()) == json.loads((tmp_path / "saved" / file).read_text())


@pytest.mark.parametrize(
    ("precision", "declared", "expected"),
    [("bf16-true", None, torch.bfloat16), ("32", "bfloat16", torch.float32), ("32", None, torch.float32)],
)
def test_from_pretrained_keeps_the_dtype_of_the_weights(precision, declared, expected, tmp_path):
    # A model whose config names the dtype of the checkpoint it once came from trains in another one.
    transformers = pytest.importorskip("transformers")
    callback = CheckpointMergeCallback(window=2, every_n_steps=2, dirpath=tmp_path, evaluate=False)
    module = llama(dtype=declared)
    train(module, callback, data=token_dicts(), precision=precision, max_steps=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "latest")
    assert module.dtype == model.dtype == expected
    merged = load_merge(tmp_path / "latest")
    assert torch.equal(model.lm_head.weight, merged["lm_head.weight"])


def test_the_live_models_config_is_left_alone(tmp_path):
    module = llama()
    before = module.model.config.to_dict()
    merged_run(module, tmp_path, data=token_dicts())
    assert module.model.config.to_dict() == before


def test_a_generation_config_that_cannot_be_saved_ends_no_run(tmp_path):
    module = llama()
    module.model.generation_config.temperature = 0.5  # refused without do_sample
    with pytest.raises(ValueError):
        module.model.generation_config.save_pretrained(tmp_path)
    probe = merged_run(module, tmp_path / "merges", data=token_dicts())
    assert list(probe.weights) == [2, 4, 6, 8, 10, 12]
    assert load_merge(tmp_path / "merges" / "latest")


class TwoHeads(LanguageModel):
    """Its own head has, without the prefix, the name of the wrapped model's."""

    def __init__(self) -> None:
        super().__init__(llama(tie_word_embeddings=False).model)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)

    def training_step(self, batch, batch_idx):
        hidden = self.model.model(batch["input_ids"]).last_hidden_state
        both = self.model.lm_head(hidden) + self.lm_head(hidden)
        return nn.functional.cross_entropy(both.flatten(0, 1), batch["input_ids"].flatten())


def test_no_tensor_is_lost_where_names_meet_without_their_prefix(tmp_path):
    module = TwoHeads()
    merged_run(module, tmp_path, data=token_dicts())
    merged = load_merge(tmp_path / "latest")
    assert sum(t.numel() for t in merged.values()) == sum(p.numel() for p in module.parameters())


def test_a_stripped_emission_loads_into_the_inner_module(tmp_path):
    probe = merged_run(Classifier(), tmp_path, strip_prefix="net.")
    inner = Classifier().net
    inner.load_state_dict(load_merge(tmp_path / "latest"), strict=True)
    newest = list(probe.weights.values())[-3:]
    stripped = [{n.removeprefix("net."): t for n, t in s.items()} for s in newest]
    assert_mean(inner.state_dict(), stripped)


def test_a_parameter_may_be_named_like_a_files_format(tmp_path):
    class Momentum(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.pt = nn.Parameter(torch.ones(()))  # transverse momentum; a file's format is "pt", too

        def forward(self, x):
            return self.pt * super().forward(x)

    merged_run(Momentum(), tmp_path)
    merged = load_merge(tmp_path / "latest")
    assert merged.keys() == Momentum().state_dict().keys()


# Modules and batches that change while they train: nothing of it may end the run


class GrowingBuffer(Classifier):
    """Keeps every feature it has seen in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(1, 8))

    def training_step(self, batch, batch_idx):
        self.bank = torch.cat([self.bank, batch[0].mean(0, keepdim=True)])
        return super().training_step(batch, batch_idx)


class LateParameter(Classifier):
    """Gets a layer in the middle of the run."""

    def on_train_batch_start(self, batch, batch_idx) -> None:
        if batch_idx == 3:
            self.net[0].register_parameter("late", nn.Parameter(torch.ones(2)))


class LostBuffer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scratch", torch.zeros(3))

    def on_train_batch_start(self, batch, batch_idx) -> None:
        self.scratch = None


class ExpandedBuffer(Classifier):
    """A buffer whose elements share memory, so that it cannot be written to."""

    persistent = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 1).expand(4, 4), persistent=self.persistent)
        self.after = nn.Linear(4, 4)

    def forward(self, x):
        return self.after(super().forward(x)) * self.mask[0]


class ExpandedTransientBuffer(ExpandedBuffer):
    persistent = False


@pytest.mark.parametrize(
    "make", [GrowingBuffer, LateParameter, LostBuffer, ExpandedBuffer, ExpandedTransientBuffer]
)
def test_tensors_that_come_go_grow_or_overlap_do_not_touch_training(make, tmp_path):
    case = Case(make)
    plain, module = fit(case)
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    probe, other = fit(case, callback)
    assert_same_bits(probe.outputs, plain.outputs)
    assert_same_bits(weights_of(other), weights_of(module))


@pytest.mark.parametrize("make", [ExpandedBuffer, ExpandedTransientBuffer])
def test_an_expanded_buffer_does_not_stop_merged_evaluation(make, tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    trainer = train(make(), callback, data=loader(), val=loader(16))
    assert "merge/gain/val_loss" in trainer.callback_metrics


class Split(Enum):
    TRAIN = "train"


class Mixed(IterableDataset):
    """Batches of which only some are token ids."""

    def __init__(self, *kinds) -> None:
        self.kinds = kinds

    def __iter__(self):
        for _ in range(12):
            yield from self.kinds


TOKENS, ROWS = {"input_ids": tokens()[:4]}, {"image": torch.zeros(4, 8)}


class Node:
    """A batch that points to itself, as nodes of a graph do."""

    def __init__(self) -> None:
        self.neighbour, self.image = self, torch.zeros(4, 8)


@pytest.mark.parametrize(
    "kinds",
    [(TOKENS, ROWS), (ROWS, TOKENS), (TOKENS, None), ({"split": Split.TRAIN, **ROWS},), (Node(),)],
    ids=["tokens first", "rows first", "none", "enum", "cycle"],
)
def test_an_interval_in_steps_never_needs_countable_batches(kinds, tmp_path):
    class Anything(Classifier):
        def training_step(self, batch, batch_idx):
            return self(torch.ones(2, 8)).square().mean()

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

    probe = merged_run(Anything(), tmp_path, data=DataLoader(Mixed(*kinds), batch_size=None))
    assert list(probe.weights) == [2, 4, 6, 8, 10, 12]
    assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])


def test_weights_too_few_for_the_window_are_refused_at_once(tmp_path):
    # Else the run would end in the middle, with the first snapshot that has no weight.
    with pytest.raises(ValueError, match="window=3"):
        CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path, method=Weighted((0.5, 0.5)))


def test_one_callback_serves_several_fits(tmp_path):
    # Images, whose batches hold no tokens: that is found out anew in every fit.
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    for _ in range(2):
        module, probe = Classifier(), Probe()
        train(module, callback, probe, data=loader(), val=loader(16))
        assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])


def test_a_second_fit_of_the_same_trainer_goes_on_with_its_window(tmp_path):
    callback, probe = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path), Probe()
    module = Classifier()
    trainer = train(module, callback, probe, data=loader(), val=loader(16), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(16))
    assert list(probe.weights) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])
    record = json.loads((tmp_path / "latest" / "merge.json").read_text())
    assert [s["step"] for s in record["snapshots"]] == [12, 14, 16]


def test_two_callbacks_merge_side_by_side(tmp_path):
    case = Case(Classifier, trainer={"max_epochs": 3})
    plain, module = fit(case)
    callbacks = [
        CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / "close"),
        CheckpointMergeCallback(window=2, every_n_steps=8, dirpath=tmp_path / "far"),
    ]
    probe, other = fit(case, *callbacks)
    assert_same_bits(probe.outputs, plain.outputs)
    assert_same_bits(weights_of(other), weights_of(module))
    assert_mean(load_merge(tmp_path / "close" / "latest"), [probe.weights[k] for k in (20, 22, 24)])
    assert_mean(load_merge(tmp_path / "far" / "latest"), [probe.weights[k] for k in (16, 24)])


class GraphAcrossBatches(Classifier):
    """Truncated back-propagation: the graph of one batch is still alive after the next validation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kept = None

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.kept is None:
            self.kept = loss
            return loss.detach()
        self.optimizers().zero_grad()
        self.manual_backward(self.kept + loss)
        self.optimizers().step()
        self.kept = None
        return loss.detach()


def test_a_graph_that_lives_across_a_validation_still_runs_backward(tmp_path):
    case = Case(GraphAcrossBatches, trainer={"max_epochs": 3, "val_check_interval": 3})
    plain, module = fit(case)
    probe, other = fit(case, CheckpointMergeCallback(window=2, every_n_steps=1, dirpath=tmp_path))
    assert_same_bits(probe.outputs, plain.outputs)
    assert_same_bits(weights_of(other), weights_of(module))


# Trainers


def test_a_fast_dev_run_writes_nothing(tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=1, dirpath=tmp_path / "merges")
    train(Classifier(), callback, data=loader(), val=loader(), fast_dev_run=True, default_root_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_limited_by_time_publishes_its_last_merge(tmp_path):
    probe = Probe()
    callback = CheckpointMergeCallback(
        window=3, every_n_steps=2, dirpath=tmp_path, emit_every=0, durable=False
    )
    options = {"max_time": timedelta(milliseconds=500), "max_steps": -1, "max_epochs": -1}
    train(Classifier(), callback, probe, data=DataLoader(Endless(), 8), **options)
    assert len(probe.weights) > 3
    assert_mean(load_merge(tmp_path / "latest"), list(probe.weights.values())[-3:])


@pytest.mark.parametrize(
    "options", [{"logger": False}, {"barebones": True}, {"enable_checkpointing": True}, {"logger": True}]
)
def test_without_a_dirpath_merges_lie_beside_lightnings_logs(options, tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2)
    trainer = train(
        Classifier(), callback, data=loader(), val=loader(16), default_root_dir=tmp_path, **options
    )
    beside = Path(trainer.log_dir) if trainer.log_dir else tmp_path
    assert (beside / "merges" / "latest" / "model.safetensors").exists()


def test_checkpoints_and_merges_share_a_folder(tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, monitor="merged/val_loss", save_top_k=-1, filename="{step}"
    )
    train(
        Classifier(),
        callback,
        checkpoint,
        data=loader(),
        val=loader(16),
        max_epochs=3,
        enable_checkpointing=True,
    )
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    assert len(emissions(tmp_path)) == 3


# Loggers

LOGGED = {
    "merge/phase",
    "merge/lr_ratio",
    "merge/window",
    "merge/diversity_rms",
    "merge/diversity_change",
    "merged/val_loss",
    "merge/gain/val_loss",
}


def curves_of_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def curves_of_csv(folder: Path) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    curves.setdefault(name, {})[int(row["step"])] = float(value)
    return curves


def logged_run(folder: Path, *callbacks: Callback) -> list[dict[str, dict[int, float]]]:
    seed()
    loggers = [TensorBoardLogger(folder, name="tb"), CSVLogger(folder, name="csv")]
    options = {"max_epochs": 3, "log_every_n_steps": 1, "logger": loggers}
    train(Classifier(), *callbacks, data=loader(), val=loader(16), **options)
    return [curves_of_tensorboard(loggers[0].log_dir), curves_of_csv(Path(loggers[1].log_dir))]


def test_every_logger_gets_every_curve_at_the_steps_of_the_live_ones(tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / "merges")
    for curves in logged_run(tmp_path, callback):
        assert curves.keys() >= LOGGED
        assert not [name for name in curves if name.startswith("merged/") and name != "merged/val_loss"]
        assert curves["merged/val_loss"].keys() == curves["val_loss"].keys() == {7, 15, 23}
        # Snapshots follow every second step; Lightning counts a step's logs from 0.
        assert curves["merge/window"] == {1: 1, 3: 2, 5: 3, **dict.fromkeys(range(7, 24, 2), 3)}
        assert curves["merge/diversity_rms"].keys() == set(range(5, 24, 2))
        for step, gain in curves["merge/gain/val_loss"].items():
            # The logger holds fp32, and the gain is a difference of fp32 losses around 1.
            difference = curves["val_loss"][step] - curves["merged/val_loss"][step]
            assert gain == pytest.approx(difference, abs=5e-7)


def test_the_live_curves_are_those_of_a_run_without_the_callback(tmp_path):
    plain = logged_run(tmp_path / "plain")
    merged = logged_run(
        tmp_path / "merged",
        CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / "merges"),
    )
    for without, with_merges in zip(plain, merged, strict=True):
        live = {n: c for n, c in with_merges.items() if not n.startswith(("merge/", "merged/"))}
        assert live == without


def test_tokens_are_logged_where_they_can_be_counted(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    train(llama(), callback, data=token_dicts(), logger=logger)
    assert curves_of_csv(Path(logger.log_dir))["merge/tokens"] == {2 * k - 1: 64 * k for k in range(1, 7)}


# Hooks


def test_the_published_snapshots_are_taken_once_each(tmp_path):
    probe = merged_run(GAN(), tmp_path, steps=36, every_n_steps=3, keep_last=None)
    steps = Counter(
        s["step"]
        for folder in emissions(tmp_path)
        for s in json.loads((folder / "merge.json").read_text())["snapshots"]
    )
    assert set(steps) == {4, 6, 10, 12, 16, 18, 22, 24, 28, 30, 34, 36}
    assert len(probe.outputs) == 18
