"""Merging LoRA adapters of a model of 7B parameters: time and memory, beside the way over dense products.

    python benchmarks/adapters.py --folder /disk/with/2GB

Makes adapters (rank 16, bf16, on all linear layers of a Llama 7B) and merges them, exactly and into rank 16.
One layer is also merged by the dense product and its singular values, which is what peft's
``add_weighted_adapter`` does with ``combination_type="svd"``. Every merge is a process of its own. Its memory
is the peak of anonymous memory, its children's included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from offline_merge import ours, run
from record import write
from safetensors.torch import load_file, save_file

WIDTH, INNER, LAYERS, RANK = 4096, 11008, 32, 16
PARTS = {
    **{f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"},
    **{f"mlp.{part}_proj": (INNER, WIDTH) for part in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}


def make_adapters(folder: Path, count: int, layers: int) -> list[Path]:
    """Adapters of random factors; reused if they are there."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    config["target_modules"] = sorted(part.rpartition(".")[2] for part in PARTS)
    folders = [folder / f"{layers}-layers" / f"expert-{index}" for index in range(count)]
    for index, path in enumerate(folders):
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(parents=True)
        generator = torch.Generator().manual_seed(index)
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(layers):
            for part, (rows, columns) in PARTS.items():
                name = f"base_model.model.model.layers.{layer}.{part}.lora_"
                a = torch.randn(RANK, columns, generator=generator) / columns**0.5
                b = torch.randn(rows, RANK, generator=generator) / RANK**0.5
                tensors |= {f"{name}A.weight": a.bfloat16(), f"{name}B.weight": b.bfloat16()}
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
    return folders


def by_dense_product(folders: list[Path], part: str) -> float:
    """Seconds that one layer takes by its dense product, as in peft 0.21."""
    given = [load_file(path / "adapter_model.safetensors") for path in folders]
    name = f"base_model.model.model.layers.0.{part}.lora_"
    start = time.perf_counter()
    delta = sum(g[f"{name}B.weight"].float() @ g[f"{name}A.weight"].float() * (2 / len(given)) for g in given)
    u, values, v = torch.linalg.svd(delta, full_matrices=False)
    (u[:, :RANK] * values[:RANK]).contiguous(), v[:RANK].contiguous()
    return time.perf_counter() - start


def main() -> None:
    """Measures and writes ``benchmarks/results/adapters.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="for the adapters and merges (a temporary one)")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=parsed.folder) as scratch:
        folders = make_adapters(parsed.folder or Path(scratch), parsed.count, parsed.layers)
        figures = {"adapters": parsed.count, "rank": RANK, "layers": parsed.layers * len(PARTS)}
        for name, options in (("exact", ()), ("rank_16", ("--rank", str(RANK)))):
            merged = run(ours(Path(scratch) / name, folders, *options))
            figures[name] = {"seconds": merged.seconds, "anonymous_mib": merged.anonymous}
            print(f"{name:10} {merged.seconds:7.1f} s {merged.anonymous:8.0f} MiB", flush=True)
        figures["dense_layer_seconds"] = by_dense_product(folders, "self_attn.q_proj")
        print(f"one layer of {WIDTH} x {WIDTH} by its dense product: {figures['dense_layer_seconds']:.1f} s")
        print(write("adapters", figures))


if __name__ == "__main__":
    main()
