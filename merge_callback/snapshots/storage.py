"""Where snapshots live: in device memory, in host memory, or in memory-mapped files; and their files."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from merge_callback.sharding.sharding import Sharding
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.deltas import CODECS, decode, encode
from merge_callback.snapshots.files import clear, make_folder
from merge_callback.snapshots.frozen import FrozenPart
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.safetensors_file import (
    CorruptFileError,
    arena_header,
    file_checksum,
    map_arena,
    sync,
    write_file,
)
from merge_callback.snapshots.safetensors_header import read_header
from merge_callback.snapshots.shard_files import (
    SHARDS,
    a_file,
    gather_shards,
    list_shards,
    listed_shards,
    shard_file,
    shards_name,
    shares,
    write_shard,
)
from merge_callback.snapshots.staging import ToHost

Storage = Literal["disk", "cpu", "device"]

_WORTH_A_FILE = 1 / 32
"""How much of a model has to be frozen for it to be kept once: else each snapshot stands by itself."""


class NonFiniteSnapshotError(ValueError):
    """A snapshot that holds NaN or Inf; the message names the tensors."""


class DifferenceError(NonFiniteSnapshotError):
    """A snapshot whose difference to the one before can't be stored; the message names the tensors."""


@dataclass
class Snapshot:
    """The weights at one optimizer step.

    ``phase`` and ``since`` name the segment of the learning-rate schedule it was taken in; only snapshots of
    one segment may be merged. ``since`` and ``lr_step`` count the steps whose learning rate was read: before
    the segment, and up to the snapshot. ``in_spike`` tells that the loss was an outlier around that step.
    ``file`` (in the window's folder) and ``checksum`` (SHA-256 of the file) are empty for a snapshot that
    lives in memory only; that of several ranks is a folder with a file of each, and a list of them.
    ``difference_to`` is the step of the snapshot before, where this one is kept as the difference to it.
    ``frozen`` is the file (or folder) of what it has in common with others, where that is kept once, and
    ``frozen_checksum`` that one's checksum.
    """

    kind: ClassVar[str] = ""

    step: int
    tokens: int | None
    lr: float
    lr_ratio: float
    phase: str
    since: int
    lr_step: int
    in_spike: bool = False
    file: str = ""
    checksum: str = ""
    difference_to: int | None = None
    frozen: str = ""
    frozen_checksum: str = ""
    arena: Arena = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    def record(self) -> dict[str, Any]:
        """Everything but the weights, as primitives."""
        entries = {k: v for k, v in vars(self).items() if k != "arena"}
        return entries if self.frozen else {k: v for k, v in entries.items() if not k.startswith("frozen")}


