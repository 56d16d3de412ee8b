"""A real fit that real signals interrupt at a chosen instruction, and what is left of its weights.

`answer_all` runs in a process of its own. The same fit runs undisturbed first: what its steps and its restore
left behind is all that an interrupted one may leave behind.
"""

import copy
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from spiking_runs import EVERY, FIRES, SPIKE, Batches, Damage, Line
from training_runs import QUIET, assert_same_bits, is_beside, seed, weights_of

from merge_callback import CheckpointMergeCallback, SpikeOptions

EVALUATION, EVIDENCE, ARENA = "lightning/merged_validation.py", "recovery/evidence.py", "snapshots/arena.py"
RECOVERY, POLICY, KEEPER = "recovery/restore.py", "recovery/spike_policy.py", "engine/snapshot_pipeline.py"
EMISSIONS = "engine/emissions.py"

PARTS = {
    "merged validation": ((EVALUATION, "validate_with"), (EVALUATION, "validate_with"), 2),
    "merged weights go in": ((ARENA, "copy_to"), (ARENA, "copy_to"), 1),
    "live weights come back": ((ARENA, "copy_to"), (ARENA, "copy_to"), 2),
    "trial": ((EVIDENCE, "hold"), (EVIDENCE, "hold"), 1),
    "live weights come back from the trial": ((ARENA, "copy_to"), (ARENA, "copy_to"), 1),
    "restore": ((RECOVERY, "restore"), (POLICY, "_restore"), 1),
    "snapshot": ((KEEPER, "take"), (KEEPER, "take"), 3),
    "emission": ((EMISSIONS, "_publish"), (EMISSIONS, "_publish"), 2),
}
"""The function that a part begins with, the one whose return ends it, and which of its calls is meant."""

SPIKING = ("trial", "live weights come back from the trial", "restore")
VALIDATING = ("merged validation", "merged weights go in", "live weights come back")

SENDER = """
import os, sys, time
for line in sys.stdin:
    process, number, delay = line.split()
    end = time.perf_counter() + float(delay)
    while time.perf_counter() < end: pass
    os.kill(int(process), int(number))
    print("sent", flush=True)
"""
"""A process that sends signals a little later: a thread of this one would have to wait for its turn."""


class Part:
    """Counts the instructions that the package runs in a part of a fit; sends signals before one of them.

    Args:
        name: of the part.
        at: index of the instruction.
        signals: to send.
        delay: seconds between the first and the second one.
    """

    def __init__(self, name, at=-1, signals=(), delay=0.0):
        (self.first, self.last, self.left), self.at = PARTS[name], at
        self.signals, self.delay = signals, delay
        self.count, self.active, self.owner = 0, False, None
        self.is_sending = self.is_over = False

    def __enter__(self):
        threading.settrace(self.enter_frame)
        sys.settrace(self.enter_frame)
        return self

    def __exit__(self, *_):
        self.is_over = True  # a second signal that comes only now must not interrupt the judging
        sys.settrace(None)
        threading.settrace(None)

    def enter_frame(self, frame, event, arg):
        file = frame.f_code.co_filename
        if "/merge_callback/" not in file and not file.endswith("contextlib.py"):
            return None
        if self.is_at(frame, self.first):
            self.left -= 1
            self.active = self.active or self.left == 0
            if self.left == 0:
                self.owner = threading.get_ident()
        if not (self.active and threading.get_ident() == self.owner) and not self.is_at(frame, self.last):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self.trace

    def trace(self, frame, event, arg):
        if self.active and event == "opcode" and threading.get_ident() == self.owner:
            if self.count == self.at:
                self.count += 1
                self.send()
            self.count += 1
        if self.active and event == "return" and self.is_at(frame, self.last):
            self.active = False
        return self.trace

    def send(self):
        first, *second = self.signals
        for number in second:
            self.is_sending = True
            print(os.getpid(), int(number), self.delay, file=SEND.stdin, flush=True)
        os.kill(os.getpid(), first)

    def interrupt(self, number, frame):
        """The handler of Ctrl-C."""
        if not self.is_over:
            raise KeyboardInterrupt

    def wait(self):
        """Waits until the second signal was sent."""
        if self.is_sending:
            SEND.stdout.readline()

    @staticmethod
    def is_at(frame, place):
        return frame.f_code.co_name == place[1] and frame.f_code.co_filename.endswith("/" + place[0])


class States(Callback):
    """What each optimizer step, and what was done after it, left behind."""

    def __init__(self):
        self.known = []  # weights, and the optimizer's moments

    def on_train_start(self, trainer, module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.note(trainer, module))
        self.note(trainer, module)

    def on_train_batch_end(self, trainer, module, *_):
        self.note(trainer, module)

    def note(self, trainer, module):
        self.known.append((weights_of(module), moments(trainer.optimizers[0].state_dict())))


