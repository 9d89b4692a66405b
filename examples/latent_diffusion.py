"""The whole of Stable Diffusion, trained from scratch on this machine: words, an autoencoder, diffusion of its latents.

    python examples/latent_diffusion.py "a red circle above a blue square"     trains once; then paints
    python examples/latent_diffusion.py "a ring below a cross" --sweep 0 1 3   a row for each weight of guidance
    python examples/latent_diffusion.py "a red circle above a blue square" --story    everything in one picture
    python examples/latent_diffusion.py --data glyphs "a bold seven"           digits; --data mnist, handwritten ones
    python examples/latent_diffusion.py --data pets --size 64 "a cat"          your own pictures
    python examples/latent_diffusion.py --judge 500                            how often is it what was asked for?
    python examples/latent_diffusion.py --resume                               go on with an interrupted run
    TINYDIFF_BACKEND=cupy python examples/latent_diffusion.py                  on a GPU

The pictures to learn from are scenes of two shapes in colour, 64x64, with captions such as "a small red circle above a
blue square" (data/scenes.py). One in ten of the combinations of shapes, colours and layout is held out.

First a variational autoencoder learns to squeeze a picture to 16x16 vectors of 4 numbers, a 12th of it, and back
(models/autoencoder.py; 09_autoencoder.py shows more of it, and --autoencoder takes one that it has trained). Then the
pictures are encoded once, each channel is brought to mean 0 and deviation 1 (latents.py), and a U-Net that attends to
the words learns to take noise from these latents, as text_to_image.py does with pixels: what is the same is
imported from there. A net of two levels or more begins with latents of half the side, if they can be halved, to learn
which words belong to which object. To paint is to sample a latent and to decode it.

The directory of the run (runs/latent_diffusion) gets samples.png, words.png, loss.png, log.jsonl, checkpoint.npz and
model.npz of the diffusion, latent_space.npz and the directory autoencoder of the autoencoder, and the directory coarse
of the beginning. --story draws story.png: how one prompt becomes a picture, from the numbers of its words to the
decoded latent.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import common
import numpy as np
from text_to_image import (
    CAPTION_DROPOUT,
    WIDTH,
    add_painting,
    as_begun,
    captioned,
    check_prompts,
    check_resumed,
    check_same,
    check_shape,
    draw_words,
    for_validation,
    guided,
    halved,
    judge_samples,
    parse_painting,
    some_of,
    source_of,
)

from tinydiff import Rng, data, no_grad, plot, saving
from tinydiff.backend import to_host
from tinydiff.diffusion import Denoiser, KarrasSDE, edm_loss, sample
from tinydiff.latents import cached_latents
from tinydiff.models.attention_maps import attention_maps
from tinydiff.models.autoencoder import autoencoder_loss
from tinydiff.models.text import TextEncoder, TextToImage, Tokenizer, drop_prompts, split
from tinydiff.models.unet import UNet
from tinydiff.optim import EMA, Adam, cosine, warmup
from tinydiff.trained import Trained
from tinydiff.training import train

# Mean and standard deviation of ln sigma in training. At high levels it is decided which object goes where, at low ones
# how the corners of a small square differ from a circle: both must come often.
NOISE = 0.4, 1.8
SQUEEZED, LEARNED = 54_000, 434_000  # pictures that the autoencoder, of 64x64, and the diffusion learn from
# Which words belong to which object is decided at the highest levels, and learned late (docs/latent_diffusion.md). So
# a seventh as many latents come before, but a round at least, of half the side and with these levels alone. The mean of
# 2x2 has half the noise: 1.4 there is 1.4 + ln 2 here.
COARSE_SHARE, COARSE_NOISE = 1 / 7, (1.4, 0.7)
PARTS = "autoencoder", "coarse"  # directories of --out, with the checkpoints of what comes before


def main() -> int:
    args = arguments()
    path = args.out / "model.npz"
    as_begun(args, path)
    trained_before = common.agreed(args, path.exists())
    if not trained_before:
        if not args.resume and any((args.out / part / "checkpoint.npz").exists() for part in ("", *PARTS)):
            sys.exit(f"the training in {args.out} was not finished: --resume goes on, or choose another --out")
        if args.judge:
            common.trained_judge(args)  # there is one: else the program ends now, and not after the training
        if code := trained(args, path):
            return code  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
    else:
        refuse_options(args, path)
    if args.ranks.rank:
        return 0
    space, denoiser, tokenizer, ema = load(path, args)
    if trained_before:
        common.say_which(path)
    prompts = args.prompts or args.preview
    check_prompts(tokenizer, args)
    with ema.applied():
        if args.judge:
            judge_samples(
                lambda tokens, weight: samples_of(space, denoiser, tokenizer, tokens, weight, args), tokenizer, args
            )
            return 0
        paint(space, denoiser, tokenizer, prompts, args)
        draw_words(denoiser, tokenizer, prompts, args)
        if args.story:
            tell_story(space, denoiser, tokenizer, prompts[0], args)
    return 0


def refuse_options(args, path):
    """End the program if options of an autoencoder were given where there is one already."""
    names = ("latent", "kl_weight", "autoencoder_images")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        sys.exit(f"{path} is there already, so {' and '.join(given)} cannot change its autoencoder")


# ---------------------------------------------------------------- the autoencoder


def autoencoder(images, args):
    """The latent space of --autoencoder, or of this run, which is trained if it is not there; if that is interrupted,
    the program ends. images: bytes (n, H, W, C)."""
    path = args.autoencoder or args.out / "latent_space.npz"
    if common.agreed(args, path.exists()):
        if args.autoencoder:
            refuse_options(args, path)
        space, kept = common.load_space(path, "09_autoencoder.py")
        for name in ("latent", "kl_weight"):
            if getattr(args, name) not in (None, getattr(kept, name)):
                option = f"--{name.replace('_', '-')}"
                sys.exit(f"the autoencoder in {path} was trained with {option} {getattr(kept, name):g}, not "
                         f"{getattr(args, name):g}: choose another --out")  # fmt: skip
        if space.image != images.shape[1:]:
            sys.exit(f"the autoencoder in {path} takes pictures of {space.image}, but those of {args.data} have the "
                     f"shape {images.shape[1:]}: choose another --autoencoder")  # fmt: skip
        return space
    later = [file for part in ("coarse", "") if (file := args.out / part / "checkpoint.npz").exists()]
    if args.resume and later:
        sys.exit(f"{later[0]} has learned from latents, but there is no {path}: give the --autoencoder of its training")
    if args.autoencoder:
        sys.exit(f"there is no {path}: train it by 09_autoencoder.py, or leave out --autoencoder")
    made_as = argparse.Namespace(
        data=args.data,
        kind="variational",
        latent=args.latent or (4 if max(args.shape) > 32 else 8),
        levels=2,
        kl_weight=1e-4 if args.kl_weight is None else args.kl_weight,
        codes=None,
        seed=args.seed,
        shape=args.shape,
    )
    choose_channels(args, 2**made_as.levels)  # now, and not after the training
    net = common.new_autoencoder(made_as)
    wanted = args.autoencoder_images or SQUEEZED * 64**2 / np.prod(args.shape[:2])
    epochs = max(1, round(wanted / len(images)))
    batch_size = max(1, args.batch_size // 2)  # a picture is twelve latents
    steps = epochs * -(-len(images) // batch_size)
    print(f"the autoencoder: {net.count():,} parameters, {len(images):,} pictures", file=sys.stderr)
    began, options = args.out / "autoencoder" / "checkpoint.npz", {"kl_weight": made_as.kl_weight}
    resume = args.resume and began.exists()
    if resume:
        common.check_options(began, **options)

    def loss(x0, rng, sample_offset):
        return autoencoder_loss(net, data.to_float(x0, -1, 1), rng, sample_offset=sample_offset)

    state = train(
        net,
        loss,
        images,
        Adam(net.parameters(), lr=2e-3),
        epochs=epochs,
        batch_size=batch_size,
        microbatch=args.microbatch,
        threads=args.threads,
        seed=args.seed,
        schedule=warmup(min(100, -(-steps // 10)), cosine(steps)),
        schedule_by="step",
        out=began.parent,
        resume=resume,
        ranks=args.ranks,
        log_every=100,
        save_every=500,
        about={"options": options, "data": source_of(args)},
    )
    if state.exit_code:
        sys.exit(state.exit_code)  # 130: Ctrl-C, 143: SIGTERM, 74: not saved
    space = common.new_space(net, made_as)
    space.measure(images)
    if args.ranks.rank:
        return space
    common.keep_space(space, path, made_as)
    back = space.decode(space.encode(images[:8]))
    pairs = np.concatenate([data.to_float(images[:8], -1, 1), back])
    plot.image_grid(pairs, args.out / "pairs.png", rows=2, row_labels=["given", "back"], low=-1, high=1)
    return space


# ---------------------------------------------------------------- the diffusion


def trained(args, path):
    """Train, and leave the model. The exit code: 0 if it was finished."""
    images, captions, held, _ = captioned(args)
    tokenizer = Tokenizer.fit(captions)
    check_prompts(tokenizer, args)  # now, and not after the training
    args.shape, args.preview = list(images.shape[1:]), some_of(captions)
    space = autoencoder(images[~held], args)
    args.latents = list(space.shape)
    choose_channels(args, args.shape[0] // args.latents[0])
    if args.raw:
        common.leave_unscaled(space)
    latents = cached_latents(space, images)  # (N, h, w, C), once
    tokens = tokenizer.encode(captions)  # (N, L)
    held_out, held_out_tokens = latents[held], tokens[held]
    latents, tokens = latents[~held], tokens[~held]
    denoiser, ema = new_model(tokenizer, args)

    def pictures(state):
        if state.step % 1000 == 0:
            with ema.applied():
                paint(space, denoiser, tokenizer, args.preview, args)
        plot.loss_curve(
            state.records,
            args.out / "loss.png",
            x="step",
            title=f"EDM loss of latents, {Path(args.data).name}",
            validation_label="validation, averaged weights",
        )

    wanted = args.images or LEARNED * min(1, 64**2 / np.prod(args.shape[:2]))
    epochs = max(1, round(wanted / len(latents)))
    if args.images and args.images < len(latents):
        print(
            f"--images {args.images:,} is less than a round: all {len(latents):,} pictures are taken", file=sys.stderr
        )
    steps = epochs * -(-len(latents) // args.batch_size)
    warm = min(200, -(-steps // 10))
    print(f"the diffusion: {denoiser.count():,} parameters, {len(tokenizer.words)} words, {len(latents):,} pictures, "
          f"{len(held_out):,} held out; pictures go to {args.out}", file=sys.stderr)  # fmt: skip

    def about(noise):
        """What a checkpoint says of its model, the autoencoder with its weights too."""
        return Trained(
            denoiser, KarrasSDE(), space.shape, null=True, eps=0.002, noise=noise, space=space, data=source_of(args)
        ).about()

    def learn(out, latents, held_out, noise, epochs, schedule, on_record=None):
        def loss(z0, tokens, rng, sample_offset):
            if denoiser.training:
                tokens = drop_prompts(tokens, CAPTION_DROPOUT, rng, sample_offset=sample_offset)
            mean, std = noise
            return edm_loss(denoiser, z0, rng, mean=mean, std=std, sample_offset=sample_offset, tokens=tokens)

        resume = args.resume and (out / "checkpoint.npz").exists()
        if resume:
            check_resumed(out / "checkpoint.npz", denoiser, tokenizer)
            check_latents(out / "checkpoint.npz", space)
        return train(
            denoiser,
            loss,
            (latents, tokens),
            Adam(denoiser.parameters(), lr=args.lr),
            epochs=epochs,
            batch_size=args.batch_size,
            microbatch=args.microbatch,
            threads=args.threads,
            validation=for_validation((held_out, held_out_tokens), args.seed),
            seed=args.seed,
            schedule=schedule,
            schedule_by="step",
            ema=ema,
            out=out,
            resume=resume,
            ranks=args.ranks,
            log_every=100,
            save_every=500,
            about=about(noise),
            on_record=on_record,
        )

    began = args.resume and (args.out / "checkpoint.npz").exists()
    if args.resume and not began and not can_be_halved(latents, args.channels) and (args.out / "coarse").exists():
        sys.exit(f"the run in {args.out} began at half the side, which a net of --channels {args.channels} does not: "
                 "give the same as before, or another --out")  # fmt: skip
    if can_be_halved(latents, args.channels) and not began:
        few = max(1, round(COARSE_SHARE * epochs))
        print(f"the beginning: {few * len(latents):,} latents of half the side, high noise levels", file=sys.stderr)
        state = learn(args.out / "coarse", halved(latents), halved(held_out), COARSE_NOISE, few, warmup(warm))
        if state.exit_code:
            return state.exit_code
        print(f"now {epochs * len(latents):,} whole latents, all noise levels", file=sys.stderr)
    state = learn(args.out, latents, held_out, NOISE, epochs, warmup(warm, cosine(steps)), pictures)
    if state.finished and not args.ranks.rank:
        settings = {name: getattr(args, name) for name in SETTINGS} | {"space": space.fingerprint()}
        parts = {"model": denoiser.state_dict(), "ema": ema.state_dict(), "about": about(NOISE)}
        saving.save(path, {**parts, "settings": settings})
        print(f"validation loss {state.records[-1]['validation']:.4g}", file=sys.stderr)
    return state.exit_code


def can_be_halved(latents, channels):
    """Whether the net also takes these latents (N, h, w, C) at half the side. A net of one level attends at its finest
    level anyway, and works on few pixels: it is left as it is."""
    return len(channels) > 1 and not any(side % 2 ** len(channels) for side in latents.shape[1:3])


def choose_channels(args, shrunk):
    """args.channels, if there are none, for latents that are pictures shrunk by that factor; or end the program,
    because the U-Net cannot halve them often enough."""
    sides = [side // shrunk for side in args.shape[:2]]
    two_levels = min(sides) >= 16 and not any(side % 2 for side in sides)
    args.channels = args.channels or ([48, 96] if two_levels else [96])
    check_shape(args.shape, args.channels, shrunk)


def check_latents(path, space):
    """End the program if the checkpoint has learned from other latents."""
    try:
        weights = saving.load(path)["about"]["space"]["weights"]
        same = all(np.array_equal(weights[name], to_host(value)) for name, value in space.state_dict().items())
    except (LookupError, TypeError, ValueError):
        return  # train says what is wrong
    if not same:
        sys.exit(f"{path} has learned from other latents, of another autoencoder or with another --raw: give the same "
                 "as before, or another --out")  # fmt: skip


# What is kept beside the weights, and the fingerprint of the latent space.
SETTINGS = ("data", "size", "skip_broken", "drawn", "training_seed", "preview", "channels", "shape", "latents", "raw")


def new_model(tokenizer, args):
    rng = Rng(args.training_seed).child("model")
    encoder = TextEncoder(tokenizer.size, tokenizer.length, WIDTH, rng=rng)
    net = UNet(args.latents[-1], args.channels, patch=1, context=WIDTH, pooled=False, positions=True, rng=rng)
    denoiser = Denoiser(TextToImage(encoder, net, tokenizer), sigma_data=1.0)
    return denoiser, EMA(denoiser, 0.998)


def load(path, args):
    """The latent space, the trained model, its tokenizer, and the average of its weights. The options of its training
    replace those of now."""
    state = common.checkpoint_of(path, "latent_diffusion.py")
    try:
        kept = state["settings"]
        found = {name: kept[name] for name in SETTINGS}
        tokenizer = Tokenizer.from_array(state["model"]["net.vocabulary"])
        check_same(args, argparse.Namespace(**found))
        if args.raw and not found["raw"]:
            sys.exit(f"the model in {args.out} was trained without --raw: choose another --out")
        vars(args).update(found)
        denoiser, ema = new_model(tokenizer, args)
        denoiser.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        wanted = kept["space"]
    except (LookupError, TypeError, ValueError) as error:
        sys.exit(f"{path} is no model of this example, or an earlier version made it: {error!r}")
    of_space = args.autoencoder or args.out / "latent_space.npz"
    space, _ = common.load_space(of_space, "latent_diffusion.py")
    if args.raw:
        common.leave_unscaled(space)
    if space.fingerprint() != wanted:
        sys.exit(
            f"{path} was trained on the latents of another autoencoder than {of_space} (fingerprint {wanted}, not "
            f"{space.fingerprint()}): give that one by --autoencoder, or train again with another --out"
        )
    return space, denoiser, tokenizer, ema


# ---------------------------------------------------------------- the pictures


def paint(space, denoiser, tokenizer, prompts, args):
    """samples.png: a row for each prompt, or, of one prompt with --sweep, for each weight."""
    began = time.monotonic()
    tokens = np.repeat(tokenizer.encode(prompts), args.samples, axis=0)  # (prompts * samples, L)
    weights = args.sweep or [args.guidance]
    rows = [samples_of(space, denoiser, tokenizer, tokens, weight, args) for weight in weights]
    labels = prompts if not args.sweep else [f"guidance {weight:g}" for weight in args.sweep]
    plot.image_grid(np.concatenate(rows), args.out / "samples.png", rows=len(labels), row_labels=labels, low=-1, high=1,
                    title=prompts[0] if args.sweep else None)  # fmt: skip
    print(f"\n{args.out / 'samples.png'} painted in {time.monotonic() - began:.0f} s", file=sys.stderr)


def samples_of(space, denoiser, tokenizer, tokens, weight, args):
    """A picture for each row of tokens (N, L): a latent by guidance with that weight, decoded, (N, H, W, C)."""
    model = guided(denoiser, tokenizer, weight, args)
    rng = Rng(args.seed).child("samples")
    microbatch = max(20, 5000 // math.prod(args.latents[:2]))  # small latents: more at a time, as each call has a cost
    z = sample(model, (len(tokens), *args.latents), KarrasSDE(), rng, method=args.sampler, steps=args.steps, eps=0.002,
               microbatch=microbatch, **denoiser.net.encode(tokens))  # fmt: skip
    return space.decode(z)


def tell_story(space, denoiser, tokenizer, prompt, args, columns=6):
    """story.png: one prompt, from top to bottom: the numbers of its words, their vectors, the latent from noise on,
    what the denoiser takes it for, decoded, and where the pixels look for each word."""
    words, tokens = split(prompt), tokenizer.encode(prompt)
    encoded = denoiser.net.encode(tokens)
    vectors = to_host(encoded["context"])[0, : len(words)]  # (words, WIDTH)
    seen = []

    def note(step, t, x, denoised):
        seen.append((float(t), x, to_host(denoised)[0]))

    sample(guided(denoiser, tokenizer, args.guidance, args), (1, *args.latents), KarrasSDE(),
           Rng(args.seed).child("samples"), method=args.sampler, steps=args.steps, eps=0.002, callback=note,
           **encoded)  # fmt: skip
    # The first steps are all noise and the last ones all picture.
    chosen = [*(np.linspace(0.2, 0.85, columns - 1) * args.steps).round().astype(int), args.steps]
    with attention_maps(denoiser) as maps, no_grad():  # of the passes with the words alone
        for k in chosen:
            denoiser(seen[k][1], seen[k][0], **encoded)
    weights = np.stack([to_host(passes[i])[0] for i in range(columns) for passes in maps.values()])
    weights = weights.reshape(columns, len(maps), *weights.shape[1:]).mean(axis=1)  # (columns, pixels, words)
    side = round((np.prod(args.latents[:2]) / weights.shape[1]) ** 0.5)
    height, width = args.latents[0] // side, args.latents[1] // side
    decoded = space.decode(np.stack([seen[k][2] for k in chosen]))

    shown = [i for i, word in enumerate(words) if word not in ("a", "an", "the", "to", "of", ",")]
    figure = plot.new_figure(2.0 + 1.25 * columns, 2.6 + 1.25 * (2 + len(shown)))
    grid = figure.add_gridspec(3 + len(shown), columns, height_ratios=[1.1, 1, 1] + [1] * len(shown), hspace=0.2,
                               wspace=0.06, left=0.2, right=0.98, top=0.93, bottom=0.02)  # fmt: skip
    figure.text(0.5, 0.97, f'"{prompt}"', ha="center", va="center", fontsize=15, color=plot.INK)

    def picture(row, column, image, label="", title="", **options):
        axes = figure.add_subplot(grid[row, column])
        axes.imshow(image, interpolation="nearest", **options)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=9, color=plot.FAINT, pad=3)
        if label:
            axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, color=plot.INK, labelpad=8)

    of_words = figure.add_subplot(grid[0, :])
    of_words.imshow(vectors, cmap="RdBu_r", vmin=-2.5, vmax=2.5, aspect="auto", interpolation="nearest")
    of_words.set_yticks(range(len(words)), [f"{w}  {n}" for w, n in zip(words, tokens[0])], fontsize=8)
    of_words.set_xticks([])
    of_words.tick_params(length=0)
    of_words.spines[:].set_visible(False)
    of_words.set_title(
        f"each word is a number, then a vector of {WIDTH}: blue below 0, red above", fontsize=9, color=plot.FAINT, pad=3
    )
    for column, k in enumerate(chosen):
        sigma, latent = seen[k][0], to_host(seen[k][1])[0]
        first = column == 0
        shades = np.clip(latent[..., :3] / (2 * max(1.0, latent.std())) / 2 + 0.5, 0, 1)
        picture(1, column, shades, "the latent,\n3 channels\nas colours" * first, f"noise {sigma:.2g}")
        picture(2, column, np.clip(decoded[column] / 2 + 0.5, 0, 1).squeeze(), "what it is\ntaken for" * first,
                **({"cmap": "gray"} if decoded.shape[-1] == 1 else {}))  # fmt: skip
        for row, i in enumerate(shown, 3):
            share, most = weights[column, :, i].reshape(height, width), weights[:, :, i].max()
            picture(row, column, share, f'attention to\n"{words[i]}"\n0 to {most:.2f}' * first, cmap="magma", vmin=0,
                    vmax=most)  # fmt: skip
    plot.save(figure, args.out / "story.png")
    print(f"{args.out / 'story.png'}", file=sys.stderr)


def arguments():
    parser = common.parser(__doc__)
    add, integer = parser.add_argument, common.integer
    add_painting(parser, "latent_diffusion", "scenes")
    parser.set_defaults(guidance=2.0)
    add("--story", action="store_true", help="draw story.png, how the first prompt becomes a picture")
    add("--autoencoder", type=common.file, metavar="FILE", help="latent_space.npz of 09_autoencoder.py or another run")
    add("--latent", type=integer(1), metavar="N", help="channels of the latent (default: 4; of "
        "pictures up to 32x32, 8)")  # fmt: skip
    add("--kl-weight", type=common.not_negative, metavar="X", help="of the autoencoder's divergence (default: 1e-4)")
    add("--autoencoder-images", type=integer(1), metavar="N", help="pictures that the autoencoder learns from, in "
        f"whole rounds (default: {SQUEEZED:,} of 64x64; of smaller ones more)")  # fmt: skip
    add("--raw", action="store_true", help="do not bring the latents to mean 0 and deviation 1, to see what goes wrong")
    add("--images", type=integer(1), metavar="N", help="pictures that the diffusion learns from, in whole rounds "
        f"(default: {LEARNED:,}; of pictures above 64x64 fewer); with two levels a seventh as many come before, a "
        "round at least, at half the side")  # fmt: skip
    add("--channels", type=integer(8, multiple_of=8), nargs="+", metavar="N", help="of the U-Net, from fine to coarse "
        "(default: 48 96; of latents smaller than 16x16, or of odd sides, one level of 96)")  # fmt: skip
    common.add_training(parser, batch_size=64)
    add("--lr", type=common.positive, default=2e-3, metavar="X", help="of Adam in the diffusion, after a warm-up: "
        "constant at half the side, then before a cosine")  # fmt: skip
    return parse_painting(parser, PARTS)


if __name__ == "__main__":
    common.run(main)
