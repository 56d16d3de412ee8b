"""A merge takes the place of an earlier merge at most: no input, and nothing of anybody's, is lost by it."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import warnings

import pytest
import torch
from checkpoint_files import save_distributed
from forked import Forked
from safetensors.torch import save_file

from merge_callback import load_merge
from merge_callback.cli.main import main
from merge_callback.offline import output_folder
from merge_callback.offline.output_folder import OutputFolder, exchange

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def run(tmp_path):
    """A folder of a run: three checkpoints, and notes beside them."""
    folder = tmp_path / "run"
    folder.mkdir()
    for i in (1, 2, 3):
        torch.save({"weight": torch.full((4,), float(i))}, folder / f"step={i}.ckpt")
    (folder / "notes.txt").write_text("lab book")
    return folder


def merge(first, *others):
    """Merges checkpoints, or a single one with itself."""
    twice = [first] if others[0] in ("--output", "--as", "--shard-size") else []
    return main(["merge", "--quiet", "--keep-all", *map(str, (first, *twice, *others))])


def tree(folder):
    """Every name below a folder, with what files hold."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(capsys, root, *arguments):
    """The message of a merge that is refused; all below ``root`` is as it was."""
    before = tree(root)
    capsys.readouterr()
    assert merge(*arguments, "--force") == 1
    assert tree(root) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def value(folder):
    return float(load_merge(folder)["weight"][0])


# --- what is not replaced -----------------------------------------------------------------------------------


def test_the_folder_of_the_run_is_no_output(run, tmp_path, capsys):
    error = refused(capsys, tmp_path, run, "--last", 2, "--output", run)
    assert re.search(r"run: holds \S+step=2.ckpt, which is merged; .* name another folder", error)


@pytest.mark.parametrize("given", ["{run}/../run", "{run}/", "{root}/linked/run", "{root}/run/./"])
def test_by_no_name_is_it_one(run, tmp_path, capsys, given):
    (tmp_path / "linked").symlink_to(tmp_path)
    output = given.format(run=run, root=tmp_path)
    assert "which is merged" in refused(capsys, tmp_path, run / "step=1.ckpt", "--output", output)


def test_a_folder_above_the_inputs_is_no_output(run, tmp_path, capsys):
    assert "which is merged" in refused(capsys, tmp_path, run / "step=1.ckpt", "--output", tmp_path)


def test_a_folder_that_the_inputs_are_links_into_is_no_output(run, tmp_path, capsys):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "old") == 0
    (tmp_path / "in.safetensors").symlink_to(tmp_path / "old/model.safetensors")
    error = refused(capsys, tmp_path, tmp_path / "in.safetensors", "--output", tmp_path / "old")
    assert "which is merged" in error


def test_the_merge_of_a_merge_takes_another_folder(run, tmp_path, capsys):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "old") == 0
    error = refused(capsys, tmp_path, tmp_path / "old", run / "step=2.ckpt", "--output", tmp_path / "old")
    assert "which is merged" in error


def test_the_base_s_folder_is_no_output(run, tmp_path, capsys):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "base") == 0
    inputs = run / "step=2.ckpt", run / "step=3.ckpt"
    error = refused(
        capsys,
        tmp_path,
        *inputs,
        "--method",
        "ties",
        "--base",
        tmp_path / "base",
        "--output",
        tmp_path / "base",
    )
    assert re.search(r"holds \S*base, which is merged", error)


def test_a_folder_that_an_input_s_files_link_into_is_no_output(run, tmp_path, capsys):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "blobs") == 0
    cache = tmp_path / "snapshots/revision"
    cache.mkdir(parents=True)
    (cache / "model.safetensors").symlink_to(tmp_path / "blobs/model.safetensors")
    error = refused(capsys, tmp_path, cache, "--output", tmp_path / "blobs")
    assert re.search(r"holds \S*snapshots/revision/model.safetensors, which is merged", error)


