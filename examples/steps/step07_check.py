"""Step 7. How do we know that it is right? Two ways to differentiate by numbers, and one way to be fooled.

    central difference      f'(x) = (f(x + h) - f(x - h)) / (2 h)      the error is of the order h^2 + 1e-16 / h
    complex step            f'(x) = Im f(x + i h) / h                  the error is of the order h^2

f(x + i h) = f(x) + i h f'(x) - h^2 f''(x) / 2 - ...: the imaginary part is h f'(x), and nothing is subtracted, so no
digits cancel. h may be 1e-30, and the derivative is right to the last digit. The forwards are NumPy's, and take
complex numbers as they are (if they are analytic: |x| is not).

`gradcheck` compares every element of the gradient of sum(r f(x)), where r is random. Why random? With r = 1, softmax
has the gradient 0, since its sum is always 1; and a wrong rule, z (z̄ - mean(z̄)), gives 0 too. It passes, though it is
wrong for every other z̄.

Nothing of the engine changes, so this step imports the one before.
"""

import numpy as np
from step06_matmul import Tensor, loss_of, new_net, op, softmax, sum, tanh, tensor


def central_difference(f, x, h=1e-5):
    return (f(x + h) - f(x - h)) / (2 * h)


def complex_step(f, x, h=1e-30):
    return np.imag(f(x + 1j * h)) / h


def numeric_gradient(f, arrays, i):
    """d f / d arrays[i], each element by a complex step. f: arrays -> a number."""
    gradient = np.zeros(arrays[i].shape)
    for at in np.ndindex(gradient.shape):

        def of_element(value, at=at):
            changed = [a.astype(complex) for a in arrays]
            changed[i][at] = value
            return f(*changed)

        gradient[at] = complex_step(of_element, arrays[i][at])
    return gradient


def gradcheck(f, *arrays, weights=None):
    """The largest difference between the gradients of sum(weights f(x)) by the rules and by the complex step.

    f: Tensors -> a Tensor. weights: random unless given.
    """
    leaves = [tensor(a) for a in arrays]
    z = f(*leaves)
    r = np.random.default_rng(0).normal(size=z.data.shape) if weights is None else weights
    z.backward(r)

    def value(*arrays):
        return (f(*map(Tensor, arrays)).data * r).sum()

    return max(np.abs(x.grad - numeric_gradient(value, arrays, i)).max() for i, x in enumerate(leaves))


@op
def wrong_softmax(x):
    return softmax.forward(x)


@wrong_softmax.vjp
def wrong_softmax_vjp(g, z, _x):
    return z * (g - g.mean(axis=-1, keepdims=True))  # right: (g * z).sum, the mean with the weights z


def main():
    exact = 1 - np.tanh(1.0) ** 2
    print("tanh'(1), the error of   a central difference   a complex step")
    for h in (1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 1e-11):
        errors = [abs(method(np.tanh, 1.0, h) - exact) for method in (central_difference, complex_step)]
        print(f"    h = {h:.0e}            {errors[0]:.0e}                  {errors[1]:.0e}")

    x = np.array([[0.0, 1.0, 2.0], [-1.0, 0.5, 3.0]])
    print(f"softmax, random weights:     {gradcheck(softmax, x):.0e}")
    print(
        f"the wrong one, weights 1:    {gradcheck(wrong_softmax, x, weights=np.ones((2, 3))):.0e}, as if it were right"
    )
    print(f"the wrong one, random:       {gradcheck(wrong_softmax, x):.0e}")

    data = np.linspace(-3, 3, 8)[:, None]
    arrays = [w.data for w in new_net(hidden=4)]
    print(f"the net of step 6, its loss: {gradcheck(lambda *w: loss_of(w, data, np.sin(data)), *arrays):.0e}")
    print(f"sum(tanh(x)), along an axis: {gradcheck(lambda x: sum(tanh(x), axis=0), x):.0e}")


if __name__ == "__main__":
    main()
