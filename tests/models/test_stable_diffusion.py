"""The released Stable Diffusion at a reduced size, from files in its layouts: counts, files, words, schedule, images,
and what is said of bad input. That the numbers are right: tests/parity."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_diffusion import configs, host, save_folder, save_single_file, save_words

from tinydiff import Rng, nn, ops, tensor
from tinydiff.backend import to_device, xp
from tinydiff.diffusion import ScoreModel, ddpm, sample, sigma_at
from tinydiff.models.attention_maps import attention_maps
from tinydiff.models.stable_diffusion.autoencoder import Autoencoder
from tinydiff.models.stable_diffusion.lora import Lora, noise_loss, pulls_on_words
from tinydiff.models.stable_diffusion.pipeline import SAMPLERS, load_pipeline
from tinydiff.models.stable_diffusion.schedule import ScaledLinearSDE, schedule_of, whole_steps
from tinydiff.models.stable_diffusion.text_encoder import TextEncoder
from tinydiff.models.stable_diffusion.tokenizer import Tokenizer, split
from tinydiff.models.stable_diffusion.unet import UNet, time_features
from tinydiff.models.stable_diffusion.weights import load_nets, open_safetensors

safetensors_numpy = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    from conftest import in_use

    for _ in in_use("numpy"):  # files are written on the host
        made = save_folder(tmp_path_factory.mktemp("weights") / "one")
    return made


@pytest.fixture(scope="module")
def folder_2(tmp_path_factory: Any) -> Path:
    from conftest import in_use

    for _ in in_use("numpy"):
        made = save_folder(tmp_path_factory.mktemp("weights") / "two", 2)
    return made


def test_the_code_of_the_chapter_runs(
    numpy_backend: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the small nets, in few steps, with small images."""
    text = (Path(__file__).parent.parent.parent / "docs" / "stable_diffusion.md").read_text()
    monkeypatch.chdir(tmp_path)
    smaller = {
        "weights/stable-diffusion-v1-5": folder.as_posix(),
        ", rng=0)  ": ", rng=0, height=16, width=16, steps=2)  ",
        "(64, 64)": "(8, 8)",
        "steps=9, eps=100.0": "steps=1",
        "steps=10": "steps=4",
        "16:48, 16:48": "4:12, 4:12",
    }
    names: dict[str, Any] = {}
    for code in (found := re.findall(r"```python\n(.*?)```", text, re.S)):
        for old, new in smaller.items():
            code = code.replace(old, new)
        exec(compile(code, "stable_diffusion.md", "exec"), names)
    assert len(found) == 5 and names["image"].shape == (1, 8, 8, 3)
    assert names["filled"].shape == names["winter"].shape == (1, 16, 16, 3)
    assert (tmp_path / "my_cat.safetensors").exists() and names["pulls"]


# ---------------------------------------------------------------- the sizes of the released nets


def test_the_released_nets_have_their_numbers_of_parameters_and_take_no_memory() -> None:
    blank = nn.Unfilled()
    text, unet, vae = TextEncoder(rng=blank), UNet(rng=blank), Autoencoder(rng=blank)
    assert (text.count(), unet.count(), vae.count()) == (123_060_480, 859_520_964, 83_653_863)
    assert UNet(context=1024, heads=(5, 10, 20, 20), linear=True, rng=blank).count() == 865_910_724
    assert TextEncoder(width=1024, layers=23, heads=16, activation="gelu", rng=blank).count() == 340_387_840
    assert all(not any(p.data.strides) for p in unet.parameters() if p.ndim > 1)


def test_a_net_that_is_not_filled_has_shapes_and_becomes_one_that_is() -> None:
    blank, net = nn.Linear(3, 5, rng=nn.Unfilled()), nn.Linear(3, 5, rng=0)
    assert blank.weight.shape == (3, 5) and blank.bias is not None
    for p, q in zip(blank.parameters(), net.parameters()):
        p.data = q.data
    x = tensor(np.ones((2, 3), "float32"))
    assert (host(blank(x)) == host(net(x))).all()


