"""Snapshots are written, merged, measured and published while training goes on, and nobody can tell."""

import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from run_outcomes import damage, leftovers, metrics, outcome, window
from safetensors.torch import load_file
from tiny_run import SaveAt, StopError, Tiny, Tokens, fit
from torch.utils.data import DataLoader, Dataset
from training_runs import assert_same_bits

from merge_callback import CheckpointMergeCallback
from merge_callback.engine import snapshot_pipeline
from merge_callback.merging import LinearMethod

CODEC = {"snapshot_codec": "delta-fp16"}
WAYS = pytest.mark.parametrize("codec", [{}, CODEC], ids=["whole", "differences"])
LAST = [20, 22, 24, 26]


class Do(Callback):
    """Calls a function with the trainer and the module after some steps, without waiting for anything."""

    def __init__(self, **acts):
        self.acts = {int(step.removeprefix("step")): act for step, act in acts.items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in self.acts:
            self.acts[trainer.global_step](trainer, module)


class DoFirst(Do):
    """Does so before the merging callback acts."""

    acts_first = True


class Gate:
    """What is handed in beside training waits from ``close`` on until ``open``."""

    def __init__(self):
        self.opened = threading.Event()

    def close(self, trainer, module):
        merging = next(c for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback))
        merging.session.background.submit(self.opened.wait)

    def open(self, *_):
        self.opened.set()


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open()  # whatever a failed test did, nobody waits for it


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run leaves behind, by the codec."""
    known = {}

    def outcome_of(**codec):
        if str(codec) not in known:
            folder = tmp_path_factory.mktemp("unbroken")
            _, module, _ = fit(folder, **codec)
            known[str(codec)] = outcome(folder, module)
        return known[str(codec)]

    return outcome_of


def steps(folder):
    return [record["step"] for record in window(folder / "merges")["snapshots"]]


def snapshot_file(folder, step):
    (path,) = (folder / "merges/window").glob(f"step={step:08d}-*.safetensors")
    return path


# --- the weights of the step --------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["disk", "cpu", "device"])
def test_a_snapshot_holds_the_weights_of_its_step_whatever_becomes_of_them_before_it_is_written(
    tmp_path, gate, storage
):
    weights = {}

    def keep(trainer, module):
        weights.update({name: tensor.clone() for name, tensor in module.state_dict().items()})
        gate.close(trainer, module)

    @torch.no_grad()
    def spoil(trainer, module):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(7)

    fit(
        tmp_path,
        before=[DoFirst(step10=keep)],
        callbacks=[Do(step10=spoil, step11=gate.open)],
        storage=storage,
        trainer={"max_steps": 14, "limit_val_batches": 0},
    )

    assert_same_bits(load_file(snapshot_file(tmp_path, 10)), weights)
    assert float(load_file(snapshot_file(tmp_path, 12))["norm.weight"].min()) > 6


@WAYS
@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_snapshot_that_is_kept_late_changes_nothing_that_is_left_behind(
    tmp_path, gate, unbroken, storage, codec
):
    late = DoFirst(step10=gate.close)

    _, module, _ = fit(tmp_path, before=[late], callbacks=[Do(step11=gate.open)], storage=storage, **codec)

    assert outcome(tmp_path, module) == unbroken(**codec)


# --- metrics ------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_snapshot_are_logged_at_its_step_however_late_they_come(tmp_path, gate, unbroken):
    fit(tmp_path, before=[DoFirst(step8=gate.close)], callbacks=[Do(step9=gate.open)])

    assert metrics(tmp_path) == unbroken()["metrics"]
    # The axis is one behind: what is logged after the first step is logged at 0.
    logged = [int(k.split()[0]) for k in unbroken()["metrics"] if k.endswith("merge/window")]
    assert logged == [step - 1 for step in range(2, 27, 2)]


def test_a_validation_finds_the_numbers_of_the_snapshot_of_its_own_step(tmp_path):
    seen = {}

    class Reads(Callback):
        def on_validation_end(self, trainer, module):
            seen[trainer.global_step] = {k: float(v) for k, v in trainer.callback_metrics.items()}

    best = ModelCheckpoint(tmp_path / "c", monitor="merge/tokens", mode="max")
    fit(tmp_path, callbacks=[Reads(), best])

    assert list(seen) == [6, 12, 18, 24]
    assert {step: found["merge/tokens"] for step, found in seen.items()} == {s: 24.0 * s for s in seen}
    logged = metrics(tmp_path)
    # Before step 12 no two snapshots to measure lie behind the warm-up.
    diversities = [seen[step]["merge/diversity_rms"] for step in (12, 18, 24)]
    # What callbacks read is a tensor in fp32.
    assert diversities == pytest.approx(
        [logged[f"{step - 1} merge/diversity_rms"] for step in (12, 18, 24)], rel=2.0**-24
    )
    assert float(best.best_model_score) == 24.0 * 24
    assert all("merged/val_loss" in seen[step] for step in (12, 18, 24))


# --- a slow disk --------------------------------------------------------------------------------------------


def test_a_snapshot_that_is_due_before_the_last_is_kept_waits_for_it_and_says_so_once(
    tmp_path, unbroken, monkeypatch
):
    monkeypatch.setattr(snapshot_pipeline, "_NOTICEABLE", 0.5)
    gates, timers = {6: Gate(), 8: Gate()}, []

    def close(trainer, module):
        """The disk takes what is due now only once the next snapshot has been waiting for a while."""
        gate = gates[trainer.global_step]
        gate.close(trainer, module)
        timers.append(threading.Timer(1.3 * snapshot_pipeline._NOTICEABLE, gate.open))

    def start(trainer, module):
        timers[-1].start()

    with pytest.warns(UserWarning, match="storage is slower than the interval") as told:
        _, module, _ = fit(
            tmp_path,
            before=[DoFirst(step6=close, step7=start, step8=close, step9=start)],
            trainer={"limit_val_batches": 0},
        )

    lines = [str(w.message) for w in told if "slower than the interval" in str(w.message)]
    assert len(lines) == 1
    assert "at step 8 until" in lines[0]
    assert outcome(tmp_path, module)["window"] == unbroken()["window"]


def test_a_checkpoint_does_not_wait_for_ever_and_names_what_was_kept_before_it(tmp_path, gate, monkeypatch):
    monkeypatch.setattr(snapshot_pipeline, "_PATIENCE", 0.1)
    checkpoint = tmp_path / "c.ckpt"

    fit(
        tmp_path,
        before=[DoFirst(step10=gate.close, step12=gate.open)],
        callbacks=[SaveAt(checkpoint, 11)],
    )

    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = (states[key] for key in states if key.startswith("CheckpointMergeCallback"))
    assert [record["step"] for record in state["window"]["snapshots"]] == [2, 4, 6, 8]
    assert steps(tmp_path) == LAST


# --- what fails ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails(LinearMethod):
    """Raises in its second merge and in no other."""

    error: type[BaseException]
    calls: list

    def raw_weights(self, positions):
        if threading.current_thread() is not threading.main_thread():
            self.calls.append(len(positions))
            if len(self.calls) == 2:
                raise self.error("on purpose")
        return [1.0] * len(positions)


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, SystemExit, KeyboardInterrupt])
def test_a_job_that_fails_costs_its_merge_only(tmp_path, caplog, error):
    calls = []
    trainer, _, _ = fit(tmp_path, method=Fails(error, calls), emit_every=1, keep_last=None, evaluate=False)

    assert trainer.global_step == 26
    assert steps(tmp_path) == LAST
    assert len(calls) > 2
    assert "on purpose" in caplog.text
    assert "training goes on" in caplog.text
    assert (tmp_path / "merges/latest").resolve().name.startswith("step=00000026")
    assert not damage(tmp_path / "merges")
    assert not leftovers(tmp_path / "merges")


@contextmanager
def interrupts():
    """Takes interrupts, which a shell's background job ignores, and Lightning does once one came."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@WAYS
