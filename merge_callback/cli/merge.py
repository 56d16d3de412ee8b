"""The commands ``merge`` and ``methods``."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from merge_callback.checkpoints.plain_yaml import read_value
from merge_callback.checks import one_of, resolve_dtype, resolve_size
from merge_callback.cli.config_file import checked, is_plain, read_options
from merge_callback.cli.imports import import_all
from merge_callback.merging import METHODS, MergeMethod, Weighted, resolve_method
from merge_callback.merging.method import own_options
from merge_callback.offline import workers
from merge_callback.offline.job import Job, OutputNames
from merge_callback.offline.left_out import grouped
from merge_callback.offline.merge_adapters import merge_adapters, opened_adapters
from merge_callback.offline.merge_files import merge_files
from merge_callback.offline.selection import Selection, select
from merge_callback.snapshots.files import printable

_RENAMED = {"as": "kind", "import": "imports", "from": "first_step", "to": "last_step"}
"""An option's name in a file, and its own."""

_KINDS = {
    "checkpoints": list,
    "exclude": list,
    "imports": list,
    "last": int,
    "every": int,
    "first_step": int,
    "last_step": int,
    "rank": int,
    "keep_order": bool,
    "keep_all": bool,
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
    "first_step": None,
    "last_step": None,
    "keep_order": False,
    "keep_all": False,
    "base": None,
    "dtype": None,
    "exclude": [],
    "state_key": None,
    "strip_prefix": None,
    "prefix": "",
    "shard_size": None,
    "kind": "safetensors",
    "rank": None,
    "force": False,
    "quiet": False,
    "imports": [],
}

_FORMATS = ("safetensors", "lightning", "lora", "model")
_CHOICE = ("last", "every", "first_step", "last_step", "keep_order", "keep_all")
_IMPORT_HELP = "modules that register methods of your own"
_DESCRIPTION = """\
Merge checkpoints into a new folder, which appears complete or not at all. It needs no GPU, and a few
megabytes of memory whatever the size of the model. The inputs are put in the order of their steps, and stay
as they are. The output is of the kind of the last one: files that `from_pretrained` loads if that is a
model's folder. Defaults stand in brackets."""

_METHODS_DESCRIPTION = """\
List every merging method: what it computes, its options with their defaults and meanings, and its source."""

_EXAMPLES = """\
examples:
  merge-callback merge run/*step=*.ckpt --method wma --output merged
  merge-callback merge run/ --last 10 --method ties --density 0.8 --output merged
  merge-callback merge run-a/ckpt run-b/ckpt --weights 0.5 0.5 --dtype bf16 --output merged
  merge-callback merge run/ --import my_methods --method last_k --k 2 --output merged
  merge-callback merge --config merge.yaml --output merged
"""


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``merge``, the options of every method among them."""
    parser.set_defaults(run=_merge, refuse=parser.error)
    parser.argument_default = argparse.SUPPRESS  # what was not given is not there: a file may give it
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT", help="files, folders, or folders of a run")
    add("--config", type=Path, metavar="FILE", help="YAML with any of these options, by their long names")
    add("--output", type=Path, metavar="DIR", help="the folder to make; needed")
    add("--method", metavar="NAME", help="a name that `merge-callback methods` lists (sma)")
    add("--from", dest="first_step", type=int, metavar="STEP", help="of all these, only from that step on")
    add("--to", dest="last_step", type=int, metavar="STEP", help="and only up to that step")
    add("--every", type=int, metavar="K", help="of the rest, only every K-th, counted from the last")
    add("--last", type=int, metavar="N", help="of the rest, only the last N")
    add("--keep-order", action="store_true", help="take them in the order given, not by their steps")
    add("--keep-all", action="store_true", help="leave out no earlier merges, repeated ones, or spikes")
    add("--base", type=Path, metavar="CKPT", help="initial model of the task vectors (the first checkpoint)")
    add("--dtype", metavar="TYPE", help="of the merged weights: fp32, bf16, fp16 or fp64 (the checkpoints')")
    add("--exclude", nargs="+", metavar="PATTERN", help="names to copy from the last checkpoint, '*.bias'")
    add("--state-key", metavar="KEY", help="where in the files the weights are, e.g. 'model_ema'")
    add(
        "--strip-prefix",
        metavar="P",
        help="taken off the names, e.g. 'model.' (what a snapshot's run takes off)",
    )
    add("--prefix", metavar="P", help="put before the names")
    add("--shard-size", metavar="SIZE", help="a larger model is split (as the last checkpoint is, or 5GB)")
    add("--as", dest="kind", choices=_FORMATS, help="format; of LoRA adapters lora, or model with --base")
    add(
        "--rank",
        type=int,
        metavar="R",
        help="of a merged LoRA adapter (the sum of all ranks, which is exact)",
    )
    add("--force", action="store_true", help="replace the output folder if it is there")
    add("--quiet", action="store_true", help="no progress bar")
    add("--import", dest="imports", nargs="+", metavar="MODULE", help=_IMPORT_HELP)
    about = "explained by `merge-callback methods`; here with the methods that have them, and their defaults"
    group = parser.add_argument_group("options of the methods", about)
    for name, used_by in _method_options().items():
        group.add_argument(
            _flag(name),
            dest=f"option_{name}",
            nargs="+" if name == "weights" else None,
            type=float if name == "weights" else _option_value,
            metavar="W" if name == "weights" else "X",
            help=", ".join(used_by),
        )


def import_methods(arguments: Sequence[str]) -> None:
    """Imports the modules that a command line, or its ``--config``, names: their methods have options, too.

    Raises:
        ValueError: if one can't be imported, or the file is no file of options.
        OSError: if that can't be read.
    """
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, argument_default=argparse.SUPPRESS)
    early.add_argument("--import", dest="imports", nargs="+")
    early.add_argument("--config", type=Path)
    with suppress(argparse.ArgumentError):  # which the command's own parser tells
        named, _ = early.parse_known_args(arguments)
        import_all(getattr(named, "imports", []), here=True)
        if "config" in named:
            imports = read_options(named.config).get("import") or []
            import_all(checked(f"{named.config}: 'import'", imports, list), here=False)


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``methods``."""
    parser.set_defaults(run=_list_methods)
    parser.description = _METHODS_DESCRIPTION
    parser.add_argument("--import", dest="imports", nargs="+", metavar="MODULE", help=_IMPORT_HELP)


