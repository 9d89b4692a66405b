"""Legible digits in minutes: a small diffusion model, trained and sampled on this machine.

    python examples/quickstart.py                         digits drawn here, no download
    python examples/quickstart.py --data mnist            handwritten ones; four times as long
    TINYDIFF_BACKEND=cupy python examples/quickstart.py   on a GPU

A padded residual U-Net (models/unet.py) learns to remove noise of any strength (diffusion/predict.py). Its condition is
the digit in the image, and how it is drawn. In training the condition is left out one time in ten, so that sampling can
strengthen its effect (guidance), and a part of it one time in ten, so that the digit alone will do. The directory of
the run (runs/quickstart, of MNIST runs/quickstart_mnist) gets samples.png, one row per digit, and loss.png, log.jsonl
and checkpoint.npz.
"""

from __future__ import annotations

import itertools
import sys
import time

import common
import numpy as np

from tinydiff import Rng, data, plot
from tinydiff.backend import to_device
from tinydiff.data.glyphs import ATTRIBUTES, VARIETIES
from tinydiff.diffusion import Denoiser, Guided, KarrasSDE, drop_labels, edm_loss, sample
from tinydiff.distributed import ALONE
from tinydiff.models.unet import UNet
from tinydiff.optim import EMA, Adam, cosine, warmup
from tinydiff.trained import Trained
from tinydiff.training import train

VARIETY = "plain"  # of the glyphs: few enough styles for a few minutes
# Mean and standard deviation of ln sigma in training. Karras et al. have -1.2 and 1.2; but whether the strokes of a
# digit hang together is decided at higher noise levels.
NOISE = -0.6, 1.4
BEFORE = -1.2, 1.2  # in older versions, whose checkpoints may not say so
LABEL_DROPOUT = 0.1  # how often all labels are left out in training, and how often some of them


