"""What several ranks publish, and what one process makes of their files afterwards."""

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import UnevenModule, fit, run_jobs
from lightning.pytorch.callbacks import LambdaCallback
from training_runs import assert_same_bits

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.checkpoints.open import open_checkpoint, verify
from merge_callback.snapshots.safetensors_file import CorruptFileError


def publish(strategy: str, folder: Path, **options) -> None:
    merging = CheckpointMergeCallback(
        window=4, every_n_steps=2, count_tokens=len, method="sma", dirpath=folder, **options
    )
    fit(strategy, UnevenModule(), merging)


RUNS = {
    "ddp": {},
    "fsdp2": {},
    "fsdp1": {},
    "ddp in files": {"max_shard_size": 300},
    "fsdp2 as dcp": {"format": "dcp"},
    "fsdp1 as dcp": {"format": "dcp"},
    "ddp as dcp": {"format": "dcp"},
    "fsdp2 as bf16": {"snapshot_dtype": "bf16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every run's folder: on two ranks, and alone under ``<name> alone``."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = {
        name: (publish, {"strategy": name.split()[0], "folder": folder / name, **options})
        for name, options in RUNS.items()
    }
    run_jobs(2, jobs, timeout=300)
    publish("alone", folder / "alone")
    publish("alone", folder / "alone as bf16", snapshot_dtype="bf16")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_ranks_publish_what_one_process_does(folder, name):
    alone = folder / ("alone as bf16" if "bf16" in name else "alone")
    found, expected = load_merge(folder / name / "latest"), load_merge(alone / "latest")

    assert_same_bits(found, expected)


def test_a_merge_in_several_files_is_written_as_one_process_writes_it(folder):
    files = sorted((folder / "ddp in files" / "latest").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 300 + 4200 for file in files)  # a page of header


def test_every_rank_writes_its_own_part_for_distributed_checkpointing(folder):
    published = folder / "fsdp2 as dcp" / "latest"
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= {path.name for path in published.iterdir()}
    record = json.loads((published / "merge.json").read_text())
    assert record["files"].keys() == {"__0_0.distcp", "__1_0.distcp", ".metadata", "README.md"}
    assert record["method"]["name"] == "sma"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp1"])
def test_a_snapshot_of_several_ranks_opens_offline(folder, name):
    found = sorted((folder / name / "window").glob("step=*"))[-1]
    alone = sorted((folder / "alone" / "window").glob("step=*"))[-1]
    checkpoint, expected = open_checkpoint(found), open_checkpoint(alone)
    assert_same_bits(checkpoint.tensors, {name: expected.tensors[name] for name in checkpoint.tensors})
    assert checkpoint.tensors.keys() == expected.tensors.keys()
    assert (checkpoint.format, checkpoint.step) == ("snapshot", 12)
    assert not verify(checkpoint)


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "lie", "escape"])
def test_a_damaged_snapshot_of_several_ranks_is_refused(folder, tmp_path, damage):
    original = sorted((folder / "fsdp2" / "window").glob("step=*"))[-1]
    copy = tmp_path / original.name
    copy.mkdir()
    for path in original.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    file, listing = copy / "rank-00001-of-00002.safetensors", copy / "shards.json"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-8])
    elif damage == "lose":
        file.unlink()
    else:
        files = json.loads(listing.read_text())["files"]
        listed = [*files][:1] if damage == "lie" else ["../" + name for name in files]
        listing.write_text(json.dumps({"files": {name: next(iter(files.values())) for name in listed}}))
    with pytest.raises((CorruptFileError, FileNotFoundError), match=r"rank-00001|shards\.json|holds"):
        open_checkpoint(copy)


def test_each_rank_keeps_half_of_a_model_of_some_size(tmp_path):
    found = run_jobs(2, {s: (share_of_the_window, {"strategy": s, "folder": tmp_path / s}) for s in BIG})
    for name, ranks in found.items():
        whole = sum(size for size, _ in ranks)
        assert whole == ranks[0][1], name  # nothing is kept twice
        assert all(abs(size / (whole / 2) - 1) < 0.05 for size, _ in ranks), name


BIG = ("ddp", "fsdp2", "fsdp1")


def share_of_the_window(strategy: str, folder: Path) -> tuple[int, int]:
    """Bytes of one snapshot here, and of the whole model."""

    class Big(UnevenModule):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(40, 6 * 512)
            self.squeeze = torch.nn.Linear(6 * 512, 6)
            self.head = torch.nn.Linear(6, 13)

        def forward(self, tokens):
            return self.head(self.features(self.squeeze(self.embedding(tokens))))

    merging = CheckpointMergeCallback(window=2, every_n_steps=2, dirpath=folder, evaluate=False)
    stores = []
    note = LambdaCallback(on_train_batch_start=lambda *_: stores.append(merging.session.window.store))
    fit(strategy, Big(), merging, note, max_steps=4)
    return stores[-1].layout.nbytes, stores[-1].whole.nbytes
