"""Reports what the callback is about to do, before the run spends anything on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from merge_callback.options import Options
from merge_callback.signals.host import Host
from merge_callback.snapshots.running import RunningAverages
from merge_callback.snapshots.storage import STORAGES, SnapshotStore


@dataclass(frozen=True)
class Plan:
    """The figures of a run's merging, for the user to read.

    Args:
        window: number of snapshots kept.
        every: the interval between snapshots, in ``unit``.
        unit: ``"steps"`` or ``"tokens"``.
        total_steps: optimizer steps the whole run will take; ``None`` if it has no end.
        snapshot_bytes: size of one snapshot in bytes, on all ranks together.
        rank_bytes: bytes of it that this rank keeps.
        window_bytes: size of a full window in bytes, on all ranks together.
        storage: the place of the snapshots.
        folder: the folder of the snapshot files, if any.
        free: free room there, in bytes.
        methods: merging method by phase.
        frozen_bytes: frozen bytes of a snapshot, on all ranks together, if these are stored only once.
        batches: batches of the whole run, if the steps per batch are still to be measured; else ``None``. A
            manual optimization takes any number of steps per batch, and those of all its optimizers count.
        running: the running averages, and what they take; empty if there are none.
        experts: how many finished experts this one is merged with, and by which method; empty if none.
        candidates: what else the window is merged by; empty if nothing.
    """

    window: int
    every: int
    unit: str
    total_steps: int | None
    snapshot_bytes: int
    rank_bytes: int
    window_bytes: int
    storage: str
    folder: Path | None
    free: int
    methods: dict[str, str]
    frozen_bytes: int = 0
    batches: int | None = None
    experts: str = ""
    running: str = ""
    candidates: str = ""

    @classmethod
    def of(
        cls, options: Options, store: SnapshotStore, host: Host, running: RunningAverages | None = None
    ) -> Plan:
        """The plan for a run.

        Raises:
            ValueError: if a full window does not fit.
        """
        experts = options.experts
        return cls(
            window=options.window,
            every=options.every,
            unit=options.unit,
            total_steps=host.total_steps,
            snapshot_bytes=store.whole.nbytes,
            rank_bytes=store.layout.nbytes,
            window_bytes=store.nbytes(options.window, of_all_ranks=True),
            storage=options.storage,
            folder=store.folder,
            free=check_room(options, store, host.processes, running.stored_nbytes if running else 0),
            methods={phase: method.name for phase, method in options.methods.items()},
            frozen_bytes=store.whole.only(store.expected).nbytes,
            batches=None if host.total_steps else host.total_batches,
            running=_told(running) if running else "",
            candidates=", ".join(options.candidates),
            experts=f"{len(experts.paths)} finished experts by {experts.method.name}" if experts else "",
        )

    def lines(self) -> list[str]:
        """The lines to report at the start of fit."""
        place = f"{self.storage}, lost with the process"
        if self.folder:
            place = f"{self.storage} ({from_here(self.folder)})"
        one, every = in_bytes(self.snapshot_bytes), f"{self.every:,} {self.unit}"
        share = (
            "" if self.rank_bytes == self.snapshot_bytes else f" ({in_bytes(self.rank_bytes)} of this rank)"
        )
        once = f", {in_bytes(self.frozen_bytes)} of it frozen and kept once" if self.frozen_bytes else ""
        return [
            f"merge: a snapshot every {every}, the last {self.window} kept" + self._count(),
            f"merge: {one} per snapshot{share}{once}, {in_bytes(self.window_bytes)} in total, "
            f"on {place}; {in_bytes(self.free)} free",
            "merge: " + ", ".join(f"{method} in the {phase} phase" for phase, method in self.methods.items()),
            *([f"merge: each validation compares it with {self.candidates}"] if self.candidates else []),
            *([f"merge: {self.running}"] if self.running else []),
            *([f"merge: after each validation, merged with {self.experts}"] if self.experts else []),
        ]

    def measured(self, tokens_per_step: float) -> list[str]:
        """One more line, once the number of tokens per step is known."""
        steps = self.every / tokens_per_step
        return [
            f"merge: {tokens_per_step:,.0f} tokens per step, so a snapshot about every {steps:,.0f} steps"
            + self._in_this_run(steps)
        ]

    def with_steps(self, per_batch: float) -> Plan:
        """The plan of a manual optimization, once the number of optimizer steps per batch is known."""
        return replace(self, total_steps=int((self.batches or 0) * per_batch), batches=None)

    def counted(self, per_batch: float) -> list[str]:
        """One more line for such a plan."""
        return [
            f"merge: {per_batch:.3g} optimizer step{'s' * (per_batch != 1)} per batch (of all optimizers), "
            f"so a snapshot about every {self.every / per_batch:,.3g} batches" + self._in_this_run(self.every)
        ]

    def warnings(self, tokens_per_step: float | None = None) -> list[str]:
        """What the user loses if the run is too short for the window."""
        count = self.count(tokens_per_step)
        if count is None or count >= self.window or self.experts:
            return []
        end = f"the run ends after {self.total_steps:,} steps, with {count} of {self.window} snapshots"
        lost = "nothing will be merged" if count < 2 else "the window never fills"
        return [f"merge: {lost}: {end}; {self._remedy(tokens_per_step)}"]

    def count(self, tokens_per_step: float | None = None) -> int | None:
        """The number of snapshots that the whole run will take; ``None`` if that is not known yet."""
        if self.total_steps is None or (self.unit == "tokens" and tokens_per_step is None):
            return None
        per_step = tokens_per_step if self.unit == "tokens" and tokens_per_step else 1
        return int(self.total_steps * per_step // self.every)

    def _remedy(self, tokens_per_step: float | None) -> str:
        per_step = tokens_per_step if self.unit == "tokens" and tokens_per_step else 1
        filling = math.floor((self.total_steps or 0) * per_step / self.window)
        if filling < per_step:
            return "train longer, or choose a smaller window="
        return f"every_n_{self.unit}={filling} would fill it once"

    def _count(self) -> str:
        if self.unit == "tokens":
            return "; the tokens per step will be measured over the first steps"
        return self._in_this_run(self.every)

    def _in_this_run(self, steps: float) -> str:
        if self.batches:
            return (
                f"; the steps of all optimizers count; this run has {self.batches:,} batches, and the steps "
                "per batch will be measured over the first ones"
            )
        if self.total_steps is None:
            return "; the run has no set end"
        return f"; {int(self.total_steps / steps)} in this run of {self.total_steps:,} steps"


def from_here(path: Path) -> Path:
    """A path as one would type it in the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def in_bytes(size: float) -> str:
    """A size for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _told(running: RunningAverages) -> str:
    """What running averages take, for people."""
    every = {name: one.average.every_n_steps for name, one in running.by_name.items()}
    names = ", ".join(name + (f" (every {n} steps)" if n > 1 else "") for name, n in every.items())
    line = (
        f"running averages {names}: {in_bytes(running.nbytes)} each in memory, and again for a copy of each"
    )
    if running.stored_nbytes:
        line += (
            f"; copies at snapshots and checkpoints take up to {in_bytes(running.stored_nbytes)} of disk, "
            "and up to three times as much while the trainer's last two checkpoints need older ones"
        )
    return line


def check_room(options: Options, store: SnapshotStore, processes: int = 1, further: int = 0) -> int:
    """Checks that a full window fits its storage, and returns the free room there in bytes.

    The window's files that are there already (of a resumed run) count as free.

    Args:
        options: the callback's options.
        store: the store of this rank's snapshots.
        processes: number of processes on this machine, each with its own window.
        further: bytes that are to lie beside the window's files.

    Raises:
        ValueError: if it does not fit; says how much is needed and free, and what to choose instead.
        RemoteError: if it does not fit on another rank.
    """
    place = store.place
    free = place.free_bytes(store.folder, store.device)
    problem = None
    try:
        if store.folder is not None:
            files = [*store.folder.glob("*step=*.safetensors"), *store.folder.glob("*step=*/*.safetensors")]
            disk = STORAGES["disk"].free_bytes(store.folder, store.device)
            disk += sum(p.lstat().st_size for p in files)
            needed = store.peak_nbytes(options.window, of_all_ranks=True) + further
            _check_fits("disk", needed, disk, store.codec)
            free = disk if place.needs_files else free
        if not place.needs_files:
            sharing = processes if place.is_of_machine else 1
            _check_fits(options.storage, store.peak_nbytes(options.window) * sharing, free, store.codec)
    except ValueError as error:
        problem = error
    store.ranks.agree(problem)
    return free


def _check_fits(storage: str, needed: int, free: int, codec: str) -> None:
    if needed <= free:
        return
    raise ValueError(
        f"the window needs {in_bytes(needed)} of {storage} room and {in_bytes(free)} are free: "
        f"choose {STORAGES[storage].remedy}, or a smaller window="
        + ("" if codec else ", or snapshot_codec='delta-fp16'")
    )
