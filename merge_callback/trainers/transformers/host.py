"""A training of the Hugging Face ``Trainer``, as the engine sees it."""

from __future__ import annotations

import copy
import logging
import math
import os
import tempfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations.integration_utils import rewrite_logs

from merge_callback.engine.charts import Charts
from merge_callback.engine.kept_state import PythonState, kept_weights, put_back
from merge_callback.engine.random_state import RandomState
from merge_callback.metrics import MERGED_EVAL, SPIKE_TEXT
from merge_callback.recovery.evidence import copied
from merge_callback.signals.host import HeldBatch, Host, LossOf, Rehearsal, UnrepeatableStepError

log = logging.getLogger(__name__)

_VALIDATED = 8  # batches of a validation that is rehearsed

_CONTAINERS = {dict, list, set, deque, defaultdict, OrderedDict}
_LOOKED_INTO = 1000  # items

_SUPPORTED = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "FSDP"}


@dataclass
class Evaluated:
    """The last evaluation, so that it can be run again.

    Args:
        run: runs it, on so many batches or on all.
        dataloader: what it ran over.
        prefix: of its metrics' names.
        random: the random generators when it began.
        metrics: that it found.
    """

    run: Callable[[int | None], Any]
    dataloader: Any
    prefix: str
    random: RandomState
    metrics: dict[str, float]


