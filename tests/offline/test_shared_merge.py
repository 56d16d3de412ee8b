"""Processes of one launcher share a merge: the output has the bytes that one process writes."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_files import ROOT
from distributed_runs import run_jobs
from safetensors.torch import save_file

from merge_callback.cli import merge as merging
from merge_callback.cli import sweep as sweeping
from merge_callback.cli.main import main
from merge_callback.offline.peers import Peers
from merge_callback.offline.shared_merge import shares

EVALUATION = """
def loss(state):
    return {"val_loss": (state["layer.2.weight"] ** 2).mean()}
"""


def model(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}.weight": torch.randn(i + 2, 7, generator=generator) for i in range(6)}
    mask = torch.full((3,), float("-inf"))
    scalar = torch.randn((), generator=generator).bfloat16()
    return tensors | {"mask": mask, "empty": torch.empty(0, 4), "scalar": scalar, "count": torch.tensor(seed)}


def write_run(folder, spoilt=()):
    folder.mkdir()
    for seed in range(4):
        tensors = model(seed)
        for name in spoilt:
            tensors[name][0, 0] = torch.nan
        save_file(tensors, folder / f"step={seed + 1}00.safetensors")


def command(folder, name, arguments):
    """What a rank does: the command, as a launcher would start it; its exit status."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    peers = Peers(dist.get_rank(), dist.get_world_size(), dist.FileStore(f"store-{name}", 2))

    @contextmanager
    def found():
        yield peers

    merging.peers_of_launcher = sweeping.peers_of_launcher = found
    return main(arguments)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder in which two ranks ran all commands, and the exit statuses of both by command."""
    folder = tmp_path_factory.mktemp("shared")
    write_run(folder / "run")
    write_run(folder / "own", ["layer.5.weight"])
    write_run(folder / "other", ["layer.4.weight"])
    (folder / "scoring.py").write_text(EVALUATION)
    whole = {"scope": "global", "density": "0.5"}
    options = [part for name, value in whole.items() for part in (f"--{name}", value)]
    methods = ["--methods", "sma", "wma", "ties", "greedy", "--evaluate", "scoring:loss", "--last", "2", "4"]
    commands = {
        "sma": ["merge", "run"],
        "ties": ["merge", "run", "--method", "ties", *options],
        "lightning": ["merge", "run", "--as", "lightning"],
        "sweep": ["sweep", "run", *methods],
        "own": ["merge", "own"],
        "other": ["merge", "other"],
    }
    jobs = {
        name: (
            command,
            {"folder": folder, "name": name, "arguments": [*given, "--output", f"2/{name}", "--quiet"]},
        )
        for name, given in commands.items()
    }
    statuses = run_jobs(2, jobs)
    here = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    alone = pytest.MonkeyPatch()
    alone.setattr("merge_callback.offline.workers.available", lambda: 1)
    try:
        for name in ("sma", "ties", "lightning", "sweep"):
            assert main([*commands[name], "--output", f"1/{name}", "--quiet"]) == 0
    finally:
        alone.undo()
        sys.path.remove(str(folder))
        sys.modules.pop("scoring", None)
        os.chdir(here)
    return folder, statuses


@pytest.mark.parametrize("name", ["sma", "ties", "lightning", "sweep"])
def test_two_processes_write_the_bytes_of_one(two_ranks, name):
    folder, statuses = two_ranks
    assert statuses[name] == [0, 0]
    one, two = folder / "1" / name, folder / "2" / name
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_the_merges_of_a_sweep_are_shared(two_ranks):
    folder, _ = two_ranks
    kept = [(folder / "2/sweep-sweep" / name).read_text() for name in ("results.jsonl", "results-1.jsonl")]
    assert all(text.count('"metrics"') > 2 for text in kept)
    tables = [(folder / f"{count}/sweep-sweep/results.csv").read_bytes() for count in (1, 2)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("name", ["own", "other"])
def test_a_failure_of_either_ends_both_and_leaves_nothing(two_ranks, name):
    folder, statuses = two_ranks
    assert statuses[name][0] == 1  # the other may have sent all of its part before
    if name == "other":
        assert statuses[name][1] == 1
    assert not [path for path in (folder / "2").iterdir() if name in path.name]


def test_shares_are_about_the_same():
    sizes = {"a": 8, "b": 4, "c": 3, "d": 0, "e": 1}
    assert shares(sizes, 2) == [["a", "d"], ["b", "c", "e"]]
    assert shares({"a": 1}, 3) == [["a"], [], []]


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    write_run(tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "-m", "merge_callback", "merge", "run", "--quiet", "--output", "two"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    subprocess.run(
        [sys.executable, "-m", "merge_callback", "merge", "run", "--quiet", "--output", "one"],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
