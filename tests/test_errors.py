"""Bad input gets an error that quotes it: at the call, with the shapes, in the words of who called."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import backend, ops

pytestmark = pytest.mark.usefixtures("each_backend")


def t(*shape: int, dtype: str = "float32") -> td.Tensor:
    return td.tensor(np.ones(shape, dtype), requires_grad=np.dtype(dtype).kind == "f")


def arr(*shape: int, dtype: str = "float32") -> Any:
    return backend.to_device(np.ones(shape, dtype))


Bad = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]

BAD: dict[str, Bad] = {
    # ---- convolution
    "conv2d rank of x": (
        lambda: ops.conv2d(t(8, 8, 3), t(3, 3, 3, 4)),
        ValueError,
        ("conv2d takes x (N, H, W, C)", "(8, 8, 3)", "(3, 3, 3, 4)"),
    ),
    "conv2d rank of w": (lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3)), ValueError, ("(1, 8, 8, 3)", "(3, 3)")),
    "conv2d channels": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 4, 6)),
        ValueError,
        ("x (1, 8, 8, 3) has 3 channels", "w (3, 3, 4, 6) with groups=1 takes 4"),
    ),
    "conv2d channels first": (
        lambda: ops.conv2d(t(1, 3, 8, 8), t(3, 3, 3, 6)),
        ValueError,
        ("x (1, 3, 8, 8) has 8 channels", "takes 3"),
    ),
    "conv2d groups": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 1, 4), groups=2),
        ValueError,
        ("conv2d: groups=2 must divide the channels", "3 of x (1, 8, 8, 3)", "4 of w (3, 3, 1, 4)"),
    ),
    "conv2d groups of the output": (
        lambda: ops.conv2d(t(1, 8, 8, 4), t(3, 3, 2, 5), groups=2),
        ValueError,
        ("groups=2", "5 of w (3, 3, 2, 5)"),
    ),
    "conv2d groups of a float": (
        lambda: [ops.conv2d(t(1, 8, 8, 4), t(3, 3, 2, 4), groups=groups) for groups in (2, 2.0)],
        ValueError,
        ("conv2d: groups must be an int", "2.0"),
    ),
    "conv2d no groups": (lambda: ops.conv2d(t(1, 8, 8, 4), t(3, 3, 2, 4), groups=0), ValueError, ("groups=0",)),
    "conv2d empty": (
        lambda: ops.conv2d(t(1, 2, 9, 3), t(3, 3, 3, 4)),
        ValueError,
        ("conv2d: the output of x (1, 2, 9, 3) with w (3, 3, 3, 4), stride=1, padding=0, dilation=1", "empty: (0, 7)"),
    ),
    "conv2d empty by dilation": (
        lambda: ops.conv2d(t(1, 6, 6, 3), t(3, 3, 3, 4), dilation=3),
        ValueError,
        ("dilation=3", "empty: (0, 0)"),
    ),
    "conv2d bias": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 3, 4), t(3)),
        ValueError,
        ("the bias must have shape (4,), not (3,)",),
    ),
    "conv2d stride": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 3, 4), stride=0),
        ValueError,
        ("stride must be an int of at least 1, or two, not 0",),
    ),
    "conv2d float stride": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 3, 4), stride=1.5),
        ValueError,
        ("stride", "not 1.5"),
    ),
    "conv2d three strides": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 3, 4), stride=(1, 2, 3)),
        ValueError,
        ("not (1, 2, 3)",),
    ),
    "conv2d padding": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 3, 4), padding=-1),
        ValueError,
        ("padding must be an int of at least 0", "not -1"),
    ),
    "conv2d padding word": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 3, 4), padding="full"),
        ValueError,
        ("int, a pair, 'same' or 'valid', not 'full'",),
    ),
    "conv2d dilation": (
        lambda: ops.conv2d(t(1, 8, 8, 3), t(3, 3, 3, 4), dilation=(1, 0)),
        ValueError,
        ("dilation", "not (1, 0)"),
    ),
    "conv1d rank": (
        lambda: ops.conv1d(t(1, 8, 8, 3), t(3, 3, 4)),
        ValueError,
        ("conv1d takes x (N, L, C)", "(1, 8, 8, 3)", "(3, 3, 4)"),
    ),
    "conv1d channels": (
        lambda: ops.conv1d(t(2, 9, 3), t(3, 4, 5)),
        ValueError,
        ("conv1d: x (2, 9, 3) has 3 channels, but w (3, 4, 5)", "takes 4"),
    ),
    "conv1d empty": (
        lambda: ops.conv1d(t(2, 2, 3), t(3, 3, 5)),
        ValueError,
        ("conv1d: the output of x (2, 2, 3) with w (3, 3, 5)", "empty"),
    ),
    "conv1d bias": (
        lambda: ops.conv1d(t(2, 9, 3), t(3, 3, 5), t(4)),
        ValueError,
        ("conv1d: the bias must have shape (5,), not (4,)",),
    ),
    "conv_transpose2d rank": (
        lambda: ops.conv_transpose2d(t(4, 4, 3), t(3, 3, 2, 3)),
        ValueError,
        ("conv_transpose2d takes", "(4, 4, 3)"),
    ),
    "conv_transpose2d channels": (
        lambda: ops.conv_transpose2d(t(1, 4, 4, 3), t(3, 3, 2, 5)),
        ValueError,
        ("conv_transpose2d: x (1, 4, 4, 3) has 3 channels, but w (3, 3, 2, 5) with groups=1 takes 5",),
    ),
    "conv_transpose2d groups": (
        lambda: ops.conv_transpose2d(t(1, 4, 4, 3), t(3, 3, 2, 3), groups=2),
        ValueError,
        ("groups=2", "(1, 4, 4, 3)"),
    ),
    "conv_transpose2d bias": (
        lambda: ops.conv_transpose2d(t(1, 4, 4, 3), t(3, 3, 2, 3), t(3)),
        ValueError,
        ("shape (2,), not (3,)",),
    ),
    "conv_transpose2d output_padding": (
        lambda: ops.conv_transpose2d(t(1, 4, 4, 3), t(3, 3, 2, 3), stride=2, output_padding=2),
        ValueError,
        ("output_padding=2 must be smaller than stride=2 or dilation=1",),
    ),
    "conv_transpose2d empty": (
        lambda: ops.conv_transpose2d(t(1, 1, 1, 3), t(2, 2, 2, 3), padding=1),
        ValueError,
        ("x (1, 1, 1, 3) with w (2, 2, 2, 3)", "padding=1", "empty: (0, 0)"),
    ),
    # ---- pools
    "max_pool2d rank": (
        lambda: ops.max_pool2d(t(4, 4, 3), kernel=2),
        ValueError,
        ("max_pool2d takes images (N, H, W, C), not (4, 4, 3)",),
    ),
    "max_pool2d kernel": (
        lambda: ops.max_pool2d(t(1, 4, 4, 3), kernel=5),
        ValueError,
        ("kernel=5 is larger than the padded image (1, 4, 4, 3)",),
    ),
    "max_pool2d padding": (
        lambda: ops.max_pool2d(t(1, 4, 4, 3), kernel=2, padding=2),
        ValueError,
        ("padding=2 must be at most half of kernel=2",),
    ),
    "avg_pool2d stride": (
        lambda: ops.avg_pool2d(t(1, 4, 4, 3), kernel=2, stride=0),
        ValueError,
        ("avg_pool2d: stride", "not 0"),
    ),
    "upsample_nearest2d scale": (
        lambda: ops.upsample_nearest2d(t(1, 4, 4, 3), scale=0),
        ValueError,
        ("scale", "not 0"),
    ),
    "upsample_nearest2d rank": (lambda: ops.upsample_nearest2d(t(4, 4, 3)), ValueError, ("(4, 4, 3)",)),
    # ---- norms
    "group_norm groups": (
        lambda: ops.group_norm(t(2, 4, 6), t(6), t(6), groups=4),
        ValueError,
        ("groups=4 does not divide the 6 channels of x (2, 4, 6)",),
    ),
    "group_norm weight": (
        lambda: ops.group_norm(t(2, 4, 6), t(4), t(6), groups=2),
        ValueError,
        ("group_norm: the weight must have shape (6,) or (2, 6) for x (2, 4, 6), not (4,)",),
    ),
    "group_norm weight and bias": (
        lambda: ops.group_norm(t(2, 4, 6), t(6), t(2, 6), groups=2),
        ValueError,
        ("group_norm: give weight and bias of one shape, or neither, not (6,) and (2, 6)",),
    ),
    "group_norm shift": (
        lambda: ops.group_norm(t(2, 4, 6), t(6), t(6), t(6), groups=2),
        ValueError,
        ("group_norm: the shift must have shape (2, 6), not (6,)",),
    ),
    "layer_norm bias": (
        lambda: ops.layer_norm(t(2, 6), t(6), t(1)),
        ValueError,
        ("the bias must have shape (6,)", "not (1,)"),
    ),
    "layer_norm only one": (
        lambda: ops.layer_norm(t(2, 6), t(6)),
        ValueError,
        ("layer_norm: give weight and bias of one shape, or neither, not (6,) and None",),
    ),
    "batch_norm rank": (
        lambda: ops.batch_norm(t(6)),
        ValueError,
        ("batch_norm takes x of at least 2 dimensions", "(6,)"),
    ),
    # ---- attention
    "attention D": (
        lambda: ops.attention(t(1, 2, 5, 4), t(1, 2, 6, 3), t(1, 2, 6, 4)),
        ValueError,
        ("q (1, 2, 5, 4), k (1, 2, 6, 3) and v (1, 2, 6, 4) do not fit",),
    ),
    "attention length": (
        lambda: ops.attention(t(2, 5, 4), t(2, 6, 4), t(2, 7, 4)),
        ValueError,
        ("(2, 6, 4)", "(2, 7, 4)"),
    ),
    "attention heads": (
        lambda: ops.attention(t(2, 2, 5, 4), t(2, 3, 6, 4), t(2, 3, 6, 4)),
        ValueError,
        ("the leading axes of q (2, 2, 5, 4), k (2, 3, 6, 4) and v (2, 3, 6, 4) do not fit",),
    ),
    "attention mask shape": (
        lambda: ops.attention(t(2, 5, 4), t(2, 6, 4), t(2, 6, 4), mask=arr(6, 5, dtype="bool")),
        ValueError,
        ("a mask of shape (6, 5) does not fit the scores", "(5, 6)"),
    ),
    "attention mask of integers": (
        lambda: ops.attention(t(2, 5, 4), t(2, 6, 4), t(2, 6, 4), mask=arr(5, 6, dtype="int64")),
        TypeError,
        ("the mask must be of bool", "not int64 of shape (5, 6)"),
    ),
    # ---- axes
    "softmax axis": (lambda: ops.softmax(t(2, 3), axis=2), ValueError, ("softmax: axis 2 does not fit",)),
    "softmax of a number": (lambda: ops.softmax(t()), ValueError, ("softmax: axis -1 does not fit", "0 dimensions")),
    "log_softmax axis": (lambda: ops.log_softmax(t(2), axis=-2), ValueError, ("log_softmax: axis -2 does not fit",)),
    "sum axis": (lambda: ops.sum(t(2, 3), axis=2), ValueError, ("sum: axis 2 does not fit an array of 2 dimensions",)),
    "mean axes": (lambda: ops.mean(t(2, 3), axis=(0, -2)), ValueError, ("mean: axis (0, -2) names an axis twice",)),
    "max axis": (lambda: ops.max(t(2, 3), axis=-3), ValueError, ("max: axis -3",)),
    "prod axis": (lambda: ops.prod(t(2, 3), axis=7), ValueError, ("prod: axis 7",)),
    "logsumexp axis": (lambda: ops.logsumexp(t(2, 3), axis=7), ValueError, ("logsumexp: axis 7",)),
    "cumsum axis": (lambda: ops.cumsum(t(2, 3), axis=2), ValueError, ("axis 2",)),
    "flip axis": (
        lambda: ops.flip(t(2, 3), axis=5),
        ValueError,
        ("flip: axis 5 does not fit an array of 2 dimensions",),
    ),
    "squeeze axis": (lambda: ops.squeeze(t(1, 3), axis=2), ValueError, ("squeeze: axis 2",)),
    "squeeze a longer axis": (lambda: ops.squeeze(t(1, 3), axis=1), ValueError, ("squeeze", "1", "(1, 3)")),
    "swapaxes": (lambda: ops.swapaxes(t(2, 3), axis1=0, axis2=2), ValueError, ("swapaxes: axis 2",)),
    "expand_dims": (lambda: ops.expand_dims(t(2, 3), axis=4), ValueError, ("expand_dims: axis 4", "(2, 3)")),
    "transpose": (lambda: ops.transpose(t(2, 3), axes=(0,)), ValueError, ("transpose: axes (0,)", "(2, 3)")),
    "transpose twice": (lambda: ops.transpose(t(2, 3), axes=(0, 0)), ValueError, ("(0, 0)",)),
    "take axis": (lambda: ops.take(t(2, 3), arr(1, dtype="int64"), axis=2), ValueError, ("take: axis 2",)),
    "take_along_axis": (
        lambda: ops.take_along_axis(t(2, 3), arr(1, 1, dtype="int64"), axis=2),
        ValueError,
        ("take_along_axis: axis 2",),
    ),
    "take_along_axis rank": (
        lambda: ops.take_along_axis(t(2, 3), arr(1, dtype="int64"), axis=1),
        ValueError,
        ("(1,)", "(2, 3)"),
    ),
    "roll axis": (lambda: ops.roll(t(2, 3), shift=1, axis=2), ValueError, ("roll: axis 2",)),
    "split axis": (lambda: ops.split(t(2, 3), 1, axis=2), ValueError, ("split: axis 2",)),
    "split unequal": (lambda: ops.split(t(2, 3), 2, axis=1), ValueError, ("split: 2 equal parts of axis 1", "(2, 3)")),
    "mean of nothing": (
        lambda: ops.mean(t(0, 3), axis=0),
        ValueError,
        ("mean over axis 0 of an array of shape (0, 3)",),
    ),
    "var of too few": (lambda: ops.var(t(1, 3), axis=0, ddof=1), ValueError, ("var over axis 0", "(1, 3)", "ddof 1")),
    # ---- shapes that meet
    "reshape": (lambda: t(2, 3).reshape(4, 2), ValueError, ("6 elements", "(2, 3)", "(4, 2)")),
    "reshape -1": (lambda: t(2, 3).reshape(4, -1), ValueError, ("(2, 3)", "(4, -1)")),
    "add": (lambda: t(2, 3) + t(4, 3), ValueError, ("(2,3)", "(4,3)")),
    "multiply by an array": (lambda: t(2, 3) * arr(2), ValueError, ("(2,3)", "(2,)")),
    "broadcast_to": (lambda: ops.broadcast_to(t(2, 3), shape=(4, 4)), ValueError, ("(2,3)", "(4,4)")),
    "matmul": (lambda: t(2, 3) @ t(4, 5), ValueError, ("matmul: the shapes (2, 3) and (4, 5) do not fit",)),
    "linear": (lambda: ops.linear(t(2, 3), t(4, 5), t(5)), ValueError, ("linear: x (2, 3), w (4, 5) and b (5,)",)),
    "linear bias": (lambda: ops.linear(t(2, 3), t(3, 5), t(3)), ValueError, ("b (3,) must be (..., n), (n, m), (m,)",)),
    "linear of a number": (
        lambda: ops.linear(t(2, 1), 2.0, t(1)),
        TypeError,
        ("linear takes Tensors and arrays", "2.0"),
    ),
    "matmul vector": (lambda: t(2, 3) @ t(2), ValueError, ("(2, 3) and (2,)",)),
    "matmul scalar": (lambda: ops.matmul(t(2, 3), t()), ValueError, ("(2, 3) and ()",)),
    "matmul batch": (
        lambda: t(2, 3, 4) @ t(3, 4, 5),
        ValueError,
        ("matmul: the leading axes", "(2, 3, 4) and (3, 4, 5)"),
    ),
    "concatenate": (lambda: ops.concatenate([t(2, 3), t(3, 3)], axis=1), ValueError, ("axis 1", "(2, 3), (3, 3)")),
    "concatenate ranks": (lambda: ops.concatenate([t(2, 3), t(3)]), ValueError, ("(2, 3), (3,)",)),
    "concatenate axis": (lambda: ops.concatenate([t(2, 3), t(2, 3)], axis=2), ValueError, ("axis 2", "(2, 3)")),
    "concatenate nothing": (lambda: ops.concatenate([]), ValueError, ("no arrays",)),
    "stack": (lambda: ops.stack([t(2, 3), t(3, 2)]), ValueError, ("stack: the shapes (2, 3), (3, 2) differ",)),
    "pad": (
        lambda: ops.pad(t(2, 3), pad_width=((1, 1),)),
        ValueError,
        ("pad: an array of shape (2, 3) takes 2 pairs", "not ((1, 1),)"),
    ),
    "pad by a number": (lambda: ops.pad(t(2, 3), pad_width=1), ValueError, ("(2, 3) takes 2 pairs", "not 1")),
    "pad by less than nothing": (
        lambda: ops.pad(t(2, 3), pad_width=((0, 0), (-1, 0))),
        ValueError,
        ("of at least 0, not ((0, 0), (-1, 0))",),
    ),
    "tril": (lambda: ops.tril(t(3)), ValueError, ("tril is for matrices", "(3,)")),
    "einsum operands": (lambda: ops.einsum("ij,jk->ik", t(2, 3)), ValueError, ("'ij,jk->ik' has 2 operands, but 1",)),
    "einsum rank": (lambda: ops.einsum("ij->i", t(2, 3, 4)), ValueError, ("'ij' of 'ij->i'", "(2, 3, 4)")),
    "einsum output": (lambda: ops.einsum("ij->ik", t(2, 3)), ValueError, ("output 'ik'",)),
    "einsum lengths": (
        lambda: ops.einsum("ij,jk->ik", t(2, 3), t(4, 5)),
        ValueError,
        ("'ij,jk->ik' with shapes (2, 3), (4, 5)", "length 3 meets one of length 4"),
    ),
    "index_add": (lambda: ops.index_add(t(4, 2), t(3, 5), index=arr(3, dtype="int64")), ValueError, ("(3,5)", "(3,2)")),
    # ---- indices, labels, words
    "embedding of floats": (
        lambda: ops.embedding(arr(3), t(5, 2)),
        TypeError,
        ("embedding: the index must be of integers, not float32 of shape (3,)",),
    ),
    "embedding table": (
        lambda: ops.embedding(arr(3, dtype="int64"), t(5)),
        ValueError,
        ("the table must be a matrix", "(5,)"),
    ),
    "cross_entropy labels": (
        lambda: ops.cross_entropy(t(4, 10), arr(3, dtype="int64")),
        ValueError,
        ("cross_entropy", "(4, 10)", "(4,), not (3,)"),
    ),
    "cross_entropy one-hot": (
        lambda: ops.cross_entropy(t(4, 10), arr(4, 10, dtype="int64")),
        ValueError,
        ("(4,), not (4, 10)",),
    ),
    "cross_entropy float labels": (
        lambda: ops.cross_entropy(t(4, 10), arr(4)),
        TypeError,
        ("labels must be integers, not float32 of shape (4,)",),
    ),
    "cross_entropy number": (lambda: ops.cross_entropy(t(3), 1), TypeError, ("array of integers, not 1",)),
    "cross_entropy list": (lambda: ops.cross_entropy(t(2, 10), [1, 2]), TypeError, ("not list: [1, 2]",)),
    "mse_loss": (
        lambda: ops.mse_loss(t(4, 1), t(4)),
        ValueError,
        ("mse_loss: the prediction has shape (4, 1), but the target has shape (4,)",),
    ),
    "bce": (lambda: ops.binary_cross_entropy_with_logits(t(4, 1), t(4)), ValueError, ("(4, 1)", "(4,)")),
    "reduction": (
        lambda: ops.mse_loss(t(4), t(4), reduction="avg"),
        ValueError,
        ("mse_loss: reduction must be 'mean', 'sum' or 'none', not 'avg'",),
    ),
    "reduction of cross_entropy": (
        lambda: ops.cross_entropy(t(1, 3), arr(1, dtype="int64"), reduction="x"),
        ValueError,
        ("cross_entropy", "'x'"),
    ),
    "gelu": (
        lambda: ops.gelu(t(3), approximate="fast"),
        ValueError,
        ("gelu: approximate must be 'none' or 'tanh', not 'fast'",),
    ),
    "dropout": (
        lambda: ops.dropout(t(3), p=1.0, rng=td.Rng(0)),
        ValueError,
        ("dropout: p must be in [0, 1), not 1.0",),
    ),
    "dropout without an Rng": (
        lambda: ops.dropout(t(3), p=0.5, rng=None),
        TypeError,
        ("dropout: rng must be a tinydiff.Rng", "not None"),
    ),
    "dropout with a seed": (lambda: ops.dropout(t(3), p=0.5, rng=7), TypeError, ("not 7",)),
    "mse_loss of a number": (
        lambda: ops.mse_loss(t(4), 0.0),
        ValueError,
        ("mse_loss: the prediction has shape (4,), but the target is 0.0",),
    ),
    "norm of integers": (
        lambda: ops.layer_norm(t(2, 3, dtype="int64")),
        TypeError,
        ("layer_norm: x must be floating, not int64 of shape (2, 3)",),
    ),
    "matmul of a list": (
        lambda: t(2, 2) @ [1.0, 2.0],
        TypeError,
        ("an op takes Tensors, arrays and numbers, not list: [1.0, 2.0]",),
    ),
    "matmul of a number": (lambda: t(2, 2) @ 3.0, TypeError, ("not float: 3.0",)),
    "an unknown option": (lambda: ops.sum(t(3), axes=0), TypeError, ("axes",)),
    # ---- Tensors
    "tensor of integers": (
        lambda: td.tensor([1, 2, 3], requires_grad=True),
        TypeError,
        ("only a floating Tensor can require a gradient, not int64 of shape (3,)", "dtype='float32'"),
    ),
    "tensor of bool": (lambda: td.tensor([True], requires_grad=True), TypeError, ("bool of shape (1,)",)),
    "requires_grad of integers": (
        lambda: setattr(td.tensor([1, 2]), "requires_grad", True),
        TypeError,
        ("int64 of shape (2,)",),
    ),
    "tensor of text": (lambda: td.tensor("seven"), TypeError, ("a Tensor holds an array of numbers", "'seven'")),
    "tensor of nothing": (lambda: td.tensor(None), TypeError, ("a Tensor holds an array of numbers", "None")),
    "tensor of a ragged list": (
        lambda: td.tensor([[1.0], [1.0, 2.0]]),
        TypeError,
        ("a Tensor holds an array of numbers", "[[1.0], [1.0, 2.0]]"),
    ),
    "operand": (lambda: t(3) * "2", TypeError, ("an op takes Tensors, arrays and numbers, not str: '2'",)),
    "item": (lambda: t(3).item(), ValueError, ("one element", "(3,)")),
    "truth": (lambda: bool(t(3)), ValueError, ("(3,)",)),
    "len": (lambda: len(t()), TypeError, ("shape () has no length",)),
    "numpy.asarray": (lambda: np.asarray(t(2, 3)), TypeError, ("lose the gradient", "(2, 3)", ".numpy()")),
    "numpy.hstack": (lambda: np.hstack([t(2, 3), t(2, 3)]), TypeError, ("lose the gradient", "(2, 3)")),
    "numpy.arctan": (lambda: np.arctan(t(2, 3)), TypeError, ("arctan of (2, 3)", "tinydiff.ops", ".numpy()")),
    "numpy.add.reduce": (lambda: np.add.reduce(t(2, 3)), TypeError, ("add of (2, 3)", "lose the gradient")),
    "numpy.exp into": (
        lambda: np.exp(t(2, 3), out=np.zeros((2, 3))),
        TypeError,
        ("lose the gradient",),
    ),
    "float16": (lambda: td.tensor(np.ones(3, "float16")), TypeError, ("shape (3,)", "float16", "astype('float32')")),
    "float16 Parameter": (lambda: td.nn.Parameter(np.ones(3, "float16")), TypeError, ("shape (3,)", "float16")),
    "float16 Module": (lambda: td.nn.Linear(2, 3, rng=0).astype("float16"), TypeError, ("Linear.astype", "float16")),
    "float16 of an op": (lambda: t(3).astype("float16"), TypeError, ("astype: float16", "only float32 and float64")),
    "float16 array": (lambda: ops.mean(backend.to_device(np.ones(3, "float16"))), TypeError, ("sum: float16",)),
    "dtype of text": (lambda: td.tensor([1.0], dtype="S4"), TypeError, ("[1.0]", "S4")),
    "dtype of dates": (lambda: td.tensor([1.0], dtype="datetime64[s]"), TypeError, ("[1.0]", "datetime64")),
    "deepcopy of a result": (lambda: copy.deepcopy(t(3) * 2), TypeError, ("shape (3,)", "multiply", "x.detach()")),
    "pickle of a result": (lambda: pickle.dumps(t(3) * 2), TypeError, ("shape (3,)", "multiply", "x.detach()")),
    # ---- backward
    "backward of many": (
        lambda: (t(2, 3) * 2).backward(),
        RuntimeError,
        ("an output of shape (2, 3) needs an adjoint of that shape", ".sum()"),
    ),
    "grad of many": (lambda: td.grad(t(2, 3) * 2, t(2, 3)), RuntimeError, ("(2, 3)",)),
    "complex adjoint": (
        lambda: (t(2) * 2).backward(backend.to_device(np.array([1j, 1j]))),
        TypeError,
        ("the adjoint is complex128, but the output is float32",),
    ),
    "adjoint": (
        lambda: (t(2, 3) * 2).backward(arr(3)),
        RuntimeError,
        ("the adjoint has shape (3,), but the output has shape (2, 3)",),
    ),
    "backward of a constant": (
        lambda: (td.tensor([1.0, 2.0]) * 2).sum().backward(),
        RuntimeError,
        ("a Tensor of shape ()", "does not depend on any Tensor that requires a gradient", "no_grad"),
    ),
    "grad of an array": (lambda: td.grad(arr(1), t(1)), RuntimeError, ("does not depend",)),
    "grad by a constant": (
        lambda: td.grad(t(2).sum(), (t(2), td.tensor([1.0, 2.0]))),
        RuntimeError,
        ("grad: input 1 (a Tensor of shape (2,)) does not require a gradient",),
    ),
    "grad by an array": (
        lambda: td.grad(t(2).sum(), [arr(2)]),
        RuntimeError,
        ("grad: input 0", "does not require a gradient"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_quoted(name: str) -> None:
    call, error, quoted = BAD[name]
    with pytest.raises(error) as raised:
        call()
    text = str(raised.value)
    for part in quoted:
        assert re.sub(r"\s", "", part) in re.sub(r"\s", "", text), f"{part!r} is not in {text!r}"
    assert type(raised.value).__name__ != "KeyError" and len(text) < 400


def test_an_index_out_of_range_is_found_out_on_numpy(each_backend: str) -> None:
    if each_backend != "numpy":
        return  # on a GPU it is not, and says so in the docstrings
    for call in (
        lambda: t(3, 2)[3],
        lambda: ops.embedding(np.array([0, 5]), t(3, 2)),
        lambda: ops.take(t(3, 2), np.array([2]), axis=1),
        lambda: ops.cross_entropy(t(2, 3), np.array([0, 3])),
    ):
        with pytest.raises(IndexError, match=r"index \d is out of bounds for axis \d with size \d"):
            call()


def test_a_label_that_is_no_class_makes_the_loss_nan(each_backend: str) -> None:
    """Counting from the end would train on the wrong class in silence; raising would wait for the device."""
    for wrong in (-1, -2, 3) if each_backend == "cupy" else (-1, -2):
        x = t(2, 3)
        losses = ops.cross_entropy(x, backend.to_device(np.array([wrong, 1])), reduction="none").numpy()
        assert np.isnan(losses[0]) and np.isfinite(losses[1])
