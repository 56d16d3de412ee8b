"""The runs of all ways, each trained once and kept on disk."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.recorders import SaveAt
from benchmarks.spike_guard.causes import CAUSES, EXTRA, Cause
from benchmarks.spike_guard.plan import ARMS, GUARDS, PLAN, arm_name
from benchmarks.spike_guard.runs import Run, brief, train
from merge_callback import SpikeOptions


class Cache:
    """The runs that are done, a JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        causes = {kind: _numbers(cause) for kind, cause in (CAUSES | EXTRA).items()}
        plan = json.loads(json.dumps({"plan": asdict(PLAN), "causes": causes}))
        known = folder / "plan.json"
        if known.exists() and json.loads(known.read_text()) != plan:
            raise SystemExit(f"--cache={folder} holds the runs of another plan: name a new folder")
        known.write_text(json.dumps(plan))

    def path(self, model: str, seed: int, kind: str, arm: str) -> Path:
        """Where a run is; the unbroken one is the same for all kinds."""
        name = "unbroken" if arm == "unbroken" else f"{kind}, {arm}"
        return self.folder / f"{model}-{seed}" / f"{name.replace(' ', '_')}.json"

    def load(self, *key: Any) -> Run:
        """A run that is done."""
        return Run(**json.loads(self.path(*key).read_text()))

    def has(self, *key: Any) -> bool:
        """Whether a run is done."""
        return self.path(*key).exists()

    def save(self, run: Run, *key: Any) -> None:
        """Keeps a run; whole or not at all."""
        path = self.path(*key)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".tmp")
        kept = asdict(run)
        kept["losses"] = [round(loss, 4) for loss in run.losses]
        kept["events"] = [{k: v for k, v in event.items() if k != "values"} for event in run.events]
        draft.write_text(json.dumps(kept))
        draft.replace(path)


def _numbers(cause: type[Cause]) -> dict[str, float]:
    """What a cause's severity is."""
    named = ((name, getattr(cause, name)) for name in dir(cause))
    return {name: value for name, value in named if isinstance(value, (int, float))}


def run_seed(cache: Cache, model: str, seed: int, kinds: Sequence[str], arms: Sequence[str]) -> None:
    """Trains the trunk of one seed and all ways that are missing."""
    wanted = [("", "unbroken"), *itertools.product(kinds, arms)]
    missing = [(kind, arm) for kind, arm in wanted if not cache.has(model, seed, kind, arm)]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "trunk.ckpt"
        watch = SpikeOptions(action="warn")
        save = [SaveAt(PLAN.trunk, checkpoint)]
        trunk = train(model, seed, folder / "trunk", watch, callbacks=save, steps=PLAN.trunk)
        print(f"{model} seed {seed} trunk: {trunk.seconds:.1f} s {brief(trunk)}", flush=True)
        for kind, arm in missing:
            cause = None if arm == "unbroken" else (CAUSES | EXTRA)[kind](seed)
            run = twin(cache, model, seed, kind, arm)
            if run is None:
                run = train(model, seed, folder / "arm", ARMS.get(arm, watch), cause, checkpoint)
                shutil.rmtree(folder / "arm")
            cache.save(run, model, seed, kind, arm)
            ratio = run.final / cache.load(model, seed, "", "unbroken").final
            print(
                f"{model} seed {seed} {kind:18} {arm:42} {ratio:.4f} {run.seconds:.1f} s {brief(run)}",
                flush=True,
            )


def twin(cache: Cache, model: str, seed: int, kind: str, arm: str) -> Run | None:
    """A run with another guard that is done and was restored once, from the very snapshots this one would be.

    The two are then the same bit for bit, and one of them need not be trained.
    """
    options = ARMS.get(arm)
    if options is None or options.action != "restore":
        return None
    for guard in GUARDS:
        key = (model, seed, kind, arm_name(guard, options.pma_window, str(options.optimizer)))
        if not cache.has(*key) or len((run := cache.load(*key)).restores) != 1:
            continue
        (event,) = run.restores
        taken = range(0, event["onset"] - options.guard + 1, PLAN.every)
        if [s["step"] for s in event["snapshots"]] == list(taken)[-options.pma_window :]:
            return run
    return None
