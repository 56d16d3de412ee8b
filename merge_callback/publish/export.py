"""A merge under the names its users load it by."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merge_callback.publish.emission import Publisher
from merge_callback.publish.hugging_face import find_pretrained, write_config
from merge_callback.publish.provenance import emission_name, provenance
from merge_callback.sharding import Ranks, Sharding
from merge_callback.snapshots.capture import tensor_names
from merge_callback.snapshots.merge import Merge


@dataclass(frozen=True)
class Naming:
    """The prefix taken off published names, and what else a model's loader needs beside the weights."""

    prefix: str = ""
    add_files: Callable[[Path], None] | None = None

    @classmethod
    def of(cls, module: nn.Module, strip_prefix: str | None) -> Naming:
        """The naming for ``module``: its Hugging Face model's own, where it wraps one, else as asked.

        Raises:
            ValueError: where ``strip_prefix`` begins no tensor's name.
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
            return cls()  # a second head beside the Hugging Face model's own, say
        add_files = partial(write_config, found[1]) if found and found[0] == prefix else None
        return cls(prefix, add_files)

    def published(self, name: str) -> str:
        """A tensor's name in the emission."""
        return name.removeprefix(self.prefix)

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
        return {"tied": dict(tied), "stripped_prefix": self.prefix, "copied": sorted(copied), "files": texts}


def _names_that_meet(names: Sequence[str], prefix: str) -> list[str]:
    stripped = [name.removeprefix(prefix) for name in names if prefix and name.startswith(prefix)]
    return [name for name in stripped if name in names]


def prepare_emission(
    publisher: Publisher,
    merge: Merge,
    sharding: Sharding,
    tied: Mapping[str, str],
    naming: Naming,
    ranks: Ranks | None = None,
    distributed: bool = False,
    **record: Any,
) -> Callable[[], Path | None]:
    """Settles what a merge says of itself, and leaves its weights to be written later.

    Args:
        publisher: where to.
        merge: what; this rank's part of it.
        sharding: which part that is.
        tied: further names of shared tensors, each with the name it is kept under.
        naming: how its tensors are called outside.
        ranks: to talk through, from another thread than training's.
        distributed: write the format of ``torch.distributed.checkpoint``, all ranks at once.
        **record: further entries of ``merge.json``; ``diversity`` among them.

    Returns:
        What publishes it, to be called on all ranks: the first one writes what all of them send, tensor by
        tensor, and gets the folder. There it raises OSError where it can't be written.
    """
    ranks = ranks or sharding.ranks
    content = provenance(
        merge.method,
        merge.snapshots,
        merge.weights,
        record.pop("diversity", None),
        copied=merge.copied,
        stripped_prefix=naming.prefix,
        **record,
    )
    name = emission_name(merge.method.name, merge.step, merge.snapshots[-1].tokens)
    own = merge.arena.tensors()
    dtypes = {name: tensor.dtype for name, tensor in own.items()}
    whole = {n: torch.empty(sharding.wholes[n], dtype=d, device="meta") for n, d in dtypes.items()}
    published = {naming.published(n): tensor for n, tensor in whole.items()}
    aliases = {naming.published(alias): naming.published(kept) for alias, kept in tied.items()}

    def publish_safetensors() -> Path | None:
        values = sharding.gather(own, publisher.written(whole), ranks)
        try:
            if not ranks.is_first:
                return None
            write = partial(publisher.write_safetensors, tensors=published, values=values, tied=aliases)
            return publisher.publish(name, write, content, aliases, naming.add_files)
        finally:
            for _ in values:  # the other ranks send all they have, whatever became of it
                pass

    def publish_distributed() -> Path | None:
        from merge_callback.publish.distributed import write_distributed  # costs most of a second

        parts = {naming.published(n): tensor for n, tensor in own.items()}
        pieces = {naming.published(n): sharding.kept[n] for n in dtypes}
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
            return publisher.publish(name, write, content, aliases, naming.add_files)
        finally:
            if folder is None:  # the others wait to be told where to write
                ranks.from_first(None)

    return publish_distributed if distributed else publish_safetensors
