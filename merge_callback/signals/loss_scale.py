"""The scale of an optimizer's gradients in fp16 training."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState


def gradient_scale(optimizer: Any, scaler: GradScaler | None) -> Tensor | None:
    """What the gradients that an optimizer is about to apply are multiplied by; ``None`` if they are as is.

    Most optimizers get their gradients unscaled. Fused ones unscale them within their step.

    Args:
        optimizer: just before its step, or in a hook of it.
        scaler: the run's; ``None`` if there is none, or if only the optimizer knows it.

    Returns:
        One element on the device of the scaler, which a later step overwrites.
    """
    within: Tensor | None = getattr(optimizer, "grad_scale", None)
    if within is not None or scaler is None:
        return within
    state = scaler._per_optimizer_states.get(id(optimizer))
    return scaler._scale if state is None or state["stage"] is OptState.READY else None
