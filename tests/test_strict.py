"""The strict backend: what it must refuse, and that ordinary things work and agree with NumPy.

With TINYDIFF_BACKEND=cupy the same snippets run on CuPy as well, which keeps `strict` honest: CuPy must refuse what it
refuses, except where `why` says for what reason strict is stricter; there CuPy must accept.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import pickle
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # strict is a package beside this file, however pytest imports
strict = importlib.import_module("strict")
ON_CUPY = os.environ.get("TINYDIFF_BACKEND") == "cupy"


class Refusal(NamedTuple):
    # a statement; xp, np, f (2, 3) float32, i int64, m bool mask, z complex64, h a host array, t: takes over operations
    code: str
    error: type[Exception]
    match: str  # in strict's message
    cupy: type[Exception] | None = None  # CuPy's error, where it is another
    why: str = ""  # strict is stricter: why. CuPy accepts


HIDDEN_COPY = (
    "CuPy copies the host array to the device at each use, which stalls the stream and is an error in a CUDA graph"
)
ON_THE_HOST = "CuPy's answer is a NumPy array or scalar, or depends on which argument it checks first"
DISPATCH = "NumPy hands the call to CuPy, which hides where the code computes; tinydiff calls xp"
READS_BOTH = "the same code has to run on NumPy, which does otherwise"
UNDEFINED = "CuPy does it without an error, and the result depends on the order of threads"
REFUSALS = [
    # host arrays: operands
    Refusal("f + h", TypeError, "Unsupported type"),
    Refusal("h + f", TypeError, "Unsupported type"),
    Refusal("h == f", TypeError, "Unsupported type"),
    Refusal("f += h", TypeError, "Unsupported type"),
    Refusal("f @ h.T", TypeError, "Unsupported type"),
    Refusal("h @ f.T", TypeError, "Unsupported type"),
    Refusal("f + [1, 2, 3]", TypeError, "Unsupported type"),
    Refusal("f + None", TypeError, "Unsupported type"),
    Refusal("xp.exp(h)", TypeError, "Unsupported type"),
    Refusal("xp.exp([1.0])", TypeError, "Unsupported type"),
    Refusal("xp.maximum(f, h)", TypeError, "Unsupported type"),
    Refusal("xp.add(f, f, out=h)", TypeError, "`out` must be"),
    Refusal("xp.matmul(f, h.T)", TypeError, "Unsupported type"),
    Refusal("xp.matmul(f, f.T, out=np.empty((2, 2), 'f4'))", TypeError, "Unsupported type"),
    Refusal("xp.where(h > 0, f, 0)", TypeError, "Unsupported type"),
    Refusal("xp.where(m, f, h)", TypeError, "Unsupported type"),
    Refusal("xp.where([True, False, True], f, 0)", TypeError, "Unsupported type", AttributeError),
    Refusal("xp.concatenate([f, h])", TypeError, "Unsupported type"),
    Refusal("xp.stack([f, h])", TypeError, "Unsupported type"),
    Refusal("xp.broadcast_to(h, (2, 2, 3))", TypeError, "Unsupported type"),
    Refusal("xp.pad(h, 1)", TypeError, "Unsupported type", ValueError),
    Refusal("xp.add.at(f, i, h)", TypeError, "Unsupported type", why=HIDDEN_COPY),
    Refusal("xp.add.at(f, 0, h[0])", TypeError, "Unsupported type"),
    Refusal("xp.sum([1.0, 2.0])", TypeError, "Unsupported type", AttributeError),
    Refusal("xp.sum(3.0)", TypeError, "takes an array", AttributeError),
    Refusal("xp.sum(h)", TypeError, "Unsupported type", why=ON_THE_HOST),
    Refusal("xp.reshape(h, (3, 2))", TypeError, "Unsupported type", why=ON_THE_HOST),
    Refusal("xp.zeros_like(h)", TypeError, "Unsupported type", why=ON_THE_HOST),
    Refusal("xp.einsum('ij->i', h)", TypeError, "Unsupported type", why=HIDDEN_COPY),
    Refusal("xp.asarray(h)", TypeError, "Unsupported type", why="there is one way in, backend.to_device"),
    Refusal("xp.array([f, f])", TypeError, "use stack", why=READS_BOTH),
    Refusal("xp.array([f, 1.0])", TypeError, "use stack"),
    Refusal("xp.result_type(f, h)", TypeError, "Unsupported type", why=ON_THE_HOST),
    # host arrays: indices and assignments
    Refusal("f[np.array([0, 1])]", TypeError, "an index", why=HIDDEN_COPY),
    Refusal("f[[0, 1]]", TypeError, "an index", why=HIDDEN_COPY),
    Refusal("f[h > 0]", TypeError, "an index", why=HIDDEN_COPY),
    Refusal("f[:, np.array([0])] = 1.0", TypeError, "an index", why=HIDDEN_COPY),
    Refusal("xp.take(f, [0, 1])", TypeError, "Unsupported type", why=HIDDEN_COPY),
    Refusal("f.take(np.array([0]))", TypeError, "Unsupported type", why=HIDDEN_COPY),
    Refusal("xp.add.at(f, np.array([0]), 1.0)", TypeError, "an index", why=HIDDEN_COPY),
    Refusal("f[0] = h[0]", ValueError, "cannot be used for fill"),
    Refusal("f[...] = h", ValueError, "cannot be used for fill"),
    Refusal("f[0] = [1, 2, 3]", ValueError, "cannot be used for fill"),
    Refusal("f[0] = np.array(3.0)", ValueError, "cannot be used for fill", why=ON_THE_HOST),
    Refusal("f[0] = t", TypeError, "Unsupported type"),
    Refusal("f += t", TypeError, "Unsupported type"),
    Refusal("xp.copyto(f, h)", TypeError, "Unsupported type", ValueError),
    Refusal(
        "f[xp.array([0, 2])]",
        IndexError,
        "out of bounds",
        why="CuPy wraps the index in silence: it is always a mistake",
    ),
    Refusal("f[xp.array([0, 0])] = f", ValueError, "occurs twice", why=UNDEFINED),
    Refusal("f[xp.array([0, 0])] += f", ValueError, "occurs twice", why=UNDEFINED),
    Refusal("f[1.0]", IndexError, "must be an integer", why=READS_BOTH),
    # NumPy's hands on arrays of the device
    Refusal("np.asarray(f)", TypeError, "Implicit conversion"),
    Refusal("np.array([f, f])", TypeError, "Implicit conversion"),
    Refusal("np.array(f, dtype='f8')", TypeError, "Implicit conversion"),
    Refusal("np.float32(f[0, 0])", TypeError, "Implicit conversion"),
    Refusal("h[i]", TypeError, "Implicit conversion"),
    Refusal("h[0] = f[0]", TypeError, "Implicit conversion"),
    Refusal("np.testing.assert_allclose(f, f)", TypeError, "Implicit conversion|was called with"),
    Refusal("np.add(h, f)", TypeError, "does not support ufuncs"),
    Refusal("np.exp(f)", TypeError, "does not support ufuncs", why=DISPATCH),
    Refusal("np.add(f, f)", TypeError, "does not support ufuncs", why=DISPATCH),
    Refusal("np.sum(f)", TypeError, r"call xp\.sum", why=DISPATCH),
    Refusal("np.concatenate([f, f])", TypeError, r"call xp\.concatenate", why=DISPATCH),
    Refusal("np.shape(f)", TypeError, r"call xp\.shape", why=DISPATCH),
    Refusal("np.lib.stride_tricks.as_strided(f, (2, 2), (4, 4))", TypeError, "Implicit conversion"),
    Refusal("np.from_dlpack(f)", AttributeError, "__dlpack__", RuntimeError),
    # functions that CuPy lacks
    Refusal("xp.block([f, f])", AttributeError, "'cupy' has no attribute 'block'"),
    Refusal("xp.errstate(all='ignore')", AttributeError, "has no attribute 'errstate'"),
    Refusal("xp.insert(f, 0, 1.0)", AttributeError, "has no attribute 'insert'"),
    Refusal("xp.geomspace(1, 2, 3)", AttributeError, "has no attribute 'geomspace'"),
    Refusal("xp.einsum_path('ij->i', f)", AttributeError, "has no attribute 'einsum_path'"),
    Refusal("xp.ndenumerate(f)", AttributeError, "has no attribute 'ndenumerate'"),
    Refusal("xp.vecdot(f, f)", AttributeError, "has no attribute 'vecdot'"),
    Refusal("xp.nanquantile(f, 0.5)", AttributeError, "has no attribute 'nanquantile'"),
    Refusal("xp.linalg.multi_dot([f, f.T])", AttributeError, r"'cupy.linalg' has no attribute 'multi_dot'"),
    Refusal("xp.lib.format", AttributeError, "has no attribute 'format'"),
    Refusal("xp.trapz(f)", AttributeError, "tinydiff runs on both", why=READS_BOTH),
    Refusal("xp.random", AttributeError, "not offered", why="tinydiff.rng draws by counter, the same on every backend"),
    Refusal("xp.ElementwiseKernel", AttributeError, "tinydiff runs on both", why=READS_BOTH),
    Refusal("xp.asnumpy(f)", AttributeError, "has no 'asnumpy'", why="there is one way out, backend.to_host"),
    Refusal("xp.apply_along_axis(lambda v: v, 0, f)", AttributeError, "calls back", why="a Python call for each row"),
    # methods and attributes that CuPy lacks
    Refusal("f.resize(3)", AttributeError, "'resize'"),
    Refusal("f.setflags(write=False)", AttributeError, "'setflags'"),
    Refusal("f.flags.writeable", AttributeError, "writeable"),
    Refusal("f.ctypes", AttributeError, "'ctypes'"),
    Refusal("f.__array_interface__", AttributeError, "__array_interface__"),
    Refusal("f.note = 1", AttributeError, "note"),
    Refusal("f.get_it()", AttributeError, "nor has CuPy"),
    Refusal("f.scatter_add(0, 1.0)", AttributeError, "CuPy's ndarray has 'scatter_add'", why=READS_BOTH),
    Refusal("hash(f)", TypeError, "unhashable"),
    Refusal("f.item(0)", TypeError, "argument"),
    # keywords that CuPy lacks
    Refusal("f.sum(where=m)", TypeError, "unexpected keyword argument.*where"),
    Refusal("f.sum(initial=0.0)", TypeError, "unexpected keyword argument.*initial"),
    Refusal("f.max(initial=0.0)", TypeError, "unexpected keyword argument.*initial"),
    Refusal("xp.max(f, where=m, initial=0.0)", TypeError, "unexpected keyword argument"),
    Refusal("xp.mean(f, where=m)", TypeError, "unexpected keyword argument.*where"),
    Refusal("xp.var(f, correction=1)", TypeError, "unexpected keyword argument.*correction"),
    Refusal("xp.add(f, f, where=m)", TypeError, "Wrong arguments.*where"),
    Refusal("xp.add(f, f, order='C')", TypeError, "Wrong arguments.*order"),
    Refusal("xp.add(f, f, subok=True)", TypeError, "Wrong arguments.*subok"),
    Refusal("xp.add.reduce(f, initial=0.0)", TypeError, "unexpected keyword argument.*initial"),
    Refusal("xp.einsum('ij->i', f, out=f[:, 0])", TypeError, "unexpected keyword argument.*out"),
    Refusal("xp.einsum('ij->i', f, order='C')", TypeError, "unexpected keyword argument.*order"),
    Refusal("xp.take(f, i, mode='wrap')", TypeError, "unexpected keyword argument.*mode"),
    Refusal("xp.clip(f, min=0, max=1)", TypeError, "unexpected keyword argument"),
    Refusal("f.transpose(axes=(1, 0))", TypeError, "unexpected keyword argument.*axes"),
    Refusal(
        "xp.lib.stride_tricks.as_strided(f, (2, 2), (4, 4), writeable=False)",
        TypeError,
        "unexpected keyword.*writeable",
    ),
    Refusal("xp.lib.stride_tricks.sliding_window_view(f, 2, 0, writeable=True)", NotImplementedError, "Writeable"),
    Refusal("xp.sum(f, 0, None, None, True, 0)", TypeError, "5 positional arguments"),
    Refusal("xp.argmax(f, 0, None)", TypeError, "name it", why=READS_BOTH),
    # ufunc methods and dtypes that CuPy lacks
    Refusal("xp.maximum.reduce(f)", NotImplementedError, r"cupy_maximum\.reduce"),
    Refusal("xp.logical_and.reduce(m)", NotImplementedError, "not supported yet"),
    Refusal("xp.maximum.accumulate(f)", NotImplementedError, r"cupy_maximum\.accumulate"),
    Refusal("xp.multiply.at(f, i, 2.0)", NotImplementedError, r"cupy_multiply\.at"),
    Refusal("xp.subtract.at(f, i, 2.0)", TypeError, "only supports"),
    Refusal("xp.add.at(m, i, True)", TypeError, "only supports"),
    Refusal("xp.add.at(z, i, 1.0)", TypeError, "only supports"),
    Refusal("f.astype(object)", ValueError, "Unsupported dtype"),
    Refusal("f.astype('U3')", ValueError, "Unsupported dtype"),
    Refusal("f.astype(np.longdouble)", ValueError, "Unsupported dtype"),
    Refusal("xp.zeros(3, dtype=object)", ValueError, "Unsupported dtype"),
    Refusal("xp.zeros(3, dtype='datetime64[s]')", ValueError, "Unsupported dtype"),
    Refusal("xp.logical_and(z, z)", TypeError, "CuPy has no loop"),
    Refusal("xp.clip(z, 0, 1)", TypeError, "Wrong type"),
    Refusal("-m", TypeError, "negative"),
    Refusal("m - m", TypeError, "subtract"),
    Refusal("i += 1.5", TypeError, "same_kind"),
    Refusal("f.astype('u1') + 300", OverflowError, "out of bounds"),
    # arrays of the device where Python wants numbers
    Refusal("range(i[0])", TypeError, "interpreted as an integer"),
    Refusal("[1, 2][i[0]]", TypeError, "list indices"),
    Refusal("xp.zeros(i[1])", TypeError, "interpreted as an integer"),
    Refusal("f.reshape(i[0], -1)", TypeError, "interpreted as an integer"),
    Refusal("f.sum(axis=i[0])", TypeError, "interpreted as an integer"),
    Refusal("xp.split(f, i, axis=1)", TypeError, "interpreted as an integer"),
    Refusal("xp.pad(f, 1, constant_values=f[0, 0])", TypeError, "interpreted as an integer"),
    Refusal("float(f[0, :1])", TypeError, "only 0-dimensional arrays"),
    Refusal("len(f[0, 0])", TypeError, "unsized"),
    Refusal("iter(f[0, 0])", TypeError, "0-d array"),
    Refusal("bool(f)", ValueError, "ambiguous"),
    Refusal("5 in f", ValueError, "truth value"),
    Refusal("round(f[0, 0], 1)", TypeError, "__round__"),
]

WAITS = [  # what waits for the device; each raises under no_sync
    *(
        "float(f[0, 0])",
        "int(i[0])",
        "complex(f[0, 0])",
        "bool(m[0, 0])",
        "f.sum().item()",
        "f.tolist()",
        "f.get()",
        "f.tobytes()",
    ),
    *(
        "if (f > 0).all(): pass",
        "str(f)",
        "repr(f)",
        "f'{f[0, 0]:.3f}'",
        "pickle.dumps(f)",
        "f[m]",
        "f[m] = 0.0",
        "f[:, m[0]]",
    ),
    *(
        "xp.nonzero(f)",
        "xp.where(m)",
        "xp.flatnonzero(m)",
        "xp.argwhere(m)",
        "m.nonzero()",
        "xp.unique(i)",
        "xp.bincount(i)",
    ),
    *(
        "xp.putmask(f, m, 0.0)",
        "xp.extract(m, f)",
        "xp.compress(m[0], f, axis=1)",
        "xp.nanmax(f)",
        "xp.repeat(f, i, axis=0)",
    ),
    *(
        "xp.arange(i[1])",
        "xp.linspace(f[0, 0], f[0, 1], 3)",
        "xp.delete(f, 0, axis=0)",
        "xp.histogram(f)",
        "bool(xp.allclose(f, f))",
    ),
    *(
        "xp.lib.stride_tricks.sliding_window_view(f, 2, axis=1)",
        "xp.average(f, weights=f)",
        "xp.union1d(i, i)",
        "f[True]",
    ),
]

DOES_NOT_WAIT = [
    *(
        "f + 1.0",
        "f @ f.T",
        "f += f",
        "f[i]",
        "f[0, 1]",
        "f[0] = f[1]",
        "f[i] = 0.0",
        "xp.add.at(f, i, 1.0)",
        "f.sum()",
        "f.mean(axis=0)",
    ),
    *(
        "xp.copyto(f, 0.0, where=m)",
        "xp.where(m, f, 0.0)",
        "xp.take_along_axis(f, i[:, None], axis=1)",
        "xp.allclose(f, f)",
    ),
    *(
        "xp.concatenate([f, f])",
        "xp.pad(f, 1)",
        "xp.lib.stride_tricks.as_strided(f, (2, 2), (4, 4))",
        "[row * 2 for row in f]",
    ),
    *(
        "xp.repeat(f, 2, axis=0)",
        "xp.arange(3)",
        "xp.linspace(0, 1, 3)",
        "f[xp.array(1)]",
        "xp.cumsum(f, axis=0)",
        "copy.deepcopy(f)",
    ),
    *(
        "f.shape, f.dtype, len(f), f.ndim, f.size",
        "xp.isfinite(f).all()",
        "xp.count_nonzero(f)",
        "f.astype('f8')",
        "xp.argmax(f, axis=1)",
    ),
]


class TakesOver:
    """A class like Tensor: arrays leave operations to it."""

    __array_ufunc__ = None

    def __radd__(self, other: Any) -> str:
        return "radd"

    def __rmatmul__(self, other: Any) -> str:
        return "rmatmul"

    def __gt__(self, other: Any) -> str:
        return "gt"


def _cupy() -> Any:
    import cupy
    import cupyx

    forbid = (lambda: cupyx.allow_synchronize(False)) if importlib.util.find_spec("cupy_on_cpu") is None else None
    if forbid is None:  # the emulator also sees what allow_synchronize lets through
        forbid = importlib.import_module("cupy_on_cpu").forbid_sync
    return SimpleNamespace(name="cupy", xp=cupy, to_device=cupy.asarray, to_host=cupy.asnumpy, no_sync=forbid)


@pytest.fixture(params=["strict", "cupy"] if ON_CUPY else ["strict"])
def device(request: Any) -> Any:
    if request.param == "cupy":
        return _cupy()
    return SimpleNamespace(
        name="strict", xp=strict.xp, to_device=strict.to_device, to_host=strict.to_host, no_sync=strict.forbid_sync
    )


def _names(device: Any) -> dict[str, Any]:
    h = np.arange(6, dtype=np.float32).reshape(2, 3)
    f = device.to_device(h)
    return {
        **{"xp": device.xp, "np": np, "pickle": pickle, "copy": copy, "t": TakesOver()},
        **{"f": f, "i": device.to_device([0, 1]), "m": f > 2, "z": f.astype("complex64"), "h": h},
    }


def _run(code: str, device: Any, context: Any = None) -> None:
    names = _names(device)
    with context or contextlib.nullcontext():
        exec(code, names)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.code)
@pytest.mark.filterwarnings("ignore")
def test_refused(refusal: Refusal, device: Any) -> None:
    if device.name == "strict":
        with pytest.raises(refusal.error, match=refusal.match):
            _run(refusal.code, device)
    elif refusal.why:
        _run(refusal.code, device)  # the reason given must still be needed
    else:
        with pytest.raises(refusal.cupy or refusal.error):
            _run(refusal.code, device)


@pytest.mark.parametrize("code", WAITS)
@pytest.mark.filterwarnings("ignore")
def test_waits(code: str, device: Any) -> None:
    before = strict.syncs
    _run(code, device)
    assert device.name != "strict" or strict.syncs > before
    with pytest.raises(RuntimeError):
        _run(code, device, device.no_sync())


@pytest.mark.parametrize("code", DOES_NOT_WAIT)
def test_does_not_wait(code: str, device: Any) -> None:
    before = strict.syncs
    _run(code, device, device.no_sync())
    assert strict.syncs == before


def test_waiting_is_forbidden_in_one_thread_only() -> None:
    f = strict.to_device(1.0)
    seen = []
    with strict.forbid_sync():
        thread = threading.Thread(target=lambda: seen.append(float(f)))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="waits for the device"), strict.forbid_sync():
            float(f)
        with pytest.raises(RuntimeError, match="waits for the device"):
            float(f)
    assert seen == [float(f)] == [1.0]


# ---------------------------------------------------------------- what works, and agrees with NumPy


AGREE = [
    *(
        "f + 1",
        "1 - f",
        "f * f",
        "f / 3.0",
        "2 ** f",
        "f ** 2",
        "f // 2",
        "f % 2",
        "-f",
        "abs(-f)",
        "f @ f.T",
        "f > 2",
        "f == f",
        "~m",
    ),
    *(
        "m & m",
        "i << 1",
        "divmod(f, 2)[1]",
        "np.float64(2) * f",
        "f * np.float32(2)",
        "f + True",
        "z + 1j",
        "z.real",
        "z.imag",
        "f.imag",
    ),
    *(
        "f.sum()",
        "f.sum(axis=(0, 1), keepdims=True)",
        "f.mean(0)",
        "f.var(axis=1, ddof=1)",
        "f.max(axis=-1)",
        "f.std()",
        "f.prod(1)",
    ),
    *(
        "f.any()",
        "f.argmax()",
        "f.argmin(axis=1)",
        "f.cumsum(axis=1)",
        "f.clip(1, 3)",
        "f.round(1)",
        "xp.sum(f, axis=0, dtype='f8')",
    ),
    *(
        "f.reshape(3, 2)",
        "f.reshape((-1, 2))",
        "f.transpose(1, 0)",
        "f.transpose((1, 0))",
        "f.T",
        "f.swapaxes(0, 1)",
        "f.ravel()",
    ),
    *(
        "f.squeeze()",
        "f[None, ..., 0]",
        "f[0, 1]",
        "f[i]",
        "f[:, ::-1]",
        "f[i, i]",
        "f[1]",
        "f[i[:, None], i]",
        "f[m]",
        "f[-1, 1:]",
    ),
    *(
        "f.take(i, axis=1)",
        "xp.take(f, i, axis=0)",
        "xp.take_along_axis(f, i[:, None], axis=1)",
        "f.repeat(2, axis=0)",
        "f.flatten()",
    ),
    *(
        "xp.exp(f)",
        "xp.exp(1.0)",
        "xp.maximum(f, 2)",
        "xp.maximum(f, np.float64(2))",
        "xp.minimum(f, f.max())",
        "xp.tanh(z)",
    ),
    *(
        "xp.where(m, f, 0.0)",
        "xp.where(m, 1.0, 0.0)",
        "xp.where(m, f, np.float64(0))",
        "xp.where(m, f, f.astype('f8').max())",
    ),
    *(
        "xp.concatenate([f, f], axis=1)",
        "xp.stack((f, f), axis=-1)",
        "xp.split(f, 3, axis=1)[1]",
        "xp.split(f, [1], axis=1)[1]",
    ),
    *(
        "xp.pad(f, ((1, 0), (0, 2)))",
        "xp.pad(f, 1, mode='reflect')",
        "xp.einsum('ij,kj->ik', f, f)",
        "xp.tensordot(f, f, axes=([1], [1]))",
    ),
    *(
        "xp.matmul(f, f.T)",
        "xp.dot(f, f.T)",
        "xp.outer(f[0], f[1])",
        "xp.zeros((2, 3), 'f4')",
        "xp.ones(2)",
        "xp.full((2,), 7.0)",
    ),
    *(
        "xp.arange(5)",
        "xp.arange(0, 1, 0.25, dtype='f4')",
        "xp.linspace(0, 1, 5)",
        "xp.eye(3, dtype='f4')",
        "xp.zeros_like(f)",
    ),
    *(
        "xp.full_like(f, 2)",
        "xp.array([[1.0, 2], [3, 4]], dtype='f4')",
        "xp.asarray(3.0)",
        "xp.tril(f, -1)",
        "xp.roll(f, 1, axis=1)",
    ),
    *(
        "xp.flip(f, 0)",
        "xp.tile(f, (2, 1))",
        "xp.expand_dims(f, 1)",
        "xp.broadcast_to(f, (2, 2, 3))",
        "xp.moveaxis(f, 0, 1)",
    ),
    *(
        "xp.sort(f[:, ::-1], axis=1)",
        "xp.argsort(f, axis=1)",
        "xp.cumsum(f)",
        "xp.isfinite(f)",
        "xp.isnan(f).any()",
        "xp.sign(f - 2)",
    ),
    *(
        "xp.logaddexp(f, f)",
        "xp.add(f, f, dtype='f8')",
        "xp.add.reduce(f)",
        "xp.add.outer(f, i)",
        "xp.multiply.accumulate(f, axis=1)",
    ),
    *(
        "xp.clip(f, 1, None)",
        "xp.clip(f, 0.5, 1.5)",
        "xp.allclose(f, f)",
        "xp.array_equal(f, f + 1)",
        "xp.count_nonzero(f)",
        "xp.diff(f)",
    ),
    *(
        "xp.lib.stride_tricks.as_strided(f, (2, 2), (4, 4))",
        "xp.linalg.norm(f, axis=1)",
        "xp.linalg.norm(f)",
        "xp.nonzero(m)[1]",
    ),
    *("f.astype('f8')", "f.astype(xp.float64)", "f.view('i4')", "f.copy()", "f.sum(dtype=xp.float64)"),
    *("f.mean() * f", "f + f.astype('f8').sum()"),
    *("f.size", "f.ndim", "f.nbytes", "f.strides", "len(f)", "xp.ndim(f)", "xp.size(f, 0)"),
    *("xp.result_type(f, 1.0)", "xp.result_type(f, 'f8')"),
    *(
        "xp.can_cast('f4', 'f8')",
        "xp.issubdtype(f.dtype, xp.floating)",
        "xp.finfo(f.dtype).eps",
        "xp.iinfo('i4').max",
        "xp.dtype('f4')",
    ),
    *("xp.promote_types('f4', 'f8')", "xp.broadcast_shapes((2, 1), (3,))", "xp.pi", "xp.newaxis"),
    *("f.flags.c_contiguous", "f.T.flags['F_CONTIGUOUS']"),
]


@pytest.mark.parametrize("code", AGREE)
def test_agrees_with_numpy(code: str, device: Any) -> None:
    names = _names(device)
    host = {k: device.to_host(v) if isinstance(v, device.xp.ndarray) else v for k, v in names.items()}
    want, got = eval(code, {**host, "xp": np}), eval(code, names)
    if (
        isinstance(want, (np.ndarray, np.generic))
        and not isinstance(want, (np.bool_, np.floating))
        or isinstance(got, device.xp.ndarray)
    ):
        assert isinstance(got, device.xp.ndarray), "not an array of the device"
        assert got.dtype == np.asarray(want).dtype
        assert got.shape == np.shape(want)
        np.testing.assert_allclose(device.to_host(got), want, rtol=1e-6)
    else:
        assert got == want


def test_nep50_dtypes(device: Any) -> None:
    """Python numbers are weak, NumPy's scalars and 0-d arrays are not."""
    xp, f = device.xp, _names(device)["f"]
    zero_d, wide = f.sum(), f.astype("f8").sum()
    i, b = device.to_device([0, 1, 2]), f > 2
    assert (f + 1.0).dtype == (zero_d + 1.0).dtype == (2 * zero_d).dtype == (f * np.float32(1)).dtype == np.float32
    assert (f * np.float64(1)).dtype == (np.float64(1) * f).dtype == (f + wide).dtype == (wide + f).dtype == np.float64
    assert xp.add(f, wide).dtype == xp.maximum(f, np.float64(0)).dtype == xp.where(b, f, wide).dtype == np.float64
    assert xp.where(b, f, 0.0).dtype == xp.clip(f, 0.0, 1.0).dtype == f.clip(0, 1).dtype == np.float32
    assert xp.clip(f, 0, np.float64(1)).dtype == f.clip(0, wide).dtype == (f + i).dtype == (i + 1.5).dtype == np.float64
    assert (b + 1).dtype == np.int64 and (f + 1j).dtype == np.complex64 and (i + 1j).dtype == np.complex128
    assert xp.result_type(zero_d, 1.0) == xp.result_type(f, 1) == np.float32 and xp.result_type(f, wide) == np.float64
    f += wide
    assert f.dtype == np.float32


