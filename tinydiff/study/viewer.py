"""The backward pass as one HTML file, to be stepped through: `tinydiff.study.save(loss, "backward.html")`.

The page is viewer.html, with viewer.css, viewer.js and the data of one pass written into it, so it needs no server and
no network. This file gathers the data. All numbers are the engine's: of the passes in passes.py, the expressions of
explain.py, and the checks of local_check.py. Of large arrays the first elements are kept, and the page says which.
"""

from __future__ import annotations

import inspect
import json
import math
import textwrap
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import backend
from ..arguments import integer, number
from ..engine import Node, Tensor, seed
from ..nn import Module
from .explain import Step, explain, graph_of, shortly
from .folding import holder_of, rows_of
from .local_check import TINY, Checked, LocalOp
from .page_arrays import LEVELS, Arrays, layout, plain
from .passes import before_unbroadcast, forward_values, inputs_of, recursion, topological

HERE = Path(__file__).parent
SIZE = 1_900_000  # bytes of a page; of larger ones less is kept
ROUNDING = 1e-6  # a relative difference between two passes that is none


def save(
    loss: Tensor,
    path: Any,
    module: Module | None = None,
    *,
    names: Mapping[str, Any] | None = None,
    grad: Any = None,
    elements: int = 4,
    seconds: float = 30.0,
) -> Path:
    """Write the backward pass of a result to one HTML file, and return its path. Open it in any browser.

    module, names: as for explain; the graph is folded by the module's paths. Without a module the one that holds the
    parameters is looked for among the objects that are alive. grad: the adjoint of the result, if it is no scalar.
    elements: so many elements of each input's adjoint are checked one by one, the largest that the page shows and one
    at random; of an op of few elements all are. seconds: for all checks, the smallest nodes first; the page says which
    nodes were not reached.

    Nothing is changed: the graph is still there for `backward`, `.grad` is as it was, and hooks do not run.
    Errors: as for explain and for `backward`; OSError if the file cannot be written.
    """
    elements = integer("save: elements", elements, 0)
    seconds = number("save: seconds", seconds, "[0, inf)")
    path = Path(path)
    module = holder_of(loss) if module is None else module
    path.write_text(Page(loss, module, names, grad, elements, seconds).html(path.stem), encoding="utf-8")
    return path


