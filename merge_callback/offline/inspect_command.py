"""The command ``inspect``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from merge_callback.offline.checkpoint import Checkpoint, open_checkpoint, verify
from merge_callback.publish.emission import PROVENANCE


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``inspect``."""
    parser.set_defaults(run=_inspect)
    parser.add_argument("path", type=Path, help="a checkpoint, a snapshot, an emission")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def _inspect(parsed: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(parsed.path)
    for line in (*_layout(checkpoint), *_provenance(parsed.path)):
        print(line)
    if parsed.tensors:
        for name, tensor in checkpoint.tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            print(f"  {name:60} {dtype:10} {list(tensor.shape)}")
    problems = verify(checkpoint)
    if not problems:
        print(f"checksums    {'none recorded' if problems is None else 'verified'}")
    for problem in problems or ():
        print(f"problem      {problem}")
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
    if checkpoint.tied:
        lines.append(f"shared       {', '.join(f'{a} = {kept}' for a, kept in checkpoint.tied.items())}")
    if checkpoint.step is not None:
        tokens = "" if checkpoint.tokens is None else f", {checkpoint.tokens:,} tokens"
        lines.append(f"step         {checkpoint.step:,}{tokens}")
    return lines


def _provenance(path: Path) -> list[str]:
    record = path / PROVENANCE
    if not record.is_file():
        return []
    content: dict[str, Any] = json.loads(record.read_text())
    method = content["method"]
    lines = [f"method       {method['name']} {method['options']} ({method['reference']})"]
    weights = content.get("weights")
    for i, source in enumerate(content.get("inputs") or content.get("snapshots") or []):
        weight = source.get("weight", weights[i] if weights else None)
        share = "" if weight is None else f"weight {weight:.4f}  "
        lines.append(f"  merged     {share}{source.get('path') or 'snapshot'} (step {source.get('step')})")
    return lines
