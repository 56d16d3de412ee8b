"""Compiles Triton's kernels for a GPU that need not be there: ``compiled_kernels.py ARCHITECTURE``, e.g. 90.

Prints a JSON list: of each compiled kernel its name, whether it reads 16 bytes a thread at once, and whether
it fuses multiplications with additions.
"""

import json
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from merge_callback.reduce import triton_kernels, triton_ties
from merge_callback.reduce.passes import Cut


class Described:
    """What Triton asks a GPU's driver before it compiles."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compiled_by(calls, architecture):
    """What the calls would launch, compiled and not launched."""
    driver.set_active(Described(architecture))
    kernels, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernels.append((self.__name__, run(self, *arguments, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    for call in calls:
        call()
    return kernels


def sources(begin, *dtypes):
    return [torch.zeros(4096, dtype=dtype)[begin:] for dtype in dtypes]


def calls():
    """Every kernel, with sources of one dtype, of several, and such as begin anywhere."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for given in (sources(0, fp32, fp32), sources(0, bf16, bf16), sources(1, fp32, bf16, fp16)):
        yield lambda given=given: sum_up(given)
        yield lambda given=given: elect(given)


def sum_up(given):
    ones = [1.0] * len(given)
    ends = [7, given[0].numel()]
    triton_kernels.one_pass(given, ones, torch.empty_like(given[-1]), ones, ends)
    triton_kernels.one_pass(given, [ones] * 8, [torch.empty_like(given[-1]) for _ in range(8)], ones, ends)


def elect(given):
    cuts = [Cut(0.5, 1.0, 7)] * (len(given) - 1)
    triton_ties.elect(given[0], given[1:], torch.empty_like(given[-1]), 1.0, cuts)


if __name__ == "__main__":
    report = []
    for name, kernel in compiled_by(calls(), int(sys.argv[1])):
        ptx = kernel.asm["ptx"]
        wide = re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.\S+ .*, 0x10", ptx) is not None
        report.append({"name": name, "wide": wide, "fused": "fma.rn.f32" in ptx})
    print(json.dumps(report))
