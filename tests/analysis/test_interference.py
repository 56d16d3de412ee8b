"""Interference between task vectors: against the definition and cases worked by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from merge_callback.analysis.interference import (
    _part,
    chance,
    count,
    interference,
    magnitude_ratio,
    overlap,
    pair_mean,
    sign_conflict,
    variance,
)
from merge_callback.analysis.top_magnitude import keep_top, thresholds

SHAPES = {"a": (50, 6), "b": (37,), "c": (2, 3, 5)}


def models(count=4, dtype=torch.float32, seed=0):
    """A base and ``count`` models that moved from it, in part together. Coarse, so that magnitudes tie."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        return {n: (scale * torch.randn(s, generator=generator) * 16).round() / 16 for n, s in SHAPES.items()}

    base, common = draw(2.0), draw(0.3)
    own = [draw(0.3) for _ in range(count)]
    return [base, *({n: base[n] + common[n] + o[n] for n in SHAPES} for o in own)], dtype


def pruned_by_sorting(tau, top):
    """The k largest magnitudes by a stable sort: of equal ones those of lower index."""
    kept = np.zeros_like(tau)
    best = np.argsort(-np.abs(tau), kind="stable")[: max(1, int(top * len(tau) / 100))]
    kept[best] = tau[best]
    return kept


def by_definition(vectors):
    """The measures of [LIM] App. I of whole vectors, in fp64 numpy; pairwise ones averaged over pairs."""
    conflicts, overlaps, ratios = [], [], []
    for a, b in itertools.permutations(vectors, 2):
        either, both = (a != 0) | (b != 0), (a != 0) & (b != 0)
        conflicts.append(100 * np.sum(a * b < 0) / either.sum())
        overlaps.append(100 * both.sum() / np.sum(a != 0))
        x, y = np.abs(a[both]), np.abs(b[both])
        ratios += [np.mean(np.maximum(x, y) / np.minimum(x, y))] if both.any() else []
    union = np.any([v != 0 for v in vectors], axis=0)
    spread = np.mean(np.mean(np.square(vectors), axis=0)[union])
    return [np.mean(conflicts), np.mean(overlaps), np.mean(ratios), spread]


def measured(counts):
    return [
        *(pair_mean(measure(counts)) for measure in (sign_conflict, overlap, magnitude_ratio)),
        variance(counts),
    ]


def task_vectors(states, scope, top):
    """τ of every model, pruned by tensor or as a whole, all tensors in one vector."""
    base, *others = ([s[n].double().numpy().ravel() for n in SHAPES] for s in states)
    taus = [[t - b for t, b in zip(other, base, strict=True)] for other in others]
    if scope == "global":
        return [pruned_by_sorting(np.concatenate(tau), top) for tau in taus]
    return [np.concatenate([pruned_by_sorting(t, top) for t in tau]) for tau in taus]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("top", [1, 20, 60])
def test_the_measures_are_the_papers(scope, top, dtype):
    states = [{n: t.to(dtype) for n, t in state.items()} for state in models()[0]]
    base, *others = states
    expected = by_definition(task_vectors(states, scope, top))
    # Differences of these coarse numbers are exact; fp64 sums in another order.
    assert measured(interference(others, base, top, scope=scope)) == pytest.approx(expected, rel=1e-12)


def test_measures_worked_by_hand():
    tau = torch.tensor([[4.0, -2.0, 0.0, 1.0, 0.0], [2.0, 2.0, 3.0, 0.0, 0.0]])
    counts = count(tau)
    # Active in either: 4 entries, of which the second has opposite signs; in both: 2 of the 3 of each.
    assert sign_conflict(counts)[0, 1] == 25
    assert overlap(counts)[0, 1].item() == pytest.approx(100 * 2 / 3, rel=1e-15)
    assert magnitude_ratio(counts)[0, 1] == 1.5  # 4/2 and 2/2
    assert variance(counts) == ((16 + 4) / 2 + (4 + 4) / 2 + 9 / 2 + 1 / 2) / 4


def test_only_the_top_entries_of_each_tensor_are_looked_at():
    base = {"w": torch.zeros(10)}
    first = {"w": torch.tensor([9.0, -8, 1, 1, 1, 1, 1, 1, 1, 1])}
    second = {"w": torch.tensor([9.0, 1, -1, -1, -1, -1, -1, -1, -1, 8])}
    counts = interference([first, second], base, top=20)
    # Kept: entries 0 and 1, and 0 and 9. Everything else would conflict.
    assert sign_conflict(counts)[0, 1] == 0
    assert overlap(counts)[0, 1] == 50
    assert sign_conflict(interference([first, second], base, top=100))[0, 1] == 80


def test_the_overlap_is_of_the_first_ones_entries():
    base = {"w": torch.zeros(10)}
    moved_once = {"w": torch.tensor([5.0] + [0.0] * 9)}
    moved_twice = {"w": torch.tensor([5.0, 4.0] + [0.0] * 8)}
    # The first has one entry that is not 0, so that its top 20 % are one, not two.
    counts = interference([moved_once, moved_twice], base, top=20)
    assert overlap(counts).tolist() == [[100, 100], [50, 100]]
    assert pair_mean(overlap(counts)) == 75


