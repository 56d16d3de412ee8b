"""Metadata of somebody else's whose values are of other types."""

import json
import os

import pytest
import torch
from checkpoint_files import few_tensors
from codec_windows import new_window, take
from command_line import refused, run
from mutated_files import shared_out
from resumed_runs import stopped
from safetensors.torch import save_file
from tiny_run import fit

from merge_callback import load_merge
from merge_callback.snapshots.files import CorruptFileError
from merge_callback.snapshots.window_folder import WindowFolder

# What hangs is to fail soon.
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("in_this_process")]

METHOD = {"name": "sma", "options": {}, "reference": "a paper"}


@pytest.mark.parametrize(
    "record",
    [
        {"files": {}},
        {"method": "x"},
        {"method": None},
        {"method": {"name": "sma"}},
        {"method": METHOD, "inputs": "abc"},
        {"method": METHOD, "inputs": ["abc"]},
        {"method": METHOD, "snapshots": {"a": 1}},
        {"method": METHOD, "inputs": [{}, {}], "weights": [1.0]},
        {"method": METHOD, "inputs": [{}], "weights": ["a half"]},
        {"method": METHOD, "inputs": [{}], "weights": 3},
        {"method": METHOD, "snapshots": [{"weight": [1]}]},
        {"method": METHOD, "tied": [["a", "b"]]},
        {"method": METHOD, "tied": {"alias": {"a": 1}}},
    ],
    ids=str,
)
def test_a_record_of_other_types_is_refused_in_a_line(tmp_path, record):
    (tmp_path / "merged").mkdir()
    save_file(few_tensors(), tmp_path / "merged/model.safetensors")
    (tmp_path / "merged/merge.json").write_text(json.dumps(record))
    assert "merged/merge.json: " in refused("inspect", tmp_path / "merged")


@pytest.mark.parametrize(
    "record", ["{", "[]", '"x"', "[" * 100_000, '{"tied": 3}', '{"tied": {"a": "gone"}}', "\xff"]
)
def test_a_merge_whose_record_is_broken_is_not_loaded(tmp_path, record):
    save_file(few_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "merge.json").write_text(record, encoding="latin-1")
    with pytest.raises(CorruptFileError, match=r"merge\.json"):
        load_merge(tmp_path)


def test_a_merge_is_loaded_from_no_file_elsewhere(tmp_path):
    save_file(few_tensors(), tmp_path / "secret.safetensors")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/merge.json").write_text('{"tied": {}}')
    weight_map = dict.fromkeys(few_tensors(), "../secret.safetensors")
    index = tmp_path / "merged/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptFileError, match="expected a plain name"):
        load_merge(tmp_path / "merged")


