"""Which way a metric improves, and so the sign of a gain."""

import pytest
import torch
from evaluation_runs import Case, fit, merging
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics import MeanMetric, MetricCollection
from training_runs import (
    Classifier,
)

from merge_callback.engine.metric_names import sounds_lower

# Gains

IMPROVE_DOWNWARDS = [
    "loss",
    "val_loss",
    "val/loss_ce",
    "valLoss",
    "loss_epoch",
    "val_loss1",
    "val_losses",
    "MeanSquaredError",
    "val_rmse",
    "perplexity",
    "val_ppl",
    "word_error_rate",
    "val_nll",
    "negative_log_likelihood",
    "bits_per_byte",
    "cross_entropy",
    "val_fid",
    "kl_div",
]


IMPROVE_UPWARDS = [
    "acc",
    "val_accuracy",
    "val/f1",
    "auroc",
    "bleu",
    "log_likelihood",
    "psnr",
    "MulticlassAccuracy",
    "recall@5",
]


class Named(Classifier):
    """Logs one value under all names."""

    def validation_step(self, batch, batch_idx):
        for name in (*IMPROVE_DOWNWARDS, *IMPROVE_UPWARDS, "score", "penalty"):
            self.log(name, self.loss(batch))


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("named")
    modes = {"score": "max", "merged/penalty": "min"}
    monitors = [
        ModelCheckpoint(folder, monitor=name, mode=mode, filename=mode) for name, mode in modes.items()
    ]
    return fit(Case(Named), *monitors, merging(folder), enable_checkpointing=True).metrics.seen[16]


@pytest.mark.parametrize("name", [*IMPROVE_DOWNWARDS, "penalty"])
def test_a_gain_is_positive_where_the_merge_scores_lower_on_what_should_fall(name, named):
    assert named["merged/val_loss"] != named["val_loss"]
    assert named[f"merge_gain/{name}"] == pytest.approx(named[name] - named[f"merged/{name}"], abs=1e-6)


@pytest.mark.parametrize("name", [*IMPROVE_UPWARDS, "score"])
def test_a_gain_is_positive_where_the_merge_scores_higher_on_what_should_rise(name, named):
    assert named[f"merge_gain/{name}"] == pytest.approx(named[f"merged/{name}"] - named[name], abs=1e-6)


def test_a_metric_object_says_itself_which_way_it_improves(tmp_path):
    class Distance(MeanMetric):
        higher_is_better = False

    class Measured(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.inception = Distance()

        def validation_step(self, batch, batch_idx):
            self.inception(self.loss(batch))
            self.log("inception", self.inception)

    seen = fit(Case(Measured), merging(tmp_path)).metrics.seen[16]
    assert seen["merge_gain/inception"] == pytest.approx(
        seen["inception"] - seen["merged/inception"], abs=1e-6
    )


class Distance(MeanMetric):
    """Says itself that lower is better."""

    higher_is_better = False


class Hit(MeanMetric):
    higher_is_better = True


class Numbers(Classifier):
    """Logs what metric objects return, as numbers, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = MetricCollection({"A": Distance(), "B": Hit()}, prefix="val/")
        self.own, self.alone = MetricCollection({"C": Distance()}), Distance()
        self.forwarded = Hit()

    def validation_step(self, batch, batch_idx):
        value = self.loss(batch)
        for metric in (self.scores, self.own, self.alone):
            metric.update(value)
        self.log("direct", self.forwarded(value))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.scores.compute())  # by name, and by what was returned
        self.log_dict({f"x/{name}": float(value) for name, value in self.own.compute().items()})
        self.log("renamed", self.alone.compute())
        self.log("unclear", float(self.net[0].weight.sum()))
        for metric in (self.scores, self.own, self.alone):
            metric.reset()


def test_numbers_that_metric_objects_return_improve_as_these_say(tmp_path, caplog):
    with caplog.at_level("INFO"):
        seen = fit(Case(Numbers), merging(tmp_path)).metrics.seen[16]
    for name in ("val/A", "x/C", "renamed"):
        assert seen[f"merge_gain/{name}"] == pytest.approx(seen[name] - seen[f"merged/{name}"], abs=1e-6)
    for name in ("val/B", "direct"):
        assert seen[f"merge_gain/{name}"] == pytest.approx(seen[f"merged/{name}"] - seen[name], abs=1e-6)
    assert "merge_gain/unclear" not in seen
    assert "merged/unclear" in seen
    told = [record.message for record in caplog.records if "higher_is_better" in record.message]
    assert len(told) == 1
    assert "logged for unclear," in told[0]


@pytest.mark.parametrize(
    "name", ["acc_std", "accuracy_gap", "policy_entropy", "val_f1_threshold", "kl_weight", "grad_scale_error"]
)
def test_of_a_name_that_only_contains_a_metrics_no_direction_is_known(name):
    assert sounds_lower(name) is None


def test_options_say_which_way_a_metric_improves(tmp_path):
    options = {"lower_is_better": ["unclear"], "higher_is_better": "val/A"}
    seen = fit(Case(Numbers), merging(tmp_path, **options)).metrics.seen[16]
    assert seen["merge_gain/unclear"] == pytest.approx(seen["unclear"] - seen["merged/unclear"], abs=1e-6)
    assert seen["merge_gain/val/A"] == pytest.approx(seen["merged/val/A"] - seen["val/A"], abs=1e-6)


def test_a_scheduler_that_monitors_says_which_way_a_metric_improves(tmp_path):
    class Scheduled(Numbers):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
            return [optimizer], [{"scheduler": plateau, "monitor": "unclear"}]

    seen = fit(Case(Scheduled), merging(tmp_path)).metrics.seen[16]
    assert seen["merge_gain/unclear"] == pytest.approx(seen["merged/unclear"] - seen["unclear"], abs=1e-6)
