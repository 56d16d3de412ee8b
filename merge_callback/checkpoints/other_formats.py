"""Formats that are not read, each told by its names or first bytes, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from merge_callback.checkpoints.file_names import MANIFEST, WEIGHTS

_OLD = (
    "not a file of torch.save since torch 1.6, so it cannot be mapped; load it with the torch that wrote it "
    "and save it again, without _use_new_zipfile_serialization=False"
)
_AGAIN = "load it with what wrote it, and save its state dict with torch.save or safetensors"
_FIRST_BYTES = (
    (b"", "is empty; its copy or download was never finished: fetch it again"),
    (b"version https://git-lfs", "is a pointer of Git LFS and not the file itself: run `git lfs pull`"),
    (
        b"GGUF",
        "is a GGUF file, whose weights are quantised in blocks; merge the checkpoints it was made from",
    ),
    (b"\x89HDF\r\n", f"is an HDF5 file, as of Keras; {_AGAIN}"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it and give what is in it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard; unpack it and give what is in it"),
    (b"BZh", "is compressed by bzip2; unpack it and give what is in it"),
    (b"\xfd7zXZ\x00", "is compressed by xz; unpack it and give what is in it"),
    (b"\x93NUMPY", f"is an array of NumPy; {_AGAIN}"),
    (b"<", "is a web page, as a failed download leaves it: fetch the file itself"),
    (b"PK\x05\x06", "is an empty archive: fetch or save it again"),
)


def what_else(head: bytes) -> str:
    """What a file is that is no zip archive, and what to do.

    Args:
        head: its first 512 bytes, or all if it has fewer.
    """
    for start, what in _FIRST_BYTES:
        if head.startswith(start) if start else not head:
            return what
    if head[257:262] == b"ustar":
        return "is a tar archive, as a .nemo file is; unpack it and give the checkpoint that is in it"
    if head[8:9] == b"{" and not any(head[5:8]):
        return "is a safetensors file by another name; rename it to end in .safetensors"
    if re.match(rb"\x80[\x02-\x05]", head):
        return _OLD
    return f"not a file of torch.save since torch 1.6 (it begins with {head[:8].hex(' ')}); {_AGAIN}"


def what_folder(folder: Path) -> str:
    """What a folder is that no reader matches, and what to do."""
    remedy = "give a checkpoint file, or a folder with safetensors files or a DCP .metadata"
    if (folder / MANIFEST).exists():
        remedy = "it is a window of snapshots: give one of them"
    elif any(folder.glob("zero_pp_rank_*")) or any(folder.glob("*/zero_pp_rank_*")):
        remedy = "DeepSpeed's ranks hold parts of it: run its zero_to_fp32.py and give what that writes"
    elif others := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        remedy = f"give the file itself: {folder / others[0]}"
    elif any(folder.glob("mp_rank_*/*.pt")):
        remedy = "each rank of Megatron has a part in it: convert it to torch_dist or Hugging Face's format"
    elif any(folder.glob("*.distcp")):
        remedy = "a distributed checkpoint without its .metadata was never finished: use an earlier one"
    return f"holds neither {WEIGHTS} nor an index of shards; {remedy}"


def what_archive(names: Sequence[str]) -> str | None:
    """What a zip archive is, if it is one that others than ``torch.save`` write.

    Args:
        names: of what is in it.
    """
    if any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.+)", name) for name in names):
        return "is a TorchScript program; load it with torch.jit.load and save its state_dict()"
    if any(name.endswith(".npy") for name in names):
        return f"is an archive of NumPy arrays; {_AGAIN}"
    if "model.weights.h5" in names:
        return f"is a model of Keras; {_AGAIN}"
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
