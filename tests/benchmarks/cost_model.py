"""What a training step costs on P ranks: computing, and the sending that computing does not hide.

    python tests/benchmarks/cost_model.py                     measure one and two ranks, and print the tables of
                                                              docs/scaling.md (needs mpi4py and an mpiexec)
    python tests/benchmarks/cost_model.py --from FILE.json    the tables of an earlier run, kept with --out FILE.json

    t(P) = microbatches of a rank * microbatch + (microbatches - 1) * sum + allreduce(P) not hidden + update

Every constant is measured apart from the step that it predicts (cost_measure.py), and none is fitted to it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


# ---------------------------------------------------------------- the arithmetic


@dataclass(frozen=True)
class Network:
    """latency: seconds of an empty message. bandwidth: bytes/s that a rank sends while it receives as many. adding:
    bytes/s at which it adds what it receives to its own."""

    name: str
    latency: float
    bandwidth: float
    adding: float = math.inf


def ring(size: float, ranks: int, net: Network) -> float:
    """Seconds of an allreduce of `size` bytes: P - 1 messages of size / P, each added to the next, and P - 1 to tell
    everyone."""
    hops, part = ranks - 1, size / ranks
    return 2 * hops * (net.latency + part / net.bandwidth) + hops * part / net.adding


def doubling(size: float, ranks: int, net: Network) -> float:
    """In each of log2 P rounds two ranks swap and add everything that they have."""
    return math.ceil(math.log2(ranks)) * (net.latency + size / net.bandwidth + size / net.adding)


def halving(size: float, ranks: int, net: Network) -> float:
    """In log2 P rounds they swap and add a half, a quarter, ..., and in as many rounds they tell each other. P must be
    a power of two. (Thakur, Rabenseifner and Gropp 2005 compare the three.)"""
    share = size * (ranks - 1) / ranks
    return 2 * (math.log2(ranks) * net.latency + share / net.bandwidth) + share / net.adding


def allreduce(size: float, ranks: int, net: Network) -> float:
    """The quickest of the three."""
    if ranks == 1:
        return 0.0
    ways = (ring, doubling, halving) if ranks & (ranks - 1) == 0 else (ring, doubling)
    return min(way(size, ranks, net) for way in ways)


def hierarchical(size: float, ranks: int, within: int, inside: Network, outside: Network) -> float:
    """Sum a share of the bytes in each of the `within` ranks of a machine, then every share over the machines, then
    tell each other: `outside` is what a rank has of the network between machines."""
    if ranks <= within:
        return allreduce(size, ranks, inside)
    return halving(size, within, inside) + allreduce(size / within, ranks // within, outside)


def exposed(bucket: float, backward: float, buckets: int) -> float:
    """What is left of the sending if the gradients go in so many buckets, of so many seconds each, one after the other
    while the backward pass goes on. The last is ready only at its end; one alone hides nothing."""
    return max(bucket, bucket * buckets - backward * (buckets - 1) / buckets)


def of_images(n: int, known: Sequence[tuple[int, float]]) -> float:
    """Seconds of n images: a line through the times of the smallest and of the largest number that was measured."""
    (a, at_a), (b, at_b) = known[0], known[-1]
    return at_a if a == b else at_a + (n - a) * (at_b - at_a) / (b - a)


def roofline(counted: Sequence[dict[str, Any]], flop_rate: float, byte_rate: float) -> float:
    """Seconds of ops that multiply at the one rate or move bytes at the other, whichever takes longer."""
    return sum(max(row["flop"] / flop_rate, row["moved"] / byte_rate) for row in counted)


@dataclass(frozen=True)
class Costs:
    """Of a net on one machine; seconds. forward and backward: [(images, seconds of a microbatch)]. sum: of the
    gradients of two microbatches; pack: of copying them into one piece for the network, and back."""

    forward: Sequence[tuple[int, float]]
    backward: Sequence[tuple[int, float]]
    largest: int  # images of a microbatch
    gradients: int  # bytes
    sum: float
    pack: float
    update: float

    def computing(self, images: int) -> float:
        """Seconds before anything is sent, of a rank with so many images of the batch."""
        parts = [self.largest] * (images // self.largest) + [images % self.largest] * (images % self.largest > 0)
        passes = sum(of_images(n, self.forward) + of_images(n, self.backward) for n in parts)
        return passes + self.sum * (len(parts) - 1)

    def step(self, batch: int, ranks: int, net: Network, buckets: int = 1, factor: float = 1.0) -> float:
        """Seconds of a step of the whole batch, with the images shared. buckets: as in exposed, during the backward
        pass of the last microbatch. factor: of the bytes that are sent, 1/2 for bf16."""
        images = -(-batch // ranks)
        last = images % self.largest or self.largest
        bucket = allreduce(factor * self.gradients / buckets, ranks, net)
        sent = exposed(bucket, of_images(last, self.backward), buckets)
        return self.computing(images) + (sent + self.pack if ranks > 1 else 0.0) + self.update


def efficiency(one: float, many: float, ranks: int, weak: bool) -> float:
    """Strong: of the same batch. weak: each rank has the batch that one rank had."""
    return one / many if weak else one / (ranks * many)


# ---------------------------------------------------------------- from measurements to costs


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def costs_of(ranks: Sequence[dict[str, Any]], name: str) -> Costs:
    """The costs of a net, means over the ranks that were measured at once. To the ops belong the random numbers, which
    are drawn outside of ops, and what the engine does between them."""
    nets, machines = [r["nets"][name] for r in ranks], [r["machine"] for r in ranks]
    engine, moved = mean([m["engine"] for m in machines]), mean([m["byte_rate"] for m in machines])
    size = 4 * nets[0]["parameters"]

    def line(*ways: str) -> list[tuple[int, float]]:
        found = []
        for i, first in enumerate(nets[0]["alone"]):
            times = [sum(net["alone"][i][way] for way in ways) for net in nets]
            found.append((first["images"], mean(times) + engine * first["calls"] / 2))
        return found

    # Packing reads and writes all gradients once, and so does unpacking.
    return Costs(
        line("forward", "draws"), line("backward"), nets[0]["sizes"][0], size,
        mean([n["sum"] for n in nets]), 4 * size / moved, mean([n["adam"] for n in nets]),
    )  # fmt: skip


def network_of(ranks: Sequence[dict[str, Any]]) -> Network:
    first = {key: mean([r["machine"][key] for r in ranks]) for key in ("latency", "bandwidth", "adding")}
    return Network("memory of this machine", **first)


def predicted(ranks: Sequence[dict[str, Any]], name: str) -> float:
    """Seconds of the step that was measured on these ranks."""
    costs, net = costs_of(ranks, name), ranks[0]["nets"][name]
    images = sum(net["sizes"])
    sent = allreduce(costs.gradients, len(ranks), network_of(ranks)) + costs.pack if len(ranks) > 1 else 0.0
    return costs.computing(images) + sent + costs.update


def sampled(ranks: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Seconds of an image for each evaluation of the net while it is sampled: by the sum of the ops, and measured."""
    found = ranks[0]["nets"][name]["sampling"]
    alone, measured = (
        found[seconds] / evaluations_of(name, found[steps]) / found["images"]
        for seconds, steps in (("seconds", "steps"), ("measured", "measured_steps"))
    )
    return alone, measured


