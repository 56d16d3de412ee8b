"""Files that are broken, or that want code run, are refused by name."""

import io
import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import Evil, entry, few_tensors, sharded_folder, write_safetensors
from safetensors.torch import save_file
from torch import Tensor

from merge_callback.checkpoints.open import open_checkpoint, verify
from merge_callback.sharding import Piece
from merge_callback.snapshots.safetensors_file import CorruptFileError, file_checksum
from merge_callback.snapshots.shard_files import gather_shards

# Refusals: torch.save


def test_pickle_that_wants_code_is_refused_and_not_run(tmp_path):
    for content in ({"state_dict": few_tensors(), "x": Evil(tmp_path / "ran")}, Evil(tmp_path / "ran")):
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(
            ValueError, match=r"a\.ckpt: loading it would run code, which this tool never does"
        ):
            open_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()


def test_old_pickle_that_cannot_be_mapped_is_refused(tmp_path):
    torch.save(few_tensors(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"since torch 1.6, so it cannot be mapped; load it .* save it again"
    ):
        open_checkpoint(tmp_path / "a.pt")


def test_cut_file_is_refused(tmp_path):
    torch.save(few_tensors(), tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", (tmp_path / "a.pt").stat().st_size - 30)
    with pytest.raises(CorruptFileError, match="cut or altered"):
        open_checkpoint(tmp_path / "a.pt")


def test_compressed_archive_is_refused(tmp_path):
    written = io.BytesIO()
    torch.save({"w": torch.zeros(5000)}, written)
    with (
        zipfile.ZipFile(written) as old,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CorruptFileError, match="is compressed"):
        open_checkpoint(tmp_path / "a.pt")


def test_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CorruptFileError, match=r"not written by torch\.save"):
        open_checkpoint(tmp_path / "a.pt")


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


flat = torch.arange(6.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"__metadata__": torch.ones(1)}, "'__metadata__' is no name for a tensor"),
        ({3: torch.ones(1)}, "3 is no name for a tensor"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is torch.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, "'w' is torch.strided on meta"),
        ({"a": flat, "b": flat[2:]}, "'a' and 'b' share memory without being the same tensor"),
        ({"a": flat, "b": flat.view(2, 3)}, "share memory without being the same tensor"),
        ({"state_dict": {"w": torch.ones(1), "x": 3}}, "'x' is a int, expected a plain tensor"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"state_dict": 5}, "'state_dict' is a int, expected names mapped to tensors"),
        ([torch.ones(1)], "holds a list, expected a state dict"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "a.pt")


