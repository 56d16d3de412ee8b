"""The demo of a divergence: a real one, restored, beside the same run without the callback."""

import json
import struct
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from merge_callback.cli.main import main
from merge_callback.demo.spike import RUNS, SpikePlan, SpikeRun, run_spike_demo
from merge_callback.demo.spike_curves import format_spike_table, smoothed

PLAN = SpikePlan(
    steps=130, warmup=10, excess=300.0, excess_from=100, excess_steps=5, validate_every=65, snapshot_every=10
)
"""As short as the detector's history and a divergence allow."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # three trainings: 20 s alone, 100 s with others


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The three runs, and their folder."""
    output = tmp_path_factory.mktemp("demo")
    return run_spike_demo(output, PLAN), output / "version_0"


def test_the_run_with_the_callback_is_restored_from_before_the_divergence(demo):
    (unbroken, merged, broken), _ = demo
    (event,) = merged.events
    assert event["event"] == "restore"
    assert PLAN.excess_from < event["onset"] <= event["restored_at"] < PLAN.excess_from + 20
    assert [s["step"] for s in event["snapshots"]] == [70, 80, 90]
    assert not unbroken.events
    assert not broken.events
    assert merged.final < 1.2 * unbroken.final < broken.final


def test_the_runs_are_the_same_until_the_learning_rate_goes_wrong(demo):
    runs, _ = demo
    assert [run.name for run in runs] == list(RUNS)
    assert len({tuple(run.losses[: PLAN.excess_from]) for run in runs}) == 1
    assert len({tuple(run.losses) for run in runs}) == 3
    assert {len(run.losses) for run in runs} == {PLAN.steps}
    assert [[step for step, _ in run.validations] for run in runs] == [[65, 130]] * 3


def test_the_applied_learning_rate_is_what_is_drawn(demo):
    (unbroken, merged, broken), _ = demo
    stable = unbroken.learning_rates[-1]
    at = slice(PLAN.excess_from, PLAN.excess_from + PLAN.excess_steps)
    assert broken.learning_rates[at] == pytest.approx([PLAN.excess * stable] * PLAN.excess_steps)
    restored = merged.events[0]["restored_at"]
    assert merged.learning_rates[:restored] == broken.learning_rates[:restored]
    ramp = [(i + 1) / 100 for i in range(PLAN.steps - restored)]
    scheduled = broken.learning_rates[restored:]
    assert merged.learning_rates[restored:] == pytest.approx(
        [rate * factor for rate, factor in zip(scheduled, ramp, strict=True)]
    )


def test_everything_the_summary_names_is_there(demo):
    runs, folder = demo
    kept = json.loads((folder / "runs.json").read_text())
    assert [SpikeRun(**run).losses for run in kept] == [run.losses for run in runs]
    assert (folder / "with_the_callback/merges/spikes.jsonl").is_file()
    assert not (folder / "without_it/merges").exists()
    header = (folder / "spike.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1200, 840)
    for name in RUNS:
        board = EventAccumulator(str(folder / name.replace(" ", "_")))
        board.Reload()
        assert len(board.Scalars("val_loss")) == 2


def test_the_table_shows_the_losses_and_what_happened(demo):
    runs, _ = demo
    lines = format_spike_table(runs).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["65", "130"]
    assert lines[-1].split()[1:4] == [f"{run.final:.3f}" for run in runs]
    (event,) = runs[1].events
    assert f"restore at step {event['step']}" in lines[-1]
    assert "restore" not in lines[-2]


def test_a_plan_is_stretched_but_for_how_long_it_goes_wrong():
    assert SpikePlan.scaled(1) == SpikePlan()
    assert SpikePlan.scaled(0.1) == replace(
        SpikePlan(), steps=180, warmup=20, excess_from=80, validate_every=10, snapshot_every=4
    )


def test_curves_are_running_medians():
    assert smoothed([3.0, 1.0, 2.0, 9.0], 3) == ([3, 4], [2.0, 2.0])
    assert smoothed([1.0], 3) == ([], [])


def test_the_command_runs_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("merge_callback.demo.spike.run_spike_demo", lambda *given: asked.append(given))
    options = ["--moe", "--steps-scale", "0.1", "--output", str(tmp_path), "--seed", "3"]
    assert main(["demo", "--spike", *options]) == 0
    assert asked == [(str(tmp_path), SpikePlan.scaled(0.1), True, 3, "auto", 1)]


@pytest.mark.slow
def test_the_full_demo_recovers_within_two_per_cent(tmp_path):
    unbroken, merged, broken = run_spike_demo(tmp_path)
    assert [event["event"] for event in merged.events] == ["restore"]
    assert merged.final <= 1.02 * unbroken.final  # what the callback promises
    assert broken.final >= 1.2 * unbroken.final
