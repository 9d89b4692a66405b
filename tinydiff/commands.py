"""`python -m tinydiff train`, `sample` and `eval`: a model from a data set to its pictures, without a line of Python.

Each declares its arguments and returns what to do, as in __main__.py. What is wrong with them, or with the files that
they name, is a ValueError or an OSError, which `main` turns into a line and the exit code 2.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[argparse.Namespace], int]  # returns the exit code
DATA = ("glyphs", "scenes", "mnist")


def train(parser: argparse.ArgumentParser) -> Run:
    """Train a denoiser of pictures: glyphs, scenes (both are drawn here), mnist, or a folder of your own."""
    parser.description = f"""{train.__doc__} With labels, such as the digit, the name of a picture's folder or a
    column of a table (--classes), it is the recipe of examples/quickstart.py; with --words that of
    examples/text_to_image.py. The run gets checkpoint.npz, which `sample` and `eval` take, and log.jsonl. Ctrl-C saves,
    and --resume goes on."""
    add = parser.add_argument
    add("data", metavar="DATA", help="glyphs, scenes, mnist, or a folder")
    add("--words", action="store_true", help="tell the net the captions in place of the labels")
    add("--images", type=whole(1), metavar="N", help="pictures to learn from, in whole rounds, or as many of them as "
        "are given (default: 80000, of mnist 360000, with --words 430000; fewer if they are large)")  # fmt: skip
    add("--size", type=whole(8), metavar="N", help="resize and crop the pictures of a folder to NxN")
    add("--captions", metavar="FILE", help="the table of captions of a folder (default: captions.csv in it, or a text "
        "file beside each picture); none: there are no captions")  # fmt: skip
    add("--classes", metavar="COLUMN", help="the column of that table that has the classes (default: the "
        "folders in the folder)")  # fmt: skip
    add("--encoding", metavar="NAME", help="of the captions (default: utf-8)")
    add("--skip-broken", action="store_true", help="leave out what cannot be used in a folder, and say what it was")
    add("--channels", type=whole(8, 8), nargs="+", default=[32, 64], metavar="N", help="of the U-Net, from fine to "
        "coarse, multiples of 8 (default: 32 64)")  # fmt: skip
    add("--batch-size", type=whole(1), default=64, metavar="N", help="default: %(default)s")
    add("--microbatch", type=whole(1), metavar="N", help="pictures at a time (default: 16 to 256)")
    add("--threads", type=whole(1), metavar="N", help="default: one per core")
    add("--lr", type=positive, metavar="X", help="of Adam (default: 0.0015, with --words 0.002)")
    add("--data-dir", type=Path, metavar="DIR", help="where the files of MNIST are (default: $TINYDIFF_DATA, else they "
        "are downloaded once)")  # fmt: skip
    add_seed(parser, "of the weights, the order of the data, the noise")
    add("--out", type=Path, metavar="DIR", help="directory of the run (default: runs/DATA)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add_parallel(parser)

    def run(given: argparse.Namespace, ranks: Any) -> int:
        from . import recipe

        check_data(given.data)
        for name in ("size", "skip_broken", "captions", "classes", "encoding"):
            if getattr(given, name) and given.data in DATA:
                parser.error(f"--{name.replace('_', '-')} is for a folder, not for {given.data}")
        if given.data_dir and given.data != "mnist":
            parser.error(f"--data-dir is read with mnist only, not with {given.data}")
        out = given.out or Path("runs") / f"{Path(given.data).name}{'_words' * given.words}"
        if given.resume and not (out / "checkpoint.npz").exists():
            raise ValueError(f"there is no {out / 'checkpoint.npz'} to go on from: train without --resume first")
        warnings.formatwarning = lambda message, *_: f"{message}\n"  # without the line of Python that gave it
        try:
            shown = recipe.pictures(given.data, words=given.words, seed=given.seed, size=given.size,
                                    skip_broken=given.skip_broken, data_dir=given.data_dir,
                                    captions=False if given.captions == "none" else given.captions,
                                    classes=given.classes, encoding=given.encoding)  # fmt: skip
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(as_options(str(error))) from error
        if not given.words and not shown.labels and any(shown.captions):
            raise ValueError(f"the pictures in {given.data} have captions and no classes: --words tells the net the "
                             "captions, --classes COLUMN the classes in a column of their table, and without either "
                             "there would be nothing to tell it")  # fmt: skip
        images = given.images or recipe.default_images(shown, given.words)
        state = recipe.learn(
            shown, out, words=given.words, images=images, channels=tuple(given.channels), batch_size=given.batch_size,
            microbatch=given.microbatch, threads=given.threads, lr=given.lr, seed=given.seed, resume=given.resume,
            say=say if ranks.rank == 0 else lambda text: None, ranks=ranks, data_dir=given.data_dir,
        )  # fmt: skip
        if not state.exit_code and ranks.rank == 0:
            prompt = f" --prompt {shlex.quote(shown.captions[0])}" if given.words else ""
            say(f"now: python -m tinydiff sample {out / 'checkpoint.npz'}{prompt}")
        return state.exit_code

    return shared(run)


def sample(parser: argparse.ArgumentParser) -> Run:
    """New pictures of any checkpoint that tells its net: a grid (--out), or a file for each (--each)."""
    parser.description = f"""{sample.__doc__} Checkpoints of `train` and of the examples do; those of latent diffusion
    have their autoencoder in them. Without --label a model that knows labels makes pictures of each value of the first
    one; without --prompt a model that knows words hears none."""
    add = parser.add_argument
    add_checkpoint(parser)
    add("--label", action="append", default=[], metavar="LABEL", help="7, seven, digit=7 or digit=7,face=serif; more "
        "than once: a row for each")  # fmt: skip
    add("--prompt", action="append", default=[], metavar="TEXT", help="more than once: a row for each")
    add("--negative", default="", metavar="TEXT", help="words to push away from")
    add("--count", type=whole(1), metavar="N", help="pictures for each label or prompt (default: about 64 in all)")
    add("--sampler", default="heun", metavar="NAME", help="euler_maruyama, predictor_corrector, ddpm, "
        "probability_flow, rk45, ddim, heun or dpm_solver (default: %(default)s)")  # fmt: skip
    add("--steps", type=whole(1), metavar="N", help="default: that of the sampler; of heun 17")
    add("--guidance", type=finite, metavar="X", help="how far to push towards the label or prompt (default: 1 if there "
        "is one and the model was trained for it, else 0)")  # fmt: skip
    add("--last", action="store_true", help="take the last weights of the training and not their average")
    add("--microbatch", type=whole(1), default=20, metavar="N", help="pictures at a time (default: %(default)s)")
    add("--threads", type=whole(1), metavar="N", help="default: one per core")
    add_seed(parser, "of the noise: picture i of a seed is the same in every grid")
    add("--out", type=picture_file, metavar="FILE", help="a grid, .png, .svg or .pdf (default: samples.png)")
    add("--each", type=Path, metavar="DIR", help="a file for each picture, 0000.png, 0001.png, ..., and no grid unless "
        "--out is given")  # fmt: skip
    add_parallel(parser)

    def run(given: argparse.Namespace, ranks: Any) -> int:
        import numpy as np

        from . import plot
        from .rng import Rng
        from .trained import load, method_named

        began, method = time.monotonic(), method_named(given.sampler)
        trained = load(existing(given.checkpoint), averaged=not given.last)
        if given.label and trained.tokenizer is not None:
            raise ValueError(f"this model knows words and no labels: --prompt, not --label {given.label[0]!r}")
        if (given.prompt or given.negative) and trained.tokenizer is None:
            text = given.prompt[0] if given.prompt else given.negative
            also = f", but labels: {', '.join(trained.labels)}" if trained.labels else ""
            raise ValueError(f"this model knows no words{also}; {text!r} says nothing to it")
        if given.label and not trained.labels:
            raise ValueError(f"this model knows no labels, so --label {given.label[0]!r} says nothing to it")
        rows = given.label or given.prompt
        first = next(iter(trained.labels), None)
        labels = [labels_in(trained, row) for row in given.label] if trained.labels else []
        if not rows and first is not None:
            rows = list(trained.labels[first])
            labels = [{first: i} for i in range(len(rows))]
        told = bool(rows)
        rows = rows or [""]
        each = given.count or max(1, 64 // len(rows))
        n = each * len(rows)
        guidance = given.guidance if given.guidance is not None else float(told and trained.null)
        condition: dict[str, Any] = {}
        if trained.labels:
            condition["labels"] = labels_of(trained, labels, each)
        elif trained.tokenizer is not None and told:
            condition["prompts"] = [prompt for prompt in rows for _ in range(each)]
        x = trained.sample(n, Rng(given.seed).child("samples"), negative=given.negative, guidance=guidance,
                           method=method, steps=given.steps, microbatch=given.microbatch, threads=given.threads,
                           ranks=ranks, **condition)  # fmt: skip
        if not np.isfinite(x).all():
            raise ValueError("the pictures are not finite: take more --steps, or less --guidance")
        if ranks.rank:
            return 0
        if given.each is not None:
            plot.picture_files(x, given.each, low=trained.low, high=trained.high)
        if given.out is not None or given.each is None:
            out = given.out or Path("samples.png")
            texts = [row.removeprefix(f"{first}=") for row in rows] if told else None
            plot.image_grid(x, out, rows=len(rows) if told and len(rows) > 1 else None,
                            row_labels=texts if told and len(rows) > 1 else None, low=trained.low,
                            high=trained.high)  # fmt: skip
            print(out)
        if given.each is not None:
            print(given.each)
        say(f"{n} pictures in {time.monotonic() - began:.0f} s")
        return 0

    return shared(run)


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """The denoising loss of a checkpoint on pictures that it has not learned from; with a judge, its samples too."""
    parser.description = f"""{evaluate.__doc__} The judge is the classifier that examples/08_classifier.py has trained
    for that data set: how often it finds in a sample what was asked for, and the Frechet distance of its features of
    samples and of real pictures. Without one, it is said that there is none."""
    add = parser.add_argument
    add_checkpoint(parser)
    add("--data", metavar="DATA", help="glyphs, scenes, mnist, or a folder (default: what it has learned from)")
    add("--count", type=whole(2), default=1000, metavar="N", help="pictures for the loss (default: %(default)s)")
    add("--judge", type=whole(0), default=200, metavar="N", help="samples to be judged; 0 for none (default: "
        "%(default)s)")  # fmt: skip
    add("--sampler", default="heun", metavar="NAME", help="default: %(default)s")
    add("--steps", type=whole(1), metavar="N", help="default: that of the sampler; of heun 17")
    add("--guidance", type=finite, default=0.0, metavar="X", help="of the samples (default: 0)")
    add("--data-dir", type=Path, metavar="DIR", help="where the files of MNIST are (default: $TINYDIFF_DATA)")
    add_seed(parser, "of the noise")

    def run(given: argparse.Namespace) -> int:
        from . import recipe
        from .trained import load, method_named

        method, trained = method_named(given.sampler), load(existing(given.checkpoint))
        source = trained.data
        if given.data:
            check_data(given.data)
            if place_of(given.data) != place_of(str(source.get("name"))):
                size = list(trained.space.image if trained.space else trained.shape)[:2]
                # Another folder is read as that of the training was: the same column has the classes, in a table of the
                # same name. That of the training may lie elsewhere, and name other pictures.
                table = source.get("captions")
                if isinstance(table, str):
                    own = Path(given.data, Path(table).name).absolute()
                    table = str(own) if own.is_file() else None
                source = {**source, "name": place_of(given.data), "size": size, "captions": table}
        try:
            shown = recipe.held_out(source, given.count, given.data_dir)
        except (ValueError, FileNotFoundError) as wrong:
            advice = as_options(str(wrong))
            also = "\nthese are options of train: eval reads a folder with those that train was given"
            raise ValueError(advice + also * (advice != str(wrong))) from wrong
        loss, error, kind = recipe.validation_loss(trained, shown, given.seed)
        name = Path(str(source["name"])).name
        print(f"{kind} {loss:.5g} +- {error:.2g} on {len(shown.images):,} pictures of {name} that it has not seen")
        if given.judge:
            judge_samples(trained, shown, source["name"], method, given)
        return 0

    return run


def judge_samples(trained: Any, shown: Any, name: Any, method: Any, given: argparse.Namespace) -> None:
    """Print how often a judge finds in samples what was asked for, and how like real pictures they are as a set."""
    import numpy as np

    from . import data
    from .judging import DATA as JUDGED
    from .judging import trained_judge
    from .metrics import conditional_accuracy, frechet_distance
    from .rng import Rng

    if name not in JUDGED:
        say(f"there is no judge of {name}: there are judges of {', '.join(JUDGED)}")
        return
    judge = trained_judge(name, given.data_dir)
    if judge is None:
        say(f"there is no judge of {name} yet: python examples/08_classifier.py --data {name}")
        return
    n = min(given.judge, len(shown.images))
    condition: dict[str, Any] = {}
    if trained.tokenizer is not None:
        condition["prompts"] = shown.captions[:n]
    elif trained.labels:
        keys = {label: "digit" if label == "labels" else label for label in trained.labels}
        condition["labels"] = {label: shown.labels[key][:n] for label, key in keys.items()}
    x = trained.sample(n, Rng(given.seed).child("samples"), guidance=given.guidance, method=method, steps=given.steps,
                       **condition)  # fmt: skip
    x = np.clip((x - trained.low) / (trained.high - trained.low) * 2 - 1, -1, 1)
    found, features = judge.predict(x)
    _, real = judge.predict(data.to_float(shown.images, -1, 1))
    if condition:
        wanted = {label: values[:n] for label, values in shown.labels.items() if label in found}
        for label, share in conditional_accuracy(found, wanted).items():
            print(f"{label} right in {share} of {n} samples")
    print(f"Frechet distance {frechet_distance(features, real):.4g} of {n} samples to {len(real):,} real pictures")


def labels_in(trained: Any, row: str) -> dict[str, int]:
    """The labels of one --label: "7", "digit=7", "digit=7,face=serif"."""
    first = next(iter(trained.labels))
    if row in trained.labels[first]:  # the name of a folder may have a comma in it, or "="
        return {first: trained.number_of(first, row)}
    found: dict[str, int] = {}
    for part in re.split(r",(?=\s*\w+=)", row):
        name, has_name, value = part.strip().partition("=")
        name, value = (name, value) if has_name else (first, name)
        if name not in trained.labels:
            raise ValueError(f"there is no label {name!r}: {nearest(name, list(trained.labels))}")
        found[name] = trained.number_of(name, value)
    return found


def labels_of(trained: Any, told: list[dict[str, int]], each: int) -> dict[str, list[int]]:
    """One for each picture, of what each row is told. What is not said is -1."""
    names = [name for name in trained.labels if any(name in found for found in told)]
    if not trained.null and any(len(found) < len(trained.labels) for found in told):
        raise ValueError(f"this model must be told all of {', '.join(trained.labels)}")
    return {name: [found.get(name, -1) for found in told for _ in range(each)] for name in names}


# ---------------------------------------------------------------- arguments


def whole(least: int, multiple_of: int = 1) -> Callable[[str], int]:
    """The type of an argument that is an integer, `least` or more."""

    def number(text: str) -> int:
        value = int(text)
        if value < least or value % multiple_of:
            also = f", a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise argparse.ArgumentTypeError(f"must be {least} or more{also}, not {text}")
        return value

    return number


def finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return float(text)


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, not {text}")
    return float(text)


def picture_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, not {text!r}")
    return path


def check_data(name: str) -> None:
    """Errors: ValueError for what is neither a data set that has a name nor a folder."""
    if name not in DATA and not Path(name).is_dir():
        raise ValueError(f"there is no data set and no folder {name!r}: {nearest(name, DATA)}")


def place_of(name: str) -> str:
    """The one name of a data set: a folder may be given by several, with "..", or through a link."""
    return name if name in DATA else os.path.realpath(name)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="such as runs/quickstart/checkpoint.npz, "
        "or the directory of a run")  # fmt: skip


def existing(path: Path) -> Path:
    """The file of a checkpoint; of a directory of a run, its checkpoint. Errors: ValueError if there is none."""
    path = path / "checkpoint.npz" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}")
    return path


def as_options(text: str) -> str:
    """What an error of data.folder advises, in the words of a command line."""
    text = text.replace("on_error='skip'", "--skip-broken").replace("captions=False", "--captions none")
    value = re.compile(r"""\b(size|captions|classes|encoding)=(\d+|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
    return value.sub(lambda found: f"--{found[1]} {shlex.quote(str(ast.literal_eval(found[2])))}", text)


def add_parallel(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--parallel", choices=["alone", "mpi", "nccl"], default="alone", help="share the work with the processes of "
        "mpiexec or srun: mpi, or nccl with a GPU for each")  # fmt: skip
    add("--exact", action="store_true", help="with --parallel: sum so that the number of processes changes no bit")
    add("--overlap", action="store_true", help="with --parallel: send gradients while the backward pass still runs")


def shared(run: Callable[[argparse.Namespace, Any], int]) -> Run:
    """The command with the processes of --parallel. Of several, the first alone says what is wrong."""

    def run_with_ranks(given: argparse.Namespace) -> int:
        from .distributed import connected

        if given.parallel == "alone" and (given.exact or given.overlap):
            raise ValueError(
                "--exact and --overlap are about the sums of several processes: give --parallel mpi or nccl"
            )
        with contextlib.ExitStack() as job:
            try:
                ranks = job.enter_context(connected(given.parallel, exact=given.exact, overlap=given.overlap))
            except RuntimeError as error:  # no MPI here, or no GPU
                raise ValueError(str(error)) from error
            try:
                return run(given, ranks)
            except (OSError, ValueError) as error:
                if ranks.size == 1:
                    raise
                sys.exit(f"python -m tinydiff {given.command}: {error}")

    return run_with_ranks


def add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    def seed(text: str) -> int:
        if not 0 <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, not {text}")
        return int(text)

    parser.add_argument("--seed", type=seed, default=0, metavar="N", help=f"{what} (default: 0)")


def nearest(given: str, known: Any) -> str:
    import difflib

    near = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
