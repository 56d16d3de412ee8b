"""`python -m merge_callback` is the `merge-callback` command."""

import sys

from merge_callback.offline.command_line import main

sys.exit(main())
