"""A merge is a folder of the kind that was merged: the same files, but for other weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import few_tensors
from safetensors.torch import load_file, save_file

from merge_callback import load_merge
from merge_callback.cli.main import main

TAKEN = [
    "config.json",
    "tokenization_own.py",
    "own.vocab",
    "LICENSE",
    "README.md",
    "code/__init__.py",
    "1_Pooling/config.json",
]
LEFT = [
    "optimizer.pt",
    "trainer_state.json",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "runs/events.out.tfevents.1",
    ".git/config",
]


pytestmark = pytest.mark.usefixtures("in_this_process")


def model_folders(root: Path, weights: str = "model.safetensors", files=("config.json",)) -> list[Path]:
    """Two checkpoints of a model, one step apart, with the same files beside the weights."""
    folders = [root / f"checkpoint-{step}" for step in (1, 2)]
    for step, folder in enumerate(folders):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps({"step": step}))
        save_file(few_tensors() | {"w": torch.full((4,), float(step))}, folder / weights)
    return folders


def merge(*arguments) -> int:
    return main(["merge", "--quiet", *map(str, arguments)])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def here(name: str) -> str:
    """What a file is called beside the merge, which has a card of its own."""
    return "README.original.md" if name == "README.md" else name


def test_every_file_that_is_no_weights_is_taken_along_and_the_others_are_named(tmp_path, capsys):
    folders = model_folders(tmp_path, files=[*TAKEN, *LEFT])
    assert merge(*folders, "--output", tmp_path / "out") == 0
    assert names(tmp_path / "out") == {"model.safetensors", "merge.json", "README.md", *map(here, TAKEN)}
    for name in TAKEN:
        assert (tmp_path / "out" / here(name)).read_bytes() == (folders[1] / name).read_bytes()
    told = capsys.readouterr().err
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["left_out"].keys() == {name.partition("/")[0] for name in LEFT}
    assert all(name in told for name in record["left_out"])
    assert main(["inspect", str(tmp_path / "out")]) == 0
    (tmp_path / "out/1_Pooling/config.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "out")]) == 1


def test_a_merge_with_sub_folders_is_replaced_and_nothing_else(tmp_path, capsys):
    folders = model_folders(tmp_path, files=TAKEN)
    arguments = [*folders, "--output", tmp_path / "out", "--force"]
    assert merge(*arguments) == merge(*arguments) == 0
    assert names(tmp_path / "out") == {"model.safetensors", "merge.json", "README.md", *map(here, TAKEN)}
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "out/code/mine.py").write_text("")
    capsys.readouterr()
    assert merge(*arguments) == 1
    assert "holds 'code/mine.py', which is no part of the merge" in capsys.readouterr().err
    (tmp_path / "out/code/mine.py").unlink()
    (tmp_path / "out/code/empty").mkdir()
    assert merge(*arguments) == 1
    assert (tmp_path / "out/code/empty").is_dir()


@pytest.mark.parametrize(
    "weights",
    [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.fp16.safetensors",
        "model.safetensors",
    ],
)
def test_the_weights_keep_their_file_s_name(tmp_path, weights):
    folders = model_folders(tmp_path, weights)
    assert merge(*folders, "--output", tmp_path / "out") == 0
    assert names(tmp_path / "out") == {weights, "config.json", "merge.json", "README.md"}
    assert torch.equal(load_file(tmp_path / "out" / weights)["w"], torch.full((4,), 0.5))
    assert torch.equal(load_merge(tmp_path / "out")["w"], torch.full((4,), 0.5))
    assert merge(*folders, "--output", tmp_path / "split", "--shard-size", 60) == 0
    stem, index = weights.removesuffix(".safetensors"), "model.safetensors.index.json"
    assert any(name.startswith(f"{stem}-00001-of-") for name in names(tmp_path / "split"))
    if stem.endswith("fp16"):
        index = "model.safetensors.index.fp16.json"
    assert any(name.endswith(index) for name in names(tmp_path / "split"))
    assert torch.equal(load_merge(tmp_path / "split")["w"], torch.full((4,), 0.5))


@pytest.mark.parametrize("index", ["", "diffusion_py", "fp16"])
def test_shards_and_their_index_are_those_of_the_checkpoints(tmp_path, index):
    name = {
        "": "model.safetensors.index.json",
        "diffusion_py": "diffusion_pytorch_model.safetensors.index.json",
        "fp16": "diffusion_pytorch_model.safetensors.index.fp16.json",
    }[index]
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    for folder in folders:
        folder.mkdir()
        tensors = few_tensors()
        shards = {"a-00001-of-00002.safetensors": ["mask", "a.weight"]}
        shards["a-00002-of-00002.safetensors"] = [n for n in tensors if n not in ("mask", "a.weight")]
        for file, inside in shards.items():
            save_file({n: tensors[n] for n in inside}, folder / file)
        weight_map = {n: file for file, inside in shards.items() for n in inside}
        (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    assert merge(*folders, "--output", tmp_path / "out") == 0
    assert names(tmp_path / "out") == {name, *shards, "merge.json", "README.md"}
    for file, inside in shards.items():
        assert set(load_file(tmp_path / "out" / file)) == set(inside)
    assert json.loads((tmp_path / "out" / name).read_text())["weight_map"] == weight_map


def test_what_links_out_of_the_folder_is_not_taken_and_told(tmp_path, capsys):
    folders = model_folders(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("secret")
    (folders[1] / "notes.txt").symlink_to(tmp_path / "secret/key")
    (folders[1] / "code").symlink_to(tmp_path / "secret")
    (folders[1] / "deep").mkdir()
    (folders[1] / "deep/key").symlink_to(tmp_path / "secret/key")
    os.mkfifo(folders[1] / "pipe.txt")
    assert merge(*folders, "--output", tmp_path / "out") == 0
    assert names(tmp_path / "out") == {"model.safetensors", "config.json", "merge.json", "README.md"}
    told = capsys.readouterr().err
    for name in ("notes.txt", "code", "deep", "pipe.txt"):
        assert name in told


def test_links_of_a_download_cache_are_taken_as_files(tmp_path):
    blobs = model_folders(tmp_path / "repo", files=TAKEN)
    snapshots = []
    for i, source in enumerate(blobs):
        (tmp_path / "repo/blobs").mkdir(exist_ok=True)
        snapshots.append(tmp_path / f"repo/snapshots/{i}")
        for name in names(source):
            blob = tmp_path / "repo/blobs" / f"{i}-{name.replace('/', '-')}"
            (source / name).rename(blob)
            (snapshots[-1] / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshots[-1] / name).symlink_to(os.path.relpath(blob, (snapshots[-1] / name).parent))
    assert merge(*snapshots, "--output", tmp_path / "out") == 0
    assert names(tmp_path / "out") == {"model.safetensors", "merge.json", "README.md", *map(here, TAKEN)}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("listing", "content", "part"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "unet"),
        ("modules.json", [{"path": ""}, {"path": "2_Dense"}], "2_Dense"),
    ],
)
def test_a_model_of_several_models_says_to_merge_each(tmp_path, capsys, listing, content, part):
    folders = model_folders(tmp_path)
    for folder in folders:
        (folder / listing).write_text(json.dumps(content))
        (folder / part).mkdir()
        save_file({"w": torch.ones(2)}, folder / part / "diffusion_pytorch_model.safetensors")
    for given in (folders, [f"{tmp_path}/checkpoint-*"]):
        assert merge(*given, "--output", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"with --output merged/{part}" in error
    assert merge(*(f / part for f in folders), "--output", tmp_path / "merged" / part) == 0


def test_two_variants_and_no_plain_weights_are_a_question(tmp_path, capsys):
    folders = model_folders(tmp_path, "model.fp16.safetensors")
    for folder in folders:
        save_file({"w": torch.ones(2)}, folder / "model.bf16.safetensors")
    assert merge(*folders, "--output", tmp_path / "out") == 1
    assert "move away all but one, or give a file" in capsys.readouterr().err


def test_a_lightning_merge_is_loaded_by_load_merge(tmp_path):
    for i in (1, 2):
        tied = torch.full((2,), float(i))
        torch.save({"state_dict": {"a": tied, "b": tied}}, tmp_path / f"step={i}.ckpt")
    assert merge(tmp_path, "--as", "lightning", "--output", tmp_path / "out") == 0
    merged = load_merge(tmp_path / "out")
    assert {name: value.tolist() for name, value in merged.items()} == {"a": [1.5, 1.5], "b": [1.5, 1.5]}
