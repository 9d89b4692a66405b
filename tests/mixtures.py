"""A mixture of Gaussians in one dimension, about which everything is known exactly: the score under noise, the
distribution function, its inverse, and samples."""

import math
from dataclasses import dataclass

import kolmogorov
import numpy as np

from tinydiff import Rng, backend, ops
from tinydiff.diffusion.process import VPSDE, LinearSchedule, per_sample

erf = np.vectorize(math.erf)


@dataclass(frozen=True)
class Mixture:
    weights: tuple
    means: tuple
    deviations: tuple

    def score(self, sde, std=None):
        """score(x, t) of m(t) x_0 + s(t) z, x (N, 1); std: another function of t in place of s, which is wrong."""

        def score(x, t):
            w, mu, sd = (backend.to_device(np.array(a), x.dtype) for a in (self.weights, self.means, self.deviations))
            m, s = per_sample(sde.marginal_scale(t), x), per_sample((std or sde.marginal_std)(t), x)
            var = (m * sd) ** 2 + s * s  # (N, components)
            shift = m * mu - x  # (N, 1) -> (N, components)
            which = ops.softmax(ops.log(w) - ops.log(var) / 2 - shift * shift / (2 * var), axis=1)
            return (which * shift / var).sum(axis=1, keepdims=True)  # (N, 1)

        return score

    def below(self, x, m=1.0, s=0.0):
        """The distribution function of m x_0 + s z at x (N,)."""
        mu, sd = m * np.array(self.means), np.sqrt((m * np.array(self.deviations)) ** 2 + s**2)
        return (self.weights * (1 + erf((x[:, None] - mu) / (sd * math.sqrt(2)))) / 2).sum(axis=1)

    def quantile(self, p, m=1.0, s=0.0):
        """Its inverse, by bisection."""
        low, high = np.full(p.shape, -1e3), np.full(p.shape, 1e3)
        for _ in range(80):
            middle = (low + high) / 2
            left = self.below(middle, m, s) < p
            low, high = np.where(left, middle, low), np.where(left, high, middle)
        return (low + high) / 2

    def samples(self, n, seed):
        which = np.digitize(backend.to_host(Rng(seed).uniform(n)), np.cumsum(self.weights)[:-1])
        z = backend.to_host(Rng(seed + 1).normal(n))
        return np.array(self.means)[which] + np.array(self.deviations)[which] * z

    def distance(self, x):
        """That of Kolmogorov and Smirnov, from the samples x to the distribution function."""
        return kolmogorov.distance(x, lambda x: self.below(backend.to_host(x)))


SPEC = Mixture((0.3, 0.5, 0.2), (-2.0, 0.5, 3.0), (0.4, 0.3, 0.6))


def gaussian_score(mean, variance, sde):
    """The score of Gaussian data under noise, in any dimension."""

    def score(x, t):
        m, s = per_sample(sde.marginal_scale(t), x), per_sample(sde.marginal_std(t), x)
        return -(x - m * mean) / (m * m * variance + s * s)

    return score


def constant_vp(b=8.0):
    """The variance-preserving process with the simplest schedule there is: f = -b x / 2, g = sqrt(b)."""
    return VPSDE(LinearSchedule(b, b))
