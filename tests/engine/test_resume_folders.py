"""Folders that runs share or resume from: with other runs' windows, and with files that are damaged."""

import os
import random
import re
import shutil
import signal

import pytest
import torch
from lightning.pytorch import Callback
from resumed_runs import CODEC, STOPPED, StopAtStart, assert_same, decoded_files, live_files, steps, stopped
from run_outcomes import outcome, window
from safetensors.torch import load_file
from slow_cases import some_slow
from tiny_run import At, Elsewhere, Keeper, SaveAt, StopError, fit

from merge_callback import CheckpointMergeCallback, load_merge, merge_state_dicts

# --- folders shared by runs ---------------------------------------------------------------------------------


def test_a_fresh_run_over_an_old_folder_moves_the_old_window_aside_and_both_can_be_resumed(
    tmp_path, unbroken
):
    first = stopped(tmp_path)
    shutil.move(first, tmp_path / "first.ckpt")
    (tmp_path / "metrics.jsonl").unlink()
    second = stopped(tmp_path, module=Elsewhere)
    shutil.move(second, tmp_path / "second.ckpt")
    fresh = window(tmp_path / "merges")["snapshots"]
    assert [r["step"] for r in fresh] == [6, 8, 10, 12]
    (tmp_path / "metrics.jsonl").unlink()

    with pytest.raises(StopError):
        fit(tmp_path, tmp_path / "first.ckpt", [StopAtStart()])
    old = window(tmp_path / "merges")["snapshots"]
    with pytest.raises(StopError):
        fit(tmp_path, tmp_path / "second.ckpt", [StopAtStart()], module=Elsewhere)
    assert window(tmp_path / "merges")["snapshots"] == fresh
    _, module, _ = fit(tmp_path, tmp_path / "first.ckpt")

    assert [r["step"] for r in old] == [6, 8, 10, 12]
    assert old != fresh
    found, expected = outcome(tmp_path, module), unbroken()
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]
    assert found["weights"] == expected["weights"]


def test_a_hundred_fresh_runs_over_one_folder_start(tmp_path):
    for k in range(1, 100):
        (tmp_path / f"merges/window.old-{k}").mkdir(parents=True)
    fit(tmp_path, trainer={"max_steps": 2})

    fit(tmp_path, trainer={"max_steps": 2})

    assert list((tmp_path / "merges/window.old-100").glob("*.safetensors"))


def test_two_callbacks_with_one_folder_are_refused_by_name(tmp_path):
    with pytest.raises(Exception, match=r"dirpath=.*merges"):
        fit(tmp_path, before=[CheckpointMergeCallback(every_n_steps=3, dirpath=tmp_path / "merges")])


def test_two_callbacks_that_reach_one_folder_by_two_names_are_refused_by_name(tmp_path):
    (tmp_path / "merges").mkdir()
    (tmp_path / "alias").symlink_to("merges")

    with pytest.raises(ValueError, match=r"dirpath=.* another run is using it"):
        fit(tmp_path, before=[CheckpointMergeCallback(every_n_steps=3, dirpath=tmp_path / "alias")])


@pytest.mark.parametrize("durable", [True, False])
def test_two_trainers_with_one_folder_are_refused_by_name(tmp_path, durable):
    options = {"durable": durable, "storage": "cpu", "trainer": {"logger": False}}

    def intrude(module):
        with pytest.raises(ValueError, match=r"dirpath='.*merges'.* another run is using it"):
            fit(tmp_path, **options)

    fit(tmp_path, callbacks=[At(step5=intrude)], **options)


def test_two_callbacks_with_two_folders_resume_each_with_its_own_window(tmp_path, unbroken):
    def fast():
        return CheckpointMergeCallback(window=3, every_n_steps=1, dirpath=tmp_path / "fast", evaluate=False)

    fit(tmp_path / "unbroken", before=[fast()])
    expected = window(tmp_path / "fast")
    shutil.rmtree(tmp_path / "fast")
    checkpoint = stopped(tmp_path, before=[fast()])

    fit(tmp_path, checkpoint, before=[fast()])

    assert window(tmp_path / "fast")["snapshots"] == expected["snapshots"]
    assert window(tmp_path / "merges")["snapshots"] == unbroken()["window"]["snapshots"]


