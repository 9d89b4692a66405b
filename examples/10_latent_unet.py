"""The tutorial's latent diffusion, exactly: its autoencoder, its latent U-Net, its loss; and what it lacks.

    python examples/09_autoencoder.py --kind tutorial --out runs/tutorial    first: the autoencoder
    python examples/10_latent_unet.py                                        20 epochs with latents in standard units
    python examples/10_latent_unet.py --raw --out runs/raw                   as published: latents as they come
    python examples/10_latent_unet.py --beside runs/raw                      that run and this one in one picture
    python examples/10_latent_unet.py --raw --epochs 250 --out runs/raw      as long as published
    python examples/10_latent_unet.py --resume                               go on with a run that was interrupted

The autoencoder squeezes a digit to 10x10x4 numbers, and the score of these, noised, is learned by a conditional U-Net
with transformer blocks (models/tutorial.py, LatentUNet, 285,284 parameters). The published recipe takes the latents as
they are. Each channel then has a mean and a deviation of its own, so the same noise is strong for one channel and weak
for another. In standard units (latents.py) all channels are alike. The loss is a sum over 400 numbers, and is 400 for a
net that knows nothing.

The directory of the run (runs/10_latent_unet) gets samples.png, decoded, one row per digit, loss.png, log.jsonl and
checkpoint.npz. At the end it prints how often the judge of 08_classifier.py finds the digit that was asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import common
import numpy as np

from tinydiff import Rng, load, plot
from tinydiff.backend import to_device, to_host
from tinydiff.data.glyphs import ATTRIBUTES
from tinydiff.diffusion import VESDE, sample, score_matching_loss
from tinydiff.latents import cached_latents
from tinydiff.metrics import conditional_accuracy
from tinydiff.models.tutorial import LatentUNet
from tinydiff.optim import EMA, Adam, exponential
from tinydiff.records import read_log
from tinydiff.trained import Trained
from tinydiff.training import train

SIGMA = 25.0
KNOWS_NOTHING = {"zero score": 400.0}


def main() -> int:
    args = arguments()
    space, _ = common.load_space(args.autoencoder, "09_autoencoder.py --kind tutorial --out runs/tutorial")
    if space.shape != (10, 10, 4):
        sys.exit(f"{args.autoencoder} has latents of {space.shape}, but this net is for (10, 10, 4): train it by "
                 "09_autoencoder.py --kind tutorial")  # fmt: skip
    if args.raw:
        common.leave_unscaled(space)
    judge = common.trained_judge(args)  # now, and not after the training
    if args.beside:
        check_beside(args.beside)
    sde = VESDE(SIGMA)
    net = LatentUNet(sde.marginal_std, rng=Rng(args.seed).child("model"))
    ema = EMA(net, 0.999)
    digits = {"labels": ATTRIBUTES["digit"]}
    trained = Trained(net, sde, space.shape, low=0.0, labels=digits, space=space, data={"name": args.data})

    def loss(z0, labels, rng, sample_offset):
        return score_matching_loss(net, z0, sde, rng, sample_offset=sample_offset, labels=labels)

    def pictures(state):
        title = f"latent U-Net, {'raw' if args.raw else 'standardised'} latents"
        plot.loss_curve(state.records, args.out / "loss.png", levels=KNOWS_NOTHING, title=title)
        plot.image_grid(samples(net, sde, space, args, 4, min(args.steps, 100)), args.out / "samples.png", rows=10,
                        row_labels=ATTRIBUTES["digit"])  # fmt: skip

    images, labels = common.labelled(args)
    latents = cached_latents(space, images[..., None])
    print(f"{net.count():,} parameters, {len(latents):,} latents of deviation {latents.std(axis=(0, 1, 2)).round(2)} "
          f"around {latents.mean(axis=(0, 1, 2)).round(2)}; pictures go to {args.out}", file=sys.stderr)  # fmt: skip
    state = train(
        net,
        loss,
        (latents, labels),
        Adam(net.parameters(), lr=1e-4),
        epochs=args.epochs,
        batch_size=1024,
        microbatch=args.microbatch,
        threads=args.threads,
        seed=args.seed,
        schedule=exponential(0.995, floor=0.5),
        ema=ema,
        out=args.out,
        resume=args.resume,
        ranks=args.ranks,
        about=trained.about(),
        on_record=pictures,
    )
    if state.exit_code:
        return state.exit_code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
    if args.ranks.rank:
        return 0
    with ema.applied():
        x = samples(net, sde, space, args, 10, args.steps)
    plot.image_grid(x, args.out / "samples.png", rows=10, row_labels=ATTRIBUTES["digit"])
    if args.beside:
        draw_beside(images[:1000, ..., None], args)
    try:
        found, _ = judge.predict(np.clip(2 * x - 1, -1, 1))
    except ValueError as error:  # of a decoder that has learned nothing
        sys.exit(f"the samples cannot be judged: {error}")
    print(f"the digit is right in {conditional_accuracy(found, {'digit': np.repeat(np.arange(10), 10)})['digit']}")
    return 0


def samples(net, sde, space, args, each, steps):
    """Decoded samples, `each` of every digit: (10 each, 28, 28, 1) in [0, 1]."""
    digits = to_device(np.repeat(np.arange(10), each))
    rng = Rng(args.seed).child("samples")
    z = sample(net, (10 * each, *space.shape), sde, rng, method="euler_maruyama", steps=steps, labels=digits)
    return space.decode(z)


def check_beside(folder):
    """End the program unless it is the directory of a run of this example."""
    try:
        trained, records = load(folder), read_log(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"--beside must be the directory of a run of this example: {error}")
    if trained.space is None or list(trained.labels) != ["labels"] or not records:
        sys.exit(f"--beside must be the directory of a run of this example, and {folder} has {trained!r}")


def draw_beside(images, args, each=4):
    """beside.png: the run of --beside and this one, a column for each: how the numbers in each channel of its latents
    are distributed, its loss, and `each` samples of every digit."""
    figure = plot.new_figure(9.0, 7.4)
    grid = figure.add_gridspec(3, 2, height_ratios=[1, 1, 1.25], hspace=0.45, wspace=0.18, left=0.07, right=0.98,
                               top=0.95, bottom=0.02)  # fmt: skip
    values, losses, made = ([figure.add_subplot(grid[row, column]) for column in (0, 1)] for row in range(3))
    bins = np.linspace(-8, 8, 161)
    for column, folder in enumerate((args.beside, args.out)):
        trained, records = load(folder), read_log(folder)
        raw = bool(np.all(to_host(trained.space.std.data) == 1))
        latents = trained.space.encode(images).reshape(-1, trained.shape[-1])
        for channel, colour in zip(latents.T, plot.COLOURS):
            values[column].hist(channel, bins, density=True, histtype="step", color=colour, linewidth=1.3)
        values[column].plot(bins, np.exp(-(bins**2) / 2) / (2 * np.pi) ** 0.5, color=plot.FAINT, linestyle=":")
        title = "latents as the encoder gives them" if raw else "each channel with mean 0 and deviation 1"
        plot.frame(values[column], f"{title}\n(the four channels; dotted: noise of deviation 1)", fontsize=9)
        values[column].set_ylim(0, 1.5)
        values[column].set_yticks([])
        losses[column].plot([r["epoch"] + 1 for r in records], [r["loss"] for r in records], color=plot.BLUE)
        plot.frame(losses[column], f"loss: {records[-1]['loss']:.1f} at the end", x="epoch", fontsize=9)
        digits = np.tile(np.arange(10), each)
        x = trained.sample(len(digits), Rng(args.seed).child("samples"), labels={"labels": digits},
                           method="euler_maruyama", steps=args.steps)[..., 0]  # (10 each, 28, 28)  # fmt: skip
        sheet = np.concatenate([np.concatenate(x[10 * row : 10 * row + 10], axis=1) for row in range(each)])
        made[column].imshow(np.clip(sheet, 0, 1), cmap="gray", interpolation="nearest")
        made[column].set_axis_off()
    for axes in losses:
        axes.set_ylim(0, 1.05 * max(line.get_ydata().max() for ax in losses for line in ax.lines))
    plot.save(figure, args.out / "beside.png")


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    common.add_data(parser, "mnist")
    add("--autoencoder", type=common.file, default=Path("runs/tutorial/latent_space.npz"), metavar="FILE",
        help="latent_space.npz of 09_autoencoder.py --kind tutorial")  # fmt: skip
    add("--raw", action="store_true", help="leave the latents as the encoder gives them, as published")
    add("--beside", type=Path, metavar="DIR", help="also draw beside.png, of the run in DIR and this one")
    add("--epochs", type=integer(1), default=20, metavar="N", help="how often to go through the data; published: 250")
    common.add_training(parser, batch_size=None)
    add("--steps", type=integer(1), default=500, metavar="N", help="steps of Euler-Maruyama")
    common.add_seed_and_out(parser, "10_latent_unet")
    args = common.parse(parser)
    common.check_checkpoint(args, "--resume")
    return args


if __name__ == "__main__":
    common.run(main)
