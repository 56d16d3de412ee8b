"""What ``from_pretrained`` needs beside the weights, for a module that wraps a Hugging Face model."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

from torch import nn

from merge_callback.snapshots.capture import clean_name

log = logging.getLogger(__name__)


def find_pretrained(module: nn.Module) -> tuple[str, Any] | None:
    """The one outermost ``PreTrainedModel`` inside ``module`` and the prefix of its tensors' names.

    ``None`` if there is none, or several (which of them to export would be a guess), and if peft has put
    adapters into it: the names of its layers are not those that ``from_pretrained`` knows.
    """
    transformers = sys.modules.get("transformers")  # imported by whoever built such a model
    if transformers is None:
        return None
    embedding = getattr(sys.modules.get("sentence_transformers"), "SentenceTransformer", ())
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        if isinstance(part, embedding):  # it has more than that: a pooling, layers of its own
            return None
        name = clean_name(name)
        if _is_adapted(part):
            return None
        if isinstance(part, transformers.PreTrainedModel) and not any(
            not outer or name.startswith(f"{outer}.") for outer in found
        ):
            found[name] = part
    if len(found) != 1:
        return None
    name, model = next(iter(found.items()))
    return (f"{name}." if name else ""), model


def _is_adapted(part: nn.Module) -> bool:
    """Whether peft has wrapped a model, or put a layer of its own into it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(part, (peft.PeftModel, peft.tuners.tuners_utils.BaseTunerLayer))


def write_config(model: Any, folder: Path) -> None:
    """Writes ``config.json`` (and ``generation_config.json``) as ``save_pretrained`` would.

    A configuration that its library refuses to save is reported; the weights are published without it.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # which fully_shard puts before it
    config.dtype = model.dtype
    configs = [config, model.generation_config if model.can_generate() else None]
    for part in configs:
        try:
            if part is not None:
                part.save_pretrained(folder)
        except ValueError as error:
            log.warning("merge: published without %s: %s", type(part).__name__, error)
