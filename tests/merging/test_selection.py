"""Which snapshots a method merges, and which of them takes which place: ``last`` and ``order``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from merge_callback import merge_state_dicts
from merge_callback.merging import Dare, Ema, LinearMethod, Slerp, Sma, Ties, Trajectory, Wsm, resolve_method
from merge_callback.merging.method import MergeMethod

GIVEN = [{"w": torch.tensor([float(10**i), float(i * i)])} for i in range(5)]

BACKWARDS: list[MergeMethod] = [Wsm(), Ema(), Slerp(), Ties(density=0.6), Dare(density=0.5)]


def merged(method: MergeMethod | str, given: list[dict[str, Tensor]] = GIVEN, **options: object) -> Tensor:
    return merge_state_dicts(given, method, **options)["w"]  # type: ignore[arg-type]


def test_the_last_snapshots_alone_are_merged() -> None:
    assert torch.equal(merged(Sma(last=2)), torch.tensor([5500.0, 12.5]))
    assert torch.equal(merged("wsm", last=3), merged(Wsm(), GIVEN[-3:]))
    assert torch.equal(merged(Sma(last=9)), merged(Sma()))


@pytest.mark.parametrize("method", BACKWARDS, ids=repr)
def test_reversed_gives_the_newest_the_place_of_the_oldest(method: MergeMethod) -> None:
    steps = list(range(5))
    expected = merged(method, GIVEN[::-1], steps=steps[::-1])
    torch.testing.assert_close(merged(replace(method, order="reversed")), expected, rtol=1e-6, atol=0)
    assert not torch.equal(merged(replace(method, order="reversed")), merged(method))


def test_reversed_weights_are_those_of_the_paper_backwards() -> None:
    weights = Wsm(order="reversed").weights_along(Trajectory.even(5))
    assert weights == pytest.approx([0.105573, 0.119831, 0.142141, 0.185242, 0.447214], abs=1e-6)


def test_a_random_order_depends_on_the_seed_and_the_newest_step() -> None:
    def weights(seed: int = 0, newest: int = 8) -> list[float]:
        steps = [*range(newest - 7, newest + 1)]
        return Wsm(order="random", order_seed=seed).weights_along(
            Trajectory([float(s) for s in steps], steps)
        )

    assert weights() == weights()
    assert sorted(weights()) == sorted(weights(seed=1)) == sorted(weights(newest=9))
    assert weights() != weights(seed=1)
    assert weights() != weights(newest=9)


def test_what_is_not_averaged_is_the_newest_in_any_order() -> None:
    given = [{"w": torch.full((2,), float(i)), "count": torch.tensor(i)} for i in range(3)]
    assert merge_state_dicts(given, Slerp(order="reversed"))["count"] == 2


def test_records_and_reprs_tell_the_selection_only_if_there_is_one() -> None:
    assert Wsm().options() == {"decay": "1-sqrt"}
    assert Wsm(last=5, order="random").options() == {"decay": "1-sqrt", "last": 5, "order": "random"}
    assert repr(Sma()) == "Sma()"
    assert repr(Sma(last=5)) == "Sma(last=5)"
    assert repr(Dare(density=0.5)).startswith("Dare(density=0.5, ")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"last": 1}, "sma: last=1 leaves nothing to merge"),
        ({"last": 0}, "last=0"),
        ({"order": "backwards"}, "order='backwards' must be one of 'forward'"),
        ({"order": "reversed"}, "sma: order='reversed' changes nothing"),
    ],
)
def test_a_selection_without_a_meaning_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        resolve_method("sma", **options)
    with pytest.raises(ValueError, match=told):
        resolve_method(Sma(**options))  # type: ignore[arg-type]


def test_a_method_with_an_option_of_its_own_by_such_a_name_keeps_its_meaning() -> None:
    @dataclass(frozen=True)
    class Edge(LinearMethod):
        last: bool = True

        def raw_weights(self, positions: Sequence[float]) -> list[float]:
            return [float(i == (len(positions) - 1) * self.last) for i in range(len(positions))]

    assert torch.equal(merged(Edge()), GIVEN[-1]["w"])
    assert torch.equal(merged(Edge(last=False)), GIVEN[0]["w"])
    assert Edge(last=False).options() == {"last": False}
