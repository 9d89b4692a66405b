"""The tutorial's score network: its own net, loss, learning rates and sampler, on MNIST.

    python examples/03_score_unet.py                          75 epochs, the additive net; hours on a CPU
    python examples/03_score_unet.py --epochs 21              an hour: strokes, not yet digits
    python examples/03_score_unet.py --resume                 go on with a run that was interrupted (Ctrl-C saves)
    python examples/03_score_unet.py --data glyphs            on digits drawn here, without a download
    TINYDIFF_BACKEND=cupy python examples/03_score_unet.py    on a GPU

The directory of the run (runs/03_score_unet) gets samples.png, loss.png, log.jsonl and
checkpoint.npz after every epoch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinydiff import Rng, data, plot, saving
from tinydiff.diffusion import VESDE, euler_maruyama, published, score_matching_loss
from tinydiff.models.tutorial import ScoreUNet
from tinydiff.optim import Adam, constant, exponential
from tinydiff.training import train

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
    if args.sample_only:
        model.load_state_dict(saving.load(args.out / "checkpoint.npz")["model"])
        paint(model, sde, args, args.steps)
        return 0

    def loss(x0, rng, first):
        return score_matching_loss(model, x0, sde, rng, first=first)

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
        micro_batch=args.micro_batch,
        threads=args.threads,
        seed=args.seed,
        schedule=settings["schedule"],
        out=args.out,
        resume=args.resume,
        on_record=pictures,
        reference=reference,
    )
    if not run.finished:
        return 130  # as a shell reports an interrupted program
    paint(model, sde, args, args.steps)
    return 0


def load(args):
    if args.data == "glyphs":
        return data.to_float(data.glyphs(20_000, args.seed).images)
    try:
        return data.to_float(data.mnist(args.data_dir).images)  # float32 (60000, 28, 28, 1) in [0, 1]
    except (OSError, ValueError, data.DownloadError) as error:
        sys.exit(f"{error}\nOr take --data glyphs, digits drawn here, which need no files.")


def paint(model, sde, args, steps, n=None):
    """samples.png: sample i of a seed is the same image in every grid."""
    n = args.samples if n is None else n
    x = euler_maruyama(model, (n, 28, 28, 1), sde, Rng(args.seed).child("samples"), steps=steps)
    plot.image_grid(x, args.out / "samples.png")


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
    args = parser.parse_args()
    if args.data_dir and args.data != "mnist":
        parser.error("--data-dir is read with --data mnist only")
    if (args.resume or args.sample_only) and not (args.out / "checkpoint.npz").exists():
        sys.exit(f"there is no {args.out / 'checkpoint.npz'}: train first, without --resume and --sample-only")
    args.epochs = TUTORIAL[args.skips]["epochs"] if args.epochs is None else args.epochs
    args.batch_size = TUTORIAL[args.skips]["batch_size"] if args.batch_size is None else args.batch_size
    return args


if __name__ == "__main__":
    sys.exit(main())
