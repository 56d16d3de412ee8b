"""``CheckpointMergeCallback``: merges checkpoints while the model trains."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from merge_callback.engine.probe import first_sequences
from merge_callback.engine.results import RunResults
from merge_callback.engine.session import MergeSession, beside_others
from merge_callback.merging import MergeMethod
from merge_callback.merging.running import RunningAverage
from merge_callback.messages import info, warn
from merge_callback.options import Options
from merge_callback.snapshots.live_merge import HalfRestoredError
from merge_callback.spike_options import SpikeOptions
from merge_callback.trainers.lightning.base import LightningCallback
from merge_callback.trainers.lightning.host import LightningHost
from merge_callback.trainers.lightning.merged_validation import MergedValidation, taking_part
from merge_callback.trainers.lightning.metric_direction import MetricDirections
from merge_callback.trainers.lightning.private import names_of
from merge_callback.trainers.lightning.strategies import check_strategy

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


log = logging.getLogger(__name__)


class CheckpointMergeCallback(RunResults, LightningCallback):
    """Keeps a rolling window of weight snapshots, merges them, and rescues the run with them after a spike.

    At every interval the callback takes a snapshot of the weights, measures its distance to an earlier one
    (RMS diversity), merges the snapshots of the current learning-rate phase, and publishes the merge as
    safetensors. After each validation it evaluates the merge on the same validation data.

    It also watches the loss of every optimizer step. If the loss spikes (is NaN, or an outlier for several
    steps in a row), the weights from before the spike are tried on the very batch that raised the alarm. If
    they do clearly better, they are put into the live model (PMA-init), the learning rate warms up again, and
    training goes on with the data that come next. Apart from that, the live weights are never touched:
    training with the callback is bit for bit training without it.

    In the stable phase of a schedule, a merge is ahead of the live weights by much of what annealing would
    bring (arXiv 2505.12082). In the decay the gain fades. The phase is inferred from the learning rates that
    were really applied. A merge never crosses phases and never holds snapshots of the warm-up.

    Everything is written to ``dirpath``: ``window/`` holds the snapshots, so that a resumed run has its
    window back; ``step=…-tokens=…-<method>/`` are the emissions; ``latest`` and ``best`` lead to two of them;
    ``spikes.jsonl`` has one line for each spike and what was done about it.

    Under DDP, FSDP or ``ModelParallelStrategy`` (FSDP2, tensor parallelism), each rank stores its own shards,
    and its share of what several ranks hold in common.

    While the run goes on and afterwards, ``window``, ``latest``, ``best`` and ``history`` show what there is,
    and ``merge()`` merges the window now.

    Note:
        The module's validation hooks run a second time for the merged weights.

    Example::

        trainer = Trainer(callbacks=[CheckpointMergeCallback(every_n_tokens=4_000_000_000)])
        trainer.fit(model, data)
        weights = merge_callback.load_merge("lightning_logs/version_0/merges/latest")

    Args:
        window: Number of snapshots kept, and so the most that are merged. 10 is the paper's choice. Early in
            training fewer are better; late in training 15 beat 3 by about a point.
        every_n_tokens: Tokens between snapshots. The default interval is 4B tokens.
        every_n_steps: Optimizer steps between snapshots; give this or ``every_n_tokens``. Works if tokens
            can't be counted.
        count_tokens: Function from a batch to its number of tokens. By default the size of its ``input_ids``,
            or of its first integer tensor.
        method: A method's name, a method object, or a mapping from phase (``"stable"``, ``"decay"``) to
            either. ``"auto"`` is the simple mean (``sma``) in the stable phase and ``ema`` in the decay.
        candidates: What else the window is merged by: a list of methods, or a mapping from names to methods,
            e.g. ``{"wsm-15": Wsm(last=15), "ema": "ema"}``. Each validation validates all of them and the
            merge by ``method``; the best one is published, and is what ``merged/…`` shows.
        select: The validation metric that chooses among them, and that says which emission is the best. By
            default the first whose direction is known, a loss before others.
        storage: Where snapshots live: ``"disk"`` (memory-mapped files), ``"cpu"`` or ``"device"`` memory.
            ``"auto"`` is ``"disk"``, or ``"cpu"`` if the window is not durable.
        durable: Writes every snapshot to a file, so that the window survives the process.
        snapshot_dtype: Stores the parameters that train as ``"bf16"``, ``"fp16"``, ``"fp32"`` or ``"fp64"``;
            by default in the model's own dtype. What is copied instead of averaged keeps its dtype.
        snapshot_codec: ``"delta-fp16"`` stores every snapshot but the oldest as an fp16 difference from its
            predecessor: about half the bytes for fp32 weights, with errors relative to what moved, not to the
            weights. ``"delta-bf16"`` is coarser, for weights that move by 64 or more between snapshots.
        dirpath: The folder that everything is written to. By default ``merges``, next to Lightning's
            ``checkpoints``, or ``merges-1``, ``merges-2``, … if other runs were first; a resumed run keeps
            its folder. If it is a URL that fsspec knows (``s3://…``), the emissions are uploaded to it, and
            the rest stays in a local folder, ``merge_scratch/…``.
        emit_every: Snapshots between emissions; 0 emits only at the end of training.
        format: Format of the emissions: ``"safetensors"``, which the first rank writes as one model, or
            ``"dcp"`` (``torch.distributed.checkpoint``), which all ranks write at once.
        keep_last: Number of emissions kept; ``None`` keeps all.
        keep_best: Keeps also this many emissions, those that scored best in their validations, and the last
            one of the stable phase. The link ``best`` leads to the best one. 0 keeps none of these, and makes
            no link.
        strip_prefix: Prefix to remove from published names, e.g. ``"model."``, so that the inner model loads
            them. By default that of a wrapped Hugging Face model, which makes ``from_pretrained`` work.
        max_shard_size: Larger models are published in several files with an index.
        evaluate: Validates the merged weights after each validation.
        evaluate_with: Classes, or their names, of callbacks that prepare batches or compute metrics in
            validation hooks. These run for the merged weights, too; all other callbacks do not.
        evaluate_batches: With ``candidates``, compares them on the first so many batches of each validation
            dataloader; then the best of them and the merge by ``method`` are validated in full.
        diversity_lag: The diversity is the distance between snapshots this many apart; in a smaller window,
            between the oldest and the newest.
        running: Averages that are updated after every step: ``[PowerEma(0.05), PowerEma(0.1)]``,
            ``RunningEma(half_life=0.05)``, ``SmaSince(step=1000)``, ``RunningWsm(horizon=10_000)``; or a
            mapping that gives them names.
        probe: Measures on one fixed batch how far what the model computes has moved, too: logits,
            probabilities and activations. ``"validation"``, or ``True``, takes the first 8 sequences of the
            first validation batch; else a batch, a function that returns one, or a ``ProbeOptions``, which
            names layers, too.
        exclude: ``fnmatch`` patterns of names that are copied from the newest snapshot instead of averaged,
            e.g. ``["*.router.bias"]``. Integer buffers and frozen parameters are always copied. What does not
            train and no snapshot can hold, such as a quantised base, is left out if a pattern matches it.
        lora: How LoRA adapters are merged that peft has put into the model: ``"delta"`` by what they add (the
            nearest factors to the merge of the products B A), ``"factors"`` A and B each for itself.
        base: The model that this run and ``experts`` began as; not needed if all are LoRA adapters.
        experts: Finished experts: checkpoints or LoRA adapters. After each validation this run's weights are
            merged with them by ``method`` (a name: λ and density are tuned on the validation data), and
            ``merged/…`` is what that merge scores. Stop where it peaks.
        lower_is_better: ``fnmatch`` patterns of validation metrics for which lower is better, for the sign of
            ``merge_gain/…``. Needed if no monitor's mode, torchmetrics object or standard name shows it.
        higher_is_better: The same for metrics for which higher is better.
        spike: What counts as a loss spike, and what is done about it: a ``SpikeOptions``, a mapping of its
            options, or its action alone, ``spike="warn"``.

    Raises:
        ValueError: for an option that makes no sense; the message names it, its value and the remedy.
        TrainingDivergedError: while training, if restores did not help and the options say to stop.
        HalfRestoredError: while training, if a restore, or putting back the live weights after a merged
            validation, fails half way, twice. No checkpoint is saved then.
    """

    def __init__(
        self,
        window: int = 10,
        every_n_tokens: int | float | None = None,
        every_n_steps: int | None = None,
        count_tokens: Callable[[Any], int] | None = None,
        method: str | MergeMethod | dict[str, str | MergeMethod] = "auto",
        candidates: list[str | MergeMethod] | dict[str, str | MergeMethod] | None = None,
        select: str | None = None,
        storage: str = "auto",
        durable: bool = True,
        snapshot_dtype: str | torch.dtype | None = None,
        snapshot_codec: str | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        emit_every: int = 1,
        format: str = "safetensors",
        keep_last: int | None = 3,
        keep_best: int = 1,
        strip_prefix: str | None = None,
        max_shard_size: int | str = "5GB",
        evaluate: bool = True,
        evaluate_with: Sequence[str | type[Callback]] = (),
        evaluate_batches: int | None = None,
        diversity_lag: int = 2,
        running: Sequence[str | RunningAverage] | dict[str, RunningAverage] = (),
        probe: Any = None,
        exclude: Sequence[str] = (),
        lora: str = "delta",
        base: str | os.PathLike[str] | None = None,
        experts: Sequence[str | os.PathLike[str]] = (),
        lower_is_better: Sequence[str] = (),
        higher_is_better: Sequence[str] = (),
        spike: SpikeOptions | str | bool | dict[str, Any] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.options = Options.resolve(**given)
        self.session: MergeSession | None = None
        self._host: LightningHost | None = None
        self._validation: MergedValidation | None = None
        self._resume: dict[str, Any] = {}
        self._first_batch: Any = None  # of a sanity check
        self._loaded = self._half_restored = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy made during a fit holds what a checkpoint would: the options and the state.

        It does not count as a checkpoint: the files of the trainer's last two checkpoints stay.
        """
        state = {**self.__dict__, "session": None, "_host": None, "_validation": None}
        if self.session is not None:
            state["_resume"] = copy.deepcopy(self._state(self.session, to_keep=False))
        return state

    @cached_property
    def state_key(self) -> str:
        """Distinguishes several callbacks of this kind; Lightning asks for it before every hook."""
        return self._generate_state_key(
            every=self.options.every,
            **{phase: method.name for phase, method in self.options.methods.items()},
            window=self.options.window,
            codec=self.options.snapshot_codec,
            dtype=str(self.options.snapshot_dtype or ""),
            folder=Path(self.options.dirpath or "").name,  # distinguishes callbacks with the same options
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses unsupported trainers before anything is set up."""
        if stage == "fit":
            check_strategy(trainer)
            _check_folders(trainer)
            # First in the list, so that callbacks that monitor merged/… or save a checkpoint find this step's
            # state.
            others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
            trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
            self._loaded = self._half_restored = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds or restores the window; by now every strategy has set up, moved and restored the model."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if all(isinstance(optimizer, names_of(trainer)._MockOptimizer) for optimizer in trainer.optimizers):
            info("merge: the module has no optimizer, so no weights are trained or merged")
            return
        if trainer.global_step == 0 or (trainer.ckpt_path and not self._loaded):
            self._resume = {}  # the state is another run's, left from this callback's last fit
        options = beside_others(self.options, trainer.callbacks)  # type: ignore[attr-defined]
        self._host = LightningHost(trainer, pl_module)
        named = taking_part(trainer, options.evaluate_with)
        self.session = MergeSession.begin(options, self._host, self._resume)
        self._offer(self._first_batch)
        self._first_batch = None
        directions = MetricDirections(options.lower_is_better, options.higher_is_better)
        self._validation = MergedValidation(self._host, self.session.sharding, directions, named)
        if "validation" in self._resume:
            self._validation.load_state_dict(self._resume["validation"])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the batch; before the first step, checks that tokens can be counted."""
        if self.session:
            self.session.begin_batch(batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Notes the learning rates of this step, before the schedulers change them."""
        if self.session:
            self.session.note_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances the clock and the phase, acts on a spike, takes a snapshot if one is due."""
        if self.session is None or self._host is None or self._validation is None:
            return
        if self.session.end_batch(outputs, self._host.loss_divisor, batch):
            self.session = self.session.follow_model()
            if self.session is None:
                return
            self.session.take_snapshot()
        if self.options.evaluate:
            self._validation.note_beginning()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the first batch as the probe batch, if there is none yet."""
        if batch_idx == dataloader_idx == 0:
            self._offer(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Notes the weights that the module is validated with: it may keep an average of its own."""
        is_first = batch_idx == dataloader_idx == 0 and not trainer.sanity_checking
        if is_first and self._validation and self.options.evaluate:
            self._validation.note_first_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates the merged weights, if the window has something new since the last validation."""
        if self.session and not trainer.sanity_checking:
            self.session.pipeline.wait_until_merged()  # so that a monitor finds the same metrics on all ranks
            if self._validation and self.options.evaluate:
                self._validation.update(self.session)
            elif self._validation:
                self._validation.note_live(self.session)

    def _offer(self, batch: Any) -> None:
        """Offers a probe batch; until the session begins, it is kept."""
        if batch is None or self.options.probe is None or not self.options.probe.is_validation:
            return
        if self.session is None:
            self._first_batch = first_sequences(batch)
        elif self.session.pipeline.probe:
            self.session.pipeline.probe.offer(batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publishes the last merge; the live model keeps its own weights."""
        if self.session:
            self.session.finish()
            self._resume = self._state(self.session)
            self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Releases the folder, since ``teardown`` is not called after an exception.

        It raises nothing itself, because the next callback may have a checkpoint to rescue.
        """
        if self.session:
            session = self.session
            self._half_restored = session.is_half_restored or isinstance(exception, HalfRestoredError)
            try:
                self._resume = self._state(session)
            except Exception:
                log.exception("merge: the state of the run could not be saved")
            self._let_go()
            try:
                session.close()
            except Exception:
                log.exception("merge: the folder could not be released")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses to save weights that a failed restore has overwritten in part.

        Raises:
            HalfRestoredError: if the weights are such a mixture.
        """
        if self._half_restored or (self.session and self.session.is_half_restored):
            raise HalfRestoredError(
                "a restore failed half way, so its weights are not saved; resume from an earlier checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Token clock, phase, and the records of the window's snapshots, as primitives."""
        return self._state(self.session) if self.session else self._resume

    def _run(self) -> tuple[MergeSession | None, dict[str, Any]]:
        return self.session, self._resume

    def _state(self, session: MergeSession, to_keep: bool = True) -> dict[str, Any]:
        assert self._validation is not None
        return {**session.state_dict(to_keep), "validation": self._validation.state_dict()}

    def _let_go(self) -> None:
        """Leaves the trainer's callbacks as they were."""
        if self._validation:
            self._validation.close()
        self.session = self._host = self._validation = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts, when there is a model to restore the window for."""
        self._resume = state_dict
        self._loaded = True

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Finds the state of a run that was started with another ``dirpath``, interval or method."""
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:
            return
        others = {c.state_key for c in trainer.callbacks if c is not self}  # type: ignore[attr-defined]
        saved = [key for key in states if key.startswith(type(self).__qualname__) and key not in others]
        # Older versions distinguished callbacks by their dirpath.
        similar = [key for key in saved if self._interval_and_methods in key]
        found = next(
            (k for k in (saved, similar, [k for k in similar if self._dirpath in k]) if len(k) == 1), []
        )
        if found:
            self.load_state_dict(states[found[0]])
        elif saved:
            warn(
                f"merge: the window begins empty: the checkpoint holds the states of {saved}, and it is "
                f"unclear which of them belongs to {self.state_key}"
            )

    @property
    def _interval_and_methods(self) -> str:
        return self.state_key.partition("{")[2].partition(", 'window'")[0]

    @property
    def _dirpath(self) -> str:
        return f"'dirpath': {str(self.options.dirpath or '')!r}"


def _check_folders(trainer: Trainer) -> None:
    mine = [c for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback)]  # type: ignore[attr-defined]
    given = [c.options.dirpath for c in mine if c.options.dirpath is not None]
    folders = [folder.absolute() if isinstance(folder, Path) else folder for folder in given]
    for folder in folders:
        if folders.count(folder) > 1:
            raise names_of(trainer).MisconfigurationException(
                f"{folders.count(folder)} CheckpointMergeCallbacks share dirpath={str(folder)!r}; "
                "give each its own dirpath"
            )
