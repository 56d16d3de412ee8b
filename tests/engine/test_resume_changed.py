"""Runs that are resumed into another folder, or with other options."""

import shutil
from itertools import product

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from resumed_runs import (
    CODEC,
    KEPT,
    StopAtStart,
    assert_same,
    decoded_files,
    live_files,
    steps,
    stopped,
)
from run_outcomes import outcome, window
from slow_cases import mostly_slow
from tiny_run import SaveAt, StopError, Tiny, fit


def test_a_run_resumed_into_another_folder_has_its_window_there(tmp_path, unbroken):
    checkpoint = stopped(tmp_path / "old")
    before = window(tmp_path / "old/merges")

    _, module, _ = fit(tmp_path / "new", checkpoint)

    found = outcome(tmp_path / "new", module)
    assert found["window"]["snapshots"] == unbroken()["window"]["snapshots"]
    assert found["weights"] == unbroken()["weights"]
    newest = unbroken()["latest"]
    assert found["emissions"][newest] == unbroken()["emissions"][newest]
    assert window(tmp_path / "old/merges") == before


def test_a_run_whose_folder_was_moved_resumes_bit_for_bit(tmp_path, unbroken):
    checkpoint = stopped(tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / "new")

    _, module, _ = fit(tmp_path / "new", tmp_path / "new" / checkpoint.name)

    assert_same(outcome(tmp_path / "new", module), unbroken())
    assert not (tmp_path / "old").exists()


def test_a_run_resumed_without_a_folder_goes_on_where_it_was(tmp_path, unbroken):
    checkpoint = stopped(tmp_path / "old")

    _, module, _ = fit(tmp_path / "new", checkpoint, dirpath=None)

    expected = unbroken()
    found = outcome(tmp_path / "old", module)
    assert_same(found, expected, but=["metrics"])
    assert not (tmp_path / "new/merges").exists()


def test_a_half_copied_snapshot_in_the_new_folder_is_taken_from_the_old_one(tmp_path, unbroken):
    # Between two file systems a resume copies; this is one that was killed while it copied.
    checkpoint = stopped(tmp_path / "old")
    (tmp_path / "new/merges/window").mkdir(parents=True)
    for path in live_files(tmp_path / "old/merges").values():
        (tmp_path / "new/merges/window" / path.name).write_bytes(path.read_bytes()[:4500])

    fit(tmp_path / "new", checkpoint, trainer={"max_steps": 14})

    assert steps(tmp_path / "new/merges") == [8, 10, 12, 14]


def test_a_resume_from_a_checkpoint_older_than_the_kept_windows_says_so_and_goes_on(tmp_path, unbroken):
    save = ModelCheckpoint(tmp_path / "c", every_n_train_steps=6, save_top_k=-1, filename="{step}")
    fit(tmp_path, callbacks=[save])

    with pytest.warns(UserWarning, match=r"left out of the restored window: snapshot of step 2"):
        _, module, _ = fit(tmp_path, tmp_path / "c/step=6.ckpt")

    found, expected = outcome(tmp_path, module), unbroken()
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]
    assert found["weights"] == expected["weights"]
    assert found["emissions"][expected["latest"]] == expected["emissions"][expected["latest"]]


def test_a_resume_from_a_too_old_checkpoint_leaves_the_windows_of_the_newest_ones_alone(tmp_path, unbroken):
    save = ModelCheckpoint(tmp_path / "c", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[save, SaveAt(tmp_path / "last.ckpt", 21, stop=21)])
    with pytest.raises(StopError), pytest.warns(UserWarning, match="left out"):  # a slip, noticed at once
        fit(tmp_path, tmp_path / "c/step=8.ckpt", [SaveAt(tmp_path / "slip.ckpt", 99, stop=1), StopAtStart()])

    _, module, _ = fit(tmp_path, tmp_path / "last.ckpt")

    found, expected = outcome(tmp_path, module), unbroken()
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]