@pytest.mark.parametrize("content", ["notes.txt", "merge.json/x", "sub/model.safetensors", ".hidden"])
def test_a_folder_without_a_merge_is_no_output(run, tmp_path, capsys, content):
    (tmp_path / "out" / content).parent.mkdir(parents=True)
    (tmp_path / "out" / content).write_text("mine")
    assert "out: " in refused(capsys, tmp_path, run / "step=1.ckpt", "--output", tmp_path / "out")


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".git/config", "model.safetensors.bak"])
def test_a_merge_with_something_else_beside_it_is_no_output(run, tmp_path, capsys, name):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "out") == 0
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    error = refused(capsys, tmp_path, run / "step=2.ckpt", "--output", tmp_path / "out")
    assert f"holds {name.split('/')[0]!r}, which is no part of the merge" in error


@pytest.mark.parametrize("record", ["{", "[]", '{"files": 3}', ""])
def test_a_record_that_says_nothing_makes_no_merge(run, tmp_path, capsys, record):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/merge.json").write_text(record)
    error = refused(capsys, tmp_path, run / "step=1.ckpt", "--output", tmp_path / "out")
    assert "its record can't be read" in error


def test_a_record_that_names_files_elsewhere_costs_none_of_them(run, tmp_path):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out/merge.json").read_text())
    record["files"] |= {"../run/notes.txt": "0", str(run / "step=3.ckpt"): "0"}
    (tmp_path / "out/merge.json").write_text(json.dumps(record))
    before = tree(run)
    assert merge(run / "step=2.ckpt", "--output", tmp_path / "out", "--force") == 0
    assert (tree(run), value(tmp_path / "out")) == (before, 2.0)


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
def test_what_is_no_folder_is_no_output(run, tmp_path, capsys, kind):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "old") == 0
    out = tmp_path / "out"
    out.write_text("mine") if kind == "file" else out.symlink_to("old" if kind == "link" else "nowhere")
    capsys.readouterr()
    error = refused(capsys, tmp_path, run / "step=2.ckpt", "--output", out)
    assert ("is no folder" if kind == "file" else "is a link to") in error
    assert merge(run / "step=2.ckpt", "--output", out) == 1  # without --force, too
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("output", [".", "..", "", "/"])
def test_a_folder_that_is_in_use_is_named(run, tmp_path, capsys, monkeypatch, output):
    monkeypatch.chdir(run)
    assert "merge-callback: " in refused(capsys, tmp_path, "step=1.ckpt", "--output", output)


def test_what_comes_into_the_folder_during_the_merge_is_not_lost(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert merge(run / "step=1.ckpt", "--output", out) == 0
    real = output_folder.sync

    def comes(path):
        real(path)
        (out / "notes.txt").write_text("mine")

    monkeypatch.setattr(output_folder, "sync", comes)
    assert merge(run / "step=2.ckpt", "--output", out, "--force") == 1
    assert "holds 'notes.txt', which is no part of the merge" in capsys.readouterr().err
    assert ((out / "notes.txt").read_text(), value(out)) == ("mine", 1.0)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("at_once", [True, False])
def test_what_comes_into_it_at_the_last_moment_is_not_lost_either(run, tmp_path, monkeypatch, at_once):
    out = tmp_path / "out"
    assert merge(run / "step=1.ckpt", "--output", out) == 0

    def late(draft, target):
        (target / "notes.txt").write_text("mine")
        return exchange(draft, target) if at_once else False

    monkeypatch.setattr(output_folder, "exchange", late)
    with pytest.warns(UserWarning, match=r"is left, because of what came into it: notes\.txt"):
        assert merge(run / "step=2.ckpt", "--output", out, "--force") == 0
    assert value(out) == 2.0
    assert [p.read_text() for p in tmp_path.glob(".out.*/notes.txt")] == ["mine"]


# --- what is replaced ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("old", [[], ["--as", "lightning"], ["--shard-size", "20B"]], ids=str)
def test_a_merge_is_replaced_by_force(tmp_path, monkeypatch, at_once, old):
    if not at_once:
        monkeypatch.setattr(output_folder, "exchange", lambda *_: False)
    for i in (1, 2):
        state = {"weight": torch.full((4,), float(i)), "other": torch.ones(5)}
        save_file(state, tmp_path / f"step={i}.safetensors")
    assert merge(tmp_path / "step=1.safetensors", *old, "--output", tmp_path / "out") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge(tmp_path / "step=2.safetensors", "--output", tmp_path / "out", "--force") == 0
    assert value(tmp_path / "out") == 2.0
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "merge.json", "model.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_an_emission_of_all_ranks_is_a_merge_too(run, tmp_path):
    save_distributed(tmp_path / "out", {"weight": torch.zeros(4)})
    files = dict.fromkeys(os.listdir(tmp_path / "out"), "0")
    (tmp_path / "out/merge.json").write_text(json.dumps({"tied": {}, "files": files}))
    assert merge(run / "step=2.ckpt", "--output", tmp_path / "out", "--force") == 0
    assert value(tmp_path / "out") == 2.0


def test_an_empty_folder_is_replaced_by_force_only(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "out") == 1
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "out", "--force") == 0


