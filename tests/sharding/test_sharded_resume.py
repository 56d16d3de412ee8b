"""A run of several ranks that was stopped goes on with its window, on as many ranks or others."""

import errno
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_runs import run_jobs
from sharded_runs import (
    Steady,
    copy_folder,
    left_over,
    listed,
    manifest,
    merged_fit,
    on_rank,
    published,
    resumed_fit,
    saved_fit,
    snapshots,
    window_folder,
    without_diversity,
)
from training_runs import assert_same_bits

from merge_callback.sharding import Piece, Ranks, Sharding
from merge_callback.snapshots import shard_files
from merge_callback.snapshots.folder_lock import lock_folder
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.storage import SnapshotStore
from merge_callback.snapshots.window import Window

pytestmark = pytest.mark.timeout(600)

STOPPED, TAKEN = 7, [2, 4, 6]
"""The step of the checkpoint, and the snapshots taken until then."""

CODEC = {"snapshot_codec": "delta-fp16"}

DAMAGES = [("truncated", ""), ("flipped", ""), ("missing", ""), ("no list", "")]
DAMAGES += [(damage, ", resharded") for damage in ("emptied", "flipped header", "folder missing")]


def resumed(strategy, source, folder, damage=None, **options):
    """Resumes a copy of a stopped run's folder."""
    if dist.is_initialized():
        if dist.get_rank() == 0:
            copy_folder(source, folder)
            if damage:
                harm(folder, damage)
        dist.barrier()
    else:
        copy_folder(source, folder)
    return resumed_fit(strategy, folder, **options)


def harm(folder, damage):
    """Damages the second rank's part of the snapshot of step 4."""
    (snapshot,) = window_folder(folder).glob("step=00000004*")
    file = snapshot / "rank-00001-of-00002.safetensors"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 5)
    elif damage == "emptied":
        os.truncate(file, 0)
    elif damage.startswith("flipped"):
        content = bytearray(file.read_bytes())
        content[120 if "header" in damage else -5] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "no list":
        (snapshot / "shards.json").unlink()
    else:
        snapshot.rename(window_folder(folder).parent / "gone")


def resumed_on_a_full_disk(**options):
    """Resumes where the second rank can't write its new part of the snapshot of step 4."""
    real = shard_files.write_file

    def write(path, *args):
        if "step=00000004" in str(path) and on_rank(1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args)

    shard_files.write_file = write
    try:
        return resumed(**options)
    finally:
        shard_files.write_file = real


def beside_another(strategy, folder):
    """A new run where another one has been."""
    return merged_fit(strategy, folder, module=Steady(), trainer={"limit_val_batches": 0})


def locked(strategy, folder):
    """A run whose folder is another process's."""
    lock = lock_folder(Path(folder) / "merges") if dist.get_rank() == 1 else None
    dist.barrier()
    outcome = merged_fit(strategy, folder, module=Steady(), raises=True)
    if lock:
        lock.close()
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder):
    outcome = saved_fit("alone", str(folder / "1-alone"))
    os.rename(folder / "1-alone", folder / "1-alone-unbroken")
    return outcome


@pytest.fixture(scope="module")
def unbroken(folder, alone):
    jobs = {name: (saved_fit, {"strategy": name, "folder": str(folder / f"2-{name}")}) for name in TWO}
    jobs["codec"] = (saved_fit, {"strategy": "ddp", "folder": str(folder / "2-codec"), **CODEC})
    found = run_jobs(2, jobs, timeout=400)
    for name in jobs:  # else what is missing would be found there
        os.rename(folder / f"2-{name}", folder / f"2-{name}-unbroken")
    found["codec alone"] = [saved_fit("alone", str(folder / "1-codec"), **CODEC)]
    os.rename(folder / "1-codec", folder / "1-codec-unbroken")
    return {**found, "alone": [alone]}


TWO = ["ddp", "fsdp2"]
FOUR = ["fsdp2"]


