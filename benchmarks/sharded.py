"""What the callback keeps, sends and holds up on each of 1, 2 and 4 ranks, under DDP and FSDP2.

    python benchmarks/sharded.py

Real Trainers in real processes, over gloo on this machine's CPU, one thread each. Every setting is trained
three times in fresh processes: without the callback; with the window in host memory, all that is sent being
counted; and with the window on disk, all stages being timed. The ranks meet before whatever is timed, so that
no figure holds a wait for a rank whose training step took longer. Beside them stand, from the same processes
and by all ranks at once, a copy, a hash and a durable write of the bytes that a rank keeps of a snapshot.

Where there are more ranks than cores they share them: bytes and memory alone tell of a cluster then.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from metering import Event, Meter
from projection import project
from record import QUIET, write
from torch import Tensor
from torch.utils.data import DataLoader

from merge_callback import CheckpointMergeCallback
from merge_callback.demo.gpt import GPTConfig
from merge_callback.demo.module import DemoModule
from merge_callback.demo.schedule import WSDSchedule
from merge_callback.engine.emissions import Emissions
from merge_callback.engine.session import MergeSession
from merge_callback.engine.snapshot_pipeline import SnapshotPipeline
from merge_callback.merging import resolve_method
from merge_callback.publish.export import Exporter
from merge_callback.sharding import Ranks
from merge_callback.snapshots.snapshot_files import ShardedFiles, SnapshotFiles
from merge_callback.snapshots.storage import SnapshotStore
from merge_callback.snapshots.window import Window
from merge_callback.snapshots.window_merger import WindowMerger
from merge_callback.trainers.lightning import merged_validation
from merge_callback.trainers.lightning.merged_validation import MergedValidation

SETTINGS = ((1, "alone"), (2, "ddp"), (2, "fsdp2"), (4, "ddp"), (4, "fsdp2"))
WINDOW = 3
TIMED = 5  # snapshots of the full window, and repeats of everything else
INTERVALS = {"plain": 1, "counted": 2, "timed": 1}  # optimizer steps between snapshots and validations
SNAPSHOTS = {"plain": 5, "counted": WINDOW + 1, "timed": WINDOW - 1 + TIMED}
MEBI = 1 << 20

HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")

STAGES: Mapping[tuple[Any, str], str] = {
    (SnapshotStore, "capture"): "capture",
    (SnapshotFiles, "write_own"): "write",
    (ShardedFiles, "commit"): "manifest",
    (Window, "_commit"): "manifest",
    (WindowMerger, "measure"): "merge",
    (SnapshotPipeline, "_emit"): "emit",
    (merged_validation, "validate_with"): "validation",
    (Ranks, "exchange"): "exchange",
    (Ranks, "from_first"): "exchange",
    (Ranks, "total"): "exchange",
}
"""What is timed apart; what is left of an event is "other". Its exchanges' bytes are a stage's own."""


# In a rank.


class Metered(CheckpointMergeCallback):
    """The callback, every hook on the step path an event of its own."""

    meter: Meter


def _metered(name: str) -> Any:
    def hook(self: Metered, trainer: Trainer, *args: Any) -> None:
        # In the first step the ranks agree on whether tokens can be counted.
        first = trainer.global_step == 0 or (trainer.global_step == 1 and name == HOOKS[-1])
        with self.meter.event("first step" if first else "step"):
            getattr(CheckpointMergeCallback, name)(self, trainer, *args)

    return hook


for _name in HOOKS:
    setattr(Metered, _name, _metered(_name))


def watch(meter: Meter) -> None:
    """Has the callback's work metered from now on, in this process."""
    for (owner, name), stage in STAGES.items():
        meter.wrap(owner, name, stage, sends=stage != "exchange")
    take, keep, publish = MergeSession.take_snapshot, SnapshotPipeline._keep, Emissions._publish
    update = MergedValidation.update

    def take_snapshot(self: MergeSession) -> None:
        _meet(self.ranks, meter)
        with meter.event("stall"):
            take(self)
        self.background.drain()  # else it would compete with what comes next

    def kept(self: SnapshotPipeline, *args: Any) -> None:
        with meter.event("snapshot"):
            keep(self, *args)

    def published(self: Emissions, *args: Any) -> None:
        with meter.event("emission"):
            publish(self, *args)

    def validate(self: MergedValidation, merge: Any) -> None:
        _meet(self.sharding.ranks, meter)
        with meter.event("evaluation"):
            update(self, merge)

    MergeSession.take_snapshot, SnapshotPipeline._keep = take_snapshot, kept  # type: ignore[method-assign]
    Emissions._publish, MergedValidation.update = published, validate  # type: ignore[method-assign]


