"""The C files are called through a door that checks. How they are built is test_build.py; that they compute what the
pages do is tests/test_rules_fast.py."""

from __future__ import annotations

import math
import os
import re
import shutil
from typing import Any

import numpy as np
import pytest

compiled = pytest.importorskip("tinydiff.fast.cpu.compiled")
from tinydiff.fast.cpu import activation, norm, optim, random  # noqa: E402

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
def test_a_list_and_an_array_must_agree_in_a_length() -> None:
    lists = {name: [np.ones(3, np.float32) for _ in range(64)] for name in "pgmv"}
    with pytest.raises(ValueError, match="adam: its lists have count = 64, but it is 1"):
        optim.adam_in_c(**lists, numbers=np.ones((1, 6)))


@needs_compiler
def test_an_output_shares_no_memory_and_can_be_written() -> None:
    given = arguments()
    with pytest.raises(ValueError, match="y shares memory with x"):
        norm.in_c(**(given | {"y": given["x"]}))
    given["y"].flags.writeable = False
    with pytest.raises(ValueError, match="y cannot be written"):
        norm.in_c(**given)


@needs_compiler
def test_arrays_that_are_read_may_share_memory_and_be_read_only() -> None:
    silu_vjp_in_c = activation.silu_vjp_in_c
    x, dx = np.ones(5, np.float32), np.zeros(5, np.float32)
    x.flags.writeable = False
    assert silu_vjp_in_c(g=x, x=x, dx=dx) and dx.all()
    whole = np.zeros(12, np.float32)  # side by side, and one inside another that is only read
    assert silu_vjp_in_c(g=whole[:4], x=whole[8:], dx=whole[4:8])
    assert silu_vjp_in_c(g=whole[:0], x=whole[:0], dx=whole[3:3])
    inside, to = whole[3:3], [whole[:8].reshape(8)]
    inside.flags.writeable = False
    assert optim.sgd_in_c(p=[*to, np.empty(0, "f")], g=[np.ones(8, "f"), inside], lr=0.0, decay=0.0)
    with pytest.raises(ValueError, match="dx shares memory with g"):
        silu_vjp_in_c(g=whole[:4], x=whole[8:], dx=whole[3:7])
    with pytest.raises(ValueError, match="dx shares memory with x"):
        silu_vjp_in_c(g=whole[:4], x=whole[7:11], dx=whole[4:8])


@needs_compiler
def test_a_list_of_arrays_is_checked() -> None:
    def lists(**changed: Any) -> dict[str, Any]:
        p, g = ([np.ones(shape, np.float32) for shape in ((2, 3), (), (0,))] for _ in "pg")
        return {"p": p, "g": g, "lr": 0.5, "decay": 0.0} | changed

    given, one = lists(), np.ones(7, np.float32)
    assert optim.sgd_in_c(**given) and all((a == 0.5).all() for a in given["p"])
    assert optim.sgd_in_c(**lists(p=[], g=[]))
    for changed, message in (
        ({"g": given["g"][:2]}, "g has 2 arrays, not 3"),
        ({"g": given["g"][::-1]}, r"g has the sizes \[0, 1, 6\], not \[6, 1, 0\]"),
        ({"p": [one[:6].reshape(2, 3)[:, ::-1], *given["p"][1:]]}, "p must be C arrays .* of float32, not"),
        ({"g": [a.astype("float64") for a in given["g"]]}, "g must be C arrays .* not float64"),
        ({"p": [one[:6], one[5:6].reshape(()), one[:0]]}, "p shares memory with p"),
        ({"g": [one[:6], one[6:], one[:0]], "p": [one[1:7], np.ones(1, "f"), one[:0]]}, "p shares memory with g"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"sgd: {message}"):
            optim.sgd_in_c(**lists(**changed))
    optim.sgd_in_c(**lists(p=[one[:1], one[1:2]], g=[one[2:3], one[2:3]]))  # read twice


@needs_compiler
def test_a_fixed_length() -> None:
    with pytest.raises(ValueError, match=r"source \(4,\) has 3 = 4, but it is 3"):
        random.uniform_in_c(source=np.zeros(4, np.uint64), z=np.zeros((1, 8), np.float32), first=0)


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


@pytest.mark.parametrize("dtype, digits", [("float32", 6), ("float64", 8)])
@pytest.mark.parametrize("compiled_too", [True, False])
def test_erf_has_its_digits_everywhere(
    dtype: str, digits: float, compiled_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides of its two ratios, and at the ends; digits: units in the last place."""
    if not compiled_too:
        monkeypatch.setattr(activation, "erf_in_c", lambda **given: False)
    ends = [
        0.0,
        -0.0,
        1e-300,
        1e-30,
        1e-10,
        0.46875,
        0.4687501,
        3.999,
        4.0,
        4.001,
        6.0,
        6.001,
        8.9,
        9.1,
        12.0,
        1e4,
        1e30,
        np.inf,
    ]
    x = np.array([*np.linspace(-6.5, 6.5, 20001), *ends, *(-e for e in ends), np.nan]).astype(dtype)
    y = activation.erf_numpy(x)
    expected = np.array([math.erf(value) for value in x])
    assert y.dtype == dtype and np.isnan(y[-1]) and (np.signbit(y[:-1]) == np.signbit(x[:-1])).all()
    units = np.abs(y - expected) / np.spacing(np.maximum(np.abs(expected), np.finfo(dtype).tiny).astype(dtype))
    assert np.nanmax(units) < digits


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
