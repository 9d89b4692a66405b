"""Step 10. Convolution: products of matrices, and three functions that are each other's rules.

    y[n, i, j, o] = sum over u, v, c of x[n, s i + u - p, s j + v - p, c] w[u, v, c, o]

with stride s and padding p. Under one tap (u, v) of the kernel lies a shifted picture; its pixels are the rows of a
matrix, and w[u, v] is a matrix (C, O). So a convolution is a sum of kh kw products. (All taps side by side are the
patches; with them it is one product.)

Multiply y by an image ȳ and sum. The result, F(x, w, ȳ), is linear in each of the three, and the three are treated
alike: F is the sum of all x[..] w[..] ȳ[..] that meet. The derivative of F by each is a function of the other two:

    by ȳ     conv2d(x, w)
    by x     conv2d_input_grad(ȳ, w) = x̄           also the transposed convolution, which makes images larger
    by w     conv2d_weight_grad(x, ȳ) = w̄

The rule of each of the three consists of the other two, so derivatives of any order are there at once.
"""

import itertools

import numpy as np
from step09_memory import grad, op, sum, tensor


def taps(kernel, out, stride):
    """(u, v, where the padded image lies under that tap, for all pixels of the output)."""
    for u, v in itertools.product(*map(range, kernel)):
        rows, columns = (slice(i, i + stride * (n - 1) + 1, stride) for i, n in zip((u, v), out))
        yield u, v, (slice(None), rows, columns)


def padded(x, p):
    return np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))


@op
def conv2d(x, w, *, stride=1, padding=0):
    """(N, H, W, C), (kh, kw, C, O) -> (N, OH, OW, O)"""
    out = [(n + 2 * padding - k) // stride + 1 for n, k in zip(x.shape[1:3], w.shape)]
    x, y = padded(x, padding), 0.0
    for u, v, at in taps(w.shape[:2], out, stride):
        y = y + x[at] @ w[u, v]  # (N, OH, OW, C) x (C, O) -> (N, OH, OW, O)
    return y


@conv2d.vjp
def conv2d_vjp(g, _y, x, w, *, stride=1, padding=0):
    return (
        lambda: conv2d_input_grad(g, w, size=x.shape[1:3], stride=stride, padding=padding),
        lambda: conv2d_weight_grad(x, g, kernel=w.shape[:2], stride=stride, padding=padding),
    )


@op
def conv2d_input_grad(y, w, *, size, stride=1, padding=0):
    """(N, OH, OW, O), (kh, kw, C, O) -> (N, H, W, C): each product goes back to where its pixel came from."""
    x = padded(np.zeros((len(y), *size, w.shape[2]), np.result_type(y, w)), padding)
    for u, v, at in taps(w.shape[:2], y.shape[1:3], stride):
        x[at] += y @ w[u, v].T  # (N, OH, OW, O) x (O, C) -> (N, OH, OW, C)
    return x[:, padding : padding + size[0], padding : padding + size[1]]


@conv2d_input_grad.vjp
def conv2d_input_grad_vjp(g, _x, y, w, *, size, stride=1, padding=0):
    return (
        lambda: conv2d(g, w, stride=stride, padding=padding),
        lambda: conv2d_weight_grad(g, y, kernel=w.shape[:2], stride=stride, padding=padding),
    )


@op
def conv2d_weight_grad(x, y, *, kernel, stride=1, padding=0):
    """(N, H, W, C), (N, OH, OW, O) -> (kh, kw, C, O)"""
    x = padded(x, padding)
    w = np.zeros((*kernel, x.shape[3], y.shape[3]), np.result_type(x, y))
    rows = y.reshape(-1, y.shape[3])  # (N, OH, OW, O) -> (M, O)
    for u, v, at in taps(kernel, y.shape[1:3], stride):
        w[u, v] = x[at].reshape(-1, x.shape[3]).T @ rows  # (C, M) x (M, O) -> (C, O)
    return w


@conv2d_weight_grad.vjp
def conv2d_weight_grad_vjp(g, _w, x, y, *, kernel, stride=1, padding=0):
    return (
        lambda: conv2d_input_grad(y, g, size=x.shape[1:3], stride=stride, padding=padding),
        lambda: conv2d(x, g, stride=stride, padding=padding),
    )


def conv_transpose2d(x, w, *, stride=1, padding=0):
    """The transpose of conv2d as a linear map. w: (kh, kw, O, C), that of the conv2d."""
    size = [(n - 1) * stride - 2 * padding + k for n, k in zip(x.shape[1:3], w.shape)]
    return conv2d_input_grad(x, w, size=tuple(size), stride=stride, padding=padding)


def by_patches(x, w):
    """conv2d as one product: each row holds the patch under one pixel of the output."""
    out = [n - k + 1 for n, k in zip(x.shape[1:3], w.shape)]
    patches = np.concatenate([x[at] for _, _, at in taps(w.shape[:2], out, 1)], axis=-1)  # (N, OH, OW, kh kw C)
    return patches @ w.reshape(-1, w.shape[3])  # (N, OH, OW, O)


def main():
    def shown(a):
        return str(a.squeeze()).replace("\n", "\n    ")

    x = tensor(np.arange(1, 10).reshape(1, 3, 3, 1), requires_grad=True)
    w = tensor(np.array([[1, 0], [0, -1]]).reshape(2, 2, 1, 1), requires_grad=True)
    y = conv2d(x, w)
    print("x =", shown(x.data))
    print("w =", shown(w.data))
    print("y =", shown(y.data), "     each pixel minus the one below on the right")
    print("    the same by patches:", np.array_equal(by_patches(x.data, w.data), y.data))
    x_adjoint, w_adjoint = grad(sum(y), [x, w])
    print("for ȳ = 1 everywhere:")
    print("x̄ =", shown(x_adjoint.data), "     the sum of the taps that reach the pixel")
    print("w̄ =", shown(w_adjoint.data), "     the sum of the pixels under the tap: 1 + 2 + 4 + 5 = 12")
    g = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    terms = (
        (conv2d(x.data, w.data) * g).sum(),
        (conv2d_input_grad(g, w.data, size=(3, 3)) * x.data).sum(),
        (conv2d_weight_grad(x.data, g, kernel=(2, 2)) * w.data).sum(),
    )
    print("F(x, w, ȳ) for ȳ = 1, 2, 3, 4, by its three derivatives:", *map(float, terms))


if __name__ == "__main__":
    main()
