"""The `merge-callback` command.

Every subcommand imports what it needs when it runs: merging files must not wait for Lightning.
"""

import argparse
import gc
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

import merge_callback

_EPILOG = """\
Each command explains itself: merge-callback merge --help. Inputs stay as they are.

The callback itself is used in Python:
  trainer = Trainer(callbacks=[merge_callback.CheckpointMergeCallback(every_n_steps=1000)])
  help(merge_callback.CheckpointMergeCallback)
"""

_DEMO = """\
Train a small GPT (about 120,000 parameters) on the text of Python's own standard library, on the CPU: 5,400
steps of warm-up, constant learning rate and decay, under four minutes on two cores. Every 40 steps the
callback takes a snapshot and merges the last ten. At the end a table shows the loss of the live and of the
merged weights at each validation. Nothing is downloaded.

A new folder DIR/version_N is written, of about 10 MB: curves.png, rows.json (the table), merges/ (the merged
weights and the window), checkpoints/, and logs for TensorBoard.

With --spike, three shorter runs instead (1,800 steps each): an unbroken one, and one
that an excessive learning rate breaks, with the callback, which restores it, and without."""

_DEMO_EXAMPLES = """\
examples:
  merge-callback demo
  merge-callback demo --steps-scale 0.1        half a minute; too short to see much
  merge-callback demo --spike
"""

_COMMANDS = {
    "demo": ("train a small GPT for a few minutes and see what merging gives", ""),
    "merge": ("merge checkpoint files, of any size, in little memory", "merge"),
    "sweep": ("merge in many ways, score every merge, keep the best", "sweep"),
    "moerge": ("make one model of LoRA experts that routes each token", "moerge"),
    "methods": ("list the merging methods, their options and sources", "merge"),
    "inspect": ("say what a checkpoint holds, and verify its checksums", "inspect"),
    "diversity": ("measure how far apart checkpoints lie", "measures"),
    "interference": ("measure how far task vectors agree", "measures"),
    "prune": ("remove older merges that a run has published", "prune"),
    "fit": ("train from a LightningCLI configuration: fit --config config.yaml", ""),
    "validate": ("check such a configuration without training", "validate"),
    "report": ("draw a page of a run, or show it while the run goes on", ""),
    "difficulty": ("tell which examples are hard, and what a merge forgets", "difficulty"),
}
"""What each command does, and the module in which its arguments are."""

_ON_FILES = {
    "merge",
    "diversity",
    "interference",
    "difficulty",
    "moerge",
    "inspect",
    "methods",
    "prune",
    "sweep",
}


def run() -> None:
    """The process of the command: runs it, and ends."""
    is_on_files = not _ON_FILES.isdisjoint(sys.argv[1:2])
    if is_on_files:
        # Modules are imported, and none of it is garbage: looking for that takes a sixth of the time.
        gc.set_threshold(100_000)
    status = main()
    if is_on_files:
        # Its work is on the disk, and nobody waits for anything but its end. To tear torch down takes the
        # interpreter .4 s, which is an eighth of merging ten checkpoints.
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments after the command's name; default: those of this process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["fit"]:  # before argparse: everything after it is LightningCLI's, --help too
        return _fit(arguments[1:])
    if arguments[:1] == ["report"]:  # before the others are imported: a page needs no torch
        from merge_callback.cli.report import report

        try:
            return report(arguments[1:])
        except (ValueError, OSError) as error:
            return _refuse(error)
    if arguments[:1] == ["demo"]:
        # Before torch loads OpenMP: by default a thread that waits spins for milliseconds, which starves the
        # one it waits for as soon as anything else runs. On two cores, the default and 4000 spins both take
        # 27 ms a step when idle; with both cores taken 100 to 1200 and about 100; never spinning takes 44.
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    if arguments[:1] in (["merge"], ["methods"]):
        from merge_callback.cli.merge import import_methods

        try:
            import_methods(arguments[1:])
        except (ValueError, OSError) as error:
            return _refuse(error)
    parser = _make_parser(arguments[0] if arguments else "")
    parsed, more = parser.parse_known_args(arguments)
    if more and not hasattr(parsed, "takes_more"):
        parser.prog += f" {arguments[0]}"
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    parsed.more = more
    remote = [a for a in arguments if re.match(r"[A-Za-z][\w+.:-]*://", a)]
    if remote and arguments[0] in _ON_FILES:
        return _refuse(f"{remote[0]}: the command works on local files; copy it to a local folder first")
    try:
        status: int = parsed.run(parsed)
    except BrokenPipeError:  # `| head` has seen enough; Python's own flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:  # the user's, and told as such
        return _refuse(error)
    except MemoryError:
        return _refuse("the memory does not suffice for what one of the files holds, or says it holds")
    return status


