"""Attention with its projections."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..arguments import integer
from ..backend import xp
from ..rng import Rng, as_rng
from .layers import Dropout, Linear, xavier_uniform
from .module import Layer, Parameter, same_dtype


class MultiHeadAttention(Layer):
    """Attention of the queries to the keys, in `num_heads` subspaces at once:
    (N, L, E), (N, S, kdim), (N, S, vdim) -> (N, L, E).

        y = concat over heads of softmax(q k^T / sqrt(E / heads)) v, times out_proj
        q, k, v = query, key, value times in_proj

    Called with the query alone it is self-attention; with (query, key) the values are the keys. mask: as ops.attention,
    broadcastable to (N, heads, L, S). Parameters as in PyTorch: in_proj_weight (E, 3E), or, if kdim or vdim is not E,
    q_proj_weight (E, E), k_proj_weight (kdim, E), v_proj_weight (vdim, E), Xavier uniform; in_proj_bias (3E,), zero;
    out_proj, a Linear with bias zero. Source: Vaswani et al. 2017, section 3.2.2.
    Errors: ValueError if num_heads does not divide embed_dim, for sizes that are not positive integers, or for shapes
    that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        rng: Rng | int | None = None,
    ):
        self.embed_dim = embed_dim = integer("MultiHeadAttention: embed_dim", embed_dim)
        self.num_heads = integer("MultiHeadAttention: num_heads", num_heads)
        if embed_dim % self.num_heads:
            raise ValueError(f"MultiHeadAttention: num_heads={num_heads} must divide embed_dim={embed_dim}")
        self.kdim = embed_dim if kdim is None else integer("MultiHeadAttention: kdim", kdim)
        self.vdim = embed_dim if vdim is None else integer("MultiHeadAttention: vdim", vdim)
        rng = as_rng(rng)
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = Parameter(xavier_uniform((embed_dim, 3 * embed_dim), rng))
        else:
            self.q_proj_weight = Parameter(xavier_uniform((embed_dim, embed_dim), rng))
            self.k_proj_weight = Parameter(xavier_uniform((self.kdim, embed_dim), rng))
            self.v_proj_weight = Parameter(xavier_uniform((self.vdim, embed_dim), rng))
        self.in_proj_bias = Parameter(xp.zeros(3 * embed_dim, "float32")) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, rng=rng)
        if self.out_proj.bias is not None:
            self.out_proj.bias = Parameter(xp.zeros(embed_dim, "float32"))
        self.dropout = Dropout(dropout, rng=rng)

    def forward(self, query: Any, key: Any = None, value: Any = None, *, mask: Any = None) -> Any:
        key = query if key is None else key
        value = key if value is None else value
        self._check(query, key, value)
        q, k, v = (self._heads(x) for x in self._project(query, key, value))  # (N, heads, L or S, D)
        if self.training and self.dropout.p:
            y = self._attention_with_dropout(q, k, v, mask)
        else:
            y = ops.attention(q, k, v, mask=mask)
        n, length, e = query.shape
        y = ops.reshape(ops.swapaxes(y, axis1=1, axis2=2), shape=(n, length, e))  # (N, heads, L, D) -> (N, L, E)
        return self.out_proj(y)

    def _project(self, query: Any, key: Any, value: Any) -> list[Any]:
        if not hasattr(self, "in_proj_weight"):
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif key is query and value is query:  # one product instead of three
            qkv = _projected(query, self.in_proj_weight, self.in_proj_bias)  # (N, L, E) -> (N, L, 3E)
            return ops.split(qkv, 3, axis=-1)
        else:
            weights = ops.split(self.in_proj_weight, 3, axis=1)  # (E, 3E) -> 3 of (E, E)
        biases = [None] * 3 if self.in_proj_bias is None else ops.split(self.in_proj_bias, 3)
        return [_projected(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]

    def _heads(self, x: Any) -> Any:
        n, length, e = x.shape
        x = ops.reshape(x, shape=(n, length, self.num_heads, e // self.num_heads))  # (N, L, heads, D)
        return ops.swapaxes(x, axis1=1, axis2=2)  # (N, heads, L, D)

    def _attention_with_dropout(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        eye = xp.eye(k.shape[-2], dtype=k.dtype)  # attention to the unit vectors: its weights
        return ops.matmul(
            self.dropout(ops.attention(q, k, ops.broadcast_to(eye, shape=(*k.shape[:-1], k.shape[-2])), mask=mask)), v
        )

    def _check(self, query: Any, key: Any, value: Any) -> None:
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.ndim != 3 or x.shape[2] != width or x.shape[0] != query.shape[0]:
                raise ValueError(
                    f"MultiHeadAttention: the {name} must be ({query.shape[0]}, length, {width}), not {x.shape}"
                )
            same_dtype(self, x, self.out_proj.weight)
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"MultiHeadAttention: key {key.shape} and value {value.shape} differ in length")


def _projected(x: Any, w: Any, b: Any) -> Any:
    return ops.matmul(x, w) if b is None else ops.linear(x, w, b)
