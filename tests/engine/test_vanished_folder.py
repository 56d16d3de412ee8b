"""A folder that is deleted, moved or unmounted while a run uses it: the run says so, and takes no other's."""

import shutil

import pytest
from lightning.pytorch import Callback
from training_runs import Classifier, emissions, loader, seed, train

from merge_callback import CheckpointMergeCallback, SpikeOptions
from merge_callback.recovery.spike_log import append
from merge_callback.snapshots.folder_lock import lock_folder


class At(Callback):
    """Does something at the start of the batches that follow these steps, once all is written."""

    def __init__(self, acts):
        self.acts = acts

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.acts:
            trainer.callbacks[0].session.pipeline.wait()
            self.acts[trainer.global_step]()


def fit(folder, acts):
    seed()
    callback = CheckpointMergeCallback(
        every_n_steps=2, window=4, dirpath=folder, spike=SpikeOptions(action="off")
    )
    train(Classifier(), callback, At(acts), data=loader(), max_steps=16)


def told(caplog):
    return [r.getMessage() for r in caplog.records if "deleted, moved or unmounted;" in r.getMessage()]


def move(folder):
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize("vanish", [shutil.rmtree, move])
def test_a_run_locks_the_folder_that_it_has_to_make_anew(tmp_path, caplog, vanish):
    folder, refused = tmp_path / "merges", []

    def second_run():
        with pytest.raises(ValueError, match="another run is using it"):
            lock_folder(folder)
        refused.append(True)

    fit(folder, {8: lambda: vanish(folder), 12: second_run})

    assert refused == [True]
    (message,) = told(caplog)
    assert "go on in the one of that name now" in message
    newest = emissions(folder)[-1]
    assert newest.name.startswith("step=00000016")
    assert (folder / "latest").resolve() == newest.resolve()
    lock_folder(folder).close()  # free once the run is over


def test_a_run_writes_nothing_into_a_folder_that_another_one_was_quicker_to_take(tmp_path, caplog):
    folder, locks = tmp_path / "merges", []

    def replace():
        shutil.rmtree(folder)
        locks.append(lock_folder(folder, "0123456789ab"))

    fit(folder, {8: replace})

    assert [path.name for path in folder.iterdir()] == [".lock"]
    (message,) = told(caplog)
    assert "nothing is written there any more: another run" in message
    append(folder, {"event": "warn"}, locks[0].check)  # its own run may
    assert (folder / "spikes.jsonl").exists()
    locks[0].close()


def test_a_run_comes_back_once_the_other_one_is_over(tmp_path, caplog):
    folder, locks = tmp_path / "merges", []

    def replace():
        shutil.rmtree(folder)
        locks.append(lock_folder(folder))

    fit(folder, {6: replace, 10: lambda: locks[0].close()})

    assert len(told(caplog)) == 2
    assert emissions(folder)


def test_a_lock_that_was_given_back_is_not_taken_again(tmp_path):
    kept, lost = lock_folder(tmp_path / "kept"), lock_folder(tmp_path / "merges")
    kept.close()
    shutil.rmtree(tmp_path / "merges")
    lost.close()

    kept.check()
    with pytest.raises(OSError, match="before the run was over"):
        lost.check()

    assert not (tmp_path / "merges").exists()


def test_no_event_is_recorded_in_another_run_s_folder(tmp_path, caplog):
    lock = lock_folder(tmp_path / "merges")
    move(tmp_path / "merges")
    other = lock_folder(tmp_path / "merges")

    append(tmp_path / "merges", {"event": "warn"}, lock.check)

    assert not (tmp_path / "merges/spikes.jsonl").exists()
    assert "could not be written" in caplog.text
    other.close()
