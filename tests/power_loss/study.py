"""Every kind of run and command, in each of the models: recorded, laid out, judged, resumed and counted."""

import argparse
import json
import logging
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from .checks import Verdict
from .commands import COMMANDS
from .further import FURTHER
from .runs import RUNS
from .states import MODELS, crash_states, digest

KINDS = {**RUNS, **COMMANDS, **FURTHER}

WRONG = {"damaged": "damaged", "torn": "torn", "silent": "lost silently", "crashed": "failed", "told": "lost"}
"""What is counted, and what it is called in the table."""

SEED = 0
"""Of all that is drawn by chance."""


def recorded(kind, place):
    """The log of a run of some kind, in a folder that must not exist; the kind knows what to expect then."""
    place.mkdir(parents=True)
    log = kind.record(place)
    assert not log.unseen, f"names were changed past the recorder: {log.unseen}"
    kind.prepare(place, log)
    return log


def judged(kind, place, log, models=MODELS, without=lambda record: False, at_most=None, most=16):
    """Counts, by model, of what becomes of a run; and what was wrong, one line each.

    Args:
        kind: of the run.
        place: where it was recorded.
        log: of it.
        models: which ones to look at.
        without: leaves records out of the log, see ``crash_states``.
        at_most: resumes; the kind's own number if not given. Of more states, some are drawn by chance.
        most: subsets of open changes after each record.
    """
    states = {model: _found(kind, log, model, without, most) for model in models}
    cases = {key: case for *_, found in states.values() for key, case in found.items()}
    at_most = kind.at_most if at_most is None else at_most
    chosen = random.Random(SEED).sample(sorted(cases, key=str), min(at_most, len(cases)))
    resumed = kind.resume(place, log, [cases[key] for key in chosen])
    verdicts = {key: kind.judge_resume(found, key[1]) for key, found in zip(chosen, resumed, strict=True)}
    figures, problems = {}, []
    for model, (count, distinct, verdict, found) in states.items():
        for key in found:
            verdict += verdicts.get(key, Verdict())
        tried = sum(key in verdicts for key in found)
        wrong = {name: len(lines) for name, lines in vars(verdict).items()}
        figures[model] = {"states": count, "distinct": distinct, "resumes": tried, **wrong}
        problems += [f"{model}: {line}" for line in verdict.problems]
    return {"resumes": len(chosen), **figures}, problems


def table(kinds):
    """The counts as rows of a Markdown table, one a kind; of what must not be, the sum over the models."""
    head = ["run", "operations", *(f"states, {model}" for model in MODELS), "resumes", *WRONG.values()]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, counts in kinds.items():
        states = [counts[model]["distinct"] for model in MODELS]
        wrong = [sum(counts[model][what] for model in MODELS) for what in WRONG]
        rows.append([name, *(f"{n:,}" for n in (counts["operations"], *states, counts["resumes"], *wrong))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _found(kind, log, model, without, most):
    """How many states there are and how many differ, what is wrong, and each with what it is resumed from."""
    count, verdict, promises, found, seen = 0, Verdict(), kind.promises, {}, set()
    for disk, record, trees in crash_states(log, model, without, SEED, most):
        promises = promises.after(record, disk)
        for tree in trees:
            count += 1
            key = digest(tree)
            if (key, promises) not in seen:
                seen.add((key, promises))
                verdict += kind.judge(tree, promises, log)
            for start in kind.resumes_from(promises):
                found.setdefault((key, start), (tree, start))
    return count, len({key for key, _ in seen}), verdict, found


def run(argv=None):
    """The command: goes through all kinds, shows how it goes, and writes the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.power_loss", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the counts")
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown whose table of them is replaced")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--resumes", type=int, help="of each kind at most; default: 500, or 120 of two ranks")
    given = parser.parse_args(argv)
    _be_quiet()
    counts, wrong = {}, []
    for name in given.only:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(dir=_fast()) as folder:
            kind, place = KINDS[name](), Path(folder) / "run"
            log = recorded(kind, place)
            figures, problems = judged(kind, place, log, at_most=given.resumes)
        counts[name] = {"operations": log.operations, **figures}
        wrong += problems
        row = table({name: counts[name]}).splitlines()[-1]
        told = [f"{row} {time.monotonic() - begun:.0f} s", *(f"  {line}" for line in problems[:5])]
        print("\n".join(told), file=sys.stderr, flush=True)
    if given.json:
        from benchmarks.record import described

        figures = described("power_loss", {"seed": SEED, "kinds": counts})
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    if given.page:
        page = given.page.read_text()
        given.page.write_text(
            re.sub(r"^\| run \|.*\n(\|.*\n)*", lambda _: table(counts), page, flags=re.MULTILINE)
        )
    return int(bool(wrong))


def _fast():
    """Memory, if the system has a folder there: nothing here has to be on a disk."""
    return "/dev/shm" if shutil.os.access("/dev/shm", shutil.os.W_OK) else None


def _be_quiet():
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "merge_callback"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).propagate = False
