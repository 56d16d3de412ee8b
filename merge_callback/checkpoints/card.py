"""The card of a merge, ``README.md``: what model hubs and people read first.

It holds nothing private: no absolute path, and as the name of a base model only what may be one on a hub.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_callback.checkpoints.checkpoint import read_json
from merge_callback.checkpoints.containment import contained
from merge_callback.checkpoints.file_names import (
    ADAPTER_CONFIG,
    CARD,
    CARD_BEFORE,
    CONFIG,
    MANIFEST,
    MERGED_CKPT,
    PROVENANCE,
)
from merge_callback.checkpoints.merge_record import find_record
from merge_callback.checkpoints.plain_yaml import read_value
from merge_callback.merging import METHODS
from merge_callback.snapshots.files import CorruptFileError, printable, read_small
from merge_callback.snapshots.safetensors_file import file_checksum

log = logging.getLogger(__name__)

_ON_A_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "base_model")
"""What a merge takes over from the metadata of the checkpoint that it is like."""

_MOST = 1 << 18  # bytes of a card that are read
_FEW = 40  # merged checkpoints that are listed


def write_card(folder: Path, record: Mapping[str, Any], like: Path | None = None) -> None:
    """Writes ``README.md`` into the folder of a merge, unless it has one.

    A failure is reported; the merge is published without it.

    Args:
        folder: with the merge's other files.
        record: what ``merge.json`` is going to say.
        like: the checkpoint that the merge is like, whose licence and base model it shares.
    """
    if (folder / CARD).exists():
        return
    try:
        (folder / CARD).write_text(_card(folder, record, like))
    except Exception:  # a record may come from anyone's method
        log.exception("merge: published without %s", CARD)
        (folder / CARD).unlink(missing_ok=True)


def base_model_of(path: Path) -> str:
    """The hub's name of the model that a checkpoint was trained from, as far as it is known; else empty."""
    folder = path if path.is_dir() else path.parent
    sources = (
        find_record(folder).content.get("base_model"),
        _mapping(_json(folder, MANIFEST).get("published")).get("base_model"),
        _json(folder, ADAPTER_CONFIG).get("base_model_name_or_path"),
        _metadata(folder).get("base_model"),
    )
    return next((name for source in sources if (name := public_name(source))), "")


def public_name(name: object) -> str:
    """``name`` if it may be that of a model on a hub, and no path of this machine; else empty.

    >>> public_name("org/model"), public_name("/home/me/model"), public_name("../model")
    ('org/model', '', '')
    """
    if not isinstance(name, str) or not _ON_A_HUB.fullmatch(name) or os.path.exists(name):
        return ""
    return name


def renamed_cards(extras: Mapping[str, Path]) -> dict[str, Path]:
    """What lies beside a checkpoint's weights, by the names it gets beside those of a merge of it.

    Somebody's own card of the checkpoint is kept as ``README.original.md``, for the merge has a card of its
    own; one that we have written, and nobody has edited, goes.
    """
    card = extras.get(CARD)
    if card is None:
        return dict(extras)
    others = {name: path for name, path in extras.items() if name != CARD}
    is_ours = find_record(card.parent).files.get(CARD) == file_checksum(card)
    return others if is_ours else {**others, CARD_BEFORE: card}


