"""`python -m tinydiff doctor` and `check`: what they say, their exit codes, and no traceback for a user's mistake."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinydiff import backend, check_ops, doctor
from tinydiff.__main__ import main
from tinydiff.operators import OPS
from tinydiff.study.examples import CALLS


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TINYDIFF_")}
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "tinydiff", *arguments]
    return subprocess.run(command, env={**env, **environment}, cwd=root, capture_output=True, text=True, timeout=100)


def test_the_doctor_finds_nothing_wrong_here(capsys: Any, monkeypatch: Any, numpy_backend: str) -> None:
    monkeypatch.delenv("TINYDIFF_DATA", raising=False)
    assert main(["doctor", "--seconds", "0.5"]) == 0
    said = capsys.readouterr().out
    for part in (
        "Python: 3.",
        "numpy: ",
        "tinydiff: ",
        "backend: numpy",
        "GFLOP/s",
        "MNIST: ",
        "steps of a small U-Net",
    ):
        assert part in said
    assert "\x1b" not in said and "WRONG" not in said
    count = said.count("to do: ")
    also = f", with {count} suggestion{'s' * (count > 1)}" if count else ""
    assert said.endswith(f"\nall is well{also}\n")


def flags_of_the_processor() -> list[str]:
    """Of an x86 with Linux; else none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith("flags")), [])


@pytest.mark.skipif("avx2" not in flags_of_the_processor(), reason="for an x86 with AVX2, on Linux")
def test_the_doctor_knows_a_processor_that_openblas_does_not(numpy_backend: str) -> None:
    """OpenBLAS is told that this is an older one."""
    said = run("doctor", "--seconds", "0.1", OPENBLAS_CORETYPE="Haswell").stdout
    ((state, text),) = re.findall("(.*)  BLAS: (.*)\n", said)
    if "not the OpenBLAS" in text:
        assert state.strip() == "note"
    elif "avx512vl" in flags_of_the_processor():
        assert state.strip() == "note" and "for a Haswell" in text and "OPENBLAS_CORETYPE=SkylakeX" in said
    else:
        assert state.strip() == "ok" and text == "OpenBLAS for Haswell"


def test_the_doctor_says_what_to_do_and_goes_on(tmp_path: Path, monkeypatch: Any, numpy_backend: str) -> None:
    monkeypatch.setenv("TINYDIFF_DATA", str(tmp_path))

    def broken() -> Any:
        raise OSError("no driver")
        yield

    monkeypatch.setattr(doctor, "the_backend", broken)
    out = io.StringIO()
    assert doctor.examine(out, seconds=0.1) == 1
    said = out.getvalue()
    assert "WRONG  broken: OSError: no driver" in said
    assert "WRONG  MNIST: " in said and "to do: mend what TINYDIFF_DATA names" in said
    assert "steps of a small U-Net" in said and said.endswith("2 problems\n")


