"""``merge_state_dicts``: values, dtypes, and what it refuses."""

import pytest
import torch

from merge_callback import merge_state_dicts

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def state_dicts(count=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "weight": torch.randn(7, 5, generator=generator).to(dtype),
            "scalar": torch.randn((), generator=generator).to(dtype),
            "empty": torch.empty(0, 3, dtype=dtype),
            "steps": torch.tensor(i),
            "mask": torch.tensor([i == 0, True]),
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_is_summed_wide_and_cast_once(dtype):
    dicts = state_dicts(10, dtype)
    merged = merge_state_dicts(dicts)
    exact = torch.stack([d["weight"] for d in dicts]).double().mean(0)
    assert merged["weight"].dtype == dtype
    # One rounding to the dtype, plus fp32 rounding of ten sums (64 epsilons is generous).
    wide = 64 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    tolerance = torch.finfo(dtype).eps / 2 * exact.abs() + wide
    assert ((merged["weight"].double() - exact).abs() <= tolerance).all()


def test_bf16_inputs_are_not_summed_in_bf16():
    """256 + 1 is lost in bf16; the mean of 256, 1, 1, … must still feel the ones."""
    dicts = [{"w": torch.tensor([v], dtype=torch.bfloat16)} for v in (256, 1, 1, 1, 1, 1, 1, 1)]
    assert merge_state_dicts(dicts)["w"].item() == torch.tensor(263 / 8).bfloat16().item()


def test_integers_and_booleans_come_from_the_last():
    merged = merge_state_dicts(state_dicts())
    assert merged["steps"].item() == 2
    assert merged["mask"].tolist() == [False, True]
    assert merged["steps"].dtype == torch.int64


def test_excluded_names_come_from_the_last():
    dicts = [{"router.bias": torch.tensor([float(i)]), "w": torch.tensor([float(i)])} for i in range(3)]
    merged = merge_state_dicts(dicts, exclude=["*.bias"])
    assert merged["router.bias"].item() == 2
    assert merged["w"].item() == 1


def test_the_result_shares_no_memory_with_the_inputs():
    dicts = state_dicts(1)
    merged = merge_state_dicts(dicts)
    for name, tensor in dicts[0].items():
        assert tensor.numel() == 0 or merged[name].data_ptr() != tensor.data_ptr()


def test_sma_does_not_depend_on_shapes_or_strides():
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    merged = merge_state_dicts([{"w": a.t()}, {"w": b.t()}])["w"]
    assert torch.equal(merged, merge_state_dicts([{"w": a}, {"w": b}])["w"].t())


def test_complex_tensors_are_averaged_too():
    merged = merge_state_dicts([{"w": torch.tensor([1 + 2j])}, {"w": torch.tensor([3 - 4j])}])
    assert merged["w"].item() == 2 - 1j


def test_merging_one_gives_it_back_bit_for_bit():
    dicts = state_dicts(1)
    assert all(torch.equal(merge_state_dicts(dicts)[name], t) for name, t in dicts[0].items())


def test_wsm_uses_the_positions():
    dicts = [{"w": torch.tensor([float(i)], dtype=torch.float64)} for i in range(3)]
    even = merge_state_dicts(dicts, "wsm")["w"].item()
    uneven = merge_state_dicts(dicts, "wsm", positions=[0, 1, 10])["w"].item()
    assert even != uneven


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda d: d[1].pop("weight"), "'weight'"),
        (lambda d: d[0].update(extra=torch.zeros(1)), "'extra'"),
        (lambda d: d[1].update(weight=torch.zeros(5, 7)), r"'weight': shape .*\[5, 7\].*\[7, 5\]"),
        (lambda d: d[0].update(weight=d[0]["weight"].half()), "'weight': dtype torch.float16"),
        (lambda d: d.clear(), "at least one"),
    ],
)
def test_what_does_not_match_is_named(spoil, named):
    dicts = state_dicts()
    spoil(dicts)
    with pytest.raises(ValueError, match=named):
        merge_state_dicts(dicts)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "median"}, "median"),
        ({"method": "ema", "alfa": 0.1}, "alfa"),
        ({"positions": [1, 2]}, "positions"),
        ({"weights": [0.5, 0.5]}, "weights"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        merge_state_dicts(state_dicts(), **options)
