"""How fast a layer with LoRA experts is, beside other ways to compute the same numbers.

    python benchmarks/moerge.py            # a minute on one core

Eight experts of rank 16, two per token, routers by Arrow; the time of a forward pass, and of one with the
backward pass of inputs, experts and routers, without what the base layer takes. All variants run in turn
within each round; quoted is the median over rounds. Each is checked against the loop over tokens first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import write
from torch import Tensor, nn

from merge_callback.merging.low_rank import LowRank
from merge_callback.moerge import MoergedLinear, moerge

Variant = Callable[[MoergedLinear, Tensor], Tensor]


class Nothing(nn.Linear):
    """A base layer that takes no time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def as_built(layer: MoergedLinear, x: Tensor) -> Tensor:
    """All experts as one A and one B."""
    return layer(x)


def by_expert(layer: MoergedLinear, x: Tensor) -> Tensor:
    """Each expert in turn, on the tokens that chose it."""
    chosen, weights = layer.route(x)
    y = x.new_zeros(len(x), layer.out_features)
    for t, e in enumerate(layer.experts()):
        tokens, place = (chosen == t).nonzero(as_tuple=True)
        out = F.linear(F.linear(x[tokens], e.a), e.b) * e.scale
        y = y.index_add(0, tokens, out * weights[tokens, place, None])
    return y


def on_all_tokens(layer: MoergedLinear, x: Tensor) -> Tensor:
    """Each expert in turn, on all tokens: the naive loop over experts."""
    chosen, weights = layer.route(x)
    shares = weights.new_zeros(len(x), len(layer.ranks)).scatter(-1, chosen, weights)
    outputs = [F.linear(F.linear(x, e.a), e.b) * e.scale for e in layer.experts()]
    return torch.stack([out * shares[:, t, None] for t, out in enumerate(outputs)]).sum(0)


def gathered(layer: MoergedLinear, x: Tensor) -> Tensor:
    """The chosen factors of each token, gathered, in a batched product."""
    chosen, weights = layer.route(x)
    experts = layer.experts()
    a, b = torch.stack([e.a for e in experts])[chosen], torch.stack([e.b * e.scale for e in experts])[chosen]
    h = torch.einsum("nkri,ni->nkr", a, x) * weights[..., None]
    return torch.einsum("nkor,nkr->no", b, h)


def by_token(layer: MoergedLinear, x: Tensor) -> Tensor:
    """Each token and each of its experts in turn: the naive loop over both."""
    experts, (chosen, weights) = layer.experts(), layer.route(x)
    outputs = []
    for i, token in enumerate(x):
        used = [(experts[t], w) for t, w in zip(chosen[i].tolist(), weights[i], strict=True)]
        outputs.append(sum(w * e.scale * (e.b @ (e.a @ token)) for e, w in used))
    return torch.stack(outputs)


VARIANTS: dict[str, Variant] = {
    f.__name__: f for f in (as_built, by_expert, on_all_tokens, gathered, by_token)
}


def make_layer(width: int, experts: int, rank: int) -> MoergedLinear:
    torch.manual_seed(0)
    factors = [
        {"0": LowRank(torch.randn(width, rank) / rank, torch.randn(rank, width) / width**0.5, 2.0)}
        for _ in range(experts)
    ]
    return moerge(nn.Sequential(Nothing(width, width)), factors, k=2)[0]


def seconds(run: Variant, layer: MoergedLinear, x: Tensor, backward: bool) -> float:
    begun = time.perf_counter()
    if backward:
        run(layer, x).square().mean().backward()
    else:
        with torch.no_grad():
            run(layer, x)
    return time.perf_counter() - begun


def measured(width: int, tokens: int, experts: int, rank: int, rounds: int) -> dict[str, object]:
    layer = make_layer(width, experts, rank)
    x = torch.randn(tokens, width, requires_grad=True)
    expected = by_token(layer, x).detach()
    off = {
        n: float((run(layer, x).detach() - expected).abs().max() / expected.abs().max())
        for n, run in VARIANTS.items()
    }
    assert max(off.values()) < 1e-5, off
    found: dict[str, object] = {"width": width, "tokens": tokens, "experts": experts, "rank": rank, "k": 2}
    for what, backward in (("forward", False), ("forward_and_backward", True)):
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(rounds + 1):  # the first warms up
            for name, run in VARIANTS.items():
                times[name].append(seconds(run, layer, x, backward))
        found[f"{what}_ms"] = {n: round(1e3 * statistics.median(t[1:]), 3) for n, t in times.items()}
    return {**found, "relative_error": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    sizes = [(256, 256), (1024, 256), (2048, 256)]  # what is gathered takes up to 0.5 MB per token
    rows = [measured(width, tokens, experts=8, rank=16, rounds=rounds) for width, tokens in sizes]
    for row in rows:
        print({k: v for k, v in row.items() if k != "relative_error"})
    print(write("moerge", {"layers": rows}))


if __name__ == "__main__":
    main()
