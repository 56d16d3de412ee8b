"""What counts as tokens in a batch, and when an interval has passed."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from merge_callback.signals.snapshot_interval import Interval
from merge_callback.signals.token_clock import TokenClock, count_tokens

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


class Waiting:
    """Statistics that note after which steps their tokens are waited for."""

    def __init__(self):
        self.step, self.steps = 0, []

    def flush_to_clock(self):
        self.steps.append(self.step)


def run(marks, every, unit):
    """The steps at which the interval is over, and those whose tokens were waited for."""
    clock, statistics = TokenClock(), Waiting()
    interval, due = Interval(every, unit, clock, statistics, 0), []
    for step, (before, after) in enumerate(pairwise([0, *marks]), start=1):
        statistics.step = step
        clock.add(after - before)
        if interval.is_over(step if unit == "tokens" else after):
            due.append(step)
    return due, [*dict.fromkeys(statistics.steps)]


def test_tokens_are_waited_for_where_a_step_of_twice_the_largest_would_end_the_interval():
    due, waited = run([10, 14, 24, 34, 44, 54, 64, 74, 84], 60, "tokens")
    assert (due, waited) == ([7], [5, 6, 7])  # at 44 and 54


def test_nothing_is_known_of_a_run_without_tokens_so_they_are_waited_for():
    assert run([0, 0], 10**9, "tokens") == ([], [1, 2])


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_an_interval_is_over_once_however_large_the_steps(unit):
    due, _ = run([3, 9, 10, 11, 35, 40], 10, unit)
    assert due == [3, 5, 6]
