"""The runs that are recorded: each really trains, and can go on in what a power loss has left.

What they may rely on is said in marks of the log. A checkpoint of the trainer's is Lightning's to write: it
lies outside the folder that is watched, and counts as durable once saving it has returned.
"""

import json
import os
import shutil
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import spiking_runs
import tiny_run
import torch
from distributed_runs import full_weights, run_ranks
from frozen_runs import Adapted
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from sharded_runs import OFF, merged_fit
from training_runs import assert_mean

from merge_callback import CheckpointMergeCallback, PowerEma, RunningEma, SmaSince
from merge_callback.merging import Ema
from merge_callback.publish import Publisher

from .checks import (
    MERGES,
    Outcome,
    Promises,
    digest_of,
    inspected,
    judge_folder,
    judge_outcome,
    noting,
    outcome,
)
from .log import Log, Recorder
from .states import MODELS, Disk, below, digest, lay_out

ROOT, LOG, CHECKPOINTS = "disk", "log", "checkpoints"
"""In the folder of a run: what is watched, its log, and the trainer's checkpoints."""


class Remembers(Callback):
    """Remembers the live weights after every step, and what running averages hold after the last one."""

    def __init__(self):
        self.weights, self.averages = {}, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for callback in trainer.callbacks:
            if isinstance(callback, CheckpointMergeCallback) and callback.session.running:
                averages = callback.session.running.by_name.items()
                self.averages = {n: (a.at, digest_of(a.arena.own_tensors())) for n, a in averages if a.arena}
        weights = full_weights(trainer.strategy.model) if trainer.world_size > 1 else module.state_dict()
        self.weights[trainer.global_step] = {name: tensor.clone() for name, tensor in weights.items()}


class Tells(Checkpoint):
    """Saves checkpoints after these steps, and marks what is told to others."""

    def __init__(self, recorder, folder, steps):
        self.recorder, self.folder, self.steps = recorder, Path(folder), steps

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step in self.steps:
            path = self.folder / f"step={step:03d}.ckpt"
            trainer.save_checkpoint(path)
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                self.recorder.mark("checkpoint", {"step": step, "path": str(path)})
        if trainer.is_global_zero:
            self.recorder.mark("batch", step)


@contextmanager
def announcing(tell):
    """Tells the name of each emission when its publishing has returned."""
    publish = Publisher.publish

    def publish_and_tell(self, *args, **kwargs):
        place = publish(self, *args, **kwargs)
        tell(place.name)
        return place

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Publisher, "publish", publish_and_tell)
        yield


