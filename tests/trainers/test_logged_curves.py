"""What every logger gets of a run, and that the live curves are left alone."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from foreign_modules import GAN, llama, merged_run, token_dicts
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from training_runs import (
    Classifier,
    emissions,
    loader,
    seed,
    train,
)

from merge_callback import CheckpointMergeCallback

# Loggers

LOGGED = {
    "merge/phase",
    "merge/lr_ratio",
    "merge/window",
    "merge/diversity_rms",
    "merge/diversity_change",
    "merged/val_loss",
    "merge_gain/val_loss",
}


def curves_of_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def curves_of_csv(folder: Path) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    curves.setdefault(name, {})[int(row["step"])] = float(value)
    return curves


def logged_run(folder: Path, *callbacks: Callback) -> list[dict[str, dict[int, float]]]:
    seed()
    loggers = [TensorBoardLogger(folder, name="tb"), CSVLogger(folder, name="csv")]
    options = {"max_epochs": 3, "log_every_n_steps": 1, "logger": loggers}
    train(Classifier(), *callbacks, data=loader(), val=loader(16), **options)
    return [curves_of_tensorboard(loggers[0].log_dir), curves_of_csv(Path(loggers[1].log_dir))]


def test_every_logger_gets_every_curve_at_the_steps_of_the_live_ones(tmp_path):
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / "merges")
    for curves in logged_run(tmp_path, callback):
        assert curves.keys() >= LOGGED
        assert not [name for name in curves if name.startswith("merged/") and name != "merged/val_loss"]
        assert curves["merged/val_loss"].keys() == curves["val_loss"].keys() == {7, 15, 23}
        # Snapshots follow every second step; Lightning counts a step's logs from 0.
        assert curves["merge/window"] == {1: 1, 3: 2, 5: 3, **dict.fromkeys(range(7, 24, 2), 3)}
        assert curves["merge/diversity_rms"].keys() == set(range(5, 24, 2))
        for step, gain in curves["merge_gain/val_loss"].items():
            # The logger holds fp32, and the gain is a difference of fp32 losses around 1.
            difference = curves["val_loss"][step] - curves["merged/val_loss"][step]
            assert gain == pytest.approx(difference, abs=5e-7)


def test_the_live_curves_are_those_of_a_run_without_the_callback(tmp_path):
    plain = logged_run(tmp_path / "plain")
    merged = logged_run(
        tmp_path / "merged",
        CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / "merges"),
    )
    for without, with_merges in zip(plain, merged, strict=True):
        live = {n: c for n, c in with_merges.items() if not n.startswith(("merge/", "merge_", "merged/"))}
        assert live == without


def test_tokens_are_logged_where_they_can_be_counted(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path)
    train(llama(), callback, data=token_dicts(), logger=logger)
    assert curves_of_csv(Path(logger.log_dir))["merge/tokens"] == {2 * k - 1: 64 * k for k in range(1, 7)}


# Hooks


def test_the_published_snapshots_are_taken_once_each(tmp_path):
    probe = merged_run(GAN(), tmp_path, steps=36, every_n_steps=3, keep_last=None)
    steps = Counter(
        s["step"]
        for folder in emissions(tmp_path)
        for s in json.loads((folder / "merge.json").read_text())["snapshots"]
    )
    assert set(steps) == {4, 6, 10, 12, 16, 18, 22, 24, 28, 30, 34, 36}
    assert len(probe.outputs) == 18
