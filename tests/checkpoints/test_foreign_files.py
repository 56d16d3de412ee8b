"""Files of other people's trainers: weights under other keys, beside objects of other classes."""

import argparse
import collections
import enum
import gzip
import json
import pathlib
import pickle
import subprocess
import warnings
import zipfile
from contextlib import suppress

import lightning.pytorch as pl
import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_files import few_tensors, save_distributed, sharded_folder
from training_runs import assert_same_bits

import merge_callback.cli.main as command_line
from merge_callback.checkpoints.load_merge import load_merge
from merge_callback.checkpoints.open import is_checkpoint_folder, open_checkpoint
from merge_callback.offline.selection import select

ADAM = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
OTHER = {"w": torch.zeros(2)}

PLACES = {
    "nanoGPT": (lambda w: {"model": w, "optimizer": ADAM, "iter_num": 3}, None),
    "PyTorch's tutorial": (lambda w: {"epoch": 1, "model_state_dict": w, "optimizer_state_dict": ADAM}, None),
    "Composer": (
        lambda w: {"state": {"model": w, "optimizers": {"Adam": ADAM}}, "rng": [{"cpu": OTHER}]},
        None,
    ),
    "DeepSpeed": (
        lambda w: {"module": w, "optimizer": ADAM, "lr_scheduler": {"x": OTHER}, "ds_version": "1"},
        None,
    ),
    "Megatron": (
        lambda w: {"model": w, "rng_state": [OTHER], "opt_param_scheduler": {}, "iteration": 2},
        None,
    ),
    "BasicSR": (lambda w: {"params_ema": w}, None),
    "statistics beside": (lambda w: {"net": w, "norm": {"mean": torch.ones(2), "std": torch.ones(2)}}, None),
    "any one name": (lambda w: {"my_best": w, "scaler": {"scale": torch.ones(1)}}, None),
    "torchvision's average": (lambda w: {"model": OTHER, "model_ema": w, "optimizer": ADAM}, "model_ema"),
    "a GAN": (lambda w: {"generator": w, "discriminator": OTHER}, "generator"),
    "two levels": (lambda w: {"model": {"encoder": w, "decoder": OTHER}}, "model.encoder"),
    "timm": (lambda w: {"state_dict": w, "state_dict_ema": OTHER, "optimizer": ADAM}, None),
}


@pytest.mark.parametrize("kind", PLACES)
def test_weights_are_found_where_one_place_fits_and_asked_for_otherwise(tmp_path, kind):
    make, key = PLACES[kind]
    path = tmp_path / "a.pt"
    torch.save(make(few_tensors()), path)
    assert_same_bits(open_checkpoint(path, state_key=key).tensors, few_tensors())
    if key is not None:
        with pytest.raises(ValueError, match=rf"a\.pt: holds several state dicts \(.*{key}.*--state-key"):
            open_checkpoint(path)


