"""`python -m tinydiff train`, `sample` and `eval`: tiny runs from data to pictures, and what is said of mistakes.
What examples/ write is sampled in test_examples.py."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread, imsave

import tinydiff
from tinydiff import Rng, data, judging, recipe, saving
from tinydiff.__main__ import main
from tinydiff.commands import as_options, labels_in
from tinydiff.describing import describe
from tinydiff.diffusion import Denoiser, KarrasSDE, edm_loss
from tinydiff.models.unet import UNet
from tinydiff.recipe import held_out, validation_loss
from tinydiff.trained import Trained

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart.py"
SMALL = ["--channels", "8", "--batch-size", "8"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(*arguments: Any) -> subprocess.CompletedProcess:
    """In a fresh process, whose output is no terminal."""
    command = [sys.executable, "-m", "tinydiff", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """24 pictures in the files of MNIST, for training and for testing."""
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28), np.uint8)
    folder = tmp_path / "data"
    folder.mkdir()
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(24, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Twenty pictures of 16x16 in colour, in folders of their classes, with captions."""
    for i in range(20):
        kind, colour = ("cat", "dog")[i % 2], ("red", "green", "blue")[i % 3]
        pixels = np.zeros((16, 16, 3))
        pixels[:, : 2 + i // 2, i % 3] = 1
        (tmp_path / "pets" / kind).mkdir(parents=True, exist_ok=True)
        imsave(tmp_path / "pets" / kind / f"{i}.png", pixels)
        (tmp_path / "pets" / kind / f"{i}.txt").write_text(f"a {colour} {kind}")
    return tmp_path / "pets"


def untrained(path: Path, *, null: bool = True) -> None:
    net = UNet(1, [8], labels={"digit": 3, "face": 2}, groups=4, embedding=16, rng=0)
    labels = {"digit": ["zero", "one", "two"], "face": ["sans", "serif"]}
    Trained(Denoiser(net, 0.5), KarrasSDE(), (8, 8, 1), labels=labels, null=null).save(path)


@pytest.mark.slow
def test_from_handwriting_to_pictures(tmp_path: Path, digits: Path) -> None:
    out = tmp_path / "run"
    done = run("train", "mnist", "--data-dir", digits, "--images", 24, "--out", out, *SMALL)
    assert done.returncode == 0 and "24 pictures, each once, none held out" in done.stderr, done.stderr
    assert "\x1b" not in done.stderr and "\r" not in done.stderr  # it is no terminal
    options = ["--label", "7", "--count", 3, "--steps", 2, "--sampler", "heun", "--guidance", 2, "--seed", 5]
    done = run("sample", out, *options, "--out", tmp_path / "deep" / "grid.png", "--each", tmp_path / "each")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'deep' / 'grid.png'}\n{tmp_path / 'each'}\n"
    assert imread(tmp_path / "deep" / "grid.png").ndim == 3
    trained = tinydiff.load(out / "checkpoint.npz")
    x = trained.sample(3, Rng(5).child("samples"), labels={"digit": 7}, guidance=2.0, steps=2)
    files = sorted((tmp_path / "each").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png"]
    for file, image in zip(files, x):
        np.testing.assert_allclose(imread(file), np.clip(image[..., 0] / 2 + 0.5, 0, 1), atol=0.51 / 255)
    done = run("eval", out, "--data-dir", digits, "--judge", 0)
    loss, n = re.fullmatch(r"denoising loss (\S+) \+- \S+ on (\d+) pictures of mnist that it has not seen\n",
                           done.stdout).groups()  # fmt: skip
    assert done.returncode == 0 and int(n) == 24
    shown = held_out({"name": "mnist"}, 24, digits)
    x0 = shown.images.astype("float32") / 127.5 - 1
    mean, std = recipe.NOISE
    rng = Rng(0).child("validation")
    wanted = edm_loss(trained.model, x0, rng, mean=mean, std=std, digit=shown.labels["digit"]).item()
    assert float(loss) == pytest.approx(wanted, rel=1e-3)
    assert (
        "nothing is left to train: all 3 steps were done before"
        in run("train", "mnist", "--data-dir", digits, "--images", 24, "--out", out, "--resume", *SMALL).stderr
    )


@pytest.mark.slow
def test_the_recipe_is_that_of_the_quickstart(tmp_path: Path, digits: Path, numpy_backend: str) -> None:
    """The same weights, averages and description, bit for bit."""
    options = ["--data-dir", str(digits), "--images", "48", "--batch-size", "8", "--channels", "8", "16", "--seed", "3"]
    assert main(["train", "mnist", *options, "--out", str(tmp_path / "a")]) == 0
    command = [sys.executable, str(QUICKSTART), "--data", "mnist", *options, "--steps", "1"]
    subprocess.run([*command, "--out", str(tmp_path / "b")], check=True, capture_output=True, env=environment())
    a, b = (saving.load(tmp_path / name / "checkpoint.npz") for name in "ab")
    for part in (("model",), ("ema", "averages")):
        ours, theirs = a, b
        for key in part:
            ours, theirs = ours[key], theirs[key]
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    for state in (a, b):
        state["about"].pop("data")
    assert a["about"] == b["about"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["-m", "tinydiff", "train", "mnist"], [QUICKSTART, "--data", "mnist", "--steps", 1]]
)
def test_a_run_goes_on_at_its_own_noise_levels(tmp_path: Path, digits: Path, command: list[Any]) -> None:
    """Also one that has begun with those of an older version."""

    def learn(*options: Any) -> None:
        line = [sys.executable, *map(str, options)]
        subprocess.run(line, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=200)

    losses = []
    for noise in (recipe.NOISE, (-1.2, 1.2)):
        out = tmp_path / str(noise)
        options = [*command, "--data-dir", digits, "--out", out, *SMALL]
        learn(*options, "--images", 24)
        begun = saving.load(out / "checkpoint.npz")
        begun["about"]["noise"] = noise
        saving.save(out / "checkpoint.npz", begun)
        learn(*options, "--images", 48, "--resume")
        assert tinydiff.load(out).noise == noise
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_its_noise_levels(tmp_path: Path, digits: Path, capsys: Any) -> None:
    """The quickstart's of an older version has learned with those of Karras et al.; `train` has always told them."""
    out = tmp_path / "run"
    options = ["--data-dir", str(digits), "--out", str(out), *SMALL]
    assert main(["train", "mnist", *options, "--images", "24"]) == 0
    begun = saving.load(out / "checkpoint.npz")
    told = begun["about"]
    abouts = [None, told | {"noise": None}, told | {"noise": (0.0, 0.0)}, told | {"data": 1}]
    for state in [{}, *({**begun, "about": about} for about in abouts)]:
        saving.save(out / "checkpoint.npz", state)
        assert main(["train", "mnist", *options, "--images", "48", "--resume"]) == 2
        assert "checkpoint.npz cannot go on with these pictures: it does not say how" in capsys.readouterr().err
    del begun["about"]
    saving.save(out / "checkpoint.npz", begun)
    command = [QUICKSTART, "--data", "mnist", "--steps", 1, *options, "--images", 48, "--resume"]
    line = [sys.executable, *map(str, command)]
    subprocess.run(line, env=environment(), check=True, capture_output=True, timeout=200)
    assert tinydiff.load(out).noise == (-1.2, 1.2)


