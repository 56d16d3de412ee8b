"""Runs the demo in several processes of one machine; Lightning starts them with the same command line."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

VERSION = "MERGE_CALLBACK_DEMO_VERSION"
"""The environment variable that passes the number of the run's folder to the other processes."""


def cpu_options(strategy: str, devices: int) -> dict[str, Any]:
    """The Trainer's options for `devices` processes on the CPU.

    Args:
        strategy: `ddp`, `fsdp2`, or `auto`: DDP if there is more than one process.
        devices: Number of processes.
    """
    options = {"accelerator": "cpu", "devices": devices, "strategy": strategy}
    if strategy == "fsdp2":
        options["strategy"] = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    return options


def share_cores(devices: int) -> None:
    """Gives each process its share of the cores."""
    # The model is too small for more threads, which would wait for each other.
    threads = max(1, min(4, torch.get_num_threads() // devices))
    torch.set_num_threads(threads)
    if devices > 1:
        # Lightning gives the processes all cores, unless this is set.
        os.environ["OMP_NUM_THREADS"] = str(threads)


def new_version(output: str | Path) -> int:
    """Finds the number of the next `version_…` folder in `output`, the same one in all processes.

    The first process finds it; those that Lightning starts for it inherit its environment.

    Raises:
        ValueError: If Lightning did not start this process.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[VERSION] = str(TensorBoardLogger(output, name="").version)
    if VERSION not in os.environ:
        raise ValueError("the demo starts its processes itself: start it without torchrun, with --devices N.")
    return int(os.environ[VERSION])
