"""Mixtures of Gaussians: data whose density and score are known exactly, at every time of a diffusion.

    mixture = GaussianMixture([0.3, 0.7], [-2.0, 1.0], [0.16, 0.09])           numbers: x (N,) or (N, 1)
    mixture = GaussianMixture([0.5, 0.5], [[0, 1], [2, -1]], [S1, S2])         points of the plane: x (N, 2)

If X is a mixture, then so is m X + s Z with Z ~ N(0, I): its means are m mu_k, its covariances m^2 S_k + s^2 I. Every
method takes m and s (`scale` and `std`; numbers, or (N,) with one value per sample), so a mixture is known at every
time of a diffusion (see diffusion.exact).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import backend, ops
from ..backend import Array
from ..operators import array_of
from ..rng import Rng, as_rng


class GaussianMixture:
    """p(x) = sum over k of w_k N(x; mu_k, S_k)

    weights (K,), positive, of sum 1. means (K,) for numbers, (K, D) for vectors. covariances (K, D, D), or variances
    (K,), the same in every direction; 0 is a point mass, which has a density only with noise.
    Errors: ValueError for other shapes, weights that are not positive or not of sum 1, numbers that are not finite, a
    covariance that is not symmetric or has a negative variance in some direction.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any):
        w, mu, cov = (np.asarray(backend.to_host(array_of(a)), np.float64) for a in (weights, means, covariances))
        if w.ndim != 1 or not (w > 0).all() or not abs(w.sum() - 1) < 1e-6:
            raise ValueError(f"GaussianMixture: weights must be positive and of sum 1, not {w.tolist()}")
        if mu.shape[:1] != w.shape or mu.ndim > 2:
            raise ValueError(f"GaussianMixture: means must be (K,) or (K, D) for K = {len(w)}, not {mu.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
            raise ValueError(
                f"GaussianMixture: means and covariances must be finite, not {mu.tolist()} and {cov.tolist()}"
            )
        self.shape = mu.shape[1:]  # of one sample
        mu = mu.reshape(len(w), -1)  # (K, D)
        d = mu.shape[1]
        if cov.shape == w.shape:
            cov = cov[:, None, None] * np.eye(d)  # (K,) -> (K, D, D)
        if cov.shape != (len(w), d, d) or not np.allclose(cov, cov.swapaxes(1, 2)):
            raise ValueError(
                f"GaussianMixture: covariances must be (K,), or (K, D, D) and symmetric, for K = {len(w)}, D = {d}, "
                f"not {cov.shape}: {cov.tolist()}"
            )
        # Along the eigenvectors of its covariance each Gaussian is a product of 1-D ones, and noise adds to variances.
        variances, directions = np.linalg.eigh(cov)  # (K, D) and (K, D, D), whose columns are the directions
        if not (variances > -1e-12).all():
            raise ValueError(f"GaussianMixture: a variance is negative: {cov.tolist()}")
        self.weights, self.means, self.directions = w, mu, directions
        self.variances = variances.clip(0)

    def sample(self, n: int, rng: Rng | int, *, scale: Any = 1.0, std: Any = 0.0, sample_offset: int = 0) -> Array:
        """n samples, float32, (n,) or (n, D) like the means. Row i is sample `sample_offset + i` of the seed."""
        rng = as_rng(rng)
        u = rng.uniform(n, sample_offset=sample_offset)
        edges = backend.to_device(self.weights.cumsum()[:-1], "float32")
        k = (u[:, None] >= edges).sum(axis=1)  # (n, K - 1) -> (n,)
        shape = (n, self.means.shape[1])
        spread = backend.to_device(self.directions * np.sqrt(self.variances)[:, None, :], "float32")  # (K, D, D)
        z = rng.normal(shape, sample_offset=sample_offset)
        x = self._array(self.means, z)[k] + (spread[k] * z[:, None, :]).sum(axis=2)  # (n, D)
        x = x * _column(scale) + rng.normal(shape, sample_offset=sample_offset) * _column(std)
        return x.reshape((n, *self.shape))  # (n, D) -> (n,) or (n, D)

    def log_density(self, x: Any, *, scale: Any = 1.0, std: Any = 0.0) -> Any:
        """ln p, in nats: x (N,) or (N, D) -> (N,)."""
        logs, _, _ = self._parts(x, scale, std)
        return ops.logsumexp(logs, axis=1)  # (N, K) -> (N,)

    def density(self, x: Any, *, scale: Any = 1.0, std: Any = 0.0) -> Any:
        """p: x (N,) or (N, D) -> (N,)."""
        return ops.exp(self.log_density(x, scale=scale, std=std))

    def score(self, x: Any, *, scale: Any = 1.0, std: Any = 0.0) -> Any:
        """The gradient of ln p by x, in the shape of x: the scores of the Gaussians, weighted with the probability that
        x comes from each.
        """
        logs, y, variances = self._parts(x, scale, std)
        likely = ops.expand_dims(ops.softmax(logs, axis=1), axis=2)  # (N, K, 1)
        pull = likely * y / variances
        return -ops.einsum("nke,kde->nd", pull, self._array(self.directions, x)).reshape(x.shape)

    def cdf(self, x: Any, *, scale: Any = 1.0, std: Any = 0.0) -> Any:
        """P(X <= x), for numbers: x (N,) or (N, 1) -> (N,). Errors: ValueError in more dimensions."""
        if self.means.shape[1] != 1:
            raise ValueError(f"GaussianMixture.cdf is for numbers, not for vectors of {self.means.shape[1]}")
        _, y, variances = self._parts(x, scale, std)
        below = (ops.erf(y / ops.sqrt(variances * 2)) + 1) / 2  # (N, K, 1)
        return (below * self._array(self.weights[:, None], x)).sum(axis=(1, 2))

    def _parts(self, x: Any, scale: Any, std: Any) -> tuple[Any, Any, Any]:
        """For each sample and Gaussian: ln w_k N(x; ...), (N, K); x less the mean, along the eigenvectors, (N, K, D);
        and the variances along them, (K, D) or (N, K, D).
        """
        n, d = x.shape[0] if x.ndim else 0, self.means.shape[1]
        if x.ndim == 0 or math.prod(x.shape[1:]) != d:
            raise ValueError(f"GaussianMixture: x must be (N, {d}){' or (N,)' if d == 1 else ''}, not {x.shape}")
        if isinstance(std, (int, float)) and std == 0 and not self.variances.all():
            raise ValueError("GaussianMixture: a point mass has no density without noise (std)")
        m, s = (a if isinstance(a, (int, float)) else a.reshape((-1, 1, 1)) for a in (scale, std))
        offset = x.reshape((n, 1, d)) - m * self._array(self.means, x)  # (N, K, D)
        y = ops.einsum("nkd,kde->nke", offset, self._array(self.directions, x))
        variances = self._array(self.variances, x) * (m * m) + s * s  # (K, D) or (N, K, D)
        squares = (y * y / variances + ops.log(variances)).sum(axis=2)  # (N, K)
        return squares * -0.5 + self._array(np.log(self.weights) - d / 2 * math.log(2 * math.pi), x), y, variances

    @staticmethod
    def _array(a: np.ndarray, like: Any) -> Array:
        return backend.to_device(a.astype(str(like.dtype)))


def _column(a: Any) -> Any:
    return a if isinstance(a, (int, float)) else a.reshape((-1, 1))
