"""The page of a run: what it says, that it needs nothing else, and that it is shown while the run goes on."""

import json
import random
import re
import subprocess
import sys
import threading
from html import unescape
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from event_files import EVERY, STEPS, run, write_run

from merge_callback.cli.main import main
from merge_callback.engine.events import EventFile
from merge_callback.events import EVENTS, KINDS
from merge_callback.metrics import FORECAST, FORECAST_ERROR
from merge_callback.noise import spread
from merge_callback.report.numbers import thinned, ticks
from merge_callback.report.page import page, read_runs
from merge_callback.report.run_view import names_of
from merge_callback.report.serve import server


def text_of(html):
    """What a reader sees, without the graphics."""
    body = re.sub(r"(?s)<(style|script|svg).*?</\1>", "", html)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def drawn(*folders, target=Path("/")):
    return page(read_runs([*folders]), target)


def test_the_page_says_what_matters(tmp_path):
    text = text_of(drawn(write_run(tmp_path, restores=(200, 250, 300)), target=tmp_path))

    assert "finished" in text
    assert "+0.100" in text  # the best gain
    assert "step 400" in text  # the newest merge
    assert "3 restores" in text
    assert "Loss spike: the sma was restored" in text
    assert "stable" in text
    assert "20 " in text
    assert f"{STEPS} of {STEPS}" in text


def test_a_gain_over_weights_that_a_spike_has_spoilt_is_not_the_best(tmp_path):
    file = EventFile(write_run(tmp_path, restores=(200,), ended=False), run())
    scores = {"live": {"val_loss": 9.0}, "merged": {"val_loss": 2.0}}
    file.write("validation", 210, scores=scores, gains={"val_loss": 7.0}, merge=210, seconds=1.0)

    (view,) = read_runs([tmp_path])
    assert view.best("val_loss").gain == pytest.approx(0.1)


def test_a_run_whose_phase_is_not_recognised_yet_has_a_page(tmp_path):
    file = EventFile(tmp_path, run())
    file.write("advice", 1, text="x")
    assert "running" in text_of(drawn(tmp_path))
    file.write("validation", 20, scores={"live": {"val_loss": 3.5}}, gains={}, merge=None, seconds=None)
    assert "3.5" in text_of(drawn(tmp_path))


@pytest.mark.parametrize(
    "value", [1e308, -1e308, 10**400, float("nan"), 5e-324], ids=["most", "least", "whole", "nan", "tiny"]
)
def test_numbers_that_no_axis_can_hold_are_left_out(tmp_path, value):
    file = EventFile(write_run(tmp_path), run())
    scores = {"live": {"val_loss": value}, "merged": {"val_loss": -value}}
    file.write("validation", STEPS + 1, scores=scores, gains={"val_loss": 9.0}, merge=1, seconds=value)
    file.write("snapshot", STEPS + 1, lr=value, diversity=value, bytes=value, stall=value)
    assert "finished" in drawn(tmp_path)


@pytest.mark.parametrize("written", [2, "2", None, [1]])
def test_another_format_is_named(tmp_path, written):
    EventFile(tmp_path, run(format=written)).write("advice", 1, text="x")
    with pytest.raises(ValueError, match="install a newer one"):
        read_runs([tmp_path])


def test_every_merge_is_linked_to_its_record_as_long_as_that_is_there(tmp_path):
    folder = write_run(tmp_path / "run" / "merges")
    html = drawn(folder, target=tmp_path / "pages")

    links = re.findall(r'href="([^"]+)"', html)
    assert links == [f"../run/merges/step%3D{step:08d}-ties/merge.json" for step in (400, 380)]
    assert text_of(html).count("removed") == STEPS // EVERY // 2 - 2


def test_a_path_that_leads_out_of_the_folder_is_no_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/merge.json").write_text("{}")
    file = EventFile(write_run(tmp_path / "run", ended=False), run())
    file.write("emission", 401, path="../outside", method="sma", snapshots=[1, 2], weights=[0.5, 0.5])

    assert "outside" not in drawn(tmp_path / "run")


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_name(tmp_path):
    evil = '"><script>alert(1)</script>'
    html = drawn(write_run(tmp_path, metric=evil, storage=evil))

    assert "<script>alert" not in html
    assert text_of(html).count("alert(1)") > 3
    assert not re.search(r"https?://|\bsrc=|@import|url\(", html)
    assert "default-src 'none'" in unescape(html)


