"""Safetensors files and folders: Hugging Face's, our emissions, our snapshots."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_callback.checkpoints.checkpoint import (
    NOT_ALONE,
    Checkpoint,
    is_frozen_part,
    parse_count,
    read_json,
    segment_of,
    step_in_name,
)
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import CONFIG, INDEX, MANIFEST, PROVENANCE, TRAINER_STATE, WEIGHTS
from merge_callback.checkpoints.mapped_file import map_safetensors
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.model_folder import check_whole, extras
from merge_callback.snapshots.files import CorruptFileError, read_small

_SNAPSHOT_KEYS = {"layout", "lr_step", "phase", "since", "step"}
_OTHER = re.compile(r"(model|diffusion_pytorch_model)(\.\w+)?\.safetensors(\.index(\.\w+)?\.json)?")
"""Names that libraries give a model's only weights, in a variant such as ``fp16``; or the index of them."""


_SHARED = re.compile(
    r"(.+\.)?(lm_head|embed_out|output_projection|output_layer|embed_tokens|wte|shared|word_embeddings|decoder)"
    r"\.(weight|bias)"
)
"""What the layers at both ends of a language model are called, which may share their weights."""


def open_file(path: Path) -> Checkpoint:
    """One safetensors file, which may be a snapshot of our window.

    Raises:
        CorruptFileError: where it breaks a rule of the format.
        ValueError: where it is no model, but what snapshots have in common.
        OSError: where it can't be opened.
    """
    tensors, metadata = map_safetensors(path)
    if is_frozen_part(metadata):
        raise ValueError(f"{path}: {NOT_ALONE}")
    snapshot = metadata.keys() >= _SNAPSHOT_KEYS
    return Checkpoint(
        path=path,
        tensors=tensors,
        tied={} if snapshot else _aliases(tensors, metadata),
        step=_first(parse_count(metadata.get("step")), step_in_name(path)),
        tokens=parse_count(metadata.get("tokens")),
        files=[path],
        extras=[],
        format="snapshot" if snapshot else "safetensors",
        difference_to=parse_count(metadata.get("difference_to")) if snapshot else None,
        frozen=metadata.get("frozen", "") if snapshot else "",
        frozen_checksum=metadata.get("frozen_checksum", ""),
        segment=segment_of(metadata) if snapshot else None,
    )


def open_folder(folder: Path) -> Checkpoint:
    """A folder with ``model.safetensors``, or with shards and an index; an emission if it has ``merge.json``.

    Raises:
        CorruptFileError: where a file is broken, or index and files disagree, or one leads out of the folder.
        FileNotFoundError: where a file is missing.
        ValueError: where the folder has both, or neither.
    """
    check_whole(folder)
    files, index = weight_files(folder)
    merge = read_record(folder) if (folder / PROVENANCE).exists() else None
    record = merge.content if merge else trainer_record(folder)
    tensors, aliases, shards = _read_shards(folder, files)
    taken, left_out = extras(folder, {*files, index})
    return Checkpoint(
        path=folder,
        tensors=tensors,
        tied=merge.tied(tensors) if merge else aliases,
        step=_first(parse_count(record.get("step")), step_in_name(folder)),
        tokens=parse_count(record.get("tokens")),
        files=[folder / file for file in files],
        extras=taken,
        format="emission" if merge else "safetensors",
        segment=segment_of(record),
        shards=shards,
        index=index,
        left_out=left_out,
    )


def weight_files(folder: Path) -> tuple[dict[str, set[str] | None], str]:
    """The files a folder's weights are in, each with the names an index gives it (``None``: no index).

    And the name of that index, which is empty where there is none. ``model.safetensors`` and its index go
    before what other libraries call a model's weights, and those before a variant of the same.

    Raises:
        CorruptFileError: where the index is broken.
        ValueError: where it is not clear which files, or there are none.
    """
    indices = sorted(path.name for path in folder.glob("*.safetensors.index*.json"))
    single = (folder / WEIGHTS).exists()
    if not single and INDEX not in indices and (others := other_weights(folder)):
        if len(others) > 1:
            raise ValueError(f"{folder}: has {', '.join(others)}; move away all but one, or give a file")
        index = others[0] if others[0].endswith(".json") else ""
        return read_index(folder, index) if index else {others[0]: None}, index
    if INDEX in indices or (len(indices) == 1 and not single):
        index = INDEX if INDEX in indices else indices[0]
        files = read_index(folder, index)
        if single and WEIGHTS not in files:
            raise ValueError(
                f"{folder}: has both {WEIGHTS} and {INDEX}, of other files; remove the one left over"
            )
        return files, index
    if single:
        return {WEIGHTS: None}, ""
    raise ValueError(f"{folder}: {_whats_wrong(folder, indices)}")