@pytest.mark.parametrize(("size", "kept"), mostly_slow(product([2, 7], KEPT), daily=[0, 2, 5, 7]))
def test_a_run_resumes_with_another_window_size(tmp_path, size, kept):
    checkpoint = stopped(tmp_path, **kept)

    fit(tmp_path, checkpoint, window=size, **kept, trainer={"max_steps": 18})

    assert steps(tmp_path / "merges") == [6, 8, 10, 12, 14, 16, 18][-size:]


CHANGES = [("disk", "cpu"), ("cpu", "disk"), ("device", "disk")]


@pytest.mark.parametrize(
    ("before", "after", "codec"),
    mostly_slow(
        ((*change, codec) for change, codec in product(CHANGES, [{}, CODEC])),
        daily=[0, 3, 4],
    ),
)
def test_a_run_resumes_with_another_storage(tmp_path, unbroken, before, after, codec):
    checkpoint = stopped(tmp_path, storage=before, **codec)

    _, module, _ = fit(tmp_path, checkpoint, storage=after, **codec)

    assert_same(outcome(tmp_path, module), unbroken(**codec))


@pytest.mark.parametrize("size", [2, 3])
def test_a_window_of_differences_that_is_resumed_smaller_holds_the_same_weights(tmp_path, unbroken, size):
    checkpoint = stopped(tmp_path, **CODEC)
    before = decoded_files(tmp_path / "merges")

    with pytest.raises(StopError):
        fit(tmp_path, checkpoint, [StopAtStart()], window=size, **CODEC)

    found = decoded_files(tmp_path / "merges")
    assert list(found) == [6, 8, 10, 12][-size:]
    for step, tensors in found.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[step][name]), (step, name)


@pytest.mark.parametrize(("before", "after"), [({}, CODEC), (CODEC, {})], ids=["on", "off"])
def test_a_resume_with_another_codec_is_an_error_that_names_the_option(tmp_path, before, after):
    checkpoint = stopped(tmp_path, **before)
    known = window(tmp_path / "merges")

    with pytest.raises(ValueError, match=r"snapshot_codec='?\w+.* there and '?\w+.* here"):
        fit(tmp_path, checkpoint, **after)
    assert window(tmp_path / "merges") == known


def test_a_resume_with_another_codec_into_another_folder_begins_with_an_empty_window(tmp_path):
    checkpoint = stopped(tmp_path / "old")

    with pytest.warns(UserWarning, match="the window begins empty.*snapshot_codec"):
        fit(tmp_path / "new", checkpoint, trainer={"max_steps": 18}, **CODEC)

    assert steps(tmp_path / "new/merges") == [14, 16, 18]


def test_a_window_that_was_never_durable_is_named_when_it_is_gone(tmp_path):
    checkpoint = stopped(tmp_path, durable=False, storage="cpu")

    with pytest.warns(UserWarning, match="snapshot of step 12: it lived in memory only"):
        fit(tmp_path, checkpoint, durable=False, storage="cpu", trainer={"max_steps": 18})


class Deeper(Tiny):
    """Has a tensor more than the checkpoint, and accepts that."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False
        self.gain = torch.nn.Parameter(torch.ones(3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint):
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []


def test_a_resume_into_a_model_with_another_layout_is_an_error_that_names_the_tensor(tmp_path):
    checkpoint = stopped(tmp_path)
    before = window(tmp_path / "merges")

    with pytest.raises(ValueError, match="gain"):
        fit(tmp_path, checkpoint, module=Deeper)
    assert window(tmp_path / "merges") == before


def test_a_resume_with_another_snapshot_dtype_is_an_error_that_names_the_option(tmp_path):
    checkpoint = stopped(tmp_path)

    with pytest.raises(ValueError, match="snapshot_dtype"):
        fit(tmp_path, checkpoint, snapshot_dtype="bf16")
