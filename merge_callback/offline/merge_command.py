"""The commands ``merge`` and ``methods``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import torch

from merge_callback.checks import one_of, resolve_dtype, resolve_size
from merge_callback.merging import METHODS, MergeMethod, resolve_method
from merge_callback.offline import workers
from merge_callback.offline.config_file import checked, is_plain, read_options, read_value
from merge_callback.offline.merge_files import Job, Naming, merge_files
from merge_callback.offline.selection import select
from merge_callback.snapshots.files import printable

_RENAMED = {"as": "kind", "import": "imports"}  # an option's name in a file, and its own
_KINDS = {
    "checkpoints": list,
    "exclude": list,
    "imports": list,
    "last": int,
    "every": int,
    "force": bool,
    "quiet": bool,
}
"""What a file may give for an option; text for all others."""

_DEFAULTS: dict[str, Any] = {
    "checkpoints": [],
    "output": None,
    "method": "sma",
    "last": None,
    "every": 1,
    "base": None,
    "dtype": None,
    "exclude": [],
    "state_key": None,
    "strip_prefix": "",
    "prefix": "",
    "shard_size": "5GB",
    "kind": "safetensors",
    "force": False,
    "quiet": False,
    "imports": [],
}

_EXAMPLES = """\
examples:
  merge-callback merge run/*step=*.ckpt --method wma --output merged
  merge-callback merge run/ --last 10 --method ties --density 0.8 --output merged
  merge-callback merge run-a/ckpt run-b/ckpt --weights 0.5 0.5 --dtype bf16 --output merged
  merge-callback merge --config merge.yaml --output merged
"""


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``merge``, the options of every method among them."""
    parser.set_defaults(run=_merge)
    parser.argument_default = argparse.SUPPRESS  # what was not given is not there: a file may give it
    parser.epilog, parser.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT", help="oldest first; files, folders, or folders of a run")
    add("--config", type=Path, metavar="FILE", help="YAML with any of these options, by their long names")
    add("--output", type=Path, metavar="DIR", help="the folder to make")
    add("--method", help="a name that `merge-callback methods` lists (sma)")
    add("--last", type=int, metavar="N", help="of all these, only the last N")
    add("--every", type=int, metavar="K", help="of all these, only every K-th, from the last")
    add("--base", type=Path, metavar="CKPT", help="initial model of the task vectors (the first checkpoint)")
    add("--dtype", metavar="TYPE", help="of the merged weights: fp32, bf16, fp16 or fp64 (the checkpoints')")
    add("--exclude", nargs="+", metavar="PATTERN", help="names copied from the last checkpoint")
    add("--state-key", metavar="KEY", help="where in the files the weights are, e.g. 'model_ema'")
    add("--strip-prefix", metavar="P", help="taken off the names, e.g. 'model.'")
    add("--prefix", metavar="P", help="put before the names")
    add("--shard-size", metavar="SIZE", help="a larger model is split (5GB)")
    add("--as", dest="kind", choices=("safetensors", "lightning"), help="format")
    add("--force", action="store_true", help="replace the output folder if it is there")
    add("--quiet", action="store_true", help="no progress bar")
    add("--import", dest="imports", nargs="+", metavar="MODULE", help="that register own methods")
    group = parser.add_argument_group("options of the methods")
    for name, used_by in _method_options().items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"option_{name}",
            nargs="+" if name == "weights" else None,
            type=float if name == "weights" else _option_value,
            help=", ".join(used_by),
        )


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``methods``: there are none."""
    parser.set_defaults(run=_list_methods)


def _merge(parsed: argparse.Namespace) -> int:
    explicit = vars(parsed)
    given = {**_DEFAULTS, **(_read_config(parsed.config) if "config" in parsed else {}), **explicit}
    one_of("--as", given["kind"], ("safetensors", "lightning"))
    _import(given["imports"], here="imports" in explicit)
    if not given["checkpoints"] or given["output"] is None:
        raise ValueError("name the checkpoints to merge, and the folder to make with --output")
    job = _job(given)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each of the workers
    try:
        record = merge_files(job, Path(given["output"]))
    finally:
        torch.set_num_threads(threads)
    method = record["method"]["name"]
    print(
        f"{printable(str(given['output']))}: {method} of {len(record['inputs'])} checkpoints", file=sys.stderr
    )
    return 0


class _InCurrentFolder(MetaPathFinder):
    """Finds one module in the current folder, where Python finds it nowhere else.

    One alone: the folder may be a downloaded one, and whatever is imported later, by torch say, must not be
    found there.
    """

    def __init__(self, module: str) -> None:
        self.name = module.partition(".")[0]

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module, or the package that it lies in."""
        return PathFinder.find_spec(fullname, [os.getcwd()]) if fullname == self.name else None


def _import(modules: Iterable[str], here: bool) -> None:
    """Imports the modules that register methods.

    Args:
        modules: their names.
        here: from the current folder, too: not on the word of a file, which may be anyone's.
    """
    for module in modules:
        finders = [_InCurrentFolder(module)] if here else []
        sys.meta_path += finders
        try:
            import_module(module)
        except (ImportError, TypeError) as error:
            raise ValueError(f"--import {module}: {error}{_mend(module, error, here)}") from None
        finally:
            for finder in finders:
                sys.meta_path.remove(finder)


def _mend(module: str, error: Exception, here: bool) -> str:
    missing = getattr(error, "name", None)
    if not here:
        return "; a module of the current folder has to be named on the command line, with --import"
    return f"; if {missing} lies beside it, name it first" if missing and missing != module else ""


def _job(given: Mapping[str, Any]) -> Job:
    checkpoints = select([str(path) for path in given["checkpoints"]], given["last"], given["every"])
    base = given["base"]
    return Job(
        checkpoints=checkpoints,
        method=_method(given),
        base=None if base is None else Path(base),
        dtype=resolve_dtype("--dtype", given["dtype"]),
        exclude=given["exclude"],
        state_key=given["state_key"],
        naming=Naming(given["strip_prefix"], given["prefix"]),
        max_shard_bytes=resolve_size("--shard-size", given["shard_size"]),
        kind=given["kind"],
        force=given["force"],
        progress=not given["quiet"],
        workers=workers.available(),
    )


def _method(given: Mapping[str, Any]) -> MergeMethod:
    options = {key.removeprefix("option_"): v for key, v in given.items() if key.startswith("option_")}
    name = given["method"]
    return resolve_method("weighted" if name == "sma" and "weights" in options else name, **options)


def _read_config(path: Path) -> dict[str, Any]:
    """The options that a file gives."""
    options = _method_options().keys()
    found: dict[str, Any] = {}
    for key, value in read_options(path).items():
        name, where = _RENAMED.get(key, str(key).replace("-", "_")), f"{path}: {key!r:.100}"
        if name in options and is_plain(value):
            found[f"option_{name}"] = value
        elif name in options:
            raise ValueError(f"{where} is {value!r:.100}, expected a number, text or a list of them")
        elif name in _DEFAULTS and value is not None:
            found[name] = checked(where, value, _KINDS.get(name, str))
        elif name not in _DEFAULTS:
            raise ValueError(f"{where} is an unknown option; see merge-callback merge --help")
    return found


def _option_value(text: str) -> Any:
    try:
        return read_value(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.100} is {error}") from None


def _method_options() -> dict[str, list[str]]:
    """Every option of a method, with the methods that have it."""
    found: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for option in fields(method):  # type: ignore[arg-type]
            found.setdefault(option.name, []).append(name)
    return found


def _list_methods(parsed: argparse.Namespace) -> int:
    for name, method in METHODS.items():
        options = ", ".join(f"{f.name}={f.default!r}" for f in fields(method))  # type: ignore[arg-type]
        print(f"{name:16} {_summary(method)}")
        facts = {"options": options, "needs": ", ".join(method.needs), "source": method.reference}
        for label, text in facts.items():
            if text:
                print(f"{'':16} {label}: {text}")
    return 0


def _summary(method: type[MergeMethod]) -> str:
    return (method.__doc__ or "").split("\n")[0].replace("``", "")