@pytest.mark.slow
def test_the_recipe_of_words_is_that_of_the_example(tmp_path: Path, monkeypatch: Any, numpy_backend: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("text_to_image")
    monkeypatch.setattr(sys, "argv", ["text_to_image.py", "--out", str(tmp_path)])
    args = example.arguments()
    glyphs = data.glyphs(64, 0)
    shown = recipe.Pictures(glyphs.images[..., None], {}, {}, glyphs.captions, {"name": "glyphs", "seed": 0})
    assert (recipe.WORDS_NOISE, recipe.WIDTH) == (example.NOISE, example.WIDTH)
    assert recipe.default_images(shown, words=True) == example.WORK
    state = recipe.learn(shown, tmp_path / "run", words=True, images=64, channels=(8, 16))
    trained = tinydiff.load(tmp_path / "run")
    args.shape, args.channels = [28, 28, 1], [8, 16]
    ours, theirs = trained.model, example.new_model(trained.tokenizer, args, 0.5)[0]
    assert describe(ours.net) == describe(theirs.net)
    assert state.records[0]["lr"] == pytest.approx(args.lr / 100)  # the first of 100 steps of warm-up


@pytest.mark.slow
def test_pictures_of_ones_own_by_class_and_by_words(
    tmp_path: Path, pets: Path, monkeypatch: Any, capsys: Any, numpy_backend: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["train", str(pets), "--images", "16", *SMALL]) == 0
    assert main(["sample", "runs/pets", "--label", "class=cat", "--label", "dog", "--count", "2", "--steps", "1"]) == 0
    assert imread("samples.png").shape[0] == (2 * (16 + 2) + 2) * 3  # a row for each
    assert main(["train", str(pets), "--words", "--images", "16", *SMALL]) == 0
    options = ["--steps", "1", "--each", "each"]
    assert main(["sample", "runs/pets_words", "--prompt", "a red dog", "--negative", "blue", *options]) == 0
    assert len(list(Path("each").iterdir())) == 64 and imread("each/0000.png").shape == (16, 16, 3)
    capsys.readouterr()
    for name in ("pets", "pets_words"):
        assert main(["eval", f"runs/{name}"]) == 0
        said = capsys.readouterr()
        assert re.match(r"denoising loss \S+ \+- \S+ on \d+ pictures of pets that it has not seen\n", said.out)
        assert "there is no judge of" in said.err
    assert main(["sample", "runs/pets_words", "--prompt", "a rad dog", "--steps", "1"]) == 2
    assert "'rad'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_classes_may_be_a_column(
    tmp_path: Path, pets: Path, monkeypatch: Any, capsys: Any, numpy_backend: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        f"{path.parent.name}/{path.name},{('red', 'green', 'blue')[int(path.stem) % 3]}" for path in pets.glob("*/*g")
    ]
    (pets / "captions.csv").write_text("\n".join(["file,colour", *rows]))

    def refused(*options: str) -> str:
        assert main(["train", str(pets), *options, *SMALL]) == 2
        return capsys.readouterr().err

    assert "if 'colour' is the class of a picture, say --classes colour\n" in refused()
    assert "no column 'color' (is 'colour' meant?), but ['file', 'colour']" in refused("--classes", "color")
    reading = ["--classes", "colour", "--captions", "pets/captions.csv"]
    assert main(["train", str(pets), *reading, "--images", "16", *SMALL]) == 0
    assert tinydiff.load("runs/pets").labels == {"class": ["blue", "green", "red"]}
    assert main(["sample", "runs/pets", "--label", "green", "--count", "2", "--steps", "1"]) == 0
    (tmp_path / "link").symlink_to(pets)
    shutil.copytree(pets, "copy")
    capsys.readouterr()
    said = []
    for options in ([], *(["--data", name] for name in ("pets", "runs/../pets", "link", "copy"))):
        assert main(["eval", "runs/pets", *options]) == 0  # which reads the same column again
        said.append(capsys.readouterr().out.replace(" of copy ", " of pets "))
    assert said == said[:1] * 5
    table = (pets / "captions.csv").read_text()
    for text, says in (
        (
            table.replace("red", "white"),
            "knows 'class' as blue, green, red, and these pictures have blue, green, white",
        ),
        (table.replace("colour", "hue"), "no column 'colour', but ['file', 'hue']"),
        (None, "--classes colour names a column, and there is no table"),
    ):
        Path("copy/captions.csv").unlink() if text is None else Path("copy/captions.csv").write_text(text)
        assert main(["eval", "runs/pets", "--data", "copy"]) == 2
        assert says in (said := capsys.readouterr().err) and "classes=" not in said
    assert said.endswith("\nthese are options of train: eval reads a folder with those that train was given\n")
    assert main(["eval", "runs/pets", "--data", "pest"]) == 2
    assert "there is no data set and no folder 'pest'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_advice_of_a_folder_is_given_in_options(
    tmp_path: Path, pets: Path, monkeypatch: Any, capsys: Any, numpy_backend: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    imsave(pets / "cat" / "0.png", np.zeros((16, 24, 3)))
    assert main(["train", str(pets), *SMALL]) == 2
    assert capsys.readouterr().err.endswith("16x16, 1 of 16x24. --size 64 resizes and crops them all to 64x64\n")
    for column in ("it's", "the kind", 'an "odd" one', 'it\'s "odd"', "a\\b"):
        advised = as_options(f"say classes={column!r}, or captions=False")
        assert shlex.split(advised.replace(", or", " or")) == ["say", "--classes", column, "or", "--captions", "none"]


