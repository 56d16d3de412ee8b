"""TIES and DARE against their definitions, written out the slow way."""

import math

import pytest
import torch

from merge_callback import merge_state_dicts
from merge_callback.merging import Dare, Ties, Trajectory
from merge_callback.merging.method import Inputs
from merge_callback.merging.randomness import Stream
from merge_callback.reduce import ranges

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# METHODS.md: three task vectors on θ_init = 0, worked out by hand.
TAU = [[1, -2, 0.5, 3, -0.1], [2, 1, -0.5, -3, 0.2], [-0.5, -1.5, 0.1, 0.3, -0.4]]


def on_zeros(taus, method, dtype=torch.float32, **options):
    dicts = [{"w": torch.tensor(tau, dtype=dtype)} for tau in taus]
    base = {"w": torch.zeros_like(dicts[0]["w"])}
    return merge_state_dicts(dicts, method, base=base, **options)["w"].tolist()


@pytest.mark.parametrize(
    ("density", "golden"), [(0.8, [1.5, -1.75, 0.5, 1.65, -0.4]), (0.6, [1.5, -1.75, 0, 3, -0.4])]
)
def test_ties_gives_the_golden_numbers(density, golden):
    assert on_zeros(TAU, "ties", density=density) == pytest.approx(golden, rel=1e-7)  # fp32


def test_dare_without_a_drop_is_the_golden_task_arithmetic_or_ties():
    mean = [0.833333, -0.833333, 0.033333, 0.1, -0.1]  # given to 6 digits
    assert on_zeros(TAU, "dare", density=1.0) == pytest.approx(mean, abs=1e-6)
    assert on_zeros(TAU, "dare", density=1.0, ties=True) == on_zeros(TAU, "ties", density=1.0)


# The definition of TIES, by sorting. All arithmetic in fp64: fp32 may differ in its last bits.


def kept_by_sorting(taus, k):
    """The k largest magnitudes of each row, of equal ones those of the lowest indices."""
    order = torch.sort(taus.abs(), dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(taus).scatter(1, order, taus.gather(1, order))


def elect(kept):
    kept = kept.double()
    signs = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept * signs > 0
    return (kept * agree).sum(0) / agree.sum(0).clamp(min=1)


def ties_by_sorting(thetas, density, scale=1.0, base=None):
    wide = torch.float64 if thetas.dtype == torch.float64 else torch.float32
    initial, others = (thetas[0], thetas[1:]) if base is None else (base, thetas)
    taus = others.to(wide) - initial.to(wide)
    kept = kept_by_sorting(taus, max(1, math.floor(density * taus.shape[1])))
    return initial.double() + scale * elect(kept)


def snapshots(count, n, seed, dtype=torch.float32, spread=0.05):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, generator=generator, dtype=torch.float64)
    steps = torch.randn(count, n, generator=generator, dtype=torch.float64) * spread
    return (first + steps).to(dtype)


def as_dicts(thetas):
    return [{"w": theta} for theta in thetas]


