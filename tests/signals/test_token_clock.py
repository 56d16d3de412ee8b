"""What counts as tokens in a batch, and when an interval has passed."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from merge_callback.signals.token_clock import TokenClock, count_tokens, crossed

IDS = torch.zeros(4, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    "batch",
    [
        IDS,
        [IDS, IDS],
        (IDS, torch.zeros(4)),
        {"input_ids": IDS, "labels": torch.zeros(99, 99)},
        {"attention_mask": torch.zeros(2, 2, dtype=torch.int64), "input_ids": IDS},
        {"text": ["a"], "tokens": IDS.int()},
        {"nested": {"x": IDS}},
        SimpleNamespace(input_ids=IDS),
        {"input_ids": IDS.reshape(2, 2, 8)},
        IDS.byte(),
    ],
    ids=[
        "tensor",
        "list",
        "tuple",
        "hugging face",
        "mask first",
        "text beside",
        "nested",
        "object",
        "choices",
        "bytes",
    ],
)
def test_token_ids_are_found(batch):
    assert count_tokens(batch) == 32


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(4, 8),
        (torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
        {"x": torch.zeros(4, 32, 32, dtype=torch.int64)},
        torch.zeros(4, 8, dtype=torch.bool),
        {"text": ["a", "b"]},
        None,
    ],
    ids=["floats", "images and labels", "labels", "bytes of images", "maps", "masks", "strings", "nothing"],
)
def test_what_is_no_token_batch_is_refused_with_the_way_out(batch):
    with pytest.raises(ValueError, match=r"count_tokens=.*every_n_steps="):
        count_tokens(batch)


def test_an_own_counter_is_asked():
    clock = TokenClock(lambda batch: batch["mask"].sum())
    assert clock.count({"mask": torch.tensor([1, 1, 0])}) == 2


def test_a_crossing_is_near_where_a_step_of_twice_the_largest_would_bring_it():
    clock = TokenClock()
    assert clock.is_near(10**9)  # nothing is known yet
    near = []
    for tokens in (10, 4, 10, 10, 10, 10, 10, 10, 10):
        clock.add(tokens)
        near.append(clock.is_near(60))
    assert near == [False, False, False, False, True, True, False, False, False]  # at 44 and 54


def test_an_interval_is_crossed_once_however_large_the_steps():
    marks = [0, 3, 9, 10, 11, 35, 40]
    due = [crossed(before, after, 10) for before, after in pairwise(marks)]
    assert due == [False, False, True, False, True, True]
