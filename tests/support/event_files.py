"""Event files of runs that nobody has trained."""

import json
import math

from merge_callback.engine.events import EventFile

STEPS, EVERY = 400, 10


def run(**entries):
    return {
        "run_id": "one",
        "window": 4,
        "every": EVERY,
        "unit": "steps",
        "methods": {"stable": "sma", "decay": "ties"},
        "total_steps": STEPS,
        "storage": "disk",
        "url": None,
        "ranks": 2,
        "snapshot_bytes": 1_000_000,
        "window_bytes": 4_000_000,
        "versions": {"torch": "2.13"},
        **entries,
    }


def restore(step):
    """The record of a restore."""
    values = [9.0] * 5
    return {
        "event": "restore",
        "trigger": "loss",
        "onset": step - 5,
        "step": step,
        "values": values,
        "baseline": 2.0,
        "threshold": 2.5,
        "seconds": 0.5,
        "rewarm_steps": 5,
    }


def write_run(
    folder, steps=STEPS, every=EVERY, metric="val_loss", restores=(), ended=True, until=None, **entries
):
    """Writes the event file of a run with warm-up, stable phase and decay; returns its folder.

    Half of its merges were validated; of the emissions, only the last two are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = EventFile(folder, run(total_steps=steps, **entries))
    file.write("phase", 0, phase="warmup", since=0)
    file.write("phase", steps // 10, phase="stable", since=steps // 20)
    for step in range(every, (until or steps) + 1, every):
        decay = max(0.0, step / steps - 0.8) * 5
        if step == int(steps * 0.85):
            file.write("phase", step, phase="decay", since=int(steps * 0.8))
        diversity, kept = 0.02 * (1.02 - decay), [max(every, step - i * every) for i in (3, 2, 1, 0)]
        file.write(
            "snapshot",
            step,
            tokens=step * 2048,
            lr=0.01 * (1 - decay),
            phase="decay" if decay else "stable",
            bytes=1_000_000,
            stall=0.002,
            background=0.05,
            window=kept,
            diversity=diversity,
            layers={f"blocks.{i}": diversity * (1 + i / 8) for i in range(6)},
        )
        file.write(
            "metrics", step, values={"merge/diversity_rms": diversity, "merge/phase": 1}, log_step=step
        )
        live = 1.5 + 2 * math.exp(-6 * step / steps) + 0.02 * math.sin(7 * step)
        scores, gains = {"live": {metric: live}}, {}
        if step % (2 * every) == 0:
            gains = {metric: 0.1 * (1 - decay)}
            scores["merged"] = {metric: live - gains[metric]}
            method = "ties" if decay else "sma"
            file.write(
                "emission",
                step,
                path=f"step={step:08d}-{method}",
                method=method,
                phase="decay" if decay else "stable",
                tokens=step * 2048,
                snapshots=kept,
                weights=None if decay else [0.25] * 4,
                bytes=1_000_000,
                seconds=0.1,
            )
        file.write(
            "validation",
            step,
            scores=scores,
            gains=gains,
            merge=step if gains else None,
            seconds=0.4 if gains else None,
        )
        if step in restores:
            file.write("spike", step, record=restore(step), text="merge: loss spike: the sma was restored")
    if ended:
        file.write("end", steps, finished=True)
    for path in sorted({f"step={s:08d}-ties" for s in range(2 * every, steps + 1, 2 * every)})[-2:]:
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "merge.json").write_text(json.dumps({"step": 1}))
    return folder
