"""All predictions are equivalent: identities between them, and every one of them exact on Gaussian data."""

import math

import kolmogorov
import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, nn, ops, tensor
from tinydiff.diffusion import (
    VESDE,
    VPSDE,
    Denoiser,
    FlowSDE,
    ScoreModel,
    SubVPSDE,
    denoising_loss,
    sample,
    score_matching_loss,
    score_of,
)
from tinydiff.diffusion.loss import log_normal, logit_normal
from tinydiff.diffusion.predict import TARGETS
from tinydiff.diffusion.process import per_sample

SD = 0.6  # EDM's sigma_data
MEAN, VARIANCE = 0.5, 0.3  # of Gaussian data
PROCESSES = [VESDE(25.0), VPSDE(), VPSDE("cosine"), SubVPSDE(), FlowSDE()]
every_process = pytest.mark.parametrize("sde", PROCESSES, ids=repr)
every_prediction = pytest.mark.parametrize("predicts", TARGETS)
TIMES = np.array([0.01, 0.2, 0.5, 0.9])


def model_of(net, sde, predicts):
    return ScoreModel(net, sde, predicts, sigma_data=SD if predicts == "edm" else None)


def numbers(seed, *shape):
    return backend.to_device(np.random.default_rng(seed).normal(size=shape))


def host(a):
    return np.asarray(backend.to_host(a.data if isinstance(a, Tensor) else a))


def best(predicts, x, m, s):
    """The output of a perfect network for Gaussian data: the means of x_0 and z given x, by Bayes' theorem."""
    total = m * m * VARIANCE + s * s
    x0 = MEAN + m * VARIANCE / total * (x - m * MEAN)
    z = s / total * (x - m * MEAN)
    sigma = s / m
    skip, out = SD**2 / (sigma**2 + SD**2), sigma * SD / np.sqrt(sigma**2 + SD**2)  # Karras et al. 2022, table 1
    return {
        "score": -(x - m * MEAN) / total,
        "noise": z,
        "x0": x0,
        "v": m * z - s * x0,
        "flow": z - x0,
        "edm": (x0 - skip * x / m) / out,
    }[predicts]