def _meet(ranks: Ranks, meter: Meter) -> None:
    if ranks.group is not None and not meter.count:  # there it would be counted
        dist.barrier(ranks.group)


class Finale(Callback):
    """After the last step: restores, merges by two methods, and the floors."""

    def __init__(self, merging: Metered, done: Path) -> None:
        self.merging, self.done = merging, done
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        session, meter = self.merging.session, self.merging.meter
        if trainer.global_step != trainer.max_steps or session is None or session.spikes is None:
            return
        store, window, ranks = session.window.store, session.window, session.ranks
        self.found = {"arena": store.layout.nbytes, "whole": store.whole.nbytes}
        self.found["tensors"] = len(store.whole.names)
        for _ in range(TIMED):
            _meet(ranks, meter)
            with meter.event("restore"):
                session.spikes.policy.recovery.restore(window.segment()[-3:], session.progress.step, 1.0)
        self.done.touch()  # what follows is not the callback's memory
        self._emit_distributed(session)
        for name in ("sma", "ties"):
            merger = WindowMerger(window, {"stable": resolve_method(name)}, session.merger.lag)
            for _ in range(1 if meter.count else 3):
                _meet(ranks, meter)
                with meter.event(name):
                    merger.measure(session.live(), merge=True)
        if store.folder is not None and not meter.count:
            file = store.files.path(window.snapshots[-1])
            self.found["file"] = file.stat().st_size
            self.found["floors"] = floors(store.layout.nbytes, store.folder.parent, ranks)

    def _emit_distributed(self, session: MergeSession) -> None:
        """Publishes the merge as all ranks do it at once."""
        merge, keeper = session.merger.current(session.live()), session.pipeline
        assert merge is not None
        for _ in range(3):
            exporter = Exporter(keeper.publisher, session.sharding, keeper.naming, keeper.publish_group, True)
            publish = exporter.prepare(merge, {})
            _meet(session.ranks, self.merging.meter)
            with self.merging.meter.event("emission as dcp"):
                publish()


def floors(size: int, folder: Path, ranks: Ranks) -> dict[str, float]:
    """Seconds of a copy, a hash and a durable write of ``size`` bytes, by all ranks at once.

    Also seconds a byte and a message of sending to the first rank, over the callback's own group.
    """
    source = torch.randint(255, (size,), dtype=torch.uint8)
    target, view = torch.empty_like(source), memoryview(source.numpy())
    found = {
        "copy": timed(lambda: target.copy_(source), ranks),
        "hash": timed(lambda: hashlib.sha256(view), ranks),
        "write": timed(lambda: write_once(folder / f"floor-{ranks.rank}", view), ranks),
    }
    if ranks.group is not None:
        large, small = torch.empty(8 * MEBI, dtype=torch.uint8), torch.empty(4096, dtype=torch.uint8)
        found["send a byte"] = timed(lambda: to_first(large, 4, ranks), ranks) / (4 * large.numel())
        found["send a message"] = timed(lambda: to_first(small, 200, ranks), ranks) / 200
    return found


def timed(job: Callable[[], object], ranks: Ranks) -> float:
    seconds = []
    for _ in range(TIMED):
        _meet(ranks, Meter(count=False))
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def write_once(path: Path, view: memoryview) -> None:
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(view), 16 * MEBI):
            file.write(view[start : start + 16 * MEBI])
        os.fsync(file.fileno())
    path.unlink()


def to_first(tensor: Tensor, count: int, ranks: Ranks) -> None:
    """The last rank sends to the first one; the others look on."""
    for _ in range(count if ranks.rank in (0, ranks.size - 1) else 0):
        if ranks.is_first:
            dist.recv(tensor, ranks.size - 1, group=ranks.group)
        else:
            dist.send(tensor, 0, group=ranks.group)


