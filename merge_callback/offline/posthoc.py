"""The running average of any width, from what a run has stored (EDM2, arXiv 2312.02696, section 3)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_callback.checkpoints.checkpoint import read_manifest
from merge_callback.checkpoints.file_names import MANIFEST, WINDOW
from merge_callback.checks import resolve_dtype
from merge_callback.merging.posthoc import MOST_RESIDUAL, PosthocEma, Profile, solve
from merge_callback.merging.running import PowerEma, gamma_of
from merge_callback.offline import workers
from merge_callback.offline.job import Job
from merge_callback.offline.merge_files import merge_files
from merge_callback.snapshots.files import CorruptFileError
from merge_callback.snapshots.running_files import FOLDER_NAME

_NEGLIGIBLE = 1e-6  # of all weights: fp32 does not hold what a smaller one adds


@dataclass(frozen=True)
class Reconstruction:
    """What to sum for an average of another width.

    Args:
        files: the stored averages, oldest first.
        method: with the weight of each.
    """

    files: list[Path]
    method: PosthocEma


def posthoc_ema(
    run: str | os.PathLike[str],
    sigma: float,
    output: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Makes the ``PowerEma`` of any width after the run, as if it had been tracked; see ``load_merge``.

    It is a weighted sum of the ``PowerEma`` averages that the run has stored with its snapshots. Two widths
    are enough, ``running=[PowerEma(0.05), PowerEma(0.1)]``, for all between .05 and .15.

    Args:
        run: the folder of the run's merges, or its window.
        sigma: the relative width.
        output: the folder to make.
        step: up to which the average runs; default: the last one that was stored.
        dtype: of the output; default: fp32, as the averages are stored.
        force: replace an earlier output.

    Returns:
        What ``merge.json`` in the output says: inputs, weights, and the ``residual`` among the options.

    Raises:
        FileNotFoundError: if the run has stored no such averages.
        ValueError: if the sum would differ too much from that average; the message says what to do.
    """
    found = reconstruction(Path(run), sigma, step)
    job = Job(
        checkpoints=found.files,
        method=found.method,
        dtype=resolve_dtype("dtype", dtype),
        force=force,
        workers=workers.available(),
    )
    return merge_files(job, Path(output))


def reconstruction(run: Path, sigma: float, step: int | None = None) -> Reconstruction:
    """Which stored averages of a run to sum, and how; see ``posthoc_ema``.

    Raises:
        FileNotFoundError: if it has stored none.
        ValueError: if their sum would differ too much.
    """
    gamma_of(sigma)
    stored = _stored(run)
    last = max(profile.step for profile in stored.values())
    until = last if step is None else step
    if not 0 < until <= last:
        raise ValueError(f"step {until}: averages were stored up to step {last}; choose a step up to that")
    usable = {file: profile for file, profile in stored.items() if profile.step <= until} or stored
    solution = solve([*usable.values()], Profile(until, sigma))
    if solution.residual > MOST_RESIDUAL:
        widths = ", ".join(f"{width:g}" for width in sorted({profile.sigma for profile in usable.values()}))
        raise ValueError(
            f"sigma={sigma:g} at step {until}: what is stored (widths {widths}, {len(usable)} copies) would "
            f"miss that profile by {solution.residual:.3f} of its size, more than {MOST_RESIDUAL:g}: choose "
            "a width nearer to those, or have a run track two widths and take snapshots more often"
        )
    total = sum(map(abs, solution.weights))
    chosen = {f: w for f, w in zip(usable, solution.weights, strict=True) if abs(w) > _NEGLIGIBLE * total}
    scale = sum(chosen.values())
    weights = tuple(weight / scale for weight in chosen.values())
    return Reconstruction([*chosen], PosthocEma(sigma, until, weights, solution.residual))


def _stored(run: Path) -> dict[Path, Profile]:
    """The power-function averages in a run's window, oldest first."""
    window = run if (run / MANIFEST).is_file() else run / WINDOW
    found: dict[Path, Profile] = {}
    for record in sorted(read_manifest(window).running, key=_step):
        profile = record.get("average")
        if not isinstance(profile, Mapping) or profile.get("kind") != PowerEma.name:
            continue
        file, step, sigma = record.get("file"), _step(record), profile.get("sigma")
        if not isinstance(file, str) or not FOLDER_NAME.fullmatch(file) or not isinstance(sigma, float):
            raise CorruptFileError(f"{window / MANIFEST}: lists {record!r:.200} as a running average")
        if step > 0 and (window / file).is_dir():
            found[window / file] = Profile(step, sigma)
    if not found:
        raise FileNotFoundError(
            f"{run}: no stored averages of power functions: give the folder of the merges of a run that was "
            "trained with running=[PowerEma(0.05), PowerEma(0.1)]"
        )
    return found


def _step(record: Mapping[str, Any]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0
