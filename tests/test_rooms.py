"""Which rooms of the package may know which: every import points down, and none leads back."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from itertools import groupby

import pytest
from checkpoint_files import ROOT

PACKAGE = ROOT / "merge_callback"
TOP = [
    "transformers",
    "cli",
    "report",
    "demo",
    "transformers",
    "trainers",
    "engine",
    "options",
    "publish",
    "recovery",
    "offline",
    "moerge",
    "checkpoints",
    "analysis",
]
BOTTOM = [
    "snapshots",
    "signals",
    "spike_options",
    "probe_options",
    "candidate_options",
    "merging",
    "diversity",
    "sharding",
    "reduce",
]
ROOMS = [*TOP, *BOTTOM, "metrics", "events", "messages", "checks", "noise", "torch_metric", "urls"]
"""From the top to the bottom."""

MAY_USE = {
    "lightning": {"trainers/lightning", "demo"},
    "pytorch_lightning": {"trainers/lightning"},
    "transformers": {"trainers", "cli"},
}
"""Training frameworks, and who may import them."""

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path):
    """The names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def own_imports():
    """The modules of the package that each of them imports."""
    return {module: {*imported(path)} & {*MODULES} - {module} for module, path in MODULES.items()}


def room_of(module):
    return next(iter(module.split(".")[1:2]), "")


def test_every_room_has_a_place():
    assert {room_of(module) for module in MODULES} - {"", "__main__"} == {*ROOMS}


def test_every_import_points_down():
    height = {room: -i for i, room in enumerate(ROOMS)}
    upward = [
        f"{module} imports {other}"
        for module, others in own_imports().items()
        for other in others
        if room_of(module) in height and height[room_of(module)] < height.get(room_of(other), -len(ROOMS))
    ]
    assert not upward


def test_no_import_leads_back():
    order = [*TopologicalSorter(own_imports()).static_order()]  # raises CycleError, which names them
    assert {*order} == {*MODULES}


def test_frameworks_stay_at_the_rim():
    strange = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name, _ in groupby(sorted(imported(path)))
        if (places := MAY_USE.get(name.partition(".")[0])) is not None
        and not any(str(path.relative_to(PACKAGE)).startswith(f"{place}/") for place in places)
    ]
    assert not strange


IMPORTED_WITH_TORCH = """
import json, os, sys, torch
for number, names in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        for name in names:
            __import__(name)
        print(json.dumps([number, sorted(sys.modules)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, names
"""
"""Imports each list of modules in a process that has imported torch alone."""

NEEDS = {
    "opening files": ["merge_callback.checkpoints.open", "merge_callback.offline.selection"],
    "measures of files": [
        "merge_callback.analysis.pairwise",
        "merge_callback.analysis.interference",
        "merge_callback.cli.measures",
    ],
    "a window": [name for name in MODULES if room_of(name) == "snapshots"],
}


@pytest.fixture(scope="module")
def loaded():
    """The modules that are loaded afterwards, by what is needed."""
    command = [sys.executable, "-c", IMPORTED_WITH_TORCH, json.dumps([*NEEDS.values()])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {[*NEEDS][number]: {*names} for number, names in map(json.loads, printed)}


@pytest.mark.parametrize("what", NEEDS)
def test_what_is_slow_to_import_is_not_imported_for(what, loaded):
    assert loaded[what] >= {*NEEDS[what]}
    assert not loaded[what] & {
        "lightning",
        "pytorch_lightning",
        "torchmetrics",
        "transformers",
        "matplotlib",
        "triton",
    }
