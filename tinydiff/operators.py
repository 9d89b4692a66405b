"""NumPy's operators, methods and functions on a Tensor: most lines name an op, and the rest is in place or on the host.

Everything about an op, its gradient included, stands on its page in tinydiff/ops; Tensor itself is in engine.py.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from . import backend, summary
from .arguments import with_own_keywords
from .changes import note_change
from .hooks import Handle, Hooks
from .locks import free_in_child
from .modes import grad_enabled

if TYPE_CHECKING:
    from .engine import Tensor

OPS: dict[str, Callable[..., Any]] = {}  # every op by name; they enter themselves as tinydiff/ops defines them


def register(function: Any) -> Any:
    """Enter a function in OPS, under its name. Errors: ValueError if another function has that name."""
    name, place = function.__name__, (function.__module__, function.__qualname__)
    if name in OPS:
        before = OPS[name].__module__, OPS[name].__qualname__
        if before != place or "<locals>" in function.__qualname__:  # else the same cell, or module, is run again
            raise ValueError(
                f"there is an op named {name!r} already: choose another name, or take it out first, by "
                f"tinydiff.engine.OPS.pop({name!r})"
            )
    OPS[name] = function
    return function


_accumulating = free_in_child()


COMPARISONS = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")


class NumPyFunction:
    """What NumPy calls for np.exp(x), which is ops.exp(x), for `a < x`, and for `a -= x` with an array a.

    NumPy looks for it on the class. CuPy looks on the Tensor, where it finds None: this leaves `a * x` to x.__rmul__.
    """

    def __get__(self, x: Any, _class: Any) -> Any:
        return self if x is None else None

    def __call__(self, _x: Any, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        name = {"absolute": "abs"}.get(ufunc.__name__, ufunc.__name__)
        requiring = [x for x in inputs if isinstance(x, Operators) and x._requires_grad]
        into = [x for x in options.get("out", ()) if isinstance(x, Operators)]
        if method == "__call__" and not options and name in OPS:
            return OPS[name](*inputs)
        lost = into or requiring and grad_enabled()
        if method == "__call__" and (name in COMPARISONS or "out" in options and not lost):
            return ufunc(*map(array_of, inputs), **options)
        shapes = ", ".join(str(getattr(x, "shape", x)) for x in inputs)
        raise TypeError(
            f"NumPy's {name} of {shapes}, called so, is no op of tinydiff, and would lose the gradient of a Tensor: "
            "use tinydiff.ops, or x.numpy() for the values alone"
        )


def values_of(x: Any) -> Any:
    """x for NumPy: Tensors as NumPy arrays, in lists, tuples and dicts too. Errors: TypeError where a gradient would be
    lost."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(values_of, x))
    if isinstance(x, dict):
        return {name: values_of(value) for name, value in x.items()}
    return x.__array__() if isinstance(x, Operators) else x


