"""What a command that writes would do: what it would read, merge and write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from merge_callback.checkpoints.file_names import MERGED_CKPT, METADATA
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.engine.plan import in_bytes
from merge_callback.merging import LinearMethod
from merge_callback.offline.file_merge import FileMerge
from merge_callback.offline.job import Job
from merge_callback.offline.merge_adapters import opened_adapters
from merge_callback.offline.merge_files import output_files, with_prefix
from merge_callback.offline.optimizer_states import comparable
from merge_callback.offline.output_folder import OutputFolder
from merge_callback.snapshots.files import printable

HELP = "only say what would be read, merged and written, with sizes"


def tell_dry(lines: Iterable[str]) -> int:
    """Prints what would be done, on one of several processes; returns the exit status."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    for line in lines:
        print(printable(line))
    print("nothing was written")
    return 0


def of_merge(job: Job, output: Path) -> Iterator[str]:
    """What ``merge`` would do; the checkpoints are opened and compared, as far as that takes no room.

    Raises:
        ValueError, OSError: as the merge itself.
    """
    paths = [*job.method.select(job.checkpoints), *([] if job.base is None else [job.base])]
    OutputFolder(output, job.force, paths).check()
    yield from reads(paths)
    if opened_adapters(job.checkpoints):
        yield f"would merge LoRA adapters by {job.method!r}"
        yield f"would write {output}, {_room(output)}"
        return
    merging = compared(job)
    if merging is None:
        yield f"would put distributed checkpoints together, compare and merge them by {job.method!r}"
        yield f"would write {output}, {_room(output)}"
        return
    yield f"would merge {len(merging.newest.tensors)} tensors by {job.method!r}"
    if isinstance(job.method, LinearMethod) and job.base is None:
        weights = ", ".join(f"{weight:.4g}" for weight in job.method.weights_along(merging.trajectory))
        yield f"  weights, oldest first: {weights}"
    shards, _, _ = output_files(merging)
    sizes = {name: sum(t.nbytes for t in shard.values()) for name, shard in shards.items()}
    if job.optimizer_state:
        comparable(merging)
        yield "would merge the moments of the optimizers with the same weights"
        sizes = {MERGED_CKPT: size_of(merging.newest.path)}
    elif job.kind == "lightning":
        sizes = {MERGED_CKPT: sum(sizes.values())}
    for name, size in sizes.items():
        yield f"would write {output / name}, {in_bytes(size)}"
    if job.kind != "lightning" and merging.newest.extras:
        yield f"would copy {', '.join(path.name for path in merging.newest.extras)}"
    yield _room(output)


def compared(job: Job) -> FileMerge | None:
    """The merge, whose checkpoints are opened and compared; ``None`` if that takes room on the disk.

    Raises:
        ValueError, OSError: as the merge itself.
    """
    paths = [*job.method.select(job.checkpoints), *([] if job.base is None else [job.base])]
    if any((path / METADATA).is_file() for path in paths):  # distributed ones are put together first
        return None
    opened = [open_checkpoint(path, state_key=job.state_key) for path in paths]
    checkpoints, base = (opened, None) if job.base is None else (opened[:-1], opened[-1])
    return FileMerge(with_prefix(job, checkpoints[-1]), checkpoints, base)


def reads(paths: Sequence[Path]) -> Iterator[str]:
    """A line for each checkpoint that would be read, with its size."""
    for path in paths:
        yield f"would read {path}, {in_bytes(size_of(path))}"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(found.stat().st_size for found in path.rglob("*") if found.is_file())


def _room(output: Path) -> str:
    above = next(folder for folder in Path(os.path.abspath(output)).parents if folder.is_dir())
    return f"{in_bytes(shutil.disk_usage(above).free)} are free there"
