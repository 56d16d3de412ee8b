"""Parameters of which the default run takes some, and the slow tests the others."""

import pytest


def some_slow(cases, slow):
    """The cases of a test, of which those in `slow` are not of the default run: others are like them."""
    assert {*slow} <= {*cases}
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]


def mostly_slow(cases, daily):
    """Parameters of a test, of which those at the indices `daily` belong to every run of the tests."""
    slow = pytest.mark.slow
    return [
        pytest.param(
            *case,
            marks=() if index in daily else slow,
            id=" ".join(getattr(part, "__name__", str(part)) for part in case),
        )
        for index, case in enumerate(cases)
    ]
