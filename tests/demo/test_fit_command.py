"""The command line of `fit` and `demo`, and the example configurations."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_files import ROOT
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from training_runs import QUIET

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.cli import main as command_line
from merge_callback.cli.main import main
from merge_callback.demo import DemoData, DemoModule, GPTConfig, TokenKindModule, WSDSchedule
from merge_callback.demo.expert import KINDS, token_kinds
from merge_callback.demo.run import DemoPlan

CONFIGS = ROOT / "example_configs"


def test_devices_that_cannot_share_the_batches_are_refused_at_once(tmp_path, capsys):
    for option in ([], ["--spike"]):
        assert main(["demo", *option, "--devices", "3", "--output", str(tmp_path / "run")]) == 1
        assert "3 processes can't share batches of 16 sequences evenly" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def printed_config(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["wsd_gpt", "moe_gpt"])
def test_example_configs_train(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.callbacks.every_n_steps=1"]
    small = ["--data.validation_batches=1", "--model.schedule.warmup=1"]
    assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *short, *small]) == 0
    assert (tmp_path / f"demo_run/{name}/version_0/merges/latest/model.safetensors").is_file()


@pytest.mark.parametrize(
    "name", [pytest.param("expert_v0", marks=pytest.mark.slow), "expert_v1", "expert_adaptive"]
)
def test_example_configs_of_experts_train(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=10", "--trainer.val_check_interval=5", "--data.max_bytes=60_000"]
    assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *short]) == 0
    (expert,) = (tmp_path / f"demo_run/{name}/version_0/checkpoints").iterdir()
    assert re.fullmatch(r"step=(5|10)-val_acc=0\.\d{4}\.ckpt", expert.name)


@pytest.mark.slow
def test_the_config_of_an_expert_that_its_merge_stops_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo_run").mkdir()
    for name in ("base", "expert0", "expert1"):
        save_file(TokenKindModule().state_dict(), f"demo_run/{name}.safetensors")
    short = ["--trainer.max_steps=5", "--trainer.val_check_interval=5", "--data.max_bytes=40_000"]
    config = str(CONFIGS / "expert_merged.yaml")
    assert main(["fit", "--config", config, *short]) == 0
    (expert,) = Path("demo_run/expert_merged/version_0/checkpoints").iterdir()
    assert expert.name == "step=5.ckpt"


def test_every_byte_of_source_has_the_kind_of_its_token():
    source = "def f(x):  # no\n    return '''a\nb''' + 10\n"
    found = "".join(KINDS[kind][0] for kind in token_kinds(source))
    assert found == "kkksnonoosscccc" + "sssss" + "kkkkkk" + "s" + "sssssssss" + "sosnns"


def test_an_expert_begins_with_a_merge_of_the_demo(tmp_path):
    merging = CheckpointMergeCallback(every_n_steps=1, dirpath=tmp_path, evaluate=False)
    demo = DemoModule(schedule=WSDSchedule(warmup=0)), DemoData(max_bytes=2_000_000)
    Trainer(**QUIET, max_steps=2, callbacks=[merging]).fit(*demo)
    merge = load_merge(tmp_path / "latest")
    module = TokenKindModule(base=str(tmp_path / "latest"))
    assert torch.equal(module.model.tokens.weight, merge["model.tokens.weight"])
    assert module(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, len(KINDS))


@pytest.mark.parametrize(("name", "gpt"), [("wsd_gpt", GPTConfig()), ("moe_gpt", GPTConfig(experts=4))])
def test_example_configs_are_the_demo(name, gpt, capsys):
    config = printed_config(capsys, "--config", str(CONFIGS / f"{name}.yaml"))
    module = config["model"]["init_args"]
    assert GPTConfig(**module["gpt"]) == gpt
    assert WSDSchedule(**module["schedule"]) == DemoPlan().schedule
    assert config["trainer"]["max_steps"] == DemoPlan().schedule.steps
    merging = config["trainer"]["callbacks"][-1]
    assert merging["class_path"] == "merge_callback.CheckpointMergeCallback"
    assert merging["init_args"]["every_n_steps"] == DemoPlan().snapshot_every


def test_fit_takes_any_module_and_data(capsys):
    classes = "lightning.pytorch.demos.boring_classes.BoringModel", "BoringDataModule"
    config = printed_config(capsys, "--model", classes[0], "--data", classes[1])
    assert config["model"]["class_path"] == classes[0]
    assert config["data"]["class_path"].endswith(classes[1])
    assert printed_config(capsys)["model"]["class_path"] == "merge_callback.demo.DemoModule"


OWN_MODULE = """
from lightning.pytorch.demos.boring_classes import BoringModel

class Own(BoringModel):
    def __init__(self, fails: bool = False):
        super().__init__()
        self.fails = fails

    def on_train_start(self):
        if self.fails:
            raise ValueError("of the module's own")
"""


def test_fit_finds_modules_of_the_current_folder_and_tells_wrong_options_in_a_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("own_module_of_fit.py").write_text(OWN_MODULE)
    own = [
        "--model",
        "own_module_of_fit.Own",
        "--data",
        "lightning.pytorch.demos.boring_classes.BoringDataModule",
    ]
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_progress_bar", "enable_checkpointing")]
    options = ["fit", *own, *quiet, "--trainer.max_steps=2", "--trainer.callbacks=CheckpointMergeCallback"]
    every = "--trainer.callbacks.every_n_steps=1"

    assert main([*options, every]) == 0
    assert Path("merges/latest/model.safetensors").is_file()
    for path in Path().glob("*.yaml"):
        path.unlink()
    for wrong, said in {
        "--trainer.callbacks.window=0": "window=0 must be a positive whole number",
        "--trainer.max_steps=-5": "`max_steps` must be a non-negative integer",
    }.items():
        capsys.readouterr()
        assert main([*options, every, wrong]) == 1
        assert [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith(f"merge-callback: {said}")
        ]
    with pytest.raises(ValueError, match="of the module's own"):
        main([*options, every, "--model.fails=true"])
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("command", ["demo", "fit"])
def test_missing_extras_are_named_with_the_command_that_installs_them(command, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    assert main([command]) == 1
    assert capsys.readouterr().err.endswith("is missing: pip install 'merge-callback[demo]'\n")


def test_command_line_loads_neither_torch_nor_lightning():
    check = "import sys, merge_callback.cli.main; print({'torch', 'lightning'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "set()"
