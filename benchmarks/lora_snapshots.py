"""What it matters whether the snapshots of a LoRA run are merged by their products or factor by factor.

    python benchmarks/lora_snapshots.py

Trains a small Llama on the standard library's sources, puts an adapter of rank 8 on all its linear layers,
trains that, and merges its last ten snapshots both ways, by several methods: how far is what either gives
from the merge of the dense products, and what is the loss on held-out text? Needs peft and transformers.
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

from merge_callback.merging import Inputs, Trajectory, merge_state_dicts, resolve_method
from merge_callback.merging.low_rank import LowRank, relative_error
from merge_callback.sharding import Piece, Sharding
from merge_callback.snapshots.lora_merge import factor_pairs, merge_factors

COUNT, RANK, CONTEXT = 10, 8, 64
METHODS = ("sma", "slerp", "ties", "dare")
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


def merges(
    taken: list[dict[str, Tensor]], name: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Factors merged apart and by their products, and each one's mean distance from the merged products."""
    method, even = resolve_method(name), Trajectory.even(len(taken))
    pieces = {n: Piece.all_of(tensor.shape) for n, tensor in taken[0].items()}
    snapshots = [partial(lambda s, names: {n: s[n].view(-1) for n in names}, s) for s in taken]
    pairs = factor_pairs(pieces)
    flat = merge_factors(pairs, snapshots, method, even, Sharding(taken[0], pieces))
    found = {
        "factors": merge_state_dicts(taken, method),
        "products": {n: tensor.view(taken[0][n].shape) for n, tensor in flat.items()},
    }
    off: dict[str, list[float]] = {kind: [] for kind in found}
    for a, b in pairs:
        dense = [(s[b] @ s[a]).view(-1) for s in taken]
        inputs, exact = Inputs(a, dense), torch.empty_like(dense[0])
        method.merge(inputs, exact, even, method.survey([inputs], even))
        exact = exact.view(taken[0][b].shape[0], -1)
        for kind, merged in found.items():
            off[kind].append(relative_error(LowRank(merged[b], merged[a]), exact))
    return found, {kind: sum(values) / len(values) for kind, values in off.items()}


def measured(base: Any, lr: float, every: int, seed: int, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """One run, and the merges of its last snapshots."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    module, snapshots = Tuned(peft.get_peft_model(copy.deepcopy(base), config), lr), Snapshots(every)
    data = DataLoader(train, batch_size=16, shuffle=True)
    Trainer(max_steps=every * COUNT, callbacks=[snapshots], **QUIET).fit(module, data)
    run: dict[str, Any] = {"lr": lr, "every": every, "seed": seed}
    run["live"] = loss(module.model, snapshots.taken[-1], held_out)
    for name in METHODS:
        found, off = merges(snapshots.taken, name)
        losses = {kind: loss(module.model, merged, held_out) for kind, merged in found.items()}
        run[name] = {"relative_distance": off, "loss": losses}
    return run


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
        print(f"lr {lr:g} every {every:2} seed {seed}: loss live {runs[-1]['live']:.4f}", flush=True)
        for name in METHODS:
            off, losses = runs[-1][name]["relative_distance"], runs[-1][name]["loss"]
            told = (f"{kind} off {off[kind]:.4f}, loss {losses[kind]:.4f}" for kind in off)
            print(f"  {name:6} {'; '.join(told)}", flush=True)
    print(write("lora_snapshots", {"snapshots": COUNT, "rank": RANK, "runs": runs}))


if __name__ == "__main__":
    main()
