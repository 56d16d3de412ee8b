"""How old should the restored weights be? Guard, number of snapshots and optimizer policy, measured.

    python benchmarks/spike_guard.py --cache guard_cache            # all arms; an interrupted run goes on
    python benchmarks/spike_guard.py --cache before --arms default  # the default policy alone, all causes
    python benchmarks/spike_guard.py --table                        # the tables again, from the JSON

All arms take over an hour on one core; with TMPDIR on a disk in memory no time is lost to fsync.

A small GPT trains once per seed, with a snapshot every 10 steps. From a checkpoint shortly before the onset
it goes on in several ways: unbroken; broken and only warned of; broken and restored, for every combination of
``guard`` (5, 10, 30, 100 steps), ``pma_window`` (1, 3, 10) and ``optimizer`` (keep, reset). `CAUSES` says
what breaks it. A cause ends with the first restore, as if somebody had mended it
then, or after its length; corrupted data go on to their end.

A run is *recovered* if its final validation loss, the mean of three validations, is within 2 % of the
unbroken run's. It is *back on trend* once its training loss (mean of 10 steps) is within 2 % of the unbroken
run's on the same batches; counted from the first restore, so 10 is the least. Its *excess* is how far its
training loss lies above the unbroken run's in the mean of all steps from the first restore to the end.

The re-warm-up takes 30 steps, not the default 100: only some 300 steps are left after a restore.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from record import QUIET, RESULTS, write
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from merge_callback import CheckpointMergeCallback, SpikeOptions, TrainingDivergedError
from merge_callback.demo.crops import Batch, DemoData
from merge_callback.demo.gpt import GPTConfig
from merge_callback.demo.module import DemoModule
from merge_callback.demo.schedule import WSDSchedule
from merge_callback.demo.spike import read_events

Record = dict[str, Any]

GUARDS, WINDOWS, POLICIES = (5, 10, 30, 100), (1, 3, 10), ("keep", "reset")
DEFAULT = (10, 3, "keep")
MODELS = ("dense", "moe")
WITHIN = 1.02
"""A loss this close to the unbroken run's counts as recovered."""
SMOOTH = 10
"""Steps over whose mean training losses are compared; few, as the batches are the same."""
REAL = 1.03
"""A cause that leaves the run less than this far above the unbroken one has not really broken it."""


@dataclass(frozen=True)
class Plan:
    """The lengths in optimizer steps, and the sizes; a cache holds the runs of one plan only."""

    warmup: int = 100
    trunk: int = 1188
    """Where the ways part."""
    onset: int = 1200
    """Steps taken before the first one that is broken."""
    steps: int = 1500
    rewarm: int = 30
    every: int = 10
    window: int = 24
    """Enough for ten snapshots that are 100 steps old, with what comes in until the spike is noticed."""
    batch_size: int = 32
    context: int = 16
    width: int = 32
    validations: tuple[int, ...] = (1460, 1480, 1500)
    validation_batches: int = 32


PLAN = Plan()


# --- what breaks a run --------------------------------------------------------------------------------------


