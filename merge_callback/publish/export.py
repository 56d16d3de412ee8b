"""A merge under the names its users load it by."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_callback.checkpoints.card import public_name
from merge_callback.publish.adapter import Adapter
from merge_callback.publish.emission import ModelFiles, Publisher
from merge_callback.publish.hugging_face import find_pretrained, write_config
from merge_callback.publish.provenance import emission_name, provenance
from merge_callback.sharding import Ranks, Sharding
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.capture import complex_names, tensor_names
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.mapped_tensors import map_safetensors
from merge_callback.snapshots.merge import Merge

_PIECE = 1 << 26  # bytes of an emission that are read out of a device at once


@dataclass(frozen=True)
class Naming:
    """The prefix taken off published names, and what else a model's loader needs beside the weights.

    ``adapter`` is that of peft, if the module trains one. ``complex`` names the complex tensors, which a
    window keeps as real and imaginary parts. ``base_model`` is what a hub calls the model that was loaded.
    """

    prefix: str = ""
    add_files: Callable[[Path], None] | None = None
    further_files: Mapping[str, bytes] = field(default_factory=dict)
    adapter: Adapter | None = None
    complex: frozenset[str] = frozenset()
    base_model: str = ""

    @classmethod
    def of(
        cls, module: nn.Module, strip_prefix: str | None, further_files: Mapping[str, bytes] | None = None
    ) -> Naming:
        """The naming for ``module``: its Hugging Face model's own, where it wraps one, else as asked.

        Args:
            module: the model.
            strip_prefix: what the user asks to take off.
            further_files: that are published as they are, by name.

        Raises:
            ValueError: if ``strip_prefix`` begins no tensor's name.
        """
        names = tensor_names(module)
        if strip_prefix and not any(name.startswith(strip_prefix) for name in names):
            raise ValueError(
                f"strip_prefix={strip_prefix!r} begins no tensor's name of this model; "
                f"its first is {next(iter(names), None)!r}"
            )
        found = find_pretrained(module)
        prefix = strip_prefix if strip_prefix is not None else found[0] if found else ""
        if met := _names_that_meet(names, prefix):
            if strip_prefix:
                raise ValueError(
                    f"strip_prefix={strip_prefix!r} would give two tensors of this model one name: "
                    f"{met[:3]}; publish with the full names, or rename one of each"
                )
            prefix = ""  # a second head beside the Hugging Face model's own, say
        add_files = partial(write_config, found[1]) if found and found[0] == prefix else None
        base = public_name(getattr(found[1], "name_or_path", None)) if found else ""
        return cls(prefix, add_files, further_files or {}, Adapter.of(module), complex_names(module), base)

    def published(self, name: str) -> str:
        """A tensor's name in the emission."""
        return name.removeprefix(self.prefix)

    def write_files(self, folder: Path) -> None:
        """Writes all that is published beside the weights."""
        for name, content in self.further_files.items():
            (folder / name).write_bytes(content)
        if self.add_files is not None:
            self.add_files(folder)

    def record(self, tied: Mapping[str, str], copied: Collection[str]) -> dict[str, Any]:
        """What makes an emission of a merge, beside the weights, for a merge of the snapshots' files.

        Args:
            tied: further names of shared tensors in the module, each with the name it is kept under.
            copied: names of the tensors that are not averaged.
        """
        texts = {}
        if self.add_files is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.add_files(Path(folder))
                texts = {path.name: path.read_text() for path in sorted(Path(folder).iterdir())}
        return {
            "tied": dict(tied),
            "stripped_prefix": self.prefix,
            "copied": sorted(copied),
            "files": texts,
            **({"complex": sorted(self.complex)} if self.complex else {}),
            **({"base_model": self.base_model} if self.base_model else {}),
        }

    def as_they_are(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A window's tensors with the dtypes and shapes that the model's have."""
        return {n: torch.view_as_complex(t) if n in self.complex else t for n, t in tensors.items()}


def _names_that_meet(names: Sequence[str], prefix: str) -> list[str]:
    stripped = [name.removeprefix(prefix) for name in names if prefix and name.startswith(prefix)]
    return [name for name in stripped if name in names]


class Exporter:
    """Publishes the merges of a run, under the names their users load them by.

    Args:
        publisher: where to.
        sharding: which part of each tensor this rank has.
        naming: how the tensors are called outside.
        ranks: to talk through, from another thread than training's.
        distributed: write the format of ``torch.distributed.checkpoint``, all ranks at once.
    """

    def __init__(
        self,
        publisher: Publisher,
        sharding: Sharding,
        naming: Naming,
        ranks: Ranks | None = None,
        distributed: bool = False,
    ) -> None:
        self._publisher, self._sharding, self._naming = publisher, sharding, naming
        self._ranks = ranks or sharding.ranks
        self._distributed = distributed
        self._model: _Model | None = None

    def prepare(self, merge: Merge, tied: Mapping[str, str], **record: Any) -> Callable[[], Path | None]:
        """Settles what a merge says of itself, and leaves its weights to be written later.

        Args:
            merge: what; this rank's part of it.
            tied: further names of shared tensors, each with the name it is kept under.
            **record: further entries of ``merge.json``; ``diversity`` among them.

        Returns:
            What publishes it, to be called on all ranks: the first one writes what all of them send, tensor
            by tensor, and gets the folder. There it raises OSError if it can't be written.
        """
        content = provenance(
            merge.method,
            merge.snapshots,
            merge.weights,
            record.pop("diversity", None),
            copied=merge.copied,
            **({"lora": {"products": merge.lora_products}} if merge.lora_products else {}),
            **({"recomputed": merge.recomputed} if merge.recomputed else {}),
            **({"base_model": self._naming.base_model} if self._naming.base_model else {}),
            stripped_prefix=self._naming.prefix,
            **record,
        )
        outside = self._naming.published
        aliases = {outside(alias): outside(kept) for alias, kept in tied.items()}
        publish = partial(
            self._publisher.publish,
            emission_name(merge.method.name, merge.step, merge.snapshots[-1].tokens),
            record=content,
            tied=aliases,
            add_files=self._naming.write_files,
        )
        if self._distributed:
            return partial(self._write_distributed, merge.arena, publish)
        if self._model is None or not self._model.is_of(merge.arena):
            self._model = _Model(merge.arena, self._sharding, self._naming, self._publisher.max_shard_bytes)
        return partial(self._write_safetensors, self._model, merge.arena, aliases, publish)

    def _write_safetensors(
        self, model: _Model, arena: Arena, aliases: Mapping[str, str], publish: Callable[..., Path]
    ) -> Path | None:
        values = model.values(arena, self._ranks)
        try:
            if not self._ranks.is_first:
                return None
            return publish(write=partial(self._write_files, model=model, values=values, aliases=aliases))
        finally:
            for _ in values:  # the other ranks send all they have, whatever became of it
                pass

    def _write_files(
        self, folder: Path, model: _Model, values: Iterator[Tensor], aliases: Mapping[str, str]
    ) -> dict[str, str]:
        checksums = self._publisher.write_safetensors(folder, model.files, values, aliases)
        if self._naming.adapter is not None:  # out of the files, which all ranks have had a part in
            files = [map_safetensors(folder / name)[0] for name in model.files.files]
            tensors = {model.inside[name]: tensor for file in files for name, tensor in file.items()}
            self._naming.adapter.write(folder, tensors)
        return checksums

    def _write_distributed(self, arena: Arena, publish: Callable[..., Path]) -> Path | None:
        from merge_callback.publish.distributed import write_distributed  # costs most of a second

        outside, ranks = self._naming.published, self._ranks
        parts, pieces = {}, {}
        for name, tensor in arena.tensors().items():
            piece, is_complex = self._sharding.kept[name], name in self._naming.complex
            parts[outside(name)] = torch.view_as_complex(tensor.view(-1, 2)) if is_complex else tensor
            pieces[outside(name)] = piece.of_complex if is_complex else piece
        folder: Path | None = None

        def write(draft: Path) -> dict[str, str]:
            nonlocal folder
            folder = ranks.from_first(draft)
            return write_distributed(folder, parts, pieces, ranks)

        if not ranks.is_first:
            if (draft := ranks.from_first(folder)) is not None:
                write_distributed(draft, parts, pieces, ranks)
            return None
        try:
            return publish(write=write)
        finally:
            if folder is None:  # the others wait to be told where to write
                ranks.from_first(None)


class _Model:
    """What all merges of one layout have in common: their files, and where what goes into these lies.

    It takes a second to work out for 20,000 tensors.
    """

    def __init__(self, arena: Arena, sharding: Sharding, naming: Naming, max_shard_bytes: int) -> None:
        self._sharding, self._layout, self._frozen = sharding, arena.layout, _frozen_layout(arena)
        places = {n: p for n, p in self._frozen.places.items() if n in arena.shared} if self._frozen else {}
        dtypes = {n: group.dtype for n, (group, _) in (*arena.layout.places.items(), *places.items())}
        whole = naming.as_they_are(
            {n: torch.empty(sharding.wholes[n], dtype=d, device="meta") for n, d in dtypes.items()}
        )
        self.files = ModelFiles({naming.published(n): t for n, t in whole.items()}, max_shard_bytes)
        self.inside = {naming.published(name): name for name in whole}
        self._names = [[self.inside[name] for name in shard] for shard in self.files.shards]
        self._spans = [arena.spans(shard) for shard in self._names] if sharding.ranks.size == 1 else []

    def is_of(self, arena: Arena) -> bool:
        """Whether a merge is one of these."""
        return arena.layout is self._layout and _frozen_layout(arena) is self._frozen

    def values(self, arena: Arena, ranks: Ranks) -> Iterator[Tensor]:
        """The whole tensors on the first rank, in the order of the files; neighbours in one piece."""
        if ranks.size > 1:
            return self._sharding.gather(arena.tensors(), chain.from_iterable(self._names), ranks)
        spans = (arena.bytes_of(*span) for shard in self._spans for span in shard)
        return (piece.cpu() for span in spans for piece in torch.split(span, _PIECE))


def _frozen_layout(arena: Arena) -> Layout | None:
    return arena.frozen.arena.layout if arena.frozen is not None else None
