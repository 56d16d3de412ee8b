"""The command ``report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from merge_callback.cli.parser import Parser

_PORT = 8765

_DESCRIPTION = """\
Draw one HTML page of a run: scores of live and merged weights, gains, diversity, spikes, merges, and what
it cost. Of several runs, one page that compares them. It needs no GPU and no torch."""

_EXAMPLES = """\
examples:
  merge-callback report lightning_logs/version_0/merges
  merge-callback report run-a/merges run-b/merges --output both.html
  merge-callback report lightning_logs/version_0/merges --serve
"""


def report(arguments: Sequence[str]) -> int:
    """Draws the page of one or several runs, or shows it.

    Args:
        arguments: those after the command's name.

    Raises:
        ValueError: for a folder without an event file.
        OSError: if the page can't be written, or the port is taken.
    """
    from merge_callback.report.page import page, read_runs
    from merge_callback.snapshots.files import replacing

    parsed = _parser().parse_args(arguments)
    runs = read_runs(parsed.runs)
    if parsed.serve is not None:
        return _serve(parsed.runs, parsed.serve)
    output = parsed.output or runs[0].history.folder / "report.html"
    _check_own(output)
    with replacing(output.absolute()) as draft:
        draft.write_bytes(page(runs, output.absolute().parent).encode(errors="replace"))
    print(output)
    return 0


def _check_own(output: Path) -> None:
    """Refuses to write over anything but an earlier page."""
    from merge_callback.report.page import MARK
    from merge_callback.snapshots.files import open_regular

    if output.is_dir():
        raise ValueError(f"--output {output}: is a folder; name a file in it")
    if output.exists():
        with open_regular(output) as file:
            if MARK.encode() not in file.read(2000):
                raise ValueError(f"--output {output}: is there already, and no report; name another file")


def _serve(folders: Sequence[Path], port: int) -> int:
    from merge_callback.report.serve import server

    with server(folders, port) as shown:
        print(f"http://localhost:{shown.server_port}   (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            shown.serve_forever()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "merge-callback report",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder of merges, or one that holds it"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the page goes (report.html in the first run's folder)",
    )
    parser.add_argument(
        "--serve",
        nargs="?",
        type=int,
        const=_PORT,
        metavar="PORT",
        help=f"show it at http://localhost:PORT ({_PORT}) instead, drawn again as the run goes on",
    )
    return parser
