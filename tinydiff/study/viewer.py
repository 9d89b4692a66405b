"""The backward pass as one HTML file, to be stepped through: `tinydiff.study.save(loss, "backward.html")`.

The page is viewer.html, with viewer.css, viewer.js and the data of one pass written into it, so it needs no server and
no network. This file gathers the data. All numbers are the engine's: of the passes in passes.py, the expressions of
explain.py, and the checks of local_check.py. Of large arrays the first elements are kept, and the page says which.
"""

from __future__ import annotations

import base64
import gc
import inspect
import itertools
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
from ..nn import Module, Parameter
from .explain import Step, _graph, _short, explain
from .local_check import TINY, Checked, LocalOp
from .passes import before_unbroadcast, forward_values, inputs_of, recursion, topological

SHAPES = "tinydiff.ops.shape"  # the ops that move elements and change none
HERE = Path(__file__).parent
SIZE = 1_900_000  # bytes of a page; of larger ones less is kept
# The most elements that are kept of an array. The first number with which the page fits SIZE counts.
LEVELS = (6000, 5000, 4000, 3500, 3000, 2500, 2000, 1500, 1000, 500, 200, 50, 10)
IMAGES, CHANNELS, SIDE = 2, 8, 32  # never more of an array than these: images, channels, rows and columns
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
    module = module or holder_of(loss)
    path.write_text(Page(loss, module, names, grad, elements, seconds).html(path.stem), encoding="utf-8")
    return path


def holder_of(loss: Tensor) -> Module | None:
    """The module alive that holds most of the parameters that the result was computed from; of several the smallest."""
    if not isinstance(loss, Tensor) or loss.node is None:
        return None
    leaves = {id(x) for node in _graph(loss.node) for x in node.parents if isinstance(x, Parameter)}
    best, most = None, (0, 0)
    for module in [x for x in gc.get_objects() if isinstance(x, Module)]:
        try:
            held = {id(p) for p in module.parameters()}
        except (ValueError, AttributeError):  # one that is not finished yet, or holds itself
            continue
        if (score := (len(held & leaves), -len(held))) > most:
            best, most = module, score
    return best


class Arrays:
    """The arrays of a page, each once: `self(array)` is its number."""

    def __init__(self) -> None:
        self.kept: list[tuple[np.ndarray, bool, dict[str, Any]]] = []
        self.alive: list[Any] = []  # so that an id stays its own
        self.numbers: dict[int, int] = {}

    def __call__(self, array: Any, kernel: bool = False) -> int | None:
        if array is None or not hasattr(array, "shape") or hasattr(array, "no_values"):
            return None
        if id(array) not in self.numbers:
            self.numbers[id(array)] = len(self.kept)
            self.alive.append(array)
            host = backend.to_host(array)
            host = host.astype(np.float64) if host.dtype.kind != "f" else host
            self.kept.append((host, kernel, figures(host)))
        return self.numbers[id(array)]

    def written(self, most: int) -> list[dict[str, Any]]:
        return [shown(array, kernel, most) | said for array, kernel, said in self.kept]


def figures(array: np.ndarray) -> dict[str, Any]:
    """What is said of all of an array; NaN and Inf are counted, and left out of the rest."""
    finite = array[np.isfinite(array)].astype(np.float64)
    return {
        "norm": plain(np.linalg.norm(finite)),
        "low": plain(finite.min()) if finite.size else None,
        "high": plain(finite.max()) if finite.size else None,
        "bad": int(array.size - finite.size),
    }


def shown(array: np.ndarray, kernel: bool, most: int) -> dict[str, Any]:
    """The first elements of an array, exactly as they are, and how to lay them out."""
    axes, crop = layout(array.shape, kernel, most)
    first = np.ascontiguousarray(array[tuple(slice(n) for n in crop)])
    what = ("output channels", "input channels") if kernel else ("channels", "images")
    words = dict(zip(axes, ("columns", "rows", *(what if len(axes) == 4 else ("blocks",)))))
    cut = [f"{m} of {n} {words.get(a, 'blocks')}" for a, (m, n) in enumerate(zip(crop, array.shape)) if m < n]
    return {
        "shape": array.shape,
        "crop": crop,
        "axes": axes,
        "bytes": array.itemsize,
        "data": base64.b64encode(first.astype(f"<f{array.itemsize}").tobytes()).decode(),
        "said": f"shown: the first {', '.join(cut)}" if cut else "",
    }


