"""How many bits an image costs: a network trained by maximum likelihood, and its bits per dimension on test images.

    python examples/06_likelihood.py                          MNIST, 5 rounds: a quarter of an hour on a CPU
    python examples/06_likelihood.py --data glyphs            digits drawn here, without a download
    python examples/06_likelihood.py --measure --bits 1000    no training: the checkpoint in --out, more images
    TINYDIFF_BACKEND=cupy python examples/06_likelihood.py    on a GPU

Bits are per pixel: an image of 8-bit greys without compression has 8. The loss is in bits too. It is a bound for the
SDE (diffusion/loss.py); at the end the density of the ODE is measured (diffusion/likelihood.py). The directory of the
run (runs/06_likelihood) gets loss.png, samples.png, log.jsonl, checkpoint.npz and bits.txt.
"""

from __future__ import annotations

import math
import sys

import common
import numpy as np

from tinydiff import Rng, plot, saving
from tinydiff.backend import to_device
from tinydiff.diffusion import KarrasSDE, ScoreModel, bits_per_dimension, likelihood_loss, sample
from tinydiff.diffusion.likelihood import average
from tinydiff.models.fourier import FourierInputs
from tinydiff.models.unet import UNet
from tinydiff.optim import EMA, Adam, cosine, warmup
from tinydiff.trained import Trained
from tinydiff.training import train

EPS = 1e-3  # the least noise, where greys are 2/256 apart
LOW, HIGH = -1.0, 1.0
PUBLISHED = {"RealNVP": 1.06, "FFJORD": 0.99}  # on MNIST: Grathwohl et al. 2019, table 2


