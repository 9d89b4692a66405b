"""Teaching the released U-Net something new with a two-thousandth of its weights; and what a loss wants of each word.

A linear layer y = x W of the cross-attention becomes

    y = x W + (x A) B,       A (inside, rank), B (rank, outside)

with W as it was. B starts at zero, so the net starts as it was, and A and B alone are trained: of the 860 million
weights of version 1 there are 0.4 million at rank 4. Source: Hu et al. 2021, "LoRA".

    lora = Lora(sd.unet, rank=4, rng=0)
    loss = noise_loss(sd, latents, context, rng)             # and lora.parameters() for the optimiser
    lora.save("cat.safetensors")
    Lora.load(other.unet, "cat.safetensors", scale=0.8)

Files of others may change the text encoder and convolutions too, `Lora.load(.., text_encoder=sd.text_encoder)`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import nn, ops
from ...arguments import integer, number
from ...backend import Array, to_device, to_host, xp
from ...diffusion.loss import denoising_loss
from ...engine import Tensor, grad
from ...nn.layers import fan_in_uniform
from ...rng import Rng, as_rng
from ...saving import write_atomically
from .text_encoder import TextEncoder
from .unet import UNet
from .weights import open_safetensors

TARGETS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")  # the cross-attention


class Lora(nn.Module):
    """The matrices A and B of every layer of the U-Net whose path ends in one of `targets`, linear layers or
    convolutions. They work as soon as this object is made, and until `remove`; the weights of the U-Net require no
    gradient from then on.

    rank: of each product. scale: what (x A) B is multiplied by, an attribute that may be changed.
    Errors: ValueError for a rank that is no positive integer, or targets that no layer has.
    """

    def __init__(
        self,
        unet: UNet,
        rank: int = 4,
        *,
        targets: Sequence[str] = TARGETS,
        scale: float = 1.0,
        rng: Rng | int | None = None,
    ):
        rank, rng = integer("Lora: rank", rank), as_rng(rng)
        chosen = {path: layer for path, layer in layers_of(unet).items() if path.endswith(tuple(targets))}
        if not chosen:
            raise ValueError(f"Lora: the U-Net has no layer that ends in {' or '.join(targets)}")
        self._attach([unet], chosen, {path: Pair(layer, rank, rng) for path, layer in chosen.items()}, scale)

    def _attach(self, nets: Sequence[Any], layers: dict[str, Any], pairs: dict[str, Pair], scale: float) -> None:
        self.scale, self.layers = number("Lora: scale", scale), pairs
        for net in nets:
            for p in net.parameters():
                p.requires_grad = False
        self._handles = [layers[path].register_forward_hook(self._hook(pair)) for path, pair in pairs.items()]

    def _hook(self, pair: Pair) -> Callable[..., Any]:
        return lambda _layer, inputs, output: output + self.scale * pair(inputs[0])

    def remove(self) -> None:
        """The nets are as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """A safetensors file under the names of diffusers, "unet.<path>.lora_A.weight" (rank, inside) and
        "....lora_B.weight" (outside, rank), with the scale in B."""
        save_safetensors = _package("safetensors.numpy").save
        arrays = {}
        for layer, pair in self.layers.items():
            name = layer.replace(WORDS, f"{WORDS}text_model.") if layer.startswith(WORDS) else f"unet.{layer}"
            a, b = to_host(pair.lora_A._data), to_host(pair.lora_B._data * self.scale)
            b = b.reshape(*(1,) * (a.ndim - 2), *b.shape)  # of a convolution too: (rank, outside) -> (1, 1, ...)
            for kind, array in (("A", a), ("B", b)):
                arrays[f"{name}.lora_{kind}.weight"] = array.transpose(_TO_FILE[array.ndim]).copy()
        write_atomically(path, lambda file: file.write(save_safetensors(arrays, {"format": "pt"})))

    @classmethod
    def load(
        cls, unet: UNet, path: str | os.PathLike[str], scale: float = 1.0, *, text_encoder: TextEncoder | None = None
    ) -> Lora:
        """From a file under the names of diffusers, or of kohya's scripts ("lora_unet_<path with _>.lora_down.weight",
        "....lora_up.weight" and "....alpha", which means a scale of alpha / rank), for linear layers and convolutions.
        text_encoder: of which the file may have layers too.

        Errors: ValueError for a file that is none, with every entry that fits no layer of these nets or lacks its
        partner (a file may have other things than such pairs, as "dora_scale" or "hada_w1_a", or be for another
        family); RuntimeError without the package safetensors.
        """
        entries, names, layers = open_safetensors(Path(path)), {}, {}
        for net, of_diffusers, of_kohya, start in (
            (unet, ("", "unet."), "lora_unet_", ""),
            (text_encoder, (WORDS, f"{WORDS}text_model."), "lora_te_text_model_", WORDS),
        ):
            for own, layer in ({} if net is None else layers_of(net)).items():
                layers[start + own] = layer
                for name in (*(prefix + own for prefix in of_diffusers), of_kohya + own.replace(".", "_")):
                    names[name] = start + own
        found: dict[str, dict[str, Any]] = {}
        wrong = []
        for name, entry in entries.items():
            stem, _, kind = name.removesuffix(".weight").rpartition(".")
            if kind in ("down", "up"):  # of diffusers before 2024
                stem, kind = re.sub(r"\.lora(_linear_layer)?$", "", stem), f"lora_{kind}"
            kind = {"lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up"}.get(kind, kind)
            if stem not in names or kind not in ("down", "up", "alpha"):
                wrong.append(f"{name} {entry.shape}")
            else:
                found.setdefault(names[stem], {})[kind] = entry.read()
        wrong += [f"{layer}: no {kind}" for layer, p in found.items() for kind in ("down", "up") if kind not in p]
        if wrong or not found:
            what = "this U-Net (the text encoder's need text_encoder=)" if text_encoder is None else "these nets"
            listed = "".join(f"\n  {name}" for name in wrong) or " it has no entries"
            raise ValueError(f"{str(path)!r} changes more than the layers of {what}, or is no LoRA:{listed}")
        alphas = _alphas(path)
        pairs = {layer: Pair.of_file(f"{str(path)!r}: {layer}", layers[layer], parts) for layer, parts in found.items()}
        for layer, pair in pairs.items():
            part = "text_encoder" if layer.startswith(WORDS) else "unet"
            pair.lora_B.data = pair.lora_B.data * alphas.get(part, 1.0)
        lora = cls.__new__(cls)
        changed = [unet] if text_encoder is None else [unet, text_encoder]
        lora._attach(changed, layers, pairs, scale)
        return lora