@dataclass
class Cause:
    """Something that goes wrong for ``length`` steps or until the run is restored. The hooks do nothing.

    Args:
        seed: of the run.
    """

    seed: int
    length = 1
    mends = True
    """Whether it ends with the first restore, as if somebody had mended it then."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1000 + self.seed)
        self.ended = False

    def is_on(self, step: int) -> bool:
        """Whether it breaks the update after ``step`` optimizer steps."""
        return not self.ended and PLAN.onset <= step < PLAN.onset + self.length

    def learning_rate(self, step: int) -> float:
        """What the learning rate is multiplied by."""
        return 1.0

    def batch(self, batch: Batch, step: int) -> Batch:
        """The batch that is trained on."""
        return batch

    def gradients(self, module: LightningModule, step: int) -> None:
        """Spoils the gradients."""

    def clips(self) -> bool:
        """Whether the gradients are clipped."""
        return True

    def weights(self, module: LightningModule, before: Tensor | None) -> None:
        """Spoils the weights after the update; ``before`` are those before it where `remembers` is set."""

    remembers = False


def random_labels(batch: Batch, generator: torch.Generator) -> Batch:
    """The same text with random bytes for labels."""
    labels = torch.randint(0, 256, batch["labels"].shape, generator=generator)
    return {"input_ids": batch["input_ids"], "labels": labels}


class Surge(Cause):
    """The learning rate is 40 times too high for 40 steps."""

    length = 40
    excess = 40.0

    def learning_rate(self, step: int) -> float:
        return self.excess


class Creep(Surge):
    """The learning rate grows by a tenth a step for 80 steps, at most 300-fold: the slowest to show."""

    length = 80
    growth = 1.1
    excess = 300.0

    def learning_rate(self, step: int) -> float:
        return min(self.excess, self.growth ** (step - PLAN.onset + 1))


class LostClipping(Cause):
    """Clipping is off, and one batch in three has random labels and a loss that counts 300 times.

    With clipping on the same batches do no harm that lasts (`ClippedOutliers`).
    """

    length = 90
    scale = 300.0
    period = 3

    def batch(self, batch: Batch, step: int) -> Batch:
        return batch if (step - PLAN.onset) % self.period else random_labels(batch, self.generator)

    def gradients(self, module: LightningModule, step: int) -> None:
        if (step - PLAN.onset) % self.period == 0:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad *= self.scale

    def clips(self) -> bool:
        return False


class ClippedOutliers(LostClipping):
    """The control: the same outliers, clipped."""

    def clips(self) -> bool:
        return True


class CorruptBatches(Cause):
    """The labels of 150 batches are random bytes, as after a wrong offset in a file.

    No restore changes the data: they go on to their end.
    """

    length = 150
    mends = False

    def batch(self, batch: Batch, step: int) -> Batch:
        return random_labels(batch, self.generator)


class Bfloat16(Cause):
    """The weights live in bf16, and an update is added in 256 parts, each sum rounded toward zero.

    So rounds an accumulator that drops the bits it has no room for. Fewer parts do the same harm more mildly:
    with 8 the loss rises by a tenth, with 64 by a third, and neither is an outlier among batches this small.
    """

    length = 200
    parts = 256
    remembers = True

    def weights(self, module: LightningModule, before: Tensor | None) -> None:
        assert before is not None
        part = (parameters_to_vector(module.parameters()) - before) / self.parts
        total = before
        for _ in range(self.parts):
            total = ((total + part).view(torch.int32) & -65536).view(torch.float32)
        vector_to_parameters(total, module.parameters())


class BitFlip(Cause):
    """The highest bit of the exponent of one weight flips, once: |w| < 2 becomes |w| · 2^128.

    Seeds take turns at the matrices of the blocks.
    """

    def weights(self, module: LightningModule, before: Tensor | None) -> None:
        matrices = [p for name, p in module.named_parameters() if "blocks" in name and p.ndim == 2]
        chosen = matrices[int(torch.randint(len(matrices), (), generator=self.generator))].view(-1)
        index = int(torch.randint(len(chosen), (), generator=self.generator))
        chosen.view(torch.int32)[index] ^= 1 << 30


CAUSES: dict[str, type[Cause]] = {
    "lr surge": Surge,
    "lost clipping": LostClipping,
    "corrupted batches": CorruptBatches,
    "bf16 accumulation": Bfloat16,
    "bit flip": BitFlip,
}
EXTRA: dict[str, type[Cause]] = {"lr creep": Creep, "clipped outliers": ClippedOutliers}
"""Further ones for ``--kinds``: the one whose damage is older than its first outlier, and a control."""


# --- one run ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one run was like, from the trunk on."""

    losses: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0
    """Of processor time, in all threads."""

    @property
    def final(self) -> float:
        """The mean of the last validations; infinite where the run did not get there with finite weights."""
        if self.stopped or not all(map(math.isfinite, self.validations)):
            return math.inf
        return statistics.fmean(self.validations)

    @property
    def restores(self) -> list[Record]:
        """The restores among the events."""
        return [event for event in self.events if event["event"] == "restore"]


