"""The commands ``merge`` and ``methods``."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from merge_callback.checkpoints.open import recorded_step
from merge_callback.checkpoints.plain_yaml import read_value
from merge_callback.checks import one_of
from merge_callback.cli.config_file import checked, is_plain, read_options
from merge_callback.cli.dry_run import of_merge, tell_dry
from merge_callback.cli.imports import import_all
from merge_callback.cli.merge_arguments import (
    DEFAULTS,
    FORMATS,
    IMPORT_HELP,
    add_form,
    add_range,
    chosen,
    job_of,
    notes_of,
    own_line,
    tell,
)
from merge_callback.merging import METHODS, MergeMethod, resolve_method
from merge_callback.merging.method import own_options
from merge_callback.offline.job import Job
from merge_callback.offline.merge_adapters import merge_adapters, opened_adapters
from merge_callback.offline.merge_files import merge_files
from merge_callback.offline.peers import Peers, peers_of_launcher
from merge_callback.offline.posthoc import Reconstruction, reconstruction
from merge_callback.offline.selection import Selection

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
    "dry_run": bool,
    "optimizer_state": bool,
    "quiet": bool,
    "sigma": float,
}
"""What a file may give for an option; text for all others."""

_POSTHOC = ("posthoc-ema", "posthoc_ema")
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
  merge-callback merge run/ --method posthoc-ema --sigma 0.08 --output ema
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
    add_range(add)
    add("--last", type=int, metavar="N", help="of the rest, only the last N")
    add("--base", type=Path, metavar="CKPT", help="initial model of the task vectors (the first checkpoint)")
    add("--as", dest="kind", choices=FORMATS, help="format; of LoRA adapters lora, or model with --base")
    add(
        "--rank",
        type=int,
        metavar="R",
        help="of a merged LoRA adapter (the sum of all ranks, which is exact)",
    )
    add("--sigma", type=float, metavar="S", help="with --method posthoc-ema: the width of the average")
    add(
        "--optimizer-state",
        action="store_true",
        help="merge Adam's moments with the same weights, too: training resumes from the output",
    )
    add_form(add)
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
    parser.add_argument("--import", dest="imports", nargs="+", metavar="MODULE", help=IMPORT_HELP)


def _merge(parsed: argparse.Namespace) -> int:
    explicit = vars(parsed)
    config = _read_config(parsed.config) if "config" in parsed else {}
    given = {**DEFAULTS, **config, **explicit}
    if given["optimizer_state"] and "kind" not in {**config, **explicit}:
        given["kind"] = "lightning"
    one_of("--as", given["kind"], FORMATS)
    if given["optimizer_state"] and given["kind"] != "lightning":
        raise ValueError(f"--optimizer-state makes a Lightning checkpoint; leave --as {given['kind']} out")
    if not given["checkpoints"] or given["output"] is None:
        explicit["refuse"]("name the checkpoints to merge, and the folder to make with --output")
    if given["method"] in _POSTHOC:
        found = _reconstruction(given)
        method: MergeMethod = found.method
        selection = Selection(found.files, [recorded_step(path) for path in found.files], [])
    else:
        method = _method(given)
        selection = chosen(given, method)
    told, is_quiet = selection.lines(), given["quiet"]  # where quiet, told when all went well
    job = job_of(given, selection.chosen, method, (lambda: None) if is_quiet else (lambda: tell(told)))
    if given["dry_run"]:
        tell(told)
        return tell_dry(of_merge(job, Path(given["output"])))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each of the workers
    try:
        with peers_of_launcher() as peers:
            record = _merged(job, Path(given["output"]), peers)
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) or not (place := own_line(error, method)):
            raise
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from None
    finally:
        torch.set_num_threads(threads)
    if not record:  # of a process that has helped another
        return 0
    tell(
        [
            *(told if is_quiet else []),
            *notes_of(record),
            *_told_error(record.get("lora", {}).get("relative_error", {})),
            f"{given['output']}: {method.name} of {len(record['inputs'])} checkpoints",
        ]
    )
    return 0


def _reconstruction(given: Mapping[str, Any]) -> Reconstruction:
    """What makes a running average of another width.

    Raises:
        ValueError: for anything but one run and a width, or options that have no meaning here.
    """
    named = [name for name in ("base", "first_step", "last") if given[name] is not None]
    if len(given["checkpoints"]) != 1 or given["sigma"] is None or named:
        raise ValueError(
            f"--method {given['method']} takes the folder of one run, --sigma and, if it is not to end with "
            "the run, --to; e.g. merge-callback merge run/ --method posthoc-ema --sigma 0.08 --output ema"
        )
    return reconstruction(Path(given["checkpoints"][0]), given["sigma"], given["last_step"])


def _merged(job: Job, output: Path, peers: Peers) -> dict[str, Any]:
    """Merges models, or LoRA adapters, which are small, on rank 0, if that is what the checkpoints are."""
    if adapters := opened_adapters(job.checkpoints):
        if job.optimizer_state:
            raise ValueError(
                f"--optimizer-state is for whole models, and {job.checkpoints[-1]} is a LoRA adapter"
            )
        return merge_adapters(job, adapters, output) if peers.rank == 0 else {}
    if job.kind in ("lora", "model") or job.rank is not None:
        option = f"--as {job.kind}" if job.rank is None else "--rank"
        raise ValueError(f"{option} is for LoRA adapters, and {job.checkpoints[-1]} is none")
    return merge_files(job, output, peers)


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
        elif name in DEFAULTS and value is not None:
            found[name] = checked(where, value, _KINDS.get(name, str))
        elif name not in DEFAULTS:
            raise ValueError(f"{where} is an unknown option; see merge-callback merge --help")
    return found


def _flag(option: str) -> str:
    """What a method's option is called; ``--method-last`` if ``--last`` is the command's own."""
    taken = option in DEFAULTS or option in _RENAMED or option in ("config", "help")
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
