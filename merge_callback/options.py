"""The callback's options, checked once: every message names the option, the value and the mend."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from merge_callback.merging import LinearMethod, MergeMethod, Weighted, resolve_method
from merge_callback.snapshots.storage import Storage
from merge_callback.training.token_clock import TokenCounter

DEFAULT_TOKENS = 4_000_000_000
"""Spacing of the snapshots in tokens: 4B serves 0.7B and 7B models (arXiv 2505.12082, section 4.3)."""

MERGED_PHASES = ("stable", "decay")

MethodOption = str | MergeMethod | Mapping[str, str | MergeMethod]

SNAPSHOT_DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class SpikeOptions:
    """What is a loss spike, and what is done about it.

    A spike is a loss that is not finite, or ``patience`` losses in a row above
    ``median + max(threshold · 1.4826 · MAD, floor · |median|)`` of the last 128 losses that were not.

    Raises:
        ValueError: for an option that makes no sense; the message names it, its value and the mend.
    """

    action: Literal["restore", "warn", "off"] = "restore"
    """``"restore"`` the run from the merge of the snapshots before the spike and go on; ``"warn"`` only; or
    don't look at all."""
    threshold: float = 6.0
    """How many robust standard deviations above the median an outlier lies."""
    floor: float = 0.05
    """How far above the median an outlier lies at least, as a share of it."""
    patience: int = 5
    """Outliers in a row that make a spike; fewer heal by themselves. A NaN is one at once."""
    grad_norm: bool = False
    """Watch the norm of the unclipped gradients as well, by the same rule. Reads the gradients every step."""
    pma_window: int = 3
    """Snapshots that are merged into the restored weights (PMA-init, arXiv 2505.12082 section 4.5)."""
    guard: int = 10
    """Optimizer steps before the first outlier from which on no snapshot is trusted: the damage is older than
    the loss shows (1 to 8 steps, arXiv 2304.13013 section 3.4)."""
    method: str | MergeMethod = "sma"
    """How they are merged."""
    optimizer: Literal["keep", "reset", "scale"] | Callable[[Optimizer], None] = "keep"
    """``"keep"`` the optimizers' state where it is finite (else it is reset), ``"reset"`` it in place,
    ``"scale"`` its moments as if all gradients had been ``optimizer_scale`` times as large; or a function of
    the optimizer. On the demo's models ``"keep"`` recovers soonest."""
    optimizer_scale: float = 0.1
    """See ``optimizer``."""
    rewarm_steps: int = 100
    """Optimizer steps over which the learning rate ramps up again, from 0 to where the schedule then is."""
    lr_factor: float = 1.0
    """Multiplies the learning rate for good, at each restore."""
    cooldown: int | None = None
    """Optimizer steps after a restore within which another spike means that it did not help: the next restore
    is from older snapshots, those after it halve the learning rate. Default: five times ``rewarm_steps``, at
    least 128."""
    max_restores: int = 5
    """Restores in a row, each within the cooldown of the one before; a further one stops the run."""
    no_snapshot: Literal["warn", "stop"] = "warn"
    """What to do about a spike before there is a snapshot old enough to restore."""

    def __post_init__(self) -> None:
        one_of("spike.action", self.action, ("restore", "warn", "off"))
        one_of("spike.no_snapshot", self.no_snapshot, ("warn", "stop"))
        if not callable(self.optimizer):
            one_of("spike.optimizer", self.optimizer, ("keep", "reset", "scale"))
        for option in ("patience", "pma_window", "max_restores"):
            object.__setattr__(self, option, positive(f"spike.{option}", getattr(self, option)))
        for option in ("guard", "rewarm_steps", "cooldown"):
            if option != "cooldown" or self.cooldown is not None:
                object.__setattr__(self, option, not_negative(f"spike.{option}", getattr(self, option)))
        for option in ("threshold", "floor", "lr_factor", "optimizer_scale"):
            value, most = (
                getattr(self, option),
                1.0 if option in ("lr_factor", "optimizer_scale") else math.inf,
            )
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= most or value == math.inf:
                bound = " of at most 1" if most == 1 else ""
                raise ValueError(f"spike.{option}={value!r} must be a positive number{bound}")
        self._check_merging()

    @property
    def merging(self) -> LinearMethod:
        """The method.

        Raises:
            ValueError: for an unknown one, or one that is not linear.
        """
        method = resolve_method(self.method)
        if not isinstance(method, LinearMethod):
            raise ValueError("it must be a linear method, e.g. 'sma'")
        return method

    @property
    def cooldown_steps(self) -> int:
        """The cooldown in optimizer steps."""
        return max(5 * self.rewarm_steps, 128) if self.cooldown is None else self.cooldown

    def _check_merging(self) -> None:
        """Makes sure that the method serves as many snapshots as there may be."""
        try:
            for size in range(1, self.pma_window + 1):
                self.merging.normalised_weights([float(i) for i in range(size)])
        except ValueError as error:
            raise ValueError(
                f"spike.method={self.method!r} does not serve spike.pma_window={self.pma_window}: {error}"
            ) from None


