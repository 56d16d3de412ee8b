"""What it matters whether the snapshots of a LoRA run are merged by their products or factor by factor.

    python benchmarks/lora_snapshots.py

Trains a small Llama on the standard library's sources, puts an adapter of rank 8 on all its linear layers,
trains that, and merges its last ten snapshots both ways: how far from the mean of the products is what either
gives, and what is the loss on held-out text? Needs peft and transformers.
"""

from __future__ import annotations

import copy
import logging
import sysconfig
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import peft
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from record import QUIET, write
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from merge_callback.merging.low_rank import LowRank, total
from merge_callback.snapshots.lora_merge import factor_pairs, merge_factors

COUNT, RANK, CONTEXT = 10, 8, 64
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokens(modules: list[str]) -> Tensor:
    """Bytes of modules of the standard library, in rows."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join((folder / f"{name}.py").read_bytes() for name in modules)
    return torch.tensor(list(text[: len(text) // CONTEXT * CONTEXT])).view(-1, CONTEXT)


class Tuned(LightningModule):
    """A language model."""

    def __init__(self, model: Any, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Snapshots(Callback):
    """Copies of the factors, every few steps."""

    def __init__(self, every: int) -> None:
        self.every, self.taken = every, list[dict[str, Tensor]]()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Takes one."""
        if trainer.global_step % self.every == 0:
            state = module.model.state_dict()
            self.taken.append({n: t.detach().clone() for n, t in state.items() if ".lora_" in n})


@torch.no_grad()
def loss(model: Any, factors: dict[str, Tensor], ids: Tensor) -> float:
    """Of the model with these factors."""
    model.load_state_dict(model.state_dict() | factors)
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def measured(base: Any, lr: float, every: int, seed: int, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """One run, and both merges of its last snapshots."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    module, snapshots = Tuned(peft.get_peft_model(copy.deepcopy(base), config), lr), Snapshots(every)
    data = DataLoader(train, batch_size=16, shuffle=True)
    Trainer(max_steps=every * COUNT, callbacks=[snapshots], **QUIET).fit(module, data)
    taken, weights = snapshots.taken, [1 / COUNT] * COUNT
    factors = {name: torch.stack([s[name] for s in taken]).mean(0) for name in taken[0]}
    products = {name: tensor.clone() for name, tensor in factors.items()}
    merge_factors([partial(lambda s, names: s, s) for s in taken], weights, products, ())
    off: dict[str, list[float]] = {"factors": [], "products": []}
    for a, b in factor_pairs(factors):
        mean = total([LowRank(s[b], s[a]) for s in taken], weights, torch.float64)
        for name, merged in (("factors", factors), ("products", products)):
            off[name].append(LowRank(merged[b], merged[a]).distance(mean) / mean.norm())
    return {
        "lr": lr,
        "every": every,
        "seed": seed,
        "relative_distance": {name: sum(found) / len(found) for name, found in off.items()},
        "loss": {
            name: loss(module.model, found, held_out)
            for name, found in (("live", taken[-1]), ("factors", factors), ("products", products))
        },
    }


def main() -> None:
    """Measures and writes ``benchmarks/results/lora_snapshots.json``."""
    logging.disable(logging.INFO)
    train, held_out = tokens(["argparse", "inspect", "typing"]), tokens(["ast"])[:128]
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES))
    Trainer(max_steps=300, **QUIET).fit(Tuned(base, 1e-3), DataLoader(train, batch_size=16, shuffle=True))
    runs = []
    for lr, every, seed in product((1e-3, 5e-3), (10, 40), (1, 2, 3)):
        runs.append(measured(base, lr, every, seed, train, held_out))
        apart, loss_ = runs[-1]["relative_distance"], runs[-1]["loss"]
        print(
            f"lr {lr:g} every {every:2} seed {seed}: off {apart['factors']:.4f} {apart['products']:.4f}, "
            f"loss live {loss_['live']:.4f} factors {loss_['factors']:.4f} products {loss_['products']:.4f}",
            flush=True,
        )
    print(write("lora_snapshots", {"snapshots": COUNT, "rank": RANK, "runs": runs}))


if __name__ == "__main__":
    main()
