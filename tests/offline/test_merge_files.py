"""Merging checkpoint files: what comes out, and for whom."""

import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from forked import Forked
from lightning.pytorch import LightningModule, Trainer
from merge_commands import change, files, merge, model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_callback import load_merge, merge_state_dicts
from merge_callback.cli.main import main
from merge_callback.offline import file_merge, workers

pytestmark = pytest.mark.usefixtures("in_this_process")


METHODS = ["sma", "wma", "ema", "slerp", "task_arithmetic", "ties", "dare", "dropout", "noise", "meta", "wsm"]


def merge_in_processes(count, arguments, killed=False):
    """Merges in so many processes, ``killed`` if asked; the exit status, and all that was printed."""
    with TemporaryDirectory() as folder:
        process = Forked(_merge_in_processes, count, arguments, killed, log=Path(folder, "log"))
        try:
            return process.wait(), Path(folder, "log").read_text()
        finally:
            process.kill()


def _merge_in_processes(count, arguments, killed):
    workers.available = lambda: count
    if killed:
        file_merge.FileMerge.merge = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return main(arguments)


# --- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_files_merge_to_the_very_bits_that_state_dicts_do(tmp_path, checkpoints, method):
    paths, dicts = checkpoints
    assert merge(*paths, "--method", method, "--output", tmp_path / "out") == 0

    found = load_file(tmp_path / "out/model.safetensors")
    steps = [100, 200, 300]
    expected = merge_state_dicts(dicts, method, positions=steps, steps=steps)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_what_is_the_same_in_all_checkpoints_has_to_fit_the_dtype_too(tmp_path, capsys):
    for step in (1, 2):
        save_file({"base": torch.full((3,), 1e6)}, tmp_path / f"step={step}.safetensors")
    assert merge(tmp_path, "--dtype", "fp16", "--output", tmp_path / "out") == 1
    assert "'base': the merge does not fit torch.float16" in capsys.readouterr().err


def test_what_is_the_same_in_all_checkpoints_stays_to_the_last_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base, head = torch.randn(3, 5000, generator=generator), torch.randn(3, 9, generator=generator)
    for step in (1, 2, 3):
        save_file({"base": base, "head": head + step}, tmp_path / f"step={step}.safetensors")
    assert merge(tmp_path, "--output", tmp_path / "out") == 0
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged["base"].equal(base)
    torch.testing.assert_close(merged["head"], head + 2)


def test_what_is_the_same_in_all_checkpoints_but_not_in_the_base_is_merged(tmp_path):
    for name, value in (("base", 1.0), ("step=1", 3.0), ("step=2", 3.0)):
        save_file({"weight": torch.full((5,), value)}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"step={step}.safetensors" for step in (1, 2)]
    options = ["--base", tmp_path / "base.safetensors", "--method", "task_arithmetic", "--scale", "0.5"]
    assert merge(*paths, *options, "--output", tmp_path / "out") == 0
    assert load_file(tmp_path / "out/model.safetensors")["weight"].tolist() == [2.0] * 5


def test_processes_side_by_side_merge_to_the_same_bits(tmp_path, checkpoints):
    paths, _ = checkpoints
    assert merge(*paths, "--method", "dare", "--output", tmp_path / "one") == 0
    command = ["merge", *map(str, paths), "--method", "dare", "--quiet", "--output", str(tmp_path / "three")]
    status, said = merge_in_processes(3, command)
    assert status == 0, said
    one, three = (json.loads((tmp_path / name / "merge.json").read_text()) for name in ("one", "three"))
    assert one["files"] == three["files"]
    change(paths[1], model_scale=torch.tensor(torch.nan))
    status, said = merge_in_processes(3, [*command, "--force"])
    assert (status, "'model.scale'" in said) == (1, True)  # what one raises reaches the user


def test_a_process_that_is_killed_is_an_error_and_leaves_nothing(tmp_path, checkpoints):
    paths, _ = checkpoints
    command = ["merge", *map(str, paths), "--quiet", "--output", str(tmp_path / "out")]
    status, said = merge_in_processes(2, command, killed=True)
    assert status == 1
    assert "a process was killed while it merged" in said
    assert files(tmp_path) == sorted(["run", *(path.name for path in paths)])


def test_options_of_a_method_are_flags(tmp_path, checkpoints):
    paths, dicts = checkpoints
    assert merge(*paths, "--method", "ema", "--alpha", "0.5", "--output", tmp_path / "a") == 0
    assert merge(*paths, "--weights", "1", "2", "1", "--output", tmp_path / "b") == 0
    for folder, expected in (
        ("a", merge_state_dicts(dicts, "ema", alpha=0.5)),
        ("b", merge_state_dicts(dicts, weights=[0.25, 0.5, 0.25])),
    ):
        found = load_merge(tmp_path / folder)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_s_folder_is_picked_from(tmp_path, checkpoints):
    paths, dicts = checkpoints
    assert merge(paths[0].parent, "--last", 2, "--output", tmp_path / "out") == 0
    expected = merge_state_dicts(dicts[1:])
    assert torch.equal(load_merge(tmp_path / "out")["model.embed.weight"], expected["model.embed.weight"])
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert [source["step"] for source in record["inputs"]] == [200, 300]


