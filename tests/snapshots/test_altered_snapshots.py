"""A snapshot's file that another process writes to: its bytes reach no emission, metric or live weight."""

import os
import re
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from codec_windows import new_window, take
from slow_cases import mostly_slow
from spiking_runs import USED, Damage, spiking, used
from tiny_run import At, fit
from window_runs import CODEC, LAST, steps

from merge_callback import load_merge
from merge_callback.merging import resolve_method
from merge_callback.snapshots.arena import all_finite
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.merge import NonFiniteMergeError
from merge_callback.snapshots.window_merger import WindowMerger

LEFT_OUT = "left out of the window: snapshot of step .* is not what was written to it"


def overwrite(path, data, at=-64):
    """Writes into a file in place, as a copy tool does, or a disk that is read back with errors."""
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(data)


NOT_A_NUMBER, INFINITE = b"\xff" * 64, b"\x00\x00\x80\x7f" * 16  # in fp32; the first in fp16, too


WAYS = {
    "NaN": (NOT_A_NUMBER, {}),
    "Inf": (INFINITE, {}),
    "differences": (NOT_A_NUMBER, CODEC),
    "ties": (NOT_A_NUMBER, {"method": "ties"}),
    "bf16": (NOT_A_NUMBER, {"snapshot_dtype": "bf16"}),
}


@pytest.mark.parametrize(
    ("way", "which"), mostly_slow(product(WAYS, [0, 1, 3]), daily=[0, 1, 2, 5, 6, 8, 10, 14])
)
def test_bytes_that_are_no_numbers_are_neither_published_nor_evaluated(tmp_path, caplog, way, which):
    data, options = WAYS[way]

    def spoil(module):
        overwrite(sorted((tmp_path / "merges/window").glob("step=*"))[which], data)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        options = {"storage": "disk", "emit_every": 1, **options}
        trainer, _, _ = fit(tmp_path, callbacks=[At(step11=spoil)], **options)

    told = caplog.text + " ".join(str(warning.message) for warning in warned)
    # The oldest leaves the window before the next merge; with differences it is summed up first.
    assert bool(re.search(LEFT_OUT, told)) == (which > 0 or options.get("snapshot_codec") is not None)
    assert "could not be merged" not in told
    for path in (tmp_path / "merges").glob("step=*"):
        assert all(all_finite(tensor) for tensor in load_merge(path).values()), path.name
    assert all(value == value for value in map(float, trainer.callback_metrics.values()))
    assert steps(tmp_path) == LAST  # later snapshots are taken and merged as ever


def test_a_sound_window_is_not_read_again(tmp_path, monkeypatch):
    """To read all files for every merge would take as long as to write them."""
    monkeypatch.setattr("merge_callback.snapshots.window.Window.drop_damaged", None)
    fit(tmp_path)
    assert steps(tmp_path) == LAST


def test_a_merge_in_memory_that_is_not_finite_is_not_made():
    window = new_window({"weight": torch.zeros(8), "other": torch.zeros(3)}, codec="")
    for step in (1, 2):
        take(window, step, {"weight": torch.ones(8), "other": torch.ones(3)})
    window.snapshots[0].arena.tensors()["weight"][5] = torch.nan
    for method in ("sma", "ties", "slerp"):
        merger = WindowMerger(window, {"stable": resolve_method(method)}, 1)
        with pytest.raises(
            NonFiniteMergeError, match="in the merge of the snapshots of steps 1, 2 weight hold NaN"
        ):
            merger.current(ModelTensors())
        with pytest.raises(NonFiniteMergeError):
            merger.measure(ModelTensors(), merge=True)


def test_a_merge_that_can_not_be_mended_costs_itself_alone(tmp_path, caplog):
    """In memory nothing tells which snapshot is spoilt: there is no merge until it has left the window."""

    def spoil(module):
        trainer = module.trainer
        snapshot = trainer.callbacks[0].session.window.snapshots[-1]
        snapshot.arena.buffer[-8:] = 0xFF

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, callbacks=[At(step11=spoil)], storage="cpu", emit_every=1)
    published = sorted(int(path.name[5:13]) for path in (tmp_path / "merges").glob("step=*"))
    assert (published[-1], 12 in published, steps(tmp_path)) == (26, False, LAST)
    for path in (tmp_path / "merges").glob("step=*"):
        assert all(all_finite(tensor) for tensor in load_merge(path).values()), path.name
    assert "in the merge of the snapshots of steps" in caplog.text


