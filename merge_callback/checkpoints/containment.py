"""Which files a folder may name: an index, a manifest or a metadata file may come from anywhere."""

from __future__ import annotations

from pathlib import Path

from merge_callback.snapshots.files import CorruptFileError, printable


def contained(folder: Path, name: object) -> Path:
    """The file ``name`` of a folder, if it may be read on the word of another file in it.

    A name must be plain: no separators, no ``..``. A symlink must end in the same folder or, as in the cache
    of Hugging Face (``<repo>/snapshots/<revision>/model.safetensors -> ../../blobs/<hash>``), in the folder
    ``blobs`` beside the ``snapshots`` that the folder lies in. The path that the user gave may itself be, or
    lead through, any symlink.

    Raises:
        CorruptFileError: if the name or the link leaves the folder.
        FileNotFoundError: if there is no such regular file.
    """
    if not isinstance(name, str) or name in {"", ".", ".."} or set(name) & {"/", "\\", "\0"}:
        raise CorruptFileError(
            f"{folder}: refers to the file {name!r}, expected a plain name within the folder"
        )
    root, shown = folder.resolve(), printable(str(folder / name))
    try:
        target = (root / name).resolve()
    except RuntimeError:  # what Python before 3.13 says of a link that leads to itself
        raise CorruptFileError(f"{shown} is a link that leads to itself") from None
    if target.parent not in (root, _blobs(root)):
        raise CorruptFileError(
            f"{shown} is a link to {printable(str(target))}, outside of the folder; "
            "put the file itself there if it belongs to the checkpoint"
        )
    if not target.is_file():
        raise FileNotFoundError(f"{shown} is missing, or no regular file")
    return folder / name


def contained_below(folder: Path, name: object) -> Path:
    """The file ``name`` of a folder or of one in it (``1_Pooling/config.json``), which must be no link.

    Raises:
        CorruptFileError, FileNotFoundError: as above.
    """
    above = name.split("/")[:-1] if isinstance(name, str) else []
    if {"", ".", ".."} & {*above}:
        return contained(folder, name)  # which refuses it
    for part in above:
        folder = folder / part
        if folder.is_symlink() or not folder.is_dir():
            raise CorruptFileError(f"{printable(str(folder))}: is no folder that a file of it is read from")
    return contained(folder, name.split("/")[-1] if isinstance(name, str) else name)


def _blobs(root: Path) -> Path | None:
    """Where the cache of Hugging Face keeps the files of a snapshot folder, if this is one."""
    return next((p.parent / "blobs" for p in (root, *root.parents) if p.name == "snapshots"), None)
