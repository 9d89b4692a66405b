"""The tutorial's score network: its own net, loss, learning rates and method of sampling, on MNIST.

    python examples/03_score_unet.py                          75 epochs, the additive net; over an hour on a CPU
    python examples/03_score_unet.py --epochs 21              twenty minutes: strokes, not yet digits
    python examples/03_score_unet.py --resume                 go on with a run that was interrupted (Ctrl-C saves)
    python examples/03_score_unet.py --compare                the trained net, sampled in eight ways
    python examples/03_score_unet.py --bits 1000              its bits per dimension on that many test images
    python examples/03_score_unet.py --data glyphs            on digits drawn here, without a download
    mpiexec -n 4 python examples/03_score_unet.py --parallel mpi          on four processes; so do the other chapters
    TINYDIFF_BACKEND=cupy python examples/03_score_unet.py    on a GPU

The directory of the run (runs/03_score_unet) gets samples.png, loss.png, log.jsonl and checkpoint.npz after every
epoch. compare.png has one row per method, all from the same noise and with the same number of evaluations of the net
(in the label), with the running average of the weights (EMA) and, in the last rows, without.
"""

from __future__ import annotations

import contextlib
import sys

import common
import numpy as np

from tinydiff import Rng, backend, data, plot
from tinydiff.diffusion import METHODS, VESDE, Counted, rk45, sample, score_matching_loss, steps_for
from tinydiff.diffusion.likelihood import average, bits_per_dimension
from tinydiff.distributed import ALONE
from tinydiff.models.tutorial import PUBLISHED_LOSS, SIMPLE_LOSS, ScoreUNet
from tinydiff.optim import EMA, Adam, constant, exponential
from tinydiff.trained import Trained
from tinydiff.training import train

# As published; the published losses, which are printed beside ours, are for these settings.
TUTORIAL = {
    "add": {"lr": 1e-3, "schedule": exponential(0.98, floor=0.2), "batch_size": 1024, "epochs": 75},
    "concat": {"lr": 5e-4, "schedule": constant(), "batch_size": 2048, "epochs": 50},
}
SIGMA = 25.0


def main() -> int:
    args = arguments()
    sde = VESDE(SIGMA)
    if args.sample_only or args.compare or args.bits:
        use(sde, args)
        return 0
    model = ScoreUNet(sde.marginal_std, skips=args.skips, rng=Rng(args.seed).child("model"))
    ema = EMA(model, 0.999)

    def loss(x0, rng, sample_offset):
        return score_matching_loss(model, x0, sde, rng, sample_offset=sample_offset)

    def pictures(state):
        """After each epoch: the loss curve, and a quick grid of samples."""
        title = f"score U-Net ({args.skips}), {args.data}"
        plot.loss_curve(state.records, args.out / "loss.png", reference=reference, levels=levels, title=title)
        draw_samples(model, sde, args, min(args.steps, 250), n=16)

    images = data.to_float(common.images(args))  # float32 (60000, 28, 28, 1) in [0, 1]
    reference, levels = (PUBLISHED_LOSS[args.skips], SIMPLE_LOSS) if args.data == "mnist" else ({}, {})
    settings = TUTORIAL[args.skips]
    print(f"{model.count():,} parameters, {len(images):,} images; pictures and log go to {args.out}", file=sys.stderr)
    state = train(
        model,
        loss,
        (images,),
        Adam(model.parameters(), lr=settings["lr"]),
        epochs=args.epochs,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        threads=args.threads,
        seed=args.seed,
        schedule=settings["schedule"],
        ema=ema,
        out=args.out,
        resume=args.resume,
        ranks=args.ranks,
        about=Trained(model, sde, (28, 28, 1), low=0.0, data={"name": args.data}).about(),
        on_record=pictures,
        reference=reference,
    )
    if state.exit_code:
        return state.exit_code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
    with ema.applied():
        draw_samples(model, sde, args, args.steps, ranks=args.ranks)
    return 0


def use(sde, args):
    """--sample-only, --compare and --bits, from the checkpoint, which knows its net."""
    path = args.out / "checkpoint.npz"
    trained, ema = common.load_trained(path, "03_score_unet.py")
    model = trained.model
    if ema is None and not args.sample_only:
        sys.exit(f"{path} has no average of the weights")
    if args.sample_only:
        with ema.applied() if ema is not None else contextlib.nullcontext():
            draw_samples(model, sde, args, args.steps, ranks=args.ranks)
    if args.ranks.rank:
        return
    if args.compare:
        compare(model, ema, sde, args)
    if args.bits:
        measure(model, ema, sde, args)


