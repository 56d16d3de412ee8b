"""What a run has to show in Python: its window, merges, history; during the run and afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from merge_callback.checkpoints.load_merge import load_merge
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.checks import positive
from merge_callback.engine.history import History
from merge_callback.engine.session import MergeSession
from merge_callback.merging import MergeMethod, resolve_method
from merge_callback.offline.job import Job
from merge_callback.offline.merge_files import merge_files
from merge_callback.options import MERGED_PHASES, Options
from merge_callback.publish.emission import step_of
from merge_callback.publish.published import emissions, latest_in
from merge_callback.snapshots.lora_merge import factor_pairs
from merge_callback.snapshots.merge import Merge
from merge_callback.snapshots.segments import Segments
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.window_merger import WindowMerger


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot in a window: when it was taken, at which learning rate, and in which phase of it.

    ``step`` counts optimizer steps; ``tokens`` is ``None`` if tokens are not counted; ``lr`` is the learning
    rate that the last step applied (the largest, with several); ``phase`` is ``"warmup"``, ``"stable"`` or
    ``"decay"``.
    """

    step: int
    tokens: int | None
    lr: float
    phase: str


class RunResults:
    """What a callback or merger shows of its run in Python: while the run goes on, and when it is over."""

    options: Options

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options.shown()})"

    @abstractmethod
    def _run(self) -> tuple[MergeSession | None, Mapping[str, Any]]:
        """The session while the run goes on, else ``None``; and its last ``state_dict``, or an empty one."""

    @property
    def window(self) -> list[SnapshotInfo]:
        """The snapshots in the window, oldest first. Waits until the last one is stored."""
        session, state = self._run()
        if session is not None:
            session.pipeline.wait_for_last()
            snapshots = list(session.pipeline.stored_snapshots)
        else:
            snapshots = _snapshots(state.get("window", {}))
        return [SnapshotInfo(s.step, s.tokens, s.lr, s.phase) for s in snapshots]

    @property
    def latest(self) -> Path | str | None:
        """The newest emission: its folder, or its URL; ``None`` if there is none.

        It is complete, ready for ``load_merge``. Of a remote folder only the first rank knows.
        """
        place = self._published()
        if place.url is None and (name := latest_in(place.folder)) in place.names:
            return place.folder / str(name)
        return place.path_of(place.names[-1]) if place.names else None

    @property
    def best(self) -> Path | str | None:
        """The emission that scored best in its validation, of those that are still there.

        ``None`` if none of them was validated. The metric is the first one whose direction is known (see
        ``lower_is_better``), a loss before others.
        """
        session, state = self._run()
        history = session.pipeline.history if session else History.of(state.get("history", {}))
        place = self._published()
        best = history.ranked({*map(step_of, place.names)})[:1]
        return next((place.path_of(name) for name in reversed(place.names) if step_of(name) in best), None)

    @property
    def history(self) -> list[dict[str, Any]]:
        """A row for each snapshot and for each validation so far, for ``pandas.DataFrame(callback.history)``.

        All have ``event`` (``"snapshot"`` or ``"validation"``), ``step``, ``tokens`` and ``phase``. A
        snapshot's has ``lr`` and what was logged of it; a validation's has the live metrics by their names
        and, if a merge was validated, what was logged of it, and the ``merge_step`` of its newest snapshot.
        """
        session, state = self._run()
        rows = session.pipeline.history.rows if session else state.get("history", {}).get("rows", ())
        return [dict(row) for row in rows]

    def merge(
        self, method: str | MergeMethod | None = None, last: int | None = None
    ) -> dict[str, Tensor] | None:
        """Merges the window now, by any method, without publishing the merge or touching the run.

        Call it from the thread that trains, and on all ranks at the same place. It takes memory for two more
        models. When the run is over, it reads the window's files, and any process may call it by itself.

        Args:
            method: a method's name or object; default: that of the phase.
            last: only the newest so many snapshots, at least 2; default: all that may be merged.

        Returns:
            New CPU tensors as ``load_merge`` would give them, had this merge been published: on the first
            rank, and an empty mapping on the others. ``None`` if there are not two snapshots to merge yet, or
            if they can't be merged; the log says why.

        Raises:
            ValueError: for an unknown method, or a ``last`` below 2.
            RuntimeError: when the run is over, if its window was in memory only, or holds LoRA adapters,
                which are merged by their products only while it goes on.
        """
        if last is not None and positive("last", last) < 2:
            raise ValueError(f"last={last} leaves nothing to merge; choose 2 or more")
        session, state = self._run()
        options = session.options if session else self.options
        methods = options.methods if method is None else dict.fromkeys(MERGED_PHASES, resolve_method(method))
        if session is None:
            return _merge_of_files(state.get("window", {}), methods, last, options)
        merger = WindowMerger(session.window, methods, 1, options.exclude, options.lora, last)
        merge = session.current_merge(merger)
        return None if merge is None else _whole_tensors(session, merge)

    def _published(self) -> _Published:
        session, state = self._run()
        if session is not None:
            publisher = session.pipeline.publisher
            state = {
                "dirpath": session.dirpath,
                "remote": session.folder.url,
                "run_id": session.folder.run_id,
                "published": publisher.published,
                "remote_names": publisher.remote_names,
            }
        if not state:
            return _Published(Path(), None, [], {})
        folder, url = Path(state["dirpath"]), state.get("remote")
        here = [] if url else [emission.path.name for emission in emissions(folder, state["run_id"])]
        return _Published(folder, url, here or list(state["published"]), state.get("remote_names", {}))


