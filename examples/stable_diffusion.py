"""The released Stable Diffusion, versions 1 and 2, painted and taught by tinydiff's own ops.

    python examples/stable_diffusion.py --weights FOLDER "a lighthouse in a storm, oil painting"
    python examples/stable_diffusion.py --weights FOLDER "a cat" --negative "blurry" --guidance 9 --batch 4 --seed 7
    python examples/stable_diffusion.py --weights FOLDER "the same in winter" --init photo.jpg --strength 0.6
    python examples/stable_diffusion.py --weights FOLDER "a whale" --init photo.jpg --mask mask.png     white: anew
    python examples/stable_diffusion.py --weights FOLDER "a photograph of my cat" --learn cats/         trains a LoRA
    python examples/stable_diffusion.py --weights FOLDER "my cat in space" --lora runs/stable_diffusion/lora.safetensors
    python examples/stable_diffusion.py --weights FOLDER "a red cat" --init cat.jpg --pulls             words.png

Nothing is downloaded. --weights is a folder with text_encoder, unet, vae, tokenizer and scheduler, or the original
single .safetensors file with a folder `tokenizer` beside it. Where to get them, and under which licence, is said when
there are none. The images are <out>/image_000.png and so on, with the prompt and all settings in their metadata; with
--preview N there is a preview.png every N steps. On a CPU in float32 the weights of version 1 take 4.3 GB of memory, or
2.2 GB with --half.

--learn FOLDER trains a LoRA of the cross-attention on the pictures in the folder: all of them have the prompt as their
caption. --pulls draws how strongly the loss of the picture --init pulls on the key and on
the value of each word of the prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import common
import numpy as np
from PIL import Image, PngImagePlugin

from tinydiff import Rng, Tensor, data, no_grad, plot, saving
from tinydiff.backend import to_device, to_host
from tinydiff.models.stable_diffusion.lora import Lora, noise_loss, pulls_on_words
from tinydiff.models.stable_diffusion.pipeline import SAMPLERS, load_pipeline
from tinydiff.optim import AdamW

WHERE = """There are no weights yet. tinydiff downloads none by itself; get one of these, with its licence:

  Stable Diffusion 1.5, CreativeML Open RAIL-M, 4.3 GB (2.1 GB as fp16):
    huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5
  Stable Diffusion 2.1, CreativeML Open RAIL++-M, 5.2 GB (2.6 GB as fp16):
    huggingface.co/stabilityai/stable-diffusion-2-1

of which these files are needed, in these folders, in a folder of any name:

  model_index.json
  text_encoder/config.json   text_encoder/model.safetensors
  unet/config.json           unet/diffusion_pytorch_model.safetensors
  vae/config.json            vae/diffusion_pytorch_model.safetensors
  tokenizer/vocab.json       tokenizer/merges.txt    tokenizer/tokenizer_config.json
  scheduler/scheduler_config.json

(.fp16.safetensors will do), and then: python examples/stable_diffusion.py --weights THAT_FOLDER "a prompt\""""


def main():
    args = arguments()
    if args.weights is None or not args.weights.exists():
        given = "" if args.weights is None else f"--weights {args.weights}: there is no such folder or file.\n"
        sys.exit(given + WHERE)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_rest, **_options: print(f"note: {message}", file=sys.stderr)
        try:
            sd = load_pipeline(args.weights, half=args.half, progress=Progress("loading"), predicts=args.predicts)
            if args.lora:
                Lora.load(sd.unet, args.lora, args.lora_scale, text_encoder=sd.text_encoder)
            args.out.mkdir(parents=True, exist_ok=True)
            {"learn": learn, "pulls": draw_pulls, "paint": paint}[args.what](sd, args)
        except (ValueError, RuntimeError, MemoryError) as error:
            sys.exit(f"\n{error}")


