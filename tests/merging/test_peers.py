"""Our methods beside those of mergekit 0.1.5 and peft 0.21, on the same fp64 tensors.

`pip install "merge-callback[peers]"` brings both; without them these tests are skipped. Where they differ
from us, a test says how.
"""

import importlib

import pytest
import torch

from merge_callback import merge_state_dicts
from merge_callback.merging import Dare, Ema, Sma, TaskArithmetic, Ties, Weighted, Wma
from merge_callback.merging.randomness import Stream

SHAPE, SIZE = (37, 53), 37 * 53

DENSITIES = [0.01, 0.2, 0.5, 0.8, 0.99]


@pytest.fixture
def mergekit():
    """What merges tensors by the name of a method."""
    return pytest.importorskip("mergekit.merge_methods.api", reason="needs the extra 'peers'").merge_tensors


@pytest.fixture
def peft():
    """Functions of lists of task vectors, their weights, and a density."""
    pytest.importorskip("peft", minversion="0.21", reason="needs the extra 'peers'")
    return importlib.import_module("peft.utils.merge_utils")


def random_snapshots(count, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return [
        first + spread * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)
    ]


def with_task_vectors(count=4):
    """An initial model and its task vectors, in each of which no two magnitudes are equal, and none is 0.

    All are whole 2^-20ths. So the differences are exact, and fp32 holds them: mergekit ranks the magnitudes
    and drops entries in fp32 on a CPU, whatever the dtype.
    """
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.stack([torch.randperm(1 << 21, generator=generator)[:SIZE] + 1 for _ in range(count)])
    signs = 2 * torch.randint(0, 2, (count, SIZE), generator=generator) - 1
    initial = torch.randint(-(1 << 21), 1 << 21, SHAPE, generator=generator).double() / 2**20
    return initial, list((magnitudes * signs).double().reshape(count, *SHAPE) / 2**20)


def ours(thetas, method):
    return merge_state_dicts([{"w": theta} for theta in thetas], method)["w"]


def on(initial, taus):
    return [initial, *(initial + tau for tau in taus)]


def assert_same(found, expected):
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # roundings of sums of a few numbers


# Weighted sums.


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (Sma(), 1.0),
        (Wma(), [1.0, 2.0, 3.0, 4.0, 5.0]),
        (Ema(alpha=0.2), [0.8**4, 0.8**3, 0.8**2, 0.8, 1.0]),
        (Weighted([0.5, 0.25, 0.125, 0.0625, 0.0625]), [0.5, 0.25, 0.125, 0.0625, 0.0625]),
    ],
    ids=["sma", "wma", "ema", "weighted"],
)
def test_the_linear_family_is_mergekit_s_linear(mergekit, method, weights):
    thetas = random_snapshots(5)
    assert_same(ours(thetas, method), mergekit(thetas, "linear", parameters={"weight": weights}))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_task_arithmetic_is_mergekit_s_where_that_is_told_to_normalise(mergekit, scale):
    thetas = random_snapshots(5)
    options = {"weight": 1.0, "normalize": True, "lambda": scale}
    theirs = mergekit(thetas, "task_arithmetic", base_index=0, parameters=options)
    assert_same(ours(thetas, TaskArithmetic(scale=scale)), theirs)


@pytest.mark.filterwarnings("ignore:task_arithmetic. the plain sum", "ignore:.*negative weights extrapolate")
def test_the_plain_sum_is_the_default_of_both_peers(mergekit, peft):
    initial, taus = with_task_vectors()
    thetas = on(initial, taus)
    merged = ours(thetas, TaskArithmetic(normalize=False))
    assert_same(merged, mergekit(thetas, "task_arithmetic", base_index=0, parameters={"weight": 1.0}))
    assert_same(merged, initial + peft.task_arithmetic(taus, torch.ones(len(taus))))


# SLERP.


@pytest.mark.parametrize("spread", [3.0, 0.3, 0.01])  # wide angles, narrow ones, and as good as parallel
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_our_chain_is_mergekit_s_slerp_step_by_step(mergekit, spread, t):
    thetas = random_snapshots(5, spread)
    theirs = thetas[0]
    for theta in thetas[1:]:
        theirs = mergekit([theirs, theta], "slerp", base_index=0, parameters={"t": t})
    merged = merge_state_dicts([{"w": theta} for theta in thetas], "slerp", t=t)["w"]
    assert_same(merged, theirs)


def test_mergekit_takes_a_zero_vector_for_a_perpendicular_one(mergekit):
    """We interpolate linearly there, as METHODS.md has it: a zero vector has no angle."""
    zero, theta = torch.zeros(SHAPE, dtype=torch.float64), random_snapshots(1)[0]
    theirs = mergekit([zero, theta], "slerp", base_index=0, parameters={"t": 0.4})
    assert_same(theirs, theta * torch.sin(torch.tensor(0.2 * torch.pi, dtype=torch.float64)))
    assert_same(merge_state_dicts([{"w": zero}, {"w": theta}], "slerp", t=0.4)["w"], 0.4 * theta)


