"""Weights from PyTorch and to PyTorch, without importing it; and Tensors that share their memory with other libraries.

    from_torch(model, torch.load("weights.pt"))
    torch_model.load_state_dict({k: torch.tensor(v) for k, v in to_torch(model).items()})

The names of the weights must be the same; they are if both modules have the same attributes. Only the order of the axes
differs: PyTorch has (out, in) and channels first, tinydiff (in, out) and channels last. Only axes are exchanged: if a
network flattens an image, the rows of the Linear after it must be put in the new order by hand.

    x = from_dlpack(torch_tensor)              # one memory, two names: nothing is copied
    torch_tensor = torch.from_dlpack(x)        # and back; also jax.dlpack.from_dlpack, numpy.from_dlpack, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import backend, nn
from .arguments import check_precision
from .engine import Tensor

# For each layer, the order of the axes of PyTorch's array: ours = theirs.transpose(axes).
AXES: dict[type, dict[str, tuple[int, ...]]] = {
    nn.Linear: {"weight": (1, 0)},  # (out, in)
    nn.Conv1d: {"weight": (2, 1, 0)},  # (out, in / groups, k)
    nn.Conv2d: {"weight": (2, 3, 1, 0)},  # (out, in / groups, kh, kw)
    nn.ConvTranspose2d: {"weight": (2, 3, 1, 0)},  # (in, out / groups, kh, kw)
    nn.MultiHeadAttention: {f"{part}_proj_weight": (1, 0) for part in ("in", "q", "k", "v")},  # (3 E, E), (E, dim)
}


def from_torch(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state_dict of the PyTorch module of the same names: its values are torch tensors, or
    arrays in their layout.

    Batch norm's num_batches_tracked is left out: nothing here reads it. Values of bfloat16 and float8, which NumPy
    lacks, go through float32, which holds them exactly.
    Errors: ValueError that lists every missing, unexpected and wrongly shaped entry; then nothing is changed.
    """
    axes = dict(axes_of(module))
    counters = {
        f"{path}.num_batches_tracked".lstrip(".")
        for path, part in module.named_modules()
        if isinstance(part, nn.BatchNorm2d)
    }
    converted = {}
    for name, value in state.items():
        if name not in counters:
            array = _host(value)
            order = axes.get(name, ())
            converted[name] = array.transpose(order) if order and len(order) == array.ndim else array
    try:
        module.load_state_dict(converted)
    except ValueError as error:
        raise ValueError(f"from_torch: {error} (shapes with tinydiff's order of axes)") from None


def to_torch(module: nn.Module) -> dict[str, np.ndarray]:
    """The state_dict of the PyTorch module of the same names, as NumPy arrays in PyTorch's
    layouts. Waits for the device.
    """
    axes = dict(axes_of(module))
    state = {}
    for name, array in module.state_dict().items():
        host = backend.to_host(array)
        state[name] = np.ascontiguousarray(host.transpose(np.argsort(axes[name]))) if name in axes else host
    for path, part in module.named_modules():
        if isinstance(part, nn.BatchNorm2d):  # PyTorch asks for it, and reads it only where momentum is None
            state[f"{path}.num_batches_tracked".lstrip(".")] = np.zeros((), np.int64)
    return state


def axes_of(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, axes) of every weight whose axes have another order in PyTorch: ours = theirs.transpose(axes)."""
    for path, part in module.named_modules():
        for kind, names in AXES.items():
            if isinstance(part, kind):
                yield from ((f"{path}.{name}".lstrip("."), axes) for name, axes in names.items())


def from_bfloat16(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of bfloat16 in these bytes, as float32: each is the upper half of one."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)


def _host(value: Any) -> np.ndarray:
    """A NumPy array, also from a torch tensor that requires a gradient or is on a GPU."""
    if hasattr(value, "detach"):
        value = value.detach()
    if hasattr(value, "cpu"):
        value = value.cpu()
    kind = str(getattr(value, "dtype", ""))
    if "bfloat16" in kind or "float8" in kind:  # a torch tensor, or an array of ml_dtypes
        value = value.float() if hasattr(value, "float") else value.astype("float32")
    return value.numpy() if hasattr(value, "numpy") else backend.to_host(value)


# ---------------------------------------------------------------- arrays of other libraries


def from_dlpack(x: Any, /, *, copy: bool | None = None) -> Tensor:
    """A Tensor of the memory of another library's array, by the DLPack protocol; nothing is copied unless copy=True.

    x: anything with `__dlpack__` (arrays of NumPy, PyTorch, JAX, CuPy and so on), on the device of the backend in use.
    Both share the memory: what one writes the other sees, and no gradient notices it. The Tensor requires no gradient;
    set x.requires_grad for one. Memory that the other library marks as read-only stays so.
    Errors: TypeError for what has no `__dlpack__`, and for 16-bit floating numbers; BufferError, with the reason, where
    the memory cannot be shared: it is on another device, of a dtype that NumPy lacks, or it requires a gradient there.
    Source: the Python array API standard, 2024.12, from_dlpack.
    """
    if not (hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")):
        raise TypeError(f"from_dlpack: a {type(x).__name__} has no __dlpack__; tinydiff.tensor makes a Tensor of {x!r}")
    try:
        array = backend.from_dlpack(x)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:  # each library has its own
        kind, number = x.__dlpack_device__()
        raise BufferError(
            f"from_dlpack: backend {backend.active().name!r} cannot share the memory of this {type(x).__name__}, which "
            f"is on DLPack's device ({int(kind)}, {number}; (1, 0) is the CPU, 2 is CUDA): {error}"
        ) from error
    check_precision("from_dlpack", array.dtype)
    return Tensor(array.copy() if copy else array)
