"""What the tests of merged files share."""

import pytest
from merge_commands import model
from safetensors.torch import save_file


@pytest.fixture
def checkpoints(tmp_path):
    """Three files, and their state dicts."""
    paths, dicts = [], [model(seed) for seed in range(3)]
    for i, state in enumerate(dicts):
        paths.append(tmp_path / f"run/step={100 * (i + 1)}.safetensors")
        paths[-1].parent.mkdir(exist_ok=True)
        save_file(state, paths[-1])
    return paths, dicts
