"""Diffusion of a single number: add noise, and remove it again. Every answer is known exactly.

    python examples/01_one_dimension.py                       three pictures in a minute
    python examples/01_one_dimension.py --seed 1              other noise

point.png     a number that starts at 0 walks at random, and the reverse walk leads back to 0
mixture.png   the same for numbers of two kinds, with a noise strength that grows: the reverse walk makes data
learned.png   a tiny network learns the score of the two kinds from samples alone, beside the exact one
"""

from __future__ import annotations

import time

import common
import numpy as np

from tinydiff import Rng, Tensor, no_grad, plot
from tinydiff.backend import to_device, to_host, xp
from tinydiff.data import GaussianMixture
from tinydiff.diffusion import VESDE, Brownian, score_matching_loss
from tinydiff.diffusion.exact import Exact, forward_diffusion_1d, point_mass, reverse_diffusion_1d
from tinydiff.microbatch import blas_threads
from tinydiff.models.fourier import ScoreMLP
from tinydiff.optim import EMA, Adam, cosine, warmup

TIMES = (0.02, 0.1, 0.3, 1.0)  # at which the learned score is drawn
PALE = "#c9d8e6"  # histograms
WALKS = ("#002f4d", "#00568a", plot.BLUE, "#3d9bd4", "#7cc0ea")  # of one colour: the key has the middle one
SHADES = {"within two standard deviations": "#eef3f8", "within one": "#dbe7f2"}


def main() -> int:
    args = arguments()
    rng, began = Rng(args.seed), time.monotonic()

    # The tutorial's demonstration: noise of strength 1 for a time of 10, in 100 steps.
    exact = Exact(point_mass(0.0), Brownian(sigma=1.0, t_max=10.0))
    walks = walk(exact, args.walkers, steps=100, rng=rng.child("point"))
    draw_walks(walks, exact, args.out / "point.png", "a point", height=11)

    # Two kinds of numbers, and a noise strength of 10^t.
    exact = Exact(GaussianMixture([0.3, 0.7], [-2.0, 1.5], [0.25, 0.36]), VESDE(sigma=10.0))
    walks = walk(exact, args.walkers, steps=500, rng=rng.child("mixture"))
    draw_walks(walks, exact, args.out / "mixture.png", "two kinds of numbers", height=13)

    # The same with a learned score: the network has only seen samples.
    net = learn(exact, args.steps, rng.child("net"))
    start = exact.sample(args.walkers // 2, 1.0, rng.child("start"))
    _, path = reverse_diffusion_1d(
        start, exact.process.diffusion, score_of(net), t_max=1.0, steps=500, rng=rng.child("learned")
    )
    draw_learned(net, exact, path[-1], args.out / "learned.png")
    print(f"point.png, mixture.png and learned.png in {args.out} after {time.monotonic() - began:.0f} s")
    return 0


# ---------------------------------------------------------------- the mathematics


def walk(exact, n, steps, rng):
    """Forward from the data, and back from the exact distribution at t_max: (times, x (steps + 1, N)) of each."""
    sde, end = exact.process, exact.process.t_max
    x0 = exact.mixture.sample(n, rng.child("data"))
    forward = forward_diffusion_1d(x0, sde.diffusion, t_max=end, steps=steps, rng=rng.child("forward"))
    start = exact.sample(n, end, rng.child("start"))
    reverse = reverse_diffusion_1d(start, sde.diffusion, exact.score, t_max=end, steps=steps, rng=rng.child("reverse"))
    for name, (times, x) in (("forward", forward), ("reverse", reverse)):
        ends = ", ".join(f"t = {times[i]:g}: {to_host(x[i]).std():.3f}" for i in (0, -1))
        print(f"{name:8} {sde}, {steps} steps; standard deviation at {ends}")
    return forward, reverse


def learn(exact, steps, rng):
    """Denoising score matching: the loss uses the noise that was added to each sample, and not the density."""
    sde, began = exact.process, time.monotonic()
    net = ScoreMLP(sde.marginal_std, 1, rng=rng.child("weights"))
    optimizer, ema, schedule = Adam(net.parameters(), lr=5e-3), EMA(net, 0.998), warmup(100, cosine(steps))
    for step in range(steps):
        optimizer.lr = 5e-3 * schedule(step)
        x0 = exact.mixture.sample(512, rng).reshape((512, 1))
        noise = rng.copy()  # to measure another score with the same noise
        optimizer.zero_grad()
        loss = score_matching_loss(net, x0, sde, rng)
        loss.backward()
        optimizer.step()
        ema.update()
        if (step + 1) % 1000 == 0:
            best = score_matching_loss(exact.score, x0, sde, noise)
            print(f"step {step + 1}  loss {loss.item():.3f}, of the exact score {best.item():.3f}")
    ema.copy_to(net)
    print(f"the network learned in {time.monotonic() - began:.0f} s")
    return net


def score_of(net):
    """The network as a function score(x, t) of numbers x (N,) at one time t, as an array."""

    @no_grad()
    def score(x, t):
        times = xp.full(len(x), t, x.dtype)
        return net(Tensor(x.reshape((-1, 1))), Tensor(times)).data.reshape((-1,))

    return score


# ---------------------------------------------------------------- the pictures


def draw_walks(walks, exact, path, what, height):
    """Two rows, forward and reverse: the density at the start, five walks, the density at the end."""
    figure = plot.new_figure(9.5, 6.0)
    grid = figure.add_gridspec(
        2, 3, width_ratios=(1, 4, 1), wspace=0.06, hspace=0.5, left=0.07, right=0.98, top=0.94, bottom=0.17
    )
    titles = f"forward: from {what} to noise", f"reverse: from noise to {what}"
    for row, ((times, x), title) in enumerate(zip(walks, titles)):
        middle = figure.add_subplot(grid[row, 1])
        t, x = np.array(times), to_host(x)
        if not exact.mixture.variances.any():  # a point: one and two standard deviations around it
            spread = np.array([exact.process.marginal_std(float(u)) for u in t])
            for n, (name, shade) in zip((2, 1), SHADES.items()):
                middle.fill_between(t, -n * spread, n * spread, color=shade, linewidth=0, label=name)
        for i, colour in enumerate(WALKS):
            name = "five of the walks" if colour == plot.BLUE else ""
            middle.plot(t, x[:, i : i + 1], color=colour, linewidth=0.9, label=name)
        middle.set_xlim(t[0], t[-1])
        middle.set_ylim(-height, height)
        middle.tick_params(labelleft=False)
        plot.frame(middle, title, x="time t")
        for column, i in ((0, 0), (2, -1)):
            axes = figure.add_subplot(grid[row, column])
            draw_density(axes, x[i], exact, t, i)
            axes.set_ylim(-height, height)
            if column == 0:
                axes.invert_xaxis()
                axes.set_ylabel("x")
            else:
                axes.tick_params(labelleft=False)
    draw_key(figure)
    plot.save(figure, path)


def draw_key(figure):
    """What the lines and areas of all panels mean, once each, along the lower edge."""
    key = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels()):
            key.setdefault(name, handle)
    figure.legend(list(key.values()), list(key), loc="lower center", ncols=len(key), frameon=False, fontsize=9)


