"""Adapters of peft: a merge of them, from training or from files, is loaded by peft itself."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from training_runs import emissions, seed, train
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.cli.main import main

NEW = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
OTHER = {"peft_type": "FOURIERFT", "n_frequency": 4, "target_modules": ["q_proj", "v_proj"]}
TOKENS = torch.arange(16).view(2, 8)


def save_adapters(root, *configs):
    """Adapters as peft's ``save_pretrained`` leaves them, one step apart."""
    folders = [root / f"checkpoint-{step}" for step in (1, 2)]
    for step, folder, config in zip((1.0, 2.0), folders, configs or (CONFIG, CONFIG), strict=True):
        folder.mkdir(parents=True)
        pair = {NEW.format("A"): torch.full((2, 8), step), NEW.format("B"): torch.full((8, 2), 3 * step)}
        save_file(pair, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "optimizer.pt").write_bytes(b"")
    return folders


@pytest.mark.parametrize("given", ["run", "run/checkpoint-*", "run/*/adapter_model.safetensors"])
def test_adapters_of_a_run_are_merged_into_an_adapter(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)
    save_adapters(tmp_path / "run")
    assert main(["merge", "--quiet", str(tmp_path / given), "--output", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "merge.json", "README.md"}
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    product = merged[NEW.format("B")] @ merged[NEW.format("A")]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (product * config["lora_alpha"] / config["r"]).unique() == (2 * 2 * 3 + 2 * 2 * 12) / 2
    assert load_merge(tmp_path / "out").keys() == merged.keys()
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["step"] == 2
    assert record["left_out"].keys() == {"optimizer.pt"}


def test_adapters_of_different_kinds_are_refused_by_what_differs(tmp_path, capsys):
    folders = save_adapters(
        tmp_path, OTHER, {**OTHER, "n_frequency": 8, "target_modules": ["v_proj", "q_proj"]}
    )
    assert main(["merge", *map(str, folders), "--output", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "n_frequency is 4 and 8" in told
    assert "target_modules" not in told


def test_an_adapter_beside_a_whole_model_is_left_out_with_its_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)
    folders = save_adapters(tmp_path)
    for step, folder in enumerate(folders):
        save_file({"w": torch.full((2,), float(step))}, folder / "model.safetensors")
    assert main(["merge", "--quiet", *map(str, folders), "--output", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "merge.json", "README.md"}


# What peft itself makes of it.


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="needs the extra 'peers'")


def llama():
    seed()
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
        )
    )


class Tuned(LightningModule):
    """A model with an adapter in it."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def trained(model, folder):
    """The module, and the published merge, of a run that trains an adapter."""
    module = Tuned(model)
    batches = DataLoader(torch.randint(0, 32, (48, 8)), batch_size=4)
    train(module, CheckpointMergeCallback(every_n_steps=2, dirpath=folder, evaluate=False), data=batches)
    return module, emissions(folder)[-1]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["lora", "modules to save", "embedding"],
)
def test_a_merged_adapter_is_loaded_by_peft_by_transformers_and_by_the_module(peft, options, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **options))
    module, merge = trained(model, tmp_path / "merges")
    module.load_state_dict(load_merge(merge))
    expected = logits(module.model)
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.equal(logits(fresh), expected)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, merge)), expected)
    config = json.loads((merge / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert module.model.peft_config["default"].inference_mode is False
    assert json.loads((merge / "merge.json").read_text())["files"].keys() == {
        "model.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }


def test_nothing_loads_random_layers_from_a_merged_adapter_whose_base_is_not_known(peft, tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    module, merge = trained(model, tmp_path)
    for kind in (AutoModel, LlamaForCausalLM):
        with pytest.raises((OSError, TypeError, ValueError)):
            kind.from_pretrained(merge, local_files_only=True)
    module.load_state_dict(load_merge(merge))
    loaded = peft.PeftModel.from_pretrained(llama(), merge)
    assert torch.equal(logits(loaded), logits(module.model))


def test_learned_prompts_are_published_as_the_module_alone(peft, tmp_path):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    module, merge = trained(peft.get_peft_model(base, prompts), tmp_path)
    assert {path.name for path in merge.iterdir()} == {"model.safetensors", "merge.json", "README.md"}
    module.load_state_dict(load_merge(merge))
