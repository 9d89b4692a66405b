"""The examples on a few images: they train, go on and sample, and their errors are for those who type commands."""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread, imsave

import tinydiff
from tinydiff import Rng, backend, data, metrics, no_grad, saving, tensor, training
from tinydiff.__main__ import main as tinydiff_main
from tinydiff.diffusion import VESDE, Denoiser, KarrasSDE, edm_loss
from tinydiff.models.fourier import ScoreMLP
from tinydiff.models.text import Tokenizer
from tinydiff.models.unet import UNet
from tinydiff.trained import Trained

EXAMPLES = Path(__file__).parent.parent / "examples"
ONE_DIMENSION, TWO_DIMENSIONS = EXAMPLES / "01_one_dimension.py", EXAMPLES / "02_two_dimensions.py"
QUICKSTART, SCORE_UNET = EXAMPLES / "quickstart.py", EXAMPLES / "03_score_unet.py"
USING, JUDGE = EXAMPLES / "04_using_a_model.py", EXAMPLES / "05_judge.py"
LIKELIHOOD, CONDITIONAL = EXAMPLES / "06_likelihood.py", EXAMPLES / "07_conditional_unet.py"
CLASSIFIER, WORDS = EXAMPLES / "08_classifier.py", EXAMPLES / "text_to_image.py"
AUTOENCODER, LATENT = EXAMPLES / "09_autoencoder.py", EXAMPLES / "latent_diffusion.py"
LATENT_UNET = EXAMPLES / "10_latent_unet.py"
ALL = [ONE_DIMENSION, TWO_DIMENSIONS, QUICKSTART, SCORE_UNET, USING, JUDGE, LIKELIHOOD, CONDITIONAL, CLASSIFIER]
ALL += [AUTOENCODER, LATENT_UNET, WORDS, LATENT, EXAMPLES / "stable_diffusion.py"]
# Emulated on a CPU, CuPy takes half a minute for what others of these tests make it do as well: train, sample, judge.
# And a test that goes on with files and options, which are the same on every backend, ends there before it does.
EMULATED = os.environ.get("TINYDIFF_BACKEND") == "cupy"
on_the_host = pytest.mark.skipif(EMULATED, reason="files, options, messages: the same on every backend")
sys.path.insert(0, str(EXAMPLES))  # as Python does for a script: what they share lies beside them


@pytest.fixture
def data_dir(tmp_path):
    """24 images in the files of MNIST, for training and for testing."""
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28), np.uint8)
    folder = tmp_path / "data"
    folder.mkdir()
    labels = np.arange(24, dtype=np.uint8) % 10
    for name, array in [
        ("train-images-idx3-ubyte", images),
        ("train-labels-idx1-ubyte", labels),
        ("t10k-images-idx3-ubyte", images[::-1]),
        ("t10k-labels-idx1-ubyte", labels[::-1]),
    ]:
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / name).write_bytes(header + array.tobytes())
    return folder


