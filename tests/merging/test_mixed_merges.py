"""Methods that are a merge of merges, and those on task vectors that are one weighted sum."""

import math

import pytest
import torch

from merge_callback import merge_state_dicts
from merge_callback.merging import Dropout, Ema, Meta, Sma, TaskArithmetic, Wma

# Task vectors and results: the golden numbers of the methods' definitions, θ_init = 0.
TAUS = [[1.0, -2.0, 0.5, 3.0, -0.1], [2.0, 1.0, -0.5, -3.0, 0.2], [-0.5, -1.5, 0.1, 0.3, -0.4]]
MEAN = [0.833333333333, -0.833333333333, 0.033333333333, 0.1, -0.1]


def dicts(*values):
    return [{"w": torch.tensor(value, dtype=torch.float64)} for value in values]


ZERO = {"w": torch.zeros(5, dtype=torch.float64)}


# --- task arithmetic ----------------------------------------------------------------------------------------


def test_task_arithmetic_is_the_mean_of_all_but_the_first():
    merged = merge_state_dicts([ZERO, *dicts(*TAUS)], "task_arithmetic")
    assert merged["w"].tolist() == pytest.approx(MEAN, abs=1e-12)


def test_task_arithmetic_takes_another_base():
    base = {"w": torch.full((5,), 7.0, dtype=torch.float64)}
    merged = merge_state_dicts(dicts(*TAUS), "task_arithmetic", base=base, scale=0.5)
    expected = [7 + 0.5 * (sum(t[i] for t in TAUS) / 3 - 7) for i in range(5)]
    assert merged["w"].tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.filterwarnings("ignore:weights")
def test_the_plain_sum_of_task_vectors_comes_with_a_warning():
    with pytest.warns(UserWarning, match="overshoots"):
        merged = merge_state_dicts(dicts(*TAUS), "task_arithmetic", base=ZERO, normalize=False)
    assert merged["w"].tolist() == pytest.approx([sum(t[i] for t in TAUS) for i in range(5)], abs=1e-14)


def test_task_arithmetic_of_one_snapshot_is_that_snapshot():
    assert torch.equal(merge_state_dicts(dicts(TAUS[0]), "task_arithmetic")["w"], dicts(TAUS[0])[0]["w"])


def test_a_base_is_refused_where_it_would_do_nothing():
    with pytest.raises(ValueError, match="'sma' uses no base"):
        merge_state_dicts(dicts(*TAUS), "sma", base=ZERO)


def test_a_base_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"'w': shape .*\[4\].* in the base"):
        merge_state_dicts(dicts(*TAUS), "task_arithmetic", base={"w": torch.zeros(4, dtype=torch.float64)})


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match="task_arithmetic: scale="):
        TaskArithmetic(scale=scale)


# --- meta ---------------------------------------------------------------------------------------------------


def test_meta_is_the_mean_of_three_merges():
    found = merge_state_dicts(dicts(*TAUS), "meta")["w"]
    three = [merge_state_dicts(dicts(*TAUS), m)["w"] for m in (Ema(), Sma(), Wma())]
    torch.testing.assert_close(found, sum(three) / 3, rtol=1e-14, atol=1e-15)
    assert Meta(alpha=0.5).normalised_weights([1.0, 2.0]) != Meta().normalised_weights([1.0, 2.0])
    with pytest.raises(ValueError, match="alpha=2"):
        Meta(alpha=2)


# --- dropout ------------------------------------------------------------------------------------------------

POSITIONS = [float(i) for i in range(10)]


def counts(method, positions=POSITIONS):
    return method.raw_weights(positions)


def test_every_merge_leaves_out_its_share():
    for seed in range(20):
        taken = counts(Dropout(seed=seed))
        assert sum(taken) == 3 * 8
        assert all(0 <= t <= 3 for t in taken)
    assert sum(counts(Dropout(p=0.25, merges=1))) == 8  # 10 − ⌊2.5⌋


def test_a_merge_takes_two_snapshots_at_least_and_one_where_there_is_one():
    assert sum(counts(Dropout(p=0.99, merges=1))) == 2
    assert counts(Dropout(p=0.99), [1.0]) == [3.0]
    assert counts(Dropout(p=0.99), [1.0, 2.0]) == [3.0, 3.0]


def test_the_choice_depends_on_the_seed_and_the_merge_alone():
    assert counts(Dropout(seed=1)) == counts(Dropout(seed=1))
    assert len({tuple(counts(Dropout(seed=seed))) for seed in range(50)}) > 40
    assert max(counts(Dropout(merges=50))) < 50  # the merges differ among themselves


def test_no_snapshot_is_favoured():
    total = [sum(column) for column in zip(*(counts(Dropout(seed=s)) for s in range(500)), strict=True)]
    # 1500 draws at p = .8 each: a standard deviation of 15.5.
    assert all(abs(t - 1200) < 5 * 15.5 for t in total)


def test_dropout_of_a_model_is_the_mean_of_means():
    found = merge_state_dicts(dicts(*TAUS), "dropout", p=0.4, merges=2, seed=3)["w"]
    taken = counts(Dropout(p=0.4, merges=2, seed=3), [0.0, 1.0, 2.0])
    expected = sum(t * torch.tensor(v, dtype=torch.float64) for t, v in zip(taken, TAUS, strict=True)) / 4
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "named"), [({"p": 1.0}, "p=1.0"), ({"p": -0.1}, "p=-0.1"), ({"merges": 0}, "merges=0")]
)
def test_wrong_options_name_themselves(options, named):
    with pytest.raises(ValueError, match=f"dropout: {named}"):
        Dropout(**options)
