"""Checkpoints that rebuild themselves: what comes back samples as what was saved, bit for bit; and what a stranger or a
damaged disk has written is refused by one error."""

from __future__ import annotations

import copy
import inspect
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, nn, saving
from tinydiff.backend import to_host
from tinydiff.describing import CLASSES, DEEPEST, LONGEST, Unknown, describe, rebuild, rebuildable
from tinydiff.diffusion import VESDE, VPSDE, CosineSchedule, Denoiser, Guided, KarrasSDE, ScoreModel, edm_loss, sample
from tinydiff.latents import LatentSpace
from tinydiff.models import autoencoder, tutorial
from tinydiff.models.fourier import FourierInputs, ScoreMLP
from tinydiff.models.text import TextEncoder, TextToImage, Tokenizer
from tinydiff.models.unet import UNet
from tinydiff.optim import EMA, Adam
from tinydiff.trained import FIELDS, Trained
from tinydiff.training import CannotResume, train

SHAPE = (8, 8, 1)
DIGITS = ["zero", "one", "two"]


def stirred(module: Any, seed: int = 0) -> Any:
    """With random weights everywhere, also where a net starts with zeros."""
    for i, p in enumerate(module.parameters()):
        p.data = Rng(seed).child(i).normal(p.shape, p.dtype) * 0.3
    return module


def labelled() -> Denoiser:
    return stirred(Denoiser(UNet(1, [8, 8], labels={"digit": 3}, groups=4, embedding=16, rng=0), 0.7))


def of_words() -> Denoiser:
    words = Tokenizer.fit(["a red cat", "a blue dog"])
    net = UNet(1, [8], context=16, embedding=16, rng=0)
    return stirred(Denoiser(TextToImage(TextEncoder(words.size, words.length, 16, rng=0), net, words), 0.5))


def a_space() -> LatentSpace:
    space = LatentSpace(stirred(autoencoder.VariationalAutoencoder(1, [8], 3, kl_weight=0.1, rng=0)), (16, 16, 1))
    space.measure(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), "uint8"))
    return space


# ---------------------------------------------------------------- descriptions

MADE = {
    "unet": lambda: UNet(3, [8, 16], labels={"class": 2, "arguments": 3}, groups=4, attention=[0], rng=0),
    "edm": labelled,
    "words": of_words,
    "x0": lambda: ScoreModel(UNet(1, [8], rng=0), VPSDE("cosine"), "x0"),
    "schedule": lambda: ScoreModel(UNet(1, [8], rng=0), VPSDE(CosineSchedule(0.01)), "noise"),
    "fourier": lambda: ScoreModel(FourierInputs(UNet(5, [8], out_channels=1, rng=0), 0.5, (1, 2)), KarrasSDE(), "edm",
                                  sigma_data=0.5),
    "points": lambda: ScoreMLP(VESDE(10.0).marginal_std, 2, rng=0),
    "tutorial": lambda: tutorial.ScoreUNet(VESDE().marginal_std, skips="add", rng=0),
    "conditional": lambda: tutorial.ConditionalUNet(VESDE(9.0).marginal_std, classes=4, rng=0),
    "latent": lambda: tutorial.LatentUNet(VESDE().marginal_std, rng=0),
    "codes": lambda: autoencoder.QuantisedAutoencoder(1, [8, 16], 2, codes=16, rng=0),
    "space": a_space,
}  # fmt: skip


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_net_is_made_again_from_what_json_keeps_of_it(make: Any, each_backend: str) -> None:
    """Of the same class, with weights of the same names and shapes, but none of the numbers that were drawn."""
    net = make()
    description = json.loads(json.dumps(describe(net)))
    again = rebuild(description, rng=1)
    assert type(again) is type(net) and describe(again) == description
    shapes = [{name: t.shape for name, t in module.named_tensors()} for module in (net, again)]
    assert shapes[0] == shapes[1] and shapes[0]
    again.load_state_dict(net.state_dict())


def test_every_class_of_a_file_can_be_described() -> None:
    """Each argument of each is in the tables above: none is forgotten when a class gets a new one."""
    assert {cls.__module__.split(".")[0] for cls in CLASSES.values()} >= {"tinydiff"}
    for name, cls in CLASSES.items():
        if cls.__module__.startswith("tinydiff."):
            kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
            assert inspect.Parameter.POSITIONAL_ONLY not in kinds, name


