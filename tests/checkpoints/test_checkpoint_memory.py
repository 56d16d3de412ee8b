"""What it costs to open checkpoint files."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from checkpoint_files import entry, in_subprocess, save_distributed
from safetensors.torch import save_file

from merge_callback.checkpoints.open import open_checkpoint

# What it costs


PEAKS = """
import sys, pathlib, threading, torch, torch.distributed.checkpoint
from merge_callback.checkpoints.open import open_checkpoint

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

folder = pathlib.Path(sys.argv[1])
for name in ("big.pt", "big.safetensors", "big.dcp"):
    before = peak = anonymous()
    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    tensors = open_checkpoint(folder / name, folder).tensors
    total = sum(float(tensor.sum()) for tensor in tensors.values())
    done.set()
    watcher.join()
    print(total, max(peak, anonymous()) - before)
"""


def test_opening_a_large_file_takes_no_memory_but_for_one_chunk_of_a_distributed_one(tmp_path):
    tensors = {f"layer{i}": torch.full((5_000_000,), float(i)) for i in range(6)}  # 19 MiB each
    torch.save(tensors, tmp_path / "big.pt")
    save_file(tensors, tmp_path / "big.safetensors")
    save_distributed(tmp_path / "big.dcp", {"model": {n: tensors[n] for n in list(tensors)[:3]}})
    lines = [map(float, line.split()) for line in in_subprocess(PEAKS, tmp_path).splitlines()]
    totals, peaks = zip(*lines, strict=True)
    assert list(totals) == [sum(range(n)) * 5e6 for n in (6, 6, 3)]
    # Half a tensor's slack each. Measured, in MiB: 0.1, 0.0 and 19.3.
    assert max(peaks[:2]) < 10, peaks
    assert peaks[2] < 30, peaks


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
