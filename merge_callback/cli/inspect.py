"""The command ``inspect``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_callback.checkpoints.checkpoint import parse_count, read_manifest
from merge_callback.checkpoints.checksums import checksums_of_snapshot, problems
from merge_callback.checkpoints.file_names import MANIFEST, PROVENANCE
from merge_callback.checkpoints.lora import LoraAdapter
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.open import Checkpoint, open_checkpoint, verify
from merge_callback.snapshots.files import CorruptFileError, printable

_DESCRIPTION = """\
Say what a checkpoint holds: its format, files, tensors, step and tokens; of a merge also the method and the
weight of each merged snapshot; of a run's window every snapshot in it. All bytes are read, to compare them
with the checksums that were recorded. Exit status 1 if one differs."""

_EXAMPLES = """\
examples:
  merge-callback inspect lightning_logs/version_0/merges/latest
  merge-callback inspect lightning_logs/version_0/merges/window
  merge-callback inspect pytorch_model.bin --tensors
"""


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``inspect``."""
    parser.set_defaults(run=_inspect)
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="a checkpoint, a snapshot, a merge, or a run's window/")
    add("--state-key", metavar="KEY", help="where in the file the weights are, e.g. 'model_ema'")
    add("--tensors", action="store_true", help="list the name, dtype and shape of every tensor, too")


def _inspect(parsed: argparse.Namespace) -> int:
    if (parsed.path / MANIFEST).is_file():
        return _inspect_window(parsed.path)
    checkpoint = open_checkpoint(parsed.path, state_key=parsed.state_key, dequantise=False)
    merged = (parsed.path / PROVENANCE).exists()
    for line in (*_layout(checkpoint), *(read_record(parsed.path).lines() if merged else [])):
        print(printable(line))
    if parsed.tensors:
        for name, tensor in checkpoint.tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            print(f"  {printable(name):60} {dtype:10} {list(tensor.shape)}")
    return _told(verify(checkpoint))


def _told(found: list[str] | None) -> int:
    """Tells how the checksums compare; returns the exit status."""
    if not found:
        print(f"checksums    {'none recorded' if found is None else 'verified'}")
    for problem in found or ():
        print(printable(f"problem      {problem}"))
    return 1 if found else 0


def _inspect_window(folder: Path) -> int:
    """Lists the snapshots of a window, oldest first."""
    records = read_manifest(folder).snapshots
    print(f"window       {len(records)} snapshots, oldest first")
    files = []
    for record in records:
        own = _files_of(folder, record)
        files += own
        step, tokens = parse_count(record.get("step")), parse_count(record.get("tokens"))
        size = sum(file.stat().st_size for file in own if file.exists())
        notes = [f"the difference to step {record['difference_to']}"] * bool(record.get("difference_to"))
        notes += ["in a loss spike"] * (record.get("in_spike") is True)
        counted = "" if tokens is None else f"{tokens:,} tokens  "
        line = f"step {step or 0:<10,} {counted}lr {record.get('lr')!s:.8}  {record.get('phase')}"
        print(printable(f"  {line}  {size / 1e6:,.1f} MB  {', '.join(notes)}".rstrip()))
    return _told(problems([], checksums_of_snapshot(list(dict.fromkeys(files)))))


def _files_of(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """The files of a snapshot, one or one of each rank, and of what it has in common with others.

    Raises:
        CorruptFileError: if the record names something else.
    """
    found: list[Path] = []
    for name in filter(None, (record.get("file"), record.get("frozen"))):
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptFileError(f"{folder / MANIFEST}: lists {name!r:.100}, expected the name of a file")
        path = folder / name
        found += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return found


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
