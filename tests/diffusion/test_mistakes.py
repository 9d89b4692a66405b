"""Mistakes of the lineage, made here on purpose: the wrong result beside the right one, as in docs/mistakes.md.

The numbers of that page are asserted here, by tests with the numbers of its sections.
"""

import math

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, grad, nn, ops, tensor
from tinydiff.data import GaussianMixture
from tinydiff.diffusion import VESDE, Brownian, ScoreModel, denoising_loss, sample, score_matching_loss
from tinydiff.diffusion.exact import Exact, forward_diffusion_1d, point_mass, reverse_diffusion_1d
from tinydiff.diffusion.loss import log_normal
from tinydiff.models.tutorial import Autoencoder, ScoreUNet

pytestmark = pytest.mark.usefixtures("numpy_backend")
N = 10_000
CLOSE = 5 / math.sqrt(2 * N)  # five standard errors of a standard deviation from N samples, relative
SDE = VESDE(25.0)


def zeros(*shape):
    return backend.to_device(np.zeros(shape, np.float32))


def std(x):
    return float(np.asarray(backend.to_host(x), np.float64).std())


@pytest.mark.parametrize(("steps", "wrong"), [(100, 100.0), (400, 400.0)])
def test_1_a_step_without_the_root_of_dt_depends_on_the_number_of_steps(steps, wrong):
    """After a time of 10 with strength 1 the variance is 10; the text's x + r makes 100 in 100 steps."""
    rng, x = Rng(0), zeros(N)
    for _ in range(steps):
        x = x + rng.normal(N)
    assert std(x) ** 2 == pytest.approx(wrong, rel=2 * CLOSE)
    _, path = forward_diffusion_1d(zeros(N), lambda t: 1.0, t_max=10.0, steps=steps, rng=0)
    assert std(path[-1]) ** 2 == pytest.approx(10, rel=2 * CLOSE)


def test_2_the_noise_that_has_gathered_is_not_the_noise_that_is_added():
    """At t = 0.5: g = 5, s = 1.93. The walk has the standard deviation s."""
    assert SDE.diffusion(0.5) == pytest.approx(5) and SDE.marginal_std(0.5) == pytest.approx(1.930805)
    _, path = forward_diffusion_1d(zeros(N), SDE.diffusion, t_max=0.5, steps=400, rng=1)
    assert std(path[-1]) == pytest.approx(1.93, rel=CLOSE + 0.005)  # the second: the sum of g^2 dt for the integral
    assert SDE.diffusion(0.0) == 1 and SDE.marginal_std(0.0) == 0


def test_3_the_noised_sample_is_not_one_step_away():
    """At t = 0.5 its deviation is 1.93; one step of 0.5 makes 0.71, and one of 0.001 made there adds 0.16."""
    _, once = forward_diffusion_1d(zeros(N), SDE.diffusion, t_max=0.5, steps=1, rng=2)
    assert std(once[-1]) == pytest.approx(0.7071, rel=CLOSE)
    assert SDE.diffusion(0.5) * math.sqrt(0.001) == pytest.approx(0.158, abs=0.001)
    seen = []
    score_matching_loss(
        lambda x, t: seen.append((x.numpy(), t.numpy())) or x, zeros(N, 1), SDE, Rng(3), eps=0.4999, sample_offset=0
    )
    x, t = seen[0]
    near = x[abs(t - 0.5) < 0.02, 0]
    assert near.std() == pytest.approx(1.93, rel=5 / math.sqrt(2 * len(near)) + 0.05)


def minimum(loss):
    """Where a parabola has its minimum: from three of its points."""
    low, middle, high = (loss(a) for a in (0.0, 0.1, 0.2))
    return 0.1 + 0.1 * (low - high) / (2 * (low - 2 * middle + high))


