"""What all tests share."""

import gc
import json
from functools import lru_cache

import pytest
import torch
from distributed_runs import FSDP2_ON_CPUS
from hypothesis import settings
from killed_run import fit, killable_runs, outcome
from lightning.fabric.utilities import registry

from merge_callback import METHODS

# The models here are tiny: a second thread only waits, ten times as long where another process has the core.
torch.set_num_threads(1)

# Every new Trainer searches all installed packages for callbacks.
registry.entry_points = lru_cache(registry.entry_points)

# The same examples every time, however slow the machine.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


def pytest_collection_finish():
    """Spares the garbage collector what stays to the end: all modules, and the tests themselves."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else some libraries complain of leaks


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run leaves behind that was never stopped, by its options."""
    known = {}

    def outcome_of(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("unbroken")
            _, module, _ = fit(folder, **options)
            known[key] = outcome(folder, module)
        return known[key]

    return outcome_of


@pytest.fixture(scope="module")
def live():
    """Lives through a run whose processes are killed; see `killed_run.live`."""
    with killable_runs() as ask:
        yield ask


@pytest.fixture(scope="module")
def survivor(tmp_path_factory, live):
    """The outcome of a run like the killed ones that nobody killed."""
    return live(tmp_path_factory.mktemp("survivor"))["outcome"]


@pytest.fixture(autouse=True)
def same_methods():
    """Methods that a test registers are gone after it."""
    known = dict(METHODS)
    yield
    for name in METHODS.keys() - known.keys():
        del METHODS[name]


def pytest_collection_modifyitems(items):
    for item in items:
        if "fsdp2" in item.name and not FSDP2_ON_CPUS:
            item.add_marker(pytest.mark.skip(reason="torch 2.6 has no FSDP2 on CPUs"))
