"""What hooks of a merged validation find around them, and which values there are where it fails."""

import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from evaluation_runs import Case, Watching, fit, merging
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn
from torchmetrics import MeanMetric, MetricTracker
from torchmetrics.classification import MulticlassCalibrationError
from training_runs import Classifier, assert_same_bits, loader, weights_of

from merge_callback import load_merge

# What hooks read


class Client:
    """What a service's logger hands out."""

    def __init__(self) -> None:
        self.id, self.config, self.written = "run-7", {"lr": 0.3}, []

    def get_url(self) -> str:
        return "https://runs/7"

    def log(self, value) -> None:
        self.written.append(value)


class Service(Logger):
    """A logger of a service: an experiment with values, a property, and methods of its own."""

    name, version, save_dir = "service", 7, "runs"

    def __init__(self) -> None:
        super().__init__()
        self.client, self.images = Client(), []

    @property
    def experiment(self) -> Client:
        return self.client

    def log_metrics(self, metrics, step=None) -> None: ...

    def log_hyperparams(self, *args, **kwargs) -> None: ...

    def log_image(self, image) -> None:
        self.images.append(image)


class Asking(Classifier):
    """Notes what its hooks find in every validation, and writes to all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list] = {}

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        trainer, (csv, board, service) = self.trainer, self.loggers
        assert isinstance(csv, CSVLogger)
        assert isinstance(board, TensorBoardLogger)
        found = [
            self.logger.log_dir,
            trainer.log_dir,
            board.version,
            board.experiment.get_logdir(),
            (service.experiment.id, service.experiment.config["lr"], service.experiment.get_url()),
            trainer.checkpoint_callback.dirpath,
            trainer.early_stopping_callback.wait_count,
            [type(callback).__name__ for callback in trainer.callbacks],
            os.path.join(service.save_dir, str(service.version)),
        ]
        notes(trainer).append(found)
        board.experiment.add_scalar("x", 1.0)
        service.experiment.log("point")
        service.experiment.config["lr"] = 3.0
        service.log_image("image")
        trainer.early_stopping_callback.wait_count = 77
        trainer.callbacks.append(Callback())


NOTES: dict[int, list] = {}


def notes(trainer: Trainer) -> list:
    return NOTES.setdefault(trainer.global_step, [])


def test_hooks_of_a_merged_validation_read_what_they_read_in_the_live_one_and_write_nothing(tmp_path):
    class Writing(Asking):
        """Writes in the merged validation only."""

        def validation_step(self, batch, batch_idx):
            stopping, service = self.trainer.early_stopping_callback, self.loggers[2]
            before = (stopping.wait_count, len(self.trainer.callbacks))
            super().validation_step(batch, batch_idx)
            if len(notes(self.trainer)) == 1:  # live
                stopping.wait_count = before[0]
                self.trainer.callbacks.pop()
                service.client.config["lr"] = 0.3

    NOTES.clear()
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path), Service()]
    stopping = EarlyStopping("val_loss", patience=100)
    others = [stopping, ModelCheckpoint(monitor="val_loss")]
    run = fit(
        Case(Writing),
        *others,
        merging(tmp_path),
        logger=loggers,
        enable_checkpointing=True,
        limit_val_batches=1,
    )
    assert [len(found) for found in NOTES.values()] == [2, 2]
    for live, merged in NOTES.values():
        assert merged == live
    service = loggers[2]
    assert (service.images, service.client.written) == (["image"] * 2, ["point"] * 2)  # of the live ones
    assert service.client.config == {"lr": 0.3}
    assert stopping.wait_count < 77
    assert type(run.trainer.callbacks[-1]) is ModelCheckpoint
    assert "merged/val_loss" in run.trainer.callback_metrics
    assert not [name for callback in run.trainer.callbacks for name in vars(callback) if name[:3] == "on_"]


# Callbacks that measure


class Evaluator(Callback):
    """Prepares batches and measures, as anomalib's does."""

    def __init__(self) -> None:
        self.seen, self.rounds = MeanMetric(), 0

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.seen.reset()  # so it is full when the merge is validated

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self.rounds += 1

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        batch[0].fill_(2.0)
        self.seen.update(pl_module(batch[0]).sum())

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("in_callback", self.seen.compute())
        pl_module.log("in_callback_once", pl_module.net[0].weight.sum())