WORDS = "text_encoder."  # before the paths of the text encoder's layers
_FROM_FILE = {2: (1, 0), 4: (2, 3, 1, 0)}  # the axes of weights: ours = theirs.transpose(..), as in interop.py
_TO_FILE = {2: (1, 0), 4: (3, 2, 0, 1)}


class Pair(nn.Module):
    """What is added to the output of a layer, before the scale: (x A) B on the last axis, (..., inside) -> (...,
    outside); of a convolution, that of x with A (kh, kw, inside, rank), and then B at each pixel."""

    def __init__(self, layer: Any, rank: int, rng: Rng):
        inside, outside = sizes_of(layer)
        kernel = kernel_of(layer)
        self.stride, self.padding = getattr(layer, "stride", 1), getattr(layer, "padding", 0)
        self.lora_A = nn.Parameter(fan_in_uniform((*kernel, inside, rank), inside * math.prod(kernel), rng))
        self.lora_B = nn.Parameter(xp.zeros((rank, outside), "float32"))

    @classmethod
    def of_file(cls, name: str, layer: Any, parts: Mapping[str, Any]) -> Pair:
        """parts: "down" (rank, inside), of a convolution with its kernel behind, "up" (outside, rank), and perhaps
        "alpha". Errors: ValueError for matrices of other shapes."""
        (inside, outside), kernel = sizes_of(layer), kernel_of(layer)
        down, up = (a.reshape(a.shape[:2]) if a.shape[2:] == (1, 1) else a for a in (parts["down"], parts["up"]))
        if down.shape[1:] != (inside, *kernel) or up.shape != (outside, down.shape[0]) or not down.size:
            wanted = f"(rank, {', '.join(map(str, (inside, *kernel)))}) and ({outside}, rank)"
            raise ValueError(f"{name} has matrices of {down.shape} and {up.shape}, not {wanted}")
        factor = 1.0
        if (alpha := parts.get("alpha")) is not None:
            if alpha.size != 1 or not math.isfinite(alpha.sum()):
                raise ValueError(f"{name} has an alpha of {alpha!r}, which is no finite number")
            factor = float(alpha.sum()) / len(down)
        pair = cls(layer, len(down), nn.Unfilled())
        pair.lora_A = nn.Parameter(to_device(down.transpose(_FROM_FILE[down.ndim]).astype("float32", order="C")))
        pair.lora_B = nn.Parameter(to_device(up.T.astype("float32", order="C") * factor))
        return pair

    def forward(self, x: Any) -> Any:
        if self.lora_A.ndim == 2:
            h = ops.matmul(x, self.lora_A)  # (..., inside) -> (..., rank)
        else:
            h = ops.conv2d(x, self.lora_A, stride=self.stride, padding=self.padding)  # -> (N, H, W, rank)
        return ops.matmul(h, self.lora_B)  # (..., rank) -> (..., outside)


