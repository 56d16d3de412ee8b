"""The C kernels under the compiler's sanitizers: no byte beyond a tensor, no undefined operation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from merge_callback import reduce

KERNELS = Path(reduce.__file__).with_name("kernels.c")
HERE = Path(__file__).parent
SANITIZERS = ("asan", "ubsan")

RUN = """
import importlib.util, sys, types
import pytest
real = importlib.util.find_spec
library = types.SimpleNamespace(origin=sys.argv[1])
importlib.util.find_spec = lambda name, *more: library if name.endswith("._kernels") else real(name, *more)
alone = ["-qxs", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", "-k", "library"]
sys.exit(pytest.main([*alone, *sys.argv[2:]]))
"""

UNALIGNED = """
import importlib.util, sys, types
import torch
real = importlib.util.find_spec
library = types.SimpleNamespace(origin=sys.argv[1])
importlib.util.find_spec = lambda name, *more: library if name.endswith("._kernels") else real(name, *more)
from merge_callback.merging import Inputs, Ties, Trajectory
from merge_callback.reduce import compiled, dispatch, one_pass
size = (1 << 19) + 5
sources, outs = [torch.randn(size) for _ in range(3)], [torch.empty(size) for _ in range(2)]
for best in range(1, compiled.instructions() + 1):
    compiled.instructions = lambda: best
    together = one_pass(sources, [[1, 2, 3], [1, 0, 1]], outs, [1, -1, 0], [7, size])
    assert torch.equal(together, one_pass(sources, None, None, [1, -1, 0], [7, size]))
    for dispatch.EAGER, out in zip((False, True), outs):
        Ties().merge(Inputs("w", sources), out, Trajectory.even(3))
    dispatch.EAGER = False
    assert torch.equal(*outs)
"""


def file_of(library):
    return subprocess.check_output(["gcc", f"-print-file-name=lib{library}.so"], text=True).strip()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs GCC")
def test_the_kernels_stay_within_their_tensors(tmp_path):
    libraries = [file_of(name) for name in SANITIZERS]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("GCC has no sanitizers")
    flags = ["-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = str(tmp_path / "kernels.so")
    subprocess.run(["gcc", *flags, "-fPIC", "-shared", "-o", built, str(KERNELS)], check=True)
    cases = [str(HERE / name) for name in ("test_reduce.py", "test_compiled_ties.py")]
    found = subprocess.run(
        [sys.executable, "-c", RUN, built, *cases],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": " ".join(libraries)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert " passed" in found.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs GCC")
def test_no_store_needs_more_alignment_than_the_compiler_gives(tmp_path):
    """Without optimization an array on the stack lies anywhere, and a streamed store to it would crash."""
    built = str(tmp_path / "kernels.so")
    flags = ["-O0", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run(["gcc", *flags, "-o", built, str(KERNELS)], check=True)
    found = subprocess.run(
        [sys.executable, "-c", UNALIGNED, built], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
