"""`python -m merge_callback` is the `merge-callback` command."""

from merge_callback.offline.command_line import run

run()
