"""What a run publishes: content, provenance, names, shards, retention."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import killed_run
import pytest
import safetensors.torch
import torch
from killed_run import (
    STEPS,
    At,
    Elsewhere,
    Keeper,
    Tiny,
    checksum,
    damage,
    emissions,
    leftovers,
    window,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear

from merge_callback import load_merge, merge_state_dicts
from merge_callback.merging import Ema
from merge_callback.publish import Publisher, export
from merge_callback.publish.emission import ModelFiles


def fit(folder, **options):
    """A run that merges by the mean in both phases, unless told otherwise."""
    return killed_run.fit(folder, **{"method": "sma", **options})


def record(path):
    """What `merge.json` says."""
    return json.loads((path / "merge.json").read_text())


def names(folder):
    """The emissions of a run, oldest first."""
    return [path.name for path in emissions(folder / "merges")]


def published_steps(folder):
    """The steps of a run's emissions."""
    return [int(name[5:13]) for name in names(folder)]


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


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic", "dare", "noise", "dropout", "meta"])
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


# --- when, and which stay -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("emit_every", "expected"),
    [
        (0, [26]),
        # Snapshots 2 to 26 are numbers 1 to 13; a merge needs two of one phase.
        (1, [6, 8, 10, 12, 14, 16, 18, 20, 24, 26]),
        (3, [6, 12, 18, 24, 26]),
        (100, [26]),
    ],
)
def test_a_merge_is_published_every_so_many_snapshots_and_at_the_end(tmp_path, emit_every, expected):
    fit(tmp_path, emit_every=emit_every, keep_last=None)

    assert published_steps(tmp_path) == expected


@pytest.mark.parametrize("keep_last", [1, 2, None])
def test_the_last_merges_stay(tmp_path, keep_last):
    fit(tmp_path, keep_last=keep_last, keep_best=0)

    assert not (tmp_path / "merges/best").is_symlink()
    assert published_steps(tmp_path) == [4, 8, 12, 16, 20, 24, 26][1 if keep_last is None else -keep_last :]
    assert os.readlink(tmp_path / "merges/latest") == names(tmp_path)[-1]
    assert not leftovers(tmp_path / "merges")


@pytest.mark.parametrize("keep_best", [1, 2])
def test_the_best_merges_and_the_last_of_the_stable_phase_stay(tmp_path, keep_best):
    _, _, callback = fit(tmp_path, keep_last=1, keep_best=keep_best)
    validated = [row for row in callback.history if row.get("merge_step") is not None]
    scores = {row["merge_step"]: row["merged/val_loss"] for row in validated}
    phases = {row["step"]: row["phase"] for row in callback.history if row["event"] == "snapshot"}
    made = [4, 8, 12, 16, 20, 24, 26]
    best = sorted(scores.keys() & made, key=scores.get)
    stable = max(step for step in made if phases[step] == "stable")
    assert published_steps(tmp_path) == sorted({*best[:keep_best], stable, made[-1]})
    assert len(published_steps(tmp_path)) > 1
    pointed = tmp_path / "merges" / os.readlink(tmp_path / "merges/best")
    assert record(pointed)["step"] == best[0]
    assert callback.best == pointed
    assert load_merge(tmp_path / "merges/best").keys() == load_merge(pointed).keys()
    assert not leftovers(tmp_path / "merges")


def test_a_best_link_that_a_full_disk_refuses_is_tried_again(tmp_path, monkeypatch):
    publisher = Publisher(tmp_path, None, 1 << 30)
    (tmp_path / "step=00000001-sma").mkdir()
    publisher.published = ["step=00000001-sma"]

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", refuse)
        publisher.protect({1}, 1)
    assert not (tmp_path / "best").is_symlink()
    publisher.protect({1}, 1)
    assert os.readlink(tmp_path / "best") == "step=00000001-sma"