@dataclass(frozen=True)
class Options:
    """What the callback was given, resolved."""

    window: int
    every: int
    unit: Literal["tokens", "steps"]
    count_tokens: TokenCounter | None
    methods: dict[str, MergeMethod]
    storage: Storage
    durable: bool
    snapshot_dtype: torch.dtype | None
    dirpath: Path | None
    emit_every: int
    keep_last: int | None
    strip_prefix: str | None
    max_shard_bytes: int
    evaluate: bool
    diversity_lag: int
    exclude: tuple[str, ...]
    spike: SpikeOptions

    @classmethod
    def resolve(cls, **given: Any) -> Options:
        """Checks the callback's arguments, by their names there, and resolves defaults and spellings.

        Raises:
            ValueError: see the functions below.
        """
        every, unit = resolve_interval(given["every_n_tokens"], given["every_n_steps"])
        keep_last, emit_every = given["keep_last"], given["emit_every"]
        return cls(
            window=positive("window", given["window"]),
            every=every,
            unit=unit,
            count_tokens=given["count_tokens"],
            methods=resolve_methods(given["method"], given["window"]),
            storage=resolve_storage(given["storage"], given["durable"]),
            durable=given["durable"],
            snapshot_dtype=resolve_dtype(given["snapshot_dtype"]),
            dirpath=resolve_dirpath(given["dirpath"]),
            emit_every=0 if emit_every == 0 else positive("emit_every", emit_every),
            keep_last=None if keep_last is None else positive("keep_last", keep_last),
            strip_prefix=given["strip_prefix"],
            max_shard_bytes=resolve_size(given["max_shard_size"]),
            evaluate=given["evaluate"],
            diversity_lag=positive("diversity_lag", given["diversity_lag"]),
            exclude=patterns("exclude", given["exclude"]),
            spike=resolve_spike(given["spike"]),
        )


def resolve_interval(
    every_n_tokens: int | None, every_n_steps: int | None
) -> tuple[int, Literal["tokens", "steps"]]:
    """The interval and its unit; 4B tokens where none is given.

    Raises:
        ValueError: where both are given, or one is not a positive number.
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

    ``"auto"`` is ``sma`` in both phases; a mapping may leave a phase to ``auto``.

    Raises:
        ValueError: for an unknown phase, method or option, or given weights that can't serve a window that
            is filling up or full.
    """
    if not isinstance(method, Mapping):
        method = dict.fromkeys(MERGED_PHASES, method)
    if unknown := set(method) - set(MERGED_PHASES):
        raise ValueError(
            f"method={dict(method)!r} names the phases {sorted(unknown)}; "
            f"the phases that are merged are {', '.join(MERGED_PHASES)}"
        )
    chosen = {phase: method.get(phase, "auto") for phase in MERGED_PHASES}
    methods = {phase: resolve_method("sma" if m == "auto" else m) for phase, m in chosen.items()}
    for weighted in (m for m in methods.values() if isinstance(m, Weighted)):
        for size in range(2, window + 1):
            try:
                weighted.normalised_weights([float(i) for i in range(size)])
            except ValueError as error:
                raise ValueError(f"method={weighted!r} does not serve window={window}: {error}") from None
    return methods


