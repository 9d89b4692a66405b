"""The contract of `sample` for every method: the timesteps, the last step, seeds, microbatches, and errors at the call.
The laws of the methods are in test_methods_ode.py and test_methods_noise.py."""

import copy
import pickle

import kolmogorov
import numpy as np
import pytest
from mixtures import constant_vp, gaussian_score

from tinydiff import Rng, Tensor, backend, grad_enabled, ops
from tinydiff.data import GaussianMixture
from tinydiff.diffusion import (
    METHODS,
    VESDE,
    Brownian,
    Counted,
    Denoiser,
    FlowSDE,
    Guided,
    KarrasSDE,
    Method,
    heun,
    karras_times,
    method,
    process,
    sample,
    score_of,
    sigma_at,
    steps_for,
    uniform_times,
)
from tinydiff.diffusion import methods as process_methods
from tinydiff.diffusion.exact import Exact
from tinydiff.diffusion.loss import log_normal, logit_normal, uniform
from tinydiff.diffusion.predict import flow_velocity
from tinydiff.engine import array_of

SDE = VESDE(25.0)
every_method = pytest.mark.parametrize("name", METHODS)
all_but_rk45 = pytest.mark.parametrize("name", [name for name in METHODS if name != "rk45"])


def steps(name, n):
    """n; for rk45 more, because its steps are an upper limit."""
    return 1000 if name == "rk45" else n


# ---------------------------------------------------------------- the stops and the last step


@all_but_rk45
def test_the_callback_sees_every_stop(name):
    seen = []
    options = {"steps": 4, "eps": 0.2, "timesteps": uniform_times, "callback": lambda *a: seen.append(a)}
    x = sample(gaussian_score(0.2, 0.1, SDE), (2, 3), SDE, 0, method=name, **options)
    assert [a[0] for a in seen] == [0, 1, 2, 3, 4]
    assert [a[1] for a in seen] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2]) and seen[-1][1] == 0.2
    assert all(a[2].shape == a[3].shape == (2, 3) for a in seen)
    np.testing.assert_array_equal(backend.to_host(seen[-1][3]), backend.to_host(x))
    np.testing.assert_array_equal(backend.to_host(seen[0][2]), backend.to_host(SDE.prior((2, 3), 0)))


def test_the_callback_of_rk45_sees_one_time_per_sample():
    seen = []
    x = sample(gaussian_score(0.2, 0.1, SDE), (2, 3), SDE, 0, method="rk45", callback=lambda *a: seen.append(a))
    assert [a[0] for a in seen] == list(range(len(seen))) and seen[-1][1] == 1e-3
    times = np.array([backend.to_host(a[1]) for a in seen[:-1]])  # (rounds, 2)
    assert (times[0] == 1).all() and (np.diff(times, axis=0) <= 0).all() and times[-1] == pytest.approx(1e-3)
    np.testing.assert_array_equal(backend.to_host(seen[-1][3]), backend.to_host(x))


@every_method
@pytest.mark.parametrize("sde", [SDE, constant_vp()], ids=["VE", "VP"])
def test_the_last_step_denoises(each_backend, name, sde):
    """What is returned is what the score takes x at t = eps to be, in closed form."""
    eps, mean, variance, last = 0.1, 0.5, 0.25, {}
    x = sample(gaussian_score(mean, variance, sde), (5, 3), sde, 1, method=name, steps=steps(name, 20), eps=eps,
                       callback=lambda *a: last.update(t=a[1], x=backend.to_host(a[2])))  # fmt: skip
    m, s2 = sde.marginal_scale(eps), sde.marginal_std(eps) ** 2
    exact = mean + m * variance / (m * m * variance + s2) * (last["x"] - m * mean)
    assert last["t"] == eps
    np.testing.assert_allclose(backend.to_host(x), exact, rtol=1e-4, atol=1e-5)