def test_reductions_stay_on_the_device(device: Any) -> None:
    f = _names(device)["f"]
    for a in (
        f.sum(),
        f.max(),
        f.mean(),
        f[0, 1],
        device.xp.exp(1.0),
        f.argmax(),
        (f > 2).all(),
        device.xp.linalg.norm(f),
    ):
        assert isinstance(a, device.xp.ndarray) and a.shape == ()


def test_views_and_writes(device: Any) -> None:
    f = _names(device)["f"]
    element = f[0, 1]
    element += 10  # a view of no dimensions
    f[1] = f[0]
    f[:, 2:] = 7
    f.T[0] = -1.0
    f.real[0, 0] = 5
    f[device.xp.array([0, 1]), device.xp.array([0, 0])] += 1
    before = f
    f *= 2
    assert before is f
    assert device.to_host(f).tolist() == [[12, 22, 14], [0, 22, 14]]


def test_out(device: Any) -> None:
    xp, f = device.xp, _names(device)["f"]
    y, square = xp.zeros((2, 3), "f4"), xp.zeros((2, 2), "f4")
    assert xp.add(f, 1, out=y) is y and xp.multiply(y, y, y) is y and xp.exp(y, out=(y,)) is y
    assert xp.matmul(f, f.T, out=square) is square and device.to_host(square)[1, 1] == 50
    total = xp.zeros((), "f4")
    assert f.sum(out=total) is total and xp.max(f, out=total) is total and float(total) == 5
    assert xp.concatenate([f[:1], f[1:]], out=y) is y and device.to_host(y).tolist() == device.to_host(f).tolist()
    xp.add.at(y, (xp.array([0, 0]), xp.array([1, 1])), 1.0)
    xp.copyto(y, 0, where=f > 2)
    assert device.to_host(y).tolist() == [[0, 3, 2], [0, 0, 0]]


