"""Every kernel of the package compiles for the GPUs that it is written for, down to machine code, without a GPU.

CuPy's emulator runs kernels through a compiler for CPUs, which takes code that NVRTC refuses: a missing header, more
shared memory than there is. So each goes through NVRTC here as well, with the options that CuPy gives it.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

import tinydiff

if os.environ.get("TINYDIFF_BACKEND") != "cupy":
    pytest.skip("CUDA kernels are CuPy's: TINYDIFF_BACKEND=cupy", allow_module_level=True)

import cupy
from cupy._core import core
from cupy.cuda import compiler

from tinydiff.kernels import cuda, launch

assert cuda  # imported for its kernels, which enter themselves in the lists

GPUS = ["sm_80", "sm_90"]  # A100, H100


def compile_for(gpu: str, source: str) -> bytes:
    options = core.assemble_cupy_compiler_options(())
    options += "-ftz=true", f"-arch={gpu}", "--device-as-default-execution-space"
    return compiler._NVRTCProgram(source, "kernel.cu", method="cubin").compile(options)[0]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kernel", launch.KERNELS, ids=lambda k: k.name)
def test_kernels_in_cuda(kernel, gpu):
    for source in kernel.sources():
        assert kernel.name.encode() in compile_for(gpu, source)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kernel", launch.ELEMENTWISE, ids=lambda k: k.name)
def test_elementwise_kernels(kernel, gpu):
    headers = "".join(f"#include <{h}>\n" for h in core._cupy_header_list)
    parameters = kernel.in_params + kernel.out_params
    for dtype in ("float32", "float64"):
        kernel(*(cupy.ones(64 if p.raw else 1, p.dtype or dtype) for p in parameters))
    assert len(kernel.cached_codes) >= (2 if any(p.dtype is None for p in parameters) else 1)
    for source in kernel.cached_codes.values():
        assert kernel.name.encode() in compile_for(gpu, headers + source)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kernel", launch.RAW, ids=lambda k: k.name)
def test_kernels_of_other_launchers(kernel, gpu):
    assert kernel.name.encode() in compile_for(gpu, kernel.code)


@pytest.mark.parametrize("gpu", GPUS)
def test_what_the_gpu_would_refuse_is_refused(gpu):
    with pytest.raises(compiler.CompileException, match="nothing_of_this_name"):
        compile_for(gpu, 'extern "C" __global__ void f(float* x) { x[0] = nothing_of_this_name; }')
    with pytest.raises(Exception, match="shared"):
        compile_for(
            gpu, 'extern "C" __global__ void f(int i) { __shared__ double x[9999]; x[i] = i; x[0] = x[i / 2]; }'
        )


# ---------------------------------------------------------------- none is forgotten


def test_kernels_are_made_in_one_place():
    """So all are in the lists that the tests above go through."""
    for path in sorted(Path(tinydiff.__file__).parent.rglob("*.py")):
        made = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        made &= {"RawKernel", "RawModule", "ElementwiseKernel", "ReductionKernel", "fuse", "rawkernel"}
        assert made == ({"RawKernel", "ElementwiseKernel"} if path.name == "launch.py" else set()), path


def test_kernels_have_names_of_their_own():
    names: list[Any] = [k.name for k in (*launch.KERNELS, *launch.ELEMENTWISE)]
    names += {k.name for k in launch.RAW}  # one name for both dtypes
    assert len(set(names)) == len(names) > 10
