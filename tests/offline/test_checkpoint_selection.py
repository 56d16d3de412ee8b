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
    return [path.name for path in select([str(folder), *more], **options).chosen]


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
    with pytest.raises(ValueError, match=r"their order is not known: .* give the checkpoints one by one"):
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
    assert names(merges) == names(merges / "window" / "step=*") == files[2:]
    older = merges / "window" / files[0]
    assert names(older) == [older.name]


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
    with pytest.raises(
        ValueError, match=r"and a window of snapshots; say which: '.*/\*\.ckpt' or .*/window$"
    ):
        select([str(merges)])


# Single paths


def test_paths_without_a_known_step_stay_in_the_order_given(tmp_path):
    checkpoints(tmp_path, "step=1.ckpt", "step=2.ckpt", "final/")
    given = [str(tmp_path / name) for name in ("step=2.ckpt", "final", "step=1.ckpt")]
    found = select(given)
    assert [str(path) for path in found.chosen] == given
    assert found.notes == ["they stay in the order given: the step of final is not known"]


@pytest.mark.parametrize(
    "pattern",
    [
        "epoch=0-step={}.ckpt",
        "step_{}/weights.pt",
        "global_step{}/actor/weights.pt",
        "ep1-ba{}-rank0.pt",
        "checkpoint-{}/model.safetensors",
    ],
)
def test_what_a_shell_makes_of_a_glob_is_ordered_by_step(tmp_path, pattern):
    written = [pattern.format(step) for step in (80, 90, 100, 110)]
    for name in written:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        checkpoints(tmp_path, name)
    given = sorted(str(tmp_path / name) for name in written)
    assert [str(path) for path in select(given, last=2).chosen] == [str(tmp_path / n) for n in written[2:]]
    assert [str(path) for path in select(given, last=2, keep_order=True).chosen] == given[-2:]


def test_recorded_steps_and_thousands_order_single_paths(tmp_path):
    checkpoints(tmp_path, "epoch=9.ckpt", global_step=900)
    checkpoints(tmp_path, "epoch=10.ckpt", global_step=1000)
    checkpoints(tmp_path, "step-1.5k.pt", "iter_2K.pt", "step=950.pt")
    found = select([str(path) for path in sorted(tmp_path.iterdir())])
    assert found.steps == [900, 950, 1000, 1500, 2000]
    assert found.is_reordered


@pytest.mark.parametrize(
    "record", [{"iter_num": 900}, {"iteration": 900}, {"optimizer_history": [{"num_updates": 900}]}]
)
def test_a_recorded_step_comes_before_a_number_that_may_be_an_epoch_s(tmp_path, record):
    checkpoints(tmp_path, "checkpoint_3.pt", **record)
    checkpoints(tmp_path, "ckpt7.pt", global_steps=700)
    (tmp_path / "checkpoint-800.pt").write_bytes(b"whatever it is, its name tells")
    found = select([str(tmp_path / "*.pt")])
    assert [(path.name, step) for path, step in zip(found.chosen, found.steps, strict=True)] == [
        ("ckpt7.pt", 700),
        ("checkpoint-800.pt", 800),
        ("checkpoint_3.pt", 900),
    ]


def test_fairseq_s_names_tell_the_epoch_before_the_step(tmp_path):
    checkpoints(tmp_path, "checkpoint_1_900.pt", "checkpoint_2_1000.pt")
    assert select([str(tmp_path / "*.pt")]).steps == [900, 1000]


def test_a_run_named_like_a_step_orders_nothing(tmp_path):
    checkpoints(tmp_path, "run_step2/model-10.pt", "run_step2/model-9.pt")
    given = [str(tmp_path / "run_step2" / name) for name in ("model-10.pt", "model-9.pt")]
    assert [path.name for path in select(given).chosen] == ["model-9.pt", "model-10.pt"]


# What is left out


def left_out(found) -> list[str]:
    return [note for note in found.notes if note.startswith("left out")]


