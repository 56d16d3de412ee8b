"""What the callback and the merger show in Python, while a run goes on and when it is over."""

from pathlib import Path

import pytest
import torch
from distributed_runs import UnevenModule, fit, run_jobs
from lightning.pytorch import Callback
from training_runs import Classifier, assert_same_bits, loader, train, weights_of

from merge_callback import CheckpointMergeCallback, CheckpointMerger, load_merge, merge_state_dicts
from merge_callback.engine.results import SnapshotInfo

OPTIONS = {"window": 4, "every_n_steps": 3, "method": "sma", "keep_last": None, "spike": "off"}


class Asks(Callback):
    """Asks the merging callback after each validation, and keeps the weights at its snapshots."""

    def __init__(self, merging, method=None, last=None):
        self.merging, self.asked = merging, {"method": method, "last": last}
        self.weights, self.merges, self.windows, self.latest = {}, {}, {}, {}

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step % OPTIONS["every_n_steps"] == 0:
            self.weights[trainer.global_step] = weights_of(module)

    def on_validation_end(self, trainer, module):
        step = trainer.global_step
        self.windows[step] = self.merging.window
        self.merges[step] = self.merging.merge(**self.asked)
        self.latest[step] = self.merging.latest


def fitted(folder, *, ask=True, validate=6, **asked):
    """The callback, what asked it, and the module, after 18 steps."""
    torch.manual_seed(0)
    merging = CheckpointMergeCallback(dirpath=folder, **OPTIONS)
    asks, module = Asks(merging, **asked), Classifier()
    callbacks = [merging, asks] if ask else [merging]
    train(module, *callbacks, data=loader(), val=loader(16), max_steps=18, val_check_interval=validate,
          check_val_every_n_epoch=None)  # fmt: skip
    return merging, asks, module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("run"), method="wma", last=2)


def test_the_window_shows_when_its_snapshots_were_taken(run):
    merging, asks, _ = run
    assert [(s.step, s.phase, s.tokens) for s in asks.windows[12]] == [
        (step, "stable", None) for step in (3, 6, 9, 12)
    ]
    assert merging.window == asks.windows[18]
    assert repr(merging.window[-1]) == "SnapshotInfo(step=18, tokens=None, lr=0.3, phase='stable')"
    assert merging.window[-1] == SnapshotInfo(18, None, 0.3, "stable")


def test_a_merge_on_demand_is_that_of_the_asked_method_and_snapshots(run):
    _, asks, _ = run
    for step in (6, 12, 18):
        pair = [asks.weights[step - 3], asks.weights[step]]
        assert_same_bits(asks.merges[step], merge_state_dicts(pair, "wma"))


def test_when_the_run_is_over_its_window_is_merged_from_the_files(run):
    merging, asks, _ = run
    assert_same_bits(merging.merge(), load_merge(merging.latest))
    assert_same_bits(merging.merge("wma", last=2), asks.merges[18])


def test_asking_disturbs_neither_training_nor_merges(run, tmp_path):
    merging, _, module = run
    other, _, undisturbed = fitted(tmp_path, ask=False)
    assert_same_bits(weights_of(module), weights_of(undisturbed))
    assert [p.name for p in sorted(tmp_path.glob("step=*"))] == [
        p.name for p in sorted(merging.latest.parent.glob("step=*"))
    ]
    assert_same_bits(load_merge(merging.latest), load_merge(other.latest))
    assert merging.history == other.history


def test_latest_is_the_newest_emission_and_best_the_one_that_scored_best(run):
    merging, asks, _ = run
    assert merging.latest.name == "step=00000018-sma"
    assert asks.latest[12].name in ("step=00000009-sma", "step=00000012-sma")  # it may still be written
    scores = {row["merge_step"]: row["merged/val_loss"] for row in validations(merging)}
    best = min(scores, key=scores.get)
    assert merging.best.name == f"step={best:08d}-sma"
    loaded = Classifier()
    loaded.load_state_dict(load_merge(merging.best))
    losses = [loaded.eval().loss(batch).item() for batch in loader(16)]
    assert sum(losses) / len(losses) == pytest.approx(scores[best], rel=1e-6)


def validations(merging):
    return [row for row in merging.history if row["event"] == "validation"]


def test_history_has_a_row_for_each_snapshot_and_validation(run):
    merging, _, _ = run
    assert [(row["event"], row["step"]) for row in merging.history] == [
        *[("snapshot", 3), ("snapshot", 6), ("validation", 6), ("snapshot", 9)],
        *[("snapshot", 12), ("validation", 12), ("snapshot", 15), ("snapshot", 18), ("validation", 18)],
    ]
    assert {"phase", "tokens", "lr", "merge/diversity_rms"} <= merging.history[-2].keys()
    for row in validations(merging):
        gain = next(value for name, value in row.items() if "gain/" in name)
        assert gain == pytest.approx(row["val_loss"] - row["merged/val_loss"], abs=1e-6)
        assert row["merge_step"] == row["step"]


