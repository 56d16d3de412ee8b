"""``WarmupAdaptiveDecay``: the rates that are really applied, when it cuts them, when it stops."""

import math
from itertools import groupby, pairwise

import pytest
import torch
from distributed_runs import run_jobs
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from spiking_runs import FIRES, Line, spiking
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from training_runs import QUIET, assert_same_bits, loader, one_thread, rows, seed, train, weights_of

from merge_callback import CheckpointMergeCallback, WarmupAdaptiveDecay

LONG = {"max_steps": 300, "limit_val_batches": 1}
EVERY_5 = {"val_check_interval": 5, "check_val_every_n_epoch": None}


def scripted(base):
    """A classifier that logs the accuracy ``score(step)`` and notes the rates of each optimizer step."""

    class Scripted(base):
        def __init__(self, score=lambda step: 0.5, groups=(0.4,), kind=float):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
            self.score, self.groups, self.kind, self.rates = score, groups, kind, []

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", self.score(self.trainer.global_step))

        def configure_optimizers(self):
            layers = self.net if len(self.groups) > 1 else [self.net]
            groups = [
                {"params": layer.parameters(), "lr": self.kind(lr)}
                for layer, lr in zip(layers, self.groups, strict=True)
            ]
            optimizer = torch.optim.Adam(groups, capturable=False, foreach=False)
            optimizer.register_step_pre_hook(
                lambda o, *_: self.rates.append(tuple(float(group["lr"]) for group in o.param_groups))
            )
            return optimizer

    return Scripted


Scripted = scripted(LightningModule)


def adaptive(**options):
    return WarmupAdaptiveDecay(**{"min_lr": 0.06, **options})


def run(module, callback, *others, **options):
    data = DataLoader(ConcatDataset([rows(8)] * 8), batch_size=8)  # in the middle of an epoch as at its start
    return train(module, callback, *others, data=data, val=data, **{**LONG, **EVERY_5, **options})


def levels(rates, warmup=50):
    """Each rate after the warm-up, and for how many steps it was held."""
    return [(rate, len([*held])) for rate, held in groupby(rates[warmup:])]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_the_rates_are_those_of_appendix_j(namespace):
    package = pytest.importorskip(namespace)
    module = scripted(package.LightningModule)()
    trainer = package.Trainer(**QUIET, **EVERY_5, max_steps=300, callbacks=[adaptive()])
    with one_thread():
        trainer.fit(module, loader(), loader(8))
    # A value that never changes: the first look, at 55, is the best; three more without a better one cut.
    warmup = [0.4 * step / 50 for step in range(1, 51)]
    held = [0.4] * 20 + [0.2] * 15 + [0.1] * 15  # .05 is below min_lr
    assert [rate for (rate,) in module.rates] == pytest.approx(warmup + held, rel=1e-12)
    assert trainer.should_stop


def test_only_a_new_best_value_resets_the_count():
    better = {60: 0.6, 70: 0.55, 75: 0.61, 90: 0.62}  # two looks between new best ones; .55 is none
    module = Scripted(lambda step: better.get(step, 0.5))
    run(module, adaptive(), max_steps=107)
    assert levels(module.rates) == [((0.4,), 55), ((0.2,), 2)]  # cut after 95, 100 and 105


def test_a_nan_is_no_new_best_value_and_lower_may_be_better():
    module = Scripted(lambda step: float("nan") if step < 62 else -float(step))
    run(module, adaptive(mode="min"), max_steps=90)
    assert levels(module.rates) == [((0.4,), 40)]
    worse = Scripted(float)
    run(worse, adaptive(mode="min"), max_steps=72)
    assert levels(worse.rates) == [((0.4,), 20), ((0.2,), 2)]


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_each_group_has_its_own_peak_and_all_must_be_spent(kind):
    module = Scripted(groups=(0.4, 0.1), kind=kind)
    run(module, adaptive(warmup_steps=10, min_lr=0.15))
    assert module.rates[4] == pytest.approx((0.2, 0.05))
    (first, steps), (second, more) = levels(module.rates, 10)
    assert first + second == pytest.approx((0.4, 0.1, 0.2, 0.05))
    assert (steps, more) == (20, 15)


def test_steps_are_optimizer_steps_when_gradients_are_accumulated():
    module = Scripted()
    run(module, adaptive(warmup_steps=4), accumulate_grad_batches=2, val_check_interval=10)
    assert levels(module.rates, 3) == [((0.4,), 22), ((0.2,), 15), ((0.1,), 15)]


