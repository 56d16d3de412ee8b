"""Finds the folder for a run's snapshots and merges: every run has its own."""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from merge_callback.checkpoints.file_names import LATEST, WINDOW
from merge_callback.checkpoints.merge_record import find_record
from merge_callback.options import Options
from merge_callback.publish.remote_folder import RemoteFolder
from merge_callback.sharding import Ranks
from merge_callback.signals.host import Host
from merge_callback.snapshots.files import make_folder, sync
from merge_callback.snapshots.folder_lock import LOCK, FolderInUseError, FolderLock, holder, lock_folder
from merge_callback.snapshots.manifest import find_manifest
from merge_callback.urls import is_remote, local_path

_SCRATCH = "merge_scratch"
_MOST_CLAIMS = 20  # lost claims after which the store probably does not list new files

_T = TypeVar("_T")


@dataclass
class RunFolder:
    """The folder of one run.

    Args:
        path: the local folder, which holds the window and, without a ``url``, the emissions.
        run_id: the run's id.
        url: the remote folder that the emissions go to, if any.
        is_new: whether the folder was made for this run.
        is_elsewhere: whether the resumed run kept its window on another machine.
        notices: lines about it to show the user.
        lock: the lock on the local folder, on the first rank.
    """

    path: Path
    run_id: str
    url: str | None = None
    is_new: bool = False
    is_elsewhere: bool = False
    notices: tuple[str, ...] = ()
    lock: FolderLock | None = None

    @classmethod
    def take(cls, options: Options, host: Host, resume: Mapping[str, Any]) -> RunFolder:
        """Finds the run's folder and locks it: the first rank does so for all, and all have to call this.

        If a ``dirpath`` is given, the run uses it. A resumed run goes on in its former folder, unless another
        run uses that by now. All others get a new folder: the default one, or ``merges-1``, ``merges-2``, …
        next to it. So runs that share a logger's folder never share this one.

        Args:
            options: the callback's options.
            host: the run; its first rank knows the default folder.
            resume: a former session's ``state_dict``; empty for a new run.

        Raises:
            ValueError: if it can't be written, another run uses the given one, or a rank does not see it.
            RemoteError: if another rank raises.
        """
        ranks = Ranks.of_run()
        run_id, token = ranks.from_first(
            (resume.get("run_id") or uuid.uuid4().hex, uuid.uuid4().hex[:12] if ranks.size > 1 else "")
        )
        folder: RunFolder | None = None
        problem: Exception | None = None
        try:
            if ranks.is_first:
                folder = _find(options, host, resume, run_id, token)
        except Exception as error:
            problem = error
        try:
            ranks.agree(problem)
            found = (folder.path, folder.url, folder.is_elsewhere) if folder else (Path(), None, False)
            path, url, is_elsewhere = ranks.from_first(found)
            if token and (options.durable or options.format == "dcp") and holder(path) != token:
                problem = _not_shared(path, url, ranks.rank)
            ranks.agree(problem)
            ranks.close()
        except BaseException:
            if folder is not None:
                folder.give_up()
            raise
        return folder or cls(path, run_id, url, is_elsewhere=is_elsewhere)

    def give_up(self) -> None:
        """Unlocks the folder, and removes it if it was made for this run and is empty."""
        if self.lock is None:
            return
        self.lock.close()
        if self.is_new:
            if self.url is not None:
                with suppress(Exception):
                    RemoteFolder(self.url).release(self.run_id)
            with suppress(OSError):
                (self.path / WINDOW).rmdir()
            with suppress(OSError):
                if os.listdir(self.path) == [LOCK]:
                    (self.path / LOCK).unlink()
                    self.path.rmdir()


def _find(options: Options, host: Host, resume: Mapping[str, Any], run_id: str, token: str) -> RunFolder:
    given = options.dirpath
    if isinstance(given, Path):
        path = given.absolute()  # the run may change the current folder
        return RunFolder(path, run_id, lock=lock_folder(path, token))
    if given is not None:
        if resume.get("remote") == given:
            return _resumed(resume, run_id, token)
        if not resume:  # a run survives the loss of its remote folder, but it starts only with a sound one
            _reach(given, lambda remote: remote.check_writable(run_id))
        path = _scratch(given)
        return _with_notice(RunFolder(path, run_id, given, lock=lock_folder(path, token)))
    if not resume:
        return _new(host.default_folder, run_id, token)
    try:
        return _resumed(resume, run_id, token)
    except FolderInUseError as error:
        folder = _new(host.default_folder, run_id, token)
        folder.notices = (f"merge: {error.folder} is another run's; this one goes on in {folder.path}",)
        return _with_notice(folder)


