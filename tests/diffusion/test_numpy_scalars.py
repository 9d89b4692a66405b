"""NumPy scalars in place of numbers, and processes written in NumPy, change no dtype: a model in float32 is never asked
in float64, and everything that comes out is float32."""

import copy
import pickle

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, ops
from tinydiff.diffusion import (
    METHODS,
    VESDE,
    VPSDE,
    Brownian,
    CosineSchedule,
    Denoiser,
    FlowSDE,
    Guided,
    KarrasSDE,
    LinearSchedule,
    Method,
    ScoreModel,
    SubVPSDE,
    bits_per_dimension,
    denoising_loss,
    edm_loss,
    inpaint,
    karras_times,
    likelihood_loss,
    log_likelihood,
    sample,
    score_matching_loss,
    score_of,
    sigma_at,
    time_at,
    uniform_times,
)
from tinydiff.diffusion.edit import denoise, image_to_image, interpolate, spherical
from tinydiff.diffusion.exact import Exact, forward_diffusion_1d, point_mass, reverse_diffusion_1d
from tinydiff.diffusion.loss import explicit_loss, implicit_loss, log_normal, logit_normal, sliced_loss, uniform
from tinydiff.diffusion.predict import TARGETS, flow_velocity
from tinydiff.diffusion.process import SDE, plain
from tinydiff.diffusion.runge_kutta import solve
from tinydiff.rng import as_rng

pytestmark = pytest.mark.usefixtures("numpy_backend")
F = np.float64


class InNumPy:
    """Variance preserving, with a constant beta, as a user of NumPy may write it: nothing in it is a Python float, so
    that even its arrays are of float64."""

    t_max, beta = F(1.0), F(8.0)

    def drift(self, x, t):
        return self.beta * x * F(-0.5) * np.ones(x.shape)

    def diffusion(self, t):
        return np.sqrt(self.beta) * np.ones(np.shape(t))

    def marginal_scale(self, t):
        return np.exp(self.beta * np.asarray(t, float) / -2)

    def marginal_std(self, t):
        return np.sqrt(-np.expm1(-self.beta * np.asarray(t, float)))

    def prior(self, shape, rng, *, sample_offset=0):
        return F(1) * as_rng(rng).normal(shape, sample_offset=sample_offset)

    def prior_log_density(self, x):
        return np.asarray(-(x**2).sum(axis=1) / 2, float)


class Schedule:
    def beta(self, t):
        return F(8.0) * np.cosh(F(0.1) * t)

    def integral(self, t):
        return F(80.0) * np.sinh(F(0.1) * t)


class Inheriting(SDE):
    """A process that takes its prior from SDE."""

    def drift(self, x, t):
        return F(0.0)

    def diffusion(self, t):
        return np.sqrt(F(2) * t)

    def marginal_scale(self, t):
        return np.ones(np.shape(t))

    def marginal_std(self, t):
        return np.sqrt(F(1) * t * t)


