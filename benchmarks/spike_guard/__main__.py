"""How old should the restored weights be? Guard, number of snapshots and optimizer policy, measured.

    python -m benchmarks.spike_guard --cache guard_cache            # all arms; an interrupted run goes on
    python -m benchmarks.spike_guard --cache before --arms default  # the default policy alone, all causes
    python -m benchmarks.spike_guard --table                        # the tables again, from the JSON

All arms take over an hour on one core; with TMPDIR on a disk in memory no time is lost to fsync.

A small GPT trains once per seed, with a snapshot every 10 steps. From a checkpoint shortly before the onset
it goes on in several ways: unbroken; broken and only warned of; broken and restored, for every combination of
``guard`` (5, 10, 30, 100 steps), ``pma_window`` (1, 3, 10) and ``optimizer`` (keep, reset). `CAUSES` says
what breaks it. A cause ends with the first restore, as if somebody had mended it then, or after its length;
corrupted data go on to their end.

A run is *recovered* if its final validation loss, the mean of three validations, is within 2 % of the
unbroken run's. It is *back on trend* once its training loss (mean of 10 steps) is within 2 % of the unbroken
run's on the same batches; counted from the first restore, so 10 is the least. Its *excess* is how far its
training loss lies above the unbroken run's in the mean of all steps from the first restore to the end.

The re-warm-up takes 30 steps, not the default 100: only some 300 steps are left after a restore.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.record import RESULTS, write
from benchmarks.recorders import on_one_quiet_thread
from benchmarks.spike_guard.cache import Cache, run_seed
from benchmarks.spike_guard.causes import CAUSES, EXTRA
from benchmarks.spike_guard.figures import collect
from benchmarks.spike_guard.plan import ARMS, DEFAULT, MODELS, PLAN, arm_name
from benchmarks.spike_guard.tables import tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache", type=Path, help="folder of the runs; an interrupted benchmark goes on there"
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="two seeds")
    parser.add_argument("--kinds", nargs="+", default=list(CAUSES), choices=[*CAUSES, *EXTRA])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--arms", choices=["all", "default", "none"], default="all")
    parser.add_argument("--name", default="spike_guard", help="of the JSON among the results")
    parser.add_argument("--table", action="store_true", help="only make the tables again from that JSON")
    options = parser.parse_args()
    if not options.table:
        print(measure(options))
    text = tables(json.loads((RESULTS / f"{options.name}.json").read_text()))
    (RESULTS / f"{options.name}.md").write_text(text + "\n")
    print(text)


def measure(options: argparse.Namespace) -> Path:
    """Runs what is missing, and writes the figures."""
    on_one_quiet_thread()
    logging.getLogger("merge_callback").setLevel(logging.ERROR)
    torch.backends.mkldnn.enabled = False  # matrices this small take longer with it
    seeds = 2 if options.quick else options.seeds
    chosen = {"all": list(ARMS), "default": ["no action", arm_name(*DEFAULT)], "none": ["no action"]}
    arms = chosen[options.arms]
    with tempfile.TemporaryDirectory() as name:
        cache = Cache(options.cache or Path(name))
        for seed, model in itertools.product(range(seeds), options.models):
            run_seed(cache, model, seed, options.kinds, arms)
        figures = collect(cache, options.models, options.kinds, arms, seeds)
    causes = {kind: str((CAUSES | EXTRA)[kind].__doc__) for kind in options.kinds}
    return write(options.name, {"plan": asdict(PLAN), "causes": causes, "seeds": seeds, **figures})


if __name__ == "__main__":
    main()