def draw_density(axes, x, exact, times, i):
    """A histogram lying on its side, and the exact density. That of a point at t = 0 cannot be drawn; the reverse walk
    ends with the noise of its last step, which is the density of the point one step away from 0."""
    t, span = float(times[i]), np.abs(x).max() * 1.3
    if np.ptp(x) == 0:
        axes.axhline(x[0], color=plot.RED, linewidth=1.5)
    else:
        at = t if exact.mixture.variances.all() or t > 0 else float(times[i - 1])
        grid = np.linspace(-span, span, 601)
        axes.hist(x, bins=np.linspace(-span, span, 81), density=True, orientation="horizontal", color=PALE,
                  label=f"all {len(x):,} walks")  # fmt: skip
        density = to_host(exact.density(to_device(grid), at))
        axes.plot(density, grid, color=plot.RED, linewidth=1.3, label="exact density")
        if at != t:
            axes.text(0.5, 0.7, "the noise of\nthe last step", transform=axes.transAxes, ha="center", fontsize=8)
    axes.set_xticks([])
    plot.frame(axes, f"t = {t:g}", x="density")
    axes.spines["bottom"].set_visible(False)


def draw_learned(net, exact, samples, path):
    """The score, learned and exact, where the data are at four times; and what the learned one makes of noise."""
    figure = plot.new_figure(12.5, 3.5)
    for i, t in enumerate(TIMES):
        axes = figure.add_subplot(1, 5, i + 1)
        x = np.linspace(-25, 25, 4001)
        density = to_host(exact.density(to_device(x), t))
        seen = density > 2e-3 * density.max()
        x, density = x[seen], density[seen]
        truth = to_host(exact.score(to_device(x), t))
        learned = to_host(score_of(net)(to_device(x.astype(np.float32)), t))
        low, high = truth.min() * 1.2, truth.max() * 1.2
        here = low + density / density.max() * (high - low) * 0.4
        axes.fill_between(x, low, here, color="#e3eaf1", label="density at that time, not to scale")
        axes.plot(x, truth, color=plot.RED, linewidth=1.4, label="exact")
        axes.plot(x, learned, color=plot.BLUE, linewidth=1.4, linestyle=(0, (4, 2)), label="learned")
        axes.set_ylim(low, high)
        plot.frame(axes, f"t = {t:g}", x="x", y="score" if i == 0 else "")
    axes = figure.add_subplot(1, 5, 5)
    x = np.linspace(-5, 5, 501)
    density = to_host(exact.density(to_device(x), 0.0))
    axes.hist(to_host(samples), bins=np.linspace(-5, 5, 81), density=True, color=PALE, label="made from noise")
    axes.plot(x, density, color=plot.RED, linewidth=1.4, label="exact")
    plot.frame(axes, "t = 0", x="x", y="density")
    figure.set_layout_engine("tight", w_pad=1.6, rect=(0, 0.09, 1, 1))
    draw_key(figure)
    plot.save(figure, path)


def arguments():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--walkers", type=common.integer(2), default=20_000, metavar="N", help="for the histograms; 5 are drawn")
    add("--steps", type=common.integer(1), default=6000, metavar="N", help="steps of training")
    common.add_seed_and_out(parser, "01_one_dimension", seed_help="of everything random")
    return common.parse(parser)


if __name__ == "__main__":
    with blas_threads(1):  # because all products are small here
        common.run(main)