def test_if_somebody_removes_the_best_merge_the_best_of_the_others_takes_its_place(tmp_path):
    def remove(module):
        module.trainer.callbacks[0].session.pipeline.background.drain()
        shutil.rmtree((tmp_path / "merges/best").resolve())

    _, _, callback = fit(tmp_path, keep_last=None, callbacks=[At(step25=remove)])
    assert load_merge(tmp_path / "merges/best")
    assert callback.best == (tmp_path / "merges/best").resolve()


def test_latest_points_at_the_newest_from_the_first_merge_on(tmp_path):
    seen = {}

    def look(module):
        module.trainer.callbacks[0].session.background.drain()
        seen[len(seen)] = (os.readlink(tmp_path / "merges/latest"), names(tmp_path)[-1])

    fit(tmp_path, emit_every=1, callbacks=[At(**{f"step{step}": look for step in range(7, STEPS)})])

    assert len(seen) == STEPS - 7  # that of step 6 waits for the validation there
    assert all(pointed == newest for pointed, newest in seen.values())


def test_a_run_that_has_nothing_to_merge_at_its_end_says_so(tmp_path):
    with pytest.warns(UserWarning, match="no merge was published|nothing was published|one snapshot"):
        fit(tmp_path, every_n_steps=15, trainer={"max_steps": 26})

    assert not emissions(tmp_path / "merges")


def test_a_run_that_enters_its_decay_at_the_very_end_has_its_last_stable_merge_published(tmp_path):
    # The window ends with the first snapshot of the decay (22), which has nothing to be merged with.
    fit(tmp_path, emit_every=0, trainer={"max_steps": 23})

    (path,) = emissions(tmp_path / "merges")
    assert record(path)["phase"] == "stable"
    assert record(path)["step"] == 20


# --- names that are taken -----------------------------------------------------------------------------------


def test_another_merge_of_the_same_name_gets_a_version(tmp_path):
    fit(tmp_path, emit_every=0)
    before = checksum(tmp_path / "merges/step=00000026-tokens=624-sma/model.safetensors")

    fit(tmp_path, emit_every=0, module=Elsewhere)
    fit(tmp_path, emit_every=0, module=lambda: Tiny(width=4))

    name = "step=00000026-tokens=624-sma"
    assert names(tmp_path) == [name, f"{name}-v1", f"{name}-v2"]
    assert os.readlink(tmp_path / "merges/latest") == f"{name}-v2"
    assert checksum(tmp_path / f"merges/{name}/model.safetensors") == before
    assert not damage(tmp_path / "merges")


def test_the_same_merge_is_published_once(tmp_path):
    fit(tmp_path, emit_every=0)
    (path,) = emissions(tmp_path / "merges")
    before = path.stat().st_mtime_ns

    fit(tmp_path, emit_every=0)

    assert names(tmp_path) == ["step=00000026-tokens=624-sma"]
    assert path.stat().st_mtime_ns == before


def test_a_run_removes_no_merge_that_another_run_published(tmp_path):
    fit(tmp_path, keep_last=None)
    before = names(tmp_path)

    fit(tmp_path, keep_last=1)  # the same merges again

    assert names(tmp_path) == before


def test_a_damaged_merge_of_the_same_name_is_not_taken_for_the_same(tmp_path):
    fit(tmp_path, emit_every=0)
    (path,) = emissions(tmp_path / "merges")
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)

    fit(tmp_path, emit_every=0)

    latest = tmp_path / "merges/latest"
    assert checksum(latest / "model.safetensors") == record(latest)["files"]["model.safetensors"]


def test_a_folder_that_takes_the_name_of_latest_stays_and_merges_are_published(tmp_path):
    (tmp_path / "merges/latest").mkdir(parents=True)
    (tmp_path / "merges/latest/note.txt").write_text("ours")

    fit(tmp_path)

    assert published_steps(tmp_path) == [20, 24, 26]
    assert (tmp_path / "merges/latest/note.txt").read_text() == "ours"
    assert not leftovers(tmp_path / "merges")