def resolve_storage(storage: str, durable: bool) -> Storage:
    """``"auto"`` is ``"disk"`` (the page cache keeps it in memory), or ``"cpu"`` if not durable.

    Raises:
        ValueError: for an unknown storage, or ``"disk"`` with ``durable=False``.
    """
    if storage == "auto":
        return "disk" if durable else "cpu"
    if storage not in ("disk", "cpu", "device"):
        raise ValueError(f"storage={storage!r} must be 'auto', 'disk', 'cpu' or 'device'")
    if storage == "disk" and not durable:
        raise ValueError(
            "storage='disk' keeps the window in files, durable=False forbids them; drop one of the two"
        )
    return storage  # type: ignore[return-value]


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype by its short name (``"bf16"``) or itself.

    Raises:
        ValueError: for any other name or dtype.
    """
    found = dtype
    if isinstance(dtype, str):
        found = SNAPSHOT_DTYPES.get(dtype, getattr(torch, dtype.removeprefix("torch."), None))
    if found is not None and found in SNAPSHOT_DTYPES.values():
        return found  # type: ignore[return-value]
    if dtype is None:
        return None
    raise ValueError(f"snapshot_dtype={dtype!r} must be one of {', '.join(SNAPSHOT_DTYPES)}, or None")


def resolve_dirpath(dirpath: str | os.PathLike[str] | None) -> Path | None:
    """The folder as a path.

    Raises:
        ValueError: where it is a file, or its nearest existing parent can't be written.
    """
    if dirpath is None:
        return None
    path = Path(dirpath).expanduser()
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


def resolve_spike(spike: SpikeOptions | None) -> SpikeOptions:
    """The defaults where nothing is given.

    Raises:
        ValueError: for anything that is not a ``SpikeOptions``.
    """
    if spike is not None and not isinstance(spike, SpikeOptions):
        raise ValueError(f"spike={spike!r} must be a SpikeOptions, e.g. SpikeOptions(action='warn')")
    return spike or SpikeOptions()


def resolve_size(max_shard_size: int | str) -> int:
    """``"5GB"`` (or a number of bytes) in bytes.

    Raises:
        ValueError: for any other text, or a size that is not positive.
    """
    if isinstance(max_shard_size, str):
        text = max_shard_size.upper().replace(" ", "")
        unit = next((u for u in ("TB", "GB", "MB", "KB", "B") if text.endswith(u)), "")
        try:
            max_shard_size = int(float(text.removesuffix(unit)) * _UNITS[unit or "B"])
        except ValueError:
            raise ValueError(
                f"max_shard_size={max_shard_size!r} must be a size like '5GB', or bytes"
            ) from None
    return positive("max_shard_size", max_shard_size)


def positive(option: str, value: float) -> int:
    """``value`` if it is a positive whole number.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 4e9 in YAML is a float
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{option}={value!r} must be a positive whole number")
    return value


def not_negative(option: str, value: float) -> int:
    """``value`` if it is 0 or a positive whole number.

    Raises:
        ValueError: otherwise.
    """
    return 0 if value == 0 and value is not False else positive(option, value)


def one_of(option: str, value: str, choices: Sequence[str]) -> None:
    """Makes sure that ``value`` is one of ``choices``.

    Raises:
        ValueError: otherwise.
    """
    if value not in choices:
        raise ValueError(f"{option}={value!r} must be one of {', '.join(map(repr, choices))}")


def patterns(option: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Name patterns as a tuple; one string is one pattern.

    Raises:
        ValueError: for anything that is not a string in it.
    """
    found = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f"{option}={value!r} must be a list of name patterns, e.g. ['*.router.bias']")
    return found
