"""Every kernel of the package compiles for the GPUs that it is written for, down to machine code, without a GPU.

CuPy's emulator runs kernels through a compiler for CPUs, which takes code that NVRTC refuses: a missing header, more
shared memory than there is. So each file goes through NVRTC as well, as it stands on disk and with every combination of
macros that a call may ask for, with the options that CuPy gives it.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tinydiff

if os.environ.get("TINYDIFF_BACKEND") != "cupy":
    pytest.skip("CUDA kernels are CuPy's: TINYDIFF_BACKEND=cupy", allow_module_level=True)

import cupy
from cupy._core import core
from cupy.cuda import compiler

from tinydiff.fast.cuda import activation, conv, launch, norm, optim, random, softmax, table

assert activation and conv and norm and optim and random and softmax  # their files enter themselves in the lists

GPUS = ["sm_80", "sm_90"]  # A100, H100
PACKAGE = Path(tinydiff.__file__).parent
SOURCES = {s.path: s for s in launch.SOURCES}
FILES = sorted([*PACKAGE.rglob("*.cu"), *PACKAGE.rglob("*.cuh")])


def compile_for(gpu: str, source: str, options: tuple[str, ...] = ()) -> bytes:
    options = core.assemble_cupy_compiler_options(options)
    options += "-ftz=true", f"-arch={gpu}", "--device-as-default-execution-space"
    return compiler._NVRTCProgram(source, "kernel.cu", method="cubin").compile(options)[0]


def kernels_in(path: Path) -> set[str]:
    """What stands before the parameters of a function that is marked __global__."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/|__launch_bounds__\(.*?\)", "", path.read_text(), flags=re.S)
    return {part.split("(")[0].split()[-1] for part in code.split("__global__")[1:]}


def compiles(path: Path, gpu: str, options: tuple[str, ...] = ()) -> None:
    machine_code = compile_for(gpu, path.read_text(), (f"-I{path.parent}", *options))
    for name in kernels_in(path):
        assert f".text.{name}".encode() in machine_code, name


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_compiles_as_it_stands(path: Path, gpu: str) -> None:
    compiles(path, gpu)


def combinations() -> Iterator[Any]:
    for source in launch.SOURCES:
        for options in source.combinations():
            values = [option.partition("=")[2] for option in options]
            yield pytest.param(source.path, options, id=" ".join([source.path.name, *values]))


@pytest.mark.parametrize(("path", "options"), list(combinations()))
def test_a_file_compiles_for_all_that_a_call_may_ask_for(path: Path, options: tuple[str, ...]) -> None:
    """For the older GPU, which has no more of anything than the newer one."""
    compiles(path, GPUS[0], options)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kernel", launch.ELEMENTWISE, ids=lambda k: k.name)
def test_elementwise_kernels(kernel: Any, gpu: str) -> None:
    headers = "".join(f"#include <{h}>\n" for h in core._cupy_header_list)
    dtypes = ("float32", "float64", "complex64", "complex128")
    for dtype in dtypes:
        kernel(*(cupy.ones(1, dtype) for _ in kernel.in_params))
    assert len(kernel.cached_codes) >= len(dtypes)
    for source in kernel.cached_codes.values():
        assert kernel.name.encode() in compile_for(gpu, headers + source)


@pytest.mark.parametrize("gpu", GPUS)
def test_what_the_gpu_would_refuse_is_refused(gpu: str) -> None:
    with pytest.raises(compiler.CompileException, match="nothing_of_this_name"):
        compile_for(gpu, 'extern "C" __global__ void f(float* x) { x[0] = nothing_of_this_name; }')
    with pytest.raises(Exception, match="shared"):
        compile_for(
            gpu, 'extern "C" __global__ void f(int i) { __shared__ double x[9999]; x[i] = i; x[0] = x[i / 2]; }'
        )


# ---------------------------------------------------------------- none is forgotten


def test_every_kernel_of_every_file_is_known_to_the_launcher() -> None:
    assert {p for p in FILES if p.suffix == ".cu"} == set(SOURCES)
    for path in FILES:
        launched = set(SOURCES[path].kernels) if path in SOURCES else set()
        assert kernels_in(path) == launched, path.name


def test_kernels_have_names_of_their_own() -> None:
    names = [name for source in launch.SOURCES for name in source.kernels]
    names += [kernel.name for kernel in launch.ELEMENTWISE]
    assert len(set(names)) == len(names) > 10


def test_kernels_are_made_of_files_alone() -> None:
    """And by launch.py alone, so all are in the lists that the tests above go through."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        made = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        made |= {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
        made &= {"RawKernel", "RawModule", "ElementwiseKernel", "ReductionKernel", "create_ufunc", "fuse", "rawkernel"}
        at_home = path == Path(launch.__file__)
        assert made == ({"RawKernel", "ElementwiseKernel"} if at_home else set()), path
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        assert at_home or not any("__global__" in text or "__device__" in text for text in texts), path


def test_the_defaults_of_the_headers_are_those_of_the_launcher() -> None:
    defined = dict(re.findall(r"#ifndef (\w+)\n#define \1 (\w+)\n", "".join(p.read_text() for p in FILES)))
    assert defined.pop("TENSORS") == str(table.TENSORS)
    assert defined == {macro: str(value) for macro, value in launch.DEFAULTS.items()}


def test_what_a_file_says_it_depends_on_is_what_it_is_compiled_for() -> None:
    for path, source in SOURCES.items():
        (said,) = re.findall(r"^Depends on (.*)\.$", path.read_text(), re.M)
        several = {macro for macro, values in source.macros.items() if values != (launch.DEFAULTS.get(macro),)}
        assert several == (set() if said == "none of the macros" else set(said.split(", "))), path.name
