"""Step 11. Group norm and silu: when a rule worked out by hand is worth it.

    y = x s,  s = 1 / (1 + e^-x)                   x̄ = ȳ s (1 + x (1 - s))                            silu
    xhat = c r,  c = x - mean(x),  r = 1 / sqrt(mean(c^2) + eps),  y = xhat w + b                     group norm

The mean is over all positions and the channels of a group, of one sample. Its differential, term by term:

    dc = dx - mean(dx)
    dr = -r^3 mean(c dx)                                       as d mean(c^2) = 2 mean(c dc), and mean(c) = 0
    dxhat = r dc + c dr = r (dx - mean(dx) - xhat mean(xhat dx))

With h = ȳ w, the adjoint of xhat, collect what multiplies dx in sum(h dxhat). A mean may change sides: sum(h mean(dx))
is sum(mean(h) dx). So

    x̄ = r (h - mean(h) - xhat mean(xhat h)),      w̄ = sum ȳ xhat,   b̄ = sum ȳ        (both sums are unbroadcast's)

`composed_norm` is the same function in the ops that we have, without a rule. The engine differentiates it as well, and
the gradient is the same. But it keeps c and xhat where the op keeps x alone, and each of its nodes is one more pass
over memory. That is why tinydiff has one op for it, and why its page has this derivation.
"""

import numpy as np
from step09_memory import kept_bytes, mean, op, reshape, tensor


@op
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@sigmoid.vjp
def sigmoid_vjp(g, z, _x):
    return g * (z * (1 - z))


@op
def silu(x):
    return x * sigmoid(x)


@silu.vjp
def silu_vjp(g, _z, x):
    s = sigmoid(x)
    return g * (s * (1 + x * (1 - s)))


@op
def rsqrt(x):
    """z = 1 / sqrt(x),   dz = -z^3 / 2 dx"""
    return x**-0.5


@rsqrt.vjp
def rsqrt_vjp(g, z, _x):
    return g * (-0.5 * (z * z * z))


def standardize(x, axes, eps):
    """xhat and r"""
    c = x - mean(x, axis=axes, keepdims=True)
    r = rsqrt(mean(c * c, axis=axes, keepdims=True) + eps)
    return c * r, r


@op
def normalize(x, weight, bias, *, axes, eps):
    xhat, _ = standardize(x, axes, eps)
    return xhat * weight + bias


@normalize.vjp
def normalize_vjp(g, _y, x, weight, _bias, *, axes, eps):
    xhat, r = standardize(x, axes, eps)

    def x_adjoint():
        h = g * weight
        return r * (h - mean(h, axis=axes, keepdims=True) - xhat * mean(xhat * h, axis=axes, keepdims=True))

    return x_adjoint, lambda: g * xhat, g


def composed_norm(x, weight, bias, *, axes, eps):
    """normalize, without a rule of its own."""
    xhat, _ = standardize(x, axes, eps)
    return xhat * weight + bias


def group_norm(x, weight, bias, *, groups, eps=1e-5, norm=normalize):
    """(N, H, W, C) with weight and bias (C,)"""
    n, height, width, channels = x.shape
    split = (groups, channels // groups)
    z = reshape(x, shape=(n, height * width, *split))  # (N, H, W, C) -> (N, L, G, D)
    y = norm(z, reshape(weight, shape=split), reshape(bias, shape=split), axes=(1, 3), eps=eps)
    return reshape(y, shape=x.shape)  # (N, L, G, D) -> (N, H, W, C)


def main():
    np.set_printoptions(precision=3, suppress=True)
    one = tensor([1.0])
    x = tensor(np.array([[1.0], [3.0]]).reshape(1, 2, 1, 1), requires_grad=True)
    y = group_norm(x, one, tensor([0.0]), groups=1, eps=0.0)
    print(f"x = {x.data.ravel()}: mean 2, deviation 1, xhat = {y.data.ravel()}")
    y.backward(np.array([1.0, 0.0]).reshape(y.shape))
    print(f"for ȳ = [1. 0.], x̄ = {x.grad.data.ravel()}: two numbers are always at -1 and 1, so nothing can move")

    data, weights = np.random.default_rng(0).normal(size=(2, 8, 8, 4)), np.array([1.0, 2.0, 3.0, 4.0])
    adjoint, gradients = np.random.default_rng(1).normal(size=data.shape), {}
    for norm in (normalize, composed_norm):
        x = tensor(data, requires_grad=True)
        y = group_norm(x, tensor(weights), tensor(np.zeros(4)), groups=2, norm=norm)
        name = "the op" if norm is normalize else "composed"
        print(f"{name:9} keeps {kept_bytes(y):7,.0f} bytes; x has {x.data.nbytes:,}")
        y.backward(adjoint)
        gradients[name] = x.grad.data
    print(f"largest difference of the gradients: {np.abs(gradients['the op'] - gradients['composed']).max():.0e}")


if __name__ == "__main__":
    main()
