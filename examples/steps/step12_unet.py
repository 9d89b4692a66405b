"""Step 12. A small U-Net that removes noise, on the real engine: only the import changes.

    python examples/steps/step12_unet.py             with tinydiff
    python examples/steps/step12_unet.py --steps     with the engine of steps 9 to 11: 60 steps, the same losses

Pictures x₀ of 16x16 get noise of a random level σ, x = x₀ + σ z, and the net learns D(x), the denoised picture, by the
mean square error. For every σ the input of the net and its target should have the mean square 1, so, with s^2 the mean
square of the pictures (Karras et al. 2022),

    D = c_skip x + c_out F(c_in x, ln σ),   c_skip = s^2 / (s^2 + σ^2),   c_out = c_skip σ √(s^2 + σ^2) / s,
    c_in = 1 / √(s^2 + σ^2);      F learns (x₀ - c_skip x) / c_out

F is a U-Net: from 16x16 to 8x8 and back, what it knew at 16x16 added on the way back. Then a picture is drawn from
noise alone, by small steps along dx/dσ = (x - D) / σ.
"""

import math
import sys

import numpy as np

if "--steps" in sys.argv:
    from step09_memory import matmul, mean, no_grad, reshape, tensor
    from step10_convolution import conv2d, conv_transpose2d
    from step11_group_norm import group_norm, silu
else:
    from tinydiff import backend, no_grad, tensor
    from tinydiff.ops import conv2d, conv_transpose2d, group_norm, matmul, mean, reshape, silu

    backend.use("numpy")  # as everything else here; the examples outside this folder run on a GPU too

S = 1.0  # all pixels are -1 or 1


def pictures(rng, n):
    """Discs and squares of -1 and 1: (n, 16, 16, 1)"""
    i, j = np.indices((16, 16)) + 0.5
    row, column = rng.uniform(6, 10, (2, n, 1, 1))
    radius, round_ = rng.uniform(3, 5, (n, 1, 1)), rng.uniform(size=(n, 1, 1)) < 0.5
    a, b = abs(i - row), abs(j - column)
    inside = np.where(round_, a * a + b * b < radius**2, np.maximum(a, b) < radius * 0.85)
    return np.where(inside, 1.0, -1.0)[..., None]


def new_weights(rng, channels=(8, 16)):
    c, d = channels

    def uniform(*shape):
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        return tensor(rng.uniform(-bound, bound, shape), requires_grad=True)

    weights = {"first": uniform(3, 3, 1, c), "down": uniform(3, 3, c, d), "up": uniform(2, 2, c, d)}
    weights["last"] = uniform(3, 3, c, 1)
    for name, n in {"fine": c, "coarse": d, "joined": c}.items():
        weights[f"{name}.norm"] = tensor(np.ones(n), requires_grad=True)
        weights[f"{name}.shift"] = tensor(np.zeros(n), requires_grad=True)
        weights[f"{name}.level"] = uniform(2, n)
        weights[f"{name}.conv"] = uniform(3, 3, n, n)
    return weights


def block(weights, name, x, level):
    """x + conv(silu(norm(x + what the level says)))"""
    n, channels = x.shape[0], x.shape[3]
    shift = reshape(matmul(level, weights[f"{name}.level"]), shape=(n, 1, 1, channels))  # (N, C) -> (N, 1, 1, C)
    h = group_norm(x + shift, weights[f"{name}.norm"], weights[f"{name}.shift"], groups=4)
    return x + conv2d(silu(h), weights[f"{name}.conv"], padding=1)


def unet(weights, x, level):
    """(N, 16, 16, 1), (N, 2) -> (N, 16, 16, 1)"""
    fine = block(weights, "fine", conv2d(x, weights["first"], padding=1), level)  # (N, 16, 16, c)
    coarse = block(weights, "coarse", conv2d(fine, weights["down"], stride=2, padding=1), level)  # (N, 8, 8, d)
    joined = fine + conv_transpose2d(coarse, weights["up"], stride=2)  # (N, 16, 16, c)
    return conv2d(silu(block(weights, "joined", joined, level)), weights["last"], padding=1)


