"""Step 9. What is kept, and for how long.

A net's memory in training is what its nodes keep for their rules. So far they keep every input and every output.

    z = x + y        x̄ = z̄,  ȳ = z̄             reads nothing
    z = x y          x̄ = z̄ y,  ȳ = z̄ x         reads both inputs
    z = tanh x       x̄ = z̄ (1 - z^2)           reads the output

The rules say so themselves: since step 2 the names that they do not read begin with an underscore. `Op.vjp` looks at
the names, and the node keeps those arrays as shape and dtype alone. And more is saved:

* `requires_grad`: only leaves that ask for a gradient have one, and what depends on none of them leaves no node.
* inside `with no_grad():` nothing leaves a node. That is for using a net.
* the backward pass frees each node's arrays as soon as its rule has run, unless they are kept for a second pass.

This is the last change of the engine.
"""

import contextlib
import inspect
import itertools
import math
import operator

import numpy as np

clock = itertools.count()
recording = [True]


@contextlib.contextmanager
def no_grad():
    """Inside, nothing is recorded."""
    recording.append(False)
    try:
        yield
    finally:
        recording.pop()


class Tensor:
    """An array, its gradient, and the Node that computed it; None for a leaf."""

    def __init__(self, data, requires_grad=False, node=None):
        self.data, self.grad, self.node, self.requires_grad = data, None, node, requires_grad

    @property
    def shape(self):
        return self.data.shape

    def backward(self, grad=None, create_graph=False):
        """Add d(self)/d(leaf), weighted with grad, to the `.grad` of every leaf. grad: 1 if it has one element.
        create_graph: record the pass itself, so that the gradients can be differentiated again."""
        for leaf, g in backward_pass(self, seed(self, grad, create_graph), create_graph, keep=create_graph):
            leaf.grad = as_tensor(g) if leaf.grad is None else as_tensor(leaf.grad + g)

    def __add__(self, y):
        return add(self, y)

    def __sub__(self, y):
        return subtract(self, y)

    def __rsub__(self, y):
        return subtract(y, self)

    def __neg__(self):
        return negative(self)

    def __mul__(self, y):
        return multiply(self, y)

    def __matmul__(self, y):
        return matmul(self, y)

    def __rmatmul__(self, y):
        return matmul(y, self)

    __array_ufunc__ = None  # so that NumPy leaves array * Tensor to __rmul__
    __radd__, __rmul__ = __add__, __mul__


def tensor(data, requires_grad=False):
    """A leaf with a copy of the data."""
    return Tensor(np.array(data, dtype=float), requires_grad)


