"""The claims of the papers, on runs that two cores can make.

    python -m benchmarks.papers phases               # one claim; the runs it needs are trained first
    python -m benchmarks.papers all                  # all of them; resumable
    python -m benchmarks.papers all --quick          # two seeds of a very small model: to see that it runs
    python -m benchmarks.papers all --train          # only the runs, seed by seed
    python -m benchmarks.papers all --ready          # of the seeds whose runs are finished

In full the four studies of the shared runs take 30 minutes on an idle core.

A claim writes benchmarks/results/papers/NAME.json and NAME.png, and prints its verdicts; docs/evidence.md is
written from these files (``python docs/generate.py``).
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from benchmarks.papers.claims import NAMES, specs
from benchmarks.papers.evidence import RESULTS, rewritten, written
from benchmarks.papers.study import SIZES, Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*NAMES, "all"], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seeds", type=int, help="default: 5, 2 if --quick")
    parser.add_argument("--size", choices=SIZES, default="full", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the same as --size quick")
    parser.add_argument("--cache", type=Path, default=Path("build/papers"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--train", action="store_true", help="train the runs, and nothing else")
    parser.add_argument("--ready", action="store_true", help="train nothing: the seeds that are finished")
    parser.add_argument("--redraw", action="store_true", help="verdicts and pictures from the JSON files")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small for more
    warnings.filterwarnings("ignore", message=".*negative weights extrapolate")  # they are meant to
    size = "quick" if options.quick else options.size
    study = Study(options.cache, options.seeds or (2 if size == "quick" else 5), size)
    names = NAMES if "all" in options.names else options.names
    if options.redraw:
        for name in names:
            print(*rewritten(name, options.out), sep="\n")
        return
    if not options.ready:
        study.train(spec for seed in study.seeds for name in names for spec in specs(name, study, seed))
    for name in () if options.train else names:
        print(*written(name, study, options.out), sep="\n", flush=True)


if __name__ == "__main__":
    main()
