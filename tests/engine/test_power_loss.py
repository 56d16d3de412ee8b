"""What a power loss at any moment leaves is whole, and nothing that was told to be kept is lost silently."""

import ctypes
import json
import os
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from checkpoint_files import ROOT
from codec_windows import new_window, take
from power_loss.checks import MERGES, Promises, Verdict, judge_folder
from power_loss.commands import Commands, called
from power_loss.log import Log, Recorder
from power_loss.runs import announcing, short
from power_loss.states import FOLDER, MODELS, below, crash_states, digest
from power_loss.study import KINDS, WRONG, judged, recorded, table

from merge_callback.publish import Publisher


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run that was recorded: its kind, folder and log."""
    kind, place = short(), tmp_path_factory.mktemp("recorded") / "run"
    return kind, place, recorded(kind, place)


class Unresumed:
    """A kind whose states are only looked at."""

    at_most = 0

    def resumes_from(self, promises):
        return ()

    def resume(self, place, log, cases):
        return ()


def final(log, model):
    """What a power loss may leave after the last record."""
    *_, (_, _, trees) = crash_states(log, model)
    return list(trees)


# --- a run and a command ------------------------------------------------------------------------------------


def test_a_power_loss_damages_nothing_and_loses_nothing_silently(run):
    figures, problems = judged(*run, at_most=40)
    assert not problems, problems[:5]
    for model in MODELS:
        assert figures[model]["distinct"] > 100
        assert figures[model]["resumes"] > 5
        assert not figures[model]["told"]


@pytest.mark.parametrize(
    ("count", "options", "exchange"),
    [(2, [], True), (2, [], False), (1, ["--as", "lightning"], True)],
    ids=["forced", "forced where names are not exchanged", "as one of Lightning's"],
)
def test_a_merge_is_the_old_one_or_the_new_one_at_any_time(tmp_path, monkeypatch, count, options, exchange):
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)
    kind = Commands(count, *options, exchange=exchange, start=called)
    log = recorded(kind, tmp_path / "run")
    exchanged = [record for record in log.records if record.get("label") == "renameat2"]
    assert len(exchanged) == (count > 1 and exchange)
    _, problems = judged(kind, tmp_path / "run", log)
    assert not problems, problems[:5]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_power_loss_in_any_kind_of_run_damages_nothing_and_loses_nothing_silently(tmp_path, name):
    kind = KINDS[name]()
    log = recorded(kind, tmp_path / "run")
    _, problems = judged(kind, tmp_path / "run", log, at_most=60)
    assert not problems, problems[:5]


# --- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2, None])
def test_an_emission_in_sight_is_whole_and_so_is_the_latest(tmp_path, keep_last):
    (tmp_path / "disk").mkdir()
    recorder = Recorder(tmp_path / "disk", tmp_path / "log")
    publisher = Publisher(tmp_path / "disk" / MERGES, keep_last, 1 << 30)
    with recorder.recording(), announcing(partial(recorder.mark, "published")):
        for step in (1, 2, 3, 4):
            tensors = {"weight": torch.full((3, 2), float(step))}

            def write(draft, tensors=tensors):
                return publisher.write_safetensors(draft, tensors, iter(tensors.values()))

            publisher.publish(f"step={step:08d}-sma", write, {"run_id": "run", "step": step})
    log, kind = Log(tmp_path / "log"), Published()
    for disk, record, _ in crash_states(log, "ordered"):
        if record.get("mark") == "published":
            kind.truth[record["value"]] = {digest(below(disk.as_it_is(), f"{MERGES}/{record['value']}"))}
    _, problems = judged(kind, tmp_path, log)
    assert not problems, problems[:5]
    for tree in final(log, "strict"):
        names = [name for name in below(tree, MERGES) if name.startswith("step=") and "/" not in name]
        assert len(names) == (keep_last or 4)


class Published(Unresumed):
    promises = Promises()

    def __init__(self):
        self.truth = {}

    def judge(self, tree, promises, log):
        return judge_folder(tree, promises, self.truth, log)


@pytest.mark.parametrize("codec", ["", "delta-fp16"])
def test_a_window_lists_only_snapshots_that_are_there(tmp_path, codec):
    root = tmp_path / "disk"
    root.mkdir()
    recorder = Recorder(root, tmp_path / "log")
    kept = new_window({"weight": torch.zeros(4)}, 3, root / "new/window", codec=codec)
    with recorder.recording():
        for step in range(1, 8):
            take(kept, step, {"weight": torch.full((4,), step / 8)})
            recorder.mark("taken", step)
    _, problems = judged(Listed(), tmp_path, Log(tmp_path / "log"))
    assert not problems, problems[:5]
    assert len(kept) == 3


@dataclass(frozen=True)
class Taken:
    """Whether a snapshot was taken, and the files that have had a name of their own."""

    any: bool = False
    files: frozenset = frozenset()

    def after(self, record, disk):
        now = below(disk.as_it_is(), "new/window") or {}
        own = {item for item in now.items() if not item[0].startswith(".")}
        return Taken(self.any or record.get("mark") == "taken", self.files | own)


class Listed(Unresumed):
    promises = Taken()

    def judge(self, tree, promises, log):
        found, verdict = below(tree, "new/window") or {}, Verdict()
        if "manifest.json" in found:
            listed = json.loads(log.blob(found["manifest.json"]))["snapshots"]
            files = [record["file"] for record in listed]
            verdict.torn += [f for f in files if (f, found.get(f)) not in promises.files]
        elif promises.any:
            verdict.silent.append("there is no manifest")
        return verdict


# --- the simulator ------------------------------------------------------------------------------------------


def test_a_log_tells_all_that_a_run_has_left(tmp_path):
    log, root = short().record(tmp_path / "run"), tmp_path / "run/disk"
    for disk, _, _ in crash_states(log, "strict"):
        last = disk
    found = {str(path.relative_to(root)): path for path in root.rglob("*")}
    assert last.as_it_is().keys() == found.keys()
    for path, what in last.as_it_is().items():
        if found[path].is_symlink():
            assert what == f"link {os.readlink(found[path])}"
        elif found[path].is_dir():
            assert what == FOLDER
        else:
            assert log.blob(what) == found[path].read_bytes()


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_forgotten_sync_is_noticed(run, is_folder):
    _, _, log = run
    folders = {record["new"] for record in log.records if record.get("kind") == FOLDER}

    def forgotten(record):
        return "path" in record and (record["sync"] in folders) == is_folder

    figures, _ = judged(*run, without=forgotten, at_most=0)
    wrong = {model: figures[model]["damaged"] + figures[model]["silent"] for model in MODELS}
    assert wrong["strict"] > 0
    assert wrong["unordered"] > 0
    assert is_folder or wrong["ordered"] > 0


def test_a_rename_past_the_recorder_is_noticed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/one").write_text("")
    with Recorder(tmp_path / "disk", tmp_path / "log").recording():
        one, two = (os.fsencode(tmp_path / "disk" / name) for name in ("one", "two"))
        assert ctypes.CDLL(None).rename(one, two) == 0
    assert Log(tmp_path / "log").unseen


def test_the_models_differ_in_what_a_sync_makes_last(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    (root / "kept").mkdir()
    with Recorder(root, tmp_path / "log").recording():
        (root / "a").mkdir()
        (root / "a/b").mkdir()
        (root / "kept/other").mkdir()
        descriptor = os.open(root / "a", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    log = Log(tmp_path / "log")
    found = {model: {tuple(sorted(tree)) for tree in final(log, model)} for model in MODELS}
    everything = ("a", "a/b", "kept", "kept/other")
    assert found["ordered"] == {everything}
    assert found["unordered"] == {everything, ("a", "a/b", "kept")}
    assert found["strict"] == {everything, ("a", "a/b", "kept"), ("kept", "kept/other"), ("kept",)}


def test_bytes_that_were_not_synced_may_be_anything(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    recorder = Recorder(root, tmp_path / "log")
    with recorder.recording(), open(root / "file", "wb", buffering=0) as file:
        file.write(b"abcd")
        os.fsync(file.fileno())
        file.write(b"efgh")
        recorder.mark("written", None)
        os.fsync(file.fileno())
    log = Log(tmp_path / "log")
    found = [
        {log.blob(tree["file"]) for tree in trees if "file" in tree}
        for *_, trees in crash_states(log, "strict")
    ]
    assert {b"abcd", b"abcdefgh", b"abcd\0\0\0\0", b"abcdef"} in found
    assert found[-1] == {b"abcdefgh"}


def test_the_documentation_has_the_counts_of_the_study():
    counts = json.loads((ROOT / "benchmarks/results/power_loss.json").read_text())["kinds"]
    assert counts.keys() == KINDS.keys()
    assert table(counts) in (ROOT / "docs/assumptions.md").read_text()
    assert not any(counts[name][model][what] for name in counts for model in MODELS for what in WRONG)
