"""The adapter that peft has put into a model, as files that ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from merge_callback.checkpoints.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from merge_callback.messages import info
from merge_callback.snapshots.capture import clean_name
from merge_callback.snapshots.safetensors_file import tensors_header, write_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """The active adapter of a model.

    Args:
        model: with a ``peft_config``: a ``PeftModel``, or a model that transformers has put adapters into.
        name: of the adapter.
        prefix: of the model's tensors within the module.
        before: what peft has before the names of such a model in an adapter's file.
    """

    model: Any = field(repr=False)
    name: str
    prefix: str
    before: str = ""

    @classmethod
    def of(cls, module: nn.Module) -> Adapter | None:
        """The one adapter that ``module`` trains; ``None`` if it has none, or none that can be told apart."""
        if (peft := sys.modules.get("peft")) is None:  # imported by whoever has put one in
            return None
        found: dict[str, Any] = {}
        for name, part in module.named_modules():
            is_outermost = not any(not outer or name.startswith(f"{outer}.") for outer in found)
            if is_outermost and (isinstance(part, peft.PeftModel) or _has_own_adapters(part)):
                found[name] = part
        if not found:
            return None
        (name, model), *others = found.items()
        active = model.active_adapters
        active = list(active() if callable(active) else active)
        if others or len(active) != 1 or model.peft_config[active[0]].is_prompt_learning:
            info(
                "merge: merges are published as the whole module: for several models with adapters, several "
                "active adapters, or learned prompts, no adapter_model.safetensors is written"
            )
            return None
        prefix = f"{clean_name(name)}." if clean_name(name) else ""
        before = "" if isinstance(model, peft.PeftModel) else "base_model.model."
        return cls(model, active[0], prefix, before)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes the adapter's configuration and weights; reports why, if peft can't tell them.

        Args:
            folder: where to.
            tensors: a merge, by the names within the module.
        """
        from peft import get_peft_model_state_dict
        from peft.utils.constants import EMBEDDING_LAYER_NAMES

        # In peft's "auto" mode each call asks the Hub whether the vocabulary was enlarged.
        targets = getattr(self.model.peft_config[self.name], "target_modules", None) or ()
        own = {n.removeprefix(self.prefix): t for n, t in tensors.items() if n.startswith(self.prefix)}
        try:
            state = get_peft_model_state_dict(
                self.model,
                state_dict=own,
                adapter_name=self.name,
                save_embedding_layers=not {*EMBEDDING_LAYER_NAMES}.isdisjoint(targets),
            )
            weights = {self.before + name: tensor.contiguous() for name, tensor in state.items()}
            self._write_config(folder)
        except Exception as error:
            log.warning("merge: published without %s: %r", ADAPTER_WEIGHTS, error)
            (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
            return
        write_file(folder / ADAPTER_WEIGHTS, tensors_header(weights), weights.values(), {"format": "pt"})

    def _write_config(self, folder: Path) -> None:
        """As ``save_pretrained`` of peft's model would, without changing the live one for a moment."""
        config = copy.copy(self.model.peft_config[self.name])
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = vars(base).get("name_or_path") or None
        kind = type(base)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else mapping)


def _has_own_adapters(part: nn.Module) -> bool:
    """Whether transformers itself has put adapters into a model of its own (``add_adapter``)."""
    return bool(getattr(part, "_hf_peft_config_loaded", False))
