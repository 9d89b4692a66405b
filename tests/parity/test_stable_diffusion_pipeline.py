"""The whole of Stable Diffusion beside diffusers: they write a folder, we read it; images from the same noise, by every
sampler that both have; the tokeniser on hundreds of prompts; the names of the single file."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_diffusion

from tinydiff import Rng, interop, no_grad, tensor
from tinydiff.models.stable_diffusion import pipeline, tokenizer, weights, writing
from tinydiff.models.stable_diffusion.lora import Lora
from tinydiff.models.stable_diffusion.tokenizer import END

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
import released  # noqa: E402  after the check that PyTorch is here
from compare import channels_first  # noqa: E402
from diffusers import (  # noqa: E402
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("numpy_backend"), pytest.mark.filterwarnings("ignore")]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm_solver": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}
PROMPT, NEGATIVE, SIZE, STEPS = "a red lighthouse in the storm, 1998!", "oil painting", (40, 32), 10


@pytest.fixture(scope="module", params=[1, 2], ids=["version 1", "version 2"])
def theirs(request: Any, tmp_path_factory: Any) -> Any:
    """(their pipeline, the folder it has written)"""
    folder = tmp_path_factory.mktemp("weights")
    small_diffusion.save_words(folder / "tokenizer", padding=END if request.param == 1 else "!")
    words = released.transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    parts = dict(
        vae=released.autoencoder(),
        text_encoder=released.text_encoder(request.param),
        tokenizer=words,
        unet=released.unet(
            request.param, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
            attention_head_dim=2 if request.param == 1 else [1, 2],
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            timestep_spacing="trailing", prediction_type="epsilon" if request.param == 1 else "v_prediction",
        ),
    )  # fmt: skip
    made = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.save_pretrained(folder, safe_serialization=True)
    # What they write today has the words in a file of its own, tokenizer.json; what was released has these two.
    small_diffusion.save_words(folder / "tokenizer", padding=END if request.param == 1 else "!")
    return made, folder


class Noise:
    """In place of their randn_tensor: our draws, one after the other."""

    def __init__(self, seed: int):
        self.rng = Rng(seed)

    def __call__(self, shape: Any, **_options: Any) -> Any:
        n, c, h, w = shape
        return torch.tensor(channels_first(self.rng.normal((n, h, w, c))))


def painted(theirs: Any, kind: Any, sampler: str, monkeypatch: Any, **options: Any) -> np.ndarray:
    """Their image, with our noise, and with the mean of the encoder in place of a sample."""
    made, _ = theirs
    scheduler = SCHEDULERS[sampler].from_config(made.scheduler.config, timestep_spacing="trailing")
    parts = {**made.components, "scheduler": scheduler}
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    noise = Noise(options.pop("seed"))
    for module in {kind.__module__, type(scheduler).__module__}:
        for name, value in {"randn_tensor": noise, "retrieve_latents": lambda e, **_: e.latent_dist.mode()}.items():
            if hasattr(__import__(module, fromlist=[""]), name):
                monkeypatch.setattr(f"{module}.{name}", value)
    if "image" not in options:  # they start some samplers from sigma z, and not from sqrt(1 + sigma^2) z
        scheduler.set_timesteps(STEPS)
        sigma = ((1 - scheduler.alphas_cumprod[-1]) / scheduler.alphas_cumprod[-1]).sqrt()
        start = (1 + sigma**2).sqrt() if float(scheduler.init_noise_sigma) > 2 else 1.0
        n, (h, w) = len(options["prompt"]), SIZE
        options |= {"latents": noise((n, 4, h // 8, w // 8)) * (start / scheduler.init_noise_sigma)}
        options |= {"height": h, "width": w}
    with torch.no_grad():
        return pipe(num_inference_steps=STEPS, output_type="np", **options).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image(theirs: Any, sampler: str, guidance: float, monkeypatch: Any) -> None:
    ours = pipeline.load_pipeline(theirs[1])
    prompts = [PROMPT, "a cat"]
    x = ours.paint(
        prompts,
        height=SIZE[0],
        width=SIZE[1],
        steps=STEPS,
        sampler=sampler,
        guidance=guidance,
        negative=NEGATIVE,
        rng=3,
    )
    y = painted(
        theirs, StableDiffusionPipeline, sampler, monkeypatch, seed=3, prompt=prompts,
        guidance_scale=guidance, negative_prompt=[NEGATIVE] * 2 if guidance > 1 else None,
    )  # fmt: skip
    assert x.shape == y.shape == (2, *SIZE, 3) and x.std() > 0.05
    assert abs(x - y).max() < 1e-3


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_image_to_image(theirs: Any, sampler: str, guidance: float, monkeypatch: Any) -> None:
    ours = pipeline.load_pipeline(theirs[1])
    image = np.random.default_rng(5).uniform(size=(*SIZE, 3)).astype("float32")
    x = ours.paint(PROMPT, image=image, strength=0.6, steps=STEPS, sampler=sampler, guidance=guidance, rng=3)
    y = painted(
        theirs, StableDiffusionImg2ImgPipeline, sampler, monkeypatch, seed=3, prompt=[PROMPT], strength=0.6,
        guidance_scale=guidance, image=torch.tensor(channels_first(image[None])),
    )  # fmt: skip
    assert x.shape == y.shape == (1, *SIZE, 3)
    assert abs(x - y).max() < 1e-3


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    "sampler", ["ddim", "dpm_solver", "heun"]
)  # with fresh noise at each step they use it otherwise
def test_inpainting(theirs: Any, sampler: str, guidance: float, monkeypatch: Any) -> None:
    ours = pipeline.load_pipeline(theirs[1])
    image = np.random.default_rng(5).uniform(size=(*SIZE, 3)).astype("float32")
    mask = np.zeros(SIZE, bool)
    mask[8:32, 8:24] = True
    options = dict(sampler=sampler, guidance=guidance, rng=3)
    x = ours.paint(PROMPT, image=image, mask=mask, strength=0.9, steps=STEPS, **options)
    y = painted(
        theirs, StableDiffusionInpaintPipeline, sampler, monkeypatch, seed=3, prompt=[PROMPT], strength=0.9,
        guidance_scale=guidance, image=torch.tensor(channels_first(image[None])), height=SIZE[0], width=SIZE[1],
        mask_image=torch.tensor(mask[None, None].astype("float32")),
    )  # fmt: skip
    assert abs(x - y).max() < 1e-3


# ---------------------------------------------------------------- words


def prompts(count: int = 500) -> list[str]:
    """Real words, accents composed and not, emoji, other scripts, punctuation, digits, spaces, overlong ones."""
    rng, found = random.Random(0), ["", " ", "!!!", "it's we'll I'd'd 'S", "ﬁne ΣΟΦΟΣ İstanbul ǅ", "<|endoftext|> a"]
    parts = [
        "lighthouse", "storm", "Oil-painting", "café", "cafe\u0301", "naïve", "日本語", "ひらがな", "Привет", "ΣΑΣ",
        "🏠", "👩‍🚀", "🇩🇪", "½", "²", "Ⅷ", "1998", "3.14", "...", "?!", "#tag", "@", "--", "_a_", "\t", "\n", "\u00a0",
        "\u3000", "'re", "’s", "don't", "(((masterpiece)))", "e\u0301\u0302", "नमस्ते", "\u200b", "“", "”",
        "a" * 40, "ß", "ẞ",
    ]  # fmt: skip
    for _ in range(count - len(found)):
        found.append(rng.choice(["", " "]).join(rng.choice(parts) for _ in range(rng.randrange(1, 30))))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padding", [END, "!"])
def test_tokenizer(padding: str, tmp_path: Path) -> None:
    small_diffusion.save_words(tmp_path, padding=padding)
    ours, theirs = (
        tokenizer.Tokenizer.from_folder(tmp_path),
        released.transformers.CLIPTokenizer.from_pretrained(tmp_path),
    )
    given = prompts()
    assert len(given) == 500
    wanted = theirs(given, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    found = ours.encode(given)
    different = [(p, a.tolist(), b.tolist()) for p, a, b in zip(given, found, wanted) if (a != b).any()]
    assert not different, f"{len(different)}: {different[:2]}"


# ---------------------------------------------------------------- the single file


@pytest.mark.parametrize("version", [1, 2])
def test_names_of_the_single_file(version: int, tmp_path: Path) -> None:
    """The same weights go to the same places as by diffusers' own conversion."""
    from diffusers.loaders import single_file_utils as utils
    from safetensors.torch import load_file

    path = small_diffusion.save_single_file(tmp_path / "x.safetensors", version)
    state, configs = load_file(path), small_diffusion.configs(version)
    found = weights._open_single_file(path)[0]
    unet = {**configs["unet"], "class_embed_type": None, "addition_embed_type": None,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}  # fmt: skip
    vae = {**configs["vae"], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    wanted = {
        "unet": utils.convert_ldm_unet_checkpoint(dict(state), unet),
        "vae": utils.convert_ldm_vae_checkpoint(dict(state), vae),
    }
    for part, theirs in wanted.items():
        assert set(theirs) == set(found[part])
        for name, value in theirs.items():
            ours = found[part][name].read()
            assert (ours.reshape(value.shape) == value.numpy()).all(), name
    shutil.rmtree(tmp_path)


# ---------------------------------------------------------------- files that they write, and files that they read


def test_they_read_what_is_written_here(theirs: Any, tmp_path: Path) -> None:
    """The folder, with all that its configurations say: the same weights give the same numbers."""
    made, given = theirs
    ours = pipeline.load_pipeline(given)
    writing.save_folder(ours, tmp_path / "ours")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "ours", safety_checker=None, local_files_only=True)
    rng = np.random.default_rng(0)
    x, words = (
        torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in ((1, 4, 5, 4), (1, 77, ours.unet.context))
    )
    with torch.no_grad():
        for call in (
            lambda pipe: pipe.unet(x, 500, words).sample,
            lambda pipe: pipe.vae.decode(x).sample,
            lambda pipe: pipe.text_encoder(torch.tensor(ours.tokenizer.encode(PROMPT))).last_hidden_state,
        ):
            found, wanted = call(again), call(made)
            assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()
    assert again.scheduler.config.prediction_type == made.scheduler.config.prediction_type
    assert again.vae.config.scaling_factor == made.vae.config.scaling_factor
    ids = made.tokenizer(prompts(50), padding="max_length", max_length=77, truncation=True).input_ids
    assert (tokenizer.Tokenizer.from_folder(tmp_path / "ours" / "tokenizer").encode(prompts(50)) == ids).all()


