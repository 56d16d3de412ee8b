"""Commands that run in this process."""

import contextlib
import io

from merge_callback.cli.main import main


def run(arguments):
    """Runs the command; returns its exit status and what it printed, apart."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = main(arguments)
        except SystemExit as left:
            status = left.code
    return status, out.getvalue(), errors.getvalue()


def refused(*arguments):
    """The one line that a command refuses its files with."""
    status, out, errors = run([*map(str, arguments)])
    assert (status, errors.count("\n"), out) == (1, 1, ""), (status, out, errors)
    assert errors.startswith("merge-callback: ")
    return errors