@pytest.fixture(scope="module")
def on_two(folder, unbroken):
    def job(strategy, source, name, **options):
        return resumed, {
            "strategy": strategy,
            "source": str(folder / f"{source}-stopped"),
            "folder": str(folder / name),
            **options,
        }

    jobs = {name: job(name, f"2-{name}", f"2-{name} to 2-{name}") for name in TWO}
    jobs["ddp to fsdp2"] = job("fsdp2", "2-ddp", "2-ddp to 2-fsdp2")
    jobs["alone to ddp"] = job("ddp", "1-alone", "1-alone to 2-ddp")
    jobs["alone to fsdp2"] = job("fsdp2", "1-alone", "1-alone to 2-fsdp2")
    unvalidated = {"trainer": {"limit_val_batches": 0}}
    jobs["smaller"] = job("ddp", "2-ddp", "smaller", window=2, **unvalidated)
    jobs["codec"] = job("ddp", "2-codec", "2-codec to 2-ddp", **CODEC)
    jobs["codec resharded"] = job("fsdp2", "2-codec", "2-codec to 2-fsdp2", **CODEC)
    jobs["codec from one"] = job("fsdp2", "1-codec", "1-codec to 2-fsdp2", **CODEC)
    jobs["codec smaller"] = job("ddp", "2-codec", "codec smaller", window=2, **unvalidated, **CODEC)
    damaged = {"damage": "flipped", "trainer": {"max_steps": 8, "limit_val_batches": 0}}
    jobs["codec damaged"] = job("ddp", "2-codec", "codec damaged", **damaged, **CODEC)
    jobs["memory"] = job("ddp", "2-ddp", "memory", storage="cpu", **unvalidated)
    short = {"max_steps": 8, "limit_val_batches": 0}
    for damage, how in DAMAGES:
        place = f"{damage}{how}"
        jobs[place] = job("fsdp2" if how else "ddp", "2-ddp", place, damage=damage, trainer=short)
    _, options = job("fsdp2", "2-ddp", "full", trainer=short)
    jobs["full"] = (resumed_on_a_full_disk, options)
    another = {"strategy": "ddp", "folder": str(folder / "another")}
    jobs["first"], jobs["another"] = (beside_another, another), (beside_another, another)
    jobs["locked"] = (locked, {"strategy": "ddp", "folder": str(folder / "locked")})
    return run_jobs(2, jobs, timeout=400)


@pytest.fixture(scope="module")
def on_four(folder, unbroken):
    jobs = {
        name: (
            resumed,
            {
                "strategy": name,
                "source": str(folder / f"2-{name}-stopped"),
                "folder": str(folder / f"2-{name} to 4-{name}"),
            },
        )
        for name in FOUR
    }
    jobs["swapped"] = (swapped, {"folder": str(folder / "swapped")})
    return run_jobs(4, jobs, timeout=400)


def swapped(folder):
    """Two of four ranks change places, as where a mesh is laid out the other way round."""
    ranks, whole = Ranks.of_run(timedelta(seconds=30)), torch.arange(24.0).view(8, 3)

    def window(place):
        part, piece = whole[2 * place : 2 * place + 2], Piece.box((8, 3), (2 * place, 0), (2, 3))
        sharding = Sharding({"t": part}, {"t": piece}, (), ranks)
        layouts = {"layout": Layout.of({"t": part}), "whole": Layout.of({"t": whole})}
        store = SnapshotStore(storage="disk", folder=Path(folder), sharding=sharding, **layouts)
        return Window(2, store, "run"), part

    before, part = window(ranks.rank)
    for step in (1, 2):
        before.add(Snapshot(step, None, 0.1, 1.0, "stable", 0, step), before.capture({"t": part + step}))
    after, part = window([0, 2, 1, 3][ranks.rank])
    problems = after.restore(before.state_dict(), last_step=2)
    return problems, [torch.equal(s.arena.tensors()["t"], part + s.step) for s in after.snapshots]


