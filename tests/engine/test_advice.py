"""Advice: what is said when, why, and only once; the closing line of a run."""

from dataclasses import replace

import pytest
from training_runs import Classifier, loader, train

from merge_callback import CheckpointMergeCallback
from merge_callback.engine import advice
from merge_callback.engine.advice import Advice, Seen
from merge_callback.snapshots.snapshot import Snapshot

STABLE = Seen(phase="stable", since=0, window=10, merged=10, span=90, share=0.09, parameters=120_000)
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
        (replace(DECAY, diversity=0.05), ["spent", "fading"]),
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
        lines.append(told.after_snapshot(snapshots(steps[:i][-10:], phase, since), diversity))
    return [line for line in lines if line]


def stable_run() -> Advice:
    told = Advice(window=10, parameters=1000, total_steps=1000)
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
    assert len(follow(told, range(610, 710, 10), [0.0] * 10, "decay", 600)) == 2


def test_snapshots_at_another_distance_are_not_compared():
    assert not follow(stable_run(), range(410, 440, 2), [0.01] * 15, "decay", 400)


def test_a_pair_across_phases_is_not_compared():
    (segment, pair) = snapshots([410, 420], "decay", 400), {"rms": 0.0, "steps": [390, 410]}
    assert stable_run().after_snapshot(segment, pair) is None


def test_a_resumed_run_does_not_repeat_itself():
    told, again = stable_run(), Advice(window=10, parameters=1000, total_steps=1000)
    steps, rms = range(410, 510, 10), [0.01] * 10
    assert len(follow(told, steps, rms, "decay", 400)) == 2
    again.load_state_dict(told.state_dict())
    assert again.state_dict() == told.state_dict()
    assert not follow(again, steps, rms, "decay", 400)


def test_losing_merges_of_one_phase_are_told_of_with_the_metric():
    told = Advice(window=10, parameters=1000, total_steps=1000)
    follow(told, range(10, 60, 10), [1.0] * 5)
    told.after_validation(Snapshot(20, None, 1, 1, "stable", 0, 20), {"b": 1.0}, {"b": 2.0}, {"b": True})
    for merged in (1.5, 1.5, 1.5):
        live, scores = {"b": 1.0, "val_loss": 1.0}, {"b": 0.5, "val_loss": merged}
        metrics, line = told.after_validation(
            Snapshot(50, None, 1, 1, "stable", 0, 50), live, scores, {"b": True, "val_loss": True}
        )
        assert metrics == {"merge_gain/b": 0.5, "merge_gain/val_loss": -0.5}
    assert "worse than the live weights (val_loss: by 0.5 on average): their snapshots span 40 steps" in line


def closing(caplog, folder, **options) -> str:
    merging = CheckpointMergeCallback(window=3, every_n_steps=2, dirpath=folder / "merges", **options)
    with caplog.at_level("INFO"):
        train(Classifier(lr=0.1), merging, data=loader(), val=loader(16), max_epochs=2)
    return caplog.records[-1].message


def test_the_last_line_tells_how_many_merges_there_are_and_where_the_best_lies(caplog, tmp_path):
    folder = tmp_path / "merges"
    newest = f"merge: 7 merges published, the newest is {folder}/step=00000016-sma"
    none = "; none of those that were validated scored better than the live weights in val_loss"
    assert closing(caplog, tmp_path) == newest + none
    assert closing(caplog, tmp_path / "b", lower_is_better=["none"], higher_is_better=["val_loss"]).endswith(
        "in val_loss, of the merge of step 8 (stable phase): not published, or no longer kept (keep_last=3)"
    )