@all_but_rk45
@pytest.mark.parametrize("n", [1, 2, 7])
def test_evaluations_are_counted_as_stated(name, n):
    score = Counted(gaussian_score(0.2, 0.1, SDE))
    sample(score, (2, 3), SDE, 0, method=name, steps=n)
    assert score.nfe == (2 * n + 1 if name in ("predictor_corrector", "probability_flow", "heun") else n + 1)
    assert steps_for(name, score.nfe) == n


@every_method
def test_it_may_begin_anywhere(each_backend, name):
    """From x at t = 0.4: the first stop is there, nothing is drawn for the prior, and float64 stays float64."""
    seen, x = [], backend.to_device(np.arange(6.0).reshape(2, 3))
    out = sample(gaussian_score(0.2, 0.1, SDE), (2, 3), SDE, 0, method=name, steps=steps(name, 5), start=(x, 0.4),
                         callback=lambda *a: seen.append(a))  # fmt: skip
    assert backend.to_host(seen[0][1]) == pytest.approx(0.4) and str(out.dtype) == "float64"
    np.testing.assert_allclose(backend.to_host(seen[0][2]), backend.to_host(x), rtol=1e-12)


# ---------------------------------------------------------------- seeds


@every_method
def test_a_sample_is_the_same_alone_and_in_any_batch(each_backend, name):
    def run(n, offset=0):
        x = sample(gaussian_score(0.2, 0.1, SDE), (n, 4, 4, 1), SDE, 11, method=name, steps=steps(name, 7),
                   sample_offset=offset)  # fmt: skip
        assert backend.active().is_array(x) and str(x.dtype) == "float32"
        return backend.to_host(x)

    many = run(6)
    np.testing.assert_array_equal(run(1, offset=4), many[4:5])
    np.testing.assert_array_equal(run(3), many[:3])
    assert len({row.tobytes() for row in many}) == 6


@every_method
def test_an_rng_goes_on_and_a_seed_repeats(name):
    score, rng = gaussian_score(0.2, 0.1, SDE), Rng(3)
    first, second, again = (
        backend.to_host(sample(score, (2, 3), SDE, r, method=name, steps=steps(name, 2))) for r in (rng, rng, 3)
    )
    assert (first != second).all()
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize(
    "name, options, drawn",
    [
        ("euler_maruyama", {}, 6),
        ("predictor_corrector", {}, 11),
        ("ddpm", {}, 6),
        ("ddim", {}, 1),
        ("ddim", {"eta": 0.3}, 6),
        ("heun", {}, 1),
        ("probability_flow", {}, 1),
        ("dpm_solver", {}, 1),
    ],
)
def test_noise_is_drawn_by_those_that_say_so(name, options, drawn):
    rng = Rng(0)
    sample(gaussian_score(0, 1, SDE), (2, 3), SDE, rng, method=METHODS[name](**options), steps=5)
    assert rng.step == drawn


# ---------------------------------------------------------------- scores and denoisers


@every_method
def test_the_score_gets_tensors_one_time_per_sample_and_the_condition(name):
    calls = []

    def score(x, t, *, label):
        assert isinstance(x, Tensor) and isinstance(t, Tensor) and t.shape == (2,) and str(t.dtype) == "float32"
        assert label == "seven" and not grad_enabled()
        calls.append(t.numpy())
        return gaussian_score(0.2, 0.1, SDE)(x, t)

    sample(score, (2, 3), SDE, 0, method=name, steps=steps(name, 5), label="seven")
    assert calls and grad_enabled()


@every_method
@pytest.mark.parametrize("sde", [SDE, constant_vp()], ids=["VE", "VP"])
def test_a_denoiser_samples_as_its_score_does(each_backend, name, sde):
    """D = (variance x + sigma^2 mean) / (variance + sigma^2) is the denoiser of N(mean, variance)."""

    def denoise(x, sigma):
        s2 = array_of(sigma).reshape((-1, 1)) ** 2
        return (x * 0.25 + s2 * 0.5) / (s2 + 0.25)

    options = {"steps": steps(name, 9), "eps": 0.01}
    x, y = (backend.to_host(sample(score, (3, 2), sde, 4, method=name, **options))
            for score in (gaussian_score(0.5, 0.25, sde), score_of(denoise, sde)))  # fmt: skip
    np.testing.assert_allclose(x, y, atol=2e-4)