# --- what a restore reads -----------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes()[-1:])
    overwrite(path, bytes([content[0] ^ 1]), at=-1)


def another_file(path):
    draft = path.with_name("other")
    draft.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    os.replace(draft, path)


def header(path):
    overwrite(path, b"{ ", at=8)


def noise(path):
    overwrite(path, os.urandom(64))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [flip, another_file, header, noise, pipe])
@pytest.mark.parametrize(("codec", "left"), [("", [1, 3]), ("delta-fp16", [1])])
def test_a_snapshot_whose_file_changed_is_dropped_with_what_builds_on_it(tmp_path, damage, codec, left):
    window = new_window({"weight": torch.zeros(100)}, folder=tmp_path, codec=codec)
    for step in (1, 2, 3):
        take(window, step, {"weight": torch.linspace(0, step, 100)})
    assert window.drop_damaged() == []
    damage(tmp_path / window.snapshots[1].file)
    lost = window.drop_damaged()
    assert [snapshot.step for snapshot in window.snapshots] == left
    assert len(lost) == 3 - len(left)
    assert all("is not what was written to it" in line for line in lost)


def test_a_file_that_was_removed_is_still_what_was_written(tmp_path):
    window = new_window({"weight": torch.zeros(100)}, folder=tmp_path, codec="")
    for step in (1, 2):
        take(window, step, {"weight": torch.full((100,), float(step))})
    (tmp_path / window.snapshots[0].file).unlink()
    assert window.drop_damaged() == []
    assert float(window.snapshots[0].arena.tensors()["weight"][0]) == 1.0


def test_a_difference_that_changed_is_not_written_anew_as_a_sound_snapshot(tmp_path, caplog):
    window = new_window({"weight": torch.zeros(100)}, 3, tmp_path)
    for step in (1, 2, 3):
        take(window, step, {"weight": torch.linspace(0, step, 100)})
    flip(tmp_path / window.snapshots[1].file)
    take(window, 4, {"weight": torch.linspace(0, 4, 100)})
    assert [snapshot.step for snapshot in window.snapshots] == [1]  # what was the oldest, and is sound
    assert re.search(LEFT_OUT.split(": ", 1)[1], caplog.text)
    take(window, 5, {"weight": torch.linspace(0, 5, 100)})
    assert [snapshot.step for snapshot in window.snapshots] == [1, 5]
    assert window.drop_damaged() == []


def test_a_snapshot_is_kept_whole_where_the_one_before_is_spoilt(tmp_path):
    window = new_window({"weight": torch.zeros(100)}, 4, tmp_path)
    for step in (1, 2):
        take(window, step, {"weight": torch.linspace(0, step, 100)})
    overwrite(tmp_path / window.snapshots[1].file, NOT_A_NUMBER)
    take(window, 3, {"weight": torch.linspace(0, 3, 100)})
    assert [(snapshot.step, snapshot.difference_to) for snapshot in window.snapshots] == [
        (1, None),
        (3, None),
    ]


@pytest.mark.parametrize("damage", [flip, noise])
def test_a_restore_takes_no_snapshot_whose_file_changed(tmp_path, damage):
    def spoil(module):
        (path,) = Path(tmp_path / "window").glob(f"step={USED[1]:08d}*")
        damage(path)

    with pytest.warns(UserWarning, match=f"snapshot of step {USED[1]}: .* is not what was written to it"):
        run = spiking(
            tmp_path, durable=True, storage="disk", emit_every=0, callbacks=[Damage({USED[2] + 4: spoil})]
        )
    (restore,) = run.restores
    assert USED[1] not in used(restore)
    assert used(restore)[-1] == USED[2]
    assert all(all_finite(parameter) for parameter in run.module.parameters())