def test_a_parameter_made_of_one_number_shown_everywhere_has_memory_of_its_own() -> None:
    """Only what Unfilled makes is kept as it is."""
    p = nn.Parameter(np.broadcast_to(np.float32(1), (3,)))
    p.data -= to_device(np.arange(3, dtype="float32"))
    assert host(p).tolist() == [1, 0, -1]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("version", [1, 2])
def test_both_layouts_hold_the_same_nets(version: int, tmp_path: Path) -> None:
    """Also kept as float16, to its precision."""
    seen: list[tuple[int, int]] = []
    a = load_pipeline(save_folder(tmp_path / "a", version), progress=lambda done, total: seen.append((done, total)))
    b = load_pipeline(save_single_file(tmp_path / "b" / "all.safetensors", version))
    c = load_pipeline(tmp_path / "a", half=True)
    assert seen[-1][0] == seen[-1][1] == sum(p.size * 4 for n in nets(a) for p in n.parameters())
    options: Any = dict(height=16, width=8, steps=2, rng=1)
    x, y, z = (sd.paint("a red house", **options) for sd in (a, b, c))
    assert x.shape == (1, 16, 8, 3) and x.dtype == "float32" and 0 <= x.min() < x.max() <= 1
    assert (x == y).all()
    assert 0 < abs(x - z).max() < 0.02
    kept = {str(t.dtype) for _, t in c.unet.named_tensors() if t.ndim > 1}
    assert kept == {"float16"}


def nets(sd: Any) -> list[Any]:
    return [sd.text_encoder, sd.unet, sd.autoencoder]


def test_names_that_files_of_2022_have(folder: Path, tmp_path: Path) -> None:
    """Their autoencoder's attention has other names, and their text encoder the numbers from 0 to 76."""
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    path = old / "vae" / "diffusion_pytorch_model.safetensors"
    state = safetensors_numpy.load_file(path)
    for new, name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {n.replace(f"attentions.0.{new}", f"attentions.0.{name}"): a for n, a in state.items()}
    safetensors_numpy.save_file(state, path)
    path = old / "text_encoder" / "model.safetensors"
    state = safetensors_numpy.load_file(path)
    state["text_model.embeddings.position_ids"] = np.arange(77)[None]
    safetensors_numpy.save_file(state, path)
    a, b = load_nets(folder), load_nets(old)
    assert (host(a.autoencoder.encoder.mid_block.attentions[0].to_q.weight)
            == host(b.autoencoder.encoder.mid_block.attentions[0].to_q.weight)).all()  # fmt: skip


def test_weights_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    made = save_folder(tmp_path / "wrong")
    path = made / "unet" / "diffusion_pytorch_model.safetensors"
    state = safetensors_numpy.load_file(path)
    gone = [n for n in state if n.startswith("down_blocks.0.resnets.0")]
    for n in gone:
        del state[n]
    state["conv_in.weight"] = state["conv_in.weight"][:, :3].copy()
    state["something.else"] = np.zeros(7, "float32")
    safetensors_numpy.save_file(state, path)
    with pytest.raises(ValueError) as error:
        load_nets(made)
    text = str(error.value)
    assert all(f"missing: unet {n} " in text for n in gone)
    assert "wrongly shaped: unet conv_in.weight is (32, 3, 3, 3), not (32, 4, 3, 3)" in text
    assert "unexpected: unet something.else (7,)" in text and f"{len(gone) + 2} entries" in text


