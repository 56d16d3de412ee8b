"""`merge-callback sweep`: every merge is the one that `merge` makes, scored once, and the best is written."""

import csv
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_callback import merge_state_dicts
from merge_callback.cli.main import main
from merge_callback.offline import sweep as sweeping
from merge_callback.offline.candidates import greedy_soup, line_search, metric_weighted, plain_candidates

EVALUATION = """
import json, os, torch
calls = []

def loss(state):
    calls.append({name: tensor.clone() for name, tensor in state.items()})
    return {"val_loss": ((state["a.weight"] - 1) ** 2).mean(), "accuracy": state["a.weight"].mean()}

def strange(state):
    return {"thing": 1.0}

def failing(state):
    if len(calls) > 1:
        raise KeyError("no such\\nbatch")
    return loss(state)

def not_a_number(state):
    return {"val_loss": float("nan")}

def empty(state):
    return {}

def text(state):
    return {"val_loss": "low"}

def alone(state):
    return 3
"""


def model(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": 1 + torch.randn(6, 5, generator=generator) / (1 + seed),
        "a.bias": torch.randn(5, generator=generator).bfloat16(),
        "still": torch.ones(3),
        "seen": torch.tensor(seed),
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Five checkpoints in `run/`, an evaluation in `scoring.py`, and a folder to work in."""
    (tmp_path / "run").mkdir()
    for seed in range(5):
        save_file(model(seed), tmp_path / f"run/step={100 * (seed + 1)}.safetensors")
    (tmp_path / "scoring.py").write_text(EVALUATION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("merge_callback.offline.workers.available", lambda: 1)
    yield tmp_path
    sys.modules.pop("scoring", None)


def sweep(*arguments, evaluate="loss"):
    scored = ["--evaluate", f"scoring:{evaluate}", "--quiet"]
    return main(["sweep", "run", *scored, *map(str, arguments)])


def table(folder):
    with open(Path(folder) / "results.csv", newline="") as file:
        return {row["candidate"]: row for row in csv.DictReader(file)}


def test_each_merge_is_scored_as_the_command_merge_makes_it(run, capsys):
    methods = ["sma", "wsm", "ties:density=0.5", "ema:alpha=0.1"]
    chosen = ["--last", 3, 5, "--order", "forward", "reversed", "--select", "val_loss"]
    assert sweep("--methods", *methods, *chosen, "--output", "best") == 0
    dicts, steps = [model(seed) for seed in range(5)], [100, 200, 300, 400, 500]
    calls = iter(sys.modules["scoring"].calls)
    found = [{**state} for state in calls]
    for name, options, last, order in [
        ("sma", {}, 3, "forward"),
        ("wsm", {}, 5, "reversed"),
        ("ties", {"density": 0.5}, 3, "reversed"),
        ("ema", {"alpha": 0.1}, 5, "forward"),
    ]:
        expected = merge_state_dicts(
            dicts[-last:], name, positions=steps[-last:], steps=steps[-last:], order=order, **options
        )
        assert any(all(torch.equal(state[n], expected[n]) for n in expected) for state in found), name
    rows = table("best-sweep")
    # 2 x 2 of three methods, 2 of sma, whose order changes nothing, and the newest checkpoint alone.
    assert len(rows) == len(found) == 15
    printed = capsys.readouterr()
    assert "sma: order='reversed' changes nothing" in printed.err
    record = json.loads(Path("best/merge.json").read_text())
    best = record["sweep"]["candidate"]
    merges = {n: float(row["val_loss"]) for n, row in rows.items() if row["checkpoints"] != "1"}
    assert merges[best] == min(merges.values())
    assert {one["name"] for one in record["sweep"]["candidates"]} == rows.keys()
    assert f"best by val_loss: {best}" in printed.out
    assert Path("best-sweep/pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_has_the_bytes_of_its_own_merge(run):
    assert sweep("--methods", "wma", "--last", 3, "--select", "accuracy", "--output", "best") == 0
    assert main(["merge", "run", "--last", "3", "--method", "wma", "--output", "alone", "--quiet"]) == 0
    assert Path("best/model.safetensors").read_bytes() == Path("alone/model.safetensors").read_bytes()


def test_linear_merges_are_made_in_one_read(run, monkeypatch):
    passes, reads, opened = [], [], []
    one_pass, open_checkpoint = sweeping.one_pass, sweeping.open_checkpoint

    def counted(sources, rows, outs):
        passes.append(len(outs))
        reads.append(sum(source.nbytes for source in sources))
        one_pass(sources, rows, outs)

    monkeypatch.setattr(sweeping, "one_pass", counted)
    monkeypatch.setattr(
        sweeping, "open_checkpoint", lambda path, *rest: opened.append(path) or open_checkpoint(path, *rest)
    )
    methods = ["--methods", "sma", "wsm", "wma", "--last", 2, 3, 5]
    assert sweep(*methods, "--select", "val_loss", "--results", "all") == 0
    assert passes == [9, 9]  # of the two tensors that differ; each gives all nine merges
    assert sum(reads) == 5 * (30 * 4 + 5 * 2)
    assert len(opened) == len({*opened}) == 5


def test_merges_go_in_groups_if_the_memory_is_short(run, monkeypatch):
    monkeypatch.setattr(sweeping, "available_memory", lambda: 1)
    passes, one_pass = [], sweeping.one_pass
    monkeypatch.setattr(sweeping, "one_pass", lambda *a: passes.append(len(a[2])) or one_pass(*a))
    assert sweep("--methods", "sma", "wma", "--select", "val_loss", "--results", "all") == 0
    assert passes == [1, 1, 1, 1]


def test_a_broken_off_sweep_goes_on(run, capsys):
    chosen = ["--methods", "sma", "wma", "ema", "--select", "val_loss", "--results", "scores"]
    assert sweep(*chosen, evaluate="failing") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{run / 'scoring.py'}:" in message
    assert "KeyError" in message
    kept = Path("scores/results.jsonl").read_text()
    assert kept.count('"metrics"') == 2
    Path("scores/results.jsonl").write_text(kept + '{"key": "cut o')  # as a kill leaves it
    source = EVALUATION
    scoring = sys.modules["scoring"]
    scoring.failing = scoring.loss  # the same evaluation, as its file tells, which now works
    scoring.calls.clear()
    assert Path("scoring.py").read_text() == source
    assert sweep(*chosen, evaluate="failing") == 0
    assert len(scoring.calls) == 2
    assert len(table("scores")) == 4
    scoring.calls.clear()
    assert sweep(*chosen, evaluate="failing") == 0
    assert not scoring.calls


def test_other_files_and_another_evaluation_are_scored_again(run):
    chosen = ["--methods", "sma", "--select", "val_loss", "--results", "scores"]
    assert sweep(*chosen) == 0
    calls = sys.modules["scoring"].calls
    assert len(calls) == 2
    save_file(model(9), run / "run/step=500.safetensors")
    assert sweep(*chosen) == 0
    assert len(calls) == 4
    assert sweep(*chosen, "--dtype", "fp16") == 0
    assert len(calls) == 6
    Path("scoring.py").write_text(EVALUATION + "# other data\n")
    assert sweep(*chosen) == 0
    assert len(calls) == 8


def test_greedy_soup_and_weights_by_metric(run, capsys):
    methods = ["--methods", "greedy", "metric-weighted", "--temperature", 0.05]
    assert sweep(*methods, "--select", "val_loss", "--output", "best") == 0
    states = [model(seed)["a.weight"] for seed in range(5)]
    losses = [float(((state - 1) ** 2).mean()) for state in states]
    order = sorted(range(5), key=lambda i: losses[i])
    kept, best = order[:1], losses[order[0]]
    for i in order[1:]:
        mean = torch.stack([states[j] for j in sorted([*kept, i])]).mean(0)
        if (loss := float(((mean - 1) ** 2).mean())) <= best:
            kept, best = sorted([*kept, i]), loss
    assert "single checkpoints scatter by" in capsys.readouterr().err
    rows = table("best-sweep")
    soup = f"greedy [{','.join(str(i + 1) for i in kept)}]"
    assert float(rows[soup]["val_loss"]) == pytest.approx(best, rel=1e-5)
    weights = torch.softmax(-torch.tensor(losses) / 0.05, 0)
    mean = sum(w * s for w, s in zip(weights, states, strict=True))
    found = float(rows["metric-weighted-5 T=0.05"]["val_loss"])
    assert found == pytest.approx(float(((mean - 1) ** 2).mean()), rel=1e-5)


def test_a_line_search_finds_the_scale(run):
    assert sweep("--methods", "extrapolate", "--line-search", "--select", "val_loss", "--output", "best") == 0
    rows = {name: float(row["val_loss"]) for name, row in table("best-sweep").items() if "λ" in name}
    best = min(rows, key=rows.get)
    record = json.loads(Path("best/merge.json").read_text())
    assert record["method"]["options"]["scale"] == float(best.rpartition("=")[2])
    assert {0, 0.25, 2} <= {float(name.rpartition("=")[2]) for name in rows}
    assert len(rows) > 9


def drive(search, score):
    """Answers a search by a function of its candidates; returns all that it asked for."""
    asked, some = [], next(search)
    while True:
        asked += some
        try:
            some = search.send([score(one) for one in some])
        except StopIteration:
            return asked


def test_searches_leave_out_what_has_no_number():
    scores = {(0,): 1.0, (1,): -math.inf, (2,): 2.0, (0, 2): 3.0}
    asked = drive(greedy_soup(range(3)), lambda one: scores.get(one.inputs, -math.inf))
    assert [one.inputs for one in asked] == [(0,), (1,), (2,), (0, 2), (0, 1, 2)]
    *_, weighted = drive(metric_weighted(range(3)), lambda one: scores.get(one.inputs, -math.inf))
    assert weighted.inputs == (0, 2)
    assert weighted.method.weights == pytest.approx(torch.softmax(torch.tensor([2.0, 4.0]), 0).tolist())


def test_the_line_search_halves_around_the_best():
    [start], _ = plain_candidates([("extrapolate", {})], [None], ["forward"], 4)
    asked = drive(line_search(start), lambda one: -((one.method.scale - 0.6) ** 2))
    assert [one.method.scale for one in asked][9:] == [0.375, 0.625, 0.5625, 0.6875]


@pytest.mark.parametrize(
    ("evaluate", "options", "named"),
    [
        ("strange", [], "a lower or a higher 'thing'"),
        ("loss", [], "several metrics"),
        ("loss", ["--select", "f1"], "--select f1"),
        ("not_a_number", [], "no merge has a finite val_loss"),
        ("empty", [], "returned no metrics"),
        ("text", [], "'low' for 'val_loss'"),
        ("alone", [], "returned a int"),
        ("missing", [], "no function 'missing'"),
    ],
)
def test_an_evaluation_that_says_nothing_is_refused(run, capsys, evaluate, options, named):
    assert sweep("--output", "best", *options, evaluate=evaluate) == 1
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not Path("best").exists()


def test_a_strange_metric_has_the_direction_that_is_said(run):
    assert sweep("--higher-is-better", "th*", "--results", "scores", evaluate="strange") == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--methods", "nonsense"], "unknown method 'nonsense'"),
        (["--methods", "ema:beta=2"], "no option beta"),
        (["--methods", "ema:alpha"], "gives no value"),
        (["--methods", "sma", "--order", "reversed"], "nothing is left to try"),
        (["--last", "9"], "there are 5 checkpoints"),
        (["--last", "1"], "must be at least 2"),
        (["--temperature", "0"], "must be a positive number"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_made(run, capsys, options, named):
    before = sorted(run.rglob("*"))
    assert sweep("--results", "scores", "--select", "val_loss", *options) == 1
    assert named in capsys.readouterr().err
    assert sorted(path for path in run.rglob("*") if "__pycache__" not in path.parts) == before


def test_nothing_that_is_there_is_replaced(run, capsys):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("kept")
    assert sweep("--select", "val_loss", "--results", "mine") == 1
    assert "holds 'notes.txt'" in capsys.readouterr().err
    assert sweep("--select", "val_loss", "--output", "mine") == 1
    assert sweep("--select", "val_loss", "--output", "run", "--force") == 1
    assert sweep("--select", "val_loss", "--results", "run") == 1
    assert sweep("--select", "val_loss", "--output", "new", "--results", "new/scores") == 1
    assert sorted(os.listdir("mine")) == ["notes.txt"]
    assert len(os.listdir("run")) == 5

    chosen = ["--select", "val_loss", "--results", "scores"]
    assert sweep(*chosen) == 0
    assert sweep(*chosen, "--methods", "wma") == 0  # the table is the sweep's own
    assert "wma-5" in table("scores")
    Path("scores/results.csv").write_text("edited")
    capsys.readouterr()
    assert sweep(*chosen) == 0
    assert "results.csv was edited" in capsys.readouterr().err
    assert Path("scores/results.csv").read_text() == "edited"
    Path("scores/results.csv").unlink()
    Path("scores/results.csv").symlink_to(run / "mine/notes.txt")
    assert sweep(*chosen) == 0
    assert Path("mine/notes.txt").read_text() == "kept"


def test_a_dry_run_writes_nothing(run, capsys):
    before = sorted(run.rglob("*"))
    assert sweep("--methods", "sma", "greedy", "--output", "best", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "would read run/step=100.safetensors" in printed
    assert "sma-5, greedy-5 (a search)" in printed
    assert sorted(run.rglob("*")) == before


def test_adapters_are_refused_whose_factors_have_no_mean(run, capsys):
    folders = [run / f"adapters/step={step}" for step in (1, 2)]
    for folder in folders:
        folder.mkdir(parents=True)
        factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
        name = "base_model.model.q_proj.lora_"
        save_file({f"{name}{f}.weight": t for f, t in factors.items()}, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    scored = ["--evaluate", "scoring:loss", "--results", "scores"]
    assert main(["sweep", *map(str, folders), *scored]) == 1
    assert "is a LoRA adapter" in capsys.readouterr().err
    assert main(["merge", *map(str, folders), "--optimizer-state", "--output", "out"]) == 1
    assert "is a LoRA adapter" in capsys.readouterr().err
    assert not Path("scores").exists()


def test_usage_is_told(run, capsys):
    for arguments in (
        ["sweep", "run", "--results", "x"],
        ["sweep", "run", "--evaluate", "scoring:loss"],
        ["sweep", "run", "--evaluate", "scoring:loss", "--results", "x", "--line-search"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "--line-search looks for the scale of extrapolate" in capsys.readouterr().err


def test_a_whole_state_reaches_the_evaluation(run):
    assert sweep("--select", "val_loss", "--results", "scores") == 0
    state = sys.modules["scoring"].calls[-1]
    assert state.keys() == load_file("run/step=500.safetensors").keys()
    assert int(state["seen"]) == 4  # which is not averaged


MODULE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule

class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.net(batch) + torch.rand(())).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Ones(LightningDataModule):
    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 3), 2)

    train_dataloader = val_dataloader
"""

CONFIG = """
trainer: {max_steps: 1, accelerator: cpu, limit_val_batches: 2}
model: {class_path: tiny_module.Tiny}
data: {class_path: tiny_module.Ones}
"""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Three checkpoints of a module, whose names a wrapper has changed, and its configuration."""
    monkeypatch.chdir(tmp_path)
    Path("tiny_module.py").write_text(MODULE)
    Path("config.yaml").write_text(CONFIG)
    Path("run").mkdir()
    for step in (1, 2, 3):
        bias = torch.tensor([float(step)])
        save_file(
            {"_orig_mod.net.weight": torch.ones(1, 3), "_orig_mod.net.bias": bias},
            f"run/step={step}.safetensors",
        )
    yield tmp_path
    sys.modules.pop("tiny_module", None)


def test_the_validation_of_a_configuration_scores_merges(configured, capsys):
    arguments = ["sweep", "run", "--methods", "sma", "greedy", "--config", "config.yaml", "--quiet"]
    assert main([*arguments, "--results", "scores"]) == 0
    losses = {name: float(row["val_loss"]) for name, row in table("scores").items()}
    noise = losses["checkpoint 2"]
    # The mean of all is the second one, and has drawn the same random numbers.
    assert losses["sma-3"] == noise
    assert losses["checkpoint 1"] < noise < losses["checkpoint 3"]
    assert "checkpoint alone" in capsys.readouterr().out
    assert sorted(path.name for path in configured.iterdir() if path.name != "__pycache__") == [
        "config.yaml",
        "run",
        "scores",
        "tiny_module.py",
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("Tiny}", "Nothing}"), "Nothing"),
        (("max_steps", "most_steps"), "most_steps"),
        (("Linear(3, 1)", "Linear(4, 1)"), "does not fit the model of --config"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(configured, capsys, change, named):
    for file in ("config.yaml", "tiny_module.py"):
        Path(file).write_text(Path(file).read_text().replace(*change))
    arguments = ["sweep", "run", "--config", "config.yaml", "--quiet"]
    assert main([*arguments, "--results", "scores"]) == 1
    assert named in capsys.readouterr().err.splitlines()[-1]
