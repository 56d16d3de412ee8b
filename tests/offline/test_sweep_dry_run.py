"""`merge-callback sweep --dry-run` says what the sweep itself would say."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from merge_callback.cli.main import main

OTHER = {
    "names": {"weight": torch.ones(3, 4), "new": torch.ones(2)},
    "shape": {"weight": torch.ones(4, 3)},
    "dtype": {"weight": torch.ones(3, 4, dtype=torch.bfloat16)},
}


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Runs a sweep over two checkpoints in `run/`, and returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        save_file({"weight": torch.full((3, 4), float(step))}, tmp_path / f"run/step={step}.safetensors")
    (tmp_path / "mean_of.py").write_text("def loss(state):\n    return {'loss': state['weight'].mean()}\n")

    def run(*options):
        capsys.readouterr()
        status = main(["sweep", "run", "--evaluate", "mean_of:loss", "--output", "best", "--quiet", *options])
        return status, capsys.readouterr()

    yield run
    sys.modules.pop("mean_of", None)


@pytest.mark.parametrize("what", OTHER)
def test_what_the_sweep_refuses_is_refused(tmp_path, sweep, what):
    save_file(OTHER[what], tmp_path / "run/step=1.safetensors")
    (planned, dry), (status, real) = sweep("--dry-run"), sweep()
    assert planned == status == 1
    assert dry.err.splitlines()[-1] == real.err.splitlines()[-1]
    assert {"dtype": "convert all to one dtype first"}.get(what, what) in real.err


def test_the_size_is_that_of_the_merged_tensors(sweep):
    assert "would write the best to best, 24 B\n" in sweep("--dry-run", "--dtype", "bf16")[1].out
