"""Step 4. Arrays, and a product with the Jacobian that never makes the Jacobian.

For z = f(x) on arrays, dz = J dx, where the Jacobian J has a row for each element of z and a column for each of x. The
final scalar changes by dL = z̄ · dz = z̄ · (J dx) = (Jᵀ z̄) · dx, so

    x̄ = Jᵀ z̄

A rule computes this vector-Jacobian product directly. Softmax, z = e^x / sum(e^x), shows why. Its differential is
dz = z dx - z sum(z dx), so J = diag(z) - z zᵀ has n^2 numbers, and the rule needs n:

    x̄ = z z̄ - z sum(z z̄) = z (z̄ - sum(z z̄))

The engine stays as it is; it only ever added adjoints and handed them on. What is new besides: `sum`, which makes a
scalar of an array, and plain numbers and arrays among the inputs, which are constants, with None in place of a parent.
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

    def __call__(self, *inputs):
        values = [x.data if isinstance(x, Tensor) else x for x in inputs]
        out = np.asarray(self.forward(*values))
        parents = [origin(x) for x in inputs]
        return Tensor(out, Node(self, parents, values, out))

    def vjp(self, rule):
        """Decorator: the rule (g, out, *inputs) -> one adjoint for each input."""
        self.rule = rule
        return rule


def op(forward):
    """Decorator: make a function an op."""
    return Op(forward)


class Node:
    """One call, out = op(*values). parents: for each input the node that made it, or itself if it is a leaf, or None.
    time: its number."""

    def __init__(self, op, parents, values, out):
        self.op, self.parents, self.values, self.out = op, parents, values, out
        self.time = next(clock)

    def pull_back(self, g):
        """The adjoint of each input, from that of the output."""
        return self.op.rule(g, self.out, *self.values)


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
def sum(x):
    return x.sum()


@sum.vjp
def sum_vjp(g, _z, x):
    return (g * np.ones_like(x),)


@op
def softmax(x):
    e = np.exp(x - x.max())  # a constant added to x changes nothing, and now nothing overflows
    return e / e.sum()


@softmax.vjp
def softmax_vjp(g, z, _x):
    return (z * (g - (g * z).sum()),)


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


def jacobian(f, x):
    """J of f at x: one row for each element of z, each a product of J's transpose with a unit vector."""
    rows = []
    for unit in np.eye(f(tensor(x)).data.size):
        leaf = tensor(x)
        f(leaf).backward(unit)
        rows.append(leaf.grad)
    return np.array(rows)


def main():
    np.set_printoptions(precision=3, suppress=True)
    x, z_adjoint = np.log([1.0, 2.0, 1.0]), np.array([4.0, 0.0, 0.0])
    leaf = tensor(x)
    z = softmax(leaf)
    sum(z * z_adjoint).backward()
    J = jacobian(softmax, x)
    print(f"x = log [1 2 1],   z = softmax(x) = {z.data},   z̄ = {z_adjoint}")
    print("J =", str(J).replace("\n", "\n    "))
    print(f"Jᵀ z̄     = {J.T @ z_adjoint}")
    print(f"the rule = {leaf.grad}")
    n = 1000
    print(f"for n = {n}, J has {n * n:,} numbers, and the rule works with {n:,}")


if __name__ == "__main__":
    main()
