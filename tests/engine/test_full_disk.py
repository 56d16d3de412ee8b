"""What happens where the window's files, or its merges, can't be written."""

import os
import re
import subprocess
from contextlib import contextmanager, suppress
from itertools import product

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from resumed_runs import StopAtStart
from run_outcomes import checksum, emissions
from slow_cases import mostly_slow
from tiny_run import STEPS, At, SaveAt, StopError, Tiny, fit
from window_runs import (
    CODEC,
    LAST,
    WAYS,
    Full,
    assert_nothing_is_half_there,
    quiet,
    settle,
    steps,
    unlimited,  # noqa: F401 (a fixture)
)

from merge_callback import CheckpointMergeCallback


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_disk_full_while_a_snapshot_is_written_costs_that_snapshots_file_only(tmp_path, storage):
    fit(tmp_path / "unbroken", storage=storage, keep_last=None)
    full = Full(3000, 10, 14)  # a snapshot takes 5 kB

    with pytest.warns(UserWarning, match="the snapshot of step 12 could not be kept in a file"):
        fit(tmp_path, before=[full], storage=storage, keep_last=None, trainer=quiet())

    assert_nothing_is_half_there(tmp_path)
    assert steps(tmp_path) == LAST
    assert [record["step"] for record in full.during[-1]["snapshots"]] == [2, 4, 6, 8]
    expected, found = (
        {p.name: p for p in emissions(f / "merges")} for f in (tmp_path / "unbroken", tmp_path)
    )
    if storage == "cpu":  # in memory nothing was lost; merge 12 found no room either
        assert expected.keys() - found.keys() == {"step=00000012-tokens=288-sma"}
        for name, path in found.items():
            assert checksum(path / "model.safetensors") == checksum(expected[name] / "model.safetensors")


def test_a_disk_full_while_the_manifest_is_written_loses_no_snapshot(tmp_path):
    full = Full(5500, 17, 24)  # a snapshot takes 5.3 kB, a record in the manifest 0.3 kB

    with pytest.warns(UserWarning, match="step 23"):
        fit(tmp_path, before=[full], window=30, every_n_steps=1, trainer=quiet())

    assert_nothing_is_half_there(tmp_path)
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    seen = [len(manifest["snapshots"]) for manifest in full.during]
    assert seen[0] >= 10
    assert seen[-1] == seen[-4]  # the last complete one stayed


def wide():
    """A model whose merge is larger than its snapshot in bf16."""
    return Tiny(width=64)


def test_a_disk_full_while_a_merge_is_published_costs_that_emission_only(tmp_path):
    options = {"module": wide, "snapshot_dtype": "bf16", "keep_last": None}
    fit(tmp_path / "unbroken", **options)
    full = Full(11_000, 10, 14)  # a snapshot takes 8.8 kB, a merge 13.4 kB

    with pytest.warns(UserWarning, match="the merge of step 12 was not published"):
        fit(tmp_path, before=[full], trainer=quiet(), **options)

    assert_nothing_is_half_there(tmp_path)
    expected, found = (
        {p.name: p for p in emissions(f / "merges")} for f in (tmp_path / "unbroken", tmp_path)
    )
    assert expected.keys() - found.keys() == {"step=00000012-tokens=288-sma"}
    for name, path in found.items():
        assert checksum(path / "model.safetensors") == checksum(expected[name] / "model.safetensors")


def test_a_merge_that_found_no_room_is_published_at_the_end_if_there_is_room_then(tmp_path):
    full = Full(11_000, 26, 27)

    with pytest.warns(UserWarning, match="the merge of step 26 was not published"):
        fit(tmp_path, before=[full], module=wide, snapshot_dtype="bf16", emit_every=1, trainer=quiet())

    assert os.readlink(tmp_path / "merges/latest") == "step=00000026-tokens=624-ema"


needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounts a small disk; full disks are tested above too"
)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a few pages in memory; `small_disk(pages)` returns its folder."""
    mounted = []

    def mount(pages, inodes=1000):
        folder = tmp_path / "disk"
        folder.mkdir()
        options = f"size={pages * 4096},nr_inodes={inodes}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"can't mount: {done.stderr.decode()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave=0):
    """Takes all room on a disk but `leave` pages."""

    def write(module=None):
        disk = os.statvfs(folder)
        (folder / "fill").write_bytes(b"\1" * (disk.f_bavail - leave) * disk.f_frsize)

    return write


def free(folder):
    """Gives back the room that `fill` took."""
    return lambda module=None: (folder / "fill").unlink()


@needs_root
@pytest.mark.parametrize(
    ("codec", "leave"), mostly_slow(product([{}, CODEC], range(8)), daily=[0, 2, 4, 6, 9, 11, 13, 15])
)
def test_a_disk_that_fills_and_empties_again_leaves_a_right_window(tmp_path, small_disk, leave, codec):
    disk = small_disk(100)
    holes = At(step9=fill(disk, leave), step17=free(disk))

    fit(tmp_path, before=[holes], dirpath=disk / "merges", trainer=quiet(), **codec)

    (tmp_path / "merges").symlink_to(disk / "merges")
    assert_nothing_is_half_there(tmp_path)
    assert steps(tmp_path) == LAST


@needs_root
@pytest.mark.parametrize(
    ("storage", "codec"), mostly_slow(product(["disk", "cpu"], [{}, CODEC]), daily=[0, 3])
)
def test_a_disk_with_room_for_the_window_and_one_more_snapshot_never_jams(
    tmp_path, small_disk, storage, codec
):
    disk = small_disk(100)
    # Room for a snapshot, not for its manifest; what the window drops would make room for both. The next
    # difference is written, and the second snapshot whole, before the oldest goes.
    jam = At(step9=fill(disk, leave=4 if codec else 2))

    fit(
        tmp_path,
        before=[jam],
        dirpath=disk / "merges",
        emit_every=0,
        storage=storage,
        trainer=quiet(),
        **codec,
    )

    (tmp_path / "merges").symlink_to(disk / "merges")
    assert steps(tmp_path) == LAST


@contextmanager
def no_permission(folder):
    """Within, nothing can be written below `folder`."""
    if os.geteuid() == 0:  # may write everywhere, so be somebody else
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    parts = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for part in parts:
        part.chmod(0o555)
    try:
        yield
    finally:
        for part in parts:
            part.chmod(0o755)


def test_a_folder_that_can_not_be_written_is_named_before_training_starts(tmp_path):
    (tmp_path / "closed").mkdir()
    if os.geteuid() == 0:
        tmp_path.chmod(0o755)
    refused = pytest.raises(ValueError, match=r"dirpath='.*merges'.* can't be written")
    with no_permission(tmp_path / "closed"), refused:
        CheckpointMergeCallback(dirpath=tmp_path / "closed/merges")


@WAYS
def test_a_folder_that_turns_read_only_and_back_leaves_a_right_window(tmp_path, codec):
    locked = no_permission(tmp_path / "merges")

    def lock(module):
        settle(module.trainer)  # a draft that is begun could not be removed
        locked.__enter__()

    change = At(step9=lock, step17=lambda m: locked.__exit__(None, None, None))

    with pytest.warns(UserWarning, match="the snapshot of step 12 could not be kept in a file"):
        fit(tmp_path, before=[change], trainer=quiet(), **codec)

    assert_nothing_is_half_there(tmp_path)
    assert steps(tmp_path) == LAST


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_window_that_can_not_fit_is_refused_with_its_size_and_a_way_out(tmp_path, storage):
    mend = r"needs 1\d+\.\d TB of .* free: choose .*snapshot_codec='delta-fp16'"
    with pytest.raises(ValueError, match=mend):
        fit(tmp_path, window=100_000_000_000, storage=storage)


@needs_root
def test_a_resumed_run_counts_the_room_of_its_own_window_as_free(tmp_path, small_disk):
    disk = small_disk(60)
    options = {"dirpath": disk / "merges", "emit_every": 0, "trainer": quiet()}
    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[SaveAt(tmp_path / "c.ckpt", 13, stop=13)], **options)
    fill(disk, leave=1)()  # a full window and one more snapshot need 6 kB

    with pytest.raises(StopError):
        fit(tmp_path, tmp_path / "c.ckpt", [StopAtStart()], **options)
    with pytest.raises(ValueError, match=r"needs 6.* kB"):
        fit(tmp_path / "fresh", dirpath=disk / "fresh", trainer=quiet())


@needs_root
@pytest.mark.filterwarnings("ignore:.*is low on space")
@WAYS
def test_a_run_that_asked_for_just_the_room_there_is_never_jams(tmp_path, small_disk, recwarn, codec):
    disk = small_disk(800)
    options = {"module": lambda: Tiny(width=2048), "dirpath": disk / "merges", "emit_every": 0}
    options |= {"trainer": quiet(limit_val_batches=0), **codec}
    fill(disk, leave=10)()
    with pytest.raises(ValueError) as refused:
        fit(tmp_path, **options)
    needed = float(re.search(r"needs ([\d.]+) MB", str(refused.value))[1]) * 1e6
    free(disk)()
    # Six files, rounded up to pages, and their headers; two manifests, the folders, and what MB rounds off.
    fill(disk, leave=int(needed / 4096) + 6 * 2 + 6 + 13)()

    fit(tmp_path, **options)

    (tmp_path / "merges").symlink_to(disk / "merges")
    assert steps(tmp_path) == LAST
    assert not [w for w in recwarn.list if "could not be kept" in str(w.message)]


@needs_root
def test_a_run_that_was_not_refused_has_room_for_the_files_its_checkpoints_keep(
    tmp_path, small_disk, recwarn
):
    disk = small_disk(100)
    fill(disk, leave=5 * 2 + 4)()  # five snapshot files, the folders and two manifests
    save = ModelCheckpoint(tmp_path / "c", every_n_train_steps=8, save_top_k=-1)
    with suppress(ValueError):  # which would be fine: it was told before it trained
        fit(tmp_path, callbacks=[save], dirpath=disk / "merges", emit_every=0, trainer=quiet())

    assert not [w for w in recwarn.list if "could not be kept" in str(w.message)]