def test_the_record_says_all_and_inspect_verifies_it(tmp_path, checkpoints, capsys):
    paths, _ = checkpoints
    merge(*paths, "--method", "wma", "--output", tmp_path / "out")
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["method"]["name"] == "wma"
    assert record["weights"] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert [source["path"] for source in record["inputs"]] == [str(path) for path in paths]
    assert record["copied"] == ["model.positions", "model.seen"]
    digest = hashlib.sha256((tmp_path / "out/model.safetensors").read_bytes()).hexdigest()
    card = hashlib.sha256((tmp_path / "out/README.md").read_bytes()).hexdigest()
    assert record["files"] == {"model.safetensors": digest, "README.md": card}

    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--tensors"]) == 0
    told = capsys.readouterr().out
    for part in ("wma", "weight 0.3333", "model.norm.weight", "float32", "5 with 418 values", "verified"):
        assert part in told
    with open(tmp_path / "out/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert main(["inspect", str(tmp_path / "out")]) == 1
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["inspect", str(paths[0])]) == 0
    assert "none recorded" in capsys.readouterr().out


def test_prefixes_excluded_names_and_dtypes_are_the_user_s(tmp_path, checkpoints):
    paths, dicts = checkpoints
    options = ["--strip-prefix", "model.", "--prefix", "net.", "--exclude", "*.norm.*", "--dtype", "bf16"]
    assert merge(*paths, *options, "--output", tmp_path / "out") == 0
    found, expected = load_merge(tmp_path / "out"), merge_state_dicts(dicts)
    assert set(found) == {name.replace("model.", "net.") for name in expected}
    assert torch.equal(found["net.embed.weight"], expected["model.embed.weight"].bfloat16())
    assert torch.equal(found["net.norm.weight"], dicts[-1]["model.norm.weight"].bfloat16())
    assert torch.equal(found["net.positions"], dicts[-1]["model.positions"])


def test_a_large_model_is_written_in_shards(tmp_path, checkpoints):
    paths, dicts = checkpoints
    assert merge(*paths, "--shard-size", "1KB", "--output", tmp_path / "out") == 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(dicts[0])
    assert len(set(index["weight_map"].values())) > 1
    found, expected = load_merge(tmp_path / "out"), merge_state_dicts(dicts)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
    assert main(["inspect", str(tmp_path / "out")]) == 0


def test_another_base_is_named(tmp_path, checkpoints):
    paths, _ = checkpoints
    assert merge(*paths[1:], "--method", "ties", "--base", paths[0], "--output", tmp_path / "a") == 0
    assert merge(*paths, "--method", "ties", "--output", tmp_path / "b") == 0
    a, b = load_merge(tmp_path / "a"), load_merge(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((tmp_path / "a/merge.json").read_text())["base"]["path"] == str(paths[0])


def test_a_configuration_file_gives_what_the_command_line_does_not(tmp_path, checkpoints):
    paths, dicts = checkpoints
    config = {"checkpoints": [str(p) for p in paths], "method": "ema", "alpha": 0.5, "dtype": "bf16"}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({**config, "shard-size": "1GB"}))
    assert merge("--config", tmp_path / "merge.yaml", "--dtype", "fp64", "--output", tmp_path / "out") == 0
    expected = merge_state_dicts(dicts, "ema", alpha=0.5)["model.embed.weight"]
    found = load_merge(tmp_path / "out")["model.embed.weight"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0)


