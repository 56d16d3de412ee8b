"""``python -m tests.power_loss --json benchmarks/results/power_loss.json``, in the repository's folder."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS), str(TESTS.parent)]  # as pytest has them

from power_loss.study import run  # noqa: E402

sys.exit(run())