class Prepared(Classifier):
    """Measures, in its own step, the same as the callback does."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("in_module", self(batch[0]).sum(), batch_size=1)


@pytest.mark.parametrize("kind", [Evaluator, "Evaluator"])
def test_a_callback_that_takes_part_measures_the_merged_weights(kind, tmp_path):
    evaluator = Evaluator()
    seen = fit(Case(Prepared), evaluator, merging(tmp_path, evaluate_with=[kind])).metrics.seen
    for metrics in (seen[8], seen[16]):
        assert metrics["in_callback"] == pytest.approx(metrics["in_module"], rel=1e-5)
        assert metrics["merged/in_callback"] == pytest.approx(metrics["merged/in_module"], rel=1e-5)
        assert metrics["merged/in_callback"] != pytest.approx(metrics["in_callback"], rel=1e-5)
    assert evaluator.rounds == 2  # of the live weights


class PartOfModule(nn.Module, Callback):
    """Prepares batches for the module that it is a part of, as anomalib's pre-processors do."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        batch[0].fill_(2.0)


class BringingItsOwn(Prepared):
    def __init__(self):
        super().__init__()
        self.prepare = PartOfModule()

    def configure_callbacks(self):
        return [self.prepare]


def test_callbacks_that_are_parts_of_the_module_take_part(tmp_path):
    run = fit(Case(BringingItsOwn), Evaluator(), merging(tmp_path, evaluate_with=["Evaluator"]))
    seen = run.metrics.seen[16]
    assert seen["merged/in_callback"] == pytest.approx(seen["merged/in_module"], rel=1e-5)
    with torch.no_grad():
        run.module.load_state_dict(load_merge(tmp_path / "merges/latest"))
        twos = run.module.eval()(torch.full_like(next(iter(loader()))[0], 2.0)).sum()
    assert seen["merged/in_module"] == pytest.approx(float(twos), rel=1e-5)


def test_a_callback_that_takes_no_part_leaves_no_merged_value_and_is_named(tmp_path, caplog):
    with caplog.at_level("INFO"):
        seen = fit(Case(Prepared), Evaluator(), merging(tmp_path)).metrics.seen[16]
    assert {name for name in seen if name.startswith("merged/")} == {"merged/in_module", "merged/val_loss"}
    [told] = [record.message for record in caplog.records if "evaluate_with" in record.message]
    assert "no merged/… value of in_callback, in_callback_once" in told
    assert "evaluate_with=['Evaluator']" in told


def test_a_lambda_callback_that_takes_no_part_is_named(tmp_path, caplog):
    def log_sum(trainer, module):
        module.log("sum", float(module.net[0].weight.sum()))

    with caplog.at_level("INFO"):
        seen = fit(Case(), LambdaCallback(on_validation_epoch_end=log_sum), merging(tmp_path)).metrics.seen[
            16
        ]
    assert "merged/sum" not in seen
    assert "evaluate_with=['LambdaCallback']" in caplog.text


def test_a_class_that_no_callback_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no callback of the class 'Evaluators'"):
        fit(Case(), Evaluator(), merging(tmp_path, evaluate_with=["Evaluators"]))
    with pytest.raises(ValueError, match="evaluate_with=3 must be"):
        merging(tmp_path, evaluate_with=3)


