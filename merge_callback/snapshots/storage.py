"""Where snapshots lie: in device memory, host memory or memory-mapped files; and the store they share."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from merge_callback.sharding.sharding import Sharding
from merge_callback.snapshots.arena import Arena, FrozenPart
from merge_callback.snapshots.arena_pool import ArenaPool
from merge_callback.snapshots.codecs import Delta, Whole
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.live_copy import FiniteCheck, LiveCopy
from merge_callback.snapshots.safetensors_file import map_arena
from merge_callback.snapshots.snapshot import Snapshot, Stored
from merge_callback.snapshots.snapshot_files import SnapshotFiles
from merge_callback.snapshots.staging import ToHost, copying, send


class Memory:
    """Keeps snapshots in host memory.

    Args:
        live_device: of the live model.
        pool: of arenas.
        files: of the snapshots.
        to_host: reads arenas out of device memory.
    """

    needs_files: ClassVar[bool] = False
    """Whether snapshots lie in their files."""
    is_of_machine: ClassVar[bool] = True
    """Whether the room is shared by the processes of a machine, each of which has a window of its own."""
    remedy: ClassVar[str] = "storage='disk'"
    """What a user may choose if there is not enough room."""

    def __init__(
        self, live_device: torch.device, pool: ArenaPool, files: SnapshotFiles, to_host: ToHost
    ) -> None:
        self.device = self.device_for(live_device)
        self._pool, self._files, self._to_host = pool, files, to_host

    @staticmethod
    def device_for(live_device: torch.device) -> torch.device:
        """The device of the arenas."""
        return torch.device("cpu")

    @staticmethod
    def free_bytes(folder: Path | None, device: torch.device) -> int:
        """Free room where snapshots would lie, in bytes."""
        return available_memory()

    def moved_in(self, arena: Arena) -> Arena:
        """A captured snapshot on the device of the arenas."""
        if arena.buffer.device == self.device:
            return arena
        moved = self._pool.acquire(arena.layout, self.device)
        self._to_host.copy(arena.buffer, moved.buffer)
        self._pool.recycle(arena)
        return moved.sharing(arena.frozen, arena.shared)

    def to_be_written(self, arena: Arena) -> Arena:
        """A captured snapshot where it is best written from: its place, so that the device is read once."""
        return self.moved_in(arena)

    def admitted(self, stored: Stored, arena: Arena) -> Arena:
        """A captured snapshot, written if it is to be, in its place."""
        return self.moved_in(arena)

    def loaded(self, mapped: Arena) -> Arena:
        """A snapshot in its place, from its mapped file."""
        arena = self._pool.acquire(mapped.layout, self.device)
        if arena.buffer.is_cuda:
            send([(arena.buffer, copying(mapped.buffer))])
        else:
            arena.buffer.copy_(mapped.buffer)
        return arena

    def rewritable(self, arena: Arena) -> Arena:
        """A loaded snapshot, to be written and admitted once more; never one that is mapped."""
        return arena

    def release(self, arena: Arena) -> None:
        """Gives the memory of a snapshot that was dropped to the next one."""
        self._pool.recycle(arena)

    def is_cut(self, stored: Stored) -> bool:
        """Whether a mapped file was cut: reading past its end would kill the process."""
        return False


class DeviceMemory(Memory):
    """Keeps snapshots in the memory of the live model's device."""

    is_of_machine = False
    remedy = "storage='disk' or 'cpu'"

    @staticmethod
    def device_for(live_device: torch.device) -> torch.device:
        """The device of the arenas."""
        return live_device

    @staticmethod
    def free_bytes(folder: Path | None, device: torch.device) -> int:
        """Free room where snapshots would lie, in bytes."""
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


class Mapped(Memory):
    """Keeps snapshots in memory maps of their files: the page cache holds what is in use."""

    needs_files = True
    is_of_machine = False
    remedy = "a dirpath on a larger disk, or durable=False with storage='cpu'"

    @staticmethod
    def free_bytes(folder: Path | None, device: torch.device) -> int:
        """Free room where snapshots would lie, in bytes."""
        return shutil.disk_usage(folder).free if folder is not None else available_memory()

    def to_be_written(self, arena: Arena) -> Arena:
        """The same: its bytes go to the file as they come from the device."""
        return arena

    def admitted(self, stored: Stored, arena: Arena) -> Arena:
        """A captured snapshot that was written, as its mapped file."""
        self._pool.recycle(arena)
        return map_arena(self._files.path(stored), arena.layout).sharing(arena.frozen, arena.shared)

    def loaded(self, mapped: Arena) -> Arena:
        """A snapshot in its place, from its mapped file."""
        return mapped

    def rewritable(self, arena: Arena) -> Arena:
        """A copy of a loaded snapshot in memory."""
        return super().loaded(arena).sharing(arena.frozen, arena.shared)

    def release(self, arena: Arena) -> None:
        """Does nothing: the map ends with the arena, and the file is the window's to remove."""

    def is_cut(self, stored: Stored) -> bool:
        """Whether a mapped file was cut: reading past its end would kill the process."""
        if not stored.file:
            return False
        try:
            size = os.stat(self._files.path(stored)).st_size
        except OSError:  # a removed file stays readable through its map
            return False
        # Not by its untyped_storage(): once Python has seen that, the map is given back under the GIL.
        buffer = stored.arena.buffer
        return size < buffer.storage_offset() + buffer.nbytes  # the header lies before it