PROCESSES = {
    "ve": VESDE(F(25.0)), "vp": VPSDE(LinearSchedule(F(0.1), F(20.0))), "cosine": VPSDE(CosineSchedule(F(0.008))),
    "subvp": SubVPSDE(), "flow": FlowSDE(F(0.999)), "karras": KarrasSDE(F(80.0)), "brownian": Brownian(F(2.0), F(1.0)),
    "in NumPy": InNumPy(), "schedule in NumPy": VPSDE(Schedule()), "inheriting": Inheriting(),
}  # fmt: skip
OPTIONS = {
    "predictor_corrector": {"snr": F(0.16)},
    "rk45": {"rtol": F(1e-2), "atol": F(1e-2)},
    "ddim": {"eta": F(0.5)},
    "heun": {"s_churn": F(9), "s_tmin": F(0.01), "s_tmax": F(50), "s_noise": F(1.003)},
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_method = pytest.mark.parametrize("name", METHODS)


def narrow(*arrays):
    return all(str(a.dtype) == "float32" for a in arrays)


def score(x, t, **condition):
    """A model of float32, which refuses everything else."""
    assert narrow(x, t) and t.shape == x.shape[:1]
    return x * -0.001


def data(*shape):
    return Rng(5).normal(shape)


@every_method
@every_process
def test_sampling(name, process):
    def seen(step, t, x, denoised):
        assert narrow(x, denoised) and (type(t) is float or narrow(t))

    options = {
        "method": METHODS[name](**OPTIONS.get(name, {})), "steps": np.int64(1000 if name == "rk45" else 4),
        "eps": F(0.01), "sample_offset": np.int64(2),
    }  # fmt: skip
    start = (data(2, 3), F(process.t_max) / 2)
    assert narrow(sample(score, (np.int64(2), 3), process, 0, callback=seen, **options))
    assert narrow(sample(score, (2, 3), process, 0, start=start, microbatch=np.int64(1), **options))
    if name != "rk45":
        timesteps = lambda *a: [F(t) for t in karras_times(*a, rho=F(7))]  # noqa: E731
        assert narrow(sample(score, (2, 3), process, 0, timesteps=timesteps, **options))


@pytest.mark.parametrize("predicts", TARGETS)
@every_process
def test_every_prediction_learns_and_samples(predicts, process):
    model = ScoreModel(score, process, predicts, sigma_data=F(0.5))
    x, t = Tensor(data(2, 3)), F(process.t_max) / 2
    results = [model(x, t), model.denoised(x, np.float32(t)), model.noise(x, np.full(2, t)), model.score(x, t)]
    if not isinstance(process, KarrasSDE):
        results.append(model(x, np.int64(1)) if process.t_max >= 1 else model(x, t))
    for times in (None, uniform(F(0.01)), logit_normal(F(0), F(1)), lambda n, *_: np.full(n, t)):
        for weight in (None, lambda t: np.exp(F(-1) * t), lambda t: F(2.0), lambda t: np.ones(len(t), int)):
            results.append(denoising_loss(model, data(2, 3), Rng(0), times=times, weight=weight))
    results.append(sample(model, (2, 3), process, 0, steps=3, eps=F(0.01)))
    assert narrow(*results)


@every_process
def test_the_losses(process):
    x0, options = data(2, 3), {"eps": F(0.01), "sample_offset": np.int64(1)}
    results = [
        loss(score, x0, process, Rng(0), **options) for loss in (score_matching_loss, implicit_loss, sliced_loss)
    ]
    results.append(explicit_loss(score, x0, process, Rng(0), score=lambda x, t: -x.numpy() / F(2), **options))
    assert narrow(*results)


def test_the_losses_of_edm_and_of_likelihood():
    results = [edm_loss(Denoiser(score, F(0.5)), data(2, 3), Rng(0), mean=F(-1.2), std=F(1.2))]
    for process in (KarrasSDE(F(80)), KarrasSDE()):
        model = ScoreModel(score, process, "edm", sigma_data=F(0.5))
        results.append(likelihood_loss(model, data(2, 3), Rng(0), eps=F(1e-3)))
        results.append(denoising_loss(model, data(2, 3), Rng(0), times=log_normal(F(-1.2), F(1.2))))
    assert narrow(*results)


@every_process
def test_likelihood(process):
    options = {"rtol": F(1e-3), "atol": F(1e-3), "eps": F(0.1)}
    for more in ({"probes": np.int64(2)}, {"exact": True}):
        found = log_likelihood(score, data(2, 3), process, 0, sample_offset=np.int64(1), **options, **more)
        assert narrow(found) and found.shape == (2, 1 if "exact" in more else 2)
    rng = Rng(0)
    images = np.zeros((3, 2), np.uint8)
    bits = bits_per_dimension(
        score, images, process, rng, low=F(-1), high=F(1), probes=np.int64(2), microbatch=np.int64(2), **options
    )
    assert narrow(bits) and type(rng.step) is int


@every_process
def test_edits(process):
    x, eps = data(2, 4, 4, 1), F(0.01)
    middle = F(process.t_max) / 2
    results = [
        inpaint(score, x, x > 0, process, 0, steps=np.int64(2), resample=np.int64(2), eps=eps),
        image_to_image(score, x, process, 0, t=middle, steps=np.int64(3), eps=eps),
        interpolate(score, x[0], x[1], process, np.int64(3), steps=np.int64(3), eps=eps),
        denoise(score, x, process, sigma=F(sigma_at(process, middle))),
        denoise(score, x, process, sigma=np.full(2, sigma_at(process, middle))),
        spherical(x[0], x[0], [F(0.5)]), spherical(x[0], x[1], list(np.linspace(0, 1, 3))),
    ]  # fmt: skip
    assert narrow(*results)


def test_an_image_in_float64_is_filled_by_a_model_in_float32():
    x = data(2, 4, 4, 1).astype("float64")
    assert inpaint(score, x, x > 0, VESDE(), 0, steps=2, resample=2).dtype == "float64"  # as the images


@every_process
def test_denoisers_and_guidance(process):
    x, middle = data(2, 3), F(process.t_max) / 2
    denoiser = Denoiser(score, F(0.5))
    guided = Guided(denoiser, np.linspace(0, 1, 3)[1], digit=np.int64(3))
    assert type(guided.weight) is float
    results = [
        denoiser(Tensor(x), sigma) for sigma in (F(0.5), np.float32(0.5), np.int64(1), np.full(2, 0.5), [0.5, 1])
    ]
    results += [guided(Tensor(x), F(0.5)), sample(guided, (2, 3), process, 0, steps=3, eps=F(0.01))]
    results += [
        score_of(denoiser, process)(Tensor(x), t) for t in (middle, np.full(2, middle), Tensor(np.full(2, middle)))
    ]
    assert narrow(*results)


def test_a_plain_process_can_be_copied_and_compared():
    process = VESDE(5.0)
    for twin in (copy.copy(plain(process)), copy.deepcopy(plain(process)), pickle.loads(pickle.dumps(plain(process)))):
        assert twin.marginal_std(0.5) == process.marginal_std(0.5) and isinstance(twin, VESDE)
    assert plain(process) == process and hash(plain(process)) == hash(process)


@every_process
def test_a_process_is_asked_for_plain_numbers(process):
    asked, t = plain(process), F(process.t_max) / 2
    functions = asked.diffusion, asked.marginal_scale, asked.marginal_std, lambda t: sigma_at(process, t)
    assert isinstance(asked, type(process)) and repr(asked) == repr(process) and type(asked.t_max) is float
    for function in functions:
        assert type(function(t)) is float and type(function(np.float32(t))) is float
        several = function(np.full(2, t, np.float32))
        assert type(several) is float or narrow(several) and several.shape == (2,)
        several = function(Tensor(np.full(2, t, np.float32)))
        assert type(several) is float or isinstance(several, Tensor) and narrow(several)
    assert type(time_at(process, F(sigma_at(process, t)))) is float
    assert narrow(flow_velocity(process, data(2, 3), t, data(2, 3)))
    for timesteps in (uniform_times, karras_times):
        assert {type(u) for u in timesteps(process, np.int64(3), t, F(0.01))} == {float}
    exact = Exact(point_mass(F(0.5)), process)
    assert narrow(exact.score(data(4), t), exact.sample(np.int64(4), t, 0))


def test_a_gradient_by_the_time_is_kept():
    t = Tensor(np.full(2, 0.5, np.float32), requires_grad=True)
    plain(VESDE()).marginal_std(t).sum().backward()
    assert t.grad is not None


def test_a_method_of_ones_own_that_widens_asks_the_model_in_float32():
    def widening(state, *, stretch=1.0):
        assert type(stretch) is float
        x = state.x * np.ones(state.x.shape)
        for t, t_next in state.intervals:
            x = x + F(t_next - t) * flow_velocity(state.process, x, t, state.stop(x, t).score)
            state.score(x, np.full(len(x), t))
        return x

    assert narrow(sample(score, (2, 3), InNumPy(), 0, method=Method(widening, steps=3)(stretch=F(0.9))))
    assert repr(METHODS["heun"](s_churn=F(2))) == "heun(s_churn=2.0)"


def test_a_score_in_float64_makes_no_samples_in_float64():
    assert narrow(sample(lambda x, t: x.numpy() * F(-0.5), (2, 3), VESDE(), 0, steps=3))


def test_walks_and_equations():
    walk = forward_diffusion_1d(data(4), lambda t: F(1.0), t_max=F(2), steps=np.int64(3), rng=0)
    back = reverse_diffusion_1d(walk[1][-1], np.sqrt, lambda x, t: x * F(-1), t_max=F(2), steps=np.int64(3), rng=0)
    assert narrow(walk[1], back[1]) and {type(t) for t in (*walk[0], *back[0])} == {float}
    for _, y in solve(lambda y, t: -y, data(2, 3), F(0), F(1), rtol=F(1e-3), atol=F(1e-3), steps=np.int64(99)):
        assert narrow(y)


def test_float64_stays_float64():
    x = Rng(0).normal((2, 3), "float64")
    model = lambda x, t: ops.negative(x)  # noqa: E731
    results = [sample(model, (2, 3), p, 0, start=(x, 0.5), steps=3) for p in (VESDE(), InNumPy())]
    results += [score_matching_loss(model, x, VPSDE(), Rng(0)), log_likelihood(model, x, InNumPy(), 0, eps=0.01)]
    assert {str(backend.to_host(getattr(r, "data", r)).dtype) for r in results[:2]} == {"float64"}
    assert {str(r.dtype) for r in results} == {"float64"}
