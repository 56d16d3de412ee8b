"""Names of somebody else's, as they reach the terminal."""

import pytest
import torch
from checkpoint_files import few_tensors
from command_line import run
from safetensors.torch import save_file

from merge_callback.snapshots.files import printable

# What hangs is to fail soon.
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("in_this_process")]

NAMES = [
    "\x1b]0;title\x07\x1b[31mred",
    "a\nchecksums    verified",
    "a\rb",
    "\u202egnp.exe",
    "\x9b2J",
    "b\u2028c",
    "\x7f",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_reaches_the_terminal_as_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for i in (1, 2, 3):
        save_file({name: torch.full((4,), float(i)), "x": torch.ones(2)}, tmp_path / f"step={i}.safetensors")
    paths = [f"step={i}.safetensors" for i in (1, 2, 3)]
    for command in (
        ["inspect", "--tensors", paths[0]],
        ["diversity", "--by-layer", *paths],
        ["interference", *paths],
        ["merge", "--keep-all", *paths, "--exclude", "nothing*", "--output", "out"],
    ):
        _, out, errors = run(command)
        assert all(line.isprintable() for line in (out + errors).split("\n")), command
    assert printable(name) in run(["inspect", "--tensors", paths[0]])[1]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_name_of_a_file_does_too(tmp_path, name):
    save_file(few_tensors(), tmp_path / f"{name}.safetensors")
    (tmp_path / f"broken {name}.safetensors").write_bytes(b"")
    for path in tmp_path.iterdir():
        status, out, errors = run(["inspect", str(path)])
        assert all(line.isprintable() for line in (out + errors).split("\n"))
        assert errors.count("\n") == status


def test_text_that_may_be_shown_is_shown_as_it_is():
    assert printable("Schicht µ, 層.weight") == "Schicht µ, 層.weight"
