"""Publishing merges in a remote folder, while the next ones are made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from merge_callback.checkpoints.file_names import BEST, LATEST, PROVENANCE
from merge_callback.checkpoints.merge_record import find_record
from merge_callback.publish.emission import Publisher, step_of
from merge_callback.publish.remote_folder import RemoteFolder

log = logging.getLogger(__name__)

_NOTICEABLE = 10.0  # seconds of waiting that the user is told of


class Queue(Protocol):
    """Does jobs in a thread of its own, one after the other."""

    def submit(self, work: Callable[[], object]) -> object:
        """Hands a job in, without waiting."""

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until nothing is left to do, for so many seconds at most; says whether that is so."""


class RemotePublisher(Publisher):
    """Publishes merges in a local folder first, and moves them to a remote one beside all else.

    Whatever the remote folder does, the run goes on: a merge that can't be uploaded stays in the local
    folder, which is told, and is tried again with the next one, at the end, and when the run is resumed.

    Args:
        folder: the local one.
        keep_last: how many of this run's emissions stay; ``None`` keeps all.
        max_shard_bytes: a larger model is split into several files with an index.
        url: of the remote folder.
        run_id: of the run.
        queue: which uploads.
    """

    def __init__(
        self, folder: Path, keep_last: int | None, max_shard_bytes: int, url: str, run_id: str, queue: Queue
    ) -> None:
        super().__init__(folder, keep_last, max_shard_bytes)
        self.url, self.run_id, self._queue = url, run_id, queue
        self._remote: RemoteFolder | None = None
        self._own: list[str] = []  # of this run's emissions the remote ones, oldest first
        self._places: dict[str, str] = {}  # the remote names of those that have another one here
        self._best_there: str | None = None  # what ``best`` names there
        self._is_queued = False
        self._resumed_at = (
            -1
        )  # step up to which the remote ones are this run's, and not an abandoned branch's

    def resume(self, published: Iterable[str], run_id: str, last: int) -> None:
        """Goes on from what a run had published; what waits here since then is uploaded."""
        self.published = [*published, *self._named_after(last, published)]
        self._resumed_at = last
        self._submit()

    def newest_up_to(self, step: int) -> Path | str | None:
        """The newest of this run's emissions whose snapshots were taken at ``step`` or before."""
        name = self._newest_name(step, self.published)
        if name is None or (self.folder / name).is_dir():
            return name and self.folder / name
        return f"{self.url}/{self._places.get(name, name)}"

    @property
    def kept(self) -> list[str]:
        """This run's emissions, oldest first: what is not here any more is in the remote folder."""
        return list(self.published)

    @property
    def remote_names(self) -> dict[str, str]:
        """The names that emissions have in the remote folder, as far as they are others than here."""
        return {here: there for here, there in dict(self._places).items() if here != there}

    def finish_uploads(self, timeout: float | None = None) -> None:
        """Tries once more to upload what is not uploaded yet, for so many seconds at most."""
        self._submit()
        patience = _NOTICEABLE if timeout is None else min(timeout, _NOTICEABLE)
        if not self._queue.drain(patience):
            log.warning("merge: waiting for uploads to %s; what waits is in %s", self.url, self.folder)
        rest = None if timeout is None else timeout - patience
        if not self._queue.drain(rest) and self._waiting():
            log.warning("merge: not everything is in %s yet; the rest stays in %s", self.url, self.folder)

    def _conclude(self, name: str) -> None:
        for surplus in self._surplus(self.published):
            self.published.remove(surplus)
        self._submit()

    def _point_best(self, name: str) -> bool:
        self._submit()
        return True  # an upload that fails is tried again

    def _submit(self) -> None:
        if not self._is_queued:  # attempts that all wait for the same time-out must not pile up
            self._is_queued = True
            self._queue.submit(self._upload)

    # In the queue's thread.

    def _waiting(self) -> list[Path]:
        """This run's emissions that are here still, oldest first."""
        folders = [path.parent for path in sorted(self.folder.glob(f"step=*/{PROVENANCE}"))]
        return [folder for folder in folders if find_record(folder).run_id == self.run_id]

    def _upload(self) -> None:
        self._is_queued = False
        waiting = self._waiting()
        surplus = set(self._surplus([folder.name for folder in waiting]))
        for name in surplus:
            self._remove(name)
        try:
            for folder in (folder for folder in waiting if folder.name not in surplus):
                self._upload_one(folder)
                self._retain_remote()
            self._point_remote_best()
        except Exception as error:
            log.warning(
                "merge: %s could not be uploaded to %s (%r); it stays in %s and is tried again with the next "
                "one; training goes on",
                folder.name,
                self.url,
                error,
                self.folder,
            )

    def _upload_one(self, folder: Path) -> None:
        if self._remote is None:
            remote = RemoteFolder(self.url)
            found = [] if self.keep_last is None else remote.emissions_of(self.run_id)
            self._own = [name for name in found if step_of(name) <= self._resumed_at]
            self._remote = remote
        name = self._remote.upload(folder, self.run_id)
        self._places[folder.name] = name
        self._own = sorted({*self._own, name})  # it may be there, uploaded before this run was resumed
        self._remote.point(LATEST, name)
        self._remove(folder.name)

    def _retain_remote(self) -> None:
        for name in self._surplus(self._own):
            try:
                assert self._remote is not None
                self._remote.remove(name, self.run_id)
                self._own.remove(name)
            except Exception as error:
                log.warning("merge: %s/%s could not be removed (%r)", self.url, name, error)
                return

    def _point_remote_best(self) -> None:
        best = self._best and self._places.get(self._best)
        if best and best != self._best_there and self._remote is not None:
            self._remote.point(BEST, best)
            self._best_there = best