def test_ranks_that_change_places_agree_on_who_writes_anew(on_four):
    assert on_four["swapped"] == [([], [True, True])] * 4


@pytest.fixture(scope="module")
def on_one(folder, unbroken):
    return [resumed("alone", folder / "2-ddp-stopped", folder / "2-ddp to 1-alone")]


def assert_goes_on(folder, name, found, expected, exact=True):
    """All that the resumed ranks did and left behind is what the unbroken run did and left behind."""
    whole = expected[0].run.final
    for rank in found:
        assert rank.run.losses == expected[0].run.losses[STOPPED:]
        assert rank.run.validations == expected[0].run.validations[1:]
        assert_same_bits(rank.run.final, whole)
        assert rank.windows == {k: v for k, v in expected[0].windows.items() if k > STOPPED}
        logged = {
            k: v for k, v in expected[0].metrics.items() if int(k.split()[0]) >= STOPPED
        }  # the axis is one behind
        # Where other ranks sum up, the diversity is rounded differently; its change is a difference.
        near = {k: pytest.approx(v, rel=1e-6, abs=1e-4) if "diversity" in k else v for k, v in logged.items()}
        assert rank.metrics == (logged if exact else near)
    source = name.split(" to ")[0]
    emitted, diversities = without_diversity(published(folder / name))
    expected_emissions, expected_diversities = without_diversity(published(folder / f"{source}-unbroken"))
    assert emitted == expected_emissions
    if exact:
        assert diversities == expected_diversities
    kept = {name: tensor for name, tensor in whole.items() if name != "head.weight"}  # tied to another
    assert_same_bits(snapshots(folder / name, kept), snapshots(folder / f"{source}-unbroken", kept))
    assert left_over(folder / name) == []


@pytest.mark.parametrize("strategy", TWO)
def test_a_run_resumed_on_as_many_ranks_is_the_unbroken_run(on_two, unbroken, folder, strategy):
    assert_goes_on(folder, f"2-{strategy} to 2-{strategy}", on_two[strategy], unbroken[strategy])


@pytest.mark.parametrize("strategy", TWO)
def test_as_many_ranks_take_their_files_over_as_they_are(on_two, folder, strategy):
    def files(place):
        return {r["step"]: r["file"] for r in manifest(place)["snapshots"]}

    resumed = files(folder / f"2-{strategy} to 2-{strategy}")
    assert resumed[6] == files(folder / f"2-{strategy}-unbroken")[6]
    assert resumed[8] != files(folder / f"2-{strategy}-unbroken")[8]


@pytest.mark.parametrize("strategy", FOUR)
def test_a_run_resumed_on_more_ranks_is_the_unbroken_run(on_four, unbroken, folder, strategy):
    found = on_four[strategy]
    assert_goes_on(folder, f"2-{strategy} to 4-{strategy}", found, unbroken[strategy], exact=False)


def test_a_run_resumed_on_one_rank_is_the_unbroken_run(on_one, unbroken, folder):
    assert_goes_on(folder, "2-ddp to 1-alone", on_one, unbroken["ddp"], exact=False)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_of_one_rank_resumed_on_two_is_the_unbroken_run(on_two, unbroken, folder, strategy):
    found = on_two[f"alone to {strategy}"]
    assert_goes_on(folder, f"1-alone to 2-{strategy}", found, unbroken["alone"], exact=False)


def test_a_run_resumed_with_another_sharding_is_the_unbroken_run(on_two, unbroken, folder):
    assert_goes_on(folder, "2-ddp to 2-fsdp2", on_two["ddp to fsdp2"], unbroken["ddp"], exact=False)


def test_a_run_of_differences_is_resumed_on_as_many_ranks(on_two, unbroken, folder):
    assert_goes_on(folder, "2-codec to 2-ddp", on_two["codec"], unbroken["codec"])