def test_an_attribute_that_only_has_the_name_of_an_argument_is_not_taken_for_it() -> None:
    @rebuildable
    class Doubling(nn.Module):
        def __init__(self, channels: int, rng: Any = None):
            self.channels = 2 * channels  # of the inner layer
            self.inner = nn.Linear(channels, self.channels, rng=rng)

    try:
        description = describe(Doubling(3, rng=0))
        assert description["arguments"] == {"channels": 3}
        assert rebuild(description, rng=0).inner.weight.shape == Doubling(3, rng=0).inner.weight.shape
    finally:
        CLASSES.pop(next(name for name in CLASSES if name.endswith("Doubling")))


def test_what_was_changed_after_it_was_made_is_described_as_it_is() -> None:
    model = labelled()
    model.sigma_data = 0.25
    model.net = UNet(1, [16], rng=0)
    assert describe(model)["arguments"]["sigma_data"] == 0.25
    assert describe(model)["arguments"]["net"]["arguments"]["channels"] == [16]
    assert describe(copy.deepcopy(model)) == describe(model)
    channels = [8]
    net = UNet(1, channels, rng=0)
    channels.append(16)
    assert describe(net)["arguments"]["channels"] == [8]


class Own(nn.Module):
    def __init__(self, width: int, *, rng: Any = None):
        self.inside, self.outside = nn.Linear(1, width, rng=rng), nn.Linear(width, 1, rng=rng)

    def forward(self, x: Any, noise: Any) -> Any:
        return self.outside(self.inside(x))


def test_a_net_of_ones_own_is_brought_along_or_made_known(tmp_path: Path, monkeypatch: Any, numpy_backend: str) -> None:
    path, net = tmp_path / "own.npz", stirred(Own(5, rng=0))
    Trained(Denoiser(net, 0.5), KarrasSDE(), SHAPE).save(path)
    with pytest.raises(ValueError, match=r"does not describe the 'Own' in it\. Give your own net .*@tinydiff.rebuild"):
        tinydiff.load(path)
    wanted = tinydiff.load(path, net=Own(5)).sample(2, 0, steps=2)
    np.testing.assert_array_equal(wanted, Trained(Denoiser(net, 0.5), KarrasSDE(), SHAPE).sample(2, 0, steps=2))
    with pytest.raises(ValueError, match="own.npz.*net.inside.weight is"):
        tinydiff.load(path, net=Own(6))

    class Known(Own):
        def __init__(self, width: int, *, rng: Any = None):
            super().__init__(width, rng=rng)

    rebuildable(Known)
    Trained(Denoiser(stirred(Known(5, rng=0)), 0.5), KarrasSDE(), SHAPE).save(path)
    np.testing.assert_array_equal(tinydiff.load(path).sample(2, 0, steps=2), wanted)
    monkeypatch.delitem(CLASSES, next(name for name in CLASSES if name.endswith("Known")))
    with pytest.raises(ValueError, match="a class that is not known here"):
        tinydiff.load(path)


# ---------------------------------------------------------------- what comes back


def test_samples_of_labels_are_those_of_the_model_in_memory(tmp_path: Path, each_backend: str) -> None:
    """Compared with `sample` as it is called by hand."""
    model = labelled()
    ema = EMA(model, 0.5)
    for average in ema.averages.values():
        average *= 0.5
    Trained(model, KarrasSDE(), SHAPE, labels={"digit": DIGITS}, null=True, eps=0.002).save(tmp_path / "m.npz", ema)
    trained = tinydiff.load(tmp_path / "m.npz")

    def by_hand() -> Any:
        return to_host(
            sample(Guided(model, 2.0), (4, *SHAPE), KarrasSDE(), Rng(3), method="dpm_solver", steps=4, eps=0.002,
                   digit=np.full(4, 1))
        )  # fmt: skip

    last = by_hand()
    with ema.applied():
        averaged = by_hand()
    options: Any = {"guidance": 2.0, "method": "dpm_solver", "steps": 4}
    assert (averaged != last).any()
    for labels in ({"digit": 1}, {"digit": "one"}, {"digit": "1"}, {"digit": [1] * 4}):
        np.testing.assert_array_equal(trained.sample(4, 3, labels=labels, **options), averaged)
    trained = tinydiff.load(tmp_path / "m.npz", averaged=False)
    np.testing.assert_array_equal(trained.sample(4, 3, labels={"digit": 1}, **options), last)
    assert trained.labels == {"digit": DIGITS} and trained.model.sigma_data == 0.7 and trained.low == -1.0


