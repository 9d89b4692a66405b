"""Step 1. A number that remembers how it was made.

    L = x y + x,   at x = 2, y = 3

A program computes this in two operations, a = x y and L = a + x. How does L change when x and y change a little? One
line for each operation, in differentials:

    da = y dx + x dy,      dL = da + dx

The adjoint of a quantity, written with a bar, is the derivative of L by it: x̄ = dL/dx. To find the adjoints, read the
two lines backwards, from L, whose own adjoint is 1, to x and y:

    L̄ = 1,      from dL:  ā = L̄,  x̄ = L̄,      from da:  x̄ = L̄ + ā y = 4,  ȳ = ā x = 2

x is used twice, so its adjoint has two terms. For the reading backwards one must know which operations there were. So a
result remembers its operation and the inputs: that is a Node. Here the adjoints are still worked out by hand.
"""


class Tensor:
    """A number, and the Node that computed it; None for a leaf, a number that we chose."""

    def __init__(self, data, node=None):
        self.data, self.node = data, node

    def __add__(self, y):
        return add(self, y)

    def __mul__(self, y):
        return multiply(self, y)


class Node:
    """One operation: its name, and its inputs."""

    def __init__(self, op, parents):
        self.op, self.parents = op, parents


def add(x, y):
    return Tensor(x.data + y.data, Node("add", [x, y]))


def multiply(x, y):
    return Tensor(x.data * y.data, Node("multiply", [x, y]))


def history(x):
    """How x was made, as text."""
    if x.node is None:
        return str(x.data)
    return f"{x.node.op}({', '.join(history(parent) for parent in x.node.parents)})"


def by_hand(x, y):
    """x̄ and ȳ of L = x y + x."""
    L_adjoint = 1.0
    a_adjoint = L_adjoint  # L = a + x
    x_adjoint = L_adjoint
    x_adjoint = x_adjoint + a_adjoint * y  # a = x y, the other use of x
    y_adjoint = a_adjoint * x
    return x_adjoint, y_adjoint


def main():
    x, y = Tensor(2.0), Tensor(3.0)
    L = x * y + x
    print(f"L = {history(L)} = {L.data}")
    x_adjoint, y_adjoint = by_hand(2.0, 3.0)
    print(f"by hand:         x̄ = {x_adjoint}, ȳ = {y_adjoint}")

    def value(x, y):
        return (Tensor(x) * Tensor(y) + Tensor(x)).data

    h = 0.001
    by_x, by_y = (value(2.0 + h, 3.0) - L.data) / h, (value(2.0, 3.0 + h) - L.data) / h
    print(f"by small steps:  x̄ = {by_x:.3f}, ȳ = {by_y:.3f}      ({h} added to x, then to y)")


if __name__ == "__main__":
    main()
