"""Readers of checkpoints: every format gives the tensors that were saved, and nothing hostile gets in."""

import gc
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import sharded_save
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file, save_model
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from training_runs import Classifier, assert_same_bits, loader, train

from merge_callback import CheckpointMergeCallback
from merge_callback.offline.checkpoint import open_checkpoint, recorded_step, verify
from merge_callback.snapshots.safetensors_file import CorruptFileError

ROOT = Path(__file__).parent.parent


def few_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "a.bias": torch.randn(4, generator=generator).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
    }


def in_subprocess(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A fit that left Lightning's checkpoints, a window and emissions; and its final weights."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    module = Classifier()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=True)
    merger = CheckpointMergeCallback(every_n_steps=2, window=3, dirpath=folder / "merges")
    train(module, merger, saver, data=loader(), enable_checkpointing=True)
    return folder, {name: tensor.clone() for name, tensor in module.state_dict().items()}


# Formats


def test_lightning_checkpoint_gives_the_state_dict_and_its_step(run):
    folder, weights = run
    checkpoint = open_checkpoint(folder / "step=12.ckpt")
    assert_same_bits(checkpoint.tensors, weights)
    assert (checkpoint.format, checkpoint.step) == ("lightning", 12)
    assert checkpoint.files == [folder / "step=12.ckpt"]


def test_tokens_come_from_the_callbacks_state_in_a_lightning_checkpoint(tmp_path):
    path = tmp_path / "a.ckpt"
    callbacks = {"CheckpointMergeCallback{'every': 2}": {"tokens": 640}}
    torch.save({"state_dict": few_tensors(), "global_step": 5, "callbacks": callbacks}, path)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.tokens) == (5, 640)


def test_plain_state_dict_is_read_as_it_is_with_the_step_of_its_name(tmp_path):
    path = tmp_path / "model-step=30.pt"
    torch.save(OrderedDict(few_tensors()), path)
    checkpoint = open_checkpoint(path)
    assert_same_bits(checkpoint.tensors, few_tensors())
    assert list(checkpoint.tensors) == list(few_tensors())
    assert (checkpoint.format, checkpoint.step) == ("pytorch", 30)


def test_state_key_names_the_entry_that_holds_the_weights(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": few_tensors(), "step": 9, "optimizer": {"lr": 0.1}}, path)
    assert_same_bits(open_checkpoint(path, state_key="model").tensors, few_tensors())
    with pytest.raises(ValueError, match=r"'state_dict' among its entries \('model', 'step', 'optimizer'\)"):
        open_checkpoint(path)


def test_the_very_same_view_under_two_names_is_tied(tmp_path):
    weight = torch.randn(4, 2)
    torch.save({"head": weight, "table": weight, "other": weight.clone()}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert (list(checkpoint.tensors), checkpoint.tied) == (["head", "other"], {"table": "head"})


def test_separate_parts_of_one_storage_are_tensors_of_their_own(tmp_path):
    flat = torch.arange(10.0)
    torch.save({"a": flat[:4], "b": flat[4:].view(2, 3), "none": flat[:0]}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint.tied == {}
    assert_same_bits(checkpoint.tensors, {"a": flat[:4], "b": flat[4:].view(2, 3), "none": flat[:0]})


def test_extra_state_that_is_no_tensor_is_left_out(tmp_path):
    torch.save({"state_dict": {**few_tensors(), "a._extra_state": {"scale": 1}}}, tmp_path / "a.ckpt")
    assert open_checkpoint(tmp_path / "a.ckpt").tensors.keys() == few_tensors().keys()


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "uint16",
        "uint32",
        "uint64",
        "complex64",
    ],
)
def test_every_dtype_of_safetensors_is_read(tmp_path, dtype):
    values = torch.tensor([[0.0, 1.0, 2.0]]).to(getattr(torch, dtype))
    save_file({"x": values}, tmp_path / "a.safetensors")
    found = open_checkpoint(tmp_path / "a.safetensors").tensors["x"]
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))


def test_safetensors_come_in_the_order_of_the_file(tmp_path):
    save_file(few_tensors(), tmp_path / "a.safetensors")  # sorts by alignment, then by name
    tensors = open_checkpoint(tmp_path / "a.safetensors").tensors
    assert_same_bits(tensors, few_tensors())
    begins = [tensor.data_ptr() for tensor in tensors.values()]
    assert begins == sorted(begins)


