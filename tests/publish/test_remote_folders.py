"""Merges go where Lightning's checkpoints go, by fsspec, too: whole or not at all, at no risk for a run."""

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import distributed_runs
import fsspec
import pytest
import torch
from distributed_runs import UnevenModule, run_jobs
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from remote_stores import Shelf, assert_whole, names
from training_runs import (
    QUIET,
    Classifier,
    Probe,
    assert_mean,
    assert_same_bits,
    is_beside,
    loader,
    seed,
    train,
)

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.cli.main import main
from merge_callback.engine.run_folder import _scratch
from merge_callback.publish.remote_folder import RemoteFolder
from merge_callback.publish.remote_publisher import RemotePublisher


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """The folder behind ``shelf://``, with nothing in it; the current folder is another one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(Shelf, "root", str(tmp_path / "store"))
    monkeypatch.setattr(Shelf, "broken", ())
    fsspec.filesystem("memory").store.clear()
    return tmp_path / "store"


def fit(dirpath=None, *callbacks, steps=12, ckpt_path=None, keep_last=3, **options):
    """A fit of 12 steps with a merge of every three snapshots; the callback and a ``Probe``."""
    seed()
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=dirpath, keep_last=keep_last)
    probe = Probe()
    given = {**QUIET, "max_steps": steps, **options}
    Trainer(**given, callbacks=[callback, probe, *callbacks]).fit(Classifier(), loader(), ckpt_path=ckpt_path)
    return callback, probe


def kept(callback):
    """The steps of the window's snapshots."""
    return [record["step"] for record in callback.state_dict()["window"]["snapshots"]]


def emission(folder, run):
    """A small emission of a run."""
    source = folder / "step=00000002-sma"
    source.mkdir(parents=True)
    record = {"run_id": run, "files": {"a": "", "model.safetensors": ""}}
    for name in record["files"]:
        (source / name).write_text("weights")
    (source / "merge.json").write_text(json.dumps(record))
    return source


LAST = ["latest", "step=00000008-sma", "step=00000010-sma", "step=00000012-sma"]

WAYS = {
    "default_root_dir": lambda root: ({"default_root_dir": root}, "merges"),
    "dirpath": lambda root: ({"dirpath": f"{root}/given"}, "given"),
    "logger": lambda root: ({"logger": CSVLogger(root, "runs", "v1")}, "runs/v1/merges"),
}


