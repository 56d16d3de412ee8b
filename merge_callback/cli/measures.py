"""The commands ``diversity`` and ``interference``: what tells whether, and how, merging pays."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from merge_callback.analysis.interference import (
    Counts,
    chance,
    interference,
    magnitude_ratio,
    overlap,
    pair_mean,
    sign_conflict,
    variance,
)
from merge_callback.analysis.pairwise import PairwiseDistances, pairwise_distances
from merge_callback.analysis.tables import (
    WHOLE_MODEL,
    Source,
    curve_table,
    layer_table,
    matrix_table,
    source_table,
    write_csv,
)
from merge_callback.checkpoints.lora import as_deltas, as_task_vectors
from merge_callback.checkpoints.open import Checkpoint, open_checkpoint
from merge_callback.cli.imports import import_named
from merge_callback.offline.alignment import aligned
from merge_callback.offline.selection import select
from merge_callback.snapshots.files import printable

_MEASURES = {
    "logits": ("cosine distance of the logits", ""),
    "probabilities": ("KL divergence of the probabilities", ", in nats"),
    "activations": ("cosine distance of the activations", ""),
}
"""Functional distances: what they are, and their unit."""


def add_diversity(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``diversity``."""
    parser.set_defaults(run=_diversity)
    parser.description = (
        "Root-mean-square distance of the weights of each two checkpoints, and its change along the run. "
        "The gain of a merge follows it: where checkpoints lie close together, merging gives nothing. "
        "Example: merge-callback diversity logs/version_0/checkpoints --by-layer --plot diversity.png"
    )
    _add_checkpoints(parser)
    add = parser.add_argument
    add("--lag", type=int, metavar="L", help="besides neighbours, compare those L places apart (2)")
    add("--by-layer", action="store_true", help="the distances of every layer, too")
    add("--csv", type=Path, metavar="FILE", help="write every pair's distance to a table, too")
    add("--plot", type=Path, metavar="FILE.png", help="draw the distances, too; needs matplotlib")
    add(
        "--probe",
        metavar="MODULE:FUNCTION",
        help="also compare what the checkpoints compute: the function returns a model and a batch that its "
        "forward takes, as my_probe:build; the module may lie in the current folder",
    )
    add(
        "--probe-layers",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="with --probe, the modules whose activations are compared (the model's largest stack of blocks)",
    )


