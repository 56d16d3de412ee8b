"""The offline tool on a window whose snapshots are kept as differences."""

import json
import shutil

import pytest
import torch
from tiny_run import EVERY, WINDOW, Keeper, fit

from merge_callback import load_merge
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.cli.main import main
from merge_callback.snapshots.safetensors_file import CorruptFileError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a finished run, and the live weights of every step."""
    folder, keeper = tmp_path_factory.mktemp("run"), Keeper()
    fit(folder, callbacks=[keeper], snapshot_codec="delta-fp16", method="sma", emit_every=1)
    return folder, keeper.weights


@pytest.fixture
def window(run, tmp_path):
    """A copy of the run's window, to be meddled with."""
    return shutil.copytree(run[0] / "merges/window", tmp_path / "window")


def records(window):
    return json.loads((window / "manifest.json").read_text())["snapshots"]


def test_a_difference_is_opened_as_the_whole_snapshot(run, window, tmp_path):
    found = [open_checkpoint(window / record["file"], tmp_path) for record in records(window)]

    assert [len(checkpoint.files) for checkpoint in found] == list(range(1, WINDOW + 1))
    for checkpoint in found:
        live = run[1][checkpoint.step]
        assert checkpoint.tensors.keys() == live.keys()
        for name, tensor in checkpoint.tensors.items():
            assert tensor.dtype == live[name].dtype
            moved = (live[name].double() - run[1][checkpoint.step - EVERY][name].double()).abs()
            # One rounding of fp16 of what moved, and one of fp32 a stored snapshot.
            bound = moved * 2**-11 + live[name].double().abs() * WINDOW * 2**-23 + 2**-35
            assert bool(((tensor.double() - live[name].double()).abs() <= bound).all()), name


def test_the_command_merges_differences_as_the_run_did(run, window, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    merged = json.loads((run[0] / "merges/latest/merge.json").read_text())["snapshots"]
    steps = {snapshot["step"] for snapshot in merged}
    files = [str(window / record["file"]) for record in records(window) if record["step"] in steps]
    assert main(["merge", *files, "--method", "sma", "--output", str(tmp_path / "merged")]) == 0

    merged, emitted = load_merge(tmp_path / "merged"), load_merge(run[0] / "merges/latest")
    assert merged.keys() == emitted.keys()
    for name, tensor in emitted.items():
        # The run sums what is stored, the command what is decoded: a few roundings of fp32 apart.
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_lost_snapshot_is_named_by_what_builds_on_it(window, tmp_path):
    first, second, third, *_ = records(window)
    (window / second["file"]).unlink()

    open_checkpoint(window / first["file"], tmp_path)
    with pytest.raises((CorruptFileError, OSError), match=str(second["step"])):
        open_checkpoint(window / third["file"], tmp_path)


def test_a_snapshot_of_another_timeline_is_not_taken_for_the_one_before(window, tmp_path):
    first, second, *_ = records(window)
    (window / first["file"].replace(".safetensors", "-other.safetensors")).write_bytes(
        (window / first["file"]).read_bytes()
    )
    open_checkpoint(window / second["file"], tmp_path)  # the manifest tells which
    manifest = json.loads((window / "manifest.json").read_text())
    files = [record["file"] for record in manifest["snapshots"]]
    (window / "manifest.json").write_text(json.dumps({**manifest, "snapshots": [], "saved": [files]}))
    open_checkpoint(window / second["file"], tmp_path)  # and for the window of a checkpoint, too
    (window / "manifest.json").unlink()
    with pytest.raises(CorruptFileError, match="holds 2; which is not known"):
        open_checkpoint(window / second["file"], tmp_path)
