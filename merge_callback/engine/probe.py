"""Functional diversity of a run: what the model computes on one fixed batch, snapshot after snapshot.

At a snapshot the live model is what the newest snapshot holds, so its features are taken there and then: one
forward pass of a few sequences in training's thread, after which everything is as it was. Those of earlier
snapshots are kept, and compared in the background. A copy of the model in the background would need a second
model's memory, a gathering of all shards, and random generators, autocast caches and the module's own Python
state of its own, which are the process's: none of that could be kept from training.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_callback.diversity.features import Call, each_tensor, features_of, layers_of
from merge_callback.diversity.functional import Features, functional_distances
from merge_callback.engine.kept_state import PythonState, put_back, reset_metrics
from merge_callback.engine.random_state import RandomState
from merge_callback.messages import info, warn
from merge_callback.probe_options import ProbeOptions
from merge_callback.recovery.deferred_signals import DeferredSignals
from merge_callback.signals.host import Host
from merge_callback.snapshots.capture import clean_name, resharding_of, settled
from merge_callback.snapshots.files import replacing, sync
from merge_callback.snapshots.live_merge import free_memory
from merge_callback.snapshots.window import Window

log = logging.getLogger(__name__)

PROBE = "probe.pt"
"""In the window's folder: the probe batch, and the features of the last snapshots."""

SEQUENCES = 8
"""Of the validation's first batch."""


class Probe:
    """Takes the live model's features at each snapshot, and compares them with those of an earlier one.

    The batch is the first rank's on all ranks, and so are the distances. What can't be measured is told once;
    the run goes on without.

    Args:
        options: the batch and the layers.
        host: the run.
        window: its window, whose folder the batch is kept in.
        lag: how many snapshots apart a pair lies.

    Raises:
        ValueError: if a pattern matches no module.
    """

    def __init__(self, options: ProbeOptions, host: Host, window: Window, lag: int) -> None:
        self._options, self._host, self._window, self._lag = options, host, window, lag
        self._call: Call | None = None  # the same on all ranks
        self._own: Call | None = None  # of the first rank, until all have it
        self._features: dict[int, Features] = {}  # by step; of the first rank, which compares
        self._batch = None if options.is_validation else options.batch
        self._is_on, self._is_told, self._is_storable = True, False, True
        self._layers()
        if window.ranks.is_first:
            self._load()

    @property
    def awaits_validation(self) -> bool:
        """Whether the first batch of a validation is still to be offered."""
        unknown = self._call is None and self._own is None and self._batch is None
        return self._options.is_validation and unknown

    def offer(self, batch: Any) -> None:
        """Takes the first sequences of a validation batch, unless there is a batch already."""
        if self.awaits_validation:
            self._batch = first_sequences(batch)

    def run(self) -> Features | None:
        """The live model's features; ``None`` without a batch. All ranks call it, between two steps."""
        if not self._is_on:
            return None
        ranks = self._window.ranks
        try:
            if self._call is None:
                ranks.agreed(self._make_call)
                self._call = ranks.from_first(self._own)
            if self._call is None:
                return None
            features = ranks.agreed(partial(self._forward, self._call))
        except Exception as error:
            if DeferredSignals.has_raised(error):
                raise
            self._is_on = False
            free_memory()
            name = type(self._host.probed).__name__
            warn(
                f"merge: functional diversity is not measured: {error!r}; pass as probe= a batch that "
                f"{name}.forward takes, of a size that fits"
            )
            return None
        if not self._is_told:
            self._is_told = True
            names = [name or type(self._host.probed).__name__ for name in features.activations]
            layers = f"{len(names)} layers ({names[0]} … {names[-1]})" if names else "no layer"
            info(f"merge: functional diversity on {len(features.logits)} sequences, activations of {layers}")
        return features

    def compare(self, features: Features) -> dict[str, float]:
        """How far the newest snapshot is from the one ``lag`` before it; in the background, on all ranks.

        Args:
            features: of the newest snapshot of the window.
        """
        found: dict[str, float] = {}
        try:
            if self._window.ranks.is_first:
                found = self._compared(features.cpu())
        except Exception:
            log.exception("merge: functional diversity could not be measured at a snapshot")
        return self._window.ranks.from_first(found)

    def _compared(self, features: Features) -> dict[str, float]:
        step = self._window.snapshots[-1].step
        # A restore may have brought the run back behind later ones.
        known = {earlier: kept for earlier, kept in self._features.items() if earlier < step}
        most = self._window.size + self._lag  # a resume may go back a window
        self._features = {**dict(list(known.items())[-most:]), step: features}
        self._store()
        pair = self._window.pair(self._lag)
        if pair is None or pair[0].step not in self._features:
            return {}
        distances = functional_distances(self._features[pair[0].step], features)
        return {name: value for name, value in distances.items() if math.isfinite(value)}

    def _make_call(self) -> None:
        """Makes the arguments of the forward pass of the first rank's batch, if there is one by now."""
        batch = self._batch
        if self._own is not None or batch is None or not self._window.ranks.is_first:
            return
        if callable(batch):
            random = RandomState()
            try:
                batch = batch()
            finally:
                random.restore()
        call = Call.of(self._host.probed, batch).moved("cpu")
        pickle.dumps(call)  # what can't be sent to other ranks, or kept, is told of now
        self._own, self._batch = call, None
        self._is_storable = _is_loadable(call)
        if not self._is_storable and self._file is not None:
            warn(
                "merge: the probe batch holds objects that can't be kept with the run, so a resumed run "
                "measures functional diversity on another one; tensors, numbers and containers are kept"
            )

    def _forward(self, call: Call) -> Features:
        with DeferredSignals(), undisturbed(self._host) as model:
            return features_of(model, call.moved(self._host.device), self._layers())

    def _layers(self) -> dict[str, nn.Module]:
        parts = {clean_name(name): part for name, part in self._host.module.named_modules()}
        return layers_of(parts, self._options.layers)

    @property
    def _file(self) -> Path | None:
        return self._window.store.folder and self._window.store.folder / PROBE

    def _load(self) -> None:
        """Takes up the batch and the features of the run, if it is resumed."""
        if self._file is None or not self._file.is_file():
            return
        try:
            kept = torch.load(self._file, map_location="cpu", weights_only=True)
            if kept["run_id"] != self._window.folder.run_id:
                return
            self._own = Call(*kept["call"])
            self._features = {step: Features(*parts) for step, parts in kept["features"].items()}
            info(f"merge: functional diversity is measured on the batch of {self._file}, as before")
        except Exception as error:
            warn(f"merge: the probe batch of the resumed run can't be read, another is taken: {error!r}")

    def _store(self) -> None:
        if self._file is None or self._call is None or not self._is_storable:
            return
        call = (self._call.args, self._call.kwargs, self._call.mask)
        features = {step: (kept.logits, dict(kept.activations)) for step, kept in self._features.items()}
        content = {"run_id": self._window.folder.run_id, "call": call, "features": features}
        try:
            self._window.folder.before_writing()
            with replacing(self._file) as made:
                torch.save(content, made)
                sync(made)
        except OSError as error:
            log.warning("merge: the probe batch is not kept with the run this time: %r", error)