def test_4_the_two_objectives_differ_by_a_weight():
    """For data of variance 1 and the model -a x, the same a at every time: without the weight s^2 the best a is
    1 / (1 + E s^2) = 0.063, with it E s^2 / (E s^2 + E s^4) = 0.020. The weights themselves differ by 10^7 over time.
    """
    x0 = Rng(0).normal((200_000, 1), "float64")

    def model(a):
        return lambda x, t: x * -a

    plain = minimum(lambda a: denoising_loss(ScoreModel(model(a), SDE, "score"), x0, Rng(1)).item())
    weighed = minimum(
        lambda a: denoising_loss(
            ScoreModel(model(a), SDE, "score"), x0, Rng(1), weight=lambda t: SDE.marginal_std(t) ** 2
        ).item()
    )
    t = (np.arange(100_000) + 0.5) / 100_000
    s2 = np.array([SDE.marginal_std(float(u)) ** 2 for u in t])
    assert plain == pytest.approx(1 / (1 + s2.mean()), rel=0.05) and plain == pytest.approx(0.063, rel=0.05)
    assert weighed == pytest.approx(s2.mean() / (s2 + s2**2).mean(), rel=0.02)
    assert weighed == pytest.approx(0.020, rel=0.03)
    assert weighed == pytest.approx(minimum(lambda a: score_matching_loss(model(a), x0, SDE, Rng(1)).item()), rel=1e-6)
    assert (SDE.marginal_std(1.0) / SDE.marginal_std(1e-5)) ** 2 == pytest.approx(9.7e6, rel=0.01)


def test_5_the_predicted_noise_is_minus_s_times_the_score():
    """For images that are all the same the exact score has the loss 0; with a minus it has 4 per pixel, 3136."""
    n, seen = 200, []

    def exact(x, t):
        s = SDE.marginal_std(t).reshape((-1, 1, 1, 1))
        seen[:] = [s, -x / (s * s), x / s]
        return seen[1]

    assert score_matching_loss(exact, zeros(n, 28, 28, 1), SDE, Rng(0)).item() < 1e-3
    s, score, z = seen
    wrong = ops.square(s * score - z).sum().item() / n
    assert wrong == pytest.approx(4 * 784, rel=5 * math.sqrt(2 / (784 * n)))


@pytest.mark.parametrize(("steps", "right"), [(100, 0.316), (1000, 0.1)])
def test_6_the_score_is_a_magnitude_too(steps, right):
    """The reverse walk from T = 10 to a point. With the score, the noise of the last step remains, sqrt(dt). With its
    direction alone, of length 1, the walk does not converge to the point, and more steps do not help: 0.8."""
    exact = Exact(point_mass(0.0), Brownian(1.0, t_max=10.0))
    start = exact.sample(N, 10.0, Rng(0))
    results = []
    for score in (exact.score, lambda x, t: ops.sign(exact.score(x, t))):
        _, path = reverse_diffusion_1d(start, lambda t: 1.0, score, t_max=10.0, steps=steps, rng=1)
        results.append(std(path[-1]))
    assert results[0] == pytest.approx(right, rel=CLOSE + 0.001)
    assert results[1] == pytest.approx(0.79, abs=0.04)


def test_6_a_posterior_is_not_the_density():
    """x = 2 z + 0.5 e, z and e ~ N(0, 1): by Bayes the latent of x is N(2 x, 0.25) / 4.25, as narrow for a rare x
    as for the most frequent one. The densities of 0 and 6 differ by exp(6^2 / 8.5) = 69."""
    z = backend.to_host(Rng(0).normal(4_000_000)).astype(float)
    x = 2 * z + 0.5 * backend.to_host(Rng(1).normal(4_000_000)).astype(float)
    near = {at: z[abs(x - at) < 0.1] for at in (0.0, 6.0)}
    for at, latents in near.items():
        assert latents.std() == pytest.approx(0.5 / math.sqrt(4.25), rel=0.03)
        assert latents.mean() == pytest.approx(2 * at / 4.25, abs=0.02)
    assert len(near[0.0]) / len(near[6.0]) == pytest.approx(math.exp(36 / 8.5), rel=0.05)


def test_7_the_way_back_starts_at_the_root_of_the_time():
    """Data of variance 1, T = 10: started with variance T + 1 it comes back as 1.00, with variance T^2 as 1.74."""
    exact = Exact(GaussianMixture([1.0], [0.0], [1.0]), Brownian(1.0, t_max=10.0))
    results = []
    for spread in (math.sqrt(11), 10.0):
        start = Rng(0).normal(N) * spread
        _, path = reverse_diffusion_1d(start, lambda t: 1.0, exact.score, t_max=10.0, steps=1000, rng=1)
        results.append(std(path[-1]) ** 2)
    assert results[0] == pytest.approx(1.0, rel=2 * CLOSE + 0.01)  # the second: 1000 steps
    # x(0) given x(T) is N(x(T) / 11, 10 / 11): 100 / 121 + 10 / 11.
    assert results[1] == pytest.approx(1.74, rel=2 * CLOSE + 0.01)


