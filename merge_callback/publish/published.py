"""What runs have published in a local folder, and which of it may go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge_callback.checkpoints.containment import contained_below
from merge_callback.checkpoints.file_names import LATEST, PROVENANCE
from merge_callback.checkpoints.merge_record import MergeRecord, find_record
from merge_callback.checkpoints.model_folder import named_below
from merge_callback.publish.emission import is_own_name
from merge_callback.snapshots.files import CorruptFileError
from merge_callback.snapshots.safetensors_file import file_checksum

_SMALL = 1 << 20  # bytes of a file that is read to see whether somebody has edited it


@dataclass(frozen=True)
class Emission:
    """A published merge.

    Args:
        path: its folder.
        record: its ``merge.json``.
    """

    path: Path
    record: MergeRecord

    @property
    def nbytes(self) -> int:
        """What its files take."""
        names = [name for name, is_folder in named_below(self.path) if not is_folder]
        return sum((self.path / name).lstat().st_size for name in names)

    def foreign(self) -> str:
        """What keeps it from being removed: something in it that its run has not written; else empty."""
        for name, is_folder in named_below(self.path):
            if name != PROVENANCE and (is_folder or name not in self.record.files):
                return f"holds {name!r}, which its run has not written"
        for name, checksum in self.record.files.items():
            try:
                file = contained_below(self.path, name)
                is_edited = file.stat().st_size <= _SMALL and file_checksum(file) != checksum
            except (OSError, CorruptFileError):
                continue  # it is gone already
            if is_edited:
                return f"{name!r} was edited"
        return ""


def emissions(folder: Path, run_id: str | None = None) -> list[Emission]:
    """The emissions in a folder under the names that their runs gave them, oldest first.

    Args:
        folder: of a run, or of several.
        run_id: only of this run.
    """
    found = []
    for path in folder.glob("step=*"):
        record = find_record(path)
        is_own = record.run_id is not None and run_id in (None, record.run_id)
        if is_own and not path.is_symlink() and is_own_name(path.name, record):
            found.append((record.step or 0, path.stat().st_mtime_ns, path.name, record))
    return [Emission(folder / name, record) for *_, name, record in sorted(found, key=lambda one: one[:3])]


def linked(folder: Path) -> dict[str, str]:
    """What the links in a folder lead to there: ``latest``, and whatever others somebody has made."""
    targets = {link.name: link.resolve() for link in sorted(folder.iterdir()) if link.is_symlink()}
    return {t.name: link for link, t in targets.items() if t.parent == folder.resolve()}


def latest_in(folder: Path) -> str | None:
    """The name of the emission that ``latest`` leads to; ``None`` if it leads to none in this folder."""
    pointer = folder / LATEST
    target = pointer.resolve()
    is_one = pointer.is_symlink() and target.parent == folder.resolve() and find_record(target).content
    return target.name if is_one else None
