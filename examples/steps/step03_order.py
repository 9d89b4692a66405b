"""Step 3. From the newest node to the oldest: every rule is called once.

A node used twice gets an adjoint from each use, and must have their whole sum before it passes anything on. When has
it? All its uses are younger than it is, because an operation comes after its inputs. So number the nodes as they are
made, and go from the newest to the oldest: when a node's turn comes, all its uses have had theirs.

    x̄ = the sum, over all uses of x, of what the rules there hand to it

This is a topological order of the graph, and the clock gives it for nothing. The work is one rule for each node, and
no recursion: a chain may be longer than Python's stack is deep.

Parents are nodes now, or leaves. A Tensor is only how the program holds a result; the adjoints travel from node to
node. Nothing but a leaf gets a `grad`, and it adds up over calls of `backward`, as it would within one.
"""

import itertools
import operator

clock = itertools.count()


class Tensor:
    """A number, its gradient, and the Node that computed it; None for a leaf."""

    def __init__(self, data, node=None):
        self.data, self.grad, self.node = data, None, node

    def backward(self, grad=1.0):
        """Add d(self)/d(leaf), times grad, to the `.grad` of every leaf."""
        for leaf, g in backward_pass(self, grad):
            leaf.grad = g if leaf.grad is None else leaf.grad + g

    def __add__(self, y):
        return add(self, y)

    def __mul__(self, y):
        return multiply(self, y)


def origin(x):
    """Its place in the graph: the node that made it, or, if it is a leaf, itself."""
    return x if x.node is None else x.node


class Op:
    """A function of numbers with a rule. Called on Tensors it returns a Tensor, which remembers the call."""

    def __init__(self, forward):
        self.forward, self.name, self.rule = forward, forward.__name__, None

    def __call__(self, *inputs):
        values = [x.data for x in inputs]
        out = self.forward(*values)
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
    """One call, out = op(*values). parents: for each input the node that made it, or itself if it is a leaf.
    time: its number."""

    def __init__(self, op, parents, values, out):
        self.op, self.parents, self.values, self.out = op, parents, values, out
        self.time = next(clock)

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
            adjoints[parent] = adjoints[parent] + adjoint if parent in adjoints else adjoint
    return list(adjoints.items())  # those of the nodes are spent: these are the leaves'


def doublings(x, n):
    """2^n x"""
    for _ in range(n):
        x = x + x
    return x


def main():
    x, y = Tensor(2.0), Tensor(3.0)
    L = x * y + x
    L.backward()
    print(f"L = x y + x:     x̄ = {x.grad}, ȳ = {y.grad}")

    calls = []

    @add.vjp  # the same rule; it notes each call
    def counting_vjp(g, *rest):
        calls.append(g)
        return add_vjp(g, *rest)

    print("n doublings, whose gradient is 2^n:")
    for n in (2, 16, 1000):
        calls.clear()
        x = Tensor(1.0)
        doublings(x, n).backward()
        print(f"    n = {n:4}:    x̄ = {x.grad:.6g}, rules called: {len(calls)}, nodes: {n}")

    add.vjp(add_vjp)
    x, y = Tensor(1.0), Tensor(0.0)
    for _ in range(10_000):
        y = y + x
    y.backward()
    print(f"x added 10,000 times: x̄ = {x.grad:.0f}, without recursion")


if __name__ == "__main__":
    main()
