"""A merged model's files, written through memory maps."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_callback.checkpoints.card import base_model_of, renamed_cards, write_card
from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.file_names import CARD, PROVENANCE, WEIGHTS
from merge_callback.checkpoints.safetensors_shards import shard_names, split_shards, write_index
from merge_callback.snapshots.files import copy_file, sync
from merge_callback.snapshots.safetensors_file import (
    file_checksum,
    map_new_file,
    tensors_header,
    write_json,
)

_MOST_BYTES = 5 * 10**9  # of a file
_NAMED_LIKE_A_MODEL = re.compile(r"(model|diffusion_pytorch_model|adapter_model)[.-]")
_SYNCED = 64 << 20  # bytes after which the disk is set to work, while the rest is still merged


def lay_out(
    tensors: Mapping[str, Tensor],
    like: Checkpoint,
    published: Callable[[str], str],
    max_bytes: int | None,
) -> tuple[dict[str, dict[str, Tensor]], str]:
    """In which files a merge's tensors lie: those of the checkpoint it is like, which other tools know.

    Args:
        tensors: by their names in the output.
        like: the last of the merged checkpoints.
        published: from a tensor's name there to that in the output.
        max_bytes: of a file, if that is asked for.

    Returns:
        The tensors of each file, and the name of their index; empty if there is none.
    """
    if like.shards and max_bytes is None:
        named = {file: map(published, names) for file, names in like.shards.items()}
        files = {f: {name: tensors[name] for name in names if name in tensors} for f, names in named.items()}
        if sum(map(len, files.values())) == len(tensors):  # else they go by other names now
            return {file: held for file, held in files.items() if held}, like.index
    shards = split_shards(tensors, _MOST_BYTES if max_bytes is None else max_bytes)
    first = next(iter(like.shards), WEIGHTS)
    stem = re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", first) if _NAMED_LIKE_A_MODEL.match(first) else "model"
    base, _, variant = stem.partition(".")
    index = f"{base}.safetensors.index.{variant}.json" if variant else f"{base}.safetensors.index.json"
    files = dict(zip(shard_names(len(shards), stem), shards, strict=True))
    return files, index if len(shards) > 1 else ""


class ModelFiles:
    """The safetensors files of a model of any size: tensors that are written straight into their files.

    The memory is the page cache's, never the process's own. Write the tensors in the order of ``tensors`` and
    report each by ``done``: beside the writing, checksums are then computed and the disk is kept busy.

    Args:
        folder: where the files are made; it must exist.
        shards: for each file, by its name, the tensors by theirs, on the meta device: shapes and dtypes.
        index: the name of a file that says which tensor is where (Hugging Face's scheme); empty for none.
        tied: further names of shared tensors, each with the name it is kept under.

    Raises:
        OSError: if there is no room.
    """

    def __init__(
        self, folder: Path, shards: Mapping[str, Mapping[str, Tensor]], index: str, tied: Mapping[str, str]
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[str, _File] = {}
        self._places: dict[str, _File] = {}
        self._folder, self._index, self._background = folder, index, ThreadPoolExecutor(1)
        for name, shard in shards.items():
            shared = {alias: kept for alias, kept in tied.items() if kept in shard}
            file = _File(folder / name, shard, {"format": "pt", **shared}, self._background)
            self._files[name] = file
            self._places |= dict.fromkeys(shard, file)
            self.tensors |= file.tensors
        if index:
            write_index(folder, list(shards), list(shards.values()), index)

    def done(self, name: str) -> None:
        """Notes that a tensor, and all before it, hold their final values."""
        self._places[name].done(name)

    def finish(self) -> dict[str, str]:
        """Makes the files durable; returns the SHA-256 of each, by its name.

        Raises:
            OSError: if the disk fails.
        """
        for file in self._files.values():
            sync(file.path)
        found = {name: file.checksum() for name, file in self._files.items()}
        self._background.shutdown()
        if self._index:
            found[self._index] = file_checksum(self._folder / self._index)
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
    """Copies what lies beside a model's weights; returns the SHA-256 of each by the name it has now."""
    extras = renamed_cards(extras)
    for name, path in extras.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, folder / name)
    return {name: file_checksum(folder / name) for name in extras}


def write_texts(texts: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Writes a model's configuration; returns the SHA-256 of each file."""
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name: file_checksum(folder / name) for name in texts}


def write_record(folder: Path, record: Mapping[str, Any], like: Path) -> dict[str, Any]:
    """Writes the card and the record of a merge, which is complete then; returns what the record says.

    Args:
        folder: the draft, with all other files.
        record: what ``merge.json`` says, without what follows from the card.
        like: the checkpoint that the merge is like.
    """
    base = base_model_of(like)
    whole = {**record, **({"base_model": base} if base else {})}
    write_card(folder, whole, like)
    if (folder / CARD).exists():
        whole["files"] = {**record["files"], CARD: file_checksum(folder / CARD)}
    write_json(folder / PROVENANCE, whole)
    return whole