def test_more_frequent_validations_are_passed_over_and_rarer_ones_are_said(recwarn):
    module = Scripted()
    run(module, adaptive(warmup_steps=0), val_check_interval=2)
    assert levels(module.rates, 0)[0] == ((0.4,), 24)  # read at 6, 12, 18 and 24
    assert not [w for w in recwarn if "WarmupAdaptiveDecay" in str(w.message)]
    rare = Scripted()
    with pytest.warns(
        UserWarning, match=r"every 5 steps, but up to 8 steps.*val_check_interval=5, check_val"
    ):
        run(rare, adaptive(warmup_steps=0), val_check_interval=1.0, check_val_every_n_epoch=1)
    assert levels(rare.rates, 0)[0] == ((0.4,), 32)


@pytest.mark.parametrize(
    ("interval", "every_n_epochs", "longest"), [(3, 1, 5), (5, 1, 8), (2, 1, 2), (8, 2, 16)]
)
def test_the_longest_gap_between_validations_is_known(interval, every_n_epochs, longest):
    seen = []

    class Steps(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.global_step)

    options = {"val_check_interval": interval, "check_val_every_n_epoch": every_n_epochs, "max_steps": 64}
    every = longest - 1
    with pytest.warns(UserWarning, match=f"up to {longest} steps"):
        run(Scripted(), adaptive(every_n_steps=every), Steps(), **options)
    assert max(b - a for a, b in pairwise(seen)) == longest


class Saved(Callback):
    """Saves checkpoints after certain steps, and after their validation if they have one."""

    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 5:
            self.on_validation_end(trainer)

    def on_validation_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_a_resumed_run_goes_on_exactly(tmp_path):
    score = {60: 0.7}
    steps = (20, 57, 65, 75, 83)
    whole = Scripted(lambda step: score.get(step, 0.5))
    run(whole, adaptive(), Saved(tmp_path, steps))
    assert len(whole.rates) == 105
    for step in steps:
        rest = Scripted(lambda step: score.get(step, 0.5))
        trainer = run(rest, adaptive(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert rest.rates == whole.rates[step:], step
        assert trainer.should_stop
        assert_same_bits(weights_of(rest), weights_of(whole))


def test_a_run_that_stopped_stays_stopped(tmp_path):
    run(Scripted(), adaptive(warmup_steps=0)).save_checkpoint(tmp_path / "stopped.ckpt")
    again = Scripted()
    run(again, adaptive(warmup_steps=0), ckpt_path=tmp_path / "stopped.ckpt")
    assert not again.rates


def test_a_callback_that_joins_a_run_begins_there(tmp_path):
    run(Scripted(), Saved(tmp_path, (10,)), max_steps=10)
    module = Scripted()
    callback = adaptive(warmup_steps=5)
    callback.load_state_dict({**callback.state_dict(), "cuts": 7})  # another fit's
    run(module, callback, ckpt_path=tmp_path / "10.ckpt", max_steps=42)
    # Adam's state brings the rates of the checkpoint, .4.
    assert [rate for (rate,) in module.rates[:6]] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4, 0.4])
    assert levels(module.rates, 5) == [((0.4,), 20), ((0.2,), 7)]  # read at 20, 25, 30 and 35


def test_beside_the_merging_callback_a_cut_begins_a_new_phase(tmp_path):
    merging = CheckpointMergeCallback(every_n_steps=1, window=4, dirpath=tmp_path, spike="off")
    phases, merged = {}, []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, *_):
            phases.setdefault(merging.session.progress.phases.segment, trainer.global_step)

        def on_validation_end(self, trainer, *_):
            merged.append("merged/val_acc" in trainer.callback_metrics)

    module = Scripted()
    callback = adaptive(warmup_steps=10, monitor="merged/val_acc")
    run(module, callback, merging, Seen())
    assert [(phase.value, since) for phase, since in phases] == [
        ("stable", 0),
        ("warmup", 0),
        ("stable", 9),
        ("stable", 30),
        ("stable", 45),
    ]
    assert merged.count(False) < 4  # until the first merge
    assert levels(module.rates, 10) == [((0.4,), 20), ((0.2,), 15), ((0.1,), 15)]


