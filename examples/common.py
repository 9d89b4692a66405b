"""Code that the examples share: reading arguments, digits and checkpoints.

Everything else is in each of them: the mathematics, the loop (its own, or tinydiff.training.train), the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path

import tinydiff
from tinydiff import Rng, data, judging, no_grad, saving
from tinydiff.backend import active
from tinydiff.distributed import ALONE, CannotShare, connected
from tinydiff.latents import LatentSpace
from tinydiff.models import tutorial
from tinydiff.models.autoencoder import Autoencoder, QuantisedAutoencoder, VariationalAutoencoder
from tinydiff.optim import EMA
from tinydiff.trained import noise_of
from tinydiff.training import CannotResume

# ---------------------------------------------------------------- arguments


class Help(argparse.RawDescriptionHelpFormatter):
    """The text as it is written, and each option with its default."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS or "(default" in action.help:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help} (default: {shown})"


def parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)


def add_seed_and_out(parser, name, seed_help="of the weights, the order of the data, the noise, the samples"):
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help=seed_help)
    parser.add_argument(
        "--out", type=directory, default=Path("runs") / name, metavar="DIR", help="directory of the run"
    )


def add_data(parser, default, *, scenes=False):
    choices = ["mnist", "glyphs", *["scenes"] * scenes]
    also = ", or scenes of two shapes in colour" if scenes else ""
    parser.add_argument("--data", choices=choices, default=default, help=f"MNIST, or digits drawn here{also}")
    add_data_dir(parser)


def add_data_dir(parser):
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
        help="where the four idx files of MNIST are (default: $TINYDIFF_DATA, else they are downloaded once)"
    )  # fmt: skip


def add_training(parser, batch_size):
    """batch_size: the default; None if the example has its own option."""
    add = parser.add_argument
    if batch_size is not None:
        add("--batch-size", type=integer(1), default=batch_size, metavar="N", help="images per step")
    add("--microbatch", "--micro-batch", type=integer(1), metavar="N",
        help="images at a time; gradients are added up (default: 16 to 256; a GPU takes the batch whole)")  # fmt: skip
    add("--threads", type=integer(1), metavar="N", help="microbatches at the same time (default: one per core; a GPU "
        "has one)")  # fmt: skip
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add_parallel(parser)


def add_parallel(parser):
    add = parser.add_argument
    add("--parallel", choices=["alone", "mpi", "nccl"], default="alone", help="share the work with the processes of "
        "mpiexec or srun: mpi, or nccl with a GPU for each")  # fmt: skip
    add("--exact", action="store_true", help="with --parallel: sum so that the number of processes changes no bit")
    add("--overlap", action="store_true", help="with --parallel: send gradients while the backward pass still runs")


ENDING = contextlib.ExitStack()  # what a process does at its end with the others


