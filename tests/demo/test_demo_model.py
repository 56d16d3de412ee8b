"""The demo's model, its experts and its learning rate's schedule."""

import math

import pytest
import torch

from merge_callback.demo import GPT, GPTConfig, WSDSchedule, wsd_factor
from merge_callback.demo.experts import BIAS_STEP, Experts

EXPERT = {"width": 8, "hidden": 16, "experts": 4, "experts_per_token": 2}


# Model


def test_default_model_is_the_pilot_s_size():
    assert sum(p.numel() for p in GPT().parameters()) == 123_328


@pytest.mark.parametrize("config", [GPTConfig(), GPTConfig(experts=4)], ids=["dense", "moe"])
def test_future_bytes_do_not_change_earlier_logits(config):
    torch.manual_seed(0)
    gpt = GPT(config).eval()
    seen = torch.randint(256, (2, 64))
    changed = seen.clone()
    changed[:, 40:] = torch.randint(256, (2, 24))
    before, after = gpt(seen), gpt(changed)
    # Not bitwise: experts see other numbers of tokens, so their matrix products are blocked differently.
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 40:], after[:, 40:], atol=1e-2)


def test_flags_add_and_remove_parameters():
    names = {name for name, _ in GPT().named_parameters()}
    assert "head.weight" not in names
    assert "head.weight" in dict(GPT(GPTConfig(tied_head=False)).named_parameters())
    plain = {name for name, _ in GPT(GPTConfig(qk_norm=False)).named_parameters()}
    assert names - plain == {
        f"blocks.{i}.attention.{part}_norm.weight" for i in range(2) for part in ("query", "key")
    }


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"heads": 3}, "heads=3 must divide width=64"),
        ({"experts": 2, "experts_per_token": 3}, "=3 must lie in"),
    ],
)
def test_impossible_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**shape)


def test_each_token_goes_to_its_top_k_experts():
    torch.manual_seed(0)
    layer, tokens = Experts(**EXPERT), torch.randn(50, 8)
    chosen, weights = layer.route(tokens)
    scores = layer.router(tokens).sigmoid()
    assert torch.equal(chosen.sort(-1).values, scores.topk(2).indices.sort(-1).values)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    by_hand = torch.stack(
        [
            sum(w * layer.experts[e](token) for e, w in zip(es.tolist(), ws, strict=True))
            for token, es, ws in zip(tokens, chosen, weights, strict=True)
        ]
    )
    torch.testing.assert_close(layer(tokens), by_hand)


def test_router_bias_steers_the_choice_but_not_the_weights():
    torch.manual_seed(0)
    layer, tokens = Experts(**EXPERT), torch.randn(50, 8)
    layer.router_bias[3] = 10.0
    chosen, weights = layer.route(tokens)
    assert (chosen == 3).any(-1).all()
    scores = layer.router(tokens).sigmoid().gather(-1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_balancing_lowers_the_bias_of_overloaded_experts():
    torch.manual_seed(0)
    layer = Experts(**EXPERT)
    layer.router_bias[0] = 10.0
    layer(torch.randn(5, 20, 8))
    before, load = layer.router_bias.clone(), layer.load.clone()
    assert load.sum() == 200
    assert load[0] == 100
    layer.balance()
    assert (layer.router_bias - before)[0].item() == pytest.approx(-BIAS_STEP, rel=1e-3)  # fp32 beside 10
    assert not layer.load.any()


def test_evaluation_leaves_the_loads_alone():
    layer = Experts(**EXPERT).eval()
    layer(torch.randn(10, 8))
    assert not layer.load.any()


# Schedule


def test_schedule_rises_holds_and_decays():
    factors = [wsd_factor(step, warmup=4, stable=3, decay=4, shape="linear") for step in range(12)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [("1-sqrt", 0.5), ("linear", 0.75), ("cosine", (1 + math.sqrt(0.5)) / 2)],
)
def test_decay_shapes_follow_their_formulas(shape, quarter):
    assert wsd_factor(1, warmup=0, stable=0, decay=4, shape=shape) == pytest.approx(quarter)
    assert wsd_factor(10, warmup=0, stable=0, decay=4, shape=shape) == pytest.approx(0)


def test_unknown_decay_shape_is_refused_before_training():
    with pytest.raises(ValueError, match="Unknown decay shape 'exp'"):
        WSDSchedule(shape="exp")
