"""Conditions of any name, and arguments that are misspelt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, nn, ops
from tinydiff.diffusion import (
    VESDE,
    Denoiser,
    Guided,
    KarrasSDE,
    ScoreModel,
    bits_per_dimension,
    denoising_loss,
    edm_loss,
    heun,
    inpaint,
    log_likelihood,
    sample,
    score_matching_loss,
)
from tinydiff.diffusion.edit import denoise, image_to_image
from tinydiff.models.unet import UNet

NAMES = "shape score rng eps steps t x0 model process method weight sigma mean interval known start s_churn".split()
SDE = VESDE()


class Net(nn.Module):
    """A net that takes any condition, and remembers what it got."""

    def forward(self, x: Any, t: Any, /, **condition: Any) -> Any:
        self._got = condition
        return x * 0.5


def calls(name: str, model: Any) -> dict[str, Any]:
    """Every function that takes conditions, called with one of that name."""
    x, given = np.zeros((2, 3), "float32"), {"condition": {name: 7}}
    bits, mask = np.zeros((2, 3), "uint8"), np.ones((2, 3), bool)
    score, denoiser = ScoreModel(model, SDE, "noise"), Denoiser(model, 1.0)
    likelihood = {"rtol": 1e-2, "atol": 1e-2, "eps": 0.1, **given}
    return {
        "sample": lambda: sample(score, (2, 3), SDE, 0, steps=1, **given),
        "parts": lambda: sample(score, (2, 3), SDE, 0, steps=1, microbatch=1, **given),
        "denoiser": lambda: sample(denoiser, (2, 3), KarrasSDE(), 0, steps=1, **given),
        "guided": lambda: sample(Guided(denoiser, 1.0, negative={name: 7}, **given), (2, 3), KarrasSDE(), 0, steps=1),
        "inpaint": lambda: inpaint(score, x, mask, SDE, 0, steps=1, resample=1, **given),
        "image_to_image": lambda: image_to_image(score, x, SDE, 0, t=0.5, steps=1, **given),
        "denoise": lambda: denoise(score, x, SDE, sigma=1.0, **given),
        "score_matching_loss": lambda: score_matching_loss(score, x, SDE, Rng(0), **given),
        "denoising_loss": lambda: denoising_loss(score, x, Rng(0), **given),
        "edm_loss": lambda: edm_loss(denoiser, x, Rng(0), **given),
        "log_likelihood": lambda: log_likelihood(score, x, SDE, 0, **likelihood),
        "bits_per_dimension": lambda: bits_per_dimension(score, bits, SDE, 0, **likelihood),
    }


@pytest.mark.parametrize("call", calls("", Net()))
def test_a_condition_may_have_any_name(call: str, numpy_backend: str) -> None:
    """What trains must also sample, whatever the label is called."""
    for name in NAMES:
        net = Net()
        calls(name, net)[call]()
        assert net._got == {name: 7}


def test_no_label_of_a_net_is_called_condition() -> None:
    with pytest.raises(ValueError, match="condition"):
        UNet(1, [8], labels={"condition": 3})


@pytest.mark.parametrize(
    "call, meant",
    [
        (lambda s, x: sample(s, (2, 3), SDE, 0, step=3), "steps"),
        (lambda s, x: sample(s, (2, 3), SDE, 0, time_steps=3), "timesteps"),
        (lambda s, x: sample(s, (2, 3), SDE, 0, micro_batch=1), "microbatch"),
        (lambda s, x: sample(s, (2, 3), SDE, 0, s_chrun=1.0), "s_churn"),
        (lambda s, x: sample(s, (2, 3), SDE, 0, conditions={}), "condition"),
        (lambda s, x: heun(s_chrun=1.0), "s_churn"),
        (lambda s, x: inpaint(s, x, x > 0, SDE, 0, resamples=2), "resample"),
        (lambda s, x: score_matching_loss(s, x, SDE, Rng(0), ep=1e-3), "eps"),
        (lambda s, x: log_likelihood(s, x, SDE, 0, probe=2), "probes"),
        (lambda s, x: Guided(s, 1.0, negativ={}), "negative"),
    ],
)
def test_a_misspelt_argument_is_no_condition(call: Any, meant: str, numpy_backend: str) -> None:
    with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
        call(ScoreModel(Net(), SDE, "noise"), np.zeros((2, 3), "float32"))


def test_usual_conditions_are_passed_as_they_are(numpy_backend: str) -> None:
    net = Net()
    sample(ScoreModel(net, SDE, "noise"), (2, 3), SDE, 0, steps=1, digit=3, slant=1, condition={"step": 2})
    assert net._got == {"digit": 3, "slant": 1, "step": 2}


@pytest.mark.parametrize(
    "given, says",
    [({"condition": 3}, "must be a mapping of names"), ({"a": 1, "condition": {"a": 2}}, "'a' is given twice")],
)
def test_a_condition_that_is_no_mapping_or_given_twice(given: Any, says: str, numpy_backend: str) -> None:
    with pytest.raises(TypeError, match=says):
        sample(ScoreModel(Net(), SDE, "noise"), (2, 3), SDE, 0, steps=1, **given)


@pytest.mark.parametrize("method", ["heun", "rk45", "predictor_corrector"])
@pytest.mark.parametrize("sde", [KarrasSDE(), VESDE()], ids=repr)
def test_a_denoiser_that_is_taken_for_a_score_is_seen(sde: Any, method: str, numpy_backend: str) -> None:
    """Otherwise it paints numbers of ten thousand, without a word."""
    with pytest.warns(RuntimeWarning, match="If the model is a denoiser"):
        try:
            sample(lambda x, _t: ops.tanh(x), (4, 8, 8, 1), sde, 0, steps=2, method=method)
        except RuntimeError:  # rk45 gives up
            assert method == "rk45"


def test_a_score_of_few_numbers_is_not_too_large(numpy_backend: str) -> None:
    """One normal number may well be 4: no false alarm (warnings are errors here)."""
    for seed in range(300):
        sample(lambda x, t: -x / (1 + t.data[0] ** 2), (1, 1), KarrasSDE(), seed, steps=1)