def other_weights(folder: Path) -> list[str]:
    """The weights, or the index of them, that another library than transformers names so; variants last.

    One, or several that are all variants; none where there are no such names.
    """
    found = [match for path in sorted(folder.iterdir()) if (match := _OTHER.fullmatch(path.name))]
    return [m[0] for m in found if not m[2] and not m[4]] or [m[0] for m in found]


def recorded_step(folder: Path) -> int | None:
    """The step that a folder's ``merge.json`` or ``trainer_state.json`` tells."""
    record = read_json(folder, PROVENANCE) or trainer_record(folder)
    return parse_count(record.get("step"))


def _whats_wrong(folder: Path, indices: list[str]) -> str:
    if len(indices) > 1:
        return f"has several indices ({', '.join(indices)}), none of them {INDEX}; move the others away"
    mend = "give a checkpoint file, or a folder with safetensors files or a DCP .metadata"
    if (folder / MANIFEST).exists():
        mend = "it is a window of snapshots: give one of them"
    elif any(folder.glob("zero_pp_rank_*")) or any(folder.glob("*/zero_pp_rank_*")):
        mend = "DeepSpeed's ranks hold parts of it: run its zero_to_fp32.py and give what that writes"
    elif others := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        mend = f"give the file itself: {folder / others[0]}"
    elif any(folder.glob("mp_rank_*/*.pt")):
        mend = "each rank of Megatron has a part in it: convert it to torch_dist or Hugging Face's format"
    elif any(folder.glob("*.distcp")):
        mend = "a distributed checkpoint without its .metadata was never finished: use an earlier one"
    return f"holds neither {WEIGHTS} nor an index of shards; {mend}"


def read_index(folder: Path, name: str) -> dict[str, set[str] | None]:
    """The files that an index names, each with the names of its tensors.

    Raises:
        CorruptFileError: where it is broken, or names a file elsewhere.
    """
    path = contained(folder, name)
    try:
        content = json.loads(read_small(path))
    except CorruptFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not sound JSON ({error})") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{path}: has no weight_map, which tells the file of each tensor")
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        contained(folder, file)
        files.setdefault(file, set()).add(tensor)
    return {**files}


def _read_shards(
    folder: Path, files: Mapping[str, set[str] | None]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[str]]]:
    """The tensors of all files, further names of shared ones, and which file has which."""
    tensors: dict[str, Tensor] = {}
    shards: dict[str, list[str]] = {}
    aliases: dict[str, str] = {}
    for file, expected in files.items():
        path = contained(folder, file)
        found, metadata = map_safetensors(path)
        check_named(folder, path, expected, found)
        shards[file] = [name for name in found if name not in tensors]
        tensors |= found
        aliases |= _aliases(found, metadata)
    return tensors, {alias: kept for alias, kept in aliases.items() if alias not in tensors}, shards


def check_named(folder: Path, path: Path, expected: set[str] | None, found: Mapping[str, Tensor]) -> None:
    """Makes sure that a shard has the tensors that the index names, if there is one.

    An output layer that shares its weights with the embedding may be missing: some writers list it, and save
    the embedding alone.

    Raises:
        CorruptFileError: where it has others.
    """
    if expected is None:
        return
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if extra or not all(_SHARED.fullmatch(name) and _ties_embeddings(folder) for name in missing):
        raise CorruptFileError(
            f"{path}: other tensors than the index names: missing {missing[:3]} ({len(missing)} in all), "
            f"unexpected {extra[:3]} ({len(extra)} in all); index and shards must be of one save"
        )


def _ties_embeddings(folder: Path) -> bool:
    config = read_json(folder, CONFIG)
    inner = config.get("text_config")
    told = config.get(
        "tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
    )
    return told is not False


def _aliases(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Shared names, as ``safetensors.torch.save_model`` notes them: among all else the metadata may say."""
    return {
        alias: kept
        for alias, kept in metadata.items()
        if kept in tensors and alias not in tensors and alias != "format"
    }


def trainer_record(folder: Path) -> Mapping[str, Any]:
    """Step and tokens, as Hugging Face's Trainer notes them beside the weights."""
    state = read_json(folder, TRAINER_STATE)
    return {"step": state.get("global_step"), "tokens": state.get("num_input_tokens_seen") or None}


def _first(*steps: int | None) -> int | None:
    return next((step for step in steps if step is not None), None)
