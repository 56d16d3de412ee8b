"""Publishing a merge: a folder that is either complete or not there."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_callback.checkpoints.card import write_card
from merge_callback.checkpoints.file_names import BEST, CARD, LATEST, PROVENANCE
from merge_callback.checkpoints.merge_record import MergeRecord, find_record
from merge_callback.checkpoints.safetensors_shards import shard_names, split_shards, write_index
from merge_callback.publish.provenance import emission_name
from merge_callback.snapshots.files import (
    clear,
    draft,
    hidden_names,
    hidden_path,
    make_folder,
    put_in_place,
    replacing,
    sync,
    write_json,
)
from merge_callback.snapshots.safetensors_file import file_checksum, tensors_entries, write_file

log = logging.getLogger(__name__)

_DRAFT = hidden_names(f"step=.*|{LATEST}|{BEST}", "tmp|old")
_DOOMED = hidden_names("step=.*", "old")


class ModelFiles:
    """How a model lies in safetensors files: worked out once for all its emissions.

    Args:
        tensors: by published name; only shapes and dtypes count.
        max_shard_bytes: a larger model is split into several files.
    """

    def __init__(self, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
        self.shards = split_shards(tensors, max_shard_bytes)
        self.files = shard_names(len(self.shards))
        self.headers = [tensors_entries(shard) for shard in self.shards]
        self.sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in self.shards]


class Publisher:
    """Publishes merges as folders, keeps the last few and the best; ``latest`` and ``best`` lead to them.

    Args:
        folder: where the emissions appear.
        keep_last: how many of this run's emissions stay; ``None`` keeps all.
        max_shard_bytes: a larger model is split into several files with an index (Hugging Face's scheme).
    """

    def __init__(self, folder: Path, keep_last: int | None, max_shard_bytes: int) -> None:
        self.folder, self.keep_last, self.max_shard_bytes = folder, keep_last, max_shard_bytes
        self.published: list[str] = []
        self._protected: Collection[int] = ()  # steps of the emissions that stay besides
        self._best: str | None = None  # the name of the one that ``best`` is to lead to
        self._is_pointed_at = False  # whether it does
        self.before_writing: Callable[[], object] = lambda: None  # raises OSError if it may not be done

    def sweep(self) -> None:
        """Removes what a killed process left half written. Only for the one run that uses the folder."""
        for path in [p for p in self.folder.glob(".*") if _DRAFT.fullmatch(p.name)]:
            with contextlib.suppress(OSError):
                clear(path)

    def resume(self, published: Iterable[str], run_id: str, last: int) -> None:
        """Goes on from what a run had published, as far as it is in this folder.

        Args:
            published: when its state was taken.
            run_id: of the run.
            last: step of the merge that was handed in by then, and perhaps published later.
        """
        self.published = [
            name
            for name in (*published, *self._named_after(last, published))
            if find_record(self.folder / name).run_id == run_id
        ]

    def publish(
        self,
        name: str,
        write: Callable[[Path], Mapping[str, str]],
        record: Mapping[str, Any],
        tied: Mapping[str, str] | None = None,
        add_files: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes the merge under a temporary name, makes it durable, then renames it into place.

        Args:
            name: of the folder. If another merge has it already, ``-v1``, ``-v2``, … is added; if the
                very same merge has it, that one stays.
            write: writes the weights into the folder it is given, durably; returns the files' SHA-256.
            record: what ``merge.json`` says, besides the files and their checksums.
            tied: further names of shared tensors, stored once.
            add_files: writes further files (a model's config) into the folder it is given.

        Returns:
            The published folder.

        Raises:
            OSError: if it can't be written. Nothing is left behind.
        """
        self.before_writing()
        make_folder(self.folder)
        with draft(self.folder, name) as made:
            made.mkdir()
            if add_files is not None:
                add_files(made)
            files = dict(write(made))
            write_card(made, record)
            files |= {p.name: file_checksum(p) for p in made.iterdir() if p.name not in files}
            write_json(made / PROVENANCE, {**record, "tied": dict(tied or {}), "files": files})
            target = self._place(made, name, files)
        if find_record(target).run_id == record.get("run_id"):  # else another run's very same merge
            self.published = [*(p for p in self.published if p != target.name), target.name]
        self._conclude(target.name)
        return target

    def protect(self, steps: Collection[int], best: int | None) -> None:
        """Keeps emissions besides the last few, and points ``best`` at one of them.

        Args:
            steps: theirs.
            best: that of the one; ``None`` if nothing is known.
        """
        self._protected = steps
        name = next((n for n in reversed(self.published) if step_of(n) == best), None)
        if name is not None and not (name == self._best and self._is_pointed_at):
            self._best = name
            self._is_pointed_at = self._point_best(name)

    def write_safetensors(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor] | ModelFiles,
        values: Iterable[Tensor],
        tied: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """Writes all shards, and the index if there are several.

        Args:
            folder: where to.
            tensors: by published name, of which only shapes and dtypes count; or the files they make up.
            values: the CPU tensors themselves, one after the other in the order of the files; those of one
                file may come in one piece. None is held for longer than it takes to write it.
            tied: further names of shared tensors.

        Returns:
            The SHA-256 of each file.
        """
        model = tensors if isinstance(tensors, ModelFiles) else ModelFiles(tensors, self.max_shard_bytes)
        if len(model.shards) > 1:
            write_index(folder, model.files, model.shards)
        parts, stream = zip(model.files, model.shards, model.headers, model.sizes, strict=True), iter(values)
        return {
            file: write_file(
                folder / file,
                header,
                _first_bytes(stream, size),
                # The scheme of safetensors.torch.save_model: load_model finds the shared names here.
                {"format": "pt", **{alias: kept for alias, kept in (tied or {}).items() if kept in shard}},
            )
            for file, shard, header, size in parts
        }

    @property
    def newest_step(self) -> int:
        """Of this run's newest emission; -1 if there is none."""
        return max(map(step_of, self.published), default=-1)

    def newest_up_to(self, step: int) -> Path | str | None:
        """The newest of this run's emissions whose snapshots were taken at ``step`` or before."""
        name = self._newest_name(step, self.kept)
        return name and self.folder / name

    @property
    def kept(self) -> list[str]:
        """Those of this run's emissions that nobody has removed, oldest first."""
        return [name for name in self.published if (self.folder / name).is_dir()]

    @property
    def remote_names(self) -> dict[str, str]:
        """The names that emissions have in a remote folder, as far as they are others than here."""
        return {}

    def finish_uploads(self, timeout: float | None = None) -> None:
        """Waits until all that is published is where it belongs, so many seconds at most; here it is."""

    def _named_after(self, step: int, others: Iterable[str]) -> list[str]:
        """Emissions of a step that lie here under a name that a publisher gave them."""
        found = sorted(self.folder.glob(f"step={step:08d}-*")) if step >= 0 else []
        return [p.name for p in found if is_own_name(p.name, find_record(p)) and p.name not in others]

    def _newest_name(self, step: int, names: Sequence[str]) -> str | None:
        return next((name for name in reversed(names) if step_of(name) <= step), None)

    def _conclude(self, name: str) -> None:
        """What follows once a merge is in its place."""
        if self._point(LATEST, name):
            self._retain()

    def _point_best(self, name: str) -> bool:
        """Points ``best`` at an emission; returns whether that need not be tried again."""
        self._point(BEST, name)
        place = self.folder / BEST
        return place.is_symlink() and os.readlink(place) == name

    def _surplus(self, names: Sequence[str]) -> list[str]:
        """Those of some names that are not to be kept any more; oldest first, as these are."""
        older = [] if self.keep_last is None else names[: -self.keep_last]
        return [name for name in older if step_of(name) not in self._protected]

    def _place(self, made: Path, name: str, files: Mapping[str, str]) -> Path:
        for path in made.iterdir():  # the files that add_files wrote are not durable yet
            sync(path)
        sync(made)
        target, version = self.folder / name, 0
        while target.exists():
            if _holds(target, files):
                return target
            version += 1
            target = self.folder / f"{name}-v{version}"
        put_in_place(made, target)
        return target

    def _point(self, pointer: str, name: str) -> bool:
        place = self.folder / pointer
        try:
            with replacing(place) as link:  # durably: the merge that it pointed at may go
                link.symlink_to(name, target_is_directory=True)
        except OSError as error:
            log.warning("merge: could not point %s at %s: %s", place, name, error)
            return not place.is_symlink()  # it still points at an older merge: that one stays
        return True

    def _retain(self) -> None:
        for name in self._surplus(self.published):
            self.published.remove(name)
            self._remove(name)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            remove_emission(self.folder, name)


def remove_emission(folder: Path, name: str) -> None:
    """Removes an emission, so that what is visible under its name is complete, also after a power loss.

    Raises:
        OSError: if it can't be removed, or not as a whole.
    """
    doomed = hidden_path(folder, name, "old")  # renamed first, and durably
    clear(doomed)
    os.rename(folder / name, doomed)
    sync(folder)
    clear(doomed)


def finish_removals(folder: Path) -> None:
    """Removes what is left of emissions whose removal was broken off: nothing leads to them any more."""
    for path in [p for p in folder.glob(".*") if _DOOMED.fullmatch(p.name)]:
        with contextlib.suppress(OSError):  # another process may be at it
            clear(path)


def _first_bytes(stream: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """So many bytes of a stream of tensors, as far as it has them."""
    while size > 0 and (tensor := next(stream, None)) is not None:
        size -= tensor.nbytes
        yield tensor


def step_of(name: str) -> int:
    """The step in an emission's name."""
    return int(name.removeprefix("step=").partition("-")[0])


def is_own_name(name: str, record: MergeRecord) -> bool:
    """Whether a publisher named a folder so, and not somebody who has kept a copy."""
    method = record.content.get("method")
    if record.step is None or not isinstance(method, dict) or not isinstance(method.get("name"), str):
        return False
    own = emission_name(method["name"], record.step, record.tokens)
    return re.fullmatch(rf"{re.escape(own)}(-v\d+)?", name) is not None


def _holds(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a folder's files are, on disk and not only by its record, the ones with these checksums.

    Its card aside, which tells the metrics that were known by then, and which somebody may have edited.
    """
    if find_record(folder).own_files != {name: files[name] for name in files if name != CARD}:
        return False
    own = [folder / name for name in files if name != CARD]
    return all(path.is_file() and file_checksum(path) == files[path.name] for path in own)
