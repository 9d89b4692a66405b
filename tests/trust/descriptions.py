"""Checkpoints that a stranger has made, of which `tinydiff.load` builds a net: refused with one exception, or a model.

    python tests/trust/descriptions.py            some hundred of them
    python tests/trust/descriptions.py --long     some thousand

What a file says about itself ("about") is changed at one to three places, and saved with a right checksum: numbers
become larger, smaller, or no numbers; lists long; classes other classes; parts are taken away, put elsewhere, or into
themselves. Loading must be refused with the name of the file, or give a model whose samples are refused or made. It
may take no more memory than a few times the file; nothing is run, and nothing written outside the folder (audit.py).
"""

from __future__ import annotations

import copy
import faulthandler
import random
import shutil
import sys
import tempfile
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import numpy as np
from audit import Peak, watched

import tinydiff
from tinydiff import saving
from tinydiff.describing import CLASSES
from tinydiff.diffusion import Denoiser, KarrasSDE
from tinydiff.latents import LatentSpace
from tinydiff.models.autoencoder import VariationalAutoencoder
from tinydiff.models.text import TextEncoder, TextToImage, Tokenizer
from tinydiff.models.unet import UNet
from tinydiff.trained import Trained

LIMIT, BASE = 24, 2**23  # times the size of the file, and besides, bytes asked of Python
PROCESS = 300  # MB by which the whole process may grow meanwhile
HANGS = 60  # seconds for one file
NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    7,
    64,
    1000,
    2**16,
    2**20,
    10**9,
    2**63,
    1e-300,
    0.5,
    1e300,
    float("nan"),
    True,
    None,
    "x",
    "",
]


def models() -> dict[str, Trained]:
    words = Tokenizer.fit(["a red cat", "a blue dog"])
    told = TextToImage(TextEncoder(words.size, words.length, 16, rng=0), UNet(1, [8], context=16, rng=0), words)
    space = LatentSpace(VariationalAutoencoder(3, [8, 8], 3, groups=4, rng=0), (8, 8, 3))
    space.measure(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
    labelled = UNet(1, [8, 8], labels={"digit": 3}, groups=4, rng=0)
    return {
        "labels": Trained(
            Denoiser(labelled, 0.7), KarrasSDE(), (8, 8, 1), labels={"digit": ["a", "b", "c"]}, null=True
        ),
        "words": Trained(Denoiser(told, 0.5), KarrasSDE(), (8, 8, 1), null=True),
        "latents": Trained(Denoiser(UNet(3, [8], patch=1, rng=0), 1.0), KarrasSDE(), (2, 2, 3), space=space),
    }


def places(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in the tree, but for the weights of an autoencoder."""
    inside = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return [path] * bool(path) + [p for key, x in inside if key != "weights" for p in places(x, (*path, key))]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(about: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    about = copy.deepcopy(about)
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice(places(about))
        owner, key = at(about, path[:-1]), path[-1]
        value, kind = owner[key], rng.randrange(8)
        if kind == 0 and isinstance(value, str):
            owner[key] = rng.choice([*CLASSES, "os.system", "builtins.eval", "../x"])
        elif kind == 1 and isinstance(value, (list, str)):
            owner[key] = value * rng.choice([0, 8, 64, 5000])
        elif kind == 2 and isinstance(owner, dict):
            del owner[key]
        elif kind == 3:
            owner[key] = copy.deepcopy(at(about, rng.choice(places(about))))
        elif kind == 4 and isinstance(value, dict):
            value[rng.choice(["blocks", "channels", "rng", "heads", "labels", "x"])] = rng.choice([*NUMBERS, [8] * 64])
        elif kind == 5:  # all that makes a net large, at once
            nets = [
                p for p in places(about) if isinstance(x := at(about, p), dict) and x.get("class") == "models.unet.UNet"
            ]
            for net in nets:
                at(about, net)["arguments"] = {"channels": [8] * 64, "blocks": rng.choice([100, 1000, 60_000])}
        elif kind == 6:
            about["labels"] = {str(n): rng.choice([2**10, 2**20, ["x"] * 1000]) for n in range(rng.choice([1, 8]))}
        else:
            owner[key] = rng.choice([*NUMBERS, [8] * 64, [rng.choice(NUMBERS)], {"x": 1}])
    return about


def main() -> int:
    args = harness.arguments(__doc__, 90, 2000, "files")
    rng = random.Random(args.seed)
    warnings.simplefilter("ignore")
    out = Path(tempfile.mkdtemp(prefix="descriptions-"))
    path = out / "model.npz"
    states = {}
    for name, trained in models().items():
        trained.save(path)
        states[name] = saving.load(path)
    failures, counts, most, grown = [], Counter[str](), 0.0, 0.0
    tracemalloc.start()
    for i in range(args.count):
        name = list(states)[i % len(states)]
        saving.save(path, {**states[name], "about": changed(states[name]["about"], rng)})
        size = path.stat().st_size
        tracemalloc.reset_peak()
        process, before = Peak(), tracemalloc.get_traced_memory()[0]
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            with watched(out):
                found = tinydiff.load(path)
            end = "loaded"
        except ValueError as error:
            end = "refused"
            if str(path) not in str(error):
                failures.append(f"{i}: without the name: {error}")
        except Exception as error:
            end = "another error"
            failures.append(f"{i}, {name}: {error!r}")
        most = max(most, (tracemalloc.get_traced_memory()[1] - before - BASE) / size)
        grown = max(grown, process.more())
        if end == "loaded" and max(found.shape) <= 64:
            try:
                found.sample(1, 0, steps=1)
                end += ", and has made a sample"
            except (ArithmeticError, LookupError, TypeError, ValueError):
                end += ", and its sample was refused"
        faulthandler.cancel_dump_traceback_later()
        counts[f"{name}: {end}"] += 1
    if grown > PROCESS:
        failures.append(f"memory: {grown:.0f} MB more")
    if most > LIMIT:
        failures.append(f"memory: {most:.1f} times the file")
    print(*failures, sep="\n", end="\n" if failures else "")
    for end, count in sorted(counts.items()):
        print(f"  {end:60} {count}")
    shutil.rmtree(out)
    return harness.report(
        args,
        files=args.count,
        most_memory_in_sizes_of_the_file=f"{max(most, 0.0):.1f}",
        MB_that_the_process_grew_at_most=f"{grown:.1f}",
        failures=len(failures),
    )


if __name__ == "__main__":
    sys.exit(main())