@every_method
@pytest.mark.parametrize("wrap", [lambda model: model, Counted, lambda model: Guided(model, 0.0)])
def test_a_denoiser_is_taken_as_the_score_that_belongs_to_it(name, wrap):
    """Also inside Counted and Guided."""
    sde, denoiser, options = constant_vp(), Denoiser(lambda x, noise: ops.sin(x), 0.5), {"method": name}
    options |= {"steps": steps(name, 5), "eps": 0.01}
    by_itself = sample(wrap(denoiser), (3, 2), sde, 4, **options)
    as_a_score = sample(score_of(denoiser, sde), (3, 2), sde, 4, **options)
    np.testing.assert_array_equal(backend.to_host(by_itself), backend.to_host(as_a_score))


@pytest.mark.parametrize(
    "name, options", [("ddim", {}), ("ddim", {"eta": 0.7}), ("ddpm", {"timesteps": karras_times}), ("heun", {}),
                      ("heun", {"s_churn": 2.0}), ("dpm_solver", {})]
)  # fmt: skip
def test_what_works_in_sigma_is_the_same_for_every_process(each_backend, name, options):
    """From the same y = x / m over the same noise levels, VP and the process whose time is sigma give the same images,
    in so few steps that each scale in the wrong place shows."""
    vp, eps = constant_vp(4.0), 0.05
    karras = KarrasSDE(sigma_at(vp, 1.0))
    y = Rng(0).normal((3, 2), "float64") * karras.t_max

    def denoise(x, sigma):
        s2 = array_of(sigma).reshape((-1, 1)) ** 2
        return (x * 0.25 + s2 * 0.5) / (s2 + 0.25) + ops.sin(x) * 0.1

    chosen = METHODS[name](**options)
    one = sample(score_of(denoise, vp), (3, 2), vp, 4, method=chosen, steps=3, eps=eps,
                 start=(y * vp.marginal_scale(1.0), 1.0))  # fmt: skip
    other = sample(score_of(denoise, karras), (3, 2), karras, 4, method=chosen, steps=3, eps=sigma_at(vp, eps),
                   start=(y, karras.t_max))  # fmt: skip
    np.testing.assert_allclose(backend.to_host(one), backend.to_host(other), rtol=1e-7)


def test_the_denoiser_is_given_the_noise_beside_an_image_of_its_own_scale():
    sde, seen = constant_vp(), {}

    def denoise(x, sigma):
        seen.update(x=array_of(x), sigma=array_of(sigma))
        return x

    x = backend.to_device(np.ones((2, 3)))
    score_of(denoise, sde)(x, backend.to_device(np.array([0.5, 0.5])))
    np.testing.assert_allclose(backend.to_host(seen["x"]), 1 / sde.marginal_scale(0.5))
    np.testing.assert_allclose(backend.to_host(seen["sigma"]), sigma_at(sde, 0.5))


# ---------------------------------------------------------------- errors


def test_integers_of_numpy_are_integers():
    shape, n = (np.int64(2), np.uint8(3)), np.int32(2)
    assert sample(gaussian_score(0, 1, SDE), shape, SDE, 0, method="euler_maruyama", steps=n).shape == (2, 3)


@every_method
def test_a_count_of_steps_may_be_the_largest_of_its_type(name):
    """np.uint8(255) + 1 is 0."""
    x, y = (backend.to_host(sample(gaussian_score(0, 1, SDE), (2, 3), SDE, 0, method=name, steps=n))
            for n in (np.uint8(255), 255))  # fmt: skip
    np.testing.assert_array_equal(x, y)


