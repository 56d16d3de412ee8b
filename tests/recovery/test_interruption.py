"""Ctrl-C and SIGTERM leave the run's own weights, or wholly restored ones, and never a mixture.

Most fits run in `interrupted_run`, a process of their own.
"""

import inspect
import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from forked import Forked
from interrupted_run import PARTS, answer_all
from tiny_run import wait_for_snapshots
from training_runs import Classifier, assert_same_bits, is_beside, loader, seed, train, weights_of

from merge_callback import CheckpointMergeCallback
from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.snapshots import arena
from merge_callback.snapshots.live_merge import HalfRestoredError


def answers(cases, folder):
    """What `interrupted_run` finds wrong after each case."""
    process = Forked(answer_all, cases, folder / "answers", log=folder / "log")
    try:
        assert process.wait() == 0, (folder / "log").read_text()[-2000:]
    finally:
        process.kill()
    found = json.loads((folder / "answers").read_text())
    assert len(found) == len(cases)
    return found


# --- real fits ----------------------------------------------------------------------------------------------

BACK, BACK_FROM_TRIAL = "live weights come back", "live weights come back from the trial"

ONCE = [(BACK, 0.3), (BACK, 0.7), (BACK_FROM_TRIAL, 0.5), ("restore", 0.5), ("restore", 0.7)]
TWICE = [(BACK, 0.3), (BACK, 0.7)]
"""Parts, and where in them; without deferral every one of them ends in a mixture."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """What is wrong after each of these cases."""
    once = [{"part": part, "where": where, "signals": ["SIGINT"]} for part, where in ONCE]
    twice = [{"part": part, "where": where, "signals": ["SIGINT"], "in_hook": True} for part, where in TWICE]
    found = answers([*once, *twice], tmp_path_factory.mktemp("interrupted"))
    return {"once": found[: len(once)], "twice": found[len(once) :]}


@pytest.mark.parametrize("times", ["once", "twice"])
def test_ctrl_c_while_weights_are_put_back_or_restored_leaves_and_saves_no_mixture(interrupted, times):
    for found in interrupted[times]:
        assert found == {"wrong": [], "how": "SystemExit", "saved": True}  # as Lightning ends on Ctrl-C


@pytest.mark.slow
def test_two_hundred_signals_at_random_instructions_leave_and_save_no_mixture(tmp_path):
    drawn = random.Random(14)
    cases = []
    for number in range(200):
        count = 2 if number % 3 == 0 else 1
        cases.append(
            {
                "part": list(PARTS)[number % len(PARTS)],
                "where": drawn.random(),
                "signals": drawn.choices(["SIGINT", "SIGTERM"], k=count),
                "delay": drawn.random() * 0.003,
            }
        )

    found = answers(cases, tmp_path)

    assert [(case, each) for case, each in zip(cases, found, strict=True) if each["wrong"]] == []
    assert sum(each["saved"] for each in found) > 150


# --- checkpoints from within a merged validation ------------------------------------------------------------


def by_signal(module, path):
    kept = signal.signal(signal.SIGUSR1, lambda *_: module.trainer.save_checkpoint(path))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, kept)


SAVES = {
    "save_checkpoint": lambda module, path: module.trainer.save_checkpoint(path),
    "dump_checkpoint": lambda module, path: torch.save(
        module.trainer._checkpoint_connector.dump_checkpoint(), path
    ),
    "state_dict": lambda module, path: torch.save({"state_dict": module.state_dict()}, path),
    "signal": by_signal,
}


class Saving(Classifier):
    """Saves itself at the end of every validation, also of those with merged weights."""

    def __init__(self, save):
        super().__init__()
        self.save = SAVES[save]

    def on_validation_epoch_end(self):
        kind = "merged" if is_beside(self.trainer) else "live"
        wait_for_snapshots(self.trainer)  # the list of what is published would be another later
        self.save(self, Path(self.trainer.default_root_dir) / f"{self.trainer.global_step}-{kind}.ckpt")


def validated(folder, module):
    """A fit with a merged validation after steps 4, 8 and 12."""
    seed()
    callback = CheckpointMergeCallback(every_n_steps=2, dirpath=folder / "merges")
    options = {"val_check_interval": 4, "default_root_dir": folder}
    return train(module, callback, data=loader(), val=loader(32), max_steps=12, **options)


@pytest.mark.parametrize("save", SAVES)
def test_what_is_saved_during_a_merged_validation_is_the_live_run(tmp_path, save):
    trainer = validated(tmp_path, Saving(save))

    for step in (4, 8, 12):
        live, merged = (
            torch.load(tmp_path / f"{step}-{kind}.ckpt", weights_only=False) for kind in ("live", "merged")
        )
        for checkpoint in (live, merged):  # the later one knows of what the hooks saw, and what was published
            for state in checkpoint.get("callbacks", {}).values():
                state.pop("validation", None)
                state.pop("published", None)
        assert_same_bits(merged, live)
    # and nothing of that stays
    assert "save_checkpoint" not in vars(trainer)
    assert "dump_checkpoint" not in vars(trainer._checkpoint_connector)
    assert "state_dict" not in vars(Saving)


class ToldToStop(Classifier):
    """Gets a signal in its first merged validation; the handler sets a few things and raises nothing."""

    def __init__(self):
        super().__init__()
        self.notes, self.heard, self.validations = {"stop": False}, 0, 0

    def on_fit_start(self):
        self.handler = signal.signal(signal.SIGUSR1, self.stop)

    def on_fit_end(self):
        signal.signal(signal.SIGUSR1, self.handler)

    def validation_step(self, batch, batch_idx):
        self.validations += 1
        if is_beside(self.trainer) and batch_idx == 1 and not self.notes["stop"]:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (self.heard, self.trainer.should_stop) == (0, False)  # as before, within the validation
        super().validation_step(batch, batch_idx)

    def stop(self, number, frame):
        assert not is_beside(self.trainer)  # the handler sees the live run
        self.trainer.should_stop = self.notes["stop"] = True
        self.heard += 1


def test_what_a_handler_sets_during_a_merged_validation_stays(tmp_path):
    module = ToldToStop()
    trainer = validated(tmp_path, module)
    plain = validated(tmp_path / "plain", Classifier())

    assert (trainer.should_stop, trainer.global_step) == (True, 4)
    assert (module.notes, module.heard) == ({"stop": True}, 1)
    batches = trainer.num_val_batches[0]
    assert module.validations == batches  # of the live validation alone
    merged = json.loads(next((tmp_path / "merges").glob("step=00000004*/merge.json")).read_text())
    assert merged["step"] == 4
    assert plain.global_step == 12


class Interrupted(Classifier):
    """Gets a signal in its first merged validation, whose handler raises an exception of an ordinary kind."""

    def on_fit_start(self):
        self.handler = signal.signal(signal.SIGUSR1, self.stop)

    def stop(self, number, frame):
        raise TimeoutError("the job has run for long enough")

    def validation_step(self, batch, batch_idx):
        if is_beside(self.trainer):
            os.kill(os.getpid(), signal.SIGUSR1)
        super().validation_step(batch, batch_idx)


def test_what_a_handler_raises_during_a_merged_validation_ends_the_run(tmp_path):
    module = Interrupted()
    with pytest.raises(TimeoutError, match="long enough"):
        validated(tmp_path, module)
    signal.signal(signal.SIGUSR1, module.handler)
    assert module.trainer.global_step == 4


@pytest.mark.parametrize("times", [1, 100], ids=["once", "always"])
def test_live_weights_that_come_back_in_part_are_put_back_again_or_end_the_run(tmp_path, monkeypatch, times):
    seed()
    expected = weights_of(validated(tmp_path / "plain", Classifier()).lightning_module)
    seed()
    module, failed, overwrite = Classifier(), [], arena.overwrite

    def fails(tensor, values):
        frames = [frame.function for frame in inspect.stack()]
        is_third = tensor.shape == module.net[2].weight.shape
        if "put_all_back" in frames and is_third and len(failed) < times:
            failed.append(tensor)
            raise MemoryError("on purpose")
        overwrite(tensor, values)

    monkeypatch.setattr(arena, "overwrite", fails)
    if times == 1:
        assert_same_bits(weights_of(validated(tmp_path, module).lightning_module), expected)
        return
    with pytest.raises(HalfRestoredError):
        validated(tmp_path, module)
    with pytest.raises(HalfRestoredError):
        module.trainer.save_checkpoint(tmp_path / "mixture.ckpt")


class SavesMidway(Classifier):
    """Saves a checkpoint between two batches of each validation."""

    def validation_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "midway.ckpt")
        super().validation_step(batch, batch_idx)


def test_validation_goes_on_with_the_merged_weights_after_a_checkpoint(tmp_path):
    seed()
    expected = validated(tmp_path / "plain", Classifier()).callback_metrics
    seed()
    found = validated(tmp_path / "saving", SavesMidway()).callback_metrics

    assert expected["merged/val_loss"] != expected["val_loss"]
    assert_same_bits(found, expected)


# --- the signals themselves ---------------------------------------------------------------------------------


class HangUpError(Exception):
    pass


@pytest.fixture
def heard():
    """Which signals were handled; SIGHUP's handler raises."""
    calls = []

    def handle(number, frame):
        calls.append(signal.Signals(number).name)
        if number == signal.SIGHUP:
            raise HangUpError

    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    kept = {number: signal.signal(number, handle) for number in numbers}
    yield calls
    for number, handler in kept.items():
        assert signal.signal(number, handler) is handle


