"""How fast snapshots are merged and measured, beside what else adds tensors and what the memory can do.

    python benchmarks/reduce.py                                 # an hour on two cores, 16 GB of memory
    python benchmarks/reduce.py --counts 10 --dtypes float32 --gigabytes 4 --rounds 3 --no-compile  # a minute
    python benchmarks/reduce.py --device cuda --gigabytes 60

The equally weighted mean of N flat snapshots, far more than any cache holds, into memory that is there. All
variants run in turn within each round, so that a machine whose speed drifts slows all of them alike; quoted
is the median over rounds. A weighted sum counts as N reads and one write, whatever a variant really moves.

The read bandwidth is that of PyTorch's `sum` or `dot` over each snapshot in turn, whichever is faster: they
read one stream and write nothing. "Apart" is what is done where merge and diversity are two things: the mean,
then for each tensor of the newest and the oldest snapshot subtract, square and sum. Peers work on tensors of
2^24 elements (a 4096 x 4096 matrix), as on a model's: `stack` of whole snapshots would double the memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from record import write
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from merge_callback.merging import Inputs, Ties, Trajectory
from merge_callback.reduce import blocks, compiled, one_pass

TENSOR = 1 << 24
GIGA = 1e9
SUMS = 8  # weighted sums that are made of one read
SPARE = (
    5 + SUMS
)  # snapshots' worth of memory beside the N: outputs, fp32 total of bf16, AveragedModel's, more


class Variant(NamedTuple):
    """Something to time: ``group`` is the table it stands in, ``moved`` the bytes it counts for."""

    group: str
    name: str
    run: Callable[[], object]
    moved: int


class Snapshots:
    """N flat snapshots in memory that has been written to, and an output."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, budget: float) -> None:
        item = torch.empty((), dtype=dtype).element_size()
        self.size = max(1, int(budget / item / (count + SPARE)) // TENSOR) * TENSOR
        base = torch.randn(TENSOR, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        self.flat = [torch.empty(self.size, dtype=dtype, device=device) for _ in range(count)]
        for i, flat in enumerate(self.flat):
            for k, tensor in enumerate(flat.split(TENSOR)):
                torch.mul(base, 1 + 0.01 * i + 0.1 * k, out=tensor)
        self.out = torch.zeros(self.size, dtype=dtype, device=device)
        # bf16 is summed in fp32 here, as by us.
        narrow = dtype != torch.float32
        self.total = torch.zeros(self.size, dtype=torch.float32, device=device) if narrow else self.out
        self.outs = [torch.zeros(self.size, dtype=dtype, device=device) for _ in range(SUMS)]
        self.rows = [[(1 + (i + k) % 3) / (2 * count) for i in range(count)] for k in range(SUMS)]
        self.tensors = [flat.split(TENSOR) for flat in self.flat]
        self.weights = [1 / count] * count
        self.contrast = [-1.0, *[0.0] * (count - 2), 1.0]
        self.bytes = self.size * item

    def finish(self) -> None:
        """Casts the total into the output, where it is not the output."""
        if self.total is not self.out:
            self.out.copy_(self.total)


def bandwidths(s: Snapshots) -> list[Variant]:
    # Any dtype as fp32 and in whole words: what is measured is reading, not widening.
    words = [flat.view(torch.float32) for flat in s.flat]
    read = s.bytes * len(s.flat)
    return [
        Variant("bandwidth", "read: sum", lambda: [w.sum() for w in words], read),
        Variant("bandwidth", "read: dot", lambda: [torch.dot(w, w) for w in words], read),
        Variant("bandwidth", "copy", lambda: [s.out.copy_(f) for f in s.flat], 2 * read),
    ]


def merges(s: Snapshots, compiled_sum: Callable[[], object] | None) -> list[Variant]:
    moved = s.bytes * (len(s.flat) + 1)
    averaged = Averaged(s)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: one_pass(s.flat, s.weights, s.out),
        "our eager blocks": lambda: blocks.one_pass(s.flat, s.weights, s.out, None, ()),
        "running add_": lambda: running_add(s),
        "_foreach_add_": lambda: foreach_add(s),
        "stack().mean": lambda: stack_mean(s),
        "AveragedModel": averaged,
    }
    if compiled_sum is not None:
        runs["torch.compile"] = compiled_sum
    return [Variant("merge", name, run, moved) for name, run in runs.items()]


def merges_with_diversity(s: Snapshots) -> list[Variant]:
    moved, ends = s.bytes * (len(s.flat) + 1), [s.size]
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: one_pass(s.flat, s.weights, s.out, s.contrast, ends),
        "our eager blocks": lambda: blocks.one_pass(s.flat, s.weights, s.out, s.contrast, ends),
        "apart: running add_, difference": lambda: (running_add(s), squared_distance(s)),
        "apart: stack().mean, difference": lambda: (stack_mean(s), squared_distance(s)),
    }
    return [Variant("merge + diversity", name, run, moved) for name, run in runs.items()]


