"""Validations of the merge: what they give, and that training is bitwise that without them."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from evaluated_modules import (
    Normed,
    OwnAxis,
)
from evaluation_runs import CASES, Case, Curves, Watching, fit, merging
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from slow_cases import mostly_slow, some_slow
from training_runs import (
    QUIET,
    Classifier,
    Probe,
    assert_same_bits,
    loader,
    weights_of,
)

from merge_callback import load_merge
from merge_callback.engine.metric_names import sounds_lower

SLOW = ["limited to a part", "two loaders, limited", "sequential", "max_size", "across epochs", "collections"]
SLOW += ["bf16-true", "shuffled"]


@pytest.fixture(scope="module", params=some_slow(CASES, SLOW))
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
    if case.own_weights:
        assert not [name for name in seen if name.startswith("merged/")]
        return
    fresh = case.make()
    weights = load_merge(newest_emission(folder, step))
    for name in weights.keys() - fresh.state_dict().keys():  # a buffer that the first validation makes
        setattr(fresh, name, torch.zeros_like(weights[name]))
    fresh.load_state_dict(weights, strict=True)
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
    case, _, merged, _ = runs
    names = {
        n.removeprefix("merged/") for _, row in merged.curves.rows for n in row if n.startswith("merged/")
    }
    assert bool(names) != case.own_weights
    for name in names:
        live, twin = merged.curves.of(name), merged.curves.of(f"merged/{name}")
        gains = merged.curves.of(f"merge_gain/{name}")
        assert gains.keys() == (set() if sounds_lower(name) is None and not gains else twin.keys())
        if live:  # a metric of which Lightning logs only the forks, or none, has a twin all the same
            assert twin.keys() == {step for step in live if step >= min(twin)}
            for step, gain in gains.items():
                rounding = 2**-23 * max(1.0, abs(live[step]), abs(twin[step]))  # of fp32
                assert abs(gain) == pytest.approx(abs(live[step] - twin[step]), abs=rounding)


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
    assert "merge_gain/val_loss" not in first
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
    assert run.curves.of("merge_gain/val_loss").keys() == live


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


WHEN = [(2, True), (6, True), (6, False), (100, False)]


@pytest.mark.parametrize(
    ("every_n_steps", "at_epoch_end", "place"),
    mostly_slow(
        ((*when, place) for when, place in product(WHEN, ["before", "after", "around"])),
        daily=[0, 4, 5, 6, 11],
    ),
)
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
