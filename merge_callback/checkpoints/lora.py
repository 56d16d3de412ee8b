"""LoRA adapters as peft saves them: which tensors are the factors of which matrix, and at which scale."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint, read_json
from merge_callback.checkpoints.file_names import ADAPTER_CONFIG
from merge_callback.merging.low_rank import FACTOR, LowRank
from merge_callback.messages import warn

PREFIX = "base_model.model."
"""What peft puts before the names of the model's own modules."""

_LONGEST_PATTERN = 1000
_OTHER_MEANING = {
    "use_dora": "DoRA also scales each row of the whole weight, which depends on the base",
    "use_qalora": "QA-LoRA pools its inputs",
    "alora_invocation_tokens": "an activated LoRA acts on part of the tokens only",
    "target_parameters": "it adapts parameters of mixtures of experts, not layers",
    "lora_bias": "its factors have a bias, too",
    "layer_replication": "it repeats layers of the base",
    "use_bdlora": "its factors are block-diagonal",
    "velora_config": "its inputs are compressed",
    "monteclora_config": "its factors are random",
    "kasa_config": "it changes the base's weights, too",
    "arrow_config": "it is a router over other adapters",
    "megatron_config": "its layers are Megatron's",
    "trainable_token_indices": "it also replaces rows of the embedding",
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")
"""Initialisations that take something off the base's weights, which the adapter is relative to since then."""


@dataclass(frozen=True)
class LoraFactors:
    """One adapted layer.

    Args:
        names: of A and B in the file.
        matrix: what is added to the layer's weight, as a matrix: of a convolution the kernel's dimensions are
            A's columns; of an embedding it is the transpose.
        kernel: of a convolution, the shape of A beyond its rank; else empty.
        is_embedding: whether A and B are an embedding's.
    """

    names: tuple[str, str]
    matrix: LowRank
    kernel: tuple[int, ...] = ()
    is_embedding: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        """What has to be the same to be merged."""
        return self.matrix.shape, self.kernel, self.is_embedding, self.names

    def shaped(self, matrix: LowRank) -> tuple[Tensor, Tensor]:
        """The factors of another matrix for this layer, as A and B are saved."""
        a, b = matrix.a, matrix.b
        if self.kernel:
            return a.reshape(matrix.rank, *self.kernel), b.reshape(*b.shape, *(1 for _ in self.kernel[1:]))
        return a, b

    def as_weight(self, delta: Tensor, weight: Tensor, fan_in_fan_out: bool) -> Tensor:
        """A dense ``ΔW`` in the shape of the layer's weight.

        Raises:
            ValueError: if it does not fit.
        """
        if self.kernel:
            delta = delta.reshape(-1, *self.kernel)
        elif self.is_embedding or fan_in_fan_out:
            delta = delta.mT
        if delta.shape != weight.shape:
            raise ValueError(f"ΔW is {tuple(delta.shape)}, the base's weight {tuple(weight.shape)}")
        return delta


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter.

    Args:
        checkpoint: its folder.
        config: of peft.
        layers: the adapted ones, by the module's name in the file (with peft's prefix).
        whole: tensors that replace the base's (``modules_to_save``, biases), by their names in the file.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any] = field(repr=False)
    layers: Mapping[str, LoraFactors] = field(repr=False)
    whole: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> LoraAdapter | None:
        """A checkpoint as a LoRA adapter; ``None`` if it is something else.

        Raises:
            ValueError: for an adapter whose factors mean something else, or that lacks one.
        """
        if all(path.name != ADAPTER_CONFIG for path in checkpoint.extras):
            return None
        config = read_json(checkpoint.path, ADAPTER_CONFIG)
        if config.get("peft_type") != "LORA":
            return None
        found: dict[str, dict[str, str]] = {}
        whole = {}
        for name, tensor in checkpoint.tensors.items():
            if (named := FACTOR.fullmatch(name)) and named["rest"] in ("", ".weight"):
                found.setdefault(named["module"], {})[named["factor"]] = name
            else:
                whole[name] = tensor
        told = [why for option, why in _OTHER_MEANING.items() if config.get(option)]
        if any(name.endswith("lora_magnitude_vector") for name in whole):
            told.append(_OTHER_MEANING["use_dora"])
        if strange := [n for n in whole if "lora_" in n and "magnitude" not in n]:
            told.append(f"it has tensors like {strange[0]!r}")
        if told:
            raise ValueError(
                f"{checkpoint.path}: this adapter can't be merged as a sum of ΔW = s B A: {told[0]}"
            )
        layers = {module: _layer(checkpoint, config, module, names) for module, names in found.items()}
        return cls(checkpoint, config, layers, whole)

    @cached_property
    def changes_the_base(self) -> str:
        """The initialisation that has changed the base's weights; empty if the base is as it was."""
        how = str(self.config.get("init_lora_weights", "")).lower()
        return how if how.startswith(_CHANGES_THE_BASE) else ""


