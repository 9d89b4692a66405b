"""Words become a picture: a U-Net that attends to the words of a prompt, trained on this machine.

    python examples/text_to_image.py "a small bold seven leaning left"     trains once, about 15 minutes; then paints
    python examples/text_to_image.py "a heavy zero" "a serif two"          a row of pictures for each prompt
    python examples/text_to_image.py "a seven" --negative "bold"           away from these words
    python examples/text_to_image.py "a bold six" --sweep 0 0.5 1 2 4      a row for each weight of guidance
    python examples/text_to_image.py "a bold six" --maps                   where the pixels look for each word
    python examples/text_to_image.py --judge 1000                          how often is the picture what was asked for?
    python examples/text_to_image.py --resume                              go on with a run that was interrupted
    TINYDIFF_BACKEND=cupy python examples/text_to_image.py "a bold six"    on a GPU

The pictures to learn from are digits in matplotlib's fonts, with captions such as "a small bold serif seven leaning
left, at the top right" (data/glyphs.py). One in ten of the distinct captions is held out: those combinations of words
are not in the training set, so a prompt with one of them shows whether the words are understood one by one.

A small transformer makes a vector of each word (models/text.py), trained together with the U-Net, whose pixels attend
to the words. In training one caption in ten is left out, so that sampling can strengthen what the words do (guidance).
The directory of the run (runs/text_to_image) gets samples.png, words.png (the cosines between the vectors of the
words), loss.png, log.jsonl and checkpoint.npz, and model.npz when the training is finished, which has the vocabulary.

maps.png has a row for each word of the first prompt: how much the pixels attend to it, from the first steps to the
last, and the picture. --judge prints how often a classifier (08_classifier.py) finds what the prompt asked for, for
captions of the training set and for those that were held out; and how like real pictures the samples are as a set
(metrics.py). A row of real pictures and one of noise are the best and the worst that there can be.
"""

from __future__ import annotations

import sys
import time

import common
import numpy as np

from tinydiff import Rng, data, plot, saving
from tinydiff.backend import to_host
from tinydiff.data import hold_out
from tinydiff.diffusion import Denoiser, Guided, KarrasSDE, edm_loss, sample
from tinydiff.metrics import conditional_accuracy, copied, frechet_distance, nearest, precision_recall
from tinydiff.models.attention_maps import attention_maps
from tinydiff.models.text import TextEncoder, TextToImage, Tokenizer, drop_prompts, split
from tinydiff.models.unet import UNet
from tinydiff.optim import EMA, Adam, cosine, warmup
from tinydiff.training import train

HELD_OUT = 0.1  # of the distinct captions
WIDTH = 96  # of the vectors of the words
CAPTION_DROPOUT = 0.1  # how often the words are left out in training
PREVIEW = ["a seven", "a small bold serif three", "a heavy mono zero leaning left", "a large five, at the top right"]


def main() -> int:
    args = arguments()
    path = args.out / "model.npz"
    if not path.exists():
        if (args.out / "checkpoint.npz").exists() and not args.resume:
            sys.exit(f"the training in {args.out} was not finished: --resume goes on, or choose another --out")
        if not trained(args, path):
            return 130  # as a shell reports an interrupted program
    denoiser, tokenizer, ema, captions = load(path)
    check_prompts(tokenizer, args)
    with ema.applied():
        if args.judge:
            judge_samples(denoiser, tokenizer, captions, args)
            return 0
        paint(denoiser, tokenizer, args.prompts or PREVIEW, args, args.steps)
        draw_words(denoiser, tokenizer, args)
        if args.maps:
            draw_maps(denoiser, tokenizer, (args.prompts or PREVIEW)[0], args)
    return 0


def check_prompts(tokenizer, args):
    """End the program if the prompts have words that are not known, or too many."""
    try:
        tokenizer.encode([*args.prompts, args.negative])
    except ValueError as error:
        sys.exit(str(error))


