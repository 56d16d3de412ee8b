"""Merging checkpoint files: what comes out, for whom, in how much memory, and what is refused."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from forked import Forked
from lightning.pytorch import LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_callback import load_merge, merge_state_dicts
from merge_callback.cli.main import main
from merge_callback.offline import file_merge, output, workers


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """A test process has threads, which a fork would lose; what forks here has a process of its own."""
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)


METHODS = ["sma", "wma", "ema", "slerp", "task_arithmetic", "ties", "dare", "dropout", "noise", "meta", "wsm"]


def model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(50, 8, generator=generator).to(dtype),
        "model.norm.weight": torch.randn(8, generator=generator),
        "model.scale": torch.randn((), generator=generator).to(dtype),
        "model.positions": torch.arange(8),
        "model.seen": torch.tensor(seed),
    }


@pytest.fixture
def checkpoints(tmp_path):
    """Three files, and their state dicts."""
    paths, dicts = [], [model(seed) for seed in range(3)]
    for i, state in enumerate(dicts):
        paths.append(tmp_path / f"run/step={100 * (i + 1)}.safetensors")
        paths[-1].parent.mkdir(exist_ok=True)
        save_file(state, paths[-1])
    return paths, dicts


def merge(*arguments):
    """Runs the command; returns its exit status."""
    return main(["merge", "--quiet", *map(str, arguments)])


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


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*"))


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


# --- what is refused, and leaves nothing behind -------------------------------------------------------------


def refused(tmp_path, capsys, *arguments):
    """Runs a merge that must fail; returns what it said. Nothing may be left of it."""
    before = files(tmp_path)
    assert merge(*arguments, "--output", tmp_path / "out") == 1
    assert files(tmp_path) == before
    return capsys.readouterr().err


def change(path, **tensors):
    """Rewrites a file with other tensors in it; ``None`` takes one out."""
    state = {**load_file(path), **{name.replace("_", "."): t for name, t in tensors.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"model_extra": torch.ones(2)}, "different names.*model.extra"),
        ({"model_scale": None}, "different names.*model.scale"),
        ({"model_scale": torch.ones(2)}, "'model.scale': shape"),
        ({"model_scale": torch.ones((), dtype=torch.float64)}, "'model.scale': dtype"),
        ({"model_positions": torch.arange(8) + 1}, "'model.positions'.*differs.*--exclude"),
        ({"model_scale": torch.tensor(torch.nan)}, "'model.scale' of .*step=200.* holds NaN or Inf"),
        ({"model_scale": torch.tensor(-torch.inf)}, "'model.scale' of .*step=200.* holds NaN or Inf"),
    ],
)
@pytest.mark.parametrize("method", ["sma", "ties"])
def test_checkpoints_that_do_not_belong_together_are_refused(
    tmp_path, checkpoints, capsys, tensors, named, method
):
    paths, _ = checkpoints
    change(paths[1], **tensors)
    error = refused(tmp_path, capsys, *paths, "--method", method)
    assert re.search(named, error), error


def test_an_order_that_contradicts_the_steps_is_told(tmp_path, checkpoints):
    paths, _ = checkpoints
    swapped = [paths[0], paths[2], paths[1]]
    with pytest.warns(UserWarning, match=r"steps are \[100, 300, 200\]: merged as given"):
        merge(*swapped, "--keep-order", "--method", "ema", "--output", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(*swapped, "--keep-order", "--output", tmp_path / "mean")
        merge(*swapped, "--method", "ema", "--output", tmp_path / "ema")
    inputs = json.loads((tmp_path / "ema/merge.json").read_text())["inputs"]
    assert [record["path"] for record in inputs] == [str(path) for path in paths]


def test_weights_go_with_the_order_that_was_given_or_are_refused(tmp_path, checkpoints, capsys):
    paths, dicts = checkpoints
    given = [paths[1], paths[0], "--weights", 0.25, 0.75]
    assert "say --keep-order, or give them in that order" in refused(tmp_path, capsys, *given)
    assert merge(*given, "--keep-order", "--output", tmp_path / "out") == 0
    expected = 0.25 * dicts[1]["model.scale"] + 0.75 * dicts[0]["model.scale"]
    assert torch.allclose(load_merge(tmp_path / "out")["model.scale"], expected)


def test_the_choice_is_told_and_one_checkpoint_is_no_merge(tmp_path, checkpoints, capsys):
    paths, _ = checkpoints
    assert merge(*paths[::-1], "--last", 2, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        "2 checkpoints, oldest first: step=200.safetensors (step 200), step=300.safetensors (step 300)",
        "they were put in the order of their steps; --keep-order keeps the order given",
    ]
    message = refused(tmp_path, capsys, tmp_path / "run", "--from", 300)
    assert re.search(r"only one checkpoint is left to merge \(\S*step=300\.safetensors\)", message)


def test_a_merge_across_phases_is_warned_of(tmp_path):
    record = {"lr": 1.0, "lr_ratio": 1.0, "lr_step": 1, "layout": "x", "since": 0, "tokens": 5}
    for step, phase in ((1, "stable"), (2, "stable"), (3, "decay")):
        metadata = {k: str(v) for k, v in {**record, "step": step, "phase": phase}.items()}
        save_file({"w": torch.ones(2)}, tmp_path / f"step={step}.safetensors", metadata=metadata)
    with pytest.warns(UserWarning, match=r"several phases of the learning rate \(stable: 1, 2; decay: 3\)"):
        merge(tmp_path, "--output", tmp_path / "all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(tmp_path, "--to", 2, "--output", tmp_path / "stable")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "mean"], "unknown merging method 'mean'"),
        (["--method", "sma", "--alpha", "0.5"], "'sma'.*alpha"),
        (["--method", "ema", "--alpha", "2"], "alpha=2"),
        (["--weights", "1", "2"], "2 weights for 3 checkpoints"),
        (["--base", "BASE"], "'sma' uses no base"),
        (["--dtype", "int8"], "--dtype='int8'"),
        (["--shard-size", "big"], "--shard-size='big'"),
        (["--exclude", "nothing*"], "'nothing\\*' matches no tensor"),
        (["--strip-prefix", "net."], "'net.' begins no tensor's name"),
        (["--last", "0"], "last"),
        (["--method", "ema", "--alpha", "much"], "'ema' does not take {'alpha': 'much'}"),
        (["--import", "nowhere"], "--import nowhere: No module named 'nowhere'"),
    ],
)
def test_wrong_options_name_themselves(tmp_path, checkpoints, capsys, options, named):
    paths, _ = checkpoints
    error = refused(tmp_path, capsys, *paths, *(str(paths[0]) if o == "BASE" else o for o in options))
    assert re.search(named, error), error


def test_a_merge_that_does_not_fit_its_dtype_is_refused(tmp_path, checkpoints, capsys):
    paths, _ = checkpoints
    for path in paths:
        change(path, model_scale=torch.tensor(1e6))
    assert "'model.scale': the merge does not fit torch.float16" in refused(
        tmp_path, capsys, *paths, "--dtype", "fp16"
    )


def test_excluded_tensors_may_hold_anything(tmp_path, checkpoints):
    paths, _ = checkpoints
    change(paths[2], model_scale=torch.tensor(-torch.inf))
    assert merge(*paths, "--exclude", "model.scale", "--output", tmp_path / "out") == 0
    assert load_merge(tmp_path / "out")["model.scale"] == -torch.inf


def test_what_is_there_is_replaced_only_by_force(tmp_path, checkpoints, capsys):
    paths, dicts = checkpoints
    assert merge(paths[0], paths[0], "--keep-all", "--output", tmp_path / "out") == 0
    assert "exists; name another folder, or replace it with --force" in refused(tmp_path, capsys, *paths)
    assert torch.equal(load_merge(tmp_path / "out")["model.scale"], dicts[0]["model.scale"])
    assert merge(paths[1], paths[1], "--keep-all", "--output", tmp_path / "out", "--force") == 0
    assert torch.equal(load_merge(tmp_path / "out")["model.scale"], dicts[1]["model.scale"])
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, checkpoints, capsys, monkeypatch):
    paths, _ = checkpoints

    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert "No space left" in refused(tmp_path, capsys, *paths)


@pytest.mark.parametrize("function", ["done", "finish"])
def test_an_interruption_leaves_nothing(tmp_path, checkpoints, monkeypatch, function):
    paths, _ = checkpoints

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(output.ModelFiles, function, interrupted)
    before = files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        merge(*paths, "--output", tmp_path / "out")
    assert files(tmp_path) == before


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
    command = [sys.executable, "-m", "merge_callback"]
    listed = subprocess.run([*command, "methods"], capture_output=True, text=True, check=True)
    assert "ties" in listed.stdout
    missing = subprocess.run([*command, "inspect", str(tmp_path / "none")], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "there is no such checkpoint" in missing.stderr
