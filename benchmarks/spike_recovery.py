"""What to restore after a divergence, and what to do with the optimizer: an ablation on real ones.

    python benchmarks/spike_recovery.py                  # 40 minutes on two cores
    python benchmarks/spike_recovery.py --seeds 1 --dense

The demo model without qk-norm trains to step 780 once per seed, then goes on from that checkpoint in several
ways. From step 800 on the learning rate is 25 times too high for 40 steps, but in the unbroken one:

* {the mean of the last three clean snapshots (PMA-init), the newest clean snapshot alone} x {optimizer state
  reset, kept, scaled}: the callback with ``pma_window`` 3 or 1;
* no action: the callback told to warn only.

*Recovered* is a final validation loss within 2 % of the unbroken run's. *Back on trend* counts the steps from
the restore until the training loss (median of 25 steps) is within 2 % of the unbroken run's at the same step,
on the same batches.

Last it times a restore of a larger model against one 3-way merge and one copy of its weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from record import QUIET, RESULTS, write
from recorders import SaveAt, on_one_quiet_thread
from torch import nn

from merge_callback import CheckpointMergeCallback, SpikeOptions
from merge_callback.demo.spike import SpikePlan, SpikeRun, merging, read_events, train
from merge_callback.demo.spike_curves import SMOOTH, smoothed
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.arena_merge import Sum, merge_arenas
from merge_callback.snapshots.capture import ModelTensors

PLAN = SpikePlan(steps=1500)
TRUNK = 780
"""Where the ways part: before the learning rate goes wrong."""
WITHIN = 1.02

ARMS: dict[str, SpikeOptions | None] = {
    "unbroken": None,
    "no action": SpikeOptions(action="warn"),
    **{
        f"{what}, {policy}": SpikeOptions(pma_window=count, optimizer=policy)  # type: ignore[arg-type]
        for what, count in (("PMA-init", 3), ("newest snapshot", 1))
        for policy in ("reset", "keep", "scale")
    },
}


def run_seed(seed: int, moe: bool, arms: list[str]) -> dict[str, SpikeRun]:
    """Trains the trunk and all ways of one seed."""
    on_one_quiet_thread()
    quiet = {"enable_progress_bar": False}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "trunk.ckpt"
        callback = merging(folder / "trunk", PLAN, moe)
        save = [SaveAt(TRUNK, checkpoint)]
        train("trunk", folder, PLAN, callback, moe=moe, seed=seed, max_steps=TRUNK, callbacks=save, **quiet)
        runs = {}
        for number, arm in enumerate(arms):
            merges = folder / f"arm-{number}"
            run = train(
                arm,
                folder,
                PLAN,
                merging(merges, PLAN, moe, ARMS[arm]),
                broken=arm != "unbroken",
                moe=moe,
                seed=seed,
                ckpt_path=checkpoint,
                **quiet,
            )
            run.events = read_events(merges)
            runs[arm] = run
            events = [(e["event"], e["onset"], e["step"]) for e in run.events]
            print(
                f"{'moe' if moe else 'dense'} seed {seed} {arm:24} final {run.final:.3f} {events}", flush=True
            )
    return runs


def back_on_trend(run: SpikeRun, unbroken: SpikeRun) -> int | None:
    """Steps from the first restore (or report) until the loss is near the unbroken run's, if ever."""
    started = next((e.get("restored_at", e["step"]) for e in run.events), None)
    if started is None:
        return None
    pairs = zip(*smoothed(run.losses), smoothed(unbroken.losses)[1], strict=True)
    after = started - TRUNK  # losses begin at the checkpoint
    back = (end - after for end, loss, trend in pairs if end - SMOOTH >= after and loss <= WITHIN * trend)
    return next(back, None)


def judge(all_runs: list[dict[str, SpikeRun]], arm: str) -> dict[str, Any]:
    """The figures of one way over all seeds."""
    runs = [(seed[arm], seed["unbroken"]) for seed in all_runs]
    ratios = [run.final / unbroken.final for run, unbroken in runs]
    steps = [back_on_trend(run, unbroken) for run, unbroken in runs]
    known = [s for s in steps if s is not None]
    return {
        "runs": len(runs),
        "recovered": sum(ratio <= WITHIN for ratio in ratios) / len(runs),
        "final_to_unbroken": {
            "mean": statistics.fmean(ratios),
            "worst": max(ratios),
            "each": [round(r, 4) for r in ratios],
        },
        "steps_back_on_trend": {"median": statistics.median(known) if known else None, "each": steps},
        "restores": [sum(e["event"] == "restore" for e in run.events) for run, _ in runs],
    }


