"""The finished experts of a base, mapped from their files, and their merge with one that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.analysis.interference import (
    Counts,
    count_tensor,
    magnitude_ratio,
    overlap,
    sign_conflict,
    variance,
)
from merge_callback.checkpoints.checkpoint import Checkpoint
from merge_callback.checkpoints.lora import PREFIX, LoraAdapter, LoraFactors, plain
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.merging import Inputs, MergeMethod, Shard, Sma, Trajectory
from merge_callback.merging.low_rank import FACTOR
from merge_callback.publish.adapter import Adapter
from merge_callback.publish.export import Naming
from merge_callback.sharding import Piece, Sharding
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import ModelTensors, clean_name
from merge_callback.snapshots.layout import Layout

_TOP = 20.0  # per cent of a task vector that interference is measured over ([LIM], App. I)


@dataclass(frozen=True)
class _Place:
    """A tensor that is merged.

    Args:
        name: in the files.
        target: the live tensor that holds the expert's value, and receives the merge.
        base: gives θ_init.
        delta: gives what a live adapter adds to the live tensor, in its shape; ``None`` if it has none there.
    """

    name: str
    target: str
    base: Callable[[], Tensor]
    delta: Callable[[], Tensor] | None


class Siblings:
    """Finished experts, and the base that they and the live model began as.

    A tensor is merged if the base has it, in its shape; a head that only the live model has stays as it is. A
    live model with LoRA adapters counts as its base plus what the adapter adds, and so do siblings that are
    adapters: all that is merged is whole weights. Each rank merges the part that it keeps.

    Args:
        base: a checkpoint of any known format; ``None`` if the live model and all siblings are adapters,
            whose base is the live model's frozen weights.
        paths: of the experts: checkpoints or LoRA adapters.
        model: the live model's tensors.
        naming: what the files call them.
        sharding: which part of each this rank keeps.
        layout: of the tensors that can be merged.
        exclude: patterns of names that stay the live model's.

    Raises:
        ValueError: if a file has no tensor of the model, lacks one that the base has, or has another shape.
        OSError: for a file that is missing or unreadable.
    """

    def __init__(
        self,
        base: Path | None,
        paths: Sequence[Path],
        model: ModelTensors,
        naming: Naming,
        sharding: Sharding,
        layout: Layout,
        exclude: Sequence[str] = (),
    ) -> None:
        self.names = _short_names(paths)
        self._sharding, self._layout = sharding, layout
        self._adapter = naming.adapter
        self._zeroed = [n for n in model.tensors if (f := FACTOR.fullmatch(n)) and f["factor"] == "B"]
        if self._zeroed and self._adapter is None:
            raise ValueError("experts=… needs a model whose one LoRA adapter was put in by peft")
        if any(not piece.is_all for name, piece in model.pieces.items() if FACTOR.fullmatch(name)):
            raise ValueError("experts=… can't merge a LoRA adapter whose factors are sharded (FSDP); use DDP")
        rename = partial(_file_name, naming=naming)
        prefix = self._adapter.prefix if self._adapter else naming.prefix
        self._open = partial(_Expert.of, model=model, rename=rename, prefix=prefix)
        self._experts = [self._open(path) for path in paths]
        places = list(self._find_places(base, model, rename, exclude))
        if not places:
            raise ValueError(f"base={str(base)!r} has no tensor of this model")
        self._places = [place for place in places if place.target not in model.buffers]
        self._statistics = [place for place in places if place.target in model.buffers]
        for place in places:
            for expert in self._experts:
                expert.check(place.name, place.base())
        self._check_layers(naming.adapter)
        targets = {place.target for place in self._places}
        self.apart = [
            name
            for name in model.tensors.keys() - model.frozen - model.buffers - targets
            if not FACTOR.fullmatch(name)
        ]
        """What trains and is not merged, because the base lacks it, or has it in another shape."""
        if self.apart and self._adapter:
            raise ValueError(f"experts=… merges LoRA adapters only; this one also trains {min(self.apart)!r}")
        self._mine: Arena | None = None
        self._out: Arena | None = None

    def _check_layers(self, live: Adapter | None) -> None:
        """Makes sure that what adapters add is merged, all of it.

        Raises:
            ValueError: for a layer whose weight is not.
        """
        merged = {place.name for place in self._places}
        told = [(name, "the live adapter") for name in (_live_deltas(live) if live else {})]
        told += [(name, str(expert.path)) for expert in self._experts for name in expert.layers]
        for name, which in told:
            if name not in merged:
                raise ValueError(
                    f"{which} adds to {name!r}, which is not merged: the model has no such weight (does it "
                    "need a strip_prefix=?), it is quantised, or exclude= leaves it out"
                )

    def take(self, model: ModelTensors) -> None:
        """Copies the live weights, which are merged from now on."""
        if self._mine is None:
            self._mine, self._out = (Arena.empty(self._layout.native) for _ in range(2))
        self._mine.copy_from(self._sharding.own(model.tensors))

    def merge(self, method: MergeMethod) -> Arena:
        """The merge of the live weights, as taken, with the siblings; overwritten by the next one.

        Methods on task vectors start from the base. The live expert comes first. Of buffers it is the mean.
        """
        assert self._mine is not None
        assert self._out is not None
        self._out.copy_from(self._mine.own_tensors())
        out, trajectory = self._out.own_tensors(), Trajectory.even(1 + len(self._experts))
        # Running statistics are no task vectors: their sum may be a negative variance.
        for how, places in ((method, self._places), (Sma(), self._statistics)):
            inputs = _Repeated(partial(self._inputs, places))
            survey = how.survey(inputs, trajectory)
            for place, each in zip(places, inputs, strict=True):
                how.merge(each, out[place.target].view(-1), trajectory, survey)
        for name in self._zeroed:  # the merged weights have all that the adapter added
            out[name].zero_()
        return self._out

    def interference(self) -> dict[str, float]:
        """How much the live task vector and those of the siblings interfere, on the first rank.

        Returns:
            ``<sibling>/sign_conflict`` and ``<sibling>/overlap`` in per cent, ``<sibling>/magnitude_ratio``
            and, of all together, ``variance``; empty while the live model is the base.
        """
        assert self._mine is not None
        targets = [place.target for place in self._places]
        whole = self._sharding.gather(self._mine.own_tensors(), targets)
        counts: list[Counts] = []
        for place, live in zip(self._places, whole, strict=True):
            if self._sharding.ranks.is_first and live.numel():
                counts.append(count_tensor([t.reshape(-1) for t in self._tensors(place, live)], _TOP))
        if not counts or not (total := reduce(add, counts)).overlap[0, 0]:
            return {}
        measures = {
            "sign_conflict": sign_conflict(total),
            "overlap": overlap(total),
            "magnitude_ratio": magnitude_ratio(total),
        }
        found = {
            f"{sibling}/{measure}": float(values[0, i])
            for i, sibling in enumerate(self.names, 1)
            for measure, values in measures.items()
        }
        return {**found, "variance": variance(total)}

    def _find_places(
        self, base: Path | None, model: ModelTensors, rename: Callable[[str], str], exclude: Sequence[str]
    ) -> Iterator[_Place]:
        known = self._open(base) if base is not None else None
        if known is not None and known.adapter is not None:
            raise ValueError(f"base={str(base)!r} is an adapter; name the model that it adapts")
        deltas = _live_deltas(self._adapter) if self._adapter else {}
        left = model.matching(exclude)
        for target, (group, _) in self._layout.places.items():
            if not group.dtype.is_floating_point or target in left or FACTOR.fullmatch(target):
                continue
            name = rename(target)
            if self._adapter and ".original_module." in target:
                continue  # what modules_to_save has replaced
            if known is not None:
                begin = partial(known.weight, name, torch.empty(0))
                if not known.has(name) or begin().shape != model.pieces[target].whole:
                    continue  # a head of its own, perhaps under the name of the base's
            elif target in model.frozen or ".modules_to_save." in target:
                begin = partial(_untrained, model, target)
            else:
                continue  # nobody knows what it began as
            is_touched = target not in model.frozen or name in deltas
            if is_touched or any(expert.changes(name) for expert in self._experts):
                yield _Place(name, target, begin, deltas.get(name))

    def _inputs(self, places: Sequence[_Place]) -> Iterator[Inputs]:
        assert self._mine is not None
        several = self._sharding.ranks.size > 1
        mine = self._mine.own_tensors()
        for place in places:
            piece = self._sharding.kept[place.target]
            base, live, *others = self._tensors(place, mine[place.target], piece)
            shard = Shard(piece, self._sharding.ranks) if several else None
            yield Inputs(place.name, [live, *others], base, shard)

    def _tensors(self, place: _Place, live: Tensor, piece: Piece | None = None) -> list[Tensor]:
        """θ_init, the live expert and its siblings, of one dtype; flat, if a part is asked for."""
        base = place.base()
        tensors = [base, *(expert.weight(place.name, base) for expert in self._experts)]
        delta = [place.delta().cpu()] if place.delta else []
        if piece is not None:
            tensors, delta = ([piece.take(t) for t in ts] for ts in (tensors, delta))
            live = live.reshape(-1)
        kind = reduce(torch.promote_types, [t.dtype for t in (live, *tensors, *delta)])
        live = live.to(kind) + delta[0].to(kind) if delta else live.to(kind)
        base, *others = (t.to(kind) for t in tensors)
        return [base, live, *others]


class _Expert:
    """A checkpoint under the names that the others have, or what an adapter makes of the base."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], adapter: LoraAdapter | None) -> None:
        self.path, self.adapter = checkpoint.path, adapter
        self._checkpoint, self._names = checkpoint, names
        self.layers: dict[str, LoraFactors] = {}
        """By the name of the weight that they add to."""
        if adapter is not None:
            if adapter.changes_the_base:
                raise ValueError(
                    f"{self.path}: initialised as {adapter.changes_the_base!r}, this adapter is relative to "
                    "a changed base, so it can't be merged with others"
                )
            self.layers = {f"{plain(module)}.weight": layer for module, layer in adapter.layers.items()}
            self._whole = {plain(name): tensor for name, tensor in adapter.whole.items()}
            self._fan = bool(adapter.config.get("fan_in_fan_out"))

    @classmethod
    def of(cls, path: Path, model: ModelTensors, rename: Callable[[str], str], prefix: str) -> _Expert:
        """Opens a checkpoint, and finds out whether it has the published names, or a prefix before them."""
        checkpoint = open_checkpoint(path)
        if adapter := LoraAdapter.of(checkpoint):
            return cls(checkpoint, {}, adapter)
        stored = {**{name: name for name in checkpoint.tensors}, **checkpoint.tied}
        stored = {**{clean_name(name): kept for name, kept in stored.items()}, **stored}
        if all(name.startswith("module.") for name in stored):  # of DistributedDataParallel
            stored = {**{name.removeprefix("module."): kept for name, kept in stored.items()}, **stored}
        alias = {kept: other for other, kept in model.tied.items()}
        found: list[dict[str, str]] = []
        for before in ("", prefix):
            names: dict[str, str] = {}
            for name in model.tensors:
                for own in (name, alias.get(name)):
                    if own is not None and (there := stored.get(before + rename(own))) is not None:
                        names.setdefault(rename(name), there)
            found.append(names)
        names = max(found, key=len)
        if not names:
            raise ValueError(
                f"{path} has no tensor of this model; it has {next(iter(stored), None)!r}, the model has "
                f"{next(map(rename, model.tensors), None)!r}"
            )
        return cls(checkpoint, names, None)

    def has(self, name: str) -> bool:
        """Whether it holds a whole tensor of that name."""
        return name in self._names

    def changes(self, name: str) -> bool:
        """Whether its tensor may be another than the base's."""
        return self.adapter is None or name in self.layers or name in self._whole

    def weight(self, name: str, base: Tensor) -> Tensor:
        """Its tensor; of an adapter, the base's and what it adds to it, in fp32."""
        if self.adapter is None:
            tensor = self._checkpoint.tensors[self._names[name]]
            return torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if name in self._whole:
            return self._whole[name]
        if name not in self.layers:
            return base
        layer = self.layers[name]
        return base + layer.as_weight(layer.matrix.dense(), base, self._fan)

    def check(self, name: str, base: Tensor) -> None:
        """Makes sure that it can be merged.

        Raises:
            ValueError: if it lacks the tensor, or has another shape.
        """
        if self.adapter is None and name not in self._names:
            raise ValueError(
                f"{self.path} lacks {name!r}, which the base has; is it of another model? If not, exclude= "
                "leaves such tensors as they are"
            )
        if layer := self.layers.get(name):
            layer.as_weight(torch.empty(layer.matrix.shape, device="meta"), base, self._fan)
        elif (found := self.weight(name, base).shape) != base.shape:
            raise ValueError(f"{self.path}: {name!r} is {tuple(found)}, the base's {tuple(base.shape)}")


