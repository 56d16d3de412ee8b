"""Writes into the README and the pages what the code knows: options, metrics, events, methods, measurements.

    python docs/generate.py            # rewrites all between <!-- generated: NAME --> and <!-- end -->
    python docs/generate.py --check    # exits with 1 if one is out of date

Options are read from signatures, docstrings and dataclass fields, metrics from ``METRICS``, methods from the
registry, and what was measured from ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from merge_callback import METHODS, CheckpointMergeCallback, ProbeOptions, SpikeOptions
from merge_callback.events import KINDS
from merge_callback.merging import LinearMethod
from merge_callback.merging.method import own_options
from merge_callback.metrics import (
    DIVERSITY_CHANGE,
    DIVERSITY_RMS,
    GAIN,
    IS_SPIKING,
    MERGED,
    METRICS,
    PHASE,
)

ROOT = Path(__file__).resolve().parents[1]

_BLOCK = re.compile(r"(?s)<!-- generated: (.+?) -->\n.*?<!-- end -->")

_FIRST = (
    f"{MERGED}<name>",
    f"{GAIN}<name>",
    DIVERSITY_RMS,
    DIVERSITY_CHANGE,
    PHASE,
    IS_SPIKING,
)
"""The metrics that the README shows."""

_POINTS = {
    "early": "step 600, stable",
    "stable": "step 4,200, stable",
    "decay": "step 4,800, decay",
    "end": "step 5,400, decay",
}
"""The points of the measured run, as the pages call them."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def in_markdown(docstring: str) -> str:
    """A docstring's text on one line."""
    return re.sub(r"``(.+?)``", r"`\1`", re.sub(r"\s+", " ", docstring)).strip()


