"""Validation of the merge inside fit: what it says, and that nothing else notices it."""

import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated_modules import (
    BatchIterating,
    Collected,
    Combined,
    Diffusing,
    Forces,
    Forked,
    Holding,
    Impatient,
    Normed,
    OwnAverage,
    OwnAxis,
    OwnLogging,
    OwnSchedule,
    Ranked,
    Reassigning,
    Remembering,
    Rolling,
    Scored,
    Tracked,
    TwoLoaders,
    Wrapped,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
)
from training_runs import (
    QUIET,
    Classifier,
    Probe,
    assert_same_bits,
    loader,
    rows,
    seed,
    train,
    weights_of,
)

from merge_callback import CheckpointMergeCallback, load_merge


class Curves(Logger):
    """A logger that keeps what it is told."""

    name, version, save_dir = "curves", "0", None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs) -> None: ...

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.rows if name in metrics}

    def live(self) -> list[tuple[int, dict[str, float]]]:
        """What is logged apart from the merging."""
        kept = [
            (step, {n: v for n, v in metrics.items() if not n.startswith(("merge/", "merged/"))})
            for step, metrics in self.rows
        ]
        return [row for row in kept if row[1]]


class Metrics(Callback):
    """What a callback that stands behind the merging can see after each validation."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.seen[trainer.global_step] = {n: float(v) for n, v in trainer.callback_metrics.items()}


class Tally:
    """Counts, out of reach of whatever restores the attributes of a module."""

    def __init__(self) -> None:
        self.counts: Counter = Counter()


def merging(folder: Path, **options) -> CheckpointMergeCallback:
    """A snapshot every second step: each validation, after 8 steps, has a merge of 3."""
    options = {"window": 3, "every_n_steps": 2, "keep_last": None, "dirpath": folder / "merges", **options}
    return CheckpointMergeCallback(**options)


# Cases


class Unsized(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        yield from rows(32)


def two_loaders():
    return [loader(16), loader(24, batch_size=4)]


def combined(mode: str) -> Callable[[], CombinedLoader]:
    return lambda: CombinedLoader({"a": loader(16), "b": loader(24, batch_size=4)}, mode)


def shuffled(seed: int = 3) -> DataLoader:
    return loader(32, shuffle=True, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A module, its validation data and options of the trainer."""

    make: Callable[[], LightningModule] = Classifier
    val: Callable[[], Any] = lambda: loader(32)
    trainer: dict[str, Any] = field(default_factory=dict)
    repeatable: bool = True  # a second validation of the same weights gives the same metrics


