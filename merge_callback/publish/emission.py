"""Publishing a merge: a folder that is either complete or not there."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_callback.publish.provenance import emission_name
from merge_callback.snapshots.files import (
    CorruptFileError,
    clear,
    make_folder,
    read_object,
    sync,
    write_json,
)
from merge_callback.snapshots.safetensors_file import file_checksum, tensors_header, write_file

log = logging.getLogger(__name__)

PROVENANCE = "merge.json"
LATEST = "latest"
_DRAFT = re.compile(r"\.(step=.*|latest)\.\d{1,10}\.(tmp|old)", re.DOTALL)  # the number is a process's
_WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Publisher:
    """Publishes merges as folders, keeps the last few, and points ``latest`` at the newest.

    Args:
        folder: where the emissions appear.
        keep_last: how many of this run's emissions stay; ``None`` keeps all.
        max_shard_bytes: a larger model is split into several files with an index (Hugging Face's scheme).
    """

    def __init__(self, folder: Path, keep_last: int | None, max_shard_bytes: int) -> None:
        self.folder, self.keep_last, self.max_shard_bytes = folder, keep_last, max_shard_bytes
        self.published: list[str] = []
        self.before_writing: Callable[[], object] = lambda: None  # raises OSError where it may not be done

    def sweep(self) -> None:
        """Removes what a killed process left half written. Only for the one run that uses the folder."""
        for path in [p for p in self.folder.glob(".*") if _DRAFT.fullmatch(p.name)]:
            with contextlib.suppress(OSError):
                clear(path)

    def resume(self, run_id: str, step: int) -> None:
        """Goes on from what a run had published in this folder, up to an optimizer step of it.

        The folder tells, and not a checkpoint: that does not wait for a merge that is being published.
        """
        found = []
        for path in self.folder.glob("step=*"):
            record = _read_record(path)
            version = _version(path.name, record)
            if record.get("run_id") == run_id and version is not None and record["step"] <= step:
                found.append((record["step"], version, path.name))
        self.published = [name for *_, name in sorted(found)]

    def publish(
        self,
        name: str,
        write: Callable[[Path], Mapping[str, str]],
        record: Mapping[str, Any],
        tied: Mapping[str, str] | None = None,
        add_files: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes the merge under a temporary name, makes it durable, then renames it into place.

        Args:
            name: of the folder. Where another merge has it already, ``-v1``, ``-v2``, … is added; where the
                very same merge has it, that one stays.
            write: writes the weights into the folder it is given, durably; returns the files' SHA-256.
            record: what ``merge.json`` says, besides the files and their checksums.
            tied: further names of shared tensors, stored once.
            add_files: writes further files (a model's config) into the folder it is given.

        Returns:
            The published folder.

        Raises:
            OSError: where it can't be written. Nothing is left behind.
        """
        self.before_writing()
        make_folder(self.folder)
        draft = self.folder / f".{name}.{os.getpid()}.tmp"
        clear(draft)
        draft.mkdir()
        try:
            if add_files is not None:
                add_files(draft)
            files = dict(write(draft))
            files |= {p.name: file_checksum(p) for p in draft.iterdir() if p.name not in files}
            write_json(draft / PROVENANCE, {**record, "tied": dict(tied or {}), "files": files})
            target = self._place(draft, name, files)
        finally:
            with contextlib.suppress(OSError):
                clear(draft)
        if _read_record(target).get("run_id") == record.get("run_id"):  # else another run's very same merge
            self.published = [*(p for p in self.published if p != target.name), target.name]
        if self._point_latest(target.name):
            self._retain()
        return target

    def write_safetensors(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        values: Iterable[Tensor],
        tied: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """Writes all shards, and the index where there are several.

        Args:
            folder: where to.
            tensors: by published name; only shapes and dtypes count.
            values: the CPU tensors themselves, one after the other in the order of ``written``. None is held
                for longer than it takes to write it.
            tied: further names of shared tensors.

        Returns:
            The SHA-256 of each file.
        """
        shards, stream = split_shards(tensors, self.max_shard_bytes), iter(values)
        names = shard_names(len(shards))
        if len(shards) > 1:
            write_index(folder, names, shards)
        return {
            file: write_file(
                folder / file,
                tensors_header(shard),
                islice(stream, len(shard)),
                # The scheme of safetensors.torch.save_model: load_model finds the shared names here.
                {"format": "pt", **{alias: kept for alias, kept in (tied or {}).items() if kept in shard}},
            )
            for file, shard in zip(names, shards, strict=True)
        }

    def written(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of ``tensors`` in the order in which they are written."""
        return [name for shard in split_shards(tensors, self.max_shard_bytes) for name in shard]

    @property
    def newest_step(self) -> int:
        """Of this run's newest emission; -1 if there is none."""
        return max((_step(name) for name in self.published), default=-1)

    def newest_up_to(self, step: int) -> Path | None:
        """The newest of this run's emissions whose snapshots were taken at ``step`` or before."""
        for name in reversed(self.published):
            if _step(name) <= step and (self.folder / name).is_dir():
                return self.folder / name
        return None

    def _place(self, draft: Path, name: str, files: Mapping[str, str]) -> Path:
        for path in draft.iterdir():  # the files that add_files wrote are not durable yet
            sync(path)
        sync(draft)
        target, version = self.folder / name, 0
        while target.exists():
            if _holds(target, files):
                return target
            version += 1
            target = self.folder / f"{name}-v{version}"
        os.rename(draft, target)
        sync(self.folder)
        return target

    def _point_latest(self, name: str) -> bool:
        pointer = self.folder / f".{LATEST}.{os.getpid()}.tmp"
        try:
            clear(pointer)
            pointer.symlink_to(name, target_is_directory=True)
            os.replace(pointer, self.folder / LATEST)
            sync(self.folder)  # before the merge that it pointed at may go
        except OSError as error:
            with contextlib.suppress(OSError):
                pointer.unlink()
            log.warning("merge: could not point %s at %s: %s", self.folder / LATEST, name, error)
            return not (
                self.folder / LATEST
            ).is_symlink()  # it still points at an older merge: that one stays
        return True

    def _retain(self) -> None:
        if self.keep_last is None:
            return
        while len(self.published) > self.keep_last:
            name = self.published.pop(0)
            # Renamed first, and durably: a folder that is visible under its name is complete, also while it
            # goes, and also after a power loss.
            doomed = self.folder / f".{name}.{os.getpid()}.old"
            with contextlib.suppress(OSError):
                clear(doomed)
                os.rename(self.folder / name, doomed)
                sync(self.folder)
                clear(doomed)


def load_merge(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a published merge, by all their names (tied ones too): ready for ``load_state_dict``.

    That of the LightningModule, as a rule; where a prefix was stripped from the names (``"model."``, as of a
    wrapped Hugging Face model), that of the model under it: ``module.model.load_state_dict(…)``.

    Args:
        path: an emission's folder, e.g. ``…/merges/latest``.

    Raises:
        FileNotFoundError: where there is no published merge.
        ValueError: where its record or a file of it is broken, or leads out of the folder.
    """
    path = Path(path)
    if not (path / PROVENANCE).exists():
        mend = f"did you mean '{path / LATEST}'?" if (path / LATEST).exists() else f"it has no {PROVENANCE}"
        raise FileNotFoundError(f"{path}: no published merge; {mend}")
    from merge_callback.offline.checkpoint import open_checkpoint

    merge = open_checkpoint(path)
    tensors = {name: tensor.clone() for name, tensor in merge.tensors.items()}
    return tensors | {alias: tensors[kept] for alias, kept in merge.tied.items()}


def split_shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Shards of at most ``max_bytes`` (or one tensor), wider dtypes first so that all stay aligned."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors, key=lambda n: -tensors[n].itemsize):
        if shards[-1] and size + tensors[name].nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """The files of a model in ``count`` shards."""
    return (
        [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count > 1
        else [_WEIGHTS]
    )


def write_index(folder: Path, names: Sequence[str], shards: Sequence[Mapping[str, Tensor]]) -> None:
    """Writes which tensor is in which file (Hugging Face's scheme)."""
    weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / PROVENANCE)
    except (OSError, CorruptFileError):
        return {}


def _step(name: str) -> int:
    return int(name.removeprefix("step=").partition("-")[0])


def _version(name: str, record: Mapping[str, Any]) -> int | None:
    """0, or the number that a publisher put after the name; ``None`` of a folder that somebody else named."""
    try:
        own = emission_name(record["method"]["name"], int(record["step"]), record["tokens"])
    except (KeyError, TypeError, ValueError):
        return None
    found = re.fullmatch(rf"{re.escape(own)}(?:-v(\d+))?", name)
    return int(found[1] or 0) if found else None


def _holds(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a folder's files are, on disk and not only by its record, the ones with these checksums."""
    if _read_record(folder).get("files") != files:
        return False
    return all((folder / f).is_file() and file_checksum(folder / f) == files[f] for f in files)
