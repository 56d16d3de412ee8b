"""What ``from_pretrained`` needs beside the weights, for a module that wraps a Hugging Face model."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from torch import nn

from merge_callback.snapshots.capture import clean_name


def find_pretrained(module: nn.Module) -> tuple[str, Any] | None:
    """The one outermost ``PreTrainedModel`` inside ``module`` and the prefix of its tensors' names.

    ``None`` where there is none, or several (which of them to export would be a guess).
    """
    transformers = sys.modules.get("transformers")  # imported by whoever built such a model
    if transformers is None:
        return None
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        name = clean_name(name)
        if isinstance(part, transformers.PreTrainedModel) and not any(
            name.startswith(f"{n}.") for n in found
        ):
            found[name] = part
    if len(found) != 1:
        return None
    name, model = next(iter(found.items()))
    return (f"{name}." if name else ""), model


def write_config(model: Any, folder: Path) -> None:
    """Writes ``config.json`` (and ``generation_config.json``) as ``save_pretrained`` would."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
