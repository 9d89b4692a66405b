"""The tutorial's attention model: a score network that is told which digit to draw, on MNIST; or ours.

    python examples/07_conditional_unet.py                          100 epochs, as published; hours on a CPU
    python examples/07_conditional_unet.py --epochs 10              about a quarter of an hour
    python examples/07_conditional_unet.py --net ours --out runs/ours    our U-Net instead, 5 epochs
    python examples/07_conditional_unet.py --resume                 go on with a run that was interrupted
    python examples/07_conditional_unet.py --sample-only            the pictures again, from the checkpoint
    python examples/07_conditional_unet.py --data glyphs            on digits drawn here, without a download
    TINYDIFF_BACKEND=cupy python examples/07_conditional_unet.py    on a GPU

The net (models/tutorial.py, ConditionalUNet) is the additive U-Net of 03_score_unet.py with a transformer block at each
of its two coarsest levels: every pixel attends to every other one, and to the label, which an embedding has turned into
a vector. Attention to a single vector is a weight of 1, whatever query and key are, so these two learn nothing here:
the label only adds a vector of its own to all pixels. (With several words they do learn: text_to_image.py.)

With --net ours, the U-Net of the quickstart (models/unet.py) learns by the same loss, from the same images, but
in small batches, and by a learning rate that falls to 0 at the end. It is a denoiser D(x, sigma), whose score is
(D - x) / sigma^2; so the loss is the sum over the pixels of the square of (D - x_0) / sigma. The test loss takes the
same times and noise for both nets.

The directory of the run (runs/07_conditional_unet) gets after every epoch samples.png, one row per digit; labels.png,
the cosines between the vectors of the labels; loss.png, with the losses published for the tutorial's net; log.jsonl and
checkpoint.npz. At the end it prints the loss on the test images, which the net has not seen.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import common
import numpy as np

from tinydiff import Rng, data, no_grad, plot
from tinydiff.backend import to_device, to_host
from tinydiff.data.glyphs import ATTRIBUTES
from tinydiff.diffusion import VESDE, Denoiser, sample, score_matching_loss
from tinydiff.distributed import ALONE
from tinydiff.microbatch import microbatch_size, over_microbatches
from tinydiff.models.tutorial import PUBLISHED_LOSS, SIMPLE_LOSS, ConditionalUNet
from tinydiff.models.unet import UNet
from tinydiff.optim import EMA, Adam, cosine, exponential, warmup
from tinydiff.trained import Trained
from tinydiff.training import train

SIGMA = 25.0
SIGMA_DATA = 0.33  # the root of the mean square of MNIST's pixels, in [0, 1]
PASSES = 5  # over the test images, each with other noise and times


class Recipe(NamedTuple):
    """How a net is trained, unless an option says otherwise."""

    epochs: int
    batch_size: int
    lr: float


NAMES = {"tutorial": "conditional U-Net", "ours": "our U-Net"}
RECIPES = {"tutorial": Recipe(100, 1024, 1e-3), "ours": Recipe(5, 64, 3e-3)}  # the tutorial's as published


def main() -> int:
    args = arguments()
    sde = VESDE(SIGMA)
    if args.sample_only:
        path = args.out / "checkpoint.npz"
        trained, ema = common.load_trained(path, "07_conditional_unet.py", "labels")
        model, args.data = trained.model, trained.data.get("name")
    else:
        model = new_model(args, sde)
        ema = EMA(model, 0.999)
        digits = {"labels": ATTRIBUTES["digit"]}
        trained = Trained(model, sde, (28, 28, 1), low=0.0, labels=digits, data={"name": args.data})

    def loss(x0, labels, rng, sample_offset):
        return score_matching_loss(model, x0, sde, rng, sample_offset=sample_offset, labels=labels)

    def pictures(state):
        title = f"{NAMES[args.net]}, {args.data}"
        plot.loss_curve(state.records, args.out / "loss.png", reference=reference, levels=levels, title=title)
        draw_cosines(model, args)
        draw_samples(model, sde, args, min(args.steps, 100), each=4)

    reference, levels = (PUBLISHED_LOSS["conditional"], SIMPLE_LOSS) if args.data == "mnist" else ({}, {})
    if not args.sample_only:
        images, labels = common.labelled(args)
        print(f"{model.count():,} parameters, {len(images):,} images; pictures go to {args.out}", file=sys.stderr)
        state = train(
            model,
            loss,
            (data.to_float(images), labels),  # (n, 28, 28, 1) in [0, 1], (n,)
            Adam(model.parameters(), lr=RECIPES[args.net].lr),
            epochs=args.epochs,
            batch_size=args.batch_size,
            microbatch=args.microbatch,
            threads=args.threads,
            seed=args.seed,
            schedule=schedule(args, len(images)),
            schedule_by="epoch" if args.net == "tutorial" else "step",
            ema=ema,
            out=args.out,
            resume=args.resume,
            ranks=args.ranks,
            about=trained.about(),
            on_record=pictures,
            reference=reference,
        )
        if state.exit_code:
            return state.exit_code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
    with ema.applied():
        draw_samples(model, sde, args, args.steps, each=10, ranks=args.ranks)
        if args.ranks.rank:
            return 0
        draw_cosines(model, args)
        print(f"{test_loss(loss, args)} on the test images, with the average of the weights")
    return 0


def new_model(args, sde):
    """The net of --net, as a model of the score whose condition is `labels`."""
    rng = Rng(args.seed).child("model")
    if args.net == "tutorial":
        return ConditionalUNet(sde.marginal_std, rng=rng)
    return Denoiser(UNet(1, (32, 64), labels={"labels": 10}, rng=rng), SIGMA_DATA)


def schedule(args, n):
    """The factor of the learning rate: the tutorial's of the epoch, ours of the step."""
    if args.net == "tutorial":
        return exponential(0.98, floor=0.2)
    return warmup(100, cosine(args.epochs * -(-n // args.batch_size)))


def test_loss(loss, args):
    """The loss on the test images, the mean over PASSES times and noises of each image; with its standard error."""
    images, labels = common.labelled(args, "test")
    images, losses = data.to_float(images), []
    for i in range(PASSES):
        rng = Rng(args.seed).child("test").child(i)

        def of(rows, rng=rng):
            arrays = to_device(images[rows]), to_device(labels[rows])
            return len(labels[rows]) * loss(*arrays, rng=rng.copy(), sample_offset=rows.start).item()

        with no_grad():
            losses.append(sum(over_microbatches(of, len(images), microbatch_size(len(images)))) / len(images))
    return f"loss {np.mean(losses):.2f} +- {np.std(losses, ddof=1) / len(losses) ** 0.5:.2f}"


def draw_samples(model, sde, args, steps, each, ranks=ALONE):
    """samples.png: one row per digit."""
    digits = to_device(np.repeat(np.arange(10), each))
    rng = Rng(args.seed).child("samples")
    x = sample(model, (10 * each, 28, 28, 1), sde, rng, method="euler_maruyama", steps=steps, labels=digits,
               ranks=ranks)  # fmt: skip
    if ranks.rank == 0:
        plot.image_grid(x, args.out / "samples.png", rows=10, row_labels=ATTRIBUTES["digit"])


def draw_cosines(model, args):
    """labels.png: the cosine of the angle between the vectors of two labels, for each pair."""
    table = model.cond_embed if isinstance(model, ConditionalUNet) else model.net.labels["labels"]
    vectors = to_host(table.weight.data)[:10]  # (10, features); our table's last row is the null class
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    plot.matrix(vectors @ vectors.T, args.out / "labels.png", labels=ATTRIBUTES["digit"], low=-1, high=1,
                title="cosines between the vectors of the labels")  # fmt: skip


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    common.add_data(parser, "mnist")
    add("--net", choices=list(RECIPES), default="tutorial", help="the tutorial's net, or ours")
    add("--epochs", type=integer(1), metavar="N",
        help="how often to go through the data (default: 100; of our net 5)")  # fmt: skip
    add("--batch-size", type=integer(1), metavar="N", help="images per step (default: 1024; of our net 64)")
    common.add_training(parser, batch_size=None)
    add("--steps", type=integer(1), default=500, metavar="N", help="steps of Euler-Maruyama")
    common.add_seed_and_out(parser, "07_conditional_unet")
    add("--sample-only", action="store_true", help="no training: the pictures and the test loss from the checkpoint")
    args = common.parse(parser)
    args.epochs = args.epochs or RECIPES[args.net].epochs
    args.batch_size = args.batch_size or RECIPES[args.net].batch_size
    common.check_checkpoint(args, "--resume", "--sample-only")
    return args


if __name__ == "__main__":
    common.run(main)
