"""What a merge of LoRA adapters is written as: an adapter, or the base with ``ΔW`` added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG
from merge_callback.checkpoints.lora import plain
from merge_callback.merging.low_rank import LowRank, nearest, relative_error
from merge_callback.messages import warn
from merge_callback.offline.adapter_merge import AdapterMerge
from merge_callback.offline.adapters import unordered
from merge_callback.offline.output import ModelFiles, copy_extras, lay_out
from merge_callback.offline.workers import numbers
from merge_callback.snapshots.arena import all_finite
from merge_callback.snapshots.safetensors_file import file_checksum, write_json

_OF_INITIALISATION = ("eva_config", "corda_config", "lora_ga_config")


class IntoAdapter:
    """Writes the merge as an adapter of its own."""

    tied: Mapping[str, str] = {}

    def __init__(self, merging: AdapterMerge) -> None:
        self.merging, self.like = merging, merging.newest.checkpoint
        self.scales = numbers(merging.layers)
        if how := merging.initialisations:
            warn(
                f"the adapters were initialised by {', '.join(sorted(how))}, which changes the base: "
                "the merge fits the changed base only"
            )

    def parts(self) -> dict[str, tuple[str, ...]]:
        """What is written together, and the tensors' names."""
        layers = {module: layer.names for module, layer in self.merging.layers.items()}
        return {**layers, **{name: (name,) for name in self.merging.whole}}

    def files(self, folder: Path) -> ModelFiles:
        """The files, yet to be filled."""
        tensors: dict[str, Tensor] = {}
        for module, layer in self.merging.layers.items():
            rows, columns = layer.matrix.shape
            rank, dtype = self._rank(module), self.merging.job.dtype or layer.matrix.a.dtype
            b, a = (torch.empty(s, dtype=dtype, device="meta") for s in ((rows, rank), (rank, columns)))
            empty = LowRank(b, a)
            tensors |= dict(zip(layer.names, layer.shaped(empty), strict=True))
        for name, tensor in self.merging.whole.items():
            floating = tensor.is_floating_point()
            dtype = (self.merging.job.dtype or tensor.dtype) if floating else tensor.dtype
            tensors[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        return ModelFiles(folder, {ADAPTER_WEIGHTS: tensors}, "", {})

    def write(self, part: str, out: Sequence[Tensor]) -> float:
        """Writes a layer, or a whole tensor; returns the relative error of what is stored."""
        if part not in self.merging.layers:
            self.merging.merge_whole(part, out[0])
            return 0.0
        layer, exact, dtype = self.merging.layers[part], self.merging.matrix(part), out[0].dtype
        rank = self._rank(part)
        found = nearest(exact, rank) if isinstance(exact, Tensor) else exact.cut(rank)
        stored = _padded(found, rank).to(dtype)
        for tensor, factor in zip(out, layer.shaped(stored), strict=True):
            tensor.copy_(factor)
        if not all(map(all_finite, out)):
            raise ValueError(f"{part}: the merge does not fit {dtype}; choose a wider --dtype")
        self.scales[part].fill_(stored.scale)
        is_same = found is exact and stored.b.dtype == found.b.dtype and stored.a.dtype == found.a.dtype
        return 0.0 if is_same else relative_error(stored, exact)

    def finish(self, folder: Path) -> dict[str, str]:
        """Writes peft's configuration and what lies beside it; returns the SHA-256 of each file."""
        write_json(folder / ADAPTER_CONFIG, self._config())
        base = self.like.path
        extras = {p.relative_to(base).as_posix(): p for p in self.like.extras if p.name != ADAPTER_CONFIG}
        return {ADAPTER_CONFIG: file_checksum(folder / ADAPTER_CONFIG), **copy_extras(extras, folder)}

    def _rank(self, module: str) -> int:
        merging = self.merging
        rows, columns = merging.layers[module].matrix.shape
        held = [a.layers[module].matrix.rank for a in merging.adapters if module in a.layers]
        whole = sum(held) if merging.weights else min(sum(held), rows, columns)
        return whole if merging.job.rank is None else min(merging.job.rank, whole)

    def _config(self) -> dict[str, Any]:
        merging, config = self.merging, dict(self.merging.newest.config)
        ranks = {plain(module): self._rank(module) for module in merging.layers}
        alphas = {plain(m): float(self.scales[m]) * self._rank(m) for m in merging.layers}
        rank, alpha = (_commonest(list(found.values())) for found in (ranks, alphas))
        own = [adapter.layers.keys() for adapter in merging.adapters]
        targets = [adapter.config.get("target_modules") for adapter in merging.adapters]
        if not all(names == own[-1] for names in own) or any(
            unordered(names) != unordered(targets[-1]) for names in targets
        ):
            config |= {"target_modules": sorted(ranks), "exclude_modules": None}
            config |= {"layers_to_transform": None, "layers_pattern": None}
        saved = [name for a in merging.adapters for name in a.config.get("modules_to_save") or []]
        return {
            **config,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: found for name, found in ranks.items() if found != rank},
            "alpha_pattern": {name: found for name, found in alphas.items() if found != alpha},
            "use_rslora": False,
            "init_lora_weights": True,
            "modules_to_save": list(dict.fromkeys(saved)) or None,
            "inference_mode": True,
            **{name: None for name in _OF_INITIALISATION if name in config},
        }


