"""Triton's kernels: their cases on a GPU and in Triton's interpreter, their compilation, when they serve."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from checkpoint_files import ROOT

from merge_callback.reduce import dispatch

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SUPPORT = ROOT / "tests/support"


def outcome(arguments, **environment):
    """Runs Python; what pytest and its workers say in the environment is theirs."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**inherited, **path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


ONE_OF_EVERY_KERNEL = [
    "test_the_merge_and_the_squares_are_those_of_fp64[torch.bfloat16-10 mixed]",
    "test_several_sums_have_each_the_bits_that_it_has_alone[sums and squares-3]",
    "test_the_election_is_bitwise_that_of_the_blocks[mixed-0.2-many ties]",
    "test_the_kernels_are_what_the_methods_call",
]


def assert_cases_hold(interpreted, *cases):
    """Triton chooses when a kernel is defined, for a whole process: hence one of its own for each way."""
    pytest_alone = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    chosen = [f"{SUPPORT / 'triton_cases.py'}::{case}" for case in cases] or [SUPPORT / "triton_cases.py"]
    run = outcome([*pytest_alone, *chosen], TRITON_INTERPRET=interpreted)
    if interpreted == "1" and "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("this Triton's interpreter cannot loop under NumPy 2.4; Triton 3.9 can")
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(cases) or ''} passed" in run.stdout


@needs_triton
def test_a_case_of_every_kernel_holds():
    assert_cases_hold("1", *ONE_OF_EVERY_KERNEL)


@needs_triton
@pytest.mark.timeout(900)  # on a GPU each mixture of dtypes is compiled first
@pytest.mark.parametrize(
    "interpreted",
    [pytest.param("1", marks=pytest.mark.slow), pytest.param("0", marks=needs_gpu)],
    ids=["interpreted", "compiled"],
)
def test_every_case_holds(interpreted):
    assert_cases_hold(interpreted)


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """For sm_90, without one: with types and pointers that the interpreter would take as they come."""
    run = outcome(
        [SUPPORT / "compiled_kernels.py", "90"], TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"
    )
    assert run.returncode == 0, run.stderr
    compiled = json.loads(run.stdout)
    wide = {kernel["name"] for kernel in compiled if kernel["wide"]}
    assert wide >= {"_sum_tile", "_sum_rows", "_elect_tile"}
    assert {kernel["name"] for kernel in compiled} == wide | {"_sum_segment"}
    # A fused product and sum would round the election otherwise than PyTorch's operations do.
    assert not any(kernel["fused"] for kernel in compiled if kernel["name"] == "_elect_tile")


@needs_triton
def test_triton_is_not_imported_before_it_is_needed():
    program = (
        "import sys, torch, merge_callback, merge_callback.merging as m, merge_callback.reduce as r\n"
        "one = torch.ones(3)\n"
        "r.one_pass([one], [1.0], one, [1.0], [3])\n"
        "merge = [m.merge_state_dicts([{'w': one}] * 3, name) for name in ('slerp', 'ties')]\n"
        "print('triton' in sys.modules)"
    )
    run = outcome(["-c", program])
    assert run.stdout.split() == ["False"], run.stderr


def test_tensors_on_the_cpu_are_not_served():
    assert not dispatch.triton_serves(torch.ones(2))


@needs_triton
@needs_gpu
def test_contiguous_tensors_on_one_gpu_are_served_if_fp32_holds_them():
    one = torch.ones(4, device="cuda")
    assert dispatch.triton_serves(one, one.half(), one.bfloat16())
    assert not dispatch.triton_serves(one, one.double())
    assert not dispatch.triton_serves(one, one.cpu())
    assert not dispatch.triton_serves(one[::2])


@needs_triton
def test_where_triton_fails_the_merge_goes_on_without_it():
    """A device that is not there stands for any failure: no compiler, or a device that is too old."""
    with pytest.warns(UserWarning, match="Triton does not run on cuda:99"):
        assert not dispatch._runs_on.__wrapped__(torch.device("cuda", 99))