def test_samples_of_words_and_of_latents_come_back(tmp_path: Path, each_backend: str) -> None:
    model, space = of_words(), a_space()
    Trained(model, KarrasSDE(), SHAPE, null=True, eps=0.002).save(tmp_path / "words.npz")
    found = tinydiff.load(tmp_path / "words.npz").sample(3, 1, prompts="a red dog", negative="blue", guidance=1.5)
    words = Tokenizer.fit(["a red cat", "a blue dog"])
    negative = model.net.encode(words.encode("blue"))
    pushed, tokens = Guided(model, 1.5, negative=negative), np.repeat(words.encode("a red dog"), 3, axis=0)
    x = sample(pushed, (3, *SHAPE), KarrasSDE(), Rng(1), eps=0.002, **model.net.encode(tokens))
    np.testing.assert_array_equal(found, to_host(x))

    model = stirred(Denoiser(UNet(3, [8], patch=1, embedding=16, rng=0), 1.0))
    Trained(model, KarrasSDE(), (8, 8, 3), low=0.0, space=space).save(tmp_path / "latent.npz")
    trained = tinydiff.load(tmp_path / "latent.npz")  # the autoencoder is in it
    assert trained.space is not None and trained.space.fingerprint() == space.fingerprint()
    x = space.decode(sample(model, (3, 8, 8, 3), KarrasSDE(), Rng(1)))
    np.testing.assert_array_equal(trained.sample(3, 1), x)
    assert x.shape == (3, 16, 16, 1) and trained.sample(5, 1)[:3] == pytest.approx(x, abs=1e-4)


def test_float64_stays_float64(tmp_path: Path, numpy_backend: str) -> None:
    Trained(labelled().astype("float64"), KarrasSDE(), SHAPE, labels={"digit": 3}).save(tmp_path / "m.npz")
    trained = tinydiff.load(tmp_path / "m.npz")
    assert {str(p.dtype) for p in trained.model.parameters()} == {"float64"}


def learn(out: Path, epochs: int, channels: list[int], resume: bool = False, about: bool = True) -> Any:
    """A run of `train`, of pictures that are noise."""
    model = Denoiser(UNet(1, channels, embedding=16, rng=0), 0.5)
    x = np.random.default_rng(0).normal(0, 0.5, (16, *SHAPE)).astype("float32")

    def loss(x0: Any, rng: Any, sample_offset: int) -> Any:
        return edm_loss(model, x0, rng, sample_offset=sample_offset)

    says = Trained(model, KarrasSDE(), SHAPE).about() if about else None
    train(model, loss, x, Adam(model.parameters(), lr=1e-2), epochs=epochs, batch_size=8, out=out, resume=resume,
          ema=EMA(model, 0.9), about=says, stream=io.StringIO())  # fmt: skip
    return model


