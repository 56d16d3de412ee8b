"""The card of a merge: what it says, what it takes over, and what it keeps to itself."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file
from training_runs import Classifier, emissions, loader, train

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.checkpoints.card import base_model_of, public_name
from merge_callback.cli.main import main
from merge_callback.publish.emission import Publisher

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that publishes at its end only, after a validation of the same merge."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    merging = CheckpointMergeCallback(
        window=3, every_n_steps=2, method="sma", dirpath=folder, emit_every=0, spike="off"
    )
    options = {"val_check_interval": 6, "check_val_every_n_epoch": None}
    train(Classifier(), merging, data=loader(), val=loader(16), **options)
    return folder, merging.history


def merged(*arguments):
    return main(["merge", "--quiet", *map(str, arguments)])


def card(folder):
    """Metadata and text."""
    text = (folder / "README.md").read_text()
    _, metadata, body = re.split(r"(?m)^---\n", text, maxsplit=2)
    return yaml.safe_load(metadata), body


def test_an_emission_has_a_card_with_its_snapshots_and_scores(run):
    (folder,), history = emissions(run[0]), run[1]
    metadata, body = card(folder)
    assert metadata == {"library_name": "merge-callback", "tags": ["merge", "merge-callback", "sma"]}
    assert "# Merge of 3 checkpoints up to step 12" in body
    assert "| 8 | stable | 0.3 | 0.3333 |" in body
    scores = history[-1]
    assert f"| val_loss | {scores['merged/val_loss']:.6g} | {scores['val_loss']:.6g} |" in body
    record = json.loads((folder / "merge.json").read_text())
    assert record["metrics"]["val_loss"]["merged"] == scores["merged/val_loss"]
    code = re.search(r"(?s)```python\n(.*?)```", body)[1].replace("this folder", str(folder))
    exec(code, {"model": Classifier()})


def test_a_card_of_files_names_them_without_their_folders(run, tmp_path):
    assert merged(run[0], "--method", "ema", "--output", tmp_path / "out") == 0
    metadata, body = card(tmp_path / "out")
    assert metadata["tags"][-1] == "ema"
    assert body.count("| step=000000") == 3
    assert str(run[0]) not in body
    assert "/" not in body.replace("1/", "")


def test_the_card_is_listed_with_its_checksum_and_may_be_edited(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert merged(run[0], "--output", out) == 0
    assert "README.md" in json.loads((out / "merge.json").read_text())["files"]
    (out / "README.md").write_text("Ours now.")
    assert main(["inspect", str(out)]) == 0
    assert load_merge(out).keys() == Classifier().state_dict().keys()
    assert merged(run[0], "--output", out, "--force") == 1
    assert "its README.md was edited; --force replaces nothing but a merge" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "Ours now."


THEIRS = """\
---
license: llama3
language: no
base_model: org/first-model
tags: [chat]
model-index: [{name: x}]
---
What it is for.
"""


def checkpoints(folder, readme=None, config=None):
    folders = []
    for step in (1, 2):
        folders.append(folder / f"checkpoint-{step}")
        folders[-1].mkdir(parents=True)
        save_file({"w": torch.full((4,), float(step))}, folders[-1] / "model.safetensors")
        if readme is not None:
            (folders[-1] / "README.md").write_text(readme)
        if config is not None:
            (folders[-1] / "config.json").write_text(json.dumps(config))
    return folders


def test_somebody_s_own_card_is_kept_and_what_holds_for_the_merge_taken_over(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert merged(*checkpoints(tmp_path, THEIRS, config), "--output", tmp_path / "out") == 0
    metadata, body = card(tmp_path / "out")
    assert metadata == {
        "license": "llama3",
        "base_model": "org/first-model",
        "library_name": "transformers",
        "tags": ["merge", "merge-callback", "sma"],
    }  # YAML reads their language as false
    assert 'LlamaForCausalLM.from_pretrained("this folder")' in body
    assert "`README.original.md` is the card of a checkpoint" in body
    assert (tmp_path / "out/README.original.md").read_text() == THEIRS


def test_a_merge_of_merges_has_one_card(tmp_path):
    first = checkpoints(tmp_path, THEIRS.replace("language: no", 'language: "no"'))
    for step in (1, 2):
        assert merged(*first, "--output", tmp_path / f"step-{step}") == 0
        (tmp_path / f"step-{step}/README.original.md").unlink()
    both = [tmp_path / "step-1", tmp_path / "step-2"]
    assert merged(*both, "--keep-all", "--output", tmp_path / "out") == 0
    metadata, _ = card(tmp_path / "out")
    assert (metadata["license"], metadata["language"]) == ("llama3", "no")
    assert metadata["base_model"] == base_model_of(tmp_path / "out") == "org/first-model"
    assert not (tmp_path / "out/README.original.md").exists()


@pytest.mark.parametrize(
    "readme",
    ["", "---\n", "---\n{\n---\n", "---\na: &a [1]\nlicense: *a\n---\n", "---\nlicense: [[x]]\n---\n", "\0"],
    ids=["empty", "no end", "no YAML", "aliases", "nested", "no text"],
)
def test_a_card_that_is_not_sound_gives_nothing(readme, tmp_path):
    assert merged(*checkpoints(tmp_path, readme), "--output", tmp_path / "out") == 0
    assert card(tmp_path / "out")[0].keys() == {"library_name", "tags"}
    assert (tmp_path / "out/README.original.md").read_text() == readme


def test_a_card_that_lies_elsewhere_is_not_read(tmp_path):
    folders = checkpoints(tmp_path, config={})
    (tmp_path / "secret").write_text(THEIRS)
    (folders[1] / "README.md").symlink_to(tmp_path / "secret")
    assert merged(*folders, "--output", tmp_path / "out") == 0
    assert card(tmp_path / "out")[0].keys() == {"library_name", "tags"}
    assert not (tmp_path / "out/README.original.md").exists()


def test_a_base_model_on_this_machine_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local/model").mkdir(parents=True)
    names = ["org/model", "model", "/home/me/model", "local/model", "./model", "~/model", "a/b/c", 7, None]
    assert [name for name in names if public_name(name)] == ["org/model", "model"]


def test_the_card_of_a_wrapped_model_names_its_base(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )

    class Tuned(Classifier):
        def __init__(self):
            super().__init__()
            self.net = transformers.GPT2LMHeadModel(config)
            self.net.name_or_path = self.net.config._name_or_path = "org/first-model"

        def loss(self, batch):
            return self.net(input_ids=batch, labels=batch).loss

    data = torch.utils.data.DataLoader(torch.arange(96).view(12, 8) % 16, batch_size=2)
    train(Tuned(), CheckpointMergeCallback(every_n_steps=2, dirpath=tmp_path), data=data, max_steps=6)
    assert merged(tmp_path / "window", "--output", tmp_path / "out") == 0
    for folder in (tmp_path / "latest", tmp_path / "out"):
        metadata, body = card(folder)
        assert (metadata["base_model"], metadata["library_name"]) == ("org/first-model", "transformers")
        assert 'GPT2LMHeadModel.from_pretrained("this folder")' in body


def test_the_card_of_an_adapter_is_for_peft(tmp_path):
    folders = []
    for step in (1, 2):
        folders.append(tmp_path / f"checkpoint-{step}")
        folders[-1].mkdir()
        name = "base_model.model.layers.0.q_proj.lora_{}.weight"
        pair = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}
        save_file(pair, folders[-1] / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        config["base_model_name_or_path"] = "org/first-model"
        (folders[-1] / "adapter_config.json").write_text(json.dumps(config))
    assert merged(*folders, "--output", tmp_path / "out") == 0
    metadata, body = card(tmp_path / "out")
    assert (metadata["base_model"], metadata["library_name"]) == ("org/first-model", "peft")
    assert 'AutoModel.from_pretrained("org/first-model")' in body


def test_the_same_merge_is_known_by_its_weights_whatever_its_card_says(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run", symlinks=True)
    (published,) = emissions(folder)
    publisher = Publisher(folder, None, 1 << 30)
    tensors = load_merge(published)
    record = {**json.loads((published / "merge.json").read_text()), "metrics": {}}
    target = publisher.publish(
        published.name,
        lambda draft: publisher.write_safetensors(draft, tensors, tensors.values()),
        record,
    )
    assert target == published