def evaluations_of(name: str, steps: int) -> int:
    """Of the net, in ours.sampler. Euler-Maruyama has one a step, and one that takes out the last noise. Heun's method
    with so many noise levels above zero has two a step, and the step down to zero has one."""
    return 2 * steps - 1 if name == "quickstart" else steps + 1


# ---------------------------------------------------------------- machines that we have not, from public figures

INFINIBAND = "InfiniBand, 100 Gbit/s"
ETHERNET = "Ethernet, 10 Gbit/s"


def clusters(adding: float) -> dict[str, Network]:
    """A rank's share, of one rank for each network card."""
    return {
        INFINIBAND: Network(INFINIBAND, 2e-6, 12.5e9, adding),
        ETHERNET: Network(ETHERNET, 30e-6, 1.25e9, adding),
    }


PEAK, REACHED, MEMORY = 989.4e12, 0.4, 3.35e12  # H100 SXM: bf16 FLOP/s without sparsity, bytes/s; the part reached
NVLINK = Network("NVLink", 5e-6, 450e9)  # 900 GB/s, half of it each way
FAST = Network("400 Gbit/s a GPU", 10e-6, 50e9)
SLOW = Network("100 Gbit/s a machine of 8", 10e-6, 12.5e9 / 8)
CARD = {FAST.name: 50e9, SLOW.name: 12.5e9}  # bytes/s of one network card: one ring over all GPUs has no more
WITHIN = 8  # GPUs of a machine
RELEASED = {"parameters": 859_520_964, "batch": 2048}
EACH = 32  # images a GPU, where the batch grows with the ranks


