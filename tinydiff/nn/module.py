"""Module: parameters, and what is computed with them, in one plain object.

    class Net(Module):
        def __init__(self, rng=None):
            self.hidden = Linear(2, 50, rng=rng)
            self.out = Linear(50, 1, rng=rng)

        def forward(self, x):
            return self.out(ops.tanh(self.hidden(x)))

Nothing is registered, and there is no `super().__init__()`: a module's state is found by walking its attributes in the
order of their definition, through modules, lists, tuples and dicts. A `Parameter` is trained; any other Tensor is a
buffer, kept in the state but not trained. The path of attributes is the name: "hidden.weight", "blocks.0.norm.bias".
An attribute whose name starts with an underscore is private, and not walked; a module that knows the one it is part of
keeps it there. Errors of every walk: ValueError, with the path, for a module that holds itself, and for two parts of
the same path ({1: a, "1": b}), of which a state could keep only one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .. import backend
from ..arguments import check_precision
from ..backend import Array, xp
from ..changes import memory_of
from ..engine import Tensor
from ..hooks import Handle, Hooks
from ..modes import no_grad
from ..operators import array_of
from ..rng import Rng


class Parameter(Tensor):
    """A Tensor that is trained, with a copy of the data: a leaf that requires a gradient.
    Errors: TypeError if the data are not floating.
    """

    __slots__ = ()

    def __init__(self, data: Any):
        array = backend.to_device(array_of(data))
        if array.dtype.kind != "f":
            raise TypeError(f"a Parameter holds floating numbers, not {array.dtype} of shape {array.shape}")
        check_precision(f"a Parameter of shape {array.shape}", array.dtype)
        # Steps are in place: without a copy, two parameters made from one array would move together.
        super().__init__(array if is_unfilled(array) else array.copy(), requires_grad=True)


class Unfilled(Rng):
    """In place of an rng, where the weights are to be loaded: UNet(rng=Unfilled()). Its arrays are one number, shown in
    every place, so a net of any size takes no memory and no time until `p.data = array` fills each parameter. (Norms
    and other layers that draw nothing begin as they do otherwise.)

    most: a net that asks for more numbers than that, or more often than `times`, is an error (ValueError), and not
    built to its end: it may be a stranger who describes it.
    """

    def __init__(self, most: float = math.inf, times: float = math.inf) -> None:
        super().__init__(0)
        self.most, self.times = most, times

    def normal(self, shape: int | tuple[int, ...], dtype: Any = "float32", *, sample_offset: int = 0) -> Array:
        self.most -= math.prod(shape) if isinstance(shape, tuple) else shape
        self.times -= 1
        if self.most < 0 or self.times < 0:
            raise ValueError("it describes a net that is larger than its weights")
        return xp.broadcast_to(_BLANK.setdefault((xp.__name__, str(dtype)), xp.zeros((), dtype)), shape)

    uniform = normal


_BLANK: dict[tuple[str, str], Array] = {}  # the one number, by module and dtype


def is_unfilled(array: Array) -> bool:
    """Did Unfilled make this array?"""
    memory = memory_of(array)
    return any(memory is blank for blank in _BLANK.values())


class Setting(Tensor):
    """A buffer of one number, in float64, that a module computes with as a Python float. Such a float takes the dtype
    of what it meets; so `astype` need not convert the buffer, and the state keeps every digit.
    """

    __slots__ = ()

    def __init__(self, value: float):
        super().__init__(xp.asarray(value, "float64"))


class Module:
    """A part of a network: assign parameters, buffers and modules to attributes, and write `forward`.

    A module can be copied (copy.deepcopy) and pickled, if what its attributes hold can. The copy has the weights, their
    gradients and the mode, but no forward hooks: those belong to the module that they were registered on.
    """

    training = True

    needs_whole_batch = False  # does it depend on more than one sample, or change while training?

    _forward_hooks: Any = ()  # a list of its own, once one is registered

    def forward(self, *inputs: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, /, *inputs: Any, **options: Any) -> Any:
        output = self.forward(*inputs, **options)
        if self._forward_hooks:
            for handle in list(self._forward_hooks):
                replacement = handle.fn(self, inputs, output)
                output = output if replacement is None else replacement
        return output

    def register_forward_hook(self, fn: Callable[[Module, tuple[Any, ...], Any], Any]) -> Handle:
        """Call fn(module, inputs, output) after each forward pass of this module, with its positional inputs. If fn
        returns anything but None, that replaces the output. Hooks run in the order of their registration, and each
        gets the output of the one before. Returns a handle, whose `.remove()` takes the hook away.
        """
        if not isinstance(self._forward_hooks, Hooks):
            self._forward_hooks = Hooks()
        return Handle(self._forward_hooks, fn)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_forward_hooks"}

    # ---- what it is made of

    def children(self) -> Iterator[tuple[str, Module]]:
        """The modules right below this one, with their paths."""
        return ((path, part) for path, part in _parts(self, deep=False) if isinstance(part, Module))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers of this module itself, without those of its children."""
        return ((path, part) for path, part in _parts(self, deep=False) if isinstance(part, Tensor))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module, under the name "", and all below it; a module that is used twice is listed twice."""
        yield prefix, self
        for path, part in _parts(self):
            if isinstance(part, Module):
                yield f"{prefix}.{path}" if prefix else path, part

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer with its name; a shared one is listed under each of its names."""
        return ((path, part) for path, part in _parts(self) if isinstance(part, Tensor))

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, tensor) for name, tensor in self.named_tensors() if isinstance(tensor, Parameter))

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter once, for an optimiser."""
        return iter({id(p): p for _, p in self.named_parameters()}.values())

    def count(self) -> int:
        """The number of trained weights, element by element."""
        return sum(p.size for p in self.parameters() if p.requires_grad)

    # ---- modes

    def train(self, mode: bool = True) -> Any:
        """Switch this module and all below it to training (batch statistics, dropout); returns the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Any:
        """Switch to evaluation; returns the module."""
        return self.train(False)

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None

    def astype(self, dtype: Any) -> Any:
        """Convert every floating parameter and buffer but a Setting, here and below, in place;
        returns the module. Gradients are dropped. Errors: TypeError for a dtype that is not floating.
        """
        if xp.dtype(dtype).kind != "f":
            raise TypeError(f"{type(self).__name__}.astype: parameters are floating numbers, not {dtype!r}")
        check_precision(f"{type(self).__name__}.astype", xp.dtype(dtype))
        for _, tensor in self.named_tensors():
            if tensor.dtype.kind == "f" and not isinstance(tensor, Setting):
                tensor._data = tensor._data.astype(dtype)
                tensor.grad = None
        return self

    # ---- state

    def state_dict(self) -> dict[str, Array]:
        """name -> a copy of the array, for every parameter and buffer: later training steps do not change it."""
        return {name: tensor._data.copy() for name, tensor in self.named_tensors()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the values of a state_dict (arrays of the host or of the device, or Tensors) into the arrays that are
        there, each cast to the dtype in use.

        Errors: ValueError that says how many entries are missing, unexpected, wrongly shaped and of another kind than
        real numbers, and names the first few of each; then nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"this state does not fit {type(self).__name__}: it is a {type(state).__name__}")
        own = dict(self.named_tensors())
        given = {name: _as_array(value) for name, value in state.items()}
        common = [name for name in own if name in given]
        problems = {
            "missing": [f"{name} {t.shape}" for name, t in own.items() if name not in given],
            "unexpected": [f"{name} {a.shape}" for name, a in given.items() if name not in own],
            "wrongly shaped": [
                f"{name} is {given[name].shape}, not {own[name].shape}"
                for name in common
                if given[name].shape != own[name].shape
            ],
            "of another kind": [
                f"{name} is {given[name].dtype}, not {own[name].dtype}"
                for name in common
                if given[name].dtype.kind not in f"fiub{own[name].dtype.kind}"
            ],
        }
        wrong = [
            f"{len(entries)} {what}: {', '.join(entries[:5])}{', ...' if len(entries) > 5 else ''}"
            for what, entries in problems.items()
            if entries
        ]
        if wrong:
            raise ValueError(f"this state does not fit {type(self).__name__}: {'; '.join(wrong)}")
        listening = [m for _, m in self.named_modules() if type(m).after_load is not Module.after_load]
        before = self.state_dict() if listening else {}
        try:
            self._copy(given)
            for module in listening:
                module.after_load()
        except ValueError:
            self._copy(before)
            for module in listening:  # some may have taken over what was refused in another
                module.after_load()
            raise

    def _copy(self, state: Mapping[str, Any]) -> None:
        with no_grad():
            for name, tensor in self.named_tensors():
                if name in state:
                    tensor[...] = backend.to_device(state[name])

    def after_load(self) -> None:
        """Called by load_state_dict, for what a module keeps beside its tensors and computes from them. After a
        ValueError the tensors are as they were."""

    # ---- a picture of it

    def __repr__(self) -> str:
        """A tree: each module with its path, its arguments and the number of its parameters."""
        lines = list(_tree(self, ""))
        width = max(len(text) for text, _ in lines)
        return "\n".join(f"{text:{width}} {count:>12,}" for text, count in lines)