def test_operations_are_left_to_classes_that_ask(device: Any) -> None:
    f, t = _names(device)["f"], TakesOver()
    assert f + t == "radd" and f @ t == "rmatmul" and (f < t) == "gt"


def test_pickle_and_copy(device: Any) -> None:
    f = _names(device)["f"]
    for other in (pickle.loads(pickle.dumps(f)), copy.copy(f), copy.deepcopy(f)):
        assert isinstance(other, device.xp.ndarray) and other is not f
        other[...] = 0
    assert device.to_host(f).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_doors_copy() -> None:
    host = np.ones((2, 2), np.float32)
    a = strict.to_device(host)
    host[0] = 5
    out = strict.to_host(a)
    out[1] = 6
    assert strict.to_device(a) is a and strict.to_host(a).tolist() == [[1, 1], [1, 1]]
    assert strict.is_array(a) and not strict.is_array(host) and isinstance(a, strict.ndarray)
    with pytest.raises(ValueError, match="Unsupported dtype"):
        strict.to_device(["a"])
    with pytest.raises(TypeError, match="to_host takes an array of the device"):
        strict.to_host(host)


def test_empty_is_poisoned() -> None:
    for a in (
        strict.empty((2, 2), "f4"),
        strict.empty_like(strict.zeros(3)),
        strict.ndarray((2,), "c8"),
        strict.empty(1, "f2"),
    ):
        assert np.isnan(strict.to_host(a)).all()
    assert (strict.to_host(strict.empty(3, "i4")) == -1).all() and (strict.to_host(strict.empty(3, "u1")) == 255).all()