STORAGES: dict[str, type[Memory]] = {"disk": Mapped, "cpu": Memory, "device": DeviceMemory}
"""By the names that users know them by."""


class SnapshotStore:
    """What all snapshots of a run have in common: their layout, storage, codec, files and sharding.

    Args:
        layout: of one snapshot; of what this rank keeps of it.
        storage: of ``STORAGES``.
        folder: for the snapshot files; ``None`` keeps snapshots in memory only.
        device: of the live model's tensors.
        masks: names of buffers that may hold Inf.
        buffers: names of those that may hold -Inf.
        sharding: which part of each tensor this rank keeps.
        whole: the layout of the whole model, if the rank does not keep all of it.
        codec: of ``CODECS``: keeps snapshots as differences to the one before; ``""`` as they are.
        frozen: names of the parameters that take no gradient, for the estimate of what a window needs.

    Raises:
        ValueError: for ``"disk"`` without a folder.
    """

    def __init__(
        self,
        layout: Layout,
        storage: str,
        folder: Path | None,
        device: torch.device | str = "cpu",
        masks: Collection[str] = (),
        buffers: Collection[str] = (),
        sharding: Sharding | None = None,
        whole: Layout | None = None,
        codec: str = "",
        frozen: Collection[str] = (),
    ) -> None:
        if STORAGES[storage].needs_files and folder is None:
            raise ValueError(
                f"storage={storage!r} needs a folder; keep durable=True, or choose storage='cpu'"
            )
        self.layout, self.whole, self.folder = layout, whole or layout, folder
        self.sharding = sharding or Sharding({}, {})
        self.ranks = self.sharding.ranks
        self.session = self.ranks.from_first(uuid.uuid4().hex[:12])  # of this process and its fellows
        self.check_finite = FiniteCheck(masks, buffers)
        self.coding = Delta(codec, folder is not None, self.check_finite) if codec else Whole()
        self.live_device = live = torch.device(device)
        self.pool, to_host = ArenaPool(layout, self.coding.packed), ToHost()
        self.files = SnapshotFiles.of(folder, self.sharding, self.session, to_host)
        self.place = STORAGES[storage](live, self.pool, self.files, to_host)
        self.live = LiveCopy(
            layout, self.whole, self.coding, self.pool, (live, self.place.device), self.sharding
        )
        self.frozen: FrozenPart | None = None  # of the next snapshot
        self.expected = self.live.worth_keeping_once(frozen)

    @property
    def codec(self) -> str:
        """The codec's name; empty if snapshots are kept as they are."""
        return self.coding.name

    @property
    def device(self) -> torch.device:
        """The device of the window's arenas."""
        return self.place.device

    def capture(self, tensors: Mapping[str, Tensor], frozen: Collection[str] = (), step: int = 0) -> Arena:
        """A copy of what this rank keeps of ``tensors``; see ``LiveCopy.take``.

        Raises:
            ValueError: if the model's tensors have changed, or the file of what is frozen was cut.
        """
        if self.frozen is not None and self.place.is_cut(self.frozen):
            raise ValueError(f"{self.frozen.file} was cut")
        return self.live.take(tensors, frozen, step, self.frozen)

    def admit(self, snapshot: Snapshot, arena: Arena) -> bool:
        """Gives a snapshot its place in the storage; says whether it has one (on disk: a file)."""
        if self.place.needs_files and not snapshot.file:
            self.pool.recycle(arena)
            return False
        if (part := arena.frozen) is not None and not part.is_placed:
            part.arena, part.is_placed = self.place.admitted(part, part.arena), True
        snapshot.arena = self.place.admitted(snapshot, arena)
        return True

    def nbytes(self, count: int, of_all_ranks: bool = False) -> int:
        """Bytes of ``count`` snapshots of a window."""
        layout = self.whole if of_all_ranks else self.layout
        own = layout.only(layout.names - self.expected)
        return layout.nbytes + (count - 1) * self.coding.packed(own).nbytes

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a window's first snapshot, and of each further one, on all ranks together."""
        first = self.nbytes(1, of_all_ranks=True)
        return first, self.nbytes(2, of_all_ranks=True) - first

    def peak_nbytes(self, count: int, of_all_ranks: bool = False) -> int:
        """Bytes of the most that lies there at once: the newest is taken in before the oldest goes."""
        layout = self.whole if of_all_ranks else self.layout
        made_whole = layout.only(layout.names - self.expected).nbytes if self.codec else 0
        return self.nbytes(count + 1, of_all_ranks) + made_whole

    def may_hold(self, name: str, tensor: Tensor) -> bool:
        """Whether the NaN or Inf in a tensor are meant: a mask's."""
        return self.check_finite.may_hold(name, tensor)


def available_memory() -> int:
    """Bytes of memory that nobody uses."""
    # MemAvailable counts the page cache as free, which SC_AVPHYS_PAGES does not.
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