def send(*names):
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])


def test_deferred_signals_reach_their_handlers_afterwards_once_each_and_in_order(heard):
    with DeferredSignals():
        send("SIGUSR2", "SIGUSR1", "SIGUSR2")
        assert heard == []
    assert heard == ["SIGUSR2", "SIGUSR1"]


def test_ctrl_c_is_raised_after_the_part_that_it_came_in():
    done = []

    def part():
        with DeferredSignals():
            send("SIGINT")
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        part()
    assert done


def test_a_handler_that_raises_keeps_none_from_the_others(heard):
    with pytest.raises(HangUpError), DeferredSignals():
        send("SIGUSR1", "SIGHUP", "SIGUSR2")
    assert heard == ["SIGUSR1", "SIGHUP", "SIGUSR2"]


def test_what_is_let_through_is_handled_at_once_until_a_handler_raises(heard):
    seen = []

    def part():
        with DeferredSignals() as signals:
            send("SIGUSR2")
            with signals.let_through():
                assert heard == ["SIGUSR2"]
                send("SIGUSR1")
                assert heard == ["SIGUSR2", "SIGUSR1"]
                try:
                    send("SIGHUP")
                finally:
                    send("SIGUSR2")
                    seen.extend(heard)

    with pytest.raises(HangUpError):
        part()
    assert seen == ["SIGUSR2", "SIGUSR1", "SIGHUP"]
    assert heard == [*seen, "SIGUSR2"]


def test_uses_may_be_nested_and_the_outer_one_decides(heard):
    with DeferredSignals():
        with DeferredSignals() as signals, signals.let_through():
            send("SIGUSR1")
        assert heard == []
    assert heard == ["SIGUSR1"]


def test_other_threads_defer_nothing(heard):
    def other():
        with DeferredSignals():
            assert signal.getsignal(signal.SIGUSR1).__name__ == "handle"

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()


def test_a_handler_that_was_installed_meanwhile_stays_and_may_call_the_one_before(heard):
    with DeferredSignals():
        before = signal.getsignal(signal.SIGUSR1)

        def chained(number, frame):
            heard.append("chained")
            before(number, frame)

        signal.signal(signal.SIGUSR1, chained)
    send("SIGUSR1")
    assert heard == ["chained", "SIGUSR1"]
    before = signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGUSR2))
    assert before is chained