def trained(args, path):
    """Train, and leave the model. Was it finished?"""
    glyphs = data.glyphs(args.drawn, args.seed)
    seen = ~hold_out(glyphs.captions, HELD_OUT)
    tokenizer = Tokenizer.fit(glyphs.captions)
    check_prompts(tokenizer, args)  # now, and not after the training
    images = data.to_float(glyphs.images[seen], -1, 1)  # (n, 28, 28, 1)
    tokens = tokenizer.encode([caption for caption, kept in zip(glyphs.captions, seen) if kept])  # (n, L)
    denoiser, ema = new_model(tokenizer, args.channels, float(images.std()), args.seed)

    def loss(x0, tokens, rng, sample_offset):
        tokens = drop_prompts(tokens, CAPTION_DROPOUT, rng, sample_offset=sample_offset)
        return edm_loss(denoiser, x0, rng, sample_offset=sample_offset, tokens=tokens)

    def pictures(state):
        plot.loss_curve(state.records, args.out / "loss.png", x="step", title="EDM loss on captioned glyphs")
        if state.step % 1000 == 0:  # a preview, with few steps
            with ema.applied():
                paint(denoiser, tokenizer, PREVIEW, args, steps=min(args.steps, 7))

    epochs = max(1, round(args.images / len(images)))
    steps = epochs * -(-len(images) // args.batch_size)
    print(f"{denoiser.count():,} parameters, {len(tokenizer.words)} words, {len(images):,} pictures, "
          f"{len(seen) - len(images):,} held out; pictures go to {args.out}", file=sys.stderr)  # fmt: skip
    state = train(
        denoiser,
        loss,
        (images, tokens),
        Adam(denoiser.parameters(), lr=args.lr),
        epochs=epochs,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        threads=args.threads,
        seed=args.seed,
        schedule=warmup(200, cosine(steps)),
        schedule_by="step",
        ema=ema,
        out=args.out,
        resume=args.resume,
        log_every=100,
        save_every=500,
        on_record=pictures,
    )
    if state.finished:
        settings = {"channels": args.channels, "drawn": args.drawn, "seed": args.seed}
        saving.save(path, {"model": denoiser.state_dict(), "ema": ema.state_dict(), "settings": settings})
    return state.finished


def new_model(tokenizer, channels, sigma_data, seed):
    rng = Rng(seed).child("model")
    encoder = TextEncoder(tokenizer.size, tokenizer.length, WIDTH, rng=rng)
    net = TextToImage(encoder, UNet(1, channels, context=WIDTH, rng=rng), tokenizer)
    denoiser = Denoiser(net, sigma_data)
    return denoiser, EMA(denoiser, 0.998)


def load(path):
    """The trained model, its tokenizer, the average of its weights, and how many captions of which seed it has seen."""
    state = common.checkpoint_of(path, "text_to_image.py")
    try:
        settings = state["settings"]
        tokenizer = Tokenizer.from_array(state["model"]["net.vocabulary"])
        denoiser, ema = new_model(tokenizer, settings["channels"], 1.0, 0)
        denoiser.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
    except (LookupError, TypeError, ValueError) as error:
        sys.exit(f"{path} is no model of this example: {error!r}")
    return denoiser, tokenizer, ema, (settings["drawn"], settings["seed"])


def paint(denoiser, tokenizer, prompts, args, steps):
    """samples.png: a row for each prompt, or, of one prompt with --sweep, for each weight."""
    began = time.monotonic()
    tokens = np.repeat(tokenizer.encode(prompts), args.samples, axis=0)  # (prompts * samples, L)
    rows = [samples_of(denoiser, tokenizer, tokens, weight, args, steps) for weight in args.sweep or [args.guidance]]
    labels = prompts if not args.sweep else [f"{p}, {w:g}" for w in args.sweep for p in prompts]
    plot.image_grid(np.concatenate(rows), args.out / "samples.png", rows=len(labels), row_labels=labels, low=-1, high=1)
    print(f"\n{args.out / 'samples.png'} painted in {time.monotonic() - began:.0f} s", file=sys.stderr)


def samples_of(denoiser, tokenizer, tokens, weight, args, steps):
    """A picture for each row of tokens (N, L), by guidance with that weight: (N, 28, 28, 1) in [-1, 1], about."""
    negative = denoiser.net.encode(tokenizer.encode(args.negative))
    model = Guided(denoiser, weight, negative=negative, interval=args.interval)
    rng = Rng(args.seed).child("samples")
    x = sample(model, (len(tokens), 28, 28, 1), KarrasSDE(), rng, method="heun", steps=steps, eps=0.002, microbatch=20,
               **denoiser.net.encode(tokens))  # fmt: skip
    return to_host(x)


def judge_samples(denoiser, tokenizer, captions, args):
    """Print how good samples are, by weight of guidance, for captions that were seen and held out: between new real
    pictures of the same captions, which are as good as samples can be, and noise."""
    judge, drawn = common.trained_judge(args), data.glyphs(*captions)
    held = hold_out(drawn.captions, HELD_OUT)
    training = data.to_float(drawn.images[~held], -1, 1)
    pictures, labels = common.pictures_for_judge(args, "test")
    _, features = judge.predict(pictures)
    print(f"| shares in % | {' | '.join(labels)} | all | Frechet distance | precision | recall | copies |")
    print(f"|---|{'---|' * (len(labels) + 5)}")
    shown = list(zip(*labels.values()))  # the values of all attributes, for each test picture
    for kind, which in (("seen", ~held), ("held out", held)):
        caption = dict(zip(zip(*(v[which] for v in drawn.labels.values())), np.array(drawn.captions)[which]))
        rows = np.array([i for i, values in enumerate(shown) if values in caption])
        rows = rows[Rng(args.seed).child("judged").permutation(len(rows))][: args.judge]
        wanted = {name: values[rows] for name, values in labels.items()}
        tokens = tokenizer.encode([caption[shown[i]] for i in rows])
        sets = {"real": pictures[rows]}
        for weight in args.sweep or [0.0, args.guidance]:
            samples = samples_of(denoiser, tokenizer, tokens, weight, args, args.steps)
            sets[f"guidance {weight:g}"] = np.clip(samples, -1, 1)
        sets["noise"] = np.clip(to_host(Rng(args.seed).normal(pictures[rows].shape)), -1, 1)
        others, distances = np.delete(features, rows, axis=0), {}
        for name, images in sets.items():
            found, seen = judge.predict(images)
            _, distances[name] = nearest(images, training)
            right, among = conditional_accuracy(found, wanted).values(), precision_recall(others, seen)
            copies = copied(distances[name], distances["real"])
            cells = [f"{100 * share.value:.1f} +- {100 * share.error:.1f}" for share in (*right, *among, copies)]
            cells.insert(len(right), f"{frechet_distance(seen, others):.1f}")
            print(f"| {name}, {len(rows):,} captions {kind} | {' | '.join(cells)} |", flush=True)


def draw_maps(denoiser, tokenizer, prompt, args, columns=6):
    """maps.png: a row for each word; its share of the attention of each pixel, at some of the passes, and the
    picture. White is the largest share in the row."""
    rng, words = Rng(args.seed).child("samples"), split(prompt)
    with attention_maps(denoiser) as maps:
        x = sample(denoiser, (1, 28, 28, 1), KarrasSDE(), rng, method="heun", steps=args.steps, eps=0.002,
                   **denoiser.net.encode(tokenizer.encode(prompt)))  # fmt: skip
    weights = np.stack(
        [np.stack([to_host(w)[0] for w in passes]) for passes in maps.values()]
    )  # (layers, passes, P, S)
    passes = np.linspace(0, weights.shape[1] - 1, columns).round().astype(int)
    side = round(weights.shape[2] ** 0.5)
    shares = weights.mean(axis=0)[passes].reshape(columns, side, side, -1)  # (columns, h, w, S)
    rows = []
    for i in range(len(words)):
        share = shares[..., i] / shares[..., i].max()
        large = np.kron(share, np.ones((1, 28 // side, 28 // side)))  # (columns, 28, 28)
        rows += [*(2 * large[..., None] - 1), to_host(x)[0]]
    plot.image_grid(np.stack(rows), args.out / "maps.png", rows=len(words), row_labels=words, low=-1, high=1)
    print(f"{args.out / 'maps.png'}", file=sys.stderr)


def draw_words(denoiser, tokenizer, args):
    """words.png: the cosine of the angle between the vectors of two words, for each pair."""
    vectors = to_host(denoiser.net.encoder.embedding.weight.data)[1:]  # (words, width)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    plot.matrix(vectors @ vectors.T, args.out / "words.png", labels=tokenizer.words, low=-1, high=1,
                title="cosines between the vectors of the words")  # fmt: skip


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    add("prompts", nargs="*", metavar="PROMPT", help="what to paint")
    add("--samples", type=integer(1), default=10, metavar="N", help="pictures for each prompt")
    add("--guidance", type=common.finite, default=1.0, metavar="X", help="how far to push towards the words")
    add("--interval", type=common.positive, nargs=2, default=None, metavar=("LOW", "HIGH"),
        help="the noise levels between which to push (default: all)")  # fmt: skip
    add("--sweep", type=common.finite, nargs="+", metavar="X", help="a row for each of these weights of guidance")
    add("--negative", default="", metavar="PROMPT", help="what to push away from, in place of no words")
    add("--maps", action="store_true", help="draw maps.png, where the pixels look for each word of the first prompt")
    add("--judge", type=integer(4), metavar="N", help="judge N samples for each weight, in place of painting")
    add("--steps", type=integer(1), default=17, metavar="N",
        help="steps of Heun's method, which are 2 N + 1 evaluations")  # fmt: skip
    add("--drawn", type=integer(100), default=60_000, metavar="N", help="pictures to draw for the training")
    add("--images", type=integer(1), default=500_000, metavar="N", help="images to learn from, in whole rounds")
    add("--channels", type=integer(8, multiple_of=8), nargs="+", default=[32, 64], metavar="N",
        help="of the U-Net, from fine to coarse, multiples of 8")  # fmt: skip
    common.add_training(parser, batch_size=128)
    add("--lr", type=common.positive, default=1.5e-3, metavar="X", help="of Adam, after a warm-up, before a cosine")
    common.add_seed_and_out(parser, "text_to_image")
    args = common.parse(parser)
    args.data = "glyphs"
    common.check_channels(parser, args.channels)
    common.check_checkpoint(args, "--resume")
    return args


if __name__ == "__main__":
    common.run(main)