def run(example, *arguments, status=0):
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])  # it need not be installed
    command = [sys.executable, str(example), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == status, done.stderr
    return done.stderr


def main(monkeypatch, example, *arguments):
    """Run it in this process: what it leaves with, a status or a message."""
    monkeypatch.setattr(sys, "argv", [str(example), *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(example), run_name="__main__")
    return done.value.code


def sampled(checkpoint, *options):
    """The shape of one picture that `python -m tinydiff sample` makes of it."""
    out = checkpoint.parent / "each"
    assert tinydiff_main(["sample", str(checkpoint), "--steps", "1", "--each", str(out), *options]) == 0
    shape = imread(out / "0000.png").shape
    shutil.rmtree(out)
    return shape


@pytest.mark.slow
@pytest.mark.parametrize("skips, count", [("add", "1,022,849"), ("concat", "1,115,297")])
def test_the_score_unet_trains_goes_on_and_samples(tmp_path, data_dir, skips, count):
    out = tmp_path / "run"
    options = [
        "--skips",
        skips,
        "--data-dir",
        data_dir,
        "--out",
        out,
        "--batch-size",
        16,
        "--micro-batch",
        8,
        "--steps",
        2,
        "--samples",
        4,
    ]
    text = run(SCORE_UNET, *options, "--epochs", 1)
    assert f"{count} parameters, 24 images" in text and ("(published 1154)" in text) == (skips == "add")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.npz", "log.jsonl", "loss.png", "samples.png"]
    first = (out / "samples.png").read_bytes()
    if EMULATED:
        return
    run(SCORE_UNET, *options, "--sample-only")
    assert (out / "samples.png").read_bytes() == first
    assert sampled(out / "checkpoint.npz", "--count", "1", "--sampler", "euler_maruyama") == (28, 28)
    if skips == "add":
        checkpoint = (out / "checkpoint.npz").read_bytes()
        state = saving.load(out / "checkpoint.npz")
        averages = state.pop("ema")["averages"]
        saving.save(out / "checkpoint.npz", state)  # as older ones are: the weights themselves
        run(SCORE_UNET, *options, "--sample-only")
        assert (out / "samples.png").read_bytes() != first
        saving.save(out / "checkpoint.npz", {**state, "model": state["model"] | averages})
        run(SCORE_UNET, *options, "--sample-only")
        assert (out / "samples.png").read_bytes() == first  # the samples were made with the averaged weights
        (out / "checkpoint.npz").write_bytes(checkpoint)
    run(SCORE_UNET, *options, "--epochs", 2, "--resume")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"], r["images"]) for r in records] == [(0, 2, 24), (1, 4, 24)]
    assert [r["lr"] for r in records] == pytest.approx([1e-3, 0.98e-3] if skips == "add" else [5e-4, 5e-4])
    assert (out / "samples.png").read_bytes() != first
    if skips == "add":
        text = run(SCORE_UNET, *options, "--compare", "--evaluations", 5, "--bits", 2)
        assert 0 < imread(out / "compare.png").shape[0] - (12 * 30 + 2) * 3 < 50  # the columns are named above
        for row in ("ddpm, 5", "heun, 5", "rk45, ", "euler_maruyama, 3", "heun, 5, no average"):
            assert f"\n{row}" in text
        assert re.search(r"averaged weights: -?\d+\.\d{4} \+- .* bits per dimension on 2 test images", text)


@pytest.mark.slow
def test_the_conditional_unet_trains_goes_on_and_samples(tmp_path, data_dir, monkeypatch):
    out = tmp_path / "run"
    options = ["--data-dir", data_dir, "--out", out, "--batch-size", 16, "--micro-batch", 8, "--steps", 2]
    text = run(CONDITIONAL, *options, "--epochs", 1)
    assert "2,045,057 parameters, 24 images" in text and "(published 1010)" in text
    pictures = ["labels.png", "loss.png", "samples.png"]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.npz", *pictures[:1], "log.jsonl", *pictures[1:]]
    first = {name: (out / name).read_bytes() for name in pictures}
    assert imread(out / "samples.png").shape[0] == (10 * 30 + 2) * 3  # one row per digit
    if EMULATED:
        return
    run(CONDITIONAL, *options, "--sample-only")
    assert all((out / name).read_bytes() == first[name] for name in pictures)
    run(CONDITIONAL, *options, "--epochs", 2, "--resume")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"], r["images"]) for r in records] == [(0, 2, 24), (1, 4, 24)]
    assert [r["lr"] for r in records] == pytest.approx([1e-3, 0.98e-3])
    assert all((out / name).read_bytes() != first[name] for name in pictures[1:])  # cosines change in later digits
    before = (out / "samples.png").read_bytes()
    assert sampled(out / "checkpoint.npz", "--label", "seven", "--count", "1") == (28, 28)
    assert main(monkeypatch, CONDITIONAL, *options, "--sample-only", "--net", "ours") == 0  # it knows its net
    assert (out / "samples.png").read_bytes() == before


@pytest.mark.slow
@on_the_host
def test_our_unet_takes_the_place_of_the_tutorials(tmp_path, data_dir):
    out = tmp_path / "run"
    options = ["--net", "ours", "--data-dir", data_dir, "--out", out, "--batch-size", 16, "--steps", 2]
    text = run(CONDITIONAL, *options, "--epochs", 1)
    assert "502,308 parameters, 24 images" in text and "(published 1010)" in text
    pictures = ["labels.png", "loss.png", "samples.png"]
    first = {name: (out / name).read_bytes() for name in pictures}
    assert sampled(out / "checkpoint.npz", "--label", "7", "--count", "1") == (28, 28)
    run(CONDITIONAL, *options, "--sample-only")
    assert all((out / name).read_bytes() == first[name] for name in pictures)
    run(CONDITIONAL, *options, "--epochs", 3, "--resume")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"], r["images"]) for r in records] == [(0, 2, 24), (1, 4, 24), (2, 6, 24)]
    factors = [(step + 1) / 100 * (1 + np.cos(np.pi * step / steps)) / 2 for step, steps in [(1, 2), (3, 6), (5, 6)]]
    assert [r["lr"] for r in records] == pytest.approx([3e-3 * factor for factor in factors])


@pytest.mark.parametrize("net", ["tutorial", "ours"])
def test_the_test_loss_draws_the_same_for_both_nets(numpy_backend, data_dir, net):
    example = runpy.run_path(str(CONDITIONAL))

    def loss(x0, labels, rng, sample_offset):
        return tensor((10 * x0[:, 0, 0, 0] + rng.uniform(len(labels), sample_offset=sample_offset)).mean())

    found = example["test_loss"](loss, Namespace(net=net, data="mnist", data_dir=data_dir, seed=3))
    first = data.to_float(data.mnist(data_dir, "test").images)[:, 0, 0, 0]
    each = [10 * first.mean() + Rng(3).child("test").child(i).uniform(24).mean() for i in range(5)]
    assert found == f"loss {np.mean(each):.2f} +- {np.std(each, ddof=1) / 5**0.5:.2f}"


@pytest.mark.slow
def test_words_become_pictures(tmp_path):
    out = tmp_path / "run"
    options = ["--out", out, "--channels", 8, 16, "--steps", 2, "--samples", 3]
    training = ["--drawn", 120, "--images", 120, "--batch-size", 64]
    text = run(WORDS, "a seven", "a small bold zero", *options, *training)
    assert re.search(r"30 words, \d+ pictures, \d+ held out", text)
    assert imread(out / "samples.png").shape[0] == (2 * 30 + 2) * 3  # a row for each prompt
    first = (out / "samples.png").read_bytes()
    for name in ("checkpoint.npz", "model.npz"):
        assert sampled(out / name, "--prompt", "a bold seven", "--count", "1") == (28, 28)
    if EMULATED:
        return
    options = options[:2] + options[5:]  # the model knows its channels
    text = run(WORDS, "a seven", "a small bold zero", *options)
    assert "held out" not in text and (out / "samples.png").read_bytes() == first  # it has been trained
    assert f"the model is {out / 'model.npz'}, trained before" in text
    run(WORDS, "a seven", *options, "--sweep", 0, 2, "--negative", "bold", "--interval", 0.1, 5, "--maps")
    assert imread(out / "samples.png").shape[0] == (2 * 30 + 2) * 3 + 30  # the prompt is above
    assert 40 < imread(out / "maps.png").shape[0] - (2 * 30 + 2) * 3 < 90  # a title and the names of the columns are
    assert imread(out / "words.png").ndim == 3
    text = run(WORDS, "a seven", *options, "--drawn", 700, status=1)
    assert text == f"the model in {out} was trained with drawn 120, not 700: choose another --out\n"
    text = run(WORDS, "a bald seven", *options, status=1)
    assert "the word 'bald' of the prompt 'a bald seven' is not among the 30 known ones: the nearest are 'bold'" in text
    assert "Traceback" not in text
    (out / "model.npz").unlink()  # as if the training had been interrupted
    assert "was not finished: --resume goes on" in run(WORDS, "a seven", *options, status=1)
    text = run(WORDS, "a bald seven", "--out", tmp_path / "other", *training, status=1)
    assert "'bald'" in text and not (tmp_path / "other").exists()  # said before the training


@pytest.fixture
def own_pictures(tmp_path):
    """Twelve pictures of 20x24 in colour, with captions of seven words in a table."""
    folder = tmp_path / "pets"
    folder.mkdir()
    lines = ["file,caption"]
    for i in range(12):
        pixels = np.zeros((20, 24, 3))
        pixels[:, : 4 + i, i % 3] = 1
        imsave(folder / f"{i}.png", pixels)
        lines.append(f"{i}.png,a {('red', 'green', 'blue')[i % 3]} {('cat', 'dog')[i % 2]} sits")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def own_options(folder, out):
    training = ["--images", 24, "--batch-size", 8, "--channels", 8, 8]
    return ["--data", folder, "--out", out, "--steps", 1, "--samples", 2, *training]


@on_the_host
def test_words_become_pictures_of_your_own(tmp_path, own_pictures, monkeypatch, capsys):
    out = tmp_path / "run"
    options = own_options(own_pictures, out)
    assert "multiples of 4, not 30x24: --size 32x24 resizes" in main(monkeypatch, WORDS, *options, "--size", "30x24")
    assert not out.exists()
    assert main(monkeypatch, WORDS, "a red cat", *options, "--size", "24x16", "--maps") == 0
    assert re.search(r"7 words, 11 pictures, 1 held out", capsys.readouterr().err)
    assert imread(out / "samples.png").shape[0] == (26 + 2) * 3  # a row of pictures 24 pixels high
    assert 40 < imread(out / "maps.png").shape[0] - (3 * 26 + 2) * 3 < 90  # a title, the names of the columns
    (record,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert record["validation"] == pytest.approx(validation_by_hand(own_pictures, out), rel=1e-4)
    for file in own_pictures.iterdir():  # painting needs the model alone
        file.unlink()
    assert main(monkeypatch, WORDS, "--out", out, "--steps", 1, "--samples", 2) == 0
    assert imread(out / "samples.png").shape[0] == (4 * 26 + 2) * 3  # four captions of the data
    for more, message in (
        (["--judge", 10], "no judge knows what is in your own pictures"),
        (["--data", "glyphs"], f"was trained on {own_pictures}, not on glyphs"),
        (["a yellow cat"], "'yellow'"),
        (["--data", own_pictures, "--size", "16x24"], f"{out} was trained with size [24, 16], not [16, 24]: choose"),
        (["--channels", 16, 8], f"{out} was trained with channels [8, 8], not [16, 8]: choose another --out"),
        (["--drawn", 600], f"was trained on {own_pictures}, not on glyphs"),
    ):
        assert message in main(monkeypatch, WORDS, "--out", out, *more)
    same = ["--data", own_pictures, "--size", "24x16", "--channels", 8, 8]
    assert main(monkeypatch, WORDS, "--out", out, *same, "--steps", 1, "--samples", 2) == 0
    by_heun = (out / "samples.png").read_bytes()
    assert main(monkeypatch, WORDS, "--out", out, "--sampler", "ddpm", "--steps", 1, "--samples", 2) == 0
    assert (out / "samples.png").read_bytes() != by_heun


def validation_by_hand(folder, out):
    """The EDM loss of the averaged weights on the picture that was held out, in one batch."""
    state = saving.load(out / "model.npz")
    tokenizer = Tokenizer.from_array(state["model"]["net.vocabulary"])
    args = Namespace(training_seed=0, shape=[24, 16, 3], channels=[8, 8])
    denoiser, ema = runpy.run_path(str(WORDS))["new_model"](tokenizer, args, 1.0)
    denoiser.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    pictures = data.folder(folder, size=(24, 16))  # of these the hash chooses none, so the first is held out
    x0, tokens = data.to_float(pictures.images[[0] * 512], -1, 1), tokenizer.encode(pictures.captions[:1] * 512)
    rng = Rng(0).child("validation")
    with ema.applied(), no_grad():
        x0, tokens = map(backend.to_device, (x0, tokens))
        return edm_loss(denoiser, x0, rng, mean=0.0, std=1.6, tokens=tokens).item()


@on_the_host
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("cat", "rat", "is of other captions: only one of the two vocabularies has cat, rat"),
        ("sits sits", "sits", "is of other captions: the longest has 5 words, not 4"),
        (None, None, "is of other pictures: their standard deviation is "),
    ],
)
def test_a_run_does_not_go_on_with_other_captions_or_pictures(
    tmp_path, own_pictures, monkeypatch, before, after, message
):
    """Even if there are as many words, captions and pictures as before, so that the net and the batches fit."""
    table, out = own_pictures / "captions.csv", tmp_path / "run"
    table.write_text(table.read_text() + " sits")  # the last caption is longer than the others
    assert main(monkeypatch, WORDS, *own_options(own_pictures, out)) == 0
    (out / "model.npz").unlink()
    if before:
        table.write_text(table.read_text().replace(before, after))
    else:
        imsave(own_pictures / "5.png", np.full((20, 24, 3), 0.5))
    checkpoint = (out / "checkpoint.npz").read_bytes()
    found = main(monkeypatch, WORDS, *own_options(own_pictures, out), "--resume")
    assert found.startswith(f"{out / 'checkpoint.npz'} {message}") and "\n" not in found
    assert (out / "checkpoint.npz").read_bytes() == checkpoint


@on_the_host
def test_the_noise_levels_of_a_training_are_an_option_and_stay_as_they_are(tmp_path, own_pictures, monkeypatch, capsys):
    losses = []
    for noise in ([], ["--noise", "0.4", "1.4"]):
        out = tmp_path / f"run{len(noise)}"
        assert main(monkeypatch, WORDS, *own_options(own_pictures, out), *noise) == 0
        losses.append(json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] != losses[1] and tinydiff.load(out / "model.npz").noise == (0.4, 1.4)
    again = [WORDS, *own_options(own_pictures, out)]
    assert "was trained with --noise 0.4 1.4: choose another" in main(monkeypatch, *again, "--noise", "0", "1.6")
    (out / "model.npz").unlink()  # as if it had been interrupted
    message = main(monkeypatch, *again, "--resume", "--noise", "0", "1.6")
    assert "has learned with --noise 0.4 1.4: give the same, or another --out" in message
    assert main(monkeypatch, *again, "--resume") == 0
    assert tinydiff.load(out / "model.npz").noise == (0.4, 1.4)  # not the default
    assert main(monkeypatch, *again, *noise) == 0
    (out / "model.npz").unlink()
    (out / "checkpoint.npz").write_bytes((out / "checkpoint.npz").read_bytes()[:1000])
    assert "damaged" in main(monkeypatch, *again, "--resume")
    capsys.readouterr()
    assert main(monkeypatch, WORDS, "--noise", "0", "0") == 2
    assert "--noise: STD must be positive, not 0" in capsys.readouterr().err


@on_the_host
def test_an_interrupted_run_knows_its_pictures(tmp_path, own_pictures, monkeypatch, capsys):
    out = tmp_path / "run"
    options = own_options(own_pictures, out)
    assert main(monkeypatch, WORDS, *options) == 0
    (out / "model.npz").unlink()  # as if it had been interrupted
    without = [x for i, x in enumerate(options) if not {"--data", "--size"} & {str(x), str(options[i - 1])}]
    assert len(without) < len(options)
    message = main(monkeypatch, WORDS, *without, "--data", "glyphs", "--resume")
    assert f"has learned from {own_pictures}, not from glyphs" in message
    assert main(monkeypatch, WORDS, *without, "--resume") == 0 and (out / "model.npz").exists()
    capsys.readouterr()
    assert main(monkeypatch, WORDS, *without, "--resume") == 0
    assert f"the training in {out} is finished, so there is nothing to resume" in capsys.readouterr().err


@on_the_host
def test_a_checkpoint_says_how_its_folder_was_read(tmp_path, own_pictures, monkeypatch):
    rows = (own_pictures / "captions.csv").read_text().replace("caption", "species").replace("cat", "caf\xe9")
    (own_pictures / "captions.csv").unlink()
    (own_pictures / "mine.csv").write_text(rows, encoding="cp1252")
    (own_pictures / "3.png").write_bytes(b"<html>")
    out = tmp_path / "run"
    reading = ["--captions", "mine.csv", "--classes", "species", "--encoding", "cp1252", "--skip-broken"]
    options = own_options(own_pictures, out)
    with pytest.warns(UserWarning, match=r"3\.png: is no picture"):
        assert main(monkeypatch, WORDS, *options, *reading, "--size", "24") == 0
        assert tinydiff_main(["eval", str(out / "checkpoint.npz")]) == 0
        (out / "model.npz").unlink()  # as if it had been interrupted
        assert main(monkeypatch, WORDS, *options, "--resume") == 0 and (out / "model.npz").exists()


@on_the_host
def test_broken_pictures_of_your_own_are_left_out_on_request(tmp_path, own_pictures, monkeypatch, capsys):
    (own_pictures / "3.png").write_bytes(b"<html>")
    options = own_options(own_pictures, tmp_path / "run")
    message = main(monkeypatch, WORDS, *options)
    assert (
        "3.png: is no picture" in message and "--skip-broken leaves out" in message and not (tmp_path / "run").exists()
    )
    with pytest.warns(UserWarning, match=r"3\.png: is no picture"):
        assert main(monkeypatch, WORDS, *options, "--skip-broken") == 0
    assert re.search(r" 10 pictures, 1 held out", capsys.readouterr().err)


def test_pictures_of_your_own_that_say_nothing_are_refused(tmp_path, own_pictures, monkeypatch):
    options = own_options(own_pictures, tmp_path / "run")
    (own_pictures / "captions.csv").unlink()
    assert "have no captions" in main(monkeypatch, WORDS, *options)
    for i in range(1, 12):
        (own_pictures / f"{i}.png").unlink()
    (own_pictures / "0.txt").write_text("a cat")
    assert "there must be two pictures or more" in main(monkeypatch, WORDS, *options)
    assert "is not there" in main(monkeypatch, WORDS, "--data", tmp_path / "none", "--out", tmp_path / "run")
    assert main(monkeypatch, WORDS, "--data", "mnist", "--size", 64) == 2


def test_handwriting_is_not_drawn(monkeypatch, capsys):
    assert main(monkeypatch, WORDS, "--data", "mnist", "--drawn", 600) == 2
    assert "--drawn is for --data glyphs and scenes, not for --data mnist" in capsys.readouterr().err


@on_the_host
def test_words_become_handwriting_and_are_judged(tmp_path, data_dir, monkeypatch, capsys):
    out = tmp_path / "run"
    options = ["--data-dir", data_dir, "--out", out, "--steps", 1, "--samples", 2]
    training = ["--data", "mnist", "--images", 24, "--batch-size", 8, "--channels", 8, 8]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    no_judge = "there is no judge yet: python examples/08_classifier.py --data mnist"
    assert no_judge in main(monkeypatch, WORDS, *training, *options, "--judge", 5)
    assert not out.exists()  # said before the training
    assert main(monkeypatch, WORDS, "a seven", *training, *options) == 0
    printed = capsys.readouterr().err
    assert "11 words" in printed
    assert imread(out / "samples.png").shape[0] == (30 + 2) * 3
    assert no_judge in main(monkeypatch, WORDS, *options, "--judge", 5)
    common = runpy.run_path(str(EXAMPLES / "common.py"))
    judge, _, _, path = common["new_judge"](argparse.Namespace(data="mnist", data_dir=data_dir))
    path.parent.mkdir(parents=True)
    saving.save(path, judge.state_dict())
    compared = []
    nearest = metrics.nearest
    monkeypatch.setattr(metrics, "nearest", lambda a, b: compared.append(len(b)) or nearest(a, b))
    assert main(monkeypatch, WORDS, *options, "--judge", 5, "--sweep", 0) == 0
    table = capsys.readouterr().out
    assert "| digit | Frechet" in table and "captions seen" in table and "held out" not in table
    learned, held = map(int, re.search(r"(\d+) pictures, (\d+) held out", printed).groups())
    assert learned + held == 24 and held and set(compared) == {learned}  # a copy is one of what was learned from


@pytest.mark.slow
@on_the_host
def test_the_classifier_is_trained_once(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--data-dir", data_dir, "--out", tmp_path / "run"]
    assert "training a judge for mnist" in run(CLASSIFIER, *options)
    assert imread(tmp_path / "run" / "mistakes.png").ndim == 3
    assert "training a judge" not in run(CLASSIFIER, *options)
    (kept,) = (tmp_path / "cache" / "tinydiff" / "judges").iterdir()
    labels = data_dir / "train-labels-idx1-ubyte"
    sound = labels.read_bytes()
    labels.write_bytes(sound[:8] + sound[:7:-1])  # other data, another judge
    assert "training a judge for mnist" in run(CLASSIFIER, *options)
    labels.write_bytes(sound)
    kept.write_bytes(kept.read_bytes()[:100])
    assert "train it again, python examples/08_classifier.py --data mnist" in run(CLASSIFIER, *options, status=1)
    assert "training a judge for mnist" in run(CLASSIFIER, *options, "--again")


@pytest.mark.slow
@on_the_host
def test_a_judge_that_cannot_be_kept_is_used_all_the_same(tmp_path, data_dir, monkeypatch, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tinydiff").write_text("a file, where the directory of the cache should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(monkeypatch, CLASSIFIER, "--data-dir", data_dir, "--out", tmp_path / "run") == 0
    printed = capsys.readouterr()
    assert re.search(r"\nthe judge is not kept \(.*\): set XDG_CACHE_HOME to a directory of yours\n", printed.err)
    assert re.search(r"\| digit \| \d+.\d\d \+- .* %", printed.out)


# Emulated on a CPU it takes five minutes; the same function runs there on handwriting, in half a minute (above).
@pytest.mark.slow
@pytest.mark.skipif(EMULATED, reason="the figures are those of the host")
def test_samples_of_words_are_judged_between_real_pictures_and_noise(tmp_path, monkeypatch, capsys):
    """By a judge and a generator of few pictures; a row for each of them, for captions seen and held out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw = data.glyphs
    monkeypatch.setattr(data, "glyphs", lambda n, seed: draw(min(n, 1000), seed, variety="plain", cache=False))
    out = ["--out", tmp_path / "run"]
    training = ["--drawn", 600, "--images", 600, "--batch-size", 64, "--channels", 8, 16, "--steps", 2]
    assert "there is no judge yet" in main(monkeypatch, WORDS, *out, *training, "--judge", 40)
    assert not (tmp_path / "run").exists()  # said before the training
    assert main(monkeypatch, CLASSIFIER, "--data", "glyphs", *out) == 0
    capsys.readouterr()
    assert main(monkeypatch, WORDS, *out, *training, "--judge", 40) == 0
    header, _, *rows = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    names = ["real", "guidance 0", "guidance 1", "noise"]
    assert [row[0] for row in rows] == [f"{a}, 40 captions {b}" for b in ("seen", "held out") for a in names]
    real, _, _, noise, *_ = ({name: float(cell.split()[0]) for name, cell in zip(header[1:], row[1:])} for row in rows)
    assert real["digit"] > 60 > 40 > noise["digit"] and real["Frechet distance"] < noise["Frechet distance"] / 10
    assert real["precision"] > 80 and real["recall"] > 80 > noise["recall"]
    assert real["copies"] == 2.5 and noise["copies"] == 0  # below the quantile of 0.01 of 40 real pictures is one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count", "numbers"), [("tutorial", 709, "10x10x4 = 400"), ("variational", 40_456, "14x14x2 = 392"),
                                   ("codebook", 40_902, "14x14x2 = 392")]
)  # fmt: skip
def test_an_autoencoder_is_trained_and_drawn_again(tmp_path, data_dir, monkeypatch, capsys, kind, count, numbers):
    out = tmp_path / "run"
    options = ["--data-dir", data_dir, "--out", out, "--kind", kind]
    assert main(monkeypatch, AUTOENCODER, *options, "--epochs", 2, "--batch-size", 8) == 0
    printed = capsys.readouterr()
    assert f"{count:,} parameters, 24 images" in printed.err
    assert re.search(rf"{numbers} numbers for 784; mean squared error 0\.\d+ on 24 test images", printed.out)
    assert ("perplexity" in printed.out) == (kind == "codebook")
    names = ["checkpoint.npz", "latent_space.npz", "log.jsonl", "loss.png", "pairs.png", "prior.png", "walk.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    first = (out / "walk.png").read_bytes()
    (out / "walk.png").unlink()
    assert main(monkeypatch, AUTOENCODER, "--data-dir", data_dir, "--out", out, "--draw-only") == 0
    assert (out / "walk.png").read_bytes() == first and printed.out == capsys.readouterr().out
    if kind == "tutorial":
        assert main(monkeypatch, AUTOENCODER, "--kind", kind, "--data", "scenes") == 2
        assert main(monkeypatch, AUTOENCODER, "--kind", kind, "--perceptual", 1) == 2
        saving.save(out / "latent_space.npz", {"settings": {}})
        assert "no autoencoder with its latent space" in main(monkeypatch, AUTOENCODER, "--out", out, "--draw-only")


@pytest.mark.slow
def test_a_judge_looks_at_what_an_autoencoder_gives_back(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--data-dir", data_dir, "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 8]
    assert "there is no judge yet" in main(monkeypatch, AUTOENCODER, *options, "--perceptual", 1)
    keep_a_judge(argparse.Namespace(data="mnist", data_dir=data_dir))
    losses = []
    for weight in (0, 0.1):
        assert main(monkeypatch, AUTOENCODER, *options, "--perceptual", weight) == 0
        losses.append(json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[1] > losses[0] * 1.01  # the distance is a positive term
    assert "began with --perceptual 0.1, not 0: give the same" in main(monkeypatch, AUTOENCODER, *options, "--resume")
    assert main(monkeypatch, AUTOENCODER, *options, "--resume", "--perceptual", 0.1) == 0


def keep_a_judge(args):
    """In the cache, where the examples look for it; not trained."""
    common = runpy.run_path(str(EXAMPLES / "common.py"))
    judge, _, _, path = common["new_judge"](args)
    path.parent.mkdir(parents=True)
    saving.save(path, judge.state_dict())


@pytest.mark.slow
def test_the_tutorials_latent_unet_learns_from_raw_and_from_standardised_latents(
    tmp_path, data_dir, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = ["--data-dir", data_dir, "--autoencoder", tmp_path / "a" / "latent_space.npz"]
    assert "train a model first, python examples/09_autoencoder.py --kind" in main(monkeypatch, LATENT_UNET, *kept)
    for kind in ("variational", "tutorial"):
        train = ["--data-dir", data_dir, "--out", tmp_path / "a", "--epochs", 1, "--batch-size", 8]
        assert main(monkeypatch, AUTOENCODER, "--kind", kind, *train) == 0
        if kind == "variational":
            assert "has latents of (14, 14, 2), but this net is for (10, 10, 4)" in main(
                monkeypatch, LATENT_UNET, *kept
            )
    assert "there is no judge yet" in main(monkeypatch, LATENT_UNET, *kept)
    keep_a_judge(argparse.Namespace(data="mnist", data_dir=data_dir))
    for raw in ([], ["--raw"]):
        capsys.readouterr()
        run = tmp_path / ("raw" if raw else "run")
        options = [*kept, "--epochs", 1, "--steps", 2, "--out", run, *raw]
        if raw:
            assert "must be the directory of a run" in main(monkeypatch, LATENT_UNET, *options, "--beside", tmp_path)
            options += ["--beside", tmp_path / "run"]
        done = main(monkeypatch, LATENT_UNET, *options)
        printed = capsys.readouterr()
        if raw:
            assert done == 0 and re.search(r"the digit is right in \d+\.\d\d \+- ", printed.out)
        else:  # after one step nothing is dark in what it decodes
            assert "the samples cannot be judged: Classifier: the numbers of the images" in done
        standard = "latents of deviation [1. 1. 1. 1.] around" in printed.err.replace("  ", " ")
        assert "285,284 parameters, 24" in printed.err and standard == (not raw)
        assert imread(run / "samples.png").shape[0] == (10 * 30 + 2) * 3
        assert sampled(run / "checkpoint.npz", "--label", "7", "--count", "1") == (28, 28)
    both = imread(tmp_path / "raw" / "beside.png")
    assert both.shape[1] == 9 * 130 and not np.array_equal(both[:, :585], both[:, 585:])


@pytest.mark.skipif(EMULATED, reason="64x64 pictures take long on the emulated device, and the sizes are the same")
def test_the_latents_of_scenes_get_a_net_of_two_levels_which_begins_at_half_the_side(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, trainings, train = tmp_path / "run", [], training.train

    def noted(model, loss, data, *arguments, **options):
        trainings.append((np.shape(data if options["out"].name == "autoencoder" else data[0])[1:], options))
        return train(model, loss, data, *arguments, **options)

    monkeypatch.setattr(training, "train", noted)
    few = ["--drawn", 100, "--images", 50, "--steps", 1, "--samples", 1, "--out", out]
    run = [LATENT, "a red circle above a blue square", *few, "--autoencoder-images", 50]
    assert main(monkeypatch, *run) == 0
    shapes = [(64, 64, 3), (8, 8, 4), (16, 16, 4)]
    assert [shape for shape, _ in trainings] == shapes
    assert [options["about"].get("noise") for _, options in trainings] == [None, [1.4, 0.7], [0.4, 1.8]]
    (kept,) = (tmp_path / "cache" / "tinydiff" / "latents").iterdir()
    assert np.load(kept)["latents"].shape == (100, 16, 16, 4)
    net = tinydiff.load(out / "model.npz").model.net.net
    assert net.patch == 1 and net.positions and net.levels == 2 and net.pooled is None

    learned = saving.load(out / "model.npz")["model"]
    gone = ["model.npz", "checkpoint.npz", "coarse/checkpoint.npz", "latent_space.npz"]
    for i in range(len(gone)):  # as if it had been interrupted in the last training, before it, and so on
        for name in gone[: i + 1]:
            (out / name).unlink()
        assert "was not finished: --resume goes on" in main(monkeypatch, *run)
        del trainings[:]
        assert main(monkeypatch, *run, "--resume") == 0
        assert [shape for shape, _ in trainings] == shapes[[2, 1, 1, 0][i] :]
        again = saving.load(out / "model.npz")["model"]
        assert all(np.array_equal(again[name], value) for name, value in learned.items())

    name = "net.encoder.embedding.weight"  # the last training goes on from what the one before has learned
    state = saving.load(out / "coarse" / "checkpoint.npz")
    state["model"][name] = state["model"][name] + 1
    saving.save(out / "coarse" / "checkpoint.npz", state)
    for path in (out / "model.npz", out / "checkpoint.npz"):
        path.unlink()
    assert main(monkeypatch, *run, "--resume") == 0
    assert abs(saving.load(out / "model.npz")["model"][name] - learned[name] - 1).max() < 0.1

    for path in (out / "model.npz", out / "checkpoint.npz"):
        path.unlink()
    assert "began at half the side, which a net of --channels [96]" in main(
        monkeypatch, *run, "--resume", "--channels", 96
    )
    space = (out / "latent_space.npz").rename(tmp_path / "space.npz")  # as if it had come by --autoencoder
    assert f"there is no {out / 'latent_space.npz'}: give the --autoencoder" in main(monkeypatch, *run, "--resume")
    assert main(monkeypatch, LATENT, *few, "--resume", "--autoencoder", space) == 0
    message = main(monkeypatch, *run, "--out", tmp_path / "new", "--autoencoder", tmp_path / "none.npz")
    assert f"there is no {tmp_path / 'none.npz'}: train it" in message


@pytest.mark.slow
def test_words_become_latents_become_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    few = ["--drawn", 120, "--images", 100, "--autoencoder-images", 100, "--channels", 8]
    options = ["--data", "glyphs", "--out", out, "--steps", 2, "--samples", 2]
    prompt = "a small bold seven"
    message = main(monkeypatch, LATENT, *options, *few, 8)
    assert "2 levels (--channels) need sides that are multiples of 8, not 28x28" in message and not out.exists()
    assert main(monkeypatch, LATENT, prompt, *options, *few, "--story") == 0
    assert re.search(r"30 words, 1\d\d pictures, 1\d held out", capsys.readouterr().err)
    assert imread(out / "samples.png").shape[0] == (30 + 2) * 3
    assert imread(out / "story.png").ndim == imread(out / "pairs.png").ndim == 3
    for name in ("checkpoint.npz", "model.npz"):  # the autoencoder is in them
        assert sampled(out / name, "--prompt", prompt, "--count", "1") == (28, 28)
    kept = [*(tmp_path / "cache" / "tinydiff" / "latents").iterdir()]
    assert len(kept) == 1 and np.load(kept[0])["latents"].shape == (120, 7, 7, 8)
    first = (out / "samples.png").read_bytes()
    if EMULATED:
        return
    capsys.readouterr()
    assert main(monkeypatch, LATENT, prompt, *options) == 0 and (out / "samples.png").read_bytes() == first
    assert f"the model is {out / 'model.npz'}, trained before" in capsys.readouterr().err
    story = (out / "story.png").read_bytes()
    assert main(monkeypatch, LATENT, prompt, *options, "--sampler", "ddpm", "--story") == 0
    assert (out / "samples.png").read_bytes() != first and (out / "story.png").read_bytes() != story
    message = main(monkeypatch, LATENT, prompt, *options, "--kl-weight", 0)
    assert "model.npz is there already, so --kl-weight cannot change its autoencoder" in message
    assert main(monkeypatch, LATENT, prompt, *options, "--sweep", 0, 2, "--negative", "heavy") == 0
    assert imread(out / "samples.png").shape[0] == (2 * 30 + 2) * 3 + 30  # the prompt is above
    assert "the word 'pink'" in main(monkeypatch, LATENT, "a pink seven", *options)
    assert "was trained on glyphs, not on scenes" in main(monkeypatch, LATENT, *options, "--data", "scenes")
    assert "there is no judge yet" in main(monkeypatch, LATENT, *options, "--judge", 5)

    raw = ["--data", "glyphs", "--autoencoder", out / "latent_space.npz", "--out", tmp_path / "raw", "--steps", 1]
    train = ["--drawn", 120, "--images", 100, "--channels", 8]
    assert main(monkeypatch, LATENT, prompt, *raw, *train, "--raw") == 0
    space = tinydiff.load(tmp_path / "raw" / "model.npz").space
    assert (space.std == 1).all() and (space.mean == 0).all()
    assert main(monkeypatch, LATENT, prompt, *raw) == 0  # the model knows that its latents are raw
    assert "was trained without --raw" in main(monkeypatch, LATENT, *options, "--raw")
    (tmp_path / "raw" / "model.npz").unlink()  # as if it had been interrupted
    assert "has learned from other latents" in main(monkeypatch, LATENT, *raw, *train, "--resume")
    assert main(monkeypatch, LATENT, prompt, *raw, *train, "--resume", "--raw") == 0

    kept = {name: (out / name).read_bytes() for name in ("model.npz", "checkpoint.npz", "latent_space.npz")}
    for name in ("model.npz", "checkpoint.npz"):
        (out / name).unlink()
    again = [LATENT, prompt, *options, *few, "--resume"]
    assert "has learned from glyphs, not from scenes" in main(monkeypatch, *again, "--data", "scenes")
    assert "was trained with --kl-weight 0.0001, not 0.5" in main(monkeypatch, *again, "--kl-weight", 0.5)
    assert main(monkeypatch, *again) == 0 and not (out / "coarse").exists()
    for name in kept:  # as if it had been interrupted in its autoencoder
        (out / name).unlink()
    message = main(monkeypatch, *again, "--kl-weight", 0)
    assert "began with --kl-weight 0.0001, not 0: give the same, or another --out" in message
    for name, content in kept.items():
        (out / name).write_bytes(content)

    state = saving.load(out / "latent_space.npz")  # an autoencoder that this diffusion does not know
    state["space"]["mean"] = state["space"]["mean"] + 1
    saving.save(tmp_path / "other.npz", state)
    message = main(monkeypatch, LATENT, *options, "--autoencoder", tmp_path / "other.npz")
    assert re.search(r"the latents of another autoencoder than .*other\.npz .*give that one by --autoencoder", message)
    (tmp_path / "pixels").mkdir()
    saving.save(tmp_path / "pixels" / "model.npz", {"model": {}, "ema": {}, "settings": {"data": "scenes"}})
    assert "is no model of this example" in main(monkeypatch, LATENT, "--out", tmp_path / "pixels")
    saving.save(tmp_path / "other.npz", {"model": {}})
    message = main(monkeypatch, LATENT, *options, "--autoencoder", tmp_path / "other.npz")
    assert "other.npz is no autoencoder with its latent space" in message
    message = main(monkeypatch, LATENT, "--data", "scenes", "--drawn", 100, "--out", tmp_path / "new", "--autoencoder",
                   out / "latent_space.npz")  # fmt: skip
    assert "takes pictures of (28, 28, 1), but those of scenes have the shape (64, 64, 3)" in message


@pytest.mark.slow
def test_the_quickstart_trains_goes_on_and_samples(tmp_path, data_dir):
    out = tmp_path / "run"
    options = ["--data", "mnist", "--data-dir", data_dir, "--out", out, "--batch-size", 8, "--micro-batch", 4]
    options += ["--channels", 8, 16, "--steps", 2]
    text = run(QUICKSTART, *options, "--images", 24)  # one round
    assert "parameters, 24 images" in text and "samples.png after" in text
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.npz", "log.jsonl", "loss.png", "samples.png"]
    first = (out / "samples.png").read_bytes()
    assert imread(out / "samples.png").shape[0] == (10 * 30 + 2) * 3  # one row per digit
    assert sampled(out / "checkpoint.npz", "--label", "7", "--count", "1") == (28, 28)
    if EMULATED:
        return
    run(QUICKSTART, "--out", out, "--steps", 2, "--sample-only")  # the checkpoint knows its data and its channels
    assert (out / "samples.png").read_bytes() == first
    assert f"there is no {tmp_path / 'checkpoint.npz'}: train first, without --resume\n" == run(
        QUICKSTART, "--out", tmp_path, "--resume", status=1
    )
    run(QUICKSTART, *options, "--images", 48, "--resume")
    assert "nothing is left to train: all 6 steps were done before" in run(
        QUICKSTART, *options, "--images", 48, "--resume"
    )
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"], r["images"]) for r in records] == [(0, 3, 24), (1, 6, 24)]
    assert (out / "samples.png").read_bytes() != first


@pytest.mark.slow
def test_the_quickstart_samples_every_digit_in_every_style_of_the_glyphs(tmp_path, monkeypatch, each_backend):
    few = data.glyphs(80, 0, variety="plain", cache=False)
    monkeypatch.setattr(data, "glyphs", lambda n, seed, variety: few)
    options = ["--out", tmp_path, "--images", 80, "--channels", 8, 16, "--steps", 2]
    assert main(monkeypatch, QUICKSTART, *options) == 0
    height, width = imread(tmp_path / "samples.png").shape[:2]
    names = height - (10 * 30 + 2) * 3, width - (8 * 30 + 2) * 3  # two faces, two weights, two slants
    assert 0 < names[0] < 50 and 0 < names[1] < 100


def test_one_dimension_draws_and_walks_as_far_as_it_must(tmp_path, monkeypatch, capsys, each_fast_backend):
    """Standard deviations: sqrt(10) at the end of the walk from a point, 0.1^(1/2) where the way back ends."""
    assert main(monkeypatch, ONE_DIMENSION, "--walkers", 2000, "--steps", 3, "--out", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learned.png", "mixture.png", "point.png"]
    forward, reverse, *_ = capsys.readouterr().out.splitlines()
    assert float(forward.split()[-1]) == pytest.approx(10**0.5, rel=5 / 4000**0.5)
    assert float(reverse.split()[-1]) == pytest.approx(0.1**0.5, rel=5 / 4000**0.5)


@pytest.mark.slow
def test_two_dimensions_compares_four_losses_and_draws(tmp_path, monkeypatch, capsys, each_fast_backend):
    assert main(monkeypatch, TWO_DIMENSIONS, "--steps", 60, "--out", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.png", "scores.png"]
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()[2:6]]
    assert [row[0].strip() for row in rows] == ["explicit", "denoising", "implicit", "sliced"]
    errors = np.array([[float(cell) for cell in row[1:-1]] for row in rows])
    assert (errors[:, -1] < 0.9).all()  # 1 is the error of the zero score


@pytest.mark.slow
def test_a_model_of_glyphs_is_used(tmp_path, monkeypatch, each_fast_backend):
    """Trained for a moment, and used in four ways: twelve rows of ten; a second run gives the same, and a run without
    the condition gives others."""
    few = data.glyphs(80, 0, variety="plain", cache=False)
    monkeypatch.setattr(data, "glyphs", lambda n, seed, variety: few)
    # a rate so large that the condition matters after two steps, and not by the rounding of the last digit alone
    train = ["--out", tmp_path, "--images", 80, "--channels", 8, 16, "--steps", 1, "--lr", 1]
    assert main(monkeypatch, QUICKSTART, *train) == 0
    options = ["--checkpoint", tmp_path / "checkpoint.npz", "--steps", 2]

    def paint(name, *more):
        assert main(monkeypatch, USING, *options, "--out", tmp_path / f"{name}.png", *more) == 0
        return imread(tmp_path / f"{name}.png")

    one = paint("one")
    assert one.shape[0] == (12 * 30 + 2) * 3
    if each_fast_backend == "cupy":  # emulated, each picture takes half a minute
        return
    two, untold = paint("two"), paint("untold", "--untold")
    np.testing.assert_array_equal(one, two)
    assert (one != untold).any()
    assert main(monkeypatch, USING, *options, "--compare", 5, "--out", tmp_path / "compare.png") == 0
    assert 0 < imread(tmp_path / "compare.png").shape[0] - (8 * 30 + 2) * 3 < 50  # the digits are named above


@pytest.mark.slow
@on_the_host
def test_a_model_of_mnist_is_used(tmp_path, data_dir):
    train = ["--data", "mnist", "--data-dir", data_dir, "--images", 24, "--channels", 8, 16, "--steps", 1]
    run(QUICKSTART, *train, "--out", tmp_path)
    picture = tmp_path / "deep" / "in.png"
    text = run(
        USING, "--data-dir", data_dir, "--checkpoint", tmp_path / "checkpoint.npz", "--steps", 2, "--out", picture
    )
    assert imread(picture).shape[0] == (12 * 30 + 2) * 3 and "estimated as" in text


def pairs_for_the_judge(n):
    """Real images, as many other ones, and noise with the same greys."""
    images = data.to_float(data.glyphs(2 * n, 0, cache=False).images)  # (2n, 28, 28, 1)
    noise = np.random.default_rng(0).permuted(images[n:].reshape(n, -1), axis=1).reshape(n, 28, 28, 1)
    return images[:n], images[n:], noise


def test_the_judge_cannot_tell_real_from_real_and_can_tell_it_from_noise(numpy_backend):
    """ln 2 within three standard errors and the 0.05 that it is too sure of itself; less than half of it for noise
    whose pixels are those of real images in another order, so that no mean or variance gives it away."""
    judge = runpy.run_path(str(JUDGE))
    assert judge["new_judge"](Rng(0)).count() == 6513
    real, other, noise = pairs_for_the_judge(128)
    losses = judge["held_out_losses"](real, other, Rng(0), steps=50)
    assert losses.shape == (128,) and abs(losses.mean() - np.log(2)) < 0.05 + 3 * losses.std() / 128**0.5 < 0.15
    assert judge["held_out_losses"](real, noise, Rng(0), steps=50).mean() < np.log(2) / 2


def test_no_judge_has_seen_what_it_is_asked_about(monkeypatch):
    judge = runpy.run_path(str(JUDGE))
    held_out_losses = judge["held_out_losses"]
    real, fake = (np.arange(8.0, dtype=np.float32).reshape(8, 1, 1, 1) + offset for offset in (0, 100))
    learned, asked = [], []

    def trained_judge(real, fake, rng, steps):
        learned.append({*real.ravel(), *fake.ravel()})

    def pair_losses(judge, real, fake, rng):
        asked.append({*real.ravel(), *fake.ravel()})
        return tensor(real.ravel())

    monkeypatch.setitem(held_out_losses.__globals__, "trained_judge", trained_judge)
    monkeypatch.setitem(held_out_losses.__globals__, "pair_losses", pair_losses)
    np.testing.assert_array_equal(held_out_losses(real, fake, Rng(0)), np.arange(8))  # each pair once, in its place
    assert all(not a & b and len(a | b) == 16 for a, b in zip(learned, asked)) and len(asked) == judge["FOLDS"]


@pytest.mark.slow
@pytest.mark.parametrize("skips", ["add", "concat"])
def test_samplers_are_judged(tmp_path, data_dir, monkeypatch, capsys, skips):
    """One row per sampler, with its own number of evaluations, and one of real images; the same in a second run."""
    train = ["--skips", skips, "--data-dir", data_dir, "--out", tmp_path, "--batch-size", 24, "--epochs", 1]
    run(SCORE_UNET, *train, "--steps", 2, "--samples", 1)
    judge = runpy.run_path(str(JUDGE))
    few = [("euler_maruyama", 5, {}), ("heun", 5, {"s_churn": 10.0}), ("dpm_solver", 5, {})]
    monkeypatch.setitem(judge["main"].__globals__, "CONTESTANTS", few)
    monkeypatch.setattr(judge["held_out_losses"], "__defaults__", (2,))  # steps of a judge, which only has to run
    options = ["--checkpoint", tmp_path / "checkpoint.npz", "--data-dir", data_dir, "--samples", 8, "--judges", 1]
    monkeypatch.setattr(sys, "argv", [str(JUDGE), *map(str, options)])
    assert judge["main"]() == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("| 8 samples by") and len(lines) == 6
    assert lines[2].startswith("| euler_maruyama, 5 evaluations |") and lines[2].endswith("| 0.000 +- 0.000 |")
    assert "heun, 5 evaluations, s_churn 10" in lines[3] and "(other real images)" in lines[5]
    if EMULATED:
        return
    assert judge["main"]() == 0 and capsys.readouterr().out == text
    assert "takes twice as many real images" in main(monkeypatch, JUDGE, *options, "--samples", 13)


def test_what_cannot_be_judged_is_an_error_of_one_line(tmp_path, data_dir, monkeypatch):
    options = ["--data-dir", data_dir, "--samples", 8, "--checkpoint"]
    assert "train a model first" in main(monkeypatch, JUDGE, *options, tmp_path / "none.npz")
    saving.save(tmp_path / "other.npz", {"model": {"conv1.weight": np.zeros(3)}})
    assert "does not say how its net was made" in main(monkeypatch, JUDGE, *options, tmp_path / "other.npz")
    trained = Trained(ScoreMLP(VESDE().marginal_std, 2, rng=0), VESDE(), (1, 1, 2))
    trained.save(tmp_path / "other.npz")
    assert "is not a checkpoint of examples/03" in main(monkeypatch, JUDGE, *options, tmp_path / "other.npz")


def test_samples_are_judged_as_a_file_has_them():
    images = np.array([-3.0, 0.001, 0.5, 0.9999, 7.0])
    np.testing.assert_array_equal(
        runpy.run_path(str(JUDGE))["as_a_file_has_it"](images), np.array([0, 0, 128 / 255, 1, 1], np.float32)
    )


@pytest.mark.slow
def test_the_likelihood_is_trained_measured_and_written_down(tmp_path, data_dir):
    out = tmp_path / "run"
    options = ["--data-dir", data_dir, "--out", out, "--batch-size", 8, "--micro-batch", 4, "--channels", 8, 16]
    options += ["--bits", 2, "--rtol", 1e-4, "--samples", 4]
    text = run(LIKELIHOOD, *options, "--epochs", 1)
    assert "1 rounds of 24 images" in text
    names = ["bits.txt", "checkpoint.npz", "log.jsonl", "loss.png", "samples.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    first, picture = (out / "bits.txt").read_text(), (out / "samples.png").read_bytes()
    assert re.fullmatch(
        r"-?\d+\.\d{4} \+- \d+\.\d{4} bits per dimension on 2 test images, to a tolerance of 0.0001; "
        r"each pixel by itself \d\.\d{4}\n",
        first,
    )
    assert sampled(out / "checkpoint.npz", "--count", "1") == (28, 28)
    if EMULATED:
        return
    run(LIKELIHOOD, *options, "--measure")
    assert (out / "bits.txt").read_text() == first and (out / "samples.png").read_bytes() == picture
    run(LIKELIHOOD, *options, "--epochs", 2, "--resume")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"], r["images"]) for r in records] == [(0, 3, 24), (1, 6, 24)]
    # a net that knows nothing beyond the first two moments, of pictures that are noise: nearly 8 bits, or more
    assert records[0]["loss"] > 7.5 and (out / "bits.txt").read_text() != first


def test_a_checkpoint_that_is_none_is_an_error_of_one_line(tmp_path, monkeypatch):
    assert "train a model first" in main(monkeypatch, USING, "--checkpoint", tmp_path / "none.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK")
    assert "is no checkpoint of tinydiff" in main(monkeypatch, USING, "--checkpoint", tmp_path / "torn.npz")
    saving.save(tmp_path / "other.npz", {"model": {"conv1.weight": np.zeros(3)}})
    assert "does not say how its net was made" in main(monkeypatch, USING, "--checkpoint", tmp_path / "other.npz")
    Trained(Denoiser(UNet(1, [8], rng=0), 0.5), KarrasSDE(), (28, 28, 1)).save(tmp_path / "other.npz")
    message = main(monkeypatch, USING, "--checkpoint", tmp_path / "other.npz")
    assert "is not a checkpoint of examples/quickstart.py: its net knows no digit" in message


def test_what_a_likelihood_is_of_and_what_it_is_compared_with(each_backend):
    likelihood = runpy.run_path(str(LIKELIHOOD))
    greys = np.array([[[[0]]], [[[255]]]], np.uint8)
    x = np.concatenate([backend.to_host(likelihood["dequantised"](greys, Rng(i))) for i in range(500)], axis=1)
    assert x.shape == (2, 500, 1, 1) and x.dtype == np.float32
    for found, low in zip(x, (-1, 1 - 2 / 256)):  # a grey is all of its cell, and nothing else
        assert low <= found.min() < low + 1e-4 and low + 2 / 256 - 1e-4 < found.max() < low + 2 / 256
    # counted 255 times, and each grey once more: 256 of 511, and 1 of 511
    train = np.full((255, 2, 1), 7, np.uint8)
    assert likelihood["by_itself"](train, np.array([[[7], [9]]], np.uint8)) == pytest.approx(
        -(np.log2(256 / 511) + np.log2(1 / 511)) / 2
    )


@pytest.mark.parametrize("example", [SCORE_UNET, LIKELIHOOD, QUICKSTART, CONDITIONAL])
def test_a_checkpoint_that_does_not_know_its_net_is_an_error_of_one_line(tmp_path, data_dir, monkeypatch, example):
    saving.save(tmp_path / "checkpoint.npz", {"model": {f"layer{i}.weight": np.zeros(3) for i in range(99)}})
    options = ["--data", "mnist", "--data-dir", data_dir, "--out", tmp_path]
    message = main(monkeypatch, example, *options, "--measure" if example == LIKELIHOOD else "--sample-only")
    assert "does not say how its net was made" in message and "train again" in message and len(message) < 500


@pytest.mark.slow
@on_the_host
def test_going_on_with_another_net_is_an_error_of_one_line(tmp_path, data_dir, monkeypatch):
    options = ["--data", "mnist", "--data-dir", data_dir, "--out", tmp_path, "--batch-size", 8, "--steps", 1]
    assert main(monkeypatch, QUICKSTART, *options, "--channels", 8, "--images", 24) == 0
    message = main(monkeypatch, QUICKSTART, *options, "--channels", 16, "--images", 48, "--resume")
    assert f"{tmp_path}/checkpoint.npz: its model is of another run: this state does not fit Denoiser" in message
    message = main(monkeypatch, QUICKSTART, *options, "--channels", 8, "--images", 48, "--resume", "--seed", 3)
    assert message == f"{tmp_path}/checkpoint.npz is of another run: it has seed 0, not 3"


@pytest.mark.parametrize("example", ALL, ids=lambda path: path.stem)
def test_help_says_what_the_example_is_for_and_what_every_option_does(monkeypatch, capsys, example):
    assert main(monkeypatch, example, "--help") == 0
    text = capsys.readouterr().out
    assert runpy.run_path(str(example))["__doc__"].strip() in text
    options = re.findall(r"^  (--\S+.*)((?:\n {8,}.*)*)", text, re.MULTILINE)
    assert {"--seed", "--out"} - {option.split()[0] for option, _ in options} <= {"--out"} and "None" not in text
    for option, more in options:
        assert re.search(r"\S {2,}\S", option) or more.strip(), f"{option} has no help"


@pytest.mark.parametrize("example", ALL, ids=lambda path: path.stem)
def test_an_example_has_its_own_loop_or_calls_train(example):
    """And never a third thing: whoever opens one sees how it learns."""
    text = example.read_text()
    loop = all(f"optimizer.{call}()" in text for call in ("zero_grad", "step")) and (
        ".backward()" in text or "gradients(" in text
    )
    assert loop + ("    state = train(" in text) == (example != USING)  # which learns nothing


@pytest.mark.parametrize("example", [QUICKSTART, SCORE_UNET, LIKELIHOOD])
def test_errors_are_a_line_or_two_and_no_traceback(monkeypatch, tmp_path, example):
    for options, message in [
        (["--data", "mnist", "--data-dir", tmp_path], "lacks train-images-idx3-ubyte"),
        (
            ["--measure" if example == LIKELIHOOD else "--sample-only"],
            f"there is no {tmp_path / 'none' / 'checkpoint.npz'}",
        ),
        (["--resume"], "there is no"),
    ]:
        assert message in main(monkeypatch, example, *options, "--out", tmp_path / "none")


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        (ONE_DIMENSION, ["--walkers", 1], "argument --walkers: must be 2 or more, not 1"),
        (TWO_DIMENSIONS, ["--seed", -1], "argument --seed: must be 0 or more, not -1"),
        (SCORE_UNET, ["--steps", 0], "argument --steps: must be 1 or more, not 0"),
        (SCORE_UNET, ["--compare", "--evaluations", 2], "--evaluations must be 3 or more"),
        (SCORE_UNET, ["--seed", -1], "argument --seed: must be 0 or more, not -1"),
        (ONE_DIMENSION, ["--seed", 2**63], f"argument --seed: must be less than 2**63, not {2**63}"),
        (TWO_DIMENSIONS, ["--steps", "many"], "argument --steps: invalid"),
        (USING, ["--seed", 2**64], "argument --seed: must be less than 2**63"),
        (USING, ["--checkpoint", "."], "argument --checkpoint: must be a file, not a directory, '.'"),
        (JUDGE, ["--seed", 2**64], "argument --seed: must be less than 2**63"),
        (QUICKSTART, ["--out", __file__], "argument --out: must be a directory, or a new one"),
        (QUICKSTART, ["--out", f"{__file__}/run"], f"{__file__} is a file"),
        (QUICKSTART, ["--lr", "nan"], "argument --lr: must be positive and finite, not nan"),
        (QUICKSTART, ["--lr", "fast"], "argument --lr: invalid"),
        (QUICKSTART, ["--steps", 1.5], "argument --steps: invalid"),
        (LIKELIHOOD, ["--fourier", 1.5], "argument --fourier"),
        (USING, ["--compare", 2], "argument --compare: must be 3 or more, not 2"),
        (JUDGE, ["--samples", 7], "argument --samples: must be 8 or more, not 7"),
        (USING, ["--steps", 1], "argument --steps: must be 2 or more, not 1"),
        (QUICKSTART, ["--steps", 0], "argument --steps: must be 1 or more, not 0"),
        (QUICKSTART, ["--images", -5], "argument --images: must be 1 or more, not -5"),
        (QUICKSTART, ["--channels", 8, 12], "argument --channels: must be 8 or more, a multiple of 8, not 12"),
        (QUICKSTART, ["--guidance", "nan"], "argument --guidance: must be a finite number, not nan"),
        (QUICKSTART, ["--images", "many"], "argument --images: invalid number value: 'many'"),
        (USING, ["--out", "x.gif"], "argument --out: must end in .png, .svg or .pdf, not 'x.gif'"),
        (USING, ["--out", "/proc/x/y.png"], "argument --out: /proc/x/y.png cannot be made: "),
        (QUICKSTART, ["--lr", 0], "argument --lr: must be positive and finite, not 0"),
        (QUICKSTART, ["--data", "glyphs", "--data-dir", "x"], "--data-dir is read with --data mnist only"),
        (LIKELIHOOD, ["--bits", 0], "argument --bits: must be 1 or more, not 0"),
        (LIKELIHOOD, ["--rtol", 0], "argument --rtol: must be positive and finite, not 0"),
        (LIKELIHOOD, ["--rtol", 0.001], "--rtol must be below the least noise, 0.001, not 0.001"),
        (LIKELIHOOD, ["--epochs", 0], "argument --epochs: must be 1 or more, not 0"),
        (LIKELIHOOD, ["--channels", 8, 16, 24], "--channels: 28x28 images have two levels, 14x14 and 7x7, not 3"),
        (LIKELIHOOD, ["--resume", "--measure"], "argument --measure: not allowed with argument --resume"),
        (QUICKSTART, ["--channels", 8, 16, 24], "--channels: 28x28 images have two levels, 14x14 and 7x7, not 3"),
        (LIKELIHOOD, ["--channels", 12], "argument --channels: must be 8 or more, a multiple of 8, not 12"),
        (LIKELIHOOD, ["--data", "glyphs", "--data-dir", "x"], "--data-dir is read with --data mnist only"),
        (SCORE_UNET, ["--data", "glyphs", "--data-dir", "x"], "--data-dir is read with --data mnist only"),
    ],
)
def test_a_bad_argument_is_quoted_before_anything_is_done(monkeypatch, capsys, tmp_path, example, options, message):
    where = "--checkpoint" if example == JUDGE else "--out"
    name = "none.png" if example == USING else "none"
    assert main(monkeypatch, example, where, tmp_path / name, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_ctrl_c_before_the_training_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinydiff.data.glyphs", interrupted)
    assert main(monkeypatch, QUICKSTART, "--data", "glyphs", "--out", tmp_path / "run") == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_wrong_backend_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(QUICKSTART), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "TINYDIFF_BACKEND": "cuda"},
    )
    assert done.returncode == 1 and "'cuda'" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
