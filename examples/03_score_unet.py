"""The tutorial's score network: its own net, loss, learning rates and sampler, on MNIST.

    python examples/03_score_unet.py                          75 epochs, the additive net; over an hour on a CPU
    python examples/03_score_unet.py --epochs 21              twenty minutes: strokes, not yet digits
    python examples/03_score_unet.py --resume                 go on with a run that was interrupted (Ctrl-C saves)
    python examples/03_score_unet.py --compare                the trained net, sampled in eight ways
    python examples/03_score_unet.py --bits 1000              its bits per dimension on that many test images
    python examples/03_score_unet.py --data glyphs            on digits drawn here, without a download
    TINYDIFF_BACKEND=cupy python examples/03_score_unet.py    on a GPU

The directory of the run (runs/03_score_unet) gets samples.png, loss.png, log.jsonl and
checkpoint.npz after every epoch, and compare.png: a row a sampler, all from the same noise and with the same number of
evaluations of the net (its number in the label), by the running average of the weights (EMA) and, at the end, without.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np

from tinydiff import Rng, backend, data, plot, saving
from tinydiff.diffusion import VESDE, euler_maruyama, published, score_matching_loss
from tinydiff.diffusion.likelihood import average, bits_per_dimension
from tinydiff.diffusion.samplers import SAMPLERS, Counted, steps_for
from tinydiff.models.tutorial import ScoreUNet
from tinydiff.optim import EMA, Adam, constant, exponential
from tinydiff.training import CannotResume, train

# As published; the loss beside which ours is printed is of the same settings.
TUTORIAL = {
    "add": {"lr": 1e-3, "schedule": exponential(0.98, floor=0.2), "batch_size": 1024, "epochs": 75},
    "concat": {"lr": 5e-4, "schedule": constant(), "batch_size": 2048, "epochs": 50},
}
SIGMA = 25.0


def main() -> int:
    args = arguments()
    sde = VESDE(SIGMA)
    model = ScoreUNet(sde.marginal_std, skips=args.skips, rng=Rng(args.seed).child("model"))
    ema = EMA(model, 0.999)
    if args.sample_only or args.compare or args.bits:
        try:
            state = saving.load(args.out / "checkpoint.npz")
            model.load_state_dict(state["model"])
        except (ValueError, KeyError) as error:
            sys.exit(f"{args.out / 'checkpoint.npz'} is not one of this example with these --skips: {error}")
        averaged = "ema" in state
        if averaged:
            ema.load_state_dict(state["ema"])
        elif not args.sample_only:
            sys.exit(f"{args.out / 'checkpoint.npz'} has no average of the weights: it is of an older version")
        if args.sample_only:
            with ema.applied() if averaged else contextlib.nullcontext():
                paint(model, sde, args, args.steps)
        if args.compare:
            compare(model, ema, sde, args)
        if args.bits:
            measure(model, ema, sde, args)
        return 0

    def loss(x0, rng, sample_offset):
        return score_matching_loss(model, x0, sde, rng, first=sample_offset)

    def pictures(run):
        """After each epoch: the loss curve, and a quick grid of samples."""
        title = f"score U-Net ({args.skips}), {args.data}"
        plot.loss_curve(run.records, args.out / "loss.png", reference=reference, levels=levels, title=title)
        paint(model, sde, args, min(args.steps, 250), n=16)

    images = load(args)
    reference, levels = (published.LOSS[args.skips], published.SIMPLE) if args.data == "mnist" else ({}, {})
    settings = TUTORIAL[args.skips]
    print(f"{model.count():,} parameters, {len(images):,} images; pictures and log go to {args.out}", file=sys.stderr)
    run = train(
        model,
        loss,
        (images,),
        Adam(model.parameters(), lr=settings["lr"]),
        epochs=args.epochs,
        batch_size=args.batch_size,
        microbatch=args.micro_batch,
        threads=args.threads,
        seed=args.seed,
        schedule=settings["schedule"],
        ema=ema,
        out=args.out,
        resume=args.resume,
        on_record=pictures,
        reference=reference,
    )
    if not run.finished:
        return 130  # as a shell reports an interrupted program
    with ema.applied():
        paint(model, sde, args, args.steps)
    return 0


def load(args):
    return data.to_float(read(args, "train"))  # float32 (60000, 28, 28, 1) in [0, 1]


def read(args, split):
    """uint8 (n, 28, 28), to learn from ("train") or others ("test")."""
    if args.data == "glyphs":
        return data.glyphs(20_000, int(split == "test")).images  # the same for every --seed
    try:
        return data.mnist(args.data_dir, split).images
    except (OSError, ValueError, data.DownloadError) as error:
        sys.exit(f"{error}\nOr take --data glyphs, digits drawn here, which need no files.")


def paint(model, sde, args, steps, n=None):
    """samples.png: sample i of a seed is the same image in every grid."""
    n = args.samples if n is None else n
    x = euler_maruyama(model, (n, 28, 28, 1), sde, Rng(args.seed).child("samples"), steps=steps)
    plot.image_grid(x, args.out / "samples.png")


def compare(model, ema, sde, args):
    """compare.png: the same ten samples by every sampler, as many evaluations for each; rk45 takes what it needs."""
    names, rows = [], []

    def row(name, label="", **options):
        score = Counted(model)
        x = SAMPLERS[name](score, (10, 28, 28, 1), sde, Rng(args.seed).child("samples"), **options)
        names.append(f"{name}, {score.nfe}{label}")
        rows.append(backend.to_host(x))
        print(names[-1], file=sys.stderr)

    few = [name for name in SAMPLERS if name != "rk45"]
    with ema.applied():
        for name in few:
            row(name, steps=steps_for(name, args.evaluations))
        row("rk45", rtol=1e-3, atol=1e-3)  # finer than the 256 greys of a picture
        row("euler_maruyama", steps=args.steps)
    for name in ("euler_maruyama", "heun"):
        row(name, ", no average", steps=steps_for(name, args.evaluations))
    row("euler_maruyama", ", no average", steps=args.steps)
    plot.image_grid(np.concatenate(rows), args.out / "compare.png", rows=len(rows), row_labels=names)


def measure(model, ema, sde, args):
    """Bits per dimension on the first of the test images, with and without the average of the weights."""
    images = read(args, "test")[: args.bits, :, :, None]  # (n, 28, 28, 1)

    def progress(done, total, so_far):
        print(f"\r{done} of {total} images, {so_far} bits per dimension", end="", file=sys.stderr, flush=True)

    for name, weights in (("averaged", ema.applied()), ("last", contextlib.nullcontext())):
        with weights:
            bits = bits_per_dimension(model, images, sde, Rng(args.seed).child("bits"), threads=args.threads,
                                      progress=progress)  # fmt: skip
        print(f"\n{name} weights: {average(bits)} bits per dimension on {len(images)} test images", file=sys.stderr)


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def natural(text):
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return int(text)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--skips",
        choices=TUTORIAL,
        default="add",
        help="how the halves of the U-Net are joined (default: add, the tutorial's second net)",
    )
    add(
        "--data",
        choices=["mnist", "glyphs"],
        default="mnist",
        help="MNIST, read from --data-dir or downloaded once; or digits drawn here",
    )
    add("--data-dir", type=Path, help="where the four idx files of MNIST are (default: $TINYDIFF_DATA, else download)")
    add(
        "--epochs",
        type=positive,
        help="how often to go through the data (default: the tutorial's 75, or 50 with --skips concat)",
    )
    add("--batch-size", type=positive, help="images a step (default: the tutorial's 1024, or 2048)")
    add(
        "--micro-batch",
        type=positive,
        help="images at a time; gradients are added up (default: 32 or 64; a GPU takes the batch whole)",
    )
    add(
        "--threads", type=positive, help="micro-batches worked on at the same time (default: one a core; a GPU has one)"
    )
    add("--steps", type=positive, default=500, help="steps of the sampler (default: %(default)s)")
    add("--samples", type=positive, default=64, help="images in the final grid (default: %(default)s)")
    add(
        "--seed",
        type=natural,
        default=0,
        help="of the weights, the order of the data, the noise, the samples (default: %(default)s)",
    )
    add("--out", type=Path, default=Path("runs/03_score_unet"), help="directory of the run (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--sample-only", action="store_true", help="no training: paint samples.png from the checkpoint in --out")
    add("--compare", action="store_true", help="no training: paint compare.png from the checkpoint in --out")
    add("--evaluations", type=positive, default=35, help="of the net by each in --compare (default: %(default)s)")
    add("--bits", type=positive, metavar="N", help="no training: bits per dimension on N test images")
    args = parser.parse_args()
    if args.data_dir and args.data != "mnist":
        parser.error("--data-dir is read with --data mnist only")
    if args.evaluations < 3:
        parser.error(
            f"--evaluations must be 3 or more, for a step of every sampler and the last one, not {args.evaluations}"
        )
    wants_one = args.resume or args.sample_only or args.compare or args.bits
    if wants_one and not (args.out / "checkpoint.npz").exists():
        sys.exit(
            f"there is no {args.out / 'checkpoint.npz'}: train first, without --resume, --sample-only and the like"
        )
    args.epochs = TUTORIAL[args.skips]["epochs"] if args.epochs is None else args.epochs
    args.batch_size = TUTORIAL[args.skips]["batch_size"] if args.batch_size is None else args.batch_size
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CannotResume as error:
        sys.exit(str(error))
