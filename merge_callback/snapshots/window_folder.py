"""A window's folder: its manifest, and which of its files somebody still needs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from merge_callback.snapshots.files import (
    clear,
    copy_file,
    hidden_names,
    make_folder,
    replacing,
    sync,
    write_json,
)
from merge_callback.snapshots.manifest import MANIFEST, find_manifest
from merge_callback.snapshots.shard_files import step_of

log = logging.getLogger(__name__)

WINDOW = "window"
"""The folder of the window in a run's folder."""

_SNAPSHOT = re.compile(r"(frozen-|running-[\w.-]+-)?step=\d+-[0-9a-f]{12}(-delta|\.safetensors)?")
_DRAFT = hidden_names(rf"(?:frozen-)?step=.*|{re.escape(MANIFEST)}")


class WindowFolder:
    """The folder that the snapshot files of a run lie in; all ranks share it, and the first one keeps it.

    Args:
        path: of the folder; ``None`` if nothing is kept in files: then nothing is done.
        run_id: of the run; a folder that holds another run's window is moved aside, never written over.
        session: of this process and its fellows, by which they name the folders of their snapshots.
        keeps: whether this rank is the one that writes what all share.
    """

    def __init__(self, path: Path | None, run_id: str, session: str, keeps: bool) -> None:
        self.path, self.run_id, self.session = path, run_id, session
        self.saved: list[list[str]] = []  # the files of the windows that the last two checkpoints need
        self._own = path if keeps else None
        self.published: Mapping[str, Any] = {}  # what is said of how merges of the snapshots are published
        self.running: Sequence[Mapping[str, Any]] = []  # records of the stored running averages
        self.before_writing: Callable[[], object] = lambda: None  # raises OSError if it may not be done

    def claim(self) -> None:
        """Makes the folder this run's own; a window in it that is not this run's is moved aside.

        Raises:
            OSError: if the folder can't be created or written.
        """
        if (folder := self._own) is None:
            return
        strange = any(folder.glob("*step=*")) and find_manifest(folder).run_id != self.run_id
        if strange or (folder.exists() and not folder.is_dir()):
            places = (folder.with_name(f"{folder.name}.old-{number}") for number in count(1))
            aside = next(place for place in places if not place.exists())
            os.replace(folder, aside)
            log.warning("merge: %s holds the window of another run; it was moved to %s", folder, aside)
        make_folder(folder)
        sync(folder.parent)  # what was moved aside, too

    def saved_with(self, files: list[str]) -> list[list[str]]:
        """What the last two checkpoints need, if the one that is made now needs these files."""
        return [*(saved for saved in self.saved if saved != files), files][-2:]

    def resume(self, saved: Sequence[Sequence[str]]) -> None:
        """Goes on from what a checkpoint noted, and from what newer ones need: it may be an older one."""
        known = [list(files) for files in saved]
        newer = find_manifest(self.path).saved if self.path else []
        self.saved = [*(files for files in newer if files not in known), *known]

    def write_manifest(self, layout: str, snapshots: Sequence[Mapping[str, Any]]) -> None:
        """Lists what the window holds and what checkpoints need.

        Raises:
            OSError: if it can't be written.
        """
        if self._own is not None:
            self.before_writing()
            make_folder(self._own)
            manifest = {
                "format": 1,
                "run_id": self.run_id,
                "layout": layout,
                "snapshots": list(snapshots),
                "saved": self.saved,
                **({"running": list(self.running)} if self.running else {}),
                **({"published": dict(self.published)} if self.published else {}),
            }
            write_json(self._own / MANIFEST, manifest)

    def prune(self, held: Collection[str], latest: int) -> None:
        """Removes the files nobody needs.

        Args:
            held: names of those that the window holds.
            latest: the last step a snapshot was begun at: other ranks may be ahead with that of a later one.
        """
        if self._own is None or not self._own.is_dir():
            return
        try:
            self.before_writing()
        except OSError:  # they are another run's
            return
        needed = {*held, *(file for files in self.saved for file in files)}
        needed.update(record["file"] for record in self.running)
        for path in [
            p for p in self._own.iterdir() if _SNAPSHOT.fullmatch(p.name) or _DRAFT.fullmatch(p.name)
        ]:
            if path.name in needed:
                continue
            if self.session in path.name:  # a folder that may not be complete yet
                step = step_of(path.name, self.session)
                if step is not None and step >= latest:
                    continue
            with contextlib.suppress(OSError):
                clear(path)

    def find(self, file: str, recorded_folder: str) -> Iterator[Path]:
        """Where a snapshot's file may lie: here, in a window that was moved aside, or as recorded."""
        if not file:
            return
        for folder in (*([] if self.path is None else [self.path]), Path(recorded_folder)):
            for place in (folder, *sorted(folder.parent.glob(f"{folder.name}.old-*"))):
                if (place / file).exists():
                    yield place / file

    def take_over(self, source: Path) -> Path:
        """Has a file of another folder lie here, too; returns its path here."""
        assert self.path is not None
        target = self.path / source.name
        # A hard link costs no room, and snapshot files are only ever removed, never written to.
        with replacing(target) as made:  # durably: the folder it came from may go
            try:
                os.link(source, made)
            except OSError:
                copy_file(source, made)
                sync(made)
        return target