CASES = {
    "plain": Case(),
    "limited": Case(trainer={"limit_val_batches": 2}),
    "limited to a part": Case(trainer={"limit_val_batches": 0.5}),
    "two loaders": Case(TwoLoaders, two_loaders),
    "two loaders, limited": Case(TwoLoaders, two_loaders, {"limit_val_batches": 1}),
    "sequential": Case(TwoLoaders, lambda: CombinedLoader(two_loaders(), "sequential")),
    "min_size": Case(Combined, combined("min_size")),
    "max_size": Case(Combined, combined("max_size")),
    "max_size_cycle": Case(Combined, combined("max_size_cycle")),
    "inside the epoch": Case(Scored, trainer={"val_check_interval": 3}),
    "across epochs": Case(Scored, trainer={"val_check_interval": 5, "check_val_every_n_epoch": None}),
    "every second epoch": Case(trainer={"check_val_every_n_epoch": 2, "max_epochs": 4}),
    "sanity check": Case(Scored, trainer={"num_sanity_val_steps": 2}),
    "reloaded": Case(trainer={"reload_dataloaders_every_n_epochs": 1}),
    "accumulation": Case(Scored, trainer={"val_check_interval": 3, "accumulate_grad_batches": 2}),
    "bf16-mixed": Case(Scored, trainer={"precision": "bf16-mixed"}),
    "bf16-true": Case(trainer={"precision": "bf16-true"}),
    "profiled": Case(trainer={"profiler": "simple"}),
    "metric objects": Case(Scored),
    "collections": Case(Collected),
    "collections, inside": Case(Collected, trainer={"val_check_interval": 3}),
    "lists": Case(Ranked, trainer={"val_check_interval": 3}, repeatable=False),
    "wrappers": Case(Wrapped, trainer={"val_check_interval": 3}),
    "tracker": Case(Tracked, repeatable=False),
    "forked": Case(Forked),
    "unsized": Case(val=lambda: DataLoader(Unsized(), 8)),
    "iterator": Case(BatchIterating),
    "forces": Case(Forces),
    "shuffled": Case(val=shuffled, repeatable=False),
    "shuffled, limited": Case(val=shuffled, trainer={"limit_val_batches": 2}, repeatable=False),
    "shuffled globally": Case(val=lambda: loader(32, shuffle=True), repeatable=False),
    "workers": Case(Scored, lambda: loader(32, num_workers=1, persistent_workers=True)),
    "random": Case(Rolling, repeatable=False),
    "modes": Case(Normed, repeatable=False),
    "reassigned buffers": Case(Reassigning),
    "attributes": Case(Remembering),
    "own generators": Case(Diffusing, repeatable=False),
    "own containers": Case(Holding, repeatable=False),
    "own average": Case(OwnAverage, repeatable=False),
    "own schedule": Case(OwnSchedule, trainer={"max_epochs": 3}),
    "own stopping": Case(Impatient),
    "averaging callback": Case(trainer={"callbacks": lambda: [EMAWeightAveraging(decay=0.5)]}),
    "own logging": Case(OwnLogging),
    "own axis": Case(OwnAxis, repeatable=False),
}


@dataclass
class Run:
    module: LightningModule
    probe: Probe
    curves: Curves
    metrics: Metrics
    trainer: Trainer


def fit(case: Case, *callbacks: Callback, **options) -> Run:
    seed()
    run = Run(case.make(), Probe(), Curves(), Metrics(), None)  # type: ignore[arg-type]
    options = {"max_epochs": 2, "log_every_n_steps": 1, "logger": run.curves, **case.trainer, **options}
    more = options.pop("callbacks", list)()
    run.trainer = train(
        run.module,
        *callbacks,
        *more,
        run.probe,
        run.metrics,
        data=loader(shuffle=True),
        val=case.val(),
        **options,
    )
    return run


@pytest.fixture(scope="module", params=CASES)
def runs(request, tmp_path_factory):
    """One case, fitted without and with the callback, and the folder of the latter."""
    folder = tmp_path_factory.mktemp("runs")
    case = CASES[request.param]
    return case, fit(case), fit(case, merging(folder)), folder / "merges"


def test_training_is_bitwise_that_without_merged_validations(runs):
    _, plain, merged, _ = runs
    assert_same_bits(merged.probe.outputs, plain.probe.outputs)
    assert_same_bits(weights_of(merged.module), weights_of(plain.module))


def test_live_metrics_and_curves_are_those_without_merged_validations(runs):
    _, plain, merged, _ = runs
    assert merged.curves.live() == plain.curves.rows
    for step, seen in plain.metrics.seen.items():
        assert {n: v for n, v in merged.metrics.seen[step].items() if not n.startswith("merge")} == seen


def test_merged_metrics_are_those_of_a_separate_validation(runs):
    case, _, merged, folder = runs
    step, seen = max(merged.metrics.seen.items())
    fresh = case.make()
    fresh.load_state_dict(load_merge(newest_emission(folder, step)), strict=True)
    limits = {k: v for k, v in case.trainer.items() if k in ("limit_val_batches", "precision")}
    trainer = Trainer(**{**QUIET, **limits, "logger": Curves(), "inference_mode": False})
    trainer.validate(fresh, case.val(), verbose=False)
    trainer.callback_metrics.pop("step", None)  # an axis, no metric
    expected = {f"merged/{name}": float(value) for name, value in trainer.callback_metrics.items()}
    assert expected
    assert expected.keys() <= seen.keys()
    if case.repeatable:
        assert {name: seen[name] for name in expected} == expected