@pytest.mark.slow
def test_a_run_goes_on_with_the_pictures_that_it_began_with(
    tmp_path: Path, pets: Path, monkeypatch: Any, capsys: Any, numpy_backend: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refused(*options: str) -> str:
        capsys.readouterr()
        assert main(["train", str(pets), "--resume", "--images", "38", *SMALL, *options]) == 2
        return capsys.readouterr().err

    for options in ([], ["--words"]):
        assert main(["train", str(pets), "--images", "19", *SMALL, *options]) == 0
        records = [
            json.loads(line) for line in Path(f"runs/pets{'_words' * bool(options)}/log.jsonl").read_text().splitlines()
        ]
        assert records[-1]["validation"] > 0 and Path("runs/pets/loss.png").exists()
        assert main(["train", str(pets), "--resume", "--images", "38", *SMALL, *options]) == 0
        assert "it has learned from pictures [16, 16, 3], not [32, 32, 3]" in refused("--size", "32", *options)
    (pets / "cat" / "0.txt").write_text("a pad cat")  # as long as "red"
    assert "they, their captions or their classes are not those" in refused("--words")
    (pets / "cat").rename(pets / "cow")
    assert "they, their captions or their classes are not those" in refused()


@pytest.mark.slow
def test_what_says_nothing_to_a_model_is_an_error(
    tmp_path: Path, pets: Path, monkeypatch: Any, capsys: Any, numpy_backend: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in pets.rglob("*.*"):
        path.rename(flat / path.name)
    assert main(["train", str(flat), *SMALL]) == 2
    assert "have captions and no classes: --words tells the net the captions" in capsys.readouterr().err
    for path in flat.glob("*.txt"):
        path.unlink()
    (flat / "7.png").write_bytes(b"")
    assert main(["train", str(flat), *SMALL]) == 2
    assert "7.png" in capsys.readouterr().err
    (flat / "mine.csv").write_text("file,caption\n0.png,a caf\xe9\n", encoding="cp1252")
    words = ["train", str(flat), "--words", *SMALL]
    for options, advice in (([], "--captions mine.csv"), (["--captions", "mine.csv"], "--encoding cp1252")):
        assert main([*words, *options]) == 2 and advice in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "glyphs", "--encoding", "cp1252"])
    assert "--encoding is for a folder, not for glyphs" in capsys.readouterr().err
    (flat / "mine.csv").unlink()
    with pytest.warns(UserWarning, match="7.png"):
        assert main(["train", str(flat), "--skip-broken", "--images", "16", *SMALL]) == 0
    assert main(["sample", "runs/flat", "--label", "cat"]) == 2
    assert "knows no labels, so --label 'cat' says nothing to it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_judge_that_was_trained_is_asked(
    tmp_path: Path, digits: Path, monkeypatch: Any, capsys: Any, numpy_backend: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    net = UNet(1, [8], labels={"digit": 10}, groups=4, embedding=16, rng=0)
    path = tmp_path / "m.npz"
    Trained(Denoiser(net, 0.5), KarrasSDE(), (28, 28, 1), labels={"digit": 10}, data={"name": "mnist"}).save(path)
    command = ["eval", str(path), "--data-dir", str(digits), "--judge", "20", "--steps", "1"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "there is no judge of mnist yet" in said.err and "Frechet" not in said.out
    judge, _, _, kept = judging.new_judge("mnist", digits)
    saving.save(kept, judge.state_dict())
    assert main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"\ndigit right in \d.*% of 20 samples\nFrechet distance \S+ of 20 samples to 24 real", said), said


