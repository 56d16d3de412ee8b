"""A file of each format that is read, made by the library whose format it is, and what it was made from."""

from pathlib import Path

import mutated_files
import pytest
import torch
from accelerate import Accelerator
from checkpoint_files import save_distributed
from safetensors.torch import save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from training_runs import Classifier, assert_same_bits, loader, train
from transformers import GPT2Config, GPT2LMHeadModel

from merge_callback import CheckpointMergeCallback, SmaSince
from merge_callback.checkpoints.open import is_checkpoint_folder, open_checkpoint, recorded_step
from merge_callback.checkpoints.registry import READERS, reader_of
from merge_callback.cli.main import main


class Tied(nn.Module):
    """Two layers with one weight, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last.weight = self.first.weight


def distributed(folder: Path):
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model.last(model.norm(model.first(torch.ones(4, 4)))).sum().backward()
    optimizer.step()
    untied = {name: t for name, t in model.state_dict().items() if name != "last.weight"}
    state = {"model": untied, "optim": get_optimizer_state_dict(model, optimizer)}
    return save_distributed(folder / "step-5", state), untied


def kept_by_ranks(folder: Path):
    return folder / mutated_files.shared_out(folder), {
        "embed.weight": mutated_files.tensors()["embed.weight"]
    }


def lightning_merge(folder: Path):
    weights = Tied().state_dict()
    for step in (3, 5):
        torch.save({"state_dict": weights, "global_step": step}, folder / f"step={step}.ckpt")
    assert main(["merge", f"{folder}/*.ckpt", "--as", "lightning", "--output", f"{folder}/m", "--quiet"]) == 0
    return folder / "m", weights


def accelerate(folder: Path):
    Accelerator(cpu=True).save_model(Tied(), folder / "checkpoint-5", 200, safe_serialization=False)
    return folder / "checkpoint-5", Tied().state_dict()


def transformers(folder: Path):
    config = GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder / "checkpoint-5", max_shard_size=300)
    return folder / "checkpoint-5", {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}


def safetensors(folder: Path):
    save_model(Tied(), folder / "step=5.safetensors")
    return folder / "step=5.safetensors", Tied().state_dict()


def lightning(folder: Path):
    module = Classifier()
    train(module, data=loader(), max_steps=5).save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt", module.state_dict()


def averaged(folder: Path):
    module = Classifier()
    callback = CheckpointMergeCallback(every_n_steps=5, dirpath=folder / "m", running=[SmaSince(step=4)])
    train(module, callback, data=loader(), max_steps=5)
    (path,) = (folder / "m/window").glob("running-*")
    return path, module.state_dict()


EXAMPLES = {
    "dcp": distributed,
    "sharded-snapshot": kept_by_ranks,
    "running-average": averaged,
    "lightning-merge": lightning_merge,
    "bin-folder": accelerate,
    "safetensors-folder": transformers,
    "safetensors": safetensors,
    "pytorch": lightning,
}


def test_every_format_has_an_example():
    assert [reader.name for reader in READERS] == list(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_its_library_wrote_is_read_to_the_last_bit_and_by_one_reader_only(name, tmp_path):
    path, expected = EXAMPLES[name](tmp_path)

    reader, checkpoint = reader_of(path), open_checkpoint(path, tmp_path)

    assert reader.name == name
    assert is_checkpoint_folder(path) == path.is_dir()
    tied = {alias: checkpoint.tensors[kept] for alias, kept in checkpoint.tied.items()}
    assert_same_bits(checkpoint.tensors | tied, dict(expected))
    assert recorded_step(path) == checkpoint.step == (10 if name == "sharded-snapshot" else 5)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "sharded-snapshot"])
def test_two_of_them_are_merged(name, tmp_path):
    path, expected = EXAMPLES[name](tmp_path)
    checkpoint = open_checkpoint(path, tmp_path)
    negative = {n: -t if t.is_floating_point() else t for n, t in checkpoint.tensors.items()}
    torch.save(negative | {a: negative[kept] for a, kept in checkpoint.tied.items()}, tmp_path / "other.pt")
    arguments = [str(path), str(tmp_path / "other.pt"), "--weights", "0.25", "0.75", "--keep-all"]
    assert main(["merge", "--keep-order", *arguments, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    merged = open_checkpoint(tmp_path / "out").tensors
    for key, tensor in merged.items():
        torch.testing.assert_close(
            tensor, -0.5 * expected[key] if tensor.is_floating_point() else expected[key]
        )
