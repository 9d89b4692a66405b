"""Where does a net look? The weights of its attention to a context, for pictures of each word over the image.

    with attention_maps(net) as maps:
        sample(denoiser, (4, 32, 32, 3), KarrasSDE(), 0, **net.encode(ids))
    for layer, weights in maps.items():                              # "net.down.3.block.multihead_attn"
        weights[-1]                                                  # the last step: (4, pixels, words)

Attention itself may never have all weights in memory at once (fast/attention.py), so they are computed again, from the
queries and keys that an observer of the engine sees.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .. import nn
from ..backend import Array
from ..observers import Observer, observing
from ..operators import array_of
from ..ops.attention import attention_weights
from .stable_diffusion.blocks import Attention

Maps = dict[str, list[Array]]


@contextlib.contextmanager
def attention_maps(net: nn.Module) -> Iterator[Maps]:
    """Inside, each call of an attention layer of `net` (a MultiHeadAttention, or one of the released U-Net) whose keys
    are not its queries leaves its weights in the result, {the path of the layer: [one (N, L, S) per call]}: averaged
    over the heads, on the device, of sum 1 over the S keys.

    A call is a pass of the net; a step of Heun's method, or of guidance, has two. Only this thread is seen, so sample
    without `microbatch` inside; nor is there anything to see in a captured step that the device repeats.
    """
    maps: Maps = {}
    watch = _Watch()

    def noting(path: str) -> Callable[..., None]:
        def note(_layer: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
            if watch.seen and len(inputs) > 1 and inputs[1] is not inputs[0]:
                maps.setdefault(path, []).append(watch.weights().mean(axis=1))  # (N, heads, L, S) -> (N, L, S)
            watch.seen = None

        return note

    kinds = (nn.MultiHeadAttention, Attention)
    layers = [(path, layer) for path, layer in net.named_modules() if isinstance(layer, kinds)]
    handles = [layer.register_forward_hook(noting(path)) for path, layer in layers]
    try:
        with observing(watch):
            yield maps
    finally:
        for handle in handles:
            handle.remove()


class _Watch(Observer):
    """Remembers the queries and keys of the latest attention. The layer's hook, which is called next, knows whose."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.seen: Any = None

    def on_call(self, run: Callable[..., Any], op: Any, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        if op.name == "scaled_dot_product_attention":
            q, k, _, mask = map(array_of, inputs)
            self.seen = q, k, mask, params["scale"]
        return run(op, inputs, params)

    def weights(self) -> Array:
        return attention_weights(*self.seen)  # (N, heads, L, S)
