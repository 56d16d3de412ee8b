"""Without a dirpath each run has a folder of its own, whatever folders its loggers share with other runs."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from tiny_run import At
from training_runs import QUIET, Classifier, loader, seed, train

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.engine import run_folder


class Sweep(Logger):
    """Names its runs as those of W&B, MLflow and Comet do: one ``save_dir`` for all, and an id for each."""

    def __init__(self, save_dir, version="3fk2a9x1", name="project"):
        super().__init__()
        self._save_dir, self._version, self._name = save_dir, version, name

    save_dir = property(lambda self: self._save_dir)
    version = property(lambda self: self._version)
    name = property(lambda self: self._name)

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        pass


def run(folder, *callbacks, every=2, steps=8, ckpt_path=None, start=0, **options):
    """A fit without a dirpath; returns the folder that its callback chose."""
    seed(start)
    callback = CheckpointMergeCallback(window=3, every_n_steps=every)
    given = {"max_steps": steps, "logger": False, "default_root_dir": folder, **options}
    if ckpt_path is None:
        trainer = train(Classifier(), callback, *callbacks, data=loader(), **given)
    else:
        trainer = train_on(ckpt_path, callback, *callbacks, **given)
    assert trainer.global_step == steps
    return Path(callback.state_dict()["dirpath"])


def train_on(ckpt_path, *callbacks, **options):
    trainer = Trainer(**{**QUIET, **options, "callbacks": list(callbacks)})
    trainer.fit(Classifier(), loader(), ckpt_path=ckpt_path)
    return trainer


def content(folder):
    """All bytes below a folder, by path."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run_ids(folder):
    """The runs whose merges and window lie in a folder."""
    records = [*folder.glob("step=*/merge.json"), folder / "window/manifest.json"]
    return {json.loads(path.read_text())["run_id"] for path in records}


@pytest.mark.parametrize("version", ["3fk2a9x1", 7])
def test_merges_lie_beside_the_checkpoints_of_the_same_run(tmp_path, version):
    saving = ModelCheckpoint(every_n_train_steps=4)
    folder = run(tmp_path, saving, logger=Sweep(str(tmp_path), version), enable_checkpointing=True)

    assert folder == Path(saving.dirpath).with_name("merges")
    assert load_merge(folder / "latest")


def test_the_runs_of_a_sweep_keep_apart_what_is_theirs(tmp_path):
    first = run(tmp_path, logger=Sweep(str(tmp_path), "first"))
    before = content(first)
    second = run(tmp_path, logger=Sweep(str(tmp_path), "second"), start=1)

    assert (first, second) == (tmp_path / "project/first/merges", tmp_path / "project/second/merges")
    assert content(first) == before


SHARING = {
    "no logger": lambda folder: False,
    "a fixed version": lambda folder: CSVLogger(folder, name="run", version="v1"),
    "one run of a tracking server": lambda folder: Sweep(None),
}


@pytest.mark.parametrize("logger", SHARING.values(), ids=SHARING)
def test_runs_that_share_a_folder_of_lightning_s_have_folders_of_their_own(tmp_path, logger):
    folders, contents = [], []
    for number in range(3):
        folders.append(run(tmp_path, logger=logger(tmp_path), start=number))
        contents.append(content(folders[-1]))

    assert [folder.name for folder in folders] == ["merges", "merges-1", "merges-2"]
    assert len({folder.parent for folder in folders}) == 1
    assert [content(folder) for folder in folders] == contents
    assert len(set().union(*map(run_ids, folders))) == 3


def test_where_the_merges_are_is_told_where_the_plain_name_is_taken(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(tmp_path)
        assert "another run's" not in caplog.text
        folder = run(tmp_path)

    assert (
        f"{tmp_path / 'merges'} is another run's; snapshots and merges of this one go to {folder}"
        in caplog.text
    )


def test_what_somebody_else_keeps_under_that_name_is_left_alone(tmp_path):
    (tmp_path / "merges").mkdir()
    (tmp_path / "merges/notes.txt").write_text("mine")
    (tmp_path / "merges-1").symlink_to("nowhere")

    assert run(tmp_path).name == "merges-2"
    assert content(tmp_path / "merges") == {Path("notes.txt"): b"mine"}


def test_two_callbacks_of_one_trainer_have_a_folder_each_and_both_resume(tmp_path):
    def pair():
        return [CheckpointMergeCallback(window=3, every_n_steps=n, evaluate=False) for n in (1, 2)]

    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, save_top_k=-1)
    options = {"logger": False, "default_root_dir": tmp_path, "enable_checkpointing": True}
    first = pair()
    train(Classifier(), *first, saving, data=loader(), max_steps=8, **options)
    second = pair()
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    train_on(checkpoint, *second, max_steps=12, **options)

    folders = [Path(c.state_dict()["dirpath"]) for c in first]
    assert sorted(f.name for f in folders) == ["merges", "merges-1"]
    assert [Path(c.state_dict()["dirpath"]) for c in second] == folders
    windows = [[s["step"] for s in c.state_dict()["window"]["snapshots"]] for c in second]
    assert windows == [[10, 11, 12], [8, 10, 12]]


