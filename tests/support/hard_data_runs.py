"""Weights that are wrecked, whatever the data, and a step that copes with losses that are not finite."""

import torch
from spiking_runs import SPIKE, Damage, Line

EVIDENCE = {"evidence": "batch", "rewarm_steps": 10, "cooldown": 128}


def wreck(module):
    """What no data do: the output is off by 30 from now on."""
    module.net[2].bias += 30


WRECKED = Damage({SPIKE - 1: wreck})
"""The loss of the next batch, number ``SPIKE``, is the first that shows it."""


class Guarded(Line):
    """Drops the gradients of a batch whose loss is not finite."""

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)
