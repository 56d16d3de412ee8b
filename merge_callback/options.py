"""The callback's options, checked once: every message names the option, the value and the remedy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from merge_callback.candidate_options import check_comparison, check_fits, check_running, resolve_candidates
from merge_callback.checks import (
    not_negative,
    one_of,
    patterns,
    positive,
    resolve_dtype,
    resolve_size,
    true_or_false,
)
from merge_callback.merging import MergeMethod, resolve_method
from merge_callback.merging.running import RunningAverage, resolve_running
from merge_callback.probe_options import ProbeOptions, resolve_probe
from merge_callback.snapshots.codecs import CODECS
from merge_callback.snapshots.storage import STORAGES
from merge_callback.spike_options import SpikeOptions, resolve_spike
from merge_callback.urls import file_system_of, is_remote, local_path

DEFAULT_TOKENS = 4_000_000_000
"""Spacing of the snapshots in tokens: 4B suits 0.7B and 7B models (arXiv 2505.12082, section 4.3)."""

AUTO = {"stable": "sma", "decay": "ema"}
"""The default method of each phase that is merged, by the comparison in ``docs/evidence.md``."""

MERGED_PHASES = tuple(AUTO)

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "window": 10,
        "every_n_tokens": None,
        "every_n_steps": None,
        "count_tokens": None,
        "method": "auto",
        "candidates": None,
        "select": None,
        "storage": "auto",
        "durable": True,
        "snapshot_dtype": None,
        "snapshot_codec": None,
        "dirpath": None,
        "emit_every": 1,
        "format": "safetensors",
        "keep_last": 3,
        "keep_best": 1,
        "strip_prefix": None,
        "max_shard_size": "5GB",
        "evaluate": True,
        "evaluate_with": (),
        "evaluate_batches": None,
        "diversity_lag": 2,
        "running": (),
        "probe": None,
        "exclude": (),
        "lora": "delta",
        "base": None,
        "experts": (),
        "lower_is_better": (),
        "higher_is_better": (),
        "spike": None,
    }
)
"""The default of each option, the same for all training loops."""

MethodOption = str | MergeMethod | Mapping[str, str | MergeMethod]


@dataclass(frozen=True)
class ExpertOptions:
    """Finished experts that the merge of this run's expert is made with.

    Args:
        base: what all of them began as; ``None`` if they are adapters.
        paths: of the finished ones.
        method: how they are merged.
        is_tuned: whether its options are chosen on validation data.
    """

    base: Path | None
    paths: tuple[Path, ...]
    method: MergeMethod
    is_tuned: bool


@dataclass(frozen=True)
class Options:
    """The resolved options of a callback or merger."""

    window: int
    every: int
    unit: Literal["tokens", "steps"]
    count_tokens: Callable[[Any], int] | None
    methods: dict[str, MergeMethod]
    candidates: dict[str, MergeMethod]
    """What else the window is merged by, by name; the default method is none of them."""
    select: str | None
    storage: str
    durable: bool
    snapshot_dtype: torch.dtype | None
    snapshot_codec: str
    dirpath: Path | str | None
    """A local folder, or the URL of a remote one."""
    emit_every: int
    format: str
    keep_last: int | None
    keep_best: int
    strip_prefix: str | None
    max_shard_bytes: int
    evaluate: bool
    evaluate_with: tuple[str, ...]
    evaluate_batches: int | None
    diversity_lag: int
    running: Mapping[str, RunningAverage]
    probe: ProbeOptions | None
    exclude: tuple[str, ...]
    lora: str
    experts: ExpertOptions | None
    lower_is_better: tuple[str, ...]
    higher_is_better: tuple[str, ...]
    spike: SpikeOptions
    given: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the user has given that is not the default."""

    @classmethod
    def resolve(cls, **given: Any) -> Options:
        """Checks options by the names in ``DEFAULTS``, and resolves defaults and spellings.

        Raises:
            TypeError: for a name that is not an option's.
            ValueError: see the functions below.
        """
        for name in given.keys() - DEFAULTS.keys():
            near = get_close_matches(name, DEFAULTS, 1)
            raise TypeError(f"{name!r} is not an option" + (f"; did you mean {near[0]!r}?" if near else ""))
        given = {**DEFAULTS, **given}
        every, unit = resolve_interval(given["every_n_tokens"], given["every_n_steps"])
        keep_last = given["keep_last"]
        experts = resolve_experts(given["base"], given["experts"], given["method"])
        if experts:
            given["method"] = "auto"  # the given one is that of the experts
            if not given["evaluate"]:
                raise ValueError("evaluate=False and experts=[…] were both given: the merge is evaluated")
        methods = resolve_methods(given["method"], given["window"])
        candidates = resolve_candidates(given["candidates"], methods, given["window"])
        check_comparison(given, candidates)
        running = resolve_running(given["running"])
        check_running(running, candidates, methods)
        batches = given["evaluate_batches"]
        return cls(
            window=resolve_window(given["window"]),
            every=every,
            unit=unit,
            count_tokens=resolve_counter(given["count_tokens"]),
            methods=methods,
            candidates=candidates,
            select=given["select"],
            storage=resolve_storage(given["storage"], given["durable"]),
            durable=true_or_false("durable", given["durable"]),
            snapshot_dtype=resolve_dtype("snapshot_dtype", given["snapshot_dtype"]),
            snapshot_codec=resolve_codec(given["snapshot_codec"], given["snapshot_dtype"]),
            dirpath=resolve_dirpath(given["dirpath"]),
            emit_every=not_negative("emit_every", given["emit_every"]),
            format=resolve_format(given["format"]),
            keep_last=None if keep_last is None else positive("keep_last", keep_last),
            keep_best=not_negative("keep_best", given["keep_best"]),
            strip_prefix=resolve_prefix(given["strip_prefix"]),
            max_shard_bytes=resolve_size("max_shard_size", given["max_shard_size"]),
            evaluate=true_or_false("evaluate", given["evaluate"]),
            evaluate_with=resolve_classes(given["evaluate_with"]),
            evaluate_batches=None if batches is None else positive("evaluate_batches", batches),
            diversity_lag=positive("diversity_lag", given["diversity_lag"]),
            running=running,
            probe=resolve_probe(given["probe"]),
            exclude=patterns("exclude", given["exclude"]),
            lora=one_of("lora", given["lora"], ("delta", "factors")),
            experts=experts,
            lower_is_better=patterns("lower_is_better", given["lower_is_better"]),
            higher_is_better=patterns("higher_is_better", given["higher_is_better"]),
            spike=resolve_spike(given["spike"], given["window"]),
            given={n: v for n, v in given.items() if (tuple(v) if isinstance(v, list) else v) != DEFAULTS[n]},
        )

    def shown(self) -> str:
        """Window, interval and method, and what else is not the default, as one would write them."""
        first = {"window": self.window, f"every_n_{self.unit}": self.every, "method": "auto"}
        shown = {**first, **self.given, f"every_n_{self.unit}": self.every}
        return ", ".join(f"{n}={v:_}" if type(v) is int else f"{n}={v!r}" for n, v in shown.items())


