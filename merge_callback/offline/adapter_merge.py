"""What a method makes of the LoRA adapters of one base, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.lora import LoraAdapter, LoraFactors, plain
from merge_callback.checks import matches_any
from merge_callback.merging import Inputs, LinearMethod
from merge_callback.merging.low_rank import LowRank, total
from merge_callback.offline.adapters import warn_of_bases
from merge_callback.offline.compatibility import check_weights
from merge_callback.offline.file_merge import common_record, trajectory_of
from merge_callback.offline.job import Job
from merge_callback.snapshots.arena import all_finite


class AdapterMerge:
    """Adapters that were found to belong together, and what a method makes of each layer."""

    def __init__(self, job: Job, adapters: Sequence[LoraAdapter], base: Checkpoint | None) -> None:
        self.job, self.adapters, self.base, self.newest = job, adapters, base, adapters[-1]
        self.trajectory = trajectory_of([adapter.checkpoint for adapter in adapters])
        self._arranged, self._places = job.method.arranged(adapters, self.trajectory)
        self._check_options()
        self.layers: dict[str, LoraFactors] = {}
        self.whole: dict[str, Tensor] = {}
        for adapter in reversed(adapters):
            for module, layer in adapter.layers.items():
                if self.layers.setdefault(module, layer).kind != layer.kind:
                    raise ValueError(
                        f"{module}: its ΔW is {layer.matrix.shape} in {adapter.checkpoint.path}, and "
                        f"{self.layers[module].matrix.shape} in another one: they are of different models"
                    )
            for name, tensor in adapter.whole.items():
                if self.whole.setdefault(name, tensor).shape != tensor.shape:
                    raise ValueError(
                        f"{name}: its shapes differ, {tuple(tensor.shape)} in one of the adapters"
                    )
        self._check_patterns()
        self._check_finite()
        warn_of_bases([adapter.config for adapter in adapters])
        self.weights = self._weights()
        self.survey = None if self.weights else job.method.survey(_Layers(self), self._places)

    @property
    def on_task_vectors(self) -> bool:
        """Whether the method takes a θ_init, which is 0 for what is added to a base."""
        return "task vectors" in self.job.method.needs

    @property
    def initialisations(self) -> set[str]:
        """Those that have changed the base's weights, which the adapters are relative to."""
        return {adapter.changes_the_base for adapter in self.adapters} - {""}

    def matrix(self, module: str) -> LowRank | Tensor:
        """The merged ΔW of a layer: exact factors, or dense."""
        if self._is_copied(f"{plain(module)}.weight"):
            return self._of(module, self.newest).matrix
        if self.weights is None:
            inputs = self.inputs(module)
            out = torch.empty_like(inputs.tensors[0])
            self.job.method.merge(inputs, out, self._places, self.survey)
            return out.view(self.layers[module].matrix.shape)
        held = [(a.layers[module].matrix, w) for a, w in self._weighted() if module in a.layers]
        return total([matrix for matrix, _ in held], [weight for _, weight in held])

    def inputs(self, module: str) -> Inputs:
        """The dense ΔW of every adapter, flat, in fp32."""
        deltas = [self._of(module, adapter).matrix.dense().reshape(-1) for adapter in self._arranged]
        zero = torch.zeros_like(deltas[0]) if self.on_task_vectors else None
        return Inputs(f"{plain(module)}.weight", deltas, zero)

    def merge_whole(self, name: str, out: Tensor) -> None:
        """Merges a tensor that replaces the base's."""
        if not out.is_floating_point() or self._is_copied(plain(name)):
            out.copy_(self.newest.whole.get(name, self.whole[name]))
            return
        base = None if self.base is None else self.base.tensors.get(plain(name))
        tensors = [adapter.whole.get(name, base) for adapter in self._arranged]
        if any(t is None for t in tensors) or (base is None and self.on_task_vectors):
            raise ValueError(
                f"{plain(name)} replaces the base's tensor, and {self.job.method.name!r} needs that, or not "
                "every adapter has it: give --base"
            )
        flat = [tensor.to(out.dtype).reshape(-1) for tensor in tensors if tensor is not None]
        initial = base.to(out.dtype).reshape(-1) if base is not None and self.on_task_vectors else None
        self.job.method.merge(Inputs(plain(name), flat, initial), out.view(-1), self._places, self.survey)

    def record(self) -> dict[str, Any]:
        """The provenance."""
        checkpoints = [adapter.checkpoint for adapter in self.adapters]
        return {
            **common_record(self.job, checkpoints, self.base, self.trajectory),
            "weights": self.weights,
            "copied": sorted(n for n in map(plain, self.whole) if self._is_copied(n)),
            "stripped_prefix": "",
            "prefix": "",
        }

    def _weights(self) -> list[float] | None:
        """What multiplies each adapter's ΔW; ``None`` if the method is not linear."""
        method = self.job.method
        if not isinstance(method, LinearMethod):
            return None
        return method.weights_along(self.trajectory, self.on_task_vectors)

    def _weighted(self) -> Iterator[tuple[LoraAdapter, float]]:
        yield from zip(self.adapters, self.weights or (), strict=True)

    def _of(self, module: str, adapter: LoraAdapter) -> LoraFactors:
        """An adapter's layer; one of rank 0 if it does not adapt it."""
        layer = self.layers[module]
        if module in adapter.layers:
            return adapter.layers[module]
        rows, columns = layer.matrix.shape
        nothing = LowRank(layer.matrix.b.new_zeros(rows, 0), layer.matrix.a.new_zeros(0, columns))
        return LoraFactors(layer.names, nothing, layer.kernel, layer.is_embedding)

    def _is_copied(self, name: str) -> bool:
        return matches_any(name, self.job.exclude)

    def _check_options(self) -> None:
        job = self.job
        if job.naming.strip or job.naming.prefix:
            raise ValueError("adapters keep the names that peft loads: leave out --strip-prefix and --prefix")
        check_weights(job.method, len(self.adapters))
        if job.kind == "lightning":
            raise ValueError("--as lightning is no format of adapters; choose lora, or model with --base")
        if job.rank is not None and (job.rank < 1 or job.kind == "model"):
            why = "of an adapter; with --as model nothing is cut" if job.rank > 0 else "at least 1"
            raise ValueError(f"--rank {job.rank} must be {why}")

    def _check_patterns(self) -> None:
        names = [*(f"{plain(module)}.weight" for module in self.layers), *map(plain, self.whole)]
        for pattern in self.job.exclude:
            if not any(matches_any(name, [pattern]) for name in names):
                raise ValueError(
                    f"--exclude {pattern!r} matches no adapted weight; the first is {names[0]!r}"
                )

    def _check_finite(self) -> None:
        for adapter in self.adapters:
            for name, tensor in adapter.checkpoint.tensors.items():
                if not all_finite(tensor):
                    raise ValueError(f"tensor {name!r} of {adapter.checkpoint.path} holds NaN or Inf")


class _Layers:
    """Every layer's dense ΔW, for methods that look at the whole model first."""

    def __init__(self, merging: AdapterMerge) -> None:
        self._merging = merging

    def __iter__(self) -> Iterator[Inputs]:
        return map(self._merging.inputs, self._merging.layers)
