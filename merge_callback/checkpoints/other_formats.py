"""Formats that are not read, each told by its names or first bytes, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from merge_callback.checkpoints.file_names import LATEST, MANIFEST, WEIGHTS

_OLD = (
    "not a file of torch.save since torch 1.6, so it cannot be mapped; load it with the torch that wrote it "
    "and save it again, without _use_new_zipfile_serialization=False"
)
_AGAIN = "load it with what wrote it, and save its state dict with torch.save or safetensors"
_GGUF = "is a GGUF file, whose weights are quantised in blocks; merge the checkpoints it was made from"
_HDF5 = f"is an HDF5 file, as of Keras; {_AGAIN}"
_KERAS = f"is a model of Keras; {_AGAIN}"
_TAR = "is a tar archive, as a .nemo file is; unpack it and give the checkpoint that is in it"
_EXPORTED = "is a program of torch.export; load it with torch.export.load and save its state_dict"
_ARRAYS = f"is an archive of NumPy arrays; {_AGAIN}"
_FIRST_BYTES = (
    (b"", "is empty; its copy or download was never finished: fetch it again"),
    (b"version https://git-lfs", "is a pointer of Git LFS and not the file itself: run `git lfs pull`"),
    (b"GGUF", _GGUF),
    (b"\x89HDF\r\n", _HDF5),
    (b"\x1f\x8b", "is compressed by gzip; unpack it and give what is in it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard; unpack it and give what is in it"),
    (b"BZh", "is compressed by bzip2; unpack it and give what is in it"),
    (b"\xfd7zXZ\x00", "is compressed by xz; unpack it and give what is in it"),
    (b"\x93NUMPY", f"is an array of NumPy; {_AGAIN}"),
    (b"<", "is a web page, as a failed download leaves it: fetch the file itself"),
    (b"PK\x05\x06", "is an empty archive: fetch or save it again"),
)


_BY_NAME = {
    ".onnx": "is a program of ONNX; merge the checkpoints that it was exported from",
    ".msgpack": f"holds weights of Flax; {_AGAIN}",
    ".pb": f"is of TensorFlow; {_AGAIN}",
    ".index": f"is of a checkpoint of TensorFlow; {_AGAIN}",
    ".tflite": "is a program of TensorFlow Lite; merge the checkpoints that it was exported from",
    ".gguf": _GGUF,
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    ".keras": _KERAS,
    ".nemo": _TAR,
    ".tar": _TAR,
    ".pt2": _EXPORTED,
    ".npz": _ARRAYS,
}
"""Endings of files that are not read, whatever is in them."""


def what_else(name: str, head: bytes) -> str:
    """What a file is that is no zip archive, and what to do.

    Args:
        name: of the file.
        head: its first 512 bytes, or all if it has fewer.
    """
    for start, what in _FIRST_BYTES:
        if head.startswith(start) if start else not head:
            return what
    if head[257:262] == b"ustar":
        return _TAR
    if head[8:9] == b"{" and not any(head[5:8]):
        return "is a safetensors file by another name; rename it to end in .safetensors"
    if re.match(rb"\x80[\x02-\x05]", head):
        return _OLD
    if by_name := _BY_NAME.get(Path(name).suffix):
        return by_name
    return f"not a file of torch.save since torch 1.6 (it begins with {head[:8].hex(' ')}); {_AGAIN}"


def what_folder(folder: Path) -> str:
    """What a folder is that no reader matches, and what to do."""
    remedy = "give a checkpoint file, or a folder with safetensors files or a DCP .metadata"
    if (folder / MANIFEST).exists():
        remedy = "it is a window of snapshots: give one of them"
    elif (folder / LATEST).exists():
        remedy = f"it is the folder of a run's merges: give one of them, such as {folder / LATEST}"
    elif other := what_in_folder(folder):
        remedy = other
    elif others := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        remedy = f"give the file itself: {folder / others[0]}"
    return f"holds neither {WEIGHTS} nor an index of shards; {remedy}"


def what_in_folder(folder: Path) -> str | None:
    """What to do about a folder that holds the checkpoint of a trainer in a format that is not read."""
    if any(folder.glob("zero_pp_rank_*")) or any(folder.glob("*/zero_pp_rank_*")):
        return "DeepSpeed's ranks hold parts of it: run its zero_to_fp32.py and give what that writes"
    if any(folder.glob("mp_rank_*/*.pt")) or any(folder.glob("*/mp_rank_*/*.pt")):
        return "each rank of Megatron has a part in it: convert it to torch_dist or Hugging Face's format"
    if any(folder.glob("*.distcp")):
        return "a distributed checkpoint without its .metadata was never finished: use an earlier one"
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _BY_NAME)
    return f"{found[0]} {_BY_NAME[Path(found[0]).suffix]}" if found else None


def what_archive(names: Sequence[str]) -> str | None:
    """What a zip archive is, if it is one that others than ``torch.save`` write.

    Args:
        names: of what is in it.
    """
    if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.+)", name) for name in names):
        return "is a TorchScript program; load it with torch.jit.load and save its state_dict()"
    if any(name.endswith(".npy") for name in names):
        return _ARRAYS
    if "model.weights.h5" in names:
        return _KERAS
    # The last one is how torch 2.6 saves them.
    exported = ("/archive_format", "/sample_inputs/model.pt", "serialized_exported_program.json")
    if any(name.endswith(exported) for name in names):
        return _EXPORTED
    if any(re.search(r"(^|/)data\.pkl$", name) for name in names):
        return None
    inside = [
        name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".distcp"))
    ]
    return (
        f"is an archive of files ({inside[0]}, …); unpack it and give the checkpoint in it"
        if inside
        else None
    )
