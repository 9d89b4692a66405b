"""Images squeezed to latents and back: what an autoencoder keeps, and what its latents look like.

    python examples/09_autoencoder.py                              a variational one, of MNIST
    python examples/09_autoencoder.py --kind tutorial              the tutorial's, 709 parameters, 50 epochs
    python examples/09_autoencoder.py --kind codebook --latent 4   latents that are words of a codebook
    python examples/09_autoencoder.py --data scenes                64x64 in colour, which has more to squeeze
    python examples/09_autoencoder.py --kl-weight 0.3              what the divergence does: compare prior.png
    python examples/09_autoencoder.py --perceptual 0.1             pictures must also look alike to a judge
    python examples/09_autoencoder.py --draw-only                  the pictures again, from the finished run

Of an image of 28x28 the tutorial's net keeps 10x10x4 numbers; ours, with the default of two channels, keeps 14x14x2,
which is a little less. --levels 2 halves the sides once more, --latent says how many channels there are. The directory
of the run (runs/09_autoencoder) gets

    pairs.png     images that it has not seen, and what came back, below each
    walk.png      the plane through the latents of three images, decoded: are there images between images?
    prior.png     normal latents, decoded. Diffusion will have to do better: it learns where the latents are
    loss.png, log.jsonl, checkpoint.npz, and latent_space.npz: the autoencoder with the mean and deviation of its
                  latents, as latent diffusion needs it

and the mean squared error on the test images is printed, in the units in which black is 0 and white is 1.
"""

from __future__ import annotations

import sys

import common
import numpy as np

from tinydiff import Rng, data, plot
from tinydiff.backend import to_device, to_host
from tinydiff.models.autoencoder import autoencoder_loss
from tinydiff.ops import mse_loss
from tinydiff.optim import Adam, constant, cosine, warmup
from tinydiff.training import train

EPOCHS = {"mnist": 5, "glyphs": 15, "scenes": 10}  # of ours; the tutorial's had 50
RESTARTS = 20  # times in the first half that the codes nobody uses are put elsewhere


def main() -> int:
    args = arguments()
    if args.draw_only:
        space, kept = common.load_space(args.out / "latent_space.npz", "09_autoencoder.py")
        vars(args).update(vars(kept))  # the options that it was trained with replace those of now
    else:
        images = pictures_of(args)
        args.shape = list(images.shape[1:])
        net = common.new_autoencoder(args)
        print(f"{net.count():,} parameters, {len(images):,} images; pictures go to {args.out}", file=sys.stderr)
        if code := trained(net, images, args):
            return code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
        if args.ranks.rank:
            return 0
        space = common.new_space(net, args)
        space.measure(images)
        common.keep_space(space, args.out / "latent_space.npz", args)
    draw(space, args)
    return 0


# ---------------------------------------------------------------- the data and the net


def pictures_of(args, split="train"):
    """uint8 (n, H, W, C)."""
    if args.data == "scenes":
        return data.scenes(*((20_000, 0) if split == "train" else (2000, 1))).images
    return common.images(args, split)[..., None]


def scaled(images, args):
    """float32, as the net takes them: the tutorial's has a sigmoid at its end, and so works from 0 to 1."""
    return data.to_float(images, *((0, 1) if args.kind == "tutorial" else (-1, 1)))


def judge_of(args):
    """The trained judge of --data, whose weights get no gradient: it only looks."""
    judge = common.trained_judge(args)
    for parameter in judge.parameters():
        parameter.requires_grad = False
    return judge


# ---------------------------------------------------------------- the training