@pytest.mark.parametrize("protocol", ["memory", "shelf"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_merges_land_in_the_store_and_the_window_in_a_folder_that_is_named(way, protocol, caplog):
    root = f"{protocol}://bucket/run"
    options, place = way(root)
    with caplog.at_level("INFO"):
        callback, probe = fit(**options)

    url = f"{root}/{place}"
    scratch = Path.cwd() / "merge_scratch" / protocol / "bucket/run" / place
    assert names(url) == LAST
    assert f"merges go to {url}; the window and the record of loss spikes stay in {scratch}" in caplog.text
    assert kept(callback) == [8, 10, 12]
    assert (scratch / "window/manifest.json").exists()
    assert not list(scratch.glob("step=*"))
    assert [path.name for path in Path.cwd().iterdir()] == ["merge_scratch"]
    for merge in (f"{url}/latest", f"{url}/step=00000012-sma"):
        assert_mean(load_merge(merge), list(probe.weights.values())[-3:])


def test_merges_lie_beside_the_checkpoints_that_lightning_saves_remotely():
    saving = ModelCheckpoint(every_n_train_steps=6)
    callback, _ = fit(None, saving, default_root_dir="shelf://bucket/run", enable_checkpointing=True)

    assert callback.state_dict()["remote"] == "shelf://bucket/run/merges"
    assert names("shelf://bucket/run") == ["checkpoints", "merges"]


def test_at_no_moment_is_anything_in_sight_that_is_not_whole(store, monkeypatch):
    seen = []
    monkeypatch.setattr(Shelf, "watch", lambda: seen.append(assert_whole(store / "bucket/merges")))

    fit("shelf://bucket/merges", keep_last=2)

    assert max(seen) == 3


def test_a_record_comes_last_and_goes_first(store, tmp_path, monkeypatch):
    source, states = emission(tmp_path, "mine"), []
    look = (store / "bucket" / source.name).glob
    monkeypatch.setattr(Shelf, "watch", lambda: states.append({p.name for p in look("[!.]*")}))
    remote = RemoteFolder("shelf://bucket")
    remote.upload(source, "mine")
    remote.remove(source.name, "mine")

    whole = {"a", "model.safetensors", "merge.json"}
    assert whole in states
    assert all(state == whole for state in states if "merge.json" in state)


def test_a_run_of_its_own_beside_another_one(store):
    fit(default_root_dir="shelf://bucket")
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    callback, _ = fit(default_root_dir="shelf://bucket")

    assert callback.state_dict()["remote"] == "shelf://bucket/merges-1"
    assert Path(callback.state_dict()["dirpath"]).name == "merges-1"
    assert {p: p.read_bytes() for p in before} == before
    assert names("shelf://bucket/merges-1") == LAST


@pytest.mark.parametrize("protocol", ["memory", "shelf"])
def test_of_two_machines_that_start_at_once_none_gets_the_others_folder(protocol):
    url = f"{protocol}://bucket/merges"
    one, other = RemoteFolder(url), RemoteFolder(url)
    one._mark("one")  # what a claim begins with

    assert not other.claim("other")
    assert one.claim("one")
    assert not other.claim("other")


def test_only_what_the_run_published_is_removed(store):
    fit("shelf://bucket/merges", keep_last=2)
    folder = store / "bucket/merges"
    (folder / "step=00000001-mine").mkdir()
    (folder / "step=00000001-mine/notes").write_text("mine")
    others = {p: p.read_bytes() for p in folder.glob("step=*/*")}

    shutil.rmtree("merge_scratch")
    fit("shelf://bucket/merges", keep_last=1)

    assert {p: p.read_bytes() for p in others} == others
    assert names("shelf://bucket/merges") == [
        "latest",
        "step=00000001-mine",
        "step=00000010-sma",
        "step=00000012-sma",
        "step=00000012-sma-v1",
    ]
    assert (folder / "latest").read_text() == "step=00000012-sma-v1"


class RisesAgain(Classifier):
    """Scores best in its second validation."""

    def validation_step(self, batch, batch_idx):
        beside = torch.is_inference_mode_enabled() and is_beside(self.trainer)
        self.log("val_loss", abs(self.global_step - 6.0) - 0.5 * beside)


def test_the_best_merge_stays_and_has_a_pointer(store):
    seed()
    callback = CheckpointMergeCallback(
        every_n_steps=2, window=3, dirpath="shelf://bucket/merges", keep_last=1
    )
    options = {"max_steps": 12, "val_check_interval": 2, "check_val_every_n_epoch": None}
    train(RisesAgain(), callback, data=loader(128), val=loader(8), **options)
    folder = store / "bucket/merges"
    assert names("shelf://bucket/merges") == ["best", "latest", "step=00000006-sma", "step=00000012-sma"]
    assert (folder / "best").read_text() == "step=00000006-sma"
    assert callback.best == "shelf://bucket/merges/step=00000006-sma"
    found, expected = (load_merge(f"shelf://bucket/merges/{name}") for name in ("best", "step=00000006-sma"))
    assert_same_bits(found, expected)


class Breaks(Probe):
    """Has methods of the store fail between two steps."""

    def __init__(self, monkeypatch, methods, first, last):
        super().__init__()
        self.set = lambda broken: monkeypatch.setattr(Shelf, "broken", broken)
        self.methods, self.first, self.last = methods, first, last

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        publisher = trainer.callbacks[0].session.pipeline.publisher
        trainer.callbacks[0].session.background.drain()
        publisher._queue.drain()
        if trainer.global_step in (self.first, self.last):
            self.set(self.methods if trainer.global_step == self.first else ())


@pytest.mark.parametrize("methods", [("put_file",), ("open",), ("ls",), ("rm_file",), ("makedirs",)], ids=str)
def test_a_store_that_fails_for_a_while_costs_nothing(store, monkeypatch, caplog, methods):
    healthy = Probe()
    seed()
    train(Classifier(), healthy, data=loader())
    _, probe = fit("shelf://bucket/merges", Breaks(monkeypatch, methods, 5, 9))

    assert_same_bits(probe.outputs, healthy.outputs)
    assert "training goes on" in caplog.text or "could not be removed" in caplog.text
    assert names("shelf://bucket/merges") == LAST
    assert assert_whole(store / "bucket/merges") == 3
    assert not list(store.rglob(".uploading"))


def test_what_a_store_never_takes_stays_in_the_named_folder_until_a_resume(store, monkeypatch, caplog):
    saving = ModelCheckpoint("saved", every_n_train_steps=12)
    fit(
        "shelf://bucket/merges",
        Breaks(monkeypatch, ("put_file",), 1, None),
        saving,
        enable_checkpointing=True,
    )

    scratch = _scratch("shelf://bucket/merges")
    assert sorted(path.name for path in scratch.glob("step=*")) == LAST[1:]
    assert f"it stays in {scratch}" in caplog.text
    assert "latest" not in names("shelf://bucket/merges")

    monkeypatch.setattr(Shelf, "broken", ())
    fit("shelf://bucket/merges", steps=14, ckpt_path=saving.best_model_path)

    assert names("shelf://bucket/merges") == ["latest", *LAST[2:], "step=00000014-sma"]
    assert not list(scratch.glob("step=*"))


@pytest.mark.parametrize("option", ["dirpath", "default_root_dir"])
def test_a_store_that_can_t_be_written_at_the_start_is_refused_by_name(monkeypatch, option):
    monkeypatch.setattr(Shelf, "broken", ("open",))

    with pytest.raises(ValueError, match=r"dirpath='shelf://bucket/x.* out of reach.*; check its name"):
        fit(**{option: "shelf://bucket/x"})
    assert not list(Path.cwd().rglob(".lock"))


def test_a_store_whose_listings_are_out_of_date_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Shelf, "ls", lambda *args, **options: [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="was just written there"):
        fit(default_root_dir="shelf://bucket/run")


def test_a_start_that_is_refused_takes_no_name_from_the_next_one():
    refused = CheckpointMergeCallback(window=3, every_n_steps=2, exclude=["nothing.*"])
    with pytest.raises(ValueError, match="exclude"):
        train(Classifier(), refused, data=loader(), default_root_dir="shelf://bucket")

    assert names("shelf://bucket") == []
    assert fit(default_root_dir="shelf://bucket")[0].state_dict()["remote"] == "shelf://bucket/merges"


class Slow(Probe):
    """Has uploads begin no earlier than step 10, and notes which snapshots the window holds before that."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.go, self.window = threading.Event(), []
        real = Shelf.put_file
        monkeypatch.setattr(Shelf, "put_file", lambda *args: (self.go.wait(), real(*args)))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 10:
            self.window = [snapshot.step for snapshot in trainer.callbacks[0].session.window.snapshots]
            self.go.set()


def test_nobody_waits_for_an_upload_but_the_end_of_the_run(monkeypatch):
    slow = Slow(monkeypatch)
    fit("shelf://bucket/merges", slow)

    assert slow.window == [6, 8, 10]
    assert names("shelf://bucket/merges") == LAST


def test_attempts_do_not_pile_up_while_a_store_is_out_of_reach(tmp_path, monkeypatch, caplog):
    emission(tmp_path, "mine")
    monkeypatch.setattr(Shelf, "broken", ("open",))
    jobs = []
    queue = SimpleNamespace(submit=jobs.append, drain=lambda timeout: True)
    publisher = RemotePublisher(tmp_path, 3, 1 << 30, "shelf://bucket", "mine", queue)
    for _ in range(3):
        publisher.finish_uploads()
    assert len(jobs) == 1

    jobs.pop()()
    publisher.finish_uploads()
    assert len(jobs) == 1
    assert "step=00000002-sma could not be uploaded to shelf://bucket" in caplog.text


@pytest.mark.parametrize("url", ["nowhere://bucket/merges", "gs:::://x"])
def test_a_store_that_nobody_knows_is_refused_when_the_callback_is_made(url):
    with pytest.raises(ValueError, match=r"dirpath='.*://.*' can't be used: .*name another"):
        CheckpointMergeCallback(dirpath=url)


def test_a_file_url_is_a_local_folder(tmp_path):
    fit(f"file://{tmp_path}/merges")

    assert (tmp_path / "merges/latest").is_symlink()
    assert load_merge(f"file://{tmp_path}/merges/latest")
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("dirpath", "options"),
    [("shelf://bucket/merges", {}), (None, {"default_root_dir": "shelf://bucket"})],
    ids=["dirpath", "default_root_dir"],
)
def test_a_resumed_run_goes_on_with_its_window_and_its_merges(monkeypatch, tmp_path, dirpath, options):
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, save_top_k=-1)
    fit(dirpath, saving, steps=8, enable_checkpointing=True, **options)
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    callback, _ = fit(dirpath, ckpt_path=checkpoint, steps=10, **options)

    assert callback.state_dict()["remote"] == "shelf://bucket/merges"
    assert kept(callback) == [6, 8, 10]
    assert callback.state_dict()["dirpath"] == str(tmp_path / "here/merge_scratch/shelf/bucket/merges")
    # The first one of step 8 is an abandoned branch's: this loader begins again.
    published = [f"step=000000{name}" for name in ("06-sma", "08-sma", "08-sma-v1", "10-sma")]
    assert names("shelf://bucket/merges") == ["latest", *published]


def test_on_another_machine_the_window_begins_empty_and_the_merges_go_on(tmp_path, recwarn):
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=6, save_top_k=-1)
    fit(None, saving, steps=8, enable_checkpointing=True, default_root_dir="shelf://bucket")
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    shutil.rmtree("merge_scratch")
    recwarn.clear()
    callback, _ = fit(ckpt_path=checkpoint, default_root_dir="shelf://bucket")

    told = [str(w.message) for w in recwarn if "merge:" in str(w.message)]
    assert len(told) == 1
    assert "the window begins empty" in told[0]
    assert "which is not here" in told[0]
    assert kept(callback) == [8, 10, 12]
    assert names("shelf://bucket/merges") == ["latest", *(f"step={n:08d}-sma" for n in (6, 8, 10, 12))]


def test_what_a_killed_run_left_half_done_is_cleaned_up_and_nothing_else(store, tmp_path, monkeypatch):
    source, others = (emission(tmp_path / run, run) for run in ("mine", "another"))
    remote = RemoteFolder("shelf://bucket")
    monkeypatch.setattr(Shelf, "broken", ("put_file",))
    with pytest.raises(ConnectionError):
        remote.upload(source, "mine")
    monkeypatch.setattr(Shelf, "broken", ())

    assert remote.upload(others, "another") == "step=00000002-sma-v1"
    assert remote.emissions_of("another") == ["step=00000002-sma-v1"]
    assert (store / "bucket/step=00000002-sma/.uploading").exists()
    assert remote.emissions_of("mine") == []
    assert names("shelf://bucket") == ["step=00000002-sma-v1"]
    assert remote.upload(source, "mine") == "step=00000002-sma"


def test_what_is_no_merge_is_refused_in_the_words_of_a_local_one():
    fit("memory://bucket/merges")

    with pytest.raises(FileNotFoundError, match=r"did you mean 'memory://bucket/merges/latest'"):
        load_merge("memory://bucket/merges")
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/nothing: no published merge"):
        load_merge("memory://bucket/nothing")
    fsspec.filesystem("memory").pipe_file("/bucket/merges/latest", b"../merges")
    with pytest.raises(FileNotFoundError, match="no name of one"):
        load_merge("memory://bucket/merges/latest")


@pytest.mark.parametrize("command", [["inspect"], ["merge", "--output", "out"], ["diversity"]], ids=str)
def test_the_commands_say_that_they_work_on_local_files(capsys, command):
    assert main([*command, "s3://bucket/merges/latest"]) == 1
    assert capsys.readouterr().err == (
        "merge-callback: s3://bucket/merges/latest: the command works on local files; "
        "copy it to a local folder first\n"
    )


def on_ranks(strategy, folder, **options):
    """A run on several ranks; the folder and the store that each of them knows."""
    import os

    Shelf.root = f"{folder}/store"
    os.makedirs(f"{folder}/here", exist_ok=True)
    os.chdir(f"{folder}/here")
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, evaluate=False, method="sma", **options)
    run = distributed_runs.fit(
        strategy, UnevenModule(), callback, every=2, default_root_dir="shelf://bucket", logger=False
    )
    state = callback.state_dict()
    return state["dirpath"], state["remote"], list(run.weights.values())[-3:]


def test_two_ranks_have_one_folder_and_publish_one_merge_there(tmp_path, store):
    jobs = {
        name: (on_ranks, {"strategy": strategy, "folder": str(tmp_path), "format": name})
        for name, strategy in (("safetensors", "ddp"), ("dcp", "fsdp2"))
    }
    results = run_jobs(2, jobs)

    for name, place in (("safetensors", "merges"), ("dcp", "merges-1")):
        (dirpath, url, snapshots), other = results[name]
        assert (dirpath, url) == other[:2]
        assert (Path(dirpath).name, url) == (place, f"shelf://bucket/{place}")
        assert [name[:13] for name in names(url)] == [name[:13] for name in LAST]
        assert assert_whole(store / "bucket" / place) == 3
        assert_mean(load_merge(f"{url}/latest"), snapshots)
