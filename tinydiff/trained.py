"""A trained model with all that sampling needs, and checkpoints that rebuild it.

    trained = Trained(denoiser, KarrasSDE(), (28, 28, 1), labels={"digit": 10}, null=True)
    train(denoiser, loss, ..., about=trained.about())              # or trained.save("model.npz")
    trained = tinydiff.load("runs/quickstart/checkpoint.npz")      # in another process: the net, with averaged weights
    x = trained.sample(64, 0, labels={"digit": 7}, guidance=2.0)   # (64, 28, 28, 1)

A checkpoint has the entry "about": how the net, the process and, of latent diffusion, the autoencoder were made
(describing.py), the shape of a picture, what black and white are, the names of the labels. The words are in the net,
and sigma_data is in its weights. The weights of the autoencoder are in "about" too, so a checkpoint is one file.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import nn, saving
from .arguments import integer, number
from .backend import to_device, to_host, xp
from .describing import Unknown, describe, rebuild
from .diffusion.methods import METHODS
from .diffusion.predict import Guided
from .diffusion.sample import sample
from .distributed import ALONE, Ranks
from .engine import Tensor
from .latents import LatentSpace
from .models import autoencoder as _autoencoder  # noqa: F401  whose classes are rebuildable, as those of the next ones
from .models import fourier, text, tutorial, unet  # noqa: F401
from .models.inputs import sizes
from .models.text import TextToImage, Tokenizer
from .nn.module import is_unfilled
from .optim import EMA
from .rng import Rng

FIELDS = ("model", "process", "shape", "low", "high", "labels", "null", "eps", "noise", "space", "data")  # of "about"
LARGEST_IMAGE = 2**22  # numbers of an image that an autoencoder takes


class Trained:
    """A model, and what it was trained for.

    model: a Denoiser, a ScoreModel or another module score(x, t, **condition). process: that of its samples.
    shape: (H, W, C) of what it makes. low, high: what black and white are. space: the LatentSpace that decodes what it
    makes; then low and high are those of the decoded picture.
    labels: the conditions by name, with the names of their values, {"digit": ["zero", ...]}, or how many there are.
    null: were the labels or words left out now and then in training? Guidance needs it.
    eps: where sampling stops. noise: mean and deviation of ln sigma in the training of a Denoiser.
    data: what it has learned from, {"name": "mnist"}, and what else is needed to get it again.
    Errors: ValueError for what is none of this.
    """

    def __init__(
        self,
        model: Any,
        process: Any,
        shape: Sequence[int],
        *,
        low: float = -1.0,
        high: float = 1.0,
        labels: Mapping[str, int | Sequence[str]] | None = None,
        null: bool = False,
        eps: float = 1e-3,
        noise: tuple[float, float] = (-1.2, 1.2),
        space: LatentSpace | None = None,
        data: Mapping[str, Any] | None = None,
    ):
        self.model, self.process, self.shape = model, process, sizes("Trained: shape", shape, 3)
        if not (callable(getattr(process, "prior", None)) and callable(getattr(process, "marginal_std", None))):
            raise ValueError(f"Trained: the process must have prior and marginal_std, which {process!r:.80} has not")
        self.low, self.high = number("Trained: low", low), number("Trained: high", high)
        if not self.low < self.high:
            raise ValueError(f"Trained: low={low!r} must be below high={high!r}")
        self.labels = {name: _values(name, values) for name, values in (labels or {}).items()}
        self.null, self.eps = bool(null), number("Trained: eps", eps, "(0, inf)")
        self.noise = number("Trained: the mean of noise", noise[0]), number("Trained: its std", noise[1], "(0, inf)")
        self.space, self.data = space, dict(data or {})
        if space is not None and space.shape != self.shape:
            raise ValueError(f"Trained: the latents of the space are {space.shape}, not {self.shape}")
        self.text = next((m for _, m in model.named_modules() if isinstance(m, TextToImage)), None)
        vocabulary = getattr(self.text, "vocabulary", None)
        self.tokenizer = None if vocabulary is None else Tokenizer.from_array(vocabulary)

    def __repr__(self) -> str:
        told = f", labels {', '.join(self.labels)}" if self.labels else ", words" if self.tokenizer else ""
        net = type(getattr(self.text or self.model, "net", self.model)).__name__
        return f"<Trained {net} of {self.model.count():,} parameters: {'x'.join(map(str, self.shape))}{told}>"

    # ---- files

    def about(self) -> dict[str, Any]:
        """The entry "about" of a checkpoint; `train` takes it as about=."""
        found = {name: describe(getattr(self, name)) for name in FIELDS}
        found |= {"labels": {name: list(values) for name, values in self.labels.items()}, "data": dict(self.data)}
        if self.space is not None:
            found["space"] = {"made": describe(self.space), "weights": self.space.state_dict()}
        return found

    def save(self, path: str | os.PathLike[str], ema: EMA | None = None) -> None:
        """Write a file for `load`. ema: the averages of the weights, which `load` takes then."""
        parts = {"model": self.model.state_dict()} | ({} if ema is None else {"ema": ema.state_dict()})
        saving.save(path, {**parts, "about": self.about()})

    # ---- samples

    def sample(
        self,
        n: int,
        rng: Rng | int,
        *,
        labels: Mapping[str, Any] | None = None,
        prompts: str | Sequence[str] | None = None,
        negative: str = "",
        guidance: float = 0.0,
        method: Any = "heun",
        steps: int | None = None,
        microbatch: int = 20,
        threads: int | None = None,
        ranks: Ranks = ALONE,
    ) -> np.ndarray:
        """n pictures, float32 (n, H, W, C) on the host, of which `low` is black and `high` is white, about.

        rng: an Rng or a seed; picture i of a seed is the same among any number. labels: {"digit": 7}, or n of them;
        values may be their names. A label that is not given is the null class. prompts: one for all, or n.
        guidance: the weight, 0 for none; negative: a prompt to push away from. method, steps, ranks: as for `sample`.
        Errors: ValueError for labels and words that the model does not know, with the nearest it knows, for a condition
        that it does not have, and for guidance where there is nothing to push towards or away from.
        """
        n, guidance = integer("sample: n", n), number("sample: guidance", guidance)
        condition = self._labels(n, labels or {}) | self._words(n, prompts)
        if negative and (self.text is None or not guidance):
            why = "this model knows no words" if self.text is None else "guidance is what pushes, and it is 0"
            raise ValueError(f"sample: negative={negative!r:.80} pushes nothing away: {why}")
        model: Any = self.model
        if guidance or negative:
            if not condition:
                raise ValueError(f"sample: guidance={guidance:g} pushes towards a condition: give a label or a prompt")
            if not self.null:
                raise ValueError(
                    "sample: this model was never trained without its condition, so there is no guidance: guidance=0"
                )
            model = Guided(model, guidance, negative=self._words(1, negative) if self.text else None)
        x = sample(model, (n, *self.shape), self.process, rng, method=method, steps=steps, eps=self.eps,
                   microbatch=microbatch, threads=threads, ranks=ranks, condition=condition)  # fmt: skip
        return to_host(x) if self.space is None else self.space.decode(x)

    def _labels(self, n: int, given: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, values in given.items():
            if name not in self.labels:
                raise ValueError(f"sample: there is no label {name!r}: {_nearest(name, list(self.labels))}")
            many = [values] if isinstance(values, (str, int)) else np.asarray(to_host(values)).reshape(-1).tolist()
            numbers = [self.number_of(name, value) for value in many]
            if len(numbers) not in (1, n):
                raise ValueError(f"sample: {name!r} must be one label, or one for each of {n}, not {len(numbers)}")
            found[name] = to_device(np.resize(np.array(numbers, "int64"), n))
        return found

    def number_of(self, name: str, value: Any) -> int:
        """The number of a value of a label: of "seven", 7; also of "7" and 7. Errors: ValueError, with the nearest."""
        values = self.labels[name]
        if isinstance(value, str):
            if value in values:
                return values.index(value)
            if not value.isdecimal():
                raise ValueError(f"sample: {name} cannot be {value!r}: {_nearest(value, values)}")
        number_of = integer(f"sample: {name}", int(value) if isinstance(value, str) else value, -1 if self.null else 0)
        if number_of >= len(values):
            raise ValueError(f"sample: {name} must be 0 to {len(values) - 1}, not {value}")
        return number_of

    def _words(self, n: int, prompts: str | Sequence[str] | None) -> dict[str, Any]:
        if prompts is None:
            return {}
        if self.text is None or self.tokenizer is None:
            raise ValueError(f"sample: this model knows no words, so {prompts!r:.80} says nothing to it")
        tokens = self.tokenizer.encode(prompts)
        if len(tokens) not in (1, n):
            raise ValueError(f"sample: prompts must be one, or one for each of {n}, not {len(tokens)}")
        return self.text.encode(np.resize(tokens, (n, tokens.shape[1])))


def load(path: str | os.PathLike[str], *, net: Any = None, process: Any = None, averaged: bool = True) -> Trained:
    """The model in a checkpoint of `train`, of the directory of a run, or in a file of Trained.save, ready to sample:
    everything is rebuilt from the file, in which no code is executed. averaged: with the averages of the weights, if it
    has them.
    net, process: your own, if their classes are not @tinydiff.rebuildable; the weights of the net are loaded.
    Errors: ValueError, which names the file, for one that is damaged, that says nothing of its net (those of older
    versions, and of `train` without about=), or whose net is not known here; FileNotFoundError."""
    name = os.fspath(path)
    name = os.path.join(name, "checkpoint.npz") if os.path.isdir(name) else name
    state = saving.load(name)  # FileNotFoundError, which names it
    if "about" not in state or isinstance(state["about"], dict) and "model" not in state["about"]:
        raise ValueError(
            f"{name!r} does not say how its net was made, as checkpoints of older versions, or of train without "
            "about=, do not: make the net yourself, net.load_state_dict(saving.load(path)['model']), or train again"
        )
    try:
        return _trained(state, net, process, averaged)
    except Unknown as error:
        raise ValueError(
            f"{name!r}: {error}. Give your own net or process, tinydiff.load(path, net=MyNet(...)); or decorate the "
            "class with @tinydiff.rebuildable before training, and import it before loading"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{name!r} is no checkpoint of a model, or it is damaged: {why}"[:600]) from error


def noise_of(state: Mapping[str, Any]) -> tuple[float, float] | None:
    """Mean and deviation of ln sigma in the training of a checkpoint; None if it does not say, in good numbers."""
    try:
        mean, std = state["about"]["noise"]
        return number("noise: the mean", mean), number("noise: the deviation", std, "(0, inf)")
    except (LookupError, TypeError, ValueError):
        return None


def _trained(state: Mapping[str, Any], net: Any, process: Any, averaged: bool) -> Trained:
    about, weights = state["about"], state["model"]
    if not isinstance(about, dict) or set(about) != set(FIELDS):
        raise ValueError(f"what it says about itself must be {', '.join(FIELDS)}")
    model = _made(about["model"], weights, net)
    if averaged and "ema" in state:
        average = EMA(model)
        average.load_state_dict(state["ema"])
        average.copy_to(model)
    given = {name: about[name] for name in FIELDS if name not in ("model", "process", "space")}
    space = None if about["space"] is None else _space(**about["space"])
    if numbers := [name for name, values in given["labels"].items() if not isinstance(values, list)]:
        raise ValueError(f"the values of {numbers[0]!r} must have names")  # and not be millions by one number
    # A process draws no weights; if a stranger put a net here, it does not become large.
    made = rebuild(about["process"], rng=nn.Unfilled(2**16, 64), own=process)
    for name, tensor in model.named_tensors():
        if tensor.dtype.kind == "f" and not bool(xp.isfinite(tensor.data).all()):
            raise ValueError(f"its {name} has numbers that are not finite")
    return Trained(model.eval(), made, given.pop("shape"), space=space, **given)


def _made(description: Any, weights: Any, own: Any = None) -> Any:
    """The module of a description with these weights. It gets memory for them only when their names and shapes are
    those of the file; until then a stranger may ask for what he likes."""
    arrays = {name: to_host(array) for name, array in weights.items()}
    largest = max([1024, len(arrays), *(side for a in arrays.values() for side in a.shape)])
    # Half of what a net draws, or less, is not among its weights: it is drawn, and then set to zero, or left out.
    numbers, draws = 2 * sum(a.size for a in arrays.values()) + 2**16, 2 * len(arrays) + 64
    module = rebuild(description, rng=nn.Unfilled(numbers, draws), own=own, largest=largest)
    if not isinstance(module, nn.Module):
        raise ValueError(f"it describes a {type(module).__name__}, which is no net")
    for name, tensor in module.named_tensors():
        if name in arrays and arrays[name].shape == tensor.shape:
            if is_unfilled(tensor._data) or _another_precision(tensor, arrays[name]):
                tensor._data = xp.empty(tensor.shape, arrays[name].dtype if tensor.dtype.kind == "f" else tensor.dtype)
    module.load_state_dict(arrays)
    return module


def _space(made: Any, weights: Any) -> LatentSpace:
    """A LatentSpace. It encodes an image when it is made, so first its autoencoder has to fit the file."""
    given, begin = made["arguments"], "autoencoder."
    inside = {name.removeprefix(begin): array for name, array in weights.items() if name.startswith(begin)}
    autoencoder = _made(given["autoencoder"], inside)
    if math.prod(given["image"]) > LARGEST_IMAGE:
        raise ValueError(f"its images would be {given['image']!r:.80}")
    return _made({**made, "arguments": {**given, "autoencoder": {"own": "autoencoder"}}}, weights, autoencoder)


def _another_precision(tensor: Tensor, array: np.ndarray) -> bool:
    """Is one of the two float32, the other float64? A Setting is float64 always."""
    return {str(tensor.dtype), str(array.dtype)} == {"float32", "float64"} and not isinstance(tensor, nn.module.Setting)


def _values(name: str, values: Any) -> list[str]:
    """The names of the values of a label; of a number of them, "0", "1", ..."""
    if not isinstance(values, (list, tuple)):
        return [str(i) for i in range(integer(f"Trained: the number of values of {name!r}", values, 1, 2**20))]
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"Trained: the values of {name!r} must have names, not {values!r:.80}")
    return list(values)


def _nearest(given: str, known: Sequence[str]) -> str:
    """ "did you mean 'seven'?" """
    if not known:
        return "it has none"
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"it knows {', '.join(map(repr, known[:20]))}{', ...' if len(known) > 20 else ''}"


def method_named(name: str) -> Any:
    """The method of sampling of that name. Errors: ValueError, with the nearest."""
    if name not in METHODS:
        raise ValueError(f"there is no sampler {name!r}: {_nearest(name, list(METHODS))}")
    return METHODS[name]
