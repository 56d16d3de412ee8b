"""Metadata of somebody else's: what it is, how much, and of which types, is looked at before it is used."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import socket
import time
import zipfile

import pytest
import torch
from checkpoint_files import Evil, few_tensors, flip_last_byte, save_distributed, sharded_folder
from codec_windows import new_window, take
from killed_run import fit
from mutated_files import distributed_emission, run, shared_out
from resumed_runs import stopped
from safetensors.torch import save_file

from merge_callback import load_merge
from merge_callback.checkpoints.open import open_checkpoint, recorded_step, verify
from merge_callback.snapshots.files import CorruptFileError, open_regular, printable, read_object, read_small
from merge_callback.snapshots.window_folder import WindowFolder

pytestmark = pytest.mark.timeout(60)  # what hangs is to fail soon


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, tmp_path):
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def refused(*arguments):
    """The one line that a command refuses its files with."""
    status, out, errors = run([*map(str, arguments)])
    assert (status, errors.count("\n"), out) == (1, 1, ""), (status, out, errors)
    assert errors.startswith("merge-callback: ")
    return errors


# --- what kind of file it is --------------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def zeros(path):
    path.symlink_to("/dev/zero")


def elsewhere(path):
    outside = path.parent.parent / "outside.json"
    outside.write_text("{}")
    path.symlink_to(outside)


def huge(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def folder(path):
    path.mkdir()


def itself(path):
    path.symlink_to(path.name)


def endpoint(path):
    here = os.getcwd()
    os.chdir(path.parent)  # such a name may have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


KINDS = pytest.mark.parametrize("put", [pipe, zeros, elsewhere, huge, folder, itself, endpoint])


@KINDS
def test_a_trainer_state_that_is_no_file_of_metadata_is_refused(tmp_path, put):
    model = sharded_folder(tmp_path / "model")
    put(model / "trainer_state.json")
    assert "trainer_state.json" in refused("inspect", model)
    assert "trainer_state.json" in refused(
        "merge", model, model, "--keep-all", "--output", tmp_path / "out", "--quiet"
    )


@KINDS
def test_a_record_that_is_no_file_of_metadata_is_refused(tmp_path, put):
    (tmp_path / "merged").mkdir()
    save_file(few_tensors(), tmp_path / "merged/model.safetensors")
    put(tmp_path / "merged/merge.json")
    status, out, errors = run(["inspect", str(tmp_path / "merged")])
    if put is itself:  # there is nothing, then
        assert (status, "format       safetensors" in out) == (0, True)
        return
    assert (status, errors.count("\n"), "merge.json" in errors) == (1, 1, True)
    with pytest.raises((ValueError, OSError), match=r"merge\.json"):
        load_merge(tmp_path / "merged")


@KINDS
def test_a_manifest_that_is_no_file_of_metadata_is_refused(tmp_path, put):
    kept = new_window({"weight": torch.zeros(4)}, 3, tmp_path / "window", codec="")
    take(kept, 2, {"weight": torch.ones(4)})
    (tmp_path / "window/manifest.json").unlink()
    put(tmp_path / "window/manifest.json")
    status, _, errors = run(["inspect", str(tmp_path / "window" / kept.snapshots[0].file)])
    assert (status, errors.count("\n"), "manifest.json" in errors) == (1, 1, True)


@KINDS
def test_a_resumed_run_does_without_such_a_manifest(tmp_path, put):
    (tmp_path / "window").mkdir()
    put(tmp_path / "window/manifest.json")
    folder = WindowFolder(tmp_path / "window", "run", "0123456789ab", True)
    folder.resume([["step=00000002-0123456789ab.safetensors"]])
    assert folder.saved == [["step=00000002-0123456789ab.safetensors"]]


@KINDS
@pytest.mark.parametrize("name", [".metadata", "meta.pt", "shards.json", "model.safetensors.index.json"])
def test_no_other_metadata_is_waited_for_either(tmp_path, put, name):
    makes = {
        "shards.json": shared_out,
        "model.safetensors.index.json": lambda f: sharded_folder(f / "m") and "m",
    }
    make = makes.get(name, lambda f: save_distributed(f / "step=10", few_tensors()).name)
    place = tmp_path / make(tmp_path)
    (place / name).unlink(missing_ok=True)
    put(place / name)
    if name == "meta.pt":  # it would only have told the step
        assert recorded_step(place) == 10
        assert run(["inspect", str(place)])[0] == 0
    else:
        assert place.name in refused("inspect", place)


@KINDS
def test_options_that_are_no_small_file_are_refused(tmp_path, put):
    put(tmp_path / "merge.yaml")
    status, _, errors = run(
        ["merge", "--config", str(tmp_path / "merge.yaml"), "--output", str(tmp_path / "out")]
    )
    assert status in (1, 2)  # a link may lead to a file without options: then there are no checkpoints
    assert errors.count("\n") == 1


def test_a_regular_file_is_read_through_a_link_and_no_further_than_allowed(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "b.json").symlink_to("a.json")
    assert read_object(tmp_path / "b.json") == {"a": 1}
    assert read_small(tmp_path / "b.json", 8) == b'{"a": 1}'
    with pytest.raises(CorruptFileError, match=r"b\.json: has more than 7 bytes"):
        read_small(tmp_path / "b.json", 7)
    with pytest.raises(CorruptFileError, match="is a device, expected a regular file"):
        open_regular(tmp_path.joinpath("/dev/null"))


# --- how much work it makes ---------------------------------------------------------------------------------

MARKS = [b"(" * 3_000_000, b"(N" * 1_500_000, b"(]" * 1_500_000, b"((t" * 1_000_000]


@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: repr(marks[:3]))
@pytest.mark.parametrize("file", [".metadata", "a.ckpt", "meta.pt"])
def test_a_pickle_that_begins_values_without_end_is_refused_at_once(tmp_path, file, marks):
    save_distributed(tmp_path / "step=10", few_tensors())
    content = b"\x80\x02" + marks + b"."
    path = tmp_path / "step=10" / file
    if file == ".metadata":
        path.write_bytes(content)
    else:
        torch.save(few_tensors(), path)
        with zipfile.ZipFile(path) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, part in parts.items():
                new.writestr(name, content if name.endswith("data.pkl") else part)
    begun = time.process_time()
    if file == "meta.pt":
        assert recorded_step(tmp_path / "step=10") == 10
    else:
        assert file in refused("inspect", path if file == "a.ckpt" else path.parent)
    # Ended at the thousandth value, it takes milliseconds, and about four seconds otherwise.
    assert time.process_time() - begun < 2


LONG = b"a" * 200_000


@pytest.mark.parametrize(
    "content",
    [
        b"c" + LONG + b"\nb\n.",
        b"cbuiltins\n" + LONG + b"\n.",
        b"X" + len(LONG).to_bytes(4, "little") + LONG + b")R.",
    ],
    ids=["module", "name", "function"],
)
@pytest.mark.parametrize("file", ["a.ckpt", "meta.pt", "__0_0.distcp"])
def test_a_long_name_in_a_pickle_is_refused_at_once(tmp_path, file, content):
    """Torch searches its reason by patterns that take the square of its length."""
    place = save_distributed(tmp_path / "step=10", few_tensors())
    stream = io.BytesIO()
    torch.save(few_tensors(), stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(place / "new", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02" + content if name.endswith("data.pkl") else old.read(name))
    os.replace(place / "new", place / file)
    if file == "__0_0.distcp":
        metadata = pickle.loads((place / ".metadata").read_bytes())
        size = (place / file).stat().st_size
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = dataclasses.replace(info, offset=0, length=size)
        (place / ".metadata").write_bytes(pickle.dumps(metadata))
    begun = time.process_time()
    if file == "meta.pt":
        assert recorded_step(place) == 10
    else:
        error = refused("inspect", place / file if file == "a.ckpt" else place)
        assert len(error) < 1500
    assert time.process_time() - begun < 2


def test_an_endless_configuration_is_not_copied(tmp_path):
    model = sharded_folder(tmp_path / "model")
    with open(model / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)  # no room is taken
    assert "tokenizer.json: has 1099511627776 bytes" in refused(
        "merge", model, model, "--keep-all", "--output", tmp_path / "out"
    )


def test_a_long_sound_pickle_is_read(tmp_path):
    torch.save({"state_dict": few_tensors(), "numbers": [(i,) for i in range(60_000)]}, tmp_path / "a.ckpt")
    torch.save(
        {"state_dict": few_tensors(), "numbers": [[i, (i, i, i, i)] for i in range(60_000)]},
        tmp_path / "b.ckpt",
    )
    for name in ("a.ckpt", "b.ckpt"):
        assert open_checkpoint(tmp_path / name).tensors.keys() == few_tensors().keys()


def test_a_length_beyond_the_file_takes_no_memory(tmp_path):
    save_distributed(tmp_path / "step=10", few_tensors())
    for opcode in (pickle.BINUNICODE8, pickle.BINBYTES8, pickle.BYTEARRAY8):
        (tmp_path / "step=10/.metadata").write_bytes(
            b"\x80\x05" + opcode + (1 << 40).to_bytes(8, "little") + b"x."
        )
        assert ".metadata" in refused("inspect", tmp_path / "step=10")


def test_a_name_that_occurs_twice_among_many_is_found_soon(tmp_path):
    names = [f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(60_000)]
    text = ("{" + ",".join([*names, names[-1]]) + "}").encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    begun = time.process_time()
    assert "'59999' occurs twice" in refused("inspect", tmp_path / "a.safetensors")
    assert time.process_time() - begun < 2  # by counting each name among all it takes half a minute


# --- of which types it is -----------------------------------------------------------------------------------

METHOD = {"name": "sma", "options": {}, "reference": "a paper"}


@pytest.mark.parametrize(
    "record",
    [
        {"files": {}},
        {"method": "x"},
        {"method": None},
        {"method": {"name": "sma"}},
        {"method": METHOD, "inputs": "abc"},
        {"method": METHOD, "inputs": ["abc"]},
        {"method": METHOD, "snapshots": {"a": 1}},
        {"method": METHOD, "inputs": [{}, {}], "weights": [1.0]},
        {"method": METHOD, "inputs": [{}], "weights": ["a half"]},
        {"method": METHOD, "inputs": [{}], "weights": 3},
        {"method": METHOD, "snapshots": [{"weight": [1]}]},
        {"method": METHOD, "tied": [["a", "b"]]},
        {"method": METHOD, "tied": {"alias": {"a": 1}}},
    ],
    ids=str,
)
def test_a_record_of_other_types_is_refused_in_a_line(tmp_path, record):
    (tmp_path / "merged").mkdir()
    save_file(few_tensors(), tmp_path / "merged/model.safetensors")
    (tmp_path / "merged/merge.json").write_text(json.dumps(record))
    assert "merged/merge.json: " in refused("inspect", tmp_path / "merged")


@pytest.mark.parametrize(
    "record", ["{", "[]", '"x"', "[" * 100_000, '{"tied": 3}', '{"tied": {"a": "gone"}}', "\xff"]
)
def test_a_merge_whose_record_is_broken_is_not_loaded(tmp_path, record):
    save_file(few_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "merge.json").write_text(record, encoding="latin-1")
    with pytest.raises(CorruptFileError, match=r"merge\.json"):
        load_merge(tmp_path)


def test_a_merge_is_loaded_from_no_file_elsewhere(tmp_path):
    save_file(few_tensors(), tmp_path / "secret.safetensors")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/merge.json").write_text('{"tied": {}}')
    weight_map = dict.fromkeys(few_tensors(), "../secret.safetensors")
    index = tmp_path / "merged/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptFileError, match="expected a plain name"):
        load_merge(tmp_path / "merged")


YAML = [
    "- a",
    "[",
    "\t",
    "{" * 5000,
    "a\0b: 1",
    "checkpoints: !!python/object/apply:os.system ['touch RAN']",
    "a: &a [x]\nb: *a",
    "a: &a {x: 1}\nb: {<<: [*a, *a]}",
    "? [1]\n: 2",
    "checkpoints: 2020-01-01",
    "checkpoints: {a: 1}",
    "checkpoints: [[a]]",
    "last: two",
    "last: 2.5",
    "last: true",
    "every: [1]",
    "force: 'no'",
    "output: [out]",
    "base: {a: 1}",
    "exclude: [{}]",
    "method: [ties]",
    "density: {a: 1}",
    "density: [[1]]",
    "method: ties\ndensity: [1]",
    "method: ties\ndensity: much",
    "weights: {a: 1}",
    "dtype: [fp32]",
    "shard-size: []",
    "shard-size: .inf",
    "strip-prefix: 2020-01-01",
    "as: torch",
    "as: [lightning]",
    "run: x",
    "config: x",
    "option_density: 1",
    "1: 2",
    "? {a: 1}\n: 2",
]


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:40])
def test_options_of_other_types_are_refused_in_a_line(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        save_file(few_tensors(), tmp_path / f"step={i}.safetensors")
    (tmp_path / "merge.yaml").write_text(text)
    refused(
        "merge",
        "step=1.safetensors",
        "step=2.safetensors",
        "--config",
        "merge.yaml",
        "--quiet",
        "--output",
        "out",
    )
    assert sorted(os.listdir(tmp_path)) == ["merge.yaml", "step=1.safetensors", "step=2.safetensors"]


def test_options_that_are_left_empty_are_not_given(tmp_path):
    save_file(few_tensors(), tmp_path / "a.safetensors")
    files = [str(tmp_path / "a.safetensors")] * 2
    content = f"checkpoints: {files}\nkeep_all: true\nlast:\nbase: null\nexclude: ~\nquiet: true\n"
    (tmp_path / "merge.yaml").write_text(content)
    assert run(["merge", "--config", str(tmp_path / "merge.yaml"), "--output", str(tmp_path / "out")])[0] == 0


def test_a_value_on_the_command_line_that_is_no_yaml_is_a_wrong_argument(tmp_path):
    for value in ("[", "!!python/object/apply:os.system [x]", "&a [*a]"):
        status, _, errors = run(
            ["merge", "a", "a", "--keep-all", "--method", "ties", "--density", value, "--output", "out"]
        )
        assert (status, "argument --density" in errors) == (2, True)


SAVED = [5, "ab", None, [5], [None], [[["a"]]], [{"a": 1}], {"a": ["b"]}, [[1]], [["a"], 5], True, [[]], 1.5]


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_a_manifest_of_other_types_costs_a_resumed_run_nothing(tmp_path, saved):
    (tmp_path / "manifest.json").write_text(json.dumps({"run_id": "run", "saved": saved}))
    ours = "step=00000002-0123456789ab.safetensors"
    (tmp_path / ours).touch()
    folder = WindowFolder(tmp_path, "run", "ffffffffffff", True)
    folder.resume([[ours]])
    folder.prune([], 1 << 40)
    folder.write_manifest("layout", [])
    assert folder.saved[-1] == [ours]
    assert (tmp_path / ours).exists()


def test_a_run_is_resumed_over_a_manifest_of_other_types(tmp_path):
    checkpoint = stopped(tmp_path)
    manifest = tmp_path / "merges/window/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "saved": 5, "snapshots": [[]]}))
    fit(tmp_path, checkpoint)
    assert json.loads(manifest.read_text())["snapshots"][-1]["step"] == 26


@pytest.mark.parametrize(
    "records", [[{"step": [1], "file": {}}], [{"step": 10, "file": 3}], {"a": 1}, [[]], "x", 3]
)
def test_a_difference_beside_a_manifest_of_other_types_is_opened(tmp_path, records):
    kept = new_window({"weight": torch.zeros(4)}, 3, tmp_path / "window")
    for step in (10, 20):
        take(kept, step, {"weight": torch.full((4,), step / 8)})
    (tmp_path / "window/manifest.json").write_text(json.dumps({"snapshots": records}))
    assert run(["inspect", str(tmp_path / "window" / kept.snapshots[1].file)])[0] == 0


PIECES = [
    "[]",
    "3",
    '{"a": 1}',
    '{"a": [[4], null, 3]}',
    '{"a": [["4"], null, []]}',
    '{"a": [[4], null, [[[2], [4]]]]}',
]
PIECES += [
    '{"a": [[-4], null, [[[0], [-4]]]]}',
    '{"a": [[4], "x", []]}',
    '{"a": [[4], null, [[[0, 0], [4]]]]}',
    "[" * 9000,
]


@pytest.mark.parametrize("pieces", PIECES, ids=lambda text: text[:40])
def test_parts_of_tensors_that_are_none_are_refused(tmp_path, pieces):
    place = tmp_path / shared_out(tmp_path)
    for name in json.loads((place / "shards.json").read_text())["files"]:
        save_file({"a": torch.ones(4)}, place / name, {"pieces": pieces})
    assert place.name in refused("inspect", place)


# --- checksums ----------------------------------------------------------------------------------------------

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


# --- what reaches the terminal ------------------------------------------------------------------------------

NAMES = [
    "\x1b]0;title\x07\x1b[31mred",
    "a\nchecksums    verified",
    "a\rb",
    "\u202egnp.exe",
    "\x9b2J",
    "b\u2028c",
    "\x7f",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_reaches_the_terminal_as_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for i in (1, 2, 3):
        save_file({name: torch.full((4,), float(i)), "x": torch.ones(2)}, tmp_path / f"step={i}.safetensors")
    paths = [f"step={i}.safetensors" for i in (1, 2, 3)]
    for command in (
        ["inspect", "--tensors", paths[0]],
        ["diversity", "--by-layer", *paths],
        ["interference", *paths],
        ["merge", "--keep-all", *paths, "--exclude", "nothing*", "--output", "out"],
    ):
        _, out, errors = run(command)
        assert all(line.isprintable() for line in (out + errors).split("\n")), command
    assert printable(name) in run(["inspect", "--tensors", paths[0]])[1]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_name_of_a_file_does_too(tmp_path, name):
    save_file(few_tensors(), tmp_path / f"{name}.safetensors")
    (tmp_path / f"broken {name}.safetensors").write_bytes(b"")
    for path in tmp_path.iterdir():
        status, out, errors = run(["inspect", str(path)])
        assert all(line.isprintable() for line in (out + errors).split("\n"))
        assert errors.count("\n") == status


def test_text_that_may_be_shown_is_shown_as_it_is():
    assert printable("Schicht µ, 層.weight") == "Schicht µ, 層.weight"


# --- further ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_a_measure_is_not_written_over_what_is_measured(tmp_path, option):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / f"step={i}.safetensors" for i in (1, 2)]
    for path in paths:
        save_file(few_tensors(), path)
    (tmp_path / "out.png").symlink_to(paths[0].name)
    before = paths[0].read_bytes()
    for target in (paths[0], tmp_path / "out.png"):
        assert "is a file of a checkpoint that is measured" in refused("diversity", *paths, option, target)
    assert paths[0].read_bytes() == before


def test_no_pickle_beside_a_checkpoint_is_run(tmp_path):
    save_distributed(tmp_path / "step=10", few_tensors())
    torch.save({"global_step": Evil(tmp_path / "ran")}, tmp_path / "step=10/meta.pt")
    assert recorded_step(tmp_path / "step=10") == 10
    assert not (tmp_path / "ran").exists()
    stream = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), stream)
    (tmp_path / "step=10/meta.pt").write_bytes(stream.getvalue())
    assert recorded_step(tmp_path / "step=10") == 10
    assert not (tmp_path / "ran").exists()