def test_shared_names_are_those_save_model_noted(tmp_path):
    module = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 3), "table": torch.nn.Linear(3, 3, bias=False)})
    module["table"].weight = module["head"].weight
    save_model(module, str(tmp_path / "model.safetensors"), metadata={"note": "by hand"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.tied == {"table.weight": "head.weight"}
        assert checkpoint.tensors.keys() == {"head.weight", "head.bias"}


def test_misaligned_tensors_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    entries = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    write_safetensors(path, entries, b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    tensors = open_checkpoint(path).tensors
    assert tensors["wide"].tolist() == [1.5, -2.0]
    assert tensors["byte"].tolist() == [7]


def test_writing_to_a_tensor_by_mistake_leaves_the_file_alone(tmp_path):
    save_file(few_tensors(), tmp_path / "a.safetensors")
    torch.save(few_tensors(), tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        before = (tmp_path / name).read_bytes()
        open_checkpoint(tmp_path / name).tensors["a.weight"].zero_()
        assert (tmp_path / name).read_bytes() == before


def test_files_may_be_read_only(tmp_path):
    save_file(few_tensors(), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0o444)
    assert_same_bits(open_checkpoint(tmp_path / "a.safetensors").tensors, few_tensors())


def test_sharded_folder_gives_all_shards_and_the_files_beside_them(tmp_path):
    folder = sharded_folder(tmp_path / "checkpoint-500")
    checkpoint = open_checkpoint(folder)
    assert_same_bits(checkpoint.tensors, few_tensors())
    assert [path.name for path in checkpoint.extras] == ["config.json", "tokenizer.json"]
    assert {path.name for path in checkpoint.files} == {"first.safetensors", "second.safetensors"}
    assert (checkpoint.format, checkpoint.step, checkpoint.tokens) == ("safetensors", 500, None)


def test_trainer_state_tells_step_and_tokens(tmp_path):
    save_file(few_tensors(), tmp_path / "model.safetensors")
    state = {"global_step": 70, "num_input_tokens_seen": 9000}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.tokens) == (70, 9000)


def test_hugging_face_cache_is_read_through_its_links(tmp_path):
    repo = tmp_path / "models--a--b"
    blobs = sharded_folder(repo / "blobs")
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    checkpoint = open_checkpoint(snapshot)
    assert_same_bits(checkpoint.tensors, few_tensors())
    assert len(checkpoint.extras) == 2


def test_snapshot_of_the_window_is_read_and_verified(run):
    folder, weights = run
    newest = max((folder / "merges" / "window").glob("step=*.safetensors"))
    checkpoint = open_checkpoint(newest)
    assert_same_bits(checkpoint.tensors, weights)
    assert (checkpoint.format, checkpoint.step, checkpoint.tied) == ("snapshot", 12, {})
    assert verify(checkpoint) == []


def test_snapshot_that_was_altered_is_found_by_its_name_alone(run, tmp_path):
    newest = max((run[0] / "merges" / "window").glob("step=*.safetensors"))
    copy = Path(shutil.copy(newest, tmp_path))
    assert verify(open_checkpoint(copy)) == []
    flip_last_byte(copy)
    assert [str(copy) in line for line in verify(open_checkpoint(copy))] == [True]


def test_emission_is_read_through_latest_and_verified(run, tmp_path):
    folder, _ = run
    checkpoint = open_checkpoint(folder / "merges" / "latest")
    assert (checkpoint.format, checkpoint.step) == ("emission", 12)
    assert verify(checkpoint) == []
    copy = Path(shutil.copytree(folder / "merges" / "latest", tmp_path / "copy"))
    flip_last_byte(copy / "model.safetensors")
    assert ["model.safetensors" in line for line in verify(open_checkpoint(copy))] == [True]


def test_emission_ties_are_those_of_its_record(tmp_path):
    save_file({"head": torch.ones(2)}, tmp_path / "model.safetensors")
    record = {"step": 4, "tokens": 44, "tied": {"table": "head"}, "files": {}}
    (tmp_path / "merge.json").write_text(json.dumps(record))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.tied, checkpoint.step, checkpoint.tokens) == ({"table": "head"}, 4, 44)


def test_nothing_recorded_is_nothing_to_verify(tmp_path):
    torch.save(few_tensors(), tmp_path / "a.pt")
    assert verify(open_checkpoint(tmp_path / "a.pt")) == []


# Distributed checkpoints


def test_distributed_checkpoint_of_two_processes_is_put_together(tmp_path):
    folder = tmp_path / "step-9"
    script = [sys.executable, str(ROOT / "tests" / "sharded_save.py")]
    both = [subprocess.Popen([*script, str(r), str(tmp_path / "meet"), str(folder)]) for r in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    checkpoint = open_checkpoint(folder, spool=tmp_path)
    model = sharded_save.build()
    model.train()(torch.ones(4, 5))  # moves the running statistics of the batch norm
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert_same_bits(checkpoint.tensors, {**expected, "columns": sharded_save.columns()})
    assert (checkpoint.format, checkpoint.step) == ("dcp", 9)
    assert {path.name for path in checkpoint.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def save_distributed(folder: Path, state: dict) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_distributed_checkpoint_leaves_nothing_in_the_spool(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"model": few_tensors()})
    spool = tmp_path / "spool"
    spool.mkdir()
    tensors = open_checkpoint(folder, spool).tensors
    assert list(spool.iterdir()) == []
    gc.collect()
    assert_same_bits(tensors, {f"model.{name}": tensor for name, tensor in few_tensors().items()})


def test_flat_distributed_checkpoint_keeps_names_that_sound_like_training_state(tmp_path):
    tensors = {"optimizer.weight": torch.ones(3), "scale": torch.tensor(2.0), "none": torch.empty(0, 4)}
    folder = save_distributed(tmp_path / "saved", tensors)
    assert_same_bits(open_checkpoint(folder, tmp_path).tensors, tensors)


@pytest.mark.parametrize("key", ["optimizer", "optim", "optimizer_0", "optimizer_states", "train_state"])
def test_training_state_in_a_distributed_checkpoint_is_not_taken_for_weights(tmp_path, key):
    state = {"model": few_tensors(), key: {"state": {"exp_avg": torch.ones(3)}}, "epoch": 3}
    for name, content in {"plain": state, "nested": {"app": state}}.items():
        folder = save_distributed(tmp_path / name, content)
        names = open_checkpoint(folder, tmp_path).tensors.keys()
        assert {n.removeprefix("app.") for n in names} == {f"model.{n}" for n in few_tensors()}


def test_sharded_lightning_checkpoint_knows_its_step(tmp_path):
    folder = save_distributed(tmp_path / "saved.ckpt", {"state_dict": few_tensors()})
    torch.save({"global_step": 21, "epoch": 1}, folder / "meta.pt")
    assert open_checkpoint(folder, tmp_path).step == recorded_step(folder) == 21


def test_full_spool_is_an_error_and_no_killed_process(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"model": {"w": torch.ones(1 << 18)}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(OSError, match="no room for 1048576 bytes of tensors; give another spool folder"):
            open_checkpoint(folder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "content",
    [
        b"cos\ngetcwd\n(tR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nS'mro'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
        b"ctorch.distributed.checkpoint.metadata\nfield\n(tR.",
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.getcwd\x93)R.",
    ],
)
def test_metadata_that_wants_code_is_refused(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"\.metadata: reading it could run code, which this tool never does"
    ):
        open_checkpoint(tmp_path, tmp_path)


def test_sound_metadata_with_code_in_it_is_refused_and_not_run(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"model": few_tensors()})
    alter_metadata(folder, lambda metadata: setattr(metadata, "planner_data", Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"it asks for pathlib\..*touch|could run code"):
        open_checkpoint(folder, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_metadata_cannot_change_a_class_of_this_process(tmp_path):
    change = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x03\x00\x00\x00newK\x01s\x86b."
    (tmp_path / ".metadata").write_bytes(change)
    with pytest.raises(ValueError, match="it changes"):
        open_checkpoint(tmp_path, tmp_path)
    assert not hasattr(Metadata, "new")
    pickle.loads(change)  # the plain unpickler would have
    assert Metadata.new == 1
    del Metadata.new


def alter_metadata(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_distributed_checkpoint_of_files_elsewhere_is_refused(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"w": torch.ones(3)})
    (folder / "__0_0.distcp").rename(tmp_path / "away.distcp")

    def point_away(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = "../away.distcp"

    alter_metadata(folder, point_away)
    with pytest.raises(CorruptFileError, match=r"'\.\./away.distcp', expected a plain name"):
        open_checkpoint(folder, tmp_path)


def test_distributed_checkpoint_with_a_part_missing_is_refused(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"w": torch.ones(3, 2)})

    def enlarge(metadata):
        metadata.state_dict_metadata["w"].size = torch.Size([4, 2])

    alter_metadata(folder, enlarge)
    with pytest.raises(CorruptFileError, match=r"'w': its 1 parts do not cover its shape \[4, 2\]"):
        open_checkpoint(folder, tmp_path)


def test_distributed_checkpoint_of_malformed_records_is_refused(tmp_path):
    def misplace(metadata):
        next(iter(metadata.storage_data.values())).offset = "3"

    def forget(metadata):
        metadata.storage_data.clear()

    def lengthen(metadata):
        metadata.state_dict_metadata["w"].chunks[0].sizes = torch.Size([3, 2, 1])

    def fray(metadata):
        metadata.state_dict_metadata["w"].size = (3.0, 2)

    for number, change in enumerate((misplace, forget, lengthen, fray)):
        folder = save_distributed(tmp_path / str(number), {"w": torch.ones(3, 2)})
        alter_metadata(folder, change)
        with pytest.raises(CorruptFileError):
            open_checkpoint(folder, tmp_path)


def test_distributed_checkpoint_that_was_cut_is_refused(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"w": torch.ones(3, 2)})
    os.truncate(folder / "__0_0.distcp", 100)
    with pytest.raises(CorruptFileError, match=r"'w': __0_0.distcp has 100 bytes"):
        open_checkpoint(folder, tmp_path)


def test_distributed_checkpoint_with_altered_parts_is_refused(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"w": torch.ones(3, 2)})
    part = folder / "__0_0.distcp"
    part.write_bytes(b"\0" * part.stat().st_size)
    with pytest.raises(CorruptFileError, match="'w' cannot be read"):
        open_checkpoint(folder, tmp_path)


def test_distributed_checkpoint_of_training_state_alone_is_refused(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"optim": {"exp_avg": torch.ones(3)}})
    with pytest.raises(ValueError, match="only training state"):
        open_checkpoint(folder, tmp_path)


def test_metadata_that_is_none_is_refused(tmp_path):
    for content in (b"", b"\x80\x04}.", b"garbage"):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"\.metadata: "):
            open_checkpoint(tmp_path, tmp_path)