def newest_emission(folder: Path, step: int) -> Path:
    published = [path for path in sorted(folder.glob("step=*")) if int(path.name[5:13]) <= step]
    return published[-1]


def test_merged_metrics_and_gains_are_logged_at_the_steps_of_the_live_ones(runs):
    _, _, merged, _ = runs
    names = {
        n.removeprefix("merged/") for _, row in merged.curves.rows for n in row if n.startswith("merged/")
    }
    assert names
    for name in names:
        live, twin = merged.curves.of(name), merged.curves.of(f"merged/{name}")
        gains = merged.curves.of(f"merge/gain/{name}")
        assert twin.keys() == gains.keys()
        if live:  # a metric of which Lightning logs only the forks, or none, has a twin all the same
            assert twin.keys() == {step for step in live if step >= min(twin)}
            for step, gain in gains.items():
                # Differences of fp32 values around 1.
                assert abs(gain) == pytest.approx(abs(live[step] - twin[step]), abs=1e-6)


# The first validations


def test_metrics_of_training_get_no_merged_twin(tmp_path):
    run = fit(Case(), merging(tmp_path, every_n_steps=10))
    assert run.metrics.seen.keys() == {8, 16}
    for seen in run.metrics.seen.values():
        assert [n for n in seen if n.startswith("merged/")] == ["merged/val_loss"]


def test_before_the_first_merge_the_live_metrics_stand_in(tmp_path):
    # Snapshots at 6, 12, 18, 24: the first merge comes at 12.
    run = fit(Case(), merging(tmp_path, every_n_steps=6), max_epochs=3)
    first, *later = run.metrics.seen.values()
    assert first["merged/val_loss"] == first["val_loss"]
    assert "merge/gain/val_loss" not in first
    assert all(seen["merged/val_loss"] != seen["val_loss"] for seen in later)
    assert run.curves.of("merged/val_loss").keys() == {15, 23}


def test_a_merge_is_validated_once(tmp_path):
    # Snapshots at 12, 24 and 36: the first merge comes with 24, and 32 sees nothing new.
    hooks: Counter = Counter()

    class Counting(Classifier):
        def on_validation_start(self) -> None:
            hooks[self.trainer.global_step] += 1

    run = fit(Case(Counting), merging(tmp_path, every_n_steps=12, window=2), max_epochs=5)
    assert hooks == {8: 1, 16: 1, 24: 2, 32: 1, 40: 2}
    assert run.metrics.seen[32]["merged/val_loss"] == run.metrics.seen[24]["merged/val_loss"]


def test_an_own_axis_of_validation_moves_no_curve_of_training(tmp_path):
    run = fit(Case(OwnAxis), merging(tmp_path))
    assert run.curves.of("merge/window").keys() == set(range(1, 16, 2))
    # Lightning takes ``step`` for the axis and does not draw it.
    assert not [name for _, row in run.curves.rows for name in row if name.endswith("step")]


def test_an_own_axis_of_training_moves_no_curve_of_validation(tmp_path):
    class Thousandfold(Classifier):
        def on_train_batch_end(self, *_) -> None:
            self.log("step", 1000.0 * self.trainer.global_step, on_step=True, on_epoch=False)

    run = fit(Case(Thousandfold), merging(tmp_path))
    live = run.curves.of("val_loss").keys()
    assert run.curves.of("merged/val_loss").keys() == live
    assert run.curves.of("merge/gain/val_loss").keys() == live