def test_a_phase_that_is_recognised_later_counts_from_its_beginning(tmp_path):
    (view,) = read_runs([write_run(tmp_path)])
    assert view.phases == [("warmup", 0, 20), ("stable", 20, 320), ("decay", 320, 400)]


def test_a_run_that_has_hardly_begun_has_a_page(tmp_path):
    EventFile(tmp_path, run(total_steps=None)).write("phase", 0, phase="stable", since=0)
    text = text_of(drawn(tmp_path))
    assert "running" in text
    assert "nothing was published yet" in text
    assert "Nothing was validated yet" in text


def test_numbers_that_are_none_are_no_points(tmp_path):
    file = EventFile(write_run(tmp_path, ended=False), run())
    scores = {"live": {"val_loss": float("nan")}, "merged": {"val_loss": float("inf")}}
    file.write("validation", 500, scores=scores, gains={"val_loss": float("nan")}, merge=500, seconds=1.0)

    (view,) = read_runs([tmp_path])
    assert view.scores("val_loss")["live"][-1][0] == STEPS
    assert view.gains("val_loss")[-1][0] == STEPS
    assert "nan" not in drawn(tmp_path).lower()


def test_several_runs_are_drawn_over_each_other(tmp_path):
    for name in ("wide", "narrow"):
        write_run(tmp_path / name / "merges", run_id=name)
    text = text_of(drawn(tmp_path / "wide", tmp_path / "narrow/merges"))

    assert "2 runs" in text
    for part in ("wide, live", "narrow, merged", "Merges of wide", "What it cost of narrow"):
        assert part in text


def test_runs_are_named_by_what_their_paths_differ_in():
    paths = ["/a/logs/version_0/merges", "/a/logs/version_12/merges", "/a/logs/old/version_0/merges"]
    assert names_of([Path(path) for path in paths]) == ["version_0", "version_12", "old/version_0"]
    assert names_of([Path("/a/logs/version_3/merges")]) == ["logs/version_3"]
    assert names_of([Path("/a/x/merges"), Path("/a/x/merges-1")]) == ["merges", "merges-1"]


def test_other_scores_of_a_validation_have_curves_too(tmp_path):
    file = EventFile(write_run(tmp_path, ended=False), run())
    file.write("validation", 402, scores={"live": {"val_loss": 2.0}, "wsm-15": {"val_loss": 1.5}}, gains={})
    assert "wsm-15" in text_of(drawn(tmp_path))


def test_the_newest_forecast_is_told_until_the_decay_begins(tmp_path):
    values = {f"{FORECAST}val_loss": 1.25, f"{FORECAST_ERROR}val_loss": 0.02}
    for steps, is_told in ((300, True), (STEPS, False)):
        folder = write_run(tmp_path / str(steps), until=steps, ended=False)
        EventFile(folder, run()).write("metrics", 290, values=values, log_step=290)
        text = text_of(drawn(folder))
        assert ("A decay from step 290 on would give 1.250 ± 0.020." in text) == is_told
        assert "forecast of a decay" in text


def test_the_page_of_a_long_run_stays_small(tmp_path):
    short, long = (len(drawn(write_run(tmp_path / f"{n}", steps=n * 10, every=10))) for n in (450, 900))
    assert long < 1.3 * short


def test_noise_is_what_differs_from_the_trend():
    generator = random.Random(0)
    noisy = [2 - i / 50 + generator.gauss(0, 0.1) for i in range(400)]
    assert spread(noisy) == pytest.approx(0.1, rel=0.15)
    assert spread([i / 7 for i in range(20)]) == pytest.approx(0, abs=1e-12)
    assert spread([1.0, 2.0, 1.0]) is None


