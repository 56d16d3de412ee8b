"""The plan that is printed at the start of fit."""

import re
from pathlib import Path

import pytest

from merge_callback.engine.plan import Plan, in_bytes


def plan(**changes):
    numbers = {
        "window": 10,
        "every": 40,
        "unit": "steps",
        "total_steps": 5400,
        "rank_bytes": 1_000_000_000,
        "snapshot_bytes": 492_000,
        "window_bytes": 4_920_000,
        "storage": "disk",
        "folder": Path("runs/merges/window"),
        "free": 80 * 10**9,
        "methods": {"stable": "sma", "decay": "ema"},
    }
    return Plan(**{**numbers, **changes})


def test_it_says_interval_count_bytes_place_and_room():
    text = "\n".join(plan().lines())
    for part in ("every 40 steps", "last 10 kept", "135 in this run of 5,400 steps", "492.0 kB per snapshot"):
        assert part in text
    for part in (
        "4.9 MB in total",
        "runs/merges/window",
        "80.0 GB free",
        "sma in the stable",
        "ema in the decay",
    ):
        assert part in text
    assert plan().warnings() == []


def test_an_interval_in_tokens_is_translated_once_it_is_measured():
    tokens = plan(unit="tokens", every=4_000_000_000, total_steps=100_000)
    assert "measured over the first steps" in tokens.lines()[0]
    assert tokens.warnings() == []
    [line] = tokens.measured(2_097_152)
    assert "2,097,152 tokens per step" in line
    assert "every 1,907 steps; 52 in this run of 100,000 steps" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total_steps": 200}, "the window never fills: the run ends after 200 steps, with 5 of 10"),
        ({"total_steps": 79}, "nothing will be merged: .* with 1 of 10 .* every_n_steps=7 would fill it"),
        ({"total_steps": 5}, "nothing will be merged: .* train longer, or choose a smaller window="),
    ],
)
def test_a_run_that_ends_before_the_window_is_useful_is_warned_of(changes, said):
    [warning] = plan(**changes).warnings()
    assert re.search(said, warning)


def test_a_short_run_in_tokens_is_warned_of_once_steps_are_measured():
    tokens = plan(unit="tokens", every=1_000_000, total_steps=100)
    [warning] = tokens.warnings(10_000)
    assert "with 1 of 10" in warning
    assert "every_n_tokens=100000" in warning


def test_a_run_without_an_end_is_no_reason_to_warn():
    endless = plan(total_steps=None)
    assert endless.warnings() == []
    assert "no set end" in endless.lines()[0]


def test_sizes_are_for_people():
    assert [in_bytes(x) for x in (264, 1056, 5e9, 2.5e15)] == ["264 B", "1.1 kB", "5.0 GB", "2500.0 TB"]


def test_a_manual_optimization_is_planned_once_its_steps_are_measured():
    unknown = plan(total_steps=None, batches=100, every=30)
    assert "steps of all optimizers count" in unknown.lines()[0]
    assert unknown.warnings() == []
    measured = unknown.with_steps(6.0)
    [line] = measured.counted(6.0)
    assert "6 optimizer steps per batch" in line
    assert "every 5 batches; 20 in this run of 600 steps" in line
    assert measured.warnings() == []
    [warning] = unknown.with_steps(0.5).warnings()
    assert "with 1 of 10" in warning
