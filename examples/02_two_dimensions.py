"""Scores in the plane, and four losses that all learn the same score.

    python examples/02_two_dimensions.py                      two pictures and a table in a minute
    python examples/02_two_dimensions.py --steps 10000        closer

scores.png    the score of a mixture of two Gaussians at four times, exact and learned
samples.png   points of noise, their way back, and what they become, beside the data

The table has the distance of each of the four nets from the exact score. Explicit score matching uses the exact score.
Implicit and sliced score matching differentiate the learned score by its input, and then the loss by the weights, so
they also test second derivatives. Denoising score matching, the loss of every diffusion model, needs neither.
"""

from __future__ import annotations

import time

import common
import numpy as np

from tinydiff import Rng, Tensor, no_grad, plot
from tinydiff.backend import to_device, to_host, xp
from tinydiff.data import GaussianMixture
from tinydiff.diffusion import VESDE, sample, score_matching_loss
from tinydiff.diffusion.exact import Exact
from tinydiff.diffusion.loss import explicit_loss, implicit_loss, sliced_loss
from tinydiff.microbatch import blas_threads
from tinydiff.models.fourier import ScoreMLP
from tinydiff.optim import EMA, Adam, cosine, warmup

MIXTURE = GaussianMixture([0.5, 0.5], [[0, 1], [2, -1]], [[[1, 0], [0, 1]], [[2, 0.5], [0.5, 1]]])
EXACT = Exact(MIXTURE, VESDE(sigma=25.0))
TIMES = (0.05, 0.3, 0.6, 1.0)  # at which the scores are compared
WAYS = 5  # from noise to data that are drawn
SHADES = [(1 - 0.09 * i, 1 - 0.055 * i, 1 - 0.025 * i) for i in range(1, 8)]  # white to blue


def denoising(net, x0, rng):
    return score_matching_loss(net, x0, EXACT.process, rng)


def explicit(net, x0, rng):
    return explicit_loss(net, x0, EXACT.process, rng, score=EXACT.score)


def implicit(net, x0, rng):
    return implicit_loss(net, x0, EXACT.process, rng)


def sliced(net, x0, rng):
    return sliced_loss(net, x0, EXACT.process, rng)


def main() -> int:
    args = arguments()
    rng, began = Rng(args.seed), time.monotonic()
    print(f"| loss | {' | '.join(f't = {t:g}' for t in TIMES)} | all times | seconds |")
    print("|---" * (len(TIMES) + 3) + "|")
    nets = {}
    for loss in (explicit, denoising, implicit, sliced):
        start = time.monotonic()
        nets[loss] = learn(loss, args.steps, Rng(args.seed).child("learn"))  # the same weights and data for all
        took = time.monotonic() - start
        errors = [error(nets[loss], t, rng.child("points")) for t in (*TIMES, None)]
        print(f"| {loss.__name__} | {' | '.join(f'{e:.3f}' for e in errors)} | {took:.0f} |", flush=True)
    draw_scores(nets[denoising], args.out / "scores.png")
    draw_samples(nets[denoising], rng.child("samples"), args.out / "samples.png")
    print(f"scores.png and samples.png in {args.out} after {time.monotonic() - began:.0f} s")
    return 0


def learn(loss, steps, rng):
    net = ScoreMLP(EXACT.process.marginal_std, 2, rng=rng.child("weights"))
    optimizer, ema, schedule = Adam(net.parameters(), lr=1e-2), EMA(net, 0.998), warmup(100, cosine(steps))
    data, noise = rng.child("data"), rng.child("noise")
    for step in range(steps):
        optimizer.lr = 1e-2 * schedule(step)
        x0 = MIXTURE.sample(512, data)
        optimizer.zero_grad()
        # Some losses draw more than others; a source with its own step per training step gives all the same noise.
        value = loss(net, x0, Rng(noise.seed, stream=noise.stream, step=4 * step))
        value.backward()
        optimizer.step()
        ema.update()
    ema.copy_to(net)
    return net


@no_grad()
def at(net, x, t):
    """The net at points x (N, 2), all at the time t."""
    return to_host(net(Tensor(to_device(x)), Tensor(xp.full(len(x), t, "float32"))).data)


def error(net, t, rng):
    """sqrt(E |s (net - score)|^2 / E |s score|^2) over the noised data at a time, or over times uniform in (0, 1)."""
    top = bottom = 0.0
    for u in np.linspace(0.005, 0.995, 100) if t is None else [t]:
        x, s = EXACT.sample(2000, float(u), rng), EXACT.process.marginal_std(float(u))
        truth = to_host(EXACT.score(x, float(u)))
        top += (s * s * (at(net, x, u) - truth) ** 2).sum()
        bottom += (s * s * truth**2).sum()
    return (top / bottom) ** 0.5


# ---------------------------------------------------------------- the pictures


