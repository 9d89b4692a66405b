"""The viewer's page in a real browser, headless Chromium, from disk and without a network: every key, every click."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import Rng, Tensor, nn, ops
from tinydiff.engine import Op
from tinydiff.study.viewer import save

pytestmark = pytest.mark.skipif(
    os.environ.get("TINYDIFF_BACKEND") == "cupy", reason="a page is a page: it is tried on NumPy"
)
SWITCHES = ["no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update",
            "disable-sync", "disable-dev-shm-usage"]  # fmt: skip
SIZES = {"wide": (1280, 720), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, headless=True, args=[f"--{switch}" for switch in SWITCHES])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """visit(path, fragment, size): the page, opened. Messages in its console, and requests for anything but the file,
    fail the test at its end."""
    faults: list[str] = []
    contexts = []

    def hear(message: Any) -> None:
        if "willReadFrequently" not in message.text:  # which is advice to a test that reads pixels
            faults.append(f"{message.type}: {message.text}")

    def visit(path: Path, fragment: str = "", size: tuple[int, int] = SIZES["wide"], **options: Any) -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", hear)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(path.as_uri()) or faults.append(request.url))
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("#rows .here")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert faults == []


class Net(nn.Module):
    """Two layers, of which the second is used twice."""

    def __init__(self) -> None:
        self.first = nn.Linear(3, 4, rng=Rng(0))
        self.body = nn.Sequential(nn.Linear(4, 5, rng=Rng(1)), nn.SiLU(), nn.Linear(5, 4, rng=Rng(2)))

    def forward(self, x: Any) -> Any:
        h = self.first(x)  # (N, 3) -> (N, 4)
        return self.body(h) + self.body(ops.tanh(h))


class Case:
    """A page, and what the engine says of the same graph."""

    def __init__(self, folder: Path) -> None:
        self.net = Net()
        x = Rng(3).normal((2, 3), "float32")
        self.h = self.net.first(x)
        self.z = self.net.body(self.h) + self.net.body(ops.tanh(self.h))
        loss = ops.sum(ops.square(self.z))
        self.path = save(loss, folder / "net.html", self.net, names={"h": self.h, "z": self.z})
        (self.h_bar,) = td.grad(loss, self.h)
        loss.backward()


@pytest.fixture(scope="module")
def case(tmp_path_factory: Any) -> Case:
    return Case(tmp_path_factory.mktemp("pages"))


def text(page: Any, selector: str) -> str:
    return page.locator(selector).first.inner_text()


def until(page: Any, condition: str, argument: Any = None) -> None:
    """Wait until an expression is true. (Playwright's own way needs eval, which the page forbids.)"""
    for _ in range(250):
        if page.evaluate(condition, argument):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {condition}")


def click_element(page: Any, key: str, column: float, row: float) -> None:
    """Click the picture of that key at a place given in cells of 48 or 12 pixels."""
    canvas = page.locator(f"[data-key={key}] canvas")
    side = canvas.evaluate("c => c.clientHeight / c.dataset.rows")
    canvas.click(position={"x": (column + 0.5) * side, "y": (row + 0.5) * side})


def shortest(x: Any) -> float:
    """A float32 as the page writes it, read again."""
    return float(np.float32(x))


# ---------------------------------------------------------------- keys


def test_the_arrows_go_through_all_steps_and_end_where_they_should(visit: Any, case: Case) -> None:
    page = visit(case.path)
    assert text(page, "#where").startswith("backward, step 1 of ")
    steps = int(text(page, "#where").split()[-1])
    headings, said = [], []
    for _ in range(steps + 2):  # two more than there are
        heading, bold = page.evaluate("['h2', 'b'].map(e => document.querySelector('#node ' + e)?.textContent)")
        headings.append(heading)
        said.append(bold and bold.strip())
        page.keyboard.press("ArrowRight")
    assert text(page, "#where") == f"backward, step {steps} of {steps}"
    assert headings[0].startswith("L = sum(") and "first.weight" in headings[-1]
    for name in ("body.0.weight", "h"):  # accumulation is a step of its own
        assert said.count(f"{name} receives 1 of 2.") == said.count(f"{name} receives 2 of 2.") == 1
    assert said.index("h receives 1 of 2.") < said.index("h receives 2 of 2.")
    page.keyboard.press("ArrowLeft")
    assert text(page, "#where") == f"backward, step {steps - 1} of {steps}"
    page.click("#next")
    page.click("#back")
    assert text(page, "#where") == f"backward, step {steps - 1} of {steps}"


def test_space_plays_and_stops(visit: Any, case: Case) -> None:
    page = visit(case.path)
    page.keyboard.press(" ")
    assert page.get_attribute("#play", "aria-pressed") == "true"
    until(page, "state.step >= 2")
    page.keyboard.press(" ")
    assert page.get_attribute("#play", "aria-pressed") == "false"
    page.focus("#play")
    page.keyboard.press(" ")  # on the button it presses the button, once
    assert page.get_attribute("#play", "aria-pressed") == "true"


def test_f_goes_forward_and_back_at_the_same_node(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h")
    page.keyboard.press("f")
    assert text(page, "#where").startswith("forward, ") and text(page, "#node h2").startswith("h = ")
    page.keyboard.press("ArrowRight")
    assert text(page, "#node h2").split(" = ")[0] != "h" and page.locator("[data-key=g]").count() == 0
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("f")
    assert text(page, "#where").startswith("backward, ") and text(page, "#node h2").startswith("h = ")


def test_slash_finds_a_module_an_op_or_a_name(visit: Any, case: Case) -> None:
    page = visit(case.path)
    for wanted, found in (("tanh", "tanh("), ("first.weight", ", first.weight, "), ("silu", "silu(")):
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "find"
        page.fill("#find", wanted)
        page.keyboard.press("Enter")
        assert found in text(page, "#node h2")
        assert page.locator("details.row:visible").count() < page.locator("details.row").count()
        page.focus("#find")
        page.keyboard.press("Escape")
        assert page.locator("details.row[hidden]").count() == 0
        assert page.evaluate("document.activeElement.id") != "find"


def test_question_mark_shows_the_keys(visit: Any, case: Case) -> None:
    page = visit(case.path)
    assert not page.is_visible("#keys")
    page.keyboard.press("?")
    assert page.is_visible("#keys") and page.get_attribute("#help", "aria-expanded") == "true"
    page.keyboard.press("?")
    assert not page.is_visible("#keys")


# ---------------------------------------------------------------- numbers


def test_every_element_that_is_clicked_is_the_engines_own(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h")
    for row, column in np.ndindex(2, 4):
        for key, array in (("y", case.h.data), ("g", case.h_bar.data)):
            click_element(page, key, column, row)
            assert text(page, "#element h2").endswith(f"[{row}, {column}]")
            assert shortest(text(page, "#value")) == shortest(array[row, column])
    page.click("#rows summary:has-text('first')")  # closes it
    assert not page.is_visible("#rows button.leaf:has-text('first.bias')")
    page.click("#rows summary:has-text('first')")
    page.click("#rows button.leaf:has-text('first.weight')")  # a leaf leads to its gradient
    assert shortest(text(page, "#value")) == shortest(case.net.first.weight.grad.data[0, 0])


def test_the_chain_rule_of_an_element(visit: Any, case: Case) -> None:
    """By hand: of h = x W + b, b̄_k = sum_n h̄_nk. The sum, its terms, the rule's value, and the verdict."""
    page = visit(case.path, "#node=h&at=a2,2")
    rule, numeric = float(text(page, "#rule")), float(text(page, "#numeric"))
    assert shortest(rule) == shortest(case.net.first.bias.grad.data[2])
    assert numeric == pytest.approx(case.h_bar.data[:, 2].astype(float).sum(), rel=1e-12)
    assert float(text(page, "#difference")) == pytest.approx(shortest(rule) - numeric, rel=1e-3, abs=1e-15)
    assert text(page, "#verdict") == "✓ equal but for rounding"
    terms = page.locator("#sum tr:has(button)").all_inner_texts()
    assert sorted(t.split()[:2] for t in terms) == [["[0,", "2]"], ["[1,", "2]"]]
    page.click("#sum button")  # a term leads to the element of the adjoint that it came from
    assert text(page, "#element h2").startswith("h̄[")
    assert page.locator("#element table").count() == 1  # which is the sum of its own parts
    values = [float(t.split()[-1]) for t in page.locator("#element table tr").all_inner_texts()]
    assert sum(values) == pytest.approx(float(text(page, "#value")), rel=1e-6)


def test_a_small_op_shows_its_jacobian(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h&at=a2,2")
    assert "column 2" in page.get_attribute("#jacobian canvas", "aria-label")
    box = page.locator("#jacobian canvas").evaluate("c => [c.clientWidth, c.clientHeight]")
    assert box[0] > 0 and box[1] > 0
    side = box[0] / 6  # the adjoint, a gap, and a column for each of 4 elements
    page.locator("#jacobian canvas").click(position={"x": 5.5 * side, "y": 1.5 * side})
    assert text(page, "#element h2").endswith("[3]")


def test_the_elements_that_the_verdict_speaks_of_are_listed(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h")
    verdict = text(page, "#node .verdict")
    assert verdict.startswith("✓") and verdict.endswith("at each element listed under “Checked”")
    listed = page.locator("#element section:has(h3:has-text('Checked: first.b̄ias')) button")
    assert listed.all_inner_texts() == [f"✓ [{k}]" for k in range(4)]


def test_summing_to_the_shape_is_a_step_of_its_own(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h&step=1")
    assert "broadcast first.bias (4,) to (2, 4)" in text(page, "#node")
    assert page.locator("#steps button").all_inner_texts() == ["the rule", "sum first.b̄ias to its shape"]
    page.click("#steps button")
    assert page.url.endswith("#node=h")


def test_the_rule_stands_there_with_its_source(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h")
    assert "first.b̄ias = sum(h̄, axis=0)" in text(page, "#node pre")
    page.click("#node summary")
    assert "def linear_vjp" in text(page, "#node details")


# ---------------------------------------------------------------- the address


@pytest.mark.parametrize("fragment", ["#node=h&at=g,1,3", "#node=h&step=1&at=r2,0,2", "#mode=forward&node=h&at=y,0,0",
                                      "#mode=recursion&node=h&at=g,0,1"])  # fmt: skip
def test_the_address_holds_the_moment(visit: Any, case: Case, fragment: str) -> None:
    page = visit(case.path, fragment)
    assert page.url.endswith(fragment)
    here = text(page, "#node"), text(page, "#element")
    page.keyboard.press("ArrowLeft" if "step" in fragment else "ArrowRight")  # the last step has none on its right
    assert not page.url.endswith(fragment)
    page.evaluate("hash => { location.hash = hash; }", fragment)  # as a link in a page of lessons does
    until(page, "hash => '#' + fragment() === hash", fragment)
    assert (text(page, "#node"), text(page, "#element")) == here


def test_an_address_that_means_nothing_does_no_harm(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=nothing")
    for fragment in ("#step=99", "#node=h&at=zz,1", "#node=h&at=g,99,99", "#mode=x", "#at=g,a,", "#%E0"):
        page.evaluate("hash => { location.hash = hash; }", fragment)
        page.keyboard.press("ArrowRight")
        assert text(page, "#where").startswith("backward, step ")


# ---------------------------------------------------------------- what is wrong


def test_recursion_shows_where_the_numbers_go_wrong(visit: Any, case: Case) -> None:
    page = visit(case.path)
    page.keyboard.press("r")
    assert page.get_attribute("#recursion", "aria-pressed") == "true"
    page.keyboard.press("/")
    page.fill("#find", "h linear")
    page.keyboard.press("Enter")
    assert "Too early: h is visited on the first of 2 arrivals" in text(page, "#node .late")
    click_element(page, "g", 1, 0)
    found, should = float(text(page, "#value")), float(text(page, "#should"))
    assert shortest(should) == shortest(case.h_bar.data[0, 1]) and found != should
    late = page.locator("#rows .is-late").all_inner_texts()
    assert any("first.weight" in t for t in late) and not any("body" in t for t in late)
    assert "first.weight" in text(page, "#node table")
    page.click("#recursion")
    assert page.locator("#rows .is-late").count() == 0


def test_a_wrong_rule_is_red(visit: Any, tmp_path: Path) -> None:
    twice = Op(lambda x: x * x)  # not in the registry
    twice.name = "squared"
    twice.vjp(lambda g, _z, x: g * x)
    x = Tensor(np.array([1.0, 2.0, 3.0]), True)
    path = save(ops.sum(ops.exp(twice(x))), tmp_path / "wrong.html", names={"x": x})
    page = visit(path, "#node=y1&at=a0,1")
    red = "rgb(192, 0, 32)"
    assert text(page, "#verdict") == "✗ the rule is wrong here"
    assert page.locator("#verdict").evaluate("e => getComputedStyle(e).color") == red
    assert "disagrees" in text(page, "#node .wrong")
    assert float(text(page, "#rule")) == pytest.approx(float(text(page, "#numeric")) / 2, rel=1e-12)
    marked = page.locator("#rows button.is-wrong").all_inner_texts()
    assert len(marked) == 1 and "squared" in marked[0]
    assert page.locator("#rows button.is-wrong").evaluate("e => getComputedStyle(e).boxShadow").startswith(red)


def test_nan_and_inf_are_magenta_and_zero_is_white(visit: Any, tmp_path: Path) -> None:
    x = Tensor(np.array([0.0, -1.0, np.nan, np.inf]), True)
    page = visit(save(ops.sum(x * 1.0), tmp_path / "nan.html", names={"x": x}), "#node=y1")
    colours = page.locator("[data-key=x0] canvas").evaluate(
        """c => [0, 1, 2, 3].map(k =>
        [...c.getContext('2d').getImageData((k + .5) * c.width / 4, 6, 1, 1).data].slice(0, 3))"""
    )
    assert colours == [[255, 255, 255], [8, 81, 156], [214, 0, 214], [214, 0, 214]]
    click_element(page, "x0", 3, 0)
    assert text(page, "#value") == "Inf"


# ---------------------------------------------------------------- for everybody


def test_it_works_without_a_mouse(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h")
    for _ in range(200):  # to the first picture
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "CANVAS":
            break
    key = page.evaluate("document.activeElement.parentElement.dataset.key")
    assert key == "x0"
    page.keyboard.press("Shift+ArrowRight")  # the first element
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    assert "[1, 1]" in text(page, "#element h2")
    assert page.evaluate("document.activeElement.parentElement.dataset.key") == key  # the focus stays
    page.keyboard.press("Escape")
    assert "No element chosen" in text(page, "#element")


def test_everything_that_can_be_reached_has_a_name(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h&at=a2,2")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, canvas, input, summary, [tabindex="0"]')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent || (e.labels || []).length))
        .map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("size", SIZES)
def test_nothing_sticks_out_sideways(visit: Any, case: Case, size: str) -> None:
    page = visit(case.path, "", SIZES[size])
    for fragment in ("#node=L", "#node=h&at=a2,2", "#node=h&step=1", "#mode=recursion&node=h", "#mode=forward&node=h"):
        page.evaluate("hash => { location.hash = hash; }", fragment)
        until(page, "hash => '#' + fragment() === hash", fragment)
        wide = page.evaluate(
            """[document.documentElement, ...document.querySelectorAll('nav, main, aside')]
            .map(e => e.scrollWidth - e.clientWidth)"""
        )
        assert max(wide) <= 0
        if size == "wide":
            assert page.evaluate("document.documentElement.scrollHeight") <= SIZES["wide"][1]  # only its columns scroll


def test_on_a_phone_the_buttons_stay_in_reach(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h", SIZES["phone"], has_touch=True)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.tap("#next")
    assert "step" in page.url
    page.tap("#back")
    page.evaluate("scrollTo(0, 0)")
    page.locator("[data-key=g] canvas").tap(position={"x": 10, "y": 10})
    in_sight = "document.getElementById('element').getBoundingClientRect().top < innerHeight"
    assert not page.evaluate(in_sight)
    page.tap("#chosen")  # to what is said of the element
    until(page, in_sight)


def test_it_prints(visit: Any, case: Case) -> None:
    page = visit(case.path, "#node=h&at=a2,2")
    page.emulate_media(media="print")
    assert not page.is_visible("#modes") and not page.is_visible("#play") and page.is_visible("#element")
    assert page.evaluate("getComputedStyle(document.querySelector('main')).overflow") == "visible"
    assert page.pdf()[:4] == b"%PDF"
