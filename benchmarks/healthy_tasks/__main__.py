"""Does the rescue leave healthy runs alone, however hard their losses are to read?

    python benchmarks/healthy_tasks                       # all tasks: a few minutes
    python benchmarks/healthy_tasks --only gan_phases ppo
    python benchmarks/healthy_tasks --seeds 3 --workers 2

Every task is a small LightningModule that really learns, and whose loss is difficult to tell from a
divergence: by the order of its data, its schedules, its objective, an opponent, or surgery on the weights.
Each is trained twice from the same seed, with the callback as it is by default and without it. A task must
learn without the callback. With it there may be no restore and no end, and the final weights and score must
be the same bit for bit. Where that is not so, the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from record import write

from healthy_tasks.catalogue import TASKS
from healthy_tasks.comparison import compare


def main() -> int:
    options = parse()
    unknown = [name for name in options.only or () if name not in TASKS]
    if unknown:
        sys.exit(f"there is no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    began = time.perf_counter()
    runs = []
    scores = "score: start → without, with"
    print(f"{'task':26} seed  steps  restores  ended  equal  {scores:34} events (what is hard)")
    pairs = list(product(options.only or TASKS, range(options.seeds)))
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for run in pool.map(compare, *zip(*pairs, strict=True)):
            print(row(run), flush=True)
            runs.append(run)
    losses = {f"{run['task']}-s{run['seed']}": np.asarray(run.pop("losses"), np.float32) for run in runs}
    if options.curves:
        np.savez_compressed(options.curves, **losses)
    figures = summary(runs)
    print("\n".join(f"{what}: {value}" for what, value in figures.items()))
    figures["seconds"] = round(time.perf_counter() - began)
    print(write(options.name, {**figures, "runs": runs}))
    return int(bool(figures["not as they should be"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="healthy_tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these tasks")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to train each task with")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="healthy_tasks", help="of the file in benchmarks/results")
    parser.add_argument(
        "--curves", type=Path, metavar="NPZ", help="keep the losses without the callback here"
    )
    return parser.parse_args()


def row(run: dict[str, Any]) -> str:
    """A line of the table."""
    score = run["score"]
    scores = f"{score['start']:.4g} → {score['without']:.4g}, {score['with']:.4g}"
    events = ", ".join(f"{kind} {count}" for kind, count in run["events"].items()) or "none"
    remarks = "" if run["learned"] else "  DID NOT LEARN"
    remarks += f"  ERROR {run['error'].splitlines()[-1]}" if run["error"] else ""
    return (
        f"{run['task']:26} {run['seed']:4}  {run['steps']:5}  {run['restores']:8}  {yes(run['ended']):5}  "
        f"{yes(run['bitwise_equal']):5}  {scores:34} {events}  ({run['hard']}){remarks}"
    )


def yes(value: Any) -> str:
    return "yes" if value else "no"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many runs are as they should be, and the names of those that are not."""

    def names(what: Any) -> list[str]:
        return sorted({run["task"] for run in runs if what(run)})

    return {
        "tasks": len({run["task"] for run in runs}),
        "pairs of runs": len(runs),
        "optimizer steps": sum(run["steps"] for run in runs),
        "restores": sum(run["restores"] for run in runs),
        "restored": names(lambda run: run["restores"]),
        "ended": names(lambda run: run["ended"]),
        "not equal": names(lambda run: not run["bitwise_equal"]),
        "other events only": names(lambda run: run["events"] and not run["restores"] and not run["ended"]),
        "did not learn": names(lambda run: not run["learned"]),
        "errors": names(lambda run: run["error"]),
        "not as they should be": names(lambda run: not as_it_should_be(run)),
    }


def as_it_should_be(run: dict[str, Any]) -> bool:
    """Whether a healthy task learned, and the callback left it alone."""
    touched = run["restores"] or run["ended"] or not run["bitwise_equal"]
    return run["learned"] and not touched and not run["error"]


if __name__ == "__main__":
    sys.exit(main())