def several_merges(s: Snapshots) -> list[Variant]:
    """K weighted sums; what is counted are N reads and K writes."""
    moved, ends = s.bytes * (len(s.flat) + SUMS), [s.size]
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: one_pass(s.flat, s.rows, s.outs),
        "ours, with diversity": lambda: one_pass(s.flat, s.rows, s.outs, s.contrast, ends),
        "one after another": lambda: [
            one_pass(s.flat, row, out) for row, out in zip(s.rows, s.outs, strict=True)
        ],
    }
    return [Variant(f"{SUMS} merges", name, run, moved) for name, run in runs.items()]


def ties(s: Snapshots) -> list[Variant]:
    inputs, trajectory = Inputs("flat", s.flat), Trajectory.even(len(s.flat))
    run = lambda: Ties().merge(inputs, s.out, trajectory)  # noqa: E731
    return [Variant("ties", "ours", run, s.bytes * (len(s.flat) + 1))]


def running_add(s: Snapshots) -> None:
    torch.mul(s.flat[0], s.weights[0], out=s.total)
    for flat, weight in zip(s.flat[1:], s.weights[1:], strict=True):
        s.total.add_(flat, alpha=weight)
    s.finish()


def foreach_add(s: Snapshots) -> None:
    totals = s.total.split(TENSOR)
    torch._foreach_zero_(totals)
    for tensors, weight in zip(s.tensors, s.weights, strict=True):
        torch._foreach_add_(totals, tensors, alpha=weight)
    s.finish()


def stack_mean(s: Snapshots) -> None:
    for out, *tensors in zip(s.out.split(TENSOR), *s.tensors, strict=True):
        out.copy_(torch.stack(tensors).mean(0))


def squared_distance(s: Snapshots) -> Tensor:
    pairs = zip(s.tensors[0], s.tensors[-1], strict=True)
    return torch.stack([(new.float() - old.float()).square().sum() for old, new in pairs]).cpu()


class Averaged:
    """``AveragedModel`` updated with each snapshot in turn, in the snapshots' dtype."""

    def __init__(self, s: Snapshots) -> None:
        self.models = [nn.ParameterList(nn.Parameter(t, False) for t in tensors) for tensors in s.tensors]
        self.average = AveragedModel(self.models[0])

    def __call__(self) -> None:
        self.average.n_averaged.zero_()
        for model in self.models:
            self.average.update_parameters(model)


def compile_sum(s: Snapshots) -> tuple[Callable[[], object], float]:
    """PyTorch's compiler on the sum, written into the output; and the seconds it takes the first time."""

    def weighted_sum(sources: Sequence[Tensor], out: Tensor) -> None:
        total = sources[0].float() * s.weights[0]
        for source, weight in zip(sources[1:], s.weights[1:], strict=True):
            total = total + source.float() * weight
        out.copy_(total)

    torch._dynamo.reset()
    built = torch.compile(weighted_sum, dynamic=False)
    start = time.perf_counter()
    built(s.flat, s.out)
    synchronize(s.out.device)
    return lambda: built(s.flat, s.out), time.perf_counter() - start