@pytest.mark.parametrize(("n", "left"), [(500, 0.0504), (250, 0.2009)])
def test_8_the_last_step_must_not_go_past_the_data(n, left):
    """Images that are all the same. The notebook makes n updates over n - 1 intervals, the last of them from t = 0.001
    by a whole step, twice (or four times) what removes the noise. Ours ends with one denoising step: nothing is left.
    """

    def score(x, t):
        return x / -(SDE.marginal_std(t).reshape((-1, 1)) ** 2)

    rng = Rng(0)
    x = SDE.prior((N, 1), rng)
    h = (1 - 1e-3) / (n - 1)
    for i in range(n):
        t = 1 - i * h
        g2 = SDE.diffusion(t) ** 2
        mean = x + g2 * h * score(x, backend.to_device(np.full(N, t, np.float32)))
        x = mean + math.sqrt(h * g2) * rng.normal((N, 1))
    assert std(mean) == pytest.approx(left, rel=CLOSE)  # both by the recursion of the variance
    ours = sample(score, (N, 1), SDE, Rng(0), method="euler_maruyama", steps=n)
    assert std(ours) < 1e-4


def test_10_pixels_and_latents():
    """A net of pixels refuses latents. And EDM's levels are for data of deviation 1/2: those above the deviation of
    the data, at which it is decided what there will be, come up 1 time in 6, and for deviation 5 1 time in 100."""
    with pytest.raises(ValueError, match=r"\(2, 10, 10, 4\)"):
        ScoreUNet(SDE.marginal_std)(Tensor(zeros(2, 10, 10, 4)), Tensor(zeros(2)))
    levels = backend.to_host(log_normal()(100_000, 80.0, Rng(0), "float32", 0))
    assert (levels > 5).mean() == pytest.approx(0.0096, abs=0.0015)
    assert (levels > 1).mean() == pytest.approx(0.159, abs=0.006)


def test_10_batch_norm_while_encoding():
    """The latent of an image depends on the other images while batch norms train; in evaluation it does not."""
    net = Autoencoder(rng=Rng(0))
    x = Tensor(Rng(1).uniform((8, 28, 28, 1)))
    dark = ops.concatenate([x[:1], x[1:] * 0.1], axis=0)

    def change():
        a, b = (net.encode(batch)[:1].numpy() for batch in (x, dark))
        return float(abs(a - b).max())

    assert change() > 0.3
    net.eval()
    assert change() < 1e-5


def test_11_times_close_by_look_unrelated_and_borders_are_thrown_away():
    """The Fourier features of two times 0.01 apart have the similarity 0.17, 0.02 apart 0.001, averaged over
    frequencies of scale 30. Of 26 x 26, a convolution of 3 x 3 with stride 2 and no padding never sees the last row and
    column.
    """
    features = nn.FourierFeatures(20_000, scale=30.0, rng=Rng(0))
    e = features(tensor([0.5, 0.51, 0.52])).numpy()
    similarity = e @ e[0] / 10_000
    for i, expected in ((1, 0.17), (2, 0.001)):
        assert similarity[i] == pytest.approx(math.exp(-((2 * math.pi * 30 * 0.01 * i) ** 2) / 2), abs=0.04)
        assert similarity[i] == pytest.approx(expected, abs=0.04)
    x = Tensor(Rng(1).normal((1, 26, 26, 1)), requires_grad=True)
    y = ops.conv2d(x, Tensor(Rng(2).normal((3, 3, 1, 1))), stride=2)
    (g,) = grad(ops.square(y).sum(), x)
    seen = g.numpy()[0, :, :, 0] != 0
    assert y.shape == (1, 12, 12, 1)
    assert not seen[25].any() and not seen[:, 25].any() and seen[:25, :25].all()
