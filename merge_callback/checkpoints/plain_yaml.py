"""YAML of anyone's: plain values, and no aliases, which make gigabytes out of a few lines."""

from __future__ import annotations

from typing import Any

import yaml


def read_value(text: str) -> Any:
    """One value, as YAML has it.

    Raises:
        ValueError: if it is not YAML, or holds more than plain values; in one line.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        # Aliases of aliases, and mappings merged into mappings, make gigabytes out of a few lines.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise ValueError("it uses aliases (*name), which are not read; write the values out")
        return yaml.load(text, loader)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(f"not sound YAML ({' '.join(str(error).split())})") from None
