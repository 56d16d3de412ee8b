"""What it costs to open checkpoint files."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from checkpoint_files import entry, in_subprocess, save_distributed
from safetensors.torch import save_file

from merge_callback.offline.checkpoint import open_checkpoint

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
