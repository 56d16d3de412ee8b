"""Runs that meet what no plan foresees: others' files, a logger that is gone, no threads, a moved folder."""

import os
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from run_outcomes import emissions
from tiny_run import At, SaveAt, StopError, Tiny, fit
from training_runs import Classifier, loader, train
from window_runs import LAST, assert_nothing_is_half_there, quiet, steps

from merge_callback import CheckpointMergeCallback, SpikeOptions, load_merge
from merge_callback.engine import snapshot_pipeline


def test_files_of_others_survive_beside_the_merges_and_drafts_of_a_killed_run_do_not(tmp_path):
    merges = tmp_path / "merges"
    others = [".bashrc.old", ".notes.tmp", ".venv.old/lib", ".step=7.tmp"]
    drafts = [".step=00000004-sma.123.tmp/model.safetensors", ".step=00000002-sma.123.old/a", ".latest.9.tmp"]
    for name in (*others, *drafts):
        (merges / name).parent.mkdir(parents=True, exist_ok=True)
        (merges / name).touch()
    fit(tmp_path, trainer={"max_steps": 4})
    assert all((merges / name).exists() for name in others)
    assert not any((merges / name).exists() for name in drafts)


class Gone(Logger):
    """A logger whose server does not answer any more, once it is said to be ``gone``."""

    name, version, gone = "gone", 0, False

    def log_metrics(self, metrics, step=None):
        if self.gone:
            raise ConnectionError("the tracking server is gone")

    def log_hyperparams(self, *_): ...


def test_a_logger_that_fails_costs_no_checkpoint_that_another_callback_rescues(tmp_path):
    class Ends(Callback):
        """The snapshot of step 8 is kept, and not logged yet, when the run ends."""

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 8:
                trainer.callbacks[0].session.background.drain()
                trainer.logger.gone = True
                raise StopError

    rescue = OnExceptionCheckpoint(tmp_path / "rescue")
    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[Ends(), rescue], trainer={"logger": Gone(), "enable_checkpointing": True})
    assert [path.name for path in (tmp_path / "rescue").iterdir()] == ["on_exception.ckpt"]
    fit(tmp_path, ckpt_path=tmp_path / "rescue/on_exception.ckpt")  # and the folder is free
    assert steps(tmp_path) == LAST


def test_a_logger_that_takes_no_merge_metrics_only_loses_these(tmp_path, caplog):
    class Refusing(Gone):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("merge") for name in metrics):
                raise ValueError("no such metric in the schema")

    table = CSVLogger(tmp_path)
    fit(tmp_path, trainer={"logger": [Refusing(), table]})
    assert steps(tmp_path) == LAST
    assert caplog.text.count("Refusing failed; training goes on without") == 1
    assert "merge/window" in table.experiment.metrics_keys


def test_a_resume_in_another_runs_folder_leaves_its_merges_alone(tmp_path):
    saved = tmp_path / "saved.ckpt"
    fit(tmp_path / "a", callbacks=[SaveAt(saved, 20)], keep_last=2)
    fit(tmp_path / "b", module=lambda: Tiny(width=8), keep_last=None)
    before = {path.name: load_merge(path) for path in emissions(tmp_path / "b/merges")}
    fit(
        tmp_path / "a", ckpt_path=saved, dirpath=tmp_path / "b/merges", keep_last=2, trainer={"max_steps": 40}
    )
    for name, merge in before.items():
        kept = load_merge(tmp_path / "b/merges" / name)
        assert all(torch.equal(kept[key], merge[key]) for key in merge)


@pytest.mark.parametrize("work", [True, False], ids=["no thread", "threads"])
def test_a_system_without_threads_costs_time_only(tmp_path, monkeypatch, work):
    start = threading.Thread.start

    def refused(thread):
        if work and thread.name == "merge-background":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr(snapshot_pipeline, "_PATIENCE", 1e9)  # to wait for nothing would take for ever
    fit(tmp_path, trainer=quiet())
    assert steps(tmp_path) == LAST
    assert_nothing_is_half_there(tmp_path)


