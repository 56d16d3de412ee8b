"""Metadata of somebody else's: what kind of file it is, and how much, is looked at before it is used."""

import dataclasses
import io
import os
import pickle
import socket
import time
import zipfile

import pytest
import torch
from checkpoint_files import Evil, few_tensors, save_distributed, sharded_folder
from codec_windows import new_window, take
from command_line import refused, run
from mutated_files import shared_out
from safetensors.torch import save_file

from merge_callback import load_merge
from merge_callback.checkpoints.open import open_checkpoint, recorded_step
from merge_callback.snapshots.files import CorruptFileError, open_regular, read_object, read_small
from merge_callback.snapshots.window_folder import WindowFolder

# What hangs is to fail soon.
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("in_this_process")]


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