def released_costs(forward: Sequence[dict[str, Any]], samples: int) -> tuple[float, float]:
    """Seconds of the forward and the backward pass of so many images on one H100: arrays of 16 bits where ours have 32,
    and a backward pass of twice the products and bytes."""
    rows = [{"flop": r["flop"] * samples, "moved": r["moved"] * samples / 2} for r in forward]
    seconds = roofline(rows, PEAK * REACHED, MEMORY)
    return seconds, 2 * seconds


def released_step(
    forward: Sequence[dict[str, Any]], samples: int, ranks: int, outside: Network,
    *, flat: bool = False, buckets: int = 1, width: int = 4, zero: bool = False,
) -> float:  # fmt: skip
    """Seconds of a step with so many images a GPU. flat: one ring over all GPUs, which enters and leaves a machine by
    one network card. width: bytes of a gradient. zero: each rank updates its slice of all parameters (ZeRO 1); as they
    are gathered after the update, in float32, nothing hides that."""
    there, back = released_costs(forward, samples)
    size = width * RELEASED["parameters"] / buckets
    if ranks == 1:
        bucket = 0.0
    elif flat and ranks > WITHIN:
        bucket = ring(size, ranks, replace(outside, bandwidth=CARD[outside.name]))
    else:
        bucket = hierarchical(size, ranks, WITHIN, NVLINK, outside)
    update = 7 * 4 * RELEASED["parameters"] / MEMORY / (ranks if zero else 1)  # Adam reads four arrays, writes three
    gather = 0.0
    if zero:  # a sum is both: each rank gets its slice of it, and then all get all slices
        bucket, gather = bucket / 2, hierarchical(4 * RELEASED["parameters"], ranks, WITHIN, NVLINK, outside) / 2
    return there + back + exposed(bucket, back, buckets) + update + gather


def count_released() -> list[dict[str, Any]]:
    """Products and bytes of one evaluation of the released U-Net, 64x64 latents, batch 1."""
    import stable_diffusion

    from tinydiff import Tensor, no_grad
    from tinydiff.models.stable_diffusion.unet import UNet
    from tinydiff.nn import Unfilled
    from tinydiff.profile import profile

    net: Any = UNet(rng=Unfilled()).eval()
    for p in net.parameters():
        p.data = stable_diffusion.values(p.shape)
    assert sum(p.size for p in net.parameters()) == RELEASED["parameters"]
    x, words = stable_diffusion.values((1, 64, 64, 4)), Tensor(stable_diffusion.values((1, 77, 768)))
    steps = stable_diffusion.np.full(1, 500.0)
    report = profile(no_grad()(lambda: net(Tensor(x), steps, words)), show=False)
    return [{"op": r.op, "flop": r.flop or 0, "moved": r.moved, "calls": r.calls} for r in report.rows]


# ---------------------------------------------------------------- the tables

RANKS = (1, 2, 8, 64, 1024)
NETS = {"concat": (256, 2048), "quickstart": (64, 64)}  # the batch that is measured, and that of the training
EVALUATIONS = {"concat": 501, "quickstart": 2 * 35}  # of the net for an image; guidance doubles them


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %"


def constants(found: dict[str, Any]) -> str:
    rows = []
    for count in ("1", "2"):
        m = {key: mean([r["machine"][key] for r in found[count]]) for key in found[count][0]["machine"]}
        net = network_of(found[count])
        sent = [f"{m['latency'] * 1e6:.1f}", f"{m['bandwidth'] / 1e9:.2f}", ms(m["allreduce"]),
                ms(allreduce(m["message"], 2, net))] if count == "2" else ["", "", "", ""]  # fmt: skip
        rows.append([count, f"{m['flop_rate'] / 1e9:.1f}", f"{m['byte_rate'] / 1e9:.1f}", f"{m['adding'] / 1e9:.1f}",
                     f"{m['engine'] * 1e6:.1f}", *sent])  # fmt: skip
    return table(["ranks at once", "GEMM, GFLOP/s", "copy, GB/s", "add, GB/s", "engine, us an op", "latency, us",
                  "swap, GB/s", "allreduce of 4 MiB, ms", "by the model"], rows)  # fmt: skip


