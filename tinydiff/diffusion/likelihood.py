"""How probable an image is under a model: its log-density. Two estimates enter, and the errors of both are known.

Along the probability-flow ODE dx/dt = v(x, t) the density changes as volumes do. Let x(t_max) be the point to which the
ODE leads from x. Then

    ln p(x) = ln prior(x(t_max)) + integral over t of the divergence of v at x(t)          (Chen et al. 2018, theorem 1)

The divergence is the trace of dv/dx. One backward pass gives one row of dv/dx, or any combination of its rows. So the
trace costs D backward passes, or it is estimated as E[z . (dv/dx)^T z] for random signs z (Hutchinson 1989; Grathwohl
et al. 2019, "FFJORD"). Here p is the density at time eps, because the score cannot be learned at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..arguments import integer, number
from ..backend import Array, to_device, to_host, xp
from ..engine import Tensor, grad
from ..microbatch import over_microbatches
from ..modes import set_grad_enabled
from ..operators import array_of
from ..rng import Rng, as_rng
from .conditions import conditions
from .predict import as_score, checked_score, flow_velocity, rows_of
from .process import least_time, like, plain
from .runge_kutta import solve


def log_likelihood(
    model: Callable[..., Any],
    x: Any,
    process: Any,
    rng: Rng | int,
    *,
    probes: int = 1,
    exact: bool = False,
    eps: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int = 1000,
    sample_offset: int = 0,
    **condition: Any,
) -> Array:
    """ln p(x) in nats: x (N, ...) -> (N, probes). Each column uses another probe z; the mean of them is the estimate.

    model: score(x, t, **condition), differentiable, made of ops on its Tensors, or a Denoiser (see predict.py).
    exact: compute the divergence itself, by one backward pass per dimension: (N, 1), for small D. rng: one draw per
    probe, whose row i is that of sample `sample_offset + i`. rtol, atol, steps: of the ODE (runge_kutta.py), for each
    sample, in the mean over x and separately for the integral. No standard error contains the error of the ODE; to see
    it, call again with a tenth of the tolerance.
    Errors: ValueError for probes < 1, eps outside (0, t_max), a tolerance that is not below the noise at eps, a score
    of another shape; TypeError for an x that is not of floats, or a score without a gradient; RuntimeError if the
    tolerance cannot be met.
    Source: Song et al. 2021, section 4.3 and appendix D.2.
    """
    condition = conditions(log_likelihood, condition)
    x = to_device(array_of(x))
    if x.dtype.kind != "f" or x.ndim == 0:
        raise TypeError(f"log_likelihood: x must be (N, ...) of floats, not {x.dtype} of shape {x.shape}")
    process, probes = plain(process), integer("log_likelihood: probes", probes)
    eps = least_time("log_likelihood: eps", eps, process)
    rtol, atol = number("log_likelihood: rtol", rtol, "(0, inf)"), number("log_likelihood: atol", atol, "(0, inf)")
    noise, allowed = process.marginal_std(eps), atol + rtol * float(abs(to_host(x)).max(initial=0.0))
    if not allowed < noise:
        raise ValueError(
            f"log_likelihood: atol + rtol |x| must be below the noise at eps={eps:g}, {noise:.2g}, not {allowed:.2g} "
            f"(atol={atol:g}, rtol={rtol:g}), or the solver may step over details of the density"
        )
    shape, (n, d) = x.shape, (x.shape[0], math.prod(x.shape[1:]))
    if exact:
        groups = [[xp.broadcast_to(row, (n, d)) for row in xp.eye(d, dtype=x.dtype)]]  # one column, the sum of D terms
    else:
        rng = as_rng(rng)
        signs = [rng.integers(2, (n, d), sample_offset=sample_offset) * 2 - 1 for _ in range(probes)]
        groups = [[z.astype(x.dtype)] for z in signs]

    score = as_score(model, process)

    def derivative(state: Array, t: Array) -> Array:
        """Of x and of the integrals, side by side: (N, D + columns)."""
        with set_grad_enabled(True):
            here = Tensor(state[:, :d].reshape(shape), requires_grad=True)  # (N, D) -> (N, ...)
            s = score(here, Tensor(t), **condition)
            checked_score(s, here)
            velocity = flow_velocity(process, here, t, like(here, s))
        if not (isinstance(s, Tensor) and s.requires_grad):
            raise TypeError(
                "log_likelihood: the score has no gradient: it must be computed by ops, from the Tensor that it is "
                "given, and not under no_grad"
            )
        columns = [velocity.data.reshape(n, d)]  # (N, ...) -> (N, D)
        for group in groups:
            terms = [(z * grad(velocity, here, z.reshape(shape))[0].data.reshape(n, d)).sum(axis=1) for z in group]
            columns.append(sum(terms).reshape(n, 1))  # (N,) -> (N, 1)
        return xp.concatenate(columns, axis=1)  # (N, D), (N, 1), ... -> (N, D + columns)

    state = xp.concatenate([x.reshape(n, d), xp.zeros((n, len(groups)), x.dtype)], axis=1)  # (N, D + columns)
    *_, (_, state) = solve(derivative, state, eps, process.t_max, rtol=rtol, atol=atol, steps=steps, apart=len(groups))
    prior = process.prior_log_density(state[:, :d].reshape(shape))  # (N, D) -> (N, ...) -> (N,)
    return like(x, prior).reshape(n, 1) + state[:, d:]  # (N, 1) + (N, columns)


class Average(NamedTuple):
    """A mean over images and its standard error, for images and probes together. `probe_error` is the part of the
    probes: the standard error if these were all images. NaN where there is only one image, or one probe."""

    mean: float
    standard_error: float
    probe_error: float

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" +- {self.standard_error:.4f}"
        probes = "" if math.isnan(self.probe_error) else f" (of which probes {self.probe_error:.4f})"
        return f"{self.mean:.4f}{error}{probes}"


def average(estimates: Any) -> Average:
    """The mean of estimates (N, probes), as log_likelihood and bits_per_dimension return them, and its errors."""
    a = to_host(array_of(estimates)).astype(float)
    if a.ndim != 2 or a.size == 0:
        raise ValueError(f"average: estimates must be (N, probes), and not none, not {a.shape}")
    n, probes = a.shape
    of_images = a.mean(axis=1).std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    of_probes = math.sqrt(a.var(axis=1, ddof=1).mean() / (n * probes)) if probes > 1 else math.nan
    return Average(float(a.mean()), float(of_images), of_probes)


def bits_per_dimension(
    model: Callable[..., Any],
    images: Any,
    process: Any,
    rng: Rng | int,
    *,
    low: float = 0.0,
    high: float = 1.0,
    probes: int = 1,
    eps: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    microbatch: int = 64,
    threads: int | None = None,
    progress: Callable[[int, int, Average], Any] | None = None,
    **condition: Any,
) -> Any:
    """The code length of an image under this model, in bits per pixel and channel: images (N, ...) of uint8
    -> (N, probes) on the host. `average` gives the mean and its standard error.

        x = low + (high - low) (k + u) / 256,  u ~ U(0, 1)         bits = -log2 p(x) / D + 8 - log2(high - low)

    An image of bytes has a probability, but the model is a density. The mean of the density over the cell of an image,
    a cube of edge 1/256 (hence the 8 bits), is a probability; the mean of ln p is at most the logarithm of that mean.
    low, high: what the bytes 0 and 255 were in training, as in data.to_float; here each byte is a cell of the range.
    microbatch, threads: how many images at a time, and how many such parts at the same time (None: one per core); the
    estimates depend on them only by rounding. progress(done, N, average so far): called after each part.
    condition: what has one entry per image is split in the same way, as in `sample`.
    Errors: TypeError for images that are not of uint8, ValueError for none, or a high that is not above low; and those
    of log_likelihood.
    Source: Theis et al. 2016, "A note on the evaluation of generative models", section 3.1.
    """
    condition = conditions(bits_per_dimension, condition)
    images = array_of(images)
    if images.dtype != "uint8":
        raise TypeError(
            f"bits_per_dimension: images must be of bytes, uint8, not {images.dtype}: the figure is about integers"
        )
    if images.ndim < 2 or images.size == 0:
        raise ValueError(f"bits_per_dimension: images must be (N, ...), and not none, not {images.shape}")
    low, high = number("bits_per_dimension: low", low), number("bits_per_dimension: high", high)
    if not low < high:
        raise ValueError(f"bits_per_dimension: low must be less than high, not {low!r} and {high!r}")
    rng, probes = as_rng(rng), integer("bits_per_dimension: probes", probes)
    microbatch = integer("bits_per_dimension: microbatch", microbatch)
    n, d, state = len(images), math.prod(images.shape[1:]), rng.state()

    def part(rows: slice) -> Any:
        source = Rng(**state)
        k = to_device(images[rows]).astype("float32")
        x = low + (high - low) * (k + source.uniform(k.shape, sample_offset=rows.start)) / 256
        given = {name: rows_of(value, rows, n) for name, value in condition.items()}
        nats = log_likelihood(
            model, x, process, source, probes=probes, eps=eps, rtol=rtol, atol=atol, sample_offset=rows.start,
            condition=given,
        )  # fmt: skip
        return to_host(nats / (-d * math.log(2)) + (8 - math.log2(high - low)))

    parts: list[Any] = []
    for bits in over_microbatches(part, n, microbatch, threads):
        parts.extend(bits)
        if progress is not None:
            progress(len(parts), n, average(parts))
    rng.step += 1 + probes
    return to_host(parts)
