"""When a run publishes a merge, under which name, and which of them stay."""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from published_runs import fit, names, published_steps, record
from run_outcomes import checksum, damage, emissions, leftovers
from tiny_run import STEPS, At, Elsewhere, Tiny

from merge_callback import load_merge
from merge_callback.publish import Publisher

# --- when, and which stay -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("emit_every", "expected"),
    [
        (0, [26]),
        # Snapshots 2 to 26 are numbers 1 to 13; a merge needs two of one phase.
        (1, [6, 8, 10, 12, 14, 16, 18, 20, 24, 26]),
        (3, [6, 12, 18, 24, 26]),
        (100, [26]),
    ],
)
def test_a_merge_is_published_every_so_many_snapshots_and_at_the_end(tmp_path, emit_every, expected):
    fit(tmp_path, emit_every=emit_every, keep_last=None)

    assert published_steps(tmp_path) == expected


@pytest.mark.parametrize("keep_last", [1, 2, None])
def test_the_last_merges_stay(tmp_path, keep_last):
    fit(tmp_path, keep_last=keep_last, keep_best=0)

    assert not (tmp_path / "merges/best").is_symlink()
    assert published_steps(tmp_path) == [4, 8, 12, 16, 20, 24, 26][1 if keep_last is None else -keep_last :]
    assert os.readlink(tmp_path / "merges/latest") == names(tmp_path)[-1]
    assert not leftovers(tmp_path / "merges")


@pytest.mark.parametrize("keep_best", [1, 2])
def test_the_best_merges_and_the_last_of_the_stable_phase_stay(tmp_path, keep_best):
    _, _, callback = fit(tmp_path, keep_last=1, keep_best=keep_best)
    validated = [row for row in callback.history if row.get("merge_step") is not None]
    scores = {row["merge_step"]: row["merged/val_loss"] for row in validated}
    phases = {row["step"]: row["phase"] for row in callback.history if row["event"] == "snapshot"}
    made = [4, 8, 12, 16, 20, 24, 26]
    best = sorted(scores.keys() & made, key=scores.get)
    stable = max(step for step in made if phases[step] == "stable")
    assert published_steps(tmp_path) == sorted({*best[:keep_best], stable, made[-1]})
    assert len(published_steps(tmp_path)) > 1
    pointed = tmp_path / "merges" / os.readlink(tmp_path / "merges/best")
    assert record(pointed)["step"] == best[0]
    assert callback.best == pointed
    assert load_merge(tmp_path / "merges/best").keys() == load_merge(pointed).keys()
    assert not leftovers(tmp_path / "merges")


def test_a_best_link_that_a_full_disk_refuses_is_tried_again(tmp_path, monkeypatch):
    publisher = Publisher(tmp_path, None, 1 << 30)
    (tmp_path / "step=00000001-sma").mkdir()
    publisher.published = ["step=00000001-sma"]

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", refuse)
        publisher.protect({1}, 1)
    assert not (tmp_path / "best").is_symlink()
    publisher.protect({1}, 1)
    assert os.readlink(tmp_path / "best") == "step=00000001-sma"


def test_if_somebody_removes_the_best_merge_the_best_of_the_others_takes_its_place(tmp_path):
    def remove(module):
        module.trainer.callbacks[0].session.pipeline.background.drain()
        shutil.rmtree((tmp_path / "merges/best").resolve())

    _, _, callback = fit(tmp_path, keep_last=None, callbacks=[At(step25=remove)])
    assert load_merge(tmp_path / "merges/best")
    assert callback.best == (tmp_path / "merges/best").resolve()


def test_latest_points_at_the_newest_from_the_first_merge_on(tmp_path):
    seen = {}

    def look(module):
        module.trainer.callbacks[0].session.background.drain()
        seen[len(seen)] = (os.readlink(tmp_path / "merges/latest"), names(tmp_path)[-1])

    fit(tmp_path, emit_every=1, callbacks=[At(**{f"step{step}": look for step in range(7, STEPS)})])

    assert len(seen) == STEPS - 7  # that of step 6 waits for the validation there
    assert all(pointed == newest for pointed, newest in seen.values())


