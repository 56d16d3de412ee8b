"""The strategies of Lightning that are supported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_callback.trainers.lightning.private import names_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def check_strategy(trainer: Trainer) -> None:
    """Refuses unsupported strategies.

    Raises:
        MisconfigurationException: if the strategy is not supported; says why.
    """
    if reason := _unsupported_reason(trainer):
        raise names_of(trainer).MisconfigurationException(
            f"CheckpointMergeCallback can't work with {type(trainer.strategy).__name__}: {reason}; use one "
            "device, DDP, FSDP, or ModelParallelStrategy (FSDP2, tensor parallelism)"
        )


def _unsupported_reason(trainer: Trainer) -> str:
    """Why a strategy's model can't be merged; empty if it can."""
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
    return "it is not known which rank holds which part of the weights"