@contextmanager
def current_folder(path):
    before = os.getcwd()
    path.mkdir(exist_ok=True)
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def test_a_run_that_changes_the_current_folder_keeps_its_own(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    away = At(step11=lambda module: os.chdir(tmp_path / "elsewhere"))
    with current_folder(tmp_path / "run"):
        fit(tmp_path, callbacks=[away], dirpath="merges")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert steps(tmp_path / "run") == LAST


@pytest.mark.parametrize("missing", [1, 2000])
def test_a_file_that_lost_less_than_its_header_is_seen_to_be_cut(tmp_path, missing):
    def cut(module):
        oldest = min((tmp_path / "merges/window").glob("step=*"))
        os.truncate(oldest, oldest.stat().st_size - missing)

    with pytest.warns(UserWarning, match="left out of the window: snapshot of step .* was cut"):
        fit(tmp_path, callbacks=[At(step11=cut)])
    assert steps(tmp_path) == LAST


class LateMask(Classifier):
    """Fills a mask at its first forward pass; with NaN where it is told to."""

    def __init__(self, value=float("-inf")):
        super().__init__()
        self.value = value
        self.register_buffer("mask", torch.zeros(4, 4))

    def training_step(self, batch, batch_idx):
        self.mask.copy_(torch.full((4, 4), self.value).triu(1))
        return super().training_step(batch, batch_idx)


def test_a_mask_that_the_first_step_fills_may_hold_minus_infinity_and_nothing_else(tmp_path):
    def merging(name):
        return CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=tmp_path / name)

    train(LateMask(), merging("mask"), data=loader())
    assert torch.equal(load_merge(tmp_path / "mask/latest")["mask"], torch.full((4, 4), -torch.inf).triu(1))
    for value in (torch.inf, torch.nan):
        with pytest.warns(UserWarning, match="mask hold NaN or Inf"):
            train(LateMask(value), merging(str(value)), data=loader())
        assert not (tmp_path / str(value) / "latest").exists()


class NoRate(torch.optim.Optimizer):
    """Descends by a rate that is none of Lightning's business."""

    def __init__(self, parameters, **defaults):
        super().__init__(parameters, {"scale": 0.1, **defaults})

    @torch.no_grad()
    def step(self, closure):
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter -= self.param_groups[0]["scale"] * parameter.grad
        return loss


@pytest.mark.parametrize("defaults", [{}, {"lr": None}], ids=str)
def test_an_optimizer_without_a_learning_rate_counts_as_constant_and_is_not_restored(tmp_path, defaults):
    class Free(Classifier):
        def configure_optimizers(self):
            return NoRate(self.parameters(), **defaults)

    options = {"window": 3, "every_n_steps": 2, "dirpath": tmp_path}
    with pytest.raises(ValueError, match=r"learning rate of NoRate .*action='warn'"):
        train(Free(), CheckpointMergeCallback(**options, spike=SpikeOptions()), data=loader())
    with pytest.warns(UserWarning, match="nothing is restored: .*learning rate of NoRate"):
        train(Free(), CheckpointMergeCallback(**options), data=loader())  # nobody asked for restores
    assert "stable" in (tmp_path / "latest/merge.json").read_text()


def test_steps_that_lightning_does_not_count_are_told_of_once(tmp_path):
    class Raw(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            loss.backward()
            optimizer.step()
            return loss

    class Held(At):
        def on_train_batch_end(self, *_):
            held.append(len(merging.session.progress.statistics._losses))

    held = []
    merging = CheckpointMergeCallback(every_n_steps=2, dirpath=tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(Raw(), merging, Held(), data=loader(), max_epochs=80, max_steps=-1)
    assert len([w for w in told if "no optimizer step was seen in 256 batches" in str(w.message)]) == 1
    assert len(held) > 300
    assert max(held) == 256


def test_of_two_callbacks_one_restores_the_run(tmp_path):
    first, second = (CheckpointMergeCallback(every_n_steps=2, dirpath=tmp_path / name) for name in "ab")
    actions = []

    class Look(At):
        def on_train_batch_end(self, *_):
            actions.append([c.session.options.spike.action for c in (first, second)])

    train(Classifier(), first, second, Look(), data=loader())
    assert {tuple(sorted(pair)) for pair in actions} == {("restore", "warn")}


def test_a_sparse_buffer_is_refused_by_name(tmp_path):
    class Sparse(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("graph", torch.eye(3).to_sparse())

    with pytest.raises(ValueError, match=r"'graph' has the layout torch.sparse_coo, .*persistent=False"):
        train(Sparse(), CheckpointMergeCallback(every_n_steps=2, dirpath=tmp_path), data=loader())


def test_callbacks_are_shown_what_loggers_know_only_where_all_ranks_show_it(tmp_path):
    # Ranks are done with a snapshot at different times, and a callback that monitors it acts at once.
    seen, gate = [], threading.Event()

    class Look(At):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                merging.session.background.submit(gate.wait)
            if trainer.global_step == 5:  # the snapshot of step 4 is kept only now
                gate.set()
                merging.session.background.drain()
                assert merging.session.pipeline._reports
            seen.append((trainer.global_step, "merge/window" in trainer.callback_metrics))

    merging = CheckpointMergeCallback(every_n_steps=4, dirpath=tmp_path, evaluate=False)
    train(Classifier(), merging, Look(), data=loader())
    assert next(step for step, known in seen if known) == 8
