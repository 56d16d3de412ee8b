"""The base model, a task's examples with its head, and what the two score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.upcycling.corpus import CONTEXT, VOCABULARY, text
from benchmarks.upcycling.setup import Study
from benchmarks.upcycling.tasks import Examples, sample
from merge_callback.demo.gpt import GPT, GPTConfig
from merge_callback.merging.low_rank import FACTOR, LowRank

WIDTH = 64
ADAPTED = ("qkv", "out", "up", "down")
Weights = Mapping[str, Tensor]
Factors = Mapping[str, LowRank]


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        head: maps features `(…, WIDTH)` to logits; fitted to the base's features, then frozen, as the heads
            of the paper's vision models are. It is not merged.
        parts: its examples for `train`, `validation`, `test`.
    """

    name: str
    head: nn.Linear
    parts: Mapping[str, Examples]


class Encoder(GPT):
    """The demo's GPT with features instead of logits, and in its last block only what `last` needs."""

    def __init__(self) -> None:
        shape = GPTConfig(vocabulary=VOCABULARY, context=CONTEXT, width=WIDTH, layers=2, heads=2)
        super().__init__(shape)
        self.head = nn.Identity()  # type: ignore[assignment]

    def last(self, contexts: Tensor) -> Tensor:
        """The features after the last lexeme; `(batch, CONTEXT)` to `(batch, WIDTH)`."""
        x = self.tokens(contexts) + self.positions.weight
        *blocks, block = self.blocks
        for each in blocks:
            x = each(x)
        attention = block.attention
        query, key, value = (
            part.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for part in attention.qkv(block.attention_norm(x)).chunk(3, -1)
        )
        query, key = attention.query_norm(query[:, :, -1:]), attention.key_norm(key)
        mixed = F.scaled_dot_product_attention(query, key, value).flatten(1)
        x = x[:, -1] + attention.out(mixed)
        found: Tensor = self.norm(x + block.mlp(block.mlp_norm(x)))
        return found


def pretrain(steps: int) -> dict[str, Tensor]:
    """Trains a language model on the library's text; returns its weights without the (tied) head."""
    torch.manual_seed(0)
    model, lexemes, peak = Encoder(), text(), 2e-3
    optimizer = AdamW(model.parameters(), weight_decay=0.05, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 100, 2 * (steps - step) / steps)
        at = torch.randint(len(lexemes) - CONTEXT - 1, (64, 1)) + torch.arange(CONTEXT + 1)
        logits = F.linear(model(lexemes[at[:, :-1]]), model.tokens.weight)
        take(optimizer, F.cross_entropy(logits.flatten(0, 1), lexemes[at[:, 1:]].flatten()))
    return copy_of(model.state_dict())


def take(optimizer: Optimizer, loss: Tensor) -> None:
    """One step."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def copy_of(weights: Weights) -> dict[str, Tensor]:
    """Weights that training doesn't change."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def with_weights(weights: Weights) -> Encoder:
    """A model."""
    model = Encoder()
    model.load_state_dict(dict(weights))
    return model


def make_task(name: str, study: Study, base: Weights, seed: int) -> Task:
    """A task with training examples and a head of this seed; validation and test are always the same."""
    held_out = sample(name, True, study.validation + study.test, seed=0)
    parts = {
        "train": sample(name, False, study.train, seed),
        "validation": held_out[: study.validation],
        "test": held_out[study.validation :],
    }
    few = parts["train"][: study.probe]
    x = features(with_weights(base), few.contexts)
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, 1 + max(int(part.labels.max()) for part in parts.values()))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), few.labels) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Task(name, head.requires_grad_(False), parts)


@torch.no_grad()
def features(model: Any, contexts: Tensor) -> Tensor:
    """After the last lexeme; `(examples, CONTEXT)` to `(examples, WIDTH)`."""
    return torch.cat([model.last(part) for part in contexts.split(200)])


def logits(model: Any, task: Task, part: str) -> Tensor:
    """Of all examples of a part, `(examples, classes)`."""
    return task.head(features(model, task.parts[part].contexts))


def accuracy(model: Any, task: Task, part: str) -> float:
    """In percent."""
    right = logits(model, task, part).argmax(-1) == task.parts[part].labels
    return 100 * float(right.float().mean())


def accuracies(weights: Weights, tasks: Sequence[Task], part: str) -> list[float]:
    """Of one model on all tasks."""
    model = with_weights(weights)
    return [accuracy(model, task, part) for task in tasks]


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers."""
    return fmean(values)


def new_expert(kind: str, base: Weights) -> Any:
    """The base, to be trained as a whole (`full`) or by an adapter of peft (`lora16`)."""
    model = with_weights(base)
    if kind == "full":
        return model
    from peft import LoraConfig, get_peft_model  # slow to import

    rank = int(kind.removeprefix("lora"))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ADAPTED))
    return get_peft_model(model, config)


def trained_state(kind: str, model: nn.Module) -> dict[str, Any]:
    """What an expert has learnt: all its weights, or factors by layer."""
    weights = copy_of(model.state_dict())
    if kind == "full":
        return weights
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if named := FACTOR.fullmatch(name):
            module = named["module"].removeprefix("base_model.model.")
            found.setdefault(module, {})[named["factor"]] = tensor
    return {module: LowRank(pair["B"], pair["A"], 1.0) for module, pair in found.items()}


def dense(kind: str, state: Mapping[str, Any], base: Weights) -> dict[str, Tensor]:
    """An expert's weights: θ_0 + ΔW for LoRA."""
    if kind == "full":
        return dict(state)
    added = {f"{module}.weight": factors.dense() for module, factors in state.items()}
    return {name: tensor + added[name] if name in added else tensor for name, tensor in base.items()}


def steps(
    model: Any, task: Task, examples: Examples, count: int, batch: int, rate: float, seed: int
) -> Iterator[int]:
    """Trains at a constant rate, and yields the number of each step after it."""
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0, fused=True)
    for step, chosen in enumerate(batches(len(examples), count, batch, seed), 1):
        output = task.head(model.last(examples.contexts[chosen]))
        take(optimizer, F.cross_entropy(output, examples.labels[chosen]))
        yield step


def batches(size: int, count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """The examples of each step, in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(size, generator=generator) for _ in range(count * batch // size + 1)]
    return iter(torch.cat(orders)[: count * batch].view(count, batch))
