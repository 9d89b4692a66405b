"""Which method of sampling is better? A judge, a small network, learns to distinguish samples from real digits.

    python examples/03_score_unet.py                          trains the net whose samples are judged; over an hour
    python examples/05_judge.py                               then this takes some minutes, mostly for one method
    python examples/05_judge.py --samples 128                 a quick one
    python examples/05_judge.py --checkpoint runs/other/checkpoint.npz

The figure is the judge's cross-entropy, in nats, on images that it has not learned from: ln 2 = 0.693 if it cannot
distinguish the two kinds, 0 if it always can, so higher is better. It is a classifier two-sample test (Lopez-Paz and
Oquab 2017). Compare figures within one table only, because more samples make a better judge.

All methods get the same net (its averaged weights), initial noise, real images (of the test set, which the net has not
seen) and judges. Samples and real images are treated in the same way: clipped to [0, 1], rounded to the 256 greys of a
file, and given noise of standard deviation 0.5 before the judge sees them. Without this noise the judge would recognise
every sample by a grey of 1/255 in the black around a digit, and all figures would be 0. The last row has other real
images in place of samples, so it is the figure of a perfect method. It is a little above ln 2, because the judge is a
little overconfident.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import common
import numpy as np

from tinydiff import Rng, data, nn, no_grad, ops
from tinydiff.backend import to_device, to_host, xp
from tinydiff.data.batches import Batches
from tinydiff.diffusion import METHODS, VESDE, sample, steps_for
from tinydiff.microbatch import gradients, microbatch_size, over_microbatches
from tinydiff.models.tutorial import ScoreUNet
from tinydiff.optim import AdamW, cosine

# (method, evaluations of the net, options); the others are compared with the first.
CONTESTANTS = [
    ("euler_maruyama", 500, {}),
    ("euler_maruyama", 35, {}),
    ("heun", 35, {}),
    ("heun", 35, {"s_churn": 10.0}),  # as much as its algorithm allows, in 17 steps
    ("dpm_solver", 35, {}),
    ("ddim", 35, {}),
    ("ddpm", 35, {}),
]
SIGMA = 25.0  # of the process, as in 03_score_unet.py
FOLDS = 4
NOISE = 0.5  # on the images that the judge sees


def main() -> int:
    args = arguments()
    model, sde = build(args.checkpoint), VESDE(SIGMA)
    real, others = real_images(args)
    rows, first = [*CONTESTANTS, None], None
    print(f"| {args.samples} samples by | judge's loss, nats | above the first |\n|---|---|---|", flush=True)
    for row in rows:
        if row is None:
            label, images = "(other real images)", others
        else:
            label, images = samples_by(model, sde, *row, args)
        print(f"\r{label}: judging\033[K", end="", file=sys.stderr, flush=True)
        losses = np.mean(
            [held_out_losses(real, images, Rng(i).child("judge")) for i in range(args.judges)], axis=0
        )  # (N,)
        first = losses if first is None else first
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        # The real half of a pair is the same in all rows, so a difference is more certain than its two terms.
        print(f"| {label} | {mean(losses)} | {mean(losses - first)} |", flush=True)
    return 0


def mean(values):
    """The mean and its standard error, as text."""
    return f"{values.mean():.3f} +- {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


# ---------------------------------------------------------------- the judge


def new_judge(rng):
    """Images (N, 28, 28, 1) -> logits (N, 1, 1, 1) of the probability that they are real; 6,513 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, rng=rng),  # (N, 28, 28, 1) -> (N, 14, 14, 8)
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, rng=rng),  # -> (N, 7, 7, 16)
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, rng=rng),  # -> (N, 4, 4, 32)
        nn.GroupNorm(8, 32),
        nn.SiLU(),
        nn.Conv2d(32, 1, 4, rng=rng),  # -> (N, 1, 1, 1)
    )


def held_out_losses(real, fake, rng, steps=100):
    """The loss on pair i, a real and a fake image (N, 28, 28, 1), of a judge that learned from other pairs: the mean of
    its two cross-entropies, (N,), in nats.

    Each of FOLDS judges learns from the pairs of the other folds, so that every pair is judged once. The number of
    steps does not depend on N, and is so small that a judge does not memorise the pairs.
    Source: Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests", section 3, with the cross-entropy in
    place of the accuracy, because it also shows changes that do not change a decision.
    """
    losses = np.empty(len(real))
    for fold in range(FOLDS):
        held_out = np.arange(len(real)) % FOLDS == fold
        judge = trained_judge(real[~held_out], fake[~held_out], rng.child(fold), steps)
        with no_grad():
            of_pairs = pair_losses(judge, real[held_out], fake[held_out], rng.child(fold).child("held out"))
        losses[held_out] = to_host(of_pairs.data)
    return losses


