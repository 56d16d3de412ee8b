"""The command ``sweep``."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_callback.checkpoints.plain_yaml import read_value
from merge_callback.cli.dry_run import compared, reads, tell_dry
from merge_callback.cli.imports import import_all, import_named
from merge_callback.cli.merge_arguments import DEFAULTS, add_form, add_range, chosen, job_of, notes_of, tell
from merge_callback.cli.sweep_tables import TABLE, as_csv, as_table, noise_of, pictured
from merge_callback.engine.metric_names import said_lower, sounds_lower
from merge_callback.engine.plan import in_bytes
from merge_callback.merging import METHODS, Extrapolate, Sma
from merge_callback.offline import candidates as made
from merge_callback.offline.job import Job
from merge_callback.offline.merge_adapters import opened_adapters
from merge_callback.offline.merge_files import merge_files
from merge_callback.offline.output_folder import OutputFolder
from merge_callback.offline.peers import Peers, peers_of_launcher
from merge_callback.offline.sweep import Evaluate, Objective, Scored, Sweep
from merge_callback.offline.sweep_results import SweepResults
from merge_callback.snapshots.files import printable
from merge_callback.snapshots.safetensors_file import file_checksum

_ORDERS = ("forward", "reversed", "random")

_SWEEP_DEFAULTS: dict[str, Any] = {
    **DEFAULTS,
    "methods": ["sma"],
    "lasts": None,
    "orders": ["forward"],
    "evaluate": None,
    "config": [],
    "results": None,
    "select": None,
    "lower_is_better": [],
    "higher_is_better": [],
    "pareto": None,
    "line_search": False,
    "temperature": None,
}

_DESCRIPTION = """\
Merge checkpoints in many ways, score every merge, and keep the best. Each method is tried with each number of
the newest checkpoints and in each order; what means nothing (sma reversed, more than there are) is left out.
Linear methods are merged together, in one read of the files, as many at a time as half of the free memory
holds. The newest checkpoint alone is scored, too.

Two methods exist here alone. `greedy` is the greedy soup (arXiv 2203.05482): the checkpoints are scored one
by one, and the best first, each is added to the mean if that does not get worse. `metric-weighted` weighs
them by softmax(score / T) (arXiv 2504.18580).

Every score is kept in the folder of results as soon as it is known, with a table (results.csv) and, if there
are two metrics, a picture (pareto.png). The same command goes on where it was broken off, and scores only
what is new. With --output, the best is merged again from the files, and its merge.json has all scores.

In `torchrun --nproc-per-node N -m merge_callback sweep …` the processes share the merges."""

_EXAMPLES = """\
examples:
  merge-callback sweep run/ --methods sma wsm ties --last 5 10 --evaluate my_module:evaluate --output best
  merge-callback sweep run/ --methods ema:alpha=0.1 ema:alpha=0.3 greedy --config config.yaml --results scores
  merge-callback sweep run/ --methods extrapolate --line-search --evaluate my_module:evaluate --results scores
"""


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``sweep``."""
    parser.set_defaults(run=_sweep, refuse=parser.error)
    parser.argument_default = argparse.SUPPRESS
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="files, folders, or folders of a run")
    add(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="names that `merge-callback methods` lists, greedy or metric-weighted; options follow as "
        "ties:density=0.7,scale=1.2 (sma)",
    )
    add("--last", dest="lasts", nargs="+", type=int, metavar="N", help="how many of the newest (all)")
    add("--order", dest="orders", nargs="+", choices=_ORDERS, help="which takes which place (forward)")
    add("--line-search", action="store_true", help="of extrapolate, look for the best scale λ from 0 to 2")
    add(
        "--temperature", type=float, metavar="T", help="of metric-weighted (standard deviation of the scores)"
    )
    add(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="takes a state dict and returns its metrics by name; the module may lie in the current folder",
    )
    add(
        "--config",
        action="append",
        metavar="FILE",
        help="instead: a configuration of LightningCLI, whose validation scores the merges",
    )
    add("--select", metavar="METRIC", help="which is to be best; needed if there are several")
    for which in ("lower", "higher"):
        add(
            f"--{which}-is-better",
            nargs="+",
            metavar="METRIC",
            help=f"of metrics whose names do not tell: {which} is better; patterns, too",
        )
    add("--pareto", nargs=2, metavar="METRIC", help="the two that are drawn (the selected and the next)")
    add("--output", type=Path, metavar="DIR", help="the folder to make of the best merge")
    add("--results", type=Path, metavar="DIR", help="where scores, table and picture are kept (OUTPUT-sweep)")
    add_range(add)
    add("--as", dest="kind", choices=("safetensors", "lightning"), help="format of the output")
    add_form(add)


