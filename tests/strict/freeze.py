"""Writes cupy_api.json: what the installed CuPy offers, so that `strict` can refuse the rest without CuPy.

    python tests/strict/freeze.py            # writes the table beside this file

Nearly all of it is read from CuPy's objects without using a device. One question needs a device, real or
emulated, because CuPy answers it only in an error message: the dtypes that `ufunc.at` takes.
"""

from __future__ import annotations

import inspect
import json
import types
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("cupy_api.json")
SUBMODULES = ("linalg", "fft", "lib.stride_tricks")
CONSTANTS = (bool, int, float, complex, str, type(None))


def parameters(function: Any) -> str:
    """The parameters of a function without annotations and defaults: "a, axis=, /, *, out=, **kwargs"."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function compiled by Cython: its docstring begins with its signature
        line = (function.__doc__ or "").split("\n")[0]
        inside = line[line.index("(") + 1 : line.rindex(")")]
        words = [w.strip().partition("=") for w in inside.split(",") if w.strip()]
        names = [name.split()[-1] + equals for name, equals, _ in words]  # drops C types: "int axis=-1"
        return ", ".join(n for n in names if n != "self")
    words, last = [], None
    for p in signature.parameters.values():
        if last is p.POSITIONAL_ONLY and p.kind is not p.POSITIONAL_ONLY:
            words.append("/")
        if p.kind is p.KEYWORD_ONLY and last not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL):
            words.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        words.append(stars + p.name + ("" if p.default is p.empty else "="))
        last = p.kind
    if last is inspect.Parameter.POSITIONAL_ONLY:
        words.append("/")
    return ", ".join(w for w in words if w != "self")


def supports(ufunc: Any, method: str, count: int) -> bool:
    try:
        getattr(ufunc, method)(*[None] * count)
    except NotImplementedError:
        return False
    except Exception:  # it got as far as looking at the arguments
        return True
    return True


def at_dtypes(cupy: Any, ufunc: Any) -> str:
    """The dtypes, as characters, of the arrays that `ufunc.at` can add into."""
    found = ""
    for char in "?bBhHiIlLqQefdFD":
        try:
            ufunc.at(cupy.zeros(2, char), cupy.zeros(1, "q"), 1)
            found += char
        except TypeError as error:
            if "only supports" not in str(error):
                raise
        except NotImplementedError:
            return ""
    return found


def table() -> dict[str, Any]:
    import cupy

    functions, ufuncs, classes, constants, objects = {}, {}, [], [], []
    for name in sorted(n for n in dir(cupy) if not n.startswith("_")):
        value = getattr(cupy, name)
        if isinstance(value, cupy.ufunc):
            methods = {"reduce": 1, "accumulate": 1, "reduceat": 2, "at": 3, "outer": 2}
            ufuncs[name] = {
                "nin": value.nin,
                "nout": value.nout,
                # Loops of bfloat16, "E", are there only where ml_dtypes is.
                "types": " ".join(loop for loop in value.types if "E" not in loop),
                "methods": " ".join(m for m, count in methods.items() if supports(value, m, count)),
                "at": at_dtypes(cupy, value) if supports(value, "at", 3) else "",
            }
        elif name == "matmul":
            functions[name] = "a, b, /, " + parameters(value.__call__).partition(", ")[2]  # a generalised ufunc
        elif isinstance(value, type):
            classes.append(name)
        elif isinstance(value, CONSTANTS):
            constants.append(name)
        elif isinstance(value, types.ModuleType) or not callable(value):
            objects.append(name)
        else:
            functions[name] = parameters(value)
    submodules = {}
    for path in SUBMODULES:
        module = cupy
        for part in path.split("."):
            module = getattr(module, part)
        members = {n: getattr(module, n) for n in dir(module) if not n.startswith("_")}
        submodules[path] = {n: parameters(f) for n, f in members.items() if inspect.isfunction(f) or n == "matmul"}
    if "matmul" in submodules["linalg"]:
        submodules["linalg"]["matmul"] = functions["matmul"]
    methods, attributes = {}, []
    for name in dir(cupy.ndarray):
        value = getattr(cupy.ndarray, name)
        if name.startswith("__") or not name.startswith("_"):
            if not callable(value):
                attributes.append(name)
            elif not name.startswith("__"):
                methods[name] = parameters(value)
            else:
                attributes.append(name)  # special methods: only their presence matters
    return {
        "cupy": cupy.__version__,
        "functions": functions,
        "ufuncs": ufuncs,
        "ufunc_methods": {
            m: parameters(getattr(cupy.ufunc, m)) for m in ("reduce", "accumulate", "reduceat", "at", "outer")
        },
        "classes": sorted(classes),
        "constants": sorted(constants),
        "objects": sorted(objects),
        "submodules": submodules,
        "methods": methods,
        "attributes": sorted(attributes),
    }


def write(data: dict[str, Any]) -> str:
    """JSON with one line an entry of the first two levels, so that a difference between versions reads well."""
    lines = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(write(table()))
    print(f"wrote {TABLE}")
