"""Makes the window of a run for its model, and restores it when the run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from merge_callback.checks import DTYPES
from merge_callback.engine.model_parts import global_tensors
from merge_callback.engine.run_folder import RunFolder
from merge_callback.merging.power_iteration import vectors_of
from merge_callback.messages import warn
from merge_callback.options import Options
from merge_callback.publish.export import Naming
from merge_callback.sharding import Sharding, device_of
from merge_callback.snapshots.arena import all_finite
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.codecs import CODECS
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.running import RunningAverages
from merge_callback.snapshots.storage import SnapshotStore
from merge_callback.snapshots.window import Window
from merge_callback.snapshots.window_folder import WINDOW
from merge_callback.snapshots.window_restore import layout_difference

log = logging.getLogger(__name__)


def new_window(
    options: Options,
    model: ModelTensors,
    sharding: Sharding,
    folder: RunFolder,
    resume: Mapping[str, Any],
) -> Window:
    """An empty window for a model.

    Args:
        options: the options of merging.
        model: the live model's tensors.
        sharding: says what each rank keeps of them.
        folder: the run's folder.
        resume: a former session's ``state_dict``; empty for a new run.
    """
    still, codec = stored_natively(options, model, resume.get("window", {}))
    store = SnapshotStore(
        Layout.of(sharding.own(model.tensors), options.snapshot_dtype, still),
        options.storage,
        folder.path / WINDOW if options.durable else None,
        device_of(model.tensors.values()),
        {name for name in model.buffers if not all_finite(model.tensors[name])},
        model.buffers,
        sharding,
        Layout.of(global_tensors(model), options.snapshot_dtype, still),
        codec=codec,
        frozen=model.frozen,
    )
    return Window(options.window, store, folder.run_id)


def running_averages(
    options: Options, model: ModelTensors, window: Window, device: torch.device
) -> RunningAverages | None:
    """The running averages that the options ask for; ``None`` if they ask for none.

    What is excluded, most of a frozen model, masks and the vectors of spectral norm are left out.

    Args:
        options: the options of merging.
        model: the live model's tensors.
        window: the run's window.
        device: the device that training uses.
    """
    if not options.running:
        return None
    masks = {name for name in model.buffers if not all_finite(model.tensors[name])}
    left_out = {
        *masks,
        *model.matching(options.exclude),
        *vectors_of(model.tensors),
        *window.store.expected,
    }
    return RunningAverages(options.running, model.tensors, left_out, window, device)


def still_needed(window: Window, count: int) -> int:
    """The bytes that a window will still take of its disk, if it is to hold ``count`` snapshots."""
    if window.store.folder is None:
        return 0
    first, further = window.store.sizes
    kept = len(window.snapshots)
    return first + count * further - (first + (kept - 1) * further if kept else 0)


def note_publishing(window: Window, naming: Naming, model: ModelTensors, exclude: Sequence[str]) -> None:
    """Records in the window how its merges are published, so that its files can be merged later."""
    if window.store.folder is None or not window.ranks.is_first:
        return
    try:
        published = naming.record(model.tied, model.matching(exclude))
        window.folder.published = {**published, "dtypes": _dtypes_of_merges(window.store.whole)}
    except Exception as error:  # a foreign configuration, or a full disk: merging the files then needs flags
        log.info("merge: the snapshots do not record how merges are published: %r", error)


def _dtypes_of_merges(layout: Layout) -> dict[str, str]:
    """The dtype of merges by the one that tensors are stored in, if it is one alone and another."""
    found: dict[torch.dtype, set[torch.dtype]] = {}
    for group in layout.groups:
        found.setdefault(group.stored, set()).add(group.dtype)
    single = {stored: dtypes.pop() for stored, dtypes in found.items() if len(dtypes) == 1}
    return {str(s): str(d) for s, d in single.items() if s != d and d in DTYPES.values()}


def stored_natively(
    options: Options, model: ModelTensors, recorded: Mapping[str, Any]
) -> tuple[set[str], str]:
    """Names of the tensors that are stored in their own dtype while the rest is not, and the codec.

    These are the tensors that are never averaged; rounding would change them. A resumed run keeps the set
    that it started with, though parameters may have been frozen or unfrozen in between. The codec is empty
    if it would encode no tensor.

    Args:
        options: the callback's options.
        model: the live model's tensors.
        recorded: the resumed window's ``state_dict``; empty for a new run.
    """
    tensors, dtype = global_tensors(model), options.snapshot_dtype
    still = model.frozen | model.buffers | model.matching(options.exclude)
    before = recorded.get("still", ())
    if (dtype or recorded.get("codec")) and Layout.of(tensors, dtype, before).hash == recorded.get("layout"):
        still = set(before)
    codec = options.snapshot_codec
    if codec and not Layout.of(tensors, dtype, still).delta(CODECS[codec]).is_delta:
        codec = ""
    return (still if dtype or codec else set()), codec


def restore_window(window: Window, folder: RunFolder, state: Mapping[str, Any], last_step: int) -> bool:
    """Restores the snapshots of a run that is resumed; returns whether its window fits and had any.

    Args:
        window: an empty window, for the present model.
        folder: the run's present folder.
        state: the session's ``state_dict``.
        last_step: the checkpoint's number of optimizer steps.

    Raises:
        ValueError: if the window in the run's own folder does not fit the model or the options.
    """
    kept, dirpath = state["window"], Path(state["dirpath"])
    if folder.is_elsewhere and kept["snapshots"]:
        warn(f"merge: the window begins empty: the resumed one was in {dirpath}, which is not here")
        return False
    if different := layout_difference(window.store, window.folder, kept):
        what = "of another model"
        if different.startswith("snapshot_codec"):
            what = "in another snapshot_codec"
        elif " and here " in different:
            what = "in another dtype"
        if dirpath == folder.path:
            raise ValueError(
                f"the run that is resumed kept a window {what} in dirpath={str(dirpath)!r}: "
                f"{different}; resume with the model, precision, snapshot_dtype and snapshot_codec "
                "it was kept with, or give a new dirpath to begin with an empty window"
            )
        warn(f"merge: the window begins empty, the resumed one is {what}: {different}")
        return False
    for problem in window.restore(kept, last_step):
        warn(f"merge: left out of the restored window: {problem}")
    return bool(kept["snapshots"])
