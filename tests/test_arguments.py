"""Numbers that are given as arguments."""

from typing import Any

import numpy as np
import pytest

from tinydiff.arguments import integer, number


@pytest.mark.parametrize("x", [0.5, 0, np.float64(0.25), np.float32(0.5), np.int64(0), np.array(0.5)])
def test_a_number_in_its_interval_becomes_a_float(x: Any) -> None:
    found = number("p", x, "[0, 1)")
    assert type(found) is float and found == x


@pytest.mark.parametrize(
    "x, interval",
    [(1, "[0, 1)"), (0, "(0, 1)"), (-1e-9, "[0, 1)"), (float("nan"), "(-inf, inf)"), (float("inf"), "[0, inf)"),
     ("1", "[0, 2]"), (None, "[0, 2]"), ([1], "[0, 2]"), (1j, "[0, 2]"), (True, "[0, 2]"), (np.zeros(1), "[0, 2]"),
     (10**400, "[0, inf]")],
)  # fmt: skip
def test_other_numbers_are_refused_and_quoted(x: Any, interval: str) -> None:
    with pytest.raises(ValueError) as error:
        number("layer: p", x, interval)
    assert str(error.value) == f"layer: p must be a number in {interval}, not {x!r}"


def test_the_ends_of_an_interval() -> None:
    assert number("x", 1, "[0, 1]") == 1 and number("x", float("inf"), "[0, inf]") == float("inf")


@pytest.mark.parametrize("n", [np.int32(3), 3, np.array(3)])
def test_an_integer_becomes_an_int(n: Any) -> None:
    assert type(integer("n", n)) is int


def test_an_integer_has_a_largest_value() -> None:
    assert integer("seed", 7, 0, 7) == 7
    with pytest.raises(ValueError, match="seed must be an integer from 0 to 7, not 8"):
        integer("seed", 8, 0, 7)


@pytest.mark.parametrize("n", [0, -1, 2.0, 2.5, "2", None, True, float("nan")])
def test_other_integers_are_refused_and_quoted(n: Any) -> None:
    with pytest.raises(ValueError) as error:
        integer("steps", n)
    assert str(error.value) == f"steps must be an integer of 1 or more, not {n!r}"