def test_scramble() -> None:
    """On request results have an inconvenient memory order; views stay views, promised orders are kept."""
    f = strict.to_device(np.arange(6, dtype=np.float32).reshape(2, 3))
    with strict.scramble(True):
        y = f + 1
        results = [
            y,
            strict.exp(f),
            f.sum(axis=0),
            strict.concatenate([f, f]),
            f.astype("f8"),
            strict.where(f > 0, f, 0),
        ]
        for a in (*results, f[strict.array([0, 1])]):
            assert not a.flags.c_contiguous and not a.flags.f_contiguous
        assert strict.to_host(y).tolist() == [[1, 2, 3], [4, 5, 6]]
        promised = [strict.zeros((2, 3)), strict.zeros_like(f), y.copy(), y.ravel(), y.reshape(-1), f.reshape(3, 2)]
        for a in (*promised, strict.ascontiguousarray(y)):
            assert a.flags.c_contiguous
        row = y[0]
        row[:] = 9
        out = strict.empty((2, 3), "f4")
        assert strict.add(f, y, out=out) is out and out.flags.c_contiguous
        assert strict.to_host(y)[0].tolist() == [9, 9, 9]
        assert (f.sum() + f.sum()).shape == () and strict.zeros((0, 3)).sum(axis=1).shape == (0,)
        assert strict.to_host(y @ f.T).tolist() == [[27, 108], [17, 62]]
    assert (f + 1).flags.c_contiguous