class BreakingModule(DemoModule):
    """The demo's module with a cause; it logs nothing, which saves a tenth of the time."""

    def __init__(self, gpt: GPTConfig, schedule: WSDSchedule, cause: Cause | None) -> None:
        super().__init__(gpt, schedule)
        self.cause = cause
        self.before: Tensor | None = None

    @property
    def active(self) -> Cause | None:
        """The cause, while it lasts."""
        return self.cause if self.cause and self.cause.is_on(self.trainer.global_step) else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._mean_loss(self.active.batch(batch, self.trainer.global_step) if self.active else batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        configured = super().configure_optimizers()
        scheduler = LambdaLR(configured["optimizer"], self._factor)
        return {
            "optimizer": configured["optimizer"],
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.active:
            self.active.gradients(self, self.trainer.global_step)
        if not self.active or self.active.clips():
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        active = self.active  # the step counts while it is taken
        with torch.no_grad():
            before = parameters_to_vector(self.parameters()) if active and active.remembers else None
        super().optimizer_step(*args, **kwargs)
        if active:
            with torch.no_grad():
                active.weights(self, before)

    def _factor(self, step: int) -> float:
        factor = self.schedule.factor(step)
        return factor * self.cause.learning_rate(step) if self.cause and self.cause.is_on(step) else factor


class Recorder(Callback):
    """Fills a `Run`, and ends the cause once the run is restored."""

    def __init__(self, run: Run, cause: Cause | None, folder: Path) -> None:
        self.run, self.cause, self.folder = run, cause, folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.run.losses.append(float(outputs["loss"]))
        if self.cause and self.cause.mends and not self.cause.ended:
            self.cause.ended = any(event["event"] == "restore" for event in read_events(self.folder))
            if self.cause.ended:  # the scheduler has set the next step's rate already
                for group in trainer.optimizers[0].param_groups:
                    factor = pl_module.schedule.factor(trainer.global_step)  # type: ignore[operator]
                    group["lr"] = pl_module.learning_rate * factor
        if trainer.global_step in PLAN.validations:
            self.run.validations.append(validation_loss(trainer, pl_module))


class SaveTrunk(Callback):
    """Saves the checkpoint from which all ways go on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == PLAN.trunk:
            trainer.save_checkpoint(self.path)


@torch.no_grad()
def validation_loss(trainer: Trainer, module: Any) -> float:
    """The mean loss on the held-out crops: without Lightning's loop, which takes as long as 20 steps."""
    module.eval()
    batches = list(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
    joined: Batch = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}  # type: ignore
    loss = float(module._mean_loss(joined))
    module.train()
    return loss


def train(
    model: str,
    seed: int,
    folder: Path,
    spike: SpikeOptions,
    cause: Cause | None = None,
    resume_from: Path | None = None,
    callbacks: Sequence[Callback] = (),
    steps: int = PLAN.steps,
) -> Run:
    """Trains once, from the beginning or from the checkpoint, with the merge callback in ``folder``."""
    seed_everything(seed, verbose=False)
    start, run = time.process_time(), Run()
    moe = model == "moe"
    merging = CheckpointMergeCallback(
        window=PLAN.window,
        every_n_steps=PLAN.every,
        dirpath=folder,
        emit_every=0,
        evaluate=False,
        exclude=("*.router_bias",) if moe else (),
        spike=spike,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[merging, Recorder(run, cause, folder), *callbacks],
        **QUIET,
    )
    gpt = GPTConfig(context=PLAN.context, width=PLAN.width, layers=2, qk_norm=False, experts=4 if moe else 0)
    module = BreakingModule(gpt, WSDSchedule(PLAN.warmup, PLAN.steps, 0), cause)
    data = DemoData(PLAN.batch_size, PLAN.context, seed, PLAN.steps, PLAN.validation_batches)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from)
    except TrainingDivergedError:
        run.stopped = True
    run.events = read_events(folder)
    run.seconds = time.process_time() - start
    return run


# --- all ways, with a cache on disk -------------------------------------------------------------------------


def arm_name(guard: int, window: int, policy: str) -> str:
    return f"guard={guard} pma_window={window} optimizer={policy}"


ARMS: dict[str, SpikeOptions] = {
    "no action": SpikeOptions(action="warn"),
    **{
        arm_name(guard, window, policy): SpikeOptions(
            guard=guard,
            pma_window=window,
            optimizer=policy,  # type: ignore[arg-type]
            rewarm_steps=PLAN.rewarm,
        )
        for guard, window, policy in itertools.product(GUARDS, WINDOWS, POLICIES)
    },
}


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
        save = [SaveTrunk(checkpoint)]
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


def brief(run: Run) -> str:
    """The events of a run in one line."""
    said = [
        f"{e['event']}({e['onset']}, {e.get('restored_at', e['step'])})"
        for e in run.events
        if e["event"] != "drift"
    ]
    return " ".join(said) + (" stopped" if run.stopped else "")


# --- figures ------------------------------------------------------------------------------------------------


def since_restore(run: Run, unbroken: Run) -> list[float]:
    """The losses from the first restore on as multiples of the unbroken run's, on the same batches."""
    if not run.restores:
        return []
    after = run.restores[0]["restored_at"] - PLAN.trunk  # losses begin at the checkpoint
    pairs = zip(run.losses[after:], unbroken.losses[after:], strict=not run.stopped)
    return [loss / trend for loss, trend in pairs]


def back_on_trend(ratios: Sequence[float]) -> int | None:
    """Steps until ten losses in a row are near the unbroken run's, in the mean; the ten count as well."""
    ends = range(SMOOTH, len(ratios) + 1)
    return next((end for end in ends if statistics.fmean(ratios[end - SMOOTH : end]) <= WITHIN), None)


def judge(runs: Sequence[tuple[Run, Run]]) -> Record:
    """The figures of one way, a list entry per seed; each comes with the unbroken run."""
    ratios = [run.final / unbroken.final for run, unbroken in runs]
    restores = [run.restores for run, _ in runs]
    since = [since_restore(run, unbroken) for run, unbroken in runs]
    excess = [statistics.fmean(s) - 1 if s else None for s in since]
    return {
        "final_to_unbroken": [round(r, 4) if math.isfinite(r) else None for r in ratios],
        "recovered": [r <= WITHIN for r in ratios],
        "restores": [len(found) for found in restores],
        "delay": [found[0]["restored_at"] - PLAN.onset if found else None for found in restores],
        "first_outlier": [run.events[0]["onset"] - PLAN.onset if run.events else None for run, _ in runs],
        "steps_back_on_trend": [back_on_trend(s) for s in since],
        "excess_since_restore": [round(e, 4) if e is not None and math.isfinite(e) else None for e in excess],
        "restored_snapshots": [[s["step"] for s in f[-1]["snapshots"]] if f else [] for f in restores],
        "stopped": [run.stopped for run, _ in runs],
        "events": [brief(run) for run, _ in runs],
    }


def collect(
    cache: Cache, models: Iterable[str], kinds: Sequence[str], arms: Sequence[str], seeds: int
) -> Record:
    """The figures of all runs: by model, kind and arm."""
    figures: Record = {}
    for model in models:
        unbroken = [cache.load(model, seed, "", "unbroken") for seed in range(seeds)]
        figures[model] = {
            "unbroken": {
                "final": [round(run.final, 4) for run in unbroken],
                "events": [brief(run) for run in unbroken],
            },
            "kinds": {},
        }
        for kind in kinds:
            runs = {arm: [cache.load(model, seed, kind, arm) for seed in range(seeds)] for arm in arms}
            found = {arm: judge(list(zip(r, unbroken, strict=True))) for arm, r in runs.items()}
            ratios = found["no action"]["final_to_unbroken"] if "no action" in found else []
            mild = [seed for seed, r in enumerate(ratios) if r is not None and r <= REAL]
            figures[model]["kinds"][kind] = {"seeds_not_broken": mild, "arms": found}
    return figures


# --- tables -------------------------------------------------------------------------------------------------


def tables(record: Record) -> str:
    """The decision tables in Markdown: per kind and model, and over all of them."""
    parts = []
    pooled: dict[str, list[Record]] = {}
    for model, kind, found in _each(record):
        parts.append(f"### {kind}, {model}\n\n{_origin(record, model, kind)}\n\n{_table(found)}")
        for arm, figures in found.items():
            pooled.setdefault(arm, []).append(figures)
    overall = {arm: _pool(figures) for arm, figures in pooled.items()}
    return "\n\n".join(
        [f"## Over all kinds and models\n\n{_table(overall)}\n\n{_marginals(overall)}", *parts]
    )


def _each(record: Record) -> Iterator[tuple[str, str, dict[str, Record]]]:
    for model in MODELS:
        for kind, found in record.get(model, {}).get("kinds", {}).items():
            yield model, kind, found["arms"]


def _origin(record: Record, model: str, kind: str) -> str:
    """What the cause does by itself."""
    found = record[model]["kinds"][kind]
    figures = found["arms"].get("no action")
    if figures is None:
        return ""
    text = ", ".join("not finite" if r is None else f"{r:.3f}" for r in figures["final_to_unbroken"])
    mild = found["seeds_not_broken"]
    return f"Without action final / unbroken is {text}." + (f" Not broken: seeds {mild}." if mild else "")


def _pool(figures: Sequence[Record]) -> Record:
    return {key: [value for found in figures for value in found[key]] for key in figures[0]}


def _table(found: dict[str, Record]) -> str:
    lines = [
        "| guard | pma_window | optimizer | recovered | final / unbroken: median, mean, worst "
        "| restored runs, restores | first restore after | steps back on trend | excess |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, figures in found.items():
        options = ARMS[arm]
        names = (
            ["-", "-", "no action"]
            if options.action == "warn"
            else [str(options.guard), str(options.pma_window), str(options.optimizer)]
        )
        if arm == arm_name(*DEFAULT):
            names = [f"**{name}**" for name in names]
        lines.append(f"| {' | '.join([*names, *_cells(figures)])} |")
    return "\n".join(lines)


def _cells(figures: Record) -> list[str]:
    ratios = [math.inf if r is None else r for r in figures["final_to_unbroken"]]
    share = statistics.fmean(figures["recovered"])
    count = sum(n > 0 for n in figures["restores"])
    return [
        f"{100 * share:.0f} %",
        f"{_number(statistics.median(ratios))}, {_number(statistics.fmean(ratios))}, {_number(max(ratios))}",
        f"{count} of {len(ratios)}, {sum(figures['restores'])}",
        _median(figures["delay"]),
        _median(figures["steps_back_on_trend"], count),
        _mean_percent(figures["excess_since_restore"]),
    ]


def _number(ratio: float) -> str:
    return f"{ratio:.3f}" if math.isfinite(ratio) else "∞"


def _median(steps: Sequence[int | None], out_of: int | None = None) -> str:
    """The median, and of how many if not of all; those that never come back count as the longest."""
    known = sorted(s for s in steps if s is not None)
    total = len(known) if out_of is None else out_of
    if not known:
        return "never" if total else "-"
    padded = [*map(float, known), *[math.inf] * (total - len(known))]
    middle = statistics.median_low(padded)
    text = f"{middle:.0f}" if math.isfinite(middle) else "never"
    return text if total == len(known) else f"{text} ({len(known)} of {total})"


def _mean_percent(shares: Sequence[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{100 * statistics.fmean(known):.2f} %" if known else "-"


def _marginals(found: dict[str, Record]) -> str:
    """Each option's values alone, averaged over the others."""
    lines = [
        "| option | value | recovered | mean final / unbroken of the finite | steps back on trend | excess |",
        "|---|---|---|---|---|---|",
    ]
    for option, values in (("guard", GUARDS), ("pma_window", WINDOWS), ("optimizer", POLICIES)):
        for value in values:
            arms = [a for a, o in ARMS.items() if o.action == "restore" and getattr(o, option) == value]
            if not (known := [found[arm] for arm in arms if arm in found]):
                continue
            pooled = _pool(known)
            ratios = [r for r in pooled["final_to_unbroken"] if r is not None]
            restored = sum(n > 0 for n in pooled["restores"])
            lines.append(
                f"| {option} | {value} | {100 * statistics.fmean(pooled['recovered']):.0f} % "
                f"| {statistics.fmean(ratios):.4f} | {_median(pooled['steps_back_on_trend'], restored)} "
                f"| {_mean_percent(pooled['excess_since_restore'])} |"
            )
    return "\n".join(lines)


# --- the command line ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache", type=Path, help="folder of the runs; an interrupted benchmark goes on there"
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="two seeds")
    parser.add_argument("--kinds", nargs="+", default=list(CAUSES), choices=[*CAUSES, *EXTRA])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--arms", choices=["all", "default", "none"], default="all")
    parser.add_argument("--name", default="spike_guard", help="of the JSON among the results")
    parser.add_argument("--table", action="store_true", help="only make the tables again from that JSON")
    options = parser.parse_args()
    if not options.table:
        print(measure(options))
    text = tables(json.loads((RESULTS / f"{options.name}.json").read_text()))
    (RESULTS / f"{options.name}.md").write_text(text + "\n")
    print(text)


def measure(options: argparse.Namespace) -> Path:
    """Runs what is missing, and writes the figures."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # matrices this small take longer with it
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("merge_callback").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seeds = 2 if options.quick else options.seeds
    chosen = {"all": list(ARMS), "default": ["no action", arm_name(*DEFAULT)], "none": ["no action"]}
    arms = chosen[options.arms]
    with tempfile.TemporaryDirectory() as name:
        cache = Cache(options.cache or Path(name))
        for seed, model in itertools.product(range(seeds), options.models):
            run_seed(cache, model, seed, options.kinds, arms)
        figures = collect(cache, options.models, options.kinds, arms, seeds)
    causes = {kind: str((CAUSES | EXTRA)[kind].__doc__) for kind in options.kinds}
    return write(options.name, {"plan": asdict(PLAN), "causes": causes, "seeds": seeds, **figures})


if __name__ == "__main__":
    main()