def _merge(parsed: argparse.Namespace) -> int:
    explicit = vars(parsed)
    given = {**_DEFAULTS, **(_read_config(parsed.config) if "config" in parsed else {}), **explicit}
    one_of("--as", given["kind"], _FORMATS)
    if not given["checkpoints"] or given["output"] is None:
        explicit["refuse"]("name the checkpoints to merge, and the folder to make with --output")
    method = _method(given)
    selection = _chosen(given, method)
    told, is_quiet = selection.lines(), given["quiet"]  # where quiet, told when all went well
    job = _job(given, selection.chosen, method, (lambda: None) if is_quiet else (lambda: _tell(told)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each of the workers
    try:
        record = _merged(job, Path(given["output"]))
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) or not (place := _own_line(error, method)):
            raise
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from None
    finally:
        torch.set_num_threads(threads)
    left_out = grouped(record["left_out"]).items()
    more = [f"not taken along: {', '.join(names)}: {reason}" for reason, names in left_out]
    if state := record.get("training_state", []):
        shown = ", ".join(state[:3]) + " …" * (len(state) > 3)
        more.append(f"left out as training state: {len(state)} tensors ({shown})")
    if held := record.get("not_finite", []):
        more.append(f"copied, as it holds the same NaN or Inf in all checkpoints: {', '.join(held)}")
    _tell(
        [
            *(told if is_quiet else []),
            *more,
            *_told_error(record.get("lora", {}).get("relative_error", {})),
            f"{given['output']}: {method.name} of {len(record['inputs'])} checkpoints",
        ]
    )
    return 0


def _merged(job: Job, output: Path) -> dict[str, Any]:
    """Merges models, or LoRA adapters if that is what the checkpoints are."""
    if adapters := opened_adapters(job.checkpoints):
        return merge_adapters(job, adapters, output)
    if job.kind in ("lora", "model") or job.rank is not None:
        option = f"--as {job.kind}" if job.rank is None else "--rank"
        raise ValueError(f"{option} is for LoRA adapters, and {job.checkpoints[-1]} is none")
    return merge_files(job, output)


def _told_error(errors: Mapping[str, float]) -> list[str]:
    """What cutting or rounding a merged adapter has changed, if it has."""
    if not any(errors.values()):
        return []
    worst = max(errors, key=lambda layer: errors[layer])
    mean = sum(errors.values()) / len(errors)
    return [
        f"relative error of ΔW: {mean:.3g} in the mean of {len(errors)} layers, {errors[worst]:.3g} at most, "
        f"in {worst}; all are in merge.json"
    ]


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line), file=sys.stderr)


