"""A page for each op, written when the book is built. What an op says of itself is taken from its source; all numbers
are computed here. A registered op that has no example by hand stops the build, and so does a formula that is false.

    python docs/_ext/op_pages.py           writes docs/ops/*.md
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from algebra import BAR
from claims import Case, FalseClaim, bar, clauses
from derivations import Derivation, derive, doc, module_story, out_name
from hand import HAND, KINKS, hand_adjoint, hand_case

import tinydiff
from tinydiff import Tensor
from tinydiff.engine import Node, Op
from tinydiff.operators import OPS
from tinydiff.plot import FAINT, INK
from tinydiff.profile import _flop
from tinydiff.study.catalogue import CATALOGUE
from tinydiff.study.explain import explain

DOCS = Path(__file__).parents[1]
EXERCISES = {sheet.name for sheet in CATALOGUE} | {sheet.op_name for sheet in CATALOGUE}
FILES = "elementwise activation reduce shape index linalg softmax conv pool norm attention loss".split()
LONGER = {
    "softmax": "softmax", "log_softmax": "softmax", "conv2d": "conv2d", "conv2d_p": "conv2d",
    "conv2d_input_grad": "conv_transpose2d", "conv_transpose2d": "conv_transpose2d", "conv2d_weight_grad": "conv2d",
    "normalize": "group_norm", "group_norm": "group_norm", "layer_norm": "group_norm", "batch_norm": "group_norm",
    "attention": "attention", "scaled_dot_product_attention": "attention", "cross_entropy": "cross_entropy",
}  # fmt: skip


def write_all(folder: Path) -> None:
    """Write the pages of all registered ops, and an index. Errors: FalseClaim for an op without an example by
    hand, a formula that is false, or a rule that is wrong."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    missing = set(OPS) - set(HAND)
    if missing:
        raise FalseClaim(f"no example by hand in docs/_ext/hand.py for {', '.join(sorted(missing))}")
    names = in_order()
    for name in names:
        put(folder / f"{name}.md", page(name, folder))
    put(folder / "index.md", index(names))
    for old in folder.glob("*.md"):
        if old.stem not in (*names, "index"):
            old.unlink()


