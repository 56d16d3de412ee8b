"""A sharded model and its optimizer, which two ranks save together."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor


def build() -> torch.nn.Module:
    """Seven rows, which two processes share unevenly, and one row, of which the second has none."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1), torch.nn.BatchNorm1d(1))


def columns() -> torch.Tensor:
    return torch.arange(15, dtype=torch.bfloat16).reshape(3, 5)


def save(folder: Path) -> None:
    """What each of the two ranks does."""
    model = build()
    mesh = DeviceMesh("cpu", [0, 1])
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(torch.ones(4, 5)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": moments, "columns": distribute_tensor(columns(), mesh, [Shard(1)])}
    dcp.save(state, checkpoint_id=folder)