def _sweep(parsed: argparse.Namespace) -> int:
    given = {**_SWEEP_DEFAULTS, **vars(parsed)}
    _check_usage(given)
    import_all(given["imports"], here=True)
    selection = chosen(given, Sma())
    job = job_of(given, selection.chosen, Sma(), lambda: None)
    if opened_adapters(job.checkpoints):
        raise ValueError(
            f"{job.checkpoints[-1]} is a LoRA adapter, and a sweep merges whole models: write each adapter "
            "into its base first"
        )
    plain, searching, left_out = _wanted(given, len(job.checkpoints))
    results_folder = Path(given["results"] or f"{given['output']}-sweep")
    if given["output"] is not None:
        OutputFolder(given["output"], job.force, job.checkpoints)  # refused now, not after hours
    objective = Objective(_direction(given), given["select"])
    if given["dry_run"]:
        tell([*selection.lines(), *left_out])
        names = [*(one.name for one in plain), *(f"{name} (a search)" for name, _ in searching)]
        return tell_dry(_planned(given, job, names, SweepResults(results_folder)))
    with peers_of_launcher() as peers:
        results = SweepResults(results_folder, peers.rank)
        if peers.rank == 0:
            tell([*selection.lines(), *left_out])
        evaluate, about = _evaluation(given)
        peers.exchange({})  # the folder was empty, or a sweep's, before any of them writes into it
        results.begin()
        sweep = Sweep(job, evaluate, about, objective, results, peers)
        found = sweep.run(plain, [search() for _, search in searching])
        return _finish(given, job, objective, found, results, peers)


def _check_usage(given: Mapping[str, Any]) -> None:
    if (given["evaluate"] is None) == (not given["config"]):
        given["refuse"]("say how merges are scored: either --evaluate MODULE:FUNCTION or --config FILE")
    if given["output"] is None and given["results"] is None:
        given["refuse"](
            "name the folder of the best merge with --output, or that of the scores with --results"
        )
    if given["output"] is not None and given["results"] is not None:
        output, results = (Path(os.path.abspath(given[name])) for name in ("output", "results"))
        if output in (results, *results.parents):
            raise ValueError(f"--results {given['results']}: lies in --output; name a folder outside of it")
    if given["pareto"] and find_spec("matplotlib") is None:
        raise ValueError("--pareto: matplotlib is missing: pip install 'merge-callback[demo]'")
    if given["line_search"] and not any(name.partition(":")[0] == "extrapolate" for name in given["methods"]):
        given["refuse"]("--line-search looks for the scale of extrapolate, which is not among --methods")
    if given["temperature"] is not None and not 0 < given["temperature"] < math.inf:
        raise ValueError(f"--temperature {given['temperature']} must be a positive number")


def _wanted(
    given: Mapping[str, Any], count: int
) -> tuple[list[made.Candidate], list[tuple[str, Callable[[], made.Search]]], list[str]]:
    """The candidates, the searches for more by their names, and what was left out."""
    asked = given["lasts"] or [None]
    if any(last is not None and last < 2 for last in asked):
        raise ValueError(f"--last {min(asked)} must be at least 2")
    lasts = [last for last in asked if last is None or last <= count]
    named = [_method(text) for text in given["methods"] if text not in made.SEARCHES]
    plain, left_out = made.plain_candidates(named, lasts, given["orders"], count)
    names = [name for name in made.SEARCHES if name in given["methods"]]
    searching = made.searches(names, lasts, count, given["temperature"])
    left_out += [f"left out: --last {n}: there are {count} checkpoints" for n in asked if n not in lasts]
    if given["line_search"]:
        starts = [one for one in plain if isinstance(one.method, Extrapolate)]
        plain = [one for one in plain if one not in starts]
        searching += [(f"{one.name} λ", lambda one=one: made.line_search(one)) for one in starts]  # type: ignore[misc]
    if not plain and not searching:
        raise ValueError("; ".join(["nothing is left to try", *left_out]))
    return [made.single(count - 1), *plain], searching, left_out


def _method(text: str) -> tuple[str, dict[str, Any]]:
    """A method's name and options from ``name:option=value,option=value``."""
    name, _, options = text.partition(":")
    if name not in METHODS:
        known = ", ".join(sorted({*METHODS, *made.SEARCHES} - {"weighted"}))
        raise ValueError(f"--methods {text}: unknown method {name!r}; choose of {known}")
    found = {}
    for part in filter(None, options.split(",")):
        option, sign, value = part.partition("=")
        if not sign:
            raise ValueError(f"--methods {text}: {part!r} gives no value; write option=value")
        try:
            found[option] = read_value(value)
        except ValueError as error:
            raise ValueError(f"--methods {text}: {value!r} is {error}") from None
    return name, found


