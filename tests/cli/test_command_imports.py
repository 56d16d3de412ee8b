"""The commands run no code of the folder they are run in, but what --import names."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import ROOT, save_distributed
from forked import Forked
from safetensors.torch import save_file

from merge_callback.cli.main import main

COMMANDS = """
import json, sys
from merge_callback.cli.main import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""

METHOD = """
from merge_callback import register_method
from merge_callback.merging import LinearMethod

@register_method({name!r}, reference="lab notes")
class Last(LinearMethod):
    def raw_weights(self, positions):
        return [0.0] * (len(positions) - 1) + [1.0]
"""

RAN = "open('RAN', 'a').write(__name__)\n"

TEMPTING = [
    "zstandard",
    "fractions",
    "decimal",
    "sympy",
    "pandas",
    "scipy",
    "cupy",
    "triton",
    "fsspec",
    "expecttest",
]
"""Modules that torch, or what it imports, looks for while it works, installed or not."""


@pytest.fixture
def downloaded(tmp_path):
    """A folder of distributed checkpoints with modules beside them."""
    for i in (1, 2):
        save_distributed(tmp_path / f"step={i}", {"weight": torch.full((8, 8), float(i))})
        save_file({"weight": torch.full((8, 8), float(i))}, tmp_path / f"step={i}.safetensors")
    for name in TEMPTING:
        (tmp_path / f"{name}.py").write_text(RAN)
    return tmp_path


def run(folder, *commands):
    """Runs commands in a folder, as the script does: without that folder in the search path."""
    command = [sys.executable, "-P", "-c", COMMANDS] if sys.version_info >= (3, 11) else None
    if command is None:  # what -P does: "" stands for the current folder
        command = [sys.executable, "-c", f"import sys; sys.path.remove(''); {COMMANDS}"]
    return started(folder, *command, json.dumps(commands))


def started(folder, *command):
    """Runs a program that finds this package and what is installed."""
    paths = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def run_forked(folder, *arguments):
    """Runs the command in a process that has imported PyTorch already."""
    process = Forked(print_to_files, folder, arguments)
    status = process.wait(120)
    process.kill()
    return SimpleNamespace(
        returncode=status, stdout=(folder / "stdout").read_text(), stderr=(folder / "stderr").read_text()
    )


def print_to_files(folder, arguments):
    os.chdir(folder)
    with open("stdout", "w") as out, open("stderr", "w") as err, redirect_stdout(out), redirect_stderr(err):
        return main(arguments)


def test_no_command_imports_anything_of_the_current_folder(downloaded):
    written = ["--quiet", "--output"]
    done = run(
        downloaded,
        ["inspect", "step=1"],
        ["interference", "step=1", "step=2", "step=2.safetensors"],
        ["merge", "step=1.safetensors", "step=2.safetensors", "--method", "ties", *written, "ties"],
        ["merge", "step=1", "step=2", "--as", "lightning", *written, "out"],
    )
    assert done.returncode == 0, done.stderr
    assert not (downloaded / "RAN").exists()


@pytest.mark.slow
def test_run_as_a_module_of_python_it_does_not_either(downloaded):
    command = [sys.executable, "-m", "merge_callback", "merge", "step=1", "step=2"]
    done = started(downloaded, *command, "--output", "out", "--quiet")
    assert done.returncode == 0, done.stderr
    assert not (downloaded / "RAN").exists()


def test_what_is_named_is_imported_and_nothing_else_that_lies_beside_it(downloaded):
    (downloaded / "own.py").write_text(METHOD.format(name="newest"))
    arguments = ["--import", "own", "--method", "newest", "--output", "out", "--quiet"]
    done = run(downloaded, ["merge", "step=1", "step=2", *arguments])
    assert done.returncode == 0, done.stderr
    assert not (downloaded / "RAN").exists()


def test_a_module_of_a_package_is_imported(downloaded):
    (downloaded / "lab/methods").mkdir(parents=True)
    (downloaded / "lab/methods/own.py").write_text("from .names import NAME\n" + METHOD.format(name="newest"))
    (downloaded / "lab/methods/names.py").write_text("NAME = 'newest'\n")
    arguments = ["--import", "lab.methods.own", "--method", "newest", "--output", "out", "--quiet"]
    assert run_forked(downloaded, "merge", "step=1", "step=2", *arguments).returncode == 0


@pytest.mark.slow
def test_a_module_that_one_needs_is_named_too(downloaded):
    (downloaded / "own.py").write_text("import own_names\n" + METHOD.format(name="newest"))
    (downloaded / "own_names.py").write_text("")
    arguments = ["--method", "newest", "--output", "out", "--quiet", "--import"]
    done = run_forked(downloaded, "merge", "step=1", "step=2", *arguments, "own")
    assert (
        "--import own: No module named 'own_names'; if own_names lies in the same folder, name it first"
        in done.stderr
    )
    assert run_forked(downloaded, "merge", "step=1", "step=2", *arguments, "own_names", "own").returncode == 0