def check(s: Snapshots, variants: Sequence[Variant]) -> None:
    """All merges are the same but for rounding: each in a few places of every tensor."""
    places = torch.arange(0, s.size, 999_983, device=s.out.device)
    exact = sum(w * flat[places].double() for w, flat in zip(s.weights, s.flat, strict=True))
    tolerance = 1e-2 if s.out.dtype == torch.bfloat16 else 1e-5
    for variant in variants:
        if variant.group.startswith("merge") and variant.name != "AveragedModel":
            s.out.zero_()
            variant.run()
            torch.testing.assert_close(s.out[places].double(), exact, rtol=tolerance, atol=tolerance)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def measure(s: Snapshots, options: argparse.Namespace) -> dict[str, Any]:
    """All variants in turn, so many rounds; TIES in the first ones only: it takes as long as all others."""
    compiled_sum, compile_seconds = compile_sum(s) if options.compile else (None, None)
    variants = [*bandwidths(s), *merges(s, compiled_sum), *merges_with_diversity(s)]
    check(s, variants)
    variants += [*several_merges(s), *ties(s)]
    times: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for turn in range(options.rounds):
        for variant in variants:
            if variant.group != "ties" or turn < options.ties_rounds:
                times[variant].append(seconds(variant.run, s.out.device))
    return summary(s, {v: t for v, t in times.items() if t}, compile_seconds)


def summary(s: Snapshots, times: dict[Variant, list[float]], compile_seconds: float | None) -> dict[str, Any]:
    rates = {v: [v.moved / t / GIGA for t in spent] for v, spent in times.items()}
    reads = [v for v in times if v.name.startswith("read")]
    read = max(reads, key=lambda v: statistics.median(rates[v]))
    copy = next(v for v in times if v.name == "copy")
    figures: dict[str, Any] = {
        "count": len(s.flat),
        "dtype": str(s.out.dtype).removeprefix("torch."),
        "gigabytes_per_snapshot": round(s.bytes / GIGA, 3),
        "read_by": read.name.removeprefix("read: "),
        "compile_seconds": compile_seconds,
    }
    for v in times:
        row = figures.setdefault(v.group, {}).setdefault(v.name, {})
        row["seconds"] = statistics.median(times[v])
        row["gigabytes_per_second"] = statistics.median(rates[v])
        row["of_read_bandwidth"] = in_each_round(rates[v], rates[read])
        row["of_copy_bandwidth"] = in_each_round(rates[v], rates[copy])
        ours = next(times[o] for o in times if o.group == v.group and o.name in ("ours", "copy"))
        row["times_ours"] = in_each_round(times[v], ours)
    return figures


def in_each_round(values: Sequence[float], others: Sequence[float]) -> float:
    """The median ratio, of values from the same round."""
    return statistics.median(a / b for a, b in zip(values, others, strict=False))


def show(figures: dict[str, Any]) -> None:
    size, count, dtype = (figures[k] for k in ("gigabytes_per_snapshot", "count", "dtype"))
    print(f"\nN = {count}, {dtype}, {size} GB each; read by {figures['read_by']}")
    if figures["compile_seconds"] is not None:
        print(f"  torch.compile took {figures['compile_seconds']:.1f} s the first time")
    for group in ("bandwidth", "merge", "merge + diversity", f"{SUMS} merges", "ties"):
        for name, row in figures.get(group, {}).items():
            slower = "" if group == "bandwidth" else f"   {row['times_ours']:5.2f} x the time of ours"
            rate, share = row["gigabytes_per_second"], 100 * row["of_read_bandwidth"]
            told = f"{rate:7.1f} GB/s  {share:4.0f} % of read {100 * row['of_copy_bandwidth']:4.0f} % of copy"
            print(f"  {group:18} {name:32} {told}{slower}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 10, 15, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--gigabytes", type=float, default=16.0, help="all memory that may be used")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ties-rounds", type=int, default=3)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = parse()
    device = torch.device(options.device)
    settings: list[dict[str, Any]] = []
    backend = "cpu library" if compiled.instructions() else "eager blocks"
    figures = {
        "device": str(device),
        "backend": backend if device.type == "cpu" else "cuda",
        "rounds": options.rounds,
        "ties_rounds": options.ties_rounds,
        "settings": settings,
    }
    for dtype in options.dtypes:
        for count in options.counts:
            snapshots = Snapshots(count, getattr(torch, dtype), device, options.gigabytes * GIGA)
            settings.append(measure(snapshots, options))
            show(settings[-1])
            del snapshots
            written = write("reduce", figures)  # a run that is cut leaves what it has
    print(written)


if __name__ == "__main__":
    main()
