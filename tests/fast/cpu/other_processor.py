"""The kernels on a processor that is not here: compiled for 64-bit ARM, run by an emulator, and compared, to rounding.
.ci/run does that; the compiler is Debian's gcc-aarch64-linux-gnu, the emulator its qemu-user.

As a plugin for pytest it records calls of every kernel, their arguments and their results here:

    export PYTHONPATH=tests/fast/cpu
    CALLS=calls.pickle python -m pytest -p other_processor $(cat tests/fast/cpu/kernel_tests.txt)
    python tests/fast/cpu/other_processor.py calls.pickle

The second command writes the calls to a file, compiles the kernels together with other_processor.c, which reads that
file, calls them and writes what they have written, and compares. What it must know of a kernel stands in its
declaration.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinydiff.fast.cpu import build, compiled

HERE = Path(__file__).parent
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MOST, LARGEST = 60, 2**20  # calls of one kernel and dtype that differ in shapes or numbers, and bytes of one call
NOTHING, BLOCK, LIST, INTEGER, NUMBER = range(5)  # as in other_processor.c
# Relative to the largest number of an array, or to a tenth of the largest that is read: sums may cancel to nearly 0. By
# the precision of the kernel: sums in float64 of numbers in float32 are no more exact than these.
TOLERANCE = {"f": 1e-5, "d": 1e-12}


class Call(NamedTuple):
    function: str
    char: str
    before: list[Any]  # every argument: None, an array, a list of arrays, or a number
    after: list[Any]


# ---------------------------------------------------------------- here: the calls


def arrays_of(value: Any) -> list[np.ndarray]:
    return [a for a in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(a, np.ndarray)]


def snapshot(function: Any, given: dict[str, Any]) -> list[Any]:
    """The arguments in the order of the signature, the arrays copied, and the lengths that the shapes give."""
    lengths: dict[str, Any] = {}  # which hold whatever is given, as in the door
    for x in function.arguments:
        value = given.get(x.name)
        if isinstance(value, (list, tuple)):  # count, and the sizes one after the other
            lengths |= zip(x.lengths, (len(value), np.array([a.size for a in value], np.int64)))
        elif isinstance(value, np.ndarray):
            lengths |= zip(x.lengths, value.shape)
    known = {"part": 0, "parts": 1, **given, **lengths}
    values = [known[x.name] for x in function.arguments]
    return [
        [np.array(a) for a in v] if isinstance(v, (list, tuple)) else np.array(v) if isinstance(v, np.ndarray) else v
        for v in values
    ]


calls: dict[Any, Call] = {}  # by function, dtype, shapes and numbers
original = compiled.Function.__call__


def recorded(function: Any, /, **given: Any) -> bool:
    for x in function.arguments:
        if x.kind == "out":  # what fresh memory holds by chance is no number to measure by, and nobody may read it
            for a in filter(lambda a: a.flags.writeable, arrays_of(given[x.name])):
                a.fill(np.nan if a.dtype.kind == "f" else -1)
    size = sum(a.nbytes for value in given.values() for a in arrays_of(value))
    chars = {a.dtype.char for x in function.arguments if x.dtype == "real" for a in arrays_of(given[x.name])}
    before = snapshot(function, given) if size < LARGEST and len(chars) <= 1 else None
    done = original(function, **given)
    if done and before is not None:
        char = chars.pop() if chars else "f"
        shapes = [[a.shape for a in arrays_of(v)] or str(v) for v in before]
        of_kind = (function.name, char)
        if sum(key[0] == of_kind for key in calls) < MOST:
            calls.setdefault((of_kind, str(shapes)), Call(function.name, char, before, snapshot(function, given)))
    return done


def pytest_configure() -> None:
    compiled.Function.__call__ = recorded  # type: ignore[method-assign]


def pytest_sessionfinish() -> None:
    Path(os.environ["CALLS"]).write_bytes(pickle.dumps([tuple(call) for call in calls.values()]))


# ---------------------------------------------------------------- there


def in_bytes(value: Any) -> bytes:
    """As get_value in other_processor.c reads it."""

    def integers(*n: int) -> bytes:
        return np.array(n, np.int64).tobytes()

    if value is None:
        return integers(NOTHING)
    if isinstance(value, np.ndarray):
        return integers(BLOCK, value.nbytes) + value.tobytes()
    if isinstance(value, list):
        return integers(LIST, len(value)) + b"".join(integers(a.nbytes) + a.tobytes() for a in value)
    if isinstance(value, (float, np.floating)):
        return integers(NUMBER) + np.float64(value).tobytes()
    return integers(INTEGER, int(value))


def source_of_cases() -> tuple[str, str]:
    """The declarations of the kernels in C; and the cases, one for each."""
    declarations, cases = "", ""
    for number, function in enumerate(compiled.FUNCTIONS):
        signature = [x.in_c for x in function.arguments]
        values = [
            ("(void *)a[{}].blocks" if "*const *" in text else "a[{}].blocks[0]").format(i)
            if "*" in text
            # A number may have been given as an integer.
            else (f"a[{i}].kind == NUMBER ? a[{i}].number : a[{i}].integer" if text[:3] != "int" else f"a[{i}].integer")
            for i, text in enumerate(signature)
        ]
        declarations += f"int {function.name}({', '.join(signature)});\n"
        cases += f"case {number}: status = {function.name}({', '.join(values)}); break; "
    return declarations, cases


def run_there(some: list[Call], char: str, work: Path) -> bytes:
    """What all arrays of these calls hold afterwards."""
    numbers = {function.name: i for i, function in enumerate(compiled.FUNCTIONS)}
    heads = [np.array([numbers[call.function], len(call.before)], np.int64).tobytes() for call in some]
    data = [head + b"".join(map(in_bytes, call.before)) for head, call in zip(heads, some)]
    (work / "calls").write_bytes(np.int64(len(some)).tobytes() + b"".join(data))
    declarations, cases = source_of_cases()
    (work / "declarations.h").write_text(declarations)
    subprocess.run(
        [
            CROSS, *build.FLAGS, "-static", f"-DREAL={build.REALS[char]}", f"-DCALLS={cases}", f"-I{build.HERE}",
            f"-I{work}", "-o", str(work / "program"), str(HERE / "other_processor.c"), *map(str, build.SOURCES),
            "-lm", "-pthread",
        ],
        check=True,
    )  # fmt: skip
    subprocess.run([EMULATOR, *(str(work / name) for name in ("program", "calls", "results"))], check=True)
    return (work / "results").read_bytes()


def differences(some: list[Call], found: bytes) -> list[str]:
    complaints, place = [], 0
    arguments = {function.name: function.arguments for function in compiled.FUNCTIONS}
    for call in some:
        around = largest(*(a for v in call.before for a in arrays_of(v))) / 10
        for x, value in zip(arguments[call.function], call.after):
            for here in arrays_of(value):
                there = np.frombuffer(found, here.dtype, here.size, place).reshape(here.shape)
                place += here.nbytes
                if x.kind != "sizes" and not is_close(here, there, TOLERANCE[call.char] * max(largest(here), around)):
                    shapes = [a.shape for v in call.before for a in arrays_of(v)]
                    complaints.append(f"{call.function} {call.char} {shapes}: {x.name} differs\n{here}\n{there}")
    assert place == len(found)
    return complaints


def largest(*arrays: np.ndarray) -> float:
    return max((float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in arrays if a.dtype.kind == "f"), default=0)


def is_close(here: np.ndarray, there: np.ndarray, tolerance: float) -> bool:
    """With NaN and Inf at the same places."""
    if here.dtype.kind != "f":
        return np.array_equal(here, there)
    finite = np.isfinite(here)
    if not np.array_equal(here[~finite], there[~finite], equal_nan=True) or not np.isfinite(there[finite]).all():
        return False
    return bool((np.abs(here[finite] - there[finite]) <= tolerance).all())


def compare(path: Path) -> list[str]:
    """What differs, and what was never called."""
    recorded = [Call(*call) for call in pickle.loads(path.read_bytes())]
    called = {call.function for call in recorded}
    complaints = [f"{f.name} was never called" for f in compiled.FUNCTIONS if f.name not in called]
    for char in "fd":
        some = [call for call in recorded if call.char == char]
        with tempfile.TemporaryDirectory() as work:
            complaints += differences(some, run_there(some, char, Path(work)))
    counts = {name: sum(call.function == name for call in recorded) for name in sorted(called)}
    print("compared:", ", ".join(f"{name} {n} calls" for name, n in counts.items()))
    return complaints


if __name__ == "__main__":
    sys.exit("\n".join(compare(Path(sys.argv[1]))) or 0)