@every_method
@pytest.mark.parametrize(
    "eps, begin", [(1, 5), (np.float32(0.1), np.float32(5.3)), (np.float64(0.1), np.float64(5.3))], ids=repr
)
def test_times_of_any_type_are_as_floats(each_backend, name, eps, begin):
    """An int must reach the score as one time per sample, and NumPy's float64 must not turn float32 into float64."""
    sde, x, times = Brownian(t_max=10.0), Rng(0).normal((2, 3)), []
    options = {"steps": steps(name, 5), "callback": lambda step, t, x, denoised: times.append(t)}
    options["method"] = METHODS["heun"](s_churn=5.0) if name == "heun" else name
    got, known = (sample(gaussian_score(0.2, 0.1, sde), (2, 3), sde, 0, eps=kind(eps), start=(x, kind(begin)),
                         **options) for kind in (lambda t: t, float))  # fmt: skip
    assert str(got.dtype) == "float32"
    assert {type(t) for t in times} <= {float, type(x)} and times[-1] == float(eps)
    np.testing.assert_array_equal(backend.to_host(got), backend.to_host(known))


@every_method
def test_a_start_at_an_end_rounded_to_float32_is_at_the_end(name):
    """0.999 becomes 0.99900001; with churn too, which raises noise up to that of the prior."""
    sde, x = FlowSDE(), Rng(0).normal((2, 3))
    chosen = METHODS["heun"](s_churn=5.0) if name == "heun" else name
    score = gaussian_score(0.2, 0.1, sde)
    got, known = (
        backend.to_host(sample(score, (2, 3), sde, 0, method=chosen, steps=steps(name, 5), start=(x, t)))
        for t in (np.float32(0.999), 0.999)
    )
    np.testing.assert_array_equal(got, known)


@every_method
def test_no_samples_are_no_error(name):
    assert sample(gaussian_score(0, 1, SDE), (0, 3), SDE, 0, method=name, steps=2).shape == (0, 3)
    assert sample(gaussian_score(0, 1, SDE), (0, 3), SDE, 0, method=name, steps=2, microbatch=2).shape == (0, 3)


