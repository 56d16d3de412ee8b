"""A tiny run that resumes exactly: its module, its data, and callbacks that meddle with it."""

import json
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn.functional import cross_entropy

from merge_callback import CheckpointMergeCallback

STEPS, EVERY, WINDOW, BATCHES = 26, 2, 4, 10
"""Optimizer steps, steps between snapshots, snapshots in the window, batches in an epoch."""


class Tokens:
    """A loader whose batch number i depends on i alone, and which goes on where a checkpoint was saved."""

    def __init__(self, batches=BATCHES, offset=0):
        self.batches, self.offset, self.position = batches, offset, 0

    def __len__(self):
        return self.batches

    def __iter__(self):
        for _ in range(self.batches):
            self.position += 1
            yield self.draw(self.position)

    def draw(self, index):
        generator = torch.Generator().manual_seed(self.offset + index)
        return {"input_ids": torch.randint(16, (4, 6), generator=generator)}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Held(Tokens):
    """The same validation batches every time."""

    def __iter__(self):
        return (self.draw(index) for index in range(self.batches))


class Tiny(LightningModule):
    """Predicts the next token; has parameters, float buffers, an integer buffer, and a WSD schedule."""

    def __init__(self, width=8, steps=STEPS):
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(16, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 16)

    def loss(self, batch):
        tokens = batch["input_ids"]
        hidden = self.norm(self.embed(tokens[:, :-1]).flatten(0, 1))
        return cross_entropy(self.head(hidden), tokens[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch["input_ids"]))

    def configure_optimizers(self):
        def factor(step):
            return min((step + 1) / 3, 1.0, max(0.0, (self.steps - step) / 7))

        optimizer = torch.optim.AdamW(self.parameters(), lr=0.03)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Elsewhere(Tiny):
    """`Tiny` from other initial weights."""

    def __init__(self):
        super().__init__()
        nn.init.normal_(self.head.weight)


class Recorder(Logger):
    """Keeps every logged number in a file, across processes."""

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    @property
    def name(self):
        return "recorder"

    @property
    def version(self):
        return 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        numbers = {key: float(value) for key, value in metrics.items() if key.startswith("merge")}
        if numbers:
            with open(self.path, "a") as file:
                file.write(json.dumps([step, numbers]) + "\n")


class StopError(Exception):
    """Ends a run in the middle."""


class StopsAt(Callback):
    """Ends a run after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise StopError


class Keeper(Callback):
    """Remembers the live weights of every step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights[trainer.global_step] = {k: v.clone() for k, v in module.state_dict().items()}


def wait_for_snapshots(trainer):
    """Waits until nothing of ours is written beside training: a test is about to meddle with the files."""
    for callback in trainer.callbacks:
        if getattr(callback, "session", None):
            callback.session.background.drain()


class At(Callback):
    """Calls functions after steps: at the end of the batch, in the order of the callbacks."""

    acts_first = True

    def __init__(self, **calls):
        self.calls = {int(step.removeprefix("step")): call for step, call in calls.items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in self.calls:
            wait_for_snapshots(trainer)
            self.calls[trainer.global_step](module)


class SaveAt(Checkpoint):
    """Saves a checkpoint after a batch (or the validation that follows it); then ends the run, if asked."""

    def __init__(self, path, batch, *, after_validation=False, stop=None):
        self.path, self.batch, self.after_validation = str(path), batch, after_validation
        self.stop = stop
        self.seen = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen += 1
        if self.seen == self.batch and not self.after_validation:
            trainer.save_checkpoint(self.path)
        self._stop_at(self.seen)

    def on_validation_end(self, trainer, module):
        if self.seen == self.batch and self.after_validation:
            trainer.save_checkpoint(self.path)
            self._stop_at(self.seen)

    def _stop_at(self, batch):
        saved = self.seen > self.batch or Path(self.path).exists()
        if self.stop is not None and saved and batch >= self.stop:
            raise StopError


def precede(callback, others):
    """Has others act before `callback`, which puts itself first in the trainer's list."""

    def preceded(hook):
        own = getattr(callback, hook)

        def act(*args):
            for other in others:
                getattr(other, hook)(*args)
            own(*args)

        return act

    callback.on_train_batch_end = preceded("on_train_batch_end")
    callback.on_train_end = preceded("on_train_end")


def fit(
    folder,
    ckpt_path=None,
    callbacks=(),
    module=Tiny,
    callback=None,
    before=(),
    data=None,
    trainer=None,
    **options,
):
    """Trains from scratch or on from a checkpoint; everything lands in `folder`.

    Args:
        folder: of the run.
        ckpt_path: to resume from.
        callbacks: further ones, after the merging one.
        module: one, or what builds one once the seed is set.
        callback: the merging one; default: a new one with `options`; False: none.
        before: further callbacks, listed before the merging one; those that `acts_first` act before it, too.
        data: the training loader.
        trainer: options of the `Trainer`.
        **options: of the merging callback.

    Returns:
        The trainer, the module and the callback.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(7, verbose=False)
    torch.use_deterministic_algorithms(True)
    given = {"window": WINDOW, "every_n_steps": EVERY, "dirpath": folder / "merges", "emit_every": 2}
    if callback is None:
        callback = CheckpointMergeCallback(**{**given, **options})
    if callback:
        precede(callback, [other for other in before if getattr(other, "acts_first", False)])
    before = [other for other in before if not getattr(other, "acts_first", False)]
    callbacks = [*before, *([callback] if callback else []), *callbacks]
    module = module() if callable(module) and not isinstance(module, nn.Module) else module
    chosen = {
        "max_steps": STEPS,
        "max_epochs": -1,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": Recorder(folder / "metrics.jsonl"),
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    built = Trainer(callbacks=callbacks, **{**chosen, **(trainer or {})})
    data = data or Tokens()
    built.fit(module, data, Held(3, offset=10_000), ckpt_path=ckpt_path, weights_only=True)
    return built, module, callback
