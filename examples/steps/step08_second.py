"""Step 8. Rules that are themselves differentiable: derivatives of any order.

The rule of multiply, x̄ = z̄ y, is a product. If it is computed with the op `multiply`, on Tensors, it leaves a node like
any other product, and so the gradient can be differentiated again:

    L = x^3 at x = 2:      L = 8,   dL/dx = 3 x^2 = 12,   then 6 x = 12,   then 6,   then 0

So a rule has two modes. With `create_graph` it is given Tensors that know their history (`tensor_at`), and what it
computes is recorded; without, it is given arrays. For that it must use only operators and ops: where the last step
wrote g @ y.T, there is now matmul(g, transpose(y)), and `unbroadcast` sums with the op `sum`. An op on arrays alone
returns an array, and leaves no node.

`grad` returns gradients as Tensors, and changes no `.grad`. Without create_graph they have no history, so their own
gradient would be 0: wrong, without a word. (From the next step on that is an error.)
"""

import itertools
import math
import operator

import numpy as np

clock = itertools.count()


class Tensor:
    """An array, its gradient, and the Node that computed it; None for a leaf."""

    def __init__(self, data, node=None):
        self.data, self.grad, self.node = data, None, node

    @property
    def shape(self):
        return self.data.shape

    def backward(self, grad=None, create_graph=False):
        """Add d(self)/d(leaf), weighted with grad, to the `.grad` of every leaf. grad: 1 if it has one element.
        create_graph: record the pass itself, so that the gradients can be differentiated again."""
        for leaf, g in backward_pass(self, seed(self, grad, create_graph), create_graph):
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


def tensor(data):
    """A leaf with a copy of the data."""
    return Tensor(np.array(data, dtype=float))


def origin(x):
    """Its place in the graph: the node that made it, or, if it is a leaf, itself. A constant has no place."""
    if not isinstance(x, Tensor):
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
        return Tensor(out, Node(self, parents, values, params, out))

    def vjp(self, rule):
        """Decorator: the rule (g, out, *inputs, **params) -> one adjoint for each input."""
        self.rule = rule
        return rule


def op(forward):
    """Decorator: make a function an op."""
    return Op(forward)


class Node:
    """One call, out = op(*values, **params). parents: for each input the node that made it, or itself if it is a leaf,
    or None. time: its number."""

    def __init__(self, op, parents, values, params, out):
        self.op, self.parents, self.values, self.params, self.out = op, parents, values, params, out
        self.time = next(clock)

    def pull_back(self, g, create_graph):
        """The adjoint of each input, from that of the output."""
        out, values = self.out, self.values
        if create_graph:  # Tensors with their history: what the rule computes is recorded in turn
            out = Tensor(out, self)
            values = [tensor_at(parent, value) for parent, value in zip(self.parents, values)]
        found = self.op.rule(g, out, *values, **self.params)
        adjoints = found if type(found) is tuple else (found,)
        wanted = [parent is not None for parent in self.parents]
        adjoints = [a() if want and callable(a) else a for a, want in zip(adjoints, wanted)]
        return [unbroadcast(a, x) if want else None for a, x, want in zip(adjoints, self.values, wanted)]


def tensor_at(parent, value):
    """An input of a node as a Tensor with its history; a constant stays as it is."""
    return Tensor(value, parent) if isinstance(parent, Node) else value if parent is None else parent


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
def sum_vjp(g, _z, x, *, axis=None, keepdims=False):
    axes = range(len(x.shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    kept = [1 if a in [b % len(x.shape) for b in axes] else n for a, n in enumerate(x.shape)]
    return broadcast_to(reshape(g, shape=tuple(kept)), shape=x.shape)


def mean(x, *, axis=None, keepdims=False):
    """It is written in other ops, and so needs no rule."""
    total = sum(x, axis=axis, keepdims=keepdims)
    return total * (math.prod(total.shape) / math.prod(x.shape))


@op
def reshape(x, *, shape):
    return x.reshape(shape)


@reshape.vjp
def reshape_vjp(g, _z, x, *, shape):
    return reshape(g, shape=x.shape)


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


def backward_pass(output, g, create_graph):
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
    return list(adjoints.items())  # those of the nodes are spent: these are the leaves'


def seed(output, g, create_graph):
    """The adjoint at the output: what was given, or ones. With create_graph, as a Tensor."""
    g = np.ones_like(output.data) if g is None else g
    return as_tensor(g) if create_graph else g


def as_tensor(g):
    return g if isinstance(g, Tensor) else Tensor(np.asarray(g))


def grad(output, inputs, grad_output=None, create_graph=False):
    """d(output)/d(input), weighted with grad_output, for each of the inputs, which are leaves. 0 if there is none."""
    found = dict(backward_pass(output, seed(output, grad_output, create_graph), create_graph))
    return tuple(as_tensor(found[x]) if x in found else Tensor(np.zeros_like(x.data)) for x in inputs)


def derivatives(f, x, order):
    """f, f', f'' and so on at the number x."""
    x = tensor(x)
    values = [f(x)]
    for _ in range(order):
        values.append(grad(values[-1], [x], create_graph=True)[0])
    return [float(v.data) for v in values]


def hessian(f, *numbers):
    """The matrix of the second derivatives: the gradient of each element of the gradient."""
    leaves = [tensor(x) for x in numbers]
    gradient = grad(f(*leaves), leaves, create_graph=True)
    return [[float(h.data) for h in grad(g, leaves)] for g in gradient]


def main():
    print("x^3 at 2, and its derivatives:", derivatives(lambda x: x * x * x, 2.0, 4))
    print("tanh at 0, and its derivatives:", derivatives(tanh, 0.0, 5))
    print(
        "the second derivatives of x^2 y at (2, 3), [[2 y, 2 x], [2 x, 0]]:", hessian(lambda x, y: x * x * y, 2.0, 3.0)
    )
    x = tensor(2.0)
    first = grad(x * x * x, [x])[0]  # without create_graph
    print(f"without create_graph: dL/dx = {first.data}, and its derivative {grad(first, [x])[0].data}, not 12")


if __name__ == "__main__":
    main()
