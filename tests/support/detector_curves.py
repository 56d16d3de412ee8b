"""A spike detector and the curves it is shown."""

import numpy as np

from merge_callback.signals.spike_detector import SpikeDetector


def healthy(n=200, level=2.0, noise=0.02, seed=0):
    return list(level + noise * np.random.default_rng(seed).standard_normal(n))


def watch(detector, values, start=0, rises=False, **how):
    """The events of a curve, by the step each was reported at; rises, which are only questions, if asked."""
    found = {}
    for step, value in enumerate(values, start):
        event = detector.observe(step, float(value), **how)
        if event is not None and (rises or event.kind != "rise"):
            assert event.step == step
            found[step] = event
    return found


def warm(values=None, **rule):
    """A detector after 200 healthy steps; the next step is 200."""
    detector = SpikeDetector(**rule)
    assert not watch(detector, healthy() if values is None else values)
    return detector


def kinds(events):
    return [(step, event.kind, event.onset) for step, event in events.items()]
