"""What holds of every merging method, on snapshots that hypothesis picks."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_callback import METHODS, merge_state_dicts
from merge_callback.merging import LinearMethod, slerp, threshold
from merge_callback.reduce import blocks, ranges

pytestmark = [
    pytest.mark.filterwarnings("ignore:noise. the averaged noise is near the rounding"),
    pytest.mark.filterwarnings("ignore:.*negative weights extrapolate"),  # task arithmetic with λ > 1
]

ALL = sorted(METHODS)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 8)
sizes = st.integers(0, 3000)


def picked(**strategies):
    """Ten picks; each takes a millisecond or two."""
    quick = settings(max_examples=10)
    return lambda test: quick(given(**strategies)(test))


def snapshots(seed, count, size, dtype=torch.float32, spread=0.1):
    """Points of a trajectory, around which nothing is special: no zeros, no equal magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, generator=generator, dtype=torch.float64)
    steps = torch.randn(count, size, generator=generator, dtype=torch.float64) * spread
    return list((first + steps.cumsum(0)).to(dtype))


def merge(thetas, method, **options):
    if method == "weighted":
        options = {"weights": [1 / len(thetas)] * len(thetas), **options}
    return merge_state_dicts([{"w": theta} for theta in thetas], method, **options)["w"]


def roundings(thetas, many):
    """The size of ``many`` roundings of numbers as large as the largest one here."""
    unit = torch.finfo(torch.float64 if thetas[0].dtype == torch.float64 else torch.float32).eps / 2
    largest = max((theta.abs().max().item() for theta in thetas if theta.numel()), default=0.0)
    return many * unit * largest


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# The order of the snapshots.


@picked(seed=seeds, count=counts, dtype=st.sampled_from(DTYPES[:2]), data=st.data())
def test_the_order_matters_to_a_mean_only_in_its_rounding(seed, count, dtype, data):
    thetas = snapshots(seed, count, 500, dtype)
    order = data.draw(st.permutations(range(count)))
    # Each order rounds N products and N − 1 sums, none of which is larger than the largest number.
    tolerance = roundings(thetas, 2 * (2 * count - 1))
    assert_close(merge([thetas[i] for i in order], "sma"), merge(thetas, "sma"), tolerance)


@picked(seed=seeds, power=st.integers(0, 3), dtype=st.sampled_from(DTYPES), data=st.data())
def test_the_order_matters_not_at_all_where_the_mean_is_exact(seed, power, dtype, data):
    """Whole numbers of 8 bits, and a power of two of them: no product or sum has to be rounded."""
    generator = torch.Generator().manual_seed(seed)
    thetas = list(torch.randint(-128, 129, (2**power, 500), generator=generator).to(dtype))
    order = data.draw(st.permutations(range(2**power)))
    assert torch.equal(merge([thetas[i] for i in order], "sma"), merge(thetas, "sma"))


# Snapshots that are all the same.

# Not `noise`, which adds something of its own.
IDEMPOTENT = sorted(set(ALL) - {"noise"})


@pytest.mark.parametrize("method", IDEMPOTENT)
@picked(seed=seeds, count=counts, size=sizes, dtype=st.sampled_from(DTYPES))
def test_equal_snapshots_merge_to_themselves(method, seed, count, size, dtype):
    (theta,) = snapshots(seed, 1, size, dtype)
    merged = merge([theta] * count, method)
    if dtype in DTYPES[:2]:
        # The weights are N roundings from a sum of 1, and there are N products and N − 1 sums.
        assert_close(merged, theta, roundings([theta], 3 * count))
    else:  # those are far below half a unit in the last place of 16 bits: the final cast undoes them
        assert torch.equal(merged, theta)


@pytest.mark.parametrize("method", ["ties", "dare"])
@picked(seed=seeds, count=counts, size=sizes, dtype=st.sampled_from(DTYPES))
def test_task_vectors_of_zero_leave_the_initial_model_as_it_is(method, seed, count, size, dtype):
    (theta,) = snapshots(seed, 1, size, dtype)
    assert torch.equal(merge([theta] * count, method), theta)


