"""What a network may predict: the score, the noise, the data, or a mixture of them. It is all the same knowledge.

At time t a sample is x = m x_0 + s z. Whatever the network is trained to say is another combination of the two,
y = a x_0 + b z, with its own a and b of m and s; so from y and x both x_0 and z follow by solving two equations,

    x_0 = (b x - s y) / (m b - s a),      z = (m y - a x) / (m b - s a)

and what holds for the numbers holds for what the network can give at best, which are their means given x.

    predicts     y                          a, b                       source
    "score"      -z / s                     0, -1 / s                  Song et al. 2021
    "noise"      z                          0, 1                       Ho et al. 2020, "DDPM"
    "x0"         x_0                        1, 0
    "v"          m z - s x_0                -s, m                      Salimans and Ho 2022, appendix D
    "flow"       z - x_0                    -1, 1                      Lipman et al. 2023; Liu et al. 2023
    "edm"        F of D = c_skip x + c_out F, for data of standard deviation sigma_data (sd):
                 s / (sd q), -m sd / q  with  q = sqrt(s^2 + m^2 sd^2)         Karras et al. 2022, equation 7

They differ in what they cost where s is small or large: noise is easy to see at t = 1 and hard at 0, the data the
reverse; v, flow and edm change from the one to the other on the way. "flow" is the velocity dx/dt under FlowSDE, and
"edm" is -v under VPSDE if sigma_data = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import nn, ops
from ..backend import xp
from ..engine import Tensor
from .schedule import by_name, sqrt
from .sde import per_sample

TARGETS: dict[str, Callable[[Any, Any, Any], tuple[Any, Any]]] = {  # a and b of m, s and sigma_data
    "score": lambda m, s, sd: (0.0, -1 / s),
    "noise": lambda m, s, sd: (0.0, 1.0),
    "x0": lambda m, s, sd: (1.0, 0.0),
    "v": lambda m, s, sd: (-s, m),
    "flow": lambda m, s, sd: (-1.0, 1.0),
    "edm": lambda m, s, sd: (s / (sd * _width(m, s, sd)), -m * sd / _width(m, s, sd)),
}


class ScoreModel(nn.Module):
    """A network and what it predicts, as a score: model(x, t) goes into every loss and sampler.

    net(x, t, **condition): x (N, ...) and t (N,) -> y (N, ...), which means what `predicts` says, one of the table
    above. With "edm" the network is given what that paper gives it: x / q, of variance 1, and ln(s / m) / 4.
    x (N, ...), an array or a Tensor; t: (N,) or a number.
    Errors: ValueError for another name, "edm" without a sigma_data that is positive, or a network whose output has
    another shape than x.
    """

    def __init__(self, net: Callable[..., Any], sde: Any, predicts: str = "score", *, sigma_data: float | None = None):
        by_name("prediction", TARGETS, predicts)
        if predicts == "edm" and not (sigma_data is not None and 0 < sigma_data < math.inf):
            raise ValueError(f"predicts='edm' needs sigma_data, the deviation of the data, not {sigma_data!r}")
        self.net, self.sde, self.predicts, self.sigma_data = net, sde, predicts, sigma_data

    def forward(self, x: Any, t: Any, **condition: Any) -> Any:
        return self.score(x, t, **condition)

    def score(self, x: Any, t: Any, **condition: Any) -> Any:
        """The gradient of ln p_t at x, in the shape of x: -z / s."""
        z = self.noise(x, t, **condition)
        return -z / per_sample(self.sde.marginal_std(t), x)

    def denoised(self, x: Any, t: Any, **condition: Any) -> Any:
        """E[x_0 | x], in the shape of x."""
        return self.split(self.output(x, t, **condition), x, t)[0]

    def noise(self, x: Any, t: Any, **condition: Any) -> Any:
        """E[z | x], in the shape of x."""
        return self.split(self.output(x, t, **condition), x, t)[1]

    def output(self, x: Any, t: Any, **condition: Any) -> Any:
        """What the network says at x and t, y (N, ...)."""
        n, given = x.shape[0], x
        times = Tensor(xp.full(n, t, x.dtype)) if isinstance(t, (int, float)) else t  # (N,)
        if self.predicts == "edm":
            m, s = self._of(t, x)
            given = x / _width(m, s, self.sigma_data)
            times = ops.log(self.sde.marginal_std(times) / self.sde.marginal_scale(times)) / 4
        y = self.net(given, times, **condition)
        if y.shape != x.shape:
            raise ValueError(f"ScoreModel: the network returned shape {y.shape} for x of shape {x.shape}")
        return y

    def target(self, x0: Any, z: Any, t: Any) -> Any:
        """What the network should have said: y = a x_0 + b z, in the shape of x_0."""
        a, b = TARGETS[self.predicts](*self._of(t, x0), self.sigma_data)
        return a * x0 + b * z

    def split(self, y: Any, x: Any, t: Any) -> tuple[Any, Any]:
        """x_0 and z from what the network said at x: the two equations solved."""
        m, s = self._of(t, x)
        a, b = TARGETS[self.predicts](m, s, self.sigma_data)
        determinant = m * b - s * a
        return (b * x - s * y) / determinant, (m * y - a * x) / determinant

    def _of(self, t: Any, x: Any) -> tuple[Any, Any]:
        """m and s, shaped to multiply x."""
        return per_sample(self.sde.marginal_scale(t), x), per_sample(self.sde.marginal_std(t), x)


def _width(m: Any, s: Any, sigma_data: Any) -> Any:
    """q, the standard deviation of x: that of the data, shrunk, and that of the noise."""
    return sqrt(s * s + m * m * sigma_data**2)
