"""`python -m merge_callback` is the `merge-callback` command."""

import os
import sys

if sys.path[0] == os.getcwd() and not os.environ.get("PYTHONSAFEPATH"):
    del sys.path[0]  # put there by -m; the folder may be a downloaded one, whose modules are not to be found

from merge_callback.cli.main import run

run()
