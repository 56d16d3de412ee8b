"""``WarmupAdaptiveDecay``: a learning rate that halves while validation stalls, and then stops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_callback.checks import not_negative, one_of, positive
from merge_callback.messages import info, warn
from merge_callback.metrics import MERGED
from merge_callback.trainers.lightning.base import LightningCallback
from merge_callback.trainers.lightning.private import names_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer


class WarmupAdaptiveDecay(LightningCallback):
    """Warms the learning rate up, halves it while a validation metric stalls, and stops when it is spent.

    Experts that are trained for long merge worse (*Less Is More: Undertraining Experts Improves Model
    Upcycling*). This is the schedule of that paper's Appendix J, which stops them early: with s the number of
    the optimizer step, from 1, the rate is ``η_max · s / warmup_steps`` during the warm-up. Afterwards the
    metric is read every ``every_n_steps`` steps. If it is ``patience`` times in a row not better than its
    best, the rate is multiplied by ``factor``. If the rate falls below ``min_lr``, training stops. The best
    checkpoint by validation (``ModelCheckpoint``) is the expert.

    The callback sets the rates itself, so the module returns its optimizer alone, without an LR scheduler.
    Each parameter group has its own η_max, the ``lr`` that it was given, and training stops when the rates of
    all groups are below ``min_lr``. Steps are optimizer steps, whatever ``accumulate_grad_batches`` is.
    Several ranks decide by the mean of the values of those that logged the metric, so it need not be
    synchronised.

    The metric is read when the run validates, so validate every ``every_n_steps`` steps. If validations are
    more frequent, some are passed over; if they are rarer, each is read, and a warning at the start says so.
    A resumed run goes on exactly. Only if its checkpoint was saved between a step and the validation that
    follows it (``ModelCheckpoint(every_n_train_steps=…)``), Lightning leaves that validation out.

    A ``CheckpointMergeCallback`` in the same trainer sees a warm-up and a stable phase. A cut whose rate is
    then held for 0.5 % of the run begins a new stable phase, so merges do not cross it; several cuts in
    quicker succession are a decay. It needs 0.5 % of the run, too, to see that the warm-up is over, and
    takes no snapshot before: let ``max_steps`` be what the run may need. Merged metrics
    (``"merged/val_acc"``) can be monitored. After a spike's restore its ramp multiplies these rates.

    Example::

        adaptive = WarmupAdaptiveDecay(monitor="val_acc")
        best = ModelCheckpoint(monitor="val_acc", mode="max")
        trainer = Trainer(callbacks=[adaptive, best], val_check_interval=5, check_val_every_n_epoch=None)
        trainer.fit(model, data)
        expert = best.best_model_path

    Args:
        warmup_steps: Optimizer steps of the linear warm-up.
        every_n_steps: Optimizer steps between two looks at the metric.
        patience: Looks in a row without a new best value after which the rate is cut.
        factor: What the rate is multiplied by then, between 0 and 1.
        min_lr: Training stops when the rate is below it.
        monitor: Name of a metric that validation logs.
        mode: ``"max"`` if higher is better, else ``"min"``.

    Raises:
        ValueError: for an option that makes no sense.
        MisconfigurationException: at the start of training if there is an LR scheduler, not exactly one
            optimizer, a rate already below ``min_lr``, or no validation; at a validation without the metric.
    """

    def __init__(
        self,
        warmup_steps: int = 50,
        every_n_steps: int = 5,
        patience: int = 3,
        factor: float = 0.5,
        min_lr: float = 1e-7,
        monitor: str = "val_acc",
        mode: str = "max",
    ) -> None:
        self.warmup_steps = not_negative("warmup_steps", warmup_steps)
        self.every_n_steps = positive("every_n_steps", every_n_steps)
        self.patience = positive("patience", patience)
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor!r} must lie between 0 and 1; 0.5 halves the learning rate")
        if not 0 <= min_lr < math.inf:
            raise ValueError(f"min_lr={min_lr!r} must be 0 or a positive number")
        one_of("mode", mode, ("min", "max"))
        self.factor, self.min_lr, self.monitor, self.mode = factor, min_lr, monitor, mode
        self._state, self._loaded = _new_state(), False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets that a state was loaded for an earlier fit."""
        if stage == "fit":
            self._loaded = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes each group's η_max in a new run; refuses what can't work."""
        if trainer.global_step == 0 or (trainer.ckpt_path and not self._loaded):
            self._state = {**_new_state(), "begun": trainer.global_step, "judged": trainer.global_step}
        self._check(trainer)
        self._note_peaks(trainer.optimizers[0])
        if not self._state["cuts"] and self._is_spent:
            raise names_of(trainer).MisconfigurationException(
                f"WarmupAdaptiveDecay stops below min_lr={self.min_lr:g}, but the optimizer's lr is only "
                f"{max(self._state['peaks'], default=0.0):g}"
            )
        self._stop_if_spent(trainer)
        steps = _steps_between_validations(trainer)
        if steps > self.every_n_steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            interval = self.every_n_steps * trainer.accumulate_grad_batches
            warn(
                f"WarmupAdaptiveDecay reads {self.monitor} every {self.every_n_steps} steps, but up to "
                f"{steps:g} steps lie between validations, so that the learning rate falls later; pass "
                f"Trainer(val_check_interval={interval}, check_val_every_n_epoch=None)"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the rates of the step that this batch belongs to."""
        optimizer = trainer.optimizers[0]
        self._note_peaks(optimizer)
        share = self._share(trainer.global_step + 1 - self._state["begun"])
        for group, peak in zip(optimizer.param_groups, self._state["peaks"], strict=True):
            if isinstance(group["lr"], Tensor):  # in place, since a captured or compiled step reads it
                group["lr"].fill_(peak * share)
            else:
                group["lr"] = peak * share

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the metric if that is due, and cuts the rate or stops."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = self._value(trainer)
        since = max(self._state["judged"], self._state["begun"] + self.warmup_steps)
        if value is not None and trainer.global_step >= since + self.every_n_steps:
            self._state["judged"] = trainer.global_step
            self._judge(value, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Each group's η_max, the number of cuts, the best value and the looks since, as primitives."""
        return {**self._state, "peaks": list(self._state["peaks"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self._state = {**state_dict, "peaks": list(state_dict["peaks"])}
        self._loaded = True

    def _check(self, trainer: Trainer) -> None:
        error = names_of(trainer).MisconfigurationException
        if trainer.lr_scheduler_configs:
            kind = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise error(
                f"WarmupAdaptiveDecay sets the learning rate itself, and so does the module's {kind}; return "
                "the optimizer alone from configure_optimizers"
            )
        rated = [o for o in trainer.optimizers if all("lr" in group for group in o.param_groups)]
        if len(trainer.optimizers) != 1 or len(rated) != 1 or not rated[0].param_groups:
            raise error(
                f"WarmupAdaptiveDecay works with one optimizer that has an lr, not with "
                f"{len(trainer.optimizers)}; give one optimizer several parameter groups"
            )
        if not trainer.enable_validation:
            raise error(
                f"WarmupAdaptiveDecay monitors {self.monitor}, but this run has no validation; pass a "
                "validation dataloader, and leave limit_val_batches above 0"
            )

    def _note_peaks(self, optimizer: Optimizer) -> None:
        """The η_max of groups that are not known yet; callbacks that unfreeze layers add some later."""
        peaks = self._state["peaks"]
        peaks += [float(group["lr"]) for group in optimizer.param_groups[len(peaks) :]]

    def _share(self, step: int) -> float:
        """The rate of step number ``step``, from 1, as a share of η_max."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return float(self.factor ** self._state["cuts"])

    def _value(self, trainer: Trainer) -> float | None:
        """The mean over the ranks that logged the metric; ``None`` before the first merge for a merged one.

        Every rank gets the same, also if only the first one logged it.
        """
        value = trainer.callback_metrics.get(self.monitor)
        own = [0.0, 0.0] if value is None else [float(value), 1.0]
        pair = torch.tensor(own, dtype=torch.float32, device=trainer.strategy.root_device)
        total, ranks = trainer.strategy.reduce(pair, reduce_op="sum").tolist()
        if ranks:
            return float(total / ranks)
        if self.monitor.startswith(MERGED):
            return None
        raise names_of(trainer).MisconfigurationException(
            f"WarmupAdaptiveDecay monitors {self.monitor}, but this validation didn't log it; it logged "
            f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}"
        )

    def _judge(self, value: float, trainer: Trainer) -> None:
        state, best = self._state, self._state["best"]
        is_better = value > best if self.mode == "max" else value < best
        if not math.isnan(value) and (math.isnan(best) or is_better):
            state["best"], state["looks"] = value, 0
            return
        state["looks"] += 1
        if state["looks"] == self.patience:
            state["looks"], state["cuts"] = 0, state["cuts"] + 1
            info(
                f"WarmupAdaptiveDecay: {self.monitor} was {self.patience} times not better than "
                f"{state['best']:.6g}; the learning rate is {self._highest_rate:.3g} after step "
                f"{trainer.global_step:,}"
            )
            self._stop_if_spent(trainer)

    @property
    def _highest_rate(self) -> float:
        """Of all groups, after the warm-up."""
        return float(max(self._state["peaks"], default=0.0) * self.factor ** self._state["cuts"])

    @property
    def _is_spent(self) -> bool:
        return self._highest_rate < self.min_lr

    def _stop_if_spent(self, trainer: Trainer) -> None:
        if self._is_spent:
            info(f"WarmupAdaptiveDecay: training stops, since the learning rate is below {self.min_lr:g}")
            trainer.should_stop = True


def _new_state() -> dict[str, Any]:
    return {"peaks": [], "begun": 0, "judged": 0, "cuts": 0, "best": math.nan, "looks": 0}


def _steps_between_validations(trainer: Trainer) -> float:
    """The most optimizer steps between two validations; 0 if they are timed by the clock."""
    batches, epoch = trainer.val_check_batch, trainer.num_training_batches
    if batches is None:
        return 0.0
    if (epochs := trainer.check_val_every_n_epoch) is not None and math.isfinite(epoch):
        batches += epoch % batches + (epochs - 1) * epoch
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf
