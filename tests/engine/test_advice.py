"""Advice: what is said when, why, and only once; the closing line of a run."""

import json
import math
from dataclasses import replace

import pytest
from checkpoint_files import ROOT
from training_runs import Classifier, loader, train

from merge_callback import CheckpointMergeCallback
from merge_callback.engine import advice
from merge_callback.engine.advice import Advice, Seen
from merge_callback.engine.forecast import OWN, SHARES
from merge_callback.engine.validations import Validations
from merge_callback.snapshots.snapshot import Snapshot

STABLE = Seen(
    step=1000, phase="stable", since=0, window=10, merged=10, span=90, share=0.09, parameters=120_000
)
DECAY = replace(STABLE, phase="decay", since=4000, merged=4)
LARGE = {"parameters": 13_000_000_000, "every_tokens": 8e9, "span_tokens": 80e9, "budget": 8e12}


def said(seen: Seen) -> list[str]:
    """The rules that have a line."""
    return [rule.__name__ for rule in advice.RULES if rule(seen)]


@pytest.mark.parametrize(
    ("seen", "rules"),
    [
        (STABLE, []),
        (replace(STABLE, diversity=0.05), []),  # at a constant rate it says nothing of the gain
        (DECAY, []),
        (replace(DECAY, diversity=0.6), []),
        (replace(DECAY, diversity=0.4), ["fading"]),
        (replace(DECAY, diversity=0.4, usual_gains=[0.1, 0.1]), ["fading"]),
        (replace(DECAY, diversity=0.4, usual_gains=[0.1, -0.1]), []),  # there was nothing to lose
        (replace(DECAY, diversity=0.05), ["spent"]),
        (replace(DECAY, diversity=0.05, metric="loss", usual_gains=[0.1, 0.1], gains=[0.01]), ["spent"]),
        (replace(DECAY, diversity=0.05, metric="loss", usual_gains=[0.1, 0.1], gains=[-0.03]), []),
        (replace(DECAY, diversity=0.05, metric="loss", usual_gains=[-0.1], gains=[-0.01]), []),
        (replace(DECAY, diversity=0.05, metric="loss", usual_gains=[0.1]), []),  # none is known yet
        (replace(STABLE, gains=[-0.1, -0.1]), []),
        (replace(STABLE, gains=[-0.1, -0.1, -0.1]), ["lagging"]),
        (replace(STABLE, gains=[-0.1, -0.1, -0.1, 0.1]), []),
        (replace(STABLE, gains=[-0.1] * 3, merged=3), []),  # there is nothing to leave out
        (replace(DECAY, gains=[-0.1] * 3), []),
        (replace(STABLE, window=3, merged=3, share=0.03), ["few"]),
        (replace(STABLE, window=3, merged=3, share=0.05), []),  # ten would reach far back
        (replace(STABLE, window=3, merged=2, share=0.01), []),
        (replace(STABLE, window=3, merged=3, share=0.01, gains=[-0.1]), []),
        (replace(STABLE, **LARGE), []),
        (replace(STABLE, **{**LARGE, "every_tokens": 1e9}), ["spacing"]),
        (replace(STABLE, **{**LARGE, "every_tokens": 1e9, "parameters": 10**9}), []),  # no figure is known
        (replace(STABLE, **{**LARGE, "parameters": 2 * 10**11}), ["spacing"]),
        (replace(STABLE, **{**LARGE, "budget": 1.5e12}), ["share_of_budget"]),
        (replace(STABLE, **{**LARGE, "budget": 1e11}), []),
        (replace(DECAY, **{**LARGE, "span_tokens": 1.2e12}), ["long_decay"]),
    ],
)
def test_a_rule_speaks_when_its_reason_holds(seen, rules):
    assert said(seen) == rules


def snapshots(steps, phase="stable", since=0):
    return [Snapshot(step, None, 1.0, 1.0, phase, since, step) for step in steps]


def follow(told: Advice, steps, rms, phase="stable", since=0) -> list[str]:
    """The lines while snapshots come, each as far from the one two before as ``rms`` says."""
    lines = []
    for i in range(3, len(steps) + 1):
        diversity = {"rms": rms[i - 1], "steps": [steps[i - 3], steps[i - 1]]}
        segment = snapshots(steps[:i][-10:], phase, since)
        lines.append(told.after_snapshot(segment[-1], segment, diversity))
    return [line for line in lines if line]