def main() -> int:
    args = arguments()
    sde, images = KarrasSDE(), common.images(args)[..., None]  # (n, 28, 28, 1) of bytes
    test = common.images(args, "test")[..., None]
    if args.measure:
        path = args.out / "checkpoint.npz"
        trained, ema = common.load_trained(path, "06_likelihood.py")
        return use(trained.model, ema, sde, images, test, saving.load(path)["run"]["records"], args)
    sd = float(images[:10_000].std()) * (HIGH - LOW) / 256
    net = UNet(1 + 2 * len(args.fourier), args.channels, out_channels=1, rng=Rng(args.seed).child("model"))
    model = ScoreModel(FourierInputs(net, sd, args.fourier), sde, "edm", sigma_data=sd)
    ema = EMA(model, 0.999)
    d = images[0].size
    shown = test[:256]  # for the curve of the bound on images that it does not learn from

    def loss(greys, rng, sample_offset):
        """In bits per dimension."""
        x0 = dequantised(greys, rng, sample_offset)
        return (
            likelihood_loss(model, x0, rng, eps=EPS, sample_offset=sample_offset) / (d * math.log(2))
            + 8
            - math.log2(HIGH - LOW)
        )

    levels = levels_of(images, test, args)

    def pictures(state):
        draw_loss(state.records, levels, args)

    steps = args.epochs * -(-len(images) // args.batch_size)
    print(f"{model.count():,} parameters, {args.epochs} rounds of {len(images):,} images; pictures and log go to "
          f"{args.out}", file=sys.stderr)  # fmt: skip
    state = train(
        model,
        loss,
        (images,),
        Adam(model.parameters(), lr=args.lr),
        epochs=args.epochs,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        threads=args.threads,
        validation=shown,
        seed=args.seed,
        schedule=warmup(100, cosine(steps)),
        schedule_by="step",
        ema=ema,
        out=args.out,
        resume=args.resume,
        ranks=args.ranks,
        log_every=50,
        save_every=500,
        about=Trained(model, sde, (28, 28, 1), low=LOW, high=HIGH, eps=EPS, data={"name": args.data}).about(),
        on_record=pictures,
    )
    if state.exit_code:
        return state.exit_code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
    return use(model, ema, sde, images, test, state.records, args)


def use(model, ema, sde, images, test, records, args):
    """samples.png, bits.txt, and the loss with the figure that was measured, by the averaged weights."""
    if args.ranks.rank:
        return 0
    with ema.applied():
        draw_samples(model, sde, args)
        measured = measure(model, sde, images, test[: args.bits], args)
    draw_loss(records, {"this net, by the ODE": measured, **levels_of(images, test, args)}, args)
    return 0


def levels_of(images, test, args):
    """What to compare with, in bits per dimension of test images."""
    return {"each pixel by itself": by_itself(images, test), **(PUBLISHED if args.data == "mnist" else {})}


def draw_loss(records, levels, args):
    """loss.png: the bound, on the images of training and on others; the levels are of test images."""
    plot.loss_curve(
        records, args.out / "loss.png", x="step", y="bits per dimension", levels=levels,
        title=f"bits per dimension, {args.data}", label="bound, training images", validation_label="bound, test images",
    )  # fmt: skip


def dequantised(greys, rng, sample_offset=0):
    """Floats from greys, because a density needs continuous values: grey k is uniform between k and k + 1, of 256."""
    k = to_device(greys).astype("float32")
    return (k + rng.uniform(k.shape, sample_offset=sample_offset)) * ((HIGH - LOW) / 256) + LOW


def by_itself(train, test):
    """Bits per dimension of the test images if each pixel is coded by itself, by how often it has each grey in training
    (each counted once more)."""
    total = 0.0
    for seen, new in zip(train.reshape(len(train), -1).T, test.reshape(len(test), -1).T):
        counts = np.bincount(seen, minlength=256) + 1
        total -= np.log2(counts / counts.sum())[new].sum()
    return total / test.size


def draw_samples(model, sde, args):
    shape, rng = (args.samples, 28, 28, 1), Rng(args.seed).child("samples")
    x = sample(model, shape, sde, rng, steps=17, eps=EPS, microbatch=32, threads=args.threads)
    plot.image_grid(x, args.out / "samples.png", low=LOW, high=HIGH)


def measure(model, sde, train, test, args):
    """Bits per dimension of test images (n, 28, 28, 1), and of each pixel by itself; bits.txt. Returns the first."""
    bits = bits_per_dimension(
        model, test, sde, Rng(args.seed).child("bits"), low=LOW, high=HIGH, eps=EPS, rtol=args.rtol, atol=args.rtol,
        threads=args.threads, progress=common.show_bits,
    )  # fmt: skip
    found = average(bits)
    line = f"{found} bits per dimension on {len(test)} test images, to a tolerance of {args.rtol:g}"
    line += f"; each pixel by itself {by_itself(train, test):.4f}"
    print(f"\n{line}", file=sys.stderr)
    (args.out / "bits.txt").write_text(line + "\n")
    return found.mean


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    common.add_data(parser, "mnist")
    add("--epochs", type=integer(1), metavar="N", help="rounds through the data (default: 5, of glyphs 15)")
    add("--channels", type=integer(8, multiple_of=8), nargs="+", default=[32, 64], metavar="N",
        help="of the U-Net, from fine to coarse, multiples of 8")  # fmt: skip
    add("--fourier", "--waves", type=int, nargs="*", choices=range(-4, 13), default=[1, 2, 3, 4, 5, 6], metavar="N",
        help="also give the net Fourier features of its input, of frequency 2^N pi; without N, none")  # fmt: skip
    common.add_training(parser, batch_size=64)
    add("--lr", type=common.positive, default=1.5e-3, metavar="X", help="of Adam, between a warm-up and a cosine")
    add("--samples", type=integer(1), default=64, metavar="N", help="images in samples.png")
    add("--bits", type=integer(1), default=256, metavar="N", help="test images to measure")
    add("--rtol", type=common.positive, default=1e-5, metavar="X",
        help=f"tolerance of the ODE in measuring, below {EPS:g}; its error is not in the +-")  # fmt: skip
    common.add_seed_and_out(parser, "06_likelihood")
    add("--measure", action="store_true", help="no training: samples.png and bits.txt of the checkpoint in --out")
    args = common.parse(parser)
    common.check_channels(parser, args.channels)
    if args.resume and args.measure:
        parser.error("argument --measure: not allowed with argument --resume")
    if args.rtol >= EPS:
        parser.error(f"--rtol must be below the least noise, {EPS:g}, not {args.rtol:g}")
    common.check_checkpoint(args, "--resume", "--measure")
    args.epochs = args.epochs or {"mnist": 5, "glyphs": 15}[args.data]
    return args


if __name__ == "__main__":
    common.run(main)
