"""Do experts that are trained for long merge worse, and does stopping them early help?

    python -m benchmarks.upcycling             # three seeds: one to three hours on one core
    python -m benchmarks.upcycling --quick     # three minutes, to see that it runs; its figures mean nothing
    python -m benchmarks.upcycling --seeds 1

*Less Is More: Undertraining Experts Improves Model Upcycling*, at a small scale: a transformer that has read
the standard library's sources is fine-tuned on six tasks about such sources, fully and by LoRA; its experts
of 2 to 2048 steps are merged, MoErged and stopped early. What is finished lies in `--cache`, so that a killed
study goes on there; `--report` writes what there is and computes nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from pathlib import Path

import torch

from benchmarks.record import RESULTS, described
from benchmarks.upcycling.figures import draw
from benchmarks.upcycling.findings import beside_merged, findings, stopping
from benchmarks.upcycling.parts import Work
from benchmarks.upcycling.report import gathered
from benchmarks.upcycling.setup import QUICK, Cache, Study, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a very small study")
    parser.add_argument("--seeds", type=int, help="of the experts; default: 3, 1 if --quick")
    parser.add_argument("--cache", type=Path, default=Path("build/upcycling"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="write what is finished")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small for more
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("merge_callback").setLevel(logging.ERROR)
    study = QUICK if options.quick else Study()
    seeds = options.seeds or (1 if options.quick else 3)
    cache = Cache(options.cache / ("quick" if options.quick else "full"))
    work = Work(study, cache)
    if not options.report:
        run(work.parts(seeds), cache)
    record = gathered(work, seeds)
    told = {"findings": findings, "stopping": stopping, "beside_merged": beside_merged}
    record = {**{name: tell(record) for name, tell in told.items()}, **record}
    for finding in record["findings"]:
        print("{where}: {verdict}. Paper: {paper}. Here: {ours}.".format_map(finding))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "upcycling.json"
    path.write_text(_one_line_lists(json.dumps(described("upcycling", record), indent=1)) + "\n")
    print(path, *draw(record, options.out))


def _one_line_lists(text: str) -> str:
    """JSON with each list of numbers on one line."""
    return re.sub(r"\[[\d\s.,e+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)


if __name__ == "__main__":
    main()