def moments(state):
    """An optimizer's first and second ones."""
    return [copy.deepcopy([s["exp_avg"], s["exp_avg_sq"]]) for s in state["state"].values()]


class Fused(Line):
    """Updates all weights in one call, which nothing can interrupt."""

    def __init__(self, interrupted):
        super().__init__(optimizer=torch.optim.Adam, fused=True)
        self.interrupted = interrupted  # while it is validated with merged weights

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.interrupted and is_beside(self.trainer):
            os.kill(os.getpid(), signal.SIGINT)

    def note_rates(self, optimizer):
        pass


@torch.no_grad()
def wreck(module):
    module.net[2].bias += 30


def ignore(*_):
    """A signal that comes after the fit."""


def fit(folder, part, in_hook=False, **traced):
    """Trains once; says what was known of it, and what is left."""
    seed()
    steps = FIRES + 3 if part in SPIKING else 24
    spike = SpikeOptions(rewarm_steps=10, cooldown=128)
    callback = CheckpointMergeCallback(
        every_n_steps=EVERY,
        window=6,
        dirpath=Path(folder) / "merges",
        spike=spike,
        evaluate=part in VALIDATING,
        emit_every=0 if part in SPIKING else 1,
        durable=part not in SPIKING,
    )
    states, module = States(), Fused(in_hook)
    rescue = OnExceptionCheckpoint(folder, "rescued")
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": True},
        max_steps=steps,
        val_check_interval=EVERY,
        limit_val_batches=2,
        callbacks=[callback, Damage({SPIKE - 1: wreck}), states, rescue],
    )
    how = "finished"
    place = Part(part, **traced)
    signal.signal(signal.SIGTERM, ignore)  # what Lightning's handler calls, and what it leaves behind
    signal.signal(signal.SIGINT, place.interrupt)
    try:
        with place:
            trainer.fit(module, Batches(), Batches())
    except BaseException as error:
        how = type(error).__name__
    place.wait()
    rescued = Path(folder) / "rescued.ckpt"
    saved = torch.load(rescued, weights_only=False) if rescued.exists() else None
    left = weights_of(module), moments(trainer.optimizers[0].state_dict())
    return states.known, left, saved, how, place.count


def label(known, weights, moments, only_parameters):
    """The newest known state that this is, as an index; ``None`` where it is a mixture."""

    def trained(tensors):
        return {k: v for k, v in tensors.items() if not (only_parameters and "net.1." in k)}

    for index, (theirs, gathered) in reversed(list(enumerate(known))):
        try:
            assert_same_bits(trained(weights), trained(theirs))
            assert_same_bits(moments, gathered)
        except AssertionError:
            continue
        return index
    return None


def restores_in(checkpoint):
    """How many restores the callback's state in a checkpoint knows of."""
    (state,) = (s for key, s in checkpoint["callbacks"].items() if key.startswith("CheckpointMerge"))
    return state["spikes"]["policy"]["restores"]["count"]


REFERENCE = {}
"""What the undisturbed fit of a part left behind, and how many instructions the part has."""

RESTORED = 2 * FIRES
"""Index of what the restore left behind: each step adds two to that of the start."""


def answer(case):
    """Interrupts a fit as a case says; tells what is left that should not be."""
    part = case["part"]
    if part not in REFERENCE:
        with tempfile.TemporaryDirectory() as folder:
            known, _, _, how, count = fit(folder, part)
        assert how == "finished"
        assert count > 50
        REFERENCE[part] = known, count
    known, count = REFERENCE[part]
    signals = [signal.Signals[name] for name in case["signals"]]
    with tempfile.TemporaryDirectory() as folder:
        traced = {"at": int(case["where"] * count), "signals": signals, "delay": case.get("delay", 0.0)}
        _, left, saved, how, _ = fit(folder, part, case.get("in_hook", False), **traced)
    loose = part == "emission"  # the statistics of a batch norm move in the forward pass
    found = label(known, *left, loose)
    wrong = [] if found is not None else ["the model holds a mixture"]
    if saved is not None:
        stored = label(known, saved["state_dict"], moments(saved["optimizer_states"][0]), loose)
        if stored is None:
            wrong.append("a mixture was saved")
        elif part == "restore" and restores_in(saved) != int(stored == RESTORED):
            wrong.append(f"{restores_in(saved)} restores are noted in the checkpoint of state {stored}")
    return {"wrong": wrong, "how": how, "saved": saved is not None}


def answer_all(cases, path):
    """Writes what is wrong after each case into a file."""
    global SEND
    SEND = subprocess.Popen(
        [sys.executable, "-S", "-c", SENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning", "merge_callback"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    Path(path).write_text(json.dumps([answer(case) for case in cases]))