def draw_scores(net, path):
    """Arrows of the score over the density; above exact, below learned. All arrows in a column have the same scale."""
    figure = plot.new_figure(11, 6.0, dpi=100)
    grid = figure.add_gridspec(2, len(TIMES), hspace=0.2, wspace=0.2, left=0.06, right=0.99, top=0.89, bottom=0.09)
    title = "arrows: the score, in each column to one scale; blue: the density, the darker the higher"
    figure.suptitle(title, fontsize=10)
    for column, t in enumerate(TIMES):
        half = 3.2 + 2 * EXACT.process.marginal_std(t)  # of the window
        fine, coarse = window(half, 81), window(half * 0.92, 11)
        density = to_host(EXACT.density(to_device(fine), t)).reshape(81, 81)
        truth = to_host(EXACT.score(to_device(coarse), t))
        for row, (name, arrows) in enumerate((("exact", truth), ("learned", at(net, coarse.astype("float32"), t)))):
            axes = figure.add_subplot(grid[row, column])
            axes.contourf(density, np.linspace(0.02, 1, 8) * density.max(), extent=extent(half), colors=SHADES)
            # The longest exact arrow spans two squares of the grid.
            scale = np.linalg.norm(truth, axis=1).max() / (2 * half * 0.92 * 2 / 10)
            axes.quiver(*coarse.T, *arrows.T, angles="xy", scale_units="xy", scale=scale, width=0.006, color=plot.INK)
            axes.set_xlim(extent(half)[:2])
            axes.set_ylim(extent(half)[2:])
            axes.tick_params(labelbottom=row == 1, labelsize=8)
            plot.frame(axes, f"{name}, t = {t:g}", x="$x_1$" if row == 1 else "", y="$x_2$" if column == 0 else "")
    plot.save(figure, path)


def draw_samples(net, rng, path):
    """Noise, some paths from noise to data, the samples, and the data."""
    n, frames = 2000, []
    made = sample(net, (n, 2), EXACT.process, rng.child("noise"), method="euler_maruyama", steps=300,
                  callback=lambda *a: frames.append(a))  # fmt: skip
    ways = np.stack([to_host(x[:WAYS]) for _, _, x, _ in frames] + [to_host(made[:WAYS])])  # (302, 5, 2)
    data = to_host(MIXTURE.sample(n, rng.child("data")))
    figure = plot.new_figure(11, 3.5, dpi=100)
    panels = [
        ("noise, t = 1", to_host(frames[0][2]), 28),
        ("the way back of five", None, 17),
        ("what the noise becomes, t = 0", to_host(made), 6),
        ("the data", data, 6),
    ]
    for i, (title, points, half) in enumerate(panels):
        axes = figure.add_subplot(1, 4, i + 1)
        if points is None:
            for way, colour in enumerate(plot.COLOURS):
                axes.plot(*ways[:, way].T, color=colour, linewidth=0.9)
            start = axes.plot(*ways[0].T, "o", color=plot.INK, markersize=4, markerfacecolor="white")
            end = axes.plot(*ways[-1].T, "o", color=plot.INK, markersize=4)
        else:
            dots = axes.plot(*points.T, ".", color=plot.BLUE, markersize=1.5)
            density = to_host(EXACT.density(to_device(window(half, 121)), 1.0 if i == 0 else 0.0)).reshape(121, 121)
            levels = density.max() * np.array([0.02, 0.15, 0.5, 0.85])
            lines = axes.contour(density, levels=levels, extent=extent(half), colors=plot.RED, linewidths=0.9)
        axes.set_xlim(extent(half)[:2])
        axes.set_ylim(extent(half)[2:])
        axes.set_aspect("equal")
        plot.frame(axes, title, x="$x_1$", y="$x_2$" if i == 0 else "")
        axes.tick_params(labelsize=8)
    figure.set_layout_engine("tight", rect=(0, 0.08, 1, 1))
    figure.legend(
        [*dots, lines.legend_elements()[0][0], *start, *end],
        [f"{n:,} points", "exact density: 2, 15, 50 and 85 % of its maximum", "start, t = 1", "end, t = 0"],
        loc="lower center", ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip
    plot.save(figure, path)


def window(half, n):
    """n x n points of the square around (1, 0), row by row: (n n, 2)."""
    x, y = np.meshgrid(np.linspace(1 - half, 1 + half, n), np.linspace(-half, half, n))
    return np.stack([x.ravel(), y.ravel()], axis=1)


def extent(half):
    return 1 - half, 1 + half, -half, half


def arguments():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--steps", type=common.integer(1), default=4000, metavar="N", help="steps of training, for each loss")
    common.add_seed_and_out(parser, "02_two_dimensions", seed_help="of everything random")
    return common.parse(parser)


if __name__ == "__main__":
    with blas_threads(1):  # because all products are small here
        common.run(main)
