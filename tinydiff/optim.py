"""Optimisers, in the order of their complexity, and what goes with them: clipping, averaging, schedules.

    optimizer = Adam(model.parameters(), lr=1e-3)
    schedule = exponential(0.98, floor=0.2)
    for epoch in range(epochs):
        optimizer.lr = 1e-3 * schedule(epoch)
        for batch in ...:
            model.zero_grad()
            loss(batch).backward()
            optimizer.step()

The learning rate is an attribute, and a schedule is a function of the epoch (or the step) that gives a factor for it.
A step changes the parameters in place and never waits for the device. The formula of each optimiser is a function on
lists of arrays, below its class; fast/ has versions in few passes over memory (NumPy) or in one launch (CUDA).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import backend
from .arguments import integer, number
from .backend import Array, overridable, xp
from .changes import note_change
from .engine import Tensor
from .nn import Module, Parameter
from .operators import array_of

Schedule = Callable[[float], float]
__all__ = ["EMA", "SGD", "Adam", "AdamW", "Optimizer", "clip_grad_norm", "constant", "cosine", "exponential", "warmup"]


# ---------------------------------------------------------------- optimisers


class Optimizer:
    """The base of all optimisers: parameters, learning rate, and for each parameter a count of steps and a state."""

    state_names: tuple[str, ...] = ()  # of arrays of the shape of the parameter, zero at first
    squares: tuple[str, ...] = ()  # which of them are sums of squares

    def __init__(self, parameters: Iterable[Tensor], lr: float):
        name = type(self).__name__
        self.parameters = _tensors(name, parameters)
        first: dict[int, int] = {}
        for i, p in enumerate(self.parameters):
            if p.node is not None:  # backward gives a gradient to leaves only, so it would never move
                raise ValueError(
                    f"{name}: parameter {i} of shape {p.shape} is the result of {p.node.op.name}, "
                    "not a leaf: give the Tensors that it was computed from"
                )
            if p.dtype.kind != "f":
                raise TypeError(f"{name}: parameter {i} of shape {p.shape} is {p.dtype}, not floating")
            if not p.requires_grad and not isinstance(p, Parameter):  # a Parameter may be frozen for a while
                raise ValueError(
                    f"{name}: parameter {i} of shape {p.shape} requires no gradient, so it would never move: "
                    "set requires_grad, or leave it out"
                )
            if first.setdefault(id(p), i) != i:
                raise ValueError(
                    f"{name}: parameters {first[id(p)]} and {i} are the same Tensor of shape {p.shape}, which would "
                    "move twice in a step: give it once, as model.parameters() does"
                )
        self.lr = lr
        self.counts = [0] * len(self.parameters)
        self.state = [{name: xp.zeros_like(p.data) for name in self.state_names} for p in self.parameters]

    @property
    def lr(self) -> float:
        """The learning rate. Errors, when it is set: ValueError unless it is a number in [0, inf)."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = number(f"{type(self).__name__}: lr", lr, "[0, inf)")

    def step(self) -> None:
        """Move every parameter that has a gradient. Errors: ValueError for a gradient of another shape."""
        moving = [(i, p, p.grad) for i, p in enumerate(self.parameters) if p.grad is not None]
        for i, p, g in moving:
            if g.shape != p.shape:
                raise ValueError(f"parameter {i} of shape {p.shape} has a gradient of shape {g.shape}")

        def count() -> list[Any]:
            for i, p, g in moving:
                if p.grad is not g:  # only in a captured step, which reads the gradients where they were
                    raise RuntimeError(
                        f"parameter {i} of shape {p.shape} has another gradient than when the captured step read it: "
                        "compute the gradients inside the step, after zero_grad, or leave them in the same Tensors"
                    )
                self.counts[i] += 1
            note_change(*(p.data for _, p, _ in moving))
            return self._hyperparameters([self.counts[i] for i, _, _ in moving])

        if moving:
            hyperparameters = backend.numbers(count)
            state = {name: [self.state[i][name] for i, _, _ in moving] for name in self.state_names}
            self._update([p.data for _, p, _ in moving], [g.data for _, _, g in moving], hyperparameters, **state)

    def _hyperparameters(self, counts: list[int]) -> list[Any]:
        """The rates and decays for the formula; they may depend on the counts of steps of the parameters."""
        raise NotImplementedError

    def _update(self, ps: list[Array], gs: list[Array], hyperparameters: Array, **state: list[Array]) -> None:
        """Change the parameters, and their state, in place."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the name of the class, lr, the counts of steps, and a copy of the state of each
        parameter, by its index."""
        copies = {str(i): {name: a.copy() for name, a in state.items()} for i, state in enumerate(self.state)}
        return {
            "optimizer": type(self).__name__,
            "lr": self.lr,
            "counts": list(self.counts),
            "state": copies if self.state_names else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict. Errors: ValueError for a state of another optimiser or of other parameters, or with
        values that no state_dict has; then nothing is changed."""
        try:
            lr, counts, arrays = self._checked(state)
        except ValueError as error:
            raise ValueError(
                f"this state does not fit {type(self).__name__} of {len(self.parameters)} parameters: {error}"
            ) from None
        self.lr, self.counts = lr, counts
        for i, p in enumerate(self.parameters):
            for name in self.state_names:
                # Into the array that is there: a captured step may know its address.
                array = self.state[i][name] = self.state[i][name].astype(p.dtype, copy=False)
                array[...] = backend.to_device(arrays[str(i)][name])

    def _checked(self, state: Mapping[str, Any]) -> tuple[float, list[int], dict[str, dict[str, Any]]]:
        """lr, counts and arrays of a state_dict of this optimiser. Errors: ValueError for any other state."""
        given = _entries(state, "optimizer", "lr", "counts", "state")
        if given["optimizer"] != type(self).__name__:
            raise ValueError(f"it is of {given['optimizer']!r}")
        lr, counts = number("lr", given["lr"], "[0, inf)"), given["counts"]
        if not hasattr(counts, "__len__") or isinstance(counts, Mapping):
            raise ValueError(f"counts must be a list, not {counts!r:.200}")
        if len(counts) != len(self.parameters):
            raise ValueError(f"it has {len(counts)} parameters, not {len(self.parameters)}")
        counts = [integer(f"the count of parameter {i}", n, least=0) for i, n in enumerate(counts)]
        owners = {str(i): p for i, p in enumerate(self.parameters) if self.state_names}
        if not isinstance(given["state"], Mapping):
            raise ValueError(f"state must have arrays by parameter, but is {given['state']!r:.200}")
        if others := [key for key in given["state"] if key not in owners]:
            raise ValueError(f"it has arrays for {others}, but needs none there")
        arrays, wrong, needed = {}, [], ", ".join(self.state_names)
        for i, p in owners.items():
            arrays[i] = _arrays(given["state"].get(i, {}))
            shapes = {name: tuple(a.shape) for name, a in arrays[i].items()}
            if shapes != {name: p.shape for name in self.state_names}:
                wrong.append(
                    f"parameter {i} of shape {p.shape} needs {needed} of that shape, not {shapes or 'nothing'}"
                )
        if not wrong:
            wrong = [
                f"parameter {i} has made no step, but its {name} is not zero"
                for i, p in owners.items()
                for name, a in arrays[i].items()
                if counts[int(i)] == 0 and bool((a != 0).any())
            ]
            wrong += [
                f"parameter {i} has a {name} below zero, which no sum of squares is"
                for i in owners
                for name in set(self.squares) & set(arrays[i])
                if bool((arrays[i][name] < 0).any())
            ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return lr, counts, arrays


def _entries(state: Any, *names: str) -> Mapping[str, Any]:
    """The state. Errors: ValueError unless it is a mapping that has these entries."""
    if not isinstance(state, Mapping):
        raise ValueError(f"it is no state_dict but a {type(state).__name__}: {state!r:.200}")
    if missing := set(names) - set(state):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return state


def _arrays(given: Any) -> dict[str, Any]:
    """The arrays of a part of a state. Errors: ValueError unless all are arrays, or Tensors, of floating numbers."""
    if not isinstance(given, Mapping):
        raise ValueError(f"arrays by name are needed, not a {type(given).__name__}: {given!r:.200}")
    arrays = {name: array_of(a) for name, a in given.items()}
    for name, a in arrays.items():
        if not hasattr(a, "dtype") or a.dtype.kind != "f":
            found = f"{a.dtype} of shape {a.shape}" if hasattr(a, "dtype") else f"{a!r:.200}"
            raise ValueError(f"{name} must be an array of floating numbers, not {found}")
    return arrays


def _tensors(what: str, parameters: Any) -> list[Tensor]:
    """The parameters as a list, of one if it is a single Tensor.
    Errors: TypeError or ValueError for what are no Tensors, or for none."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, (Module, str, Mapping)) or not isinstance(parameters, Iterable):
        raise TypeError(f"{what} takes Tensors: give model.parameters(), not a {type(parameters).__name__}")
    parameters = list(parameters)
    if not parameters:
        raise ValueError(
            f"{what} takes Tensors, e.g. model.parameters(), but was given none: "
            "is this a generator that has been used up?"
        )
    if kinds := sorted({type(p).__name__ for p in parameters if not isinstance(p, Tensor)}):
        raise ValueError(f"{what} takes Tensors, e.g. model.parameters(); it was given {kinds}")
    return parameters


class SGD(Optimizer):
    """p -= lr g, with g += weight_decay p before; with momentum, v = momentum v + g and p -= lr v;
    with nesterov, p -= lr (g + momentum v).

    Source: Polyak 1964; Sutskever et al. 2013 (nesterov), as PyTorch writes them.
    Errors: ValueError for numbers out of range, or nesterov without momentum.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        name = type(self).__name__
        self.momentum = number(f"{name}: momentum", momentum, "[0, inf)")
        self.weight_decay = number(f"{name}: weight_decay", weight_decay, "[0, inf)")
        if nesterov and not self.momentum:
            raise ValueError(f"{name}: nesterov needs a momentum")
        self.state_names = ("velocity",) if self.momentum else ()
        self.nesterov = nesterov
        super().__init__(parameters, lr)

    def _hyperparameters(self, counts: list[int]) -> list[Any]:
        return [self.lr, float(self.weight_decay), float(self.momentum)]

    def _update(self, ps: list[Array], gs: list[Array], hyperparameters: Array, **state: list[Array]) -> None:
        sgd_step(ps, gs, state.get("velocity"), hyperparameters, self.nesterov)


@overridable
def sgd_step(
    ps: Sequence[Array], gs: Sequence[Array], velocities: Sequence[Array] | None, hyperparameters: Array, nesterov: bool
) -> None:
    """SGD's formula on lists of arrays, in place. hyperparameters: [lr, decay, momentum]."""
    lr, decay, momentum = hyperparameters.tolist()
    for i, (p, g) in enumerate(zip(ps, gs)):
        g = g + decay * p if decay else g
        if velocities is None:
            p -= lr * g
        else:
            v = velocities[i]
            v *= momentum
            v += g
            p -= lr * (g + momentum * v if nesterov else v)


class Adam(Optimizer):
    """p -= lr mhat / (sqrt(vhat) + eps), with running means of g and g^2,

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   mhat = m / (1 - b1^n),   vhat = v / (1 - b2^n)   at step n.

    weight_decay is added to the gradient, g += weight_decay p (for the other way see AdamW).
    Source: Kingma and Ba 2015, algorithm 1. Errors: ValueError for numbers out of range.
    """

    state_names, squares = ("m", "v"), ("v",)
    decoupled = False

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, lr)
        name = type(self).__name__
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{name}: betas must be two numbers, not {betas!r}")
        b1, b2 = (number(f"{name}: betas[{i}]", beta, "[0, 1)") for i, beta in enumerate(betas))
        self.betas = b1, b2
        self.eps = number(f"{name}: eps", eps, "[0, inf)")
        self.weight_decay = number(f"{name}: weight_decay", weight_decay, "[0, inf)")

    def _hyperparameters(self, counts: list[int]) -> list[Any]:
        b1, b2 = self.betas
        decay = (1 - self.lr * self.weight_decay, 0.0) if self.decoupled else (1.0, self.weight_decay)
        # The corrections of mhat and vhat are in the rate and in eps, where they cost nothing.
        roots = {n: math.sqrt(1 - b2**n) for n in set(counts)}  # most have the same count
        rows = {n: [self.lr * root / (1 - b1**n), self.eps * root, *decay, b1, b2] for n, root in roots.items()}
        return [rows[n] for n in counts]

    def _update(self, ps: list[Array], gs: list[Array], hyperparameters: Array, **state: list[Array]) -> None:
        adam_step(ps, gs, state["m"], state["v"], hyperparameters)


