"""The loss: its value where it is known exactly, its draws, and its errors."""

import math
import re

import kolmogorov
import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, ops, tensor
from tinydiff.diffusion import (
    VESDE,
    Brownian,
    Denoiser,
    ScoreModel,
    denoising_loss,
    edm_loss,
    likelihood_loss,
    score_matching_loss,
)
from tinydiff.diffusion.loss import explicit_loss, implicit_loss, log_normal, logit_normal, noised, sliced_loss, uniform
from tinydiff.diffusion.process import per_sample

SDE = VESDE(25.0)


def zeros(*shape):
    return backend.to_device(np.zeros(shape, np.float32))


def gaussian_score(mean, variance):
    """The exact score of N(mean, variance) data after noising."""
    return lambda x, t: -(x - mean) / (per_sample(SDE.marginal_std(t), x) ** 2 + variance)


def test_the_zero_score_has_the_number_of_pixels(each_backend):
    n = 512
    loss = score_matching_loss(lambda x, t: x * 0.0, zeros(n, 28, 28, 1), SDE, Rng(0))
    assert loss.shape == () and str(loss.dtype) == "float32"
    assert loss.item() == pytest.approx(784, abs=5 * math.sqrt(2 * 784 / n))


def test_a_model_that_knows_the_image_has_none(each_backend):
    x0 = Rng(1).uniform((16, 6, 6, 1))
    loss = score_matching_loss(lambda x, t: -(x - x0) / per_sample(SDE.marginal_std(t), x) ** 2, x0, SDE, Rng(0))
    assert loss.item() < 1e-3  # rounding of x / s at s = 0.003; the sign the other way would make 4 * 36


def test_of_a_denoiser_it_is_the_error_over_the_noise_level(each_backend):
    x0 = Rng(1).uniform((16, 6, 6, 1))
    loss = score_matching_loss(Denoiser(lambda x, noise: x * 0.3, 0.5), x0, SDE, Rng(0))
    _, t, _, x = noised(x0, SDE, Rng(0), uniform(), 0)
    sigma = SDE.marginal_std(t)
    errors = (Denoiser(lambda x, noise: x * 0.3, 0.5)(x, sigma) - x0) / per_sample(sigma, x0)
    assert loss.item() == pytest.approx(float((errors * errors).sum()) / 16, rel=1e-4)


@pytest.mark.parametrize("variance, expected", [(1.0, 0.340854), (0.25, 0.194807), (0.09, 0.116630)])
def test_the_exact_score_of_gaussian_data_reaches_the_optimum(each_backend, variance, expected):
    n = 200_000
    x0 = Rng(2).normal((n, 1)) * math.sqrt(variance) + 0.3
    best = score_matching_loss(gaussian_score(0.3, variance), x0, SDE, Rng(0)).item()
    assert best == pytest.approx(expected, abs=5 * math.sqrt(3 * expected / n))
    for wrong in (
        gaussian_score(0.5, variance),
        gaussian_score(0.3, 1.5 * variance),
        lambda x, t: -gaussian_score(0.3, variance)(x, t),
    ):
        assert score_matching_loss(wrong, x0, SDE, Rng(0)).item() > best


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(each_backend):
    x0 = Rng(3).uniform((5, 4, 4, 1))
    model = gaussian_score(0.2, 0.1)
    whole = score_matching_loss(model, x0, SDE, Rng(9)).item()
    alone = [score_matching_loss(model, x0[i : i + 1], SDE, Rng(9), sample_offset=i).item() for i in range(5)]
    assert whole == pytest.approx(sum(alone) / 5, rel=1e-5)
    assert len(set(alone)) == 5


def test_each_call_draws_anew_and_each_seed_repeats():
    rng, x0, model = Rng(4), zeros(3, 2), gaussian_score(0.0, 1.0)
    first, second = (score_matching_loss(model, x0, SDE, rng).item() for _ in range(2))
    assert first != second
    assert score_matching_loss(model, x0, SDE, Rng(4)).item() == first


def test_times_lie_between_eps_and_one():
    seen = []

    def model(x, t):
        seen.append(t.numpy())
        return x

    score_matching_loss(model, zeros(4096, 1), SDE, Rng(0), eps=0.25)
    t = seen[0]
    assert t.shape == (4096,) and t.dtype == np.float32 and 0.25 <= t.min() < 0.26 and 0.99 < t.max() <= 1


@pytest.mark.parametrize(
    "times, cdf",
    [
        (uniform(0.25), lambda t: (t - 0.25) / (10 - 0.25)),
        (logit_normal(0.5, 0.8), lambda t: (1 + ops.erf((ops.log(t / (10 - t)) - 0.5) / 0.8 / math.sqrt(2))) / 2),
        (log_normal(-1.0, 0.7), lambda t: (1 + ops.erf((ops.log(t) + 1.0) / 0.7 / math.sqrt(2))) / 2),
    ],
    ids=["uniform", "logit-normal", "log-normal"],
)
def test_times_have_their_law_whatever_the_end_of_the_process(each_backend, times, cdf):
    n, seen = 4096, []
    model = ScoreModel(lambda x, t: (seen.append(t), x)[1], Brownian(1.0, t_max=10.0))
    denoising_loss(model, zeros(n, 1), Rng(0), times=times)
    assert kolmogorov.distance(seen[0].data, cdf) < kolmogorov.threshold(n)