def test_thinned_curves_keep_their_extremes():
    points = [(float(i), 5.0 if i == 7771 else 0.01 * (i % 10)) for i in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= 400
    assert (7771.0, 5.0) in kept
    assert [*kept] == sorted(kept)


@pytest.mark.parametrize(("low", "high"), [(0, 5400), (-0.03, 0.2), (1e-9, 3e-9), (1.25, 1.26), (0, 1e12)])
def test_ticks_are_few_and_round(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 5
    assert all(low - 1e-12 <= tick <= high * (1 + 1e-9) for tick in found)
    assert all(len(f"{tick:.12g}".replace(".", "").strip("-0").split("e")[0]) <= 4 for tick in found)


# --- the command


def test_the_command_writes_next_to_the_run_and_over_its_own_page_only(tmp_path, capsys):
    folder = write_run(tmp_path / "merges")
    assert main(["report", str(tmp_path)]) == 0
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text().endswith("</html>\n")

    (tmp_path / "precious.html").write_text("mine")
    assert main(["report", str(folder), "--output", str(tmp_path / "precious.html")]) == 1
    assert (tmp_path / "precious.html").read_text() == "mine"
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 1
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    write_run(tmp_path / "merges-1")
    assert main(["report", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "several runs are there; name one of merges, merges-1" in errors
    assert "is there already, and no report; name another file" in errors
    assert "no events.jsonl is there" in errors


def test_a_page_needs_no_torch(tmp_path):
    folder = write_run(tmp_path)
    script = "import sys; from merge_callback.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", f"{script}; print('torch' in sys.modules)", "report", str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "False"


@pytest.fixture
def site(tmp_path):
    """The address of a run's page that is served, and the run's folder."""
    folder = write_run(tmp_path / "merges", ended=False)
    with server([folder], 0) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", folder
        served.shutdown()


def get(address):
    with urlopen(address) as answer:
        return answer.read().decode()


def test_a_served_page_is_drawn_again_when_something_has_happened(site):
    address, folder = site
    before = get(f"{address}/changed")
    assert get(f"{address}/changed") == before
    assert "step 402" not in get(address)

    EventFile(folder, run()).write(
        "emission", 402, path="step=402", method="sma", snapshots=[1, 2], weights=None
    )

    assert get(f"{address}/changed") != before
    html = get(address)
    assert "step 402" in html
    assert "connect-src 'self'" in unescape(html)


def test_a_served_page_shows_records_and_no_other_file(site):
    address, folder = site
    (href, _) = re.findall(r'href="([^"]+)"', get(address))
    assert json.loads(get(f"{address}/{href}")) == {"step": 1}

    (folder / "secret").write_text("secret")
    for path in (f"{folder}/secret", f"{folder}/events.jsonl", "/etc/hostname", "/../../etc/hostname"):
        with pytest.raises(HTTPError, match="404"):
            get(f"{address}{path}")


def test_the_candidates_are_in_a_table_the_best_one_first(tmp_path):
    def one(name, loss, gain):
        scores = {"metrics": {"val_loss": loss}, "gains": {"val_loss": gain}}
        return {
            "name": name,
            "method": name,
            "options": {},
            "last": 5,
            "order": "forward",
            "snapshots": 5,
            **scores,
        }

    folder = write_run(tmp_path)
    found = {"selected": "wsm", "select": "val_loss", "lower_is_better": True, "spread": 0.01, "batches": 3}
    found |= {"scores": [one("sma", 2.2, 0.1), one("wsm", 2.1, 0.2), one("ties", None, None)]}
    scores = {"live": {"val_loss": 2.3}, "merged": {"val_loss": 2.1}, "ties": {"val_loss": 2.25}}
    EventFile(folder, run()).write(
        "validation", STEPS + 1, scores=scores, gains={"val_loss": 0.2}, merge=STEPS, candidates=found
    )
    page = drawn(folder)
    text = text_of(page)
    table = text[text.index("Candidates") :]
    assert table.index("wsm") < table.index("sma") < table.index("ties")
    assert "The live val_loss scatters by 0.010 from one validation to the next" in table
    assert "Compared on 3 batches" in table
    assert "<b>wsm</b>" in page

    broken = [{**found, entry: wrong} for entry in found for wrong in (None, True, "x", [None], {"a": 1})]
    broken += [{**found, "scores": [{**found["scores"][0], entry: None}]} for entry in found["scores"][0]]
    for wrong in broken:  # the file may be anybody's
        EventFile(folder, run()).write(
            "validation", STEPS + 2, scores=scores, gains={}, merge=STEPS, candidates=wrong
        )
        assert "finished" in drawn(folder)


WRONG = [
    None,
    True,
    -1,
    10**400,
    float("nan"),
    float("inf"),
    "\ud800",
    "x",
    [],
    ["x", None],
    [float("nan")],
    {},
    {"a": {"b": []}},
]


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_entries_that_are_not_what_they_should_be_spoil_no_page(tmp_path, kind):
    write_run(tmp_path, restores=(200,))
    lines = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    last = {line["event"]: line for line in lines}.get(kind, {"event": kind, "step": 7, "time": 1.0})
    for entry in {*last, *next(k for k in KINDS if k.name == kind).entries} - {"event", "format", "run_id"}:
        for wrong in WRONG:
            lines.append({**last, entry: wrong})
    (tmp_path / EVENTS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["report", str(tmp_path)]) == 0
    assert "Traceback" not in (tmp_path / "report.html").read_text(encoding="utf-8")
