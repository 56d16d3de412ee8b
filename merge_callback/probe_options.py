"""The options of functional diversity, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merge_callback.checks import patterns

VALIDATION = "validation"
"""The probe batch is the first batch of the run's own validation."""

_NO_BATCH = (type(None), str, bytes, bool, int, float)


@dataclass(frozen=True, eq=False)
class ProbeOptions:
    """On which batch, and at which layers, functional diversity is measured.

    Example::

        CheckpointMergeCallback(every_n_steps=2_000, probe=ProbeOptions(layers=["model.layers.*"]))

    Args:
        batch: ``"validation"`` takes the first 8 sequences of the first validation batch. Or a batch, or a
            function that returns one: a tensor, a mapping by the names that the model's ``forward`` takes, or
            a tuple whose first items it takes.
        layers: ``fnmatch`` patterns of the modules whose activations are compared. By default the blocks of
            the model's largest stack of blocks.

    Raises:
        ValueError: for an option that makes no sense; the message names it, its value and the remedy.
    """

    batch: Any = VALIDATION
    layers: tuple[str, ...] = ()

    @property
    def is_validation(self) -> bool:
        """Whether the run's validation supplies the batch."""
        return isinstance(self.batch, str)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", patterns("layers", self.layers))
        if isinstance(self.batch, _NO_BATCH) and self.batch != VALIDATION:
            raise ValueError(
                f"probe={self.batch!r} must be {VALIDATION!r}, a batch, or a function that returns one; None "
                "for no probe"
            )


def resolve_probe(probe: Any) -> ProbeOptions | None:
    """The options of a probe; ``None`` if nothing is measured.

    Raises:
        ValueError: for anything that is no batch.
    """
    if probe is None or probe is False:
        return None
    if isinstance(probe, ProbeOptions):
        return probe
    return ProbeOptions(VALIDATION if probe is True else probe)