def _refuse(reason: object) -> int:
    from merge_callback.snapshots.files import printable

    if isinstance(reason, OSError) and reason.filename is not None and reason.strerror:
        reason = f"{reason.filename}: {reason.strerror}"  # the system's, without its number
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    who = f"merge-callback (rank {os.environ['RANK']})" if several else "merge-callback"
    print(f"{who}: {printable(str(reason))}", file=sys.stderr)
    return 1


def _make_parser(command: str) -> argparse.ArgumentParser:
    """The parser of the command line; of the commands only this one is imported, with what it needs."""
    from merge_callback.cli.parser import Parser

    parser = Parser(
        "merge-callback",
        description="Merge the checkpoints of a run: while it trains, or afterwards from its files.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {merge_callback.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, (about, module) in _COMMANDS.items():
        own = commands.add_parser(name, help=about)
        if name == command == "demo":
            _add_demo(own)
        elif name == command and module:
            getattr(import_module(f"merge_callback.cli.{module}"), f"add_{name}")(own)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_demo)
    parser.description, parser.epilog = _DEMO, _DEMO_EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--spike",
        action="store_true",
        help="break a run by an excessive learning rate, and see it restored",
    )
    parser.add_argument("--moe", action="store_true", help="train a mixture of four experts, which is slower")
    parser.add_argument(
        "--output", default="demo_run", metavar="DIR", help="where runs are kept (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and batches (%(default)s)")
    parser.add_argument(
        "--steps-scale",
        type=_positive,
        default=1.0,
        metavar="X",
        help="multiplies all lengths: 0.1 runs a tenth of the steps (%(default)s)",
    )
    parser.add_argument(
        "--storage",
        choices=("auto", "cpu", "disk", "device"),
        default="auto",
        help="where the snapshots are kept; auto is disk (%(default)s)",
    )
    parser.add_argument(
        "--strategy",
        choices=("auto", "ddp", "fsdp2"),
        default="auto",
        help="how several processes train (%(default)s)",
    )
    parser.add_argument(
        "--devices", type=_count, default=1, metavar="N", help="processes that share each batch (%(default)s)"
    )


def _demo(parsed: argparse.Namespace) -> int:
    if not _has_demo_extra("tensorboard", "matplotlib"):
        return 1
    processes = parsed.strategy, parsed.devices
    if parsed.spike:
        from merge_callback.demo.spike import SpikePlan, run_spike_demo

        spike_plan = SpikePlan.scaled(parsed.steps_scale)
        run_spike_demo(parsed.output, spike_plan, parsed.moe, parsed.seed, *processes)
        return 0
    from merge_callback.demo.run import DemoPlan, run_demo

    plan = DemoPlan.scaled(parsed.steps_scale)
    run_demo(parsed.output, plan, parsed.moe, parsed.seed, parsed.storage, *processes)
    return 0


def _fit(arguments: list[str]) -> int:
    if not _has_demo_extra("jsonargparse", "tensorboard"):
        return 1
    from merge_callback.demo.fit import FitOptionsError, fit

    try:
        fit(arguments)
    except FitOptionsError as error:
        return _refuse(str(error))
    return 0


def _has_demo_extra(*modules: str) -> bool:
    """Says in one line what to install if one of the optional packages is missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        print(f"{', '.join(missing)} is missing: pip install 'merge-callback[demo]'", file=sys.stderr)
    return not missing


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def _positive(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text} must be a positive number")
