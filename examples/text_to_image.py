"""Words become a picture: a U-Net that attends to the words of a prompt, trained on this machine.

    python examples/text_to_image.py "a small bold seven leaning left"     trains once, about 15 minutes; then paints
    python examples/text_to_image.py "a heavy zero" "a serif two"          a row of pictures for each prompt
    python examples/text_to_image.py "a seven" --negative "bold"           away from these words
    python examples/text_to_image.py "a bold six" --sweep 0 0.5 1 2 4      a row for each weight of guidance
    python examples/text_to_image.py "a bold six" --maps                   where the pixels look for each word
    python examples/text_to_image.py --data pets --size 64 "a cat"         your own pictures, in a folder of their own
    python examples/text_to_image.py --data mnist "a seven"                handwritten digits
    python examples/text_to_image.py --judge 1000                          how often is the picture what was asked for?
    python examples/text_to_image.py --resume                              go on with a run that was interrupted
    TINYDIFF_BACKEND=cupy python examples/text_to_image.py "a bold six"    on a GPU

The pictures to learn from are digits in matplotlib's fonts, with captions such as "a small bold serif seven leaning
left, at the top right" (data/glyphs.py). One in ten of the distinct captions is held out: those combinations of words
are not in the training set, so a prompt with one of them shows whether the words are understood one by one. With
--data mnist they are handwritten, "a seven"; with --data FOLDER they are your own, in colour or grey, and their
captions are in a table, in text files, or the names of folders (docs/own_pictures.md). Of these, one picture in ten is
held out. The loss on what is held out is in the log as "validation", always with the averaged weights.

A small transformer makes a vector of each word (models/text.py), trained together with the U-Net, which hears the mean
of the words in each block, and whose pixels attend to them one by one. In training one caption in ten is left out, so
that sampling can strengthen what the words do (guidance). The directory of the run (runs/text_to_image) gets
samples.png, words.png (the cosines between the vectors of the words), loss.png, log.jsonl and checkpoint.npz, and, when
the training is finished, model.npz, which has the vocabulary and is all that painting needs.

maps.png has a row for each word of the first prompt: how much the pixels attend to it, from the first steps to the
last, and the picture. --judge prints how often a classifier (08_classifier.py) finds what the prompt asked for, for
captions of the training set and for those that were held out; and how like real pictures the samples are as a set
(metrics.py). A row of real pictures and one of noise say what is good and what is bad.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np

from tinydiff import Rng, data, plot, saving
from tinydiff.backend import to_host
from tinydiff.commands import as_options
from tinydiff.data import ATTRIBUTES, hold_out, validation_mask
from tinydiff.diffusion import Denoiser, Guided, KarrasSDE, edm_loss, sample
from tinydiff.metrics import conditional_accuracy, copied, frechet_distance, nearest, precision_recall
from tinydiff.models.attention_maps import attention_maps
from tinydiff.models.text import TextEncoder, TextToImage, Tokenizer, drop_prompts, split
from tinydiff.models.unet import UNet
from tinydiff.optim import EMA, Adam, cosine, warmup
from tinydiff.trained import Trained, noise_of
from tinydiff.training import train

DRAWN = {"glyphs": 60_000, "scenes": 20_000}  # pictures to learn from, unless --drawn says so
DRAWN_OR_READ = (*DRAWN, "mnist")  # what --data may be, beside a folder
READING = ("size", "captions", "classes", "encoding", "skip_broken")  # options of a folder, which `eval` needs too
HELD_OUT = 0.1  # of the distinct captions of glyphs, the combinations of scenes, the pictures of other data
VALIDATED = 512  # pictures and noises in the validation loss
# Mean and standard deviation of ln sigma in training. Karras et al. have -1.2 and 1.2, for pictures without words. But
# what a picture shows, and so what most of its words mean, is decided at high noise levels; a thin line, and so the
# face of a digit, at low ones. Hence a wide distribution around 0.
NOISE = 0.0, 1.6
WIDTH = 96  # of the vectors of the words
CAPTION_DROPOUT = 0.1  # how often the words are left out in training
SAMPLERS = {"heun": 17, "dpm_solver": 34, "ddim": 34, "ddpm": 100}  # and their steps; the last adds noise on the way
WORK = 430_000  # images of 28x28 to learn from, unless --images says so; of larger ones fewer, for the same time
PREVIEW = ["a seven", "a small bold serif three", "a heavy mono zero leaning left", "a large five, at the top right"]


def main() -> int:
    args = arguments()
    path = args.out / "model.npz"
    as_begun(args, path)
    trained_before = common.agreed(args, path.exists())
    if not trained_before:
        if (args.out / "checkpoint.npz").exists() and not args.resume:
            sys.exit(f"the training in {args.out} was not finished: --resume goes on, or choose another --out")
        if args.judge:
            common.trained_judge(args)  # there is one: else the program ends now, and not after the training
        if code := trained(args, path):
            return code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
    if args.ranks.rank:
        return 0
    denoiser, tokenizer, ema = load(path, args)
    if trained_before:
        common.say_which(path)
    prompts = args.prompts or args.preview
    check_prompts(tokenizer, args)
    with ema.applied():
        if args.judge:
            judge_samples(
                lambda tokens, weight: samples_of(denoiser, tokenizer, tokens, weight, args, args.steps),
                tokenizer,
                args,
            )
            return 0
        paint(denoiser, tokenizer, prompts, args, args.steps)
        draw_words(denoiser, tokenizer, prompts, args)
        if args.maps:
            draw_maps(denoiser, tokenizer, prompts[0], args)
    return 0


def as_begun(args, path):
    """With --resume: the data with which the run began, and how a folder was read, unless they are given. Says so if
    there is nothing to go on with, as the model is finished; ends the program if other data are given."""
    if not args.resume:
        return
    if path.exists():
        print(f"the training in {args.out} is finished, so there is nothing to resume", file=sys.stderr)
        return
    began = [args.out / part / "checkpoint.npz" for part in ("", *reversed(args.parts))]  # the last part first
    began = next(path for path in began if path.exists())
    try:
        kept = saving.load(began)["about"]["data"]
        name = kept["name"]
    except (LookupError, OSError, TypeError, ValueError):
        return  # train says what is wrong
    if args.data_was_given and args.data != name:
        sys.exit(f"{began} has learned from {name}, not from {args.data}: give that by --data, or another --out")
    args.data = name
    if args.data not in DRAWN_OR_READ:
        for option in READING:
            setattr(args, option, getattr(args, option) or kept.get(option))  # older checkpoints have the size alone


def check_prompts(tokenizer, args):
    """End the program if the prompts have words that are not known, or too many."""
    try:
        tokenizer.encode([*args.prompts, args.negative])
    except ValueError as error:
        sys.exit(str(error))


# ---------------------------------------------------------------- what to learn from


class Captioned(NamedTuple):
    images: np.ndarray  # uint8 (N, H, W, C)
    captions: list[str]
    held: np.ndarray  # bool (N,): not learned from, but for the validation loss
    labels: dict[str, np.ndarray]  # what a judge can look for, {attribute: (N,)}


def captioned(args):
    """The pictures of --data. Ends the program if they cannot be used."""
    args.drawn = args.drawn or DRAWN.get(args.data)
    if args.data == "glyphs":
        glyphs = data.glyphs(args.drawn, args.training_seed)
        return Captioned(glyphs.images[..., None], glyphs.captions, hold_out(glyphs.captions, HELD_OUT), glyphs.labels)
    if args.data == "scenes":
        scenes = data.scenes(args.drawn, args.training_seed)
        return Captioned(scenes.images, scenes.captions, hold_out(scenes.combinations, HELD_OUT), scenes.labels)
    if args.data == "mnist":
        digits = common.mnist(args)
        captions = [f"a {ATTRIBUTES['digit'][digit]}" for digit in digits.labels]
        held = one_in_ten([str(i) for i in range(len(captions))])
        return Captioned(digits.images[..., None], captions, held, {"digit": digits.labels.astype("int64")})
    try:
        pictures = data.folder(args.data, size=args.size, captions=args.captions, classes=args.classes,
                               encoding=args.encoding or "utf-8",
                               on_error="skip" if args.skip_broken else "raise")  # fmt: skip
    except (OSError, ValueError) as error:
        sys.exit(as_options(str(error).replace(", or captions=False if there are none", "")))
    if not any(pictures.captions):
        sys.exit(f"the pictures in {args.data} have no captions: docs/own_pictures.md says how to give them")
    return Captioned(pictures.images, pictures.captions, one_in_ten(pictures.files), {})


def one_in_ten(names):
    """Which pictures are for validation, bool (N,): one at least."""
    if len(names) < 2:
        sys.exit("there must be two pictures or more: one to learn from, one to see what was learned")
    try:
        return validation_mask(names, HELD_OUT)
    except ValueError:  # so few that the hash chose none of them
        return np.arange(len(names)) == 0


NO_JUDGE = "no judge knows what is in your own pictures: --judge is for --data glyphs, scenes and mnist"


def some_of(captions, most=4):
    """Different captions from all over the data, for previews."""
    different = [caption for caption in dict.fromkeys(captions) if caption]
    return [different[i] for i in np.unique(np.linspace(0, len(different) - 1, most).round().astype(int))]


# ---------------------------------------------------------------- the training


def trained(args, path):
    """Train, and leave the model. The exit code: 0 if it was finished."""
    if args.data_dir and args.data != "mnist":
        sys.exit("--data-dir is read with --data mnist only")
    images, captions, held, _ = captioned(args)
    tokenizer = Tokenizer.fit(captions)
    check_prompts(tokenizer, args)  # now, and not after the training
    args.shape, args.preview = list(images.shape[1:]), PREVIEW if args.data == "glyphs" else some_of(captions)
    args.channels = args.channels or ([32, 64] if max(args.shape) <= 32 else [32, 64, 96])
    check_shape(args.shape, args.channels, 2)
    tokens = tokenizer.encode(captions)  # (N, L)
    held_out = images[held], tokens[held]
    images, tokens = images[~held], tokens[~held]  # (n, H, W, C) of bytes, (n, L)
    some = images[:: max(1, len(images) // 10_000)]
    denoiser, ema = new_model(tokenizer, args, float(data.to_float(some, -1, 1).std()))
    choose_noise(args)
    about = Trained(
        denoiser, KarrasSDE(), args.shape, null=True, eps=0.002, noise=args.noise, data=source_of(args)
    ).about()
    if args.resume:
        check_resumed(args.out / "checkpoint.npz", denoiser, tokenizer)

    def loss(x0, tokens, rng, sample_offset):
        if denoiser.training:
            tokens = drop_prompts(tokens, CAPTION_DROPOUT, rng, sample_offset=sample_offset)
        return loss_of(denoiser, x0, tokens, rng, sample_offset, args.noise)

    def pictures(state):
        if state.step % 1000 == 0:  # a preview, with few steps
            with ema.applied():
                paint(denoiser, tokenizer, args.preview, args, steps=min(args.steps, 7))
        plot.loss_curve(
            state.records,
            args.out / "loss.png",
            x="step",
            title=f"EDM loss, {Path(args.data).name}",
            validation_label="validation, averaged weights",
        )

    wanted = args.images or WORK * 28**2 / np.prod(args.shape[:2])
    epochs = max(1, round(wanted / len(images)))
    if args.images and args.images < len(images):
        print(f"--images {args.images:,} is less than a round: all {len(images):,} pictures are taken", file=sys.stderr)
    steps = epochs * -(-len(images) // args.batch_size)
    print(f"{denoiser.count():,} parameters, {len(tokenizer.words)} words, {len(images):,} pictures, "
          f"{len(held_out[0]):,} held out; pictures go to {args.out}", file=sys.stderr)  # fmt: skip
    state = train(
        denoiser,
        loss,
        (images, tokens),
        Adam(denoiser.parameters(), lr=args.lr),
        epochs=epochs,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        threads=args.threads,
        validation=for_validation(held_out, args.seed),
        seed=args.seed,
        schedule=warmup(min(200, -(-steps // 10)), cosine(steps)),
        schedule_by="step",
        ema=ema,
        out=args.out,
        resume=args.resume,
        ranks=args.ranks,
        log_every=100,
        save_every=500,
        about=about,
        on_record=pictures,
    )
    if state.finished and not args.ranks.rank:
        settings = {name: getattr(args, name) for name in SETTINGS}
        parts = {"model": denoiser.state_dict(), "ema": ema.state_dict(), "about": about}
        saving.save(path, {**parts, "settings": settings})
        print(f"validation loss {state.records[-1]['validation']:.4g}", file=sys.stderr)
    return state.exit_code


def source_of(args):
    """What a checkpoint says of the pictures that it has learned from."""
    reading = {option: getattr(args, option) for option in READING}
    return {"name": args.data, "seed": args.training_seed, **reading, "size": args.shape[:2]}


def check_resumed(path, denoiser, tokenizer):
    """End the program if the checkpoint is of other words, whose numbers would take on another meaning, or of pictures
    of another size or content. Everything else is compared by `train`."""
    try:
        learned = saving.load(path)["model"]
        words, std = Tokenizer.from_array(learned["net.vocabulary"]), float(learned["data_std"])
    except (LookupError, TypeError, ValueError):
        return  # train says what is wrong
    if changed := sorted({*words.words} ^ {*tokenizer.words}):
        sys.exit(f"{path} is of other captions: only one of the two vocabularies has {', '.join(changed[:5])}")
    if words.length != tokenizer.length:
        sys.exit(f"{path} is of other captions: the longest has {words.length} words, not {tokenizer.length}")
    if abs(std / denoiser.sigma_data - 1) > 1e-5:
        sys.exit(f"{path} is of other pictures: their standard deviation is {std:.6g}, not {denoiser.sigma_data:.6g}")


def choose_noise(args):
    """args.noise, unless it is given: that of the run which goes on, or NOISE."""
    began = common.noise_of_run(args)
    if began and args.noise and tuple(args.noise) != began:
        path = args.out / "checkpoint.npz"
        sys.exit(f"{path} has learned with --noise {began[0]:g} {began[1]:g}: give the same, or another --out")
    args.noise = args.noise or began or NOISE


def loss_of(denoiser, x0, tokens, rng, sample_offset, noise):
    """The EDM loss of pictures x0, bytes (N, H, W, C)."""
    x0, (mean, std) = data.to_float(x0, -1, 1), noise
    return edm_loss(denoiser, x0, rng, mean=mean, std=std, sample_offset=sample_offset, tokens=tokens)


def for_validation(arrays, seed):
    """So many of the held-out rows, of few each several times, with another noise each time."""
    rows = np.resize(Rng(seed).child("validation").permutation(len(arrays[0])), VALIDATED)
    return [a[rows] for a in arrays]


# ---------------------------------------------------------------- the model

# What is kept beside the weights.
SETTINGS = ("data", "size", "skip_broken", "drawn", "training_seed", "shape", "preview", "channels")


def check_shape(shape, channels, patch):
    """End the program unless the net can halve pictures of this shape (H, W, C) as often as it has levels."""
    unit = patch * 2 ** (len(channels) - 1)
    height, width, _ = shape
    if height % unit or width % unit:
        nearest = "x".join(str(max(unit, round(side / unit) * unit)) for side in (height, width))
        sys.exit(f"{len(channels)} levels (--channels) need sides that are multiples of {unit}, not "
                 f"{height}x{width}: --size {nearest} resizes and crops the pictures of a folder")  # fmt: skip


def new_model(tokenizer, args, sigma_data):
    rng = Rng(args.training_seed).child("model")
    encoder = TextEncoder(tokenizer.size, tokenizer.length, WIDTH, rng=rng)
    net = TextToImage(encoder, UNet(args.shape[2], args.channels, context=WIDTH, positions=True, rng=rng), tokenizer)
    denoiser = Denoiser(net, sigma_data)
    return denoiser, EMA(denoiser, 0.998)


def load(path, args):
    """The trained model, its tokenizer, and the average of its weights. The options of its training are those of now.
    Ends the program if other ones were given."""
    state = common.checkpoint_of(path, "text_to_image.py")
    try:
        found = {name: state["settings"][name] for name in SETTINGS}
        kept = argparse.Namespace(**found)
        tokenizer = Tokenizer.from_array(state["model"]["net.vocabulary"])
        denoiser, ema = new_model(tokenizer, kept, 1.0)
        denoiser.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
    except (LookupError, TypeError, ValueError) as error:
        sys.exit(f"{path} is no model of this example: {error!r}")
    check_same(args, kept)
    if args.noise and tuple(args.noise) != (learned := noise_of(state)):
        learned = f"--noise {learned[0]:g} {learned[1]:g}" if learned else "a noise that it does not say"
        sys.exit(f"the model in {args.out} was trained with {learned}: choose another --out")
    vars(args).update(found)
    return denoiser, tokenizer, ema


def check_same(args, kept):
    """End the program if options were given that are not those of the kept model."""
    if args.data_was_given and args.data != kept.data:
        sys.exit(f"the model in {args.out} was trained on {kept.data}, not on {args.data}: choose another --out")
    for name, learned in (("size", kept.shape[:2]), ("channels", kept.channels), ("drawn", kept.drawn)):
        if (given := getattr(args, name)) and given != learned:
            sys.exit(f"the model in {args.out} was trained with {name} {learned}, not {given}: choose another --out")


# ---------------------------------------------------------------- the pictures


def paint(denoiser, tokenizer, prompts, args, steps):
    """samples.png: a row for each prompt, or, of one prompt with --sweep, for each weight."""
    began = time.monotonic()
    tokens = np.repeat(tokenizer.encode(prompts), args.samples, axis=0)  # (prompts * samples, L)
    rows = [samples_of(denoiser, tokenizer, tokens, weight, args, steps) for weight in args.sweep or [args.guidance]]
    labels = prompts if not args.sweep else [f"guidance {weight:g}" for weight in args.sweep]
    plot.image_grid(np.concatenate(rows), args.out / "samples.png", rows=len(labels), row_labels=labels, low=-1, high=1,
                    title=prompts[0] if args.sweep else None)  # fmt: skip
    print(f"\n{args.out / 'samples.png'} painted in {time.monotonic() - began:.0f} s", file=sys.stderr)


def samples_of(denoiser, tokenizer, tokens, weight, args, steps):
    """A picture for each row of tokens (N, L), by guidance with that weight: (N, H, W, C) in [-1, 1], about."""
    model = guided(denoiser, tokenizer, weight, args)
    rng = Rng(args.seed).child("samples")
    shape = (len(tokens), *args.shape)
    x = sample(model, shape, KarrasSDE(), rng, method=args.sampler, steps=steps, eps=0.002, microbatch=20,
               **denoiser.net.encode(tokens))  # fmt: skip
    return to_host(x)


def guided(denoiser, tokenizer, weight, args):
    """The denoiser, pushed with that weight towards the words, and away from those of --negative."""
    negative = denoiser.net.encode(tokenizer.encode(args.negative))
    return Guided(denoiser, weight, negative=negative, interval=args.interval)


def judge_samples(samples_of, tokenizer, args):
    """Print how good samples_of(tokens, weight) are, by weight of guidance, for captions that were seen and held out:
    between new real pictures of the same captions, which are as good as samples can be, and noise."""
    if args.data not in DRAWN_OR_READ:
        sys.exit(NO_JUDGE)
    judge, drawn = common.trained_judge(args), captioned(args)
    training = small(data.to_float(drawn.images[~drawn.held], -1, 1))
    known = {caption for caption, held in zip(drawn.captions, drawn.held) if not held}
    held = np.array([caption not in known for caption in drawn.captions])  # of handwriting, none: "a seven" is known
    pictures, labels = common.pictures_for_judge(args, "test")
    pictures = data.to_float(pictures, -1, 1)
    _, features = judge.predict(pictures)
    shares = list(shares_right(labels, labels))
    print(f"| shares in % | {' | '.join(shares)} | Frechet distance | precision | recall | copies |")
    print(f"|---|{'---|' * (len(shares) + 4)}")
    shown = list(zip(*labels.values()))  # the values of all attributes, for each test picture
    for kind, which in (("seen", ~held), ("held out", held)):
        caption = dict(zip(zip(*(v[which] for v in drawn.labels.values())), np.array(drawn.captions)[which]))
        rows = np.array([i for i, values in enumerate(shown) if values in caption])
        most = min(args.judge, len(shown) - 4)  # four others are needed to compare with
        if min(len(rows), most) < 4:  # of handwriting every caption was seen
            continue
        rows = rows[Rng(args.seed).child("judged").permutation(len(rows))][:most]
        wanted = {name: values[rows] for name, values in labels.items()}
        tokens = tokenizer.encode([caption[shown[i]] for i in rows])
        sets = {"real": pictures[rows]}
        for weight in args.sweep or [0.0, args.guidance]:
            sets[f"guidance {weight:g}"] = np.clip(samples_of(tokens, weight), -1, 1)
        sets["noise"] = np.clip(to_host(Rng(args.seed).normal(pictures[rows].shape)), -1, 1)
        others, distances = np.delete(features, rows, axis=0), {}
        for name, images in sets.items():
            found, seen = judge.predict(images)
            _, distances[name] = nearest(small(images), training)
            right, among = shares_right(found, wanted).values(), precision_recall(others, seen)
            copies = copied(distances[name], distances["real"])
            cells = [f"{100 * share.value:.1f} +- {100 * share.error:.1f}" for share in (*right, *among, copies)]
            cells.insert(len(right), f"{frechet_distance(seen, others):.1f}")
            print(f"| {name}, {len(rows):,} captions {kind} | {' | '.join(cells)} |", flush=True)


def shares_right(found, wanted):
    """How often each attribute is right, and all of them; of a scene also all but the sizes."""
    shares = conditional_accuracy(found, wanted)
    if "layout" in wanted:
        parts = [name for name in wanted if not name.endswith("size")]
        shares["scene"] = conditional_accuracy(found, {name: wanted[name] for name in parts})["all"]
    return shares


def small(images):
    """Pictures of 64x64 as 32x32; smaller ones as they are: enough to find copies."""
    return halved(images) if max(images.shape[1:3]) > 32 else images


def halved(images):
    """(N, H, W, C) -> (N, H/2, W/2, C): the mean of each 2x2."""
    n, height, width, channels = images.shape
    return images.reshape(n, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def draw_maps(denoiser, tokenizer, prompt, args, columns=6):
    """maps.png: a row for each word; its share of the attention of each pixel, at some of the passes, and the
    picture. Black is no share, and white the largest in the row, which is in its label."""
    rng, words = Rng(args.seed).child("samples"), split(prompt)
    height, width, _ = args.shape
    with attention_maps(denoiser) as maps:
        x = sample(denoiser, (1, *args.shape), KarrasSDE(), rng, method=args.sampler, steps=args.steps, eps=0.002,
                   **denoiser.net.encode(tokenizer.encode(prompt)))  # fmt: skip
    weights = np.stack(
        [np.stack([to_host(w)[0] for w in passes]) for passes in maps.values()]
    )  # (layers, passes, P, S)
    passes = np.linspace(0, weights.shape[1] - 1, columns).round().astype(int)
    side = round((height * width / weights.shape[2]) ** 0.5)  # of the square of pixels that is one pixel of the map
    shares = weights.mean(axis=0)[passes].reshape(columns, height // side, width // side, -1)  # (columns, h, w, S)
    picture = np.broadcast_to(to_host(x)[0], (height, width, 3))  # grey ones too, (H, W, 1) -> (H, W, 3)
    rows, labels = [], []
    for i, word in enumerate(words):
        share = shares[..., i] / shares[..., i].max()
        labels.append(f"{word}\n0 to {shares[..., i].max():.2f}")
        large = np.kron(share, np.ones((1, side, side)))  # (columns, H, W)
        rows += [*np.broadcast_to(2 * large[..., None] - 1, (*large.shape, 3)), picture]
    names = [*(f"pass {i + 1}" for i in passes), "the picture"]
    plot.image_grid(np.stack(rows), args.out / "maps.png", rows=len(words), row_labels=labels, column_labels=names,
                    low=-1, high=1, title="share of each pixel's attention, black to white")  # fmt: skip
    print(f"{args.out / 'maps.png'}", file=sys.stderr)


def draw_words(denoiser, tokenizer, prompts, args, most=60):
    """words.png: the cosine of the angle between the vectors of two words, for each pair; of more than `most` words,
    those of the prompts."""
    words = tokenizer.words
    if len(words) > most:
        words = sorted({word for prompt in prompts for word in split(prompt)})[:most]
    vectors = to_host(denoiser.net.encoder.embedding.weight.data)  # (1 + words, width)
    vectors = vectors[[1 + tokenizer.words.index(word) for word in words]]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    plot.matrix(vectors @ vectors.T, args.out / "words.png", labels=words, low=-1, high=1,
                title="cosines between the vectors of the words")  # fmt: skip


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    add_painting(parser, "text_to_image", "glyphs")
    add("--maps", action="store_true", help="draw maps.png, where the pixels look for each word of the first prompt")
    add("--images", type=integer(1), metavar="N", help="images to learn from, in whole rounds (default: what about 15 "
        f"minutes on two cores are enough for, {WORK:,} of 28x28)")  # fmt: skip
    add("--channels", type=integer(8, multiple_of=8), nargs="+", metavar="N", help="of the U-Net, from fine to coarse, "
        "multiples of 8 (default: 32 64, and a third level of 96 above 32 pixels)")  # fmt: skip
    common.add_training(parser, batch_size=64)
    add("--lr", type=common.positive, default=2e-3, metavar="X", help="of Adam, after a warm-up, before a cosine")
    add("--noise", type=common.finite, nargs=2, metavar=("MEAN", "STD"),
        help=f"of ln sigma in training (default: {NOISE[0]:g} {NOISE[1]:g}, or as the resumed run)")  # fmt: skip
    args = parse_painting(parser)
    if args.noise and args.noise[1] <= 0:
        parser.error(f"--noise: STD must be positive, not {args.noise[1]:g}")
    if args.data in ("glyphs", "mnist") and args.channels:
        common.check_channels(parser, args.channels)
    return args


def add_painting(parser, name, default):
    """The options about words, data and samples. name: of the run; default: of --data."""
    add, integer = parser.add_argument, common.integer
    parser.set_defaults(name=name, default_data=default)
    add("prompts", nargs="*", metavar="PROMPT", help="what to paint (default: some captions of the data)")
    add("--data", metavar="DATA", help=f"glyphs, scenes, mnist, or a folder of pictures with captions (default: "
        f"{default}, or what the model in --out has learned from)")  # fmt: skip
    common.add_data_dir(parser)
    add("--size", type=picture_size, metavar="N|HxW", help="resize and crop the pictures of a folder: 64, or 48x64")
    add("--captions", metavar="FILE", help="the table of captions of a folder (default: captions.csv in it, or a text "
        "file beside each picture)")  # fmt: skip
    add("--classes", metavar="COLUMN", help="the column of the table that has their classes, which are the words if it "
        "has no column of captions")  # fmt: skip
    add("--encoding", metavar="NAME", help="of the captions of a folder (default: utf-8)")
    add("--skip-broken", action="store_true", help="leave out pictures of a folder that cannot be used, with a warning")
    add("--drawn", type=integer(100), metavar="N", help="pictures to draw for the training (default: 60,000 glyphs, "
        "20,000 scenes)")  # fmt: skip
    add("--samples", type=integer(1), default=10, metavar="N", help="pictures for each prompt")
    add("--guidance", type=common.finite, default=1.0, metavar="X", help="how far to push towards the words")
    add("--interval", type=common.positive, nargs=2, default=None, metavar=("LOW", "HIGH"),
        help="the noise levels between which to push (default: all)")  # fmt: skip
    add("--sweep", type=common.finite, nargs="+", metavar="X", help="a row for each of these weights of guidance")
    add("--negative", default="", metavar="PROMPT", help="what to push away from, in place of no words (default: none)")
    add("--judge", type=integer(4), metavar="N", help="judge N samples for each weight, in place of painting")
    add("--sampler", choices=SAMPLERS, default="heun", help="how noise becomes samples (default: %(default)s)")
    add("--steps", type=integer(1), metavar="N", help="of the sampler (default: heun 17, ddpm 100, the others 34); one "
        "of heun is two evaluations, of the others one; with guidance an evaluation is two passes")  # fmt: skip
    add("--seed", type=common.seed, default=0, metavar="N", help="of the data drawn, the weights, the order of the "
        "data, the noise, the samples")  # fmt: skip
    add("--out", type=common.directory, metavar="DIR", help=f"directory of the run (default: runs/{name}, with the "
        "name of the data if it is not the default)")  # fmt: skip


def parse_painting(parser, parts=()):
    """parts: the directories of --out that get the checkpoints of earlier parts of the training, in their order."""
    args = common.parse(parser)
    args.parts = parts
    args.data_was_given, args.training_seed = bool(args.data or args.drawn), args.seed  # --drawn is for DRAWN
    args.data = args.data or args.default_data
    if args.drawn and args.data not in DRAWN:
        parser.error(f"--drawn is for --data {' and '.join(DRAWN)}, not for --data {args.data}")
    if args.data not in DRAWN_OR_READ:
        args.data = os.path.abspath(args.data)  # so that it is found from elsewhere
        if args.judge:
            parser.error(NO_JUDGE)
    elif args.size or args.skip_broken or args.captions or args.classes or args.encoding:
        parser.error("--size, --captions, --classes, --encoding and --skip-broken are for --data FOLDER, not for "
                     f"--data {args.data}")  # fmt: skip
    args.steps = args.steps or SAMPLERS[args.sampler]
    if args.sweep and len(args.prompts) > 1 and not args.judge:
        parser.error(f"--sweep has a row for each weight of guidance, of one prompt, not of {len(args.prompts)}")
    end = "" if args.data == args.default_data else f"_{Path(args.data).name}"
    args.out = args.out or Path("runs") / f"{args.name}{end}"
    common.check_checkpoint(args, "--resume", parts=parts)
    return args


def picture_size(text):
    """The type of --size: (height, width)."""
    sides = [common.integer(1)(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be a number of pixels, or height x width such as 48x64, not {text}")
    return [sides[0], sides[-1]]


if __name__ == "__main__":
    common.run(main)
