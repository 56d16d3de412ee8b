"""`merge-callback inspect` of a window, `prune` and `validate`."""

import json
import os
import shutil

import pytest
import torch
import yaml
from checkpoint_files import ROOT, flip_last_byte
from training_runs import Classifier, loader, train

from merge_callback import CheckpointMergeCallback
from merge_callback.cli.main import main

CONFIG = ROOT / "example_configs/wsd_gpt.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that has published six merges, and kept them all."""
    folder = tmp_path_factory.mktemp("run") / "merges"
    torch.manual_seed(0)
    merging = CheckpointMergeCallback(
        window=3, every_n_steps=2, method="sma", dirpath=folder, keep_last=None, spike="off"
    )
    train(Classifier(), merging, data=loader(), max_steps=14)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that folder, to do with as one likes."""
    return shutil.copytree(finished, tmp_path / "merges", symlinks=True)


def steps(folder):
    return sorted(int(path.name[5:13]) for path in folder.glob("step=*"))


# --- inspect ------------------------------------------------------------------------------------------------


def test_inspect_lists_the_snapshots_of_a_window(run, capsys):
    assert main(["inspect", str(run / "window")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "window       3 snapshots, oldest first"
    assert [line.split()[:5] for line in lines[1:4]] == [
        ["step", str(step), "lr", "0.3", "stable"] for step in (10, 12, 14)
    ]
    assert lines[4] == "checksums    verified"


def test_inspect_names_what_is_wrong_with_a_window(run, capsys):
    first, second, _ = sorted((run / "window").glob("*step=*.safetensors"))
    flip_last_byte(first)
    second.unlink()
    assert main(["inspect", str(run / "window")]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    assert [first.name in problems[0], second.name in problems[1], len(problems)] == [True, True, 2]


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", 7, ["a"]])
def test_a_manifest_that_lists_other_things_is_refused(run, name, capsys):
    path = run / "window/manifest.json"
    content = json.loads(path.read_text())
    content["snapshots"][0]["file"] = name
    path.write_text(json.dumps(content))
    assert main(["inspect", str(run / "window")]) == 1
    assert "expected the name of a file" in capsys.readouterr().err


# --- prune --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [True, False], ids=["the run's folder", "the merges' folder"])
def test_prune_keeps_the_newest_and_says_what_it_removes(run, around, capsys):
    assert steps(run) == [4, 6, 8, 10, 12, 14]
    path = str(run.parent if around else run)
    assert main(["prune", path, "--keep-last", "2", "--dry-run"]) == 0
    assert steps(run) == [4, 6, 8, 10, 12, 14]
    assert capsys.readouterr().out.count("would remove step=") == 4
    assert main(["prune", path, "--keep-last", "2"]) == 0
    assert steps(run) == [12, 14]
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("removed step=00000004-sma, ")
    assert told[-1].startswith("4 merges removed, ")
    assert not [name for name in os.listdir(run) if name.startswith(".step")]
    assert main(["inspect", str(run / "window")]) == 0


def test_prune_removes_nothing_that_a_link_leads_to(run, capsys):
    (run / "latest").unlink()
    (run / "latest").symlink_to("step=00000006-sma")
    (run / "best").symlink_to("step=00000004-sma")
    assert main(["prune", str(run), "--keep-last", "1"]) == 0
    assert steps(run) == [4, 6, 14]
    assert "keeps step=00000004-sma: best leads to it" in capsys.readouterr().out


def a_note(folder):
    (folder / "notes.txt").write_text("the one we shipped")


def an_edited_file(folder):
    shutil.copy(folder / "merge.json", folder / "config.json")
    record = json.loads((folder / "merge.json").read_text())
    record["files"]["config.json"] = "0" * 64
    (folder / "merge.json").write_text(json.dumps(record))


def a_folder(folder):
    (folder / "results").mkdir()


@pytest.mark.parametrize("what", [a_note, an_edited_file, a_folder])
def test_prune_removes_nothing_that_a_run_has_not_written(run, what, capsys):
    what(run / "step=00000004-sma")
    shutil.copytree(run / "step=00000006-sma", run / "shipped")
    assert main(["prune", str(run), "--keep-last", "1"]) == 0
    assert steps(run) == [4, 14]
    assert (run / "shipped/model.safetensors").exists()
    assert "keeps step=00000004-sma: " in capsys.readouterr().out


def test_prune_counts_each_run_by_itself(run):
    other = run / "step=00000002-sma"
    shutil.copytree(run / "step=00000004-sma", other)
    record = json.loads((other / "merge.json").read_text())
    (other / "merge.json").write_text(json.dumps({**record, "run_id": "another", "step": 2}))
    assert main(["prune", str(run), "--keep-last", "1"]) == 0
    assert steps(run) == [2, 14]


def test_prune_keeps_the_last_merge_of_the_stable_phase(run, capsys):
    for step in (10, 12, 14):
        path = run / f"step={step:08d}-sma/merge.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "phase": "decay"}))
    assert main(["prune", str(run), "--keep-last", "1"]) == 0
    assert steps(run) == [8, 14]
    assert "keeps step=00000008-sma: it is the last of the stable phase" in capsys.readouterr().out


def test_without_latest_prune_removes_nothing(run, capsys):
    (run / "latest").unlink()
    assert main(["prune", str(run), "--keep-last", "1"]) == 1
    assert "has no `latest` that leads to a merge in it, so nothing is removed" in capsys.readouterr().err
    assert len(steps(run)) == 6


def test_prune_refuses_what_is_no_run(tmp_path, capsys):
    assert main(["prune", str(tmp_path)]) == 1
    assert "holds no merges that a run has published" in capsys.readouterr().err


# --- validate -----------------------------------------------------------------------------------------------


def validated(path, capsys, *more):
    status = main(["validate", "--config", str(path), *more])
    return status, capsys.readouterr().out.splitlines()


def changed(folder, **options):
    """The example with other options of the callback, or of the trainer if so named."""
    content = yaml.safe_load(CONFIG.read_text())
    trainer, callback = content["trainer"], content["trainer"]["callbacks"][-1]["init_args"]
    for name, value in options.items():
        (trainer if name in ("max_steps", "max_step") else callback)[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_validate_says_what_a_configuration_would_do(capsys):
    status, told = validated(CONFIG, capsys)
    assert status == 0
    assert told[0] == "CheckpointMergeCallback(window=10, every_n_steps=40, method='auto')"
    assert told[1].endswith("the last 10 kept; 135 in this run of 5,400 steps")


def test_validate_takes_the_arguments_of_fit_and_warns_of_a_window_that_never_fills(tmp_path, capsys):
    status, told = validated(CONFIG, capsys, "--trainer.max_steps=100")
    assert status == 0
    assert "warning: merge: the window never fills" in told[-1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window": 1}, ["window=1 holds nothing to merge; choose 2 or more"]),
        (
            {"keep_lst": 3, "emit_every": "often", "window": "ten"},
            [
                "'keep_lst' is not an option; did you mean 'keep_last'?",
                "emit_every='often' must be 0 or a positive whole number",
                "window='ten' must be a positive whole number",
            ],
        ),
        ({"spike": {"patience": 0}}, ["spike.patience=0 must be a positive whole number"]),
        ({"method": {"decay": "tie"}}, ["unknown merging method 'tie'; choose one of"]),
        ({"durable": False, "storage": "disk"}, ["storage='disk' keeps the window in files, durable=False"]),
        ({"max_step": 7}, ["'trainer.max_step'"]),
        ({"count_tokens": "no_such_module.count"}, ["no_such_module"]),
    ],
)
def test_validate_names_each_problem_in_a_line(options, expected, tmp_path, capsys):
    status, told = validated(changed(tmp_path, **options), capsys)
    assert status == 1
    assert len(told) == len(expected)
    for part in expected:
        assert any(part in line for line in told), (part, told)


def test_an_object_among_the_options_is_made(tmp_path, capsys):
    wsm = {"class_path": "merge_callback.merging.Wsm", "init_args": {"decay": "linear"}}
    status, told = validated(changed(tmp_path, method={"stable": wsm}), capsys)
    assert (status, told[2]) == (0, "merge: wsm in the stable phase, ema in the decay phase")


COMMANDS = [
    *("demo", "merge", "moerge", "methods", "inspect", "diversity", "interference", "difficulty", "prune"),
    *("report", "validate"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert len(told.split("\n\n")[1]) > 60
    assert max(map(len, told.splitlines())) <= 110


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("merge --last 3", "merge: name the checkpoints to merge, and the folder to make with --output; "),
        ("merge a b --output c --ouput d", "merge: unrecognized arguments: --ouput d; "),
        ("inspect", "inspect: the following arguments are required: PATH; "),
        ("report a --serve x", "report: argument --serve: invalid int value: 'x'; "),
        ("demo --steps-scale x", "demo: argument --steps-scale: x must be a positive number; "),
        ("demo --devices 0", "demo: argument --devices: 0 must be a whole number, at least 1; "),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    command = arguments.split()[0]
    assert ended.value.code == 2
    line = f"merge-callback {said}merge-callback {command} --help tells more\n"
    assert capsys.readouterr().err == line


def test_a_file_that_is_not_there_is_named_first(tmp_path, capsys):
    missing = tmp_path / "merge.yaml"
    assert main(["merge", "a", "--output", str(tmp_path / "out"), "--config", str(missing)]) == 1
    assert capsys.readouterr().err == f"merge-callback: {missing}: No such file or directory\n"


def test_inspect_of_a_run_names_its_newest_merge(run, capsys):
    assert main(["inspect", str(run)]) == 1
    assert f"give one of them, such as {run / 'latest'}" in capsys.readouterr().err
