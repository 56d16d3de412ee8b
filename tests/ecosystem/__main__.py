"""Runs the libraries' scripts: ``python -m tests.ecosystem [NAME…] --page docs/ecosystem.md``.

Each has a virtual environment of its own, made on first use from ``lock/NAME.txt`` if that is there. What
comes out is kept in ``benchmarks/results/ecosystem.json``, and the page's table is written from that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks/results/ecosystem.json"
TORCH = "torch==2.13.0"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"

LIBRARIES = {
    "lightly": ["lightly"],
    "scvi-tools": ["scvi-tools"],
    "anomalib": ["anomalib"],
    "chemprop": ["chemprop"],
    "pytorch-forecasting": ["pytorch-forecasting"],
    "gluonts": ["gluonts[torch]"],
    "darts": ["darts"],
    "neuralforecast": ["neuralforecast"],
    "pytorch-tabular": ["pytorch-tabular", "requests"],
    "trl": ["trl", "transformers", "accelerate"],
    "peft": ["peft", "transformers"],
    "diffusers": ["diffusers", "transformers"],
    "sentence-transformers": ["sentence-transformers", "datasets", "accelerate"],
}
"""What pip installs for each, beside torch and what the package itself needs."""


def main() -> int:
    """Runs what is named; returns how many scripts did not come to their end."""
    parser = argparse.ArgumentParser(prog="python -m tests.ecosystem", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(LIBRARIES)}")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / ".venv-ecosystem", help="one folder for each"
    )
    parser.add_argument("--page", type=Path, help="whose table is written, e.g. docs/ecosystem.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - LIBRARIES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(LIBRARIES)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = []
    for name in arguments.names or LIBRARIES:
        print(f"== {name}", flush=True)
        python = environment(name, arguments.environments / name)
        if (found := outcome(name, python)) is None:
            failed.append(name)
        else:
            results[name] = found
            ordered = {name: results[name] for name in LIBRARIES if name in results}
            RESULTS.write_text(json.dumps(ordered, indent=2) + "\n")
    if arguments.page:
        write_table(arguments.page, results)
    print(f"no outcome: {', '.join(failed)}" if failed else "all scripts came to their end")
    return len(failed)


def environment(name: str, folder: Path) -> Path:
    """The interpreter of a library's virtual environment, which is made if it is not there."""
    python, lock = folder / "bin/python", HERE / f"lock/{name}.txt"
    if not python.exists():
        venv.create(folder, with_pip=True)
        needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = [TORCH, *LIBRARIES[name], "lightning", *needed["dependencies"]]
        install = ["install", "-q", *(["-r", str(lock)] if lock.exists() else wanted)]
        subprocess.run([python, "-m", "pip", *install], check=True)
    if not lock.exists():
        freeze = [python, "-m", "pip", "freeze", "--exclude-editable"]
        lines = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout.splitlines()
        lock.write_text("".join(f"{line.partition('+')[0]}\n" for line in lines if "==" in line))
    return python


def outcome(name: str, python: Path) -> dict | None:
    """What a library's script has found; ``None`` if it did not come to its end."""
    found = ROOT / f"build/ecosystem-{name}.json"
    found.parent.mkdir(exist_ok=True)
    found.unlink(missing_ok=True)
    script = [python, "-m", f"tests.ecosystem.{name.replace('-', '_')}", found]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:  # some libraries leave files in the current one
        subprocess.run(script, cwd=folder, env=surroundings, check=False)
    return json.loads(found.read_text()) if found.exists() else None


def write_table(page: Path, results: dict[str, dict]) -> None:
    """Writes the table between its marks on the page."""
    checks = list(next(iter(results.values()))["checks"])
    lines = [
        f"| library | version | trains with | {' | '.join(checks)} |",
        "|---|---|---|" + "---|" * len(checks),
    ]
    for name in LIBRARIES:
        if name in results:
            found = results[name]
            cells = ["; ".join(found["checks"][check]) or "yes" for check in checks]
            lines.append(f"| {name} | {found['version']} | `{found['trainer']}` | {' | '.join(cells)} |")
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