def _direction(given: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether lower is better, as was said, or as the metric's name tells."""

    def lower(metric: str) -> bool:
        said = said_lower(metric, given["lower_is_better"], given["higher_is_better"])
        found = sounds_lower(metric) if said is None else said
        if found is None:
            raise ValueError(
                f"is a lower or a higher {metric!r} better? say --lower-is-better {metric} or "
                f"--higher-is-better {metric}"
            )
        return found

    return lower


def _evaluation(given: Mapping[str, Any]) -> tuple[Evaluate, object]:
    """What scores a state dict, and what tells it from other evaluations."""
    if given["config"]:
        if missing := [name for name in ("lightning", "jsonargparse") if find_spec(name) is None]:
            raise ValueError(f"--config: {missing[0]} is missing: pip install 'merge-callback[demo]'")
        from merge_callback.demo.fit import validation

        files = [Path(name) for name in given["config"]]
        about = ["config", *(file_checksum(path) for path in files)]
        return validation([part for path in files for part in ("--config", str(path))]), about
    text = given["evaluate"]
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"--evaluate {text}: name a function as MODULE:FUNCTION, e.g. my_module:evaluate")
    module = import_named(f"--evaluate {text}", module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--evaluate {text}: the module has no function {name!r}")
    source = inspect.getsourcefile(module)
    about = [text, file_checksum(Path(source)) if source else ""]

    def evaluate(state: dict[str, Tensor]) -> Mapping[str, Any]:
        try:
            return function(state)  # type: ignore[no-any-return]
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if f.filename == source), text)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{place}: {reason:.500}") from error

    return evaluate, about


def _finish(
    given: Mapping[str, Any],
    job: Job,
    objective: Objective,
    found: Sequence[Scored],
    results: SweepResults,
    peers: Peers,
) -> int:
    """Writes and prints the table, and merges the best."""
    ranked = sorted(found, key=lambda one: one.score, reverse=True)
    merges = [one for one in ranked if len(one.candidate.inputs) > 1 and one.score > -math.inf]
    if not merges:
        raise ValueError(f"no merge has a finite {objective.of(found[0].metrics)}, so none is the best")
    best, metric = merges[0], objective.of(found[0].metrics)
    if peers.rank == 0:
        notes = [results.replace(TABLE, as_csv(ranked))]
        notes += pictured(given["pareto"], objective, ranked, found[0], results)
        for line in as_table(ranked, best, metric):
            print(printable(line))
        gain = "" if best.score > found[0].score else ": no merge scores better"
        print(
            printable(
                f"best by {metric}: {best.candidate.name}, {best.metrics[metric]:.6g}; the newest checkpoint "
                f"alone {found[0].metrics[metric]:.6g}{gain}"
            )
        )
        tell(filter(None, [*notes, noise_of(found, metric)]))
    if given["output"] is not None:
        _write_best(Path(given["output"]), job, best, ranked, metric, peers)
    return 0


def _write_best(
    output: Path, job: Job, best: Scored, ranked: Sequence[Scored], metric: str, peers: Peers
) -> None:
    paths = [job.checkpoints[i] for i in best.candidate.inputs]
    told = {
        "candidate": best.candidate.name,
        "select": metric,
        "candidates": [
            {
                "name": one.candidate.name,
                "method": one.candidate.method.name,
                "options": one.candidate.method.options(),
                "inputs": [job.checkpoints[i].name for i in one.candidate.inputs],
                "metrics": {n: v if math.isfinite(v) else str(v) for n, v in one.metrics.items()},
            }
            for one in ranked
        ],
    }
    whole = replace(job, checkpoints=paths, method=best.candidate.method, provenance={"sweep": told})
    record = merge_files(replace(whole, workers=1), output, peers)  # who evaluates may have threads
    if record:
        tell([*notes_of(record), f"{output}: {best.candidate.name}"])


def _planned(
    given: Mapping[str, Any],
    job: Job,
    names: Sequence[str],
    results: SweepResults,
) -> Iterator[str]:
    """What the sweep would do; the checkpoints are compared, as for a merge of all of them.

    Raises:
        ValueError, OSError: as the sweep itself.
    """
    yield from reads(job.checkpoints)
    merging = compared(job)
    yield f"would merge and score {len(names)}: {', '.join(names)}"
    known = f", which has {len(results.known)} scores already" if results.known else ""
    yield f"would keep the scores in {results.folder}{known}"
    if given["output"] is not None:
        size = sum(t.nbytes for t in merging.outputs()[0].values()) if merging else None
        yield f"would write the best to {given['output']}" + ("" if size is None else f", {in_bytes(size)}")
