"""What is durable comes in the order in which it counts, on a disk that keeps only what it was told to."""

import json

import pytest
import torch
from codec_windows import new_window, take
from power_loss import Disk, assert_whole, record_of
from safetensors.torch import save_file

from merge_callback.offline import output_folder
from merge_callback.offline.command_line import main
from merge_callback.publish import Publisher

FOLDER = ("new", "newer", "merges")


def publish(publisher, step):
    tensors = {"weight": torch.full((3, 2), float(step))}

    def write(draft):
        return publisher.write_safetensors(draft, tensors, iter(tensors.values()))

    return publisher.publish(f"step={step:08d}-sma", write, {"run_id": "run", "step": step})


@pytest.mark.parametrize("keep_last", [1, 2, None])
def test_an_emission_in_sight_is_whole_and_so_is_the_latest(tmp_path, keep_last):
    records, published = {}, []

    def judge(disk, listing):
        merges = listing(*FOLDER) or {}
        for name in (name for name in merges if name.startswith("step=")):
            place = tmp_path.joinpath(*FOLDER) / name
            if place.exists():
                records[merges[name]] = record_of(place)
            assert_whole(disk, listing(*FOLDER, name), records[merges[name]])
        assert not published or merges.keys() >= {published[-1], "latest"}

    publisher = Publisher(tmp_path.joinpath(*FOLDER), keep_last, 1 << 30)
    disk = Disk(tmp_path, judge)
    with disk.watched():
        for step in (1, 2, 3, 4):
            if keep_last == 1:
                published.clear()  # it is the next one, or that one: see the next test
            published.append(publish(publisher, step).name)
    assert disk.operations > 40
    assert len([name for name in disk.lasting(*FOLDER) if name.startswith("step=")]) == (keep_last or 4)


def test_what_latest_points_at_stays_until_it_points_elsewhere_for_good(tmp_path):
    merges, targets, seen = tmp_path.joinpath(*FOLDER), {}, set()

    def judge(disk, listing):
        found = listing(*FOLDER) or {}
        if (merges / "latest").is_symlink():
            targets[(merges / "latest").lstat().st_ino] = (merges / "latest").readlink().name
            seen.update(targets.values())  # an inode is used again
        assert "latest" not in found or targets[found["latest"]] in found

    publisher = Publisher(merges, 1, 1 << 30)
    disk = Disk(tmp_path, judge)
    with disk.watched():
        for step in (1, 2, 3):
            publish(publisher, step)
    assert len(seen) == 3


@pytest.mark.parametrize("codec", ["", "delta-fp16"])
def test_a_window_lists_only_snapshots_that_are_there(tmp_path, codec):
    folder, manifests, sure = tmp_path / "new/newer/window", {}, []

    def judge(disk, listing):
        found = listing("new", "newer", "window") or {}
        if (folder / "manifest.json").exists():
            listed = json.loads((folder / "manifest.json").read_text())["snapshots"]
            manifests[(folder / "manifest.json").stat().st_ino] = [record["file"] for record in listed]
        assert not sure or "manifest.json" in found
        if "manifest.json" in found:
            assert found["manifest.json"] in disk.synced
            files = manifests[found["manifest.json"]]
            assert set(files) <= found.keys()
            assert all(found[file] in disk.synced for file in files)

    kept = new_window({"weight": torch.zeros(4)}, 3, folder, codec=codec)
    disk = Disk(tmp_path, judge)
    with disk.watched():
        for step in range(1, 8):
            take(kept, step, {"weight": torch.full((4,), step / 8)})
            sure.append(step)
    assert len(kept) == 3


@pytest.mark.parametrize("at_once", [True, False])
def test_a_forced_merge_is_the_old_one_or_the_new_one_at_any_time(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)
    if not at_once:
        monkeypatch.setattr(output_folder, "exchange", lambda *_: False)
    paths, records, first = [], {}, []
    for i in range(3):
        paths.append(str(tmp_path / f"step={i}.safetensors"))
        save_file({"weight": torch.full((3,), float(i))}, paths[-1])

    def judge(disk, listing):
        above = listing("new", "newer") or {}
        if (tmp_path / "new/newer/out/merge.json").exists():
            record = record_of(tmp_path / "new/newer/out")
            records[(tmp_path / "new/newer/out").stat().st_ino] = record
        # Where the two can't change names, the old one has another for a moment.
        held = [name for name in above if name == "out" or (name.endswith(".old") and "out" not in above)]
        assert held or not first
        for name in held:
            assert_whole(disk, listing("new", "newer", name), records[above[name]])

    command = ["--output", str(tmp_path / "new/newer/out"), "--quiet"]
    disk = Disk(tmp_path, judge)
    with disk.watched():
        assert main(["merge", *paths[:2], *command]) == 0
        first.append(True)
        assert main(["merge", *paths[1:], "--force", *command]) == 0
    assert list(disk.lasting("new", "newer")) == ["out"]
    assert len(records) == 2