class Page:
    """The data of one page."""

    def __init__(self, loss: Tensor, module: Any, names: Any, grad: Any, elements: int, seconds: float):
        self.arrays = Arrays()
        explained = explain(loss, module, names=names)
        g = seed(loss, grad, False)
        order = graph_of(loss.node)
        with np.errstate(all="ignore"):
            self.right, self.wrong = topological(loss.node, g, order), recursion(loss.node, g)
        values = forward_values(order)
        if loss.node not in values:
            values[loss.node] = loss._data, "the result"
        self.values, self.elements = values, elements
        steps = {step.time: step for step in explained.nodes}
        self.steps = [steps[visit.node.time] for visit in self.right.visits]
        self.numbers = {visit.node: i for i, visit in enumerate(self.right.visits)}
        leaves = [x for x in self.right.sums if not isinstance(x, Node)]
        self.leaf_numbers = {x: i for i, x in enumerate(leaves)}
        self.leaf_names: dict[Any, str] = {}
        self.kernels = {
            v.node.parents[1] for v in self.right.visits if v.node.op.name in ("conv2d_p", "conv2d_input_grad")
        }
        for visit, step in zip(self.right.visits, self.steps):
            for parent, name in zip(visit.node.parents, step.inputs):
                self.leaf_names[parent] = name
        self.nodes = [self.node(i, step) for i, step in enumerate(self.steps)]
        self.leaves = [self.leaf(x) for x in leaves]
        self.check(seconds)
        self.rows = rows_of([visit.node for visit in self.right.visits], self.leaf_names)
        self.mistake = self.recursion()

    # ---- the parts of the data

    def node(self, number: int, step: Step) -> dict[str, Any]:
        visit, arrays = self.right.visits[number], self.arrays
        node, (out, origin) = visit.node, self.values.get(visit.node, (None, "not kept, and cannot be computed again"))
        raw = [None] * len(visit.to) if node.op.name == "checkpoint" else before_unbroadcast(node, visit.g)
        inputs = []
        known = inputs_of(node, self.values)
        for i, (parent, name) in enumerate(zip(node.parents, step.inputs)):
            x: dict[str, Any] = {"name": name, "shape": getattr(node.values[i], "shape", None)}
            x["array"] = arrays(known[i], parent in self.kernels)
            if isinstance(parent, Node):
                x["node"] = self.numbers.get(parent)
            elif parent is not None:
                x["leaf"] = self.leaf_numbers.get(parent)
            inputs.append(x)
        for rule in step.rules:
            i = rule.input
            if visit.to[i] is None:  # what checkpoint was given and did not use
                continue
            parent, x = node.parents[i], inputs[i]
            part = self.right.parts[parent].index((number, i))
            sums = self.right.sums[parent]
            x |= {"bar": rule.target, "expression": rule.expression, "part": part + 1, "parts": len(sums)}
            x["to"] = arrays(visit.to[i], parent in self.kernels)
            x["sum"] = arrays(sums[part], parent in self.kernels)
            if getattr(raw[i], "shape", visit.to[i].shape) != visit.to[i].shape:
                x["raw"] = arrays(raw[i])
        return {
            "name": step.result,
            "bar": step.adjoint,
            "op": step.op,
            "shape": node.shape,
            "dtype": str(node.dtype),
            "forward": step.forward,
            "constants": [[name, shortly(value)] for name, value in step.constants.items()],
            "lets": step.lets,
            "inputs": inputs,
            "out": arrays(out),
            "origin": origin,
            "g": arrays(visit.g),
            "from": self.right.parts.get(node, []),
            "fast": node.residuals is not None,
            "verdict": "",
        }

    def leaf(self, x: Any) -> dict[str, Any]:
        kernel = x in self.kernels
        return {
            "name": self.leaf_names[x],
            "shape": x.shape,
            "array": self.arrays(x._data, kernel),
            "g": self.arrays(self.right.sums[x][-1], kernel),
            "from": self.right.parts[x],
        }

    def check(self, seconds: float) -> None:
        """Check the rules, the smallest nodes first, as long as there is time."""
        end = time.monotonic() + seconds
        sizes = [math.prod(v.node.shape) + sum(math.prod(x["shape"] or ()) for x in n["inputs"])
                 for v, n in zip(self.right.visits, self.nodes)]  # fmt: skip
        for i in sorted(range(len(sizes)), key=sizes.__getitem__):
            if time.monotonic() < end and self.steps[i].op != "checkpoint":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.check_node(i)

    def check_node(self, number: int) -> None:
        visit, record = self.right.visits[number], self.nodes[number]
        local = LocalOp(visit.node, inputs_of(visit.node, self.values), visit.g)
        verdicts = []
        for i, adjoint in enumerate(visit.to):
            if adjoint is not None:
                few = adjoint.size * math.prod(visit.node.shape) <= TINY
                indices = self.chosen(adjoint, few, visit.node.parents[i])
                found = local.check(i, adjoint, indices, number)
                record["inputs"][i]["checks"] = [_checked(c) for c in found]
                verdicts += [c.verdict for c in found]
                if few:
                    record["inputs"][i]["jacobian"] = self.arrays(local.jacobian(i))
        record["verdict"] = "wrong" if "wrong" in verdicts else "right" if "right" in verdicts else ""

    def chosen(self, adjoint: Any, all_of_them: bool, parent: Any) -> list[tuple[int, ...]]:
        """The elements to check: all, or the largest of those that are shown, and one of all at random."""
        host = backend.to_host(adjoint)
        if all_of_them:
            return list(np.ndindex(*host.shape))
        _, crop = layout(host.shape, parent in self.kernels, 2000)
        shown = np.nan_to_num(np.abs(host[tuple(slice(n) for n in crop)]), nan=math.inf)
        places = np.argsort(-shown, axis=None, kind="stable")[: max(self.elements - 1, 0)]
        found = [tuple(map(int, np.unravel_index(j, shown.shape))) for j in places]
        if self.elements and host.size:
            found.append(tuple(int(n) for n in np.random.default_rng(host.size).integers(0, host.shape)))
        return list(dict.fromkeys(found))

    def recursion(self) -> dict[str, Any]:
        """The pass in the wrong order: what each node had when visited, and how far that is from right."""
        visits = []
        for visit in self.wrong.visits:
            right = self.right.visits[self.numbers[visit.node]]
            visits.append({
                "node": self.numbers[visit.node],
                "got": visit.got,
                "of": len(self.right.sums[visit.node]),
                "error": error(visit.g, right.g),
                "g": self.arrays(self.same(visit.g, right.g)),
                "to": [
                    self.arrays(self.same(a, b), parent in self.kernels)
                    for a, b, parent in zip(visit.to, right.to, visit.node.parents)
                ],
            })  # fmt: skip
        leaves = []
        for x in self.leaf_numbers:
            found, right = self.wrong.sums[x][-1], self.right.sums[x][-1]
            number = self.arrays(self.same(found, right), x in self.kernels)
            leaves.append({"error": error(found, right), "g": number})
        return {"visits": visits, "leaves": leaves}

    def same(self, array: Any, right: Any) -> Any:
        """The right array in place of one that equals it but for rounding, so that it is kept once."""
        return right if array is None or error(array, right) == 0 else array

    # ---- the page

    def data(self, most: int, title: str) -> str:
        ops = {step.op: op_page(v.node.op) for step, v in zip(self.steps, self.right.visits)}
        record = {
            "title": title,
            "nodes": self.nodes,
            "leaves": self.leaves,
            "rows": self.rows,
            "recursion": self.mistake,
            "ops": ops,
            "arrays": self.arrays.written(most),
        }
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")  # so that no source text can end the script element

    def html(self, title: str) -> str:
        for most in LEVELS:
            data = self.data(most, title)
            if len(data.encode()) <= SIZE:
                break
        page = (HERE / "viewer.html").read_text(encoding="utf-8")
        for name in ("viewer.css", "viewer.js"):
            page = page.replace(f"/*{name}*/", (HERE / name).read_text(encoding="utf-8"))
        escaped = title.replace("&", "&amp;").replace("<", "&lt;")
        return page.replace("{title}", escaped).replace("{data}", data)


def error(found: Any, right: Any) -> Any:
    """|found - right| / |right|, 0 if that is rounding alone."""
    a, b = (backend.to_host(x).astype(np.float64) for x in (found, right))
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    with np.errstate(all="ignore"):
        away = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return 0.0 if away <= ROUNDING else plain(away)


def _checked(c: Checked) -> dict[str, Any]:
    terms = [[*map(plain, (g, d)), list(j)] for j, g, d in c.terms]
    return {
        "at": c.index, "value": plain(c.value), "numeric": plain(c.numeric), "verdict": c.verdict, "method": c.method,
        "terms": terms, "rest": [c.rest[0], plain(c.rest[1])],
    }  # fmt: skip


def op_page(op: Any) -> dict[str, str]:
    """The formula and the source of the rule of an op."""
    try:
        source = textwrap.dedent(inspect.getsource(op.rule))
    except (OSError, TypeError):  # defined where there is no file
        source = "(its source is not in a file)"
    return {"formula": inspect.cleandoc(op.__doc__ or ""), "source": source, "module": op.forward.__module__}