def test_checkpoints_of_a_run_say_what_they_are_of(tmp_path: Path, numpy_backend: str) -> None:
    model = learn(tmp_path / "run", 1, [8])
    found = tinydiff.load(tmp_path / "run" / "checkpoint.npz", averaged=False).sample(2, 0, steps=2)
    np.testing.assert_array_equal(found, Trained(model, KarrasSDE(), SHAPE).sample(2, 0, steps=2))
    learn(tmp_path / "run", 2, [8], resume=True, about=False)  # what it said is kept
    tinydiff.load(tmp_path / "run" / "checkpoint.npz")
    with pytest.raises(CannotResume, match="its model is of another run"):
        learn(tmp_path / "run", 3, [16], resume=True)
    learn(tmp_path / "old", 1, [8], about=False)
    with pytest.raises(ValueError, match=r"old.*does not say how its net was made.*load_state_dict.*or train again"):
        tinydiff.load(tmp_path / "old" / "checkpoint.npz")
    learn(tmp_path / "old", 2, [8], resume=True)  # one of an older version goes on, and then it knows
    tinydiff.load(tmp_path / "old" / "checkpoint.npz")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"labels": {"digti": 1}}, "no label 'digti': did you mean 'digit'"),
        ({"labels": {"digit": "tow"}}, "digit cannot be 'tow': did you mean 'two'"),
        ({"labels": {"digit": 3}}, "digit must be 0 to 2, not 3"),
        ({"labels": {"digit": [1, 2]}}, "one for each of 3, not 2"),
        ({"prompts": "a cat"}, "knows no words"),
        ({"guidance": 1.0}, "give a label or a prompt"),
        ({"guidance": 1.0, "labels": {"digit": 1}}, "never trained without its condition"),
        ({"method": "huen"}, "huen"),
        ({"labels": {"digit": 1.9}}, "digit must be an integer"),
        ({"negative": "a cat"}, "negative='a cat' pushes nothing away: this model knows no words"),
    ],
)
def test_what_cannot_be_sampled_is_said(asked: Any, says: str, numpy_backend: str) -> None:
    trained = Trained(labelled(), KarrasSDE(), SHAPE, labels={"digit": DIGITS})
    with pytest.raises(ValueError, match=says):
        trained.sample(3, 0, **asked)


def test_a_trained_model_that_is_none_is_refused() -> None:
    for options, says in [
        ({"low": 1.0}, "low=1.0 must be below high=1.0"),
        ({"labels": {"digit": []}}, "values of 'digit'"),
        ({"eps": 0}, "eps"),
        ({"space": a_space()}, r"the space are \(8, 8, 3\), not \(8, 8, 1\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            Trained(labelled(), KarrasSDE(), SHAPE, **options)


# ---------------------------------------------------------------- damage, and strangers


def damaged(state: Any, path: list[str], value: Any) -> Any:
    """A copy of the state with another value somewhere."""
    state = copy.deepcopy(state)
    part = state
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return state


NET = ["about", "model", "arguments", "net", "arguments"]
HUGE = 10**9


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["about"], {"class": "models.unet.UNet", "arguments": {}}),
        (["about"], None),
        (["about", "model"], {"class": "os.system", "arguments": {"command": "true"}}),
        (["about", "model"], {"class": "diffusion.process.VESDE", "arguments": {}}),
        (["about", "model"], {"method": "state_dict", "of": None}),
        (["about", "model", "class"], "builtins.eval"),
        (["about", "model", "more"], 1),
        (["about", "process"], {"class": "diffusion.process.VESDE", "arguments": {"sigma": "x"}}),
        (["about", "process"], None),
        (["about", "process"], {"class": "models.unet.UNet", "arguments": {"channels": [64, 512]}}),
        ([*NET, "channels"], [HUGE]),
        ([*NET, "channels"], [16]),
        ([*NET, "channels"], [8] * 1000),
        ([*NET, "channels"], "88"),
        ([*NET, "blocks"], HUGE),
        ([*NET, "embedding"], HUGE),
        ([*NET, "labels"], {"entries": {"digit": HUGE}}),
        ([*NET, "labels"], {"entries": {"x": 3}}),
        ([*NET, "nonsense"], 1),
        ([*NET, "rng"], 1),
        (["about", "model", "arguments", "sigma_data"], -1.0),
        (["about", "shape"], [8, 8]),
        (["about", "shape"], [-8, 8, 1]),
        (["about", "labels"], {"digit": 1.5}),
        (["about", "low"], float("nan")),
        (["about", "eps"], "0"),
        (["about", "noise"], [0.0]),
        (["about", "space"], {"made": None}),
        (["about", "data"], 3),
        (["model"], {}),
        (["model"], 3),
        (["model", "data_std"], np.array(-1.0)),
    ],
)
def test_a_file_of_a_stranger_is_refused(tmp_path: Path, path: list[str], value: Any, numpy_backend: str) -> None:
    """By a ValueError that names the file, and without memory for what it asks for."""
    file = tmp_path / "m.npz"
    Trained(labelled(), KarrasSDE(), SHAPE, labels={"digit": DIGITS}).save(file)
    state = saving.load(file)
    saving.save(file, damaged(state, path, value))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"m\.npz"):
            tinydiff.load(file)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert set(state["about"]) == set(FIELDS)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["made", "arguments", "image"], [1024, 1024, 1024]),
        (["made", "arguments", "image"], [HUGE, 1, 1]),
        (["made", "arguments", "autoencoder", "arguments", "channels"], [1024]),
        (["made"], {"class": "models.unet.UNet", "arguments": {}}),
        (["weights"], {}),
        (["more"], 1),
    ],
)
def test_an_autoencoder_of_a_stranger_is_refused(
    tmp_path: Path, path: list[str], value: Any, numpy_backend: str
) -> None:
    file = tmp_path / "m.npz"
    model = Denoiser(UNet(3, [8], patch=1, embedding=16, rng=0), 1.0)
    Trained(model, KarrasSDE(), (8, 8, 3), space=a_space()).save(file)
    saving.save(file, damaged(saving.load(file), ["about", "space", *path], value))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"m\.npz"):
            tinydiff.load(file)
        assert tracemalloc.get_traced_memory()[1] < 2**27  # a side of 1,024 is allowed, whatever the file has
    finally:
        tracemalloc.stop()


