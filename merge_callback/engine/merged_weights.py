"""Temporarily puts a merge's weights into the live model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from merge_callback.engine.kept_state import kept_weights
from merge_callback.engine.random_state import RandomState
from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.recovery.schedule_free import as_before, in_mode_of_evaluation
from merge_callback.sharding import Sharding
from merge_callback.signals.host import Host
from merge_callback.snapshots.arena import Arena


@contextmanager
def merged_weights(host: Host, merged: Arena, sharding: Sharding) -> Iterator[dict[str, Tensor]]:
    """In this context the live model has the weights of a merge; all ranks enter and leave together.

    On exit, also by an exception, the live weights, all buffers and the global random generators are as they
    were, bit for bit. If a signal arrives meanwhile, its handler sees the live weights, too.

    Args:
        host: the run.
        merged: the weights; this rank's part of them.
        sharding: says what each rank keeps.

    Yields:
        The live tensors (or shards), by name.

    Raises:
        HalfRestoredError: if the live weights could not be put back.
    """

    @contextmanager
    def as_it_was() -> Iterator[None]:
        with (
            DeferredSignals(),
            kept_weights(host.module, host.root, host.spare),
            as_before(host.optimizers, modes),
        ):
            restore()
            yield

    with DeferredSignals() as signals, ExitStack() as stack:
        stack.callback(RandomState().restore)
        modes = stack.enter_context(in_mode_of_evaluation(host.optimizers))
        tensors, restore = stack.enter_context(kept_weights(host.module, host.root, host.spare))

        def put_in() -> dict[str, Tensor]:
            merged.copy_to(sharding.own(tensors))
            return tensors

        with torch.inference_mode(False), torch.no_grad():
            sharding.spread(sharding.ranks.agreed(put_in))
        stack.enter_context(DeferredSignals.around_handlers(as_it_was))
        with signals.let_through():
            yield tensors
