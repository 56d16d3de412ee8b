"""``CheckpointMergeTrainerCallback``: merges checkpoints while a Hugging Face ``Trainer`` trains."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from merge_callback.engine.results import RunResults
from merge_callback.engine.session import MergeSession, beside_others
from merge_callback.messages import warn
from merge_callback.options import Options
from merge_callback.snapshots.files import CorruptFileError, read_object, write_json
from merge_callback.snapshots.live_merge import HalfRestoredError
from merge_callback.trainers.transformers.host import TransformersHost
from merge_callback.trainers.transformers.merged_evaluation import MergedEvaluation

log = logging.getLogger(__name__)

_STATE = "merge_callback{}.json"
"""In each of the trainer's checkpoints: the state of the first callback, ``""``, and of further ones."""


class CheckpointMergeTrainerCallback(RunResults, TrainerCallback):
    """Keeps a rolling window of weight snapshots in a Hugging Face ``Trainer``, and merges them.

    It does what ``CheckpointMergeCallback`` does under Lightning, and takes the same options, but for
    ``evaluate_with``. It works in every subclass of ``Trainer`` whose ``training_step`` trains, such as TRL's
    ``SFTTrainer``; on one device, with DDP, and with FSDP 2.

    A merge is published as a folder that ``from_pretrained`` loads, tokenizer or processor included. After
    each evaluation the merge is evaluated on the same data: ``merged_eval_loss`` stands beside ``eval_loss``
    in what ``evaluate`` returns. With ``metric_for_best_model="merged_eval_loss"`` early stopping and the
    best checkpoint follow the merge. Scalars go to the loggers of ``report_to`` and to ``state.log_history``.

    The state is saved with each of the trainer's checkpoints, and ``train(resume_from_checkpoint=…)``
    restores it. ``window``, ``latest``, ``best``, ``history`` and ``merge()`` show what there is, while the
    training goes on and afterwards. Training with the callback and no spike is bit for bit training without
    it.

    Note:
        ``compute_metrics`` is called a second time, for the merged weights.

    Example::

        trainer = Trainer(model, args, callbacks=[CheckpointMergeTrainerCallback(every_n_steps=1000)], …)
        trainer.train()
        merged = AutoModelForCausalLM.from_pretrained(f"{args.output_dir}/merges/latest")

    Args:
        **options: those of ``CheckpointMergeCallback``. The default ``dirpath`` is ``merges`` in the
            trainer's ``output_dir`` (``_merges`` with ``push_to_hub``, which uploads all else there). The
            numbers that ``spike.watch`` names are those that the trainer logs.

    Raises:
        TypeError: for a name that is not an option's.
        ValueError: for an option that makes no sense, here or when training begins.
        TrainingDivergedError: in ``train``, if restoring did not help and the options say to stop.
        HalfRestoredError: in ``train``, if a restore, or the return of the live weights after a merged
            evaluation, fails half way, twice. The trainer saves no model then.
    """

    def __init__(self, **options: Any) -> None:
        if "evaluate_with" in options:
            raise TypeError(
                "'evaluate_with' is for Lightning; a Trainer's callbacks take no part in evaluations"
            )
        self.options = Options.resolve(**options)
        self.session: MergeSession | None = None
        self._last_state: dict[str, Any] = {}  # of the training that is over
        self._trainer: Trainer | None = None
        self._replaced: list[tuple[object, str, partial[Any]]] = []
        self._half_restored = False

    def set_trainer(self, trainer: Trainer) -> None:
        """Makes the trainer known to a callback that was handed over with ``add_callback``.

        It finds it by itself when training begins; known before, it gives its folder back at once if the
        first training ends by an exception.
        """
        if self._trainer is not trainer:
            self._trainer = trainer
            vars(trainer)["train"] = partial(self._train, trainer.train)

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Finds the trainer."""
        self.set_trainer(_calling_trainer()[0])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Builds or restores the window: the model is prepared, and the checkpoint loaded."""
        self._abandon()  # a try that ran out of memory
        self._put_back()
        trainer, checkpoint = _calling_trainer()
        self.set_trainer(trainer)
        self._half_restored = False
        host = TransformersHost(trainer, trainer.training_step)
        resume = self._saved(checkpoint) if state.global_step and checkpoint else {}
        # First in the list: what monitors merged metrics, or saves, then finds this step's state.
        handler = trainer.callback_handler
        mine = [c for c in handler.callbacks if isinstance(c, CheckpointMergeTrainerCallback)]
        handler.callbacks = [*mine, *(c for c in handler.callbacks if c not in mine)]
        options = beside_others(self.options, mine)
        self.session, self._host = MergeSession.begin(options, host, resume), host
        self._evaluation = MergedEvaluation(host, options)
        self._evaluation.load_state_dict(resume.get("evaluation", {}))
        self._batch: tuple[Tensor | None, Any] = (None, None)  # loss and inputs of the last micro-batch
        self._gradient_norm: Tensor | float | None = None
        self._replace(trainer, "training_step", self._training_step)
        self._replace(trainer, "evaluation_loop", self._evaluation.run_live)
        if self.options.probe and self.options.probe.is_validation:
            self._replace(trainer, "prediction_step", self._prediction_step)
        self._replace(trainer, "save_model", self._save_model)
        if self.options.spike.grad_norm:
            self._replace(trainer.accelerator, "clip_grad_norm_", self._clip_gradients)

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Notes where in the data the epoch begins."""
        if self.session:
            self._host.epochs_over, self._batch_idx = int(state.epoch or 0), 0
            if state.global_step and hasattr(train_dataloader, "__len__") and not args.ignore_data_skip:
                accumulated = args.gradient_accumulation_steps
                steps = -(-len(train_dataloader) // accumulated)
                self._batch_idx = state.global_step % steps * accumulated

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Notes the learning rates of this step; after it the scheduler has moved on."""
        if self.session:
            self.session.note_step(self._host.optimizers[0])
            if self._gradient_norm is not None:
                self.session.progress.statistics.set_gradient_norm(self._gradient_norm)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Counts a micro-batch that no optimizer step was taken with."""
        if self.session:
            self._end_batch(self.session)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advances the clock and the phase, acts on a spike, takes a snapshot if one is due."""
        if self.session and self._end_batch(self.session):
            self.session = self.session.follow_model()
            if self.session:
                self.session.take_snapshot()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Notes what ``spike.watch`` may name."""
        if self.session and self.options.spike.watch:
            self._host.note_log(logs or {})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Evaluates the merged weights, if the window has something new since the last evaluation."""
        if self.session and self.options.evaluate and metrics is not None:
            self._evaluation.update(self.session, metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Publishes the last merge; the live model keeps its own weights."""
        if self.session:
            session, self.session = self.session, None
            self._put_back()
            session.finish()
            self._last_state = session.state_dict()

    def _run(self) -> tuple[MergeSession | None, dict[str, Any]]:
        return self.session, self._last_state

    def _train(self, present: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``trainer.train``; lets go of the folder if it raises."""
        try:
            return present(*args, **kwargs)
        except BaseException as error:
            self._abandon(error)
            raise

    def _training_step(
        self, present: Callable[..., Tensor], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """``trainer.training_step``; notes the micro-batch and its loss, which nobody waits for."""
        if self.session:
            self.session.begin_batch(inputs, self._batch_idx)
        loss = present(model, inputs, *args, **kwargs)
        self._batch = (loss, inputs)
        return loss

    def _prediction_step(
        self, present: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """``trainer.prediction_step``; takes the first batch as the probe batch, if there is none yet."""
        if self.session and self.session.pipeline.probe:
            self.session.pipeline.probe.offer(inputs)
        return present(model, inputs, *args, **kwargs)

    def _end_batch(self, session: MergeSession) -> bool:
        """Counts the last micro-batch; says whether a snapshot is due."""
        (loss, inputs), self._batch = self._batch, (None, None)
        self._batch_idx += 1
        # The loss of a step is the sum of what its micro-batches return, however they are scaled.
        return session.end_batch(loss, self._host.trainer.current_gradient_accumulation_steps, inputs)

    def _clip_gradients(self, present: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``accelerator.clip_grad_norm_``; notes the norm before clipping."""
        self._gradient_norm = present(*args, **kwargs)
        return self._gradient_norm

    def _save_model(
        self, present: Callable[..., None], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """``trainer.save_model``; adds the state to what is one of the trainer's checkpoints.

        Raises:
            HalfRestoredError: instead of saving a mixture.
        """
        if self._half_restored or (self.session and self.session.is_half_restored):
            raise HalfRestoredError(
                "a restore failed half way, and its weights are not saved; resume earlier"
            )
        present(output_dir, *args, **kwargs)
        if self.session is None or output_dir is None:
            return
        is_checkpoint = os.path.basename(output_dir) == f"checkpoint-{self._host.step}"
        arguments: Any = self._host.trainer.args
        if is_checkpoint and not arguments.save_only_model:
            state = {**self.session.state_dict(), "evaluation": self._evaluation.state_dict()}
            if arguments.should_save:
                write_json(Path(output_dir, self._state_file), state)

    @property
    def _state_file(self) -> str:
        assert self._trainer is not None
        kind, others = CheckpointMergeTrainerCallback, self._trainer.callback_handler.callbacks
        index = [callback for callback in others if isinstance(callback, kind)].index(self)
        return _STATE.format(f"-{index}" if index else "")

    def _saved(self, checkpoint: str) -> dict[str, Any]:
        """The state that was saved with a checkpoint."""
        try:
            return read_object(Path(checkpoint, self._state_file))
        except (OSError, CorruptFileError) as error:
            warn(f"merge: the window begins empty: the checkpoint has no readable state of it: {error}")
            return {}

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        """Puts a method of ours, which is handed the present one, before one of the trainer's."""
        own = partial(method, getattr(owner, name))
        self._replaced.append((owner, name, own))
        setattr(owner, name, own)

    def _put_back(self) -> None:
        """Takes our methods off again; what somebody else has put before one stays."""
        while self._replaced:
            owner, name, own = self._replaced.pop()
            if vars(owner).get(name) is own:
                present = own.args[0]
                delattr(owner, name)
                if getattr(owner, name) != present:
                    setattr(owner, name, present)

    def _abandon(self, error: BaseException | None = None) -> None:
        """Ends a training that did not come to its end; raises nothing itself."""
        if self.session is None:
            return
        session, self.session = self.session, None
        self._half_restored = session.is_half_restored or isinstance(error, HalfRestoredError)
        if not self._half_restored:  # else nothing is saved until the next training begins
            self._put_back()
        try:
            self._last_state = session.state_dict(to_keep=False)
        except Exception:
            log.exception("merge: the state of the training could not be kept")
        try:
            session.close()
        except Exception:
            log.exception("merge: the folder could not be given back")


def _calling_trainer() -> tuple[Trainer, str | None]:
    """The trainer that has called the present hook, and the checkpoint that it resumes from.

    A hook is shown neither; both are in the frames of ``Trainer.train`` and what it calls.

    Raises:
        RuntimeError: if there is none.
    """
    trainer: Trainer | None = None
    checkpoint: str | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (trainer and frame.f_code.co_name in ("train", "__init__")):
        frame = frame.f_back
        if frame is not None and frame.f_code.co_varnames[:1] == ("self",):
            found = frame.f_locals
            if isinstance(found.get("self"), Trainer):
                trainer = trainer or found["self"]
                resumed = found.get("resume_from_checkpoint")
                checkpoint = checkpoint or (str(resumed) if isinstance(resumed, (str, os.PathLike)) else None)
    if trainer is None:
        raise RuntimeError("CheckpointMergeTrainerCallback is for transformers.Trainer(callbacks=[…])")
    return trainer, checkpoint
