"""`python -m merge_callback` is the `merge-callback` command."""

from merge_callback.cli.main import run

run()
