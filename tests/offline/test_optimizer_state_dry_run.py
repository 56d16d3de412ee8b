"""`merge --optimizer-state --dry-run` refuses what the merge refuses."""

import pytest
import torch

from merge_callback.cli.main import main

SOUND = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}}
OTHER = {
    "no Lightning checkpoint": None,
    "only one of": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}},
    "has 'row_var'": {0: {"step": torch.tensor(3.0), "row_var": torch.ones(4)}},
    "is (3,) in": {0: {**SOUND[0], "exp_avg": torch.ones(3)}},
}


def save(path, step, state):
    states = [] if state is None else [{"state": state, "param_groups": [{"params": [0], "lr": 0.1}]}]
    content = {"state_dict": {"weight": torch.full((4,), float(step))}, "optimizer_states": states}
    torch.save({"global_step": step, "pytorch-lightning_version": "2.6.0", **content}, path)


@pytest.mark.parametrize("reason", ["", *OTHER])
def test_a_dry_run_ends_as_the_merge_does(tmp_path, reason, capsys, monkeypatch):
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)
    for step in (1, 2):
        save(tmp_path / f"step={step}.ckpt", step, OTHER[reason] if reason and step == 1 else SOUND)
    command = ["merge", str(tmp_path), "--optimizer-state", "--output", str(tmp_path / "merged"), "--quiet"]
    told = []
    for options in (["--dry-run"], []):
        told.append((main([*command, *options]), capsys.readouterr().err.splitlines()[-1]))
        assert (tmp_path / "merged").exists() == (not reason and not options)
    if reason:
        assert told[0] == told[1] == (1, told[0][1])
        assert reason in told[0][1]
    else:
        assert [status for status, _ in told] == [0, 0]
