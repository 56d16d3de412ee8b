"""Logs the norm of the gradients at every optimizer step."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class GradientNorm(Callback):
    """Logs `grad_norm`, the 2-norm of all gradients before they are clipped."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Computes it."""
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        pl_module.log("grad_norm", torch.nn.utils.get_total_norm(gradients))