MANY = {"channels": [8] * 64, "blocks": 1000}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["model", "arguments", "net", "arguments"], {"in_channels": 1, **MANY}, "larger than its weights"),
        (["process"], {"class": "models.unet.UNet", "arguments": MANY}, "larger than its weights"),
        (["labels"], {"digit": 2**20}, "the values of 'digit' must have names"),
    ],
)
def test_a_small_file_makes_no_large_net(
    tmp_path: Path, path: list[str], value: Any, says: str, numpy_backend: str
) -> None:
    file = tmp_path / "m.npz"
    Trained(labelled(), KarrasSDE(), SHAPE, labels={"digit": ["a", "b", "c"]}).save(file)
    saving.save(file, damaged(saving.load(file), ["about", *path], value))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=says):
            tinydiff.load(file)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, numpy_backend: str) -> None:
    file, model = tmp_path / "m.npz", labelled()
    Trained(model, KarrasSDE(), SHAPE).save(file)
    state = saving.load(file)
    name = next(name for name, a in state["model"].items() if a.dtype.kind == "f" and a.ndim > 1)
    state["model"][name][0] = np.nan
    saving.save(file, state)
    with pytest.raises(ValueError, match=f"its {name} has numbers that are not finite"):
        tinydiff.load(file)


def test_an_object_in_an_object_ends_somewhere() -> None:
    deep: Any = None
    for _ in range(DEEPEST + 2):
        deep = [deep]
    with pytest.raises(ValueError, match="too deep"):
        rebuild(deep, rng=0)
    assert rebuild([8] * LONGEST, rng=0) == [8] * LONGEST
    with pytest.raises(ValueError, match=f"a list of {LONGEST + 1}, more than {LONGEST}"):
        rebuild([8] * (LONGEST + 1), rng=0)
    with pytest.raises(Unknown, match="not known here"):
        rebuild({"class": "engine.Tensor", "arguments": {}}, rng=0)


def test_what_cannot_be_rebuilt_is_refused_when_it_is_declared(monkeypatch: Any) -> None:
    monkeypatch.setattr("tinydiff.describing.CLASSES", dict(CLASSES))

    class Many:
        def __init__(self, *widths: int):
            self.widths = widths

    class Hands:
        def __init__(self, **options: int):
            self.options = options

    for cls, says in ((Many, "must have names"), (Hands, "no class above it is rebuildable")):
        with pytest.raises(TypeError, match=says):
            rebuildable(cls)

    def same(module: str) -> type:
        return type("Same", (), {"__module__": module, "__qualname__": "Same", "__init__": lambda self: None})

    rebuildable(same("one"))
    rebuildable(same("one"))  # a cell that is run again
    with pytest.raises(TypeError, match="Same is also the name of a class of one"):
        rebuildable(same("two"))