def test_a_folder_without_a_part(tmp_path: Path) -> None:
    made = save_folder(tmp_path / "part")
    (made / "vae").rename(made / "vea")
    with pytest.raises(FileNotFoundError, match="has no vae: text_encoder, unet, vae"):
        load_nets(made)
    (made / "vea").rename(made / "vae")
    (made / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        load_nets(made)
    (made / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors in .*unet"):
        load_nets(made)
    (made / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json' is no JSON"):
        load_nets(made)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_nets(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "header", "lie", "empty", "other"])
def test_a_damaged_file(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"a": np.arange(100, dtype="float32")}, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if damage == "cut":
        path.write_bytes(data[:-50])
    elif damage == "header":
        path.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    elif damage == "lie":  # of another shape than it has bytes
        header["a"]["shape"] = [101]
        text = json.dumps(header).encode().ljust(size)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(ValueError, match=r"x\.safetensors' \([\d,]+ bytes\) is no safetensors file, or is cut off"):
        open_safetensors(path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"\x80\x04")
        with pytest.raises(ValueError, match=f"{name}' is a pickle, which runs code .* take the .safetensors"):
            load_nets(tmp_path / name)
    made = save_folder(tmp_path / "folder")
    weights = made / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="is a pickle"):
        load_nets(made)


def test_other_families_are_named(tmp_path: Path) -> None:
    made = save_folder(tmp_path / "xl")
    (made / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ValueError, match="another family .StableDiffusionXLPipeline"):
        load_nets(made)
    path = tmp_path / "xl.safetensors"
    safetensors_numpy.save_file({"conditioner.embedders.0.x": np.zeros(1, "float32")}, path)
    with pytest.raises(ValueError, match="'conditioner.embedders.0.x' SDXL"):
        load_nets(path)
    safetensors_numpy.save_file({"layers.0.weight": np.zeros(1, "float32")}, path)
    with pytest.raises(ValueError, match=r"has no weights of unet, vae, text_encoder .* layers\.0\.weight"):
        load_nets(path)
    (made / "model_index.json").unlink()
    config = {**configs(1)["unet"], "addition_embed_type": "text_time"}
    (made / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="addition_embed_type='text_time'"):
        load_nets(made)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        schedule_of({"rescale_betas_zero_snr": True})
    with pytest.raises(ValueError, match="not 'linear' with 1000"):
        schedule_of({"beta_schedule": "linear", "num_train_timesteps": 1000})


# ---------------------------------------------------------------- words


def test_words_are_split_as_clip_does() -> None:
    assert split("A  lighthouse's, 19 cafe\u0301!?") == ["a", "lighthouse", "'s", ",", "1", "9", "café", "!?"]


def test_a_prompt_as_numbers_and_back(tmp_path: Path) -> None:
    save_words(tmp_path)
    words = Tokenizer.from_folder(tmp_path)
    ids = words.encode(["a lighthouse 🏠", ""])
    assert ids.shape == (2, 77) and ids.dtype == "int64"
    assert ids[1].tolist() == [words.start] + [words.end] * 76
    assert words.decode(words.numbers("A  Lighthouse, 🏠!")) == "a lighthouse , 🏠!"
    assert words.decode(words.numbers("a red house")) == "a red house"
    assert len(words.numbers("the")) == 1 < len(words.numbers("xqz")) == 3


def test_what_is_cut_off_is_said(tmp_path: Path) -> None:
    save_words(tmp_path)
    words = Tokenizer.from_folder(tmp_path)
    prompt = " ".join(["the"] * 75 + ["red", "house"] + ["the"] * 23)  # of 100 tokens
    with pytest.warns(UserWarning, match="has 100 tokens, and only the first 75 fit; .*: 'red house the"):
        ids = words.encode(prompt)
    assert ids.shape == (1, 77) and ids[0, -1] == words.end
    with pytest.raises(TypeError, match="a prompt is a string, not int: 7"):
        words.encode([7])  # type: ignore[list-item]


def test_a_vocabulary_that_is_none(tmp_path: Path) -> None:
    save_words(tmp_path)
    (tmp_path / "merges.txt").write_text("#version\na b c\n")
    with pytest.raises(ValueError, match=r"merges\.txt', line 2: two pieces are expected, not 'a b c'"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"vocab\.json': this is no vocabulary of CLIP"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("merges.txt", b"a b\n\xff", "is not UTF-8"),
        ("vocab.json", b"[" * 100_000, "is no JSON"),
        ("vocab.json", b'{"a": "0"}', "number of 'a' is no whole number from 0 on: '0'"),
        ("vocab.json", b'{"a": -1}', "number of 'a' is no whole number from 0 on: -1"),
        ("tokenizer_config.json", b'{"model_max_length": "77"}', "model_max_length must be a number .* not '77'"),
        ("tokenizer_config.json", b'{"model_max_length": 9999999999}', "from 3 to 65536, not 9999999999"),
        ("tokenizer_config.json", b'{"pad_token": ["!"]}', r"pad_token must be a piece, not \['!'\]"),
        ("special_tokens_map.json", b'{"pad_token": {}}', "pad_token must be a piece"),
    ],
)
def test_a_damaged_file_of_words_is_named(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    save_words(tmp_path)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{re.escape(name)}'.*{message}"):
        Tokenizer.from_folder(tmp_path)


# ---------------------------------------------------------------- the schedule


def test_the_process_is_the_table_of_the_authors() -> None:
    """alphas_cumprod as they compute it: numpy.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2."""
    process = ScaledLinearSDE()
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for i in (0, 1, 500, 999):
        m, s = process.marginal_scale(i + 1.0), process.marginal_std(i + 1.0)
        assert m == pytest.approx(abar[i] ** 0.5, rel=1e-12) and s == pytest.approx((1 - abar[i]) ** 0.5, rel=1e-10)
    assert sigma_at(process, 1.0) == pytest.approx(0.02916716, rel=1e-6)
    assert sigma_at(process, 1000.0) == pytest.approx(14.61464, rel=1e-5)
    t = to_device(np.array([1.0, 30.5, 1000.0], "float32"))
    assert host(process.marginal_std(t)) == pytest.approx([process.marginal_std(float(u)) for u in (1, 30.5, 1000)])
    assert str(process.marginal_std(t).dtype) == "float32"


def test_the_process_keeps_what_relates_scale_noise_and_drift() -> None:
    """dm/dt = a m and d(s^2)/dt = 2 a s^2 + g^2, between two of the steps."""
    process, t, h = ScaledLinearSDE(), 400.3, 1e-3
    m, s, g = process.marginal_scale, process.marginal_std, process.diffusion(t)
    a = float(host(process.drift(xp.ones((1, 1)), t))[0, 0])
    assert (m(t + h) - m(t - h)) / (2 * h) == pytest.approx(a * m(t), rel=1e-6)
    assert (s(t + h) ** 2 - s(t - h) ** 2) / (2 * h) == pytest.approx(2 * a * s(t) ** 2 + g**2, rel=1e-6)


def test_whole_steps() -> None:
    assert whole_steps(None, 4, 1000.0, 143.0) == [1000.0, 786.0, 572.0, 357.0, 143.0]


def test_our_ddpm_is_euler_ancestral() -> None:
    """Its two formulas, as k-diffusion has them, and ours."""
    process, target = ScaledLinearSDE(), to_device(np.full((1, 2), 0.3))

    def net(x: Any, t: Any) -> Any:
        process_t = process.marginal_scale(t), process.marginal_std(t)
        m, s = (ops.reshape(tensor(a), shape=(-1, 1)) for a in process_t)
        return (x - m * target) / s

    start = to_device(np.array([[1.0, -2.0]]))
    model = ScoreModel(net, process, "noise")
    found = sample(model, (1, 2), process, 5, method=ddpm, steps=3, eps=250.0, timesteps=whole_steps,
                   start=(start, 1000.0))  # fmt: skip
    assert SAMPLERS["euler_ancestral"] is ddpm
    y, rng = host(start) / process.marginal_scale(1000.0), Rng(5)
    sigmas = [sigma_at(process, t) for t in (1000.0, 750.0, 500.0, 250.0)]
    for sigma, after in zip(sigmas, sigmas[1:]):
        up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
        down = math.sqrt(after**2 - up**2)
        y = y + (y - 0.3) / sigma * (down - sigma) + up * host(rng.normal((1, 2), "float64"))
    assert host(found) == pytest.approx(np.full((1, 2), 0.3), abs=1e-9)
    assert abs(y - 0.3).max() < 10  # the last y is not compared: what is left of it is its expectation


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_means_the_same_images_in_any_batch(sampler: str, folder: Path) -> None:
    sd = load_pipeline(folder)
    options: Any = dict(height=8, width=12, steps=2, sampler=sampler, rng=7, guidance=1)
    both = sd.paint("a red cat", batch=2, **options)
    assert both.shape == (2, 8, 12, 3)
    assert abs(sd.paint("a red cat", **options)[0] - both[0]).max() < 1e-4 < abs(both[0] - both[1]).max()


def test_guidance_and_negative_prompts_matter_and_1_is_none(folder_2: Path) -> None:
    sd, options = load_pipeline(folder_2), dict(height=16, width=16, steps=2)
    plain = sd.paint("a red cat", guidance=1, **options)
    assert (sd.paint("a red cat", guidance=1, negative="storm", **options) == plain).all()
    strong, away = (sd.paint("a red cat", guidance=4, negative=n, **options) for n in ("", "storm"))
    assert abs(strong - plain).max() > 1e-4 and abs(away - strong).max() > 1e-5

    def first_guess(guidance: float) -> Any:
        seen: list[Any] = []
        sd.paint("a red cat", guidance=guidance, callback=lambda i, t, x, d: seen.append(host(d)), **options)
        return seen[0]

    without, with_words, four = (first_guess(g) for g in (0, 1, 4))
    assert abs(four - (without + 4 * (with_words - without))).max() < 1e-2 * abs(four - without).max()


def test_image_to_image_and_inpainting_keep_what_they_should(folder: Path) -> None:
    sd = load_pipeline(folder)
    image = np.random.default_rng(0).uniform(size=(8, 16, 3)).astype("float32")
    mask = np.zeros((8, 16), bool)
    mask[:, :8] = True
    options: Any = dict(steps=5, image=image, sampler="ddim", guidance=1)
    z = host(sd.autoencoder.encode(to_device(image[None] * 2 - 1)))
    whole = sd.decode(to_device(z))
    near, far = (abs(sd.paint("a", strength=s, **options) - whole).mean() for s in (0.4, 1.0))
    assert near < far
    kept: list[Any] = []
    sd.paint("a", mask=mask, callback=lambda i, t, x, d: kept.append(host(d)), **options)
    assert z.shape == (1, 4, 8, 4)
    assert abs(kept[-1][:, :, 4:] - z[:, :, 4:]).max() < 1e-4  # latents of what is outside the mask
    assert abs(kept[-1][:, :, :4] - z[:, :, :4]).max() > 0.1


def test_a_unet_that_fills_holes(tmp_path: Path) -> None:
    """Of nine input channels: the noise, the mask, and the latents with a grey hole."""
    sd = load_pipeline(save_folder(tmp_path / "nine", unet={"in_channels": 9}))
    image, mask = np.zeros((8, 8, 3), "float32"), np.zeros((8, 8), bool)
    mask[:4] = True
    x = sd.paint("a cat", image=image, mask=mask, steps=2, guidance=1)
    image[6:] = 1  # the net sees what is outside the hole
    assert abs(sd.paint("a cat", image=image, mask=mask, steps=2, guidance=1) - x).max() > 1e-4
    with pytest.raises(ValueError, match="of 9 input channels, fills holes: give an image and a mask"):
        sd.paint("a cat", height=16, width=16)


def test_sizes_that_are_no_multiples_of_64(folder: Path) -> None:
    """Five latents become three, and five again."""
    assert load_pipeline(folder).paint("a", height=10, width=14, steps=2).shape == (1, 10, 14, 3)


def test_where_the_released_net_looks_for_each_word(folder: Path) -> None:
    sd = load_pipeline(folder)
    with attention_maps(sd.unet) as maps:
        sd.paint("a red cat", height=8, width=16, steps=3, guidance=1)
    layers = [p for p, _ in sd.unet.named_modules() if p.endswith("attn2")]
    assert sorted(maps) == sorted(layers) and {len(passes) for passes in maps.values()} == {3}
    first = host(maps[layers[0]][0])
    assert first.shape == (1, 4 * 8, 77) and first.sum(axis=2) == pytest.approx(1, abs=1e-5)


def test_bad_arguments_are_quoted(folder: Path) -> None:
    sd, image = load_pipeline(folder), np.zeros((16, 16, 3), "float32")
    for options, message in [
        (dict(height=17), "height must be a multiple of 2, not 17: the nearest is 16"),
        (dict(width=0), "width must be an integer of 8 or more, not 0"),
        (dict(steps=1), "steps must be an integer of 2 or more, not 1"),
        (dict(sampler="euler"), "unknown sampler 'euler': choose one of dpm_solver, ddim"),
        (dict(guidance=math.nan), "guidance must be a number .*, not nan"),
        (dict(image=image, height=32), r"image must be \(32, 16, 3\), not \(16, 16, 3\)"),
        (dict(image=image, strength=0), r"strength must be a number in \(0, 1\], not 0"),
        (dict(image=image, strength=0.3, steps=4), "strength=0.3 of 4 steps leaves 1 of them, and two are needed"),
        (dict(image=image, mask=np.zeros((8, 16), bool)), r"mask must be of bool, \(16, 16\), not bool of shape \(8"),
        (dict(image=image, mask=np.zeros((16, 16))), "mask must be of bool, .*, not float64"),
        (dict(mask=np.zeros((512, 512), bool)), "a mask needs the image that it is of"),
    ]:
        with pytest.raises(ValueError, match=message):
            sd.paint("a", **options)


def test_out_of_memory_is_said_with_the_size(folder: Path, monkeypatch: Any) -> None:
    sd = load_pipeline(folder)

    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 99 GiB")

    monkeypatch.setattr(type(sd.unet), "forward", fails)
    with pytest.raises(MemoryError, match=r"out of memory for 3 images of 64x32: .*99 GiB"):
        sd.paint("a", batch=3, height=64, width=32)


def test_time_features_are_exact_in_float32() -> None:
    found = host(time_features(to_device(np.array([999.0, 0.0])), 4, "float32"))
    assert found[0] == pytest.approx([math.cos(999), math.cos(9.99), math.sin(999), math.sin(9.99)], abs=1e-7)
    assert found[1].tolist() == [1, 1, 0, 0]


# ---------------------------------------------------------------- what it learns


def test_a_lora_starts_as_nothing_learns_and_comes_back(folder: Path, tmp_path: Path) -> None:
    sd = load_pipeline(folder)
    z, context, rng = Rng(0).normal((2, 4, 4, 4)), sd.encode("a red cat"), Rng(1)
    before = noise_loss(sd, z, context, rng.copy()).item()
    sd.unet.checkpointing = True
    lora = Lora(sd.unet, rank=2, rng=0)
    assert {name.rsplit(".", 3)[1] for name in lora.layers} == {"attn2"} or all("attn2" in n for n in lora.layers)
    assert noise_loss(sd, z, context, rng.copy()).item() == pytest.approx(before, rel=1e-6)
    assert not any(p.requires_grad for p in sd.unet.parameters()) and lora.count() < 0.1 * 10**5
    for _ in range(6):
        noise_loss(sd, z, context, rng.copy()).backward()
        for p in lora.parameters():
            p.data = p.data - 0.6 * p.grad.data
        lora.zero_grad()
    after = noise_loss(sd, z, context, rng.copy()).item()
    assert after < 0.99 * before
    lora.save(tmp_path / "cat.safetensors")
    lora.remove()
    assert noise_loss(sd, z, context, rng.copy()).item() == pytest.approx(before, rel=1e-6)
    again = Lora.load(sd.unet, tmp_path / "cat.safetensors")
    assert noise_loss(sd, z, context, rng.copy()).item() == pytest.approx(after, rel=1e-5)
    again.scale = 0.0
    assert noise_loss(sd, z, context, rng.copy()).item() == pytest.approx(before, rel=1e-6)
    again.remove()

    state = safetensors_numpy.load_file(tmp_path / "cat.safetensors")  # under kohya's names, with half of the strength
    names = {"lora_A": "lora_down", "lora_B": "lora_up"}
    other = {}
    for name, a in state.items():
        layer, kind, _ = name.removeprefix("unet.").rsplit(".", 2)
        stem = "lora_unet_" + layer.replace(".", "_")
        other |= {
            f"{stem}.{names[kind]}.weight": 2 * a if kind == "lora_B" else a,
            f"{stem}.alpha": np.float32([1.0])[0],
        }
    safetensors_numpy.save_file({n: np.asarray(a) for n, a in other.items()}, tmp_path / "kohya.safetensors")
    Lora.load(sd.unet, tmp_path / "kohya.safetensors")
    assert noise_loss(sd, z, context, rng.copy()).item() == pytest.approx(after, rel=1e-5)


def test_a_lora_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    unet, path = load_pipeline(folder).unet, tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"lora_te_text_model_x.lora_down.weight": np.zeros((4, 8), "float32")}, path)
    with pytest.raises(ValueError, match=r"or is no LoRA:\n  lora_te_text_model_x.lora_down.weight \(4, 8\)"):
        Lora.load(unet, path)
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    safetensors_numpy.save_file({f"{stem}.lora_A.weight": np.zeros((4, 8), "float32")}, path)
    with pytest.raises(ValueError, match="to_k: no up"):
        Lora.load(unet, path)
    safetensors_numpy.save_file(
        {f"{stem}.lora_A.weight": np.zeros((4, 8), "float32"), f"{stem}.lora_B.weight": np.zeros((8, 4), "float32")},
        path,
    )
    with pytest.raises(ValueError, match=r"has matrices of \(4, 8\) and \(8, 4\), not \(rank, 64\) and \(32, rank\)"):
        Lora.load(unet, path)
    for shapes in (((4,), (32, 4)), ((4, 64, 3, 3), (32, 4)), ((0, 64), (32, 0)), ((), (32, 4))):
        down, up = (np.zeros(shape, "float32") for shape in shapes)
        safetensors_numpy.save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, path)
        with pytest.raises(ValueError, match=r"x\.safetensors': .*to_k has matrices of \(.*\) and \(32, .*, not"):
            Lora.load(unet, path)
    whole = {
        f"{stem}.lora_down.weight": np.zeros((4, 64), "float32"),
        f"{stem}.lora_up.weight": np.zeros((32, 4), "f4"),
    }
    safetensors_numpy.save_file(whole | {f"{stem}.alpha": np.ones(2, "float32")}, path)
    with pytest.raises(ValueError, match=r"to_k has an alpha of array\(\[1., 1.\].* no finite number"):
        Lora.load(unet, path)
    safetensors_numpy.save_file(whole, path, {"lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(ValueError, match=r"x\.safetensors' has a header whose ranks cannot be read"):
        Lora.load(unet, path)
    with pytest.raises(ValueError, match="no layer that ends in attn9"):
        Lora(unet, targets=["attn9"])


def test_what_a_loss_pulls_on(folder: Path) -> None:
    """The pull on the values, from the adjoint of the context through the values alone; a word that nobody looks at
    pulls on nothing."""
    sd = load_pipeline(folder)
    z, context = Rng(0).normal((2, 4, 4, 4)), tensor(sd.encode("a red cat"), requires_grad=True)
    found = pulls_on_words(sd.unet, lambda: noise_loss(sd, z, context, Rng(1)))
    layers = [p for p, m in sd.unet.named_modules() if p.endswith("attn2")]
    assert sorted(found) == sorted(layers)
    path = layers[0]
    keys, values = (host(a) for a in found[path])
    assert keys.shape == values.shape == (77,) and (values > 0).all()

    change = to_device(np.zeros((1, 77, 32), "float32"))  # the same by hand: what is added to the values of each word
    added = tensor(change, requires_grad=True)
    layer = dict(sd.unet.named_modules())[path].to_v
    handle = layer.register_forward_hook(lambda _layer, _inputs, output: output + added)
    noise_loss(sd, z, context, Rng(1)).backward()
    handle.remove()
    # added is shared by the two samples: its adjoint is the sum of theirs, not longer than their lengths allow
    shared = np.sqrt((host(added.grad)[0] ** 2).sum(axis=1))
    assert (shared <= values * math.sqrt(2) * 1.001).all() and shared.max() > 0.1 * values.max()
    sd.unet.checkpointing = True
    with pytest.raises(RuntimeError, match="checkpointing"):
        pulls_on_words(sd.unet, lambda: noise_loss(sd, z, context, Rng(1)))
