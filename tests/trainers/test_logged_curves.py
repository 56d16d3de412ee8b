"""What every logger gets of a run, and that the live curves are left alone."""

import csv
import json
import re
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
from merge_callback.engine.charts import Charts

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


def layout_in(events) -> dict[str, dict[str, list[str]]]:
    """The newest layout in TensorBoard's events: patterns of tags by category and title."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    *_, newest = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(newest.tensor_proto.string_val[0])
    return {
        part.title: {chart.title: [*chart.multiline.tag] for chart in part.chart} for part in layout.category
    }


def tags_on(patterns: list[str], tags: list[str]) -> set[str]:
    """The curves that TensorBoard draws on a chart."""
    return {tag for pattern in patterns for tag in tags if re.match(pattern, tag)}


class TwiceLogged(Classifier):
    """Logs a metric per step and per epoch, with a name that is a pattern of others."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_loss+acc", self.loss(batch), on_step=True, on_epoch=True)


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_tensorboard_draws_live_and_merged_on_one_chart_per_metric(prefix, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / "merges")
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    train(TwiceLogged(), callback, data=loader(), val=loader(16), max_epochs=2, logger=logger)
    (file,) = Path(logger.log_dir).glob("events*")
    events = EventAccumulator(str(file)).Reload()
    tags, start = events.Tags()["scalars"], f"{prefix}-" if prefix else ""
    layout = layout_in(events)
    drawn = {title: tags_on(patterns, tags) for title, patterns in layout["Live and merged"].items()}
    assert drawn == {
        "val_loss": {f"{start}val_loss", f"{start}merged/val_loss"},
        "val_loss+acc_epoch": {f"{start}val_loss+acc_epoch", f"{start}merged/val_loss+acc_epoch"},
    }
    shown = {title: tags_on(patterns, tags) for title, patterns in layout["Gain of the merge"].items()}
    assert shown["val_loss"] == {f"{start}merge_gain/val_loss"}


def test_a_writer_that_refuses_the_layout_is_asked_once(caplog):
    class Refusing:
        asked = 0

        def add_custom_scalars(self, layout):
            self.asked += 1
            raise ValueError("no")

    writer, charts = Refusing(), Charts()
    for name in ("merge/window", "merged/a", "merged/a", "merged/b"):
        charts.show(writer, [name])
    charts.show(object(), ["merged/c"])
    assert writer.asked == len(caplog.records) == 1


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