def origin(x):
    """Its place in the graph: the node that made it, or, if it is a leaf, itself. None if it requires no gradient."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return None
    return x if x.node is None else x.node


class Op:
    """A function of arrays with a rule. Called on arrays it returns an array; with a Tensor among its inputs it
    returns a Tensor, which remembers the call."""

    def __init__(self, forward):
        self.forward, self.name, self.rule = forward, forward.__name__, None

    def __call__(self, *inputs, **params):
        if not any(isinstance(x, Tensor) for x in inputs):
            return self.forward(*inputs, **params)
        values = [x.data if isinstance(x, Tensor) else x for x in inputs]
        out = np.asarray(self.forward(*values, **params))
        parents = [origin(x) for x in inputs]
        if not recording[-1] or all(parent is None for parent in parents):
            return Tensor(out)
        return Tensor(out, True, Node(self, parents, values, params, out))

    def vjp(self, rule):
        """Decorator: the rule (g, out, *inputs, **params) -> one adjoint for each input."""
        positional = [p for p in inspect.signature(rule).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        _, self.keeps_out, *self.keeps = [not p.name.startswith("_") for p in positional]  # of g, out, inputs
        self.rule = rule
        return rule


def op(forward):
    """Decorator: make a function an op."""
    return Op(forward)


class Node:
    """One call, out = op(*values, **params). parents: for each input the node that made it, or itself if it is a leaf,
    or None. time: its number."""

    def __init__(self, op, parents, values, params, out):
        self.op, self.parents, self.params = op, parents, params
        self.values = [a if keep or not hasattr(a, "shape") else ShapeDtype(a) for a, keep in zip(values, op.keeps)]
        self.out = out if op.keeps_out else ShapeDtype(out)
        self.time = next(clock)

    def free(self):
        self.values = self.out = None

    def pull_back(self, g, create_graph):
        """The adjoint of each input, from that of the output."""
        out, values = self.out, self.values
        if values is None:
            raise RuntimeError(f"backward a second time through {self.op.name}: its arrays were freed by the first")
        if create_graph:  # Tensors with their history: what the rule computes is recorded in turn
            out = tensor_at(self, out)
            values = [tensor_at(parent, value) for parent, value in zip(self.parents, values)]
        found = self.op.rule(g, out, *values, **self.params)
        adjoints = found if type(found) is tuple else (found,)
        wanted = [parent is not None for parent in self.parents]
        adjoints = [a() if want and callable(a) else a for a, want in zip(adjoints, wanted)]
        return [unbroadcast(a, x) if want else None for a, x, want in zip(adjoints, self.values, wanted)]


class ShapeDtype:
    """What is kept of an array that a rule does not read."""

    def __init__(self, array):
        self.shape, self.dtype = array.shape, array.dtype


def tensor_at(parent, value):
    """An input of a node as a Tensor with its history; a constant, or what was not kept, stays as it is."""
    if parent is None or isinstance(value, ShapeDtype):
        return value
    return Tensor(value, True, parent) if isinstance(parent, Node) else parent


def unbroadcast(adjoint, x):
    """The adjoint in the shape of its input: the sum of the adjoints of the copies that broadcasting has made."""
    shape, given = x.shape, adjoint.shape
    if given != shape:
        aligned = (1,) * (len(given) - len(shape)) + shape  # as broadcasting aligns it: at the last axis
        stretched = tuple(a for a, (m, n) in enumerate(zip(aligned, given)) if m != n)
        adjoint = reshape(sum(adjoint, axis=stretched), shape=shape)
    return adjoint


# ---------------------------------------------------------------- ops


@op
def add(x, y):
    return x + y


@add.vjp
def add_vjp(g, _z, _x, _y):
    return g, g


@op
def multiply(x, y):
    return x * y


@multiply.vjp
def multiply_vjp(g, _z, x, y):
    return lambda: g * y, lambda: g * x


@op
def matmul(x, y):
    return x @ y


@matmul.vjp
def matmul_vjp(g, _z, x, y):
    return lambda: matmul(g, transpose(y)), lambda: matmul(transpose(x), g)


@op
def tanh(x):
    return np.tanh(x)


@tanh.vjp
def tanh_vjp(g, z, _x):
    return g * (1 - z * z)


@op
def subtract(x, y):
    return x - y


@subtract.vjp
def subtract_vjp(g, _z, _x, _y):
    return g, lambda: -g


@op
def negative(x):
    return -x


@negative.vjp
def negative_vjp(g, _z, _x):
    return -g


@op
def sum(x, *, axis=None, keepdims=False):
    return x.sum(axis=axis, keepdims=keepdims)


@sum.vjp
def sum_vjp(g, _z, _x, *, axis=None, keepdims=False):
    axes = range(len(_x.shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    kept = [1 if a in [b % len(_x.shape) for b in axes] else n for a, n in enumerate(_x.shape)]
    return broadcast_to(reshape(g, shape=tuple(kept)), shape=_x.shape)


def mean(x, *, axis=None, keepdims=False):
    """It is written in other ops, and so needs no rule."""
    total = sum(x, axis=axis, keepdims=keepdims)
    return total * (math.prod(total.shape) / math.prod(x.shape))


@op
def reshape(x, *, shape):
    return x.reshape(shape)


@reshape.vjp
def reshape_vjp(g, _z, _x, *, shape):
    return reshape(g, shape=_x.shape)


@op
def broadcast_to(x, *, shape):
    return np.broadcast_to(x, shape)


@broadcast_to.vjp
def broadcast_to_vjp(g, _z, _x, *, shape):
    return g  # the engine sums it


@op
def transpose(x):
    return x.T


@transpose.vjp
def transpose_vjp(g, _z, _x):
    return transpose(g)


@op
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@softmax.vjp
def softmax_vjp(g, z, _x):
    return z * (g - sum(g * z, axis=-1, keepdims=True))


# ---------------------------------------------------------------- the backward pass


def backward_pass(output, g, create_graph, keep):
    """(leaf, adjoint) for each leaf that the output depends on."""
    # 1. Every node that the output was computed from, oldest first.
    order, seen, stack = [], set(), [origin(output)]
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            order.append(node)
            stack.extend(node.parents)
    order.sort(key=operator.attrgetter("time"))

    # 2. Adjoints, from the newest node to the oldest; the adjoint of each is the sum over its uses.
    adjoints = {origin(output): g}
    while order:
        node = order.pop()
        for parent, adjoint in zip(node.parents, node.pull_back(adjoints.pop(node), create_graph)):
            if parent is not None:
                adjoints[parent] = adjoints[parent] + adjoint if parent in adjoints else adjoint
        if not keep:
            node.free()
    return list(adjoints.items())  # those of the nodes are spent: these are the leaves'


def seed(output, g, create_graph):
    """The adjoint at the output: what was given, or ones. With create_graph, as a Tensor."""
    if not output.requires_grad:
        raise RuntimeError("the output does not depend on any Tensor that requires a gradient")
    g = np.ones_like(output.data) if g is None else g
    return as_tensor(g) if create_graph else g


def as_tensor(g):
    return g if isinstance(g, Tensor) else Tensor(np.asarray(g))


def grad(output, inputs, grad_output=None, create_graph=False):
    """d(output)/d(input), weighted with grad_output, for each of the inputs, which are leaves. 0 if there is none."""
    found = dict(backward_pass(output, seed(output, grad_output, create_graph), create_graph, keep=True))
    return tuple(as_tensor(found[x]) if x in found else Tensor(np.zeros_like(x.data)) for x in inputs)


def kept_bytes(output):
    """Of all arrays that the graph of this Tensor holds, each counted once."""
    arrays, seen, stack = {}, set(), [output.node]
    while stack:
        node = stack.pop()
        if hasattr(node, "parents") and node not in seen:
            seen.add(node)
            stack.extend(node.parents)
            arrays |= {id(a): a.nbytes for a in [*(node.values or ()), node.out] if isinstance(a, np.ndarray)}
    return math.fsum(arrays.values())


def ten_additions(x):
    for _ in range(10):
        x = x + 1.0
    return x


def main():
    import step08_second

    data = np.linspace(0, 1, 1000)  # 8,000 bytes
    x, y = tensor(data, requires_grad=True), tensor(data, requires_grad=True)
    print("arrays of 8,000 bytes; what the graph keeps:")
    for name, z in {"x + y": x + y, "x y": x * y, "tanh x": tanh(x), "ten additions": ten_additions(x)}.items():
        print(f"    {name:14} {kept_bytes(z):7,.0f} bytes")
    before = step08_second.tensor(data)
    print(f"    ten additions  {kept_bytes(ten_additions(before)):7,.0f} bytes with the engine of step 8")

    z = sum(tanh(x))
    z.backward()
    print(f"    after backward {kept_bytes(z):7,.0f} bytes")
    try:
        z.backward()
    except RuntimeError as error:
        print(f"once more: {error}")
    with no_grad():
        print(f"inside no_grad the node of tanh x is {tanh(x).node}")


if __name__ == "__main__":
    main()
