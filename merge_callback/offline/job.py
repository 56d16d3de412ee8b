"""What a merge of files is to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from merge_callback.merging import MergeMethod


@dataclass(frozen=True)
class OutputNames:
    """What the merged tensors are called: a prefix taken off, then one put before.

    By default the first is what the run of a snapshot takes off, and else nothing.
    """

    strip: str | None = None
    prefix: str = ""

    def check(self, names: Sequence[str], published: Sequence[str]) -> None:
        """Makes sure that every tensor has a name of its own.

        Args:
            names: that any of the checkpoints has.
            published: those in the output.

        Raises:
            ValueError: if two would share one, or no name begins with the prefix to take off.
        """
        if self.strip and not any(name.startswith(self.strip) for name in names):
            raise ValueError(
                f"--strip-prefix {self.strip!r} begins no tensor's name; the first is {names[0]!r}"
            )
        twice = sorted(name for name, count in Counter(published).items() if count > 1)
        if twice or "__metadata__" in published:
            raise ValueError(f"the prefixes give several tensors one name, or a reserved one: {twice[:3]}")


@dataclass(frozen=True)
class Job:
    """What to merge, how, and what to write.

    Args:
        checkpoints: oldest first.
        method: how.
        base: θ_init of the methods on task vectors, if it is not the first checkpoint.
        dtype: of the merged floating-point tensors; default: that of the last checkpoint.
        exclude: ``fnmatch`` patterns of names that are copied from the last checkpoint.
        naming: of the output's tensors.
        max_shard_bytes: a larger model is written in several files with an index; default: the files of the
            last checkpoint, if that is a model's folder, else 5 GB.
        state_key: where in the checkpoints the weights are, if there is more than one place.
        kind: files for ``safetensors`` and ``from_pretrained``, or one Lightning checkpoint. Of adapters:
            ``lora`` for an adapter, as by default, or ``model`` for the base with what they add.
        optimizer_state: merge the moments of the optimizers, too, so that training can go on from the output.
        rank: of the merged adapter, if it is to be of less than the sum of the ranks, which is exact.
        force: replace what is there.
        progress: show a bar.
        workers: processes that merge, one tensor each at a time; 1: this one.
        provenance: further entries of ``merge.json``.
        begun: is called once the checkpoints are found to belong together.
    """

    checkpoints: Sequence[Path]
    method: MergeMethod
    base: Path | None = None
    dtype: torch.dtype | None = None
    exclude: Sequence[str] = ()
    naming: OutputNames = field(default_factory=OutputNames)
    max_shard_bytes: int | None = None
    state_key: str | None = None
    kind: Literal["safetensors", "lightning", "lora", "model"] = "safetensors"
    optimizer_state: bool = False
    rank: int | None = None
    force: bool = False
    progress: bool = False
    workers: int = 1
    provenance: Mapping[str, Any] = field(default_factory=dict)
    begun: Callable[[], None] = lambda: None