@every_method
@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps must be an integer of 1 or more, not 0"),
        ({"steps": 2.5}, "steps must be .* not 2.5"),
        ({"eps": 0}, r"eps must be a number in \(0, 1.0\), not 0"),
        ({"eps": 1.0}, r"eps must be a number in \(0, 1.0\), not 1.0"),
        ({"shape": (-1, 3)}, r"shape must be .* not \(-1, 3\)"),
        ({"shape": ()}, r"shape must be .* not \(\)"),
        ({"shape": (2.0, 3)}, r"shape must be .* not \(2.0, 3\)"),
        ({"score": lambda x, t: x.sum()}, r"the score returned shape \(\) for x of shape \(2, 3\)"),
        ({"sample_offset": -1}, "sample_offset must be an integer of 0 or more, not -1"),
        ({"sample_offset": 1.5}, "sample_offset must be .* not 1.5"),
        ({"start": (np.zeros((2, 4)), 0.5)}, r"x must be of floats and of shape \(2, 3\), not float64 of .*\(2, 4\)"),
        ({"start": (np.zeros((2, 3), int), 0.5)}, "x must be of floats .* not int64"),
        ({"start": (np.zeros((2, 3)), 1.2)}, r"start: t must be a number in \(0.001, 1.0\], not 1.2"),
        ({"start": (np.zeros((2, 3)), 1e-3)}, r"start: t must be a number in \(0.001, 1.0\], not 0.001"),
        ({"start": (np.zeros((2, 3)), float("nan"))}, "start: t must be .* not nan"),
    ],
)
def test_bad_arguments_are_quoted(name, change, message):
    arguments = {"score": gaussian_score(0, 1, SDE), "shape": (2, 3), "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        sample(arguments.pop("score"), arguments.pop("shape"), SDE, 0, method=name, **arguments)


@pytest.mark.parametrize(
    "timesteps",
    [
        lambda sde, steps, begin, end: [begin, end],
        lambda sde, steps, begin, end: [begin, 0.5, 0.6, end],
        lambda sde, steps, begin, end: [0.9, 0.6, 0.5, end],
        lambda sde, steps, begin, end: [begin, 0.6, 0.5, 0.0],
    ],
    ids=["too few", "rises", "begins elsewhere", "ends elsewhere"],
)
def test_timesteps_that_are_none_are_quoted(timesteps):
    with pytest.raises(ValueError, match=r"timesteps must give 4 times that decrease from 1.0 to 0.001, not \["):
        sample(gaussian_score(0, 1, SDE), (2, 3), SDE, 0, method="ddim", steps=3, timesteps=timesteps)


def test_rk45_takes_no_timesteps():
    with pytest.raises(
        ValueError, match="rk45 chooses its own timesteps, so it takes none, not <function uniform_times"
    ):
        sample(gaussian_score(0, 1, SDE), (2, 3), SDE, 0, method="rk45", timesteps=uniform_times)


def test_an_unknown_method_names_the_choices():
    with pytest.raises(ValueError, match="unknown method 'plms': choose one of euler_maruyama, .*, dpm_solver"):
        sample(gaussian_score(0, 1, SDE), (2, 3), SDE, 0, method="plms")
    with pytest.raises(ValueError, match=r"; did you mean 'heun'\?"):
        sample(gaussian_score(0, 1, SDE), (2, 3), SDE, 0, method="huen")
    with pytest.raises(ValueError, match="unknown method 'plms'"):
        steps_for("plms", 35)


def test_steps_for_equal_evaluations():
    assert {name: steps_for(name, 35) for name in METHODS if name != "rk45"} == {
        "euler_maruyama": 34, "predictor_corrector": 17, "ddpm": 34, "probability_flow": 17, "ddim": 34, "heun": 17,
        "dpm_solver": 34,
    }  # fmt: skip
    assert steps_for("heun", 36) == 17 == steps_for(METHODS["heun"](s_churn=1.0), 35)
    with pytest.raises(ValueError, match="rk45 takes as many evaluations as its tolerance asks for"):
        steps_for("rk45", 35)
    with pytest.raises(ValueError, match="a step of heun and the last one cost 3 evaluations, but nfe is 2"):
        steps_for("heun", 2)
    for nfe in (2.5, 35.0, float("nan"), None, 0):
        with pytest.raises(ValueError, match=f"nfe must be an integer of 1 or more, not {nfe}"):
            steps_for("heun", nfe)
    assert steps_for("heun", np.int64(35)) == 17 and type(steps_for("heun", np.int64(35))) is int


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: METHODS["ddim"](s_churn=1.0), "ddim has no option 's_churn': it has eta"),
        (lambda: METHODS["heun"](churn=1.0), "heun has no option 'churn': it has s_churn, s_tmin, s_tmax, s_noise"),
        (lambda: METHODS["ddpm"](eta=0.5), "ddpm has no option 'eta': it has none"),
        (lambda: Method(lambda state, *, a=1: state.x, b=2), "<lambda> has no option 'b': it has a"),
    ],
)
def test_an_option_that_a_method_does_not_have_is_quoted(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_an_option_among_the_conditions_is_an_error_that_says_where_it_belongs():
    """A net that accepts any condition would ignore it silently."""
    with pytest.raises(TypeError, match=r"s_churn is an option of the method: method=heun\(s_churn=1.0\)"):
        sample(lambda x, t, **labels: -x, (2, 3), SDE, 0, method="heun", steps=2, s_churn=1.0)
    message = r"s_churn is an option of heun, as in method=heun\(s_churn=1.0\); ddim has eta. If it is a condition"
    with pytest.raises(TypeError, match=message):
        sample(lambda x, t, **labels: -x, (2, 3), SDE, 0, method="ddim", steps=2, s_churn=1.0)
    seen = []
    sample(lambda x, t, **labels: seen.append(labels) or -x, (2, 3), SDE, 0, steps=2, condition={"eta": 0.5})
    assert seen[0] == {"eta": 0.5}


def test_options_of_a_method_are_kept_and_shown():
    heun = METHODS["heun"](s_churn=2.0)
    assert repr(heun) == "heun(s_churn=2.0)" and repr(heun(s_noise=1.0)) == "heun(s_churn=2.0, s_noise=1.0)"
    assert repr(METHODS["heun"]) == "heun" and "algorithm 2" in METHODS["heun"].__doc__
    assert (heun.steps, heun(steps=5).steps, heun.timesteps) == (17, 5, karras_times)
    score = Counted(gaussian_score(0, 1, SDE))
    sample(score, (2, 3), SDE, 0, method=heun(steps=5))
    assert score.nfe == 11


# ---------------------------------------------------------------- a method of one's own


@method(steps=4)
def euler(state, *, stretch=1.0):
    """Euler's method for the ODE in t, as in the docs."""
    x = state.x
    for t, t_next in state.intervals:
        x = x + (t_next - t) * stretch * flow_velocity(state.process, x, t, state.stop(x, t).score)
    return x


def test_a_method_of_ones_own_is_like_the_others(each_backend):
    score, stops = Counted(gaussian_score(0.2, 0.1, SDE)), []
    ours = sample(score, (3, 2), SDE, 1, method=euler, callback=lambda *a: stops.append(a[:2]))
    assert score.nfe == 5 == steps_for(euler, 5) + 1 and [step for step, _ in stops] == [0, 1, 2, 3, 4]
    theirs = sample(score, (3, 2), SDE, 1, method=METHODS["probability_flow"](solver="euler"), steps=4)
    np.testing.assert_array_equal(backend.to_host(ours), backend.to_host(theirs))
    other = sample(score, (3, 2), SDE, 1, method=euler(stretch=0.9))
    assert (backend.to_host(other) != backend.to_host(ours)).all()


def test_a_plain_function_is_a_method():
    def stay(state):
        return state.x

    x = sample(gaussian_score(0.2, 0.1, SDE), (3, 2), SDE, 1, method=stay)
    np.testing.assert_array_equal(
        backend.to_host(x), backend.to_host(sample(gaussian_score(0.2, 0.1, SDE), (3, 2), SDE, 1, method=Method(stay)))
    )


@pytest.mark.parametrize(
    "rule, message",
    [
        (lambda state: None, r"<lambda> must return x of shape \(2, 3\), not NoneType: None"),
        (lambda state: state.x[:1], r"<lambda> must return x of shape \(2, 3\), not ndarray: .*"),
    ],
)
def test_a_method_that_returns_something_else_is_quoted(numpy_backend, rule, message):
    with pytest.raises(ValueError, match=message):
        sample(gaussian_score(0, 1, SDE), (2, 3), SDE, 0, method=rule)


# ---------------------------------------------------------------- microbatches


@every_method
@pytest.mark.parametrize("size, threads", [(2, None), (3, 1), (4, 2)])
def test_microbatches_change_no_bit(each_backend, name, size, threads):
    """Neither in the samples nor in the later draws of the source; the score is elementwise, so the rounding is the
    same."""
    score, source, whole_source = gaussian_score(0.2, 0.1, SDE), Rng(11, step=5), Rng(11, step=5)
    options = {"method": name, "steps": steps(name, 6), "sample_offset": 3}
    whole = sample(score, (7, 4, 4, 1), SDE, whole_source, **options)
    parts = sample(score, (7, 4, 4, 1), SDE, source, microbatch=size, threads=threads, **options)
    np.testing.assert_array_equal(backend.to_host(parts), backend.to_host(whole))
    assert source.state() == whole_source.state()


def test_microbatches_cut_the_start_and_the_conditions(each_backend):
    """An array or Tensor with one row per sample is divided; anything else is the same for all parts."""
    seen = []

    def score(x, t, *, shift, scale, table, name):
        seen.append((len(x), shift.shape, table.shape, name))
        shift = shift.data if isinstance(shift, Tensor) else shift
        return -(x - shift.reshape((-1, 1))) * scale

    shift, start = Rng(0).normal(5), Rng(1).normal((5, 3))
    options = {"start": (start, 0.5), "steps": 3, "scale": 0.3, "table": Rng(2).normal((4, 3)), "name": "five5"}
    whole = sample(score, (5, 3), SDE, 0, shift=shift, **options)
    for given in (shift, Tensor(shift)):
        seen.clear()
        parts = sample(score, (5, 3), SDE, 0, shift=given, microbatch=2, threads=1, **options)
        np.testing.assert_array_equal(backend.to_host(parts), backend.to_host(whole))
        assert {call for call in seen} == {(2, (2,), (4, 3), "five5"), (1, (1,), (4, 3), "five5")}


@pytest.mark.parametrize("kind", [list, np.array])
def test_labels_in_a_list_are_cut_like_those_in_an_array(each_backend, kind):
    """A list that went whole to each part would not fit it, or be read as something else."""
    seen = []

    def score(x, t, *, digit, style, name):
        seen.append((len(x), list(digit), style, name))
        return -x * 0.5

    options = {"digit": kind([0, 1, 2, 3, 4]), "style": (7, 8, 9, 10, 11), "name": "five5"}  # a tuple is a value
    sample(score, (5, 3), SDE, 0, steps=1, microbatch=2, threads=1, **options)
    assert {(n, tuple(digits)) for n, digits, _, _ in seen} == {(2, (0, 1)), (2, (2, 3)), (1, (4,))}
    assert all((style, name) == ((7, 8, 9, 10, 11), "five5") for _, _, style, name in seen)
    seen.clear()
    sample(score, (5, 3), SDE, 0, steps=1, microbatch=5, **options)  # all at once: as they were given
    assert {tuple(digits) for _, digits, _, _ in seen} == {(0, 1, 2, 3, 4)}
    sample(lambda x, t, digit: -x * digit, (5, 3), SDE, 0, steps=1, microbatch=2, digit=3)  # one for all


def test_guidance_takes_its_condition_where_it_is_cut(each_backend):
    class Net:
        def __call__(self, x, noise, digit=None):
            return x * 0.0 if digit is None else x * 0.0 + digit.reshape((-1, 1))

    guided, sde, digits = Guided(Denoiser(Net(), 0.5), 1.0), KarrasSDE(), backend.to_device(np.arange(5.0, dtype="f"))
    whole = sample(guided, (5, 3), sde, 0, steps=3, digit=digits)
    parts = sample(guided, (5, 3), sde, 0, steps=3, digit=digits, microbatch=2)
    bound = sample(Guided(Denoiser(Net(), 0.5), 1.0, digit=digits), (5, 3), sde, 0, steps=3)
    np.testing.assert_array_equal(backend.to_host(parts), backend.to_host(whole))
    np.testing.assert_array_equal(backend.to_host(bound), backend.to_host(whole))


def test_a_microbatch_that_is_large_enough_is_no_part(each_backend):
    """So a callback may see it, which with several parts it may not."""
    score, stops = Counted(gaussian_score(0.2, 0.1, SDE)), []
    sample(score, (3, 2), SDE, 0, steps=2, microbatch=3, callback=lambda *a: stops.append(a[2].shape))
    assert stops == [(3, 2)] * 3 and score.nfe == 5
    sample(score, (0, 2), SDE, 0, steps=2, microbatch=3)
    with pytest.raises(ValueError, match="a callback sees all 3 samples, so it cannot be given with microbatch=2"):
        sample(score, (3, 2), SDE, 0, steps=2, microbatch=2, callback=print)
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match=f"microbatch must be an integer of 1 or more, not {bad}"):
            sample(score, (3, 2), SDE, 0, steps=2, microbatch=bad)
    with pytest.raises(ValueError, match="threads must be an integer of 1 or more, not 0"):
        sample(score, (3, 2), SDE, 0, steps=2, microbatch=1, threads=0)


