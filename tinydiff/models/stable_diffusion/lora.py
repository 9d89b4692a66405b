"""Teaching the released U-Net something new with a two-thousandth of its weights; and what a loss wants of each word.

A linear layer y = x W of the cross-attention becomes

    y = x W + (x A) B,       A (inside, rank), B (rank, outside)

with W as it was. B starts at zero, so the net starts as it was, and A and B alone are trained: of the 860 million
weights of version 1 there are 0.4 million at rank 4. Source: Hu et al. 2021, "LoRA".

    lora = Lora(sd.unet, rank=4, rng=0)
    loss = noise_loss(sd, latents, context, rng)             # and lora.parameters() for the optimiser
    lora.save("cat.safetensors")
    Lora.load(other.unet, "cat.safetensors", scale=0.8)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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
from .unet import UNet
from .weights import open_safetensors

TARGETS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")  # the cross-attention


class Lora(nn.Module):
    """The matrices A and B of every layer of the U-Net whose path ends in one of `targets`. They work as soon as this
    object is made, and until `remove`; the weights of the U-Net require no gradient from then on.

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
        self.scale = number("Lora: scale", scale)
        chosen = {path: layer for path, layer in linear_layers(unet).items() if path.endswith(tuple(targets))}
        if not chosen:
            raise ValueError(f"Lora: the U-Net has no layer that ends in {' or '.join(targets)}")
        self.layers = {path: Pair(*sizes_of(layer), rank, rng) for path, layer in chosen.items()}
        for p in unet.parameters():
            p.requires_grad = False
        self._handles = [chosen[path].register_forward_hook(self._hook(pair)) for path, pair in self.layers.items()]

    def _hook(self, pair: Pair) -> Callable[..., Any]:
        return lambda _layer, inputs, output: output + self.scale * pair(inputs[0])

    def remove(self) -> None:
        """The U-Net is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """A safetensors file under the names of diffusers, "unet.<path>.lora_A.weight" (rank, inside) and
        "....lora_B.weight" (outside, rank), with the scale in B."""
        save_safetensors = _package("safetensors.numpy").save
        arrays = {}
        for layer, pair in self.layers.items():
            arrays[f"unet.{layer}.lora_A.weight"] = to_host(pair.lora_A._data).T.copy()
            arrays[f"unet.{layer}.lora_B.weight"] = to_host(pair.lora_B._data * self.scale).T.copy()
        write_atomically(path, lambda file: file.write(save_safetensors(arrays, {"format": "pt"})))

    @classmethod
    def load(cls, unet: UNet, path: str | os.PathLike[str], scale: float = 1.0) -> Lora:
        """From a file under the names of diffusers, or of kohya's scripts ("lora_unet_<path with _>.lora_down.weight",
        "....lora_up.weight" and "....alpha", which means a scale of alpha / rank).

        Errors: ValueError for a file that is none, entries that fit no linear layer of the U-Net, such as those of a
        text encoder, or that lack their partner; RuntimeError without the package safetensors.
        """
        entries, layers = open_safetensors(Path(path)), linear_layers(unet)
        by_kohya = {"lora_unet_" + name.replace(".", "_"): name for name in layers}
        found: dict[str, dict[str, Any]] = {}
        wrong = []
        for name, entry in entries.items():
            stem, _, kind = name.removesuffix(".weight").rpartition(".")
            if kind in ("down", "up") and stem.endswith(".lora"):  # of diffusers before 2024
                stem, kind = stem.removesuffix(".lora"), f"lora_{kind}"
            kind = {"lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up"}.get(kind, kind)
            layer = by_kohya.get(stem, stem.removeprefix("unet."))
            if layer not in layers or kind not in ("down", "up", "alpha"):
                wrong.append(f"{name} {entry.shape}")
            else:
                found.setdefault(layer, {})[kind] = entry.read()
        wrong += [f"{layer}: no {kind}" for layer, p in found.items() for kind in ("down", "up") if kind not in p]
        if wrong or not found:
            listed = "".join(f"\n  {name}" for name in wrong) or " it has no entries"
            raise ValueError(f"{str(path)!r} changes more than linear layers of this U-Net, or is no LoRA:{listed}")
        for layer, p in found.items():
            for kind, a in p.items():  # of a 1x1 convolution a matrix has four axes
                if a.size != 1 if kind == "alpha" else 0 in a.shape or a.ndim != 2 and a.shape[2:] != (1, 1):
                    what = "a number" if kind == "alpha" else "a matrix"
                    raise ValueError(f"{str(path)!r}: {kind} of {layer} has the shape {a.shape}, and must be {what}")
        rank = next(iter(found.values()))["down"].shape[0]
        lora = cls(unet, rank, targets=list(found), scale=scale, rng=nn.Unfilled())
        for layer, parts in found.items():
            down, up = (parts[kind].reshape(parts[kind].shape[:2]) for kind in ("down", "up"))  # without 1x1 kernels
            inside, outside = sizes_of(layers[layer])
            if down.shape[1] != inside or up.shape[0] != outside or down.shape[0] != up.shape[1]:
                lora.remove()
                raise ValueError(
                    f"{str(path)!r}: the matrices of {layer} are {down.shape} and {up.shape}, not (rank, {inside}) and "
                    f"({outside}, rank)"
                )
            pair, factor = (
                lora.layers[layer],
                float(parts["alpha"].item() if "alpha" in parts else down.shape[0]) / down.shape[0],
            )
            pair.lora_A = nn.Parameter(to_device(down.T.astype("float32", order="C")))
            pair.lora_B = nn.Parameter(to_device(up.T.astype("float32", order="C") * factor))
        return lora


class Pair(nn.Module):
    """(x A) B on the last axis: (..., inside) -> (..., outside)."""

    def __init__(self, inside: int, outside: int, rank: int, rng: Rng):
        filled = not isinstance(rng, nn.Unfilled)
        self.lora_A = nn.Parameter(fan_in_uniform((inside, rank), inside, rng))
        self.lora_B = nn.Parameter(xp.zeros((rank, outside), "float32") if filled else rng.normal((rank, outside)))

    def forward(self, x: Any) -> Any:
        return ops.matmul(ops.matmul(x, self.lora_A), self.lora_B)  # (..., inside) -> (..., rank) -> (..., outside)


def linear_layers(unet: UNet) -> dict[str, Any]:
    """Every linear layer by its path; a 1x1 convolution is one."""
    return {
        path: layer
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) or isinstance(layer, nn.Conv2d) and layer.kernel_size in (1, (1, 1))
    }


def sizes_of(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


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
