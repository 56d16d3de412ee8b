"""The scalars that a module logs in training, as they come: on their device, without waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning.pytorch import Trainer
from torch import Tensor


class LoggedScalars:
    """What ``self.log`` was given since the last step, under names that match a pattern.

    Only what is logged per step counts (``on_step=True``, the default in training): of the rest Lightning
    keeps no single values.

    Args:
        trainer: in fit.
        patterns: ``fnmatch`` patterns of names.
    """

    def __init__(self, trainer: Trainer, patterns: Sequence[str]) -> None:
        self._trainer, self._patterns = trainer, patterns
        self._matches: dict[str, bool] = {}
        self._last: dict[str, Tensor] = {}
        self._names: set[str] = set()

    @property
    def names(self) -> list[str]:
        """All that have been seen so far."""
        return sorted(self._names)

    def new_values(self) -> dict[str, Tensor]:
        """By name. Each value is given once."""
        found = {}
        for key, result in (self._trainer._results or {}).items():
            matches = self._matches.get(key)
            if matches is None:
                name = result.meta.name
                matches = self._matches[key] = any(fnmatchcase(name, pattern) for pattern in self._patterns)
            value = result._forward_cache if matches else None
            if value is not None and value is not self._last.get(key) and not result.has_reset:
                found[result.meta.name] = self._last[key] = value
                self._names.add(result.meta.name)
        return found