class Training:
    """A run of one process.

    Args:
        fit: trains in a folder, from a checkpoint on.
        every: steps between snapshots.
        steps: of the run.
        saves: steps after which the trainer saves a checkpoint.
        again: the step after which the run ends, to be resumed from its last checkpoint.
        validated: steps between validations; 0 for none.
        is_exact: whether what is published are means of the weights as they were.
        **options: of the callback.
    """

    promises, at_most = Promises(), 500  # resumes that are tried

    def __init__(self, fit, every, steps, saves, again=None, validated=0, is_exact=True, **options):
        self.fit, self.every, self.steps, self.saves = fit, every, steps, saves
        self.validated = validated
        self.again, self.is_exact, self.options = again, is_exact, {"keep_last": 2, **options}
        self.weights = {}

    def record(self, place):
        """Trains, and returns the log."""
        (place / ROOT).mkdir(parents=True)
        (place / CHECKPOINTS).mkdir()
        recorder = Recorder(place / ROOT, place / LOG)
        remembers, tells = Remembers(), Tells(recorder, place / CHECKPOINTS, self.saves)
        with recorder.recording(), announcing(partial(recorder.mark, "published")):
            if self.again:
                self._fit(place, None, self.again, [remembers, tells])
            saved = sorted((place / CHECKPOINTS).iterdir())
            self._fit(place, saved[-1] if saved else None, self.steps, [remembers, tells])
        self.weights = remembers.weights
        return Log(place / LOG)

    def prepare(self, place, log):
        """Learns from a log what was published, checks it, and how the run goes on if nothing is lost."""
        disk, promises, whole, cases = Disk(log, MODELS[0]), Promises(), [], {None: {}}
        self.truth, self.expected = {}, {}
        for record in log.records:
            disk.do(record)
            promises = promises.after(record, disk)
            if record.get("mark") == "published":
                tree = below(disk.as_it_is(), f"{MERGES}/{record['value']}")
                self.truth.setdefault(record["value"], set()).add(digest(tree))
                whole.append(tree)
            elif record.get("mark") == "checkpoint":
                cases[promises.checkpoints[-1]] = disk.as_it_is()
        for i, tree in enumerate(whole):
            found, record = inspected(tree, log, place / f"emission-{i}"), tree["merge.json"]
            if self.is_exact:
                steps = [snapshot["step"] for snapshot in json.loads(log.blob(record))["snapshots"]]
                assert_mean(found, [self.weights[step] for step in steps])
        outcomes = self.resume(place, log, [(tree, key) for key, tree in cases.items()])
        for key, found in zip(cases, outcomes, strict=True):
            problems = judge_outcome(found, found).problems
            assert not problems, problems
            self.expected[key] = found

    def judge(self, tree, promises, log):
        """What is wrong with a state as it is found."""
        return judge_folder(tree, promises, self.truth, log)

    def judge_resume(self, found, key):
        """What is wrong with what a resume made of a state."""
        return judge_outcome(found, self.expected[key])

    def resumes_from(self, promises):
        """What a run may be resumed from: the trainer's last checkpoints, or nothing."""
        return promises.checkpoints or (None,)

    def resume(self, place, log, cases):
        """What becomes of states: the run goes on in each, from a checkpoint, for an interval.

        Args:
            place: of the run; its disk is laid out afresh each time, at the very place that was recorded.
            log: of the run.
            cases: pairs of a tree and the step and path of a checkpoint, or ``None`` for a new run.
        """
        for tree, checkpoint in cases:
            yield self._resume(place, log, tree, checkpoint)

    def _resume(self, place, log, tree, checkpoint):
        shutil.rmtree(place / ROOT, ignore_errors=True)
        (place / ROOT).mkdir()
        lay_out(tree, log, place / ROOT)
        step, path = checkpoint or (self.every, None)
        told, published, remembers = [], [], Remembers()
        try:
            with noting(told), announcing(published.append):
                self._fit(place, path, step + self.every, [remembers])
            weights = self.known(step, remembers)
            found = outcome(place / ROOT / MERGES, published, weights, self.is_exact, remembers.averages)
        except Exception:
            found = Outcome(error=traceback.format_exc(limit=-6))
        found.told = "\n".join(told)
        return found

    def _fit(self, place, checkpoint, steps, callbacks):
        often = {"val_check_interval": self.validated, "limit_val_batches": 2}
        validation = often if self.validated else {"limit_val_batches": 0}
        self.fit(
            place,
            None if checkpoint is None else str(checkpoint),
            callbacks,
            dirpath=place / ROOT / MERGES,
            trainer={"max_steps": steps, "logger": False, **validation},
            **{"evaluate": bool(self.validated), **self.options},
        )

    def known(self, step, remembers):
        """The weights by step of a run that was resumed after ``step``."""
        before = {s: weights for s, weights in self.weights.items() if s <= step}
        return {**(before if remembers.weights else self.weights), **remembers.weights}


class Averaged(Training):
    """A run that writes much more than the weights of its steps."""

    at_most = 120


class Ranks(Training):
    """A run of two processes, which share each snapshot out between them.

    Args:
        strategy: of ``distributed_runs.STRATEGIES``.
        steps: of the run.
        saves: steps after which the trainer saves a checkpoint.
        **options: of the callback.
    """

    at_most = 120

    def __init__(self, strategy, steps, saves, **options):
        super().__init__(None, 2, steps, saves, **options)
        self.strategy = strategy

    def record(self, place):
        """Trains, and returns the log."""
        (place / ROOT).mkdir(parents=True)
        (place / CHECKPOINTS).mkdir()
        self.weights = run_ranks(2, train_recorded, run=self, place=place)[0]
        return Log(place / LOG)

    def resume(self, place, log, cases):
        """See ``Training.resume``; all in the same two processes."""
        found = run_ranks(2, resume_all, timeout=3000, run=self, place=place, log=log, cases=list(cases))
        yield from found[0]

    def _fit(self, place, checkpoint, steps, callbacks):
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        given = {"max_steps": steps, "limit_val_batches": 0, "enable_checkpointing": saves}
        if checkpoint is not None:
            given["ckpt_path"] = str(checkpoint)
        merged_fit(
            self.strategy,
            place,
            *callbacks,
            trainer=given,
            dirpath=place / ROOT / MERGES,
            spike=OFF,
            evaluate=False,
            **self.options,
        )


