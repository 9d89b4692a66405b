"""The judge of samples: a classifier of digits and their attributes, trained here, and what its figures mean.

    python examples/08_classifier.py                    MNIST: which digit is it?
    python examples/08_classifier.py --data glyphs      digits drawn here: also face, weight, size, slant and place
    python examples/08_classifier.py --data scenes      two shapes in colour: their kinds, colours, sizes, and layout

It is trained once, in less than three minutes on two cores, and kept in the cache for all examples that judge samples
(text_to_image.py --judge). Then it is tried on the test set, which it has not seen: how often it is right is the most
that a perfect generator could reach. Its features give the Frechet distance of two sets of pictures; printed are the
floor, real pictures against other real ones, and the ceiling, noise. The directory of the run gets mistakes.png, the
pictures of the test set that it is most wrong about.
"""

from __future__ import annotations

import sys

import common
import numpy as np

from tinydiff import Rng, data, plot, saving
from tinydiff.backend import to_host
from tinydiff.data.glyphs import ATTRIBUTES
from tinydiff.data.scenes import SCENE
from tinydiff.metrics import conditional_accuracy, frechet_distance, precision_recall
from tinydiff.models.classifier import judge_loss, shifted
from tinydiff.optim import AdamW, cosine, warmup
from tinydiff.training import train

EPOCHS, BATCH = 4, 128
VALUES = ATTRIBUTES | SCENE  # of each attribute


def main() -> int:
    args = arguments()
    judge, images, labels, path = common.new_judge(args)
    if args.again or not common.agreed(args, common.load_judge(judge, path, args)):
        if code := trained(judge, images, labels, args):
            return code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
        if args.ranks.rank == 0:
            keep(judge, path)
    if args.ranks.rank:
        return 0
    images, labels = common.pictures_for_judge(args, "test")
    images = data.to_float(images, -1, 1)
    found, features = judge.predict(images)
    print(f"| {len(images):,} test pictures of {args.data} | right |\n|---|---|")
    for name, right in conditional_accuracy(found, labels).items():
        print(f"| {name} | {right} |")
    half = len(images) // 2
    features = features[Rng(0).permutation(len(images))]  # the second half of MNIST's test set is the easier one
    _, of_noise = judge.predict(np.clip(to_host(Rng(0).normal((half, *images.shape[1:]))), -1, 1))
    floor, ceiling = (frechet_distance(features[:half], other) for other in (features[half:], of_noise))
    print(f"\nFrechet distance of {half:,} pictures: {floor:.3f} to other real ones, {ceiling:.1f} to noise")
    few = slice(0, min(half, 2000))
    precision, recall = precision_recall(features[:half][few], features[half:][few])
    print(f"precision {precision}, recall {recall}, of real pictures among other real ones")
    draw_mistakes(images, labels, found, args)
    return 0


def trained(judge, images, labels, args):
    """Train the judge. The exit code: 0 if it was finished."""
    most = 2 if args.data == "mnist" else 0  # a place is an attribute of the others, so all stays where it is
    print(f"training a judge for {args.data}: {judge.count():,} parameters, {len(images):,} pictures", file=sys.stderr)

    def loss(x, *values, rng, sample_offset):
        x = data.to_float(x, -1, 1)
        x = shifted(x, most, rng, sample_offset) if most else x
        return judge_loss(judge, x, dict(zip(labels, values)))

    state = train(
        judge,
        loss,
        (images, *labels.values()),
        AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02),
        epochs=EPOCHS,
        batch_size=BATCH,
        schedule=warmup(100, cosine(EPOCHS * -(-len(images) // BATCH))),
        schedule_by="step",
        seed=args.seed,
        ranks=args.ranks,
    )
    return state.exit_code


def keep(judge, path):
    """For the next run. That it cannot be kept is no reason to lose what was trained for minutes."""
    try:
        saving.save(path, judge.state_dict())
    except OSError as error:
        print(f"the judge is not kept ({error}): set XDG_CACHE_HOME to a directory of yours", file=sys.stderr)


def draw_mistakes(images, labels, found, args, most=12):
    """mistakes.png: a row for each picture whose attributes are wrong, those with most mistakes first."""
    wrong = np.sum([found[name] != labels[name] for name in labels], axis=0)  # (N,)
    worst = np.argsort(-wrong, kind="stable")[: min(most, int((wrong > 0).sum()))]
    if not len(worst):
        return
    texts = []
    for i in worst:
        pairs = [[VALUES[name][each[name][i]] for each in (labels, found)] for name in labels]
        texts.append(", ".join(f"{true} taken for {other}" for true, other in pairs if true != other))
    plot.image_grid(images[worst], args.out / "mistakes.png", rows=len(worst), row_labels=texts, low=-1, high=1)
    print(f"{args.out / 'mistakes.png'}", file=sys.stderr)


def arguments():
    parser = common.parser(__doc__)
    common.add_data(parser, "mnist", scenes=True)
    parser.add_argument("--again", action="store_true", help="train the judge anew")
    common.add_parallel(parser)
    common.add_seed_and_out(parser, "08_classifier", "of the order of the data")
    args = common.parse(parser)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    common.run(main)