def test_two_moved_callbacks_do_not_lose_their_windows_in_silence(tmp_path, recwarn):
    def pair(folder):
        return [
            CheckpointMergeCallback(window=3, every_n_steps=n, dirpath=folder / f"every-{n}", evaluate=False)
            for n in (1, 3)
        ]

    checkpoint = stopped(tmp_path, callback=False, before=pair(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    recwarn.clear()

    with pytest.raises(StopError):
        fit(tmp_path, checkpoint, [StopAtBatchTwo()], callback=False, before=pair(tmp_path / "b"))

    told = any("merge:" in str(w.message) for w in recwarn.list)
    assert told or (steps(tmp_path / "b/every-1") == [12, 13, 14])


class StopAtBatchTwo(Callback):
    """Ends a run after one more step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == STOPPED + 1:
            raise StopError


def test_a_folder_in_use_by_another_process_is_refused_by_name_and_free_afterwards(tmp_path, live, survivor):
    os.mkfifo(tmp_path / "hold")
    other = live(tmp_path, start={"Holds": True})["pid"]
    refused = pytest.raises(ValueError, match=r"dirpath='.*merges'.* another run is using it")
    with open(tmp_path / "hold", "w"), refused:  # the pipe opens once the other process waits at it
        fit(tmp_path, trainer={"logger": False})

    assert live(tmp_path, wait=other)["ends"] == [0]
    assert window(tmp_path / "merges")["snapshots"] == survivor["window"]["snapshots"]
    fit(tmp_path, trainer={"max_steps": 2, "logger": False})


def test_a_killed_run_can_be_restarted_while_a_process_it_forked_still_lives(tmp_path, live):
    result = live(tmp_path, [{"DiesBesideItsWorker": True}])
    try:
        worker = int((tmp_path / "worker").read_text())
        os.kill(worker, 0)  # it lives

        assert result["ends"] == [-signal.SIGKILL, 0], result["outcome"].get("log")
    finally:
        os.kill(worker, signal.SIGKILL)


# --- corrupt files ------------------------------------------------------------------------------------------


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _to_folder(path):
    path.unlink()
    path.mkdir()
    (path / "note.txt").write_text("not a snapshot")


def _to_link(path):
    path.unlink()
    path.symlink_to("nowhere")


CORRUPTIONS = {
    "a bit of the data": lambda path: _flip(path, -100),
    "a bit of the header": lambda path: _flip(path, 30),
    "a bit of the header's length": lambda path: _flip(path, 1),
    "the highest bit of the header's length": lambda path: _flip(path, 7),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut inside the header": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "longer by a byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
    "a folder": _to_folder,
    "a dangling link": _to_link,
    "another file": lambda path: path.write_bytes(random.Random(0).randbytes(6000)),
}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run stopped after batch 13, to be copied; every snapshot is published and every merge kept."""
    folder = tmp_path_factory.mktemp("halfway")
    stopped(folder / "recorded", emit_every=1, keep_last=None)
    # The checkpoint knows the old place: a file missing from a copy must not be found there.
    return shutil.move(folder / "recorded", folder / "moved")


@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_corrupt_snapshot_is_named_and_left_out_and_later_merges_are_right(
    tmp_path, halfway, corrupt, storage
):
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder, symlinks=True)
    files = live_files(folder / "merges")
    CORRUPTIONS[corrupt](files[8])
    kept = {step: load_file(files[step]) for step in (6, 10, 12)}

    with pytest.raises(StopError), pytest.warns(UserWarning, match=r"left out.*step 8.*"):
        fit(
            folder,
            folder / "after-13.ckpt",
            [SaveAt(folder / "again.ckpt", 2, stop=2)],
            emit_every=1,
            keep_last=None,
            storage=storage,
        )

    assert steps(folder / "merges") == [6, 10, 12, 14]
    kept[14] = load_file(live_files(folder / "merges")[14])
    merged = load_merge(folder / "merges/step=00000014-tokens=336-sma")
    for name, tensor in merge_state_dicts(list(kept.values())).items():
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("corrupt", ["a bit of the data", "deleted", "a dangling link"])
@pytest.mark.parametrize(("step", "left"), [(6, [14]), (8, [6, 14]), (12, [6, 8, 10, 14])])
def test_what_builds_on_a_corrupt_snapshot_is_left_out_too_and_the_next_builds_on_what_is_left(
    tmp_path, codec_halfway, corrupt, storage, step, left
):
    folder = tmp_path / "run"
    shutil.copytree(codec_halfway, folder, symlinks=True)
    CORRUPTIONS[corrupt](live_files(folder / "merges")[step])
    keeper = Keeper()

    with pytest.raises(StopError), pytest.warns(UserWarning, match="left out") as told:
        fit(
            folder,
            folder / "after-13.ckpt",
            [keeper, SaveAt(folder / "again.ckpt", 2, stop=2)],
            emit_every=1,
            storage=storage,
            **CODEC,
        )

    lines = [str(w.message) for w in told if "left out" in str(w.message)]
    lost = [s for s in (6, 8, 10, 12) if s >= step]
    assert [int(re.search(r"snapshot of step (\d+)", line)[1]) for line in lines] == lost
    assert all("kept as the difference to that of step" in line for line in lines[1:])
    assert steps(folder / "merges") == left
    found = decoded_files(folder / "merges")
    for name, live in keeper.weights[14].items():
        way = (live - found[left[-2]][name]).abs() if len(left) > 1 else torch.zeros(())
        # One rounding to fp16, 11 bits, of how far the weights went since the snapshot that is left.
        assert bool(((found[14][name] - live).abs() <= way * 2.0**-11 * 1.01 + 1e-7).all()), name


@pytest.fixture(scope="module")
def codec_halfway(tmp_path_factory):
    """`halfway`, its snapshots kept as differences."""
    folder = tmp_path_factory.mktemp("codec-halfway")
    stopped(folder / "recorded", emit_every=1, **CODEC)
    return shutil.move(folder / "recorded", folder / "moved")


def test_a_window_whose_every_file_is_corrupt_starts_anew(tmp_path, halfway, unbroken):
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder, symlinks=True)
    for path in live_files(folder / "merges").values():
        os.truncate(path, 10)

    with pytest.warns(UserWarning, match="step 12"):
        _, module, _ = fit(folder, folder / "after-13.ckpt")

    assert outcome(folder, module)["window"]["snapshots"] == unbroken()["window"]["snapshots"]
    assert outcome(folder, module)["weights"] == unbroken()["weights"]