@contextmanager
def undisturbed(host: Host) -> Iterator[Callable[..., Any]]:
    """In this context the live model may be called, in evaluation mode and without gradients.

    On exit its buffers, modes, hooks, Python state and torchmetrics, and the random generators, are as they
    were, bit for bit. Only a training step writes to the parameters, so these are not copied. Compiled
    models run eagerly: else hooks on their parts would not be called, and evaluation would be compiled, too.

    Yields:
        What takes the arguments of ``forward``.
    """
    reshard = resharding_of(host.root)
    reshard()  # if a validation has left the whole parameters in place
    outer = [host.root] if host.root is not host.module else []
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.callback(RandomState().restore)
        stack.callback(PythonState(host.module, others=outer).restore)
        for buffer in host.module.buffers():
            stack.callback(put_back, buffer, buffer.clone())
        stack.callback(reshard)
        stack.push(lambda kind, *_: settled(host.root) if kind else None)
        reset_metrics(host.module)
        host.root.eval()
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield stack.enter_context(host.forward_pass())


def first_sequences(batch: Any, most: int = SEQUENCES) -> Any:
    """A copy of the first sequences of a batch, in host memory.

    Args:
        batch: containers of tensors, whose first dimension is that of the first tensor if it counts the
            sequences; anything else is copied as a whole.
        most: sequences.
    """
    sizes: list[int] = []
    each_tensor(lambda tensor: sizes.extend(tensor.shape[:1]), batch)
    if not sizes:
        return copy.deepcopy(batch)

    def first(tensor: Tensor) -> Tensor:
        is_batched = tensor.ndim > 0 and len(tensor) == sizes[0]
        return (tensor[:most] if is_batched else tensor).detach().to("cpu", copy=True)

    return each_tensor(first, batch)


def _is_loadable(call: Call) -> bool:
    """Whether ``torch.load`` reads the arguments without running any code of theirs."""
    file = io.BytesIO()
    torch.save((call.args, call.kwargs, call.mask), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True