def test_files_of_bfloat16_in_several_parts(theirs: Any, tmp_path: Path) -> None:
    """As they write them: the weights are read as their numbers are."""
    folder = Path(shutil.copytree(theirs[1], tmp_path / "several"))
    shutil.rmtree(folder / "unet")
    unet = copy.deepcopy(theirs[0].unet).to(torch.bfloat16)
    unet.save_pretrained(folder / "unet", max_shard_size="30KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    found = interop.to_torch(pipeline.load_pipeline(folder).unet)
    assert all((found[name] == p.float().numpy()).all() for name, p in unet.state_dict().items())


def test_a_lora_goes_there_and_comes_back(theirs: Any, tmp_path: Path) -> None:
    """Ours changes their U-Net as it changes ours; theirs, with an alpha, convolutions and the words, changes ours."""
    peft = pytest.importorskip("peft")
    made, folder = theirs
    ours, their_unet = pipeline.load_pipeline(folder), copy.deepcopy(made.unet)
    rng = np.random.default_rng(0)
    x, words = (rng.normal(size=s).astype("float32") for s in ((1, 5, 4, 4), (1, 77, ours.unet.context)))

    def both(unet: Any) -> float:
        with torch.no_grad():
            y = unet(torch.tensor(channels_first(x)), 500, torch.tensor(words)).sample
        with no_grad():
            z = ours.unet(tensor(x), np.array([500.0]), tensor(words))
        return float(abs(channels_first(z) - y.numpy()).max() / abs(y.numpy()).max())

    before = both(their_unet)
    lora = Lora(ours.unet, rank=2, rng=0)
    for i, p in enumerate(lora.parameters()):
        p.data = Rng(i).normal(p.shape)
    assert both(their_unet) > 0.01
    lora.save(tmp_path / "ours.safetensors")
    their_unet.load_lora_adapter(load_file(tmp_path / "ours.safetensors"), prefix="unet")
    assert both(their_unet) < 1e-4 > before
    lora.remove()

    their_unet, their_words = copy.deepcopy(made.unet), copy.deepcopy(made.text_encoder)
    state, configs = {}, {}
    for part, net, targets in (
        ("unet", their_unet, ["to_q", "conv1", "proj_in"]),
        ("text_encoder", their_words, ["k_proj", "fc1"]),
    ):
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        peft.inject_adapter_in_model(config, net)
        state[part] = {n.replace(".default", ""): p.detach() for n, p in net.named_parameters() if ".lora_" in n}
        configs[f"{part}_lora_adapter_metadata"] = {**config.to_dict(), "target_modules": targets}
    weight_name = "theirs.safetensors"
    StableDiffusionPipeline.save_lora_weights(tmp_path, *state.values(), weight_name=weight_name, **configs)
    tokens = ours.tokenizer.encode(PROMPT)
    assert both(their_unet) > 0.01
    Lora.load(ours.unet, tmp_path / "theirs.safetensors", text_encoder=ours.text_encoder)
    assert both(their_unet) < 1e-4
    with torch.no_grad():
        wanted = their_words(torch.tensor(tokens)).last_hidden_state.numpy()
        plain = made.text_encoder(torch.tensor(tokens)).last_hidden_state.numpy()
    found = ours.encode(PROMPT)
    assert abs(found - wanted).max() < 1e-4 * abs(wanted).max() < 0.01 * abs(plain - wanted).max()