@pytest.mark.parametrize("name, says", [("jax", "unknown backend 'jax'"), ("cupy", "pip install 'cupy-cuda13x[ctk]'")])
def test_the_doctor_of_a_backend_that_is_not_there(name: str, says: str, tmp_path: Path, numpy_backend: str) -> None:
    (tmp_path / "cupy.py").write_text("raise ModuleNotFoundError('as if it were not installed', name='cupy')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = run("doctor", "--seconds", "0.1", TINYDIFF_BACKEND=name, PYTHONPATH=path)
    (wrong,) = [line for line in done.stdout.splitlines() if line.startswith("WRONG  backend: ")]
    assert done.returncode == 1 and says in wrong and done.stdout.endswith("\n1 problem\n")
    assert "\nnote   backend: numpy, in its place, for everything that follows\n" in done.stdout
    assert "steps of a small U-Net" in done.stdout and "Traceback" not in done.stderr


def test_a_gradient_that_is_wrong_does_not_train(monkeypatch: Any, numpy_backend: str) -> None:
    linear: Any = OPS["linear"]
    monkeypatch.setattr(linear, "fast_rules", {})
    monkeypatch.setattr(linear, "rule", lambda g, y, x, w, b: (g @ w.T * np.nan, None, None))
    ((_, state, text, remedy),) = doctor.training(1.0)
    assert state == "WRONG" and "tinydiff check" in remedy


def test_a_product_has_a_rate(each_backend: str) -> None:
    rate, busy = doctor.gemm(64, 0.01)
    assert rate > 0 and busy >= 0


def test_every_op_is_right_on_this_backend(each_backend: str) -> None:
    """Those that the tests themselves register have no example."""
    out = io.StringIO()
    names = [name for name in CALLS if name in OPS] if each_backend == "numpy" else ["matmul", "conv2d", "dropout"]
    assert check_ops.check_ops(names, out) == 0
    assert out.getvalue().endswith(f"{len(names)} of {len(names)} ops are right on {backend.name}\n")


def test_a_wrong_rule_is_named(monkeypatch: Any, capsys: Any, numpy_backend: str) -> None:
    monkeypatch.setattr(OPS["tanh"], "rule", lambda g, z, _x: 2 * g * (1 - z * z))
    assert main(["check", "tanh", "sin", "--order", "2"]) == 1
    said = capsys.readouterr().out
    assert "constant factor 2" in said and said.endswith("1 of 2 ops are right on numpy\nWRONG: tanh\n")


def test_an_op_that_is_not_there(capsys: Any, numpy_backend: str) -> None:
    assert main(["check", "sofmax"]) == 2
    assert "did you mean softmax" in capsys.readouterr().err


def test_a_word_that_is_none_is_answered_with_the_nearest(capsys: Any, numpy_backend: str) -> None:
    for words, says in (
        (["trian"], "invalid choice: 'trian'"),
        (["exercise", "softmx"], "there is no exercise 'softmx': did you mean softmax"),
    ):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr().err
        assert code == 2 and says in said and "did you mean" in said
    assert "did you mean train?" in run("trian").stderr


def test_a_pipe_that_closes_and_a_full_device_are_no_tracebacks() -> None:
    for words in (["check", "softmax", "matmul"], ["exercise"], ["explain", "softmax"]):
        program = [sys.executable, "-m", "tinydiff", *words]
        root = str(Path(__file__).parents[1])
        closed, end = os.pipe()
        os.close(closed)
        done = subprocess.run(program, cwd=root, stdout=end, stderr=subprocess.PIPE, text=True, timeout=100)
        os.close(end)
        assert done.returncode == 141 and done.stderr == "", done.stderr
        if os.path.exists("/dev/full"):
            with open("/dev/full", "w") as full:
                done = subprocess.run(program, cwd=root, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
            assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_the_page_of_view_may_go_to_a_new_directory(tmp_path: Path, capsys: Any, numpy_backend: str) -> None:
    script = tmp_path / "script.py"
    script.write_text("import tinydiff\nx = tinydiff.tensor([1.0], requires_grad=True)\n(x * x).backward()\n")
    out = tmp_path / "new" / "page.html"
    assert main(["view", "--out", str(out), str(script)]) == 0 and out.exists()
    with pytest.raises(SystemExit) as end:  # before the script runs
        main(["view", "--out", str(script / "page.html"), str(tmp_path / "script.py")])
    assert end.value.code == 2 and "--out: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"TINYDIFF_FAST": "2"}, "tinydiff: TINYDIFF_FAST must be 0 or 1, not '2'"),
        ({"TINYDIFF_BACKEND": "jax"}, "unknown backend 'jax': choose one of numpy, cupy"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line(environment: Any, says: str, numpy_backend: str) -> None:
    done = run("check", "sin", **environment)
    assert done.returncode == 2 and done.stderr.startswith(says) and done.stderr.count("\n") == 1


def test_ctrl_c_while_importing_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    for how, code, said in ((["-m", "tinydiff"], 130, ""), (["-c", "import tinydiff"], None, "KeyboardInterrupt")):
        done = subprocess.run([sys.executable, *how], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert (
            code in (None, done.returncode) and done.stderr.strip().endswith(said) and bool(said) == bool(done.stderr)
        )


def test_a_program_that_imports_tinydiff_keeps_its_own_errors(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import tinydiff\n")
    (tmp_path / "other" / "__main__.py").write_text("raise KeyboardInterrupt")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TINYDIFF_BACKEND": "numpy"}
    for more, says in (({}, "KeyboardInterrupt"), ({"TINYDIFF_FAST": "2"}, "ValueError: TINYDIFF_FAST must be 0 or 1")):
        command = [sys.executable, "-m", "other", "tinydiff"]
        done = subprocess.run(command, cwd=tmp_path, env={**env, **more}, capture_output=True, text=True)
        assert done.returncode and "Traceback" in done.stderr and says in done.stderr.splitlines()[-1], done.stderr


def test_a_variable_that_nothing_reads_is_warned_of(monkeypatch: Any, numpy_backend: str) -> None:
    done = run("check", "sin", TINYDIFF_BACKNED="cupy")
    assert done.returncode == 0
    assert "UserWarning: tinydiff reads no variable TINYDIFF_BACKNED: did you mean TINYDIFF_BACKEND?" in done.stderr


def test_every_variable_that_is_read_is_known() -> None:
    import re

    root = Path(backend.__file__).parent
    read = {name for path in root.rglob("*.py") for name in re.findall(r'"TINYDIFF_([A-Z_]+)"', path.read_text())}
    assert read == set(backend.VARIABLES)
