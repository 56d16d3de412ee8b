"""Merging checkpoint files tensor by tensor: models of any size, in a few megabytes of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.file_names import CONFIG
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.checkpoints.safetensors_shards import shard_names
from merge_callback.offline.file_merge import FileMerge
from merge_callback.offline.job import Job
from merge_callback.offline.lightning_file import split_dtypes, write_lightning
from merge_callback.offline.optimizer_states import MOMENTS, resumable
from merge_callback.offline.output import ModelFiles, copy_extras, lay_out, write_record, write_texts
from merge_callback.offline.output_folder import OutputFolder
from merge_callback.offline.peers import Peers
from merge_callback.snapshots.safetensors_file import file_checksum, write_json


@torch.no_grad()
def merge_files(job: Job, output: Path, peers: Peers | None = None) -> dict[str, Any]:
    """Merges checkpoints into a new folder, which appears complete or not at all.

    Args:
        job: what and how.
        output: the folder.
        peers: the processes that share the tensors; default: this one alone.

    Returns:
        What ``merge.json`` in it says; nothing on ranks that only help.

    Raises:
        ValueError: for checkpoints that don't belong together, values that are not finite, or options that
            don't fit; the tensor is named. Or if ``force`` would destroy more than an earlier merge.
            Nothing is written.
        FileExistsError: if the folder is there already.
        OSError: if a file can't be read or written.
    """
    job = replace(job, checkpoints=job.method.select(job.checkpoints))
    sources = [*job.checkpoints, *([] if job.base is None else [job.base])]
    folder = OutputFolder(output, job.force, sources)
    peers = peers or Peers()
    with folder.draft(is_kept=peers.rank == 0) as draft:
        checkpoints = [open_checkpoint(path, draft, job.state_key) for path in job.checkpoints]
        base = None if job.base is None else open_checkpoint(job.base, draft, job.state_key)
        everything = [*checkpoints, *([] if base is None else [base])]
        folder.add_sources(path for source in everything for path in (*source.files, *source.extras))
        newest, lightning = checkpoints[-1], job.kind == "lightning"
        job = with_prefix(job, newest)
        merging = FileMerge(job, checkpoints, base)
        training = _training(merging, draft) if job.optimizer_state and peers.rank == 0 else None
        if peers.rank == 0:
            job.begun()
        shards, index, tied = output_files(merging)
        if peers.rank > 0:
            merging.help([name for shard in shards.values() for name in shard], peers)
            return {}
        files = ModelFiles(draft, shards, index, tied)
        merging.run(files, peers)
        checksums = files.finish()
        if lightning:
            tensors = files.tensors | _aliases(files.tensors, tied)
            if isinstance(training, tuple):
                from merge_callback.offline.distributed_states import write_resumable

                checksums = write_resumable(draft, tensors, *training, newest.path)
            else:
                checksums = write_lightning(draft, tensors, newest, training)
        else:
            extras = {path.relative_to(newest.path).as_posix(): path for path in newest.extras}
            checksums |= copy_extras(extras, draft)
            if job.naming.strip == newest.prefix:
                checksums |= write_texts(newest.texts, draft)
            if newest.plain_config is not None:
                write_json(draft / CONFIG, newest.plain_config)
                checksums[CONFIG] = file_checksum(draft / CONFIG)
        record = {
            **merging.record(),
            "tied": tied,
            **({"optimizer_state": {"merged": list(MOMENTS), "step": newest.step}} if training else {}),
            "files": checksums,
            "left_out": {} if lightning else dict(newest.left_out),
        }
        record = write_record(draft, record, newest.path)
    return record


def with_prefix(job: Job, newest: Checkpoint) -> Job:
    """The job with the prefix that the run of the newest takes off, if no other was given."""
    if job.naming.strip is not None or job.kind == "lightning":  # a LightningModule loads names of its own
        return job
    return replace(job, naming=replace(job.naming, strip=newest.prefix))


def output_files(merging: FileMerge) -> tuple[dict[str, dict[str, Tensor]], str, dict[str, str]]:
    """The tensors of each file on the meta device, the name of their index, and the names of shared ones."""
    tensors, tied = merging.outputs()
    if merging.job.kind == "lightning":
        parts = split_dtypes(tensors)
        return dict(zip(shard_names(len(parts)), parts, strict=True)), "", tied
    shards, index = lay_out(tensors, merging.newest, merging.published, merging.job.max_shard_bytes)
    return shards, index, tied


def _training(merging: FileMerge, spool: Path) -> dict[str, Any] | tuple[str, dict[str, Any]]:
    """The state of the training, of the kind that the newest checkpoint is of."""
    if merging.newest.format == "dcp":
        from merge_callback.offline.distributed_states import resumable_distributed  # .7 s to import

        return resumable_distributed(merging, spool)
    return resumable(merging, spool)


def _aliases(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    return {alias: tensors[kept] for alias, kept in tied.items()}