def test_the_validation_loss_has_an_error_that_shrinks(tmp_path: Path, digits: Path, numpy_backend: str) -> None:
    net = UNet(1, [8], labels={"digit": 10}, groups=4, embedding=16, rng=0)
    trained = Trained(Denoiser(net, 0.5), KarrasSDE(), (28, 28, 1), labels={"digit": 10})
    few, many = (held_out({"name": "mnist"}, n, digits) for n in (8, 24))
    (_, less, _), (_, more, _) = validation_loss(trained, many), validation_loss(trained, few)
    assert 0 < less < more
    with pytest.raises(ValueError, match=r"makes pictures of \(8, 8, 1\), but these are \(28, 28, 1\)"):
        untrained(tmp_path / "m.npz")
        validation_loss(tinydiff.load(tmp_path / "m.npz"), few)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sampler", "huen"], "there is no sampler 'huen': did you mean 'heun'?"),
        (["--label", "tow"], "digit cannot be 'tow': did you mean 'two'?"),
        (["--label", "7"], "digit must be 0 to 2, not 7"),
        (["--label", "1,fase=serif"], "there is no label 'fase': did you mean face?"),
        (["--prompt", "a cat"], "this model knows no words, but labels: digit, face; 'a cat' says nothing to it"),
        (["--label", "1", "--sampler", "rk45", "--each", "m.npz"], "m.npz"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any, numpy_backend: str, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    untrained(tmp_path / "m.npz")
    assert main(["sample", "m.npz", "--count", "1", *options]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("python -m tinydiff sample: ") and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.npz"]


def test_a_label_may_have_a_comma() -> None:
    labels = {"class": ["dog", "grey, cat"], "face": ["sans", "serif"]}
    net = UNet(1, [8], labels={"class": 2, "face": 2}, groups=4, embedding=16, rng=0)
    trained = Trained(Denoiser(net, 0.5), KarrasSDE(), (8, 8, 1), labels=labels)
    for row in ("grey, cat", "class=grey, cat", "1"):
        assert labels_in(trained, row) == {"class": 1}
        assert labels_in(trained, f"{row}, face=serif") == {"class": 1, "face": 1}
    with pytest.raises(ValueError, match="class cannot be 'dog,serif': did you mean 'dog'?"):
        labels_in(trained, "dog,serif")


def test_guidance_needs_a_model_that_was_trained_for_it(tmp_path: Path, capsys: Any, numpy_backend: str) -> None:
    untrained(tmp_path / "m.npz", null=False)
    command = ["sample", str(tmp_path / "m.npz"), "--count", "1", "--steps", "1", "--out", str(tmp_path / "x.png")]
    assert main([*command, "--label", "1"]) == 2
    assert "this model must be told all of digit, face" in capsys.readouterr().err
    assert main([*command, "--label", "1,face=serif", "--guidance", "2"]) == 2
    assert "never trained without its condition" in capsys.readouterr().err
    assert main([*command, "--label", "1,face=serif"]) == 0


def test_old_and_damaged_files_are_one_line(tmp_path: Path, capsys: Any, numpy_backend: str) -> None:
    saving.save(tmp_path / "old.npz", {"model": {}})
    (tmp_path / "torn.npz").write_bytes(b"PK")
    for name, says in (("old", "does not say how its net was made"), ("torn", "damaged"), ("no", "no checkpoint")):
        for command in ("sample", "eval"):
            assert main([command, str(tmp_path / f"{name}.npz")]) == 2
            said = capsys.readouterr().err
            assert says in said and f"{name}.npz" in said and said.count("\n") == 1
    for command in ("sample", "eval"):
        assert main([command, str(tmp_path)]) == 2
        assert f"{command}: there is no checkpoint {tmp_path / 'checkpoint.npz'}" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "or the directory of a run" in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["sample", "none.npz"], "there is no checkpoint none.npz"),
        (["sample", "none.npz", "--lable", "7"], "unrecognized arguments: --lable 7: did you mean --label"),
        (["train", "glpyhs"], "there is no data set and no folder 'glpyhs': did you mean glyphs?"),
        (["train", "glyphs", "--out", "nowhere", "--resume"], "there is no nowhere/checkpoint.npz to go on from"),
        (["train", "glyphs", "--channels", "9"], "must be 8 or more, a multiple of 8, not 9"),
        (["eval", "none.npz", "--sampler", "dimm"], "there is no sampler 'dimm': did you mean 'ddim'"),
    ],
)
def test_a_mistake_is_said_without_a_traceback(command: list[str], says: str) -> None:
    done = run(*command)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: Any, capsys: Any, numpy_backend: str) -> None:
    """With fewer pictures, steps and channels."""
    page = (ROOT / "docs" / "command_line.md").read_text()
    block = re.search(r"run by tests/test_commands_models.py, on fewer pictures -->\n```sh\n(.*?)```", page, re.S)
    assert block is not None
    draw = data.glyphs
    monkeypatch.setattr(data, "glyphs", lambda n, seed, **options: draw(min(n, 64), seed, cache=False, **options))
    monkeypatch.chdir(tmp_path)
    less = {"train": ["--images", "64", "--channels", "8"], "sample": ["--steps", "1", "--count", "1"], "eval": []}
    lines = block[1].splitlines()
    assert len(lines) == 7
    for line in lines:
        python, minus_m, program, *command = shlex.split(line)
        assert (python, minus_m, program) == ("python", "-m", "tinydiff")
        assert main([*command, *less[command[0]]]) == 0, line
    assert (tmp_path / "grid.png").exists() and (tmp_path / "samples" / "0000.png").exists()