def main() -> int:
    args = arguments()
    began = time.monotonic()
    if args.sample_only:
        trained, ema = common.load_trained(args.out / "checkpoint.npz", "quickstart.py", "digit")
        args.data = trained.data.get("name")
        with ema.applied():
            draw_samples(trained.model, args, args.steps)
        print(args.out / "samples.png", file=sys.stderr)
        return 0
    images, labels = load(args)  # (n, 28, 28, 1) in [-1, 1]; {name: (n,)}
    net = UNet(
        1,
        args.channels,
        labels={name: int(values.max()) + 1 for name, values in labels.items()},
        rng=Rng(args.seed).child("model"),
    )
    denoiser = Denoiser(net, sigma_data=float(images.std()))
    ema = EMA(denoiser, 0.995)
    names = {name: ATTRIBUTES[name][: values.max() + 1] for name, values in labels.items()}
    source = {"name": args.data, "seed": args.seed, "variety": VARIETY}
    noise = common.noise_of_run(args) or (BEFORE if args.resume else NOISE)
    trained = Trained(denoiser, KarrasSDE(), (28, 28, 1), labels=names, null=True, eps=0.002, noise=noise,
                      data=source)  # fmt: skip

    def loss(x0, *values, rng, sample_offset):
        condition = drop_labels(dict(zip(labels, values)), LABEL_DROPOUT, rng, sample_offset=sample_offset)
        mean, std = noise
        return edm_loss(denoiser, x0, rng, mean=mean, std=std, sample_offset=sample_offset, **condition)

    def pictures(state):
        plot.loss_curve(state.records, args.out / "loss.png", x="step", title=f"EDM loss on {args.data}")
        if state.step % 300 == 0:  # a preview, with few steps
            with ema.applied():
                draw_samples(denoiser, args, steps=min(args.steps, 7))

    shown = [a[: args.images] for a in (images, *labels.values())]
    n = len(shown[0])
    epochs = round(args.images / n)
    steps = epochs * -(-n // args.batch_size)
    print(f"{net.count():,} parameters, {epochs * n:,} images; pictures go to {args.out}", file=sys.stderr)
    state = train(
        denoiser,
        loss,
        shown,
        Adam(denoiser.parameters(), lr=args.lr),
        epochs=epochs,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        threads=args.threads,
        seed=args.seed,
        schedule=warmup(100, cosine(steps)),
        schedule_by="step",
        ema=ema,
        out=args.out,
        resume=args.resume,
        ranks=args.ranks,
        log_every=50,
        save_every=500,
        about=trained.about(),
        on_record=pictures,
    )
    if state.exit_code:
        return state.exit_code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
    with ema.applied():
        draw_samples(denoiser, args, args.steps, args.ranks)
    print(f"{args.out / 'samples.png'} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


def load(args):
    if args.data == "mnist":
        digits = common.mnist(args)
        return data.to_float(digits.images, -1, 1), {"digit": digits.labels.astype(np.int64)}
    glyphs = data.glyphs(20_000, args.seed, variety=VARIETY)
    return data.to_float(glyphs.images, -1, 1), {name: v for name, v in glyphs.labels.items() if v.max() > v.min()}


def draw_samples(denoiser, args, steps, ranks=ALONE):
    """samples.png: one row per digit; one column per style of glyphs, or ten samples of handwriting."""
    if args.data == "mnist":
        wanted, names = [{"digit": d} for d in range(10) for _ in range(10)], None
    else:
        drawn = {name: values for name, values in VARIETIES[VARIETY].items() if len(values) > 1}
        styles = [dict(zip(drawn, choice)) for choice in itertools.product(*drawn.values())]
        plain = ("regular", "upright")
        names = [" ".join(value for value in style.values() if value not in plain) for style in styles]
        wanted = [
            {"digit": d, **{name: ATTRIBUTES[name].index(v) for name, v in style.items()}}
            for d in range(10)
            for style in styles
        ]
    condition = {name: to_device(np.array([w[name] for w in wanted])) for name in wanted[0]}
    model, shape = Guided(denoiser, args.guidance), (len(wanted), 28, 28, 1)
    rng = Rng(args.seed).child("samples")
    x = sample(model, shape, KarrasSDE(), rng, method="heun", steps=steps, eps=0.002, microbatch=20,
               ranks=ranks, **condition)  # fmt: skip
    if ranks.rank:
        return
    plot.image_grid(x, args.out / "samples.png", rows=10, row_labels=ATTRIBUTES["digit"], column_labels=names, low=-1,
                    high=1)  # fmt: skip


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    common.add_data(parser, "glyphs")
    add("--images", type=integer(1), metavar="N",
        help="images to learn from, in whole rounds through the data, of 20000 or, of MNIST, 60000; or as many of them "
        "as are given (default: 80000, of MNIST 360000)")  # fmt: skip
    # Multiples of 8, because its group norms have eight groups.
    add("--channels", type=integer(8, multiple_of=8), nargs="+", default=[32, 64], metavar="N",
        help="of the U-Net, from fine to coarse, multiples of 8")  # fmt: skip
    common.add_training(parser, batch_size=64)
    add("--lr", type=common.positive, default=1.5e-3, metavar="X", help="of Adam, after a warm-up, before a cosine")
    add("--guidance", type=common.finite, default=2.0, metavar="X",
        help="how far to push towards the digit: 0 is not at all, and the further, the less variety")  # fmt: skip
    add("--steps", type=integer(1), default=17, metavar="N",
        help="steps of Heun's method, which are 2 N + 1 evaluations")  # fmt: skip
    common.add_seed_and_out(parser, "quickstart")
    add("--sample-only", action="store_true", help="no training: draw samples.png from the checkpoint in --out, "
        "which knows its data and its channels")  # fmt: skip
    args = common.parse(parser)
    common.check_channels(parser, args.channels)
    if args.data == "mnist" and args.out == parser.get_default("out"):
        args.out = args.out.with_name("quickstart_mnist")
    common.check_checkpoint(args, "--resume", "--sample-only")
    args.images = args.images or {"glyphs": 80_000, "mnist": 360_000}[args.data]
    return args


if __name__ == "__main__":
    common.run(main)
