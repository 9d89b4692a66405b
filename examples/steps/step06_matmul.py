"""Step 6. Matrix products, and a net that learns the sine.

    Z = X Y,   dZ = dX Y + X dY          X̄ = Z̄ Yᵀ,   Ȳ = Xᵀ Z̄

Check it by shapes: X (n, k), Y (k, m) and Z̄ (n, m) can be multiplied to something of the shape of X in one way only.
Why it is so: sum(Z̄ (dX Y)) = trace(Z̄ᵀ dX Y) = trace(Y Z̄ᵀ dX) = sum((Z̄ Yᵀ) dX).

A product is expensive, and in the first layer X is the data, whose gradient nobody wants. So a rule may hand back a
function in place of an adjoint; it is called only if that gradient is wanted.

With tanh, z̄ (1 - z^2), this is enough for a net: x -> tanh(x W + b) -> y. It learns by gradient descent, w -= lr w̄.
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
        wanted = [parent is not None for parent in self.parents]
        adjoints = [a() if want and callable(a) else a for a, want in zip(adjoints, wanted)]
        return [unbroadcast(a, x) if want else None for a, x, want in zip(adjoints, self.values, wanted)]


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
    return lambda: g * y, lambda: g * x


@op
def matmul(x, y):
    return x @ y


@matmul.vjp
def matmul_vjp(g, _z, x, y):
    return lambda: g @ y.T, lambda: x.T @ g


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


def new_net(hidden=16, seed=0):
    """W (1, hidden), b (hidden,), V (hidden, 1), c (1,)"""
    rng = np.random.default_rng(seed)
    W, V = rng.normal(size=(1, hidden)), rng.normal(size=(hidden, 1)) / hidden**0.5
    return [tensor(W), tensor(rng.normal(size=hidden)), tensor(V), tensor([0.0])]


def net(weights, x):
    W, b, V, c = weights
    return tanh(x @ W + b) @ V + c  # (n, 1) -> (n, hidden) -> (n, 1)


def loss_of(weights, x, y):
    error = net(weights, x) - y
    return mean(error * error)


def train(weights, x, y, steps, lr=0.1):
    """Returns the loss of each step."""
    losses = []
    for _ in range(steps):
        for w in weights:
            w.grad = None
        loss = loss_of(weights, x, y)
        loss.backward()
        for w in weights:
            w.data = w.data - lr * w.grad
        losses.append(float(loss.data))
    return losses


def main():
    x = np.linspace(-3, 3, 64)[:, None]
    weights = new_net()
    losses = train(weights, x, np.sin(x), 2001)
    for step in (0, 20, 200, 2000):
        print(f"step {step:4}   loss {losses[step]:.4f}")
    for a in (-2.0, -1.0, 0.5, 1.5):
        print(f"x = {a:4}   sin x = {np.sin(a):6.3f}   net(x) = {net(weights, np.array([[a]])).data.item():6.3f}")


if __name__ == "__main__":
    main()
