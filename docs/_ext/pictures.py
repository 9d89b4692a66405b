"""The pictures of docs/derivations: `python docs/_ext/pictures.py` writes docs/images/derivation_*.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tinydiff.plot import BLUE, FAINT, INK, RED, frame, new_figure, save

IMAGES = Path(__file__).parents[1] / "images"
POSITIVE, NEGATIVE = "#e08214", "#8073ac"  # orange and violet, as in the matrices


def matrix(axes: Any, a: Any, title: str, size: float | None = None, digits: int = 3, fontsize: int = 8) -> None:
    """A matrix in colours, violet below 0 and orange above, with its numbers."""
    a = np.atleast_2d(a)
    size = size or float(np.abs(a).max()) or 1.0
    axes.imshow(-a, cmap="PuOr", vmin=-1.6 * size, vmax=1.6 * size)
    for i, j in np.ndindex(*a.shape):
        text = f"{a[i, j]:.{digits}g}"
        axes.text(j, i, "0" if text == "-0" else text, ha="center", va="center", fontsize=fontsize,
                  color=FAINT if abs(a[i, j]) < 1e-12 else INK)  # fmt: skip
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])


def sheet(width: float, height: float, columns: int, ratios: Any = None) -> tuple[Any, list[Any]]:
    figure = new_figure(width, height, 110)
    grid = figure.add_gridspec(1, columns, width_ratios=ratios)
    return figure, [figure.add_subplot(grid[0, i]) for i in range(columns)]


def finish(figure: Any, name: str) -> None:
    figure.set_layout_engine("tight")
    save(figure, IMAGES / f"derivation_{name}.png")


def softmax() -> None:
    y = np.array([1.0, 2.0, 5.0]) / 8
    figure, axes = sheet(7.4, 2.8, 3)
    matrix(axes[0], np.diag(y), "diag(y): each by itself", 0.63)
    matrix(axes[1], -np.outer(y, y), "- y yᵀ: they share one sum", 0.63)
    matrix(axes[2], np.diag(y) - np.outer(y, y), "together: rows sum to 0", 0.63)
    finish(figure, "softmax")


def cross_entropy() -> None:
    p, y = np.array([0.125, 0.25, 0.625]), np.array([0.0, 1.0, 0.0])
    figure, axes = sheet(7.4, 2.4, 3)
    for a, values, title in zip(
        axes, (p, y, p - y), ("p: what the net said", "y: what is true", "p - y: the gradient")
    ):
        a.bar(range(3), values, color=[NEGATIVE if v < 0 else POSITIVE for v in values], width=0.6)
        a.axhline(0, color=FAINT, linewidth=0.8)
        a.set_ylim(-0.85, 1.05)
        frame(a, title, x="class")
        a.set_xticks(range(3))
    finish(figure, "cross_entropy")


def conv2d() -> None:
    from matplotlib.patches import Rectangle

    x = np.arange(1.0, 10.0).reshape(3, 3)
    w = np.array([[1.0, 2.0], [0.0, -1.0]])
    figure = new_figure(8.6, 2.5, 110)
    grid = figure.add_gridspec(1, 6, width_ratios=[1, 1, 1, 1, 0.12, 1.25])
    for k, (i, j) in enumerate(np.ndindex(2, 2)):
        axes = figure.add_subplot(grid[0, k])
        matrix(axes, x, f"y[{i}, {j}] = {np.sum(x[i : i + 2, j : j + 2] * w):g}", 40)
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 2, 2, fill=False, edgecolor=BLUE, linewidth=1.8))
        for u, v in np.ndindex(2, 2):
            axes.text(j + v + 0.37, i + u + 0.35, f"·{w[u, v]:g}", fontsize=6, color=BLUE, ha="right", va="bottom")
    scattered, g = np.zeros((3, 3)), np.array([[1.0, 10.0], [100.0, 1000.0]])
    for i, j in np.ndindex(2, 2):
        scattered[i : i + 2, j : j + 2] += g[i, j] * w
    matrix(figure.add_subplot(grid[0, 5]), scattered, "x̄ for ȳ = 1, 10, 100, 1000", 2000, 4)
    finish(figure, "conv2d")


def conv_transpose2d() -> None:
    w = np.array([[1.0, 2.0], [3.0, 4.0]])
    rows = []
    for i, j in np.ndindex(2, 2):
        a = np.zeros((3, 3))
        a[i : i + 2, j : j + 2] = w
        rows.append(a.reshape(9))
    C = np.stack(rows)
    figure, axes = sheet(7.6, 3.0, 2, [9, 4])
    matrix(axes[0], C, "C: from 3 x 3 to 2 x 2, each row gathers", 4)
    matrix(axes[1], C.T, "Cᵀ: back, each column scatters", 4)
    finish(figure, "conv_transpose2d")


def group_norm() -> None:
    x, h = np.array([1.0, 2.0, 6.0, 3.5, 0.5, 4.0]), np.array([1.0, 0.2, 1.4, 0.3, -0.4, 0.9])
    xhat = (x - x.mean()) / x.std()
    first = h - h.mean()
    second = first - xhat * (xhat * h).mean()
    figure, axes = sheet(8.4, 2.6, 4)
    shown = zip((xhat, h, first, second), ("xhat", "h = g w", "without its mean", "and its part along xhat"))
    for a, (values, title) in zip(axes, shown):
        a.bar(range(6), values, color=[NEGATIVE if v < 0 else POSITIVE for v in values], width=0.6)
        a.axhline(0, color=FAINT, linewidth=0.8)
        a.set_ylim(-1.6, 2)
        frame(a, title, x="element of the group")
        a.set_xticks(range(6))
    finish(figure, "group_norm")


def attention() -> None:
    rng = np.random.default_rng(4)
    q, k, v, g = rng.normal(size=(3, 4)), rng.normal(size=(5, 4)), rng.normal(size=(5, 2)), rng.normal(size=(3, 2))
    s = q @ k.T
    p = np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)
    p_bar = g @ v.T
    s_bar = p * (p_bar - (p * p_bar).sum(axis=1, keepdims=True))
    figure, axes = sheet(8.6, 2.3, 3)
    matrix(axes[0], p, "p: who looks where; rows sum to 1", digits=2, fontsize=7)
    matrix(axes[1], p_bar, "p̄ = ȳ vᵀ: where looking helps", digits=2, fontsize=7)
    matrix(axes[2], s_bar, "s̄ = p (p̄ - sum p p̄); rows sum to 0", digits=2, fontsize=7)
    finish(figure, "attention")


def score() -> None:
    rng = np.random.default_rng(0)
    data, sigma = np.array([-2.0, 0.5, 3.0]), 0.8
    x0, z = rng.choice(data, 100_000), rng.normal(size=100_000)
    x = x0 + sigma * z
    target = -z / sigma
    edges = np.linspace(-4, 5, 46)
    middle = (edges[1:] + edges[:-1]) / 2
    place = np.digitize(x, edges) - 1
    means = [target[place == i].mean() for i in range(45)]
    line = np.linspace(-4, 5, 300)
    normals = np.exp(-((line[:, None] - data) ** 2) / (2 * sigma**2))
    exact = (normals * (data - line[:, None])).sum(1) / normals.sum(1) / sigma**2
    figure, (axes,) = sheet(7.4, 3.2, 1)
    axes.scatter(x[:2500], target[:2500], s=2, color=FAINT, alpha=0.5, label="-z / σ of single pairs")
    axes.plot(middle, means, color=INK, marker="o", markersize=3, linewidth=1, label="their mean in windows")
    axes.plot(line, exact, color=RED, linewidth=1.5, label="the score")
    axes.set_ylim(-4, 4)
    axes.set_xlim(-4, 5)
    axes.legend(edgecolor="none", fontsize=8)
    frame(axes, "", x="x", y="direction back")
    finish(figure, "score")


if __name__ == "__main__":
    for draw in (softmax, cross_entropy, conv2d, conv_transpose2d, group_norm, attention, score):
        draw()