# ---------------------------------------------------------------- every method on every process

KS_STEPS = {"euler_maruyama": 400, "predictor_corrector": 200, "ddpm": 400, "rk45": 1000}
KS_PROCESSES = {name: process(name) for name in ("ve", "vp", "subvp", "flow", "karras")}
MIXTURE = GaussianMixture([0.3, 0.5, 0.2], [-1.5, 0.0, 1.5], [0.04, 0.09, 0.04])


@every_method
@pytest.mark.parametrize("sde", KS_PROCESSES.values(), ids=KS_PROCESSES)
def test_samples_have_the_law_of_the_data_under_every_process(numpy_backend, name, sde):
    """2,000 samples by the exact score, within the distance of Kolmogorov and Smirnov that samples of the very law
    exceed in one of a thousand cases. Steps equal in t on the line of flow, whose noise level is infinite at its end,
    and equal in sigma^(1/7) under EDM, whose t is sigma."""
    n, options = 2000, {"steps": KS_STEPS.get(name, 100)}
    if name != "rk45" and isinstance(sde, (FlowSDE, KarrasSDE)):
        options["timesteps"] = uniform_times if isinstance(sde, FlowSDE) else karras_times
    x = sample(Exact(MIXTURE, sde).score, (n, 1), sde, 1, method=name, **options)
    assert kolmogorov.distance(x, MIXTURE.cdf) < kolmogorov.threshold(n)