class AdamW(Adam):
    """Adam with decoupled weight decay: p *= 1 - lr weight_decay, instead of a term in the gradient.

    Source: Loshchilov and Hutter 2019, algorithm 2.
    """

    decoupled = True

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(parameters, lr, betas, eps, weight_decay)


@overridable
def adam_step(
    ps: Sequence[Array], gs: Sequence[Array], ms: Sequence[Array], vs: Sequence[Array], hyperparameters: Array
) -> None:
    """Adam's formula on lists of arrays, in place: m and v move, then p = shrink p - rate m / (sqrt(v) + eps).

    hyperparameters: [rate, eps, shrink, decay, b1, b2] for each parameter; the corrections for the number of its steps
    are in the first two.
    """
    for p, g, m, v, (rate, eps, shrink, decay, b1, b2) in zip(ps, gs, ms, vs, hyperparameters.tolist()):
        p *= shrink
        g = g + decay * p if decay else g
        m *= b1
        m += (1 - b1) * g
        v *= b2
        v += (1 - b2) * (g * g)
        p -= rate * (m / (xp.sqrt(v) + eps))


# ---------------------------------------------------------------- clipping, averaging


def clip_grad_norm(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Array:
    """Scale all gradients, in place, so that the norm of all of them together is at most max_norm.

    parameters: Tensors, or a single one; one that is given twice counts once. max_norm: inf only measures.
    Returns the norm before, an array without axes that stays on the device; 0 if no parameter has a gradient. If a
    gradient is NaN or Inf, so is the norm.
    Source: Pascanu et al. 2013. Errors: ValueError if max_norm is not positive, or for no parameters at all, as from a
    generator that is used up; TypeError for a module or what else is no Tensors.
    """
    max_norm = number("clip_grad_norm: max_norm", max_norm, "(0, inf]")
    distinct = {id(p): p for p in _tensors("clip_grad_norm", parameters)}.values()
    gradients = [p.grad for p in distinct if p.grad is not None]
    if not gradients:
        return xp.zeros((), "float32")

    backend.each_time(lambda: note_change(*(g.data for g in gradients)))
    return clip_norm([g._data for g in gradients], max_norm)


@overridable
def clip_norm(gs: Sequence[Array], max_norm: float) -> Array:
    """Scale the arrays so that the norm of all together is at most max_norm (and a millionth less); returns the norm
    before."""
    # The squares of numbers above 1e19 are too large for float32: so of the largest number as a unit.
    largest = xp.stack([abs(g).max() for g in gs if g.size] or [xp.zeros((), "float32")]).max()
    unit = xp.where((largest > 1) & xp.isfinite(largest), largest, 1).astype(largest.dtype)
    norm = unit * xp.sqrt(xp.stack([xp.square(g / unit).sum() for g in gs]).sum())  # ()
    scale = xp.minimum(max_norm / (norm + 1e-6), 1)
    for g in gs:
        g *= scale
    return norm


class EMA:
    """A running average of a module's parameters; samples made with it are better than with the parameters themselves.

        average = d average + (1 - d) p,   d = min(decay, (1 + n) / (10 + n))   at update n = 0, 1, 2, ...

    The warm-up of d forgets the random first weights: with a constant d = 0.999 they would still count 37 %
    after 1000 steps. Call `update()` after each step of the optimiser; buffers are not averaged. Evaluate
    inside `with ema.applied():`.
    Errors: ValueError if decay is not in [0, 1); TypeError for what is no module.
    """

    def __init__(self, module: Module, decay: float = 0.999):
        if not isinstance(module, Module):
            raise TypeError(f"EMA takes a module, not a {type(module).__name__}")
        self.decay, self.updates = number("EMA: decay", decay, "[0, 1)"), 0
        self._parameters = dict(module.named_parameters())
        self.averages = {name: p.data.copy() for name, p in self._parameters.items()}

    def update(self) -> None:
        """Include the present parameters in the average."""

        def count() -> list[float]:
            n, self.updates = self.updates, self.updates + 1
            return [1 - min(self.decay, (1 + n) / (10 + n))]

        ps = [self._parameters[name].data for name in self.averages]
        averages = list(self.averages.values())
        average_step(averages, ps, backend.numbers(count))
        backend.each_time(functools.partial(note_change, *averages))  # a graph may have been made inside `applied`

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averages as its parameters; afterwards its own again, whatever happened inside.
        Errors: ValueError, before anything is changed, if the module has been converted to another dtype."""
        self._check_fit(self._parameters)
        before = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.averages[name]
            yield
        finally:
            for name, p in self._parameters.items():
                if p.dtype != before[name].dtype:  # the module was converted inside
                    p._data = p._data.astype(before[name].dtype)
                p.data = before[name]

    def copy_to(self, module: Module) -> None:
        """Make the averages the parameters of a module of the same kind, for good.
        Errors: ValueError, before anything is changed, for a module of other parameters."""
        parameters = dict(module.named_parameters())
        self._check_fit(parameters)
        for name, p in parameters.items():
            p.data = self.averages[name].copy()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": {name: a.copy() for name, a in self.averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict. Errors: ValueError if it is of another module, or has values that no state_dict has;
        then nothing is changed."""
        try:
            given = _entries(state, "averages", "updates")
            updates, arrays = integer("updates", given["updates"], least=0), _arrays(given["averages"])
        except ValueError as error:
            raise ValueError(f"this state does not fit an EMA: {error}") from None
        _same({name: a.shape for name, a in arrays.items()}, {name: a.shape for name, a in self.averages.items()})
        self.updates = updates
        for name, a in self.averages.items():
            a[...] = backend.to_device(arrays[name])
        note_change(*self.averages.values())

    def _check_fit(self, parameters: Mapping[str, Tensor]) -> None:
        """Errors: ValueError unless each average can become the parameter of its name, and each has one."""
        wanted = {name: f"{p.shape} {p.dtype}" for name, p in parameters.items()}
        _same({name: f"{a.shape} {a.dtype}" for name, a in self.averages.items()}, wanted)


def _same(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Errors: ValueError, which names the differences, unless both are equal."""
    names = [name for name in {**wanted, **given} if given.get(name) != wanted.get(name)]
    if names:
        wrong = ", ".join(f"{name}: {given.get(name)}, not {wanted.get(name)}" for name in names)
        raise ValueError(f"these averages are of another module: {wrong}")


@overridable
def average_step(averages: Sequence[Array], ps: Sequence[Array], hyperparameters: Array) -> None:
    """average += rest (p - average), in place. hyperparameters: [rest]."""
    rest = float(hyperparameters[0])
    for average, p in zip(averages, ps):
        average += rest * (p - average)


# ---------------------------------------------------------------- schedules: a factor for the learning rate


# Each is a class, so that it can be pickled, and shows its arguments.


@dataclass(frozen=True)
class constant:
    """1"""

    def __call__(self, step: float) -> float:
        return 1.0


@dataclass(frozen=True)
class exponential:
    """max(floor, factor^step). Errors: ValueError for a negative factor, or a floor outside [0, 1]."""

    factor: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        _keep(self, factor="[0, inf)", floor="[0, 1]")

    def __call__(self, step: float) -> float:
        return max(self.floor, self.factor**step)


@dataclass(frozen=True)
class cosine:
    """Half a period of a cosine, from 1 at step 0 to the floor at `steps`; the floor after that.

    Source: Loshchilov and Hutter 2017, equation 5.
    Errors: ValueError for steps that are not positive, or a floor outside [0, 1].
    """

    steps: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        _keep(self, steps="(0, inf)", floor="[0, 1]")

    def __call__(self, step: float) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(step / self.steps, 1))) / 2


@dataclass(frozen=True)
class warmup:
    """A straight line that reaches 1 at step `steps` - 1, times the schedule `then` at the same step.

    Errors: ValueError for steps that are not positive; TypeError for a `then` that cannot be called.
    """

    steps: float
    then: Schedule | None = None

    def __post_init__(self) -> None:
        _keep(self, steps="(0, inf)")
        if self.then is not None and not callable(self.then):
            raise TypeError(f"warmup: then must be a schedule, not {self.then!r}")

    def __call__(self, step: float) -> float:
        return min((step + 1) / self.steps, 1) * (1.0 if self.then is None else self.then(step))


def _keep(schedule: Any, **intervals: str) -> None:
    """Make the arguments plain numbers. Errors: ValueError for one outside its interval."""
    for name, interval in intervals.items():
        value = number(f"{type(schedule).__name__}: {name}", getattr(schedule, name), interval)
        object.__setattr__(schedule, name, value)
