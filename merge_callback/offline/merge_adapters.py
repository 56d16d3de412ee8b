"""Merging LoRA adapters: what they add to the base is merged, never their factors apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from merge_callback.checkpoints.file_names import ADAPTER_CONFIG
from merge_callback.checkpoints.lora import LoraAdapter, adapters_of, plain
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.offline.adapter_merge import AdapterMerge
from merge_callback.offline.adapter_output import IntoAdapter, IntoBase
from merge_callback.offline.job import Job
from merge_callback.offline.output import ModelFiles, write_record
from merge_callback.offline.output_folder import OutputFolder
from merge_callback.offline.workers import each, numbers


def opened_adapters(paths: Sequence[Path]) -> list[LoraAdapter]:
    """The LoRA adapters that checkpoints are; empty if the last one is none.

    Raises:
        ValueError: if only some are, or one can't be merged.
        OSError: if a file can't be read.
    """
    # Only then are they opened: what is put together from many files, or dequantised, takes minutes.
    newest = paths[-1]
    folder = newest if newest.is_dir() else newest.parent
    return adapters_of([*map(open_checkpoint, paths)]) if (folder / ADAPTER_CONFIG).exists() else []


@torch.no_grad()
def merge_adapters(job: Job, adapters: Sequence[LoraAdapter], output: Path) -> dict[str, Any]:
    """Merges LoRA adapters into one, or into the base model, in a new folder.

    A method is applied to ``ΔW = s B A`` of each layer, with θ_init = 0 if it is one on task vectors. The
    result of a linear one is the adapter of all factors side by side, exactly, or with ``job.rank`` the
    nearest of that rank. Others are computed on dense ``ΔW``, one layer at a time. Tensors that replace the
    base's (``modules_to_save``) are merged as they are.

    Args:
        job: what and how; ``kind`` is ``"model"`` for the base with ``ΔW`` added, else an adapter is made.
        adapters: the checkpoints of the job.
        output: the folder.

    Returns:
        What ``merge.json`` in it says, with each layer's relative error ``‖stored − exact‖_F / ‖exact‖_F``.

    Raises:
        ValueError: for adapters that don't belong together, or not to the base; values that are not finite;
            options that don't fit. The layer is named, and nothing is written.
        FileExistsError, OSError: as ``merge_files``.
    """
    sources = [a.checkpoint.path for a in adapters]
    folder = OutputFolder(output, job.force, [*sources, *([] if job.base is None else [job.base])])
    with folder.draft() as draft:
        base = None if job.base is None else open_checkpoint(job.base, draft, job.state_key)
        everything = [*(adapter.checkpoint for adapter in adapters), *([] if base is None else [base])]
        folder.add_sources(path for source in everything for path in (*source.files, *source.extras))
        merging = AdapterMerge(job, adapters, base)
        writing = IntoBase(merging) if job.kind == "model" else IntoAdapter(merging)
        job.begun()
        files = writing.files(draft)
        errors = _run(writing, files, job)
        checksums = files.finish() | writing.finish(draft)
        record = {
            **merging.record(),
            "lora": {"rank": job.rank, "relative_error": errors},
            "tied": writing.tied,
            "files": checksums,
            "left_out": dict(writing.like.left_out),
        }
        record = write_record(draft, record, writing.like.path)
    return record


def _run(writing: IntoAdapter | IntoBase, files: ModelFiles, job: Job) -> dict[str, float]:
    """Merges layer by layer, each in a process of its own; returns their relative errors."""
    parts = writing.parts()
    errors = numbers(parts)

    def merge(part: str) -> None:
        errors[part].fill_(writing.write(part, [files.tensors[name] for name in parts[part]]))

    sizes = {part: sum(files.tensors[name].nbytes for name in names) for part, names in parts.items()}
    bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=not job.progress)
    with bar, closing(each(merge, sizes, job.workers)) as merged:
        for part in merged:
            for name in parts[part]:
                files.done(name)
            bar.update(sizes[part])
    return {plain(part): float(errors[part]) for part in parts if part in writing.merging.layers}
