"""Gradients are summed over the ranks while the backward pass still computes the next ones.

    with connected("mpi", overlap=True) as ranks: ...            # or --overlap; train and gradients then do this

The backward pass goes from the last layer to the first. The gradient of a parameter is final when all ops that read it
have been gone through, and need not wait for the rest. So the parameters are taken in the reverse of their order, in
buckets of about distributed.BUCKET bytes, or, of a large net, of an eighth of all. A bucket is sent as soon as all its
gradients are final and those before it have been sent; what is left at the end of the pass, and the loss, come last. So
all ranks send the same buckets in the same order, whatever their graphs are like, and a rank without a microbatch too.

It happens in the last microbatch of a rank, where gradients are added to those of its others, if that one is alone at
work. Of B bytes of gradients, what is being sent takes another B. When it pays: docs/scaling.md.

Source: Li et al. 2020, "PyTorch distributed: experiences on accelerating data parallel training", section 3.2.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from . import distributed
from .backend import Array
from .engine import Node, Tensor
from .observers import Observer, observing

MOST = 8  # buckets, or a few more: each costs the latencies of a sum, and one in so many cannot be hidden


class Overlap(Observer):
    """The gradients of some parameters, summed over the ranks. One for each batch."""

    def __init__(self, parameters: Sequence[Tensor], ranks: distributed.Ranks):
        self.thread = threading.get_ident()
        self.parameters, self.ranks = parameters, ranks
        self.place = {p: i for i, p in enumerate(parameters)}
        last, size = len(parameters) - 1, sum(p._data.nbytes for p in parameters) // MOST
        buckets = distributed.buckets([p._data for p in reversed(parameters)], max(size, distributed.BUCKET))
        self.buckets = [[last - i for i in bucket] for bucket in buckets]
        self.sent: list[Callable[[], list[Array]]] = []  # of each bucket that is on its way: wait for its sums
        self.nodes: set[Node] = set()
        self.uses: Counter[int] = Counter()  # of each parameter: the ops that have not been gone through yet
        self.adjoints: dict[int, Array] = {}  # the sum over the uses so far
        self.final: dict[int, Array] = {}
        self.before: Sequence[Array] = ()

    def during(self, loss: Tensor, before: Sequence[Array]) -> Any:
        """Inside, a backward pass from the loss sends what is final. before: the sums of the microbatches before."""
        self.before = before
        stack = [loss.node]
        while stack:
            node = stack.pop()
            if node is not None and node not in self.nodes:
                self.nodes.add(node)
                stack += [parent for parent in node.parents if isinstance(parent, Node)]
                self.uses.update(self.place[x] for x in node.parents if isinstance(x, Tensor) and x in self.place)
        return observing(self)

    def on_rule(self, run: Callable[..., Any], node: Any, g: Any, wanted: Sequence[Any], create_graph: bool) -> Any:
        adjoints = run(node, g, wanted, create_graph)
        self.ranks.progress()
        if node in self.nodes:  # and not in the graph that a checkpoint makes anew inside its rule
            for x, adjoint in zip(node.parents, adjoints):
                if isinstance(x, Tensor) and x in self.place:
                    self._used(self.place[x], adjoint)
        return adjoints

    def _used(self, i: int, adjoint: Any) -> None:
        if adjoint is not None:
            self.adjoints[i] = self.adjoints[i] + adjoint if i in self.adjoints else adjoint
        self.uses[i] -= 1
        # A hook sees the gradient of the parameter at the end of the pass, and may change it.
        if self.uses[i] == 0 and i in self.adjoints and self.parameters[i].hooks is None:
            g = self.adjoints.pop(i)
            self.final[i] = self.before[i] + g if self.before else g
            while len(self.sent) < len(self.buckets) and all(k in self.final for k in self.buckets[len(self.sent)]):
                self._send([self.final.pop(k) for k in self.buckets[len(self.sent)]])

    def _send(self, arrays: list[Array]) -> None:
        self.sent.append(self.ranks.start_sum(arrays))

    def finish(self, sums: Sequence[Array], loss: Array) -> list[Array]:
        """The sum over the ranks for each parameter; that of the loss takes its place. sums: this rank's, of which
        those not sent yet are sent now."""
        for bucket in self.buckets[len(self.sent) :]:
            self._send([sums[k] for k in bucket])
        self.ranks.sum([loss])  # last, as on every rank: those that come before are the same, but not those sent early
        total = list(sums)
        for bucket, wait in zip(self.buckets, self.sent):
            for k, summed in zip(bucket, wait()):
                total[k] = summed
        return total
