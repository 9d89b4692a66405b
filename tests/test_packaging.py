"""What is handed out: the source distribution has what its tests need, and the files beside the code agree with it."""

from __future__ import annotations

import configparser
import doctest
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tinydiff
from tinydiff.operators import OPS

ROOT = Path(__file__).parents[1]


def test_the_source_distribution_is_complete(tmp_path: Path, numpy_backend: str) -> None:
    """Made of what git has, by setuptools alone, so that nothing is downloaded."""
    pytest.importorskip("setuptools", minversion="77")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.endswith(".png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    code = "from setuptools import setup; setup()"
    made = subprocess.run([sys.executable, "-c", code, "-q", "sdist"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (file,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        shown = archive.extractfile(next(name for name in archive.getnames() if name.endswith("/PKG-INFO")))
        assert shown is not None
        metadata = email.message_from_string(shown.read().decode())
    hidden = (".ci/", ".git")
    missing = {n for n in listed.stdout.splitlines() if not n.startswith(hidden) and not n.endswith(".png")} - names
    assert not missing
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert isinstance(text, str) and text.strip() == (ROOT / "DESCRIPTION.md").read_text().strip()
    assert not relative_targets(text)


def relative_targets(text: str) -> list[str]:
    """What a package index, which has only the text, could not find: links and pictures without an address."""
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.M)
    found += re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", text)
    return [target for target in found if not re.match(r"(https?:|mailto:|#)", target)]


def test_a_relative_link_would_be_found() -> None:
    text = "[a](docs/a.md) ![b](b.png) <img src='c.png'> [d]\n\n[d]: d.md\n[e](https://e.org) [f](#f)"
    assert sorted(relative_targets(text)) == ["b.png", "c.png", "d.md", "docs/a.md"]
    assert relative_targets((ROOT / "README.md").read_text())  # which is why an index gets another text


def test_the_text_for_an_index_is_true(numpy_backend: str) -> None:
    try:
        failures, examples = doctest.testfile(str(ROOT / "DESCRIPTION.md"), module_relative=False)
    finally:
        OPS.pop("squash", None)  # the op that it defines
    assert examples >= 8 and failures == 0


def test_the_files_beside_the_code_have_its_version_and_licence() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == tinydiff.__version__  # type: ignore[index]
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    metadata = config["metadata"]
    assert metadata["author"] in citation and f"license: {metadata['license']}" in citation
    builds = re.search(r'^requires = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    tests = config["options.extras_require"]["test"].splitlines()
    assert builds and builds[1] in tests  # the first test above needs it
    least = metadata.parser["options"]["python_requires"].removeprefix(">=").strip()
    assert f"Python :: {least}" in metadata["classifiers"] and "Typing :: Typed" in metadata["classifiers"]


def test_contributing_leads_to_an_op_that_passes_its_tests(tmp_path: Path, numpy_backend: str) -> None:
    """Its five steps, on a copy: the two blocks as they stand, and a name in each of the files that it speaks of."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    page = "\n\n".join("\n".join(line[3:] for line in block.rstrip().splitlines()) for block in blocks)
    changes = [
        ("tinydiff/ops/elementwise.py", "\n@op\ndef square(", f"\n{page}\n\n\n@op\ndef square("),
        ("tinydiff/ops/__init__.py", " subtract, tanh,", " subtract, cube, tanh,"),
        ("tinydiff/ops/__init__.py", '"stack",', '"stack", "cube",'),
        ("tinydiff/study/examples.py", "abs copy cos ", "abs copy cos cube "),
        ("tests/op_examples.py", '"negative exp ', '"negative cube exp '),
        ("tests/op_oracles.py", 'ORACLES["copy"]', 'ORACLES["cube"] = lambda x: x**3\nORACLES["copy"]'),
    ]
    for folder in ("tinydiff", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path)
    for name, old, new in changes:
        found = (tmp_path / name).read_text()
        assert found.count(old) == 1, (name, old)
        assert name in text or name.startswith("tinydiff/ops/"), f"CONTRIBUTING.md does not speak of {name}"
        (tmp_path / name).write_text(found.replace(old, new))
    tests = ["tests/test_rules.py", "tests/study/test_explain.py", "-k", "cube"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert ran.returncode == 0, ran.stdout
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) > 20
    calls = (tmp_path / "tinydiff/study/examples.py").read_text()
    assert max(map(len, calls.splitlines())) <= 120  # there is room for another name