def _card(folder: Path, record: Mapping[str, Any], like: Path | None) -> str:
    method = record["method"]
    config, adapter = _json(folder, CONFIG), (folder / ADAPTER_CONFIG).exists()
    kept = {} if like is None else _metadata(like if like.is_dir() else like.parent)
    base = public_name(record.get("base_model")) or base_model_of(folder)
    metadata = {
        **{key: value for key in _KEPT if _is_plain(value := kept.get(key)) and key != "base_model"},
        **({"base_model": base} if base else {}),
        "library_name": "peft" if adapter else "transformers" if "model_type" in config else "merge-callback",
        "tags": ["merge", "merge-callback", method["name"]],
    }
    sources = record.get("inputs") or record.get("snapshots") or []
    parts = [
        f"---\n{_yaml(metadata)}---",
        f"# Merge of {len(sources)} checkpoints{_where(record)}",
        _how(method, sources),
        _table(sources, record.get("weights")),
        _metrics(record.get("metrics") or {}),
        _candidates(_mapping(record.get("candidates"))),
        *_use(folder, config, base if adapter else ""),
        f"`{PROVENANCE}` records how the merge was made, with checksums"
        + (f"; `{CARD_BEFORE}` is the card of a checkpoint." if (folder / CARD_BEFORE).exists() else "."),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _where(record: Mapping[str, Any]) -> str:
    step, tokens = record.get("step"), record.get("tokens")
    counted = f", {tokens:,} tokens" if isinstance(tokens, int) else ""
    return f" up to step {step:,}{counted}" if isinstance(step, int) else ""


def _how(method: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> str:
    kind = METHODS.get(method["name"])
    summary = re.split(r"(?<=[^.…])\.\s", f"{kind.__doc__} " if kind and kind.__doc__ else "")[0]
    meaning = f" ({summary[0].lower()}{summary[1:]})" if summary else ""
    options = "".join(f", `{name}={value}`" for name, value in (method["options"] or {}).items())
    reference = f" Source of the method: {method['reference']}." if method["reference"] else ""
    of = "Snapshots of one training run" if any("phase" in source for source in sources) else "Checkpoints"
    text = f"{of}, merged by `{method['name']}`{meaning}{options}.{reference}"
    return " ".join(text.replace("``", "`").split())


def _table(sources: Sequence[Mapping[str, Any]], weights: Sequence[float] | None) -> str:
    """The merged checkpoints: what is known of each."""
    names = _names([str(source.get("path", "")) for source in sources])
    shares: Sequence[float | None] = weights or [source.get("weight") for source in sources]
    columns = {
        "checkpoint": names,
        "step": [_number(source.get("step")) for source in sources],
        "tokens": [_number(source.get("tokens")) for source in sources],
        "phase": [str(source.get("phase") or "") for source in sources],
        "learning rate": [f"{s['lr']:.3g}" if isinstance(s.get("lr"), float) else "" for s in sources],
        "weight": ["" if share is None else f"{share:.4f}" for share in shares],
    }
    shown = {head: cells for head, cells in columns.items() if any(cells)}
    rows = list(zip(*shown.values(), strict=True))
    more = f"\n\n… and {len(rows) - _FEW} older ones." if len(rows) > _FEW else ""
    return _markdown(list(shown), rows[-_FEW:]) + more


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """What the merge scored in the run's validation, beside the model that was trained."""
    rows = [(name, f"{s['merged']:.6g}", f"{s['live']:.6g}") for name, s in metrics.items()]
    return _markdown(["metric", "merged", "last checkpoint"], rows) if rows else ""


def _candidates(found: Mapping[str, Any]) -> str:
    """What the other merges of the same snapshots scored, by the metric that chose."""
    metric = found.get("select")
    if metric is None:
        return ""
    rows = [
        (
            f"**{one['name']}**" if one["name"] == found["selected"] else one["name"],
            str(one["snapshots"]),
            *(f"{one[kind][metric]:.6g}" if metric in one[kind] else "" for kind in ("metrics", "gains")),
        )
        for one in found["scores"]
    ]
    spread = found.get("spread")
    noise = f" The live {metric} scatters by {spread:.2g} between validations." if spread else ""
    part = f" on the first {found['batches']} batches" if found.get("batches") else ""
    text = f"It was chosen among {len(rows)} merges by {metric}{part}.{noise}"
    return f"{text}\n\n{_markdown(['candidate', 'snapshots', metric, 'gain'], rows)}"


def _use(folder: Path, config: Mapping[str, Any], base: str) -> Iterator[str]:
    """How it is loaded."""
    yield "## Loading"
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds and str(kinds[0]).isidentifier() else "AutoModel"
    if (folder / MERGED_CKPT).exists():
        yield _code(f'model = MyModule.load_from_checkpoint("{MERGED_CKPT}")')
    elif (folder / ADAPTER_CONFIG).exists():
        load = f'AutoModel.from_pretrained("{base}")' if base else "…  # the model it was trained on"
        lines = ["from peft import PeftModel", "", f"base = {load}"]
        yield _code(*lines, 'model = PeftModel.from_pretrained(base, "this folder")')
    elif "model_type" in config:
        yield _code(f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("this folder")')
    else:
        load = 'model.load_state_dict(load_merge("this folder"))'
        yield _code("from merge_callback import load_merge", "", load)


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or the last two if that tells them apart; never more of it."""
    short = [printable(Path(path).name) for path in paths]
    longer = [printable("/".join(Path(path).parts[-2:])) for path in paths]
    return short if len(set(short)) == len(short) else longer


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _yaml(values: Mapping[str, Any]) -> str:
    """Text and lists of text as YAML, which has JSON's strings; without quotes ``no`` would be false."""
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def _metadata(folder: Path) -> Mapping[str, Any]:
    """The metadata of the card in a folder; empty if there is none that can be read."""
    try:
        text = read_small(contained(folder, CARD), _MOST).decode()
        found = re.match(r"---\n(.*?)\n---(\n|\Z)", text, re.DOTALL)
        return _mapping(read_value(found[1])) if found else {}
    except (OSError, ValueError):  # CorruptFileError and UnicodeDecodeError among them
        return {}


def _json(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        return read_json(folder, name)
    except (OSError, CorruptFileError):
        return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_plain(value: object) -> bool:
    """Whether metadata is text, or a list of it."""
    items = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, str) and len(item) < 200 and item.isprintable() for item in items)