def test_folders_change_names_in_one_step_or_not_at_all(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b/x").mkdir(parents=True)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system can't")
    assert ((tmp_path / "a/x").is_dir(), os.listdir(tmp_path / "b")) == (True, [])
    with pytest.raises(FileNotFoundError, match="gone"):
        exchange(tmp_path / "a", tmp_path / "gone")


def test_what_was_replaced_stays_until_that_is_on_the_disk(run, tmp_path, monkeypatch, capsys):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "out") == 0
    real = output_folder.sync

    def fails(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(output_folder, "sync", fails)
    assert merge(run / "step=2.ckpt", "--output", tmp_path / "out", "--force") == 1
    assert "Input/output error" in capsys.readouterr().err
    (old,) = tmp_path.glob(".out.*")
    assert {value(old), value(tmp_path / "out")} == {1.0, 2.0}
    monkeypatch.setattr(output_folder, "sync", real)
    assert merge(run / "step=3.ckpt", "--output", tmp_path / "out", "--force") == 0
    assert (value(tmp_path / "out"), list(tmp_path.glob(".*"))) == (3.0, [])


# --- what others left ---------------------------------------------------------------------------------------


def hold(target, told):
    """Fills a draft of the target, tells where it is, and stays."""
    with OutputFolder(target, True, []).draft() as draft:
        (draft / "model.safetensors").write_text("half")
        told.send(draft)
        signal.pause()


def test_the_draft_of_a_process_that_lives_is_left_and_that_of_a_dead_one_goes(run, tmp_path):
    told, theirs = multiprocessing.Pipe()
    process = Forked(hold, tmp_path / "out", theirs)
    theirs.close()
    try:
        draft = told.recv()
        assert merge(run / "step=1.ckpt", "--output", tmp_path / "out") == 0
        assert os.listdir(draft) == ["model.safetensors"]
    finally:
        process.kill()
    assert os.listdir(draft) == ["model.safetensors"]
    assert merge(run / "step=2.ckpt", "--output", tmp_path / "out", "--force") == 0
    assert not list(tmp_path.glob(".*"))


def test_a_merge_that_a_kill_left_under_its_other_name_comes_back(run, tmp_path, capsys):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "out") == 0
    (tmp_path / "out").rename(tmp_path / ".out.0123456789ab.old")
    assert merge(run / "step=2.ckpt", "--output", tmp_path / "out") == 1
    assert "exists" in capsys.readouterr().err
    assert value(tmp_path / "out") == 1.0
    assert not list(tmp_path.glob(".*"))


def test_the_merge_that_was_replaced_before_a_kill_goes(run, tmp_path):
    assert merge(run / "step=1.ckpt", "--output", tmp_path / "out") == 0
    for name in (".out.0123456789ab.old", ".out.ba9876543210.tmp"):
        shutil.copytree(tmp_path / "out", tmp_path / name)
    assert merge(run / "step=2.ckpt", "--output", tmp_path / "out", "--force") == 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name",
    [
        ".out.tmp",
        ".out.1234.tmp",
        ".out.0123456789AB.tmp",
        ".output.0123456789ab.tmp",
        ".out.0123456789ab.tmp2",
    ],
)
def test_what_only_looks_like_a_draft_is_left(run, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / ".out.0123456789ab.tmp").symlink_to(tmp_path / name)
    assert merge(run / "step=2.ckpt", "--output", tmp_path / "out") == 0
    assert (tmp_path / ".out.0123456789ab.tmp/notes.txt").read_text() == "mine"


def test_nothing_is_left_by_a_merge_that_is_interrupted(run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "_place", interrupted)
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        merge(run / "step=1.ckpt", "--output", tmp_path / "out")
    assert tree(tmp_path) == before
