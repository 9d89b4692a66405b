"""Four losses, one score: exactly so for a linear model on Gaussian data, and for any model by Monte Carlo."""

import math

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, gradcheck, no_grad, ops, tensor
from tinydiff.data import GaussianMixture
from tinydiff.diffusion import VESDE, VPSDE, score_matching_loss
from tinydiff.diffusion.exact import Exact
from tinydiff.diffusion.loss import explicit_loss, implicit_loss, sliced_loss
from tinydiff.models.fourier import ScoreMLP

MU, COV = np.array([0.3, -1.0]), np.array([[2.0, 0.5], [0.5, 1.0]])
GAUSSIAN = GaussianMixture([1.0], [MU], [COV])
MIXTURE = GaussianMixture([0.5, 0.5], [[0, 1], [2, -1]], [np.eye(2), COV])
LOSSES = {
    "explicit": lambda *a, exact, **rows: explicit_loss(*a, score=exact.score, **rows),
    "denoising": lambda *a, exact, **rows: score_matching_loss(*a, **rows),
    "implicit": lambda *a, exact, **rows: implicit_loss(*a, **rows),
    "sliced": lambda *a, exact, **rows: sliced_loss(*a, **rows),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


# ---------------------------------------------------------------- exactly


class Planned(Rng):
    """Draws what was planned. All four losses of a linear model are quadratic in x0 and z (and v), so 8 points with
    the mean and the covariance of a Gaussian, each with all 4 signs of v, give its expectation without any error.
    """

    def __init__(self, t):
        super().__init__(0)
        corners = math.sqrt(4) * np.concatenate([np.eye(4), -np.eye(4)])  # (8, 4), of covariance I
        corners = corners.repeat(4, axis=0)
        self.x0 = backend.to_device(MU + corners[:, :2] @ np.linalg.cholesky(COV).T)
        self.t, self.z = t, corners[:, 2:]
        self.v = np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (8, 1))

    def uniform(self, shape, dtype="float32", *, sample_offset=0):
        return backend.to_device(np.full(shape, (self.t - 1e-5) / (1 - 1e-5)))

    def normal(self, shape, dtype="float32", *, sample_offset=0):
        return backend.to_device(self.z)

    def integers(self, n, shape, *, sample_offset=0):
        assert n == 2
        return backend.to_device(self.v)


