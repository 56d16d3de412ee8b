"""Modules as others write them: trained as without the callback, and merged and published right."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foreign_modules import (
    CASES,
    GAN,
    VOCABULARY,
    ConstantBuffers,
    ConvNet,
    Frozen,
    LanguageModel,
    Parametrised,
    Run,
    Tied,
    fit,
    llama,
    merged_run,
    mixtral,
    token_dicts,
    tokens,
)
from lightning.pytorch import Callback
from safetensors.torch import load_model
from slow_cases import some_slow
from torch import nn
from training_runs import (
    Classifier,
    assert_mean,
    assert_same_bits,
    emissions,
    mean_of,
    train,
    weights_of,
)

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.cli.main import main
from merge_callback.publish.export import Naming

SLOW = ["llama, compiled inside", "llama, bf16-true", "accumulation", "epochs", "cpu, not durable"]


@pytest.fixture(scope="module", params=some_slow(CASES, SLOW))
def run(request, tmp_path_factory) -> Run:
    """Two fits of one case, without and with the callback."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("merges")
    options = {"window": 3, "every_n_steps": 2, "keep_best": 0, "dirpath": folder, **case.callback}
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
    assert_averaged(run, run.folder / "latest", newest)
    older, newer = run.recorded(newest)[::2]
    assert any(not torch.equal(older[name], newer[name]) for name in newer)


def test_every_emission_is_the_mean_of_what_it_lists(run):
    published = emissions(run.folder)
    assert len(published) == 3
    for folder in published:
        steps = [s["step"] for s in json.loads((folder / "merge.json").read_text())["snapshots"]]
        assert_averaged(run, folder, steps)


def assert_averaged(run: Run, folder: Path, steps: list[int]) -> None:
    """An emission is the mean of these steps, but for the singular vectors, which are no mean."""
    found, snapshots = load_merge(folder), run.recorded(steps)
    vectors = json.loads((folder / "merge.json").read_text()).get("recomputed", [])
    assert bool(vectors) == (run.case.make is Parametrised)
    assert_mean(
        {name: tensor for name, tensor in found.items() if name not in vectors},
        [{name: tensor for name, tensor in s.items() if name not in vectors} for s in snapshots],
    )


def test_the_emission_loads_into_a_fresh_module_under_its_own_names(run):
    merged = load_merge(run.folder / "latest")
    module = (run.case.fresh or run.case.make)()
    target = module.model if run.wraps_pretrained else module
    target.to({"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(run.case.trainer.get("precision")))
    target.load_state_dict(merged, strict=True)
    assert not [name for name in merged if "_orig_mod" in name]
    assert_same_bits(weights_of(target), merged)


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


@pytest.mark.parametrize(
    ("make", "given", "stored"),
    [(llama, "window", None), (mixtral, "window/step=*", None), (llama, "window", "bf16")],
)
@pytest.mark.usefixtures("in_this_process")
def test_a_merge_of_the_snapshots_files_is_what_the_run_publishes(make, given, stored, tmp_path):
    transformers = pytest.importorskip("transformers")
    excluded = ["*norm.weight"]
    options = {"exclude": excluded, "snapshot_dtype": stored, "method": "sma"}
    module = make()
    module.model.model.embed_tokens.weight.requires_grad_(False)
    merged_run(module, tmp_path / "run", data=token_dicts(shuffle=True), **options)
    emission, output = tmp_path / "run/latest", tmp_path / "out"
    assert main(["merge", str(tmp_path / "run" / given), "--quiet", "--output", str(output)]) == 0
    emitted, merged = load_merge(emission), load_merge(output)
    assert_same_bits(merged, emitted)
    own, other = (json.loads((folder / "merge.json").read_text()) for folder in (output, emission))
    assert own["tied"] == other["tied"] != {}
    assert own["stripped_prefix"] == other["stripped_prefix"]
    frozen = "model.model.embed_tokens.weight"  # the command finds out that it is the same in all snapshots
    assert {*own["copied"], frozen} == {*other["copied"]}
    for file in ("config.json", "generation_config.json"):
        assert json.loads((output / file).read_text()) == json.loads((emission / file).read_text())
    model, report = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report.values()), report
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.usefixtures("in_this_process")
def test_a_lightning_merge_of_snapshots_has_the_names_of_the_module(tmp_path):
    pytest.importorskip("transformers")
    module = llama()
    merged_run(module, tmp_path / "run", data=token_dicts())
    command = ["merge", str(tmp_path / "run/window"), "--quiet", "--as", "lightning", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0
    state = torch.load(tmp_path / "out/merged.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == module.state_dict().keys()
    module.load_state_dict(load_merge(tmp_path / "out"))


@pytest.mark.parametrize(
    "published",
    [
        3,
        {"tied": {"a": 3}},
        {"stripped_prefix": []},
        {"files": {"../x": "y"}},
        {"copied": "all"},
        {"dtypes": {"torch.bfloat16": "int8"}},
    ],
)
def test_a_manifest_that_says_it_in_no_known_way_is_refused(published, tmp_path, monkeypatch, capsys):
    merged_run(Classifier(), tmp_path)
    manifest = tmp_path / "window/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "published": published}))
    assert main(["merge", str(tmp_path / "window"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert (error.count("\n"), "manifest.json" in error) == (1, True)


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


class Pooled(torch.nn.Module):
    """A Hugging Face model and layers after it, like those of sentence-transformers."""

    def __init__(self, model):
        super().__init__()
        self.model, self.dense = model, torch.nn.Linear(4, 2)


def test_a_sentence_transformer_is_not_taken_for_the_model_inside(monkeypatch):
    pooled = Pooled(llama().model)
    assert Naming.of(pooled, None).prefix == "model."
    library = SimpleNamespace(SentenceTransformer=Pooled)
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    assert Naming.of(pooled, None) == Naming()
