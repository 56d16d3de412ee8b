"""What the tests of the window's files share."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from run_outcomes import checksum, damage, leftovers, window
from safetensors.torch import load_file

from merge_callback import CheckpointMergeCallback

CODEC = {"snapshot_codec": "delta-fp16"}
WAYS = pytest.mark.parametrize("codec", [{}, CODEC], ids=["whole", "differences"])

LAST = [20, 22, 24, 26]
"""The steps of the window at the end of a run of `tiny_run.fit`."""


def steps(folder):
    """The steps of the snapshots in a run's window."""
    return [record["step"] for record in window(folder / "merges")["snapshots"]]


def files(folder):
    """The window's files by the step of their snapshot."""
    return {int(path.name[5:13]): path for path in (folder / "merges/window").glob("step=*.safetensors")}


def quiet(**trainer):
    """A trainer that logs nothing, so that a full disk is ours alone."""
    return {"logger": False, **trainer}


@contextmanager
def largest_file(size):
    """Within, a write beyond `size` bytes of a file fails with EFBIG: a full disk that needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def settle(trainer):
    """Waits for the merge that is being published beside training."""
    merging = next(c for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback))
    merging.session.background.drain()


class Full(Callback):
    """Limits the size of files from one step to another. Put it before the merging callback."""

    acts_first = True

    def __init__(self, size, first, last):
        self.size, self.first, self.last = size, first, last
        self.limit = largest_file(size)
        self.during = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in (self.first, self.last):
            settle(trainer)  # what is being published belongs to the steps before
        if trainer.global_step == self.first:
            self.limit.__enter__()
        if self.first < trainer.global_step <= self.last:
            window = Path(trainer.default_root_dir) / "merges/window"
            self.during.append(json.loads((window / "manifest.json").read_text()))
        if trainer.global_step == self.last:
            self.limit.__exit__(None, None, None)

    def on_train_end(self, trainer, module):
        if self.last > trainer.global_step:
            settle(trainer)
            self.limit.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def unlimited():
    """Whatever a failed test did, the next may write."""
    limits = {what: resource.getrlimit(what) for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS)}
    yield
    for what, limit in limits.items():
        resource.setrlimit(what, limit)


def assert_nothing_is_half_there(folder):
    merges = folder / "merges"
    assert not damage(merges)
    assert not leftovers(merges)
    for path in files(folder).values():
        assert load_file(path)
    named = {record["file"]: record["checksum"] for record in window(merges)["snapshots"] if record["file"]}
    for name, expected in named.items():
        assert checksum(merges / "window" / name) == expected
