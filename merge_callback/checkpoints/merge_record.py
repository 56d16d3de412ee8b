"""The record of a merge, ``merge.json``, as it may come from anywhere."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from merge_callback.checkpoints.checkpoint import parse_count
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import CARD, PROVENANCE
from merge_callback.snapshots.files import CorruptFileError, read_object


@dataclass(frozen=True)
class MergeRecord:
    """What a merge says of itself.

    Args:
        path: of the record.
        content: of it, in which no type is sure.
        files: what was recorded as the checksum of each file, by its name.
    """

    path: Path | str
    content: Mapping[str, Any]
    files: Mapping[str, object]

    @classmethod
    def of(cls, content: Mapping[str, Any], path: Path | str) -> MergeRecord:
        """The record that a file holds; ``path`` names it.

        Raises:
            CorruptFileError: if the content is no sound record.
        """
        files = content.get("files", {})
        if not content or not isinstance(files, dict):
            raise CorruptFileError(f"{path}: not the record of a merge; publish the merge again")
        return cls(path, content, files)

    @property
    def own_files(self) -> dict[str, object]:
        """The checksums of what makes the merge: of all files but its card."""
        return {name: checksum for name, checksum in self.files.items() if name != CARD}

    @property
    def run_id(self) -> str | None:
        """Of the run that made the merge, if one did."""
        found = self.content.get("run_id")
        return found if isinstance(found, str) else None

    @property
    def step(self) -> int | None:
        """Optimizer steps that the newest of the merged weights had taken."""
        return parse_count(self.content.get("step"))

    @property
    def tokens(self) -> int | None:
        """The tokens that these had seen."""
        return parse_count(self.content.get("tokens"))

    def tied(self, tensors: Collection[str]) -> dict[str, str]:
        """The further names of shared tensors, each with the name it is kept under.

        Raises:
            CorruptFileError: if they do not go together with the names of the files' ``tensors``.
        """
        tied = self.content.get("tied", {})
        if not isinstance(tied, dict):
            raise CorruptFileError(f"{self.path}: 'tied' is {tied!r:.100}, expected names mapped to names")
        for alias, kept in tied.items():
            if alias in tensors or not isinstance(kept, str) or kept not in tensors:
                raise CorruptFileError(f"{self.path}: ties {alias!r} to {kept!r:.100}, against the files")
        return tied

    def lines(self) -> list[str]:
        """The method and what was merged, for people.

        Raises:
            CorruptFileError: if it does not say so.
        """
        method = self.content.get("method")
        if not isinstance(method, dict) or not {"name", "options", "reference"} <= method.keys():
            raise CorruptFileError(
                f"{self.path}: 'method' is {method!r:.100}, expected its name, options and reference"
            )
        sources = self.content.get("inputs") or self.content.get("snapshots") or []
        if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
            raise CorruptFileError(
                f"{self.path}: the merged ones are {sources!r:.100}, expected their records"
            )
        weights = self.content.get("weights") or [source.get("weight") for source in sources]
        if not isinstance(weights, list) or len(weights) != len(sources) or not all(map(_is_weight, weights)):
            raise CorruptFileError(
                f"{self.path}: 'weights' is {weights!r:.100}, expected one of each merged one"
            )
        return [
            f"method       {method['name']} {method['options']} ({method['reference']})",
            *(
                f"  merged     {'' if weight is None else f'weight {weight:.4f}  '}"
                f"{source.get('path') or 'snapshot'} (step {source.get('step')})"
                for source, weight in zip(sources, weights, strict=True)
            ),
        ]


def read_record(folder: Path) -> MergeRecord:
    """The record of the merge in a folder.

    Raises:
        CorruptFileError: if the file is no sound record, or leads out of the folder.
        FileNotFoundError: if there is none.
    """
    path = contained(folder, PROVENANCE)
    try:
        content = read_object(path)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}: not the record of a merge; publish the merge again") from None
    return MergeRecord.of(content, path)


def find_record(folder: Path) -> MergeRecord:
    """The record of the merge in a folder; an empty one if there is none that can be read."""
    try:
        return read_record(folder)
    except (OSError, CorruptFileError):
        return MergeRecord(folder / PROVENANCE, {}, {})


@cache
def versions() -> dict[str, str]:
    """Python's and the packages' versions, as records tell them."""
    found = {"python": platform.python_version()}
    for package in ("merge-callback", "torch", "lightning", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # e.g. run from a source tree, or lightning not there offline
            continue
    return found


def _is_weight(weight: object) -> bool:
    return weight is None or (isinstance(weight, (int, float)) and not isinstance(weight, bool))