def train_recorded(run, place):
    """What each rank does: records its own operations; the log is everybody's."""
    recorder = Recorder(place / ROOT, place / LOG)
    torch.distributed.barrier()
    remembers, tells = Remembers(), Tells(recorder, place / CHECKPOINTS, run.saves)
    is_first = torch.distributed.get_rank() == 0
    tell = partial(recorder.mark, "published") if is_first else (lambda name: None)
    with recorder.recording(), announcing(tell):
        run._fit(place, None, run.steps, [remembers, tells])
    return remembers.weights


def resume_all(run, place, log, cases):
    """What each rank does: goes on in one state after another."""
    is_first, found = os.environ["LOCAL_RANK"] == "0", []
    for tree, checkpoint in cases:
        torch.distributed.barrier()
        if is_first:
            shutil.rmtree(place / ROOT, ignore_errors=True)
            (place / ROOT).mkdir()
            lay_out(tree, log, place / ROOT)
        torch.distributed.barrier()
        step, path = checkpoint or (run.every, None)
        told, published, result, remembers = [], [], Outcome(), Remembers()
        try:
            with noting(told), announcing(published.append):
                run._fit(place, path, step + run.every, [remembers])
            torch.distributed.barrier()
            if is_first:
                weights = run.known(step, remembers)
                averages = remembers.averages
                result = outcome(place / ROOT / MERGES, published, weights, run.is_exact, averages)
        except Exception:
            result = Outcome(error=traceback.format_exc(limit=-6))
        result.told = "\n".join(told)
        found.append(result)
    return found


def _tiny(place, checkpoint, callbacks, **options):
    return tiny_run.fit(place, checkpoint, callbacks, method="sma", emit_every=1, **options)


def _adapted(place, checkpoint, callbacks, **options):
    return _tiny(place, checkpoint, callbacks, module=Adapted, **options)


def _spiking(place, checkpoint, callbacks, **options):
    return spiking_runs.fit(place, checkpoint, callbacks, method="sma", **options)


AVERAGES = [PowerEma(0.05), RunningEma(half_life=0.05), SmaSince(step=4)]

SAVES = (3, 7, 8, 13, 19, 24)


def short():
    """A run of few steps that does all a plain one does."""
    return Training(_tiny, 2, 11, (3, 7, 8), window=3)


RUNS = {
    "plain": lambda: Training(_tiny, 2, 26, SAVES),
    "delta": lambda: Training(_tiny, 2, 26, SAVES, is_exact=False, snapshot_codec="delta-fp16"),
    "memory": lambda: Training(_tiny, 2, 26, SAVES, storage="cpu", keep_last=1),
    "frozen": lambda: Training(_adapted, 2, 26, SAVES),
    "frozen, delta": lambda: Training(_adapted, 2, 26, SAVES, is_exact=False, snapshot_codec="delta-fp16"),
    "dcp": lambda: Training(_tiny, 2, 26, SAVES, format="dcp"),
    "resumed": lambda: Training(_tiny, 2, 26, SAVES, again=12),
    "averages": lambda: Averaged(_tiny, 2, 26, SAVES, running=[*AVERAGES, PowerEma(0.1, every_n_steps=3)]),
    "candidates": lambda: Averaged(
        _tiny, 2, 26, SAVES, validated=3, is_exact=False, candidates=["wma", Ema(last=2)], running=AVERAGES
    ),
    "spikes, averages": lambda: Averaged(_spiking, 5, 128, (67, 78, 84, 86, 91, 104, 122), running=AVERAGES),
    "spikes": lambda: Training(_spiking, 5, 128, (67, 78, 84, 86, 91, 104, 122)),
    "DDP": lambda: Ranks("ddp", 12, (3, 6, 9)),
    "shards": lambda: Ranks("fsdp2", 12, (3, 6, 9)),
    "shards, averages": lambda: Ranks("fsdp2", 12, (3, 6, 9), running=AVERAGES),
    "shards, delta": lambda: Ranks("fsdp2", 12, (3, 6, 9), is_exact=False, snapshot_codec="delta-fp16"),
}
"""By the kind of run."""