def arguments(docstring: str) -> dict[str, str]:
    """The entries of a docstring's section ``Args``."""
    section = re.search(r"(?ms)^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(docstring))
    entries = re.findall(r"(?ms)^    (\w+): (.*?)(?=^    \w|\Z)", section[1] if section else "")
    return {name: in_markdown(text) for name, text in entries}


def shown(value: Any) -> str:
    """A default, as one would write it."""
    written = repr(value).replace("'", '"') if isinstance(value, (str, tuple)) else repr(value)
    return f"`{written}`"


def callback_options() -> str:
    """Every option of the callback."""
    told = arguments(CheckpointMergeCallback.__doc__ or "")
    options = list(inspect.signature(CheckpointMergeCallback).parameters.values())
    assert [option.name for option in options] == list(told), "the docstring lacks an option"
    return table(
        ("option", "default", "meaning"),
        ((f"`{option.name}`", shown(option.default), told[option.name]) for option in options),
    )


def spike_options() -> str:
    """Every option of ``SpikeOptions``."""
    told = arguments(SpikeOptions.__doc__ or "")
    return table(
        ("option", "default", "meaning"),
        ((f"`{f.name}`", shown(f.default), told[f.name]) for f in fields(SpikeOptions)),
    )


def probe_options() -> str:
    """Every option of ``ProbeOptions``."""
    told = arguments(ProbeOptions.__doc__ or "")
    return table(
        ("option", "default", "meaning"),
        ((f"`{f.name}`", shown(f.default), told[f.name]) for f in fields(ProbeOptions)),
    )


def metrics() -> str:
    """Every metric."""
    return table(
        ("metric", "meaning", "logged", "unit"),
        ((f"`{m.name}`", m.meaning, m.logged, m.unit) for m in METRICS),
    )


def events() -> str:
    """Every kind of event, with what it holds."""
    rows = [
        (f"`{kind.name}`", kind.written, "; ".join(f"`{name}` {text}" for name, text in kind.entries.items()))
        for kind in KINDS
    ]
    return table(("event", "written", "holds"), rows)


def first_metrics() -> str:
    """The metrics that matter most, for the README."""
    return table(("metric", "meaning"), ((f"`{m.name}`", m.meaning) for m in METRICS if m.name in _FIRST))


def first_sentence(name: str) -> str:
    """What a method is, by its docstring."""
    line = in_markdown(inspect.cleandoc(METHODS[name].__doc__ or "").split("\n\n")[0])
    return re.split(r"(?<=[^.…])\. ", line)[0].rstrip(".")


def methods_table(folder: str) -> str:
    """Every method, with a link to its page in ``folder``."""
    return table(
        ("method", "what it does", "source"),
        ((f"[`{n}`]({folder}{n}.md)", first_sentence(n), METHODS[n].reference) for n in METHODS),
    )


def method_options(name: str) -> str:
    """A method's options, its source and what it needs."""
    method = METHODS[name]
    told = arguments(method.__doc__ or "")
    rows = [(f"`{f.name}`", shown(f.default), told.get(f.name, "see above")) for f in own_options(method)]
    kind = "a weighted sum of the snapshots" if issubclass(method, LinearMethod) else "not a weighted sum"
    facts = f"Class `merge_callback.merging.{method.__name__}`; {kind}. Source: {method.reference}."
    return "\n\n".join([table(("option", "default", "meaning"), rows), facts] if rows else [facts])


def gain(name: str) -> str:
    """What a method gained at each point of the measured run."""
    return table(("snapshots", *_POINTS.values()), ([str(n), *_gains(name, n)] for n in (3, 10)))


def gains() -> str:
    """What every method gained that was measured, for ten snapshots."""
    measured = next(iter(_measured()["gains"].values()))
    return table(
        ("method", *_POINTS.values()),
        ([f"[`{n}`]({n}.md)", *_gains(n, 10)] for n in METHODS if f"{n}, 10" in measured),
    )


def _gains(name: str, count: int) -> list[str]:
    """The mean gain at each point, and its range over the seeds."""
    known = _measured()
    found = [known["gains"][point][f"{name}, {count}"] for point in _POINTS]
    lines = ["{mean:+.3f} ({least:+.3f} to {largest:+.3f})".format(**gain) for gain in found]
    return [re.sub(r"[+-]0\.000", "0.000", line) for line in lines]


def live() -> str:
    """The live loss of the measured run."""
    found = _measured()["gains"]
    return table(
        ("weights", *_POINTS.values()), [["live", *(f"{found[p]['live']['mean']:.3f}" for p in _POINTS)]]
    )


def functional_diversity() -> str:
    """How far each measure fell in the demo's decay."""
    changes = _measured("functional_diversity")["demo"]["changes"]
    rows = [
        (name, f"{found['stable']:.2g}", f"{100 * found['decay']:.0f} %", f"{100 * found['end']:.1f} %")
        for name, found in changes.items()
    ]
    return table(("measure", "stable phase", "decay", "last snapshot"), rows)


def forecast_rules() -> str:
    """How far each rule's forecasts of the annealed loss are off."""
    rows = [
        (name, str(found["cases"]), f"{found['mean']:+.3f}", *_absolute(found))
        for name, found in _measured("forecast")["rules"]["loss"].items()
    ]
    return table(("forecast", "forks", "mean error", "its spread", "mean size", "largest"), rows)


def _absolute(found: Mapping[str, float]) -> list[str]:
    return [f"{found[key]:.3f}" for key in ("spread", "mean absolute", "largest")]


def forecast_shares() -> str:
    """How far the annealed model is ahead of the merge, over the merge's gain, by length of the decay."""
    known = _measured("forecast")["shares"]
    return table(
        ("decay, of the steps before", "forks", "of the loss", "of the accuracy"),
        (
            (
                name,
                str(found["cases"]),
                *("{mean:.2f} ± {spread:.2f}".format(**known[m][name]) for m in known),
            )
            for name, found in known["loss"].items()
        ),
    )


def advice_runs() -> str:
    """Every line of the measured runs, and whether what came later bears it out."""
    runs = _measured("advice")["runs"]
    verdicts = {True: "yes", False: "**no**", None: "nothing came"}
    rows = [
        (
            run["name"],
            ", ".join(f"{line['rule']} at {line['step']}" for line in run["lines"]) or "none",
            ", ".join(verdicts[line["borne out"]] for line in run["lines"]),
        )
        for run in runs
    ]
    return table(("run", "lines, at their steps", "borne out"), rows)


def second_stage() -> str:
    """How a second stage went from the last weights and from merges."""
    rows = []
    for what, values in _measured("second_stage")["summary"].items():
        merges = [
            _with_range(values[start], values["difference"][start]) for start in ("merge", "merge of 3")
        ]
        rows.append([what.replace("_", "ient "), f"{values['last']:.3f}", *merges])
    head = ("what", "from the last weights", "from the merge of ten", "from the merge of three")
    return table(head, rows)


def _with_range(mean: float, differences: Sequence[float]) -> str:
    return f"{mean:.3f} ({min(differences):+.3f} to {max(differences):+.3f})"


def _measured(name: str = "methods") -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def study_findings() -> str:
    """What the paper found, and what the study did."""
    return table(
        ("where", "the paper", "here", "verdict"),
        (
            [f[key] for key in ("where", "paper", "ours", "verdict")]
            for f in _measured("upcycling")["findings"]
        ),
    )


def study_stopping() -> str:
    """The accuracies of the study's experts and merges, by how the experts were stopped."""
    columns = ("experts", "average", "task_arithmetic", "ties", "dare")
    head = ("", "stopped by", "mean step", *(f"`{c}`" if c != "experts" else c for c in columns))
    rows = (
        [row["kind"], row["rule"], str(row["step"] or ""), *(f"{row[c]:.1f}" for c in columns)]
        for row in _measured("upcycling")["stopping"]
    )
    return table(head, rows)


def study_merged() -> str:
    """Where stopping by the merge's accuracy stands among the other ways."""
    return "\n".join(f"- {sentence}" for sentence in _measured("upcycling")["beside_merged"])


def study_size() -> str:
    """How many seeds the study has, section by section."""
    known = _measured("upcycling")
    counts = {f"merges/lora{rank}": 0 for rank in known["study"]["ranks"]}
    counts |= {name: len(seeds) for name, seeds in known["seeds"].items()}
    fewer = [f"`{name}`" for name, count in counts.items() if count < max(counts.values())]
    missing = f" There are fewer yet of {', '.join(fewer)}." if fewer else ""
    date, cpu = known["date"], known["machine"]["cpu"]
    return f"Seeds of the experts: {max(counts.values())}.{missing} Measured on {date} ({cpu}, one thread)."


def running_cost() -> str:
    """What an update of a running average takes, in milliseconds and in relation to torchtitan's."""
    ways = ("torchtitan", "ours", "Lightning", "AdamW")
    rows = [
        [row["model"], *(f"{row['ms'][way]:.2f}" for way in ways), f"{row['ratio']:.2f}"]
        for row in _measured("running")["rows"]
    ]
    head = ("model", "`_foreach_lerp_`", "ours", "`EMAWeightAveraging`", "AdamW's step", "ours / the first")
    return table(head, rows)


def posthoc_errors() -> str:
    """How far averages that are made afterwards are from tracked ones, with all copies and with fewer."""
    rows = _measured("posthoc")["rows"]
    widths = sorted({row["sigma"] for row in rows} - set(_measured("posthoc")["stored"]))
    counts = list(dict.fromkeys(row["copies"] for row in rows))[:5]
    found = {(row["copies"], row["sigma"]): row for row in rows}

    def cell(count: int, sigma: float) -> str:
        row = found[count, sigma]
        return f"{100 * row['error']:.2f} % ({row['residual']:.4f})"

    head = ("copies used", *(f"σ = {sigma:g}" for sigma in widths))  # noqa: RUF001
    lines = [[str(count), *(cell(count, sigma) for sigma in widths)] for count in counts]
    return table(head, lines) + "\n\nIn brackets stand the residuals."


def evidence() -> str:
    """All claims of the papers that were tried, with their verdicts, in the order of the page's sections."""
    rows = [
        (f"[{record['title']}](#{_anchor(record['title'])})", v["source"], v["claim"], v["says"])
        for record in _evidence()
        for v in record["verdicts"]
    ]
    counts = Counter(row[-1] for row in rows)
    told = ", ".join(f"{count} {says}" for says, count in counts.most_common())
    return f"{len(rows)} claims: {told}.\n\n" + table(("study", "source", "claim", "verdict"), rows)


def evidence_of(name: str) -> str:
    """What one study found: the conclusion, the picture, the verdicts with both figures, the reasons."""
    record = _measured(f"papers/{name}")
    rows = [[v[key] for key in ("source", "claim", "paper", "ours", "says")] for v in record["verdicts"]]
    reasons = dict.fromkeys(f"*{v['claim']}* {v['why']}" for v in record["verdicts"] if v["why"])
    command = f"`python -m benchmarks.papers {name}`"
    parts = [
        f"## {record['title']}",
        record["conclusion"],
        f"![{record['title']}](../benchmarks/results/papers/{name}.png)",
        table(("source", "claim", "the paper", "here", "verdict"), rows),
        *reasons,
        f"{command}, {len(record['seeds'])} seeds, {record['date']}.",
    ]
    return "\n\n".join(part for part in parts if part)


def _evidence() -> list[Any]:
    """The records, as the page orders them."""
    page = (ROOT / "docs/evidence.md").read_text()
    return [
        _measured(f"papers/{name}") for name in re.findall(r"<!-- generated: evidence of (\w+) -->", page)
    ]


def _anchor(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def _blocks() -> dict[str, Callable[[], str]]:
    blocks: dict[str, Callable[[], str]] = {
        "options": callback_options,
        "spike options": spike_options,
        "probe options": probe_options,
        "functional diversity": functional_diversity,
        "metrics": metrics,
        "events": events,
        "first metrics": first_metrics,
        "methods": lambda: methods_table("docs/methods/"),
        "methods, from their folder": lambda: methods_table(""),
        "gains": gains,
        "live loss": live,
        "forecast rules": forecast_rules,
        "forecast shares": forecast_shares,
        "advice runs": advice_runs,
        "study, findings": study_findings,
        "study, stopping": study_stopping,
        "study, merged": study_merged,
        "study, size": study_size,
        "second stage": second_stage,
        "running": running_cost,
        "posthoc": posthoc_errors,
        "evidence": evidence,
    }
    for path in (ROOT / "benchmarks/results/papers").glob("*.json"):
        blocks[f"evidence of {path.stem}"] = lambda name=path.stem: evidence_of(name)  # type: ignore[misc]
    for name in METHODS:
        blocks[f"options of {name}"] = lambda name=name: method_options(name)  # type: ignore[misc]
        blocks[f"gain of {name}"] = lambda name=name: gain(name)  # type: ignore[misc]
    return blocks


def pages() -> list[Path]:
    """The README and every page."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def generated(text: str) -> str:
    """A page with its generated blocks as they should be.

    Raises:
        KeyError: for a block that nobody generates.
    """
    blocks = _blocks()
    return _BLOCK.sub(lambda m: f"<!-- generated: {m[1]} -->\n{blocks[m[1]]()}\n<!-- end -->", text)


def main() -> int:
    """Writes, or checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [page for page in pages() if page.read_text() != generated(page.read_text())]
    for page in stale:
        print(f"{page.relative_to(ROOT)} is out of date: python docs/generate.py" if check else page)
        if not check:
            page.write_text(generated(page.read_text()))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
