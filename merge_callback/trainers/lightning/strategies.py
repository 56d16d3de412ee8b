"""Which strategies of Lightning's can be merged under."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_callback.trainers.lightning.private import names_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def check_strategy(trainer: Trainer) -> None:
    """Refuses what is not supported.

    Raises:
        MisconfigurationException: says why.
    """
    if reason := _unsupported_reason(trainer):
        raise names_of(trainer).MisconfigurationException(
            f"CheckpointMergeCallback can't work with {type(trainer.strategy).__name__}: {reason}; use one "
            "device, DDP, FSDP, or ModelParallelStrategy (FSDP2, tensor parallelism)"
        )


def _unsupported_reason(trainer: Trainer) -> str:
    """What keeps a strategy's model from being merged; empty if nothing does."""
    strategy, names = trainer.strategy, names_of(trainer)
    if isinstance(strategy, names.DeepSpeedStrategy):
        return "its optimizer keeps master weights of its own, which a restore would have to write, too"
    if isinstance(strategy, names.FSDPStrategy):
        if strategy.kwargs.get("use_orig_params") is False:
            return "use_orig_params=False hides the parameters from the optimizer and from us"
        return ""
    known = (names.SingleDeviceStrategy, names.DDPStrategy, names.ModelParallelStrategy)
    if isinstance(strategy, known) and not isinstance(
        strategy, (names.SingleDeviceXLAStrategy, names.XLAStrategy)
    ):
        return ""
    return "which part of the weights is where is not known"