@pytest.mark.parametrize("by_shell", [True, False])
@pytest.mark.parametrize("pattern", ["*", "*/model.safetensors", "*/"])
def test_an_earlier_merge_is_left_out_and_told(tmp_path, pattern, by_shell):
    checkpoints(tmp_path, "checkpoint-100/", "checkpoint-200/", "merged/")
    (tmp_path / "merged" / "merge.json").write_text(json.dumps({"step": 100}))
    matches = sorted(map(str, tmp_path.glob(pattern))) if by_shell else [f"{tmp_path}/{pattern}"]
    found = select(matches, last=3)
    assert found.steps == [100, 200]
    assert [path for path in found.chosen if "merged" in str(path)] == []
    assert len(left_out(found)) == 1
    assert "a merge already" in left_out(found)[0]
    assert found.notes[-1] == "fewer than --last 3 were found: 2"
    assert 100 in select(matches, keep_all=True).steps
    assert len(select(matches, keep_all=True).chosen) == 3


def test_merges_of_other_tools_and_lightning_merges_are_left_out(tmp_path):
    checkpoints(tmp_path, "step=1.ckpt", "step=2.ckpt", "old/merged.ckpt", "soup/")
    (tmp_path / "old" / "merge.json").write_text("{}")
    (tmp_path / "soup" / "mergekit_config.yml").write_text("")
    found = select([f"{tmp_path}/**/*.ckpt", str(tmp_path / "soup")])
    assert [path.name for path in found.chosen] == ["step=1.ckpt", "step=2.ckpt"]


def test_merges_beside_a_run_s_checkpoints_are_left_out(tmp_path):
    checkpoints(tmp_path, "checkpoint-1/", "checkpoint-2/", "merged/")
    (tmp_path / "merged" / "merge.json").write_text("{}")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_what_repeats_another_one_is_left_out_of_single_paths(tmp_path):
    checkpoints(tmp_path, "step=1.ckpt", "step=2.ckpt", "step=2-v1.ckpt", "step=2-last.ckpt")
    checkpoints(tmp_path, "last.ckpt", global_step=2)
    (tmp_path / "latest").symlink_to("step=1.ckpt")
    given = [str(path) for path in sorted(tmp_path.iterdir())]
    assert names(given[0], *given[1:]) == ["step=1.ckpt", "step=2-v1.ckpt"]
    assert names(tmp_path / "step=1.ckpt", str(tmp_path / "step=1.ckpt")) == ["step=1.ckpt"]
    assert len(names(given[0], *given, keep_all=True)) == 7


def test_a_last_one_of_a_later_step_is_one_more(tmp_path):
    checkpoints(tmp_path, "step=1.ckpt", "step=2.ckpt")
    checkpoints(tmp_path, "last.ckpt", global_step=3)
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt", "last.ckpt"]


def test_snapshots_of_a_spike_are_left_out_of_globs_too(merges):
    manifest = merges / "window" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["snapshots"][1]["in_spike"] = True
    manifest.write_text(json.dumps(content))
    everything = sorted(str(path) for path in (merges / "window").glob("*.safetensors"))
    spiking = content["snapshots"][1]["file"]
    for given in ([str(merges / "window" / "*")], everything):
        found = select(given)
        assert spiking not in [path.name for path in found.chosen]
        assert len(found.chosen) > 1
        assert left_out(found) == [f"left out: {spiking}: a snapshot of a loss spike"]


# A range, then every, then last


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"first_step": 2}, [2, 3, 4, 5]),
        ({"first_step": 2, "last_step": 4}, [2, 3, 4]),
        ({"last_step": 4, "every": 2}, [2, 4]),
        ({"last_step": 4, "every": 2, "last": 1}, [4]),
        ({"first_step": 0, "last_step": 1}, [1]),
    ],
)
def test_a_range_of_steps_comes_first(tmp_path, options, expected):
    checkpoints(tmp_path, *(f"step={step}.ckpt" for step in range(1, 6)))
    assert select([str(tmp_path)], **options).steps == expected


def test_a_range_without_steps_or_without_checkpoints_is_refused(tmp_path):
    checkpoints(tmp_path, "step=1.ckpt", "final.pt")
    with pytest.raises(ValueError, match=r"no step lies in 5 … inf: they are 1 to 1"):
        select([str(tmp_path)], first_step=5)
    with pytest.raises(
        ValueError, match=r"--from and --to need every step: that of .*final\.pt is not known"
    ):
        select([str(tmp_path / "step=1.ckpt"), str(tmp_path / "final.pt")], last_step=5)