@every_process
@every_prediction
def test_a_perfect_network_gives_the_exact_score_and_the_exact_mean(each_backend, sde, predicts):
    x, t = numbers(0, 4, 3), backend.to_device(TIMES)
    m, s = (np.array([[f(u)] for u in TIMES]) for f in (sde.marginal_scale, sde.marginal_std))
    output = best(predicts, host(x), m, s)
    model = model_of(lambda x, t: Tensor(backend.to_device(output)), sde, predicts)
    for times in (t, Tensor(t)):
        np.testing.assert_allclose(host(model.score(x, times)), best("score", host(x), m, s), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(host(model.denoised(x, times)), best("x0", host(x), m, s), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(host(model.noise(x, times)), best("noise", host(x), m, s), rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(host(model(x, times)), host(model.score(x, times)))
    one = model_of(lambda x, t: Tensor(backend.to_device(output[1:2])), sde, predicts)
    np.testing.assert_allclose(host(one(x[1:2], 0.2)), best("score", host(x), m, s)[1:2], rtol=1e-9)


@every_process
@pytest.mark.parametrize("source", TARGETS)
@pytest.mark.parametrize("target", TARGETS)
def test_conversions_are_identities(each_backend, sde, source, target):
    """From one prediction to another and back; the other equals the one computed directly."""
    x0, z, t = numbers(1, 4, 3), numbers(2, 4, 3), backend.to_device(TIMES)
    x = per_sample(sde.marginal_scale(t), x0) * x0 + per_sample(sde.marginal_std(t), x0) * z
    a, b = (model_of(None, sde, predicts) for predicts in (source, target))
    y = a.target(x0, z, t)
    converted = b.target(*a.split(y, x, t), t)
    np.testing.assert_allclose(host(converted), host(b.target(x0, z, t)), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(host(a.target(*b.split(converted, x, t), t)), host(y), rtol=1e-8, atol=1e-8)


def test_the_velocity_of_flow_matching_is_that_of_the_probability_flow(each_backend):
    """dx/dt = f - g^2 score / 2 (Song et al. 2021, equation 13) is z - x_0 on average under the straight line."""
    sde, x = FlowSDE(), numbers(0, 4, 3)
    t = backend.to_device(TIMES)
    m, s = (np.array([[f(u)] for u in TIMES]) for f in (sde.marginal_scale, sde.marginal_std))
    score = best("score", host(x), m, s)
    velocity = host(sde.drift(x, t)) - host(sde.diffusion(t))[:, None] ** 2 * score / 2
    np.testing.assert_allclose(velocity, best("flow", host(x), m, s), rtol=1e-9)


def test_edm_is_minus_v_if_the_data_have_variance_one(each_backend):
    x0, z, t = numbers(1, 4, 3), numbers(2, 4, 3), backend.to_device(TIMES)
    edm, v = ScoreModel(None, VPSDE(), "edm", sigma_data=1.0), ScoreModel(None, VPSDE(), "v")
    np.testing.assert_allclose(host(edm.target(x0, z, t)), -host(v.target(x0, z, t)), rtol=1e-9)


class Wavy(nn.Module):
    """A network that depends on x and t."""

    def forward(self, x, t):
        return ops.sin(x * 2) + per_sample(t, x)


@every_process
def test_edm_is_the_denoiser_of_karras(each_backend, sde):
    x, t = Tensor(numbers(3, 4, 3)), backend.to_device(TIMES)
    m, s = sde.marginal_scale(t), sde.marginal_std(t)
    karras = Denoiser(Wavy(), SD)(x / per_sample(m, x), s / m)
    ours = ScoreModel(Wavy(), sde, "edm", sigma_data=SD).denoised(x, Tensor(t))
    np.testing.assert_allclose(host(ours), host(karras), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the loss


@every_process
@every_prediction
def test_all_predictions_have_one_loss_but_for_the_weight(each_backend, sde, predicts):
    def weight(t):
        m, s = sde.marginal_scale(t), sde.marginal_std(t)
        a, b = TARGETS[predicts](m, s, SD)
        return (m / (m * b - s * a)) ** 2 + t * 0.0

    model, x0 = model_of(Wavy(), sde, predicts), numbers(4, 50, 2)
    loss = denoising_loss(model, x0, Rng(5), weight=weight)
    assert loss.shape == () and str(loss.dtype) == "float64"
    assert loss.item() == pytest.approx(score_matching_loss(model, x0, sde, Rng(5)).item(), rel=1e-7)
    if predicts == "noise":
        assert denoising_loss(model, x0, Rng(5)).item() == pytest.approx(loss.item(), rel=1e-12)


def test_flow_matching_reaches_its_optimum_and_no_other_net_does(each_backend):
    """For Gaussian data the variance of z - x_0 given x_t is known at every t; its mean over the times by a sum."""
    n, u = 100_000, np.linspace(-6, 6, 4001)
    t = 1 / (1 + np.exp(-u)) * 0.999
    x_variance = (1 - t) ** 2 * VARIANCE + t**2
    left = 1 + VARIANCE - (t - (1 - t) * VARIANCE) ** 2 / x_variance
    optimum = (left * np.exp(-u * u / 2)).sum() / np.exp(-u * u / 2).sum()

    def net(x, t):
        m, s = per_sample(1 - t, x), per_sample(t, x)
        x0 = (x - m * MEAN) * (m * VARIANCE / (m * m * VARIANCE + s * s)) + MEAN
        return (x - m * x0) / s - x0

    x0 = Rng(0).normal((n, 1), "float64") * math.sqrt(VARIANCE) + MEAN
    loss, wrong = (
        denoising_loss(ScoreModel(f, FlowSDE(), "flow"), x0, Rng(1), times=logit_normal()).item()
        for f in (net, lambda x, t: net(x, t) * 0.9)
    )
    assert loss == pytest.approx(optimum, abs=5 * math.sqrt(2) * optimum / math.sqrt(n))
    assert wrong > loss


def test_times_of_flow_matching_are_logit_normal(each_backend):
    t = logit_normal(0.5, 2.0)(3000, 0.999, Rng(2), "float64", 0) / 0.999
    logit = ops.log(t / (1 - t))
    assert kolmogorov.distance(logit, lambda u: (ops.erf((u - 0.5) / math.sqrt(8)) + 1) / 2) < kolmogorov.threshold(
        3000
    )
    alone = logit_normal(0.5, 2.0)(1, 0.999, Rng(2), "float64", 7)
    assert host(alone)[0] == pytest.approx(host(t)[7] * 0.999, rel=1e-12)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_and_conditions_are_passed_on(each_backend):
    seen = []

    def net(x, t, *, label):
        seen.append(label)
        return Wavy()(x, t)

    model, x0 = ScoreModel(net, VPSDE(), "v"), numbers(6, 6, 2)
    whole = denoising_loss(model, x0, Rng(1), label="seven").item()
    parts = [denoising_loss(model, x0[i : i + 2], Rng(1), sample_offset=i, label="seven").item() for i in (0, 2, 4)]
    assert whole == pytest.approx(np.mean(parts), rel=1e-12) and len(set(parts)) == 3
    assert seen == ["seven"] * 4


def test_the_gradient_reaches_the_network(each_backend):
    """For a net a x the loss is a parabola in a, so a central difference of any width is exact."""
    x0 = numbers(7, 8, 3)

    def loss(a):
        return denoising_loss(ScoreModel(lambda x, t: x * a, VPSDE(), "v"), x0, Rng(6))

    a = tensor(0.7, "float64", requires_grad=True)
    loss(a).backward()
    ends = [loss(tensor(v, "float64")).item() for v in (1.7, -0.3)]
    assert a.grad.item() == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-9)


# ---------------------------------------------------------------- as a score, and bad input


@every_prediction
def test_it_is_sampled_as_a_score(each_backend, predicts):
    """The same samples from the exact score, and from a perfect network that predicts something else."""
    sde = VPSDE()

    def net(x, t):
        if predicts == "edm":  # undo what is done to its inputs
            sigma = ops.exp(t * 4)
            m = 1 / ops.sqrt(sigma * sigma + 1)
            m, s = per_sample(m, x), per_sample(sigma * m, x)
            x = x * ops.sqrt(s * s + m * m * SD**2)
        else:
            m, s = per_sample(sde.marginal_scale(t), x), per_sample(sde.marginal_std(t), x)
        total = m * m * VARIANCE + s * s
        x0, z = (x - m * MEAN) * (m * VARIANCE / total) + MEAN, (x - m * MEAN) * (s / total)
        return model.target(x0, z, t if predicts != "edm" else seen[-1])

    model, seen = model_of(net, sde, predicts), []

    def noting(x, t):
        seen.append(t)
        return model(x, t)

    def exact(x, t):
        m, s = per_sample(sde.marginal_scale(t), x), per_sample(sde.marginal_std(t), x)
        return -(x - m * MEAN) / (m * m * VARIANCE + s * s)

    samples = [host(sample(f, (6, 2), sde, 3, method="euler_maruyama", steps=20, eps=0.01)) for f in (noting, exact)]
    np.testing.assert_allclose(*samples, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreModel(None, VPSDE(), "epsilon"), "unknown prediction 'epsilon': choose one of score, noise, x0"),
        (lambda: ScoreModel(None, VPSDE(), "edm"), r"ScoreModel: sigma_data must be a number in \(0, inf\), not None"),
        (lambda: ScoreModel(None, VPSDE(), "edm", sigma_data=-1), "not -1"),
        (lambda: ScoreModel(lambda x, t: x[:1], VPSDE())(np.ones((2, 3)), 0.5), r"returned shape \(1, 3\)"),
        (lambda: ScoreModel(lambda x, t: x, VPSDE())(np.ones((2, 3)), 1.5), "t must be from 0 to 1, not 1.5"),
        *[
            (lambda t=t: ScoreModel(lambda x, t: x, VPSDE(), "v")(np.ones((2, 3)), t), f"t must be .* not {t!r}")
            for t in (None, 0, -1, float("nan"), "0.5")
        ],
        (lambda: score_of(Denoiser(lambda x, t: x, 0.5), VPSDE())(np.ones((2, 3)), 0), "t must be .* not 0"),
        (lambda: logit_normal(float("nan")), "mean must be a number .* not nan"),
        (lambda: log_normal(0.0, None), "std must be a number .* not None"),
        (lambda: logit_normal(0.0, 0.0), r"std must be a number in \(0, inf\), not 0.0"),
    ],
)
def test_bad_arguments_are_quoted(numpy_backend, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pictures_that_were_not_scaled_are_an_error():
    with pytest.raises(TypeError, match=r"must be of floats .* not uint8 of shape \(2, 3\)"):
        denoising_loss(ScoreModel(Wavy(), VPSDE()), backend.to_device(np.zeros((2, 3), np.uint8)), Rng(0))


def test_the_parameters_of_the_network_are_found():
    assert ScoreModel(nn.Linear(2, 2), VPSDE(), "noise").count() == 6
