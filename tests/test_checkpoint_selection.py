"""Which checkpoints a path, a glob or a run's folder stands for, and in what order."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from training_runs import Classifier, loader, train

from merge_callback import CheckpointMergeCallback
from merge_callback.offline.selection import select
from merge_callback.snapshots.safetensors_file import CorruptFileError

WEIGHTS = {"w": torch.ones(2)}


def checkpoints(folder: Path, *names: str, **content) -> None:
    """Lightning-like files, by way of the names that end in ``/`` Hugging Face folders."""
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            save_file(WEIGHTS, path / "model.safetensors")
        elif name.endswith(".safetensors"):
            save_file(WEIGHTS, path, metadata={k: str(v) for k, v in content.items()})
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state_dict": WEIGHTS, **content}, path)


def names(folder: Path | str, *more: str, **options) -> list[str]:
    return [path.name for path in select([str(folder), *more], **options)]


# A run's folder


def test_steps_are_ordered_as_numbers(tmp_path):
    checkpoints(tmp_path, "epoch=0-step=1000.ckpt", "epoch=0-step=200.ckpt", "epoch=10-step=30.ckpt")
    assert names(tmp_path) == ["epoch=10-step=30.ckpt", "epoch=0-step=200.ckpt", "epoch=0-step=1000.ckpt"]


@pytest.mark.parametrize(
    "pattern", ["checkpoint-{}/", "step-{}/", "global_step{}.ckpt", "a_iter_{}.safetensors"]
)
def test_the_names_of_other_trainers_tell_their_step(tmp_path, pattern):
    written = [pattern.format(step) for step in (1000, 500, 20)]
    checkpoints(tmp_path, *written)
    assert names(tmp_path) == [name.rstrip("/") for name in written[::-1]]


def test_recorded_steps_order_names_that_tell_none(tmp_path):
    checkpoints(tmp_path, "worst.ckpt", global_step=30)
    checkpoints(tmp_path, "best.safetensors", step=400)
    checkpoints(tmp_path, "middle/")
    (tmp_path / "middle" / "trainer_state.json").write_text(json.dumps({"global_step": 100}))
    assert names(tmp_path) == ["worst.ckpt", "middle", "best.safetensors"]


def test_one_number_orders_names_without_steps(tmp_path):
    checkpoints(tmp_path, "v2-model10.safetensors", "v2-model9.safetensors", "v2-model100.safetensors")
    assert names(tmp_path) == ["v2-model9.safetensors", "v2-model10.safetensors", "v2-model100.safetensors"]


def test_epochs_order_names_without_steps(tmp_path):
    checkpoints(tmp_path, "epoch=10-loss=0.2.safetensors", "epoch=9-loss=0.7.safetensors")
    assert names(tmp_path) == ["epoch=9-loss=0.7.safetensors", "epoch=10-loss=0.2.safetensors"]


@pytest.mark.parametrize("pair", [("a", "b"), ("a1", "b2"), ("1-loss2", "2-loss1"), ("a", "a1")])
def test_folder_without_any_order_is_refused(tmp_path, pair):
    checkpoints(tmp_path, *(f"{name}.safetensors" for name in pair))
    with pytest.raises(ValueError, match=r"no order can be told: .* give the checkpoints one by one"):
        select([str(tmp_path)])


def test_links_and_last_and_unfinished_files_are_left_out(tmp_path):
    checkpoints(tmp_path, "step=10.ckpt", "step=20.ckpt", "last.ckpt", "last-v1.ckpt", ".step=30.ckpt")
    checkpoints(tmp_path, "tmp-checkpoint-40/", ".step=50.9.tmp/", "step=60.ckpt.tmp", "checkpoint-70.tmp/")
    (tmp_path / "aaa.ckpt").symlink_to("step=20.ckpt")
    (tmp_path / "lost.ckpt").symlink_to("gone.ckpt")
    (tmp_path / "latest").symlink_to("step=20.ckpt")
    (tmp_path / "hparams.yaml").write_text("")
    (tmp_path / "logs").mkdir()
    assert names(tmp_path) == ["step=10.ckpt", "step=20.ckpt"]


def test_last_is_taken_where_there_is_nothing_else(tmp_path):
    checkpoints(tmp_path, "last.ckpt")
    assert names(tmp_path) == ["last.ckpt"]


def test_folder_without_checkpoints_says_what_to_give(tmp_path):
    checkpoints(tmp_path, "a.pt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoints in it .* give a glob, e.g. .*\*\.pt"):
        select([str(tmp_path)])


def test_folder_above_the_checkpoints_says_where_they_are(tmp_path):
    checkpoints(tmp_path, "checkpoints/a.ckpt", "merges/step=4/", "other/a.txt")
    with pytest.raises(FileNotFoundError, match=r"give '.*/checkpoints' or '.*/merges'$"):
        select([str(tmp_path)])


def test_a_step_that_was_saved_twice_counts_once(tmp_path):
    every, best = (ModelCheckpoint(tmp_path, every_n_train_steps=n, save_top_k=-1) for n in (4, 8))
    train(Classifier(), every, best, data=loader(), enable_checkpointing=True)
    assert [path.name for path in sorted(tmp_path.iterdir())][1:] == [
        "epoch=0-step=8-v1.ckpt",
        "epoch=0-step=8.ckpt",
        "epoch=1-step=12.ckpt",
    ]
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=0-step=8-v1.ckpt", "epoch=1-step=12.ckpt"]


def test_versions_of_other_steps_are_other_checkpoints(tmp_path):
    checkpoints(tmp_path, "model-v1.ckpt", global_step=10)
    checkpoints(tmp_path, "model-v2.ckpt", global_step=20)
    assert names(tmp_path) == ["model-v1.ckpt", "model-v2.ckpt"]


def test_what_lightning_really_wrote_is_ordered(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, save_last="link")
    train(Classifier(), saver, data=loader(), enable_checkpointing=True)
    assert names(tmp_path) == [f"epoch={(s - 1) // 8}-step={s}.ckpt" for s in (3, 6, 9, 12)]


# The callback's own folder


@pytest.fixture
def merges(tmp_path) -> Path:
    merger = CheckpointMergeCallback(every_n_steps=2, window=3, dirpath=tmp_path / "merges")
    train(Classifier(), merger, data=loader())
    return tmp_path / "merges"


def test_own_folder_stands_for_the_snapshots_and_not_for_their_merges(merges):
    listed = [
        record["file"]
        for record in json.loads((merges / "window" / "manifest.json").read_text())["snapshots"]
    ]
    assert names(merges) == names(merges / "window") == listed
    assert [name[:13] for name in listed] == ["step=00000008", "step=00000010", "step=00000012"]


def test_snapshots_that_only_a_checkpoint_needs_or_of_a_spike_are_left_out(merges):
    manifest = merges / "window" / "manifest.json"
    content = json.loads(manifest.read_text())
    files = [record["file"] for record in content["snapshots"]]
    content["snapshots"][1]["in_spike"] = True
    del content["snapshots"][0]
    manifest.write_text(json.dumps(content))
    assert names(merges) == files[2:]


def test_manifest_of_files_elsewhere_is_refused(merges):
    manifest = merges / "window" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["snapshots"][0]["file"] = "../../other.safetensors"
    manifest.write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match="expected a plain name within the folder"):
        select([str(merges)])
    manifest.write_text('{"snapshots": 3}')
    with pytest.raises(CorruptFileError, match="not the manifest of a window"):
        select([str(merges)])


def test_emissions_are_taken_where_there_is_no_window(merges, tmp_path):
    (merges / "window").rename(tmp_path / "away")
    found = names(merges)
    assert found == sorted(path.name for path in merges.glob("step=*"))
    assert "latest" not in found


def test_checkpoints_beside_a_window_are_a_question(merges):
    checkpoints(merges, "step=4.ckpt")
    with pytest.raises(ValueError, match=r"beside merges or a window of snapshots; say which"):
        select([str(merges)])


# Paths and globs


def test_single_paths_keep_their_order_and_their_names(tmp_path):
    checkpoints(tmp_path, "step=1.ckpt", "step=2.ckpt", "final/")
    (tmp_path / "latest").symlink_to("step=2.ckpt")
    given = [str(tmp_path / name) for name in ("step=2.ckpt", "final", "latest", "step=1.ckpt")]
    assert [str(path) for path in select(given)] == given


def test_glob_gives_checkpoints_by_step(tmp_path):
    checkpoints(tmp_path, "a-step=9.pt", "a-step=10.pt", "last.ckpt", "step=11.ckpt", "run/checkpoint-12/")
    (tmp_path / "notes.txt").write_text("")
    assert names(tmp_path / "*step=*") == ["a-step=9.pt", "a-step=10.pt", "step=11.ckpt"]
    assert names(tmp_path / "*") == ["a-step=9.pt", "a-step=10.pt", "step=11.ckpt"]
    assert names(f"{tmp_path}/run/check*/") == ["checkpoint-12"]


def test_glob_of_weight_files_is_ordered_by_their_folders(tmp_path):
    checkpoints(tmp_path, "checkpoint-1000/", "checkpoint-900/")
    found = select([str(tmp_path / "*" / "model.safetensors")])
    assert [path.parent.name for path in found] == ["checkpoint-900", "checkpoint-1000"]


def test_name_that_looks_like_a_glob_is_taken_as_the_file_it_is(tmp_path):
    checkpoints(tmp_path, "a[1].ckpt", "a1.ckpt")
    assert names(tmp_path / "a[1].ckpt") == ["a[1].ckpt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gone.ckpt", "there is no such file"),
        ("*.ckpt", "none of its 0 matches is a checkpoint"),
        ("*.txt", "none of its 1 matches is a checkpoint"),
        ("lost", "links to gone, which does not exist"),
    ],
)
def test_argument_that_finds_nothing_is_refused(tmp_path, given, message):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "lost").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=message):
        select([str(tmp_path / given)])


def test_folder_that_is_a_checkpoint_is_one(tmp_path):
    checkpoints(tmp_path, "model/")
    (tmp_path / "model" / "optimizer.ckpt").write_text("")
    assert names(tmp_path / "model") == ["model"]


def test_checkpoint_with_checkpoints_in_it_is_a_question(tmp_path):
    checkpoints(tmp_path, "run/", "run/checkpoint-2/", "run/checkpoint-10/")
    with pytest.raises(ValueError, match=r"is a checkpoint, and so are folders in it .* give '.*/run/\*/'"):
        select([str(tmp_path / "run")])
    assert names(f"{tmp_path}/run/*/") == ["checkpoint-2", "checkpoint-10"]


# Thinning


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"last": 2}, [4, 5]),
        ({"last": 9}, [1, 2, 3, 4, 5]),
        ({"every": 2}, [1, 3, 5]),
        ({"every": 3}, [2, 5]),
        ({"every": 2, "last": 2}, [3, 5]),
    ],
)
def test_last_and_every_count_from_the_newest(tmp_path, options, expected):
    checkpoints(tmp_path, *(f"step={step}.ckpt" for step in range(1, 6)))
    assert names(tmp_path, **options) == [f"step={step}.ckpt" for step in expected]
    single = [str(tmp_path / f"step={step}.ckpt") for step in range(1, 6)]
    assert [path.name for path in select(single, **options)] == [f"step={step}.ckpt" for step in expected]


@pytest.mark.parametrize("options", [{"last": 0}, {"every": 0}, {"last": -1}])
def test_counts_below_one_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        select([str(tmp_path)], **options)
