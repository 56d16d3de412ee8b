"""Restoring a live run from the merge of earlier snapshots (PMA-init, arXiv 2505.12082 section 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from merge_callback.recovery import optimizer_state
from merge_callback.recovery.lr_scale import LRScale
from merge_callback.recovery.schedule_free import restart_sequences
from merge_callback.sharding import Ranks
from merge_callback.signals.host import Host
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.snapshot import Snapshot
from merge_callback.snapshots.window_merger import WindowMerger
from merge_callback.spike_options import SpikeOptions


class Recovery:
    """Puts earlier weights into the live model, and resets the state that belonged to the replaced ones.

    Args:
        options: how to restore.
        host: the run.
        merger: returns the window's merger, once the last snapshot is in the window.

    Raises:
        ValueError: if an optimizer's state can't be reset.
    """

    def __init__(
        self,
        options: SpikeOptions,
        host: Host,
        merger: Callable[[], WindowMerger],
    ) -> None:
        self.options, self.host, self._merger = options, host, merger
        self.lr = LRScale(host.optimizers, lambda: host.step)
        self.scaler = host.scaler if host.scaler is not None and host.scaler.is_enabled() else None
        self._loss_scale = self.scaler.get_scale() if self.scaler else 1.0  # the run's initial one
        if options.action == "restore":
            for optimizer in host.optimizers:
                _check_scalable(optimizer)
                if not callable(options.optimizer):
                    _check_known(optimizer)

    def restore(self, snapshots: list[Snapshot], step: int, lasting: float) -> list[float]:
        """Restores the run from the merge of ``snapshots``.

        Changes parameters, buffers, gradients, optimizer state and loss scale in place. The schedulers, the
        step count, the data and the token clock are left as they are.

        Args:
            snapshots: snapshots of one segment, oldest first.
            step: optimizer steps taken so far.
            lasting: the factor on the learning rate from now on, after the re-warm-up.

        Returns:
            The normalised weight of each snapshot.

        Raises:
            ValueError: if the model or an optimizer's state is not as expected. The run is unchanged then,
                except that the state of other optimizers may have been reset already.
            RemoteError: if that happens on another rank.
        """
        merger, problem = self._merger(), None
        model = ModelTensors.of(self.host.module, self.host.root)
        spoilt = self._spoilt(merger.ranks)
        try:
            snapshots[-1].arena.check(merger.sharding.own(model.tensors))
            for index, optimizer in enumerate(self.host.optimizers):
                self._set_back(optimizer, index in spoilt)
        except Exception as error:
            problem = error
        merger.ranks.agree(problem)
        weights = merger.merge_into(model, snapshots, self.options.merging)
        restart_sequences(self.host.optimizers)
        merger.forget()
        # If the loop is about to drop the gradients, zeros would only be written.
        self.host.module.zero_grad(set_to_none=not self.host.is_manual)
        self._reset_loss_scale()
        self.lr.rewarm(step, self.options.rewarm_steps, lasting)
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The learning rate's factor and the first loss scale, as primitives."""
        return {"lr": self.lr.state_dict(), "loss_scale": self._loss_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.lr.load_state_dict(state["lr"])
        self._loss_scale = state["loss_scale"]

    def _spoilt(self, ranks: Ranks) -> set[int]:
        """Which optimizers have state that is not finite, on any rank; empty if all are reset anyway."""
        if callable(self.options.optimizer) or self.options.optimizer == "reset":
            return set()
        own = {i for i, o in enumerate(self.host.optimizers) if not optimizer_state.is_finite(o)}
        return set().union(*ranks.exchange(own))

    def _set_back(self, optimizer: Optimizer, is_spoilt: bool) -> None:
        policy = self.options.optimizer
        if callable(policy):
            policy(optimizer)
        elif policy == "reset" or is_spoilt:
            optimizer_state.reset(optimizer)
        elif policy == "scale":
            optimizer_state.scale(optimizer, self.options.optimizer_scale)

    def _reset_loss_scale(self) -> None:
        if self.scaler:
            state = {**self.scaler.state_dict(), "scale": self._loss_scale, "_growth_tracker": 0}
            self.scaler.load_state_dict(state)


def _check_scalable(optimizer: Optimizer) -> None:
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"cannot warm up the learning rate of {type(optimizer).__qualname__} again after a loss spike, "
            "since it has none: pass spike=SpikeOptions(action='warn') to only report spikes"
        )


def _check_known(optimizer: Any) -> None:
    if not optimizer_state.is_known(optimizer):
        name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise ValueError(
            f"cannot reset the state of {name} after a loss spike: pass spike=SpikeOptions(optimizer=fn) "
            "with a function that gets the optimizer and resets its state, or "
            "spike=SpikeOptions(action='warn') to only report spikes"
        )