class Caching(Classifier):
    """Makes its masks when it first needs them: one a plain attribute, one a buffer, as rotary caches are."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = None
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.register_buffer("kept", torch.zeros(4))

    def forward(self, x):
        if self.mask is None:
            self.mask, self.cache, self.kept = torch.ones(4), torch.ones(4), self.kept + 1
        return super().forward(x) + self.mask + self.cache + self.kept


def test_a_module_may_have_been_validated_before_it_is_fitted(tmp_path):
    # Lightning validates in inference mode, whose tensors can't be written to later.
    module = Caching()
    Trainer(**QUIET).validate(module, loader(16), verbose=False)
    assert module.mask.is_inference()
    assert module.kept.is_inference()
    run = fit(Case(lambda: module), merging(tmp_path))
    assert run.curves.of("merged/val_loss").keys() == {7, 15}


# Callbacks that monitor


class Watching(EarlyStopping):
    """Notes what it was given to judge by."""

    def __init__(self, **options) -> None:
        super().__init__(**{"monitor": "merged/val_loss", "patience": 100, **options})
        self.judged: list[float] = []

    def _evaluate_stopping_criteria(self, current):
        self.judged.append(float(current))
        return super()._evaluate_stopping_criteria(current)


@pytest.mark.parametrize(("every_n_steps", "at_epoch_end"), [(2, True), (6, True), (6, False), (100, False)])
@pytest.mark.parametrize("place", ["before", "after", "around"])
def test_early_stopping_judges_every_validation_by_its_own_merge(
    every_n_steps, place, at_epoch_end, tmp_path
):
    stoppers = [Watching(mode=mode, check_on_train_epoch_end=at_epoch_end) for mode in ("min", "max")]
    callback = merging(tmp_path, every_n_steps=every_n_steps)
    callbacks = {
        "before": [*stoppers, callback],
        "after": [callback, *stoppers],
        "around": [stoppers[0], callback, stoppers[1]],
    }[place]
    run = fit(Case(), *callbacks, max_epochs=3)
    expected = [seen["merged/val_loss"] for seen in run.metrics.seen.values()]
    assert len(expected) == 3
    assert [stopper.judged for stopper in stoppers] == [expected, expected]


def test_early_stopping_stops_a_run_by_its_merges(tmp_path):
    stopper = Watching(mode="max", patience=2)  # the loss falls, so it never improves
    run = fit(Case(), stopper, merging(tmp_path), max_epochs=20)
    assert run.trainer.current_epoch == 3


@pytest.mark.parametrize("every_n_steps", [2, 6, 100])
def test_checkpoints_are_chosen_by_merged_metrics_from_the_first_validation_on(every_n_steps, tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="merged/val_loss", save_top_k=-1, filename="{step}", enable_version_counter=False
    )
    run = fit(
        Case(),
        checkpoint,
        merging(tmp_path, every_n_steps=every_n_steps),
        max_epochs=3,
        enable_checkpointing=True,
    )
    scores = {int(Path(p).stem.removeprefix("step=")): float(v) for p, v in checkpoint.best_k_models.items()}
    assert scores == {step: seen["merged/val_loss"] for step, seen in run.metrics.seen.items()}


def test_a_checkpoint_holds_the_live_weights(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="merged/val_loss", save_top_k=-1, filename="{step}")
    probe = Probe(8)
    fit(Case(Normed), probe, checkpoint, merging(tmp_path), enable_checkpointing=True)
    for step in (8, 16):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)["state_dict"]
        live = {n: t for n, t in probe.weights[step].items() if not n.startswith(("moving.", "seen"))}
        assert_same_bits({n: saved[n] for n in live}, live)


def test_a_plateau_scheduler_can_follow_the_merge(tmp_path):
    class Following(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=100.0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "merged/val_loss"},
            }

    run = fit(Case(Following), merging(tmp_path), max_epochs=3)
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3e-3)  # three times a tenth


def test_a_module_reads_metrics_of_training_while_merged_weights_are_validated(tmp_path):
    class Reading(Classifier):
        def on_validation_epoch_end(self) -> None:
            self.log("overfit", self.trainer.callback_metrics["train_loss"])

    run = fit(Case(Reading), merging(tmp_path))
    assert run.curves.of("merged/overfit") == run.curves.of("overfit")


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


# Hooks


class Counted(Classifier):
    """Counts its validation hooks."""

    def __init__(self, calls: Tally) -> None:
        super().__init__()
        self.calls = calls


HOOKS = [
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_validation_model_zero_grad",
]


def counting(base: type, hook: str) -> Callable:
    def count(self, *args, **kwargs):
        self.calls.counts[hook] += 1
        return getattr(super(type(self), self), hook)(*args, **kwargs)

    return count


def counted(base: type) -> Any:
    return type("Counted", (base,), {hook: counting(base, hook) for hook in HOOKS if hasattr(base, hook)})


def test_the_modules_hooks_run_twice_and_those_of_callbacks_once(tmp_path):
    module_calls, callback_calls, bar_calls = Tally(), Tally(), Tally()
    other, bar = counted(Callback)(), counted(TQDMProgressBar)()
    other.calls, bar.calls = callback_calls, bar_calls
    fit(
        Case(lambda: counted(Counted)(module_calls)),
        other,
        bar,
        merging(tmp_path),
        enable_progress_bar=True,
        max_epochs=1,
    )
    once = {hook: 4 if "batch" in hook else 1 for hook in HOOKS if "model" not in hook}
    assert callback_calls.counts == bar_calls.counts == once
    assert module_calls.counts == {
        **{hook: 2 * n for hook, n in once.items()},
        "on_validation_model_zero_grad": 1,
    }


def test_a_merged_validation_is_given_the_batches_of_the_live_one(tmp_path):
    batches: dict[int, list[torch.Tensor]] = {}

    class Noting(Classifier):
        def validation_step(self, batch, batch_idx):
            batches.setdefault(self.trainer.global_step, []).append(batch[1])
            super().validation_step(batch, batch_idx)

    fit(Case(Noting), merging(tmp_path), limit_val_batches=3)
    for given in batches.values():
        assert len(given) == 6
        assert_same_bits(given[:3], given[3:])


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global generator"])
def test_a_shuffled_part_of_the_data_is_the_same_for_live_and_merged_weights(own, tmp_path):
    # Else the gain compares two weights on two samples: noise.
    batches: dict[int, list[torch.Tensor]] = {}

    class Noting(Classifier):
        def validation_step(self, batch, batch_idx):
            batches.setdefault(self.trainer.global_step, []).append(batch[0])
            super().validation_step(batch, batch_idx)

    val = shuffled if own else lambda: loader(32, shuffle=True)
    fit(Case(Noting, val), merging(tmp_path), limit_val_batches=2)
    for given in batches.values():
        assert_same_bits(given[:2], given[2:])


@pytest.mark.parametrize("kind", ["sampler", "batch sampler"])
def test_generators_of_samplers_are_left_where_they_were(kind, tmp_path):
    class OwnBatches:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(5)

        def __iter__(self):
            yield from torch.randperm(32, generator=self.generator).split(8)

        def __len__(self) -> int:
            return 4

    def val():
        if kind == "batch sampler":
            return DataLoader(rows(32), batch_sampler=OwnBatches())
        sampler = torch.utils.data.RandomSampler(rows(32), generator=torch.Generator().manual_seed(5))
        return DataLoader(rows(32), batch_size=8, sampler=sampler)

    case = Case(val=val, trainer={"limit_val_batches": 2})
    plain, merged = fit(case), fit(case, merging(tmp_path))
    assert merged.curves.live() == plain.curves.rows


# Failures


class Failing(Classifier):
    """Fails, in the second round of validation at a step, with what it is told."""

    def __init__(self, error: BaseException, step: int = 8, hook: str = "validation_step") -> None:
        super().__init__()
        self.error, self.step, self.hook = error, step, hook
        self.rounds = Tally()
        self.acc, self.norm = MulticlassAccuracy(4), nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        return self.net(self.norm(x))

    def training_step(self, batch, batch_idx):
        self.acc.update(self(batch[0]), batch[1])
        self.log("seen_acc", self.acc.compute())
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.rounds.counts[self.trainer.global_step] += 1

    def validation_step(self, batch, batch_idx):
        self.norm.train()
        self.seen += torch.rand(())
        self.acc.update(self(batch[0]), batch[1])
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            self.fail("validation_step")

    def on_validation_epoch_end(self) -> None:
        self.fail("on_validation_epoch_end")

    def on_validation_end(self) -> None:
        self.fail("on_validation_end")

    def fail(self, hook: str) -> None:
        rounds = self.rounds.counts
        merged = rounds[self.step] == 2 and self.trainer.global_step == self.step
        if hook == self.hook and merged and not rounds["failures"]:
            rounds["failures"] += 1
            raise self.error


@pytest.mark.parametrize("monitored", [True, False])
@pytest.mark.parametrize("step", [8, 16])
@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end", "on_validation_end"])
def test_a_failed_merged_validation_leaves_no_trace_in_training(hook, step, monitored, tmp_path):
    def case():
        return Case(lambda: Failing(RuntimeError("out of luck"), step, hook), shuffled)

    monitors = [Watching(), ModelCheckpoint(tmp_path, monitor="merged/val_loss")] if monitored else []
    options = {"max_epochs": 3, "enable_checkpointing": monitored}
    plain = fit(case(), max_epochs=3)
    merged = fit(case(), *monitors, merging(tmp_path), **options)
    assert merged.module.rounds.counts == {8: 2, 16: 2, 24: 2, "failures": 1}
    assert_same_bits(merged.probe.outputs, plain.probe.outputs)
    assert_same_bits(weights_of(merged.module), weights_of(plain.module))
    assert torch.equal(merged.module.seen, plain.module.seen)
    assert merged.curves.live() == plain.curves.rows


@pytest.fixture
def sigint_handler():
    """Lightning ignores further interrupts after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["keyboard", "exit"])
