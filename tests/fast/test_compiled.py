"""The C files are called through a door that checks. How they are built is test_build.py; that they compute what the
pages do is tests/test_rules_fast.py."""

from __future__ import annotations

import os
import re
import shutil
from typing import Any

import numpy as np
import pytest

compiled = pytest.importorskip("tinydiff.fast.cpu.compiled")
from tinydiff.fast.cpu import norm  # noqa: E402

COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(os.environ.get("TINYDIFF_FAST") == "0", reason="no fast versions: TINYDIFF_FAST=0"),
]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler on this machine")


def test_every_declaration_is_the_signature_in_c() -> None:
    source = "\n".join(path.read_text("utf-8") for path in compiled.SOURCES)
    signatures = dict(re.findall(r"^int (\w+)\(([^)]*?)\)$", source, re.DOTALL | re.MULTILINE))
    declared = {function.name: [argument.in_c for argument in function.arguments] for function in compiled.FUNCTIONS}
    assert declared == {
        name: [" ".join(text.split()) for text in signature.split(",")] for name, signature in signatures.items()
    }


def arguments(**changed: Any) -> dict[str, Any]:
    x, statistics = np.ones((2, 3, 4), np.float32), np.empty((2, 2, 2), np.float32)
    parameters = {"shift": None, "weight": None, "bias": None, "W": 1, "eps": 1e-5, "silu": 0}
    return {"x": x, "y": np.empty_like(x), "mean": statistics[0], "rstd": statistics[1], **parameters, **changed}


@needs_compiler
@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": np.ones((2, 3, 4))}, TypeError, r"norm: y must be a C array \(A, L, C\) of float64, not float32"),
        ({"x": np.ones((3, 2, 4), np.float32).swapaxes(0, 1)}, TypeError, r"x must be a C array .* strides"),
        ({"x": np.ones((2, 12), np.float32)}, TypeError, r"x must be a C array \(A, L, C\)"),
        ({"y": None}, TypeError, "y must be a C array .* not None"),
        ({"y": np.empty((2, 3, 5), np.float32)}, ValueError, r"y \(2, 3, 5\) has C = 5, but it is 4"),
        (
            {"weight": np.ones((2, 4), np.float32), "bias": np.ones((1, 4), np.float32)},
            ValueError,
            "has W = 1, but it is 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        norm.in_c(**arguments(**changed))


@needs_compiler
def test_an_output_shares_no_memory_and_can_be_written() -> None:
    given = arguments()
    with pytest.raises(ValueError, match="y shares memory with x"):
        norm.in_c(**(given | {"y": given["x"]}))
    given["y"].flags.writeable = False
    with pytest.raises(ValueError, match="y cannot be written"):
        norm.in_c(**given)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -30.0, 80.0, -1e4, 1e4, np.inf, np.nan])
def test_silu_in_c_at_the_ends(dtype: str, value: float) -> None:
    """With mean 0 and variance 1 from its statistics, u = weight xhat + bias is the bias where xhat is 0."""
    x = np.array([-1.0, 0.0, 1.0], dtype).reshape(1, 3, 1, 1)
    bias = np.full(1, value, dtype)
    y, _, _ = norm.norm(x, None, np.zeros(1, dtype), bias, 0.0, True)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = value / (1 + np.exp(-np.float64(value)))
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    assert np.allclose(y, expected, rtol=tolerance, atol=1e-20, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 7, 2, 3), (2, 1, 1, 130), (1, 100, 9, 1), (5, 33, 4, 8)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_c_and_blocks_agree(shape: Any, dtype: str, tolerance: float, silu: bool, rows: int | None) -> None:
    """rows: no parameters; the same for all samples; one row per sample, and a shift."""
    draw = np.random.default_rng(0)
    a, _, groups, d = shape
    x, g = (draw.normal(1, 2, shape).astype(dtype) for _ in range(2))
    parameters = (
        [None, None] if rows is None else [draw.normal(size=(a, groups * d)[2 - rows :]).astype(dtype) for _ in "wb"]
    )
    shift = draw.normal(size=(a, groups * d)).astype(dtype) if rows == 2 else None
    found = norm.norm(x, shift, *parameters, 1e-5, silu)
    expected = norm.blocked_norm(x, shift, *parameters, 1e-5, silu)
    adjoints = norm.norm_vjp(g, x, *found[1:], shift, *parameters, silu)
    known = norm.blocked_norm_vjp(g, x, *expected[1:], shift, *parameters, silu)
    for b, c in zip([*found, *adjoints], [*expected, *known]):
        assert (b is None) == (c is None)
        if b is not None:
            assert b.dtype == dtype and np.allclose(b, np.reshape(c, b.shape), rtol=tolerance, atol=tolerance * 20)
