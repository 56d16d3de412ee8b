"""Small checkpoint files, and the command that merges them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from merge_callback.cli.main import main


def model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(50, 8, generator=generator).to(dtype),
        "model.norm.weight": torch.randn(8, generator=generator),
        "model.scale": torch.randn((), generator=generator).to(dtype),
        "model.positions": torch.arange(8),
        "model.seen": torch.tensor(seed),
    }


def merge(*arguments):
    """Runs the command; returns its exit status."""
    return main(["merge", "--quiet", *map(str, arguments)])


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*"))


def change(path, **tensors):
    """Rewrites a file with other tensors in it; ``None`` takes one out."""
    state = {**load_file(path), **{name.replace("_", "."): t for name, t in tensors.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
