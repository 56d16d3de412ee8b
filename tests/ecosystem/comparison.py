"""What every library is asked: does training stay the same, do merges load, are the merged metrics right."""

import contextlib
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from tests.support.training_runs import assert_mean, emissions

EVERY, WINDOW = 6, 3
MERGING = {"every_n_steps": EVERY, "window": WINDOW, "keep_last": None, "method": "sma"}

Weights = dict[str, Tensor]

CHECKS = ("trains bitwise as without", "merges load back", "merged metrics right")


class Findings:
    """The outcome of each check, for one library; what fails is noted, and the other checks go on."""

    def __init__(self, library: str, trainer: str) -> None:
        self.name, self.trainer = library, trainer
        self.outcomes: dict[str, list[str]] = {check: [] for check in CHECKS}

    @contextlib.contextmanager
    def checking(self, check: str, what: str) -> Iterator[None]:
        """Runs one part of a check and notes its error."""
        print(f"-- {check}: {what}", flush=True)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            line = next(iter(str(error).strip().splitlines()), "")
            self.outcomes[check].append(f"{what}: {type(error).__name__}: {line[:300]}")

    def write(self, path: str) -> None:
        """Writes the outcomes as JSON: of each check, what failed."""
        found = {
            "library": self.name,
            "version": version(self.name),
            "trainer": self.trainer,
            "checks": self.outcomes,
        }
        Path(path).write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found, indent=2))


def assert_same_weights(found: Weights, expected: Weights) -> None:
    """Two state dicts have the same names and bits; a NaN is the same as itself."""
    assert found.keys() == expected.keys(), f"names differ: {sorted(found.keys() ^ expected.keys())[:4]}"
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        same = torch.equal(found[name], tensor) or torch.allclose(
            found[name], tensor, rtol=0, atol=0, equal_nan=True
        )
        assert same, f"{name} differs"


def assert_mean_weights(found: Weights, snapshots: list[Weights]) -> None:
    """A merge is the mean of snapshots, except for values that some of them do not have yet (NaN)."""
    unset = {name for name in found if any(snapshot[name].isnan().any() for snapshot in snapshots)}
    assert_mean(_without(unset, found), [_without(unset, snapshot) for snapshot in snapshots])


def _without(names: set[str], weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name not in names}


def assert_emissions(folder: Path, snapshots: dict[int, Weights], load: Callable) -> int:
    """Every merge below ``folder`` is the mean of the ``snapshots`` that its record names.

    Returns:
        How many snapshots the last merge is the mean of.
    """
    found = emissions(folder)
    assert found, f"no merge was published below {folder}"
    steps: list[int] = []
    for emission in found:
        record = json.loads((emission / "merge.json").read_text())
        steps = [snapshot["step"] for snapshot in record["snapshots"]]
        assert_mean_weights(load(emission), [snapshots[step] for step in steps])
    assert len(steps) > 1, f"the last merge is of the steps {steps}"
    return len(steps)


def assert_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    """The callback's ``merged/…`` values are those of a validation run by hand."""
    assert found, "no merged metric was logged"
    for name, value in found.items():
        assert name in expected, f"a validation by hand has {sorted(expected)}, but no {name}"
        assert abs(value - expected[name]) <= 1e-6 * max(1.0, abs(expected[name])), (
            f"merged {name} is {value}, by hand {expected[name]}"
        )


def result_path() -> str:
    """Where the runner wants the outcomes."""
    return sys.argv[1] if len(sys.argv) > 1 else "/dev/null"


def merge_files(folder: Path, output: Path, *options: str) -> Path:
    """What a user does with checkpoints that are there already."""
    command = [sys.executable, "-m", "merge_callback", "merge", folder, "--last", str(WINDOW), *options]
    done = subprocess.run(
        [*command, "--output", output], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout.strip().splitlines()[-1]
    return output