def test_an_interrupted_run_keeps_the_snapshot_that_was_being_written_and_resumes(
    tmp_path, gate, unbroken, codec
):
    def interrupt(trainer, module):
        gate.open()
        os.kill(os.getpid(), signal.SIGINT)

    with interrupts(), pytest.raises(SystemExit):
        fit(
            tmp_path,
            before=[DoFirst(step12=gate.close)],
            callbacks=[Do(step13=interrupt), OnExceptionCheckpoint(tmp_path, "rescue")],
            trainer={"val_check_interval": 26},
            **codec,
        )

    assert steps(tmp_path) == [6, 8, 10, 12]
    assert not leftovers(tmp_path / "merges")
    _, module, _ = fit(tmp_path, tmp_path / "rescue.ckpt", trainer={"val_check_interval": 26}, **codec)
    assert outcome(tmp_path, module)["window"]["snapshots"] == unbroken(**codec)["window"]["snapshots"]
    assert outcome(tmp_path, module)["weights"] == unbroken(**codec)["weights"]


def test_a_run_that_fails_while_a_snapshot_is_written_leaves_a_whole_window_and_a_free_folder(tmp_path, gate):
    def fail(trainer, module):
        gate.open()
        raise StopError

    with pytest.raises(StopError):
        fit(tmp_path, before=[DoFirst(step8=gate.close)], callbacks=[Do(step9=fail)])

    assert steps(tmp_path) == [2, 4, 6, 8]
    assert not leftovers(tmp_path / "merges")
    fit(tmp_path, trainer={"max_steps": 2, "logger": False})


