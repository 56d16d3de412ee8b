"""Quantised checkpoints: codes mean something only with their scales, so each alone has no mean.

Eight-bit floats whose scales follow a known rule are multiplied out; all else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.checkpoints.checkpoint import Checkpoint, read_json
from merge_callback.checkpoints.file_names import CONFIG
from merge_callback.checkpoints.reader import OpenOptions
from merge_callback.checkpoints.spool import default_spool, map_tensors

_KEYS = ("quantization_config", "compression_config", "quantization")
_OTHER_CONFIGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_KNOWN_METHODS = {"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark"}
"""Those whose eight-bit floats are weights divided by their scales."""

_EIGHT_BITS = {
    dtype for name in dir(torch) if name.startswith("float8_e") for dtype in [getattr(torch, name)]
}
_CODES = _EIGHT_BITS - {getattr(torch, "float8_e8m0fnu", None)}  # a power of two: always a scale
_PACKED = {torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32}
_SCALES = ("{}_scale_inv", "{}_scale", "{}.scale", "{}_qscale")
_SCALES_OF_WEIGHT = ("scale_weight", "qscale_weight", "scale")
_BESIDE = re.compile(
    r"(.+\.)?((\w+_)?(input|activation|act|output|q|k|v|kv|kv_cache|prob)_(q?scale|scale_inv|scale_ub|amax|zero_point)"
    r"|scale_(input|output)|qscale_act|scaled_fp8)"
)
"""What a layer with such weights has for its activations: it goes with the codes."""

_PARTS = re.compile(
    r"(.+\.)?(absmax|nested_absmax|quant_map|nested_quant_map|quant_state(\..+)?|SCB|CB|weight_format|qweight"
    r"|qzeros|g_idx|(\w+_)?qdata|\w+_packed|W_q|trellis|q_weight|weight_zero_point|_packed_params(\..+)?|\w+_blocks|Qidxs(_\d)?)"
)
"""Names of codes, and of what they are read with: bitsandbytes, GPTQ, AWQ, HQQ, MXFP4, torchao, …"""

_SCALE = re.compile(r"(.+_)?_?(scale_inv|scales?|zeros?|zero_points?|absmax)(_.+)?")
_BLOCK = (128, 128)  # DeepSeek's, which nothing tells if there is no config


def with_plain_weights(checkpoint: Checkpoint, options: OpenOptions) -> Checkpoint:
    """A checkpoint whose eight-bit codes are multiplied with their scales, as fp32; any other as it is.

    Codes ``q`` of shape ``(..., n, m)`` and scales ``s`` make ``q · s``, with one scale for all, for each row
    (``(n,)`` or ``(n, 1)``), or for each block of the config's ``weight_block_size``. Eight-bit floats that
    come without any scales are values of their own, and stay.

    Args:
        checkpoint: as its files have it.
        options: whether this is wanted, and the ``spool``: a folder on a disk with room for the weights as
            fp32; default: ``$TMPDIR``, else ``/var/tmp``.

    Raises:
        ValueError: for codes with another meaning; one is named, and how they were made if that is told.
    """
    if not options.dequantise:
        return checkpoint
    config, tensors = _read(checkpoint, CONFIG), checkpoint.tensors
    told = _told(checkpoint, config)
    scaled = {name.rpartition(".")[0] for name in tensors if _is_called_scale(name)}
    scales: dict[str, str] = {}
    for name, tensor in tensors.items():
        beside_scales = name.rpartition(".")[0] in scaled
        if _is_packed(name, tensor, beside_scales or told is not None):
            raise _refusal(checkpoint, name, told)
        scale = _scale(name, tensors) if tensor.dtype in _CODES else None
        if tensor.dtype in _CODES and (scale or beside_scales or told is not None):
            if scale is None or (told or {}).get("quant_method", "fp8") not in _KNOWN_METHODS:
                raise _refusal(checkpoint, name, told)
            scales[name] = scale
    return _multiplied(checkpoint, scales, told or {}, config, options.spool) if scales else checkpoint


def _multiplied(
    checkpoint: Checkpoint,
    scales: Mapping[str, str],
    told: Mapping[str, Any],
    config: Mapping[str, Any],
    spool: Path | None,
) -> Checkpoint:
    tensors, known = checkpoint.tensors, _block_sizes(told)
    shapes = {name: (torch.float32, tensors[name].shape) for name in scales}
    plain = map_tensors(spool or default_spool(), shapes)
    for name, scale in scales.items():
        factors = _in_dimensions_of(tensors[name], tensors[scale].float())
        blocks = None if factors is None else _blocks(tensors[name].shape, factors.shape, known)
        if factors is None or blocks is None:
            raise ValueError(
                f"{checkpoint.path}: it is not known which of the scales {scale!r} of shape "
                f"{list(tensors[scale].shape)} is for which of the codes {name!r} of shape "
                f"{list(tensors[name].shape)}; merge the checkpoints before they are quantised"
            )
        _multiply(plain[name].copy_(tensors[name]), factors, blocks)
    gone = {*scales.values(), *(name for name in tensors if _BESIDE.fullmatch(name))}
    return replace(
        checkpoint,
        tensors={name: plain.get(name, tensor) for name, tensor in tensors.items() if name not in gone},
        extras=[path for path in checkpoint.extras if path.name not in _OTHER_CONFIGS],
        plain_config={key: value for key, value in config.items() if key not in _KEYS} if config else None,
    )


def _told(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the files beside the weights say of the quantisation; ``None`` if there is nothing."""
    found = [config.get(key) for key in _KEYS]
    found += [_read(checkpoint, name) for name in _OTHER_CONFIGS]
    return next((content for content in found if isinstance(content, dict) and content), None)