def test_unfinished_distributed_checkpoint_is_refused(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"w": torch.ones(3)})
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="never finished"):
        open_checkpoint(folder, tmp_path)


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


# Refusals: safetensors


def write_safetensors(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


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


# Refusals: folders


def sharded_folder(folder: Path) -> Path:
    """A model in two shards with an index, a config and a tokenizer, and something that is none of it."""
    folder.mkdir(parents=True)
    tensors = few_tensors()
    shards = {"first.safetensors": list(tensors)[:2], "second.safetensors": list(tensors)[2:]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "tokenizer.json", "notes.txt"):
        (folder / name).write_text("{}")
    return folder


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
    torch.save(few_tensors(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"give the file itself: .*pytorch_model.bin"):
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
    first, second = verify(open_checkpoint(tmp_path))
    assert "expected a plain name" in first
    assert "gone.json is missing" in second


# What it costs


def test_opening_files_does_not_import_lightning():
    code = (
        "import sys, merge_callback.offline.checkpoint, merge_callback.offline.selection\n"
        "print([m for m in ('lightning', 'torchmetrics', 'transformers') if m in sys.modules])"
    )
    assert in_subprocess(code).strip() == "[]"


GROWTH = """
import sys, pathlib, torch, torch.distributed.checkpoint
from merge_callback.offline.checkpoint import open_checkpoint

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

for name in ("big.pt", "big.safetensors", "big.dcp"):
    torch.zeros(8).sum()
    before = anonymous()
    tensors = open_checkpoint(pathlib.Path(sys.argv[1]) / name, pathlib.Path(sys.argv[1])).tensors
    print(sum(float(tensor.sum()) for tensor in tensors.values()), anonymous() - before)
"""


def test_reading_a_large_file_takes_no_memory_of_its_own(tmp_path):
    tensors = {f"layer{i}": torch.full((5_000_000,), float(i)) for i in range(15)}  # 300 MB
    torch.save(tensors, tmp_path / "big.pt")
    save_file(tensors, tmp_path / "big.safetensors")
    save_distributed(tmp_path / "big.dcp", {"model": {n: tensors[n] for n in list(tensors)[:5]}})
    lines = [line.split() for line in in_subprocess(GROWTH, tmp_path).splitlines()]
    assert [float(total) for total, _ in lines] == [sum(range(n)) * 5e6 for n in (15, 15, 5)]
    assert max(int(grown) for _, grown in lines) < 20  # MB; measured: 1 to 3


def test_safetensors_larger_than_the_memory_are_mapped(tmp_path):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = 2 * memory
    header = json.dumps({"w": entry(0, size)}).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a sparse file
    assert open_checkpoint(tmp_path / "a.safetensors").tensors["w"][-1] == 0


def test_file_that_the_system_does_not_map_is_an_error_with_the_mend(tmp_path):
    torch.save({"w": torch.zeros(20_000_000)}, tmp_path / "a.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (30 << 20), hard))
    try:
        with pytest.raises(OSError, match=r"larger than the memory; .*overcommit_memory=1.*a\.pt"):
            open_checkpoint(tmp_path / "a.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_many_shards_take_no_file_descriptors(tmp_path):
    shards = [f"{i}.safetensors" for i in range(60)]
    for i, shard in enumerate(shards):
        save_file({f"w{i}": torch.ones(1)}, tmp_path / shard)
    weight_map = {f"w{i}": shard for i, shard in enumerate(shards)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = open_checkpoint(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(checkpoint.tensors) == 60


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
