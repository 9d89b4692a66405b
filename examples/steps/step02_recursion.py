"""Step 2. The chain rule by recursion: right, but too slow for a graph. And a repair that makes it wrong.

Each operation now has a rule that turns the adjoint of its output into those of its inputs:

    z = x + y      x̄ = z̄,     ȳ = z̄
    z = x y        x̄ = z̄ y,   ȳ = z̄ x

An Op is the pair of the two, what is computed and the rule. In code g stands for z̄; a rule is given g, the output and
the inputs (those that it does not read have a leading underscore). To find all gradients, start at L with the adjoint
1, and let each node hand adjoints to its parents, which do the same.

This visits every *path* from L to a leaf. If a result is used twice, all that lies before it is visited twice. In a
chain of n doublings, y = y + y, there are 2^n paths. Real nets are full of such places: a residual block, x + f(x), is
one.

The repair that comes to mind is to pass on, not each share as it arrives, but all that has arrived so far: x.grad in
place of g. Then what arrived first is passed on again with the second visit, and the gradient is wrong: for two
doublings 6 instead of 4.
"""


class Tensor:
    """A number, its gradient, and the Node that computed it; None for a leaf."""

    def __init__(self, data, node=None):
        self.data, self.grad, self.node = data, 0.0, node

    def __add__(self, y):
        return add(self, y)

    def __mul__(self, y):
        return multiply(self, y)


class Op:
    """A function of numbers with a rule. Called on Tensors it returns a Tensor, which remembers the call."""

    def __init__(self, forward):
        self.forward, self.name, self.rule = forward, forward.__name__, None

    def __call__(self, *inputs):
        values = [x.data for x in inputs]
        out = self.forward(*values)
        return Tensor(out, Node(self, inputs, values, out))

    def vjp(self, rule):
        """Decorator: the rule (g, out, *inputs) -> one adjoint for each input."""
        self.rule = rule
        return rule


def op(forward):
    """Decorator: make a function an op."""
    return Op(forward)


class Node:
    """One call, out = op(*values). parents: the Tensors that the values came from."""

    def __init__(self, op, parents, values, out):
        self.op, self.parents, self.values, self.out = op, parents, values, out

    def pull_back(self, g):
        """The adjoint of each input, from that of the output."""
        return self.op.rule(g, self.out, *self.values)


# ---------------------------------------------------------------- two ops


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


# ---------------------------------------------------------------- the backward pass


def backward(x, g=1.0):
    """Add g to the gradient of x, and do the same for its parents. Returns how many rules were called."""
    x.grad += g
    calls = 0
    if x.node is not None:
        calls = 1
        for parent, adjoint in zip(x.node.parents, x.node.pull_back(g)):
            calls += backward(parent, adjoint)
    return calls


def wrong_backward(x, g=1.0):
    """The same, but each visit passes on all that has arrived so far."""
    x.grad += g
    if x.node is not None:
        for parent, adjoint in zip(x.node.parents, x.node.pull_back(x.grad)):  # x.grad, where it was g
            wrong_backward(parent, adjoint)


def doublings(x, n):
    """2^n x"""
    for _ in range(n):
        x = x + x
    return x


def main():
    x, y = Tensor(2.0), Tensor(3.0)
    L = x * y + x
    backward(L)
    print(f"L = x y + x:     x̄ = {x.grad}, ȳ = {y.grad}")

    x = Tensor(1.0)
    wrong_backward(doublings(x, 2))
    print(f"two doublings:   x̄ = 4, but {x.grad} when all that has arrived is passed on")

    print("n doublings, whose gradient is 2^n:")
    for n in (1, 2, 4, 8, 16):
        x = Tensor(1.0)
        calls = backward(doublings(x, n))
        print(f"    n = {n:2}:      x̄ = {x.grad:7.0f}, rules called: {calls:5}, nodes: {n}")


if __name__ == "__main__":
    main()
