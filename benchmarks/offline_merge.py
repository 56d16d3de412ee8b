"""Merging checkpoint files: time and memory beside mergekit, a plain loop, and the floors of the machine.

    python benchmarks/offline_merge.py --folder /disk/with/10GB --mergekit other-venv/bin/mergekit-yaml

Makes a trajectory of bf16 Llama checkpoints, and merges it by each tool in turn within each round, so that
a machine whose speed drifts slows all of them alike. Every tool is a process of its own, timed from its start
to its end; its memory is the peak of anonymous memory, its children's included, above that of `import torch`
alone. The floors: reading all inputs once from the page cache, and writing the output once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from record import write
from safetensors.torch import load_file, save_file

MEBI = 1 << 20
TIES = ("--method", "ties", "--density", "0.8")
OURS = "from merge_callback.cli.main import run; run()"
IMPORTS = "import torch; import merge_callback.cli.merge"
NAIVE = """
import sys, torch
from safetensors.torch import load_file, save_file
*sources, output = sys.argv[1:]
dicts = [load_file(source) for source in sources]
mean = {n: torch.stack([d[n].float() for d in dicts]).mean(0).to(t.dtype) for n, t in dicts[0].items()}
save_file(mean, output, {"format": "pt"})
"""


@dataclass(frozen=True)
class Run:
    """One process: how long it took, and its memory at most, in MiB."""

    seconds: float
    anonymous: float


# The checkpoints.


def llama(millions: float) -> dict[str, Any]:
    """A configuration with about as many million parameters."""
    scale = (millions / 196) ** (1 / 3)
    width = 64 * max(1, round(16 * scale))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": max(1, round(10 * scale)),
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 32 * width,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, words = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    found = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
    found["lm_head.weight"] = (words, width)
    for layer in range(config["num_hidden_layers"]):
        parts = {f"self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        parts |= {f"mlp.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
        parts |= {"mlp.down_proj.weight": (width, inner)}
        parts |= {f"{p}_layernorm.weight": (width,) for p in ("input", "post_attention")}
        found |= {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
    return found


def make_trajectory(folder: Path, millions: float, count: int) -> list[Path]:
    """Checkpoints of a random walk whose steps are a twentieth of the weights; reused where present."""
    folders = [folder / f"{millions:g}M" / f"checkpoint-{100 * (i + 1)}" for i in range(count)]
    config, generator = llama(millions), torch.Generator().manual_seed(0)
    if all((path / "model.safetensors").exists() for path in folders):
        return folders
    draw = partial(torch.randn, generator=generator)
    weights = {name: 0.02 * draw(shape) for name, shape in shapes(config).items()}
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
        for weight in weights.values():
            weight.add_(draw(weight.shape), alpha=1e-3)
        save_file({n: w.bfloat16() for n, w in weights.items()}, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    return folders


def twice(folders: list[Path]) -> list[Path]:
    """The same checkpoints, and once more as hard links under later steps."""
    linked = [path.with_name(f"checkpoint-{100 * (len(folders) + i + 1)}") for i, path in enumerate(folders)]
    for path, link in zip(folders, linked, strict=True):
        link.mkdir(exist_ok=True)
        for source in path.iterdir():
            if not (link / source.name).exists():
                os.link(source, link / source.name)
    return [*folders, *linked]


# The processes.


def run(command: list[str]) -> Run:
    """Runs a command; its anonymous memory is read four times a second."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0.0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak))
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{errors.decode()[-2000:]}")
    return Run(seconds, peak[0])


def watch(pid: int, peak: list[float]) -> None:
    while (found := anonymous(pid)) is not None:
        peak[0] = max(peak[0], found)
        time.sleep(0.25)  # reading it walks the page tables, which holds the process up


def anonymous(pid: int) -> float | None:
    """Anonymous memory of a process and its children in MiB, shared pages once; ``None`` once it ended."""
    try:
        return sum(_anonymous(each) for each in (pid, *children(pid)))
    except (FileNotFoundError, ProcessLookupError):
        return None if not Path(f"/proc/{pid}/smaps_rollup").exists() else 0.0


