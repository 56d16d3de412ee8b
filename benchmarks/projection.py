"""What a 70B model on 512 GPUs would cost: by the costs that ``sharded.py`` measured, and assumptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

GIGA = 1e9


@dataclass(frozen=True)
class Cluster:
    """What is assumed, not measured: a model, and H100s under FSDP2 with one rank each."""

    parameters: float = 70e9
    tensors: int = 723
    """Of Llama 3 70B."""
    ranks: int = 512
    ranks_per_node: int = 8
    window: int = 10
    tokens_between: float = 4e9
    flops: float = 0.4 * 989e12
    """Of each GPU in training: 40 % of the dense bf16 peak."""
    on_device: float = 1e12
    """Copied within a GPU's memory; an H100 reads and writes 3.3 TB/s."""
    to_host: float = 5e9
    """From a GPU to host memory, all GPUs of a node at once."""
    file_system: float = 100e9
    """Written by all nodes together."""
    message: float = 50e-6
    """From one node to another, over gloo and TCP. (On shared cores the scheduler is what is measured.)"""

    @property
    def seconds_between(self) -> float:
        """At 6 floating-point operations a parameter and token."""
        return self.tokens_between * 6 * self.parameters / (self.flops * self.ranks)


@dataclass(frozen=True)
class Costs:
    """What was measured, with a core for each rank."""

    capture_over_copy: float
    seconds_a_byte_written: float
    seconds_a_byte_merged: float
    seconds_a_byte_emitted: float
    seconds_a_byte_emitted_as_dcp: float
    exchanges: int

    @classmethod
    def of(cls, setting: Mapping[str, Any], window: int) -> Costs:
        """Those of one setting of ``sharded.py``."""
        stages, floors = setting["snapshot_stage_seconds_on_rank_0"], setting["floor_seconds"]
        arena = max(setting["arena_bytes"])
        calls = setting["sent_by_each_rank"][0]["snapshot"]["calls"]
        return cls(
            max(1.0, stages["capture"] / floors["copy"]),
            stages["write"] / arena,
            stages["merge"] / (window * arena),
            setting["emission_seconds"]["emission"] / setting["bytes_of_model"],
            setting["emission_seconds"]["emission as dcp"] / setting["bytes_of_model"] * setting["ranks"],
            round(sum(number for call, number in calls.items() if call not in ("send", "recv"))),
        )


ORIGINS: Mapping[str, str] = {
    "a snapshot, GB": "70e9 parameters x 2 or 4 bytes",
    "of it on each rank, GB": "/ 512; *M* arena and file: 1.00 / ranks",
    "window on each rank, GB": "x 10: files and page cache, host memory, or GPU memory, by `storage`",
    "window on each node, GB": "x 8 ranks",
    "host memory beside it, GB": "x 2: the merge, and the live weights while it is evaluated",
    "GPU memory beside training's, GB": "the staging buffer",
    "**a snapshot holds training up, s**": "*A* 1 TB/s, on the GPU; *M* x {capture:.1f}, tensor by tensor",
    "beside training, to host, s": "*A* 5 GB/s from each GPU",
    "hash and write by a core a rank, s": "*M* {written:.1f} ns a byte",
    "the same at the file system's rate, s": "*A* 100 GB/s for all nodes",
    "merge and diversity of ten, s": "*M* {merged:.2f} ns a byte of the window, one core",
    "exchanges, s": "*M* {exchanges} of them x *A* 511 messages of 50 µs",
    "until it is kept and merged, s": "the sum",
    "share of the interval, %": "/ 8,294 s",
    "to storage on average, MB/s": "a snapshot / 8,294 s; as much again for each emission",
    "emission as safetensors, s": "*M* {emitted:.1f} ns a byte by rank 0, *A* messages: 723 x 511",
    "emission as dcp, s": "*M* {dcp:.1f} ns a byte by each rank, *A* 100 GB/s",
}
"""Where each line comes from: *M* is measured, *A* assumed, the rest arithmetic."""


def project(setting: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The costs, the assumptions and what follows, for weights of 2 and of 4 bytes; prints it as a table."""
    costs, cluster = Costs.of(setting, window), Cluster()
    columns = {name: follows(costs, cluster, size) for name, size in (("bf16", 2), ("fp32", 4))}
    figures = {
        "capture": costs.capture_over_copy,
        "written": 1e9 * costs.seconds_a_byte_written,
        "merged": 1e9 * costs.seconds_a_byte_merged,
        "emitted": 1e9 * costs.seconds_a_byte_emitted,
        "dcp": 1e9 * costs.seconds_a_byte_emitted_as_dcp,
        "exchanges": costs.exchanges,
    }
    print(f"\n70B on 512 GPUs, {cluster.seconds_between:,.0f} s between snapshots:\n")
    print("| | bf16 | fp32 | from |\n|---|---|---|---|")
    for line, origin in ORIGINS.items():
        values = " | ".join(_text(column[line]) for column in columns.values())
        print(f"| {line} | {values} | {origin.format(**figures)} |")
    return {"measured": asdict(costs), "assumed": asdict(cluster), "projected": columns}


def follows(costs: Costs, cluster: Cluster, size: int) -> dict[str, float]:
    """Each line's arithmetic."""
    snapshot = size * cluster.parameters
    share, between = snapshot / cluster.ranks, cluster.seconds_between
    passes = (cluster.ranks - 1) * cluster.message  # once round a ring of all ranks, as each exchange goes
    beside = (
        share / cluster.to_host,
        share * costs.seconds_a_byte_written,
        snapshot / cluster.file_system,
        cluster.window * share * costs.seconds_a_byte_merged,
        costs.exchanges * passes,
    )
    values = (
        snapshot / GIGA,
        share / GIGA,
        cluster.window * share / GIGA,
        cluster.window * share * cluster.ranks_per_node / GIGA,
        2 * share / GIGA,
        share / GIGA,
        share / cluster.on_device * costs.capture_over_copy,
        *beside,
        sum(beside),
        100 * sum(beside) / between,
        snapshot / between / 1e6,
        snapshot * costs.seconds_a_byte_emitted + cluster.tensors * passes,
        share * costs.seconds_a_byte_emitted_as_dcp + snapshot / cluster.file_system,
    )
    return dict(zip(ORIGINS, values, strict=True))


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
