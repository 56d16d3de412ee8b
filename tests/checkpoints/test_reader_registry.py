"""A further format of checkpoints is one reader, which every command then knows."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from checkpoint_files import few_tensors
from safetensors.torch import load_file, save_file
from training_runs import assert_same_bits

from merge_callback.checkpoints import registry
from merge_callback.checkpoints.checkpoint import Checkpoint, step_in_name
from merge_callback.checkpoints.checksums import Recorded
from merge_callback.checkpoints.open import is_checkpoint_folder, open_checkpoint, recorded_step, verify
from merge_callback.checkpoints.reader import OpenOptions, Reader
from merge_callback.checkpoints.registry import reader_of, register_reader
from merge_callback.cli.main import main
from merge_callback.snapshots.safetensors_file import file_checksum


class NpzReader(Reader):
    """Reads archives of NumPy arrays, with the checksum in a file beside each."""

    name = "npz"
    suffixes = (".npz",)

    def matches(self, path: Path) -> bool:
        return path.is_file() and path.suffix == ".npz"

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        with numpy.load(path) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
        step = step_in_name(path)
        return Checkpoint(path, tensors, tied={}, step=step, files=[path], format=self.name)

    def checksums(self, checkpoint: Checkpoint) -> list[Recorded]:
        path = checkpoint.path
        return [Recorded(path.parent, path.name, path.with_suffix(".sha256").read_text())]


@pytest.fixture(autouse=True)
def npz(monkeypatch, in_this_process):
    """The registry with one more reader, for one test."""
    monkeypatch.setattr(registry, "READERS", [*registry.READERS])
    register_reader(NpzReader())


def save(path, factor):
    numpy.savez(path, **{name: (factor * t.float()).numpy() for name, t in few_tensors().items()})
    path.with_suffix(".sha256").write_text(file_checksum(path))


def test_a_reader_opens_its_files_and_no_other_s(tmp_path):
    save(tmp_path / "step=7.npz", 2.0)
    save_file(few_tensors(), tmp_path / "step=7.safetensors")

    checkpoint = open_checkpoint(tmp_path / "step=7.npz")

    assert_same_bits(checkpoint.tensors, {name: 2.0 * t.float() for name, t in few_tensors().items()})
    assert (checkpoint.format, checkpoint.step, recorded_step(checkpoint.path)) == ("npz", 7, 7)
    assert open_checkpoint(tmp_path / "step=7.safetensors").format == "safetensors"


def test_the_commands_merge_and_inspect_its_files(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for step in (2, 3):
        save(tmp_path / f"run/step={step}.npz", float(step))

    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--quiet"]) == 0

    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert [(source["format"], source["step"]) for source in record["inputs"]] == [("npz", 2), ("npz", 3)]
    expected = {name: 2.5 * t.float() for name, t in few_tensors().items()}
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors"), expected)
    assert main(["inspect", str(tmp_path / "run/step=2.npz")]) == 0
    assert "checksums    verified" in capsys.readouterr().out


def test_what_its_checksums_tell_is_told(tmp_path):
    save(tmp_path / "a.npz", 1.0)
    (tmp_path / "a.sha256").write_text("0")
    [problem] = verify(open_checkpoint(tmp_path / "a.npz"))
    assert "a.npz: its SHA-256 is" in problem


def test_the_last_reader_that_was_added_is_asked_first(tmp_path):
    class Folder(NpzReader):
        name = "folder"

        def matches(self, path: Path) -> bool:
            return (path / "weights.npz").is_file()

    (tmp_path / "weights.npz").touch()
    save_file(few_tensors(), tmp_path / "model.safetensors")
    assert reader_of(tmp_path).name == "safetensors-folder"
    register_reader(Folder())
    assert reader_of(tmp_path).name == "folder"
    assert is_checkpoint_folder(tmp_path)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="a reader named 'npz' is already registered"):
        register_reader(NpzReader())
