"""Real fits that spike where they are told to, and what they leave behind.

As a script it lives through runs whose processes are killed, as `killed_run` does.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import tiny_run
import torch
from killed_run import last_checkpoint
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from run_outcomes import outcome
from tiny_run import Tokens
from torch.utils._pytree import tree_map_only
from training_runs import seed, train, weights_of

from merge_callback import CheckpointMergeCallback, SpikeOptions, merge_state_dicts

SPIKE, EVERY, PATIENCE, GUARD = 80, 5, 5, 10
"""First bad batch, steps between snapshots, and the options' defaults for the other two."""

FIRES = SPIKE + PATIENCE
"""The step after which the run is restored: the fifth outlier is that of the step before it."""

BURST = range(SPIKE, FIRES)
"""Just enough bad batches for a spike."""

USED = [60, 65, 70]
"""The last three snapshots that are `GUARD` steps older than the first bad batch."""

RULES = {"rewarm_steps": 10, "evidence": "rules"}
"""Bad batches are the data's fault: evidence would acquit the weights, and nothing would be restored."""

MEMORY = {"durable": False, "emit_every": 0, "evaluate": False}
"""Options of a callback that writes no files but its record, ten times as fast."""


class Batches(Tokens):
    """Batch number i depends on i alone; the ``bad`` ones tell lies, the ``broken`` ones are NaN.

    From batch ``shift`` on the features are noisier, so that the loss levels off higher.
    """

    def __init__(self, bad=(), broken=(), shift=None):
        super().__init__(batches=10_000)
        self.bad, self.broken, self.shift = set(bad), set(broken), shift

    def draw(self, index):
        generator = torch.Generator().manual_seed(index)
        x, noise = torch.randn(16, 8, generator=generator), torch.randn(16, 1, generator=generator)
        louder = 4.0 if self.shift is not None and index >= self.shift else 1.0
        y = x.sum(1, keepdim=True) + louder * noise
        if index in self.bad:
            y = 20 - 5 * y
        return (x * torch.nan if index in self.broken else x), y


class Line(LightningModule):
    """Learns a sum through a batch norm (float buffers and an integer one); draws no random numbers.

    Args:
        lr: of the optimizer.
        optimizer: its class.
        schedule: makes a scheduler of it, stepped every step.
        **options: of the optimizer.
    """

    def __init__(self, lr=0.02, optimizer=torch.optim.Adam, schedule=None, **options):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        self.build = lambda parameters: optimizer(parameters, lr=lr, **options)
        self.schedule = schedule
        self.applied = []

    def loss(self, batch):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = self.build([p for p in self.parameters() if p.requires_grad])
        self.note_rates(optimizer)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]

    def note_rates(self, optimizer):
        """Has the rate every step is really taken with noted in ``applied``, where torch reads it."""
        prepare = optimizer._init_group

        def note_and_prepare(group, *args, **kwargs):
            self.applied.append(group["lr"])
            return prepare(group, *args, **kwargs)

        optimizer._init_group = note_and_prepare


class TwoOptimizers(Line):
    """Steps an Adam and an SGD with momentum in every batch, by hand."""

    def __init__(self, lr=0.02):
        super().__init__(lr)
        self.automatic_optimization, self.lr = False, lr

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.net[0].parameters(), lr=self.lr),
            torch.optim.SGD(self.net[1:].parameters(), lr=self.lr / 10, momentum=0.9),
        ]