class Progress:
    """One line that is overwritten: how far, and how long it will still take."""

    def __init__(self, what):
        self.what, self.began = what, time.monotonic()

    def __call__(self, done, total):
        left = (time.monotonic() - self.began) * (total - done) / max(done, 1)
        end = "\n" if done == total else ""
        share = f"{100 * done / total:.0f} %" if total > 9999 else f"{done} of {total}"
        print(f"\r{self.what} {share}, {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- painting


def paint(sd, args):
    image = None if args.init is None else picture(args.init, args)
    mask = None if args.mask is None else picture(args.mask, args).mean(axis=2) >= 0.5
    progress, evaluations = Progress("step"), args.steps
    if image is not None:
        strength = args.strength or (1.0 if mask is not None else 0.75)
        evaluations = max(1, int(args.steps * strength))

    def callback(step, t, x, denoised):
        progress(step + 1, evaluations)
        if args.preview and step % args.preview == 0:
            with no_grad():
                write(sd.decode(denoised[:1])[0], args.out / "preview.png", {})

    images = sd.paint(
        args.prompt, height=args.height, width=args.width, batch=args.batch, steps=args.steps, sampler=args.sampler,
        guidance=args.guidance, negative=args.negative, image=image, strength=args.strength, mask=mask, rng=args.seed,
        callback=callback,
    )  # fmt: skip
    settings = {name: value for name, value in vars(args).items() if value is not None and name not in ("out",)}
    for i, painted in enumerate(images):
        path = args.out / f"image_{i:03}.png"
        write(painted, path, {**settings, "image": i})
        print(path, file=sys.stderr)


def picture(path, args):
    """A picture file as floats in [0, 1], (H, W, 3): of the size asked for, or its own in whole blocks of 8."""
    try:
        found = data.picture_file.read_picture(path, None, None, (255, 255, 255))
        if min(found.shape[:2]) < 8:
            sys.exit(f"{path} is {found.shape[0]}x{found.shape[1]}, and must be 8x8 at least")
        height, width = args.height or found.shape[0] // 8 * 8, args.width or found.shape[1] // 8 * 8
        if found.shape[:2] != (height, width):
            print(f"{path} is {found.shape[0]}x{found.shape[1]}, and is cropped to {height}x{width}", file=sys.stderr)
            found = data.picture_file.read_picture(path, (height, width), None, (255, 255, 255))
    except data.picture_file.Unreadable as error:
        sys.exit(f"{path} {error}")
    except OSError as error:
        sys.exit(str(error))
    return np.broadcast_to(found, (*found.shape[:2], 3)).astype("float32") / 255


def write(image, path, settings):
    """A PNG with the prompt and the settings in its metadata."""
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_text("prompt", str(settings["prompt"]))
        info.add_text("tinydiff", json.dumps({name: str(value) for name, value in settings.items()}))
    file = Image.fromarray(np.rint(image * 255).astype(np.uint8))
    saving.write_atomically(path, lambda out: file.save(out, "PNG", pnginfo=info))


# ---------------------------------------------------------------- learning


def learn(sd, args):
    """A LoRA of the pictures in --learn, whose caption is the prompt."""
    pictures = data.folder(args.learn, size=[args.height or 512, args.width or 512], colour=True)
    rng, batch = Rng(args.seed).child("lora"), min(args.batch, len(pictures.images))
    with no_grad():
        each = (to_device(data.to_float(x[None], -1, 1)) for x in pictures.images)
        latents = [to_host(sd.autoencoder.encode(x).data) for x in each]
    latents, context = np.concatenate(latents), sd.encode(args.prompt)
    sd.unet.checkpointing = True  # the blocks are computed again in the backward pass: memory for one of them is enough
    lora = Lora(sd.unet, args.rank, rng=rng.child("start"))
    optimizer = AdamW(lora.parameters(), lr=args.lr)
    print(f"{len(latents)} pictures, {lora.count():,} weights to learn", file=sys.stderr)
    progress, losses = Progress("step"), []
    for step in range(args.learn_steps):
        rows = rng.child(step).permutation(len(latents))[:batch]
        loss = noise_loss(sd, to_device(latents[rows]), context, rng.child(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(step + 1, args.learn_steps)
    lora.save(args.out / "lora.safetensors")
    tenth = max(1, len(losses) // 10)
    print(f"loss {np.mean(losses[:tenth]):.4f} at first, {np.mean(losses[-tenth:]):.4f} at last", file=sys.stderr)
    print(args.out / "lora.safetensors", file=sys.stderr)


def draw_pulls(sd, args):
    """words.png: a row for the keys and one for the values of each layer, a column for each word of the prompt."""
    if args.init is None:
        sys.exit("--pulls asks what the loss of a picture pulls on: give the picture, --init")
    if not sd.tokenizer.numbers(args.prompt):
        sys.exit(f"--pulls asks which words the loss pulls on, and the prompt {args.prompt!r} has none")
    x = to_device(picture(args.init, args)[None] * 2 - 1)
    with no_grad():
        z = sd.autoencoder.encode(x).data
    context = Tensor(sd.encode(args.prompt), requires_grad=True)
    pulls = pulls_on_words(sd.unet, lambda: noise_loss(sd, z, context, Rng(args.seed)))
    ids = sd.tokenizer.encode(args.prompt)[0]
    count = min(len(sd.tokenizer.numbers(args.prompt)), len(ids) - 2)
    words = [piece.strip() for piece in sd.tokenizer.pieces(ids[1 : count + 1])]
    rows = np.stack([to_host(row)[1 : count + 1] for pair in pulls.values() for row in pair])  # (2 layers, words)
    names = [f"{path.split('.transformer')[0]}, {kind}" for path in pulls for kind in ("keys", "values")]
    plot.matrix(rows / rows.max(axis=1, keepdims=True), args.out / "words.png", labels=names, column_labels=words,
                low=-1, high=1, title="which words the loss pulls on, of the most in each row")  # fmt: skip
    print(args.out / "words.png", file=sys.stderr)


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    add("prompt", metavar="PROMPT", help="what to paint, or the caption of --learn")
    add("--weights", type=Path, metavar="PATH", help="a folder of parts, or a single .safetensors file")
    add("--half", action="store_true", help="keep the weights in float16, and widen those of a layer while it computes")
    add("--predicts", choices=["noise", "v"], help="what the net predicts (default: as its folder says)")
    sides = integer(8, multiple_of=8)
    add("--height", type=sides, metavar="N", help="a multiple of 8 (default: 512, or that of --init)")
    add("--width", type=sides, metavar="N", help="a multiple of 8 (default: 512, or that of --init)")
    add("--steps", type=integer(2), default=25, metavar="N", help="of the sampler")
    add("--sampler", choices=list(SAMPLERS), default="dpm_solver", help="how noise becomes an image")
    add("--guidance", type=common.finite, default=7.5, metavar="X", help="how far to push towards the words; 1: not")
    add("--negative", default="", metavar="PROMPT", help="what to push away from (default: no words)")
    add("--batch", type=integer(1), default=1, metavar="N", help="images at a time; with --learn, pictures per step")
    add("--init", type=common.file, metavar="IMAGE", help="start from this picture")
    add(
        "--strength",
        type=share,
        metavar="X",
        help="how much of it is made anew, up to 1 (default: 0.75, with --mask 1)",
    )
    add(
        "--mask",
        type=common.file,
        metavar="IMAGE",
        help="paint where this picture is white, and keep the rest of --init",
    )
    add("--preview", type=integer(1), metavar="N", help="write preview.png every N steps")
    add("--lora", type=common.file, metavar="FILE", help="a LoRA to add to the weights")
    add("--lora-scale", type=common.finite, default=1.0, metavar="X", help="how much of it")
    add("--learn", type=Path, metavar="FOLDER", help="train a LoRA on the pictures in this folder")
    add("--learn-steps", type=integer(1), default=400, metavar="N", help="of the training")
    add("--rank", type=integer(1), default=4, metavar="N", help="of the LoRA")
    add("--lr", type=common.positive, default=1e-4, metavar="X", help="of AdamW")
    add("--pulls", action="store_true", help="draw which words the loss of --init pulls on")
    common.add_seed_and_out(parser, "stable_diffusion", "of the noise")
    args = common.parse(parser)
    args.what = "learn" if args.learn else "pulls" if args.pulls else "paint"
    if args.mask is not None and args.init is None:
        parser.error("--mask says what of --init is painted anew: give --init IMAGE")
    if args.strength is not None and args.init is None:
        parser.error("--strength is how much of --init is made anew: give --init IMAGE")
    return args


def share(text):
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 0, and 1 or less, not {text}")
    return float(text)


if __name__ == "__main__":
    common.run(main)
