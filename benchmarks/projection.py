"""What a 70B model on 512 GPUs would cost: by the costs that ``sharded.py`` measured, and assumptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import mean
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
    memory_bandwidth: float = 3.35e12
    """Of each GPU."""
    to_host: float = 5e9
    """From a GPU to pageable host memory, all GPUs of a node at once."""
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

    copies_beside_the_window: float
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
            mean(setting["peak_anon_bytes_above_plain"]["disk"]) / arena,
            stages["capture"] / floors["copy"],
            stages["write"] / arena,
            stages["merge"] / (window * arena),
            setting["emission_seconds"]["emission"] / setting["bytes_of_model"],
            setting["emission_seconds"]["emission as dcp"] / setting["bytes_of_model"] * setting["ranks"],
            round(sum(number for call, number in calls.items() if call not in ("send", "recv"))),
        )


def project(setting: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The costs, the assumptions and what follows, for weights of 2 and of 4 bytes; prints it as a table."""
    costs, cluster = Costs.of(setting, window), Cluster()
    columns = {name: follows(costs, cluster, size) for name, size in (("bf16", 2), ("fp32", 4))}
    print(
        f"\nprojected: {cluster.seconds_between:,.0f} s between snapshots\n\n| | bf16 | fp32 |\n|---|---|---|"
    )
    for line in columns["bf16"]:
        print(f"| {line} | " + " | ".join(_text(line, column[line]) for column in columns.values()) + " |")
    return {"measured": asdict(costs), "assumed": asdict(cluster), "projected": columns}


def follows(costs: Costs, cluster: Cluster, size: int) -> dict[str, float]:
    """Each line's arithmetic."""
    snapshot = size * cluster.parameters
    share = snapshot / cluster.ranks
    passes = (cluster.ranks - 1) * cluster.message  # once round a ring of all ranks, as each exchange goes
    stall = {
        "capture to host, s": share / cluster.to_host * costs.capture_over_copy,
        "hash and write, a core a rank, s": share * costs.seconds_a_byte_written,
        "the same at the file system's rate, s": snapshot / cluster.file_system,
        "merge and diversity, s": cluster.window * share * costs.seconds_a_byte_merged,
        "exchanges, s": costs.exchanges * passes,
    }
    bytes_, messages = snapshot * costs.seconds_a_byte_emitted, cluster.tensors * passes
    between = cluster.seconds_between
    return {
        "snapshot, GB": snapshot / GIGA,
        "of it on each rank, GB": share / GIGA,
        "window on each rank, GB": cluster.window * share / GIGA,
        "window on each node, GB": cluster.window * share * cluster.ranks_per_node / GIGA,
        "host memory beside it on each rank, GB": costs.copies_beside_the_window * share / GIGA,
        **stall,
        "stall of a snapshot, s": sum(stall.values()),
        "share of training, %": 100 * sum(stall.values()) / between,
        "storage='device': capture, ms": 2e3 * share / cluster.memory_bandwidth,
        "to storage on average, MB/s": snapshot / between / 1e6,
        "emission as safetensors, beside training: bytes, s": bytes_,
        "emission as safetensors, beside training: messages, s": messages,
        "share of the interval, %": 100 * (bytes_ + messages) / between,
        "emission as dcp, beside training, s": share * costs.seconds_a_byte_emitted_as_dcp
        + snapshot / cluster.file_system,
    }


def _text(line: str, value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
