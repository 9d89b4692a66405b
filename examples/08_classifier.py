"""The judge of samples: a classifier of digits and their attributes, trained here, and what its figures mean.

    python examples/08_classifier.py                    MNIST: which digit is it?
    python examples/08_classifier.py --data glyphs      digits drawn here: also face, weight, size, slant and place

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

from tinydiff import Rng, plot
from tinydiff.backend import to_host
from tinydiff.metrics import accuracy, frechet_distance, precision_recall


def main() -> int:
    args = arguments()
    judge = common.trained_judge(args)
    images, labels = common.pictures_for_judge(args, "test")
    found, features = common.judged(judge, images)
    print(f"| {len(images):,} test pictures of {args.data} | right |\n|---|---|")
    for name in labels:
        print(f"| {name} | {accuracy(found[name], labels[name])} |")
    if len(labels) > 1:
        both = (np.stack([each[name] for name in labels], axis=1) for each in (found, labels))
        print(f"| all of them | {accuracy(*both)} |")
    half = len(images) // 2
    features = features[Rng(0).permutation(len(images))]  # the second half of MNIST's test set is the easier one
    noise = np.clip(to_host(Rng(0).normal((half, 28, 28, 1))), -1, 1)
    _, of_noise = common.judged(judge, noise)
    floor, ceiling = (frechet_distance(features[:half], other) for other in (features[half:], of_noise))
    print(f"\nFrechet distance of {half:,} pictures: {floor:.3f} to other real ones, {ceiling:.1f} to noise")
    few = slice(0, min(half, 2000))
    precision, recall = precision_recall(features[:half][few], features[half:][few])
    print(f"precision {precision}, recall {recall}, of real pictures among other real ones")
    draw_mistakes(images, labels, found, args)
    return 0


def draw_mistakes(images, labels, found, args, most=12):
    """mistakes.png: a row for each picture whose attributes are wrong, those with most mistakes first."""
    wrong = np.sum([found[name] != labels[name] for name in labels], axis=0)  # (N,)
    worst = np.argsort(-wrong, kind="stable")[: min(most, int((wrong > 0).sum()))]
    if not len(worst):
        return
    texts = []
    for i in worst:
        pairs = [[common.word(name, each[name][i]) for each in (labels, found)] for name in labels]
        texts.append(", ".join(f"{true} taken for {other}" for true, other in pairs if true != other))
    plot.image_grid(images[worst], args.out / "mistakes.png", rows=len(worst), row_labels=texts, low=-1, high=1)
    print(f"{args.out / 'mistakes.png'}", file=sys.stderr)


def arguments():
    parser = common.parser(__doc__)
    common.add_data(parser, "mnist")
    common.add_seed_and_out(parser, "08_classifier")
    args = common.parse(parser)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    common.run(main)
