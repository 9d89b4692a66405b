"""Every block of Python in the README and in docs/ runs: sessions with the outputs that they show, the others to their
end, with what they need put before them here. The README's session, and the pages in TESTED, have tests of their own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import book
import numpy as np
import pytest

from tinydiff import Rng, backend, data, optim, study
from tinydiff.diffusion import Denoiser, KarrasSDE
from tinydiff.engine import Op
from tinydiff.models.unet import UNet
from tinydiff.operators import OPS
from tinydiff.trained import Trained

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(backend.name == "cupy", reason="the pages are written for NumPy"),
]
TESTED = {
    "pencil.md": "tests/docs/test_book.py",
    "museum.md": "tests/study/test_museum.py",
    "stable_diffusion.md": "tests/models/test_stable_diffusion.py",
}
PAGES = [p for p in book.pages() if p.name not in TESTED]
PLAIN = re.compile(r"^```python\n(?!>>>)(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_sessions_and_claims(page: Path) -> None:
    book.run(page.read_text(), page.name)
    book.check_quotes(page.read_text(), page)


# ---------------------------------------------------------------- blocks without prompts


def pets(folder: Path) -> dict[str, Any]:
    """Four pictures with the captions of the page, two with classes, and a file of six more."""
    from PIL import Image

    (folder / "pets").mkdir()
    draw = np.random.default_rng(0)
    captions = ["a cat, asleep on a sofa", "two cats", "a dog", "two dogs"]
    rows = ["file,caption"]
    for name, caption in zip(["cat1.jpg", "cat2.png", "dog1.jpg", "dog2.png"], captions):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3)).astype("uint8")).save(folder / "pets" / name)
        rows.append(f'{name},"{caption}"')
    (folder / "pets" / "captions.csv").write_text("\n".join(rows))
    (folder / "animals").mkdir()
    for name in ("cat1.jpg", "dog1.jpg"):
        (folder / "animals" / name).write_bytes((folder / "pets" / name).read_bytes())
    (folder / "animals" / "captions.csv").write_text("file,species,age\ncat1.jpg,grey_cat,3\ndog1.jpg,dog,4\n")
    np.save(folder / "photos.npy", draw.integers(0, 256, (6, 64, 64, 3)).astype("uint8"))
    return {}


def quickstart(folder: Path) -> dict[str, Any]:
    """The checkpoint of a quickstart that has learned nothing yet."""
    counts = {"digit": 10, "face": 2, "weight": 2, "slant": 3}
    denoiser = Denoiser(UNet(1, [32, 64], labels=counts, rng=0), sigma_data=1.0)
    names = {name: list(data.ATTRIBUTES[name][:n]) for name, n in counts.items()}
    trained = Trained(denoiser, KarrasSDE(), (28, 28, 1), labels=names, null=True, eps=0.002)
    trained.save(folder / "runs" / "quickstart" / "checkpoint.npz", optim.EMA(denoiser))
    return {}


def samplers(folder: Path) -> dict[str, Any]:
    """Models that need no net."""
    denoiser = Denoiser(lambda x, sigma, digit=None: 0 * x, sigma_data=0.5)
    return {"model": lambda x, t: -x, "denoiser": denoiser, "digits": np.arange(1000) % 10}


def dimensions(folder: Path) -> dict[str, Any]:
    return {"net": lambda x, t: 0 * x, "x0": np.zeros((2, 28, 28, 1), "float32"), "rng": Rng(0)}


# What a page takes as given; most take nothing.
BEFORE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": quickstart,
    "docs/command_line.md": quickstart,
    "docs/design.md": lambda folder: {"op": Op},  # an op that no registry knows
    "docs/one_and_two_dimensions.md": dimensions,
    "docs/own_pictures.md": pets,
    "docs/samplers.md": samplers,
    "docs/viewer.md": lambda folder: {},
}
NEEDS = {"from_pytorch.md": "torch"}  # a package, for the blocks without prompts
WITH_BLOCKS = [p for p in (ROOT / "README.md", *PAGES) if PLAIN.search(p.read_text())]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda p: p.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "save", functools.partial(study.save, seconds=1.0))  # all checks take half a minute
    before_it = BEFORE.get(str(page.relative_to(ROOT)), lambda _folder: {})
    space: dict[str, Any] = {"__name__": "page", **before_it(tmp_path)}
    before = dict(OPS)
    try:
        for number, block in enumerate(PLAIN.findall(page.read_text()), 1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), space)
    finally:
        OPS.clear()
        OPS.update(before)


def headings(text: str) -> set[str]:
    """The anchors of a page: its headings in lower case, without signs, with hyphens for spaces."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def dead_links(text: str, page: Path) -> list[str]:
    """The relative links that lead to no file, or to no heading of a page."""
    dead = []
    for target, anchor in re.findall(
        r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", re.sub(r"```.*?```", "", text, flags=re.S)
    ):
        path = page.parent / target if target else page
        if DOCS / "ops" == path.resolve().parent and path.suffix == ".md":  # written by the build
            if path.stem not in (*OPS, "index"):
                dead.append(target)
        elif not path.exists() or (anchor and path.suffix == ".md" and anchor not in headings(path.read_text())):
            dead.append(f"{target}#{anchor}" if anchor else target)
    return dead


@pytest.mark.parametrize("page", [ROOT / "README.md", *book.pages()], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page.read_text(), page)


@pytest.mark.parametrize("link", ["nowhere.md", "notation.md#nothing", "#nothing", "ops/nothing.md"])
def test_a_dead_link_is_found(link: str) -> None:
    good = "[a](notation.md#diffusion) [b](ops/softmax.md) [c](../tinydiff/engine.py) [d](#switches)"
    page = DOCS / "page.md"
    assert dead_links(good.replace("(#", "(../README.md#"), page) == []
    assert dead_links(f"[a]({link})", DOCS / "notation.md") == [link]