def stable_run() -> Advice:
    told = new_advice()
    steps = range(10, 410, 10)
    assert not follow(
        told, steps, [10 / (1 + i) for i in range(40)]
    )  # falls to a fortieth: said the old rule
    return told


def test_the_decay_is_judged_by_the_median_of_the_stable_phase_and_told_once():
    told, steps = stable_run(), range(410, 510, 10)
    usual = 10 / 30  # about: the median of the last twenty
    lines = follow(told, steps, [usual * (1 - i / 9) for i in range(10)], "decay", 400)
    assert [line.partition(":")[2][:40] for line in lines] == [
        " the learning rate decays since step 400",
        " the snapshots lie 100% closer together ",
    ]
    assert not follow(told, steps, [0.0] * 10, "decay", 400)
    assert len(follow(told, range(610, 710, 10), [0.0] * 10, "decay", 600)) == 1


def test_a_long_decay_does_not_forget_that_nothing_was_gained_before_it():
    told = stable_run()
    for newest in snapshots((380, 390, 400)):
        told.after_validation(newest, {"loss": 1.0}, {"loss": 1.1}, {"loss": True})
    for newest in snapshots(range(410, 610, 10), "decay", 400):
        told.after_validation(newest, {"loss": 1.0}, {"loss": 0.9}, {"loss": True})
    assert not follow(told, range(610, 710, 10), [0.1] * 10, "decay", 400)


def test_snapshots_at_another_distance_are_not_compared():
    assert not follow(stable_run(), range(410, 440, 2), [0.01] * 15, "decay", 400)


def test_a_model_that_did_not_move_is_no_fault():
    told = new_advice()
    follow(told, range(10, 110, 10), [0.0] * 10)
    assert not follow(told, range(110, 210, 10), [0.0] * 10, "decay", 100)


def test_a_pair_across_phases_is_not_compared():
    (segment, pair) = snapshots([410, 420], "decay", 400), {"rms": 0.0, "steps": [390, 410]}
    assert stable_run().after_snapshot(segment[-1], segment, pair) is None


def test_a_resumed_run_does_not_repeat_itself():
    told, again = stable_run(), new_advice()
    steps, rms = range(410, 510, 10), [0.01] * 10
    assert len(follow(told, steps, rms, "decay", 400)) == 1
    again.load_state_dict(told.state_dict())
    assert again.state_dict() == told.state_dict()
    assert not follow(again, steps, rms, "decay", 400)


def test_losing_merges_of_one_phase_are_told_of_with_the_metric():
    told = new_advice()
    follow(told, range(10, 60, 10), [1.0] * 5)
    for newest in snapshots((30, 40, 50)):
        live, merged = {"b": 1.0, "val_loss": 1.0}, {"b": 0.5, "val_loss": 1.5}
        metrics, line = told.after_validation(newest, live, merged, {"b": True, "val_loss": True})
        assert metrics == {"merge_gain/b": 0.5, "merge_gain/val_loss": -0.5}
    assert "worse than the live weights (val_loss: by 0.5 on average): their snapshots span 40 steps" in line


def validate(told: Advice, gains, phase="stable", now="stable", count=10, sign=1) -> list[dict[str, float]]:
    """What is logged of validations with these gains, the live weights at 2."""
    logged = []
    for i, gain in enumerate(gains):
        segment = snapshots(range(10 * i, 10 * (i + count), 10), phase)
        (following,) = snapshots([segment[-1].step + 10], now)
        told.after_snapshot(following, segment, None)
        scores = ({"m": 2.0}, {"m": 2.0 - gain * sign}, {"m": sign > 0})
        logged.append(told.after_validation(segment[-1], *scores)[0])
    return logged


def new_advice() -> Advice:
    return Advice(window=10, parameters=1000, total_steps=1000)


def test_the_forecast_is_the_measured_rule():
    shares = json.loads((ROOT / "benchmarks/results/forecast.json").read_text())["shares"]
    for is_lower, metric in ((True, "loss"), (False, "accuracy")):
        measured = shares[metric]["25%, 1-sqrt"]
        assert SHARES[is_lower] == (round(measured["mean"], 2), round(measured["spread"], 2))


