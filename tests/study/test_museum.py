"""The code in docs/museum.md runs, with the output that it shows."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from tinydiff.operators import OPS

PAGE = Path(__file__).parents[2] / "docs" / "museum.md"


@pytest.mark.usefixtures("numpy_backend")
def test_the_outputs_are_real() -> None:
    before = dict(OPS)
    failures, examples = doctest.testfile(str(PAGE), module_relative=False)
    assert examples >= 40 and failures == 0
    assert before == OPS


def test_there_are_ten_each_with_what_finds_it() -> None:
    rooms = PAGE.read_text().split("\n## ")[1:]
    assert [room.split(".")[0] for room in rooms] == [str(n) for n in range(1, 11)]
    for room in rooms:
        assert "```python\n>>> " in room and "**Found by**" in room.replace("\n", " "), room