@pytest.mark.parametrize("pattern", ["", "/*", "/step*/"])
def test_folders_of_steps_stand_for_the_one_checkpoint_in_each(tmp_path, pattern):
    for step in (900, 1000):
        checkpoints(tmp_path, f"step{step}/model_and_optim/")
        checkpoints(tmp_path, f"step{step}/optimizer_0/", f"step{step}/train/rank0.pt")
    found = select([f"{tmp_path}{pattern}"])
    assert [path.parent.name for path in found.chosen] == ["step900", "step1000"]
    assert {path.name for path in found.chosen} == {"model_and_optim"}
    assert found.steps == [900, 1000]


def test_runs_and_steps_with_several_checkpoints_are_a_question(tmp_path):
    checkpoints(tmp_path, "seed-a/last.ckpt", "seed-b/last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"give '.*/seed-a' or '.*/seed-b'$"):
        select([str(tmp_path)])
    checkpoints(tmp_path, "steps/step=1/generator/", "steps/step=1/critic/")
    with pytest.raises(FileNotFoundError, match=r"give '.*/steps/step=1'$"):
        select([str(tmp_path / "steps")])


def test_training_state_beside_the_weights_is_no_match_of_a_glob(tmp_path):
    beside = "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "optimizer_1.bin"
    checkpoints(tmp_path, "step=1.pt", *beside)
    assert names(tmp_path / "*") == ["step=1.pt"]


@pytest.mark.parametrize(
    "pair",
    [
        ("iter_0000001/mp_rank_00/model_optim_rng.pt", "iter_0000001/mp_rank_01/model_optim_rng.pt"),
        ("global_step1/mp_rank_00_model_states.pt", "global_step2/mp_rank_01_model_states.pt"),
        ("step1/consolidated.00.pth", "step1/consolidated.01.pth"),
        ("step1/model_world_size_2_rank_0.pt", "step2/model_world_size_2_rank_1.pt"),
        ("step1/model-00001-of-00002.safetensors", "step1/model-00002-of-00002.safetensors"),
    ],
)
def test_parts_of_different_ranks_are_no_checkpoints_of_one_model(tmp_path, pair):
    for name in pair:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    checkpoints(tmp_path, *pair)
    with pytest.raises(
        ValueError, match="are parts of checkpoints, of different ranks or shards; give whole"
    ):
        select([str(tmp_path / name) for name in pair])
    same = [str(tmp_path / pair[0].replace("1/", f"{step}/", 1)) for step in (1, 3)]
    Path(same[1]).parent.mkdir(parents=True)
    checkpoints(tmp_path, str(Path(same[1]).relative_to(tmp_path)))
    assert len(select(same).chosen) == 2


def test_what_the_options_leave_out_is_named(tmp_path):
    checkpoints(tmp_path, *(f"step={step}.ckpt" for step in range(1, 8)))
    lines = select([str(tmp_path)], last=2, every=2, first_step=2).lines()
    assert lines[1:] == [
        "left out by --from and --to: step=1.ckpt",
        "left out by --every 2: step=2.ckpt, step=4.ckpt, step=6.ckpt",
        "left out by --last 2: step=3.ckpt",
    ]


# Globs


def test_glob_gives_checkpoints_by_step(tmp_path):
    checkpoints(tmp_path, "a-step=9.pt", "a-step=10.pt", "last.ckpt", "step=11.ckpt", "run/checkpoint-12/")
    (tmp_path / "notes.txt").write_text("")
    assert names(tmp_path / "*step=*") == ["a-step=9.pt", "a-step=10.pt", "step=11.ckpt"]
    assert names(tmp_path / "*") == ["a-step=9.pt", "a-step=10.pt", "step=11.ckpt"]
    assert names(f"{tmp_path}/run/check*/") == ["checkpoint-12"]


def test_glob_of_weight_files_is_ordered_by_their_folders(tmp_path):
    checkpoints(tmp_path, "checkpoint-1000/", "checkpoint-900/")
    found = select([str(tmp_path / "*" / "model.safetensors")]).chosen
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
    assert [path.name for path in select(single, **options).chosen] == [
        f"step={step}.ckpt" for step in expected
    ]


@pytest.mark.parametrize("options", [{"last": 0}, {"every": 0}, {"last": -1}])
def test_counts_below_one_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        select([str(tmp_path)], **options)