def test_one_threshold_for_the_model_takes_its_largest_entries_from_any_tensor():
    base = {"quiet": torch.zeros(10), "loud": torch.zeros(10)}
    generator = torch.Generator().manual_seed(1)
    loud = [torch.rand(10, generator=generator) + 5 for _ in range(2)]
    quiet = [torch.rand(10, generator=generator) for _ in range(2)]
    pair = [{"quiet": q, "loud": t} for q, t in zip(quiet, loud, strict=True)]
    by_model = interference(pair, base, top=50, scope="global")
    assert by_model.union == 10
    assert overlap(by_model)[0, 1] == 100
    assert interference(pair, base, top=50).overlap.diagonal().tolist() == [10, 10]
    assert interference(pair, base, top=50).union > 10


def test_vectors_that_share_no_entry_have_no_magnitude_ratio():
    counts = count(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert math.isnan(magnitude_ratio(counts)[0, 1])
    assert math.isnan(pair_mean(magnitude_ratio(counts)))
    assert pair_mean(overlap(counts)) == pair_mean(sign_conflict(counts)) == 0


def test_pairs_without_a_ratio_stay_out_of_the_mean():
    counts = count(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]))
    assert pair_mean(magnitude_ratio(counts)) == 3


def test_the_smallest_numbers_have_a_ratio_too():
    smallest = 2.0**-149  # of fp32; 1/smallest is beyond it
    assert magnitude_ratio(count(torch.tensor([[smallest, 0.0], [4 * smallest, 1.0]])))[0, 1] == 4


def test_chance_is_what_independent_vectors_reach():
    generator = torch.Generator().manual_seed(0)
    base, pair = {"w": torch.zeros(200_000)}, []
    for _ in range(2):
        pair.append({"w": torch.randn(200_000, generator=generator)})
    counts = interference(pair, base, top=20)
    # 8000 of 200 000 entries coincide by chance, with a standard deviation of 80: 1 %, and 1.6 % of the half
    # that conflicts; four of these.
    assert float(sign_conflict(counts)[0, 1]) == pytest.approx(chance(20)[0], rel=0.064)
    assert float(overlap(counts)[0, 1]) == pytest.approx(chance(20)[1], rel=0.04)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_block_size_changes_rounding_only(scope):
    base, *others = models()[0]
    whole = interference(others, base, scope=scope)
    for block in (3, 64):
        found = interference(others, base, scope=scope, block=block)
        assert torch.equal(found.overlap, whole.overlap)
        assert torch.equal(found.conflicts, whole.conflicts)
        assert found.union == whole.union
        assert measured(found) == pytest.approx(measured(whole), rel=1e-13)


@pytest.mark.parametrize("keep", [1, 2, 50, 333, 999, 1000])
@pytest.mark.parametrize("block", [1000, 64])
def test_selection_keeps_what_a_stable_sort_keeps(keep, block):
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(1000, generator=generator)
    coarse = (fine * 4).round()  # about 20 different magnitudes: the boundary is always a tie
    vectors = torch.stack([fine, coarse, fine * 1e-42, torch.zeros(1000)])
    parts = [[_part(torch.zeros(1000), vector, block)] for vector in vectors]
    threshold, ties = thresholds(parts, keep)
    kept = []
    for piece in vectors.split(block, dim=1):
        pruned, ties = keep_top(piece, threshold, ties)
        kept.append(pruned)
    expected = [pruned_by_sorting(v.numpy(), 100 * keep / 1000) for v in vectors]
    assert torch.cat(kept, dim=1).tolist() == np.stack(expected).tolist()
    assert ties.tolist() == [0, 0, 0, 0]


def test_what_cannot_be_measured_is_refused():
    base, one, other = models(2)[0]
    with pytest.raises(ValueError, match="at least two task vectors, got 1"):
        interference([one], base)
    for top in (0, -1, 100.5):
        with pytest.raises(ValueError, match=rf"top={top:g} must be a percentage"):
            interference([one, other], base, top)
    with pytest.raises(ValueError, match="scope='layer'"):
        interference([one, other], base, scope="layer")
    with pytest.raises(ValueError, match="'b' is in the base but not in checkpoint 2"):
        interference([one, {n: t for n, t in other.items() if n != "b"}], base)
    with pytest.raises(ValueError, match="checkpoint 2 equals the base"):
        interference([one, base], base)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_task_vector_that_is_not_finite_is_refused_by_the_tensors_name(bad):
    base, one, other = models(2)[0]
    other["b"][3] = bad
    for top in (20, 1):  # 7 entries are kept, and 1: fewer than are not finite
        with pytest.raises(ValueError, match="'b': there are infinite or NaN entries"):
            interference([one, other], base, top)
        other["b"][5:9] = bad


def test_transposed_tensors_have_the_same_interference():
    base, *others = models()[0]
    turned = [{**state, "a": state["a"].T.contiguous().T} for state in others]
    assert measured(interference(turned, base)) == measured(interference(others, base))
