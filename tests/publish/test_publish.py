"""What a run publishes: its content, its provenance, its dtypes and its shards."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from published_runs import fit, published_steps, record
from run_outcomes import damage, emissions, window
from safetensors.torch import load_file
from slow_cases import some_slow
from tiny_run import Keeper, Tiny
from torch import nn
from torch.nn.functional import linear

from merge_callback import load_merge, merge_state_dicts
from merge_callback.merging import Ema


@pytest.fixture(scope="module")
def every_merge(tmp_path_factory):
    """A run that published a merge at every snapshot and kept them all, and its weights at every step."""
    folder, keeper = tmp_path_factory.mktemp("every"), Keeper()
    _, module, callback = fit(folder, callbacks=[keeper], emit_every=1, keep_last=None)
    return folder, keeper.weights, module, callback


# --- content ------------------------------------------------------------------------------------------------


def test_an_emission_is_the_mean_of_the_snapshots_it_names(every_merge):
    folder, weights, _, _ = every_merge
    for path in emissions(folder / "merges"):
        merged_from = [weights[s["step"]] for s in record(path)["snapshots"]]
        expected = merge_state_dicts(merged_from)
        found = load_merge(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), (path.name, name)


def test_the_decay_is_merged_by_ema_unless_told_otherwise(tmp_path):
    keeper = Keeper()
    fit(tmp_path, method="auto", callbacks=[keeper], emit_every=1, keep_last=None)
    methods = set()
    for path in emissions(tmp_path / "merges"):
        said = record(path)
        methods.add((said["phase"], said["method"]["name"]))
        steps = [s["step"] for s in said["snapshots"]]
        expected = merge_state_dicts([keeper.weights[s] for s in steps], said["method"]["name"])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_merge(path).items())
    assert methods == {("stable", "sma"), ("decay", "ema")}


@pytest.mark.parametrize(
    "method",
    some_slow(
        ["slerp", "task_arithmetic", "dare", "noise", "dropout", "meta"], ["task_arithmetic", "noise", "meta"]
    ),
)
def test_every_method_merges_a_window_as_it_merges_state_dicts(tmp_path, method):
    keeper = Keeper()
    fit(tmp_path, method=method, callbacks=[keeper], keep_last=1)
    said = record(tmp_path / "merges/latest")
    steps = [s["step"] for s in said["snapshots"]]
    positions = [s["tokens"] for s in said["snapshots"]]
    dicts = [keeper.weights[step] for step in steps]
    expected = merge_state_dicts(dicts, method, positions=positions, steps=steps)
    found = load_merge(tmp_path / "merges/latest")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert said["diversity"]["rms"] > 0


def test_integer_buffers_come_from_the_newest_snapshot(every_merge):
    folder, weights, _, _ = every_merge
    for path in emissions(folder / "merges"):
        counted = load_merge(path)["norm.num_batches_tracked"]
        assert torch.equal(counted, weights[record(path)["step"]]["norm.num_batches_tracked"])


def test_the_module_loads_an_emission_under_its_own_names(every_merge):
    folder, _, module, _ = every_merge
    fresh = Tiny()
    fresh.load_state_dict(load_merge(folder / "merges/latest"), strict=True)

    assert list(load_merge(folder / "merges/latest").keys() - module.state_dict().keys()) == []
    assert safetensors.torch.load_model(Tiny(), folder / "merges/latest/model.safetensors") == (set(), [])


def test_the_live_model_keeps_its_own_weights(every_merge, tmp_path):
    _, _, module, _ = every_merge
    _, plain, _ = fit(tmp_path, callback=False)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


def test_a_merge_holds_one_phase_and_no_warm_up(every_merge):
    folder, _, _, _ = every_merge
    for path in emissions(folder / "merges"):
        segments = {(s["phase"], s["since"]) for s in record(path)["snapshots"]}
        assert len(segments) == 1
        assert record(path)["phase"] in ("stable", "decay")


def test_a_merge_does_not_hold_a_snapshot_that_proved_to_be_of_the_next_phase(tmp_path):
    # The decay since step 20 is known at step 22, after snapshot 21 passed for a stable one.
    fit(tmp_path, every_n_steps=3, emit_every=0, trainer={"max_steps": 23})

    for path in emissions(tmp_path / "merges"):
        assert len({s["phase"] for s in record(path)["snapshots"]}) == 1


# --- provenance ---------------------------------------------------------------------------------------------


def test_every_file_has_the_checksum_that_the_provenance_names(every_merge):
    folder, _, _, _ = every_merge
    assert len(emissions(folder / "merges")) >= 10
    assert not damage(folder / "merges")


def test_the_provenance_names_every_snapshot_with_its_weight(every_merge):
    folder, _, _, _ = every_merge
    known = {s["step"]: s for s in window(folder / "merges")["snapshots"]}
    newest = record(folder / "merges/latest")
    assert newest["snapshots"]
    for entry in newest["snapshots"]:
        for key in ("step", "tokens", "lr", "phase", "checksum"):
            assert entry[key] == known[entry["step"]][key]
        assert entry["tokens"] == 24 * entry["step"]
        assert entry["weight"] == 1 / len(newest["snapshots"])


def test_the_provenance_names_method_diversity_layout_and_versions(every_merge):
    folder, weights, _, _ = every_merge
    newest = record(folder / "merges/latest")
    assert newest["method"] == {"name": "sma", "options": {}, "reference": "arXiv 2505.12082, eq. 3"}
    assert newest["step"] == 26
    assert newest["tokens"] == 624
    assert newest["layout"] == window(folder / "merges")["layout"]
    assert newest["versions"].keys() >= {"python", "torch", "lightning", "safetensors"}
    assert newest["diversity"]["steps"] == [22, 26]
    older, newer = weights[22], weights[26]
    names = [name for name, _ in Tiny().named_parameters()]
    rms = [(older[n] - newer[n]).double().square().mean().sqrt().item() for n in names]
    assert newest["diversity"]["rms"] == pytest.approx(sum(rms) / len(rms), rel=1e-6)


def test_the_provenance_names_the_options_of_the_method_and_what_was_copied(tmp_path):
    fit(tmp_path, method=Ema(alpha=0.3, init="recursive"), exclude=["norm.*"])

    newest = record(tmp_path / "merges/latest")
    assert newest["method"]["name"] == "ema"
    assert newest["method"]["options"] == {"alpha": 0.3, "init": "recursive"}
    assert [n for n in newest["copied"] if n != "norm.num_batches_tracked"] == [
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.weight",
    ]
    assert sum(s["weight"] for s in newest["snapshots"]) == pytest.approx(1, abs=1e-15)


def test_the_provenance_is_json_that_other_languages_read(every_merge):
    folder, _, _, _ = every_merge

    for path in emissions(folder / "merges"):
        constants: list[str] = []  # NaN and Infinity, which only Python's json knows
        json.loads((path / "merge.json").read_text(), parse_constant=constants.append)
        assert not constants


# --- shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 300, "1KB"])
def test_a_model_above_the_shard_size_is_published_in_shards_with_an_index(tmp_path, every_merge, size):
    whole, _, _, _ = every_merge
    fit(tmp_path, emit_every=1, keep_last=None, max_shard_size=size)

    path = tmp_path / "merges/latest"
    shards = sorted(path.glob("model-*.safetensors"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert not (path / "model.safetensors").exists()
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    for shard in shards:
        tensors = load_file(shard)
        nbytes = sum(t.nbytes for t in tensors.values())
        assert nbytes <= (1000 if size == "1KB" else size) or len(tensors) == 1
        assert all(index["weight_map"][name] == shard.name for name in tensors)
    expected, found = load_merge(whole / "merges/latest"), load_merge(path)
    assert index["weight_map"].keys() == expected.keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(record(path)["files"]) >= {shard.name for shard in shards}


def test_the_index_has_a_checksum_too(tmp_path):
    fit(tmp_path, max_shard_size=300)

    assert "model.safetensors.index.json" in record(tmp_path / "merges/latest")["files"]
    assert not damage(tmp_path / "merges")


def test_loading_shards_of_which_one_is_gone_is_an_error(tmp_path):
    fit(tmp_path, max_shard_size=300)
    next((tmp_path / "merges/latest").glob("model-00002-*")).unlink()

    with pytest.raises(FileNotFoundError):
        load_merge(tmp_path / "merges/latest")


@pytest.mark.parametrize("path", ["nowhere", ".", "latest"])
def test_loading_what_is_no_merge_is_an_error(tmp_path, path):
    (tmp_path / "latest").symlink_to("gone")

    with pytest.raises(FileNotFoundError):
        load_merge(tmp_path / path)


# --- dtypes -------------------------------------------------------------------------------------------------


class Half(Tiny):
    """In bfloat16, and trained so that snapshots differ by little."""

    def __init__(self):
        super().__init__()
        self.to(torch.bfloat16)
        self.norm.float()

    def loss(self, batch):
        ids = batch["input_ids"]
        hidden = self.norm(self.embed(ids[:, :-1]).flatten(0, 1).float())
        logits = linear(hidden.bfloat16(), self.head.weight, self.head.bias)
        return nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())


def test_a_bf16_model_is_summed_in_fp32_and_cast_once(tmp_path):
    keeper = Keeper()
    fit(tmp_path, module=Half, callbacks=[keeper])

    path = tmp_path / "merges/latest"
    found = load_merge(path)
    used = [keeper.weights[s["step"]] for s in record(path)["snapshots"]]
    assert len(used) == 3
    for name in ("embed.weight", "head.weight"):
        stacked = torch.stack([weights[name] for weights in used])
        assert found[name].dtype == torch.bfloat16
        exact = stacked.double().mean(0)
        error = (found[name].double() - exact).abs()
        # One rounding to bfloat16, whose unit roundoff is 2^-8, and a few in fp32 before it.
        assert (error <= exact.abs() * (2**-8 + 2**-20)).all()
        assert not torch.equal(found[name], sum(w / 3 for w in stacked))  # not what bf16 sums give
    assert found["norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_a_merge_has_the_models_dtypes_whatever_the_snapshots_have(tmp_path, dtype):
    keeper = Keeper()
    fit(tmp_path, callbacks=[keeper], snapshot_dtype=dtype)

    path = tmp_path / "merges/latest"
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[dtype]
    used, trained = (
        [keeper.weights[s["step"]] for s in record(path)["snapshots"]],
        dict(Tiny().named_parameters()),
    )
    for name, tensor in load_merge(path).items():
        assert tensor.dtype == used[-1][name].dtype
        if tensor.is_floating_point():
            kept = wanted if name in trained else tensor.dtype
            exact = torch.stack([w[name].to(kept).double() for w in used]).mean(0)
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7)


# --- Hugging Face -------------------------------------------------------------------------------------------


def test_a_generation_config_that_transformers_will_not_save_costs_that_file_only(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )

    class Llama(Tiny):
        def __init__(self):
            super().__init__()
            del self.embed, self.norm, self.head
            self.model = transformers.LlamaForCausalLM(config)
            # Real checkpoints carry such settings; `save_pretrained` raises on them.
            self.model.generation_config.temperature = 0.5
            self.model.generation_config.do_sample = False

        def loss(self, batch):
            return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    trainer, _, _ = fit(tmp_path, module=Llama, trainer={"max_steps": 12})

    assert trainer.global_step == 12
    assert published_steps(tmp_path) == [8, 12]
    assert (Path(tmp_path) / "merges/latest/config.json").is_file()