@picked(seed=seeds, count=counts, alpha=st.floats(1e-4, 0.1))
def test_noise_moves_equal_snapshots_by_no_more_than_its_deviation(seed, count, alpha):
    (theta,) = snapshots(seed, 1, 2000, torch.float64)
    moved = (merge([theta] * count, "noise", alpha=alpha) - theta).square().mean().sqrt().item()
    deviation = alpha * theta.square().mean().sqrt().item() / math.sqrt(3 * count)
    # The deviation of 2000 normal numbers is known to 1/√4000 of itself: six of that.
    assert moved == pytest.approx(deviation, rel=6 / math.sqrt(4000))


# Sums and multiples.


@pytest.mark.parametrize("method", [name for name in ALL if issubclass(METHODS[name], LinearMethod)])
@picked(seed=seeds, count=counts, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_the_linear_family_is_linear(method, seed, count, a, b):
    xs, ys = (snapshots(s, count, 300, torch.float64) for s in (seed, seed + 1))
    found = merge([a * x + b * y for x, y in zip(xs, ys, strict=True)], method)
    expected = a * merge(xs, method) + b * merge(ys, method)
    # N products and sums in each of three merges, of |a| + |b| times the largest number; and a few more.
    assert_close(found, expected, roundings([*xs, *ys], (abs(a) + abs(b)) * 3 * (2 * count + 3)))


@pytest.mark.parametrize("method", ALL)
@picked(seed=seeds, count=counts, power=st.integers(-8, 8), dtype=st.sampled_from(DTYPES[:3]))
def test_powers_of_two_pass_through_every_method(method, seed, count, power, dtype):
    """They change the exponents alone, so angles, thresholds, signs and deviations are the same."""
    thetas = snapshots(seed, count, 800, dtype)
    assert torch.equal(
        merge([theta * 2.0**power for theta in thetas], method), merge(thetas, method) * 2.0**power
    )


@pytest.mark.parametrize("method", sorted(set(ALL) - {"noise"}))  # whose numbers keep their signs
@picked(seed=seeds, count=counts, dtype=st.sampled_from(DTYPES[:2]))
def test_signs_pass_through_every_method(method, seed, count, dtype):
    """Where no kept entries cancel, as those of 16 bits might: `ties` then elects +."""
    thetas = snapshots(seed, count, 800, dtype)
    assert torch.equal(merge([-theta for theta in thetas], method), -merge(thetas, method))


# One method as another.


@picked(seed=seeds, count=st.integers(2, 8), size=st.integers(1, 3000), scale=st.floats(0.1, 2))
def test_ties_of_full_density_and_agreeing_signs_is_the_mean_of_the_task_vectors(seed, count, size, scale):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator, dtype=torch.float64)
    initial, signs = draw(size), torch.where(draw(size) < 0.5, 1.0, -1.0)
    thetas = [initial, *(initial + signs * (0.1 + draw(size)) for _ in range(count - 1))]
    expected = initial + scale * (sum(thetas[1:]) / (count - 1) - initial)
    options = {"density": 1.0, "scale": scale}
    assert_close(merge(thetas, "ties", **options), expected, roundings(thetas, 10 * count))
    task_arithmetic = merge(thetas, "task_arithmetic", scale=scale)
    assert_close(merge(thetas, "ties", **options), task_arithmetic, roundings(thetas, 10 * count))


@picked(seed=seeds, count=st.integers(2, 8), spread=st.floats(1e-6, 0.1), t=st.floats(0.01, 1))
def test_slerp_of_near_parallel_snapshots_is_the_recursive_ema(seed, count, spread, t):
    thetas = snapshots(seed, count, 400, torch.float64, spread)
    unit = torch.stack([theta / theta.norm() for theta in thetas])
    cosine = min((unit @ unit.T).min().item(), 1.0)
    ema = merge(thetas, "ema", alpha=t, init="recursive")
    apart = (merge(thetas, "slerp", t=t) - ema).norm().item()
    # A stage's factors are those of the line times 1 + (1 − x²)Ω²/6 + …, x being t or 1 − t: Ω²/8 of a norm
    # apart, and less than Ω²/6 with the higher terms at the angles here. The merge so far is a combination
    # with positive factors, so no further from the next snapshot than the snapshots are from each other.
    angle = math.acos(cosine)
    largest = max(theta.norm().item() for theta in thetas)
    grown = (1 + angle**2 / 6) ** (count - 1) - 1
    assert angle < 1
    rounded = 400 * roundings(thetas, 10 * count)
    assert apart <= (grown * largest if cosine < 0.9995 else 0) + rounded


