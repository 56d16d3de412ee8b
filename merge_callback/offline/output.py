"""A merged model's files, written through memory maps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from merge_callback.publish.emission import INDEX, shard_names, write_index
from merge_callback.snapshots.files import copy_file, sync
from merge_callback.snapshots.safetensors_file import file_checksum, map_new_file, tensors_header

_SYNCED = 64 << 20  # bytes after which the disk is set to work, while the rest is still merged


class ModelFiles:
    """The safetensors files of a model of any size: tensors that are written straight into their files.

    The memory is the page cache's, never the process's own. Write the tensors in the order of ``tensors`` and
    report each by ``done``: beside the writing, checksums are then computed and the disk is kept busy.

    Args:
        folder: where the files are made; it must exist.
        shards: for each file its tensors by name, on the meta device: their shapes and dtypes. Where there
            are several, an index says which tensor is where (Hugging Face's scheme).
        tied: further names of shared tensors, each with the name it is kept under.

    Raises:
        OSError: where there is no room.
    """

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Tensor]], tied: Mapping[str, str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[str, _File] = {}
        self._places: dict[str, _File] = {}
        self._folder, self._background = folder, ThreadPoolExecutor(1)
        names = shard_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            shared = {alias: kept for alias, kept in tied.items() if kept in shard}
            file = _File(folder / name, shard, {"format": "pt", **shared}, self._background)
            self._files[name] = file
            self._places |= dict.fromkeys(shard, file)
            self.tensors |= file.tensors
        if len(shards) > 1:
            write_index(folder, names, shards)

    def done(self, name: str) -> None:
        """Notes that a tensor, and all before it, hold their final values."""
        self._places[name].done(name)

    def finish(self) -> dict[str, str]:
        """Makes the files durable; returns the SHA-256 of each, by its name.

        Raises:
            OSError: where the disk fails.
        """
        for file in self._files.values():
            sync(file.path)
        found = {name: file.checksum() for name, file in self._files.items()}
        self._background.shutdown()
        if len(self._files) > 1:
            found[INDEX] = file_checksum(self._folder / INDEX)
        return found


class _File:
    """One safetensors file under construction."""

    def __init__(
        self,
        path: Path,
        shard: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        background: ThreadPoolExecutor,
    ) -> None:
        self.path = path
        header = tensors_header(shard)
        self._data, start = map_new_file(path, header, metadata)
        self._ends = {name: entry["data_offsets"][1] for name, entry in header.items()}
        self.tensors = {
            name: self._data[begin:end].view(shard[name].dtype).view(shard[name].shape)
            for name, (begin, end) in ((n, e["data_offsets"]) for n, e in header.items())
        }
        self._background, self._handed_over, self._unsynced = background, 0, 0
        self._digest = hashlib.sha256()
        with open(path, "rb") as file:
            self._digest.update(file.read(start))
        self._pending: list[Future[None]] = []

    def done(self, name: str) -> None:
        """Hashes what is final by now, in the background, and writes it to the disk."""
        self._hand_over(self._ends[name])

    def checksum(self) -> str:
        """The SHA-256 of the whole file."""
        self._hand_over(self._data.numel())
        for future in self._pending:
            future.result()
        return self._digest.hexdigest()

    def _hand_over(self, end: int) -> None:
        piece: memoryview = self._data[self._handed_over : end].numpy().data
        self._pending.append(self._background.submit(self._finish, piece))
        self._handed_over = end

    def _finish(self, piece: memoryview) -> None:
        self._digest.update(piece)
        self._unsynced += len(piece)
        if self._unsynced >= _SYNCED:
            sync(self.path)
            self._unsynced = 0


def copy_extras(extras: Mapping[str, Path], folder: Path) -> dict[str, str]:
    """Copies a model's configuration and tokenizer; returns the SHA-256 of each."""
    for name, path in extras.items():
        copy_file(path, folder / name)
    return {name: file_checksum(folder / name) for name in extras}
