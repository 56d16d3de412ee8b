"""The demo's text and batches."""

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from merge_callback.demo import DemoData, load_corpus
from merge_callback.demo.crops import RandomCrops
from merge_callback.demo.text import SKIPPED_FOLDERS, split_files

# Text


def write_sources(root: Path, names: list[str], size: int = 20_000) -> Path:
    """Writes files that each consist of their own name, over and over."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((name + "\n") * (size // len(name)))
    return root


def test_text_does_not_depend_on_the_order_of_the_folder(tmp_path):
    names = [f"package{i % 3}/module{i}.py" for i in range(200)]
    first = load_corpus(root=write_sources(tmp_path / "a", names))
    second = load_corpus(root=write_sources(tmp_path / "b", names[::-1]))
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)


def test_every_file_is_in_one_half_only(tmp_path):
    names = [f"module_{i:03}.py" for i in range(200)]
    corpus = load_corpus(root=write_sources(tmp_path, names))
    halves = [bytes(part.tolist()).decode().splitlines() for part in corpus]
    train, validation = (set(lines) & set(names) for lines in halves)
    assert train | validation == set(names)
    assert not train & validation


def test_text_is_the_library_s_own_and_capped():
    root = Path(json.__file__).parent.parent
    folders = {part for path, _ in split_files(root) for part in path.relative_to(root).parts[:-1]}
    assert folders
    assert not folders & SKIPPED_FOLDERS
    corpus = load_corpus(max_bytes=3_000_000)
    assert 3_000_000 <= sum(map(len, corpus)) < 4_000_000


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found 0 bytes .* ships its standard library"):
        load_corpus(root=tmp_path)


# Data


def small_loader(**changes) -> RandomCrops:
    options = {"batch_size": 3, "context": 8, "batches": 5, "key": (0, 0)}
    return RandomCrops(torch.arange(256, dtype=torch.uint8).repeat(4), **{**options, **changes})


def test_labels_are_the_inputs_one_byte_later():
    batch = next(iter(small_loader()))
    assert batch["input_ids"].shape == (3, 8)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal((batch["input_ids"] + 1) % 256, batch["labels"])


def test_loader_continues_where_it_was_saved():
    loader = small_loader()
    unbroken = [batch["input_ids"] for _ in range(2) for batch in loader]
    loader = small_loader()
    for _, _ in zip(range(3), loader, strict=False):
        state = loader.state_dict()
    resumed = small_loader()
    resumed.load_state_dict(state)
    assert len(unbroken) == 10
    for expected, batch in zip(unbroken[3:], resumed, strict=False):
        assert torch.equal(expected, batch["input_ids"])


def of_two_processes(rank: int) -> DemoData:
    data = DemoData(batch_size=4, validation_batches=3)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    data.setup("fit")
    return data


@pytest.mark.parametrize("crops", [DemoData.train_dataloader, DemoData.val_dataloader])
def test_processes_share_the_batches_of_one_process_evenly(crops):
    alone = DemoData(batch_size=4, validation_batches=3)
    alone.setup("fit")
    whole, *shares = (
        [crop.tolist() for batch in islice(crops(data), 6) for crop in batch["input_ids"]]
        for data in (alone, of_two_processes(0), of_two_processes(1))
    )
    first, second = (share[: len(whole) // 2] for share in shares)
    assert [crop for pair in zip(first, second, strict=True) for crop in pair] == whole


def test_validation_is_the_same_every_time():
    data = DemoData(validation_batches=3)
    data.setup("fit")
    loader = data.val_dataloader()
    assert len(loader) == 3
    for once, again in zip(loader, loader, strict=True):
        assert torch.equal(once["input_ids"], again["input_ids"])
