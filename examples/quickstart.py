"""From nothing to digits that you can read, in minutes: a small diffusion model, trained and sampled on this machine.

    python examples/quickstart.py                         digits drawn here, no download
    python examples/quickstart.py --data mnist            handwritten ones; twice as long
    TINYDIFF_BACKEND=cupy python examples/quickstart.py   on a GPU

A padded residual U-Net (models/unet.py) learns to remove noise of any strength (diffusion/edm.py), told which digit it
is looking at, except for one time in ten, so that at the end it can be asked what the digit adds (guidance). The
directory of the run (runs/quickstart) gets samples.png, a row a digit, and loss.png, log.jsonl and checkpoint.npz.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np

from tinydiff import Rng, data, plot, saving
from tinydiff.backend import to_device, to_host, xp
from tinydiff.data.glyphs import ATTRIBUTES, VARIETIES
from tinydiff.diffusion.edm import Denoiser, KarrasSDE, edm_loss, guided
from tinydiff.diffusion.samplers import heun, score_of
from tinydiff.microbatch import over_microbatches
from tinydiff.models.unet import UNet
from tinydiff.optim import EMA, Adam, cosine, warmup
from tinydiff.training import CannotResume, train

VARIETY = "plain"  # of the glyphs: few enough styles for a few minutes
UNSAID = 0.1  # how often the labels are kept from the net


def main() -> int:
    args = arguments()
    began = time.monotonic()
    images, labels = load(args)  # (n, 28, 28, 1) in [-1, 1]; {name: (n,)}
    net = UNet(
        1,
        args.channels,
        labels={name: int(values.max()) + 1 for name, values in labels.items()},
        rng=Rng(args.seed).child("model"),
    )
    denoiser = Denoiser(net, sigma_data=float(images.std()))
    ema = EMA(denoiser, 0.995)

    def loss(x0, *values, rng, sample_offset):
        said = rng.uniform(len(x0), first=sample_offset) >= UNSAID
        condition = {name: xp.where(said, value, -1) for name, value in zip(labels, values)}
        return edm_loss(denoiser, x0, rng, first=sample_offset, **condition)

    def pictures(run):
        plot.loss_curve(run.records, args.out / "loss.png", x="step", title=f"EDM loss on {args.data}")
        if run.step % 300 == 0:  # a quick look
            with ema.applied():
                paint(denoiser, args, steps=min(args.steps, 7))

    if args.sample_only:
        state = saving.load(args.out / "checkpoint.npz")
        denoiser.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
    else:
        epochs = max(1, round(args.images / len(images)))
        steps = epochs * -(-len(images) // args.batch_size)
        print(
            f"{net.count():,} parameters, {epochs * len(images):,} images; pictures go to {args.out}", file=sys.stderr
        )
        run = train(
            denoiser,
            loss,
            (images, *labels.values()),
            Adam(denoiser.parameters(), lr=args.lr),
            epochs=epochs,
            batch_size=args.batch_size,
            microbatch=args.micro_batch,
            seed=args.seed,
            schedule=warmup(100, cosine(steps)),
            schedule_by="step",
            ema=ema,
            out=args.out,
            resume=args.resume,
            log_every=50,
            save_every=500,
            on_record=pictures,
        )
        if not run.finished:
            return 130  # as a shell reports an interrupted program
    with ema.applied():
        paint(denoiser, args, args.steps)
    print(f"{args.out / 'samples.png'} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


def load(args):
    if args.data == "mnist":
        try:
            digits = data.mnist(args.data_dir)
        except (OSError, ValueError, data.DownloadError) as error:
            sys.exit(f"{error}\nOr take --data glyphs, digits drawn here, which need no files.")
        return data.to_float(digits.images, -1, 1), {"digit": digits.labels.astype(np.int64)}
    glyphs = data.glyphs(20_000, args.seed, variety=VARIETY)
    return data.to_float(glyphs.images, -1, 1), {name: v for name, v in glyphs.labels.items() if v.max() > v.min()}


def paint(denoiser, args, steps):
    """samples.png: a row a digit; of glyphs a column a style, of handwriting ten tries."""
    if args.data == "mnist":
        wanted = [{"digit": d} for d in range(10) for _ in range(10)]
    else:
        drawn = {name: values for name, values in VARIETIES[VARIETY].items() if len(values) > 1}
        styles = [dict(zip(drawn, choice)) for choice in itertools.product(*drawn.values())]
        wanted = [
            {"digit": d, **{name: ATTRIBUTES[name].index(v) for name, v in style.items()}}
            for d in range(10)
            for style in styles
        ]
    condition = {name: np.array([w[name] for w in wanted]) for name in wanted[0]}
    sde = KarrasSDE()

    def some(rows):
        """These rows of the grid; sample i is the same whoever paints it."""
        told = guided(denoiser, args.guidance, **{name: to_device(values[rows]) for name, values in condition.items()})
        shape, rng = (rows.stop - rows.start, 28, 28, 1), Rng(args.seed).child("samples")
        return to_host(heun(score_of(told, sde), shape, sde, rng, steps=steps, eps=0.002, first=rows.start))

    x = np.concatenate(list(over_microbatches(some, len(wanted), 20)))
    plot.image_grid(x, args.out / "samples.png", rows=10, row_labels=list(ATTRIBUTES["digit"]), low=-1, high=1)


def integer(least, multiple_of=1):
    def whole(text):
        if int(text) < least or int(text) % multiple_of:
            raise argparse.ArgumentTypeError(
                f"must be {least} or more{f', a multiple of {multiple_of}' if multiple_of > 1 else ''}, not {text}"
            )
        return int(text)

    return whole


def finite(text):
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return float(text)


def positive(text):
    if not finite(text) > 0:
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return float(text)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data",
        choices=["glyphs", "mnist"],
        default="glyphs",
        help="digits drawn here, or MNIST (default: %(default)s)",
    )
    add("--data-dir", type=Path, help="where the four idx files of MNIST are (default: $TINYDIFF_DATA, else download)")
    add(
        "--images",
        type=integer(1),
        help="images to learn from, in whole rounds through the data, of 20000 or, of MNIST, 60000 "
        "(default: 60000, of MNIST 120000)",
    )
    add(
        "--channels",
        type=integer(8, multiple_of=8),  # as its group norms have eight groups
        nargs="+",
        default=[32, 64],
        help="of the U-Net, from fine to coarse, multiples of 8 (default: 32 64)",
    )
    add("--batch-size", type=integer(1), default=64, help="images a step (default: %(default)s)")
    add(
        "--micro-batch",
        type=integer(1),
        help="images at a time in each thread (default: 32 or 64; a GPU takes the batch whole)",
    )
    add(
        "--lr",
        type=positive,
        default=1.5e-3,
        help="of Adam, after a warm-up and before a cosine (default: %(default)s)",
    )
    add(
        "--guidance",
        type=finite,
        default=1.0,
        help="how far to push towards the digit; 0 is not at all (default: %(default)s)",
    )
    add(
        "--steps",
        type=integer(1),
        default=17,
        help="steps of Heun's method, 2 steps + 1 evaluations (default: %(default)s)",
    )
    add(
        "--seed",
        type=integer(0),
        default=0,
        help="of the weights, the order of the data, the noise, the samples (default: %(default)s)",
    )
    add("--out", type=Path, default=Path("runs/quickstart"), help="directory of the run (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--sample-only", action="store_true", help="no training: paint samples.png from the checkpoint in --out")
    args = parser.parse_args()
    if len(args.channels) > 2:
        parser.error(f"--channels: 28x28 images have two levels, 14x14 and 7x7, not {len(args.channels)}")
    args.images = args.images or {"glyphs": 60_000, "mnist": 120_000}[args.data]
    if args.data_dir and args.data != "mnist":
        parser.error("--data-dir is read with --data mnist only")
    if (args.resume or args.sample_only) and not (args.out / "checkpoint.npz").exists():
        sys.exit(f"there is no {args.out / 'checkpoint.npz'}: train first, without --resume and --sample-only")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CannotResume as error:
        sys.exit(str(error))
