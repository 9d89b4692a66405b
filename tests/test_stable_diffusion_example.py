"""The example of the released Stable Diffusion, on weights of a reduced size: it paints, learns, draws, and says in a
line or two what is wrong."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread, imsave
from small_diffusion import save_folder

EXAMPLE = Path(__file__).parent.parent / "examples" / "stable_diffusion.py"
sys.path.insert(0, str(EXAMPLE.parent))  # as Python does for a script: what they share lies beside them
pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("each_fast_backend")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "weights")


def main(monkeypatch: Any, *arguments: Any) -> Any:
    """Run it in this process: what it leaves with, a status or a message."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return done.value.code


def picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    imsave(path, np.random.default_rng(seed).uniform(size=(height, width, 3)))
    return path


def test_it_paints(weights: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from PIL import Image

    out = tmp_path / "run"
    options = ["--weights", weights, "--out", out, "--height", 16, "--width", 24, "--steps", 3]
    assert main(monkeypatch, "a red house", *options, "--batch", 2, "--preview", 1, "--half") is None
    said = capsys.readouterr().err
    assert "loading 100 %, 0 s left" in said and "step 3 of 3, 0 s left" in said and "image_001.png" in said
    with Image.open(out / "image_000.png") as image:
        assert image.size == (24, 16) and image.text["prompt"] == "a red house"
        assert json.loads(image.text["tinydiff"])["steps"] == "3"
    assert imread(out / "preview.png").shape == (16, 24, 3)
    assert (imread(out / "image_000.png") != imread(out / "image_001.png")).any()

    photo = picture(tmp_path / "photo.png", 21, 30)  # is cropped to 16x24
    mask = np.zeros((16, 24, 3))
    mask[:8] = 1
    imsave(tmp_path / "mask.png", mask)
    options = ["--weights", weights, "--out", out, "--steps", 4, "--init", photo]
    assert main(monkeypatch, "a red house", *options, "--strength", 0.5) is None
    said = capsys.readouterr().err
    assert "photo.png is 21x30, and is cropped to 16x24" in said and "step 2 of 2" in said
    assert imread(out / "image_000.png").shape == (16, 24, 3)
    assert main(monkeypatch, "a " * 100, *options, "--mask", tmp_path / "mask.png") is None
    said = capsys.readouterr().err
    assert "note: the prompt has 100 tokens, and only the first 75 fit" in said and "step 4 of 4" in said


def test_it_learns_paints_with_it_and_draws_what_words_are_pulled(
    weights: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out, pictures = tmp_path / "run", tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        picture(pictures / f"{i}.png", 20, 20, i)
    options = ["--weights", weights, "--out", out, "--height", 16, "--width", 16]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(monkeypatch, "my cat", *options, "--learn", pictures, "--learn-steps", 3, "--batch", 2) is None
    said = capsys.readouterr().err
    assert "3 pictures, " in said and "weights to learn" in said and "step 3 of 3" in said and "loss " in said
    lora = out / "lora.safetensors"
    assert main(monkeypatch, "my cat", *options, "--lora", lora, "--steps", 2) is None
    with_it = imread(out / "image_000.png")
    assert main(monkeypatch, "my cat", *options, "--lora", lora, "--lora-scale", 9000, "--steps", 2) is None
    assert (imread(out / "image_000.png") != with_it).any()
    assert main(monkeypatch, "a red cat", *options, "--pulls", "--init", pictures / "0.png") is None
    assert (out / "words.png").stat().st_size > 1000


def test_what_is_wrong_is_said_in_a_line_or_two(weights: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for options in ([], ["--weights", tmp_path / "nowhere"]):
        said = main(monkeypatch, "a cat", *options)
        assert "There are no weights yet. tinydiff downloads none" in said and "CreativeML Open RAIL-M, 4.3 GB" in said
    assert "nowhere: there is no such folder" in said
    (tmp_path / "empty").mkdir()
    said = main(monkeypatch, "a cat", "--weights", tmp_path / "empty")
    assert "has no text_encoder, unet, vae, tokenizer, scheduler" in said
    for options, message in [
        (["--height", 20], "argument --height: must be 8 or more, a multiple of 8, not 20"),
        (["--strength", 0.5], "--strength is how much of --init is made anew: give --init IMAGE"),
        (["--mask", weights / "x.png"], "--mask says what of --init is painted anew"),
        (["--strength", 2], "argument --strength: must be more than 0, and 1 or less, not 2"),
        (["--sampler", "euler"], "invalid choice: 'euler'"),
    ]:
        assert main(monkeypatch, "a cat", "--weights", weights, *options) == 2
        assert message in capsys.readouterr().err
    photo = picture(tmp_path / "photo.png", 16, 16)
    small = ["--weights", weights, "--out", tmp_path / "run", "--init", photo]
    said = main(monkeypatch, "a cat", *small, "--strength", 0.1, "--steps", 4)
    assert "strength=0.1 of 4 steps leaves 0 of them, and two are needed" in said
    said = main(monkeypatch, "a cat", *small[:-1], tmp_path / "no_picture.png")
    assert "no_picture.png cannot be opened: No such file" in said
    assert "give the picture, --init" in main(monkeypatch, "a cat", *small[:4], "--pulls")
    assert "the prompt ' ' has none" in main(monkeypatch, " ", *small, "--pulls")
    tiny = picture(tmp_path / "tiny.png", 7, 20)
    assert "tiny.png is 7x20, and must be 8x8 at least" in main(monkeypatch, "a cat", *small[:-1], tiny)