def connect(arguments):
    """The processes of --parallel. All but the first are silent from now on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parallel")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    found, _ = parser.parse_known_args(arguments)
    if found.parallel not in ("mpi", "nccl"):
        if found.exact or found.overlap:
            sys.exit("--exact and --overlap are about the sums of several processes: give --parallel mpi or nccl too")
        return ALONE
    try:
        ranks = ENDING.enter_context(connected(found.parallel, exact=found.exact, overlap=found.overlap))
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    if ranks.rank:
        sys.stdout = sys.stderr = ENDING.enter_context(open(os.devnull, "w"))
    return ranks


def parse(parser):
    ranks = connect(sys.argv[1:])
    args = parser.parse_args()
    args.ranks = ranks
    if getattr(args, "data_dir", None) and getattr(args, "data", "mnist") not in ("mnist", None):
        parser.error("--data-dir is read with --data mnist only")
    try:
        active()  # CuPy that is not installed, or a backend that does not exist, is said now, in one line
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    return args


def agreed(args, value):
    """What the first of the processes of --parallel has found: all of them do as it does."""
    return args.ranks.gather(value)[0]


def say_which(path):
    """Say that nothing is trained, because the model is there already."""
    print(f"the model is {path}, trained before; another --out trains a new one", file=sys.stderr)


def check_checkpoint(args, *options, parts=()):
    """End the program if one of these options is given, and there is no checkpoint in --out to start from, nor in one
    of the directories `parts` of it, of an earlier part of the training."""
    path = args.out / "checkpoint.npz"
    given = [option for option in options if getattr(args, option.strip("-").replace("-", "_"))]
    if given and not any((args.out / part / path.name).exists() for part in ("", *parts)):
        sys.exit(f"there is no {path}: train first, without {' and '.join(given)}")


def check_options(path, **options):
    """End the program if the run that goes on from the checkpoint at `path` began with other values of these."""
    about = checkpoint_of(path, "").get("about")
    began = about.get("options", {}) if isinstance(about, dict) else {}  # older checkpoints do not say
    for name, value in options.items():
        if began.get(name, value) != value:
            option = f"--{name.replace('_', '-')}"
            sys.exit(f"{path} began with {option} {began[name]:g}, not {value:g}: give the same, or another --out")


def integer(least, multiple_of=1):
    """The type of an argument that is an integer, `least` or more."""

    def whole(text):
        if int(text) < least or int(text) % multiple_of:
            also = f", a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise argparse.ArgumentTypeError(f"must be {least} or more{also}, not {text}")
        return int(text)

    whole.__name__ = "number"  # in argparse's message about what is none
    return whole


def seed(text):
    """The type of --seed: what tinydiff.Rng takes, and the next number too."""
    number = integer(0)(text)
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"must be less than 2**63, not {text}")
    return number


def directory(text):
    """The type of --out: a directory that is there, or can be made, and into which this user may write."""
    path = Path(text).absolute()
    try:
        there = next(p for p in [path, *path.parents] if p.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be made: {error}") from error
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"must be a directory, or a new one, not {text}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {there} is not open to this user")
    return Path(text)


def file(text):
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, not a directory, {text!r}")
    return Path(text)


def new_picture(text):
    """The type of an argument that is a picture to be drawn: its directory is made now, and not after the work."""
    path = file(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, not {text!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be made: {error}") from error
    return path


def finite(text):
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return float(text)


def not_negative(text):
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more and finite, not {text}")
    return float(text)


def positive(text):
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, not {text}")
    return float(text)


def check_channels(parser, channels):
    if len(channels) > 2:
        parser.error(f"--channels: 28x28 images have two levels, 14x14 and 7x7, not {len(channels)}")


# ---------------------------------------------------------------- digits


def mnist(args, split="train"):
    """.images uint8 (n, 28, 28), .labels uint8 (n,). Ends the program if they are not found."""
    return found_or_exit(args, data.mnist, args.data_dir, split)


def found_or_exit(args, read, *where):
    """read(*where), which may need the files of MNIST. Ends the program if they are not found."""
    try:
        return read(*where)
    except (OSError, ValueError, data.DownloadError) as error:
        instead = "\nOr take --data glyphs, digits drawn here, which need no files." if hasattr(args, "data") else ""
        sys.exit(f"{error}{instead}")


def images(args, split="train"):
    """uint8 (n, 28, 28) of --data, for training ("train") or not ("test"); the same for every --seed."""
    return labelled(args, split)[0]


def labelled(args, split="train"):
    """images, and the digits on them, int64 (n,)."""
    if args.data == "glyphs":
        glyphs = data.glyphs(20_000, int(split == "test"))
        return glyphs.images, glyphs.labels["digit"]
    digits = mnist(args, split)
    return digits.images, digits.labels.astype("int64")


# ---------------------------------------------------------------- the judge


def pictures_for_judge(args, split="train"):
    """Images, bytes (n, H, W, C), and the labels of their attributes, {name: (n,)}. Ends the program if MNIST is not
    found."""
    return found_or_exit(args, judging.pictures_to_judge, args.data, split, args.data_dir)


def new_judge(args):
    """A classifier for --data, not trained yet; the pictures and labels that it learns from; and its file in the cache,
    whose name depends on them. Ends the program if MNIST is not found."""
    return found_or_exit(args, judging.new_judge, args.data, args.data_dir)


def load_judge(judge, path, args):
    """Read the weights of the judge from the cache. Were they there? Ends the program if the file is damaged."""
    try:
        judge.load_state_dict(saving.load(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        print(f"the judge in {path} cannot be read: {error}", file=sys.stderr)
        return False
    except (LookupError, TypeError, ValueError) as error:
        sys.exit(f"{path}: {error}: train it again, python examples/08_classifier.py --data {args.data} --again")
    return True


def trained_judge(args):
    """The classifier that 08_classifier.py has trained for --data. Ends the program if there is none."""
    judge, _, _, path = new_judge(args)
    if not load_judge(judge, path, args):
        sys.exit(f"there is no judge yet: python examples/08_classifier.py --data {args.data}")
    return judge


# ---------------------------------------------------------------- autoencoders

KINDS = {"plain": Autoencoder, "variational": VariationalAutoencoder, "codebook": QuantisedAutoencoder}
AUTOENCODER = ("data", "kind", "latent", "levels", "kl_weight", "codes", "seed", "shape")  # kept beside its weights


def new_autoencoder(args):
    """The net that these options (AUTOENCODER) mean."""
    rng = Rng(args.seed).child("model")
    if args.kind == "tutorial":
        return tutorial.Autoencoder(rng=rng)
    options = {"kl_weight": args.kl_weight} if args.kind == "variational" else {}
    options |= {"codes": args.codes} if args.kind == "codebook" else {}
    channels = [min(32 * 2**i, 96) for i in range(args.levels)]
    return KINDS[args.kind](args.shape[-1], channels, args.latent, rng=rng, **options)


def new_space(net, args):
    """The latent space of an autoencoder; the tutorial's has a sigmoid at its end, and so works from 0 to 1."""
    return LatentSpace(net, tuple(args.shape), 0.0 if args.kind == "tutorial" else -1.0)


