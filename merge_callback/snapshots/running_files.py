"""The files of running averages, in the window's folder: of each rank one, which can be verified alone."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_callback.merging.running import RunningAverage
from merge_callback.sharding.sharding import Sharding
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.files import CorruptFileError, sync
from merge_callback.snapshots.safetensors_header import read_header
from merge_callback.snapshots.shard_files import Source, gather, read_pieces, shard_file, write_shard
from merge_callback.snapshots.staging import ToHost
from merge_callback.snapshots.window_folder import WindowFolder

FOLDER_NAME = re.compile(r"running-[\w.-]+-step=\d+-[0-9a-f]{12}")
"""The folder of one stored average."""

_RANK = re.compile(r"rank-(\d{5})-of-(\d{5})-([0-9a-f]{12})\.safetensors")


class RunningFiles:
    """Stored copies of running averages, by name and step: a folder each, with a file of every rank.

    A rank writes its file by itself, since a checkpoint may be saved by one rank alone. Its name ends in its
    own checksum, and tells how many there are, so that no list of them is needed.

    Args:
        folder: the window's.
        averages: by name.
        sharding: which part of each tensor this rank keeps.
        session: of this process and the other ranks'.
        to_host: reads arenas out of device memory.
    """

    def __init__(
        self,
        folder: WindowFolder,
        averages: Mapping[str, RunningAverage],
        sharding: Sharding,
        session: str,
        to_host: ToHost,
    ) -> None:
        self._folder, self._sharding, self._session, self._to_host = folder, sharding, session, to_host
        self._averages, self._recorded = averages, ""
        self._stored: dict[str, dict[int, str]] = {name: {} for name in averages}
        self._of_checkpoint: dict[str, tuple[int, str]] = {}  # what only a checkpoint needs

    @property
    def folder(self) -> Path | None:
        """Of the files; ``None`` if nothing is kept in files."""
        return self._folder.path

    def file(self, name: str, step: int) -> str:
        """The folder's name of a stored average; empty if it is not stored."""
        at, file = self._of_checkpoint.get(name, (-1, ""))
        return self._stored[name].get(step, file if at == step else "")

    def up_to(self, name: str, step: int) -> list[tuple[int, str]]:
        """The steps and files of an average that were stored up to a step, the newest first."""
        return sorted(((at, file) for at, file in self._stored[name].items() if at <= step), reverse=True)

    def write(self, name: str, step: int, arena: Arena, of_checkpoint: bool = False) -> str:
        """Writes this rank's file; returns the name of its folder, empty if nothing is kept in files.

        Args:
            name: of the average.
            step: of its last update.
            arena: its values.
            of_checkpoint: whether it is stored for a checkpoint, and not to stay.

        Raises:
            OSError: if it can't be written.
        """
        if self.folder is None:
            return ""
        file = f"running-{name}-step={step:08d}-{self._session}"
        place = self.folder / file
        self._folder.before_writing()
        own = shard_file(self._sharding.ranks.rank, self._sharding.ranks.size)
        record = json.dumps(self._averages[name].record())
        metadata = {"format": "pt", "running": name, "step": str(step), "average": record}
        data = self._to_host.chunks(arena.buffer)
        checksum = write_shard(place, self._sharding, arena.layout, data, metadata)
        os.replace(place / own, place / own.replace(".safetensors", f"-{checksum[:12]}.safetensors"))
        sync(place)
        if of_checkpoint:
            self._of_checkpoint[name] = (step, file)
        else:
            self._stored[name][step] = file
        self._list()
        return file

    def load(self, file: str, out: Arena) -> None:
        """Fills an arena with what this rank keeps, whatever ranks have written it. Every file is verified.

        Raises:
            CorruptFileError: if a file is not, byte for byte, what was written, or lacks a tensor.
            OSError: if one is missing or unreadable.
        """
        problem: Exception = FileNotFoundError(f"{file or 'its file'} is gone")
        for place in self._folder.find(file, self._recorded):
            try:
                wanted = {name: self._sharding.kept[name] for name in out.layout.names}
                gather(place, rank_files(place), wanted, out.own_tensors())
                return
            except (CorruptFileError, OSError) as error:
                problem = error
        raise problem

    def thin(self, name: str, newest: int, ratio: float | None, reach: float) -> None:
        """Lets go of stored copies: the newest stay, and of older ones a sequence of growing distances.

        Args:
            name: of the average.
            newest: how many stay.
            ratio: between the steps of older ones that stay; ``None`` if none does.
            reach: how far these go back: to this part of the newest step.
        """
        stored = self._stored[name]
        kept = retained([*stored], newest, ratio, reach)
        self._stored[name] = {step: file for step, file in stored.items() if step in kept}
        self._list()

    def drop_newer(self, name: str, step: int) -> None:
        """Forgets what was stored after a step: the run goes on from there."""
        self._stored[name] = {at: file for at, file in self._stored[name].items() if at <= step}
        self._list()

    def needed(self) -> list[str]:
        """What a checkpoint that is made now needs."""
        of_checkpoint = [file for _, file in self._of_checkpoint.values()]
        return [*of_checkpoint, *(record["file"] for record in self._folder.running)]

    def state_dict(self) -> dict[str, Any]:
        """What is stored, as primitives."""
        return {
            name: [[step, file] for step, file in stored.items()] for name, stored in self._stored.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], folder: str, step: int) -> None:
        """Goes on from what was stored up to a step, in the folder that the window had then."""
        self._recorded = folder
        for name in self._averages.keys() & state.keys():
            self._stored[name] = {at: file for at, file in state[name] if at <= step}
        self._list()

    def _list(self) -> None:
        self._folder.running = [
            {"name": name, "step": step, "file": file, "average": self._averages[name].record()}
            for name, stored in self._stored.items()
            for step, file in sorted(stored.items())
        ]


def retained(steps: Sequence[int], newest: int, ratio: float | None, reach: float) -> set[int]:
    """Which of some ascending steps stay: the newest, and the first one in each interval of a growing grid.

    The grid does not move with the run, so what stays once is never missing later.

    >>> sorted(retained(range(10, 201, 10), 3, 1.5, 8))
    [30, 40, 60, 90, 130, 180, 190, 200]
    """
    ordered = sorted(steps)
    kept = set(ordered[-newest:])
    if ratio is not None and ordered:
        first: dict[int, int] = {}
        for step in ordered:
            if step > 0 and step * reach >= ordered[-1]:
                first.setdefault(math.floor(math.log(step) / math.log(ratio)), step)
        kept.update(first.values())
    return kept


def rank_files(folder: Path) -> list[Source]:
    """The files of all ranks, of a stored average.

    Raises:
        CorruptFileError: if one is missing, or does not say what it holds.
        OSError: if the folder can't be read.
    """
    found = {
        match[1]: (path, match) for path in sorted(folder.iterdir()) if (match := _RANK.fullmatch(path.name))
    }
    if not found or {match[2] for _, match in found.values()} != {f"{len(found):05d}"}:
        raise CorruptFileError(f"{folder}: the files of some ranks are missing")
    sources = []
    for path, match in found.values():
        try:
            pieces = read_pieces(read_header(path).metadata["pieces"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptFileError(f"{path}: does not say what it holds ({error!r})") from None
        sources.append(Source(path, match[3], pieces))
    return sources
