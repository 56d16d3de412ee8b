"""Which part of every tensor each rank keeps in its window, and how the parts are put together again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from merge_callback.sharding.gathering import Gathering
from merge_callback.sharding.live import overwrite
from merge_callback.sharding.pieces import Piece, split_rows
from merge_callback.sharding.ranks import Ranks, destroy_groups


@dataclass(frozen=True)
class _Replicas:
    """The ranks that hold the same part of a tensor, and the rows of it that each of them keeps."""

    ranks: tuple[int, ...]
    bounds: tuple[int, ...]

    def rows(self, rank: int) -> tuple[int, int]:
        """The first row that a rank keeps of the part, and one past the last."""
        index = self.ranks.index(rank)
        return self.bounds[index], self.bounds[index + 1]


class Sharding:
    """How a model's tensors are distributed over the windows of all ranks.

    Of a sharded tensor, each rank keeps its own shard. Replicated tensors (all of a model under DDP, the
    replicas of a hybrid sharding, tensors that tensor parallelism does not split) are split by rows, and each
    row is kept by one rank, so that all keep about the same number of frozen and of trained bytes. Buffers
    under DDP differ between the ranks until the next forward pass broadcasts the first rank's, so that rank
    keeps them.

    Args:
        tensors: this rank's live tensors, by name.
        pieces: which part of the whole each of them is.
        buffers: names of the buffers.
        ranks: the run's ranks; all of them have to construct a ``Sharding``.
        frozen: names of the parameters that take no gradient.

    Raises:
        ValueError: if the ranks' models have different tensors, or replicas with different values.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        pieces: Mapping[str, Piece],
        buffers: Collection[str] = (),
        ranks: Ranks | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        self.ranks = ranks or Ranks()
        self.wholes = {name: piece.whole for name, piece in pieces.items()}
        self.kept = dict(pieces)
        self._by_rank = [self.kept]  # those of all ranks on the first rank, else only its own
        self._replicas: dict[str, _Replicas] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        if self.ranks.size > 1:
            self._share_out(tensors, pieces, buffers, self.ranks.from_first(set(frozen)))

    def own(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The part of each live tensor that this rank keeps (views, some of which may be empty)."""
        if not self._replicas:
            return tensors
        return {name: self.own_part(name, tensor) for name, tensor in tensors.items()}

    def own_part(self, name: str, tensor: Tensor) -> Tensor:
        """The part that this rank keeps of one live tensor, or of another tensor with the same sharding."""
        replicas = self._replicas.get(name)
        return tensor if replicas is None else _rows(tensor, *replicas.rows(self.ranks.rank))

    def spread(self, tensors: Mapping[str, Tensor]) -> None:
        """Broadcasts the part that each rank keeps of the live tensors to its replicas, in place.

        It does so tensor by tensor, in training's own process groups. Nothing is sent if every tensor is
        sharded.
        """
        for name, replicas in self._replicas.items():
            for rank in replicas.ranks:
                part = _rows(tensors[name], *replicas.rows(rank))
                if part.numel():
                    sent = part.clone() if part.is_inference() else part
                    sent = sent.contiguous()
                    # As bytes: not every backend knows every dtype.
                    bits = sent.view(-1).view(torch.uint8)
                    dist.broadcast(bits, src=rank, group=self._groups[replicas.ranks])
                    if sent is not part and rank != self.ranks.rank:
                        overwrite(part, sent)

    def gather(
        self, parts: Mapping[str, Tensor], names: Iterable[str], ranks: Ranks | None = None
    ) -> Iterator[Tensor]:
        """Assembles whole tensors on the first rank, one after the other, in the order of ``names``.

        All ranks have to iterate to the end; the others send their parts, and get empty tensors.

        Args:
            parts: the parts that this rank keeps.
            names: the tensors' names.
            ranks: the group to use instead of ``self.ranks``, if that is used by another thread.

        Returns:
            CPU tensors.

        Raises:
            Exception: on all ranks, once all is sent, if one of them could not read or hold its part.
        """
        return Gathering(self._by_rank, ranks or self.ranks).tensors(parts, names)

    def close(self) -> None:
        """Destroys the process groups. All ranks have to call this."""
        # A group that this rank is not in is a number.
        groups = [group for group in self._groups.values() if isinstance(group, dist.ProcessGroup)]
        self._groups = {}
        destroy_groups(groups)

    def _share_out(
        self,
        tensors: Mapping[str, Tensor],
        pieces: Mapping[str, Piece],
        buffers: Collection[str],
        frozen: Collection[str],
    ) -> None:
        prints = {name: _fingerprint(t) for name, t in tensors.items() if name not in buffers}
        held = self.ranks.exchange((dict(pieces), prints))
        kept = [theirs for theirs, _ in held]
        _check_same_shapes([{name: piece.whole for name, piece in theirs.items()} for theirs in kept])
        shared: dict[tuple[int, ...], list[str]] = {}  # by the ranks that hold replicas of them
        for name in pieces:
            for group in _replica_groups([theirs[name] for theirs in kept]):
                _check_equal(name, {rank: held[rank][1].get(name, 0) for rank in group})
                shared.setdefault(group, []).append(name)
        for group, names in sorted(shared.items()):
            every = len(group) == self.ranks.size
            self._groups[group] = None if every else dist.new_group(list(group))
            bounds: dict[str, list[int]] = {}
            for apart in (False, True):  # separately: else one rank might keep all that trains
                parts = [name for name in names if name not in buffers and (name in frozen) is apart]
                replicated = [kept[group[0]][name] for name in parts]
                sizes = [
                    (p.rows, p.numel * tensors[n].itemsize) for n, p in zip(parts, replicated, strict=True)
                ]
                bounds |= zip(parts, split_rows(sizes, len(group)), strict=True)
            for name in names:
                rows = kept[group[0]][name].rows
                replicas = _Replicas(group, tuple(bounds.get(name) or [0, *[rows] * len(group)]))
                for rank in group:
                    kept[rank][name] = kept[rank][name].of_rows(*replicas.rows(rank))
                if self.ranks.rank in group:
                    self._replicas[name] = replicas
        self.kept = kept[self.ranks.rank]
        self._by_rank = kept if self.ranks.is_first else [self.kept]


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return (tensor if tensor.ndim else tensor.view(1))[start:stop]


def _replica_groups(pieces: Sequence[Piece]) -> list[tuple[int, ...]]:
    """The groups of several ranks that hold the same piece."""
    holders: dict[Piece, list[int]] = {}
    for rank, piece in enumerate(pieces):
        if piece.numel:
            holders.setdefault(piece, []).append(rank)
    return [tuple(ranks) for ranks in holders.values() if len(ranks) > 1]


def _fingerprint(tensor: Tensor) -> int:
    """A sum over a tensor's bits, which does not depend on the order of summing."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(integers[tensor.itemsize]).sum(dtype=torch.int64))


def _check_same_shapes(wholes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    for rank, theirs in enumerate(wholes):
        if theirs != wholes[0]:
            names = [n for n in {**theirs, **wholes[0]} if theirs.get(n) != wholes[0].get(n)]
            raise ValueError(
                f"rank {rank} has other tensors than rank 0 ({', '.join(names[:3])}): no window can "
                "be kept if each rank has layers of its own (pipeline parallelism)"
            )


def _check_equal(name: str, prints: Mapping[int, int]) -> None:
    if len(set(prints.values())) > 1:
        raise ValueError(
            f"parameter {name!r} is not sharded, but its values differ between the ranks "
            f"{list(prints)[:8]}: a merge would mix them; make it a DTensor, or keep it equal on all ranks"
        )
