"""Real optimizers and schedulers on weights that show the learning rate that was applied."""

import warnings

import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from merge_callback.recovery.lr_scale import LRScale


class Training:
    """Real optimizers on weights whose gradient is always 1: the update is minus the rate applied."""

    def __init__(self, schedule=None, groups=2, optimizers=1, tensor_lr=False, **options):
        self.weights = [
            [nn.Parameter(torch.zeros((), dtype=torch.float64))] for _ in range(groups * optimizers)
        ]
        self.steps, self.seen = 0, []
        rates = [torch.tensor(0.1 * 2**-i, dtype=torch.float64) for i in range(groups)]
        rates = rates if tensor_lr else [rate.item() for rate in rates]
        self.optimizers = [
            SGD(
                [{"params": w, "lr": r} for w, r in zip(self.weights[i::optimizers], rates, strict=True)],
                **options,
            )
            for i in range(optimizers)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR's own use of step(epoch)
            self.schedulers = [schedule(o) for o in self.optimizers] if schedule else []
        self.lr = LRScale(self.optimizers, lambda: self.steps)

    def rates(self):
        return [[float(g["lr"]) for g in o.param_groups] for o in self.optimizers]

    def close_over(self, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = sum(w for group in optimizer.param_groups for w in group["params"])
            loss.backward()
            self.seen.append([float(g["lr"]) for g in optimizer.param_groups])
            return loss.detach()

        return closure

    def step(self, how="keyword"):
        """One optimizer step of each; returns the updates."""
        moves = []
        for optimizer in self.optimizers:
            closure, params = self.close_over(optimizer), [g["params"][0] for g in optimizer.param_groups]
            before = [p.item() for p in params]
            if how == "keyword":
                optimizer.step(closure=closure)
            elif how == "positional":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            moves.append([b - p.item() for b, p in zip(before, params, strict=True)])
            self.steps += 1
        self.lr.end_step(self.steps)
        for scheduler in self.schedulers:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[1.0] if plateau else [])
        return moves

    def hooks(self):
        return sum(
            len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in self.optimizers
        )