def _anonymous(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss_Anon"))


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def ours(output: Path, folders: list[Path], *options: str) -> list[str]:
    paths = [str(path) for path in folders]
    return [sys.executable, "-c", OURS, "merge", *paths, *options, "--quiet", "--output", str(output)]


def mergekit(tool: Path, output: Path, folders: list[Path], method: str, dtype: str) -> list[str]:
    """Its command, for a configuration like those of its examples; ``fp32``: computed as we do."""
    parameters = {"weight": 1.0} | ({"density": 0.8} if method == "ties" else {})
    merged = folders[1:] if method == "ties" else folders
    config = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": parameters} for path in merged],
        **({"base_model": str(folders[0])} if method == "ties" else {}),
        **({"dtype": "float32", "out_dtype": "bfloat16"} if dtype == "fp32" else {"dtype": "bfloat16"}),
    }
    path = output.with_name(f"mergekit-{method}-{dtype}.yaml")
    path.write_text(yaml.safe_dump(config))
    return [str(tool), str(path), str(output)]


def naive(output: Path, folders: list[Path]) -> list[str]:
    output.mkdir()
    paths = [str(path / "model.safetensors") for path in [*folders, output]]
    return [sys.executable, "-c", NAIVE, *paths]


# The floors.


def read_all(folders: list[Path]) -> None:
    buffer = bytearray(16 * MEBI)
    for path in folders:
        with open(path / "model.safetensors", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write_once(output: Path, size: int) -> None:
    buffer = os.urandom(16 * MEBI)
    output.mkdir()
    with open(output / "floor", "wb", buffering=0) as file:
        for start in range(0, size, len(buffer)):
            file.write(buffer[: size - start])
        os.fsync(file.fileno())


def timed(job: Callable[[], None]) -> Run:
    start = time.perf_counter()
    job()
    return Run(time.perf_counter() - start, 0.0)


# What is compared.


def variants(
    folders: list[Path], output: Path, tool: Path | None, dtypes: list[str]
) -> dict[str, Callable[[], Run]]:
    size = (folders[0] / "model.safetensors").stat().st_size
    found: dict[str, Callable[[], Run]] = {
        "import torch": lambda: run([sys.executable, "-c", "import torch"]),
        "our imports": lambda: run([sys.executable, "-c", IMPORTS]),
        "read floor": lambda: timed(lambda: read_all(folders)),
        "write floor": lambda: timed(lambda: write_once(output, size)),
        "sma": lambda: run(ours(output, folders)),
        "ties": lambda: run(ours(output, folders, *TIES)),
        "naive mean": lambda: run(naive(output, folders)),
    }
    if tool:
        for method in ("linear", "ties"):
            for dtype in dtypes:
                command = partial(mergekit, tool, output, folders, method, dtype)
                found[f"mergekit {method}, {dtype}"] = lambda command=command: run(command())
    return found


def measure(jobs: dict[str, Callable[[], Run]], output: Path, rounds: int, slow: int) -> dict[str, list[Run]]:
    """Runs every job once a round, those of a mergekit TIES in the first ``slow`` rounds only."""
    found: dict[str, list[Run]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name, job in jobs.items():
            if name.startswith("mergekit ties") and number >= slow:
                continue
            found[name].append(job())
            print(f"round {number + 1}: {name:22} {found[name][-1].seconds:8.2f} s", flush=True)
            shutil.rmtree(output, ignore_errors=True)
            os.sync()  # what a tool left to be written must not slow down the next one
    return found


def share_unlike(folders: list[Path], output: Path, tool: Path, method: str) -> float:
    """The share of the weights that our merge and mergekit's in fp32 round differently.

    In TIES many differences of bf16 numbers equal the threshold, and mergekit keeps others of them.
    """
    ours_at, theirs_at = output / "ours", output / "theirs"
    output.mkdir()
    run(ours(ours_at, folders, *(TIES if method == "ties" else ())))
    run(mergekit(tool, theirs_at, folders, method, "fp32"))
    mine, theirs = load_file(ours_at / "model.safetensors"), {}
    for path in theirs_at.glob("*.safetensors"):
        theirs |= load_file(path)
    unlike = sum(int((mine[name] != theirs[name]).sum()) for name in mine)
    shutil.rmtree(output)
    return unlike / sum(tensor.numel() for tensor in mine.values())


def figures_of(found: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians and the ratios that matter: each is the median over rounds of the ratio within a round."""
    seconds = {name: statistics.median(r.seconds for r in runs) for name, runs in found.items()}
    torch_alone = statistics.median(r.anonymous for r in found["import torch"])
    memory = {
        n: max(r.anonymous for r in runs) - torch_alone for n, runs in found.items() if "floor" not in n
    }
    floor = [r.seconds + w.seconds for r, w in zip(found["read floor"], found["write floor"], strict=True)]
    return {
        "median_seconds": seconds,
        "all_seconds": {name: [r.seconds for r in runs] for name, runs in found.items()},
        "peak_anon_mib_above_torch": memory,
        "sma_without_imports_to_floor": statistics.median(
            (s.seconds - i.seconds) / f
            for s, i, f in zip(found["sma"], found["our imports"], floor, strict=True)
        ),
        "times_faster_than": {
            f"{mine} than {other}": statistics.median(
                o.seconds / m.seconds for o, m in zip(found[other], found[mine], strict=False)
            )
            for mine, rivals in (("sma", ("linear", "naive")), ("ties", ("mergekit ties",)))
            for other in found
            if any(rival in other for rival in rivals)
        },
    }


def memory_twice(folders: list[Path], output: Path, above: float) -> dict[str, float]:
    """The same for twice as many checkpoints: memory above `import torch`."""
    found, linked = {}, twice(folders)
    for name, options in (("sma", ()), ("ties", TIES)):
        found[name] = run(ours(output, linked, *options)).anonymous - above
        shutil.rmtree(output)
    for path in linked[len(folders) :]:
        shutil.rmtree(path)
    return found


def show(figures: dict[str, Any]) -> None:
    for name, seconds in figures["median_seconds"].items():
        memory = figures["peak_anon_mib_above_torch"].get(name)
        print(f"{name:24} {seconds:8.2f} s" + ("" if memory is None else f" {memory:9.0f} MiB"))
    print(f"sma less imports / floor {figures['sma_without_imports_to_floor']:8.2f}   (target: 2 at most)")
    for name, ratio in figures["times_faster_than"].items():
        print(f"{name + ':':40} {ratio:6.2f} times faster")
    for name, memory in figures["peak_anon_mib_twice_the_checkpoints"].items():
        print(f"{name} of twice as many: {memory:.0f} MiB   (target: 256 at most)")
    for name, share in figures["share_unlike_mergekit_in_fp32"].items():
        print(f"{name}: {100 * share:.3f} % of the weights unlike mergekit's in fp32")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, help="where the checkpoints are made, or are still; default: a temporary one")
    add("--millions", type=float, default=196, help="parameters of each")
    add("--count", type=int, default=10, help="of checkpoints")
    add("--rounds", type=int, default=5)
    add("--slow-rounds", type=int, default=2, help="rounds that mergekit's TIES takes part in")
    add("--mergekit", type=Path, default=Path(sys.executable).with_name("mergekit-yaml"), help="its command")
    add(
        "--mergekit-dtypes",
        nargs="+",
        choices=("bf16", "fp32"),
        default=["bf16", "fp32"],
        help="it computes in",
    )
    add("--check", action="store_true", help="merge once more to compare the results with mergekit's")
    add("--no-record", action="store_true", help="leave the recorded results as they are")
    return parser.parse_args()


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folders = make_trajectory(folder, options.millions, options.count)
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    tool = options.mergekit if options.mergekit.exists() else None
    read_all(folders)  # into the page cache
    os.sync()
    load = os.getloadavg()[0]
    jobs = variants(folders, output, tool, options.mergekit_dtypes)
    found = measure(jobs, output, options.rounds, options.slow_rounds)
    torch_alone = statistics.median(r.anonymous for r in found["import torch"])
    return {
        "parameters": sum(torch.Size(s).numel() for s in shapes(llama(options.millions)).values()),
        "checkpoints": options.count,
        "rounds": options.rounds,
        "load_before": load,
        **figures_of(found),
        "peak_anon_mib_twice_the_checkpoints": memory_twice(folders, output, torch_alone),
        "share_unlike_mergekit_in_fp32": {
            method: share_unlike(folders, output, tool, method)
            for method in ("linear", "ties")
            if tool and options.check
        },
    }


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        figures = compare(options, options.folder or Path(temporary))
    show(figures)
    if not options.no_record:
        print(write("offline_merge", figures))


if __name__ == "__main__":
    main()
