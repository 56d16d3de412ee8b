"""A byte-level GPT small enough to train on two CPU cores in minutes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merge_callback.demo.experts import Experts, FeedForward


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a `GPT`; the defaults give 123 k parameters."""

    vocabulary: int = 256
    """Number of tokens: one per byte value."""
    context: int = 128
    """Longest sequence, in tokens."""
    width: int = 64
    """Width of the residual stream."""
    layers: int = 2
    """Number of blocks."""
    heads: int = 2
    """Attention heads; must divide `width`."""
    qk_norm: bool = True
    """Normalise queries and keys; without it, high learning rates can make attention logits diverge."""
    tied_head: bool = True
    """Use the token embedding as the output matrix."""
    experts: int = 0
    """Experts per block; 0 is a dense MLP."""
    experts_per_token: int = 2
    """Experts that see each token, if there are any. Their joint width is that of the dense MLP."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}: change either.")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie in 1..experts={self.experts}."
            )


class Attention(nn.Module):
    """Causal self-attention with optional query-key normalisation."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        head_width = config.width // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.query_norm = nn.RMSNorm(head_width) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_width) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attends to the current and earlier positions; `(batch, context, width)` to the same."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        query, key = self.query_norm(query), self.key_norm(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return attended


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP or mixture of experts."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = _make_mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Adds both sublayers to the residual stream; `(batch, context, width)` to the same."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    """A causal language model over bytes: learned positions, RMSNorm, no biases.

    Example::

        gpt = GPT(GPTConfig())
        logits = gpt(torch.zeros(1, 128, dtype=torch.int64))  # (1, 128, 256)
    """

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied_head:
            self.head.weight = self.tokens.weight
        self.apply(_initialise)
        self._shrink_residual_outputs()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Predicts the next token at every position; `(batch, context)` int64 to logits `(…, vocabulary)`."""
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[-1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def balance_experts(self) -> None:
        """Updates the router biases from the loads since the last call; a dense model has none."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.balance()

    def _shrink_residual_outputs(self) -> None:
        """Keeps the variance of the residual stream independent of depth (GPT-2)."""
        scale = (2 * self.config.layers) ** -0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("out.weight", "down.weight")):
                    parameter.mul_(scale)


def _make_mlp(config: GPTConfig) -> nn.Module:
    hidden = 4 * config.width
    if not config.experts:
        return FeedForward(config.width, hidden)
    # The experts of a token together have the width of the dense MLP, so a step costs the same.
    return Experts(config.width, hidden // config.experts_per_token, config.experts, config.experts_per_token)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