def draw_samples(model, sde, args, steps, n=None, ranks=ALONE):
    """samples.png: sample i of a seed is the same image in every grid."""
    n = args.samples if n is None else n
    rng = Rng(args.seed).child("samples")
    x = sample(model, (n, 28, 28, 1), sde, rng, method="euler_maruyama", steps=steps, ranks=ranks)
    if ranks.rank == 0:
        plot.image_grid(x, args.out / "samples.png")


def compare(model, ema, sde, args):
    """compare.png: ten samples by every method, with equally many evaluations; rk45 takes as many as it needs."""
    names, rows = [], []

    def row(method, steps=None, label=""):
        counted = Counted(model)
        x = sample(counted, (10, 28, 28, 1), sde, Rng(args.seed).child("samples"), method=method, steps=steps)
        names.append(f"{method.name}\n{counted.nfe} evaluations{label}")
        rows.append(backend.to_host(x))
        print(f"{method.name}, {counted.nfe}{label}", file=sys.stderr)

    few = [method for name, method in METHODS.items() if name != "rk45"]
    with ema.applied():
        for method in few:
            row(method, steps_for(method, args.evaluations))
        row(rk45(rtol=1e-3, atol=1e-3))  # finer than the 256 greys of a picture
        row(METHODS["euler_maruyama"], args.steps)
    for method in (METHODS["euler_maruyama"], METHODS["heun"]):
        row(method, steps_for(method, args.evaluations), ", no average")
    row(METHODS["euler_maruyama"], args.steps, ", no average")
    plot.image_grid(np.concatenate(rows), args.out / "compare.png", rows=len(rows), row_labels=names,
                    column_labels=[f"noise {i}" for i in range(1, 11)])  # fmt: skip


def measure(model, ema, sde, args):
    """Bits per dimension on the first of the test images, with and without the average of the weights."""
    images = common.images(args, "test")[: args.bits, :, :, None]  # (n, 28, 28, 1)
    for name, weights in (("averaged", ema.applied()), ("last", contextlib.nullcontext())):
        with weights:
            bits = bits_per_dimension(model, images, sde, Rng(args.seed).child("bits"), threads=args.threads,
                                      progress=common.show_bits)  # fmt: skip
        print(f"\n{name} weights: {average(bits)} bits per dimension on {len(images)} test images", file=sys.stderr)


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    add("--skips", choices=TUTORIAL, default="add",
        help="how the halves of the U-Net are joined (default: add, the tutorial's second net)")  # fmt: skip
    common.add_data(parser, "mnist")
    add("--epochs", type=integer(1), metavar="N",
        help="how often to go through the data (default: the tutorial's 75, or 50 with --skips concat)")  # fmt: skip
    add("--batch-size", type=integer(1), metavar="N", help="images per step (default: the tutorial's 1024, or 2048)")
    common.add_training(parser, batch_size=None)
    add("--steps", type=integer(1), default=500, metavar="N", help="steps of Euler-Maruyama")
    add("--samples", type=integer(1), default=64, metavar="N", help="images in the final grid")
    common.add_seed_and_out(parser, "03_score_unet")
    add("--sample-only", action="store_true", help="no training: draw samples.png from the checkpoint in --out")
    add("--compare", action="store_true", help="no training: draw compare.png from the checkpoint in --out")
    add("--evaluations", type=integer(1), default=35, metavar="N", help="of the net by each method in --compare")
    add("--bits", type=integer(1), metavar="N", help="no training: bits per dimension on N test images")
    args = common.parse(parser)
    if args.evaluations < 3:
        parser.error(
            f"--evaluations must be 3 or more, for a step of every method and the last one, not {args.evaluations}"
        )
    common.check_checkpoint(args, "--resume", "--sample-only", "--compare", "--bits")
    args.epochs = args.epochs or TUTORIAL[args.skips]["epochs"]
    args.batch_size = args.batch_size or TUTORIAL[args.skips]["batch_size"]
    return args


if __name__ == "__main__":
    common.run(main)