def test_a_run_of_differences_is_resumed_with_another_sharding(on_two, unbroken, folder):
    found = on_two["codec resharded"]
    assert_goes_on(folder, "2-codec to 2-fsdp2", found, unbroken["codec"], exact=False)


def test_a_run_of_differences_of_one_rank_is_resumed_on_two(on_two, unbroken, folder):
    found = on_two["codec from one"]
    assert_goes_on(folder, "1-codec to 2-fsdp2", found, unbroken["codec alone"], exact=False)


def test_a_run_of_differences_is_resumed_on_one_rank(unbroken, folder):
    found = [resumed("alone", folder / "2-codec-stopped", folder / "2-codec to 1-alone", **CODEC)]
    assert_goes_on(folder, "2-codec to 1-alone", found, unbroken["codec"], exact=False)


def test_a_smaller_window_of_differences_keeps_the_newest_snapshots(on_two, folder):
    for rank in on_two["codec smaller"]:
        assert rank.windows[8] == [6, 8]
        assert [r["difference_to"] for r in rank.records] == [None, 10]
    assert listed(folder / "codec smaller") == [10, 12]
    assert left_over(folder / "codec smaller") == []


def test_what_builds_on_a_snapshot_damaged_on_one_rank_is_left_out_on_all(on_two, unbroken):
    first, second = on_two["codec damaged"]
    for rank in (first, second):
        assert rank.windows[8] == [2, 8]
        assert rank.records[1]["difference_to"] == 2
        assert_same_bits(rank.run.weights[8], unbroken["codec"][0].run.weights[8])
    told = [line for line in first.told if "left out" in line]
    assert ["snapshot of step 4" in told[0], "snapshot of step 6" in told[1]] == [True, True]
    assert "kept as the difference to that of step 4, which is lost" in told[1]


def test_a_window_resumed_into_memory_is_the_same(on_two, unbroken):
    for rank in on_two["memory"]:
        assert_same_bits(rank.run.final, unbroken["ddp"][0].run.final)
        assert rank.windows[8] == [2, 4, 6, 8]


def test_a_smaller_window_keeps_the_newest_snapshots(on_two, folder):
    for rank in on_two["smaller"]:
        assert rank.windows[8] == [6, 8]
    assert listed(folder / "smaller") == [10, 12]


@pytest.mark.parametrize(("damage", "how"), DAMAGES)
def test_a_damaged_snapshot_is_left_out_on_all_ranks_and_named(on_two, unbroken, damage, how):
    first, second = on_two[damage + how]
    for rank in (first, second):
        assert rank.windows[8] == [2, 6, 8]
        assert_same_bits(rank.run.weights[8], unbroken["ddp"][0].run.weights[8])
    (line,) = [line for line in first.told if "left out" in line]
    assert "snapshot of step 4" in line
    assert "step=00000004" in line


def test_a_resharded_snapshot_that_one_rank_can_not_write_is_left_out_on_all(on_two, unbroken, folder):
    for rank in on_two["full"]:
        assert rank.windows[8] == [2, 6, 8]
        assert_same_bits(rank.run.weights[8], unbroken["ddp"][0].run.weights[8])
    (line,) = [line for line in on_two["full"][0].told if "left out" in line]
    assert "snapshot of step 4: [Errno 28]" in line


def test_another_runs_window_is_moved_aside(on_two, folder):
    merges = folder / "another" / "merges"
    assert listed(folder / "another") == [6, 8, 10, 12]
    aside = merges / "window.old-1"
    assert sorted(int(p.name[5:13]) for p in aside.glob("step=*/shards.json") for p in [p.parent]) == [
        6,
        8,
        10,
        12,
    ]
    assert left_over(folder / "another") == []
    assert any("it was moved to" in line for line in on_two["another"][0].told)
    assert not on_two["first"][0].told


def test_a_folder_that_another_run_uses_is_refused_on_all_ranks(on_two):
    first, second = on_two["locked"]
    assert "another run is using it" in first.error
    assert "another run is using it" in second.error
    assert "rank 0" in second.error
