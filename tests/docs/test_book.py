"""The book's machinery: what is false on a page stops the build, and so does an op without a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import book
import derivations
import numpy as np
import op_pages
import pytest
from algebra import NotAFormula, read, value
from claims import FalseClaim, clauses

from tinydiff import backend
from tinydiff.engine import Op
from tinydiff.operators import OPS

pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(backend.name == "cupy", reason="the book is built with NumPy"),
]

DOCS = Path(__file__).parents[2] / "docs"

# ---------------------------------------------------------------- the notation

LETTERS = {"x": np.array([[1.0, 2.0], [3.0, 4.0]]), "y": np.array([[5.0, 6.0], [7.0, 8.0]]), "n": 2.0}
FUNCTIONS = {"log": np.log, "sum": np.sum, "cube": lambda x: x**3, "max": np.maximum, "abs": np.abs, "exp": np.exp}
X, Y = LETTERS["x"], LETTERS["y"]


def worth(text: str) -> Any:
    (tree,) = read(text, FUNCTIONS, LETTERS)

    def letter(name: str) -> Any:
        return LETTERS[name.lower()] if name.lower() in LETTERS else {"e": np.e}[name]

    return value(tree, letter, FUNCTIONS.__getitem__)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("x y", X * Y),
        ("2 x / y x", 2 * X / Y * X),
        ("x - y - x", -Y),
        ("-x^2", -(X**2)),
        ("x^-1", 1 / X),
        ("x^(n - 1)", X),
        ("x²", X * X),
        ("X Y", X @ Y),
        ("x @ y^T", X @ Y.T),
        ("XᵀY", X.T @ Y),
        ("2 X Y - X", 2 * X @ Y - X),
        ("x · y - x · x", np.sum(X * Y) - np.sum(X * X)),
        ("log x y", np.log(X) * Y),
        ("log sum x", np.log(np.sum(X))),
        ("sum x y", np.sum(X * Y)),
        ("e^-|x - 2|", np.exp(-np.abs(X - 2))),
        ("|x| y", X * Y),
        ("max(x, 2.5)", np.maximum(X, 2.5)),
        ("cube'(x)", 3 * X**2),
        ("x where x > 2, else -y", np.where(X > 2, X, -Y)),
        ("x where 1 < x <= 3", np.where((X > 1) & (X <= 3), X, 0)),
    ],
)
def test_a_formula_is_read_as_a_reader_reads_it(text: str, wanted: Any) -> None:
    assert np.allclose(worth(text), wanted)


@pytest.mark.parametrize("text", ["x +", "(x", "x) y", "|x", "x where", "x ? y", "sum", "x, y"])
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises((NotAFormula, KeyError)):
        worth(text)


def test_formulas_are_found_in_lines() -> None:
    text = "dz = y dx   as it was\nx̄ = z̄ y,   ȳ = z̄ x\na = b   because b = c\n  = c"
    bar = "\u0304"
    wanted = ["dz = y dx", f"x{bar} = z{bar} y", f"y{bar} = z{bar} x", "a = b", "because b = c", "a = c"]
    assert clauses(text) == wanted


# ---------------------------------------------------------------- what is false


def test_every_formula_of_every_op_is_true() -> None:
    """This is what the build does; and every op that has a rule has a formula for each adjoint, evaluated."""
    for name in OPS:
        made = derivations.derive(name)
        assert made.checked or not isinstance(OPS[name], Op), name


PLANTED = [
    ("multiply", "ȳ = z̄ x", "ȳ = z̄ y"),
    ("divide", "x dy / y^2", "x dy / y"),
    ("abs", "x̄ = z̄ sign x", "x̄ = z̄"),
    ("tanh", "z̄ (1 - z^2)", "z̄ (1 + z^2)"),
    ("softmax", "sum(z z̄)", "sum(z̄)"),
    ("matmul", "X̄ = Z̄ Y^T", "X̄ = Y^T Z̄"),
    ("power", "z̄ z log x", "z̄ log x"),
    ("clip", "x̄ = z̄ where low <= x <= high", "x̄ = z̄ where low <= x"),
    ("exact_gelu", "f = e^(-x^2 / 2)", "f = e^(-x^2)"),
    ("conv2d_weight_grad", "ȳ = conv2d(x, w̄)", "ȳ = conv2d(x, w)"),
    ("scaled_dot_product_attention", "q̄ = scale s̄ @ k", "q̄ = s̄ @ k"),
    ("normalize", "xhat mean(xhat h)", "mean(xhat h)"),
]


@pytest.mark.parametrize("name, right, wrong", PLANTED)
def test_a_false_formula_in_a_docstring_stops_the_build(name: str, right: str, wrong: str) -> None:
    text = "\n\n".join(derivations.doc(name))
    derivations.derive(name, text=text)
    assert right in text
    with pytest.raises((FalseClaim, ValueError)):
        derivations.derive(name, text=text.replace(right, wrong))


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("softmax", "= (z sum(z̄ z)) · dx", "= (sum(z̄ z)) · dx"),
        ("var", "x̄ = 2 z̄ c / n", "x̄ = z̄ c / n"),
        ("cross_entropy", "logits̄ = z̄ (p - Y) / n", "logits̄ = z̄ (Y - p) / n"),
        ("getitem", "E = np.eye(3)[[2, 0, 2]]", "E = np.eye(3)[[2, 0, 1]]"),
        ("shift_normalize_silu", "h = ū w", "h = ȳ w"),
    ],
)
def test_a_false_line_with_a_pencil_stops_the_build(name: str, right: str, wrong: str) -> None:
    text = derivations.pencil()[name]
    assert right in text
    with pytest.raises(FalseClaim, match="false"):
        derivations.derive(name, by_hand=text.replace(right, wrong))


def test_what_looks_like_a_formula_and_is_none_stops_the_build() -> None:
    with pytest.raises(FalseClaim, match="looks like a formula"):
        derivations.derive("multiply", text="z = x y\n\nx̄ = z̄ y,   ȳ = z̄ x,   dz = y dx + x of dy")


@pytest.mark.parametrize("line", ["dq = 2 dx", "q̄ = z̄ y"])
def test_an_adjoint_or_a_differential_of_nothing_stops_the_build(line: str) -> None:
    with pytest.raises(FalseClaim, match="belongs to 'q', which has no meaning"):
        derivations.derive("multiply", by_hand=f"```claims\n{line}\n```")


def test_python_cannot_change_what_is_true() -> None:
    page = "```python\nx = x + 1\n```\n\n```claims\nz = x y\n```"
    with pytest.raises(FalseClaim, match="'x' has a meaning already"):
        derivations.derive("multiply", by_hand=page)


def test_an_adjoint_without_a_formula_stops_the_build() -> None:
    with pytest.raises(FalseClaim, match="no formula that can be evaluated gives the adjoint of y"):
        derivations.derive("multiply", text="z = x y\n\nx̄ = z̄ y")


def test_an_op_without_a_page_stops_the_build(op: Any, tmp_path: Path) -> None:
    def halve(x: Any) -> Any:
        """z = x / 2

        dz = dx / 2          x̄ = z̄ / 2
        """
        return x / 2

    op(halve, lambda g, _z, _x: g / 2)
    with pytest.raises(FalseClaim, match="no example by hand .* for halve"):
        op_pages.write_all(tmp_path)


def test_a_wrong_rule_stops_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(OPS["sin"], "rule", lambda g, _z, x: g * OPS["cos"](x) * 1.001)
    with pytest.raises(FalseClaim, match="the rule gives"):
        op_pages.page("sin", tmp_path)


# ---------------------------------------------------------------- pages


def test_the_page_of_an_op_has_all_its_parts(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("relu", "cross_entropy"):
        page = op_pages.page(name, tmp_path)
        parts = ["Formula", "The code", "By hand", "Analytic against numeric", "The Jacobian", "The second derivative"]
        for part in [*parts, "What it costs", "What ran", *(["At kinks"] if name == "relu" else [])]:
            assert f"\n## {part}\n" in page, (name, part)
        assert (tmp_path / "images" / f"{name}.svg").read_text().count("<rect") > 3
    assert "| x[0] = 0 | 0 | 1 | 0 |" in op_pages.page("relu", tmp_path)


PAGE = """
```python
>>> import numpy as np
>>> x, g = np.array([1.0, 2.0]), np.array([3.0, 5.0])
>>> x_bar = 2 * g
>>> (x + 1).tolist()
[2.0, 3.0]
```