def checks(found: dict[str, Any]) -> str:
    rows = []
    for name in NETS:
        for count in ("1", "2"):
            ranks = found[count]
            net, costs = ranks[0]["nets"][name], costs_of(ranks, name)
            machine = {k: mean([r["machine"][k] for r in ranks]) for k in ("flop_rate", "byte_rate")}
            bound = roofline(net["counted"], **machine) * len(net["sizes"])
            ours, measured = predicted(ranks, name), max(r["nets"][name]["measured"] for r in ranks)
            sent = allreduce(costs.gradients, len(ranks), network_of(ranks)) + costs.pack if len(ranks) > 1 else 0
            rows.append([name, count, str(net["batch"]), ms(bound), ms(costs.computing(sum(net["sizes"]))), ms(sent),
                         ms(costs.update), ms(ours), ms(measured), error(ours, measured)])  # fmt: skip
    return table(["net", "ranks", "batch", "roofline, ms", "microbatches", "sending", "update", "predicted, ms",
                  "measured, ms", "error"], rows)  # fmt: skip


def counts(found: dict[str, Any]) -> str:
    rows = []
    for name in NETS:
        net = found["1"][0]["nets"][name]
        flop, moved, calls = (sum(r[key] for r in net["counted"]) for key in ("flop", "moved", "calls"))
        n = net["sizes"][0]
        rows.append([name, f"{net['parameters']:,}", f"{calls}", f"{flop / n / 1e6:.1f}", f"{moved / n / 1e6:.2f}"])
    return table(["net", "parameters", "calls", "MFLOP an image", "MB an image"], rows)


def scaling(found: dict[str, Any]) -> str:
    rows = []
    adding = mean([r["machine"]["adding"] for r in found["2"]])
    for name, (_, batch) in NETS.items():
        costs = costs_of(found["2"], name)
        for net in clusters(adding).values():
            for weak in (False, True):
                one = costs.step(batch, 1, net)
                cells = []
                for ranks in RANKS[1:]:
                    if not weak and batch < ranks:
                        cells.append(f"{batch} images at most")
                        continue
                    many = costs.step(batch * ranks if weak else batch, ranks, net)
                    cells.append(f"{ms(many)} ({efficiency(one, many, ranks, weak):.0%})")
                kind = f"{batch} a rank" if weak else f"{batch} in all"
                rows.append([name, net.name, kind, ms(one), *cells])
    return table(["net", "network", "batch", "1 rank, ms", *(f"{r:,}" for r in RANKS[1:])], rows)


def last_good(times: Sequence[tuple[int, float]], weak: bool) -> str:
    """The largest number of ranks, among powers of two, whose efficiency is one half or more."""
    one = times[0][1]
    good = [ranks for ranks, many in times if efficiency(one, many, ranks, weak) >= 0.5]
    return f"{good[-1]:,}" if good[-1] < times[-1][0] else f"all {good[-1]:,}"


def changes(found: dict[str, Any]) -> str:
    rows = []
    adding = mean([r["machine"]["adding"] for r in found["2"]])
    for name, (_, batch) in NETS.items():
        costs = costs_of(found["2"], name)
        for net in clusters(adding).values():
            cells = []
            for many, factor in ((1, 1.0), (1, 0.5), (8, 1.0)):
                whole = batch * many
                powers = [2**k for k in range(int(math.log2(whole)) + 1)]
                cells.append(last_good([(p, costs.step(whole, p, net, factor=factor)) for p in powers], False))
            rows.append([name, net.name, str(batch), *cells])
    return table(["net", "network", "batch", "as it is", "bf16 gradients", "8 times the batch"], rows)


BUCKETS = 8  # of a large net: overlap.MOST
WAYS: dict[str, dict[str, Any]] = {
    "one ring": {"flat": True},
    "sums within machines first": {},
    f"and in {BUCKETS} buckets, overlapped": {"buckets": BUCKETS},
    "and bf16 gradients": {"buckets": BUCKETS, "width": 2},
    "and ZeRO 1, by slices": {"buckets": BUCKETS, "width": 2, "zero": True},
}