class Operators:
    """The base of Tensor, whose array is `_data`."""

    __slots__ = ()
    __array_ufunc__ = NumPyFunction()
    __hash__ = object.__hash__
    _data: Any
    _requires_grad: bool
    _grad: Any
    node: Any
    grad: Any
    hooks: Any

    # fmt: off
    shape = property(lambda self: self._data.shape)
    ndim = property(lambda self: self._data.ndim)
    size = property(lambda self: self._data.size)
    dtype = property(lambda self: self._data.dtype)
    T = property(lambda self: OPS["transpose"](self))
    name = property(lambda self: getattr(self, "_name", None), lambda self, name: setattr(self, "_name", name))

    def tolist(self) -> Any: return self.numpy().tolist()

    def __neg__(self) -> Tensor: return OPS["negative"](self)
    def __pos__(self) -> Any: return self
    def __abs__(self) -> Tensor: return OPS["abs"](self)
    def __add__(self, y: Any) -> Tensor: return OPS["add"](self, y)
    def __radd__(self, y: Any) -> Tensor: return OPS["add"](y, self)
    def __sub__(self, y: Any) -> Tensor: return OPS["subtract"](self, y)
    def __rsub__(self, y: Any) -> Tensor: return OPS["subtract"](y, self)
    def __mul__(self, y: Any) -> Tensor: return OPS["multiply"](self, y)
    def __rmul__(self, y: Any) -> Tensor: return OPS["multiply"](y, self)
    def __truediv__(self, y: Any) -> Tensor: return OPS["divide"](self, y)
    def __rtruediv__(self, y: Any) -> Tensor: return OPS["divide"](y, self)
    def __pow__(self, y: Any) -> Tensor: return OPS["power"](self, y)
    def __rpow__(self, y: Any) -> Tensor: return OPS["power"](y, self)
    def __matmul__(self, y: Any) -> Tensor: return OPS["matmul"](self, y)
    def __rmatmul__(self, y: Any) -> Tensor: return OPS["matmul"](y, self)
    def __getitem__(self, index: Any) -> Tensor: return OPS["getitem"](self, index=index)

    # Comparisons have no gradient: they give plain arrays of bool.
    def __eq__(self, y: Any) -> Any: return self._data == array_of(y)
    def __ne__(self, y: Any) -> Any: return self._data != array_of(y)
    def __lt__(self, y: Any) -> Any: return self._data < array_of(y)
    def __le__(self, y: Any) -> Any: return self._data <= array_of(y)
    def __gt__(self, y: Any) -> Any: return self._data > array_of(y)
    def __ge__(self, y: Any) -> Any: return self._data >= array_of(y)

    def astype(self, dtype: Any) -> Tensor: return OPS["astype"](self, dtype=dtype)
    def copy(self) -> Tensor: return OPS["copy"](self)
    # **other: what the op does not know, such as dim=, so that the op says what it is called here.
    def sum(self, axis: Any = None, keepdims: bool = False, **other: NoReturn) -> Tensor:
        return OPS["sum"](self, axis=axis, keepdims=keepdims, **other)
    def mean(self, axis: Any = None, keepdims: bool = False, **other: NoReturn) -> Tensor:
        return OPS["mean"](self, axis=axis, keepdims=keepdims, **other)
    def max(self, axis: Any = None, keepdims: bool = False, **other: NoReturn) -> Tensor:
        return OPS["max"](self, axis=axis, keepdims=keepdims, **other)
    def min(self, axis: Any = None, keepdims: bool = False, **other: NoReturn) -> Tensor:
        return OPS["min"](self, axis=axis, keepdims=keepdims, **other)
    def prod(self, axis: Any = None, keepdims: bool = False, **other: NoReturn) -> Tensor:
        return OPS["prod"](self, axis=axis, keepdims=keepdims, **other)
    def var(self, axis: Any = None, ddof: int = 0, keepdims: bool = False, **other: NoReturn) -> Tensor:
        return OPS["var"](self, axis=axis, ddof=ddof, keepdims=keepdims, **other)
    def cumsum(self, axis: Any = None, **other: NoReturn) -> Tensor: return OPS["cumsum"](self, axis=axis, **other)
    def clip(self, low: Any = None, high: Any = None, **other: NoReturn) -> Tensor:
        return OPS["clip"](self, low=low, high=high, **other)
    def reshape(self, *shape: Any) -> Tensor: return OPS["reshape"](self, shape=shape[0] if len(shape) == 1 else shape)
    def flatten(self) -> Tensor: return self.reshape(-1)
    def ravel(self) -> Tensor: return self.reshape(-1)
    def transpose(self, *axes: Any, **other: NoReturn) -> Tensor:
        return OPS["transpose"](self, axes=(axes[0] if len(axes) == 1 else axes) or None, **other)
    @with_own_keywords
    def argmax(self, axis: Any = None) -> Any: return self._data.argmax(axis=axis)
    @with_own_keywords
    def swapaxes(self, axis1: int, axis2: int) -> Tensor: return OPS["swapaxes"](self, axis1=axis1, axis2=axis2)
    def squeeze(self, axis: Any = None, **other: NoReturn) -> Tensor: return OPS["squeeze"](self, axis=axis, **other)

    # In place, as in NumPy: the array is the same one afterwards.
    def __iadd__(self, y: Any) -> Any: self._data += self._changing("x += y", y); return self  # noqa: E702
    def __isub__(self, y: Any) -> Any: self._data -= self._changing("x -= y", y); return self  # noqa: E702
    def __imul__(self, y: Any) -> Any: self._data *= self._changing("x *= y", y); return self  # noqa: E702
    def __itruediv__(self, y: Any) -> Any: self._data /= self._changing("x /= y", y); return self  # noqa: E702
    # fmt: on

    def __setitem__(self, index: Any, y: Any) -> None:
        index = tuple(array_of(i) for i in index) if isinstance(index, tuple) else array_of(index)
        self._data[index] = self._changing("x[index] = y", y)

    def _changing(self, what: str, y: Any) -> Any:
        """Note a change in place, and return the other operand's array."""
        for name, x in (("x", self), ("y", y)):
            if grad_enabled() and isinstance(x, Operators) and x._requires_grad:
                raise RuntimeError(
                    f"{what}, where {name} has shape {x.shape} and requires a gradient, would lose that gradient: "
                    "write a new Tensor (x = x + y, ops.where, ops.index_add), or do it inside tinydiff.no_grad()"
                )
        backend.each_time(functools.partial(note_change, self._data))
        return backend.operand(array_of(y))

    def numpy(self) -> Any:
        """A NumPy array of the values, without history. Waits for the device."""
        return backend.to_host(self._data)

    def item(self) -> float:
        """The only element, as a Python number. Waits for the device. Errors: ValueError if there are several."""
        return self._only("item()")

    def _only(self, what: str) -> Any:
        if self.size != 1:
            raise ValueError(f"{what} is for a Tensor of one element, this one has shape {self.shape}")
        return self.numpy().item()

    def __float__(self) -> float:
        return float(self._only("float()"))

    def __int__(self) -> int:
        return int(self._only("int()"))

    def __bool__(self) -> bool:
        return bool(self._only("the truth of a Tensor, in `if` or `and`,"))

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("a Tensor of shape () has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """For numpy.asarray(x). Errors: TypeError for a Tensor that requires a gradient, which NumPy would lose."""
        if self._requires_grad:
            raise TypeError(
                f"NumPy would lose the gradient of a Tensor of shape {self.shape}: use tinydiff.ops, "
                "or x.numpy() for the values alone"
            )
        array = self.numpy()
        if dtype is None or dtype == array.dtype:
            return array.copy() if copy else array
        if copy is False:
            raise ValueError(f"a Tensor of {array.dtype} as {dtype} needs a copy")
        return array.astype(dtype)

    def __dlpack__(self, *, copy: bool | None = None, **options: Any) -> Any:
        """For another library's from_dlpack(x): the memory of the array itself, which both then share; a copy only if
        it is asked for, or if an axis runs backwards, which PyTorch does not survive. options: the others of the array
        API standard (stream, max_version, dl_device). Errors: BufferError for a Tensor that requires a gradient, which
        the other library would lose, and where copy=False cannot be."""
        if self._requires_grad:
            raise BufferError(
                f"another library would lose the gradient of a Tensor of shape {self.shape}: hand over x.detach()"
            )
        array, backwards = self._data, any(stride < 0 for stride in self._data.strides)
        if backwards and copy is False:
            raise BufferError(f"a Tensor of strides {array.strides} runs backwards, and needs a copy")
        return (array.copy() if backwards or copy else array).__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        """(kind, number) of the device, as DLPack counts them: (1, 0) is the CPU."""
        return self._data.__dlpack_device__()

    def __array_function__(self, fn: Any, _types: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """For numpy.mean(x) and the like: x's own method or the op of that name; else NumPy's function of the values.
        Errors: TypeError where NumPy would lose a gradient, or an op of that name is called otherwise."""
        name = fn.__name__
        if name in ("shape", "ndim", "size"):
            return fn(*(array_of(a) for a in args), **options)
        own = getattr(args[0], name, None) if args and isinstance(args[0], Operators) else None
        known = functools.partial(own, *args[1:]) if callable(own) else functools.partial(OPS.get(name, fn), *args)
        if callable(own) or name in OPS:
            try:
                return known(**options)
            except TypeError as error:
                raise TypeError(f"NumPy's {name}, called so, is no op of tinydiff: use ops.{name} ({error})") from error
        return fn(*values_of(args), **values_of(options))

    def __reduce__(self) -> Any:
        """For pickle and copy: leaves, without their hooks. Errors: TypeError for a result, which has a graph."""
        if self.node is not None:
            raise TypeError(
                f"a Tensor of shape {self.shape} that {self.node.op.name} computed cannot be copied or pickled with "
                "its graph: take x.detach()"
            )
        grad = None if self._grad is None else self._grad.detach()
        given = type(self), self._data, self._requires_grad, grad, self.name
        return restored, given, getattr(self, "__dict__", None)

    def __repr__(self) -> str:
        """The values if they are few, else one line about them. Waits for the device."""
        return str(self) if self.size <= summary.FEW else summary.one_line(self._data, *self._about())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return summary.table(self._data, *self._about())

    def __str__(self) -> str:
        grad, history = self._about()
        about = [] if self.name is None else [f"name={self.name!r}"]
        about += [f"dtype={self.dtype}"] if str(self.dtype) != "float32" else []
        about += [] if grad is None else [f"|grad|={summary.norm(grad)}"]
        return f"tensor({', '.join([str(self.numpy()), *about, *filter(None, [history])])})".replace(
            "\n", "\n" + " " * 7
        )

    def _about(self) -> tuple[Any, str]:
        """The array of the gradient, and where this Tensor comes from."""
        needs = "requires_grad=True" if self._requires_grad else ""
        history = needs if self.node is None else f"node={self.node.op.name}"
        return None if self._grad is None else self._grad._data, history

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    # ---- as in PyTorch

    def accumulate(self, g: Tensor) -> None:
        """Add g to `.grad`."""
        with _accumulating:  # or threads that share this Tensor would lose each other's gradients
            self.grad = g if self.grad is None else self.grad + g

    def zero_grad(self) -> None:
        self.grad = None

    def register_hook(self, fn: Callable[[Tensor], Tensor | None]) -> Handle:
        """Call fn(g) with the complete adjoint of this Tensor in every backward pass that reaches it. If fn returns a
        Tensor, that takes the place of g, which fn must not change itself. Returns a handle whose remove() takes the
        hook away.
        Errors: RuntimeError for a Tensor that requires no gradient; TypeError for what is no function.
        """
        self._check_required("register_hook")
        if not callable(fn):
            raise TypeError(f"register_hook takes a function of the adjoint, not {fn!r}")
        return Handle(self._hooks(), fn)

    def retain_grad(self) -> None:
        """Let backward passes add the gradient, after all hooks, to `.grad` although this Tensor is not a leaf.
        Errors: RuntimeError for a Tensor that requires no gradient.
        """
        self._check_required("retain_grad")
        if self.node is not None:  # a leaf keeps it anyway
            self._hooks().kept_by = weakref.ref(self)  # weak, as the graph must not keep its own results alive

    def _check_required(self, what: str) -> None:
        if not self._requires_grad:
            raise RuntimeError(
                f"{what}: a Tensor of shape {self.shape} requires no gradient, so it gets none (was it computed inside "
                "no_grad, or in the first run of a checkpoint?)"
            )

    def _hooks(self) -> Hooks:
        owner: Any = self if self.node is None else self.node
        if owner.hooks is None:
            owner.hooks = Hooks()
        return owner.hooks


def restored(kind: Any, data: Any, requires_grad: bool, grad: Tensor | None, name: str | None = None) -> Tensor:
    x = kind.__new__(kind)
    x._data, x._requires_grad, x._grad, x.node, x.hooks, x._name = data, requires_grad, grad, None, None, name
    return x


def array_of(x: Any) -> Any:
    """The array of a Tensor; anything else as it is."""
    return x._data if isinstance(x, Operators) else x
