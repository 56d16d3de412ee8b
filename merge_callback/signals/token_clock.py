"""Counts the tokens of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_TOKEN_KEYS = ("input_ids", "tokens", "inputs", "input", "ids", "x")
_SURE_KEYS = ("input_ids", "tokens")  # with any number of dimensions: choices, or codebooks


class TokenClock:
    """Adds up the tokens of the optimizer steps over all ranks.

    On several ranks, or if they are counted on a device, the tokens of a step are known one step later,
    unless they are waited for.

    Args:
        count: returns the tokens of one batch, as a number or as a tensor, which nobody waits for; default:
            ``count_tokens``. It should never wait for a device itself.

    Attributes:
        tokens: tokens of all steps that are known.
        largest: the largest number of tokens of one step.
        countable: whether tokens can be counted; ``None`` before the first batch.
    """

    def __init__(self, count: Callable[[Any], int | Tensor] | None = None) -> None:
        self.count = count or count_tokens
        self.tokens, self.largest = 0, 0
        self.countable: bool | None = None

    def add(self, tokens: float) -> None:
        """Advances the clock by one step; NaN stops it, since no token count is better than a wrong one."""
        if math.isnan(tokens):
            self.countable = False
        else:
            self.tokens += int(tokens)
            self.largest = max(self.largest, int(tokens))


def count_tokens(batch: Any) -> int:
    """Tokens in a batch: the elements of its token ids, padding included.

    Token ids are an integer tensor of two dimensions (batch × sequence): the batch itself, its ``input_ids``
    (or ``tokens``, ``inputs``, ``input``, ``ids``, ``x``), or the first tensor it holds. A tensor of more
    dimensions is an image, a volume or a map of labels, unless it is called ``input_ids`` or ``tokens``.

    Raises:
        ValueError: if that tensor does not hold token ids; the message names the remedies.
    """
    tensor, named = _token_ids(batch)
    kind = None if tensor is None else tensor.dtype
    if tensor is None or kind is None or kind.is_floating_point or kind.is_complex or kind is torch.bool:
        fits = False
    else:
        fits = tensor.ndim == 2 or (named and tensor.ndim > 2)
    if tensor is None or not fits:
        found = "no tensor" if tensor is None else f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
        raise ValueError(
            f"cannot read the number of tokens off this batch ({type(batch).__name__}, which holds {found}, "
            "while token ids of shape (batch, sequence) were expected): pass count_tokens=, a function from "
            "the batch to its number of tokens, or give the interval in steps with every_n_steps="
        )
    return tensor.numel()


def _token_ids(batch: Any, depth: int = 4, named: bool = False) -> tuple[Tensor | None, bool]:
    """The first tensor inside ``batch``, usual names first, and whether its name alone identifies token ids.

    Looks ``depth`` levels in.
    """
    if isinstance(batch, Tensor):
        return batch, named
    if depth == 0 or isinstance(batch, str):
        return None, False
    if isinstance(batch, (dict, Mapping)):  # dict first: checking for a Mapping is slower
        for key in _TOKEN_KEYS:
            if (
                key in batch
                and (found := _token_ids(batch[key], depth - 1, key in _SURE_KEYS))[0] is not None
            ):
                return found
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return _token_ids(vars(batch), depth - 1) if hasattr(batch, "__dict__") else (None, False)
    for value in batch:  # a loop, since this is done for every batch
        if (found := _token_ids(value, depth - 1))[0] is not None:
            return found
    return None, False