class Layer(Module):
    """A module that makes one Tensor. A type checker knows it; of a module of your own it knows nothing."""

    if TYPE_CHECKING:

        def __call__(self, /, *inputs: Any, **options: Any) -> Tensor: ...


class Sequential(Layer):
    """Layers one after the other: y = layer_n(... layer_1(x)).
    They are called "0", "1", ...; plain functions may be among them.
    """

    def __init__(self, *layers: Any):
        for layer in layers:
            if not callable(layer):
                raise TypeError(f"Sequential takes layers and functions, not {type(layer).__name__}: {layer!r}")
        vars(self).update({str(i): layer for i, layer in enumerate(layers)})

    def forward(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
        return x

    def __len__(self) -> int:
        return sum(name.isdigit() for name in vars(self))

    def __iter__(self) -> Iterator[Any]:
        return (layer for name, layer in vars(self).items() if name.isdigit())

    def __getitem__(self, index: int) -> Any:
        return list(self)[index]


def same_dtype(layer: Module, x: Any, weight: Any) -> None:
    """Refuse an input of another dtype than the weights:
    it would be converted at every step, or widen all that follows.
    """
    if x.dtype != weight.dtype and x.dtype.kind != "c":  # complex: the step of a gradient check
        remedy = f"x.astype({str(weight.dtype)!r})"
        if x.dtype.kind == "f":
            remedy += f" or module.astype({str(x.dtype)!r})"
        raise TypeError(
            f"{type(layer).__name__}: the input {x.shape} is {x.dtype}, but the weights are {weight.dtype}: "
            f"convert with {remedy}"
        )


def _parts(module: Module, deep: bool = True) -> Iterable[tuple[str, Any]]:
    """(path, Tensor or Module) of everything that a module holds, through lists, tuples and dicts, in order; `deep`:
    and of everything below. Errors: ValueError for a path that comes twice, or that leads back to where it came from.
    """
    found: dict[str, Any] = {}

    def walk(holder: Any, path: str, above: dict[int, str]) -> None:
        above = {**above, id(holder): path}
        prefix = f"{path}." if holder is not module else ""
        if isinstance(holder, Module):
            items: Any = ((name, value) for name, value in vars(holder).items() if not name.startswith("_"))
        else:
            items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for name, value in items:
            if not isinstance(value, (Tensor, Module, list, tuple, dict)):
                continue
            path = f"{prefix}{name}"
            if id(value) in above:
                raise ValueError(
                    f"{type(module).__name__}: {path!r} leads back to {above[id(value)]!r}, a {type(value).__name__} "
                    "that so holds itself: keep what a part belongs to in an attribute whose name starts with an "
                    "underscore, which is not walked"
                )
            if isinstance(value, (Tensor, Module)):
                if path in found:
                    raise ValueError(
                        f"{type(module).__name__} has two parts of the path {path!r}, of which a state could keep only "
                        "one: rename a key"
                    )
                found[path] = value
            if not isinstance(value, Tensor) and (deep or not isinstance(value, Module)):
                walk(value, path, above)

    walk(module, "", {})
    return found.items()


def _as_array(value: Any) -> Any:
    value = array_of(value)
    try:
        return value if backend.active().is_array(value) else backend.to_host(value)
    except TypeError as error:  # PyTorch's bfloat16, for one
        raise TypeError(
            f"load_state_dict: no array of NumPy can be made of {type(value).__name__}: {error} (weights of "
            "PyTorch: interop.from_torch)"
        ) from error


def _tree(module: Module, label: str) -> Iterator[tuple[str, int]]:
    yield label + type(module).__name__ + _arguments(module), module.count()
    indent = " " * (len(label) - len(label.lstrip(" "))) + "  "
    shown: dict[str, Any] = dict(module.children())
    if isinstance(module, Sequential):  # where plain functions may stand among the layers
        shown = {str(i): layer for i, layer in enumerate(module)}
    for path, child in shown.items():
        if isinstance(child, Module):
            yield from _tree(child, f"{indent}{path}: ")
        else:
            yield f"{indent}{path}: {getattr(child, '__qualname__', None) or repr(child)}", 0


def _arguments(module: Module) -> str:
    """The arguments of the constructor that are attributes too and not at their default: "(1, 32, 3, stride=2)"."""
    shown = []
    for p in list(inspect.signature(type(module).__init__).parameters.values())[1:]:
        value = getattr(module, p.name, inspect.Parameter.empty)
        if p.name == "bias":  # the argument is a bool, the attribute the Parameter or None
            value = value is not None
        if isinstance(value, (int, float, str, tuple)) and value != p.default:
            shown.append(f"{value}" if p.default is p.empty else f"{p.name}={value!r}")
    return f"({', '.join(shown)})" if shown else ""