# What the result may not depend on.


@pytest.mark.parametrize("method", ALL)
@picked(
    seed=seeds,
    count=counts,
    shape=st.lists(st.integers(1, 9), max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_the_shape_changes_no_bit(method, seed, count, shape, dtype):
    flat = snapshots(seed, count, math.prod(shape), dtype)
    merged = merge([theta.reshape(shape) for theta in flat], method)
    assert merged.shape == torch.Size(shape)
    assert torch.equal(merged.reshape(-1), merge(flat, method))


BLOCKS = [(blocks, "BLOCK"), (ranges, "BLOCK"), (slerp, "_BLOCK"), (threshold, "_SAMPLE")]


def in_blocks(size, thetas, method):
    with pytest.MonkeyPatch.context() as patch:
        for module, constant in BLOCKS:
            patch.setattr(module, constant, size)
        return merge(thetas, method)


# Not `slerp`: its weights follow from inner products summed block by block; see the next test.
@pytest.mark.parametrize("method", sorted(set(ALL) - {"slerp"}))
@picked(
    seed=seeds,
    count=counts,
    size=sizes,
    block=st.sampled_from([37, 64, 1000, 1024]),
    dtype=st.sampled_from(DTYPES),
)
def test_the_block_size_changes_no_bit(method, seed, count, size, block, dtype):
    thetas = snapshots(seed, count, size, dtype)
    assert torch.equal(in_blocks(block, thetas, method), merge(thetas, method))


@picked(seed=seeds, count=counts, size=sizes, block=st.integers(32, 2000), wide=st.sampled_from(DTYPES[:2]))
def test_the_block_size_changes_slerp_by_roundings_of_its_angles(seed, count, size, block, wide):
    thetas = snapshots(seed, count, size, wide)
    # The products are fp64 sums of up to 3000 numbers. An angle of acos(.9995) loses 1/Ω² of their digits.
    angles = 3000 * roundings([theta.double() for theta in thetas], 1) / math.acos(0.9995) ** 2
    tolerance = count * angles + roundings(thetas, 2 * count)
    assert_close(in_blocks(block, thetas, "slerp"), merge(thetas, "slerp"), tolerance)


# What a merge gives and takes.


@pytest.mark.parametrize("method", ALL)
@picked(seed=seeds, count=counts, size=sizes, dtype=st.sampled_from(DTYPES))
def test_the_result_has_the_snapshots_dtype_and_the_snapshots_stay(method, seed, count, size, dtype):
    thetas = snapshots(seed, count, size, dtype)
    before = [theta.clone() for theta in thetas]
    merged = merge(thetas, method)
    assert merged.dtype == dtype
    assert merged.shape == thetas[-1].shape
    assert torch.isfinite(merged).all()
    merged.fill_(7)  # memory of its own
    assert all(map(torch.equal, thetas, before))


@pytest.mark.parametrize("method", ALL)
@picked(seed=seeds, count=st.integers(2, 8))
def test_fp64_is_merged_in_fp64(method, seed, count):
    """Digits that fp32 does not have arrive: two merges far apart agree in fp32 and differ in fp64."""
    thetas = snapshots(seed, count, 300, torch.float64)
    shifted = merge([theta + 2**-36 for theta in thetas], method) - merge(thetas, method)
    # Every method but slerp and noise moves with its snapshots; those do so nearly.
    assert_close(shifted, torch.full_like(shifted, 2**-36), 2**-36 * 0.1)