def put(path: Path, text: str) -> None:
    """Write, unless it is there already: then Sphinx need not read it again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def file_of(name: str) -> str:
    return OPS[name].__module__.rpartition(".")[2]


def in_order() -> list[str]:
    """By file, and in a file from top to bottom."""

    def place(name: str) -> tuple[int, int]:
        function = getattr(OPS[name], "forward", OPS[name])
        return FILES.index(file_of(name)), inspect.getsourcelines(function)[1]

    return sorted(OPS, key=place)


def index(names: list[str]) -> str:
    lines = [
        "# The ops",
        "",
        "Each op has its formula, its derivation, its forward and its rule in one place of the source. Its page here",
        "shows them, evaluates every formula, and works an example whose numbers a pencil can follow. They stand in",
        "the order of the files; [add](add.md) and [multiply](multiply.md) are the place to start.",
        "",
    ]
    for file in FILES:
        here = [name for name in names if file_of(name) == file]
        said = module_story(here[0]).partition("\n\n")[0].replace("\n", " ")
        lines += [f"## {file}", "", escaped(said), "", "| op | |", "|---|---|"]
        for name in here:
            first = doc(name)[0].split("\n")[0]
            lines.append(f"| [{name}]({name}.md) | `{first.replace('|', chr(92) + '|')}` |")
        lines += ["", "```{toctree}", ":hidden:", ""] + here + ["```", ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    return re.sub(r"([*_<>\[\]|])", r"\\\1", text)


# ---------------------------------------------------------------- a page


def page(name: str, folder: Path) -> str:
    op, case = OPS[name], hand_case(name)
    derivation = derive(name)
    parts = [f"# {name}\n\n{heading(name)}", formula(name, derivation), pencil(name, derivation), code(name)]
    z, tensors = case.recorded()
    g = hand_adjoint(name, z.shape)
    adjoints = [t.numpy() for t in tinydiff.grad(z, tensors, Tensor(g), create_graph=True)]  # by the rule of the page
    jacobians, method = case.jacobians()
    parts.append(by_hand(name, case, z.numpy(), g, adjoints))
    parts.append(compared(case, g, adjoints, jacobians, method))
    draw_jacobians(folder / "images" / f"{name}.svg", case, jacobians)
    parts.append(
        "## The Jacobian\n\n"
        f"![the derivative of each element of the result by each element of each input](images/{name}.svg)\n\n"
        + jacobian_words(jacobians)
    )
    parts.append(second(case, z, tensors, g))
    if name in KINKS:
        parts.append(kink(name))
    parts.append(cost(name, op, z, case))
    shown = explain(z, names={**{n: t for n, t in zip(case.inputs, tensors)}, out_name(name): z})
    parts.append(
        "## What ran\n\nThe backward pass of the example, as [`explain`](../../tinydiff/study/explain.py) writes it "
        f"out:\n\n```text\n{shown}\n```"
    )
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def heading(name: str) -> str:
    file = f"tinydiff/ops/{file_of(name)}.py"
    kind = "an op with a rule of its own"
    if not isinstance(OPS[name], Op):
        kind = "written in other ops, whose rules make its gradient"
    text = f"From [{file}](../../{file}); {kind}."
    if name in LONGER:
        text += f" There is [a longer derivation](../derivations/{LONGER[name]}.md)."
    if name in EXERCISES:
        text += f" To write the rule yourself: `python -m tinydiff exercise {exercise_name(name)}`."
    return text


def exercise_name(name: str) -> str:
    return next(sheet.name for sheet in CATALOGUE if name in (sheet.name, sheet.op_name))


def block(text: str, kind: str = "text") -> str:
    return f"```{kind}\n{text.rstrip()}\n```"


def formula(name: str, derivation: Derivation) -> str:
    first, *rest = derivation.paragraphs
    rest = [p for p in rest if not p.startswith("At ")]
    derived = any(re.match(rf"(d\S+|\S+{BAR}\S*)( / \S+)? =", c) for p in rest for c in clauses(p))
    parts = ["## Formula", shown(first)]
    if rest:
        parts += ["## Differential and adjoint"] if derived else []
        parts += [block("\n\n".join(rest))] if derived else map(shown, rest)
    return "\n\n".join(parts)


def shown(paragraph: str) -> str:
    """A formula in a block, a sentence as a sentence."""
    formula = re.search(r"\S {3,}\S|^ +\S|^\S+(\[.*?\])? = ", paragraph, re.M)
    return block(paragraph) if formula else escaped(paragraph)


def pencil(name: str, derivation: Derivation) -> str:
    parts = []
    if name == "normalize":
        parts.append(f"The head of the file derives it:\n\n{block(module_story(name))}")
    if derivation.pencil:
        parts.append(re.sub(r"\]\((?!https?:)", "](../", derivation.pencil).replace("](../ops/", "]("))
    if derivation.generated:
        why = ["", "put in the differential", "what each differential is multiplied with, that is its adjoint"]
        lines = [f"{'dL ' if i == 0 else '   '}= {line}" for i, line in enumerate(derivation.generated)]
        width = max(map(len, lines)) + 4
        lines = [f"{line:<{width}}{w}".rstrip() for line, w in zip(lines, why)]
        parts.append(block("\n".join(lines)))
    if derivation.checked:
        worst = max(c.error for c in derivation.checked)
        article = "the " if derivation.method == "complex step" else ""
        parts.append(
            f"Evaluated on random numbers when this page was built: {len(derivation.checked)} formulas, against "
            f"{article}{derivation.method}. The largest relative error is {error(worst)}."
        )
    if not parts:
        return ""
    title = "## With a pencil" if derivation.pencil or derivation.generated or name == "normalize" else "## Evaluated"
    return "\n\n".join([title, *parts])


def code(name: str) -> str:
    op = OPS[name]
    sources = [inspect.getsource(getattr(op, "forward", op))]
    if isinstance(op, Op) and op.rule is not None:
        sources.append(inspect.getsource(op.rule))
    text = "\n\n".join(without_docstring(textwrap.dedent(s)) for s in sources)
    intro = "Forward and rule" if isinstance(op, Op) else "The function"
    return f"## The code\n\n{intro}, as they stand in the file:\n\n{block(text, 'python')}".replace(
        "The function, as they stand", "The function, as it stands"
    )


def without_docstring(source: str) -> str:
    return re.sub(r'\n\s+"""(?:.|\n)*?"""', "", source, count=1)


# ---------------------------------------------------------------- numbers


def show(a: Any) -> str:
    """An array as a reader writes it, with at most four digits after the point."""
    a = np.asarray(a)
    if a.dtype.kind != "f":
        return " ".join(np.array2string(a, separator=", ").split())
    text = np.array2string(
        a.squeeze() if a.ndim > 2 else a, formatter={"float_kind": lambda v: f"{v:.4f}".rstrip("0").rstrip(".")}
    )
    return text.replace("\n ", "\n").replace("-0 ", "0 ")


def labelled(name: str, a: Any) -> str:
    """name = array, its rows below each other."""
    first, *rest = show(a).split("\n")
    shape = f"    {np.shape(a)}" if np.ndim(a) > 2 else ""
    indent = " " * (len(name.replace(BAR, "")) + 4)
    return "\n".join([f"{name} = {first}{shape}", *(indent + line.lstrip() for line in rest)])


def error(e: float) -> str:
    return f"{e:.0e}" if e else "0"


def by_hand(name: str, case: Case, z: Any, g: Any, adjoints: list[Any]) -> str:
    out = out_name(name)
    rows = [labelled(n, a) for n, a in case.inputs.items()]
    options = {n: v for n, v in case.params.items() if n not in ("rng", "geometry")}
    for n, v in {**case.constants, **options}.items():
        if v is not None:
            rows.append(labelled(n, v) if isinstance(v, np.ndarray) else f"{n} = {v!r}")
    rows += ["", labelled(out, z), "", labelled(bar(out), g)]
    rows += [labelled(bar(n), a) for n, a in zip(case.inputs, adjoints)]
    note = " (axes of length 1 are left out)" if any(np.ndim(a) > 2 for a in (z, *case.inputs.values())) else ""
    return (
        f"## By hand\n\nThe inputs{note}, the result, an adjoint {bar(out)} that arrives, and what the "
        f"backward pass makes of it:\n\n{block(chr(10).join(rows))}"
    )


def compared(case: Case, g: Any, adjoints: list[Any], jacobians: list[Any], method: str) -> str:
    rows = []
    for (name, x), a, J in zip(case.inputs.items(), adjoints, jacobians):
        numeric = (g.reshape(-1) @ J).reshape(x.shape)
        scale = max(np.abs(numeric).max(initial=0), 1e-3)
        if not np.allclose(a, numeric, rtol=1e-6, atol=1e-6 * scale):
            raise FalseClaim(f"{case.name}: the rule gives {a} for {name}, {method} give {numeric}")
        for at in np.ndindex(*x.shape):
            place = f"{name}[{', '.join(map(str, at))}]" if at else name
            rows.append(f"| {place} | {a[at]:.10g} | {numeric[at]:.10g} | {error(abs(a[at] - numeric[at]))} |")
    more = ""
    if len(rows) > 12:
        more, rows = f"\n\nThe other {len(rows) - 12} elements agree as well.", rows[:12]
    head = f"| element | by the rule | by {method} | difference |\n|---|---|---|---|\n"
    return "## Analytic against numeric\n\n" + head + "\n".join(rows) + more


def jacobian_words(jacobians: list[Any]) -> str:
    total = sum(J.size for J in jacobians)
    full = sum(int((np.abs(J) > 1e-12).sum()) for J in jacobians)
    words = f"Orange is above 0, violet below; of {total} elements {full} are not 0. "
    return words + "The rule multiplies by the transpose of this matrix, without ever making it."


CELL, MARGIN = (46, 24), (58, 10)
ORANGE, VIOLET = (0xE0, 0x82, 0x14), (0x80, 0x73, 0xAC)


def draw_jacobians(path: Path, case: Case, jacobians: list[Any]) -> None:
    """Matrices side by side, as an SVG: it is sharp at any size, and made in no time. Numbers where there is room."""
    parts, left = [], MARGIN[0]
    for name, J in zip(case.inputs, jacobians):
        width = CELL[0] if J.size <= 100 else CELL[0] / 2
        size = np.abs(J).max(initial=0) or 1
        for (i, j), v in np.ndenumerate(J):
            x, y = left + j * width, MARGIN[1] + i * CELL[1]
            share = abs(v) / size
            colour = "".join(f"{round(255 - 0.85 * share * (255 - c)):02x}" for c in (ORANGE if v > 0 else VIOLET))
            parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{CELL[1]}" fill="#{colour}" stroke="#ddd"/>')
            if J.size <= 100:
                text = f"{v:.3g}" if abs(v) > 1e-12 else "0"
                ink = INK if abs(v) > 1e-12 else FAINT
                parts.append(label(x + width / 2, y + CELL[1] / 2 + 4, text, ink))
        below = MARGIN[1] + J.shape[0] * CELL[1] + 18
        parts.append(label(left + J.shape[1] * width / 2, below, f"elements of {name}", INK))
        left += int(J.shape[1] * width) + 24
    rows = max(J.shape[0] for J in jacobians)
    height, width = MARGIN[1] + rows * CELL[1] + 28, max(left, 260)
    parts.append(label(MARGIN[0] / 2 - 2, MARGIN[1] + rows * CELL[1] / 2, f"of {out_name(case.name)}", INK))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    put(path, head + f'<rect width="{width}" height="{height}" fill="white"/>' + "".join(parts) + "</svg>\n")


def label(x: float, y: float, text: str, colour: str) -> str:
    style = 'text-anchor="middle" font-family="sans-serif" font-size="11"'
    return f'<text x="{x:g}" y="{y:g}" {style} fill="{colour}">{text}</text>'


def second(case: Case, z: Any, tensors: list[Any], g: Any) -> str:
    arrays = list(case.inputs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = tinydiff.gradcheck(lambda *xs: case.call(list(xs)), *arrays, order=2)
    text = "## The second derivative\n\nThe rule, run on Tensors, is recorded, and can be differentiated in turn. "
    text += f"`gradcheck` of order 2 finds: {str(report).splitlines()[0]}."
    n = sum(a.size for a in arrays)
    H = hessian(z, tensors, g)
    if not np.abs(H).max(initial=0) > 1e-12:
        return text + "\n\nHere it is 0: the result is linear in all inputs together, or constant."
    of = f"{bar(out_name(case.name))} · {out_name(case.name)}"
    if n > 8:
        full = int((np.abs(H) > 1e-9).sum())
        return text + f" The matrix of second derivatives of {of} has {full} of {n * n} elements that are not 0."
    labels = [f"{name}{list(i) if i else ''}" for name, a in case.inputs.items() for i in np.ndindex(*a.shape)]
    rows = ["| | " + " | ".join(labels) + " |", "|---" * (n + 1) + "|"]
    for label, row in zip(labels, H):
        rows.append(f"| {label} | " + " | ".join(f"{v:.4g}" if abs(v) > 1e-12 else "0" for v in row) + " |")
    return text + f" In the example, of {of} by each pair of elements:\n\n" + "\n".join(rows)


def hessian(z: Any, tensors: list[Any], g: Any) -> Any:
    n = sum(t.size for t in tensors)
    H = np.zeros((n, n))
    first = tinydiff.grad(z, tensors, Tensor(g), create_graph=True)
    row = 0
    for d in first:
        for at in np.ndindex(*d.shape):
            if d.node is not None:
                unit = np.zeros(d.shape)
                unit[at] = 1
                found = tinydiff.grad(d, tensors, Tensor(unit), retain_graph=True)
                H[row] = np.concatenate([f.numpy().reshape(-1) for f in found])
            row += 1
    return H


def kink(name: str) -> str:
    given, params = KINKS[name]
    case = Case(name, given, params)
    arrays = list(case.inputs.values())
    z, tensors = case.recorded()
    found = tinydiff.grad(z, tensors, Tensor(np.ones(z.shape)))
    said = next((p for p in doc(name) if p.startswith("At ")), "")
    if not said:
        said = next(line for line in "\n".join(doc(name)).splitlines() if line.startswith("At "))
    rows = []
    with np.errstate(all="ignore"):
        for k, (n, x) in enumerate(case.inputs.items()):
            for at in np.ndindex(*x.shape):
                unit = np.zeros(x.shape)
                unit[at] = 1
                sides = [one_sided(case, arrays, k, s * unit) * s + 0.0 for s in (-1, 1)]
                value = found[k].numpy()[at]
                rows.append(f"| {n}[{', '.join(map(str, at))}] = {x[at]:g} | {sides[0]:g} | {sides[1]:g} | {value:g} |")
    head = "| | derivative from below | from above | the rule says |\n|---|---|---|---|\n"
    return f"## At kinks\n\n{block(said)}\n\n{head}" + "\n".join(rows).replace("inf", "infinite").replace("nan", "none")


def one_sided(case: Case, arrays: list[Any], k: int, unit: Any) -> Any:
    """(f(x + h unit) - f(x)) / h as h goes to 0: a small number, or infinite."""
    values = []
    for h in (1e-4, 1e-8):
        moved = [a + h * unit if i == k else a for i, a in enumerate(arrays)]
        values.append(float((case.result(moved) - case.result(arrays)).sum() / h))
    if not all(map(math.isfinite, values)):
        return np.float64(np.nan)
    if abs(values[1]) > 10 * max(abs(values[0]), 1e-6):
        return np.float64(math.copysign(math.inf, values[1]))
    return float(round(values[1], 4)) + 0.0


def cost(name: str, op: Any, z: Any, case: Case) -> str:
    nodes: list[Node] = []
    stack = [z.node]
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in nodes:
            nodes.append(node)
            stack += node.parents
    kept = {id(a): a for node in nodes for a in (*node.values, node.out) if isinstance(a, np.ndarray)}
    size = sum(a.nbytes for a in kept.values())
    moved = sum(a.size for a in case.inputs.values()), z.size
    lines = [f"the forward reads {moved[0]} numbers and writes {moved[1]}."]

    def flop(node: Node, wanted: Any) -> int:
        return _flop(node.op.name, [getattr(v, "shape", ()) for v in node.values], node.shape, node.params, wanted) or 0

    forward = sum(flop(node, None) for node in nodes)
    back = sum(flop(node, [p is not None for p in node.parents]) for node in nodes)
    if forward:
        lines.append(f"Its products cost {forward} multiplications and additions, those of the rule {back}.")
    else:
        lines.append("There are no matrix products in it: its time is that of reading and writing.")
    if isinstance(op, Op) and op.rule is not None:
        reads = [
            p.name for p in list(inspect.signature(op.rule).parameters.values())[1:]
            if p.kind is not p.KEYWORD_ONLY and not p.name.startswith("_")
        ]  # fmt: skip
        what = " and ".join(f"`{r}`" for r in reads) if reads else "nothing but shapes"
        keeps = f"that: {size} bytes here" if reads else "no array"
        lines.append(f"The rule reads {what}, so the graph keeps {keeps}.")
    else:
        used = dict.fromkeys(node.op.name for node in reversed(nodes) if node.op.name in OPS)
        made = ", ".join(f"[{n}]({n}.md)" for n in used)
        lines.append(f"Here it is made of {made}; their rules keep {size} bytes.")
    return "## What it costs\n\nIn the example: " + " ".join(lines)


if __name__ == "__main__":
    write_all(DOCS / "ops")