@dataclass(frozen=True)
class _Published:
    """Where a run's emissions are, and their names, oldest first."""

    folder: Path
    url: str | None
    names: list[str]
    remote_names: Mapping[str, str]

    def path_of(self, name: str) -> Path | str:
        here = self.folder / name
        if self.url is None or here.is_dir():  # what waits for its upload is here
            return here
        return f"{self.url}/{self.remote_names.get(name, name)}"


def _snapshots(window: Mapping[str, Any]) -> list[Snapshot]:
    """The snapshots that a window's ``state_dict`` records."""
    return [Snapshot(**record) for record in window.get("snapshots", ())]


def _whole_tensors(session: MergeSession, merge: Merge) -> dict[str, Tensor]:
    """A merge's tensors as ``load_merge`` gives them, on the first rank."""
    parts, naming = merge.arena.tensors(), session.pipeline.naming
    if session.ranks.size > 1:
        gathered = list(session.sharding.gather(parts, parts))
        if not session.ranks.is_first:
            return {}
        parts = dict(zip(parts, gathered, strict=True))
    # Copies: views of one buffer in several dtypes could not be saved, nor those of a file stay as they are.
    tensors = naming.as_they_are({name: part.to("cpu", copy=True) for name, part in parts.items()})
    tensors |= {alias: tensors[kept] for alias, kept in session.live().tied.items()}
    return {naming.published(name): tensor for name, tensor in tensors.items()}


def _merge_of_files(
    window: Mapping[str, Any], methods: Mapping[str, MergeMethod], last: int | None, options: Options
) -> dict[str, Tensor] | None:
    """The merge of the files that a run has left."""
    segments = Segments(options.window)
    segments.snapshots = _snapshots(window)
    snapshots = segments.segment()[-last if last else None :]
    if len(snapshots) < 2:
        return None
    method = methods[snapshots[-1].phase]
    remedy = "call merge() before it ends, or load what it has published"
    if not all(snapshot.file for snapshot in snapshots):
        raise RuntimeError(f"the run is over, and its window was in memory only: {remedy}")
    paths = [Path(window["folder"], snapshot.file) for snapshot in snapshots]
    if options.lora == "delta" and _has_adapters(paths[-1]):
        raise RuntimeError(f"the run is over, and it has trained LoRA adapters: {remedy}")
    with TemporaryDirectory() as folder:
        merge_files(Job(paths, method), Path(folder) / "merge")
        return load_merge(Path(folder) / "merge")


def _has_adapters(snapshot: Path) -> bool:
    return bool(factor_pairs(open_checkpoint(snapshot).tensors))
