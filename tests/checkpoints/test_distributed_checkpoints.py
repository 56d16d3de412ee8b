"""Checkpoints of `torch.distributed.checkpoint`: put together, and never trusted."""

import gc
import os
import pickle
import resource
from pathlib import Path

import pytest
import sharded_save
import torch
from checkpoint_files import Evil, few_tensors, save_distributed
from distributed_runs import run_ranks
from torch.distributed.checkpoint.metadata import Metadata
from training_runs import assert_same_bits

from merge_callback.checkpoints.open import open_checkpoint, recorded_step
from merge_callback.snapshots.safetensors_file import CorruptFileError

# Distributed checkpoints


def test_distributed_checkpoint_of_two_processes_is_put_together(tmp_path):
    folder = tmp_path / "step-9"
    run_ranks(2, sharded_save.save, folder=folder)
    checkpoint = open_checkpoint(folder, spool=tmp_path)
    model = sharded_save.build()
    model.train()(torch.ones(4, 5))  # moves the running statistics of the batch norm
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert_same_bits(checkpoint.tensors, {**expected, "columns": sharded_save.columns()})
    assert (checkpoint.format, checkpoint.step) == ("dcp", 9)
    assert {path.name for path in checkpoint.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_distributed_checkpoint_leaves_nothing_in_the_spool(tmp_path):
    folder = save_distributed(tmp_path / "saved", {"model": few_tensors()})
    spool = tmp_path / "spool"
    spool.mkdir()
    tensors = open_checkpoint(folder, spool).tensors
    assert list(spool.iterdir()) == []
    gc.collect()
    assert_same_bits(tensors, few_tensors())


def test_keys_that_lead_to_the_one_state_dict_are_no_part_of_its_names(tmp_path):
    contents = {
        "lightning": {"state_dict": few_tensors(), "optimizer_0": {"state": {"exp_avg": torch.ones(3)}}},
        "composer": {"state": {"model": few_tensors(), "timestamp": 3}, "rng": [torch.ones(2)]},
        "flat": {f"model.{name}": tensor for name, tensor in few_tensors().items()},
        "two": {"generator": few_tensors(), "critic": {"b.weight": torch.ones(2)}},
    }
    names = {
        kind: open_checkpoint(save_distributed(tmp_path / kind, content), tmp_path).tensors.keys()
        for kind, content in contents.items()
    }
    assert names["lightning"] == names["composer"] == few_tensors().keys()
    assert names["flat"] == {f"model.{name}" for name in few_tensors()}
    assert names["two"] == {*(f"generator.{name}" for name in few_tensors()), "critic.b.weight"}
    key = open_checkpoint(tmp_path / "composer", tmp_path, state_key="state.model")
    assert_same_bits(key.tensors, few_tensors())


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
        assert names == few_tensors().keys()


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
