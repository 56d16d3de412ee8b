"""Merges of LoRA adapters are those of what they add to the base, and peft loads them."""

import json
import math
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_cases import mostly_slow
from torch import nn
from training_runs import seed
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from merge_callback import load_merge, merge_state_dicts
from merge_callback.checkpoints.lora import LoraAdapter
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.cli.main import main

peft = pytest.importorskip("peft", reason="needs the extra 'lora'")

COUNT = 3


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)


def llama():
    seed()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def gpt2():
    seed()
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        seed()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.narrow = nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 5)

    def forward(self, input_ids):
        found = self.narrow(self.conv(self.embedding(input_ids)[:, None]))
        return self.linear(found.mean((2, 3)))


KINDS = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "rank-stabilised": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "whole modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "fan in, fan out": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "embedding and convolutions": (Mixed, {"target_modules": ["embedding", "conv", "narrow", "linear"]}),
}
IDS = torch.arange(16).view(2, 8) % 11


def save_adapters(root, kind, **options):
    """The base, and adapters with weights of their own as peft saves them; and what each adds, by peft."""
    make, config = KINDS[kind]
    base = make()
    base_state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(root / "base")
    else:
        (root / "base").mkdir()
        save_file(base_state, root / "base/model.safetensors")
    folders, merged = [], []
    for index in range(COUNT):
        model = peft.get_peft_model(make(), peft.LoraConfig(r=2, **config, **options))
        generator = torch.Generator().manual_seed(index)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        folders.append(root / f"expert-{'abc'[index]}")
        model.save_pretrained(folders[-1])
        merged.append({name: t.clone() for name, t in model.merge_and_unload().state_dict().items()})
    return make, base_state, folders, merged


def merge(folders, output, *options):
    assert main(["merge", "--quiet", *map(str, folders), "--output", str(output), *map(str, options)]) == 0
    return json.loads((output / "merge.json").read_text())


def loaded(make, folder):
    """The state of the base with an adapter merged in, by peft."""
    return peft.PeftModel.from_pretrained(make(), folder).merge_and_unload().state_dict()