class SnapshotStore:
    """Captures snapshots into their storage and, where a folder is given, into durable files.

    Args:
        layout: of one snapshot.
        storage: ``"disk"`` maps the files (the page cache holds what is in use), ``"cpu"`` and
            ``"device"`` keep arenas in memory.
        folder: for the snapshot files; ``None`` keeps snapshots in memory only.
        device: of the live model.
        masks: names of buffers that may hold Inf.
        buffers: names of those that may hold -Inf: attention masks, which the first forward pass may fill.
        sharding: which part of each tensor this rank keeps; ``layout`` is of these parts.
        whole: the layout of the whole model, where the rank does not keep all of it.
        codec: of ``CODECS``: keeps snapshots as differences to the one before; ``""`` as they are.
        frozen: names of the parameters that take no gradient, for the estimate of what a window needs.

    Raises:
        ValueError: for ``"disk"`` without a folder.
    """

    def __init__(
        self,
        layout: Layout,
        storage: Storage,
        folder: Path | None,
        device: torch.device | str = "cpu",
        masks: Collection[str] = (),
        buffers: Collection[str] = (),
        sharding: Sharding | None = None,
        whole: Layout | None = None,
        codec: str = "",
        frozen: Collection[str] = (),
    ) -> None:
        if storage == "disk" and folder is None:
            raise ValueError("storage='disk' needs a folder; keep durable=True, or choose storage='cpu'")
        self.layout, self.storage, self.folder = layout, storage, folder
        self.device = torch.device(device if storage == "device" else "cpu")  # of the window's arenas
        self.live_device = torch.device(device)
        self.masks, self.buffers = masks, buffers
        self.codec = codec
        self._layouts: dict[tuple[frozenset[str], bool], Layout] = {}
        self.sharding, self.whole = sharding or Sharding({}, {}), whole or layout
        self.ranks = self.sharding.ranks
        self.session = self.ranks.from_first(uuid.uuid4().hex[:12])  # of this process and its fellows
        self._free: dict[tuple[torch.device, bool], list[Arena]] = {}
        self._in_common = frozenset[str]()  # what the last snapshot captured had in common with others
        self._to_host = ToHost()
        self.frozen: FrozenPart | None = None  # of the next snapshot
        self.moved: set[str] = set()  # what was frozen, and changed all the same
        self._judged = frozenset[str](), frozenset[str]()
        self.expected = self._worth_keeping_once(frozen)
        self.before_writing: Callable[[], object] = lambda: None  # raises OSError where it may not be done

    @torch.no_grad()
    def capture(self, tensors: Mapping[str, Tensor], frozen: Collection[str] = (), step: int = 0) -> Arena:
        """A copy of what this rank keeps of ``tensors``: all that training waits for.

        Of a model on a GPU it is made on that GPU, in the order of its stream, so that only the device waits;
        in host memory, at the pace of the bus, where the GPU has no room for it. What is frozen is copied
        once, and from then on only compared.

        Args:
            tensors: the live ones.
            frozen: names of those that take no gradient now.
            step: of the snapshot.

        Raises:
            ValueError: where the model's tensors have changed, or the file of what is frozen was cut.
        """
        own = self.sharding.own(tensors)
        part = self.frozen
        if part is not None:
            if self.is_cut(part):
                raise ValueError(f"{part.file} was cut")
            self.moved |= part.moved(own)
        elif names := self._worth_keeping_once(frozen):
            part = FrozenPart(step, self._copy(self.layout.only(names), own), names)
            part.note(own)
        names = part.names if part else frozenset()
        if names != self._in_common:  # what is free is of another size
            self._in_common, self._free = names, {}
        return self._copy(self._layout(names), own).sharing(part, names)

    def _copy(self, layout: Layout, own: Mapping[str, Tensor]) -> Arena:
        try:
            arena = self.empty(self.live_device, layout)
        except torch.OutOfMemoryError:
            if self.storage == "device":
                raise
            arena = self.empty(self.device, layout)
        try:
            arena.copy_from(own)
        except ValueError:
            self.give_back(arena)
            raise
        return arena

    def _worth_keeping_once(self, frozen: Collection[str]) -> frozenset[str]:
        """What is frozen, where that is a good part of the model; none of what is stored in another dtype."""
        asked = frozenset(frozen) - self.moved
        if asked != self._judged[0]:  # at every snapshot, while training waits
            as_they_are = [
                g for g in self._packed(self.whole).groups if g.stored == g.dtype and not g.is_delta
            ]
            names = asked.intersection(s.name for group in as_they_are for s in group.segments)
            is_worth_it = self.whole.only(names).nbytes > _WORTH_A_FILE * self.whole.nbytes
            self._judged = asked, names if is_worth_it else frozenset()
        return self._judged[1]

    def sharing_only(self, arena: Arena, names: frozenset[str]) -> Arena:
        """A captured snapshot with fewer tensors in common with others, which it then holds itself."""
        if names == arena.shared:
            return arena
        other = self.empty(arena.buffer.device, self._layout(names))
        other.copy_from(arena.tensors())
        self.give_back(arena)
        if arena.frozen is not None:
            arena.frozen.names = names
        return other.sharing(arena.frozen, names)

    def check_finite(self, arena: Arena) -> None:
        """Makes sure that a captured snapshot is fit to be merged.

        Raises:
            NonFiniteSnapshotError: where a tensor holds NaN or Inf.
        """
        if bad := [name for name in arena.non_finite() if not self.may_hold(name, arena.tensor(name))]:
            raise NonFiniteSnapshotError(
                f"{', '.join(bad[:5])}{' …' if len(bad) > 5 else ''} hold NaN or Inf"
            )

    def write(self, snapshot: Snapshot | FrozenPart, arena: Arena) -> str:
        """Makes a captured snapshot durable, where there is a folder; each rank in a file of its own.

        Returns:
            The SHA-256 of the file.

        Raises:
            OSError: where its file can't be written; nothing is left of it.
        """
        if self.folder is None:
            return ""
        self.before_writing()
        if isinstance(snapshot, Snapshot) and arena.frozen is not None:
            snapshot.frozen, snapshot.frozen_checksum = arena.frozen.file, arena.frozen.checksum
        metadata = {
            "format": "pt",
            **{k: str(v) for k, v in snapshot.record().items() if v not in ("", None)},
        }
        metadata["layout"] = arena.layout.hash
        layout, data = arena.layout, self._to_host.chunks(arena.buffer)
        if self.ranks.size > 1:
            folder = self.folder / self._shards_name(snapshot)
            return write_shard(folder, self.sharding, layout, data, metadata)
        # The name ends in the checksum: two timelines of one run can never take each other's file.
        make_folder(self.folder)
        temporary = self.folder / f".{snapshot.kind}step={snapshot.step:08d}.{os.getpid()}.tmp"
        clear(temporary)
        checksum = write_file(temporary, layout.entries, data, metadata)
        file = f"{snapshot.kind}step={snapshot.step:08d}-{checksum[:12]}.safetensors"
        os.replace(temporary, self.folder / file)
        sync(self.folder)
        snapshot.file, snapshot.checksum = file, checksum
        return checksum

    def commit(self, snapshot: Snapshot | FrozenPart, checksums: Sequence[str]) -> None:
        """Completes a snapshot of several files, once every rank has written its own.

        Args:
            snapshot: whose ``file`` then is the files' folder, and ``checksum`` that of the list of them.
            checksums: of each rank's file.

        Raises:
            OSError: on the first rank, where the list can't be written.
        """
        if self.folder is not None and self.ranks.size > 1:
            snapshot.file = self._shards_name(snapshot)
            snapshot.checksum = list_shards(self.folder / snapshot.file, checksums, write=self.ranks.is_first)

    def discard(self, snapshot: Snapshot | FrozenPart) -> None:
        """Removes what this rank has written of a snapshot that another could not write."""
        snapshot.file = snapshot.checksum = ""
        if isinstance(snapshot, Snapshot):
            snapshot.frozen = snapshot.frozen_checksum = ""
        if self.folder is None or self.ranks.size == 1:
            return
        folder = self.folder / self._shards_name(snapshot)
        with contextlib.suppress(OSError):
            self.own_file(folder).unlink(missing_ok=True)
            for path in (*folder.glob(SHARDS), *folder.glob(".*.tmp")) if self.ranks.is_first else ():
                path.unlink()
            folder.rmdir()  # succeeds for the last rank

    def keep(self, snapshot: Snapshot, arena: Arena) -> bool:
        """Gives a snapshot its place in this storage; says whether it has one (on disk: a file)."""
        if self.storage == "disk" and not snapshot.file:
            self.give_back(arena)
            return False
        if (part := arena.frozen) is not None and not part.is_placed:
            part.arena, part.is_placed = self._placed(part, part.arena), True
        snapshot.arena = self._placed(snapshot, arena)
        return True

    def _placed(self, snapshot: Snapshot | FrozenPart, arena: Arena) -> Arena:
        if self.storage != "disk":
            return self.at_home(arena)
        self.give_back(arena)
        return map_arena(self.mapped_file(snapshot), arena.layout).sharing(arena.frozen, arena.shared)

    def _layout(self, frozen: frozenset[str], is_delta: bool = False) -> Layout:
        """How a snapshot lies in its arena and file that has ``frozen`` in common with others."""
        if (frozen, is_delta) not in self._layouts:
            whole = self.layout.only(self.layout.names - frozen) if frozen else self.layout
            self._layouts[frozen, is_delta] = self._packed(whole) if is_delta else whole
        return self._layouts[frozen, is_delta]

    def layout_of(self, snapshot: Snapshot, path: Path) -> Layout:
        """How a snapshot lies in its arena and file.

        Raises:
            CorruptFileError, OSError: where its file at ``path`` can't tell.
        """
        names = frozenset[str]()
        if snapshot.frozen:
            names = self.layout.names - names_in(path)
        return self._layout(names, snapshot.difference_to is not None)

    def nbytes(self, count: int, of_all_ranks: bool = False) -> int:
        """Bytes of ``count`` snapshots of a window."""
        layout = self.whole if of_all_ranks else self.layout
        own = layout.only(layout.names - self.expected)
        return layout.nbytes + (count - 1) * self._packed(own).nbytes

    def peak_nbytes(self, count: int, of_all_ranks: bool = False) -> int:
        """Bytes of the most that lies there at once: the newest is taken in before the oldest goes."""
        layout = self.whole if of_all_ranks else self.layout
        made_whole = layout.only(layout.names - self.expected).nbytes if self.codec else 0
        return self.nbytes(count + 1, of_all_ranks) + made_whole

    def own_file(self, path: Path) -> Path:
        """The file of this rank, of a snapshot whose file or folder is ``path``."""
        return path / shard_file(self.ranks.rank, self.ranks.size) if self.ranks.size > 1 else path

    def is_shared_out_alike(self, snapshot: Snapshot, path: Path) -> bool:
        """Whether the snapshot at ``path`` has a file of what this very rank keeps now."""
        own = self.own_file(path)
        return own.is_file() and shares(path, self.sharding, arena_header(self.layout_of(snapshot, own)))

    def reshard(self, snapshot: Snapshot, path: Path, part: FrozenPart | None = None) -> Arena:
        """What this rank keeps now, from a snapshot whose files were shared out over other ranks.

        Args:
            snapshot: what is known of it.
            path: of its file or folder.
            part: what it has in common with others.

        Raises:
            CorruptFileError: where a file that is read is not, byte for byte, what was written.
            OSError: where one is missing or unreadable.
        """
        layout = self.layout_of(snapshot, a_file(path))
        shared = self._shared(layout, part, path)
        arena = self.empty(self.device, layout)
        try:
            self._gather(path, snapshot.checksum, arena)
        except (CorruptFileError, OSError):
            self.give_back(arena)
            raise
        return arena.sharing(part, shared)

    def load(self, snapshot: Snapshot, path: Path, part: FrozenPart | None = None) -> None:
        """Fills ``snapshot`` from its file at ``path``, which is verified first.

        Args:
            snapshot: what is known of it.
            path: of its file or folder.
            part: what it has in common with others.

        Raises:
            CorruptFileError: where the file is not, byte for byte, what was written, or has another layout.
            OSError: where it is missing or unreadable.
        """
        layout = self.layout_of(snapshot, self.own_file(path))
        shared = self._shared(layout, part, path)
        snapshot.arena = self._verified(snapshot, path, layout).sharing(part, shared)

    def load_frozen(self, snapshot: Snapshot, path: Path, alike: bool) -> FrozenPart:
        """What a snapshot has in common with others, from its file at ``path``, which is verified.

        Args:
            snapshot: that names it.
            path: of its file or folder.
            alike: whether it may stay in that file, if shared out as it is now. Else it has no file yet.

        Raises:
            CorruptFileError: where a file is not, byte for byte, what was written, or has another layout.
            OSError: where it is missing or unreadable.
        """
        names = names_in(a_file(path)) & self.layout.names
        layout = self.layout.only(names)
        part = FrozenPart(snapshot.step, Arena.empty(Layout(())), names)
        if alike and self.own_file(path).is_file() and shares(path, self.sharding, arena_header(layout)):
            part.file, part.checksum = snapshot.frozen, snapshot.frozen_checksum
            part.arena, part.is_placed = self._verified(part, path, layout), True
        else:
            part.arena = self.empty(self.device, layout)
            self._gather(path, snapshot.frozen_checksum, part.arena)
        return part

    def _verified(self, snapshot: Snapshot | FrozenPart, path: Path, layout: Layout) -> Arena:
        expected, path = self._own_checksum(snapshot, path), self.own_file(path)
        mapped = map_arena(path, layout)
        if file_checksum(path) != expected:
            raise CorruptFileError(f"{path}: the checksum differs from the recorded one")
        if self.storage == "disk":
            return mapped
        arena = self.empty(self.device, layout)
        arena.buffer.copy_(mapped.buffer)
        return arena

    def _gather(self, path: Path, checksum: str, arena: Arena) -> None:
        wanted = {name: self.sharding.kept[name] for name in arena.layout.names}
        gather_shards(path, checksum, wanted, arena.tensors())

    def _shared(self, layout: Layout, part: FrozenPart | None, path: Path) -> frozenset[str]:
        """What a snapshot of this layout has in common with others."""
        shared = self.layout.names - layout.names
        if not shared <= (part.arena.layout.names if part else frozenset()):
            raise CorruptFileError(f"{path}: other tensors than this model's, with those that are frozen")
        return shared

    def mapped_file(self, snapshot: Snapshot | FrozenPart) -> Path:
        """The file of this rank that a snapshot of a window on disk is mapped from."""
        assert self.folder is not None
        return self.own_file(self.folder / snapshot.file)

    def lacks_file(self, part: FrozenPart) -> bool:
        """Whether what snapshots have in common is yet to be written; or again, as somebody removed it."""
        if self.folder is None:
            return False
        return not part.file or not self.own_file(self.folder / part.file).exists()

    def is_cut(self, snapshot: Snapshot | FrozenPart) -> bool:
        """Whether that file was cut: reading past its end would kill the process."""
        if self.storage != "disk" or not snapshot.file:
            return False
        try:
            size = self.mapped_file(snapshot).stat().st_size
        except OSError:  # a removed file stays readable through its map
            return False
        return size < snapshot.arena.buffer.untyped_storage().nbytes()  # header and all

    def is_as_written(self, snapshot: Snapshot | FrozenPart) -> bool:
        """Whether that file still is, byte for byte, what was written.

        Raises:
            CorruptFileError: where it is no regular file, or the list of all ranks' files is another.
            OSError: where it is missing or unreadable.
        """
        assert self.folder is not None
        expected = self._own_checksum(snapshot, self.folder / snapshot.file)
        return file_checksum(self.mapped_file(snapshot)) == expected

    def _own_checksum(self, snapshot: Snapshot | FrozenPart, path: Path) -> str:
        if self.ranks.size == 1:
            return snapshot.checksum
        return listed_shards(path, snapshot.checksum)[shard_file(self.ranks.rank, self.ranks.size)]

    def taken_out(self, snapshot: Snapshot) -> Arena:
        """The arena of a loaded snapshot, to be written and kept anew; never one that is mapped."""
        if self.storage != "disk":
            return snapshot.arena
        arena = self.empty(self.device, snapshot.arena.layout)
        arena.buffer.copy_(snapshot.arena.buffer)
        return arena.sharing(snapshot.arena.frozen, snapshot.arena.shared)

    def release(self, snapshot: Snapshot) -> None:
        """Gives an evicted snapshot's memory to the next one. Its file is the window's to remove."""
        if self.storage != "disk":
            self.give_back(snapshot.arena)

    def give_back(self, arena: Arena) -> None:
        """Takes an arena back that ``capture`` gave out, if the next snapshots are of its size."""
        is_delta = arena.layout.is_delta
        if arena.layout is self._layout(self._in_common, is_delta):
            self._free.setdefault((arena.buffer.device, is_delta), []).append(arena)

    def empty(self, device: torch.device, layout: Layout | None = None) -> Arena:
        """An arena to be overwritten, whole by default: of an earlier snapshot, as a rule."""
        layout = layout or self.layout
        free = self._free.get((device, layout.is_delta))
        if free and layout is self._layout(self._in_common, layout.is_delta):
            return free.pop().reused()
        return Arena.empty(layout, device)

    def at_home(self, arena: Arena) -> Arena:
        """A captured snapshot where the window keeps its arenas."""
        if arena.buffer.device == self.device:
            return arena
        home = self.empty(self.device, arena.layout)
        self._to_host.copy(arena.buffer, home.buffer)
        self.give_back(arena)
        return home.sharing(arena.frozen, arena.shared)

    def can_build_on(self, before: Sequence[Snapshot]) -> bool:
        """Whether the next snapshot may be kept as the difference to the last one of the window."""
        return bool(self.codec and before and (self.folder is None or before[-1].file))

    def encoded(self, snapshot: Snapshot, arena: Arena, before: Sequence[Snapshot]) -> Arena:
        """A captured snapshot as the difference to the one before.

        Args:
            snapshot: whose ``difference_to`` is set.
            arena: of it, whole and at home.
            before: the window's snapshots, of which the last can be relied on.

        Raises:
            DifferenceError: where a weight has moved further than the difference can hold.
        """
        delta = self.empty(self.device, self._layout(arena.shared, is_delta=True))
        encode(arena, [earlier.arena for earlier in before], delta)
        try:
            self.check_finite(delta)
        except NonFiniteSnapshotError as error:
            self.give_back(delta)
            raise DifferenceError(
                f"in the difference to that of step {before[-1].step} {error}: "
                f"it moved too far for snapshot_codec={self.codec!r}"
            ) from None
        snapshot.difference_to = before[-1].step
        return delta.sharing(arena.frozen, arena.shared)

    def decoded(self, snapshots: Sequence[Snapshot]) -> Arena:
        """The last of a window's snapshots as no difference."""
        last = snapshots[-1].arena
        whole = self.empty(self.device, self._layout(last.shared)).sharing(last.frozen, last.shared)
        decode([snapshot.arena for snapshot in snapshots], whole)
        return whole

    def may_hold(self, name: str, tensor: Tensor) -> bool:
        """Whether the NaN or Inf in a tensor are meant: a mask's."""
        if name in self.masks:
            return True
        return name in self.buffers and bool((tensor.isfinite() | (tensor == -torch.inf)).all())

    def _packed(self, layout: Layout) -> Layout:
        return layout.delta(CODECS[self.codec]) if self.codec else layout

    def _shards_name(self, snapshot: Snapshot | FrozenPart) -> str:
        return snapshot.kind + shards_name(snapshot.step, self.session, snapshot.difference_to is not None)


def names_in(file: Path) -> frozenset[str]:
    """The names of the tensors in a safetensors file."""
    return frozenset(read_header(file).entries)


def free_bytes(storage: Storage, folder: Path | None, device: torch.device) -> int:
    """Free room where snapshots of this storage would lie, in bytes."""
    if storage == "device" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if storage == "disk" and folder is not None:
        return shutil.disk_usage(folder).free
    return _available_memory()


def _available_memory() -> int:
    # MemAvailable counts the page cache as free, which SC_AVPHYS_PAGES does not.
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
