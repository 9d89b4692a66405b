"""The exercises, from `multiply` to attention: the op, example inputs, hints, and the usual slips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from ..backend import xp
from ..engine import Op
from ..operators import OPS
from ..ops import conv, linalg, norm
from ..ops.attention import attention_weights

Case = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Sheet:
    """case: from a drawer of normal and one of positive numbers, the inputs and options. slips: (what went
    wrong, the wrong rule), where the numbers alone do not say it. shows: functions that the forward calls and that the
    page shows too. rule: of a function that is written in other ops, and has none of its own."""

    name: str
    level: int
    case: Callable[[Any, Any], Case]
    hints: tuple[str, ...]
    op_name: str = ""
    slips: tuple[tuple[str, Callable[..., Any]], ...] = ()
    shows: tuple[Callable[..., Any], ...] = ()
    rule: Callable[..., Any] | None = None

    @property
    def op(self) -> Op:
        found = OPS[self.op_name or self.name]
        if isinstance(found, Op):
            return found
        made = Op(found)
        made.vjp(self.rule or found)
        return made

    def example(self) -> Case:
        """The same numbers each time."""
        random = np.random.default_rng(7)
        return self.case(lambda *s: random.normal(size=s), lambda *s: random.uniform(0.5, 2, size=s))


CHAIN = "The adjoint of x is g times the ordinary derivative of z by x."
PRODUCT = "Write the differential dz; what multiplies dx, times g, is the adjoint of x."
WHERE = "x contributes to z_i in some places only. To which, and how much?"
SUMS = "Write dL = sum(g dz), put in dz, and collect what multiplies each dx."
T = linalg.transposed
sigmoid, exp = ops.sigmoid, ops.exp


def total(a: Any, axis: Any = -1) -> Any:
    return ops.sum(a, axis=axis, keepdims=True)


def spread(g: Any, x: Any, axis: int) -> Any:
    """g of a reduced array, in the shape of x."""
    return ops.broadcast_to(ops.expand_dims(g, axis=axis), shape=x.shape)


# ---------------------------------------------------------------- level 3 and 4: rules, and slips of several lines


def mse_loss_rule(g: Any, _z: Any, prediction: Any, target: Any, *, reduction: str) -> Any:
    """dz = 2 mean((prediction - target) (dprediction - dtarget)), and a mean is a sum divided by the number."""
    adjoint = g * (2 / prediction.size * (prediction - target))
    return adjoint, -adjoint


def cross_entropy_rule(g: Any, _z: Any, logits: Any, labels: Any, *, reduction: str) -> Any:
    """One row: z = -x[label] + log sum e^x, dz = -dx[label] + sum(softmax(x) dx). Then the mean over the rows."""
    return g / labels.size * (ops.softmax(logits) - one_hot(labels, logits)), None


def one_hot(labels: Any, logits: Any) -> Any:
    return (labels[..., None] == xp.arange(logits.shape[-1])).astype(logits.dtype)


def norm_slip(words: str, f: Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    """f(h, xhat, r, mean) -> a wrong adjoint of x."""

    def rule(g: Any, y: Any, x: Any, weight: Any, bias: Any, *, axes: Any, eps: float) -> Any:
        xhat, r = norm.standardize(x, axes, eps)
        return f(g * weight, xhat, r, lambda a: ops.mean(a, axis=axes, keepdims=True)), None, None

    return words, rule


NORM_HINTS = (
    "First the adjoint of xhat: h = g weight.",
    "xhat = r c with c = x - mean and r = 1 / std: dxhat = r dc + c dr.",
    "dc = dx - mean(dx), and dr = -r^3 mean(c dx).",
    "x: r (h - mean(h) - xhat mean(xhat h)); weight: g xhat; bias: g.",
)
NORM_SLIPS = (
    norm_slip("mean(h) is missing: the mean depends on x", lambda h, xhat, r, mean: r * (h - xhat * mean(xhat * h))),
    norm_slip("xhat mean(xhat h) is missing: the variance depends on x", lambda h, xhat, r, mean: r * (h - mean(h))),
    norm_slip("mean and variance are taken for constants, but depend on x", lambda h, xhat, r, mean: r * h),
    norm_slip("the factor r = 1 / std is missing", lambda h, xhat, r, mean: h - mean(h) - xhat * mean(xhat * h)),
    ("the weight is missing: the adjoint of xhat is g weight",
     lambda g, y, x, w, b, **p: (norm.normalize_vjp(g, y, x, None, b, **p)[0](), None, None)),
    ("x stands where xhat belongs", lambda g, y, x, w, b, **p: (None, g * x, None)),
    ("xhat is missing: weight multiplies it", lambda g, y, x, w, b, **p: (None, g, None)),
)  # fmt: skip
TAPS = conv.Geometry((4, 4), (2, 2), (1, 1), ((1, 0), (0, 1)), (1, 1), 1)  # y is of size (4, 4) too
CONV_HINTS = (
    "Everything is one sum F(x, w, y) of products x w y, over pixels, taps and channels: linear in each of the three.",
    "The adjoint of x is the derivative of F by x, with g in the place of y: each g goes back to where its x was read.",
    "One tap at a time: out[at] += g @ w[u, v]^T, and the adjoint of w[u, v] is x[at]^T @ g over all pixels.",
)


def attention_slip(words: str, f: Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    """f(p, p_adjoint, q, k, g, scale) -> wrong adjoints."""

    def rule(g: Any, y: Any, q: Any, k: Any, v: Any, mask: Any, *, scale: float) -> Any:
        return f(attention_weights(q, k, mask, scale), g @ T(v), q, k, g, scale)

    return words, rule


def scores(p: Any, h: Any) -> Any:
    return p * (h - total(p * h))


CATALOGUE = (
    Sheet("multiply", 1, lambda N, P: ((N(2, 3), N(2, 3)), {}), (PRODUCT, "dz = y dx + x dy.")),
    Sheet("subtract", 1, lambda N, P: ((N(2, 3), N(3)), {}), (PRODUCT, "dz = dx - dy.")),
    Sheet("divide", 1, lambda N, P: ((N(2, 3), P(2, 3)), {}), (PRODUCT, "dz = dx / y - x dy / y^2.")),
    Sheet("square", 1, lambda N, P: ((N(2, 3),), {}), (CHAIN, "x^2 is x x: x is used twice.")),
    Sheet("exp", 1, lambda N, P: ((N(2, 3),), {}), (CHAIN, "The exponential is its own derivative.")),
    Sheet("log", 1, lambda N, P: ((P(2, 3),), {}), (CHAIN, "log' x = 1 / x.")),
    Sheet("sqrt", 1, lambda N, P: ((P(2, 3),), {}), (CHAIN, "From z^2 = x: 2 z dz = dx.")),
    Sheet("cos", 1, lambda N, P: ((N(2, 3),), {}), (CHAIN, "Mind the sign."),
          slips=(("cos stands where its derivative belongs", lambda g, z, x: g * z),)),
    Sheet("tanh", 1, lambda N, P: ((N(2, 3),), {}), (CHAIN, "It can be written with z alone.", "1 - z^2."),
          slips=(("1 - z stands where 1 - z^2 belongs", lambda g, z, x: g * (1 - z)),
                 ("z is the tanh already", lambda g, z, x: g * (1 - ops.tanh(z) ** 2)))),
    Sheet("sigmoid", 1, lambda N, P: ((N(2, 3),), {}),
          (CHAIN, "From 1 / z = 1 + e^-x: dz / z^2 = e^-x dx.", "e^-x = (1 - z) / z."),
          slips=(("z is the sigmoid already", lambda g, z, x: g * sigmoid(z) * (1 - sigmoid(z))),)),
    Sheet("relu", 1, lambda N, P: ((N(2, 3),), {}), (CHAIN, "It is 1 where x > 0, and 0 elsewhere."),
          slips=(("it passes where x < 0 too", lambda g, z, x: g),
                 ("the sides are exchanged", lambda g, z, x: g * (x < 0)))),
    Sheet("softplus", 2, lambda N, P: ((N(2, 3),), {}), (CHAIN, "dz = e^x / (1 + e^x) dx.", "That is a sigmoid."),
          slips=(("1 + e^x in the denominator is missing", lambda g, z, x: g * exp(x)),
                 ("e^x in the numerator is missing", lambda g, z, x: g / (1 + exp(x))),
                 ("it is differentiated twice", lambda g, z, x: g * sigmoid(x) * (1 - sigmoid(x))))),
    Sheet("silu", 2, lambda N, P: ((N(2, 3),), {}),
          ("A product, z = x s with s = sigmoid(x).", "dz = s dx + x ds.", "ds = s (1 - s) dx."),
          slips=(("the term x ds is missing: s depends on x", lambda g, z, x: g * sigmoid(x)),
                 ("the term s dx is missing", lambda g, z, x: g * z * (1 - sigmoid(x))),
                 ("the factor x of ds is missing", lambda g, z, x: g * sigmoid(x) * (2 - sigmoid(x))))),
    Sheet("power", 2, lambda N, P: ((P(2, 3), P(2, 3)), {}),
          (PRODUCT, "y fixed: a power. x fixed: an exponential, x^y = e^(y log x).",
           "dz = y x^(y-1) dx + z log(x) dy.")),
    Sheet("maximum", 2, lambda N, P: ((N(2, 3), N(2, 3)), {}), (WHERE, "To z at x > y, with factor 1; else to none."),
          slips=(("the adjoint passes to the smaller one too", lambda g, z, x, y: (g, g)),
                 ("half each is for ties", lambda g, z, x, y: (g / 2, g / 2)))),
    Sheet("sum", 2, lambda N, P: ((N(2, 3),), {"axis": 1}), (SUMS, "Each x of a row gets the g of that row.",
           "reshape, or expand_dims, and broadcast_to."),
          slips=(("g runs along the wrong axis", lambda g, z, x, *, axis, **p: spread(total(g, 0), x, 0)),)),
    Sheet("transpose", 2, lambda N, P: ((N(2, 2, 2),), {"axes": (1, 2, 0)}),
          ("Each element only moves, and its adjoint moves back.", "Axis i of z is axis axes[i] of x: invert that.")),
    Sheet("pad", 2, lambda N, P: ((N(2, 3),), {"pad_width": ((1, 0), (2, 1))}),
          (WHERE, "To one place: x[i] is z[before + i]."),
          slips=(("the slice must start at `before`", lambda g, z, x, **p: g[:2, :3]),
                 ("the slice starts at `after`", lambda g, z, x, **p: g[0:2, 1:4]))),
    Sheet("cumsum", 2, lambda N, P: ((N(2, 4),), {"axis": 1}),
          (WHERE, "x_j is in every z_i with i >= j.", "flip, cumsum, flip."),
          slips=(("the sum runs from the wrong end", lambda g, z, x, *, axis: ops.cumsum(g, axis=axis)),
                 ("x is in every later z too", lambda g, z, x, *, axis: g),
                 ("its own place is missing", lambda g, z, x, *, axis: total(g, axis) - ops.cumsum(g, axis=axis)))),
    Sheet("max", 2, lambda N, P: ((N(2, 4),), {"axis": 1}),
          (WHERE, "The largest x of a row is z; the others are in none.", "Compare x with z, spread along the axis."),
          slips=(("all x get it, but only the largest is in z", lambda g, z, x, *, axis, **p: spread(g, x, axis)),
                 ("the smallest gets it", lambda g, z, x, *, axis, **p:
                     spread(g, x, axis) * (x == ops.min(x, axis=axis, keepdims=True))),
                 ("the derivative is 1 there, not z", lambda g, z, x, *, axis, **p:
                     spread(g * z, x, axis) * (x == ops.expand_dims(z, axis=axis))))),
    Sheet("getitem", 2, lambda N, P: ((N(4, 2),), {"index": np.array([0, 2, 2])}),
          (WHERE, "An element that is picked twice is in z twice.", "Add at the index: ops.scatter_add."),
          slips=(("an element that is picked twice gets the sum, not the mean",
                  lambda g, z, x, *, index:
                     ops.scatter_add(g, index=index, shape=x.shape) * xp.asarray([[1.0], [1.0], [0.5], [1.0]])),)),
    Sheet("matmul", 3, lambda N, P: ((N(3, 3), N(3, 3)), {}),
          ("dZ = dX Y + X dY, in this order.", "sum(G * (dX Y)) is sum over i, j, k of g_ij dx_ik y_kj.",
           "So the adjoint of x_ik is the sum over j of g_ij y_kj. Which product of matrices is that?"),
          slips=(("the other factor must be transposed", lambda g, z, x, y: (g @ y, x @ g)),
                 ("the factors are in the wrong order", lambda g, z, x, y: (T(y) @ g, g @ T(x))),
                 ("it is an elementwise product", lambda g, z, x, y: (g * y, g * x)))),
    Sheet("logsumexp", 3, lambda N, P: ((N(3, 4),), {"axis": 1}),
          ("dz = sum(e^x dx) / sum(e^x).", "sum(e^x) = e^z.", "So x gets g e^(x - z); spread g and z along the axis."),
          slips=(("the softmax e^(x - z) is missing", lambda g, z, x, *, axis, **p: spread(g, x, axis)),
                 ("the division by sum(e^x) is missing", lambda g, z, x, *, axis, **p: spread(g, x, axis) * exp(x)),
                 ("e^x is missing: x has its share of the sum", lambda g, z, x, *, axis, **p:
                     spread(g * exp(-z), x, axis)))),
    Sheet("softmax", 3, lambda N, P: ((N(3, 4),), {"axis": -1}),
          ("Take logarithms first: log z = x - log sum e^x.", "dz / z = dx - sum(z dx).", "Sum g z along the axis."),
          slips=(("the term sum(g z) is missing: every output depends on every x", lambda g, z, x, *, axis: g * z),
                 ("sum(g) stands where sum(g z) belongs", lambda g, z, x, *, axis: z * (g - total(g, axis))),
                 ("only the diagonal z (1 - z) is there: every output depends on every x",
                  lambda g, z, x, *, axis: g * z * (1 - z)),
                 ("the sum runs along the wrong axis", lambda g, z, x, *, axis: z * (g - total(g * z, 0))),
                 ("the sum runs over everything: each row has its own", lambda g, z, x, *, axis:
                     z * (g - total(g * z, None))))),
    Sheet("log_softmax", 3, lambda N, P: ((N(3, 4),), {"axis": -1}),
          ("dz = dx - d(log sum e^x).", "d(log sum e^x) = sum(softmax(x) dx).", "softmax(x) = e^z."),
          slips=(("the term e^z sum(g) is missing: every output depends on every x", lambda g, z, x, *, axis: g),
                 ("the sum over g is missing", lambda g, z, x, *, axis: g * (1 - exp(z))),
                 ("z stands where e^z belongs", lambda g, z, x, *, axis: g - z * total(g, axis)),
                 ("the sum runs over everything: each row has its own", lambda g, z, x, *, axis:
                     g - exp(z) * total(g, None)),
                 ("that is the rule of softmax", lambda g, z, x, *, axis: z * (g - total(g * z, axis))))),
    Sheet("mse_loss", 3, lambda N, P: ((N(2, 3), N(2, 3)), {"reduction": "mean"}),
          ("The mean of n squares; g is a number.", "dz = 2 mean((prediction - target) (dprediction - dtarget)).",
           "Do not forget 1 / n, and g."), rule=mse_loss_rule,
          slips=(("the mean is missing: divide by the number of elements",
                  lambda g, z, x, y, **p: (2 * g * (x - y), 2 * g * (y - x))),
                 ("the difference itself is missing: each element has its own", lambda g, z, x, y, **p:
                     (g * 2 / x.size + 0 * x, -g * 2 / x.size + 0 * x)))),
    Sheet("cross_entropy", 3, lambda N, P: ((N(3, 4), np.array([0, 2, 2])), {"reduction": "mean"}),
          ("One row: z = -x[label] + log sum e^x.", "dz = -dx[label] + sum(softmax(x) dx).",
           "softmax(x) - one_hot(label), times g / rows. The labels get None."),
          rule=cross_entropy_rule,
          slips=(("the 1 at the label is missing", lambda g, z, x, y, **p: (g / y.size * ops.softmax(x), None)),
                 ("the softmax is missing", lambda g, z, x, y, **p: (-g / y.size * one_hot(y, x), None)),
                 ("the mean is missing: divide by the number of rows",
                  lambda g, z, x, y, **p: (g * (ops.softmax(x) - one_hot(y, x)), None)),
                 ("the logits stand where the softmax belongs",
                  lambda g, z, x, y, **p: (g / y.size * (x - one_hot(y, x)), None)))),
    Sheet("layer_norm", 4, lambda N, P: ((N(2, 3, 4), N(4), N(4)), {"axes": (2,), "eps": 0.1}),
          NORM_HINTS, "normalize", NORM_SLIPS, (norm.standardize,)),
    Sheet("group_norm", 4, lambda N, P: ((N(2, 3, 2, 2), N(1, 1, 2, 2), N(1, 1, 2, 2)), {"axes": (1, 3), "eps": 0.1}),
          NORM_HINTS, "normalize", NORM_SLIPS, (norm.standardize,)),
    Sheet("conv2d", 4, lambda N, P: ((N(2, 4, 4, 2), N(2, 2, 2, 2), N(2)), {"geometry": TAPS}), CONV_HINTS, "conv2d_p",
          (("it is a convolution again: g must go back to where x was read", lambda g, y, x, w, b, *, geometry:
              (conv.conv2d_p(g, w, None, geometry=geometry), None, None)),
           ("the channels of w are not exchanged", lambda g, y, x, w, b, *, geometry:
              (conv.conv2d_input_grad(g, ops.swapaxes(w, axis1=2, axis2=3), None, geometry=geometry), None, None)),
           ("x and g are exchanged", lambda g, y, x, w, b, *, geometry:
              (None, conv.conv2d_weight_grad(g, x, geometry=geometry), None))),
          (conv.Geometry.taps, conv.by_group)),
    Sheet("conv_transpose2d", 4, lambda N, P: ((N(2, 4, 4, 2), N(2, 2, 2, 2), N(2)), {"geometry": TAPS}),
          (*CONV_HINTS[:1], "The transpose of the transpose is the convolution itself.",
           "The adjoint of w is that of conv2d, with g in the place of x."), "conv2d_input_grad",
          (("it is transposed again: the transpose of the transpose is wanted", lambda g, x, y, w, b, *, geometry:
              (conv.conv2d_input_grad(g, w, None, geometry=geometry), None, None)),
           ("y and g are exchanged", lambda g, x, y, w, b, *, geometry:
              (None, conv.conv2d_weight_grad(y, g, geometry=geometry), None))),
          (conv.Geometry.taps, conv.by_group)),
    Sheet("attention", 4, lambda N, P: ((N(3, 2), N(3, 2), N(3, 2), N(3, 3)), {"scale": 0.7}),
          ("Three steps: s = scale q k^T + mask, p = softmax(s), y = p v. Go back one by one.",
           "y = p v is a matmul: p gets g v^T, v gets p^T g.",
           "s gets what softmax gives, with the sums along the row.",
           "q gets scale s_adjoint k, k gets scale s_adjoint^T q, and the mask s_adjoint."),
          "scaled_dot_product_attention",
          (attention_slip("the softmax's sum is missing: every weight of a row depends on every score",
                          lambda p, h, q, k, g, scale: (scale * (p * h) @ k, scale * T(p * h) @ q, None, p * h)),
           attention_slip("the softmax is missing between the weights and the scores",
                          lambda p, h, q, k, g, scale: (scale * h @ k, scale * T(h) @ q, None, h)),
           attention_slip("the weights must be transposed", lambda p, h, q, k, g, scale: (None, None, p @ g, None)),
           attention_slip("the adjoint of the scores must be transposed",
                          lambda p, h, q, k, g, scale:
                          (scale * T(scores(p, h)) @ k, scale * scores(p, h) @ q, None, None)),
           attention_slip("scale is missing: it multiplies q k^T", lambda p, h, q, k, g, scale:
                          (scores(p, h) @ k, T(scores(p, h)) @ q, None, None))),
          (attention_weights,)),
)  # fmt: skip