def add_interference(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``interference``."""
    parser.set_defaults(run=_interference)
    parser.description = (
        "How far the checkpoints agree in what they learned since the base (their task vectors), judged by "
        "the weights that changed most: conflicts of sign, overlap, ratio of magnitudes, variance. Much "
        "conflict means that a mean cancels what was learned. "
        "Example: merge-callback interference expert-a expert-b --base model"
    )
    _add_checkpoints(parser)
    add = parser.add_argument
    add("--base", type=Path, metavar="CKPT", help="initial model of the task vectors (the first checkpoint)")
    add(
        "--top",
        type=float,
        default=20.0,
        metavar="K",
        help="look at the K %% that changed most (%(default)g)",
    )
    add(
        "--scope",
        choices=("tensor", "global"),
        default="tensor",
        help="K %% of each, or of all (%(default)s)",
    )


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="files, folders, or folders of a run")
    add("--last", type=int, metavar="N", help="of all these, or of every K-th, only the last N")
    add("--state-key", metavar="KEY", help="where in the files the weights are, e.g. 'model_ema'")
    add("--every", type=int, default=1, metavar="K", help="of all these, only every K-th, from the last")
    add("--keep-order", action="store_true", help="compare them in the order given, not by their steps")


def _diversity(parsed: argparse.Namespace) -> int:
    if parsed.plot and not _has_matplotlib():
        return 1
    checkpoints = aligned(as_deltas(_open_all(parsed)))
    for option, path in (("--csv", parsed.csv), ("--plot", parsed.plot)):
        _check_no_input(option, path, checkpoints)
    lags = _lags(parsed.lag, len(checkpoints))
    probe = _built(parsed.probe) if parsed.probe else None
    found = pairwise_distances([c.tensors for c in checkpoints], labels=[c.path for c in checkpoints])
    functional: dict[str, Tensor] = {}
    if probe:
        from merge_callback.analysis.functional import pairwise_functional

        try:
            tensors = [
                {**c.tensors, **{n: c.tensors[kept] for n, kept in c.tied.items()}} for c in checkpoints
            ]
            labels = [c.path for c in checkpoints]
            functional = pairwise_functional(*probe, tensors, parsed.probe_layers, labels)
        except (TypeError, RuntimeError) as error:  # of the model's own code
            raise ValueError(f"--probe {parsed.probe}: {error!r}") from error
    sources = [Source(c.path, c.step, c.tokens) for c in checkpoints]
    model, layers = found.model(), found.by_layer() if parsed.by_layer else {}
    for line in (
        *_diversity_report(sources, found, model, layers, lags),
        *_functional_report(functional, lags),
    ):
        print(printable(line))
    if parsed.csv:
        write_csv(parsed.csv, sources, {WHOLE_MODEL: model, **layers}, functional)
    if parsed.plot:
        from merge_callback.analysis.plots import draw_distances

        shown = {_MEASURES[name][0]: matrix for name, matrix in functional.items()}
        draw_distances(parsed.plot, sources, model, lags, layers, shown)
    return 0


def _diversity_report(
    sources: Sequence[Source],
    found: PairwiseDistances,
    model: Tensor,
    layers: dict[str, Tensor],
    lags: Sequence[int],
) -> Iterator[str]:
    yield f"√(mean (a - b)²) of each tensor, averaged over {len(found.per_tensor)} tensors"
    for table in (source_table(sources), matrix_table(model), curve_table(model, lags)):
        yield ""
        yield from table
    if layers:
        yield ""
        yield from layer_table(layers, lags[-1])


def _functional_report(functional: Mapping[str, Tensor], lags: Sequence[int]) -> Iterator[str]:
    for name, matrix in functional.items():
        for table in (matrix_table(matrix, *_MEASURES[name]), curve_table(matrix, lags)):
            yield ""
            yield from table


def _built(spec: str) -> tuple[nn.Module, Any]:
    """The model and the batch that a function of the user's returns.

    Raises:
        ValueError: if there is no such function, or it returns anything else.
    """
    module, _, function = spec.partition(":")
    if not module or not function:
        raise ValueError(f"--probe {spec}: name a function as MODULE:FUNCTION, e.g. my_probe:build")
    build = getattr(import_named(f"--probe {spec}", module), function, None)
    if not callable(build):
        raise ValueError(f"--probe {spec}: the module has no function {function!r}")
    built = build()
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)):
        raise ValueError(f"--probe {spec}: must return (model, batch), not a {type(built).__name__}")
    return built


def _lags(asked: int | None, count: int) -> list[int]:
    """Neighbours, and those the option asks for; by default those of the callback, if there are any."""
    if count < 2:
        raise ValueError(f"distances need at least two checkpoints, got {count}")
    if asked is None:
        asked = min(2, count - 1)
    if not 1 <= asked < count:
        raise ValueError(f"--lag {asked} must lie in 1 … {count - 1}: there are {count} checkpoints")
    return sorted({1, asked})


def _interference(parsed: argparse.Namespace) -> int:
    base = open_checkpoint(parsed.base, state_key=parsed.state_key) if parsed.base else None
    found = _open_all(parsed)
    if not (deltas := as_task_vectors(found, base)):
        others = [c for c in found if base is None or c.path.resolve() != base.path.resolve()]
        deltas = [*([base] if base else []), *others]
    base, *checkpoints = aligned(deltas)
    if len(checkpoints) < 2:
        raise ValueError(
            f"interference needs at least two checkpoints besides the base ({base.path}), "
            f"got {len(checkpoints)}"
        )
    counts = interference(
        [c.tensors for c in checkpoints],
        base.tensors,
        parsed.top,
        scope=parsed.scope,
        labels=[c.path for c in (base, *checkpoints)],
    )
    sources = [Source(c.path, c.step, c.tokens) for c in checkpoints]
    kept = "each tensor" if parsed.scope == "tensor" else "the model"
    print(printable(f"task vectors from {base.path}, the {parsed.top:g} % of largest magnitude of {kept}"))
    for line in ("", *source_table(sources), "", *_interference_table(counts, parsed.top)):
        print(printable(line))
    return 0


def _interference_table(counts: Counts, top: float) -> Iterator[str]:
    conflict_by_chance, overlap_by_chance = chance(top)
    yield f"{'':20}{'mean':>10}{'least':>10}{'pair':>10}{'most':>10}{'pair':>10}{'by chance':>12}"
    yield _measure_line("sign conflict (%)", sign_conflict(counts), f"{conflict_by_chance:.2f}")
    yield _measure_line("overlap (%)", overlap(counts), f"{overlap_by_chance:.2f}")
    yield _measure_line("magnitude ratio", magnitude_ratio(counts), "")
    yield f"{'variance':20}{variance(counts):>10.3e}  (in the squared unit of the weights)"


def _measure_line(name: str, measure: Tensor, by_chance: str) -> str:
    """One measure that has a value for each pair: their mean, and the pairs furthest from it."""
    values = {
        (i, j): value
        for i, row in enumerate(measure.tolist())
        for j, value in enumerate(row)
        if i != j and value == value  # NaN if a pair has nothing in common
    }
    if not values:
        return f"{name:20}{'-':>10}"
    ends = (min(values, key=values.__getitem__), max(values, key=values.__getitem__))
    cells = "".join(f"{values[i, j]:>10.2f}{f'[{i + 1}, {j + 1}]':>10}" for i, j in ends)
    return f"{name:20}{pair_mean(measure):>10.2f}{cells}{by_chance:>12}".rstrip()


def _open_all(parsed: argparse.Namespace) -> list[Checkpoint]:
    """The checkpoints to measure."""
    selection = select(parsed.checkpoints, parsed.last, parsed.every, keep_order=parsed.keep_order)
    for note in selection.notes:
        print(printable(note), file=sys.stderr)
    return [open_checkpoint(path, state_key=parsed.state_key) for path in selection.chosen]


def _check_no_input(option: str, path: Path | None, checkpoints: Sequence[Checkpoint]) -> None:
    files = (file for checkpoint in checkpoints for file in (*checkpoint.files, *checkpoint.extras))
    if path is not None and path.exists() and any(path.samefile(file) for file in files):
        raise ValueError(f"{option} {path}: is a file of a checkpoint that is measured; name another one")


def _has_matplotlib() -> bool:
    if find_spec("matplotlib") is None:
        print("--plot: matplotlib is missing: pip install 'merge-callback[demo]'", file=sys.stderr)
        return False
    return True