@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end", "on_validation_end"])
@pytest.mark.usefixtures("sigint_handler")
def test_an_interrupt_in_a_merged_validation_leaves_the_live_weights(hook, error, tmp_path):
    module, probe, states = Failing(error, 16, hook), Probe(8), []

    class Before(Callback):
        def on_validation_start(self, trainer, pl_module) -> None:
            states.append((weights_of(pl_module), pl_module.seen.clone()))

        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            states.append((weights_of(pl_module), pl_module.seen.clone()))

    with pytest.raises(SystemExit) as raised:
        train(module, Before(), merging(tmp_path), probe, data=loader(), val=loader(32), max_epochs=3)
    assert raised.value.code == (3 if isinstance(error, SystemExit) else 1)
    assert module.rounds.counts == {8: 2, 16: 2, "failures": 1}
    assert_same_bits(weights_of(module), states[-1][0])
    assert torch.equal(module.seen, states[-1][1])
    assert len(probe.outputs) == 16


def test_what_is_raised_by_the_data_is_no_reason_to_stop(tmp_path):
    class Flaky(torch.utils.data.Dataset):
        """Fails to read one row, the third time it is asked."""

        def __init__(self) -> None:
            self.asked = 0

        def __len__(self) -> int:
            return 32

        def __getitem__(self, index):
            self.asked += index == 20
            if index == 20 and self.asked == 2:
                raise OSError("the disk is away")
            return rows(32)[index]

    case = Case(val=lambda: DataLoader(Flaky(), 8), trainer={"profiler": "simple", "max_epochs": 3})
    run = fit(case, merging(tmp_path))
    assert run.curves.of("merged/val_loss").keys() == {15, 23}
    assert run.curves.of("val_loss").keys() == {7, 15, 23}


@pytest.mark.parametrize("after", ["end", "exception"])
def test_validating_after_a_fit_is_the_trainers_own_business(after, tmp_path):
    class Stopping(Classifier):
        def training_step(self, batch, batch_idx):
            if after == "exception" and self.trainer.global_step == 13:
                raise RuntimeError("enough")
            return super().training_step(batch, batch_idx)

    module, callback, curves, calls = Stopping(), merging(tmp_path), Curves(), []
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "logger": curves, "callbacks": [callback]})
    try:
        trainer.fit(module, loader(), loader(32))
    except RuntimeError:
        assert after == "exception"
    module.on_validation_start = lambda: calls.append(1)
    for _ in range(2):
        logged = len(curves.rows)
        (found,) = trainer.validate(module, loader(32), verbose=False)
        (expected,) = Trainer(**QUIET).validate(module, loader(32), verbose=False)
        assert found == expected
        names = {*trainer.callback_metrics, *(name for _, row in curves.rows[logged:] for name in row)}
        assert not [name for name in names if name.startswith("merge")]
    assert len(calls) == 4
