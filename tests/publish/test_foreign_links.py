"""In a folder that others prepared, what lies where a file of ours belongs is neither followed nor lost."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from tiny_run import fit
from window_runs import LAST, steps

from merge_callback import SpikeOptions
from merge_callback.publish import Publisher
from merge_callback.snapshots.files import append_line, clear, write_json
from merge_callback.snapshots.folder_lock import holder, lock_folder
from merge_callback.snapshots.window_folder import WindowFolder

WORK = "ten years of work\n"


@pytest.fixture
def precious(tmp_path):
    """A file of somebody else's, which must stay as it is."""
    path = tmp_path / "home/precious.txt"
    path.parent.mkdir()
    path.write_text(WORK)
    yield path
    assert path.read_text() == WORK
    assert os.listdir(path.parent) == ["precious.txt"]


def link(place, precious):
    place.symlink_to(precious)


def relative_link(place, precious):
    place.symlink_to(os.path.relpath(precious, place.parent))


def link_to_nothing(place, precious):
    place.symlink_to(precious.with_name("not there yet"))


def link_to_the_folder(place, precious):
    place.symlink_to(precious.parent)


def other_name(place, precious):
    os.link(precious, place)


def pipe(place, precious):
    os.mkfifo(place)


def folder(place, precious):
    place.mkdir()


def device(place, precious):
    place.symlink_to("/dev/full")


def endpoint(place, precious):
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(place.parent)  # such a name may have 108 bytes at most
        try:
            listening.bind(place.name)
        finally:
            os.chdir(here)


LINKS = [link, relative_link, link_to_nothing, link_to_the_folder, device]
OTHERS = [pipe, folder, endpoint]
every = pytest.mark.parametrize("put", [*LINKS, *OTHERS, other_name], ids=lambda put: put.__name__)


@every
def test_a_lock_that_is_not_ours_is_refused_by_name(tmp_path, precious, put):
    put(tmp_path / ".lock", precious)
    with pytest.raises(ValueError, match=r"dirpath=.* can't be used: .*/\.lock.*(remove it|move it away)"):
        lock_folder(tmp_path, "0123456789ab")
    assert not holder(tmp_path) or put in (link, relative_link, other_name)


@pytest.mark.parametrize("content", ["", "ba9876543210", "ba98", "ba98" + 8 * "\0", 12 * "\0"])
def test_a_lock_that_a_run_left_is_taken(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    lock_folder(tmp_path, "0123456789ab").close()
    assert holder(tmp_path) == "0123456789ab"


@pytest.mark.parametrize("content", ["notes", "0123456789abc", "0123456789ab\n", "\0", "x" * 5000])
def test_a_file_of_the_lock_s_name_that_no_run_wrote_is_kept(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(ValueError, match="holds something else than the name of a run"):
        lock_folder(tmp_path)
    assert (tmp_path / ".lock").read_text() == content


@pytest.mark.parametrize("put", [*LINKS, *OTHERS], ids=lambda put: put.__name__)
def test_a_spike_is_not_written_through_what_is_no_file_of_ours(tmp_path, precious, put):
    put(tmp_path / "spikes.jsonl", precious)
    with pytest.raises(OSError, match="expected a regular file of this run's own; remove it"):
        append_line(tmp_path / "spikes.jsonl", "{}")


def test_a_spike_log_that_has_other_names_gets_bytes_of_its_own(tmp_path, precious):
    other_name(tmp_path / "spikes.jsonl", precious)
    append_line(tmp_path / "spikes.jsonl", "{}")
    assert (tmp_path / "spikes.jsonl").read_text() == WORK + "{}\n"
    assert not list(tmp_path.glob(".*"))


@every
def test_a_draft_replaces_what_lies_at_its_name(tmp_path, precious, put):
    put(tmp_path / f".manifest.json.{os.getpid()}.tmp", precious)
    write_json(tmp_path / "manifest.json", {"a": 1})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"a": 1}
    assert not (tmp_path / "manifest.json").is_symlink()
    assert not list(tmp_path.glob(".*"))


def publish(publisher, step):
    tensors = {"weight": torch.full((2,), float(step))}
    return publisher.publish(
        f"step={step:08d}-sma",
        lambda draft: publisher.write_safetensors(draft, tensors, iter(tensors.values())),
        {"run_id": "run"},
    )


@every
@pytest.mark.parametrize("draft", ["step=00000002-sma.{}.tmp", "latest.{}.tmp", "step=00000001-sma.{}.old"])
def test_an_emission_replaces_what_lies_at_its_drafts(tmp_path, precious, put, draft):
    merges = tmp_path / "merges"
    publisher = Publisher(merges, 1, 1 << 30)
    publish(publisher, 1)
    put(merges / f".{draft.format(os.getpid())}", precious)
    publish(publisher, 2)
    assert sorted(os.listdir(merges)) == ["latest", "step=00000002-sma"]
    assert not (merges / "step=00000002-sma").is_symlink()
    assert (merges / "latest").readlink().name == "step=00000002-sma"


def test_a_sweep_removes_a_link_and_not_what_it_leads_to(tmp_path, precious):
    for name in (".step=00000004-sma.7.tmp", ".step=00000002-sma.7.old", ".latest.7.tmp"):
        (tmp_path / name).symlink_to(precious.parent)
    Publisher(tmp_path, 1, 1 << 30).sweep()
    assert not list(tmp_path.glob(".*"))


@every
def test_a_snapshot_of_another_folder_is_taken_over_past_what_lies_at_its_draft(tmp_path, precious, put):
    name = "step=00000002-0123456789ab.safetensors"
    window, aside = tmp_path / "window", tmp_path / "window.old-1"
    window.mkdir()
    aside.mkdir()
    (aside / name).write_bytes(b"weights")
    put(window / f".{name}.{os.getpid()}.tmp", precious)
    taken = WindowFolder(window, "run", "0123456789ab", True).take_over(aside / name)
    assert (taken.read_bytes(), taken.is_symlink(), os.listdir(window)) == (b"weights", False, [name])


def test_a_window_removes_only_what_a_run_has_written(tmp_path):
    ours = ["step=00000002-0123456789ab.safetensors", ".step=00000004.7.tmp", ".manifest.json.7.tmp"]
    others = ["step=100.ckpt", "step=00000002-sma", ".notes.tmp", "step=2.txt", ".step=7.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).write_text(name)
    (tmp_path / "step=00000002-0123456789ab-delta").mkdir()
    WindowFolder(tmp_path, "run", "ffffffffffff", True).prune([], 1 << 40)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_run_in_a_prepared_folder_touches_nothing_outside_and_ends(tmp_path, precious, caplog):
    window = tmp_path / "merges/window"
    window.mkdir(parents=True)
    link(tmp_path / "merges/spikes.jsonl", precious)
    link(window / f".manifest.json.{os.getpid()}.tmp", precious)
    link(window / f".step=00000002.{os.getpid()}.tmp", precious)
    link(tmp_path / f"merges/.step=00000004-tokens=96-sma.{os.getpid()}.tmp", precious.parent)
    fit(tmp_path, spike=SpikeOptions(action="off"))
    assert steps(tmp_path) == LAST
    assert Path(tmp_path / "merges/latest/merge.json").is_file()


def test_clear_removes_a_link_to_a_folder_alone(tmp_path, precious):
    (tmp_path / "draft").symlink_to(precious.parent)
    clear(tmp_path / "draft")
    clear(tmp_path / "draft")
    assert not os.path.lexists(tmp_path / "draft")
    shutil.copytree(precious.parent, tmp_path / "draft")
    clear(tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
