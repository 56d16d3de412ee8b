"""The command ``validate``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from merge_callback.engine.plan import Plan
from merge_callback.options import DEFAULTS, Options
from merge_callback.snapshots.files import printable

_DESCRIPTION = """\
Check a configuration for `merge-callback fit`, or for a LightningCLI of your own, without training. All
arguments are read as `fit` reads them: unknown ones, classes that can't be imported and values of a wrong
type are refused. CheckpointMergeCallback is made, with its options, and what it would do is told: how many
snapshots, which methods. The model and the data are not made, so what depends on them (exclude patterns,
room for the window) is checked when training begins.

Every problem is one line with the option, its value and what to do. Exit status 1 if there is one. Further
arguments are those of `fit`, e.g. --trainer.max_steps 1000."""

_EXAMPLES = """\
example:
  merge-callback validate --config config.yaml
"""

_BESIDE = ("method", "spike")
"""Options that have to fit the window."""

_IMPORTED = ("on_spike", "optimizer")
"""Options of ``spike`` that may be the import path of a function."""


def add_validate(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``validate``."""
    parser.set_defaults(run=_validate, takes_more=True)
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--config", type=Path, action="append", required=True, metavar="FILE", help="YAML, as fit takes it")


def _validate(parsed: argparse.Namespace) -> int:
    problems = [f"{path}: {line}" for path in parsed.config for line in problems_of(path)]
    if not problems:
        from merge_callback.demo.fit import FitOptionsError, check

        try:
            files = [argument for path in parsed.config for argument in ("--config", str(path))]
            callbacks, steps = check([*files, *parsed.more])
        except FitOptionsError as error:
            problems = [str(error)]
    for line in problems:
        print(printable(f"problem      {line}"))
    if problems:
        return 1
    if not callbacks:
        print("there is no CheckpointMergeCallback among the trainer's callbacks; all else can be read")
    for callback in callbacks:
        print(printable(repr(callback)))
        for line in _plan(callback.options, steps):
            print(line)
    return 0


def problems_of(path: Path) -> Iterator[str]:
    """What the callback refuses of the options in a file of LightningCLI, each option by itself.

    Raises:
        ValueError: if the file is not sound YAML.
        OSError: if it can't be read.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not sound YAML ({' '.join(str(error).split())})") from None
    for index, options in _callbacks(content):
        for name, value in options.items():
            beside = {"window": options["window"]} if name in _BESIDE and "window" in options else {}
            try:
                Options.resolve(**{**beside, name: _plain(name, value)})
            except (ValueError, TypeError) as error:
                if not (beside and str(error).startswith("window=")):
                    yield f"trainer.callbacks[{index}]: {error}"


def _callbacks(content: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The options of each merging callback, and its place among the callbacks."""
    root = content if isinstance(content, dict) else {}
    root = root["fit"] if isinstance(root.get("fit"), dict) else root
    trainer = root.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    for index, entry in enumerate(callbacks if isinstance(callbacks, list) else [callbacks]):
        if not isinstance(entry, dict) or not isinstance(entry.get("init_args"), dict):
            continue
        if str(entry.get("class_path")).rpartition(".")[2] == "CheckpointMergeCallback":
            yield index, entry["init_args"]


def _plain(name: str, value: Any) -> Any:
    """A value without the names of classes and functions in it, which LightningCLI imports."""
    if isinstance(value, dict) and "class_path" in value:
        return DEFAULTS[name]
    if name == "count_tokens" and isinstance(value, str):
        return None
    if name == "spike" and isinstance(value, dict):
        plain = {k: v for k, v in value.items() if k not in _IMPORTED or "." not in str(v)}
        return {k: v for k, v in plain.items() if not isinstance(v, dict) or "class_path" not in v}
    if name == "method" and isinstance(value, dict):
        return {phase: _plain(name, method) for phase, method in value.items()}
    return value


def _plan(options: Options, steps: int | None) -> Iterator[str]:
    """What the callback is going to do, as far as that does not depend on the model."""
    plan = Plan(
        window=options.window,
        every=options.every,
        unit=options.unit,
        total_steps=steps,
        snapshot_bytes=0,
        rank_bytes=0,
        window_bytes=0,
        storage=options.storage,
        folder=None,
        free=0,
        methods={phase: method.name for phase, method in options.methods.items()},
    )
    interval, _, methods = plan.lines()
    yield from (interval, methods, *(f"warning: {line}" for line in plan.warnings()))