def publish(publisher, name, tensor):
    tensors = {"a": tensor}
    write = partial(publisher.write_safetensors, tensors=tensors, values=tensors.values())
    publisher.publish(name, write, {})


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_latest_never_points_at_a_merge_that_was_removed(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "nr_inodes=8", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"can't mount: {mounted.stderr.decode()}")
    try:
        publisher = Publisher(tmp_path, keep_last=1, max_shard_bytes=10**9)
        publish(publisher, "first", torch.zeros(3))
        # The root, a merge of 3 and the pointer are 5 of 8: a second merge fits, its pointer does not.
        publish(publisher, "second", torch.ones(3))

        assert load_merge(tmp_path / "latest")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


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


# --- names --------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    """A model in its own right, with an output that is tied to its input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class Wrapping(Tiny):
    """A LightningModule around a model."""

    def __init__(self):
        super().__init__()
        del self.embed, self.norm, self.head
        self.model = Inner()

    def loss(self, batch):
        ids = batch["input_ids"]
        return nn.functional.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def test_a_stripped_prefix_lets_the_inner_model_load_the_merge(tmp_path):
    fit(tmp_path, module=Wrapping, strip_prefix="model.")

    Inner().load_state_dict(load_merge(tmp_path / "merges/latest"), strict=True)
    assert record(tmp_path / "merges/latest")["stripped_prefix"] == "model."


def test_how_a_model_lies_in_its_files_is_worked_out_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(export, "ModelFiles", lambda *args: made.append(args) or ModelFiles(*args))
    fit(tmp_path)
    assert len(published_steps(tmp_path)) > 1
    assert len(made) == 1


@pytest.mark.parametrize("size", ["5GB", 1], ids=["whole", "shards"])
def test_a_tied_tensor_is_stored_once_and_loaded_under_all_its_names(tmp_path, size):
    fit(tmp_path, module=Wrapping, max_shard_size=size)

    path = tmp_path / "merges/latest"
    stored = [name for file in path.glob("*.safetensors") for name in load_file(file)]
    assert sorted(stored) == ["model.embed.weight", "model.norm.bias", "model.norm.weight"]
    assert record(path)["tied"] == {"model.head.weight": "model.embed.weight"}
    loaded = load_merge(path)
    assert torch.equal(loaded["model.head.weight"], loaded["model.embed.weight"])
    Wrapping().load_state_dict(loaded, strict=True)


def test_safetensors_own_loader_finds_the_tied_names(tmp_path):
    fit(tmp_path, module=Wrapping, strip_prefix="model.")

    model = Inner()
    missing, unexpected = safetensors.torch.load_model(model, tmp_path / "merges/latest/model.safetensors")

    assert not missing
    assert not unexpected
    with safetensors.safe_open(tmp_path / "merges/latest/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    assert torch.equal(model.head.weight, load_merge(tmp_path / "merges/latest")["embed.weight"])


def test_a_prefix_that_no_name_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"strip_prefix='net\.'.*embed.weight"):
        fit(tmp_path, strip_prefix="net.")


def test_a_prefix_whose_removal_makes_two_names_one_is_refused(tmp_path):
    class Clash(Wrapping):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)  # `model.norm.weight` and `norm.weight`

    with pytest.raises(ValueError, match=r"strip_prefix='model\.'.*norm\.(weight|bias)"):
        fit(tmp_path, module=Clash, strip_prefix="model.")


def test_a_parameter_may_be_called_as_the_metadata_is(tmp_path):
    class Named(Tiny):
        def __init__(self):
            super().__init__()
            self.pt = nn.Parameter(torch.ones(2))
            self.format = nn.Parameter(torch.ones(3))
            self.step = nn.Parameter(torch.ones(3))

    fit(tmp_path, module=Named)

    assert load_merge(tmp_path / "merges/latest").keys() == Named().state_dict().keys()


def test_a_tensor_that_is_called_pt_brings_no_other_along(tmp_path):
    class Named(Tiny):
        def __init__(self):
            super().__init__()
            self.pt = nn.Parameter(torch.ones(2))

    fit(tmp_path, module=Named)

    assert load_merge(tmp_path / "merges/latest").keys() == Named().state_dict().keys()


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