def test_a_second_run_in_the_same_process_keeps_out_of_the_first_ones_folder(tmp_path):
    inner = []

    def another(module):
        inner.append(run(tmp_path, start=1))

    outer = run(tmp_path, At(step5=another))

    assert (outer.name, inner[0].name) == ("merges", "merges-1")
    assert not run_ids(outer) & run_ids(inner[0])
    assert len(run_ids(outer)) == 1


def take(folder, number, barrier, found):
    barrier.wait()
    taken = run_folder._new(str(folder / "merges"), f"run {number}", "")
    found.put(str(taken.path))
    barrier.wait()  # the lock ends with the process
    os._exit(0)


def test_of_processes_that_start_at_once_each_has_its_own(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier, found = fork.Barrier(8), fork.SimpleQueue()
    runs = [fork.Process(target=take, args=(tmp_path, n, barrier, found)) for n in range(8)]
    for process in runs:
        process.start()
    folders = {found.get() for _ in runs}
    for process in runs:
        process.join()

    assert folders == {str(tmp_path / name) for name in ["merges", *(f"merges-{n}" for n in range(1, 8))]}


def saved(tmp_path, *callbacks, **options):
    """A run with a checkpoint at step 6; its folder, and the checkpoint."""
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, save_top_k=-1)
    folder = run(tmp_path, saving, *callbacks, enable_checkpointing=True, **options)
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    return folder, checkpoint


def test_a_resumed_run_goes_on_in_its_folder_under_another_version_and_after_others(tmp_path):
    first, checkpoint = saved(tmp_path, logger=Sweep(str(tmp_path), "first"))
    run(tmp_path, logger=Sweep(str(tmp_path), "second"), start=1)

    resumed = run(tmp_path, ckpt_path=checkpoint, steps=12, logger=Sweep(str(tmp_path), "third"))

    assert resumed == first
    manifest = json.loads((first / "window/manifest.json").read_text())
    assert [s["step"] for s in manifest["snapshots"]] == [8, 10, 12]
    assert not (tmp_path / "project/third").exists()


def test_a_run_that_branches_off_one_that_still_trains_has_its_window_in_its_own_folder(tmp_path, caplog):
    inner = []

    def branch(module):
        (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
        inner.append(run(tmp_path, ckpt_path=checkpoint, steps=8))

    with caplog.at_level("INFO"):
        outer, _ = saved(tmp_path, At(step7=branch))

    assert (outer.name, inner[0].name) == ("merges", "merges-1")
    assert f"{outer} is another run's; this one goes on in {inner[0]}" in caplog.text
    manifest = json.loads((inner[0] / "window/manifest.json").read_text())
    assert [s["step"] for s in manifest["snapshots"]] == [4, 6, 8]


def test_a_resumed_run_whose_folder_is_another_runs_by_now_leaves_that_alone(tmp_path):
    first, checkpoint = saved(tmp_path)
    first.rename(tmp_path / "put away")
    assert run(tmp_path, start=1) == first
    before = content(first)

    resumed = run(tmp_path, ckpt_path=checkpoint, steps=10)

    assert resumed.name == "merges-1"
    assert content(first) == before


def test_a_callback_that_fits_again_is_another_run(tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2)
    folders = []
    for _ in range(2):
        train(Classifier(), callback, data=loader(), max_steps=6, default_root_dir=tmp_path)
        folders.append(Path(callback.state_dict()["dirpath"]).name)

    assert folders == ["merges", "merges-1"]


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"num_sanity_val_steps": 2, "max_epochs": 0}], ids=str
)
def test_a_run_without_steps_makes_no_folder(tmp_path, options):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2)
    train(Classifier(), callback, data=loader(), val=loader(16), default_root_dir=tmp_path, **options)

    assert not list(tmp_path.rglob("merges*"))


def test_a_start_that_is_refused_takes_no_name_from_the_next_one(tmp_path):
    refused = CheckpointMergeCallback(window=3, every_n_steps=2, exclude=["nothing.*"])
    with pytest.raises(ValueError, match="exclude"):
        train(Classifier(), refused, data=loader(), default_root_dir=tmp_path)

    assert not (tmp_path / "merges").exists()
    assert run(tmp_path).name == "merges"


def test_runs_that_name_a_folder_get_that_one(tmp_path):
    for _ in range(2):
        callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / "given")
        train(Classifier(), callback, data=loader(), default_root_dir=tmp_path)

    assert callback.state_dict()["dirpath"] == str(tmp_path / "given")
    assert (tmp_path / "given/window.old-1").is_dir()
    assert torch.isfinite(load_merge(tmp_path / "given/latest")["net.0.weight"]).all()
