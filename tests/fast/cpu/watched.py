"""A plugin for pytest that watches every call of a kernel. Run by .ci/run in a library with sanitizers:

    CFLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -include tests/fast/cpu/watched.h" \\
        LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
        PYTHONPATH=tests/fast/cpu python -m pytest -p watched --capture=sys tests/test_rules_fast.py ...

The sanitizers end the process after their first report, so it is the last that is seen; pytest must not hold it back.

* Each array is copied to a block of memory of its own, of exactly its size, with a red zone around it: many arrays are
  parts of larger ones, and to read beyond them would go unnoticed. (NumPy keeps small blocks for the next array of just
  the same size, so they have their red zones too. What goes unnoticed is use after free; but the kernels keep nothing.)
* The kernels have given back all memory that they asked for when a test ends.
* A few calls of each kernel are done again while the first, the second, ... of its blocks is refused. It must raise
  MemoryError, and give back the others.
* In the end, every kernel must have been called.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tinydiff.fast.cpu import compiled

AGAIN = 3  # so many calls of each kernel are done again without memory
calls: Counter[str] = Counter()
problems: set[str] = set()
original = compiled.Function.__call__


def arrays_of(value: Any) -> list[np.ndarray]:
    return [a for a in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(a, np.ndarray)]


def copied(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [copied(a) for a in value]
    return value.copy() if isinstance(value, np.ndarray) else value


def is_refused(given: dict[str, Any], written: list[str]) -> bool:
    """Will the door refuse them, for a reason that a copy would not have?"""
    arrays = [(name in written, a) for name, value in given.items() for a in arrays_of(value)]
    return any(
        not a.flags.c_contiguous
        or (is_written and not a.flags.writeable)
        or any(is_written and np.may_share_memory(a, b) for _, b in arrays[:i] + arrays[i + 1 :])
        for i, (is_written, a) in enumerate(arrays)
    )


def variable(name: str, char: str) -> Any:
    return ctypes.c_long.in_dll(compiled.library(char), name)


def watched(function: Any, /, **given: Any) -> bool:
    names = [x.name for x in function.arguments if x.kind in ("out", "inout")]
    written = [a for name in names for a in arrays_of(given[name])]
    if is_refused(given, names):
        return original(function, **given)
    reals = [x.name for x in function.arguments if x.dtype == "real"]
    char = next((a.dtype.char for name in reals for a in arrays_of(given[name])), "f")
    if char not in "fd":
        return original(function, **given)  # which refuses them
    name = f"{function.name} {char}"
    if calls[name] < AGAIN and compiled.library(char):
        refuse_memory(function, given, char)
    exact = {key: copied(value) for key, value in given.items()}
    done = original(function, **exact)
    if done:
        calls[name] += 1
        for a, b in zip(written, [a for name in names for a in arrays_of(exact[name])]):
            a[...] = b
    return done


def refuse_memory(function: Any, given: dict[str, Any], char: str) -> None:
    grant, before = variable("watched_grant", char), variable("watched_blocks", char).value
    for n in range(100):
        grant.value = n
        try:
            original(function, **{key: copied(value) for key, value in given.items()})
            refused = grant.value < 0
            if refused:
                problems.add(f"{function.name} goes on when its block {n} is refused")
        except MemoryError:
            refused = True
        finally:
            grant.value = -1
        if variable("watched_blocks", char).value != before:
            problems.add(f"{function.name} keeps memory when its block {n} is refused")
        if not refused:
            return


compiled.Function.__call__ = watched  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    yield
    for char in "fd":
        if any(name.endswith(char) for name in calls):
            assert variable("watched_blocks", char).value == 0, "a kernel has not given back its memory"
    assert not problems


def pytest_sessionfinish(session: pytest.Session) -> None:
    print("\ncalls:", ", ".join(f"{name} {n}" for name, n in sorted(calls.items())))
    called = {name.split()[0] for name in calls}
    if missing := [f.name for f in compiled.FUNCTIONS if f.name not in called]:
        print("kernels that were never called:", ", ".join(missing))
        session.exitstatus = 1