@every_loss
@pytest.mark.parametrize("sde", [VESDE(25.0), VPSDE()], ids=repr)
@pytest.mark.parametrize("t", [0.05, 0.4])
def test_a_linear_model_has_the_exact_score_for_its_minimum(each_backend, loss, sde, t):
    """model(x) = x A + b: where the gradient, which is linear in A and b, is 0, they are those of the exact score,
    -(S + s^2 I)^-1 (x - mu) with m, to round-off."""
    plan, exact = Planned(t), Exact(GAUSSIAN, sde)

    def gradient(theta):
        p = tensor(theta, "float64", requires_grad=True)
        loss(lambda x, t: x @ p[:4].reshape((2, 2)) + p[4:], plan.x0, sde, plan, exact=exact).backward()
        return p.grad.numpy()

    start = gradient(np.zeros(6))
    hessian = np.stack([gradient(unit) - start for unit in np.eye(6)])
    theta = np.linalg.solve(hessian, -start)
    m, s = sde.marginal_scale(t), sde.marginal_std(t)
    precision = np.linalg.inv(m * m * COV + s * s * np.eye(2))
    np.testing.assert_allclose(theta[:4].reshape(2, 2), -precision, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(theta[4:], m * precision @ MU, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- for any model, by Monte Carlo


def differences(loss, sde, n=2000, runs=40):
    """Loss of one net less that of another, in each of the runs."""
    exact = Exact(MIXTURE, sde)
    nets = [ScoreMLP(sde.marginal_std, 2, hidden=8, rng=Rng(seed)).astype("float64") for seed in (1, 2)]
    for net in nets:  # far from small, so that the trace matters
        net.layer3.weight.data = net.layer3.weight.data * 4
    out = []
    for run in range(runs):
        x0 = MIXTURE.sample(n, Rng(run).child("data")).astype("float64")
        one, other = (loss(net, x0, sde, Rng(run), exact=exact).item() for net in nets)
        out.append(one - other)
    return np.array(out)


@pytest.mark.parametrize("name", ["denoising", "implicit", "sliced"])
def test_they_differ_by_a_number_that_is_the_same_for_all_models(numpy_backend, name):
    """40 runs of 2000 samples with common draws: the mean difference to the explicit loss is 0 within 4 standard
    errors, where both are some hundred standard errors from 0 themselves."""
    sde = VPSDE()
    ours, explicit = differences(LOSSES[name], sde), differences(LOSSES["explicit"], sde)
    gap = ours - explicit
    error = gap.std() / math.sqrt(len(gap))
    assert abs(gap.mean()) < 4 * error
    assert abs(explicit.mean()) > 20 * error


# ---------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("name", ["implicit", "sliced"])
def test_the_gradient_of_a_loss_with_a_gradient_inside(each_backend, name):
    """gradcheck of the loss as a function of the weights of a tanh net."""
    x0 = GAUSSIAN.sample(5, Rng(0)).astype("float64")
    sde, rng = VPSDE(), np.random.default_rng(0)

    def loss(w1, w2):
        return LOSSES[name](lambda x, t: ops.tanh(x @ w1) @ w2, x0, sde, Rng(3), exact=None)

    gradcheck(loss, rng.normal(size=(2, 4)), rng.normal(size=(4, 2)))


def test_the_trace_is_that_of_the_jacobian(each_backend):
    """psi = (sin x_1, x_0 x_1, x_2^3) has the trace x_0 + 3 x_2^2."""

    def psi(x, t):
        return ops.stack([ops.sin(x[:, 1]), x[:, 0] * x[:, 1], x[:, 2] ** 3], axis=1)

    seen = []

    def noting(x, t):
        seen[:] = [x.numpy(), t.numpy()]
        return psi(x, t)

    x0, sde = Rng(1).normal((6, 3), "float64"), VESDE(3.0)
    out = implicit_loss(noting, x0, sde, Rng(2)).item()
    x, t = seen
    s2 = np.array([sde.marginal_std(float(u)) ** 2 for u in t])
    norm = np.sin(x[:, 1]) ** 2 + (x[:, 0] * x[:, 1]) ** 2 + x[:, 2] ** 6
    assert out == pytest.approx(np.mean(s2 * (norm + 2 * (x[:, 0] + 3 * x[:, 2] ** 2))), rel=1e-10)


# ---------------------------------------------------------------- the contract


@every_loss
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(each_backend, loss):
    sde, x0 = VPSDE(), MIXTURE.sample(4, Rng(0))
    net, exact = ScoreMLP(sde.marginal_std, 2, rng=Rng(0)), Exact(MIXTURE, sde)
    whole = loss(net, x0, sde, Rng(9), exact=exact)
    assert whole.shape == () and str(whole.dtype) == "float32"
    alone = [loss(net, x0[i : i + 1], sde, Rng(9), exact=exact, sample_offset=i).item() for i in range(4)]
    assert whole.item() == pytest.approx(sum(alone) / 4, rel=1e-4)


def test_images_have_a_trace_too(each_backend):
    """For psi = -a x on 3 x 3 x 1: |psi|^2 + 2 tr = a^2 |x|^2 - 18 a."""
    seen = []

    def psi(x, t):
        seen[:] = [x.numpy(), t.numpy()]
        return x * -0.5

    sde = VPSDE()
    for loss in (implicit_loss, sliced_loss):
        out = loss(psi, Rng(0).normal((4, 3, 3, 1)), sde, Rng(1)).item()
        x, t = seen
        s2 = np.array([sde.marginal_std(float(u)) ** 2 for u in t])
        assert out == pytest.approx(np.mean(s2 * (0.25 * (x**2).sum((1, 2, 3)) - 9)), rel=1e-5)


@every_loss
@pytest.mark.parametrize(
    ("model", "x0", "error", "message"),
    [
        (lambda x, t: x[:, :1], np.zeros((3, 2)), ValueError, r"returned shape \(3, 1\) for x of shape \(3, 2\)"),
        (lambda x, t: x, np.zeros((3, 2), int), TypeError, "must be of floats"),
    ],
)
def test_bad_arguments_are_quoted(numpy_backend, loss, model, x0, error, message):
    with pytest.raises(error, match=message):
        loss(model, x0, VPSDE(), Rng(0), exact=Exact(GAUSSIAN, VPSDE()))


def test_without_a_graph_there_is_no_trace(numpy_backend):
    net = ScoreMLP(VPSDE().marginal_std, 2, rng=Rng(0))
    with no_grad(), pytest.raises(RuntimeError):
        implicit_loss(net, np.zeros((3, 2), np.float32), VPSDE(), Rng(0))


def test_the_net_is_that_of_the_tutorial(each_backend):
    net = ScoreMLP(VESDE(25.0).marginal_std, 2, rng=Rng(0))
    assert [layer.weight.shape for layer in (net.layer1, net.layer2, net.layer3)] == [(12, 50), (50, 50), (50, 2)]
    assert net.count() == 12 * 50 + 50 + 50 * 50 + 50 + 50 * 2 + 2
    x, t = Rng(1).normal((3, 2)), Tensor(backend.to_device(np.array([1e-3, 0.5, 1.0], np.float32)))
    s = np.array([[0.0316737], [1.930805], [9.845215]])
    h = np.concatenate([backend.to_host(x), net.time(t).numpy()], axis=1)
    for layer in (net.layer1, net.layer2):
        h = np.tanh(h @ layer.weight.numpy() + layer.bias.numpy())
    np.testing.assert_allclose(
        net(Tensor(x), t).numpy(), (h @ net.layer3.weight.numpy() + net.layer3.bias.numpy()) / s, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"takes x \(N, 2\), not \(3, 3\)"):
        net(Tensor(backend.to_device(np.zeros((3, 3), np.float32))), t)
