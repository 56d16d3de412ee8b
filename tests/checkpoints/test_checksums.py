"""Checksums: what verifies a file, and what does not."""

import json
import pickle
import shutil

import pytest
import torch
from checkpoint_files import few_tensors, flip_last_byte
from codec_windows import new_window, take
from command_line import run
from mutated_files import distributed_emission, shared_out
from safetensors.torch import save_file

from merge_callback.checkpoints.open import open_checkpoint, verify

# What hangs is to fail soon.
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("in_this_process")]

WRONG = ["", "0", "abc", None, 3, [], {}, True, "0" * 64, "0" * 63]


def checksums_of(path):
    """What `inspect` says of a checkpoint's checksums."""
    status, out, _ = run(["inspect", str(path)])
    return status, out.splitlines()[-1]


@pytest.fixture
def merged(tmp_path):
    (tmp_path / "in").mkdir()
    save_file(few_tensors(), tmp_path / "in/a.safetensors")
    run(
        [
            "merge",
            "--keep-all",
            *[str(tmp_path / "in/a.safetensors")] * 2,
            "--output",
            str(tmp_path / "merged"),
            "--quiet",
        ]
    )
    assert checksums_of(tmp_path / "merged") == (0, "checksums    verified")
    return tmp_path / "merged"


@pytest.mark.parametrize("recorded", WRONG, ids=str)
def test_only_a_whole_checksum_verifies_a_file_of_a_merge(merged, recorded):
    record = json.loads((merged / "merge.json").read_text())
    found = record["files"]["model.safetensors"]
    (merged / "merge.json").write_text(json.dumps({**record, "files": {"model.safetensors": recorded}}))
    status, line = checksums_of(merged)
    assert (status, f"its SHA-256 is {found}, recorded was" in line) == (1, True)


@pytest.mark.parametrize("prefix", [0, 12, 63])
def test_the_beginning_of_a_checksum_verifies_nothing(merged, prefix):
    record = json.loads((merged / "merge.json").read_text())
    record["files"]["model.safetensors"] = record["files"]["model.safetensors"][:prefix]
    (merged / "merge.json").write_text(json.dumps(record))
    assert checksums_of(merged)[0] == 1


def test_weights_that_the_record_does_not_list_are_not_verified(merged):
    record = json.loads((merged / "merge.json").read_text())
    (merged / "config.json").write_text("{}")
    record["files"] = {"config.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    (merged / "merge.json").write_text(json.dumps(record))
    status, line = checksums_of(merged)
    assert (status, "model.safetensors: no checksum is recorded for it" in line) == (1, True)
    (merged / "merge.json").write_text(json.dumps({**record, "files": {}}))
    assert checksums_of(merged) == (0, "checksums    none recorded")


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("change", ["a bit", "gone from the record", "an empty checksum"])
def test_the_files_of_an_emission_of_all_ranks_are_verified(tmp_path, file, change):
    place = tmp_path / distributed_emission(tmp_path)
    assert checksums_of(place) == (0, "checksums    verified")
    record = json.loads((place / "merge.json").read_text())
    if change == "a bit":
        content = bytearray((place / file).read_bytes())
        # Of the data, or of the planner's notes at the end: both still open.
        at = content.index(b"PLACEHOLDER") if b"PLACEHOLDER" in content else None
        at = at or (content.rfind(b"PK\x01\x02") - 700 if file != ".metadata" else None)
        if at is None:
            metadata = pickle.loads(bytes(content))
            metadata.planner_data = {"changed": ("by", "somebody")}
            (place / file).write_bytes(pickle.dumps(metadata))
        else:
            content[at] ^= 1
            (place / file).write_bytes(content)
    elif change == "an empty checksum":
        record["files"][file] = ""
    else:
        del record["files"][file]
    (place / "merge.json").write_text(json.dumps(record))
    status, line = checksums_of(place)
    assert (status, file in line) == (1, True), line


@pytest.fixture
def window(tmp_path):
    """A window of a whole snapshot and two differences."""
    kept = new_window({"weight": torch.zeros(400)}, 3, tmp_path / "window")
    for step in (10, 20, 30):
        take(kept, step, {"weight": torch.full((400,), step / 8)})
    return tmp_path / "window", [snapshot.file for snapshot in kept.snapshots]


@pytest.mark.parametrize("recorded", WRONG, ids=str)
def test_only_a_whole_checksum_verifies_a_snapshot(window, recorded):
    folder, files = window
    assert checksums_of(folder / files[0]) == (0, "checksums    verified")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["snapshots"][0]["checksum"] = recorded
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checksums_of(folder / files[0])[0] == 1


def test_what_a_snapshot_builds_on_is_verified_too(window):
    folder, files = window
    flip_last_byte(folder / files[1])
    problems = verify(open_checkpoint(folder / files[2]))
    assert len(problems) == 1
    assert files[1] in problems[0]


def test_a_snapshot_without_a_record_is_not_said_to_be_verified(window, tmp_path):
    folder, files = window
    shutil.copy(folder / files[0], tmp_path / "step=10.safetensors")
    assert checksums_of(tmp_path / "step=10.safetensors") == (0, "checksums    none recorded")


def test_the_list_of_a_snapshot_s_files_is_verified_by_the_window_s(tmp_path):
    place = tmp_path / shared_out(tmp_path)
    assert checksums_of(place) == (0, "checksums    verified")
    (tmp_path / "manifest.json").write_text(
        json.dumps({"snapshots": [{"file": place.name, "checksum": "0" * 64}]})
    )
    status, line = checksums_of(place)
    assert (status, "shards.json: its SHA-256 is" in line) == (1, True)