def layout(shape: tuple[int, ...], kernel: bool, most: int) -> tuple[list[int], list[int]]:
    """Which axis of an array is what in its picture, [column, row, column of tiles, row of tiles] as far as there are
    so many; and how much of each axis is kept, at most so many elements in all. (N, H, W, C): a row of tiles per image,
    a tile per channel; a kernel (h, w, in, out): a row of tiles per input channel. (N, L, C): a block per N."""
    n = len(shape)
    axes = ([1, 0, 3, 2] if kernel else [2, 1, 3, 0]) if n == 4 else list(range(n))[:-4:-1]
    roles = ("blocks",) if n == 3 else ("channels", "channels" if kernel else "blocks")
    role = dict(zip(axes, ("line" if n == 1 else "side", "side", *roles)))
    limits = {"line": 2 * SIDE, "side": SIDE, "channels": CHANNELS, "blocks": IMAGES, "other": 1}

    def crop() -> list[int]:
        return [min(m, limits[role.get(a, "other")]) for a, m in enumerate(shape)]

    if n > 2 and max(shape[a] for a in axes[:2]) > SIDE:  # no image, and cut anyway
        limits["side"] //= 2
    for shorter in (*["channels"] * 7, "blocks", *("side", "line") * 5):
        if math.prod(crop()) > most:
            limits[shorter] = max(limits[shorter] - 1 if shorter == "channels" else limits[shorter] // 2, 1)
    return axes, crop()


def plain(x: Any) -> Any:
    """A number for JSON, which has no NaN and no Inf: these are strings."""
    return float(x) if math.isfinite(x) else str(float(x))


class Page:
    """The data of one page."""

    def __init__(self, loss: Tensor, module: Any, names: Any, grad: Any, elements: int, seconds: float):
        self.arrays = Arrays()
        g = seed(loss, grad, False)
        explained = explain(loss, module, names=names)
        order = _graph(loss.node)
        with np.errstate(all="ignore"):
            self.right, self.wrong = topological(loss.node, g, order), recursion(loss.node, g)
        values = forward_values(order)
        if loss.node not in values:
            values[loss.node] = loss._data, "the result"
        self.values, self.elements = values, elements
        self.steps = explained.nodes
        self.numbers = {visit.node: i for i, visit in enumerate(self.right.visits)}
        leaves = [x for x in self.right.sums if not isinstance(x, Node)]
        self.leaf_numbers = {x: i for i, x in enumerate(leaves)}
        self.leaf_names: dict[Any, str] = {}
        self.kernels = {
            v.node.parents[1] for v in self.right.visits if v.node.op.name in ("conv2d_p", "conv2d_input_grad")
        }
        for visit, step in zip(self.right.visits, self.steps, strict=True):
            for parent, name in zip(visit.node.parents, step.inputs):
                self.leaf_names[parent] = name
        self.raw: dict[int, list[Any]] = {}
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
        self.raw[number] = raw
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
            parent, x = node.parents[i], inputs[i]
            part = self.right.parts[parent].index((number, i))
            if node in self.right.sums and parent is not None:
                sums = self.right.sums[parent]
                x |= {"bar": rule.target, "expression": rule.expression, "part": part + 1, "parts": len(sums)}
                x["to"] = arrays(visit.to[i], parent in self.kernels)
                x["sum"] = arrays(sums[part], parent in self.kernels)
                if raw[i] is not None and raw[i].shape != visit.to[i].shape:
                    x["raw"] = arrays(raw[i])
        return {
            "name": step.result,
            "bar": step.adjoint,
            "op": step.op,
            "shape": node.shape,
            "dtype": str(node.dtype),
            "forward": step.forward,
            "constants": [[name, _short(value)] for name, value in step.constants.items()],
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
                found = local.check(i, adjoint, self.raw[number][i], indices, number)
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
        ops = {step.op: op_page(step.op, v.node.op) for step, v in zip(self.steps, self.right.visits)}
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


def op_page(name: str, op: Any) -> dict[str, str]:
    """The formula and the source of the rule of an op."""
    try:
        source = textwrap.dedent(inspect.getsource(op.rule))
    except (OSError, TypeError):  # defined where there is no file
        source = "(its source is not in a file)"
    return {"formula": inspect.cleandoc(op.__doc__ or ""), "source": source, "module": op.forward.__module__}


# ---------------------------------------------------------------- which module a node belongs to


def rows_of(nodes: list[Node], names: Mapping[Any, str]) -> list[dict[str, Any]]:
    """The rows of the folded graph, in the order of the backward pass: runs of nodes of one module.

    A node belongs to the module whose parameters it reads. One that only brings another shape goes with the node that
    reads it, if that is the only one, and else with the one it reads. The rest stands between two modules, and belongs
    to what their paths have in common. path "": to the program itself.
    """
    readers: dict[Any, list[Node]] = {}
    for node in nodes:
        for parent in node.parents:
            if isinstance(parent, Node):
                readers.setdefault(parent, []).append(node)
    paths: dict[Node, str | None] = {}
    only_parameters: dict[Any, str] = {}
    for node in reversed(nodes):  # oldest first
        used = [x for x in node.parents if x is not None]
        found = [path_of(names[x]) if isinstance(x, Parameter) else only_parameters.get(x) for x in used]
        owners = [path for path in found if path is not None]
        paths[node] = owners[-1] if owners else None
        if owners and len(owners) == len(node.parents):
            only_parameters[node] = owners[-1]
    for node in nodes:  # newest first: a chain of reshapes goes with its end
        made = [x for x in node.parents if isinstance(x, Node)]
        if paths[node] is None and node.op.forward.__module__ == SHAPES and len(made) == 1:
            after = readers.get(node, [])
            joined = paths[after[0]] if len(after) == 1 else None
            paths[node] = joined if joined is not None else paths[made[0]]
    rows: dict[Any, dict[str, Any]] = {}  # by path; a run without one by its first node
    runs = [(path, list(run)) for path, run in itertools.groupby(range(len(nodes)), key=lambda i: paths[nodes[i]])]
    for i, (path, run) in enumerate(runs):
        if path is not None:
            rows.setdefault(path, {"path": path, "nodes": [], "ops": ""})["nodes"] += run
            continue
        beside = [runs[j][0] or "" if 0 <= j < len(runs) else "" for j in (i - 1, i + 1)]
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*(p.split(".") for p in beside)))
        ops = ", ".join(dict.fromkeys(nodes[j].op.name for j in run))
        rows[run[0]] = {"path": ".".join(a for a, _ in common), "nodes": run, "ops": ops}
    return list(rows.values())


def path_of(name: str) -> str:
    return name.rpartition(".")[0]