# --- processes ----------------------------------------------------------------------------------------------


class Drawn(Dataset):
    """The batches of `Tokens`, by index."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Tokens().draw(index)["input_ids"]


def loader(workers):
    return DataLoader(
        Drawn(),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


class OnTensors(Tiny):
    def loss(self, batch):
        return super().loss(batch if isinstance(batch, dict) else {"input_ids": batch})


@WAYS
def test_workers_forked_while_a_snapshot_is_written_change_nothing(tmp_path, gate, codec):
    options = {"module": OnTensors, "count_tokens": count, "trainer": {"limit_val_batches": 0}, **codec}
    _, plain, _ = fit(tmp_path / "alone", data=loader(0), **options)

    # The second epoch's workers are forked after step 8.
    _, module, _ = fit(
        tmp_path / "forked",
        data=loader(2),
        before=[DoFirst(step8=gate.close)],
        callbacks=[Do(step9=gate.open)],
        **options,
    )

    assert outcome(tmp_path / "forked", module) == outcome(tmp_path / "alone", plain)
    assert steps(tmp_path / "forked") == LAST


def count(batch):
    return 24


def test_a_worker_forked_in_the_midst_of_a_job_can_end_and_takes_nothing_along(tmp_path):
    ends = []

    class Forks(LinearMethod):
        """Forks a process from the job itself."""

        name = "forks"

        def options(self):
            return {}

        def raw_weights(self, positions):
            if threading.current_thread() is not threading.main_thread() and not ends:
                if (child := os.fork()) == 0:
                    os._exit(3)
                ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            return [1.0] * len(positions)

    fit(tmp_path, method=Forks(), emit_every=1)

    assert ends == [3]
    assert steps(tmp_path) == LAST
    assert not leftovers(tmp_path / "merges")


# --- several ------------------------------------------------------------------------------------------------


def second(folder, **options):
    return CheckpointMergeCallback(window=3, every_n_steps=3, dirpath=folder, evaluate=False, **options)


def test_two_callbacks_keep_their_windows_side_by_side_and_neither_waits_for_the_other(
    tmp_path, gate, unbroken
):
    fit(tmp_path / "alone", callback=second(tmp_path / "alone/merges", **CODEC))
    other = second(tmp_path / "second", **CODEC)
    held = []

    def hold(trainer, module):
        other.session.background.submit(gate.opened.wait)

    def look(trainer, module):
        merging = next(c for c in trainer.callbacks if c is not other and isinstance(c, type(other)))
        merging.session.background.drain()
        held.append([s.step for s in merging.session.window.snapshots])
        gate.open()

    _, module, _ = fit(tmp_path, before=[other, DoFirst(step9=hold)], callbacks=[Do(step10=look)], **CODEC)

    assert held == [[4, 6, 8, 10]]
    assert outcome(tmp_path, module)["window"] == unbroken(**CODEC)["window"]
    assert window(tmp_path / "second") == window(tmp_path / "alone/merges")


@WAYS
def test_a_second_fit_of_one_trainer_builds_on_the_window_of_the_first(tmp_path, codec):
    trainer, module, _ = fit(tmp_path, trainer={"max_steps": 13}, **codec)
    trainer.fit_loop.epoch_loop.max_steps = 17

    trainer.fit(module, Tokens(offset=500))

    records = window(tmp_path / "merges")["snapshots"]
    assert [r["step"] for r in records] == [10, 12, 14, 16]
    assert [r["difference_to"] for r in records] == ([None, 10, 12, 14] if codec else [None] * 4)
    assert not list((tmp_path / "merges").glob("window.old*"))


@WAYS
def test_a_checkpoint_saved_at_the_step_of_a_snapshot_and_a_validation_has_that_snapshot(
    tmp_path, unbroken, codec
):
    checkpoint = tmp_path / "c.ckpt"
    save = SaveAt(checkpoint, 12, after_validation=True, stop=12)
    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[save], **codec)
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = (states[key] for key in states if key.startswith("CheckpointMergeCallback"))

    assert [record["step"] for record in state["window"]["snapshots"]] == [6, 8, 10, 12]
    _, module, _ = fit(tmp_path, checkpoint, **codec)
    assert outcome(tmp_path, module)["window"]["snapshots"] == unbroken(**codec)["window"]["snapshots"]
    assert metrics(tmp_path) == unbroken(**codec)["metrics"]