def test_a_run_that_has_nothing_to_merge_at_its_end_says_so(tmp_path):
    with pytest.warns(UserWarning, match="no merge was published|nothing was published|one snapshot"):
        fit(tmp_path, every_n_steps=15, trainer={"max_steps": 26})

    assert not emissions(tmp_path / "merges")


def test_a_run_that_enters_its_decay_at_the_very_end_has_its_last_stable_merge_published(tmp_path):
    # The window ends with the first snapshot of the decay (22), which has nothing to be merged with.
    fit(tmp_path, emit_every=0, trainer={"max_steps": 23})

    (path,) = emissions(tmp_path / "merges")
    assert record(path)["phase"] == "stable"
    assert record(path)["step"] == 20


# --- names that are taken -----------------------------------------------------------------------------------


def test_another_merge_of_the_same_name_gets_a_version(tmp_path):
    fit(tmp_path, emit_every=0)
    before = checksum(tmp_path / "merges/step=00000026-tokens=624-sma/model.safetensors")

    fit(tmp_path, emit_every=0, module=Elsewhere)
    fit(tmp_path, emit_every=0, module=lambda: Tiny(width=4))

    name = "step=00000026-tokens=624-sma"
    assert names(tmp_path) == [name, f"{name}-v1", f"{name}-v2"]
    assert os.readlink(tmp_path / "merges/latest") == f"{name}-v2"
    assert checksum(tmp_path / f"merges/{name}/model.safetensors") == before
    assert not damage(tmp_path / "merges")


def test_the_same_merge_is_published_once(tmp_path):
    fit(tmp_path, emit_every=0)
    (path,) = emissions(tmp_path / "merges")
    before = path.stat().st_mtime_ns

    fit(tmp_path, emit_every=0)

    assert names(tmp_path) == ["step=00000026-tokens=624-sma"]
    assert path.stat().st_mtime_ns == before


def test_a_run_removes_no_merge_that_another_run_published(tmp_path):
    fit(tmp_path, keep_last=None)
    before = names(tmp_path)

    fit(tmp_path, keep_last=1)  # the same merges again

    assert names(tmp_path) == before


def test_a_damaged_merge_of_the_same_name_is_not_taken_for_the_same(tmp_path):
    fit(tmp_path, emit_every=0)
    (path,) = emissions(tmp_path / "merges")
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)

    fit(tmp_path, emit_every=0)

    latest = tmp_path / "merges/latest"
    assert checksum(latest / "model.safetensors") == record(latest)["files"]["model.safetensors"]


def test_a_folder_that_takes_the_name_of_latest_stays_and_merges_are_published(tmp_path):
    (tmp_path / "merges/latest").mkdir(parents=True)
    (tmp_path / "merges/latest/note.txt").write_text("ours")

    fit(tmp_path)

    assert published_steps(tmp_path) == [20, 24, 26]
    assert (tmp_path / "merges/latest/note.txt").read_text() == "ours"
    assert not leftovers(tmp_path / "merges")


def publish(publisher, name, tensor):
    tensors = {"a": tensor}
    write = partial(publisher.write_safetensors, tensors=tensors, values=tensors.values())
    publisher.publish(name, write, {})


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_latest_never_points_at_a_merge_that_was_removed(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "nr_inodes=8", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"can't mount: {mounted.stderr.decode()}")
    try:
        publisher = Publisher(tmp_path, keep_last=1, max_shard_bytes=10**9)
        publish(publisher, "first", torch.zeros(3))
        # The root, a merge of 3 and the pointer are 5 of 8: a second merge fits, its pointer does not.
        publish(publisher, "second", torch.ones(3))

        assert load_merge(tmp_path / "latest")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