@pytest.mark.slow
def test_an_installed_module_comes_before_one_of_that_name_in_the_folder(downloaded):
    (downloaded / "tqdm.py").write_text(RAN)
    (downloaded / "wave.py").write_text(RAN)  # Python's own, which nothing has imported yet
    for name in ("tqdm", "wave"):
        # In an interpreter of its own: in a forked one they may be imported already, and nothing is searched.
        output = ["--output", f"out-{name}", "--quiet"]
        done = run(downloaded, ["merge", "step=1", "step=2", "--import", name, *output])
        assert done.returncode == 0, done.stderr
    assert not (downloaded / "RAN").exists()


def test_a_file_of_options_names_installed_modules_only(downloaded):
    (downloaded / "own.py").write_text(RAN)
    (downloaded / "merge.yaml").write_text("import: [own]\ncheckpoints: [step=1, step=2]\n")
    done = run_forked(downloaded, "merge", "--config", "merge.yaml", "--output", "out", "--quiet")
    assert (done.returncode, (downloaded / "RAN").exists()) == (1, False)
    assert done.stderr.count("\n") == 1
    assert "a module of the current folder has to be named on the command line" in done.stderr
    (downloaded / "merge.yaml").write_text("import: [wave]\ncheckpoints: [step=1, step=2]\n")
    done = run_forked(downloaded, "merge", "--config", "merge.yaml", "--output", "out", "--quiet")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [".own", pytest.param("a/b", marks=pytest.mark.slow)])
def test_what_is_no_name_of_a_module_is_refused_in_a_line(downloaded, name):
    done = run_forked(downloaded, "merge", "step=1", "--import", name, "--output", "out", "--quiet")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


LAST_K = """
from merge_callback import register_method
from merge_callback.merging import LinearMethod

@register_method("last_k", reference="lab notes")
class LastK(LinearMethod):
    k: int = 1
    last: bool = False

    def raw_weights(self, positions):
        return [1.0 / self.k * (i < self.k) for i in reversed(range(len(positions)))]
"""


def test_options_of_an_own_method_are_flags_and_entries_of_a_file(downloaded):
    (downloaded / "own.py").write_text(LAST_K)
    files = ["step=1.safetensors", "step=2.safetensors"]
    (downloaded / "merge.yaml").write_text(f"checkpoints: [{', '.join(files)}]\nmethod: last_k\nk: 1\n")
    imported, output = ["--import", "own"], ["--output", "out", "--quiet", "--force"]
    for arguments, options in (
        ([*files, "--method", "last_k", "--k", "2", "--method-last", "true"], {"k": 2, "last": True}),
        (["--config", "merge.yaml"], {"k": 1, "last": False}),
        (["--config", "merge.yaml", "--k=2"], {"k": 2, "last": False}),
    ):
        done = run_forked(downloaded, "merge", *arguments, *imported, *output)
        assert done.returncode == 0, done.stderr
        record = json.loads((downloaded / "out/merge.json").read_text())
        assert record["method"]["options"] == options
    done = run_forked(downloaded, "merge", *files, *imported, *output, "--method", "sma", "--k", "2")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "has no option k" in done.stderr


def test_own_methods_are_listed(downloaded):
    (downloaded / "own.py").write_text(LAST_K)
    listed = run_forked(downloaded, "methods", "--import", "own")
    assert "last_k" in listed.stdout
    assert "options: k=1, last=False" in listed.stdout
    assert "last_k" not in run_forked(downloaded, "methods").stdout


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("1 / 0", "--import own: ZeroDivisionError: division by zero"),
        ("def (", "--import own: SyntaxError"),
        (METHOD.format(name="sma"), "a merging method named 'sma' is already registered"),
        (LAST_K.replace("1.0 / self.k", "1 / (self.k - 1)"), r"own.py:11: ZeroDivisionError"),
    ],
    ids=range(4),
)
def test_a_module_that_fails_is_refused_in_a_line(downloaded, code, reason):
    (downloaded / "own.py").write_text(code)
    files = ["step=1.safetensors", "step=2.safetensors"]
    done = run_forked(
        downloaded, "merge", *files, "--import", "own", "--method", "last_k", "--output", "out", "--quiet"
    )
    assert done.returncode == 1
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (downloaded / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "--help"], ["report", "--help"]])
def test_what_needs_no_torch_does_not_wait_for_it(arguments):
    program = (
        "import sys\n"
        "from contextlib import suppress\n"
        "from merge_callback.cli.main import main\n"
        f"with suppress(SystemExit): main({arguments})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
