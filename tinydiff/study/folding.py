"""Which module a node belongs to: the graph is folded by the paths of modules, one row each.

A node does not know which module called it, but the parameters that it reads have paths.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping
from typing import Any

from ..engine import Node, Tensor
from ..nn import Module, Parameter
from .explain import graph_of

SHAPES = "tinydiff.ops.shape"  # the ops that move elements and change none


def holder_of(loss: Tensor) -> Module | None:
    """The module alive that holds most of the parameters that the result was computed from; of several the smallest."""
    if not isinstance(loss, Tensor) or loss.node is None:
        return None
    leaves = {id(x) for node in graph_of(loss.node) for x in node.parents if isinstance(x, Parameter)}
    best, most = None, (0, 0)
    # By type, since isinstance would ask each object for its __class__, which runs code of those that load lazily.
    for module in [x for x in gc.get_objects() if issubclass(type(x), Module)]:
        try:
            held = {id(p) for p in module.parameters()}
        except (ValueError, AttributeError):  # one that is not finished yet, or holds itself
            continue
        if (score := (len(held & leaves), -len(held))) > most:
            best, most = module, score
    return best


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