# TIES.


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_ties_is_that_of_both_peers(mergekit, peft, density, scale):
    initial, taus = with_task_vectors()
    thetas = on(initial, taus)
    merged = ours(thetas, Ties(density=density, scale=scale))
    options = {"weight": 1.0, "density": density, "lambda": scale}
    assert_same(merged, mergekit(thetas, "ties", base_index=0, parameters=options))
    assert_same(merged, initial + scale * peft.ties(taus, torch.ones(len(taus)), density))


def test_entries_that_cancel_elect_plus_in_all_three(mergekit, peft):
    initial, (tau, _) = with_task_vectors(2)
    thetas = on(initial, [tau, -tau])
    merged = ours(thetas, Ties(density=0.5))
    assert_same(merged, mergekit(thetas, "ties", base_index=0, parameters={"weight": 1.0, "density": 0.5}))
    assert_same(merged, initial + peft.ties([tau, -tau], torch.ones(2), 0.5))
    assert merged.ge(initial).all()


@pytest.mark.parametrize("density", DENSITIES)
def test_of_equal_magnitudes_all_keep_as_many_but_not_the_same(mergekit, peft, density):
    """We keep those of the lowest indices. The peers keep those that a sort happens to put first."""
    generator = torch.Generator().manual_seed(2)
    tau = (2 * torch.randint(0, 2, SHAPE, generator=generator) - 1).double()
    initial, options = torch.zeros_like(tau), {"weight": 1.0, "density": density}
    merged = ours([initial, tau], Ties(density=density))
    others = [
        mergekit([initial, tau], "ties", base_index=0, parameters=options),
        peft.ties([tau], torch.ones(1), density),
    ]
    kept = int(density * SIZE)
    assert merged.flatten().nonzero().flatten().tolist() == list(range(kept))
    assert [other.count_nonzero() for other in others] == [kept, kept]
    assert all(torch.equal(other[other != 0], tau[other != 0]) for other in others)


def test_peft_may_keep_nothing_where_mergekit_and_we_keep_one_entry(mergekit, peft):
    tau, zero = torch.tensor([1.0, -4, 2], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    options = {"weight": 1.0, "density": 0.1}
    assert ours([zero, tau], Ties(density=0.1)).tolist() == [0, -4, 0]
    assert mergekit([zero, tau], "ties", base_index=0, parameters=options).tolist() == [0, -4, 0]
    assert peft.ties([tau], torch.ones(1), 0.1).tolist() == [0, 0, 0]


# DARE, with our drops on both sides.


@pytest.fixture
def our_drops(monkeypatch):
    """Makes `torch.bernoulli`, which both peers draw from, drop what our seed 7 does; returns the masks."""

    def install(density, count):
        drawn = [Stream(7, step, "w").uniform(0, SIZE).reshape(SHAPE) for step in range(1, count + 1)]
        masks = [uniform < density for uniform in drawn]
        left = iter(masks)
        monkeypatch.setattr(torch, "bernoulli", lambda chances: next(left).to(chances.dtype))
        return masks

    return install


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("elect", [False, True], ids=["mean", "elected"])
def test_dare_is_peft_s(peft, our_drops, density, elect):
    initial, taus = with_task_vectors()
    merged = ours(on(initial, taus), Dare(density=density, seed=7, ties=elect))
    our_drops(density, len(taus))
    if elect:
        theirs = peft.dare_ties(taus, torch.ones(len(taus)), density)
    else:
        theirs = peft.dare_linear(taus, torch.full((len(taus),), 1 / len(taus)), density)
    assert_same(merged, initial + theirs)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("elect", [False, True], ids=["mean", "elected"])
def test_dare_is_mergekit_s_but_for_the_rescaling(mergekit, our_drops, density, elect):
    initial, taus = with_task_vectors()
    thetas = on(initial, taus)
    merged = ours(thetas, Dare(density=density, scale=density, seed=7, ties=elect))  # the scale undoes ours
    our_drops(density, len(taus))
    options = {"weight": 1.0, "density": density, "normalize": True, "rescale": False}
    name = "dare_ties" if elect else "dare_linear"
    assert_same(merged, mergekit(thetas, name, base_index=0, parameters=options))


def test_mergekit_s_rescaling_keeps_the_sum_of_magnitudes_not_the_expectation(mergekit, our_drops):
    """The paper, peft and we divide by the density. On what was drawn here, that is 2.4 % off mergekit's."""
    initial, (tau,) = with_task_vectors(1)
    (mask,) = our_drops(0.5, 1)
    theirs = mergekit(
        on(initial, [tau]), "dare_linear", base_index=0, parameters={"weight": 1.0, "density": 0.5}
    )
    factor = (tau.abs().sum() / (tau * mask).abs().sum()).item()
    torch.testing.assert_close(
        theirs - initial, tau * mask * factor, rtol=1e-6, atol=1e-6
    )  # fp32, as it works
    assert abs(factor - 1 / 0.5) > 0.01
