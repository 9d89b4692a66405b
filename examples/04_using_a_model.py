"""Four uses of one trained model: inpainting, image-to-image, interpolation, denoising.

    python examples/quickstart.py                          trains it, in a minute or two
    python examples/04_using_a_model.py                    then this takes ten seconds or twenty
    python examples/04_using_a_model.py --checkpoint runs/other/checkpoint.npz --out other.png

The checkpoint is one of examples/quickstart.py, of glyphs or of MNIST. The edited images are not from its training, one
of each digit. The condition is the digit, but not the style; with --unconditional there is no condition. One figure is
drawn (--out):

    given, with a hole, filled, filled again     inpainting: the lower half is made to fit the upper
    redone from noise 0.7, 1.5, 4                image-to-image: the more noise, the less of the image is left
    a walk, another                              from the image of one noise to that of another, with guidance 1
    noisy, mean, one possibility                 denoising, at a level estimated from the noisy image itself

With --compare 11, the figure is of new images instead: one row per method, each with that many evaluations of the net.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import common
import numpy as np

from tinydiff import Rng, data, plot
from tinydiff.backend import to_device, to_host
from tinydiff.data.glyphs import ATTRIBUTES
from tinydiff.diffusion import (
    METHODS,
    Counted,
    Guided,
    KarrasSDE,
    karras_times,
    rk45,
    sample,
    steps_for,
    time_at,
)
from tinydiff.diffusion.edit import denoise, image_to_image, inpaint, interpolate, noise_level

EPS = 0.002  # where sampling stops, as in quickstart.py
GUIDANCE = 1.0  # of new images, towards the digit; less than in quickstart.py, so that they vary more
NOISE = 0.5  # standard deviation, on images from -1 to 1


def main() -> int:
    args = arguments()
    began = time.monotonic()
    trained, ema = common.load_trained(args.checkpoint, "quickstart.py", "digit")
    if ema is not None:
        ema.copy_to(trained.model)
    images, digits = load(trained, args)
    denoiser = trained.model
    sde = KarrasSDE()
    rows = compare(denoiser, sde, args) if args.compare else use(denoiser, sde, images, digits, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot.image_grid(np.concatenate(list(rows.values())), args.out, rows=len(rows), row_labels=list(rows), low=-1,
                    high=1, column_labels=ATTRIBUTES["digit"] if args.compare else None)  # fmt: skip
    print(f"{args.out} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


def use(denoiser, sde, images, digits, args):
    """Twelve rows, {label: images}."""
    rng = Rng(args.seed)
    condition = {} if args.unconditional else {"digit": to_device(digits)}
    rows: dict[str, np.ndarray] = {"given": images}

    def add(name, made, what):
        print(what, file=sys.stderr)
        rows[name] = to_host(made)

    x = to_device(images)  # (10, 28, 28, 1) in [-1, 1]
    known = np.zeros((1, 28, 28, 1), bool)
    known[:, :14] = True
    rows["with a hole"] = np.where(known, images, 0.0)
    for name in ("filled", "filled again"):
        filled = inpaint(denoiser, x, known, sde, rng.child(name), steps=args.steps, resample=5, eps=EPS, **condition)
        add(name, filled, "inpainting")

    for sigma in (0.7, 1.5, 4.0):
        redone = image_to_image(
            denoiser, x, sde, rng.child("redo"), t=sigma, method="heun", steps=args.steps // 2, eps=EPS, **condition
        )
        add(f"redone, noise {sigma:g}", redone, "image to image")

    for name, digit in (("a walk", 2), ("another", 8)):
        a, b = sde.prior((2, 28, 28, 1), rng.child(name))
        one_digit = {"digit": to_device(np.full(len(images), digit))}
        walker = denoiser if args.unconditional else Guided(denoiser, GUIDANCE, **one_digit)
        add(name, interpolate(walker, a, b, sde, len(images), steps=17, eps=EPS), "interpolation")

    noisy = x + NOISE * rng.child("photo").normal(x.shape)
    sigma = float(to_host(noise_level(noisy)).mean())
    add("noisy", noisy, f"noise of {NOISE}, estimated as {sigma:.3f}")
    add("mean", denoise(denoiser, noisy, sde, sigma=sigma, **condition), "denoising")
    one = sample(denoiser, noisy.shape, sde, rng, start=(noisy, time_at(sde, sigma)), steps=args.steps // 2, eps=EPS,
                 **condition)  # fmt: skip
    add("one possibility", one, "denoising")
    return rows


def compare(denoiser, sde, args):
    """One row per method, {label: one image of each digit}, all from the same noise; rk45 takes as many evaluations as
    it needs."""
    rows = {}
    model = Guided(denoiser, GUIDANCE, digit=to_device(np.arange(10)))
    for name, method in METHODS.items():
        if method is rk45:
            options = {"method": rk45(rtol=1e-3, atol=1e-3)}  # finer than the 256 greys of a picture
        else:
            options = {"method": method, "steps": steps_for(method, args.compare), "timesteps": karras_times}
        counted = Counted(model)
        x = sample(counted, (10, 28, 28, 1), sde, Rng(args.seed).child("samples"), eps=EPS, **options)
        rows[f"{name}\n{counted.nfe} evaluations"] = to_host(x)
        print(f"{name}, {counted.nfe} evaluations", file=sys.stderr)
    return rows


def load(trained, args):
    """An image of each digit that was not in its training, with labels: (10, 28, 28, 1), (10,)."""
    if trained.data["name"] == "glyphs":
        test = data.glyphs(200, trained.data["seed"] + 1, variety=trained.data["variety"])
        images, labels = test.images, test.labels["digit"]
    else:
        images, labels = common.mnist(args, "test")
    chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in range(10)]
    return data.to_float(images[chosen], -1, 1), labels[chosen].astype(np.int64)


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    add("--checkpoint", type=common.file, default=Path("runs/quickstart/checkpoint.npz"), metavar="FILE",
        help="of examples/quickstart.py")  # fmt: skip
    add("--out", type=common.new_picture, default=Path("runs/04_using_a_model.png"), metavar="FILE", help="the figure")
    common.add_data_dir(parser)
    add("--unconditional", "--untold", action="store_true", help="do not give the model the digit as its condition")
    add("--steps", type=integer(2), default=40, metavar="N", help="of inpainting; half for the others")
    add("--compare", type=integer(3), metavar="N", help="draw new images by every method, N evaluations each")
    add("--seed", type=common.seed, default=0, metavar="N", help="of the noise")
    return common.parse(parser)


if __name__ == "__main__":
    common.run(main)