class TransformersHost(Host):
    """One training.

    Args:
        trainer: in ``train``, once the model is prepared and a checkpoint, if any, is loaded.
        training_step: the trainer's own.

    Attributes:
        epochs_over: epochs that are over.
        evaluated: the last evaluation; ``None`` before there is one.
        further_files: those of the tokenizer or processor.

    Raises:
        ValueError: for a kind of training that is not supported.
    """

    def __init__(self, trainer: Trainer, training_step: Callable[..., Tensor]) -> None:
        _check_supported(trainer)
        self.trainer, self._training_step = trainer, training_step
        self.module: nn.Module = trainer.model  # type: ignore[assignment]
        self.optimizers = [_unwrapped(trainer.optimizer)]
        self.device = trainer.args.device
        self.scaler: GradScaler | None = getattr(trainer.accelerator, "scaler", None)
        self.processes = int(os.environ.get("LOCAL_WORLD_SIZE") or trainer.args.world_size)
        # All of output_dir but what begins with an underscore goes to the hub.
        name = "_merges" if trainer.args.push_to_hub else "merges"
        self.default_folder = os.path.join(str(trainer.args.output_dir), name)
        self.log_every = 0 if trainer.args.logging_strategy == "no" else int(trainer.state.logging_steps)
        self.epochs_over = 0
        self.evaluated: Evaluated | None = None
        self._logged: dict[str, float] = {}
        self._is_logging = False
        self._charts = Charts(_tag_in_tensorboard, MERGED_EVAL)
        self.further_files = _files_of(trainer.processing_class)

    @property
    def root(self) -> nn.Module:  # type: ignore[override]
        """The model as accelerate has wrapped it."""
        return self.trainer.model_wrapped

    @property
    def step(self) -> int:
        """``state.global_step``."""
        return self.trainer.state.global_step

    @property
    def total_steps(self) -> int | None:
        """``state.max_steps``."""
        return self.trainer.state.max_steps or None

    @property
    def will_validate(self) -> bool:
        """Whether the training evaluates."""
        return bool(self.trainer.args.eval_strategy != "no")

    @property
    def validates_now(self) -> bool:
        """Whether it evaluates after this step, if evaluations are counted in steps."""
        every, step = int(self.trainer.state.eval_steps or 0), self.step
        in_steps = self.trainer.args.eval_strategy == "steps" and every > 0
        return in_steps and step % every == 0 and step >= self.trainer.args.eval_delay

    @property
    def epoch(self) -> int:
        """Epochs that are over."""
        return self.epochs_over

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds an entry to ``state.log_history``, and hands it to the callbacks' ``on_log``.

        Not through ``Trainer.log``: that of a subclass may average, and forget, what the next entry of the
        training itself is made of. The progress bar does not print these entries.
        """
        trainer, control = self.trainer, self.trainer.control
        trainer.state.log_history.append({**metrics, "step": step})
        state, handler = copy.copy(trainer.state), copy.copy(trainer.callback_handler)
        state.global_step = step
        handler.callbacks = [
            callback
            for callback in handler.callbacks
            if not isinstance(callback, (PrinterCallback, ProgressCallback))
        ]
        should_log, self._is_logging = control.should_log, True
        try:
            handler.on_log(trainer.args, state, control, dict(metrics))
        finally:
            control.should_log, self._is_logging = should_log, False
        for callback in handler.callbacks:
            self._charts.show(getattr(callback, "tb_writer", None), metrics)

    def note_log(self, logs: Mapping[str, float]) -> None:
        """Notes what the trainer itself logs."""
        if not self._is_logging:
            self._logged = dict(logs)

    def log_text(self, text: str, step: int) -> None:
        """Shows an event in TensorBoard."""
        for callback in self.trainer.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                try:
                    writer.add_text(SPIKE_TEXT, text, step)
                except Exception:
                    log.exception("merge: TensorBoard could not show the event; training goes on")

    def stop(self) -> None:
        """Sets ``control.should_training_stop``."""
        self.trainer.control.should_training_stop = True

    def logged_scalars(self, patterns: Sequence[str]) -> Callable[[], Mapping[str, Tensor | float]]:
        """What the trainer has logged since the last step, at its ``logging_steps``."""

        def new_values() -> dict[str, Tensor | float]:
            logged, self._logged = self._logged, {}
            return {
                name: value
                for name, value in logged.items()
                if any(fnmatchcase(name, pattern) for pattern in patterns)
            }

        return new_values

    @contextmanager
    def forward_pass(self) -> Iterator[Callable[..., Any]]:
        """Calls the model in the trainer's precision."""
        with self.trainer.compute_loss_context_manager(), super().forward_pass() as called:
            yield called

    def rehearse(self, source: str) -> Rehearsal:
        """Runs the trainer's training step without its backward pass, or some of its prediction steps."""
        if source == "batch":
            return self._rehearsed(self._step_loss, ())
        evaluated = self.evaluated
        if evaluated is None:
            raise UnrepeatableStepError("there was no evaluation yet")
        loader = evaluated.dataloader
        return self._rehearsed(lambda _: self._evaluation_loss(loader), (loader,))

    def validation_loss(self) -> float:
        """That of the last evaluation."""
        if self.evaluated is None:
            return math.nan
        return float(self.evaluated.metrics.get(f"{self.evaluated.prefix}_loss", math.nan))

    @contextmanager
    def undisturbed(self, dataloaders: Sequence[Any] = ()) -> Iterator[PythonState]:
        """Within, the trainer may run its model on anything, and nobody hears of it.

        On exit its attributes and containers are as they were, the model's Python state, and the random
        generators; the weights are somebody else's to put back.

        Args:
            dataloaders: that are run over.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        others = [trainer, trainer.callback_handler, accelerator, accelerator.gradient_state, *dataloaders]
        random = RandomState(dataloaders)
        state = PythonState(self.module, self.optimizers, [trainer.lr_scheduler], others=others)
        parts = [*vars(trainer).values(), trainer.state.log_history]
        held = [(container, copy.copy(container)) for container in _containers(parts)]
        with ExitStack() as stack:
            stack.callback(random.restore)
            stack.callback(state.restore)
            for container, kept in held:
                stack.callback(_refill, container, kept)
            trainer.callback_handler.callbacks = []
            yield state

    @contextmanager
    def _rehearsed(self, loss_of: LossOf, dataloaders: Sequence[Any]) -> Iterator[LossOf]:
        with ExitStack() as stack:
            state = stack.enter_context(self.undisturbed(dataloaders))
            stack.enter_context(kept_weights(self.module, self.root, self.spare))
            stack.enter_context(torch.no_grad())
            random = RandomState(dataloaders)
            buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]

            def loss(batches: Sequence[HeldBatch]) -> float:
                state.restore()
                self.trainer.callback_handler.callbacks = []
                self.trainer.accelerator.backward = _nothing
                for buffer, kept in buffers:
                    put_back(buffer, kept)
                random.restore()
                return loss_of(batches)

            yield loss

    def _step_loss(self, batches: Sequence[HeldBatch]) -> float:
        """The loss of a step with some micro-batches, as the trainer scales it."""
        if not batches:
            raise UnrepeatableStepError("no batch of it is left")
        trainer = self.trainer
        inputs = [tree_map_only(Tensor, Tensor.clone, copied(held.batch)) for held in batches]
        samples, items = trainer.get_batch_samples(iter(inputs), len(inputs), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(samples)
        return math.fsum(float(self._training_step(self.root, sample, items)) for sample in samples)

    def _evaluation_loss(self, dataloader: Any) -> float:
        model = self.module.eval()
        steps = (
            self.trainer.prediction_step(model, inputs, prediction_loss_only=True)
            for inputs in islice(dataloader, _VALIDATED)
        )
        losses = [float(loss) for loss, _, _ in steps if loss is not None]
        if not losses:
            raise UnrepeatableStepError("the evaluation has no loss")
        return math.fsum(losses) / len(losses)


def _check_supported(trainer: Trainer) -> None:
    kind = trainer.accelerator.distributed_type
    shared = {name: getattr(trainer, f"get_{name}_size", lambda: 1)() for name in ("tp", "cp", "sp")}
    if kind.value not in _SUPPORTED:
        raise ValueError(
            f"CheckpointMergeTrainerCallback can't merge under {kind.value}: it keeps and restores weights "
            "that one process, DDP or FSDP holds; train with one of these, or take the callback out"
        )
    if parallel := [name for name, size in shared.items() if size > 1]:
        raise ValueError(
            f"CheckpointMergeTrainerCallback can't merge with {', '.join(parallel)} parallelism; train with "
            "DDP or FSDP, or take the callback out"
        )
    if kind.value == "FSDP" and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError("CheckpointMergeTrainerCallback needs fsdp_version 2")


def _unwrapped(optimizer: Any) -> Optimizer:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def _files_of(processing_class: Any) -> dict[str, bytes]:
    """What a tokenizer or processor saves of itself.

    Now, in training's own thread: the data's collator may use it at any later time, and it is no more than
    some megabytes.
    """
    if not hasattr(processing_class, "save_pretrained"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            processing_class.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
        except Exception as error:
            log.warning("merge: published without %s: %r", type(processing_class).__name__, error)
            return {}


def _containers(values: Iterable[Any], depth: int = 4) -> Iterator[Any]:
    """The containers among some values, and those in them, but not those in a long one, like a data set."""
    for value in values:
        if type(value) in _CONTAINERS:
            yield value
            if depth and len(value) <= _LOOKED_INTO:
                yield from _containers(value.values() if isinstance(value, dict) else value, depth - 1)


def _refill(container: Any, kept: Any) -> None:
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(kept)


def _nothing(*_: Any, **__: Any) -> None: ...


def _tag_in_tensorboard(name: str) -> str:
    return str(next(iter(rewrite_logs({name: 0.0}))))  # type: ignore[no-untyped-call]
