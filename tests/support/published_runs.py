"""Runs that merge by the mean, and the merges that they publish."""

import json

import tiny_run
from run_outcomes import emissions


def fit(folder, **options):
    """A run that merges by the mean in both phases, unless told otherwise."""
    return tiny_run.fit(folder, **{"method": "sma", **options})


def record(path):
    """What `merge.json` says."""
    return json.loads((path / "merge.json").read_text())


def names(folder):
    """The emissions of a run, oldest first."""
    return [path.name for path in emissions(folder / "merges")]


def published_steps(folder):
    """The steps of a run's emissions."""
    return [int(name[5:13]) for name in names(folder)]
