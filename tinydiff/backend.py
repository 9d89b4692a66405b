"""Which array module is in use, and the doors between the host and the device.

tinydiff is written once, against `xp`. `TINYDIFF_BACKEND=numpy` (the default) or `=cupy`, or one call of `use`
before the first array, decides what `xp` is. There is no fallback: a backend that cannot run is an error that
says why. Arrays enter a device by `to_device` (those of another library on the same device join it by `from_dlpack`),
and leave it by `to_host` or `scalar`, and by nothing else, so that every wait for the device can be counted (`syncs`)
and forbidden (`no_sync`).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy

Array = Any  # an array of whichever module is in use; NumPy and CuPy share no base class
HostArray = numpy.ndarray
CHOICES = ("numpy", "cupy")
PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class Backend:
    """What tinydiff needs to know about an array module."""

    name: str
    module: Any  # the namespace: xp.exp, xp.float32, ...
    to_device: Callable[[Any], Array]
    to_host: Callable[[Array], numpy.ndarray]
    is_array: Callable[[Any], bool]
    fast: str | None = None  # under which name tinydiff/fast registers its versions; None: the plain ones run
    forbid_sync: Callable[[], Any] = contextlib.nullcontext  # context in which the array module itself refuses to wait


class ArrayModule:
    """The array module in use; a name is looked up in it once and then remembered."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(active().module, name)
        setattr(self, name, value)
        return value


xp: Any = ArrayModule()
syncs = 0  # how often the host has waited for the device
_active: Backend | None = None
reports: list[Callable[[], Any]] = []  # (name, state, text, remedy) for the doctor, from what registers itself in fast/
loaders: dict[str | None, Callable[[], Any]] = {}  # by Backend.fast: what brings its fast versions, when it is chosen
_precision = "float32"
_forbidden = threading.local()


def active() -> Backend:
    """The backend in use. The first call decides, from TINYDIFF_BACKEND, unless `use` came before it."""
    if _active is None:
        use(os.environ.get("TINYDIFF_BACKEND") or "numpy")
    assert _active is not None
    return _active


def use(name: str) -> None:
    """Choose "numpy" or "cupy". It must come before the first array, because arrays of the two do not mix.

    Errors: ValueError for another name; RuntimeError if the choice has been made already, if CuPy is not installed,
    or if it finds no CUDA device.
    """
    if name not in CHOICES:
        raise ValueError(
            f"unknown backend {name!r}: choose one of {', '.join(CHOICES)} (TINYDIFF_BACKEND or backend.use)"
        )
    if _active is not None and _active.name != name:
        raise RuntimeError(
            f"the backend is {_active.name!r} already: choose {name!r} before the first array is made, "
            f"by TINYDIFF_BACKEND={name} or by backend.use({name!r}) right after the import"
        )
    if _active is None:
        _install(_numpy() if name == "numpy" else _cupy())


def _install(backend: Backend | None) -> None:
    """Set the backend, whatever it was before (None: undecided). For `use`, and for tests."""
    global _active
    _active = backend
    vars(xp).clear()
    if backend is not None and backend.fast in loaders:
        loaders[backend.fast]()


def _numpy() -> Backend:
    return Backend(
        "numpy", numpy, numpy.asarray, numpy.asarray, lambda a: isinstance(a, numpy.ndarray), fast=_fast("numpy")
    )


def _fast(name: str) -> str | None:
    """The name, unless the environment says TINYDIFF_FAST=0: then everything runs as it stands on its page."""
    return name if wants_fast() else None


def wants_fast() -> bool:
    """Shall fast/ be used? Errors: ValueError if one of the three switches is neither 0 nor 1."""
    switch("TINYDIFF_CC")  # read when the first loop is compiled; a wrong one is said now
    switch("TINYDIFF_KEEP_MEMORY")  # read before the first step in threads
    return switch("TINYDIFF_FAST")


VARIABLES = ("BACKEND", "CC", "DATA", "FAST", "KEEP_MEMORY")