class DeltaWeights(Mapping[str, Tensor]):
    """What an adapter adds to the base, by the adapted weights' names: dense, each formed when asked for.

    Args:
        adapter: fp32 ``ΔW = s B A`` of its layers.
        layers: of all adapters it is compared with; ΔW is 0 where this one has none.
        whole: the names of tensors that replace the base's, to be taken as they are.
    """

    def __init__(
        self, adapter: LoraAdapter, layers: Mapping[str, LoraFactors], whole: Collection[str] = ()
    ) -> None:
        self._adapter, self._whole = adapter, {plain(name): name for name in whole}
        self._layers = {f"{plain(module)}.weight": (module, layer) for module, layer in layers.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._whole:
            return self._adapter.whole[self._whole[name]]
        module, layer = self._layers[name]
        if module in self._adapter.layers:
            return self._adapter.layers[module].matrix.dense()
        return torch.zeros(layer.matrix.shape)

    def __iter__(self) -> Iterator[str]:
        yield from self._layers
        yield from self._whole

    def __len__(self) -> int:
        return len(self._layers) + len(self._whole)


def adapters_of(checkpoints: Sequence[Checkpoint]) -> list[LoraAdapter]:
    """The LoRA adapters that checkpoints are; none if no checkpoint is one.

    Raises:
        ValueError: if only some are.
    """
    found = [(checkpoint, LoraAdapter.of(checkpoint)) for checkpoint in checkpoints]
    adapters = [adapter for _, adapter in found if adapter]
    others = [checkpoint for checkpoint, adapter in found if not adapter]
    if adapters and others:
        raise ValueError(f"{others[0].path} is no LoRA adapter, but {adapters[0].checkpoint.path} is")
    return adapters


def as_deltas(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Adapters as what they add to their base, for measures; other checkpoints as they are.

    Args:
        checkpoints: all adapters of LoRA, or none.

    Raises:
        ValueError: if only some are, if one can't be taken apart, or if they differ in the shapes of their
            layers, or in which tensors replace the base's.
    """
    adapters = adapters_of(checkpoints)
    return _measured(adapters) if adapters else list(checkpoints)


def as_task_vectors(checkpoints: Sequence[Checkpoint], base: Checkpoint | None) -> list[Checkpoint]:
    """Adapters as what they add to a base of zeros, which comes first; nothing if there are no adapters.

    Args:
        checkpoints: see `as_deltas`.
        base: the model; only needed for tensors that replace the base's, which are left out without it.

    Raises:
        ValueError: see `as_deltas`; or if the base lacks such a tensor.
    """
    adapters = adapters_of(checkpoints)
    if not adapters:
        return []
    path, known = (Path("their base"), {}) if base is None else (base.path, base.tensors)
    if base is None:
        if names := sorted({plain(name) for adapter in adapters for name in adapter.whole}):
            warn(f"left out, as they replace the base's tensors, and no --base was given: {', '.join(names)}")
        adapters = [replace(adapter, whole={}) for adapter in adapters]
    measured, first = _measured(adapters), adapters[0]
    if missing := next((plain(name) for name in first.whole if plain(name) not in known), None):
        raise ValueError(f"{path} has no {missing!r}: the adapters are of another model")
    own = {name: known[plain(name)] for name in first.whole}
    nothing = DeltaWeights(replace(first, layers={}, whole=own), _layers_of(adapters), own)
    return [replace(first.checkpoint, path=path, tensors=nothing), *measured]


def _measured(adapters: Sequence[LoraAdapter]) -> list[Checkpoint]:
    layers, first = _layers_of(adapters), adapters[0]
    for adapter in adapters:
        if other := adapter.whole.keys() ^ first.whole.keys():
            raise ValueError(
                f"{plain(min(other))} replaces the base's tensor in one of {first.checkpoint.path} and "
                f"{adapter.checkpoint.path} only; they can't be compared"
            )
    return [replace(a.checkpoint, tensors=DeltaWeights(a, layers, first.whole)) for a in adapters]


def _layers_of(adapters: Sequence[LoraAdapter]) -> dict[str, LoraFactors]:
    """All adapted layers, each as one of the adapters has it."""
    layers = {module: layer for adapter in adapters for module, layer in adapter.layers.items()}
    for adapter in adapters:
        for module, layer in adapter.layers.items():
            if layer.matrix.shape != layers[module].matrix.shape:
                raise ValueError(f"{module}: ΔW has another shape in {adapter.checkpoint.path}")
    return layers


def plain(name: str) -> str:
    """A name as the model without the adapter has it."""
    return name.removeprefix(PREFIX)


def _layer(
    checkpoint: Checkpoint, config: Mapping[str, Any], module: str, names: Mapping[str, str]
) -> LoraFactors:
    if missing := {"A", "B"} - names.keys():
        raise ValueError(f"{checkpoint.path}: {module} has no lora_{missing.pop()}")
    a, b = checkpoint.tensors[names["A"]], checkpoint.tensors[names["B"]]
    kernel = tuple(a.shape[1:]) if a.dim() > 2 else ()
    if min(a.dim(), b.dim()) < 2 or 0 in (*a.shape, *b.shape) or math.prod(b.shape[2:]) != 1:
        raise ValueError(
            f"{checkpoint.path}: the factors of {module} are {tuple(a.shape)} and {tuple(b.shape)}: they "
            "were saved in part, by one of several ranks, or by another library"
        )
    if b.shape[1] != a.shape[0]:
        raise ValueError(
            f"{checkpoint.path}: the factors of {module}, {tuple(a.shape)} and {tuple(b.shape)}, are those "
            "of a grouped convolution, or of no LoRA"
        )
    rank = a.shape[0]
    try:
        alpha = _of_pattern(config.get("alpha_pattern"), plain(module), config.get("lora_alpha", 8))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{checkpoint.path}: lora_alpha of {module} is {alpha!r}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    matrix = LowRank(b.reshape(b.shape[0], rank), a.reshape(rank, -1), scale)
    return LoraFactors((names["A"], names["B"]), matrix, kernel, ".lora_embedding_" in names["A"])


def _of_pattern(patterns: object, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name, as in peft.

    Raises:
        ValueError: for a pattern that is none, or whose matching may take for ever.
    """
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        try:
            re.compile(pattern)
        except (re.error, RecursionError):
            raise ValueError(f"alpha_pattern has {pattern!r:.100}, which is no pattern") from None
        if len(pattern) > _LONGEST_PATTERN or re.search(r"\)[*+{?]", pattern):
            raise ValueError(f"alpha_pattern has {pattern!r:.100}: a repeated group, or too long")
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