class Tokens:
    """Random ones: what they are does not matter here."""

    def __init__(self, gpt: GPTConfig, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batches = torch.randint(256, (count, 1, gpt.context), generator=generator)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.batches[index], "labels": self.batches[index]}


STRATEGIES: Mapping[str, Callable[[int], Any]] = {
    "alone": lambda ranks: "auto",
    "ddp": lambda ranks: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda ranks: ModelParallelStrategy(ranks, 1, process_group_backend="gloo"),
}


def train(rank: int, ranks: int, strategy: str, mode: str, folder: Path, gpt: GPTConfig) -> dict[str, Any]:
    """One fit; what was found in it."""
    torch.manual_seed(0)
    steps = INTERVALS[mode] * SNAPSHOTS[mode]
    meter, callbacks = Meter(count=mode == "counted"), []
    if mode != "plain":
        watch(meter)
        merging = Metered(
            WINDOW,
            every_n_steps=INTERVALS[mode],
            method="sma",
            storage="cpu" if meter.count else "disk",
            dirpath=folder / "merges",
        )
        merging.meter = meter
        callbacks = [merging, Finale(merging, folder / "done")]
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy](ranks),
        max_steps=steps,
        val_check_interval=INTERVALS[mode],
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **QUIET,
    )
    module = DemoModule(gpt, WSDSchedule(warmup=0, stable=100 * steps, decay=0), learning_rate=1e-4)
    batches, validation = Tokens(gpt, steps, seed=rank), Tokens(gpt, 1, seed=99)
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(validation, batch_size=None))
    return {**(callbacks[1].found if callbacks else {}), "events": meter.events}