def released(forward: Sequence[dict[str, Any]]) -> str:
    rows = []
    for outside in (FAST, SLOW):
        for label, way in WAYS.items():
            cells = []
            one = released_step(forward, RELEASED["batch"], 1, outside)
            for ranks in RANKS[2:]:
                many = released_step(forward, RELEASED["batch"] // ranks, ranks, outside, **way)
                cells.append(f"{ms(many)} ({efficiency(one, many, ranks, False):.0%})")
            powers = [2**k for k in range(12)]
            good = [(p, released_step(forward, RELEASED["batch"] // p, p, outside, **way)) for p in powers]
            rows.append([outside.name, label, *cells, last_good([(1, one), *good[1:]], False)])
        one = released_step(forward, EACH, 1, outside)
        times = [(p, released_step(forward, EACH, p, outside)) for p in powers]
        cells = [f"{ms(many)} ({efficiency(one, many, p, True):.0%})" for p, many in times if p in RANKS[2:]]
        rows.append([outside.name, f"{EACH} images a GPU, sums within machines first", *cells, last_good(times, True)])
    return table(["network", "sums", *(f"{r:,}, ms" for r in RANKS[2:]), "one half up to"], rows)


def million(found: dict[str, Any]) -> str:
    rows = []
    for name, evaluations in EVALUATIONS.items():
        alone, measured = sampled(found["1"], name)
        hours = 1e6 * evaluations * alone / 3600
        rows.append([name, str(evaluations), ms(alone), ms(measured), error(alone, measured), f"{hours:,.0f}",
                     f"{hours / 1024 * 60:.1f}"])  # fmt: skip
    return table(["net", "evaluations an image", "one, predicted, ms", "measured", "error", "core-hours a million",
                  "minutes on 1,024 cores"], rows)  # fmt: skip


def released_million(found: dict[str, Any]) -> str:
    machine = found["1"][0]["machine"]
    here = roofline(found["released"], machine["flop_rate"], machine["byte_rate"])
    there = released_costs(found["released"], 1)[0]
    evaluations = 2 * 50  # 50 steps, guided
    rows = [[where, f"{one:.4g}", f"{1e6 * evaluations * one / 3600:,.0f}"]
            for where, one in (("a core of this machine", here), ("an H100", there))]  # fmt: skip
    return table(["on", "one evaluation, s (roofline)", "hours a million"], rows)


def figure(found: dict[str, Any], path: str) -> None:
    """Efficiency over ranks, with the batch fixed."""
    from matplotlib.figure import Figure

    from tinydiff.plot import BLUE, FAINT, INK, RED

    picture = Figure(figsize=(7, 3.6), layout="constrained")
    axes = picture.add_subplot()
    adding = mean([r["machine"]["adding"] for r in found["2"]])
    lines: list[tuple[str, str, str, list[tuple[int, float]]]] = []
    batch = NETS["concat"][1]
    costs = costs_of(found["2"], "concat")
    for style, net in zip(("-", "--"), clusters(adding).values()):
        times = [(2**k, costs.step(batch, 2**k, net)) for k in range(12)]
        lines.append((f"concat net, {net.name}", BLUE, style, times))
    for style, outside in zip(("-", "--"), (FAST, SLOW)):
        times = [(p, released_step(found["released"], RELEASED["batch"] // p, p, outside)) for p, _ in times]
        lines.append((f"Stable Diffusion 1.5, {outside.name}", RED, style, times))
    for label, colour, style, times in lines:
        one = times[0][1]
        axes.plot([p for p, _ in times], [efficiency(one, t, p, False) for p, t in times], style, c=colour, label=label)
    axes.axhline(0.5, color=FAINT, lw=0.8)
    axes.text(1, 0.51, "half of the ranks' time is lost", color=FAINT, fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**k for k in range(0, 12, 2)], [f"{2**k:,}" for k in range(0, 12, 2)])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("ranks, which share a batch of 2,048 images", color=INK)
    axes.set_ylabel("efficiency", color=INK)
    axes.legend(frameon=False, fontsize=8)
    picture.savefig(path, dpi=150)


def measure() -> dict[str, Any]:
    """The JSON of cost_measure.py for one and two ranks, and the counts of the released net."""
    found: dict[str, Any] = {}
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    nets = [f"{name}:{batch}" for name, (batch, _) in NETS.items()]
    for count in ("1", "2"):
        command = ["mpiexec", "-n", count, sys.executable, str(HERE / "cost_measure.py"), *nets]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        found[count] = json.loads(done.stdout.splitlines()[-1])
    found["released"] = count_released()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="earlier", type=Path, metavar="FILE.json", help="do not measure: read this")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep what was measured")
    parser.add_argument("--figure", metavar="FILE.png", help="draw the efficiency over the ranks")
    args = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported, for the released net
    found = json.loads(args.earlier.read_text()) if args.earlier else measure()
    if args.out:
        args.out.write_text(json.dumps(found))
    for title, text in (("Counts", counts(found)), ("Constants", constants(found)), ("Checks", checks(found)),
                        ("Our nets", scaling(found)), ("Efficiency above one half up to", changes(found)),
                        ("Released", released(found["released"])), ("A million", million(found)),
                        ("A million of the released", released_million(found))):  # fmt: skip
        print(f"### {title}\n\n{text}\n")
    if args.figure:
        figure(found, args.figure)


if __name__ == "__main__":
    main()
