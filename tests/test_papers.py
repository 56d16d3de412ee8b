"""The papers' claims, `benchmarks/papers`: runs that resume, scores that are kept, verdicts from figures."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from checkpoint_files import ROOT

from benchmarks.papers.claims import NAMES, claim
from benchmarks.papers.runs import AVERAGES, Run, loaded
from benchmarks.papers.spec import Spec, digest, merge
from benchmarks.papers.study import Study
from benchmarks.papers.verdict import Verdict, interval, plain, says

TINY = Spec(width=8, context=8, batch=2, steps=8, warmup=2, every=1, stored=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("papers")


@pytest.fixture(scope="module")
def run(cache):
    return Run(TINY, cache).train()


def test_a_killed_run_goes_on_from_its_last_state_to_the_same_weights(run, tmp_path):
    def stop_at_six(steps):
        told.append(steps)
        if len(told) == 6:
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt):
        Run(TINY, tmp_path).train(stop_at_six)
    resumed = Run(TINY, tmp_path).train(told.append)
    assert len(told) == 6 + 4
    for kind in ("live", *AVERAGES):
        step = 5 if kind != "live" else 8
        expected = run.weights(step, kind)
        assert all(
            torch.equal(tensor, expected[name]) for name, tensor in resumed.weights(step, kind).items()
        )
    assert resumed.losses.tolist() == run.losses.tolist()


def test_a_fork_goes_on_as_its_run_would_have(run, cache):
    longer = Run(replace(TINY, steps=12), cache).train()
    fork = Run(TINY.fork(8, 4), cache).train()
    assert fork.losses.tolist() == longer.losses[8:].tolist()
    assert fork.spec.at(9).spec == fork.spec
    assert fork.spec.at(8) == TINY.at(8)


def test_a_fork_may_begin_with_a_merge(run, cache):
    spec = TINY.fork(8, 1, weights=TINY.window(8, 2, 4), fresh=True, learning_rate=0.0)
    merged = loaded(spec.weights, cache)
    assert all(
        torch.equal(tensor, merged[name]) for name, tensor in Run(spec, cache).train().weights(9).items()
    )


def test_running_averages_follow_their_profile(cache):
    run = Run(replace(TINY, every=1, steps=5), cache).train()
    lives = [run.weights(step)["norm.weight"].double() for step in range(1, 6)]
    for kind, gamma in AVERAGES.items():
        average = lives[0]
        for t, live in enumerate(lives[1:], 2):
            average = average + (1 - (1 - 1 / t) ** (gamma + 1)) * (live - average)
        torch.testing.assert_close(run.weights(5, kind)["norm.weight"].double(), average, rtol=0, atol=1e-6)


def test_names_depend_on_what_is_given_alone():
    assert Spec().key == Spec(width=64).key != Spec(width=32).key
    assert digest(TINY.window(8, 2, 4)) != digest(TINY.window(8, 2, 4, "wma"))
    assert merge([TINY.at(4)], "weighted", weights=[1.0]).options == (("weights", (1.0,)),)


def test_scores_are_kept_and_texts_are_apart(run, cache, monkeypatch):
    study = Study(cache.parent, 1, "quick")
    study.cache = cache
    scores = {part: study.score(TINY.at(8), part) for part in ("choose", "score")}
    assert scores["choose"] != scores["score"]
    again = Study(cache.parent, 1, "quick")
    again.cache = cache
    monkeypatch.setattr(again, "evaluate", None)
    assert again.score(TINY.at(8)) == scores["score"]


def test_an_interval_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert not found.is_positive
    assert interval([1.0]).half == math.inf


def test_a_verdict_that_is_not_a_yes_has_a_reason():
    assert [says(each) for each in ([True], [True, False], [False])] == [
        "holds",
        "holds in part",
        "does not hold here",
    ]
    with pytest.raises(ValueError, match="say why"):
        Verdict("A claim.", "a paper", "1", "2", "does not hold here")


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "benchmarks/results/papers").glob("*.json"))
)
def test_the_page_tells_what_was_measured(name):
    record = json.loads((ROOT / f"benchmarks/results/papers/{name}.json").read_text())
    assert record["size"] == "full"
    assert len(record["seeds"]) >= 3
    assert record["verdicts"] == plain([asdict(verdict) for verdict in claim(name).verdicts(record)])
    assert (record["title"], record["conclusion"]) == (claim(name).TITLE, claim(name).CONCLUSION)
    assert f"<!-- generated: evidence of {name} -->" in (ROOT / "docs/evidence.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)  # three minutes on a free core
def test_very_small_studies_run_to_their_pictures(tmp_path):
    command = [sys.executable, "-m", "benchmarks.papers", "all", "--quick"]
    subprocess.run([*command, "--cache", tmp_path, "--out", tmp_path], check=True, cwd=ROOT)
    for name in NAMES:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["verdicts"] == plain([asdict(verdict) for verdict in claim(name).verdicts(record)])
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