def test_the_ramp_after_a_restore_multiplies_its_rates(tmp_path):
    class Measured(Line):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 0.5)

    callback = adaptive(warmup_steps=10, patience=15, min_lr=1e-4)
    every = {**EVERY_5, "val": loader(8), "limit_val_batches": 1}
    found = spiking(tmp_path, module=Measured, callbacks=(callback,), fit=every)
    assert len(found.restores) == 1
    # The first look is at 15, and the fifteenth after it at 90, in the middle of the ramp of 10 steps.
    scheduled = [0.02 * min(1, step / 10) * (1 if step <= 90 else 0.5) for step in range(1, 101)]
    ramp = [1.0] * FIRES + [i / 10 for i in range(1, 11)] + [1.0] * 5
    assert found.watch.scheduled == pytest.approx(scheduled)
    assert found.module.applied == pytest.approx([a * b for a, b in zip(scheduled, ramp, strict=True)])


FALLS = {"one falls": (0.001, -0.002), "first rank only": (0.0, None), "one has NaN": (0.001, math.nan)}
"""What each rank's metric gains with every step; ``None`` if the rank does not log it."""


class OfRank(Scripted):
    """Logs what only this rank saw."""

    def __init__(self, slopes):
        super().__init__(groups=(0.4, 0.1))
        self.slopes = slopes

    def validation_step(self, batch, batch_idx):
        slope = self.slopes[self.global_rank]
        if slope is not None:
            self.log("val_acc", 0.5 + slope * self.trainer.global_step)


def rates_of_rank(slopes, folder, resume_from=None):
    seed()
    module = OfRank(slopes)
    folder.mkdir(exist_ok=True)
    path = resume_from and folder / f"{resume_from}.ckpt"
    saved = () if resume_from else (Saved(folder, (7, 23, 25)),)
    ranks = {
        "devices": 2,
        "strategy": DDPStrategy(process_group_backend="gloo"),
        "use_distributed_sampler": False,
    }
    run(module, adaptive(warmup_steps=10), *saved, ckpt_path=path, **ranks)
    return module.rates, weights_of(module)


@pytest.mark.slow
def test_all_ranks_decide_the_same_whatever_each_of_them_saw(tmp_path):
    jobs = {
        (name, step): (rates_of_rank, {"slopes": slopes, "folder": tmp_path / name, "resume_from": step})
        for name, slopes in FALLS.items()
        for step in (None, 7, 23, 25)
    }
    found = run_jobs(2, jobs)
    warmup = [(0.04 * step, 0.01 * step) for step in range(1, 11)]
    for (name, step), ranks in found.items():
        first = 15 if name == "one has NaN" else 20  # else the first look is the best
        held = [(0.4, 0.1)] * first + [(0.2, 0.05)] * 15 + [(0.1, 0.025)] * 15
        for rates, weights in ranks:
            torch.testing.assert_close(rates, (warmup + held)[step or 0 :], msg=str((name, step)))
            assert_same_bits(weights, found[name, None][0][1])


class Scheduled(Scripted):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]


class OnPlateau(Scripted):
    def configure_optimizers(self):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer := super().configure_optimizers())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val_acc"},
        }


class TwoOptimizers(Scripted):
    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.net]


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Scheduled(), {}, "so does the module's StepLR; return the optimizer alone"),
        (OnPlateau(), {}, "so does the module's ReduceLROnPlateau; return the optimizer alone"),
        (TwoOptimizers(), {}, "one optimizer that has an lr, not with 2"),
        (Scripted(), {"limit_val_batches": 0}, "this run has no validation"),
        (Scripted(groups=(0.05,)), {}, r"below min_lr=0.06, but the optimizer's lr is only 0.05"),
    ],
    ids=["scheduler", "plateau", "optimizers", "validation", "rate"],
)
def test_what_cannot_work_is_refused_before_the_first_step(module, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        run(module, adaptive(), **options)
    assert not module.rates


def test_a_metric_that_validation_does_not_log_is_named():
    with pytest.raises(MisconfigurationException, match=r"monitors val_accuracy.*it logged val_acc"):
        run(Scripted(), adaptive(monitor="val_accuracy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"patience": 0.5}, "patience=0.5"),
        ({"factor": 2}, "factor=2 must lie between 0 and 1"),
        ({"min_lr": float("nan")}, "min_lr=nan"),
        ({"mode": "higher"}, "mode='higher'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupAdaptiveDecay(**options)