def warn_of_unknown_variables() -> None:
    """A UserWarning for each variable TINYDIFF_... of the environment that nothing reads: it may be misspelt."""
    for name in sorted(os.environ):
        end = name.removeprefix("TINYDIFF_")
        if name != end and end not in VARIABLES:
            near = difflib.get_close_matches(end, VARIABLES, n=1)
            meant = f"did you mean TINYDIFF_{near[0]}?" if near else f"those are TINYDIFF_ and {', '.join(VARIABLES)}"
            warnings.warn(f"tinydiff reads no variable {name}: {meant}", UserWarning, stacklevel=3)


def switch(name: str) -> bool:
    """A variable of the environment that is 1, unless it is 0. Errors: ValueError for anything else."""
    wanted = os.environ.get(name) or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, not {wanted!r}")
    return wanted == "1"


def _cupy() -> Backend:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "cupy"):
            raise RuntimeError(
                f"TINYDIFF_BACKEND=cupy, and CuPy is installed, but it cannot be imported ({error}): "
                "mend that installation, or unset TINYDIFF_BACKEND to run on the CPU"
            ) from error
        raise RuntimeError(
            "TINYDIFF_BACKEND=cupy, but CuPy is not installed: pip install 'cupy-cuda13x[ctk]' (CUDA 13) or "
            "'cupy-cuda12x[ctk]' (CUDA 12), or unset TINYDIFF_BACKEND to run on the CPU"
        ) from error
    if not cupy.cuda.is_available():
        try:
            cupy.cuda.runtime.getDeviceCount()
            why = "the driver answers, but no device is visible"
        except Exception as error:  # any failure of the driver is the reason we have to report
            why = str(error)
        raise RuntimeError(
            f"TINYDIFF_BACKEND=cupy, and CuPy is installed, but no CUDA device can be used here ({why}): "
            "check the driver and CUDA_VISIBLE_DEVICES, or unset TINYDIFF_BACKEND to run on the CPU"
        )
    return Backend(
        "cupy", cupy, cupy.asarray, cupy.asnumpy, lambda a: isinstance(a, cupy.ndarray), _fast("cupy"), _no_cupy_sync
    )


@contextlib.contextmanager
def _no_cupy_sync() -> Iterator[None]:
    """Inside, CuPy refuses to wait for the device, in this thread."""
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            # CuPy warns that it does not notice every wait; those that it does notice are enough to be useful.
            warnings.simplefilter("ignore")
            stack.enter_context(importlib.import_module("cupyx").allow_synchronize(False))
        yield


