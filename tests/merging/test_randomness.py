"""Random numbers keyed on seed, step, name and element; and the noise made of them."""

import math
import warnings

import pytest
import torch

from merge_callback import merge_state_dicts
from merge_callback.merging import Noise, randomness
from merge_callback.merging.randomness import CHUNK, Stream
from merge_callback.reduce import ranges

KINDS = ["uniform", "normal"]

WHOLE = 3 * CHUNK + 77


def draw(kind, start=0, stop=WHOLE, seed=0, step=10, name="w"):
    return getattr(Stream(seed, step, name), kind)(start, stop)


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_has_the_same_number_whatever_range_is_asked_for(kind):
    whole = draw(kind)
    assert whole.dtype == torch.float32
    for start, stop in [(0, 1), (5, 90), (CHUNK - 1, CHUNK + 1), (CHUNK, 2 * CHUNK), (77, WHOLE - 1), (9, 9)]:
        assert torch.equal(draw(kind, start, stop), whole[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_seed_step_or_name_has_other_numbers(kind):
    keys = [{}, {"seed": 1}, {"step": 11}, {"name": "v"}, {"seed": -1}, {"seed": 1, "step": 0}]
    drawn = torch.stack([draw(kind, **key) for key in keys])
    # Independent rows of n numbers correlate by 1/√n; six times that is a chance of 1e-8 or so a pair.
    correlation = torch.corrcoef(drawn) - torch.eye(len(keys))
    assert correlation.abs().max() < 6 / math.sqrt(WHOLE)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_not_repeated(kind):
    rows = draw(kind, 0, 3 * CHUNK).view(3, CHUNK)
    assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 6 / math.sqrt(CHUNK)


def test_uniform_numbers_are_uniform():
    drawn = draw("uniform", 0, 1 << 20).double()
    n = len(drawn)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # Six standard errors: of the mean √(1/12n), of the variance √(1/180n), of a share √(d(1−d)/n).
    assert abs(drawn.mean() - 1 / 2) < 6 / math.sqrt(12 * n)
    assert abs(drawn.var() - 1 / 12) < 6 / math.sqrt(180 * n)
    for d in (0.001, 0.1, 0.5, 0.8, 0.999):
        assert abs((drawn < d).double().mean() - d) < 6 * math.sqrt(d * (1 - d) / n)


def test_normal_numbers_are_normal():
    drawn = draw("normal", 0, 1 << 20).double()
    n = len(drawn)
    # Six standard errors: of the moments 1/√n, √(2/n), √(15/n), √(96/n).
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((drawn**power).mean() - expected) < 6 * math.sqrt(variance / n)


def test_the_numbers_are_those_of_the_first_release():
    """Recorded when this was written: numbers that change would change every merge that is made again."""
    assert draw("uniform", 0, 4).tolist() == [
        0.7650372385978699,
        0.1477605104446411,
        0.3382641673088074,
        0.31646472215652466,
    ]
    assert draw("normal", 0, 3).tolist() == [-2.0506932735443115, 0.25807085633277893, -0.5907946228981018]
    assert draw("uniform", CHUNK, CHUNK + 2).tolist() == [0.281225323677063, 0.464264452457428]


# The mean of noisy snapshots.


def snapshots(count=4, n=50_000, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        {"w": torch.randn(n, generator=generator).to(dtype) * 3, "b": torch.zeros(5)} for _ in range(count)
    ]


def test_noise_has_the_deviation_of_m_merges_averaged():
    dicts = snapshots()
    added = (merge_state_dicts(dicts, Noise(alpha=0.1))["w"] - merge_state_dicts(dicts)["w"]).double()
    # The mean over N of N(0, σ_k²/M): the variance is Σσ_k²/(N²M).
    expected = math.sqrt(sum((0.1 * d["w"].norm().item()) ** 2 / 50_000 for d in dicts) / 16 / 3)
    assert added.std().item() == pytest.approx(expected, rel=6 / math.sqrt(2 * 50_000))
    assert abs(added.mean()) < 6 * expected / math.sqrt(50_000)


def test_noise_is_that_of_every_snapshot_by_its_own_norm():
    """A definition in five lines, in fp64."""
    dicts = [{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([60.0, 80.0])}]
    noisy = [
        d["w"].double() + 0.1 * rms * Stream(7, step, "w").normal(0, 2).double() / math.sqrt(2)
        for step, d, rms in [(0, dicts[0], 5 / math.sqrt(2)), (1, dicts[1], 100 / math.sqrt(2))]
    ]
    merged = merge_state_dicts(dicts, Noise(alpha=0.1, merges=2, seed=7))["w"]
    torch.testing.assert_close(merged.double(), (noisy[0] + noisy[1]) / 2, rtol=1e-6, atol=0)  # fp32 sums


def test_noise_leaves_zeros_and_empty_tensors_alone():
    dicts = [{"b": torch.zeros(3), "e": torch.empty(0)}] * 2
    merged = merge_state_dicts(dicts, Noise())
    assert merged["b"].tolist() == [0, 0, 0]
    assert merged["e"].shape == (0,)


def test_without_alpha_noise_is_the_mean():
    dicts = snapshots(dtype=torch.float64)
    merged = merge_state_dicts(dicts, Noise(alpha=0))
    # sma multiplies by 1/N before it adds, noise divides after: some roundings of fp64.
    torch.testing.assert_close(merged["w"], merge_state_dicts(dicts)["w"], rtol=1e-14, atol=1e-14)


def test_noise_does_not_depend_on_the_number_of_threads(monkeypatch):
    dicts = snapshots(n=3 * CHUNK + 5)
    alone = merge_state_dicts(dicts, Noise())["w"]
    monkeypatch.setattr(ranges, "_SHARE", 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(merge_state_dicts(dicts, Noise())["w"], alone)
    finally:
        torch.set_num_threads(threads)


def test_noise_that_a_16_bit_dtype_would_swallow_warns_once_a_merge():
    dicts = [{"w": torch.ones(4).bfloat16(), "v": torch.ones(4).bfloat16()}] * 2
    with pytest.warns(UserWarning, match="rounding of torch.bfloat16") as caught:
        merge_state_dicts(dicts, Noise())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_state_dicts(snapshots(2, 10), Noise())


@pytest.mark.parametrize(
    ("options", "named"),
    [({"alpha": -1}, "alpha=-1"), ({"alpha": math.nan}, "alpha=nan"), ({"merges": 0}, "merges=0")],
)
def test_wrong_noise_options_name_themselves(options, named):
    with pytest.raises(ValueError, match=f"noise: {named}"):
        Noise(**options)


def test_the_chunk_is_part_of_the_definition():
    """It may not be tuned: other chunks are other numbers."""
    assert randomness.CHUNK == 32_768