def _resumed(resume: Mapping[str, Any], run_id: str, token: str) -> RunFolder:
    """The folder of the run that is resumed; if that was on another machine, one of the same name here."""
    url, path = resume.get("remote"), Path(resume["dirpath"])
    is_elsewhere = url is not None and not path.is_dir()
    if url is not None and is_elsewhere:
        path = _scratch(url)
    owner = _owner(path)
    if owner not in (None, run_id):
        raise FolderInUseError(path)
    is_elsewhere = is_elsewhere and owner is None
    return _with_notice(
        RunFolder(path, run_id, url, is_elsewhere=is_elsewhere, lock=lock_folder(path, token))
    )


def _new(base: str, run_id: str, token: str) -> RunFolder:
    """Makes a folder that no other run has: of several that try a name at the same time, one succeeds."""
    if is_remote(base):
        return _with_notice(_reach(base, lambda remote: _new_remote(remote, run_id, token)))
    first = local_path(base).absolute()
    path = next(path for path in map(Path, _numbered(str(first))) if _make(path))
    folder = RunFolder(path, run_id, is_new=True, lock=lock_folder(path, token))
    if path != first:
        folder.notices = (f"merge: {first} is another run's; snapshots and merges of this one go to {path}",)
    return folder


def _new_remote(remote: RemoteFolder, run_id: str, token: str) -> RunFolder:
    taken, tried = remote.siblings(), 0
    for url in _numbered(remote.url):
        path = _scratch(url)
        if url.rpartition("/")[2] in taken or not _make(path):
            continue
        folder = RunFolder(path, run_id, url, is_new=True, lock=lock_folder(path, token))
        try:
            if RemoteFolder(url).claim(run_id):
                return folder
        except BaseException:
            folder.give_up()
            raise
        folder.give_up()
        tried += 1
        if tried == _MOST_CLAIMS:
            break
    raise ValueError(
        f"dirpath={remote.url!r} can't be used: {tried} new folders next to it did not list the file that "
        "was just written there; name a dirpath"
    )


def _numbered(base: str) -> Iterator[str]:
    yield base
    yield from (f"{base}-{number}" for number in count(1))


def _make(path: Path) -> bool:
    """Makes a folder; returns whether it is new.

    Raises:
        ValueError: if it can't be made.
    """
    try:
        make_folder(path.parent)
        with suppress(FileExistsError):
            path.mkdir()
            with suppress(OSError):  # one may be allowed to make a folder, but not to sync its parent
                sync(path.parent)
            return True
    except OSError as error:
        raise ValueError(
            f"dirpath={str(path)!r} can't be used: {error}; name a folder that can be written"
        ) from None
    return False


def _scratch(url: str) -> Path:
    """The local folder of a run with a remote one; on one machine it depends on the URL alone."""
    protocol, _, place = url.rpartition("://")
    parts = (protocol, *re.sub(r"^[^/]*@", "", place).split("/"))  # without a password
    here = Path.cwd() if os.access(Path.cwd(), os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    return here.joinpath(_SCRATCH, *(part for part in parts if part not in ("", ".", "..")))


def _reach(url: str, use: Callable[[RemoteFolder], _T]) -> _T:
    """Calls a function with a remote folder, before a run begins.

    Raises:
        ValueError: if it can't be reached or written.
    """
    try:
        return use(RemoteFolder(url))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"dirpath={url!r} can't be used: {error!r}; check its name and the credentials, or name another"
        ) from error


def _with_notice(folder: RunFolder) -> RunFolder:
    line = f"merge: merges go to {folder.url}; the window and the record of loss spikes stay in {folder.path}"
    if folder.url is not None:
        folder.notices = (*folder.notices, line)
    return folder


def _owner(folder: Path) -> str | None:
    """The id of the run whose window or merges are in a folder; ``None`` if unknown."""
    return find_manifest(folder / WINDOW).run_id or find_record(folder / LATEST).run_id


def _not_shared(path: Path, url: str | None, rank: int) -> ValueError:
    remedy = "name one" if url is None else "start the run in a current folder"
    return ValueError(
        f"dirpath={str(path)!r} is not the same folder on all ranks: rank {rank} does not see what rank 0 "
        f"has written; {remedy} on a file system that they share"
    )