def run_rank(rank: int, ranks: int, strategy: str, mode: str, folder: Path, gpt: GPTConfig) -> None:
    """All of a process: results go to a file, what it prints to another."""
    ctypes.CDLL(None).mallopt(-3, MEBI)  # M_MMAP_THRESHOLD: what is freed is not counted
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if ranks > 1:
            os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks))
            dist.init_process_group(
                "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks
            )
        torch.save(train(rank, ranks, strategy, mode, folder, gpt), folder / f"rank{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # no exit handler may wait for the other ranks
    os._exit(0)


# In the first process.


def run(ranks: int, strategy: str, mode: str, gpt: GPTConfig) -> list[dict[str, Any]]:
    """What each rank found, and its anonymous memory at most."""
    with tempfile.TemporaryDirectory() as name:
        folder, fork = Path(name), multiprocessing.get_context("fork")
        processes = [
            fork.Process(target=run_rank, args=(rank, ranks, strategy, mode, folder, gpt))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        peaks = peak_memory([process.pid for process in processes], folder / "done", processes)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
            logs = [log.read_text() for log in sorted(folder.glob("*.log"))]
            raise SystemExit("\n".join([f"{ranks} ranks, {strategy}, {mode} failed", *logs])[-5000:])
        found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
    return [{**one, "peak": peak} for one, peak in zip(found, peaks, strict=True)]


def peak_memory(pids: Sequence[int | None], done: Path, processes: Sequence[Any]) -> list[int]:
    """The most anonymous memory of each until ``done`` exists; waits for all to end, or one to fail."""
    peaks = [0] * len(pids)
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        if not done.exists():
            peaks = [max(peak, anonymous(pid)) for peak, pid in zip(peaks, pids, strict=True)]
        time.sleep(0.005)
    return peaks


def anonymous(pid: int | None) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def measure(ranks: int, strategy: str, gpt: GPTConfig) -> dict[str, Any]:
    """Everything about one setting."""
    plain, counted, timed_ = (run(ranks, strategy, mode, gpt) for mode in ("plain", "counted", "timed"))
    above = {
        storage: [one["peak"] - base["peak"] for one, base in zip(found, plain, strict=True)]
        for storage, found in (("cpu", counted), ("disk", timed_))
    }
    return {
        "ranks": ranks,
        "strategy": strategy,
        "bytes_of_model": timed_[0]["whole"],
        "tensors": timed_[0]["tensors"],
        "arena_bytes": [one["arena"] for one in timed_],
        "file_bytes": [one["file"] for one in timed_],
        "peak_anon_bytes_above_plain": above,
        "snapshot_stall_seconds": statistics.median(slowest(timed_, "stall")),
        "snapshot_seconds_beside_training": statistics.median(slowest(timed_, "snapshot")),
        "snapshot_stage_seconds_on_rank_0": stages(timed_[0]["events"], "stall")
        | stages(timed_[0]["events"], "snapshot"),
        "emission_seconds": {
            name: statistics.median(slowest(timed_, name)) for name in ("emission", "emission as dcp")
        },
        "swap_seconds": statistics.median(slowest(timed_, "evaluation", "other")),
        "restore_seconds": statistics.median(slowest(timed_, "restore")),
        "merge_seconds": {name: statistics.median(slowest(timed_, name)) for name in ("sma", "ties")},
        "floor_seconds": {name: max(one["floors"][name] for one in timed_) for name in timed_[0]["floors"]},
        "sent_by_each_rank": [sent(one["events"]) for one in counted],
    }


def last(events: Iterable[Event], name: str) -> list[Event]:
    """The last few of a name: those of a full window."""
    return [event for event in events if event.name == name][-TIMED:]


def slowest(found: Sequence[Mapping[str, Any]], name: str, stage: str = "") -> list[float]:
    """Seconds of each event, or of one stage of it, on the rank that took longest."""
    by_rank = [
        [event.seconds[stage] if stage else event.stall for event in last(one["events"], name)]
        for one in found
    ]
    return [max(seconds) for seconds in zip(*by_rank, strict=True)]


def stages(events: Sequence[Event], name: str) -> dict[str, float]:
    found = last(events, name)
    names = dict.fromkeys(stage for event in found for stage in event.seconds)
    return {stage: statistics.median(event.seconds[stage] for event in found) for stage in names}


def sent(events: Sequence[Event]) -> dict[str, Any]:
    """Bytes and calls of a rank: of each optimizer step on average, of one of the other events."""
    found: dict[str, Any] = {}
    for name in ("step", "snapshot", "emission", "emission as dcp", "evaluation", "restore", "sma", "ties"):
        ones = [event for event in events if event.name == name]
        ones, over = (ones, len(ones) / len(HOOKS)) if name == "step" else (ones[-1:], 1)
        parts = {stage for event in ones for stage in event.wire} - {"validation"}
        found[name] = {
            "payload": {p: sum(event.payload[p] for event in ones) / over for p in sorted(parts)},
            "wire": {p: sum(event.wire[p] for event in ones) / over for p in sorted(parts)},
            "calls": {
                call: sum(event.calls[call] for event in ones) / over
                for call in sorted({call for event in ones for call in event.calls})
            },
        }
    return found


def show(settings: Sequence[Mapping[str, Any]]) -> None:
    print(
        "\nkept by a rank: share of the model x ranks; memory above training's in models (mean of the ranks)"
    )
    for s in settings:
        arena, file = (
            max(s[key]) * s["ranks"] / s["bytes_of_model"] for key in ("arena_bytes", "file_bytes")
        )
        cpu, disk = (max(s["peak_anon_bytes_above_plain"][k]) / s["bytes_of_model"] for k in ("cpu", "disk"))
        print(f"{_name(s)} arena {arena:6.3f}  file {file:6.3f}   memory: cpu {cpu:5.2f}  disk {disk:5.2f}")
    print("\na snapshot (ms): stall and beside training on the slowest rank, rank 0 by stage, floors")
    for s in settings:
        parts = s["snapshot_stage_seconds_on_rank_0"] | {f"[{k}]": v for k, v in s["floor_seconds"].items()}
        text = "  ".join(f"{k} {1e3 * v:.1f}" for k, v in parts.items() if k != "[send a byte]")
        stall, beside = s["snapshot_stall_seconds"], s["snapshot_seconds_beside_training"]
        print(f"{_name(s)} {1e3 * stall:7.1f} {1e3 * beside:7.1f}: {text}")
    print("\nsent, payload/wire bytes: the rank that sends most, and its calls")
    for s in settings[1:]:
        for name in s["sent_by_each_rank"][0]:
            one = max(s["sent_by_each_rank"], key=lambda rank: sum(rank[name]["wire"].values()))[name]
            parts = [f"{p} {one['payload'][p]:,.0f}/{one['wire'][p]:,.0f}" for p in one["wire"]]
            calls = ", ".join(f"{number:g} {call}" for call, number in one["calls"].items())
            print(f"{_name(s)} {name:15} {'; '.join(parts)}   ({calls})")
    print("\nother times (ms), and ratios to one process")
    for s in settings:
        times, base = (
            {
                "swap": one["swap_seconds"],
                "restore": one["restore_seconds"],
                **one["merge_seconds"],
                **one["emission_seconds"],
            }
            for one in (s, settings[0])
        )
        print(_name(s), "  ".join(f"{k} {1e3 * v:7.1f} (x{v / base[k]:.2f})" for k, v in times.items()))


def table(settings: Sequence[Mapping[str, Any]]) -> None:
    """The table of ``docs/distributed.md``."""
    lines: dict[str, list[str]] = {
        "kept by a rank, of the model": [
            f"{max(s['file_bytes']) / s['bytes_of_model']:.3f}" for s in settings
        ],
        "host memory above training's, in models": [
            f"{statistics.mean(s['peak_anon_bytes_above_plain']['disk']) / s['bytes_of_model']:.2f}"
            for s in settings
        ],
    }
    for what, name in {
        "sent by a rank for a step, bytes": "step",
        "a snapshot, with a weighted sum": "snapshot",
        "a TIES merge": "ties",
        "a merged evaluation": "evaluation",
        "an emission": "emission",
    }.items():
        most = [max(sum(rank[name]["payload"].values()) for rank in s["sent_by_each_rank"]) for s in settings]
        lines[what] = [f"{size:,.0f}" if size < 1e5 else f"{size / 1e6:,.1f}e6" for size in most]
    times = {
        "stall of a snapshot, ms": [s["snapshot_stall_seconds"] for s in settings],
        "kept and merged, beside training": [s["snapshot_seconds_beside_training"] for s in settings],
        "of it hash, write and fsync": [s["snapshot_stage_seconds_on_rank_0"]["write"] for s in settings],
        "swap of a merged evaluation": [s["swap_seconds"] for s in settings],
        "a restore": [s["restore_seconds"] for s in settings],
        "a TIES merge, ms": [s["merge_seconds"]["ties"] for s in settings],
        "an emission as safetensors, beside training": [s["emission_seconds"]["emission"] for s in settings],
        "as dcp": [s["emission_seconds"]["emission as dcp"] for s in settings],
    }
    lines |= {what: [f"{1e3 * seconds:,.0f}" for seconds in row] for what, row in times.items()}
    print("\n| | " + " | ".join(f"{s['ranks']} {s['strategy']}" for s in settings) + " |")
    print("|---" * (len(settings) + 1) + "|")
    for what, row in lines.items():
        print(f"| {what} | " + " | ".join(row) + " |")


def _name(setting: Mapping[str, Any]) -> str:
    return f"{setting['ranks']} {setting['strategy']:6}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--no-record", action="store_true", help="leave the recorded results as they are")
    options = parser.parse_args()
    for module in ("sharding.shards", "publish.distributed"):  # what they import is not the window's memory
        import_module(f"merge_callback.{module}")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    gpt = GPTConfig(context=64, width=options.width, layers=options.layers, heads=options.width // 64)
    load = os.getloadavg()[0]
    settings = []
    for ranks, strategy in SETTINGS:
        start = time.perf_counter()
        settings.append(measure(ranks, strategy, gpt))
        print(f"{ranks} {strategy}: {time.perf_counter() - start:.0f} s", flush=True)
    show(settings)
    table(settings)
    figures = {
        "window": WINDOW,
        "snapshots_timed": TIMED,
        "load_before": load,
        "settings": settings,
        "projection": project(settings[2], WINDOW),  # FSDP2, a core for each rank
    }
    if not options.no_record:
        print(write("sharded", figures))


if __name__ == "__main__":
    main()
