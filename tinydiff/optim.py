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
from typing import Any

from . import backend
from .backend import Array, overridable, xp
from .changes import note_change
from .engine import Tensor
from .nn import Module
from .operators import array_of

Schedule = Callable[[float], float]


# ---------------------------------------------------------------- optimisers


class Optimizer:
    """The base of all optimisers: parameters, learning rate, and for each parameter a count of steps and a state."""

    state_names: tuple[str, ...] = ()  # of arrays of the shape of the parameter, zero at first

    def __init__(self, parameters: Iterable[Tensor], lr: float):
        self.parameters = list(parameters)
        if not self.parameters or not all(isinstance(p, Tensor) for p in self.parameters):
            kinds = sorted({type(p).__name__ for p in self.parameters}) or "none"
            raise ValueError(
                f"{type(self).__name__} takes Tensors that require a gradient, e.g. "
                f"model.parameters(); it was given {kinds}"
            )
        for i, p in enumerate(self.parameters):
            if p.node is not None:  # backward gives a gradient to leaves only, so it would never move
                raise ValueError(
                    f"{type(self).__name__}: parameter {i} of shape {p.shape} is the result of {p.node.op.name}, "
                    "not a leaf: give the Tensors that it was computed from"
                )
        _in_range(self, lr, "lr", 0, math.inf)
        self.lr = lr
        self.counts = [0] * len(self.parameters)
        self.state = [{name: xp.zeros_like(p.data) for name in self.state_names} for p in self.parameters]

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
                note_change(p.data)
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
        """What a checkpoint keeps: lr, the counts of steps, and a copy of the state of each parameter, by its index."""
        copies = {str(i): {name: a.copy() for name, a in state.items()} for i, state in enumerate(self.state)}
        return {"lr": self.lr, "counts": list(self.counts), "state": copies if self.state_names else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict. Errors: ValueError for a state with other arrays than `state_names` for each
        parameter, or of other parameters."""
        wrong, needed = [], ", ".join(self.state_names) or "nothing"
        if missing := {"lr", "counts", "state"} - set(state):
            wrong.append(f"it has no {', '.join(sorted(missing))}")
        elif len(state["counts"]) != len(self.parameters):
            wrong.append(f"it has {len(state['counts'])} parameters, not {len(self.parameters)}")
        else:
            for i, p in enumerate(self.parameters):
                shapes = {name: tuple(a.shape) for name, a in state["state"].get(str(i), {}).items()}
                if shapes != {name: p.shape for name in self.state_names}:
                    wrong.append(
                        f"parameter {i} of shape {p.shape} needs {needed} of that shape, not {shapes or 'nothing'}"
                    )
        if wrong:
            raise ValueError(
                f"this state does not fit {type(self).__name__} of {len(self.parameters)} "
                f"parameters: {'; '.join(wrong)}"
            )
        self.lr, self.counts = float(state["lr"]), [int(n) for n in state["counts"]]
        for i, p in enumerate(self.parameters):
            for name in self.state_names:
                # Into the array that is there: a captured step may know its address.
                array = self.state[i][name] = self.state[i][name].astype(p.dtype, copy=False)
                array[...] = backend.to_device(array_of(state["state"][str(i)][name]))


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
        _in_range(self, momentum, "momentum", 0, math.inf)
        _in_range(self, weight_decay, "weight_decay", 0, math.inf)
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs a momentum")
        self.state_names = ("velocity",) if momentum else ()
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        super().__init__(parameters, lr)

    def _hyperparameters(self, counts: list[int]) -> list[Any]:
        return [float(self.lr), float(self.weight_decay), float(self.momentum)]

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

    state_names = ("m", "v")
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
        for i, beta in enumerate(betas):
            _in_range(self, beta, f"betas[{i}]", 0, 1)
        _in_range(self, eps, "eps", 0, math.inf)
        _in_range(self, weight_decay, "weight_decay", 0, math.inf)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def _hyperparameters(self, counts: list[int]) -> list[Any]:
        b1, b2 = self.betas
        decay = (1 - self.lr * self.weight_decay, 0.0) if self.decoupled else (1.0, self.weight_decay)
        # The corrections of mhat and vhat are in the rate and in eps, where they cost nothing.
        roots = [math.sqrt(1 - b2**n) for n in counts]
        return [[self.lr * root / (1 - b1**n), self.eps * root, *decay, b1, b2] for n, root in zip(counts, roots)]

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


def _in_range(owner: Any, value: float, name: str, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{type(owner).__name__}: {name} must be in [{low}, {high}), not {value!r}")


# ---------------------------------------------------------------- clipping, averaging


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Array:
    """Scale all gradients, in place, so that the norm of all of them together is at most max_norm.

    Returns the norm before, an array without axes that stays on the device. If a gradient is
    NaN or Inf, so is the norm.
    Source: Pascanu et al. 2013. Errors: ValueError if max_norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be positive, not {max_norm!r}")
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return xp.zeros((), "float32")

    def changed() -> None:
        for g in gradients:
            note_change(g.data)

    backend.each_time(changed)
    return clip_norm([g._data for g in gradients], max_norm)


@overridable
def clip_norm(gs: Sequence[Array], max_norm: float) -> Array:
    """Scale the arrays so that the norm of all together is at most max_norm (and a millionth less); returns the norm
    before."""
    norm = xp.sqrt(xp.stack([(g * g).sum() for g in gs]).sum())  # ()
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
    Errors: ValueError if decay is not in [0, 1).
    """

    def __init__(self, module: Module, decay: float = 0.999):
        _in_range(self, decay, "decay", 0, 1)
        self.decay, self.updates = decay, 0
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
        for a in averages:  # a graph may have been made inside `applied`
            backend.each_time(functools.partial(note_change, a))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averages as its parameters."""
        before = {name: p.data for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            p.data = self.averages[name]
        try:
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = before[name]

    def copy_to(self, module: Module) -> None:
        """Make the averages the parameters of a module of the same kind, for good."""
        for name, p in module.named_parameters():
            p.data = self.averages[name].copy()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": {name: a.copy() for name, a in self.averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict. Errors: ValueError if it is of another module."""
        given = {name: tuple(a.shape) for name, a in state["averages"].items()}
        wanted = {name: a.shape for name, a in self.averages.items()}
        if given != wanted:
            wrong = [
                f"{n}: {given.get(n)}, not {wanted.get(n)}"
                for n in {**wanted, **given}
                if given.get(n) != wanted.get(n)
            ]
            raise ValueError(f"these averages are of another module: {', '.join(wrong)}")
        self.updates = int(state["updates"])
        for name, a in self.averages.items():
            a[...] = backend.to_device(array_of(state["averages"][name]))
            note_change(a)


@overridable
def average_step(averages: Sequence[Array], ps: Sequence[Array], hyperparameters: Array) -> None:
    """average += rest (p - average), in place. hyperparameters: [rest]."""
    rest = float(hyperparameters[0])
    for average, p in zip(averages, ps):
        average += rest * (p - average)


# ---------------------------------------------------------------- schedules: a factor for the learning rate


def constant() -> Schedule:
    """1"""
    return lambda _step: 1.0


def exponential(factor: float, floor: float = 0.0) -> Schedule:
    """max(floor, factor^step)"""
    return lambda step: max(floor, factor**step)


def cosine(steps: float, floor: float = 0.0) -> Schedule:
    """Half a period of a cosine, from 1 at step 0 to the floor at `steps`; the floor after that.

    Source: Loshchilov and Hutter 2017, equation 5.
    """
    return lambda step: floor + (1 - floor) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def warmup(steps: float, then: Schedule | None = None) -> Schedule:
    """A straight line that reaches 1 at step `steps` - 1, times the schedule `then` at the same step."""
    return lambda step: min((step + 1) / steps, 1) * (1.0 if then is None else then(step))
