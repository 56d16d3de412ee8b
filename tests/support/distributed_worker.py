"""Forks ranks that run the jobs of ``distributed_runs.run_jobs``."""

import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from merge_callback.sharding import destroy_groups


def main(nprocs: int, folder: Path) -> int:
    # This imports the jobs' modules, which the ranks inherit.
    jobs = torch.load(folder / "jobs", weights_only=False)
    codes, _ = fork_ranks(nprocs, jobs, folder)
    if any(codes):
        print(f"exit codes: {codes}", flush=True)
    return int(any(codes))


def fork_ranks(
    nprocs: int, jobs: dict[str, Any], folder: Path, patience: float | None = None
) -> tuple[list[int | None], float]:
    """Forks ranks that run all jobs; their exit codes, and the seconds until they had ended.

    Args:
        nprocs: how many.
        jobs: as `distributed_runs.run_jobs` takes them.
        folder: of what they print and return.
        patience: seconds in which all have to end by themselves, whatever happens to one of them; the code of
            one that does not is ``None``. Without it, all end with the first that fails.
    """
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank, nprocs, jobs, folder)) for rank in range(nprocs)]
    for rank in ranks:
        rank.start()
    start = time.monotonic()

    def goes_on() -> bool:
        if patience is None:
            return not any(rank.exitcode for rank in ranks)
        return time.monotonic() - start < patience

    # The list is made once a turn: to wait for an empty one, all having ended meanwhile, would last for ever.
    while (alive := [rank for rank in ranks if rank.is_alive()]) and goes_on():
        wait([rank.sentinel for rank in alive], timeout=patience and 1)
    took = time.monotonic() - start
    if patience is None and alive:  # they would wait for ever; where all fail, all may say why
        time.sleep(0.5)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    return codes, took


def run(rank: int, nprocs: int, jobs: dict[str, Any], folder: Path) -> None:
    """What one rank does: all jobs, one after another."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    # LOCAL_RANK tells Lightning that somebody else started the processes.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(nprocs))
    # Lightning takes a process group that is there already; to meet at a file needs no free port.
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=nprocs)
    results = {}
    for name, (function, options) in jobs.items():
        print(f"job {name}", flush=True)
        try:
            results[name] = function(**options)
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)  # no exit handler may wait for the other ranks
    torch.save(results, folder / f"rank{rank}.pt")
    destroy_groups([dist.group.WORLD])