def test_best_is_not_what_was_pruned(tmp_path):
    merging, *_ = fitted(tmp_path)
    scores = {row["merge_step"]: row["merged/val_loss"] for row in validations(merging)}
    first, second, *_ = sorted(scores, key=scores.get)
    for path in tmp_path.glob(f"step={first:08d}-*"):
        path.rename(tmp_path / "elsewhere")
    assert merging.best.name == f"step={second:08d}-sma"


def test_history_and_best_survive_a_resume(tmp_path):
    merging, *_ = fitted(tmp_path)
    state = merging.state_dict()
    resumed = CheckpointMergeCallback(dirpath=tmp_path, **OPTIONS)
    resumed.load_state_dict(state)
    assert (resumed.history, resumed.best, resumed.window) == (merging.history, merging.best, merging.window)
    assert_same_bits(resumed.merge(), merging.merge())


def test_before_there_is_anything_there_is_nothing():
    merging = CheckpointMergeCallback(every_n_steps=3)
    found = merging.window, merging.latest, merging.best, merging.history, merging.merge()
    assert found == ([], None, None, [], None)


def test_what_can_not_be_merged_is_refused(tmp_path):
    merging = CheckpointMergeCallback(every_n_steps=3)
    with pytest.raises(ValueError, match="last=1 leaves nothing to merge; choose 2 or more"):
        merging.merge(last=1)
    with pytest.raises(ValueError, match="unknown merging method 'mean'; choose one of"):
        merging.merge("mean")
    merging = CheckpointMergeCallback(dirpath=tmp_path, **OPTIONS, durable=False)
    train(Classifier(), merging, data=loader())
    with pytest.raises(RuntimeError, match=r"in memory only: call merge\(\) before it ends"):
        merging.merge()
    assert len(merging.window) == 4


def test_a_plain_loop_shows_the_same(tmp_path):
    model = Classifier()
    optimizer = model.configure_optimizers()
    with CheckpointMerger(model, optimizer, dirpath=tmp_path, **OPTIONS) as merger:
        for step in range(12):
            loss = model.loss(next(iter(loader())))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            merger.step(loss=loss)
            if step == 8:
                live = loss.item()
                with merger.merged_weights():
                    merged = model.loss(next(iter(loader()))).item()
                merger.log_validation({"val_loss": live}, {"val_loss": merged})
                within = merger.merge()
    assert_same_bits(within, load_merge(tmp_path / "step=00000009-sma"))
    assert merger.best == tmp_path / "step=00000009-sma"
    assert merger.latest == tmp_path / "step=00000012-sma"
    assert [s.step for s in merger.window] == [3, 6, 9, 12]
    assert_same_bits(merger.merge(), load_merge(merger.latest))
    (row,) = [row for row in merger.history if row["event"] == "validation"]
    assert (row["step"], row["val_loss"], row["merge_step"]) == (9, live, 9)


class AtStep(Callback):
    """Merges on all ranks at one step."""

    def __init__(self, merging):
        self.merging, self.merge = merging, None

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6 and self.merge is None:
            self.merge = self.merging.merge()


def merged_on(strategy: str, folder: Path):
    merging = CheckpointMergeCallback(window=4, every_n_steps=2, method="sma", dirpath=folder, keep_last=None)
    asks = AtStep(merging)
    fit(strategy, UnevenModule(), merging, asks)
    names = [merging.latest and merging.latest.name, [s.step for s in merging.window]]
    return asks.merge, names


def test_ranks_merge_together_and_the_first_one_has_the_result(tmp_path):
    jobs = {s: (merged_on, {"strategy": s, "folder": tmp_path / s}) for s in ("ddp", "fsdp2")}
    for strategy, results in run_jobs(2, jobs).items():
        (whole, names), (empty, others) = results
        (published,) = (tmp_path / strategy).glob("step=00000006-*")
        assert_same_bits(whole, load_merge(published))
        assert empty == {}
        assert names == others


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "window=10, every_n_tokens=4_000_000_000, method='auto'"),
        (
            {"every_n_steps": 40, "keep_last": 5, "spike": "off"},
            "window=10, every_n_steps=40, method='auto', keep_last=5, spike='off'",
        ),
    ],
)
def test_a_callback_shows_its_options(options, shown):
    assert repr(CheckpointMergeCallback(**options)) == f"CheckpointMergeCallback({shown})"
