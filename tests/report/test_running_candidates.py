"""Running averages in a report: they are of no snapshots, and have colours of their own."""

import re

from event_files import STEPS, run, write_run
from test_report import drawn, text_of

from merge_callback.engine.events import EventFile
from merge_callback.report.numbers import MISSING

NAMES = ["sma", "wma", "ema-2", "back", "power_ema-0.05", "ema-half-life-0.05", "sma_since-6"]


def page_of(folder):
    def entry(name):
        own = {"options": {"every_n_steps": 1}, "snapshots": 1} if NAMES.index(name) > 3 else {"options": {}}
        common = {"name": name, "method": "sma", "last": None, "order": "forward", "snapshots": 5}
        return {**common, "metrics": {"val_loss": 2.0}, "gains": {"val_loss": 0.3}, **own}

    write_run(folder)
    found = {"selected": "sma_since-6", "select": "val_loss", "lower_is_better": True}
    found["scores"] = [entry(name) for name in NAMES]
    scores = {name: {"val_loss": 2.0} for name in ("live", "merged", *NAMES)}
    EventFile(folder, run()).write(
        "validation", STEPS + 1, scores=scores, gains={"val_loss": 0.3}, merge=STEPS, candidates=found
    )
    averaged = {"snapshots": [STEPS], "weights": None, "phase": "stable", "method": "sma_since", "path": "x"}
    EventFile(folder, run()).write("emission", STEPS, **averaged)
    return drawn(folder)


def test_a_running_average_is_not_called_a_merge_of_one_snapshot(tmp_path):
    text = text_of(page_of(tmp_path))
    assert f"1 from {STEPS:,} on" not in text
    table = text[text.index("Candidates") :]
    rows = {name: table[table.index(name) :][:60].split() for name in NAMES}
    assert rows["wma"][2:4] == ["5", "forward"]
    assert rows["power_ema-0.05"][2:4] == [MISSING, MISSING]


def test_each_line_of_a_chart_looks_different(tmp_path):
    (legend,) = re.findall(r'<ul class="legend"[^>]*>(?:(?!</ul>).)*sma_since-6.*?</ul>', page_of(tmp_path))
    looks = re.findall(r"<i[^>]*--c:[^>]*>", legend)
    assert len(looks) == len({*looks}) == 2 + len(NAMES)