def test_quantized_tensor_is_refused(tmp_path):
    torch.save({"w": quantized()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="quantized"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 8)}, "'b' begins at byte 2 of the data, expected 4"),
        ({"a": entry(0, 3), "b": entry(4, 8)}, "neither overlap nor leave gaps"),
        ({"a": entry(0, 9)}, "the data has 8 bytes, expected 9"),
        ({"a": entry(0, 4)}, "the data has 8 bytes, expected 4"),
        ({"a": entry(0, 8, "F32", [3])}, r"lies at \[0, 8\], expected 12 bytes for \[3\] of F32"),
        ({"a": entry(0, 8, "F4")}, "dtype 'F4', expected one of F64"),
        ({"a": entry(0, 8, ["F32"])}, "dtype"),
        ({"a": entry(0, 8, shape=[-8])}, "sizes"),
        ({"a": entry(0, 8, shape=[8.0])}, "sizes"),
        ({"a": entry(0, 8, shape=[True, 8])}, "sizes"),
        ({"a": entry(0, 8), "b": entry(8, 8, "U8", [0, 2**62, 2**62])}, "'b' of shape"),
        ({"a": {**entry(0, 8), "more": 1}}, "expected its dtype, shape and data_offsets"),
        ({"a": 3}, "expected its dtype, shape and data_offsets"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, "lies at"),
        ({"__metadata__": {"step": 3}, "a": entry(0, 8)}, "__metadata__ does not map text to text"),
        ([1], "not a JSON object"),
        (b"{ ", "not sound JSON"),
        (b"\xff\xfe", "not sound JSON"),
        (b"[" * 100_000, "not sound JSON"),
        (b'{"a": ' + json.dumps(entry(0, 8)).encode() + b', "a": 1}', "'a' occurs twice"),
    ],
)
def test_broken_safetensors_header_is_refused(tmp_path, header, message):
    write_safetensors(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(CorruptFileError, match=message):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_snapshot_with_a_broken_header_is_refused_on_a_resume_as_anywhere(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": entry(0, 4), "b": entry(2, 8)}, bytes(8))
    out = {"a": torch.empty(4, dtype=torch.uint8)}
    with pytest.raises(CorruptFileError, match="'b' begins at byte 2 of the data, expected 4"):
        gather_shards(path, file_checksum(path), {"a": Piece.all_of([4])}, out)


@pytest.mark.parametrize("length", [0, 1, 93, 2**63])
def test_header_length_beyond_the_file_is_refused(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(90))
    with pytest.raises(CorruptFileError, match=f"the header length {length} does not fit"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_header_of_absurd_length_is_refused_unread(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((1 << 33).to_bytes(8, "little"))
        file.truncate(1 << 34)  # a sparse file
    with pytest.raises(CorruptFileError, match="does not fit a file of 17179869184 bytes"):
        open_checkpoint(tmp_path / "a.safetensors")


def change_index(folder: Path, tensor: str, file: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = file
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "sub/x", "/etc/passwd", "..", "", "a\\b", 3, None, [1]]
)
def test_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    folder = sharded_folder(tmp_path / "model")
    save_file(few_tensors(), tmp_path / "out.safetensors")
    change_index(folder, "count", name)
    with pytest.raises(CorruptFileError, match="expected a plain name within the folder"):
        open_checkpoint(folder)


def test_index_whose_file_links_elsewhere_is_refused(tmp_path):
    folder = sharded_folder(tmp_path / "snapshots" / "model")
    for place in (tmp_path / "out.safetensors", tmp_path / "blobs" / "deep" / "out.safetensors"):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "second.safetensors", place)
        (folder / "second.safetensors").unlink()
        (folder / "second.safetensors").symlink_to(place)
        with pytest.raises(
            CorruptFileError, match=r"second\.safetensors is a link to .*, outside of the folder"
        ):
            open_checkpoint(folder)


def test_config_that_links_elsewhere_is_refused(tmp_path):
    folder = sharded_folder(tmp_path / "model")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(CorruptFileError, match=r"config\.json is a link to /etc/hostname"):
        open_checkpoint(folder)


def test_index_that_names_a_tensor_its_file_has_not_is_refused(tmp_path):
    folder = sharded_folder(tmp_path / "model")
    change_index(folder, "ghost", "first.safetensors")
    with pytest.raises(CorruptFileError, match=r"first.safetensors: .*missing \['ghost'\]"):
        open_checkpoint(folder)


def test_file_with_a_tensor_the_index_does_not_name_is_refused(tmp_path):
    folder = sharded_folder(tmp_path / "model")
    change_index(folder, "count", "first.safetensors")
    with pytest.raises(CorruptFileError, match=r"missing \['count'\]|unexpected \['count'\]"):
        open_checkpoint(folder)


def test_missing_shard_is_refused(tmp_path):
    folder = sharded_folder(tmp_path / "model")
    (folder / "second.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"second\.safetensors is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_folder_with_both_an_index_and_one_whole_file_is_refused(tmp_path):
    folder = sharded_folder(tmp_path / "model")
    save_file(few_tensors(), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has both model.safetensors and .*; remove the one left over"):
        open_checkpoint(folder)


def test_folder_without_weights_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor an index"):
        open_checkpoint(tmp_path)
    torch.save(few_tensors(), tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"give the file itself: .*consolidated.00.pth"):
        open_checkpoint(tmp_path)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such checkpoint"):
        open_checkpoint(tmp_path / "gone.ckpt")


def test_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        open_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not the record of a merge"),
        ('{"files": 3}', "not the record of a merge"),
        ('{"tied": 3}', "'tied' is 3"),
        ('{"tied": {"a.weight": "count"}}', "ties 'a.weight' to 'count', against the files"),
        ('{"tied": {"alias": "gone"}}', "ties 'alias' to 'gone', against the files"),
        ('{"tied": {"alias": ["gone"]}}', "against the files"),
    ],
)
def test_broken_record_of_an_emission_is_refused(tmp_path, record, message):
    save_file(few_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "merge.json").write_text(record)
    with pytest.raises(CorruptFileError, match=message):
        open_checkpoint(tmp_path)


def test_recorded_checksums_of_files_elsewhere_are_not_followed(tmp_path):
    save_file(few_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "merge.json").write_text('{"tied": {}, "files": {"../secret": "00", "gone.json": "00"}}')
    unlisted, first, second = verify(open_checkpoint(tmp_path))
    assert "model.safetensors: no checksum is recorded for it" in unlisted
    assert "expected a plain name" in first
    assert "gone.json is missing" in second