class _Repeated:
    """What can be iterated several times, and is made each time."""

    def __init__(self, make: Callable[[], Iterator[Inputs]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Inputs]:
        return self._make()


def _file_name(name: str, naming: Naming) -> str:
    """What a file calls a live tensor: a peft model's as the model without the adapter has it."""
    if naming.adapter is None:
        return naming.published(name)
    name = name.removeprefix(naming.adapter.prefix).removeprefix(PREFIX)
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{naming.adapter.name}.", ".")


def _live_deltas(adapter: Adapter) -> dict[str, Callable[[], Tensor]]:
    """What the live adapter adds to each layer's weight, by the weight's name in files.

    Raises:
        ValueError: for DoRA, which also scales each row of the whole weight, and for factors with a bias.
    """
    from peft.tuners.lora import LoraLayer

    found: dict[str, Callable[[], Tensor]] = {}
    for name, part in adapter.model.named_modules():
        if isinstance(part, LoraLayer) and adapter.name in {*part.lora_A, *part.lora_embedding_A}:
            if part.use_dora.get(adapter.name) or part.lora_bias.get(adapter.name):
                raise ValueError("experts=… can't merge DoRA, or factors with a bias: they are no sum of ΔW")
            layer: Any = part  # a base class that lacks what all its layers have
            found[f"{plain(name)}.weight"] = partial(_detached, layer.get_delta_weight, adapter.name)
    return found


def _detached(delta: Callable[[str], Tensor], adapter: str) -> Tensor:
    with torch.no_grad():
        return delta(adapter).detach()


def _untrained(model: ModelTensors, target: str) -> Tensor:
    """What a live tensor was before training: itself if it is frozen, else what peft has copied it from."""
    head, found, tail = target.partition(".modules_to_save.")
    name = f"{head}.original_module.{tail.partition('.')[2]}" if found else target
    return model.tensors[name].cpu()


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell the experts apart: the last parts of their paths, as many as that takes."""
    parts = [path.absolute().parts for path in paths]
    depth = next((d for d in range(1, 20) if len({p[-d:] for p in parts}) == len(parts)), 1)
    return ["/".join(p[-depth:]) for p in parts]