class Watch(Callback):
    """Remembers what every step left behind, once the merging callback has acted."""

    def __init__(self):
        self.weights, self.gradients, self.states, self.scheduled, self.batches = {}, {}, {}, [], []
        self.losses, self.metrics = {}, {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.scheduled.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = trainer.global_step
        self.batches.append(batch)
        self.weights[step] = weights_of(module)
        self.gradients[step] = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        self.states[step] = tree_map_only(torch.Tensor, torch.clone, states)
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses[step] = float(outputs["loss"])
        self.metrics[step] = {k: float(v) for k, v in trainer.callback_metrics.items()}


class Damage(Callback):
    """Does something to the live module at the start of the batches that follow these steps."""

    def __init__(self, acts):
        self.acts = acts

    @torch.no_grad()
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.acts:
            self.acts[trainer.global_step](module)


class Run:
    """A finished fit: ``module``, ``trainer``, ``callback``, what a ``watch`` saw, and ``folder``."""

    def __init__(self, folder, module, callback, watch, trainer=None):
        self.folder, self.module, self.callback = folder, module, callback
        self.watch, self.trainer = watch, trainer

    @property
    def events(self):
        return events(self.folder)

    @property
    def restores(self):
        return [event for event in self.events if event["event"] == "restore"]

    @property
    def window(self):
        """The records of the snapshots that were in the window at the end."""
        return self.callback.state_dict()["window"]["snapshots"]


def bursts(*starts, length=PATIENCE):
    """Bad batches in a row, from each of ``starts`` on."""
    return [start + i for start in starts for i in range(length)]


def used(event):
    """The steps of the snapshots a restore was from."""
    return [snapshot["step"] for snapshot in event["snapshots"]]


def events(folder):
    """The lines of the record, read by a parser that knows nothing but JSON."""
    path = Path(folder) / "spikes.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def spiking(folder, data=None, steps=100, module=None, callbacks=(), spike=None, fit=None, **options):
    """Trains with the callback; by default on `BURST`, in memory, by `RULES`.

    Args:
        folder: of the emissions, the window and the record.
        data: the loader.
        steps: optimizer steps.
        module: what is trained; default: a `Line` made after seeding.
        callbacks: further ones.
        spike: the `SpikeOptions`, or those of its options that matter.
        fit: options of the `Trainer`.
        **options: of the callback, besides `MEMORY`.
    """
    seed()
    if not isinstance(spike, SpikeOptions):
        spike = SpikeOptions(**{**RULES, "cooldown": 1000, **(spike or {})})
    module = (module or Line)()
    options = {"every_n_steps": EVERY, **MEMORY, **options}
    callback, watch = CheckpointMergeCallback(dirpath=folder, spike=spike, **options), Watch()
    run = Run(folder, module, callback, watch)
    run.trainer = train(
        module, callback, *callbacks, watch, data=data or Batches(bad=BURST), max_steps=steps, **(fit or {})
    )
    return run


def plain(data, steps=100, module=None, callbacks=(), fit=None):
    """The same fit without the merging callback."""
    seed()
    module, watch = (module or Line)(), Watch()
    trainer = train(module, *callbacks, watch, data=data, max_steps=steps, **(fit or {}))
    return Run(None, module, None, watch, trainer)


def expected(run, steps, **options):
    """The merge of the weights that the run's steps left behind."""
    return merge_state_dicts([run.watch.weights[step] for step in steps], **options)


# --- runs that are stopped or killed ------------------------------------------------------------------------


TROUBLE = {"bad": [*range(72, 75), *BURST, *range(100, 105)], "broken": [118]}
"""A streak that heals, a spike, a second one in its cooldown, and a NaN."""

STEPS, REWARM = 128, 12


def fit(folder, ckpt_path=None, callbacks=(), data=None, steps=STEPS, trainer=None, **options):
    """`tiny_run.fit` through `TROUBLE`."""
    given = {"window": 10, "every_n_steps": EVERY, "emit_every": 4, "evaluate": False}
    spike = SpikeOptions(rewarm_steps=REWARM, cooldown=20, evidence="rules")
    return tiny_run.fit(
        folder,
        ckpt_path,
        callbacks,
        module=lambda: Line(schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2 * STEPS)),
        data=data or Batches(**TROUBLE),
        trainer={"max_steps": steps, "limit_val_batches": 0, **(trainer or {})},
        **{**given, "spike": spike, **options},
    )


def story(folder):
    """The events without what differs between two equal runs: when they were, and how long they took."""
    told = [{k: v for k, v in e.items() if k not in ("time", "seconds")} for e in events(folder)]
    return [event for i, event in enumerate(told) if event not in told[:i]]


class Dies:
    """Kills the process when the package calls a function, or returns from it, for the ``nth`` time."""

    def __init__(self, function, moment="call", nth=1):
        self.function, self.moment, self.left = function, moment, nth
        sys.setprofile(self._hook)
        threading.setprofile(self._hook)  # merges are published beside training

    def _hook(self, frame, event, arg):
        here = frame.f_code.co_name == self.function and "/merge_callback/" in frame.f_code.co_filename
        if here and event == self.moment:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class CutsASnapshot(Callback):
    """Cuts off the file of a snapshot that the coming restore would read."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == SPIKE + 2:
            (path,) = (Path(trainer.default_root_dir) / "merges/window").glob(f"step={USED[1]:08d}*")
            os.truncate(path, 0)


def attempt(case, kill):
    """One process of a run: trains from the last checkpoint on, to its death or to the end."""
    folder = Path(case["folder"])
    checkpoints = ModelCheckpoint(
        folder / "checkpoints", every_n_train_steps=7, filename="{step}", save_top_k=-1
    )
    others = [CutsASnapshot()] if "cut" in kill else []
    if "dies" in kill:
        Dies(*kill["dies"])
    _, module, _ = fit(folder, last_checkpoint(folder), [*others, checkpoints])
    sys.setprofile(None)
    found = {**outcome(folder, module), "story": story(folder / "merges")}
    (folder / "outcome.json").write_text(json.dumps(found))