def layers_of(net: nn.Module) -> dict[str, Any]:
    """Every linear layer and every convolution by its path."""
    return {path: layer for path, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def sizes_of(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def kernel_of(layer: Any) -> tuple[int, ...]:
    """Of a convolution; () of a linear layer, and of a convolution of 1x1, which is one."""
    size = getattr(layer, "kernel_size", 1)
    size = (size, size) if isinstance(size, int) else tuple(size)
    return () if size == (1, 1) else size


def _alphas(path: str | os.PathLike[str]) -> dict[str, float]:
    """alpha / rank for each net, where the file has them in its header, as diffusers writes them since 2025.
    Errors: ValueError for what they say of a LoRA that is more than products of two matrices."""
    with _package("safetensors").safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        said = json.loads(text)
        for key, value in said.items():
            if value and key.partition(".")[2] in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
                raise ValueError(f"{str(path)!r} has {key}={value!r}, which is not supported here")
        return {part: said[f"{part}.lora_alpha"] / said[f"{part}.r"]
                for part in ("unet", "text_encoder") if f"{part}.r" in said}  # fmt: skip
    except (json.JSONDecodeError, AttributeError, KeyError, RecursionError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{str(path)!r} has a header whose ranks cannot be read ({error!r}): {text:.200}") from error


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError("the package safetensors is needed: pip install 'tinydiff[weights]'") from error


# ---------------------------------------------------------------- the loss, and what it pulls on


def noise_loss(sd: Any, latents: Any, context: Any, rng: Rng) -> Tensor:
    """The mean squared error of what the net predicts, at a step out of 1000 for each of the latents (N, h, w, 4):
    `denoising_loss`, as for a net of our own. context: (N, 77, width), or (1, 77, width) for all."""

    def whole(n: int, t_max: float, rng: Rng, dtype: Any, sample_offset: int) -> Array:
        return (rng.integers(int(t_max), n, sample_offset=sample_offset) + 1).astype(dtype)

    loss = denoising_loss(sd.model, latents, rng, times=whole, context=context)
    return loss * (len(latents) / latents.size)


def pulls_on_words(unet: UNet, loss_of: Callable[[], Tensor]) -> dict[str, tuple[Array, Array]]:
    """How strongly a loss pulls on the key and on the value of each word, in every layer of the cross-attention:
    {path: (|dL/dk|, |dL/dv|)}, each (S,), the lengths of the adjoints over samples and features, on the device.

    A word with a large pull on its key should be looked at more or less; on its value, should say something else.
    loss_of: computes the loss with this U-Net, once, with a context that requires a gradient or with weights that do.
    Errors: RuntimeError if neither does, or with unet.checkpointing, where the keys of the first pass are not kept.
    """
    if unet.checkpointing:
        raise RuntimeError("pulls_on_words: the keys and values are not kept while unet.checkpointing is True")
    kept: dict[tuple[str, str], Tensor] = {}

    def keeping(name: tuple[str, str]) -> Callable[..., None]:
        return lambda _layer, _inputs, output: kept.update({name: output})

    handles = []
    for path, layer in unet.named_modules():
        stem, _, kind = path.rpartition(".")
        if stem.endswith("attn2") and kind in ("to_k", "to_v"):
            handles.append(layer.register_forward_hook(keeping((stem, kind))))
    try:
        loss = loss_of()
    finally:
        for handle in handles:
            handle.remove()
    adjoints = dict(zip(kept, grad(loss, list(kept.values()))))
    lengths = {name: xp.sqrt((g._data**2).sum(axis=(0, 2))) for name, g in adjoints.items()}  # (N, S, C) -> (S,)
    return {path: (lengths[path, "to_k"], lengths[path, "to_v"]) for path, kind in lengths if kind == "to_k"}
