"""The parts of a session that are made according to the options."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from merge_callback.checkpoints.merge_record import versions
from merge_callback.engine.background import Background
from merge_callback.engine.events import EventFile
from merge_callback.engine.plan import Plan
from merge_callback.engine.run_folder import RunFolder
from merge_callback.engine.run_window import still_needed
from merge_callback.engine.snapshot_pipeline import SnapshotPipeline
from merge_callback.messages import warn
from merge_callback.options import Options
from merge_callback.publish import Publisher
from merge_callback.publish.remote_publisher import RemotePublisher
from merge_callback.recovery.spike_watch import SpikeWatch
from merge_callback.sharding import Ranks
from merge_callback.signals.host import Host
from merge_callback.signals.step_statistics import StepStatistics
from merge_callback.snapshots.window import Window
from merge_callback.spike_options import DEFAULT


def publisher_of(options: Options, folder: RunFolder, ranks: Ranks) -> Publisher:
    """The publisher of a run's merges; only that of the first rank, which publishes, uploads."""
    if folder.url is None or not ranks.is_first:
        return Publisher(folder.path, options.keep_last, options.max_shard_bytes)
    return RemotePublisher(
        folder.path, options.keep_last, options.max_shard_bytes, folder.url, folder.run_id, Background()
    )


def watch_for_spikes(
    options: Options, host: Host, pipeline: SnapshotPipeline, statistics: StepStatistics, dirpath: Path
) -> SpikeWatch | None:
    """What watches the loss, and restores the run from the pipeline's window; ``None`` if nobody is to.

    Raises:
        ValueError: if a restore is asked for, and impossible.
    """
    if options.spike.action == "off":
        return None
    watch = partial(
        SpikeWatch,
        host=host,
        merger=partial(getattr, pipeline, "merger"),  # it is the window's once the last snapshot is in it
        statistics=statistics,
        dirpath=dirpath,
        last_good_merge=pipeline.newest_emission_up_to,
    )
    try:
        return watch(options.spike)
    except ValueError as error:
        if options.spike is not DEFAULT:
            raise
        # The user has not asked for restores, so the run trains on even if they are impossible.
        warn(f"merge: loss spikes are only reported, nothing is restored: {error}")
        return watch(replace(options.spike, action="warn"))


def event_file(options: Options, plan: Plan, folder: RunFolder, ranks: Ranks, window: Window) -> EventFile:
    """The event file of a run; only the first rank has one."""
    run = {
        "run_id": folder.run_id,
        "window": options.window,
        "every": options.every,
        "unit": options.unit,
        "methods": plan.methods,
        "total_steps": plan.total_steps,
        "storage": options.storage,
        "url": folder.url,
        "ranks": ranks.size,
        "snapshot_bytes": plan.snapshot_bytes,
        "window_bytes": plan.window_bytes,
        "versions": versions(),
    }
    assert folder.lock is not None
    return EventFile(folder.path, run, folder.lock.check, partial(still_needed, window, options.window))