def test_the_error_of_a_runs_own_decay_is_the_measured_one():
    rules = json.loads((ROOT / "benchmarks/results/forecast.json").read_text())["rules"]
    for is_lower, metric in ((True, "loss"), (False, "accuracy")):
        own, added = rules[metric]["merge - constant, by the run's own earlier fork"], rules[metric]
        square = own["mean"] ** 2 + own["spread"] ** 2 * (own["cases"] - 1) / own["cases"]
        assert OWN[is_lower] == round(math.sqrt(square) / added["the merge as it is"]["mean"], 2)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_run_that_has_decayed_before_forecasts_what_that_decay_added(sign):
    def scores(live, merged):
        return {"m": sign * live}, {"m": sign * merged}, {"m": sign > 0}

    (newest,), told = snapshots([90]), Validations()
    told.note(replace(newest, phase="stable", since=0), *scores(3.0, 2.5))
    told.note(replace(newest, phase="decay", since=90, step=95), *scores(2.3, 2.4))
    told.note(replace(newest, phase="decay", since=90, step=99), *scores(2.2, 2.2))
    told.load_state_dict(json.loads(json.dumps(told.state_dict())))
    for step in range(200, 210):
        at = replace(newest, phase="stable", since=120, step=step)
        told.note(at, *(given := scores(2.5, 2.0)))
    found = told.forecasts(given[1], given[2])
    assert found["merge/forecast/m"] == pytest.approx(sign * (2.0 - 0.3))
    assert found["merge/forecast_error/m"] == pytest.approx(2 * OWN[sign > 0] * 0.3)


@pytest.mark.parametrize("sign", [1, -1])
def test_once_the_gains_are_level_it_is_forecast_what_a_decay_would_give(sign):
    logged = validate(new_advice(), [0.2, 0.4, 0.5, 0.5, 0.5, 0.5], sign=sign)
    assert [len(metrics) for metrics in logged] == [1] * 5 + [3]
    share, spread = SHARES[sign > 0]
    assert logged[-1]["merge/forecast/m"] == pytest.approx(2 - sign * (0.5 + share * 0.48))
    assert logged[-1]["merge/forecast_error/m"] == pytest.approx(2 * spread * 0.48)


def test_a_validation_that_is_not_finite_is_forgotten():
    told = new_advice()
    logged = validate(told, [float("nan"), 0.4, 0.5, float("inf"), 0.5, 0.5, 0.5])
    assert math.isnan(logged[0]["merge_gain/m"])
    assert told.validations.best["m"].gains == {"m": 0.5}
    assert math.isfinite(logged[-1]["merge/forecast/m"])


def test_a_merge_is_validated_on_several_sets():
    told = new_advice()
    validate(told, [0.5] * 5)
    newest = snapshots([130])[0]
    assert "merge/forecast/m" in told.after_validation(newest, {"m": 2}, {"m": 1.5}, {"m": True})[0]
    assert told.after_validation(newest, {"n": 2}, {"n": 1}, {"n": True})[0] == {"merge_gain/n": 1}
    assert told.validations.recent[-1].gains == {"m": 0.5, "n": 1}


@pytest.mark.parametrize(
    "other",
    [{"phase": "decay"}, {"now": "decay"}, {"count": 5}, {"gains": [0.5] * 4}, {"gains": [-0.5] * 6}],
)
def test_nothing_is_forecast_that_was_not_measured(other):
    logged = validate(new_advice(), **{"gains": [0.5] * 6, **other})
    assert {name for metrics in logged for name in metrics} == {"merge_gain/m"}


def closing(caplog, folder, **options) -> str:
    merging = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=folder / "merges", **options)
    with caplog.at_level("INFO"):
        train(Classifier(lr=0.1), merging, data=loader(), val=loader(16), max_epochs=2)
    return next(r.message for r in reversed(caplog.records) if "published" in r.message)


def test_the_last_line_tells_how_many_merges_there_are_and_where_the_best_lies(caplog, tmp_path, monkeypatch):
    folder = tmp_path / "merges"
    newest = f"merge: 7 merges published, the newest is {folder}/step=00000016-sma, the best in val_loss too"
    assert closing(caplog, tmp_path) == f"{newest}; no merge scored better than the live weights"
    monkeypatch.chdir(tmp_path)
    line = closing(caplog, tmp_path / "b", higher_is_better=["val_loss"])
    assert line.startswith(
        "merge: 7 merges published, the newest is b/merges/step=00000016-sma, the best in val_loss is "
        "b/merges/step=00000008-sma; the largest gain was "
    )
    assert line.endswith(" in val_loss, at step 8 (stable phase)")