def test_the_score_is_learned_up_to_the_end_of_the_process(each_backend):
    n, seen = 4096, []
    score_matching_loss(lambda x, t: (seen.append(t), x)[1], zeros(n, 1), Brownian(1.0, t_max=10.0), Rng(0), eps=0.25)
    assert kolmogorov.distance(seen[0].data, lambda t: (t - 0.25) / 9.75) < kolmogorov.threshold(n)


def test_a_seed_for_an_rng_is_an_error():
    """It would draw the same noise at every step."""
    for loss in (score_matching_loss, explicit_loss, implicit_loss, sliced_loss):
        options = {"score": gaussian_score(0, 1)} if loss is explicit_loss else {}
        with pytest.raises(TypeError, match=r"draws anew at each step, so it takes an Rng: make Rng\(3\) once, not 3"):
            loss(gaussian_score(0, 1), zeros(2, 3), SDE, 3, **options)
    with pytest.raises(TypeError, match="not 3"):
        denoising_loss(ScoreModel(gaussian_score(0, 1), SDE), zeros(2, 3), 3)
    with pytest.raises(TypeError, match="not 3"):
        edm_loss(Denoiser(lambda x, t: x, 0.5), zeros(2, 3), 3)


def test_the_gradient_reaches_the_model(each_backend):
    """The loss is a parabola in a for the score -a x / (v + s^2), so a central difference of any width is exact."""
    x0 = backend.to_device(Rng(5).normal((8, 3), "float64"))

    def loss(a):
        return score_matching_loss(lambda x, t: gaussian_score(0.0, 0.5)(x, t) * a, x0, SDE, Rng(6))

    a = tensor(0.7, "float64", requires_grad=True)
    out = loss(a)
    out.backward()
    assert str(out.dtype) == "float64"
    assert a.grad.item() == pytest.approx(
        (loss(tensor(1.7, "float64")).item() - loss(tensor(-0.3, "float64")).item()) / 2, rel=1e-6
    )


def test_conditions_are_passed_on_and_x0_may_be_a_tensor():
    def model(x, t, *, label, scale):
        assert label is mark and scale == 2
        return ops.negative(x)

    mark = object()
    by_array = score_matching_loss(model, zeros(2, 3), SDE, Rng(0), label=mark, scale=2)
    by_tensor = score_matching_loss(model, Tensor(zeros(2, 3)), SDE, Rng(0), label=mark, scale=2)
    assert by_array.item() == by_tensor.item()


@pytest.mark.parametrize("eps", [0, 1, -0.1, 2.0, float("nan")])
def test_an_eps_outside_is_an_error(eps):
    with pytest.raises(ValueError, match=rf"eps must be a number in \(0, 1.0\), not {eps!r}"):
        score_matching_loss(gaussian_score(0, 1), zeros(2, 3), SDE, Rng(0), eps=eps)


def test_pictures_that_were_not_scaled_are_an_error(each_backend):
    x0 = backend.to_device(np.zeros((2, 3), np.uint8))
    with pytest.raises(TypeError, match=r"must be of floats .* not uint8 of shape \(2, 3\)"):
        score_matching_loss(gaussian_score(0, 1), x0, SDE, Rng(0))


def test_a_model_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"returned shape \(2, 3\) for x of shape \(2, 3, 1\)"):
        score_matching_loss(lambda x, t: x.reshape(2, 3), zeros(2, 3, 1), SDE, Rng(0))


LOSSES = {
    "score_matching": lambda x0: score_matching_loss(lambda x, t: x, x0, SDE, Rng(0)),
    "denoising": lambda x0: denoising_loss(ScoreModel(lambda x, t: x, SDE), x0, Rng(0)),
    "edm": lambda x0: edm_loss(Denoiser(lambda x, t: x, 0.5), x0, Rng(0)),
    "likelihood": lambda x0: likelihood_loss(Denoiser(lambda x, t: x, 0.5), x0, Rng(0)),
    "explicit": lambda x0: explicit_loss(lambda x, t: x, x0, SDE, Rng(0), score=lambda x, t: x),
    "implicit": lambda x0: implicit_loss(lambda x, t: x, x0, SDE, Rng(0)),
    "sliced": lambda x0: sliced_loss(lambda x, t: x, x0, SDE, Rng(0)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 4, 4, 1), ()])
def test_the_loss_of_an_empty_batch_is_an_error_and_not_nan(each_backend, loss, shape):
    with pytest.raises(ValueError, match=rf"the batch not empty, not of shape {re.escape(str(shape))}"):
        loss(zeros(*shape))