def test_errors_say_what_to_do() -> None:
    f = strict.to_device(np.ones(3, np.float32))
    with pytest.raises(TypeError, match=r"numpy.ndarray.*bring it to the device with backend.to_device"):
        f + np.ones(3)
    with pytest.raises(TypeError, match=r"maximum"):
        strict.maximum(f, np.ones(3))
    with pytest.raises(AttributeError, match=r"CuPy 14\.2"):
        strict.block  # noqa: B018


def test_is_a_backend() -> None:
    from tinydiff import backend

    before = backend._active
    try:
        backend._install(strict.make_backend())
        a = backend.to_device([1.0, 2.0])
        assert backend.name == "strict" and backend.xp.exp is strict.exp and strict.is_array(a)
        assert backend.to_host(a).tolist() == [1, 2] and backend.scalar(a.sum()) == 3
        with backend.no_sync():
            a * 2 + a.sum()
            for wait in (
                lambda: a[a > 1],
                lambda: float(a[0]),
                lambda: backend.to_host(a),
                lambda: backend.scalar(a[0]),
            ):
                with pytest.raises(RuntimeError, match="waits for the device"):
                    wait()
    finally:
        backend._install(before)


if ON_CUPY:

    def test_table_is_fresh() -> None:
        """The frozen table is what the installed CuPy offers."""
        freeze = importlib.import_module("strict.freeze")
        assert freeze.write(freeze.table()) == freeze.TABLE.read_text()