def _read(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    if checkpoint.path.is_dir():
        return read_json(checkpoint.path, name)
    with suppress(ValueError, OSError):  # what lies beside a file that was given need not belong to it
        return read_json(checkpoint.path.parent, name)
    return {}


def _is_called_scale(name: str) -> bool:
    return _SCALE.fullmatch(name.rpartition(".")[2]) is not None and _BESIDE.fullmatch(name) is None


def _is_packed(name: str, tensor: Tensor, told: bool) -> bool:
    """Whether a tensor is a code of something other than an eight-bit float, or bytes that belong to one."""
    if tensor.numel() < 2 or (tensor.is_floating_point() and tensor.dtype not in _CODES):
        return False
    if _PARTS.fullmatch(name):
        return True
    is_weight = name.endswith("weight") and tensor.dim() > 1
    return tensor.dtype in _PACKED and (is_weight or (told and not _is_called_scale(name)))


def _refusal(checkpoint: Checkpoint, name: str, told: Mapping[str, Any] | None) -> ValueError:
    method = (told or {}).get("quant_method")
    made = f" ({method!r:.50}, its configuration says)" if method else ""
    dtype = str(checkpoint.tensors[name].dtype).removeprefix("torch.")
    return ValueError(
        f"{checkpoint.path}: {name!r} holds {dtype} codes of quantised weights{made}, which have no mean "
        "without their scales; merge the checkpoints before they are quantised, or save them dequantised"
    )


def _scale(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a code's scales, if there is one place for them."""
    module, dot, last = name.rpartition(".")
    names = [pattern.format(name) for pattern in _SCALES]
    names += [f"{module}{dot}{other}" for other in _SCALES_OF_WEIGHT if last == "weight"]
    found = [
        n for n in names if n in tensors and tensors[n].is_floating_point() and tensors[n].dtype not in _CODES
    ]
    return found[0] if len(found) == 1 else None


def _in_dimensions_of(code: Tensor, scales: Tensor) -> Tensor | None:
    if scales.numel() == 1:
        return scales.reshape([1] * code.dim())
    if scales.dim() == 1 and code.dim() > 1 and len(scales) == code.shape[0]:
        return scales.reshape(-1, *[1] * (code.dim() - 1))
    return scales if scales.dim() == code.dim() else None


def _block_sizes(told: Mapping[str, Any]) -> tuple[int, int]:
    """How many rows and columns have one scale, in the last two dimensions of a code."""
    groups = told.get("config_groups")
    weights = (
        [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    )
    found = [
        told.get("weight_block_size"),
        *(w.get("block_structure") for w in weights if isinstance(w, dict)),
    ]
    found += [[1, w["group_size"]] for w in weights if isinstance(w, dict) and w.get("group_size")]
    for sizes in found:
        if isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int and n > 0 for n in sizes):
            return sizes[0], sizes[1]
    return _BLOCK


def _blocks(code: torch.Size, scales: torch.Size, known: tuple[int, int]) -> list[int] | None:
    """How many values share a scale along each dimension; ``None`` if the shapes don't go together."""
    sizes = [*[1] * (len(code) - 2), *known][-len(code) :]
    blocks = []
    for size, count, block in zip(code, scales, sizes, strict=True):
        fits = [b for b, n in ((1, size), (size, 1), (block, ceil(size / block))) if n == count]
        if not fits:
            return None
        blocks.append(fits[0])
    return blocks


def _multiply(values: Tensor, factors: Tensor, blocks: Sequence[int]) -> None:
    """Multiplies each block of values with its factor, in place."""
    for dim, block in enumerate(blocks):
        whole, rest = divmod(values.shape[dim], block)
        if rest and whole:
            last = [*blocks[:dim], rest, *blocks[dim + 1 :]]
            end = whole * block
            _multiply(values.narrow(dim, 0, end), factors.narrow(dim, 0, whole), blocks)
            _multiply(values.narrow(dim, end, rest), factors.narrow(dim, whole, 1), last)
            return
    blocks = [min(block, size) for block, size in zip(blocks, values.shape, strict=True)]
    for dim in reversed(range(values.dim())):
        values = values.view(*values.shape[:dim], -1, blocks[dim], *values.shape[dim + 1 :])
        factors = factors.unsqueeze(dim + 1)
    values.mul_(factors)