# docs/samplers.md shows it: by probability_flow, ddim, heun and dpm_solver.
ON_A_LINE = {uniform_times: (0.008, 0.027, 0.047, 0.031), karras_times: (0.022, 0.096, 0.064, 0.118)}


@pytest.mark.parametrize("timesteps", ON_A_LINE, ids=lambda timesteps: timesteps.__name__)
def test_sixteen_steps_on_the_line_of_flow(timesteps):
    """The distance of 4,000 samples from the law of the data, to the digits of the table."""
    sde, found = FlowSDE(), []
    for name in ("probability_flow", "ddim", "heun", "dpm_solver"):
        x = sample(Exact(MIXTURE, sde).score, (4000, 1), sde, 1, method=name, steps=16, timesteps=timesteps)
        found.append(kolmogorov.distance(x, MIXTURE.cdf))
    print(timesteps.__name__, *(f"{distance:.3f}" for distance in found), sep=" | ")  # pytest -rP
    assert found == pytest.approx(ON_A_LINE[timesteps], abs=0.001)


# ---------------------------------------------------------------- pickle


def shifted(state, *, shift=0.0):
    return state.x + shift


SHIFTED = method(steps=3)(shifted)


def test_methods_and_times_can_be_pickled_and_copied():
    """For other processes: by the name of the rule, with the options."""
    for name in METHODS:
        again = pickle.loads(pickle.dumps(process_methods.as_method(name)(steps=7)))
        assert again.rule is process_methods.as_method(name).rule and again.steps == 7
    for given in (heun(s_churn=10.0), Method(shifted, shift=2.0), SHIFTED(shift=2.0)):
        for again in (pickle.loads(pickle.dumps(given)), copy.deepcopy(given), copy.copy(given)):
            assert again.rule is given.rule and again.options == given.options and repr(again) == repr(given)
    local = Method(lambda state: state.x)
    assert copy.deepcopy(local).rule is local.rule
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(local)
    for times in (uniform(0.1), logit_normal(), log_normal()):
        found = [t(4, 1.0, Rng(0), "float32", 0) for t in (times, pickle.loads(pickle.dumps(times)))]
        np.testing.assert_array_equal(*map(backend.to_host, found))