class IntoBase:
    """Writes the base model with the merged ΔW added."""

    def __init__(self, merging: AdapterMerge) -> None:
        if merging.base is None:
            raise ValueError("--as model needs the base model: give --base")
        if how := merging.initialisations:
            raise ValueError(
                f"the adapters were initialised by {', '.join(sorted(how))}, which changes the base: "
                "their ΔW does not fit the base as it was"
            )
        self.merging, self.like = merging, merging.base
        self.tied = dict(merging.base.tied)
        if any(layer.is_embedding for layer in merging.layers.values()):
            warn(
                "the adapters change an embedding: if the model's output layer shares its weight, the sum "
                "changes that, too, which the adapters do not"
            )
        self._fan_in_fan_out = bool(merging.newest.config.get("fan_in_fan_out"))
        own = {f"{plain(module)}.weight": module for module in merging.layers}
        whole = {plain(name): name for name in merging.whole}
        names = _names_in_base([*own, *whole], merging.base)
        self.layers = {names[name]: module for name, module in own.items()}
        self.whole = {names[name]: full for name, full in whole.items()}
        shared = {*self.tied, *self.tied.values()}
        if both := next((name for name in (*self.layers, *self.whole) if name in shared), None):
            raise ValueError(
                f"{both} is one tensor with another weight of the base, but the adapter changes only one of "
                "them; keep the merge as an adapter (--as lora)"
            )

    def parts(self) -> dict[str, tuple[str, ...]]:
        """What is written together: a tensor of the base each."""
        return {self.layers.get(name, name): (name,) for name in self.like.tensors}

    def files(self, folder: Path) -> ModelFiles:
        """The files, yet to be filled."""
        job = self.merging.job
        tensors = {
            name: torch.empty(
                tensor.shape,
                dtype=job.dtype if job.dtype and tensor.is_floating_point() else tensor.dtype,
                device="meta",
            )
            for name, tensor in self.like.tensors.items()
        }
        shards, index = lay_out(tensors, self.like, str, job.max_shard_bytes)
        return ModelFiles(folder, shards, index, self.tied)

    def write(self, part: str, out: Sequence[Tensor]) -> float:
        """Writes a tensor; the error of a sum is its rounding, which is not told."""
        (tensor,) = out
        if part in self.merging.layers:
            name = next(n for n, module in self.layers.items() if module == part)
            found, weight = self.merging.matrix(part), self.like.tensors[name]
            delta = found.dense() if isinstance(found, LowRank) else found
            try:
                added = self.merging.layers[part].as_weight(delta, weight, self._fan_in_fan_out)
            except ValueError as error:
                raise ValueError(f"{name} of {self.like.path}: {error}") from None
            tensor.copy_(weight.to(added.dtype) + added)
        elif part in self.whole:
            self.merging.merge_whole(self.whole[part], tensor)
        else:
            tensor.copy_(self.like.tensors[part])
        if not all_finite(tensor):
            raise ValueError(
                f"tensor {part!r}: the merge does not fit {tensor.dtype}, or the base is not finite"
            )
        return 0.0

    def finish(self, folder: Path) -> dict[str, str]:
        """Copies what lies beside the base's weights; returns the SHA-256 of each file."""
        extras = {path.relative_to(self.like.path).as_posix(): path for path in self.like.extras}
        found = copy_extras(extras, folder)
        if self.like.plain_config is not None:
            write_json(folder / CONFIG, self.like.plain_config)
            found[CONFIG] = file_checksum(folder / CONFIG)
        return found


def _names_in_base(names: Sequence[str], base: Checkpoint) -> dict[str, str]:
    """What adapted tensors are called in the base's files, which may have another prefix before all names.

    Raises:
        ValueError: if one is not there.
    """
    known = {*base.tensors, *base.tied}
    longer = [name.removesuffix(names[0]) for name in known if name.endswith(f".{names[0]}")]
    parts = names[0].split(".")
    shorter = [".".join(parts[:count]) + "." for count in range(1, len(parts) - 1)]
    for before in ["", *longer]:
        if all(before + name in known for name in names):
            return {name: before + name for name in names}
    for before in shorter:
        if all(name.removeprefix(before) in known for name in names):
            return {name: name.removeprefix(before) for name in names}
    missing = next((name for name in names if name not in known), names[0])
    raise ValueError(f"{base.path} has no {missing!r}: the adapters are of another model")


def _padded(matrix: LowRank, rank: int) -> LowRank:
    """The same matrix in factors of a larger rank."""
    missing = rank - matrix.rank
    if missing <= 0:
        return matrix
    b = torch.cat([matrix.b, matrix.b.new_zeros(matrix.shape[0], missing)], 1)
    return LowRank(b, torch.cat([matrix.a, matrix.a.new_zeros(missing, matrix.shape[1])]), matrix.scale)


def _commonest(values: Sequence[Any]) -> Any:
    return max(set(values), key=lambda value: (values.count(value), value)) if values else 1
