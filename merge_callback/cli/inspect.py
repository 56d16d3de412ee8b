"""The command ``inspect``."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from merge_callback.checkpoints.file_names import PROVENANCE
from merge_callback.checkpoints.lora import LoraAdapter
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.open import Checkpoint, open_checkpoint, verify
from merge_callback.snapshots.files import printable


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``inspect``."""
    parser.set_defaults(run=_inspect)
    parser.add_argument("path", type=Path, help="a checkpoint, a snapshot, an emission")
    parser.add_argument("--state-key", metavar="KEY", help="where in the file the weights are")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def _inspect(parsed: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(parsed.path, state_key=parsed.state_key, dequantise=False)
    merged = (parsed.path / PROVENANCE).exists()
    for line in (*_layout(checkpoint), *(read_record(parsed.path).lines() if merged else [])):
        print(printable(line))
    if parsed.tensors:
        for name, tensor in checkpoint.tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            print(f"  {printable(name):60} {dtype:10} {list(tensor.shape)}")
    problems = verify(checkpoint)
    if not problems:
        print(f"checksums    {'none recorded' if problems is None else 'verified'}")
    for problem in problems or ():
        print(printable(f"problem      {problem}"))
    return 1 if problems else 0


def _layout(checkpoint: Checkpoint) -> list[str]:
    tensors = checkpoint.tensors.values()
    count = sum(t.numel() for t in tensors)
    dtypes = Counter[str]()
    for tensor in tensors:
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    sizes = ", ".join(f"{size / 1e6:,.1f} MB {dtype}" for dtype, size in dtypes.most_common())
    lines = [
        f"format       {checkpoint.format}",
        f"files        {', '.join(path.name for path in checkpoint.files)}",
        f"tensors      {len(checkpoint.tensors)} with {count:,} values: {sizes}",
    ]
    if adapter := LoraAdapter.of(checkpoint):
        ranks = sorted({layer.matrix.rank for layer in adapter.layers.values()})
        scales = sorted({layer.matrix.scale for layer in adapter.layers.values()})
        lines.append(
            f"adapter      LoRA of {len(adapter.layers)} layers, rank {', '.join(map(str, ranks))}, scale "
            f"{', '.join(f'{scale:g}' for scale in scales)}; {len(adapter.whole)} tensors replace the base's"
        )
    if checkpoint.tied:
        lines.append(f"shared       {', '.join(f'{a} = {kept}' for a, kept in checkpoint.tied.items())}")
    if checkpoint.step is not None:
        tokens = "" if checkpoint.tokens is None else f", {checkpoint.tokens:,} tokens"
        lines.append(f"step         {checkpoint.step:,}{tokens}")
    return lines