# --- how long a restore takes -------------------------------------------------------------------------------


class Wide(LightningModule):
    """Enough parameters to be bound by memory."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(millions)])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net[0](batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


class TimeRestores(Callback):
    """Restores the run again and again at the end of its training, and times the parts."""

    def __init__(self, callback: CheckpointMergeCallback, repeats: int) -> None:
        self.callback, self.repeats = callback, repeats
        self.seconds: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        session = self.callback.session
        if trainer.global_step != trainer.max_steps or session is None or session.spikes is None:
            return
        for parameter in pl_module.parameters():  # as after a real step: every moment is there
            trainer.optimizers[0].state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.ones_like(parameter),
                "exp_avg_sq": torch.ones_like(parameter),
            }
            parameter.grad = torch.ones_like(parameter)
        snapshots = session.window.snapshots[-3:]
        model = ModelTensors.of(pl_module)
        arenas = [snapshot.arena for snapshot in snapshots]
        out = Arena.empty(session.window.store.layout)
        recovery = session.spikes.policy.recovery
        for _ in range(self.repeats):
            self._time("merge", lambda: merge_arenas(arenas, [Sum([1 / 3] * 3, out)]))
            self._time("copy", lambda: out.copy_to(model.tensors))
            self._time("reset", lambda: recovery._set_back(trainer.optimizers[0], True))
            self._time("restore", lambda: recovery.restore(snapshots, trainer.global_step, 1.0))

    def _time(self, what: str, action: Callable[[], object]) -> None:
        _synchronize()
        start = time.perf_counter()
        action()
        _synchronize()
        self.seconds.setdefault(what, []).append(time.perf_counter() - start)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_restores(millions: int, repeats: int, accelerator: str = "cpu") -> dict[str, Any]:
    """Seconds of a restore of a model of so many million fp32 parameters, and of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        callback = CheckpointMergeCallback(
            window=3,
            every_n_steps=1,
            dirpath=folder,
            storage="cpu",
            durable=False,
            emit_every=0,
            evaluate=False,
        )
        timer = TimeRestores(callback, repeats)
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=4,
            callbacks=[callback, timer],
            **QUIET,
        )
        trainer.fit(Wide(millions), torch.utils.data.DataLoader(torch.randn(16, 1000), batch_size=4))
    seconds = {what: statistics.median(times) for what, times in timer.seconds.items()}
    ratios = zip(*(timer.seconds[w] for w in ("restore", "merge", "copy")), strict=True)
    return {
        "parameters": millions * 10**6,
        "seconds": seconds,
        "restore_to_merge_and_copy": statistics.median(r / (m + c) for r, m, c in ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dense", action="store_true", help="leave the mixture of experts out")
    parser.add_argument("--millions", type=int, default=100, help="parameters of the restore that is timed")
    options = parser.parse_args()
    timing = time_restores(options.millions, repeats=9)
    print(json.dumps(timing, indent=1))
    arms = list(ARMS)
    jobs = [
        (seed, moe, arms)
        for moe in ((False,) if options.dense else (False, True))
        for seed in range(options.seeds)
    ]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        done = list(pool.map(run_seed, *zip(*jobs, strict=True)))
    figures: dict[str, Any] = {}
    for model, wanted in (("dense", False), ("moe", True)):
        runs = [found for found, (_, moe, _) in zip(done, jobs, strict=True) if moe is wanted]
        if runs:
            figures[model] = {arm: judge(runs, arm) for arm in arms}
            print_table(model, figures[model])
    curves = [{arm: asdict(run) for arm, run in runs.items()} for runs in done[:1]]
    (RESULTS / "spike_recovery_curves.json").write_text(json.dumps(curves) + "\n")
    print(write("spike_recovery", {"plan": asdict(PLAN), "restore": timing, **figures}))


def print_table(model: str, figures: dict[str, Any]) -> None:
    print(f"{model:24} recovered  final / unbroken (worst)  steps back on trend")
    for arm, f in figures.items():
        ratio, steps = f["final_to_unbroken"], f["steps_back_on_trend"]
        print(
            f"{arm:24} {100 * f['recovered']:7.0f} %  {ratio['mean']:9.3f} ({ratio['worst']:.3f})"
            f"   {steps['median']} {steps['each']}"
        )


if __name__ == "__main__":
    main()