def test_the_command_line_wins_where_it_says_what_would_be_the_default(tmp_path, checkpoints):
    paths, dicts = checkpoints
    config = {
        "checkpoints": [str(p) for p in paths],
        "method": "ema",
        "every": 2,
        "prefix": "x.",
        "quiet": True,
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    given = ["--method", "sma", "--every", "1", "--prefix", ""]
    assert merge("--config", tmp_path / "merge.yaml", *given, "--output", tmp_path / "out") == 0
    expected = merge_state_dicts(dicts, "sma")["model.embed.weight"]
    torch.testing.assert_close(load_merge(tmp_path / "out")["model.embed.weight"], expected, rtol=0, atol=0)


def test_a_method_of_one_s_own_is_imported(tmp_path, checkpoints, monkeypatch):
    (tmp_path / "own_methods.py").write_text(
        "from merge_callback import register_method\n"
        "from merge_callback.merging import LinearMethod\n"
        "@register_method('middle', reference='lab notes')\n"
        "class Middle(LinearMethod):\n"
        "    def raw_weights(self, positions):\n"
        "        return [float(i == len(positions) // 2) for i in range(len(positions))]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as a command has it
    paths, dicts = checkpoints
    assert merge(*paths, "--import", "own_methods", "--method", "middle", "--output", tmp_path / "out") == 0
    assert torch.equal(load_merge(tmp_path / "out")["model.scale"], dicts[1]["model.scale"])


# --- for whom -----------------------------------------------------------------------------------------------


class Net(LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width))
        self.head = torch.nn.Linear(width, 3)

    def training_step(self, batch, batch_idx):
        return self.head(self.net(batch)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_merges_and_loads_again(tmp_path, capsys):
    data = torch.utils.data.DataLoader(torch.randn(24, 3), batch_size=6)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    module, paths = Net(width=5), []
    trainer.fit(module, data)
    for epoch in range(2):
        paths.append(tmp_path / f"epoch{epoch}-step={4 * (epoch + 1)}.ckpt")
        trainer.save_checkpoint(paths[-1])
        trainer.fit_loop.max_epochs = epoch + 2
        trainer.fit(module, data)
    assert merge(*paths, "--as", "lightning", "--output", tmp_path / "out") == 0

    dicts = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    expected = merge_state_dicts(dicts)
    loaded = Net.load_from_checkpoint(tmp_path / "out/merged.ckpt", weights_only=True)
    assert loaded.hparams.width == 5
    assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)
    assert trainer.validate(Net(width=5), data, ckpt_path=tmp_path / "out/merged.ckpt", verbose=False)
    assert files(tmp_path / "out") == ["README.md", "merge.json", "merged.ckpt"]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    for part in ("merged.ckpt", "checksums    verified", "weight 0.5000", "step         8"):
        assert part in told
    # And what was merged can be merged again.
    assert merge(tmp_path / "out/merged.ckpt", paths[0], "--keep-all", "--output", tmp_path / "again") == 0


def test_tied_weights_stay_tied(tmp_path):
    for i in range(2):
        weight = torch.randn(4, 3)
        torch.save(
            {"state_dict": {"embed": weight, "head": weight, "b": torch.ones(1)}}, tmp_path / f"{i}.ckpt"
        )
    paths = [tmp_path / f"{i}.ckpt" for i in range(2)]
    assert merge(*paths, "--output", tmp_path / "out") == 0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert set(file.keys()) == {"embed", "b"}
        assert file.metadata()["head"] == "embed"
    found = load_merge(tmp_path / "out")
    assert torch.equal(found["head"], found["embed"])
    assert merge(*paths, "--as", "lightning", "--output", tmp_path / "ckpt") == 0
    state = torch.load(tmp_path / "ckpt/merged.ckpt", weights_only=True)["state_dict"]
    assert state["head"].data_ptr() == state["embed"].data_ptr()


# --- in how much memory -------------------------------------------------------------------------------------

MEASURED = """
import json, sys, threading, torch
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
before, peak, stop = anonymous(), {}, threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[method] = max(peak.get(method, 0), anonymous() - before)
method = "import"
threading.Thread(target=watch, daemon=True).start()
from merge_callback.cli.main import main
for method in ("sma", "ties", "slerp", "dare", "noise"):
    command = ["merge", *sys.argv[1:], "--method", method, "--quiet", "--dtype", "fp32", "--force"]
    assert main(command + ["--output", "out"]) == 0
stop.set()
print(json.dumps({**peak, "lightning": "lightning" in sys.modules}))
"""


def test_memory_does_not_depend_on_the_model(tmp_path):
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.safetensors")
        numbers = torch.arange(10_000_000, dtype=torch.int32).mul_(i + 1).remainder_(1009)
        save_file({"large": numbers.bfloat16()}, paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert not peak.pop("lightning")
    # MB above `import torch`; 10 at most were measured. In fp32 the one tensor has 40, and three of them 120.
    assert {method for method, grown in peak.items() if grown > 30} == set(), peak


def test_the_trajectory_is_told_from_tokens_then_steps_then_nothing():
    class Known:
        def __init__(self, step, tokens):
            self.step, self.tokens = step, tokens

    def positions(*known):
        return list(file_merge.trajectory_of([Known(*k) for k in known]).positions)

    assert positions((1, 10), (2, 30)) == [10, 30]
    assert positions((1, 10), (2, None)) == [1, 2]
    assert positions((2, None), (1, None)) == [0, 1]
    assert positions((None, None), (1, None)) == [0, 1]


def test_the_command_ends_with_its_status_and_all_it_printed(tmp_path):
    save_file(model(0), tmp_path / "step=1.safetensors")
    known, missing = (0, "model.embed.weight"), (1, "there is no such checkpoint")
    for name, (status, printed) in {"step=1": known, "none": missing}.items():
        arguments = ["inspect", str(tmp_path / f"{name}.safetensors"), "--tensors"]
        process = Forked(_run_as_module, arguments, log=tmp_path / f"{name}.txt")
        assert process.wait(60) == status
        assert printed in (tmp_path / f"{name}.txt").read_text()


def _run_as_module(arguments):
    sys.argv[1:] = arguments
    runpy.run_module("merge_callback", run_name="__main__")