def resolve_window(window: int) -> int:
    """The number of snapshots.

    Raises:
        ValueError: if it is not a whole number of at least 2.
    """
    if positive("window", window) == 1:
        raise ValueError("window=1 holds nothing to merge; choose 2 or more")
    return int(window)


def resolve_counter(count_tokens: Callable[[Any], int] | None) -> Callable[[Any], int] | None:
    """The function that counts a batch's tokens.

    Raises:
        ValueError: if it is not callable.
    """
    if count_tokens is not None and not callable(count_tokens):
        raise ValueError(
            f"count_tokens={count_tokens!r} must be a function from a batch to its number of tokens"
        )
    return count_tokens


def resolve_prefix(strip_prefix: str | None) -> str | None:
    """The prefix to remove from the published names.

    Raises:
        ValueError: if it is not text.
    """
    if not isinstance(strip_prefix, (str, type(None))):
        raise ValueError(f"strip_prefix={strip_prefix!r} must be text, e.g. 'model.'")
    return strip_prefix


def resolve_interval(
    every_n_tokens: float | None, every_n_steps: float | None
) -> tuple[int, Literal["tokens", "steps"]]:
    """The interval and its unit; by default 4B tokens.

    Raises:
        ValueError: if both are given, or one is not a positive number.
    """
    if every_n_tokens is not None and every_n_steps is not None:
        raise ValueError(
            f"every_n_tokens={every_n_tokens} and every_n_steps={every_n_steps} were both given; give one"
        )
    if every_n_steps is not None:
        return positive("every_n_steps", every_n_steps), "steps"
    return positive("every_n_tokens", DEFAULT_TOKENS if every_n_tokens is None else every_n_tokens), "tokens"


def resolve_methods(method: MethodOption, window: int) -> dict[str, MergeMethod]:
    """The method of each phase.

    ``"auto"`` is ``sma`` in the stable phase and ``ema`` in the decay. A mapping may leave a phase to it.

    Raises:
        ValueError: for an unknown phase, method or option, or for weights that don't fit a window while it
            fills up or once it is full.
    """
    chosen = _by_phase(method)
    if unknown := set(chosen) - set(MERGED_PHASES):
        raise ValueError(
            f"method={method!r} names the phases {sorted(unknown)}; the phases that are merged are "
            f"{', '.join(MERGED_PHASES)}. For a method's options give an object, e.g. Ema(alpha=0.1)"
        )
    try:
        methods = {phase: resolve_method(AUTO[phase] if m == "auto" else m) for phase, m in chosen.items()}
    except ValueError as error:
        raise ValueError(f"method={method!r}: {error}") from None
    for chosen_method in methods.values():
        check_fits(f"method={chosen_method!r}", chosen_method, window)
    return methods


