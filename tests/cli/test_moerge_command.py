"""`merge-callback moerge`: what it writes is what the Python function makes, and nothing else is touched."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from training_runs import assert_same_bits, weights_of

from merge_callback.cli.main import main
from merge_callback.moerge import load_moerged, moerge

transformers = pytest.importorskip("transformers")

LAYER = "transformer.h.0.attn.c_attn"  # a Conv1D, whose weight is transposed

BUILD = """
import torch

def build():
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6)})

def fail():
    raise KeyError("a table")

number = 3
"""


def gpt2():
    torch.manual_seed(0)
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()


def write_adapter(folder, layer, into, out, rank):
    folder.mkdir()
    name = f"base_model.model.{layer}.lora_"
    tensors = {f"{name}A.weight": torch.randn(rank, into), f"{name}B.weight": torch.randn(out, rank)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A model's folder, without its weights, and adapters: three of that model, and two of another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    torch.manual_seed(0)
    gpt2().config.save_pretrained("model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    for rank, name in enumerate(("law", "code", "math"), 2):
        write_adapter(tmp_path / name, LAYER, 8, 24, rank)
    for name in ("a", "b"):
        write_adapter(tmp_path / name, "q_proj", 8, 6, 2)
    (tmp_path / "my_models.py").write_text(BUILD)
    return tmp_path


def test_the_folder_is_that_of_the_function(folders, capsys):
    assert main(["moerge", "model", "law", "code", "math", "--k", "1", "--output", "moerged"]) == 0
    assert capsys.readouterr().out == "moerged: 3 experts in 1 layers, k=1\n"
    found = load_moerged(gpt2(), folders / "moerged")
    expected = moerge(gpt2(), [folders / name for name in ("law", "code", "math")], k=1)
    assert_same_bits(weights_of(found), weights_of(expected))
    assert found.get_submodule(LAYER).extra_repr() == expected.get_submodule(LAYER).extra_repr()
    ids = torch.arange(8)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)
    record = json.loads((folders / "moerged/moerge.json").read_text())
    assert (record["base"], record["experts"], record["init"]) == ("model", ["law", "code", "math"], "arrow")
    assert sorted(os.listdir("moerged")) == ["moerge.json", "moerge.safetensors"]


def test_a_function_may_make_the_base(folders):
    command = ["moerge", "my_models:build", "a", "b", "--init", "random", "--score", "signed", "--output"]
    assert main([*command, "one"]) == main([*command, "two"]) == 0
    contents = [(folders / name / "moerge.safetensors").read_bytes() for name in ("one", "two")]
    assert contents[0] == contents[1]
    found = load_moerged(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6)}), folders / "one")
    assert (found["q_proj"].k, found["q_proj"].score) == (2, "signed")


def config_of(**changes):
    def change(folder):
        path = folder / "model/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("arguments", "change", "reason"),
    [
        (["model", "law", "code", "--k", "3"], None, "k=3 must be at most the number of adapters, 2"),
        (["model", "a", "b"], None, "the adapters have a layer q_proj, GPT2LMHeadModel has none"),
        (["model", "law", "model"], None, "model: "),
        (["law", "law", "code"], None, "law: is no folder of a Hugging Face model; of another model, name a"),
        (["gpt2", "law", "code"], None, "gpt2: is no folder of a Hugging Face model"),
        (["model", "law", "code"], config_of(n_embd=16), f"{LAYER}: A of adapter 1 is (2, 8), but the base"),
        (["model", "law", "code"], config_of(n_embd="x"), "model: transformers can't make this model ("),
        (
            ["model", "law", "code"],
            config_of(model_type="unheard of", auto_map={"AutoConfig": "my_models.build"}),
            "model: transformers can't make this model (ValueError: ",
        ),
        (["my_models:none", "a", "b"], None, "my_models:none: my_models has no function 'none'"),
        (["my_models:fail", "a", "b"], None, "my_models:fail: KeyError: 'a table'"),
        (["my_models:dict", "a", "b"], None, "my_models has no function 'dict'"),
        (["no_models:build", "a", "b"], None, "no_models:build: No module named 'no_models'"),
        (["builtins:dict", "a", "b"], None, "builtins:dict returned a dict, expected a torch.nn.Module"),
    ],
    ids=range(13),
)
def test_what_makes_no_sense_is_refused_in_a_line(arguments, change, reason, folders, capsys):
    if change:
        change(folders)
    before = sorted(os.listdir())
    assert main(["moerge", *arguments, "--output", "moerged"]) == 1
    told = capsys.readouterr().err
    assert (told.count("\n"), reason in told) == (1, True), told
    assert sorted({*os.listdir()} - {"__pycache__"}) == before


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_there_stays(kind, folders, capsys):
    if kind == "folder":
        (folders / "moerged").mkdir()
    else:
        (folders / "moerged").symlink_to("nowhere")
    assert main(["moerge", "model", "law", "code", "--output", "moerged"]) == 1
    assert "moerged exists; name another folder with --output" in capsys.readouterr().err
    assert not (folders / "nowhere").exists()
    assert kind == "link" or not os.listdir("moerged")