def entered(table: dict[Any, Any], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    table[name] = function
    return function


class overridable:
    """Decorator: a function of arrays, written plainly. fast/ may register a quicker version of it for each backend:

        @overridable
        def clip_norm(gradients, max_norm): ...          # what a reader reads, and what runs without fast/

        @clip_norm.fast("cupy")
        def clip_norm_cupy(gradients, max_norm): ...     # in fast/, where nothing else knows of it

    A fast version takes the same arguments and gives the same result; it may decline, by returning NotImplemented, and
    then the plain one runs. (Ops have the same two methods of registration: engine.py.)
    """

    def __init__(self, plain: Callable[..., Any]):
        self.plain = plain
        self.versions: dict[str | None, Callable[..., Any]] = {}
        functools.update_wrapper(self, plain)

    def fast(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: the version for Backend.fast == name."""
        return functools.partial(entered, self.versions, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        version = self.versions.get(active().fast)
        found = NotImplemented if version is None else version(*args, **options)
        return self.plain(*args, **options) if found is NotImplemented else found


def __getattr__(attribute: str) -> Any:
    if attribute == "name":
        return active().name
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


def to_device(a: Any, dtype: Any = None) -> Array:
    """An array of the backend in use, from a host array, a nested list, a number, or an array that is there already."""
    array = active().to_device(a)
    return array if dtype is None else array.astype(dtype, copy=False)


def from_dlpack(a: Any) -> Array:
    """An array of the backend in use that shares the memory of another library's, which must be on its device."""
    return active().module.from_dlpack(a)


def to_host(a: Any) -> numpy.ndarray:
    """A NumPy array, from an array of the backend in use or from anything that NumPy takes. Waits for the device."""
    if not active().is_array(a):
        return numpy.asarray(a)
    _count_sync("to_host")
    return active().to_host(a)


def scalar(a: Any) -> float:
    """The Python float in an array of one element. Waits for the device."""
    _count_sync("scalar")
    return float(a)


def operand(a: Any) -> Any:
    """An input of an op: arrays stay as they are, NumPy scalars become Python's (which never widen a dtype).

    Errors: TypeError for a host array where the arrays of the device are wanted, and for anything that is no number.
    """
    if active().is_array(a) or a is None or isinstance(a, (int, float, complex)) and not isinstance(a, numpy.generic):
        return a
    if isinstance(a, numpy.generic):
        return a.item()
    if isinstance(a, numpy.ndarray):
        raise TypeError(
            f"a NumPy array of shape {a.shape} met an array of backend {active().name!r}: "
            "move it there first, with tinydiff.backend.to_device or tinydiff.tensor"
        )
    raise TypeError(f"an op takes Tensors, arrays and numbers, not {type(a).__name__}: {a!r}")


def weak(value: Any) -> Any:
    """NumPy's scalars as Python's numbers, which never widen a dtype; anything else as it is."""
    return value.item() if isinstance(value, numpy.generic) else value


def weak_beside_arrays(values: list[Any]) -> list[Any]:
    """The values, with Python's numbers for NumPy's scalars of another dtype than the floating arrays among them. One
    of the same dtype may be the sum of an array, which NumPy gives as a scalar."""
    if not any(isinstance(a, numpy.generic) for a in values):
        return values
    dtypes = {a.dtype for a in values if active().is_array(a) and a.dtype.kind == "f"}
    return [weak(a) if dtypes and getattr(a, "dtype", None) not in dtypes else a for a in values]


def as_array(a: Any) -> Array:
    """An array also where NumPy reduced one to a scalar."""
    return a if active().is_array(a) else active().to_device(a)


class precision:
    """How a GPU multiplies matrices of float32: in "float32" (the default), "tf32" or "bf16".

    The last two round the factors of a product to 11 or 8 significant bits, as tensor cores require, and add up in
    float32; arrays stay float32. `backend.precision("tf32")` holds in the whole process from then on;
    `with backend.precision("tf32"):` holds inside the block only. A captured step is captured again when the precision
    changes. Errors: ValueError for another name, or for "tf32" and "bf16" on NumPy, which has no such products.
    """

    def __init__(self, name: str):
        global _precision
        if name not in PRECISIONS:
            raise ValueError(f"unknown precision {name!r}: choose one of {', '.join(PRECISIONS)}")
        if name != "float32" and active().name != "cupy":
            raise ValueError(
                f"precision {name!r} needs the tensor cores of a GPU: backend {active().name!r} multiplies in 'float32'"
            )
        self.before, _precision = _precision, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: Any) -> None:
        global _precision
        _precision = self.before


def matmul_precision() -> str:
    """The precision in use."""
    return _precision


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Inside, every wait for the device raises RuntimeError: those through the doors of this file, and, on CuPy,
    those that CuPy makes itself. A training step is meant to run under it."""
    before, _forbidden.on = getattr(_forbidden, "on", False), True
    try:
        with active().forbid_sync():
            yield
    finally:
        _forbidden.on = before


# ---------------------------------------------------------------- a step that the device repeats by itself

# A captured step runs its Python code once; from then on the device repeats the launches that were recorded. Work that
# the host must still do before every repetition goes through the functions below. Without fast/cuda, these plain
# versions run.


@overridable
def capture(step: Callable[..., Any]) -> Any:
    """The step as one CUDA graph, which is recorded at its second call and repeated from the third on. What a step may
    do, take and return: see fast/capture.py. Without CUDA graphs this is the step itself."""
    return step


@overridable
def each_time(action: Callable[[], None]) -> None:
    """Do the action now. While a step is being captured, note it too: it is done again before every replay of the
    step, in the order in which the actions were noted."""
    action()


@overridable
def numbers(values: Callable[[], Any]) -> Array:
    """values(), an array or a list, computed on the host for a kernel; in a captured step, anew before every replay."""
    return numpy.asarray(values())


@overridable
def refuse_capture(what: str, instead: str) -> None:
    """Errors: RuntimeError while a step is being captured, because every replay would repeat the value read now."""


def _count_sync(what: str) -> None:
    global syncs
    if getattr(_forbidden, "on", False):
        raise RuntimeError(f"{what} waits for the device inside backend.no_sync()")
    syncs += 1
