"""Words -> vectors -> latents -> image: what `sample`, `Guided` and `image_to_image` do for our own nets, for the
released ones.

    sd = load_pipeline("weights/stable-diffusion-v1-5")
    images = sd.paint("a lighthouse in a storm, oil painting", rng=0)                          # (1, 512, 512, 3)
    images = sd.paint("the same in winter", image=images[0], strength=0.6)
    images = sd.paint("a whale", image=images[0], mask=hole)                                   # hole (512, 512) of bool
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ... import nn, ops
from ...arguments import integer, number
from ...backend import Array, to_device, to_host, xp
from ...diffusion.edit import Known, image_to_image
from ...diffusion.methods import Method, ddim, ddpm, dpm_solver, heun
from ...diffusion.predict import Guided, ScoreModel
from ...diffusion.process import by_name
from ...diffusion.sample import sample
from ...engine import Tensor
from ...modes import no_grad
from ...operators import array_of
from ...rng import Rng, as_rng
from .autoencoder import Autoencoder
from .schedule import ScaledLinearSDE, schedule_of, whole_steps
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .unet import UNet
from .weights import Progress, load_nets

SAMPLERS: dict[str, Method] = {  # under the names by which they are known there
    "dpm_solver": dpm_solver,  # DPM-Solver++(2M)
    "ddim": ddim,
    "heun": heun,
    "euler_ancestral": ddpm,  # with sigma_up^2 + sigma_down^2 = sigma_next^2 it is the same formula
}


class TimedUNet(nn.Module):
    """The U-Net as ScoreModel calls it: net(x, t, context, extra), where t = step + 1. extra (N, h, w, C): more
    channels of the input, such as those of a U-Net that was trained to fill holes."""

    def __init__(self, unet: UNet):
        self.unet = unet

    def forward(self, x: Any, t: Any, context: Any, extra: Any = None) -> Tensor:
        if extra is not None:
            x = ops.concatenate([x, Tensor(extra)], axis=3)  # (N, h, w, 4) -> (N, h, w, 9)
        context = context if isinstance(context, Tensor) else Tensor(context)
        return self.unet(x, array_of(t).astype("float64") - 1, context)


class StableDiffusion:
    """The three nets, the words and the schedule. predicts: "noise" or "v", what the U-Net was trained for."""

    def __init__(
        self,
        text_encoder: TextEncoder,
        unet: UNet,
        autoencoder: Autoencoder,
        tokenizer: Tokenizer,
        process: ScaledLinearSDE | None = None,
        predicts: str = "noise",
    ):
        self.text_encoder, self.unet, self.autoencoder = text_encoder.eval(), unet.eval(), autoencoder.eval()
        self.tokenizer, self.process = tokenizer, ScaledLinearSDE() if process is None else process
        self.model = ScoreModel(TimedUNet(unet), self.process, predicts)

    @no_grad()
    def encode(self, prompts: str | Sequence[str]) -> Array:
        """The vectors of the words of each prompt, (N, 77, width)."""
        return array_of(self.text_encoder(to_device(self.tokenizer.encode(prompts))))

    @no_grad()
    def paint(
        self,
        prompts: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        steps: int = 25,
        sampler: str | Method = "dpm_solver",
        guidance: float = 7.5,
        negative: str = "",
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        rng: Rng | int = 0,
        callback: Callable[[int, Any, Array, Array], Any] | None = None,
    ) -> Any:
        """Images, float32 (N, H, W, 3) in [0, 1] in host memory: `batch` of each prompt.

        height, width: multiples of 8, 512 unless there is an image. steps: of the sampler, 2 or more, from t = 1000
        down to 0. sampler: a name in SAMPLERS. guidance: as it is counted there; 1 is none, and halves the time.
        negative: what to push away from. rng: image i of a seed is the same in any batch.
        image: (H, W, 3) in [0, 1], where to start, in place of noise alone. strength: which part of the steps is taken,
        the last ones, from the noise that they begin with; 0.75, or 1 with a mask, unless given. mask: (H, W) of bool,
        true where to paint anew. What is outside comes back as the autoencoder shows it.
        callback(step, t, x, denoised): as in `sample`, of latents.
        Errors: ValueError for sizes that are no multiples of 8, an image or a mask of another size, or other arguments
        out of range; MemoryError, with the size of the images.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        n, rng = len(prompts) * integer("paint: batch", batch), as_rng(rng)
        height, width = self._size(height, width, image)
        steps, guidance = integer("paint: steps", steps, 2), number("paint: guidance", guidance)
        taken = steps if image is None else self._steps_taken(steps, strength, mask)
        chosen = by_name("sampler", SAMPLERS, sampler) if isinstance(sampler, str) else sampler
        shape = (n, height // self.autoencoder.reduction, width // self.autoencoder.reduction, self.autoencoder.latent)
        try:
            # (prompts, 77, width) -> (N, 77, width), each row `batch` times
            context = xp.repeat(self.encode(prompts), batch, axis=0)
            known = None if image is None else self._latents(image, shape)
            hole = None if mask is None else self._hole(mask, height, width)
            given = self._conditions(context, hole, image, mask, shape)
            model: Any = self.model
            if guidance != 1:
                model = Guided(model, guidance - 1, negative={**given, "context": self.encode(negative)})
            if hole is not None and self.unet.in_channels == self.autoencoder.latent:
                model = Known(model, known, ~hole, self.process)
            t_max = self.process.t_max
            options: Any = dict(
                method=chosen, steps=taken - 1, eps=float(round(t_max / steps)), timesteps=whole_steps,
                callback=callback, **given,
            )  # fmt: skip
            if known is None:
                z = sample(model, shape, self.process, rng, **options)
            else:
                t = float(round(t_max * taken / steps))
                z = image_to_image(model, known, self.process, rng, t=t, **options)
            return self.decode(z)
        except MemoryError as error:
            raise MemoryError(
                f"out of memory for {n} images of {height}x{width}: take a smaller batch or a smaller size ({error})"
            ) from error

    @no_grad()
    def decode(self, z: Any) -> Any:
        """Latents as images, float32 (N, H, W, 3) in [0, 1] in host memory, one at a time."""
        images = [to_host(array_of(self.autoencoder.decode(z[i : i + 1]))) for i in range(len(z))]
        return to_host([(x[0] / 2 + 0.5).clip(0, 1).astype("float32") for x in images])

    def _size(self, height: Any, width: Any, image: Any) -> tuple[int, int]:
        given = (512, 512) if image is None else image.shape[:2]
        height, width = given[0] if height is None else height, given[1] if width is None else width
        for name, side in (("height", height), ("width", width)):
            if integer(f"paint: {name}", side, 8) % self.autoencoder.reduction:
                raise ValueError(
                    f"paint: {name} must be a multiple of {self.autoencoder.reduction}, not {side}: "
                    f"the nearest is {max(1, round(side / self.autoencoder.reduction)) * self.autoencoder.reduction}"
                )
        if image is not None and image.shape != (height, width, 3):
            raise ValueError(f"paint: the image must be ({height}, {width}, 3), not {image.shape}")
        return height, width

    def _steps_taken(self, steps: int, strength: float | None, mask: Any) -> int:
        """How many of the steps image-to-image takes, the last ones."""
        strength = (0.75 if mask is None else 1.0) if strength is None else strength
        taken = int(steps * number("paint: strength", strength, "(0, 1]"))
        if taken < 2:
            raise ValueError(f"paint: strength={strength} of {steps} steps leaves {taken} of them, and two are needed")
        return taken

    def _latents(self, image: Any, shape: tuple[int, ...]) -> Array:
        """The latents of an image in [0, 1], for each of N: the mean of the encoder."""
        x = to_device(array_of(image)).astype("float32")[None] * 2 - 1  # (1, H, W, 3)
        return xp.broadcast_to(array_of(self.autoencoder.encode(x)), shape)

    def _hole(self, mask: Any, height: int, width: int) -> Array:
        """The mask of the latents, (1, h, w, 1) of bool: a latent is painted anew if the first of its pixels is."""
        mask, r = to_device(array_of(mask)), self.autoencoder.reduction
        if mask.shape != (height, width) or mask.dtype != "bool":
            raise ValueError(f"paint: mask must be of bool, {height, width}, not {mask.dtype} of shape {mask.shape}")
        return mask[None, ::r, ::r, None]

    def _conditions(self, context: Any, hole: Any, image: Any, mask: Any, shape: Any) -> dict[str, Any]:
        """What the net is told beside x and t."""
        latent, channels = self.autoencoder.latent, self.unet.in_channels
        if mask is not None and image is None:
            raise ValueError("paint: a mask needs the image that it is of")
        if channels == latent:
            return {"context": context}
        if channels != 2 * latent + 1:
            raise ValueError(f"paint: a U-Net of {channels} input channels is none of those that paint or fill holes")
        if mask is None:
            raise ValueError(f"paint: this U-Net, of {channels} input channels, fills holes: give an image and a mask")
        rest = to_device(array_of(image)).astype("float32")
        rest = xp.where(to_device(array_of(mask))[..., None], 0.5, rest).astype("float32")  # grey in the hole
        flags = xp.broadcast_to(hole.astype("float32"), (*shape[:3], 1))
        return {"context": context, "extra": xp.concatenate([flags, self._latents(rest, shape)], axis=3)}


def load_pipeline(
    path: Any,
    *,
    half: bool = False,
    progress: Progress | None = None,
    tokenizer: Any = None,
    predicts: str | None = None,
) -> StableDiffusion:
    """From a folder of parts or a single file: see weights.load_nets. predicts: "noise" or "v"; unless given as the
    folder says, and of a single file "v" for version 2 (its base model, of 512 pixels, needs "noise")."""
    nets = load_nets(path, half=half, progress=progress, tokenizer=tokenizer)
    process, predicted = schedule_of(nets.scheduler)
    words = Tokenizer.from_folder(nets.tokenizer)
    size = nets.text_encoder.embeddings["token_embedding"].num_embeddings
    if (last := max(words.vocabulary.values())) >= size:
        raise ValueError(f"the vocabulary has numbers up to {last}, and the text encoder {size} vectors, from 0 on")
    return StableDiffusion(nets.text_encoder, nets.unet, nets.autoencoder, words, process, predicts or predicted)
