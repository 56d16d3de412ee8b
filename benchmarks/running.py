"""What a running average costs at a step, against other ways to keep one.

    python -m benchmarks.running [--rounds 40]

* **torchtitan's**: one ``_foreach_lerp_`` over all parameters, whose lists are made once.
* **Lightning's**: what ``EMAWeightAveraging`` does in each step.
* **ours**: all of the hook, from the question whether an update is due to the end of the update.

The ways take turns within each round, on models of few and many tensors, and so does a step of ``AdamW``;
quoted are medians, and ratios to torchtitan's in the same run. Memory is what a fresh process takes besides
the model: while it averages, and the most while a snapshot of the average is made, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.record import write
from merge_callback import CheckpointMerger, RunningEma, SpikeOptions
from merge_callback.demo.gpt import GPT, GPTConfig

DECAY = 0.999
Update = Callable[[], object]


def models() -> dict[str, Callable[[], nn.Module]]:
    """Models of few and many tensors."""
    many = [nn.Linear(64, 64) for _ in range(1000)]
    return {
        "demo (0.12M, 19 tensors)": GPT,
        "GPT (25M, 67 tensors)": lambda: GPT(GPTConfig(width=512, layers=8, heads=8)),
        "many (4M, 2,000 tensors)": lambda: nn.Sequential(*many),
        "GPT in bf16 (25M, 67 tensors)": lambda: GPT(GPTConfig(width=512, layers=8, heads=8)).bfloat16(),
    }


def torchtitans(model: nn.Module, stack: ExitStack) -> Update:
    """A per-step ``_foreach_lerp_``; of narrow parameters it widens a copy first, as averages are fp32."""
    live = [p.detach() for p in model.parameters()]
    averages = [p.detach().float().clone() for p in live]
    is_narrow = any(p.dtype != torch.float32 for p in live)

    def update() -> None:
        sources = [p.float() for p in live] if is_narrow else live
        torch._foreach_lerp_(averages, sources, 1 - DECAY)

    return update


def lightnings(model: nn.Module, stack: ExitStack) -> Update:
    """What ``EMAWeightAveraging`` calls; it has averages of the model's own dtype."""
    given = EMAWeightAveraging(decay=DECAY)
    average = AveragedModel(model, use_buffers=True, **given._kwargs)
    average.update_parameters(model)
    return lambda: average.update_parameters(model)


def ours(model: nn.Module, stack: ExitStack) -> Update:
    """The hook of a session."""
    session = begun(model, stack)[0]._session
    assert session is not None
    assert session.running is not None

    def update() -> None:
        assert session.running is not None
        session.progress.step += 1
        if session.running.is_due(session.progress.step):
            session._update_averages()

    return update


def begun(model: nn.Module, stack: ExitStack) -> tuple[CheckpointMerger, torch.optim.Optimizer]:
    """A merger of which nothing but the running average is asked, after a first step."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    merger = CheckpointMerger(
        model,
        optimizer,
        dirpath=folder,
        every_n_steps=10**9,
        emit_every=0,
        running=[RunningEma(decay=DECAY)],
        spike=SpikeOptions(action="off"),
    )
    merger.step()
    stack.callback(merger._end, lambda session: session.close())
    return merger, optimizer


WAYS = {"torchtitan": torchtitans, "Lightning": lightnings, "ours": ours}


def adamw(model: nn.Module) -> Update:
    """A step of ``AdamW``, for comparison."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return optimizer.step


def times(build: Callable[[], nn.Module], rounds: int) -> dict[str, float]:
    """The median milliseconds of each way, and of an optimizer step; they take turns."""
    with ExitStack() as stack:
        model = build()
        updates: dict[str, Update] = {name: way(model, stack) for name, way in WAYS.items()}
        updates["AdamW"] = adamw(model)
        found: dict[str, list[float]] = {name: [] for name in updates}
        for index in range(rounds + 3):
            for name, update in updates.items():
                begin = time.perf_counter()
                update()
                if index >= 3:
                    found[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in found.items()}


def memory(build: Callable[[], nn.Module]) -> dict[str, dict[str, float]]:
    """Bytes per parameter that each way takes besides the model: held, and at most."""
    return {name: forked(lambda way=way: bytes_of(build, way)) for name, way in WAYS.items()}  # type: ignore[misc]


def bytes_of(
    build: Callable[[], nn.Module], way: Callable[[nn.Module, ExitStack], Update]
) -> dict[str, float]:
    """What one way takes in this process."""
    model = build()
    count = sum(p.numel() for p in model.parameters())
    with ExitStack() as stack:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        update = way(model, stack)
        for _ in range(3):
            update()
        held = resident("VmRSS") - before
        most = resident("VmHWM") - before
    return {"held": held / count, "most": most / count}


def resident(key: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def forked(function: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What a function returns in a process of its own, whose memory is not what others left behind."""
    read, written = os.pipe()
    if os.fork() == 0:
        os.write(written, repr(function()).encode())
        os._exit(0)
    os.close(written)
    with open(read, "rb") as pipe:
        found: dict[str, float] = eval(pipe.read())  # our own child's
    os.wait()
    return found


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    built = models()
    held = memory(built["GPT (25M, 67 tensors)"])  # first: this process is still small
    rows: list[dict[str, Any]] = []
    for name, build in built.items():
        found = times(build, parsed.rounds)
        rows.append({"model": name, "ms": found, "ratio": found["ours"] / found["torchtitan"]})
        print(name, {key: round(value, 3) for key, value in found.items()}, f"ratio {rows[-1]['ratio']:.3f}")
    print("bytes per parameter", held)
    print(write("running", {"rounds": parsed.rounds, "rows": rows, "bytes_per_parameter": held}))


if __name__ == "__main__":
    main()
