"""Merging checkpoint files: what is refused, and leaves nothing behind."""

import json
import re
import warnings

import pytest
import torch
from merge_commands import change, files, merge
from safetensors.torch import save_file

from merge_callback import load_merge
from merge_callback.offline import output

pytestmark = pytest.mark.usefixtures("in_this_process")


def refused(tmp_path, capsys, *arguments):
    """Runs a merge that must fail; returns what it said. Nothing may be left of it."""
    before = files(tmp_path)
    assert merge(*arguments, "--output", tmp_path / "out") == 1
    assert files(tmp_path) == before
    return capsys.readouterr().err


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
