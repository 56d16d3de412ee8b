"""Which way a metric improves, and so the sign of a gain."""

import pytest
from evaluation_runs import Case, fit, merging
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics import MeanMetric
from training_runs import (
    Classifier,
)

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
    assert named[f"merge/gain/{name}"] == pytest.approx(named[name] - named[f"merged/{name}"], abs=1e-6)


@pytest.mark.parametrize("name", [*IMPROVE_UPWARDS, "score"])
def test_a_gain_is_positive_where_the_merge_scores_higher_on_what_should_rise(name, named):
    assert named[f"merge/gain/{name}"] == pytest.approx(named[f"merged/{name}"] - named[name], abs=1e-6)


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
    assert seen["merge/gain/inception"] == pytest.approx(
        seen["inception"] - seen["merged/inception"], abs=1e-6
    )
