"""How close an average of another width, made afterwards, comes to one that was tracked in the run.

A byte-level GPT trains on the demo's text. In the same run the widths .05 and .10, which are stored with its
snapshots, and further ones are tracked. The sums of the stored ones are compared with the tracked ones:
‖sum − tracked‖ / ‖tracked − live‖. Part of the copies is then left out, so that residuals grow: from both
follows how large a residual may be.

    python -m benchmarks.posthoc [--steps 1800] [--every 20]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.record import write
from merge_callback import CheckpointMerger, PowerEma
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.demo.crops import RandomCrops
from merge_callback.demo.gpt import GPT
from merge_callback.demo.schedule import wsd_factor
from merge_callback.demo.text import load_corpus
from merge_callback.merging.posthoc import Profile, solve
from merge_callback.snapshots.manifest import find_manifest

STORED = (0.05, 0.1)
TRACKED = (0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2)
BATCH, CONTEXT = 8, 64
SPARSE = (1, 2, 3, 4, 6, 8, 12, 20)
"""Every how many-th of the stored copies are used."""

Weights = dict[str, Tensor]


def trained(folder: Path, steps: int, every: int) -> tuple[Weights, dict[float, Weights]]:
    """Trains; returns the live weights at the end and the tracked averages."""
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup, decay = steps // 27, steps // 9
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: wsd_factor(step, warmup, steps - warmup - decay, decay)
    )
    crops = RandomCrops(load_corpus().train, BATCH, CONTEXT, steps)
    running = [PowerEma(sigma) for sigma in TRACKED]
    merger = CheckpointMerger(
        model,
        optimizer,
        total_steps=steps,
        dirpath=folder,
        every_n_steps=every,
        emit_every=0,
        running=running,
    )
    with merger:
        for index in range(steps):
            batch = crops.draw(index)
            logits = model(batch["input_ids"])
            loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            merger.step(loss=loss.detach(), tokens=BATCH * CONTEXT)
    live = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return live, {sigma: at_end(folder, sigma, steps) for sigma in TRACKED}


def at_end(folder: Path, sigma: float, step: int) -> Weights:
    """A tracked average as it was stored after a step."""
    return read(next(record for record in records(folder, sigma) if record["step"] == step)["path"])


def records(folder: Path, *sigmas: float) -> list[dict[str, Any]]:
    """What the run has stored of some widths."""
    window = folder / "window"
    found = [record for record in find_manifest(window).running if record["average"]["sigma"] in sigmas]
    return [{**record, "path": window / record["file"]} for record in found]


def read(path: Path) -> Weights:
    """The tensors of a stored average in fp64."""
    return {name: tensor.double() for name, tensor in open_checkpoint(path).tensors.items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """The Euclidean distance over the whole model."""
    return sum(float((one[n].double() - other[n].double()).square().sum()) for n in names) ** 0.5


def compare(
    folder: Path, steps: int, live: Weights, tracked: Mapping[float, Weights]
) -> list[dict[str, Any]]:
    """Error and residual of every width, from all stored copies and from fewer."""
    stored = records(folder, *STORED)
    copies = {record["path"]: read(record["path"]) for record in stored}
    names, rows = [*live], []
    times = sorted({record["step"] for record in stored}, reverse=True)
    for sparse in SPARSE:
        kept = [record for record in stored if record["step"] in times[::sparse]]
        profiles = [Profile(record["step"], record["average"]["sigma"]) for record in kept]
        for sigma in TRACKED:
            solution = solve(profiles, Profile(steps, sigma))
            parts = list(zip(solution.weights, kept, strict=True))
            made = {n: torch.stack([w * copies[r["path"]][n] for w, r in parts]).sum(0) for n in names}
            error = distance(made, tracked[sigma], names) / distance(tracked[sigma], live, names)
            size = sum(map(abs, solution.weights))
            rows.append(
                {
                    "sigma": sigma,
                    "copies": len(kept),
                    "every": sparse,
                    "residual": solution.residual,
                    "error": error,
                    "weights": size,
                }
            )
    return rows


def main() -> None:
    """Trains, compares and records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--every", type=int, default=20)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        live, tracked = trained(folder, parsed.steps, parsed.every)
        rows = compare(folder, parsed.steps, live, tracked)
    for row in rows:
        print(
            f"sigma {row['sigma']:.2f}  every {row['every']:>2} ({row['copies']:>3} copies)  residual "
            f"{row['residual']:.5f}  error {row['error']:.5f}  Σ|w| {row['weights']:.2f}"
        )
    print(write("posthoc", {"steps": parsed.steps, "every": parsed.every, "stored": STORED, "rows": rows}))


if __name__ == "__main__":
    main()
