"""SLERP along the trajectory: the paper's numbers, and the recursion it stands for."""

import math

import pytest
import torch

from merge_callback import merge_state_dicts
from merge_callback.merging import Slerp, slerp

A, B, C = [1.0, 2.0, 3.0], [3.0, -1.0, 2.0], [-1.0, 2.0, 0.5]


def merged(*vectors, dtype=torch.float64, **options):
    dicts = [{"w": torch.as_tensor(v, dtype=dtype)} for v in vectors]
    return merge_state_dicts(dicts, method="slerp", **options)["w"]


def chain(vectors, t=0.4):
    """The definition, one stage after the other."""
    m = vectors[0]
    for v in vectors[1:]:
        cosine = float(m @ v / (m.norm() * v.norm())) if m.norm() * v.norm() > 0 else 1.0
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        if abs(cosine) > 0.9995:
            m = (1 - t) * m + t * v
        else:
            m = (math.sin((1 - t) * angle) * m + math.sin(t * angle) * v) / math.sin(angle)
    return m


@pytest.mark.parametrize(
    ("vectors", "golden"),
    [
        ((A, B), [2.087693009488, 0.887772873809, 2.975465883297]),
        ((A, B, C), [1.049576528958, 1.774327776338, 2.550116124585]),
        ((A, [-1.0, -2.0, -3.0]), [0.2, 0.4, 0.6]),
        ((A, [2.0, 4.0, 6.0]), [1.4, 2.8, 4.2]),
        ((A, [0.0, 0.0, 0.0]), [0.6, 1.2, 1.8]),
        ((A,), A),
    ],
)
def test_the_values_are_the_published_ones(vectors, golden):
    # Golden numbers at t = 0.4, worked out in fp64 from the definition, to 12 decimals.
    assert merged(*vectors).tolist() == pytest.approx(golden, abs=1e-12)


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.03])  # 0.03: at the edge of what counts as parallel
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_one_weighted_sum_is_the_whole_chain(spread, t):
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1000, generator=generator, dtype=torch.float64)
    vectors = [
        centre + spread * torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(6)
    ]
    # fp64; an angle of .03 loses 1/.03² of its digits.
    torch.testing.assert_close(merged(*vectors, t=t), chain(vectors, t), rtol=1e-11, atol=1e-11)


def test_the_chain_of_bf16_snapshots_is_not_rounded_between_its_stages():
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(5000, generator=generator).bfloat16() for _ in range(5)]
    exact = chain([v.double() for v in vectors])
    # One rounding to bf16 at the end (half of 2^-7), and fp32's of five products, which is far less.
    found = merged(*vectors, dtype=torch.bfloat16).double()
    assert ((found - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-5).all()


def test_every_tensor_has_its_own_angle_or_the_model_has_one():
    generator = torch.Generator().manual_seed(2)
    dicts = [
        {n: torch.randn(40, generator=generator, dtype=torch.float64) for n in ("a", "b")} for _ in range(3)
    ]
    apart = merge_state_dicts(dicts, "slerp")
    whole = merge_state_dicts(dicts, "slerp", scope="global")
    for name in ("a", "b"):
        torch.testing.assert_close(apart[name], chain([d[name] for d in dicts]), rtol=1e-12, atol=1e-12)
    together = chain([torch.cat([d["a"], d["b"]]) for d in dicts])
    torch.testing.assert_close(torch.cat([whole["a"], whole["b"]]), together, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(apart["a"], whole["a"])


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_the_block_size_changes_nothing_but_the_last_bits_of_the_angle(monkeypatch, block):
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(999, generator=generator) for _ in range(4)]
    usual = merged(*vectors, dtype=torch.float32)
    monkeypatch.setattr(slerp, "_BLOCK", block)
    # The inner products are fp64 sums of 999 products: what is left of their rounding is below fp32's.
    torch.testing.assert_close(merged(*vectors, dtype=torch.float32), usual, rtol=2e-7, atol=2e-7)


def test_near_parallel_snapshots_are_interpolated_as_the_recursive_ema_does():
    generator = torch.Generator().manual_seed(4)
    centre = torch.randn(500, generator=generator, dtype=torch.float64)
    vectors = [centre * (1 + 1e-3 * i) for i in range(5)]
    ema = merge_state_dicts([{"w": v} for v in vectors], "ema", alpha=0.4, init="recursive")["w"]
    torch.testing.assert_close(merged(*vectors), ema, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("options", [{"t": -0.1}, {"t": 1.5}, {"t": math.nan}, {"scope": "layer"}])
def test_wrong_options_name_themselves(options):
    with pytest.raises(ValueError, match=rf"slerp: {next(iter(options))}="):
        Slerp(**options)
