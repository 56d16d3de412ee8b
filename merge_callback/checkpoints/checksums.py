"""Comparing a checkpoint's files with the checksums that were recorded for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from merge_callback.checkpoints.checkpoint import read_json, read_manifest
from merge_callback.checkpoints.containment import contained_below
from merge_callback.checkpoints.file_names import PROVENANCE, SHARDS
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.snapshots.files import CorruptFileError
from merge_callback.snapshots.safetensors_file import file_checksum
from merge_callback.snapshots.shard_files import parse_shards

_IN_NAME = re.compile(r"-([0-9a-f]{12})\.safetensors$")


def problems(files: Sequence[Path], recorded: Sequence[Recorded]) -> list[str] | None:
    """Compares files with their checksums.

    Returns:
        One line for each that is not, byte for byte, what was recorded, or that nothing was recorded for;
        ``None`` if nothing was recorded at all.
    """
    if not recorded:
        return None
    known = {record.folder / record.name for record in recorded}
    unknown = [f"{file}: no checksum is recorded for it" for file in files if file not in known]
    return [*unknown, *(problem for record in recorded if (problem := record.problem()))]


def checksums_of_merge(folder: Path) -> list[Recorded]:
    """What the record of the merge in a folder says of its files, if there is one; its card may be edited."""
    if not (folder.is_dir() and (folder / PROVENANCE).exists()):
        return []
    return [Recorded(folder, name, found) for name, found in read_record(folder).own_files.items()]


def checksums_of_snapshot(files: Sequence[Path]) -> list[Recorded]:
    """What is recorded of a snapshot's files, and of those that it builds on."""
    return [record for file in files for record in _of_snapshot(file)]


class Recorded(NamedTuple):
    """What was recorded of a file: its whole SHA-256, or the first ``digits`` of it."""

    folder: Path
    name: str
    checksum: object
    digits: int = 64

    def problem(self) -> str:
        """What is wrong with the file, in one line; empty if nothing is."""
        try:
            found = file_checksum(contained_below(self.folder, self.name))
        except (OSError, CorruptFileError) as error:
            return str(error)
        if self.checksum == found[: self.digits]:
            return ""
        return f"{self.folder / self.name}: its SHA-256 is {found}, recorded was {self.checksum!r:.100}"


def _of_snapshot(file: Path) -> Iterator[Recorded]:
    """What the list of all ranks' files says, or the manifest beside a snapshot, or else its very name."""
    folder = file.parent
    if (folder / SHARDS).exists():
        listed = parse_shards(read_json(folder, SHARDS), folder / SHARDS)
        yield Recorded(folder, file.name, listed.get(file.name))
        if (found := _in_manifest(folder)) is not None:
            yield Recorded(folder, SHARDS, found)
    elif (found := _in_manifest(file)) is not None:
        yield Recorded(folder, file.name, found)
    elif digits := _IN_NAME.search(file.name):
        yield Recorded(folder, file.name, digits[1], digits=12)


def _in_manifest(snapshot: Path) -> object:
    """What the manifest of a window says of a snapshot in it; ``None`` if it does not list it."""
    for record in read_manifest(snapshot.parent).snapshots:
        for file, checksum in (("file", "checksum"), ("frozen", "frozen_checksum")):
            if record.get(file) == snapshot.name:
                found = record.get(checksum)
                return "" if found is None else found
    return None
