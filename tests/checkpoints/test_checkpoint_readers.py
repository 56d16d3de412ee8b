"""Checkpoint files of every format are read as they are, and cost no memory of their own."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_files import few_tensors, flip_last_byte, sharded_folder, write_safetensors
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file, save_model
from torch import Tensor
from training_runs import Classifier, assert_same_bits, loader, train

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.checkpoints.open import open_checkpoint, verify
from merge_callback.cli.main import main


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
    with pytest.raises(ValueError, match=r"has no entry 'net'; state dicts are at: model"):
        open_checkpoint(path, state_key="net")


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


def test_a_transposed_view_is_a_tensor_of_its_own_and_merged_like_one(tmp_path):
    """A permutation and its inverse, say, of a normalizing flow: parameters that share one array."""
    for step in (1, 2):
        weight = torch.arange(6.0).view(2, 3) * step
        torch.save({"w": weight, "inverse": weight.t()}, tmp_path / f"step={step}.ckpt")
    newest = open_checkpoint(tmp_path / "step=2.ckpt")
    assert not newest.tied
    assert_same_bits(newest.tensors, {"w": weight, "inverse": weight.t()})
    assert main(["merge", str(tmp_path), "--output", str(tmp_path / "merged"), "--quiet"]) == 0
    assert_same_bits(load_merge(tmp_path / "merged"), {"w": weight * 0.75, "inverse": weight.t() * 0.75})


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
    assert [path.name for path in checkpoint.extras] == ["config.json", "notes.txt", "tokenizer.json"]
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
    assert len(checkpoint.extras) == 3


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
    assert verify(open_checkpoint(tmp_path / "a.pt")) is None