def assert_close(found, expected, base=None):
    """Equal to the rounding of fp32 weights, which peft adds to and rounds once more than we do."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = torch.linalg.vector_norm(tensor - (0 if base is None else base[name])).clamp(min=1.0)
        assert torch.linalg.vector_norm(found[name] - tensor) <= 2e-6 * scale, name


LINEAR = {
    "sma": [],
    "weighted": ["--weights", "0.5", "0.2", "0.3"],
    "task_arithmetic": ["--scale", "0.7"],
}


@pytest.mark.parametrize(
    ("method", "kind"), mostly_slow(product(LINEAR, KINDS), daily=[*range(6), 6, 9, 12, 16])
)
def test_a_linear_merge_is_that_of_the_models_with_the_adapters_merged_in(kind, method, tmp_path):
    make, base, folders, models = save_adapters(tmp_path, kind)
    options = LINEAR[method]
    if method == "weighted":
        expected = merge_state_dicts(models, weights=[0.5, 0.2, 0.3])
    else:
        given = {"base": base, "scale": 0.7} if method == "task_arithmetic" else {}
        expected = merge_state_dicts(models, method, **given)
    options = ["--method", method, *options] if method != "weighted" else options

    record = merge(folders, tmp_path / "adapter", "--base", tmp_path / "base", *options)
    merge(folders, tmp_path / "model", "--base", tmp_path / "base", "--as", "model", *options)

    assert_close(loaded(make, tmp_path / "adapter"), expected)
    model = make()
    model.load_state_dict(load_merge(tmp_path / "model"), strict=False)
    assert_close(model.state_dict(), expected)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == COUNT * 2
    assert max(record["lora"]["relative_error"].values()) < 1e-6
    weights = record["weights"]
    given, stored = (
        [LoraAdapter.of(open_checkpoint(path)) for path in paths]
        for paths in (folders, [tmp_path / "adapter"])
    )
    for module, layer in stored[0].layers.items():
        parts = [adapter.layers[module].matrix for adapter in given]
        exact = sum(w * p.scale * (p.b.double() @ p.a.double()) for p, w in zip(parts, weights, strict=True))
        off = torch.linalg.vector_norm(layer.matrix.dense() - exact)
        assert off <= 1e-6 * torch.linalg.vector_norm(exact)  # without the rounding of the base's weights


@pytest.mark.parametrize("method", ["ties", "slerp", "dare"])
def test_a_method_that_is_not_linear_is_applied_to_what_is_added(method, tmp_path):
    make, base, folders, models = save_adapters(tmp_path, "plain")
    names = [name for name, tensor in base.items() if not torch.equal(tensor, models[0][name])]
    deltas = [{name: model[name] - base[name] for name in names} for model in models]
    zero = {"base": {name: torch.zeros_like(base[name]) for name in names}} if method != "slerp" else {}
    added = merge_state_dicts(deltas, method, **zero)
    expected = {name: t + added[name] if name in added else t for name, t in base.items()}

    merge(folders, tmp_path / "model", "--base", tmp_path / "base", "--as", "model", "--method", method)
    record = merge(folders, tmp_path / "adapter", "--method", method, "--rank", 16)

    assert_close(load_merge(tmp_path / "model"), expected)
    cut = loaded(make, tmp_path / "adapter")
    for name in names:
        rank = 6  # no more than the adapters have together
        u, values, v = torch.linalg.svd(added[name].double())
        nearest = (u[:, :rank] * values[:rank]) @ v[:rank] + base[name]
        torch.testing.assert_close(cut[name], nearest.float(), rtol=1e-5, atol=1e-5)
        off = float(torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values))
        assert record["lora"]["relative_error"][name.removesuffix(".weight")] == pytest.approx(off, abs=1e-6)


@pytest.mark.parametrize("kind", ["plain", "embedding and convolutions", "patterns"])
def test_an_adapter_of_the_old_rank_is_the_nearest_one_and_its_error_is_told(kind, tmp_path, capsys):
    make, base, folders, models = save_adapters(tmp_path, kind)
    mean = merge_state_dicts(models)

    record = merge(folders, tmp_path / "adapter", "--rank", 2)

    found, told = loaded(make, tmp_path / "adapter"), record["lora"]["relative_error"]
    assert told
    for module, error in told.items():
        name = f"{module}.weight"
        expected, stored = mean[name] - base[name], found[name] - base[name]
        flat = expected.flatten(1).double()
        values = torch.linalg.svdvals(flat)
        off = float(torch.linalg.vector_norm(values[2:]) / torch.linalg.vector_norm(values))
        assert error == pytest.approx(off, abs=1e-5)
        size = torch.linalg.vector_norm(expected)
        assert float(torch.linalg.vector_norm(stored - expected) / size) == pytest.approx(off, abs=1e-5)
    assert f"{max(told.values()):.3g}" in capsys.readouterr().err


def test_adapters_of_other_ranks_scales_and_layers_are_merged_with_zero_where_one_has_none(tmp_path):
    make, _, folders, models = save_adapters(tmp_path, "plain")
    other = peft.get_peft_model(
        make(), peft.LoraConfig(r=3, lora_alpha=1, target_modules=["q_proj", "o_proj"], use_rslora=True)
    )
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    other.save_pretrained(tmp_path / "other")
    models = [*models, {n: t.clone() for n, t in other.merge_and_unload().state_dict().items()}]

    merge([*folders, tmp_path / "other"], tmp_path / "adapter", "--keep-order")

    assert_close(loaded(make, tmp_path / "adapter"), merge_state_dicts(models))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) | {config["r"]} == {3, 6, 9}


def test_bf16_adapters_of_one_scale_are_merged_without_rounding(tmp_path):
    _, _, folders, _ = save_adapters(tmp_path, "plain")
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    record = merge(folders, tmp_path / "mean")
    assert set(record["lora"]["relative_error"].values()) == {0.0}
    merged = load_file(tmp_path / "mean/adapter_model.safetensors")
    given = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for name, tensor in merged.items():
        assert torch.equal(tensor, torch.cat([each[name] for each in given], int("lora_B" in name)))
    record = merge(folders, tmp_path / "weighted", "--weights", 0.5, 0.3, 0.2)
    assert 0 < max(record["lora"]["relative_error"].values()) < 2**-8


# --- what is measured ---------------------------------------------------------------------------------------


def told(capsys, command, *arguments):
    assert main([command, *map(str, arguments)]) == 0
    return capsys.readouterr().out


def write_deltas(root, base, models, names):
    """What each model adds to the base, by peft, as checkpoints of their own; the first of zeros."""
    folders = [root / f"full-{index}" for index in range(COUNT + 1)]
    for folder, model in zip(folders, [base, *models], strict=True):
        folder.mkdir(parents=True)
        save_file({n: model[n] - base[n] for n in names}, folder / "model.safetensors")
    return folders


def measures(text):
    """The lines of the table of interference, by their names."""
    lines = [line.split() for line in text.splitlines()]
    return [line for line in lines if line and line[0] in ("sign", "overlap", "magnitude", "variance")]


SHOWN = {
    "plain": "LoRA of 4 layers, rank 2, scale 4; 0 tensors",
    "rank-stabilised": "LoRA of 2 layers, rank 2, scale 2.12132; 0 tensors",
    "patterns": "LoRA of 4 layers, rank 2, 3, scale 2.5, 2.66667, 4; 0 tensors",
    "whole modules": "LoRA of 2 layers, rank 2, scale 4; 1 tensors replace the base's",
    "fan in, fan out": "LoRA of 1 layers, rank 2, scale 4; 0 tensors",
    "embedding and convolutions": "LoRA of 4 layers, rank 2, scale 4; 0 tensors",
}


@pytest.mark.parametrize("kind", mostly_slow(product(KINDS), daily=[0, 2, 4]))
def test_interference_diversity_and_inspect_look_at_what_adapters_add(kind, tmp_path, capsys):
    _, base, folders, models = save_adapters(tmp_path, kind)
    changed = [name for name, tensor in base.items() if not torch.equal(tensor, models[0][name])]
    layers = [name for name in changed if kind != "whole modules" or name != "lm_head.weight"]
    full = write_deltas(tmp_path / "full", base, models, changed)
    adapted = write_deltas(tmp_path / "layers", base, models, layers)
    with_base = ["--base", tmp_path / "base"]
    found = told(capsys, "interference", *folders, *with_base), told(capsys, "interference", *full)
    assert len(measures(found[0])) == 4
    assert measures(found[0]) == measures(found[1])
    if layers != changed:
        with pytest.warns(UserWarning, match=r"left out, as they replace .* was given: lm_head.weight"):
            without = told(capsys, "interference", *folders)
    else:
        without = told(capsys, "interference", *folders)
        assert "task vectors from their base, the 20 %" in without
    assert measures(without) == measures(told(capsys, "interference", *adapted))
    apart, dense = told(capsys, "diversity", *folders), told(capsys, "diversity", *full[1:])
    assert apart.splitlines()[-3:] == dense.splitlines()[-3:]
    assert SHOWN[kind] in told(capsys, "inspect", folders[0])


def test_adapters_that_can_t_be_measured_together_are_refused_in_a_line(tmp_path, capsys):
    _, _, plain, _ = save_adapters(tmp_path / "plain", "plain")
    _, _, whole, _ = save_adapters(tmp_path / "whole", "whole modules")
    only, base = "lm_head.weight replaces the base's tensor in one of", tmp_path / "plain/base"
    cases = [
        (["diversity", plain[0], whole[0]], only),
        (["interference", plain[0], whole[0], "--base", base], only),
        (["interference", plain[0]], "needs at least two checkpoints besides the base (their base), got 1"),
        (["interference", plain[0], plain[1], base], "is no LoRA adapter, but"),
    ]
    for arguments, reason in cases:
        assert main([*map(str, arguments)]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert reason in last, last


# --- what is refused ----------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert main(["merge", "--quiet", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def changed(folder, **config):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"target_parameters": ["w"]}, "mixtures of experts"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": "9"}, "lora_alpha"),
        ({"alpha_pattern": {"(q+)+": 4}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
    ],
)
def test_adapters_that_mean_something_else_are_refused_by_name(config, told, tmp_path, capsys):
    _, _, folders, _ = save_adapters(tmp_path, "plain")
    changed(folders[1], **config)
    assert told in refused(capsys, *folders, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_the_base_or_the_other_adapters_is_refused(tmp_path, capsys):
    _, _, folders, _ = save_adapters(tmp_path, "plain")
    out = ["--output", tmp_path / "out"]
    gpt2().save_pretrained(tmp_path / "gpt2")
    assert "has no 'model.layers.0" in refused(
        capsys, *folders, "--base", tmp_path / "gpt2", "--as", "model", *out
    )
    assert "give --base" in refused(capsys, *folders, "--as", "model", *out)
    assert "is none" in refused(capsys, tmp_path / "base", tmp_path / "gpt2", "--as", "lora", *out)
    assert "is no LoRA adapter" in refused(capsys, tmp_path / "base", *folders, *out)
    assert "--exclude 'q'" in refused(capsys, *folders, "--exclude", "q", *out)
    assert "--rank" in refused(capsys, *folders, "--rank", 0, *out)
    changed(folders[0], init_lora_weights="pissa")
    assert "pissa" in refused(capsys, *folders, "--base", tmp_path / "base", "--as", "model", *out)
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(
        {**tensors, name: torch.full_like(tensors[name], math.nan)}, folders[0] / "adapter_model.safetensors"
    )
    assert "NaN" in refused(capsys, *folders, *out)
    save_file({n: t for n, t in tensors.items() if n != name}, folders[0] / "adapter_model.safetensors")
    assert "has no lora_" in refused(capsys, *folders, *out)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_an_embedding_that_may_be_the_output_layer_too_is_told(tmp_path, capsys):
    gpt2().save_pretrained(tmp_path / "base")
    for index in range(2):
        model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["wte"]))
        model.save_pretrained(tmp_path / f"{index}", save_embedding_layers=False)
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.warns(UserWarning, match="output layer shares its weight"):
        merge(folders, tmp_path / "out", "--base", tmp_path / "base", "--as", "model")
    names = ["transformer.wte.weight", "lm_head.weight"]
    tied = gpt2().state_dict()
    save_file(
        {n: t for n, t in tied.items() if n != names[1]},
        tmp_path / "base/model.safetensors",
        {names[1]: names[0]},
    )
    options = ["--base", tmp_path / "base", "--as", "model", "--output", tmp_path / "tied"]
    assert "one tensor with another" in refused(capsys, *folders, *options)
