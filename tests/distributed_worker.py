"""Forks ranks that run the jobs of ``distributed_runs.run_jobs``."""

import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def main(nprocs: int, folder: Path) -> int:
    # This imports the jobs' modules, which the ranks inherit.
    jobs = torch.load(folder / "jobs", weights_only=False)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank, nprocs, jobs, folder)) for rank in range(nprocs)]
    for rank in ranks:
        rank.start()
    # The list is made once a turn: to wait for an empty one, all having ended meanwhile, would last for ever.
    while (alive := [rank for rank in ranks if rank.is_alive()]) and not any(r.exitcode for r in ranks):
        multiprocessing.connection.wait([rank.sentinel for rank in alive])
    failed = any(rank.exitcode for rank in ranks)
    if failed:  # the others would wait for that rank for ever; where all fail, all may say why
        time.sleep(0.5)
        print(f"exit codes: {[rank.exitcode for rank in ranks]}", flush=True)
    for rank in ranks:
        rank.kill()
    return int(failed)


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
    dist.destroy_process_group()