YAML = [
    "- a",
    "[",
    "\t",
    "{" * 5000,
    "a\0b: 1",
    "checkpoints: !!python/object/apply:os.system ['touch RAN']",
    "a: &a [x]\nb: *a",
    "a: &a {x: 1}\nb: {<<: [*a, *a]}",
    "? [1]\n: 2",
    "checkpoints: 2020-01-01",
    "checkpoints: {a: 1}",
    "checkpoints: [[a]]",
    "last: two",
    "last: 2.5",
    "last: true",
    "every: [1]",
    "force: 'no'",
    "output: [out]",
    "base: {a: 1}",
    "exclude: [{}]",
    "method: [ties]",
    "density: {a: 1}",
    "density: [[1]]",
    "method: ties\ndensity: [1]",
    "method: ties\ndensity: much",
    "weights: {a: 1}",
    "dtype: [fp32]",
    "shard-size: []",
    "shard-size: .inf",
    "strip-prefix: 2020-01-01",
    "as: torch",
    "as: [lightning]",
    "run: x",
    "config: x",
    "option_density: 1",
    "1: 2",
    "? {a: 1}\n: 2",
]


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:40])
def test_options_of_other_types_are_refused_in_a_line(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        save_file(few_tensors(), tmp_path / f"step={i}.safetensors")
    (tmp_path / "merge.yaml").write_text(text)
    refused(
        "merge",
        "step=1.safetensors",
        "step=2.safetensors",
        "--config",
        "merge.yaml",
        "--quiet",
        "--output",
        "out",
    )
    assert sorted(os.listdir(tmp_path)) == ["merge.yaml", "step=1.safetensors", "step=2.safetensors"]


def test_options_that_are_left_empty_are_not_given(tmp_path):
    save_file(few_tensors(), tmp_path / "a.safetensors")
    files = [str(tmp_path / "a.safetensors")] * 2
    content = f"checkpoints: {files}\nkeep_all: true\nlast:\nbase: null\nexclude: ~\nquiet: true\n"
    (tmp_path / "merge.yaml").write_text(content)
    assert run(["merge", "--config", str(tmp_path / "merge.yaml"), "--output", str(tmp_path / "out")])[0] == 0


def test_a_value_on_the_command_line_that_is_no_yaml_is_a_wrong_argument(tmp_path):
    for value in ("[", "!!python/object/apply:os.system [x]", "&a [*a]"):
        status, _, errors = run(
            ["merge", "a", "a", "--keep-all", "--method", "ties", "--density", value, "--output", "out"]
        )
        assert (status, "argument --density" in errors) == (2, True)


SAVED = [5, "ab", None, [5], [None], [[["a"]]], [{"a": 1}], {"a": ["b"]}, [[1]], [["a"], 5], True, [[]], 1.5]


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_a_manifest_of_other_types_costs_a_resumed_run_nothing(tmp_path, saved):
    (tmp_path / "manifest.json").write_text(json.dumps({"run_id": "run", "saved": saved}))
    ours = "step=00000002-0123456789ab.safetensors"
    (tmp_path / ours).touch()
    folder = WindowFolder(tmp_path, "run", "ffffffffffff", True)
    folder.resume([[ours]])
    folder.prune([], 1 << 40)
    folder.write_manifest("layout", [])
    assert folder.saved[-1] == [ours]
    assert (tmp_path / ours).exists()


def test_a_run_is_resumed_over_a_manifest_of_other_types(tmp_path):
    checkpoint = stopped(tmp_path)
    manifest = tmp_path / "merges/window/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "saved": 5, "snapshots": [[]]}))
    fit(tmp_path, checkpoint)
    assert json.loads(manifest.read_text())["snapshots"][-1]["step"] == 26


@pytest.mark.parametrize(
    "records", [[{"step": [1], "file": {}}], [{"step": 10, "file": 3}], {"a": 1}, [[]], "x", 3]
)
def test_a_difference_beside_a_manifest_of_other_types_is_opened(tmp_path, records):
    kept = new_window({"weight": torch.zeros(4)}, 3, tmp_path / "window")
    for step in (10, 20):
        take(kept, step, {"weight": torch.full((4,), step / 8)})
    (tmp_path / "window/manifest.json").write_text(json.dumps({"snapshots": records}))
    assert run(["inspect", str(tmp_path / "window" / kept.snapshots[1].file)])[0] == 0


PIECES = [
    "[]",
    "3",
    '{"a": 1}',
    '{"a": [[4], null, 3]}',
    '{"a": [["4"], null, []]}',
    '{"a": [[4], null, [[[2], [4]]]]}',
]
PIECES += [
    '{"a": [[-4], null, [[[0], [-4]]]]}',
    '{"a": [[4], "x", []]}',
    '{"a": [[4], null, [[[0, 0], [4]]]]}',
    "[" * 9000,
]


@pytest.mark.parametrize("pieces", PIECES, ids=lambda text: text[:40])
def test_parts_of_tensors_that_are_none_are_refused(tmp_path, pieces):
    place = tmp_path / shared_out(tmp_path)
    for name in json.loads((place / "shards.json").read_text())["files"]:
        save_file({"a": torch.ones(4)}, place / name, {"pieces": pieces})
    assert place.name in refused("inspect", place)