def trained_judge(real, fake, rng, steps):
    judge = new_judge(rng.child("weights"))
    optimizer, schedule = AdamW(judge.parameters(), weight_decay=0.1), cosine(steps)
    order = Batches(len(real), 64, seed=rng.stream)

    def loss(real, fake, rng, sample_offset):
        return pair_losses(judge, real, fake, rng, sample_offset).mean()

    for step in range(steps):
        optimizer.lr = 1e-3 * schedule(step)
        rows = order.indices(step)
        optimizer.zero_grad()
        gradients(loss, optimizer.parameters, (real[rows], fake[rows]), rng.child(step))  # forward and backward
        optimizer.step()
    return judge


def pair_losses(judge, real, fake, rng, sample_offset=0):
    """Cross-entropies, each of a real image and a fake one: 2 x (N, 28, 28, 1) -> (N,)."""
    losses = []
    for images, is_real in ((real, 1.0), (fake, 0.0)):
        seen = to_device(images) + NOISE * rng.normal(images.shape, sample_offset=sample_offset)
        logits = judge(seen).reshape((-1,))  # (N, 28, 28, 1) -> (N, 1, 1, 1) -> (N,)
        target = xp.full(logits.shape, is_real, "float32")
        losses.append(ops.binary_cross_entropy_with_logits(logits, target, reduction="none"))
    return (losses[0] + losses[1]) / 2


# ---------------------------------------------------------------- the images that it judges


def samples_by(model, sde, name, evaluations, options, args):
    """The row's label, and its images (N, 28, 28, 1), made in microbatches."""
    n, method, steps = args.samples, METHODS[name](**options), steps_for(name, evaluations)
    label = ", ".join([f"{name}, {evaluations} evaluations", *(f"{key} {value:g}" for key, value in options.items())])

    def some(rows):
        shape = (rows.stop - rows.start, 28, 28, 1)
        rng = Rng(args.seed).child("samples")
        return to_host(sample(model, shape, sde, rng, method=method, steps=steps, sample_offset=rows.start))

    parts, done = [], 0
    for part in over_microbatches(some, n, microbatch_size(n)):
        parts.append(part)
        done += len(part)
        print(f"\r{label}: {done} of {n}", end="", file=sys.stderr, flush=True)
    return label, as_a_file_has_it(np.concatenate(parts))


def as_a_file_has_it(images):
    """Clipped to [0, 1], and rounded to 256 greys."""
    return (np.rint(np.clip(images, 0, 1) * 255) / 255).astype(np.float32)


def real_images(args):
    """Two disjoint sets of N images of the test set, chosen at random, because its second half is more difficult."""
    images = common.mnist(args, "test").images
    if len(images) < 2 * args.samples:
        sys.exit(f"--samples {args.samples} takes twice as many real images, but the test set has {len(images)}")
    order = Rng(args.seed).child("real").permutation(len(images))
    images = data.to_float(images[order[: 2 * args.samples]])  # (2N, 28, 28, 1) in [0, 1]
    return images[: args.samples], images[args.samples :]


def build(path):
    """The net of 03_score_unet.py with its averaged weights."""
    trained, ema = common.load_trained(path, "03_score_unet.py")
    if type(trained.model) is not ScoreUNet or ema is None:
        sys.exit(f"{path} is not a checkpoint of examples/03_score_unet.py: it has no such net, or no average")
    ema.copy_to(trained.model)
    return trained.model


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    add("--checkpoint", type=common.file, default=Path("runs/03_score_unet/checkpoint.npz"), metavar="FILE",
        help="of examples/03_score_unet.py")  # fmt: skip
    common.add_data_dir(parser)
    add("--samples", type=integer(2 * FOLDS), default=512, metavar="N", help="of each method")
    add("--judges", type=integer(1), default=3, metavar="N", help="seeds of the judge, averaged over")
    add("--seed", type=common.seed, default=0, metavar="N", help="of the samples and the choice of real images")
    return common.parse(parser)


if __name__ == "__main__":
    common.run(main)
