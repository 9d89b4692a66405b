"""What is on an image? A small network that says it, to measure samples with, and how far it can be trusted.

    python examples/07_classifier.py                    digits, faces, sizes, ... of glyphs; some minutes, once
    python examples/07_classifier.py --data mnist       the digits of MNIST
    python examples/07_classifier.py --train 5000 --epochs 2              a worse one, in seconds

The classifier is kept in the cache, so a second run is quick. The table has its accuracy on images that it has not
learned from, attribute by attribute: what it says of samples is to be compared with that, not with 100 %. Then, for its
features, the scale of the Frechet distance: the floor is that of real images from other real images, the ceiling that
of noise. Both are for as many images as --samples, because the distance is too large with few.

mistakes.png has the images about which the classifier was most certain and wrong. Each row has the image, and at its
right the training image that is nearest to it, pixel by pixel.
"""

from __future__ import annotations

import sys

import common
import numpy as np

from tinydiff import data, plot
from tinydiff.metrics import conditional_accuracy, frechet_distance, frechet_scale, nearest, precision_recall
from tinydiff.models.classifier_training import glyphs_classifier, mnist_classifier, trained_classifier

TEST_SEED = 1_000_002  # of the glyphs that are asked about
GLYPHS_TESTED = 20_000


def main() -> int:
    args = arguments()
    train, wanted, names = images_of(args, "train")
    test, truth, _ = images_of(args, "test")
    classifier = build(args, train, wanted, names)
    seen = classifier.predict(test)
    print(f"{len(test)} images, {classifier.count():,} parameters\n\n| attribute | right | mistakes |\n|---|---|---|")
    for name, right in conditional_accuracy(seen.probabilities, truth).items():
        if name != "all" or len(truth) > 1:
            print(f"| {name} | {right} | {round(right.n * (1 - right.value))} |")
    scale_of_the_distance(args, classifier, train, test)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_mistakes(args.out / "mistakes.png", seen, truth, names, test, train)
    return 0


def build(args, images, labels, names):
    """The classifier, from the cache if it is there."""
    if args.train is None and args.epochs is None:  # the one that other programs take, too
        if args.data == "mnist":
            return mnist_classifier(args.data_dir, seed=args.seed)
        return glyphs_classifier(seed=args.seed)
    n, heads = args.train or len(images), {name: len(values) for name, values in names.items()}
    labels = {name: values[:n] for name, values in labels.items()}
    options = {} if args.epochs is None else {"epochs": args.epochs}
    return trained_classifier(images[:n], labels, heads, augment=args.data == "mnist", seed=args.seed, **options)


def images_of(args, split):
    """Images uint8 (n, 28, 28), their labels, and the names of the classes, for each attribute."""
    if args.data == "mnist":
        images, labels = common.mnist(args, split)
        return images, {"digit": labels}, {"digit": data.ATTRIBUTES["digit"]}
    drawn = data.glyphs(60_000, 1_000_001) if split == "train" else data.glyphs(GLYPHS_TESTED, TEST_SEED)
    return drawn.images, drawn.labels, data.ATTRIBUTES


def scale_of_the_distance(args, classifier, train, test):
    """Of real images and of noise, which every figure of samples lies between."""
    n = min(args.samples, len(test), len(train) // 2)
    images = (np.concatenate([train[:n], test[:n]]) / 127.5 - 1).astype(np.float32)[..., None]  # (2n, 28, 28, 1)
    features = lambda x: classifier.predict(x).features  # noqa: E731
    real, other = images[:n], images[n:]
    floor, ceiling = frechet_scale(features, real, other, args.seed)
    same = frechet_distance(features(train[n : 2 * n]), features(real))
    precision, recall = precision_recall(features(real), features(other))
    print(f"\nFrechet distance of {n} images from {n} training images: noise {ceiling:.4g}, test images {floor:.4g}, "
          f"other training images {same:.4g}")  # fmt: skip
    print(f"precision {precision}, recall {recall} of the test images")


def draw_mistakes(path, seen, truth, names, test, train, rows=16):
    """Those of which the classifier was most certain, over all attributes."""
    found = []
    for name, p in seen.probabilities.items():
        said = p.argmax(axis=1)
        for i in np.flatnonzero(said != truth[name]):
            found.append((float(p[i, said[i]]), int(i), name, names[name][truth[name][i]], names[name][said[i]]))
    worst = sorted(found, reverse=True)[:rows]
    print(f"\n{len(found)} mistakes")
    if not worst:
        return
    which = [i for _, i, *_ in worst]
    beside = nearest(test[which], train).which
    images = np.stack([test[which], train[beside]], axis=1).reshape(-1, 28, 28)  # (rows, 2, 28, 28) -> (2 rows, 28, 28)
    labels = [f"{right}, taken for {said}, {100 * p:.1f} %" for p, _, _, right, said in worst]
    plot.image_grid(images, path, rows=len(worst), row_labels=labels)
    print(path, file=sys.stderr)


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    common.add_data(parser, "glyphs")
    add("--train", type=integer(1), metavar="N", help="how many images to train on (default: 60000)")
    add("--epochs", type=integer(1), metavar="N", help="how often it sees them (default: as the library does)")
    add("--samples", type=integer(65), default=5000, metavar="N", help="images in each set that is compared")
    common.add_seed_and_out(parser, "07_classifier", "of the weights, the order of the data, the noise")
    return common.parse(parser)


if __name__ == "__main__":
    common.run(main)