def keep_space(space, path, args):
    settings = {name: getattr(args, name) for name in AUTOENCODER}
    saving.save(path, {"space": space.state_dict(), "settings": settings})


def leave_unscaled(space):
    """Mean 0 and deviation 1, whatever they are: then latents are what the encoder gives, to see what goes wrong."""
    with no_grad():
        space.mean[...], space.std[...] = 0.0, 1.0


def load_space(path, example):
    """The latent space in a file of keep_space, and the options of its autoencoder."""
    state = checkpoint_of(path, example)
    try:
        args = argparse.Namespace(**{name: state["settings"][name] for name in AUTOENCODER})
        space = new_space(new_autoencoder(args), args)
        space.load_state_dict(state["space"])
    except (LookupError, TypeError, ValueError) as error:
        sys.exit(f"{path} is no autoencoder with its latent space: {error!r}")
    return space, args


# ---------------------------------------------------------------- runs


def checkpoint_of(path, example):
    """The state in a checkpoint of another example."""
    try:
        return saving.load(path)
    except FileNotFoundError:
        sys.exit(f"there is no {path}: train a model first, python examples/{example}")
    except ValueError as error:
        sys.exit(str(error))


def load_trained(path, example, *labels):
    """What a checkpoint of an example has: a Trained, whose net is rebuilt from the file, with its last weights; and
    the average of these, None if it has none. labels: the least that the net must know."""
    try:
        trained, state = tinydiff.load(path, averaged=False), saving.load(path)
        if missing := set(labels) - set(trained.labels):
            sys.exit(f"{path} is not a checkpoint of examples/{example}: its net knows no {', '.join(missing)}")
        if "ema" not in state:
            return trained, None
        ema = EMA(trained.model)
        ema.load_state_dict(state["ema"])
    except FileNotFoundError:
        sys.exit(f"there is no {path}: train a model first, python examples/{example}")
    except ValueError as error:
        sys.exit(str(error))
    return trained, ema


def noise_of_run(args):
    """Mean and deviation of ln sigma in the training with which --resume goes on; None if there is none, or if its file
    does not say, or is damaged, which train will say."""
    try:
        return noise_of(saving.load(args.out / "checkpoint.npz")) if args.resume else None
    except ValueError:
        return None


def show_bits(done, total, so_far):
    """The progress of bits_per_dimension, in one line that is overwritten."""
    print(f"\r{done} of {total} images, {so_far} bits per dimension", end="", file=sys.stderr, flush=True)


def run(main):
    """Run the example; a checkpoint that cannot be resumed, or a file that cannot be opened, is an error of one line,
    and Ctrl-C needs no traceback."""
    with ENDING:
        try:
            sys.exit(main())
        except (CannotResume, CannotShare, OSError) as error:
            sys.exit(str(error))
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)  # as a shell reports an interrupted program