def _own_line(error: Exception, method: MergeMethod) -> str:
    """The line of an own method's module in which it failed; empty for those of this package."""
    file = getattr(sys.modules.get(type(method).__module__), "__file__", None)
    if not file or type(method).__module__.startswith("merge_callback."):
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else ""


def _job(
    given: Mapping[str, Any], checkpoints: Sequence[Path], method: MergeMethod, begun: Callable[[], None]
) -> Job:
    base, size = given["base"], given["shard_size"]
    return Job(
        checkpoints=checkpoints,
        method=method,
        base=None if base is None else Path(base),
        dtype=resolve_dtype("--dtype", given["dtype"]),
        exclude=given["exclude"],
        state_key=given["state_key"],
        naming=OutputNames(given["strip_prefix"], given["prefix"]),
        max_shard_bytes=None if size is None else resolve_size("--shard-size", size),
        kind=given["kind"],
        rank=given["rank"],
        force=given["force"],
        progress=not given["quiet"],
        workers=workers.available(),
        begun=begun,
    )


def _chosen(given: Mapping[str, Any], method: MergeMethod) -> Selection:
    """The checkpoints to merge.

    Raises:
        ValueError: if there is only one, or weights were given in another order than theirs.
    """
    choice = {name: given[name] for name in _CHOICE}
    found = select([str(path) for path in given["checkpoints"]], **choice)
    if len(found.chosen) < 2 and given["base"] is None:
        names = "".join(f" ({path})" for path in found.chosen)
        raise ValueError("; ".join([f"only one checkpoint is left to merge{names}", *found.notes]))
    if found.is_reordered and isinstance(method, Weighted):
        raise ValueError(
            "--weights, one for each checkpoint, go with their order, and they were not given oldest first "
            f"(their steps: {', '.join(map(str, found.steps))}); say --keep-order, or give them in that order"
        )
    return found


def _method(given: Mapping[str, Any]) -> MergeMethod:
    options = {key.removeprefix("option_"): v for key, v in given.items() if key.startswith("option_")}
    name = given["method"]
    return resolve_method("weighted" if name == "sma" and "weights" in options else name, **options)


def _read_config(path: Path) -> dict[str, Any]:
    """The options that a file gives."""
    options = {_flag(option)[2:].replace("-", "_"): option for option in _method_options()}
    found: dict[str, Any] = {}
    for key, value in read_options(path).items():
        name, where = _RENAMED.get(key, str(key).replace("-", "_")), f"{path}: {key!r:.100}"
        if name in options and is_plain(value):
            found[f"option_{options[name]}"] = value
        elif name in options:
            raise ValueError(f"{where} is {value!r:.100}, expected a number, text or a list of them")
        elif name in _DEFAULTS and value is not None:
            found[name] = checked(where, value, _KINDS.get(name, str))
        elif name not in _DEFAULTS:
            raise ValueError(f"{where} is an unknown option; see merge-callback merge --help")
    return found


def _flag(option: str) -> str:
    """What a method's option is called; ``--method-last`` if ``--last`` is the command's own."""
    taken = option in _DEFAULTS or option in _RENAMED or option in ("config", "help")
    return f"--{'method-' if taken else ''}{option.replace('_', '-')}"


def _option_value(text: str) -> Any:
    try:
        return read_value(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.100} is {error}") from None


def _method_options() -> dict[str, list[str]]:
    """Every option of a method, with the methods that have it."""
    found: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for option in own_options(method):
            default = f" ({option.default})" if isinstance(option.default, (str, int, float)) else ""
            found.setdefault(option.name, []).append(name + default)
    return found


def _list_methods(parsed: argparse.Namespace) -> int:
    for name, method in METHODS.items():
        options = ", ".join(f"{f.name}={f.default!r}" for f in own_options(method))
        print(f"{name:16} {_summary(method)}")
        facts = {"options": options, **_meanings(method), "needs": ", ".join(method.needs)}
        for label, text in {**facts, "source": method.reference}.items():
            if text:
                print(f"{'':16} {label}: {text}")
    return 0


def _meanings(method: type[MergeMethod]) -> dict[str, str]:
    """What the options of a method mean, from its docstring."""
    text = inspect.cleandoc(method.__doc__ or "").partition("\nArgs:\n")[2]
    found = dict(re.findall(r"(?ms)^    (\w+): (.*?)(?=^    \w|^\S|\Z)", text))
    own = (option.name for option in own_options(method))
    return {f"  {name}": " ".join(found[name].replace("``", "").split()) for name in own if name in found}


def _summary(method: type[MergeMethod]) -> str:
    return (method.__doc__ or "").split("\n")[0].replace("``", "")