class Best(Classifier):
    """Logs the best of all validations, of a metric that keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = MetricTracker(MulticlassCalibrationError(4), maximize=False)
        self.values: dict[str, list[float]] = {"live": [], "merged": []}

    def on_validation_epoch_start(self) -> None:
        self.tracker.increment()

    def validation_step(self, batch, batch_idx):
        self.tracker.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("error", self.tracker.compute())
        self.log("best_error", float(self.tracker.best_metric()))


class LaterBegun(Best):
    """Begins a metric with each epoch of training."""

    def on_validation_epoch_start(self) -> None: ...

    def on_train_epoch_start(self) -> None:
        self.tracker.increment()


@pytest.mark.parametrize("kind", [Best, LaterBegun])
def test_a_tracker_compares_the_merge_with_what_it_has_tracked(kind, tmp_path):
    seen = fit(Case(kind), merging(tmp_path), max_epochs=4, num_sanity_val_steps=0).metrics.seen
    live: list[float] = []
    for metrics in seen.values():
        assert metrics["best_error"] == pytest.approx(min([*live, metrics["error"]]))
        known = [*live, metrics["error"]] if kind is Best else live  # the one that is replaced is no other
        assert metrics["merged/best_error"] == pytest.approx(min([*known, metrics["merged/error"]]))
        live.append(metrics["error"])


# Weights of the module's own


class Swapping(Classifier):
    """Is validated with an average of its weights that is no part of it."""

    def on_fit_start(self) -> None:
        self.shadow = weights_of(self.net)

    def on_train_batch_end(self, *_) -> None:
        for name, tensor in self.net.state_dict().items():
            self.shadow[name].lerp_(tensor, 0.3)

    def on_validation_epoch_start(self) -> None:
        self.live = weights_of(self.net)
        self.net.load_state_dict(self.shadow)

    def on_validation_epoch_end(self) -> None:
        self.net.load_state_dict(self.live)


class Registering(Swapping):
    """The average is a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.average = deepcopy(self.net).requires_grad_(False)

    @property
    def shadow(self):
        return self.average.state_dict()

    def on_fit_start(self) -> None: ...


@pytest.mark.parametrize("kind", [Swapping, Registering])
def test_a_module_that_is_validated_with_other_weights_leaves_no_merged_value(kind, tmp_path, caplog):
    case = Case(kind, trainer={"num_sanity_val_steps": 0})
    run, plain = fit(case, merging(tmp_path)), fit(case)
    assert_same_bits(weights_of(run.module), weights_of(plain.module))
    names = {name for name in run.metrics.seen[16] if name.startswith(("merged/", "merge_gain/"))}
    if kind is Registering:  # it is merged, too
        assert names == {"merged/val_loss", "merge_gain/val_loss"}
    else:
        assert not names
        assert "hooks of Swapping put weights of its own in" in caplog.text


# Failures


class FailingTwice(Classifier):
    """Fails in the merged validations of step 8 and 16."""

    def on_validation_start(self) -> None:
        merged = type(self.trainer.fit_loop.epoch_loop.val_loop).__name__ == "MergedEvaluationLoop"
        if merged and self.trainer.global_step < 24:
            raise RuntimeError("no data")


def test_after_a_failed_merged_validation_nothing_follows_the_live_weights(tmp_path):
    seen = fit(Case(FailingTwice), merging(tmp_path), max_epochs=3).metrics.seen
    for step in (8, 16):
        assert not [name for name in seen[step] if name.startswith(("merged/", "merge_gain/"))]
    assert {"merged/val_loss", "merge_gain/val_loss"} <= seen[24].keys()


def test_monitors_live_through_a_failed_merged_validation(tmp_path):
    class Scheduled(FailingTwice):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100)
            return [optimizer], [{"scheduler": plateau, "monitor": "merged/val_loss"}]

    watching = Watching(patience=1)
    best = ModelCheckpoint(tmp_path, monitor="merged/val_loss", save_top_k=1, save_last=True)
    run = fit(Case(Scheduled), watching, best, merging(tmp_path), max_epochs=3, enable_checkpointing=True)
    merged = run.curves.of("merged/val_loss")
    assert list(merged) == [23]
    assert watching.judged == pytest.approx([merged[23]])
    assert float(best.best_model_score) == pytest.approx(merged[23])
    assert torch.load(best.best_model_path, weights_only=False)["global_step"] == 24
    assert Path(best.last_model_path).exists()
    assert "_run_early_stopping_check" not in vars(watching)


def test_early_stopping_is_itself_again_after_a_run_of_failures(tmp_path):
    watching = Watching()
    fit(Case(FailingTwice), watching, merging(tmp_path), max_epochs=2)
    assert "_run_early_stopping_check" not in vars(watching)
    assert watching.judged == []
