"""Step 5. Broadcasting, and the sum that undoes it.

NumPy adds a row b (3,) to each row of X (2, 3). So z = X + b uses every element of b twice, once for each row, and an
adjoint is the sum over all uses:

    z_ij = x_ij + b_j          x̄_ij = z̄_ij,     b̄_j = sum over i of z̄_ij

Without the sum, add's rule would give b an adjoint of the shape (2, 3). No rule need know: `unbroadcast` sums each
adjoint to the shape of its input, in one place, along the axes that broadcasting has stretched.

Its mirror image is `sum` along an axis, whose rule spreads. The axis is an option, not an input: inputs are positional
and have adjoints, options have names and have none.
"""

import itertools
import operator

import numpy as np

clock = itertools.count()


class Tensor:
    """An array, its gradient, and the Node that computed it; None for a leaf."""

    def __init__(self, data, node=None):
        self.data, self.grad, self.node = data, None, node

    def backward(self, grad=None):
        """Add d(self)/d(leaf), weighted with grad, to the `.grad` of every leaf. grad: 1 if it has one element."""
        for leaf, g in backward_pass(self, np.ones_like(self.data) if grad is None else grad):
            leaf.grad = g if leaf.grad is None else leaf.grad + g

    def __add__(self, y):
        return add(self, y)

    def __sub__(self, y):
        return subtract(self, y)

    def __rsub__(self, y):
        return subtract(y, self)

    def __mul__(self, y):
        return multiply(self, y)

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
    """A function of arrays with a rule. Called on Tensors it returns a Tensor, which remembers the call."""

    def __init__(self, forward):
        self.forward, self.name, self.rule = forward, forward.__name__, None

    def __call__(self, *inputs, **params):
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

    def pull_back(self, g):
        """The adjoint of each input, from that of the output."""
        found = self.op.rule(g, self.out, *self.values, **self.params)
        adjoints = found if type(found) is tuple else (found,)
        return [
            adjoint if parent is None else unbroadcast(adjoint, x)
            for adjoint, x, parent in zip(adjoints, self.values, self.parents)
        ]


def unbroadcast(adjoint, x):
    """The adjoint in the shape of its input: the sum of the adjoints of the copies that broadcasting has made."""
    shape, given = x.shape, adjoint.shape
    if given != shape:
        aligned = (1,) * (len(given) - len(shape)) + shape  # as broadcasting aligns it: at the last axis
        stretched = tuple(a for a, (m, n) in enumerate(zip(aligned, given)) if m != n)
        adjoint = adjoint.sum(axis=stretched).reshape(shape)
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
    return g * y, g * x


@op
def subtract(x, y):
    return x - y


@subtract.vjp
def subtract_vjp(g, _z, _x, _y):
    return g, -g


@op
def sum(x, *, axis=None, keepdims=False):
    return x.sum(axis=axis, keepdims=keepdims)


@sum.vjp
def sum_vjp(g, _z, x, *, axis=None, keepdims=False):
    return np.broadcast_to(g.reshape(x.sum(axis=axis, keepdims=True).shape), x.shape)


def mean(x, *, axis=None, keepdims=False):
    """It is written in other ops, and so needs no rule."""
    total = sum(x, axis=axis, keepdims=keepdims)
    return total * (total.data.size / x.data.size)


@op
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@softmax.vjp
def softmax_vjp(g, z, _x):
    return z * (g - (g * z).sum(axis=-1, keepdims=True))


# ---------------------------------------------------------------- the backward pass


def backward_pass(output, g):
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
        for parent, adjoint in zip(node.parents, node.pull_back(adjoints.pop(node))):
            if parent is not None:
                adjoints[parent] = adjoints[parent] + adjoint if parent in adjoints else adjoint
    return list(adjoints.items())  # those of the nodes are spent: these are the leaves'


def main():
    X, b = tensor([[1, 2, 3], [4, 5, 6]]), tensor([10, 20, 30])
    w = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    z = X + b  # (2, 3) + (3,) -> (2, 3)
    sum(z * w).backward()
    print("z̄ =", str(w).replace("\n", "\n    "))
    print(f"b̄ = {b.grad}, the sum over the rows")
    alone = add_vjp(w, None, X.data, b.data)[1]
    print(f"add's rule alone gives b an adjoint of shape {alone.shape}, and b is {b.data.shape}")

    column = tensor([[1], [2]])
    sum(column * b).backward()  # (2, 1) * (3,) -> (2, 3)
    print(f"(2, 1) * (3,): each element of the column has the adjoint 10 + 20 + 30: {column.grad.tolist()}")


if __name__ == "__main__":
    main()