def test_a_state_key_that_is_not_there_names_those_that_are(tmp_path):
    torch.save({"model": few_tensors()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: has no entry 'ema'; state dicts are at: model"):
        open_checkpoint(tmp_path / "a.pt", state_key="ema")


def test_an_optimizer_s_file_is_no_checkpoint(tmp_path):
    torch.save(ADAM, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt: holds only training state"):
        open_checkpoint(tmp_path / "optimizer.pt")


def test_the_command_takes_a_state_key(tmp_path):
    for i in (1, 2):
        torch.save(
            {"model": OTHER, "model_ema": {"w": torch.full((2,), float(i))}}, tmp_path / f"step_{i}.pt"
        )
    output = ["--output", str(tmp_path / "m"), "--quiet", "--state-key", "model_ema"]
    assert command_line.main(["merge", str(tmp_path / "*.pt"), *output]) == 0
    assert torch.equal(open_checkpoint(tmp_path / "m").tensors["w"], torch.full((2,), 1.5))


# Objects of other classes


class Size(enum.Enum):
    SMALL = 1


class Attributes(dict):
    """What many configuration libraries make."""


class Plain:
    def __init__(self) -> None:
        self.x = torch.ones(2)


OBJECTS = {
    "a path": pathlib.PurePosixPath("/data"),
    "a namespace": argparse.Namespace(lr=1, nested=argparse.Namespace(x=2)),
    "an enum": Size.SMALL,
    "a class": torch.optim.AdamW,
    "a function": torch.nn.functional.relu,
    "numpy's float": np.float64(1),
    "numpy's array": np.ones(3),
    "numpy's generator": np.random.default_rng(0).bit_generator.state,
    "a mapping of its own": Attributes(a=1, b=Attributes(c=2)),
    "a default": collections.defaultdict(list, a=[1]),
    "a range": range(3),
    "an object": Plain(),
    "a named tuple": argparse.Namespace(size=torch.Size([2]), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_the_weights_are_no_hindrance(tmp_path, kind):
    content = {
        "state_dict": few_tensors(),
        "global_step": 7,
        "pytorch-lightning_version": "2.6",
        "hyper_parameters": {"lr": 0.1, "cfg": OBJECTS[kind], "more": [OBJECTS[kind]], "size": {"width": 4}},
    }
    torch.save(content, tmp_path / "a.ckpt")
    checkpoint = open_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint.step == 7
    assert_same_bits(checkpoint.tensors, few_tensors())


def test_a_lightning_merge_carries_the_plain_hyperparameters(tmp_path):
    content = {"state_dict": few_tensors(), "global_step": 7, "pytorch-lightning_version": pl.__version__}
    given = {
        "lr": 0.1,
        "cfg": OBJECTS["a path"],
        "size": {"width": 4, "kind": Size.SMALL, "t": torch.ones(2)},
    }
    for name in ("a", "b"):
        torch.save({**content, "hyper_parameters": given}, tmp_path / f"{name}.ckpt")
    arguments = ["merge", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"), "--as", "lightning", "--quiet"]
    with pytest.warns(UserWarning, match=r"b\.ckpt: hyperparameters of other classes"):
        assert command_line.main([*arguments, "--output", str(tmp_path / "m")]) == 0
    merged = torch.load(tmp_path / "m" / "merged.ckpt", weights_only=True)
    assert_same_bits(merged["hyper_parameters"], {"lr": 0.1, "size": {"width": 4, "t": torch.ones(2)}})


def test_a_lightning_merge_of_sharded_checkpoints_loads_into_the_module(tmp_path):
    for step in (1, 2):
        folder = save_distributed(tmp_path / f"step={step}.ckpt", {"state_dict": few_tensors()})
        meta = {"global_step": step, "pytorch-lightning_version": "2.6.1", "hyper_parameters": {"width": 4}}
        torch.save(meta, folder / "meta.pt")
    arguments = [str(tmp_path / f"step={step}.ckpt") for step in (1, 2)]
    assert command_line.main(["merge", *arguments, "--as", "lightning", "--output", str(tmp_path / "m")]) == 0
    merged = torch.load(tmp_path / "m" / "merged.ckpt", weights_only=True)
    assert merged["state_dict"].keys() == few_tensors().keys()
    assert (merged["hyper_parameters"], merged["global_step"]) == ({"width": 4}, 2)
    assert load_merge(tmp_path / "m").keys() == few_tensors().keys()


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_is_ever_run(tmp_path):
    mark = str(tmp_path / "ran")
    code = f"open({mark!r}, 'w').close()"
    for function, *arguments in [
        (exec, code),
        (eval, code),
        (subprocess.call, ["touch", mark]),
        (pathlib.Path.touch, pathlib.Path(mark)),
        (torch.load, mark),
        (np.save, mark, 3),
        (torch.save, 3, mark),
        (pathlib.Path.write_text, pathlib.Path(mark), "x"),
        (warnings.warn, mark),
    ]:
        torch.save({"state_dict": few_tensors(), "x": Call(function, *arguments)}, tmp_path / "a.ckpt")
        with suppress(ValueError):
            open_checkpoint(tmp_path / "a.ckpt")
        assert not pathlib.Path(mark).exists()


def test_an_object_for_a_weight_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save({"w": torch.ones(2), "x": Plain()}, tmp_path / "a.pt")
    torch.save({"state_dict": {"w": torch.ones(2), "x": Plain()}}, tmp_path / "b.pt")
    torch.save(Plain(), tmp_path / "c.pt")
    with pytest.raises(
        ValueError, match=r"b\.pt: 'x' is a test_foreign_files\.Plain, expected a plain tensor"
    ):
        open_checkpoint(tmp_path / "b.pt")
    with pytest.raises(
        ValueError, match=r"c\.pt: holds a test_foreign_files\.Plain, expected a state dict; save"
    ):
        open_checkpoint(tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"a\.pt: 'x' is a test_foreign_files\.Plain"):
        open_checkpoint(tmp_path / "a.pt")


# Folders of Hugging Face


def bin_folder(folder, index: bool = True):
    folder.mkdir()
    table = torch.ones(3, 2)
    shards = {
        "pytorch_model-1.bin": {"embed.weight": table, "head.weight": table},
        "pytorch_model-2.bin": few_tensors(),
    }
    if not index:
        shards = {"pytorch_model.bin": {name: t for shard in shards.values() for name, t in shard.items()}}
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    if index:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text('{"global_step": 40}')
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_a_folder_of_bin_files_is_read(tmp_path, index):
    folder = bin_folder(tmp_path / "model", index)
    checkpoint = open_checkpoint(folder)
    assert_same_bits(checkpoint.tensors, {"embed.weight": torch.ones(3, 2), **few_tensors()})
    assert (checkpoint.tied, checkpoint.step) == ({"head.weight": "embed.weight"}, 40)
    assert [path.name for path in checkpoint.extras] == ["config.json"]
    assert is_checkpoint_folder(folder)


def test_a_folder_of_bin_files_that_disagree_is_refused(tmp_path):
    folder = bin_folder(tmp_path / "model")
    torch.save({"b": torch.ones(2)}, folder / "pytorch_model-2.bin")
    with pytest.raises(ValueError, match=r"pytorch_model-2\.bin: other tensors than the index names"):
        open_checkpoint(folder)
    (folder / "pytorch_model-2.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-2\.bin is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.decoder.embed_tokens.weight", "cls.predictions.decoder.bias"]
)
def test_an_index_may_list_what_shares_the_embedding_s_weights(tmp_path, name):
    folder = sharded_folder(tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = "first.safetensors"
    path.write_text(json.dumps(index))
    assert_same_bits(open_checkpoint(folder).tensors, few_tensors())
    (folder / "config.json").write_text('{"text_config": {"tie_word_embeddings": false}}')
    with pytest.raises(ValueError, match="other tensors than the index names: missing"):
        open_checkpoint(folder)


# Other formats

OTHERS = {
    "is empty": b"",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "is a GGUF file": b"GGUF\x03\0\0\0",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "compressed by gzip": gzip.compress(b"x"),
    "compressed by Zstandard": b"\x28\xb5\x2f\xfd\0",
    "is an array of NumPy": b"\x93NUMPY\x01\0",
    "is a tar archive, as a .nemo file": b"a" + bytes(256) + b"ustar" + bytes(300),
    "is a web page": b"<!DOCTYPE html>",
    "rename it to end in .safetensors": safetensors.torch.save(few_tensors()),
    "_use_new_zipfile_serialization": pickle.dumps({"w": 3}, 2),
    "it begins with 01 02": b"\x01\x02",
}


BY_ENDING = {
    "a.onnx": "is a program of ONNX; merge the checkpoints that it was exported from",
    "flax_model.msgpack": "holds weights of Flax; load it with what wrote it",
    "ckpt-1.index": "is of a checkpoint of TensorFlow",
    "saved_model.pb": "is of TensorFlow",
}


@pytest.mark.parametrize("name", BY_ENDING)
def test_a_format_that_has_no_first_bytes_is_called_by_its_ending(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x08\x0e\x3a\x8d")
    with pytest.raises(ValueError, match=f"{name}: {BY_ENDING[name]}"):
        open_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"no checkpoints in it .*; {name} {BY_ENDING[name]}"):
        select([str(tmp_path)])


@pytest.mark.parametrize("said", OTHERS)
def test_another_format_is_called_by_its_name(tmp_path, said):
    (tmp_path / "a.pt").write_bytes(OTHERS[said])
    with pytest.raises(ValueError, match=rf"a\.pt: .*{said}"):
        open_checkpoint(tmp_path / "a.pt")


def test_another_archive_is_called_by_its_name(tmp_path):
    layer = torch.nn.Linear(2, 2)
    torch.jit.script(layer).save(tmp_path / "a.pt")
    torch.export.save(torch.export.export(layer, (torch.ones(1, 2),)), tmp_path / "d.pt2")
    np.savez(tmp_path / "b.npz", w=np.ones(2))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("run/model.ckpt", "x")
    for file, said in {
        "a.pt": "TorchScript",
        "b.npz": "NumPy",
        "d.pt2": r"a program of torch\.export; load it with torch\.export\.load",
        "c.zip": r"run/model\.ckpt, …\); unpack",
    }.items():
        with pytest.raises(ValueError, match=rf"{file}: .*{said}"):
            open_checkpoint(tmp_path / file)


def test_weights_that_lie_in_other_files_are_refused(tmp_path):
    torch.save(
        {"module": {"w": torch.empty(0)}, "ds_version": "0.15"}, tmp_path / "mp_rank_00_model_states.pt"
    )
    torch.save({"optimizer_state_dict": ADAM}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match=r"states\.pt: its tensors are empty: .*zero_to_fp32"):
        open_checkpoint(tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"DeepSpeed.s ranks hold parts of it: run its zero_to_fp32\.py"):
        open_checkpoint(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"DeepSpeed.s ranks hold parts of it: run its zero_to_fp32\.py"
    ):
        select([str(tmp_path)])
