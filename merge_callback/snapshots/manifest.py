"""The manifest of a window: what lists the snapshots in its folder, whoever prepared that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_callback.snapshots.files import CorruptFileError, read_object

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Args:
        path: of the file.
        content: of it, in which no type is sure.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def run_id(self) -> str | None:
        """Of the run whose window it is."""
        found = self.content.get("run_id")
        return found if isinstance(found, str) else None

    @property
    def lists_snapshots(self) -> bool:
        """Whether it is a window's: it lists records, if only none."""
        found = self.content.get("snapshots")
        return isinstance(found, list) and all(isinstance(record, dict) for record in found)

    @property
    def snapshots(self) -> list[Mapping[str, Any]]:
        """The records of the snapshots, oldest first; without whatever else is listed there."""
        found = self.content.get("snapshots")
        return [r for r in found if isinstance(r, dict)] if isinstance(found, list) else []

    @property
    def running(self) -> list[Mapping[str, Any]]:
        """The records of the stored running averages."""
        found = self.content.get("running")
        return [r for r in found if isinstance(r, dict)] if isinstance(found, list) else []

    @property
    def saved(self) -> list[list[str]]:
        """The names of the files that each of the last checkpoints needs, as far as they are such lists."""
        found = self.content.get("saved")
        lists = [files for files in found if isinstance(files, list)] if isinstance(found, list) else []
        return [files for files in lists if all(isinstance(file, str) for file in files)]

    def record_of(self, file: str) -> Mapping[str, Any]:
        """The record of the snapshot with this file or folder; empty if it lists none."""
        return next((record for record in self.snapshots if record.get("file") == file), {})


def find_manifest(folder: Path) -> Manifest:
    """The manifest of a run's own window; an empty one if there is none that can be read."""
    path = folder / MANIFEST
    try:
        return Manifest(path, read_object(path))
    except (OSError, CorruptFileError):
        return Manifest(path, {})
