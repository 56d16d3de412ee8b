"""Notices a module whose hooks put other weights in for a validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merge_callback.trainers.lightning.undisturbed import replaced

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_TENSORS, _ELEMENTS = 16, 64  # of the largest parameters; hooks that swap weights change nearly all of them


class SeenWeights:
    """A sample of the trained weights that a validation is run with.

    Of sharded weights there is none.

    Args:
        trainer: in fit.
        module: its module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._live: list[Tensor] = []

    def note_live(self) -> None:
        """Takes the sample in a validation of the live weights, after its first step."""
        self._live = self._sample()

    @contextmanager
    def checked(self) -> Iterator[None]:
        """In this context other weights are validated, which have just been put in.

        Raises:
            RuntimeError: on exit, if it was run with those of the validation of the live weights.
        """
        put_in, seen, strategy = self._sample(), list[Tensor](), self._trainer.strategy
        step = strategy.validation_step

        def validation_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            if not seen:
                seen.extend(self._sample())
            return output

        with replaced(strategy, "validation_step", validation_step):
            yield
        if seen and _are_same(seen, self._live) and not _are_same(put_in, self._live):
            raise RuntimeError(
                f"hooks of {type(self._module).__name__} put weights of its own in for a validation (an "
                "average?), so the merge can't be validated. If they are registered as buffers or "
                "parameters, they are merged and validated, too; else pass evaluate=False"
            )

    @torch.no_grad()
    def _sample(self) -> list[Tensor]:
        plain = [p for p in self._module.parameters() if p.requires_grad and type(p.data) is Tensor]
        plain = [p for p in plain if p.is_contiguous() and p.untyped_storage().size()]
        largest = sorted(plain, key=nn.Parameter.numel, reverse=True)[:_TENSORS]
        return [p.view(-1)[:: max(1, p.numel() // _ELEMENTS)][:_ELEMENTS].clone() for p in largest]


def _are_same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