def assert_near(merged, exact):
    """One rounding to the dtype, and fp32 (fp64) roundings of a few sums of numbers around 1."""
    wide = 64 * torch.finfo(torch.float64 if merged.dtype == torch.float64 else torch.float32).eps
    tolerance = torch.finfo(merged.dtype).eps / 2 * exact.abs() + wide * exact.abs().clamp(min=1)
    assert ((merged.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_is_its_definition(dtype, density):
    for count, n in [(2, 1), (2, 2), (3, 3), (4, 100), (10, 3001), (3, 70_000)]:
        thetas = snapshots(count, n, seed=n, dtype=dtype)
        merged = merge_state_dicts(as_dicts(thetas), Ties(density=density))["w"]
        assert_near(merged, ties_by_sorting(thetas, density))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
def test_ties_keeps_the_lower_of_equal_magnitudes(density):
    """Few magnitudes and many zeros: nearly every threshold falls on equal entries."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        thetas = torch.randint(-2, 3, (5, 777), generator=generator).float()
        merged = merge_state_dicts(as_dicts(thetas), Ties(density=density, scale=0.5))["w"]
        assert_near(merged, ties_by_sorting(thetas, density, scale=0.5))


def test_ties_on_a_base_has_a_task_vector_for_every_snapshot():
    thetas, base = snapshots(4, 500, 0), snapshots(1, 500, 1)[0]
    merged = merge_state_dicts(as_dicts(thetas), "ties", base={"w": base}, density=0.3)["w"]
    assert_near(merged, ties_by_sorting(thetas, 0.3, base=base))


def test_one_snapshot_alone_is_its_own_initial_model():
    (theta,) = snapshots(1, 100, 0)
    for method in (Ties(), Ties(scope="global"), Dare(), Dare(ties=True)):
        assert torch.equal(merge_state_dicts([{"w": theta}], method)["w"], theta)


def test_at_least_one_entry_of_a_task_vector_is_kept():
    dicts = [{"w": torch.zeros(5)}, {"w": torch.tensor([1.0, -4, 2, 4, 0])}]
    assert merge_state_dicts(dicts, Ties(density=0.01))["w"].tolist() == [0, -4, 0, 0, 0]


def test_empty_tensors_stay_empty():
    dicts = [{"e": torch.empty(0, 3), "w": torch.ones(2)}] * 3
    for method in (Ties(), Ties(scope="global"), Dare()):
        assert merge_state_dicts(dicts, method)["e"].shape == (0, 3)


# Global scope.


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "equal magnitudes"])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.8, 1.0])
def test_global_ties_is_ties_of_the_whole_model_as_one_vector(density, ties):
    sizes = {"a": 300, "empty": 0, "b": 1, "c": 2500}
    whole = snapshots(5, sum(sizes.values()), 3)
    whole = (whole * 2).round() if ties else whole
    dicts = [dict(zip(sizes, theta.split(list(sizes.values())), strict=True)) for theta in whole]
    merged = merge_state_dicts(dicts, Ties(density=density, scope="global"))
    assert_near(torch.cat(list(merged.values())), ties_by_sorting(whole, density))


def test_global_ties_differs_from_ties_by_tensor():
    """A tensor whose entries are all small loses them to the other's."""
    dicts = [{"s": torch.zeros(4), "l": torch.zeros(4)}, {"s": torch.ones(4), "l": torch.full((4,), 9.0)}]
    assert merge_state_dicts(dicts, Ties(density=0.5))["s"].tolist() == [1, 1, 0, 0]
    merged = merge_state_dicts(dicts, Ties(density=0.5, scope="global"))
    assert merged["s"].tolist() == [0] * 4
    assert merged["l"].tolist() == [9] * 4


@pytest.mark.parametrize("above", [1e-9, 1e-7], ids=["rounds down", "rounds up"])
def test_global_ties_compares_single_with_double_precision(above):
    """The threshold is no fp32 number: the fp32 entry 1 lies below it, the next one above."""
    singles = torch.tensor([1.0, 1 + 2**-23, 0.5])
    doubles = torch.tensor([1 + above, 0.1, 2.0], dtype=torch.float64)
    dicts = [{"s": singles * 0, "d": doubles * 0}, {"s": singles, "d": doubles}]
    merged = merge_state_dicts(dicts, Ties(density=0.5, scope="global"))
    assert merged["s"].tolist() == [0, 1 + 2**-23, 0]
    assert merged["d"].tolist() == [1 + above, 0, 2]


# What the result may not depend on.

METHODS = [Ties(), Ties(scope="global", density=0.3), Dare(), Dare(ties=True, density=0.5)]


def merged_w(method, shape=None):
    thetas = (snapshots(4, 12_345, 9, torch.bfloat16), snapshots(4, 12_345, 9))
    return [
        merge_state_dicts(as_dicts(t if shape is None else t.reshape(4, *shape)), method)["w"].flatten()
        for t in thetas
    ]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("block", [37, 1000])
def test_the_block_size_changes_no_bit(method, block, monkeypatch):
    expected = merged_w(method)
    monkeypatch.setattr(ranges, "BLOCK", block)
    assert all(map(torch.equal, merged_w(method), expected))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_shape_changes_no_bit(method):
    assert all(map(torch.equal, merged_w(method, (5, 823, 3)), merged_w(method)))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_number_of_threads_changes_no_bit_and_stays(method, monkeypatch):
    expected = merged_w(method)
    monkeypatch.setattr(ranges, "_SHARE", 1000)
    monkeypatch.setattr(ranges, "BLOCK", 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert all(map(torch.equal, merged_w(method), expected))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_threads_merge_parameters_and_under_inference_mode(method, monkeypatch):
    """Grad and inference modes are a thread's own: those of the caller have to reach the others."""
    monkeypatch.setattr(ranges, "_SHARE", 100)
    thetas = snapshots(3, 1000, 0)
    expected = merge_state_dicts(as_dicts(thetas), method)["w"]
    parameters = [{"w": torch.nn.Parameter(theta.clone())} for theta in thetas]
    monkeypatch.setattr(ranges, "BLOCK", 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(merge_state_dicts(parameters, method)["w"], expected)
        with torch.inference_mode():
            assert torch.equal(merge_state_dicts(parameters, method)["w"], expected)
    finally:
        torch.set_num_threads(threads)


def test_the_result_goes_straight_into_the_given_memory(tmp_path):
    """As offline merges do it: ``out`` is a file's mapping."""
    thetas = snapshots(4, 5000, 2)
    out = torch.from_file(str(tmp_path / "out"), shared=True, size=5000)
    Ties().merge(Inputs("w", list(thetas)), out, Trajectory.even(4))
    assert torch.equal(out, merge_state_dicts(as_dicts(thetas), Ties())["w"])


# DARE.


def test_dare_is_its_definition():
    thetas = snapshots(4, 40_000, 1)
    taus = thetas[1:].double() - thetas[0].double()
    masks = torch.stack([Stream(5, step, "w").uniform(0, 40_000) < 0.3 for step in (1, 2, 3)])
    thinned = taus * masks / 0.3
    dare = Dare(density=0.3, scale=0.5, seed=5)
    merged = merge_state_dicts(as_dicts(thetas), dare)["w"]
    assert_near(merged, thetas[0].double() + 0.5 * thinned.mean(0))
    with pytest.warns(UserWarning, match="dare: the plain sum"):
        plain = Dare(density=0.3, scale=0.5, seed=5, normalize=False)
    assert_near(merge_state_dicts(as_dicts(thetas), plain)["w"], thetas[0].double() + 0.5 * thinned.sum(0))
    elected = Dare(density=0.3, scale=0.5, seed=5, ties=True)
    merged = merge_state_dicts(as_dicts(thetas), elected)["w"]
    assert_near(merged, thetas[0].double() + 0.5 * elect(thinned))


@pytest.mark.parametrize("density", [0.1, 0.8])
def test_dare_is_unbiased(density):
    """Over many elements with τ = 1 the mean is 1, with the variance (1−d)/(dN) of independent drops."""
    n, count = 200_000, 3
    dicts = [{"w": torch.zeros(n)}, *({"w": torch.ones(n)} for _ in range(count))]
    merged = merge_state_dicts(dicts, Dare(density=density))["w"].double()
    variance = (1 - density) / density / count
    assert abs(merged.mean() - 1) < 6 * math.sqrt(variance / n)
    # The kurtosis of a mean of three such draws is below 8: six standard errors of a variance.
    assert merged.var().item() == pytest.approx(variance, rel=6 * math.sqrt(8 / n))


def test_dare_depends_on_seed_step_and_name_only():
    thetas = snapshots(3, 5000, 0)
    inputs = Inputs("w", list(thetas))

    def merged(method=Dare(), name="w", steps=(10, 20, 30)):  # noqa: B008
        out = torch.empty(5000)
        method.merge(Inputs(name, inputs.tensors), out, Trajectory([0.0, 1, 2], steps))
        return out

    assert torch.equal(merged(), merged())
    assert torch.equal(merged(steps=(99, 20, 30)), merged())  # θ_init has no task vector
    for other in (merged(Dare(seed=1)), merged(name="v"), merged(steps=(10, 20, 31))):
        assert not torch.equal(other, merged())


def test_a_base_gives_the_first_snapshot_a_key_of_its_own():
    (theta,) = snapshots(1, 5000, 0)
    out = torch.empty(5000)
    Dare().merge(Inputs("w", [theta], base=torch.zeros(5000)), out, Trajectory([0.0], [42]))
    assert torch.equal(out != 0, Stream(0, 42, "w").uniform(0, 5000) < 0.8)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Ties(density=0), "ties: density=0"),
        (lambda: Ties(density=1.2), "ties: density=1.2"),
        (lambda: Ties(density=math.nan), "ties: density=nan"),
        (lambda: Ties(scale=math.inf), "ties: scale=inf"),
        (lambda: Ties(scope="layer"), "ties: scope='layer'"),
        (lambda: Dare(density=-0.1), "dare: density=-0.1"),
        (lambda: Dare(scale=math.nan), "dare: scale=nan"),
        (lambda: Dare(ties=True, normalize=False), "dare: normalize=False"),
    ],
)
def test_wrong_options_name_themselves(build, named):
    with pytest.raises(ValueError, match=named):
        build()
