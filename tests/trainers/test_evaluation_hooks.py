"""Hooks, data, failures and interrupts around a validation of the merge."""

import math
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_runs import Case, Curves, Tally, Watching, fit, merging, shuffled
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from slow_cases import mostly_slow
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
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


def test_a_bar_that_a_thread_draws_finds_itself_while_the_merge_is_validated(tmp_path, monkeypatch):
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)

    class Slow(Classifier):
        def validation_step(self, batch, batch_idx):
            assert self.trainer.progress_bar_callback is bar
            time.sleep(0.15)  # the thread draws ten times a second
            super().validation_step(batch, batch_idx)

    bar = RichProgressBar()
    run = fit(Case(Slow), bar, merging(tmp_path), enable_progress_bar=True, max_epochs=1, limit_val_batches=2)
    assert run.curves.of("merged/val_loss")
    assert not died
    assert not [name for name in vars(bar) if name.startswith("on_")]


def noting(batches: dict[int, list[torch.Tensor]]) -> type[Classifier]:
    """A module that notes what it is validated on, by step; as its attributes they would be put back."""

    class Noting(Classifier):
        def validation_step(self, batch, batch_idx):
            batches.setdefault(self.trainer.global_step, []).append(batch)
            super().validation_step(batch, batch_idx)

    return Noting


def test_a_merged_validation_is_given_the_batches_of_the_live_one(tmp_path):
    batches: dict[int, list[torch.Tensor]] = {}
    fit(Case(noting(batches)), merging(tmp_path), limit_val_batches=3)
    for given in batches.values():
        assert len(given) == 6
        assert_same_bits(given[:3], given[3:])


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global generator"])
def test_a_shuffled_part_of_the_data_is_the_same_for_live_and_merged_weights(own, tmp_path):
    # Else the gain compares two weights on two samples: noise.
    batches: dict[int, list[torch.Tensor]] = {}
    val = shuffled if own else lambda: loader(32, shuffle=True)
    fit(Case(noting(batches), val), merging(tmp_path), limit_val_batches=2)
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


class Reshuffling(Sampler):
    """Counts its epochs itself, and shuffles each in another way."""

    def __init__(self, data) -> None:
        self.data, self.epoch = data, 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        yield from torch.randperm(len(self.data), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.data)


class Jittered(Dataset):
    """Moves each row as a transform with a generator of its own says."""

    def __init__(self) -> None:
        self.rows, self.transforms = rows(32), [partial(self.moved, np.random.default_rng(0))]

    @staticmethod
    def moved(generator, x):
        return x + generator.normal()

    def __getitem__(self, index):
        x, y = self.rows[index]
        return self.transforms[0](x), y

    def __len__(self) -> int:
        return len(self.rows)


class Collator:
    """Masks a part of each batch, as its own generator says."""

    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __call__(self, items):
        x, y = default_collate(items)
        x[:, self.generator.randrange(8)] = 0
        return x, y


@pytest.mark.parametrize("kind", ["sampler", "data set", "collator"])
def test_what_data_draw_from_and_count_is_the_same_for_live_and_merged_weights(kind, tmp_path):
    def fitted(*callbacks):
        given: dict[int, list[torch.Tensor]] = {}

        class Noting(Classifier):
            def validation_step(self, batch, batch_idx):
                given.setdefault(self.trainer.global_step, []).append(batch[0])
                super().validation_step(batch, batch_idx)

        seed()
        data = Jittered() if kind == "data set" else rows(32)
        options = {"batch_size": 8, "collate_fn": Collator() if kind == "collator" else None}
        validated = DataLoader(data, sampler=Reshuffling(data) if kind == "sampler" else None, **options)
        module = Noting()
        train(module, *callbacks, data=DataLoader(data, **options), val=validated, max_epochs=4)
        return weights_of(module), given

    weights, batches = fitted(merging(tmp_path))
    for given in batches.values():
        assert len(given) == 8
        assert_same_bits(given[:4], given[4:])
    plain, live = fitted()
    assert_same_bits(weights, plain)
    assert_same_bits([given[:4] for given in batches.values()], [*live.values()])


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


HOOKS = ["validation_step", "on_validation_epoch_end", "on_validation_end"]


@pytest.mark.parametrize(
    ("hook", "step", "monitored"), mostly_slow(product(HOOKS, [8, 16], [True, False]), daily=[0, 3, 5, 10])
)
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
@pytest.mark.parametrize("hook", HOOKS)
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


@dataclass(slots=True)
class Best:
    """The best value so far, in an object without a ``__dict__``."""

    value: float = math.inf
    history: list = field(default_factory=list)
    step: int = field(init=False)  # not set before the first validation


class Frozen:
    __slots__ = ("_count",)

    def __init__(self):
        object.__setattr__(self, "_count", 0)

    def __setattr__(self, name, value):
        raise AttributeError(name)

    def add(self):
        object.__setattr__(self, "_count", self._count + 1)


class Slotted(Classifier):
    """Keeps its notes in objects with slots."""

    def __init__(self):
        super().__init__()
        self.best, self.nested = Best(), {"rounds": [Frozen()]}

    def on_validation_epoch_end(self):
        loss = float(self.trainer.callback_metrics["val_loss"])
        self.best.value, self.best.step = min(loss, self.best.value), self.trainer.global_step
        self.best.history.append(loss)
        self.nested["rounds"][0].add()


def test_objects_with_slots_are_put_back_after_a_merged_validation(tmp_path):
    plain = fit(Case(Slotted), max_epochs=3)
    merged = fit(Case(Slotted), merging(tmp_path), max_epochs=3)
    assert merged.module.best == plain.module.best
    assert len(plain.module.best.history) == 3
    assert merged.module.nested["rounds"][0]._count == 3


class OwnTrainer(Trainer):
    """A trainer of somebody's own class, which its module knows like any other."""


class Telling(Classifier):
    """Tells its trainer of every validation; has a tensor without values, as lazily built models do."""

    def __init__(self):
        super().__init__()
        self.shape = torch.empty(2, device="meta")

    def on_validation_epoch_end(self):
        self.trainer.told.append(self.trainer.callback_metrics["val_loss"])


@pytest.mark.parametrize("kind", [Trainer, OwnTrainer])
def test_nothing_of_a_trainer_is_put_back_after_a_merged_validation(kind, tmp_path):
    """With a trainer's own state would go that of all callbacks, this one's thread among them."""
    trainer = kind(**QUIET, max_epochs=3, callbacks=[merging(tmp_path)])
    trainer.told = []
    trainer.fit(Telling(), loader(), loader())
    assert len(trainer.told) == 3 + 3
    assert trainer.callback_metrics["merged/val_loss"] in trainer.told
