"""What cost_model.py needs to know of a machine and of our nets, measured on each of several ranks at once.

    mpiexec -n 2 python tests/benchmarks/cost_measure.py concat:256 quickstart:64        prints JSON

Each rank keeps to one core. Every call of an op in one microbatch is recorded, forward and backward, and then run
alone, many times; the sums of these times are what the model adds up. The step that the model is to predict is measured
in the same process, in turns with its parts, so a slow minute of the machine is slow for both. Of all rounds the
fastest counts: other work on the machine can only add to a time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ours

from tinydiff import Rng, grad, ops, optim, tensor
from tinydiff.backend import to_device
from tinydiff.distributed import connected
from tinydiff.engine import Node, Op
from tinydiff.microbatch import gradients, microbatches, size_for_ranks
from tinydiff.observers import Observer, observing
from tinydiff.profile import machine_rates, profile

ROUNDS, SHORTEST = 5, 0.002  # seconds that a call is repeated for, in each round
MESSAGE = 2**22  # bytes, about the gradients of the concat net
PIXELS = 28 * 28


class Calls(Observer):
    """Every call of an op and of a rule, ready to be run again: [(forward or backward, function)]."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Callable[[], Any]]] = []
        self.within = False  # a rule calls ops, which are part of it

    def on_call(self, run: Callable[..., Any], op: Any, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        again = partial(Op.apply, op, inputs, params)
        return self._outermost("forward", partial(run, op, inputs, params), again)

    def on_rule(self, run: Callable[..., Any], node: Any, g: Any, wanted: Any, create_graph: bool) -> Any:
        node.time = sys.maxsize  # the optimiser changes the parameters between the runs, and here that is no error
        again = partial(Node.pull_back, node, g, tuple(wanted), create_graph)
        return self._outermost("backward", partial(run, node, g, wanted, create_graph), again)

    def _outermost(self, way: str, now: Callable[[], Any], again: Callable[[], Any]) -> Any:
        if self.within:
            return now()
        self.within = True
        try:
            result = now()
        finally:
            self.within = False
        self.found.append((way, again))
        return result


def seconds(run: Callable[[], Any]) -> float:
    """Of one run, the mean over as many as take SHORTEST."""
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < SHORTEST or not count:
        run()
        count += 1
    return passed / count


class Parts:
    """Things that are timed alone, once a round; a time is that of the fastest round."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, Callable[[], Any], list[float]]] = []

    def add(self, key: Any, run: Callable[[], Any]) -> None:
        self.runs.append((key, run, []))

    def measure(self) -> None:
        for _, run, times in self.runs:
            times.append(seconds(run))

    def total(self, key: Any) -> float:
        return sum(min(times) for name, _, times in self.runs if name == key)

    def count(self, key: Any) -> int:
        return sum(name == key for name, *_ in self.runs)


class Net:
    """One of our nets (ours.py): its parts, and its whole step."""

    def __init__(self, name: str, batch: int, ranks: Any):
        self.name, self.ranks = name, ranks
        net, self.parts = ours.net_of(name), Parts()
        self.loss, self.adam = ours.loss_of(name, net), optim.Adam(net.parameters(), lr=1e-3)
        self.batch = [to_device(a) for a in ours.batch_of(name, batch)]
        self.numbers = sum(p.size for p in self.adam.parameters)
        size = size_for_ranks(batch, PIXELS, ranks)
        mine = microbatches(batch, size)[ranks.rank :: ranks.size]
        self.sizes = [part.stop - part.start for part in mine]
        self.times: list[float] = []
        self.step()  # from now on the C library keeps freed memory (fast/threads.py)
        for n in sorted({1, self.sizes[0]}):
            self._record(n)
        self.counted = profile(lambda: self._gradients(self.sizes[0]), show=False).rows
        update = ours.adam_step(name)
        found = [np.ones(p.shape, "float32") for p in self.adam.parameters]
        more = [np.zeros(p.shape, "float32") for p in self.adam.parameters]
        self.parts.add("adam", update)
        self.parts.add("sum of gradients", lambda: [np.add(a, b, out=a) for a, b in zip(more, found)])
        self.sampled, self.steps = 64, 2
        method = "heun" if name == "quickstart" else "euler_maruyama"
        calls = Calls()
        with observing(calls):
            ours.sampler(method, self.sampled, self.steps, 1)()
        for _, run in calls.found:
            self.parts.add("sampling", run)
        self.whole_sampler, self.sample_times = ours.sampler(method, self.sampled, 10, 1), []

    def _mean(self, n: int) -> Any:
        return self.loss(*[a[:n] for a in self.batch], rng=Rng(0), sample_offset=0)

    def _gradients(self, n: int) -> Any:
        return grad(self._mean(n), self.adam.parameters, retain_graph=False)

    def _record(self, n: int) -> None:
        calls = Calls()
        with observing(calls):
            grad(self._mean(n), self.adam.parameters, retain_graph=True)
        for way, run in calls.found:
            self.parts.add((way, n), run)
        self.parts.add(("draws", n), lambda: Rng(0).normal((n, 28, 28, 1)))

    def step(self) -> None:
        self.ranks.gather(None)
        began = time.perf_counter()
        gradients(self.loss, self.adam.parameters, self.batch, Rng(0), None, 1, self.ranks)
        self.adam.step()
        self.times.append(time.perf_counter() - began)

    def round(self) -> None:
        self.parts.measure()
        for _ in range(3):
            self.step()
        began = time.perf_counter()
        self.whole_sampler()
        self.sample_times.append(time.perf_counter() - began)

    def found(self) -> dict[str, Any]:
        total = self.parts.total
        largest = self.sizes[0]
        return {
            "batch": len(self.batch[0]), "parameters": self.numbers, "sizes": self.sizes,
            "alone": [{"images": n, "calls": self.parts.count(("forward", n)) + self.parts.count(("backward", n)),
                       **{way: total((way, n)) for way in ("forward", "backward", "draws")}}
                      for n in sorted({1, largest})],
            "adam": total("adam"), "sum": total("sum of gradients"),
            "sampling": {"images": self.sampled, "steps": self.steps, "seconds": total("sampling"),
                         "measured": min(self.sample_times), "measured_steps": 10},
            "counted": [{"op": r.op, "flop": r.flop or 0, "moved": r.moved, "calls": r.calls + r.backward_calls}
                        for r in self.counted],
            "measured": min(self.times[1:]), "median": statistics.median(self.times[1:]),
        }  # fmt: skip


def overhead_parts() -> tuple[Parts, Callable[[], Any], int]:
    """A chain of tiny ops: what the engine needs for a node beyond the op and its rule is its time less its parts'."""
    x, w = (tensor(np.full(4, v, np.float32), requires_grad=True) for v in (1.0, 0.999))

    def chain(keep: bool) -> Any:
        y = x
        for _ in range(100):
            y = ops.multiply(y, w)
        return grad(y.sum(), (x, w), retain_graph=keep)

    calls, parts = Calls(), Parts()
    with observing(calls):
        chain(True)
    for _, run in calls.found:
        parts.add("chain", run)
    return parts, partial(chain, False), len(calls.found)


class Machine:
    """Rates of this core, and, with several ranks, of what is sent between them."""

    def __init__(self, ranks: Any):
        self.ranks, self.rates = ranks, []
        self.chain, self.whole_chain, self.calls = overhead_parts()
        self.chain_times: list[float] = []
        self.here, self.there, self.nothing = np.ones(MESSAGE, "u1"), np.ones(MESSAGE, "u1"), np.zeros(1, "u1")
        self.sum, self.more = np.ones(MESSAGE // 4, "f4"), np.ones(MESSAGE // 4, "f4")
        self.sent: list[tuple[float, float, float, float]] = []

    def round(self) -> None:
        self.rates.append(machine_rates(1))
        self.chain.measure()
        self.chain_times.append(seconds(self.whole_chain))
        added = seconds(lambda: np.add(self.sum, self.more, out=self.sum))
        if self.ranks.size > 1:
            comm, other = self.ranks.comm, self.ranks.rank ^ 1

            def swap(a: Any, b: Any) -> Any:
                return comm.Sendrecv(a, other, recvbuf=b, source=other)

            times = [
                together(self.ranks, run, count)
                for run, count in ((lambda: swap(self.nothing, self.nothing.copy()), 200),
                                   (lambda: swap(self.here, self.there), 10),
                                   (lambda: comm.Allreduce(self.sum.copy(), self.more), 10))
            ]  # fmt: skip
        else:
            times = [0.0, 0.0, 0.0]
        self.sent.append((added, *times))

    def found(self) -> dict[str, float]:
        flop, copied = (max(r[i] for r in self.rates) for i in (0, 1))
        added, latency, swapped, summed = (min(s[i] for s in self.sent) for i in range(4))
        engine = (min(self.chain_times) - self.chain.total("chain")) / self.calls
        return {
            "flop_rate": flop, "byte_rate": copied, "engine": max(engine, 0.0), "adding": MESSAGE / added,
            "latency": latency, "bandwidth": MESSAGE / (swapped - latency) if swapped else 0.0,
            "allreduce": summed, "message": MESSAGE,
        }  # fmt: skip


def together(ranks: Any, run: Callable[[], Any], count: int) -> float:
    """Seconds of a run that all ranks make at the same time."""
    run()
    ranks.gather(None)
    began = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - began) / count


def main() -> None:
    with connected("mpi") as ranks:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[ranks.rank % len(cores)]})
        machine = Machine(ranks)
        nets = [Net(name, int(batch), ranks) for name, batch in (text.split(":") for text in sys.argv[1:])]
        for _ in range(ROUNDS):
            ranks.gather(None)
            machine.round()
            for net in nets:
                net.round()
        mine = {"machine": machine.found(), "nets": {net.name: net.found() for net in nets}}
        everyone = ranks.gather(mine)
        if ranks.rank == 0:
            print(json.dumps(everyone))


if __name__ == "__main__":
    main()
