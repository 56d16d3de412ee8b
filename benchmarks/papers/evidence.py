"""Writes what a claim found."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.papers.claims import claim, ready
from benchmarks.papers.study import Study
from benchmarks.papers.verdict import plain
from benchmarks.record import RESULTS as ALL_RESULTS
from benchmarks.record import described

RESULTS = ALL_RESULTS / "papers"


def written(name: str, study: Study, out: Path = RESULTS) -> Iterator[str]:
    """Measures a claim on the seeds whose runs are there, writes its files, and tells its verdicts."""
    module = claim(name)
    if not (seeds := ready(name, study)):
        yield f"{name}: no seed's runs are finished"
        return
    figures = plain(module.measure(Study(study.cache.parent, seeds, study.name)))
    record = described(f"papers/{name}", {"size": study.name, "seeds": seeds, **figures})
    yield from _write(name, record, out)


def rewritten(name: str, out: Path = RESULTS) -> Iterator[str]:
    """Writes the verdicts and the picture again from the figures that are there."""
    yield from _write(name, json.loads((out / f"{name}.json").read_text()), out)


def _write(name: str, record: dict[str, Any], out: Path) -> Iterator[str]:
    module = claim(name)
    verdicts = module.verdicts(record)
    told = {"title": module.TITLE, "conclusion": module.CONCLUSION, "verdicts": [asdict(v) for v in verdicts]}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, **told}, indent=1)
    (out / f"{name}.json").write_text(re.sub(r"\[[^\[\]{}\"]+\]", _on_one_line, text) + "\n")
    module.draw(record).savefig(out / f"{name}.png", dpi=100)
    yield from (f"{name}: {verdict.line()}" for verdict in verdicts)


def _on_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]")