```claims
x̄ = g + g
x · x = 5
```
"""


def test_a_page_runs() -> None:
    book.run(PAGE, "page.md")


@pytest.mark.parametrize(
    "right, wrong, words",
    [
        ("[2.0, 3.0]", "[2.0, 4.0]", "what a Python session shows"),
        ("x̄ = g + g", "x̄ = g", "page.md, line 11: 'x̄ = g' is false"),
        ("x · x = 5", "x · x = 4", "is false"),
        ("x · x = 5", "y · x = 5", "'y' has no meaning here"),
    ],
)
def test_a_page_that_is_false_stops_the_build(right: str, wrong: str, words: str) -> None:
    with pytest.raises((FalseClaim, NotAFormula)) as found:
        book.run(PAGE.replace(right, wrong), "page.md")
    assert words in str(found.value).replace("x\u0304", "x̄")


def test_what_is_evaluated_is_marked() -> None:
    text = book.marked("```claims\nx = x\n```\n\n```text\nclaims\n```\n")
    assert text == "```{code-block} text\n:class: claims\n\nx = x\n```\n\n```text\nclaims\n```\n"


def test_links_to_the_source_lead_into_the_book() -> None:
    page = DOCS / "derivations" / "softmax.md"
    text = "[a](../../tinydiff/engine.py) [b](../../tinydiff/ops/softmax.py#softmax) [c](../notation.md) [d](other.md)"
    wanted = "[a](../source/tinydiff/engine.py.md) [b](../ops/softmax.md) [c](../notation.md) [d](other.md)"
    assert book.rewritten(text, page) == wanted
    assert book.targets(text, page) == {"tinydiff/engine.py", "tinydiff/ops/softmax.py"}


@pytest.mark.parametrize("link", ["softmax.py#sofmtax", "softmax.py#conv2d"])
def test_a_link_to_an_op_that_is_not_in_that_file_stops_the_build(link: str) -> None:
    with pytest.raises(FalseClaim, match="has no op"):
        book.rewritten(f"[a](../../tinydiff/ops/{link})", DOCS / "derivations" / "softmax.md")


def test_the_page_of_a_file_that_is_gone_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "DOCS", tmp_path / "docs")
    pages = tmp_path / "docs" / "source" / "tinydiff"
    pages.mkdir(parents=True)
    (pages / "gone.py.md").write_text("# tinydiff/gone.py")
    (tmp_path / "tinydiff").mkdir()
    (tmp_path / "tinydiff" / "here.py").write_text("")
    page = tmp_path / "docs" / "page.md"
    page.write_text("[here](../tinydiff/here.py)")
    book.write_source_pages([page])
    assert [p.name for p in pages.iterdir()] == ["here.py.md"]


def test_a_quote_must_stand_in_a_linked_file() -> None:
    page = DOCS / "engine.md"
    text = page.read_text()
    assert text.count("```py\n") == 4
    book.check_quotes(text, page)
    with pytest.raises(FalseClaim, match="engine.md quotes what does not stand"):
        book.check_quotes(text.replace("adjoints[parent] + adjoint", "adjoint"), page)


def test_a_page_that_the_index_forgets_is_in_the_contents_all_the_same() -> None:
    index = (DOCS / "index.md").read_text()
    assert "\nunet\n" in book.more(index.replace("\nunet\n", "\n"))
    assert "\nunet\n" not in book.more(index)