def trained(net, images, args):
    """Train. The exit code: 0 if it was finished."""
    steps = args.epochs * -(-len(images) // args.batch_size)
    features = judge_of(args).activations if args.perceptual else None

    def loss(x, rng, sample_offset):
        x = scaled(x, args)
        if args.kind == "tutorial":
            return mse_loss(net(x), x)
        return autoencoder_loss(net, x, rng, features=features, weight=args.perceptual, sample_offset=sample_offset)

    def on_record(state):
        if args.kind == "codebook":
            few = to_device(scaled(images[:: max(1, len(images) // 256)], args))
            if state.step < steps / 2:
                net.restart(few, Rng(args.seed).child("restart").child(state.step))
            state.records[-1]["perplexity"] = net.perplexity(net.indices(net.features(few)))
        plot.loss_curve(state.records, args.out / "loss.png", x="step", title=f"{args.kind} autoencoder, {args.data}")

    tutorials = args.kind == "tutorial"
    options = {"perceptual": args.perceptual}
    if args.kind == "variational":
        options["kl_weight"] = args.kl_weight
    if args.resume:
        common.check_options(args.out / "checkpoint.npz", **options)
    state = train(
        net,
        loss,
        images,
        Adam(net.parameters(), lr=args.lr),
        epochs=args.epochs,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        threads=args.threads,
        seed=args.seed,
        schedule=constant() if tutorials else warmup(max(1, min(100, steps // 10)), cosine(steps)),
        schedule_by="step",
        out=args.out,
        resume=args.resume,
        ranks=args.ranks,
        log_every=None if tutorials else max(1, steps // (2 * RESTARTS)),
        about={"options": options},
        on_record=on_record,
    )
    return state.exit_code


# ---------------------------------------------------------------- the finished net


def draw(space, args, count=10):
    """pairs.png, walk.png, prior.png; and print how near the test images come back."""
    test = scaled(pictures_of(args, "test"), args)
    latents = space.encode(test)
    back = np.clip(space.decode(latents), test.min(), test.max())
    error = np.mean((back - test) ** 2) / (test.max() - test.min()) ** 2
    print(f"{space.shape[0]}x{space.shape[1]}x{space.shape[2]} = {np.prod(space.shape)} numbers for "
          f"{np.prod(space.image)}; mean squared error {error:.5f} on {len(test):,} test images")  # fmt: skip
    if args.kind == "codebook":
        net = space.autoencoder
        used = net.perplexity(net.indices(net.features(to_device(test[:1000]))))
        print(f"perplexity {used:.0f} of {args.codes} codes")

    def grid(images, name, rows, **options):
        plot.image_grid(images, args.out / name, rows=rows, low=test.min(), high=test.max(), **options)

    grid(np.concatenate([test[:count], back[:count]]), "pairs.png", 2, row_labels=["given", "back"],
         title="test images, through the latent and back")  # fmt: skip
    a, b, c = latents[[0, 1, 2]]
    steps = np.linspace(0, 1, 7)
    plane = np.stack([a + u * (b - a) + v * (c - a) for v in steps for u in steps])
    shares = [f"{share:.2g}" for share in steps]
    grid(space.decode(plane), "walk.png", len(steps), row_labels=shares, column_labels=shares,
         title="first test image, towards the second (across) and the third (down)")  # fmt: skip
    noise = to_host(Rng(args.seed).child("prior").normal((5 * count, *space.shape)))
    grid(space.decode(noise), "prior.png", 5, title="decoded noise of deviation 1")


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    add("--data", choices=["mnist", "glyphs", "scenes"], default="mnist", help="MNIST, or digits or scenes drawn here")
    common.add_data_dir(parser)
    add("--kind", choices=[*common.KINDS, "tutorial"], default="variational", help="of autoencoder")
    add("--latent", type=integer(1), default=2, metavar="N", help="channels of the latent")
    add("--levels", type=integer(1), default=1, metavar="N", help="resolutions, each half of the one before")
    add("--kl-weight", type=common.not_negative, default=1e-3, metavar="X", help="of the divergence; variational")
    add("--perceptual", type=common.not_negative, default=0.0, metavar="X",
        help="weight of the perceptual distance, in the features of the judge of 08_classifier.py")  # fmt: skip
    add("--codes", type=integer(2), default=256, metavar="N", help="of the codebook")
    add("--epochs", type=integer(1), metavar="N",
        help="rounds through the data (default: 5, of glyphs 15, of scenes 10; the tutorial's 50)")  # fmt: skip
    add("--batch-size", type=integer(1), metavar="N", help="images per step (default: 64, the tutorial's 2048)")
    common.add_training(parser, batch_size=None)
    add("--lr", type=common.positive, metavar="X", help="of Adam (default: 2e-3, the tutorial's 1e-3)")
    common.add_seed_and_out(parser, "09_autoencoder", "of the weights, the order of the data, the noise")
    add("--draw-only", action="store_true", help="no training: the pictures of the finished run in --out")
    args = common.parse(parser)
    tutorials = args.kind == "tutorial"
    if tutorials and args.data == "scenes":
        parser.error("--kind tutorial is for images of 28x28 with one channel, not for --data scenes")
    if tutorials and args.perceptual:
        parser.error("--perceptual is not for --kind tutorial: the judge sees [-1, 1], that net gives [0, 1]")
    args.epochs = args.epochs or (50 if tutorials else EPOCHS[args.data])
    args.batch_size = args.batch_size or (2048 if tutorials else 64)
    args.lr = args.lr or (1e-3 if tutorials else 2e-3)
    common.check_checkpoint(args, "--resume")
    return args


if __name__ == "__main__":
    common.run(main)