def resolve_experts(base: object, experts: object, method: MethodOption) -> ExpertOptions | None:
    """The finished experts of this run's base, and how all of them are merged.

    A method that is given by its name is tuned on validation data; by default it is ``task_arithmetic``.

    Raises:
        ValueError: for a base without experts, what is not a list of paths, or a method for each phase.
    """
    if isinstance(experts, (str, os.PathLike)):
        experts = [experts]
    if not isinstance(experts, Sequence) or not all(isinstance(p, (str, os.PathLike)) for p in experts):
        raise ValueError(f"experts={experts!r} must be a list of the paths of finished experts")
    if base is not None and not isinstance(base, (str, os.PathLike)):
        raise ValueError(f"base={base!r} must be the path of the model that the experts began as")
    if not experts:
        if base is not None:
            raise ValueError(
                f"base={str(base)!r} has no meaning without experts=[…], the paths of finished ones"
            )
        return None
    if isinstance(method, Mapping):
        raise ValueError(f"method={method!r}: with experts=… it is one method, which merges the experts")
    try:
        chosen = resolve_method("task_arithmetic" if method == "auto" else method)
    except ValueError as error:
        raise ValueError(f"method={method!r}: {error}") from None
    paths = tuple(local_path(path) for path in experts)
    return ExpertOptions(local_path(base) if base else None, paths, chosen, isinstance(method, str))


def _by_phase(method: MethodOption) -> dict[str, str | MergeMethod]:
    given = method if isinstance(method, Mapping) else dict.fromkeys(MERGED_PHASES, method)
    return {**dict.fromkeys(MERGED_PHASES, "auto"), **given}


def resolve_classes(evaluate_with: str | type | Sequence[str | type]) -> tuple[str, ...]:
    """The names of the callbacks' classes.

    Raises:
        ValueError: for anything that is neither a class nor a name.
    """
    several = [evaluate_with] if isinstance(evaluate_with, (str, type)) else evaluate_with
    if not isinstance(several, Sequence) or not all(isinstance(kind, (str, type)) for kind in several):
        raise ValueError(
            f"evaluate_with={evaluate_with!r} must be a list of callbacks' classes, or their names"
        )
    return tuple(kind if isinstance(kind, str) else kind.__name__ for kind in several)


def resolve_storage(storage: str, durable: bool) -> str:
    """``"auto"`` is ``"disk"`` (the page cache keeps it in memory), or ``"cpu"`` if not durable.

    Raises:
        ValueError: for an unknown storage, or ``"disk"`` with ``durable=False``.
    """
    if storage == "auto":
        return "disk" if durable else "cpu"
    if storage not in tuple(STORAGES):
        *others, last = map(repr, ("auto", *STORAGES))
        raise ValueError(f"storage={storage!r} must be {', '.join(others)} or {last}")
    if STORAGES[storage].needs_files and not durable:
        raise ValueError(
            f"storage={storage!r} keeps the window in files, durable=False forbids them; drop one of the two"
        )
    return storage


def resolve_codec(codec: str | None, snapshot_dtype: object) -> str:
    """The snapshot codec; empty for uncompressed snapshots.

    Raises:
        ValueError: for an unknown one, or one together with a ``snapshot_dtype``.
    """
    if codec not in (None, *CODECS):
        raise ValueError(
            f"snapshot_codec={codec!r} must be one of {[*CODECS]}, or None to keep snapshots as they are"
        )
    if codec is not None and snapshot_dtype is not None:
        raise ValueError(
            f"snapshot_codec={codec!r} and snapshot_dtype={str(snapshot_dtype)!r} were both given; give one"
        )
    return codec or ""


def resolve_format(format: str) -> str:
    """The format of the emissions.

    Raises:
        ValueError: for an unknown one.
    """
    if format not in ("safetensors", "dcp"):
        raise ValueError(
            f"format={format!r} must be 'safetensors', or 'dcp' for that of torch.distributed.checkpoint"
        )
    return format


def resolve_dirpath(dirpath: str | os.PathLike[str] | None) -> Path | str | None:
    """A local folder as a path, a URL unchanged.

    Raises:
        ValueError: if it is a file, its nearest existing parent can't be written, or fsspec does not know the
            URL.
    """
    if dirpath is None:
        return None
    if not isinstance(dirpath, (str, os.PathLike)):
        raise ValueError(f"dirpath={dirpath!r} must be the path of a folder")
    if is_remote(dirpath):
        url = str(dirpath).rstrip("/")
        try:
            file_system_of(url)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"dirpath={str(dirpath)!r} can't be used: {error}; install what is missing, or name another"
            ) from None
        return url
    path = local_path(dirpath)
    try:
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        is_folder, writable = existing.is_dir(), os.access(existing, os.W_OK | os.X_OK)
    except PermissionError as error:
        raise ValueError(f"dirpath={str(dirpath)!r} can't be written: {error}; name another folder") from None
    if not is_folder:
        raise ValueError(f"dirpath={str(dirpath)!r}: {existing} is a file; name a folder")
    if not writable:
        raise ValueError(f"dirpath={str(dirpath)!r}: {existing} can't be written; name another folder")
    return path