@pytest.mark.parametrize(
    "content", some_slow([b"", b"{", b"[]", b"\xff\xfe", b"null", b"{}"], [b"{", b"null", b"{}"]), ids=repr
)
def test_an_unreadable_manifest_loses_nothing(tmp_path, unbroken, content):
    checkpoint = stopped(tmp_path)
    (tmp_path / "merges/window/manifest.json").write_bytes(content)

    _, module, _ = fit(tmp_path, checkpoint)

    assert_same(outcome(tmp_path, module), unbroken())


@pytest.mark.parametrize("content", [None, b"", b"{}"], ids=repr)
def test_a_fresh_run_does_not_delete_the_snapshots_beside_a_lost_manifest(tmp_path, unbroken, content):
    checkpoint = stopped(tmp_path)
    shutil.move(checkpoint, tmp_path / "first.ckpt")
    manifest = tmp_path / "merges/window/manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    fit(tmp_path, module=Elsewhere, trainer={"max_steps": 8, "logger": False})
    (tmp_path / "metrics.jsonl").unlink()

    with pytest.raises(StopError):
        fit(tmp_path, tmp_path / "first.ckpt", [StopAtStart()])

    assert steps(tmp_path / "merges") == [6, 8, 10, 12]


def test_files_of_others_in_the_window_folder_do_not_stop_the_run(tmp_path):
    checkpoint = stopped(tmp_path)
    (tmp_path / "merges/window/notes").mkdir()
    (tmp_path / "merges/window/notes/plan.txt").write_text("ours")

    fit(tmp_path, checkpoint)

    assert steps(tmp_path / "merges") == [20, 22, 24, 26]
    assert (tmp_path / "merges/window/notes/plan.txt").read_text() == "ours"
