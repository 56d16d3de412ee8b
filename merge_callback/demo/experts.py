"""The MLP, and a mixture of such MLPs with top-k routing, balanced by a bias instead of by a loss."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

BIAS_STEP = 1e-3
"""How far a router bias moves per optimizer step (the rate of arXiv 2408.15664, §4.1)."""


class FeedForward(nn.Module):
    """Two matrices with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(…, width)` to the same."""
        # The exact GELU: on CPU its tanh approximation takes four times as long.
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class Experts(nn.Module):
    """Routes each token to its top-k experts and sums their outputs by the router's scores.

    The choice uses score plus `router_bias`, but the weights only use the scores. The bias evens out the
    load without a gradient (auxiliary-loss-free balancing, arXiv 2408.15664). It is control state of the
    live model, not a trained weight: pass `exclude=["*.router_bias"]` to copy it instead of averaging it.
    """

    router_bias: Tensor
    load: Tensor

    def __init__(self, width: int, hidden: int, experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, hidden) for _ in range(experts))
        self.register_buffer("router_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(…, width)` to the same."""
        tokens = x.flatten(0, -2)
        chosen, weights = self.route(tokens)
        # Sorted by expert, each expert's tokens are one slice, so one gather is needed, and one back.
        order = chosen.flatten().argsort(stable=True)
        loads = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        slices = torch.split(tokens.index_select(0, order // self.experts_per_token), loads)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, slices, strict=True)])
        outputs = outputs.index_select(0, order.argsort()).view(*chosen.shape, -1)
        return (outputs * weights.unsqueeze(-1)).sum(-2).to(x.dtype).view_as(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses the experts of each token, and counts the choices while training.

        Args:
            tokens: `(tokens, width)`.

        Returns:
            The chosen experts, and their weights that sum to 1 per token; both `(tokens, experts_per_token)`.
        """
        scores = self.router(tokens).float().sigmoid()
        chosen = (scores + self.router_bias).topk(self.experts_per_token).indices
        weights = scores.gather(-1, chosen)
        if self.training:
            self.load += F.one_hot(chosen, len(self.experts)).sum((0, 1))
        return chosen, weights / weights.sum(-1, keepdim=True)

    @torch.no_grad()
    def balance(self) -> None:
        """Makes overloaded experts less, and idle ones more, likely to be chosen; then resets the loads."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.load)
        load = self.load.float()
        self.router_bias += BIAS_STEP * torch.sign(load.mean() - load)
        self.load.zero_()