def scales(sigma):
    """c_skip, c_out and c_in, each (N, 1, 1, 1)"""
    total = S**2 + sigma**2
    return S**2 / total, sigma * S / np.sqrt(total), 1 / np.sqrt(total)


def network(weights, x, sigma):
    """F(c_in x, ln σ) as a Tensor"""
    level = np.log(sigma[:, 0, 0]) / 4  # (N, 1, 1, 1) -> (N, 1)
    return unet(weights, tensor(scales(sigma)[2] * x), np.concatenate([level, np.ones_like(level)], axis=1))


def denoise(weights, x, sigma):
    """D(x), an array"""
    c_skip, c_out, _ = scales(sigma)
    with no_grad():
        return c_skip * x + c_out * network(weights, x, sigma).data


def loss_of(weights, x0, sigma, z):
    x, (c_skip, c_out, _) = x0 + sigma * z, scales(sigma)
    error = network(weights, x, sigma) - (x0 - c_skip * x) / c_out
    return mean(error * error)


def draw_noise(rng, n):
    """σ (n, 1, 1, 1), log-uniform from 0.05 to 10, and z (n, 16, 16, 1)"""
    return np.exp(rng.uniform(math.log(0.05), math.log(10), (n, 1, 1, 1))), rng.normal(size=(n, 16, 16, 1))


def train(weights, rng, steps, batch=16, lr=5e-3):
    """Adam: steps in proportion to the mean of the gradient over the root of the mean of its square."""
    means = {name: [np.zeros(w.shape), np.zeros(w.shape)] for name, w in weights.items()}
    losses = []
    for step in range(1, steps + 1):
        for w in weights.values():
            w.grad = None
        loss = loss_of(weights, pictures(rng, batch), *draw_noise(rng, batch))
        loss.backward()
        for name, w in weights.items():
            m, v = means[name]
            m += 0.1 * (w.grad.data - m)
            v += 0.01 * (w.grad.data**2 - v)
            w.data = w.data - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
        losses.append(float(loss.data))
    return losses


def sample(weights, rng, n, levels=20):
    """Pictures from noise: from σ = 10 down to 0.05, and then D."""
    sigmas = np.geomspace(10, 0.05, levels)
    x = sigmas[0] * rng.normal(size=(n, 16, 16, 1))
    for sigma, lower in zip(sigmas, sigmas[1:]):
        x = x + (lower - sigma) * (x - denoise(weights, x, np.full((n, 1, 1, 1), sigma))) / sigma
    return denoise(weights, x, np.full((n, 1, 1, 1), sigmas[-1]))


def show(x):
    """Pictures side by side, every second row, since letters are taller than wide."""
    for row in range(0, 16, 2):
        print("   ".join("".join(" .:*#"[int(np.clip(2.5 + 2.5 * v, 0, 4))] for v in a[row, :, 0]) for a in x))


def main():
    rng = np.random.default_rng(0)
    weights = new_weights(rng)
    # tinydiff is quicker, and so takes more steps
    losses = train(weights, rng, 60 if "--steps" in sys.argv else 300)
    for first in range(0, len(losses), 30):
        print(f"step {first:3}   loss {losses[first]:.4f}   mean of 30: {np.mean(losses[first : first + 30]):.4f}")
    x0, z = pictures(rng, 4), rng.normal(size=(4, 16, 16, 1))
    x, sigma = x0 + z, np.ones((4, 1, 1, 1))
    denoised = denoise(weights, x, sigma)
    print(f"pictures with noise of σ = 1, and denoised: mean square error {np.mean((x - x0) ** 2):.3f}, and "
          f"{np.mean((denoised - x0) ** 2):.3f}")  # fmt: skip
    show(x)
    print()
    show(denoised)
    print("from noise alone:")
    show(sample(weights, rng, 4))


if __name__ == "__main__":
    main()
