"""LoRA files of others: of convolutions and of the text encoder, with ranks in the header. A product of matrices beside
a layer must do what a weight does that has it added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_diffusion import host, save_folder

from tinydiff.models.stable_diffusion.lora import Lora, layers_of
from tinydiff.models.stable_diffusion.pipeline import load_pipeline

safetensors_numpy = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("numpy_backend")
OPTIONS: Any = dict(height=16, width=16, steps=2, rng=1, sampler="ddim")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return save_folder(tmp_path_factory.mktemp("weights") / "one")


LAYERS = {  # (down, up), as in a file, of rank 3
    "unet.down_blocks.0.resnets.0.conv1": ((3, 32, 3, 3), (32, 3, 1, 1)),
    "unet.down_blocks.0.downsamplers.0.conv": ((3, 32, 3, 3), (32, 3, 1, 1)),  # of stride 2
    "unet.up_blocks.1.resnets.0.conv_shortcut": ((3, 96, 1, 1), (32, 3, 1, 1)),
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": ((3, 64), (512, 3)),
    "text_encoder.encoder.layers.1.self_attn.q_proj": ((3, 64), (64, 3)),
    "text_encoder.encoder.layers.0.mlp.fc1": ((3, 64), (128, 3)),
}


def random_pairs() -> dict[str, tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        layer: tuple((rng.normal(size=s) / 9).astype("float32") for s in shapes) for layer, shapes in LAYERS.items()
    }


def merged(folder: Path, factor: float) -> Any:
    """The pipeline with what the pairs add, factor up down, in its weights."""
    sd = load_pipeline(folder)
    for path, (down, up) in random_pairs().items():
        part, _, own = path.partition(".")
        layer = layers_of(getattr(sd, part))[own]
        change = np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)  # (out, in) or (out, in, kh, kw)
        layer.weight.data = host(layer.weight) + factor * change.transpose((1, 0) if change.ndim == 2 else (2, 3, 1, 0))
    return sd


def diffusers_names(path: str) -> str:
    return path.replace("text_encoder.", "text_encoder.text_model.")


def kohya_names(path: str) -> str:
    part, _, own = path.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part] + own.replace(".", "_")


@pytest.mark.parametrize("kind", ["diffusers", "older diffusers", "kohya", "header"])
def test_convolutions_and_the_text_encoder(kind: str, folder: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    factor, metadata = 1.0, {}
    for path, (down, up) in random_pairs().items():
        if kind == "kohya":
            stem, factor = kohya_names(path), 0.5
            state |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": np.float32([1.5]),
            }
        elif kind == "older diffusers":
            stem = diffusers_names(path) + (".lora_linear_layer" if path.startswith("text") else ".lora")
            state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        else:
            stem = diffusers_names(path)
            state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    if kind == "header":  # alpha / r
        factor = 2.0
        values = {"r": 3, "lora_alpha": 6, "use_dora": False, "rank_pattern": {}}
        said = {f"{part}.{name}": value for part in ("unet", "text_encoder") for name, value in values.items()}
        metadata = {"lora_adapter_metadata": json.dumps(said)}
    safetensors_numpy.save_file(state, tmp_path / "x.safetensors", metadata)
    sd = load_pipeline(folder)
    before = sd.paint("a red cat", **OPTIONS)
    lora = Lora.load(sd.unet, tmp_path / "x.safetensors", text_encoder=sd.text_encoder)
    wanted, found = merged(folder, factor).paint("a red cat", **OPTIONS), sd.paint("a red cat", **OPTIONS)
    assert abs(found - wanted).max() < 2e-4 < 0.01 < abs(found - before).max()
    lora.save(tmp_path / "again.safetensors")
    lora.remove()
    assert (sd.paint("a red cat", **OPTIONS) == before).all()
    again = safetensors_numpy.load_file(tmp_path / "again.safetensors")
    assert {n.split(".lora_")[0] for n in again} == {diffusers_names(path) for path in LAYERS}
    Lora.load(sd.unet, tmp_path / "again.safetensors", text_encoder=sd.text_encoder)
    assert abs(sd.paint("a red cat", **OPTIONS) - wanted).max() < 2e-4


def test_what_is_not_read_is_named(folder: Path, tmp_path: Path) -> None:
    sd, path = load_pipeline(folder), tmp_path / "x.safetensors"
    state = {}
    for layer, (down, up) in random_pairs().items():
        state |= {f"{kohya_names(layer)}.lora_down.weight": down, f"{kohya_names(layer)}.lora_up.weight": up}
    safetensors_numpy.save_file(state, path)
    with pytest.raises(
        ValueError, match=r"need text_encoder=\)(?s:.*)lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down"
    ):
        Lora.load(sd.unet, path)
    stem = kohya_names("unet.mid_block.resnets.0.conv1")
    for name in (f"{stem}.hada_w1_a", f"{stem}.dora_scale", f"{stem}.lora_mid.weight", "lora_te2_x.lora_down.weight"):
        safetensors_numpy.save_file({**state, name: np.zeros((3, 3), "float32")}, path)
        with pytest.raises(ValueError, match=rf"is no LoRA:\n  {name} \(3, 3\)$"):
            Lora.load(sd.unet, path, text_encoder=sd.text_encoder)
    plain = sd.paint("a", **OPTIONS)
    for shape in [(3, 64, 5, 5), (3, 64), (3, 32, 3, 3), (0, 64, 3, 3)]:
        pair = {
            f"{stem}.lora_down.weight": np.zeros(shape, "float32"),
            f"{stem}.lora_up.weight": np.zeros((64, 3), "float32"),
        }
        safetensors_numpy.save_file(pair, path)
        with pytest.raises(ValueError, match=r"mid_block.resnets.0.conv1 has matrices of .* not \(rank, 64, 3, 3\)"):
            Lora.load(sd.unet, path)
    pair = {
        f"{stem}.lora_down.weight": np.ones((3, 64, 3, 3), "float32"),
        f"{stem}.lora_up.weight": np.ones((64, 3), "float32"),
    }
    safetensors_numpy.save_file({**pair, f"{stem}.alpha": np.float32([np.nan])}, path)
    with pytest.raises(ValueError, match="has an alpha of .*nan"):
        Lora.load(sd.unet, path)
    for said, message in [
        ('{"unet.use_dora": true}', "has unet.use_dora=True, which is not supported"),
        ("{", "header whose ranks cannot be read"),
        ('{"unet.r": 0, "unet.lora_alpha": 1}', "header whose ranks cannot be read"),
        ('{"unet.r": 4}', "header whose ranks cannot be read"),
    ]:
        safetensors_numpy.save_file(pair, path, {"lora_adapter_metadata": said})
        with pytest.raises(ValueError, match=message):
            Lora.load(sd.unet, path)
    assert (sd.paint("a", **OPTIONS) == plain).all()  # nothing of all this is left


def test_a_convolution_can_be_taught(folder: Path) -> None:
    """Its gradients are those of the matrices in a merged weight: by the chain rule, from the weight's own."""
    from tinydiff import Rng
    from tinydiff.models.stable_diffusion.lora import noise_loss

    sd = load_pipeline(folder)
    z, context = Rng(0).normal((1, 4, 4, 4)), sd.encode("a red cat")
    layer = layers_of(sd.unet)["mid_block.resnets.0.conv1"]
    noise_loss(sd, z, context, Rng(1)).backward()
    of_weight = host(layer.weight.grad)
    lora = Lora(sd.unet, 2, targets=["mid_block.resnets.0.conv1"], rng=0)
    (pair,) = lora.layers.values()
    noise_loss(sd, z, context, Rng(1)).backward()
    wanted = np.einsum("uvcr,uvco->ro", host(pair.lora_A), of_weight)  # B is zero, so the weight is as it was
    np.testing.assert_allclose(host(pair.lora_B.grad), wanted, rtol=1e-3, atol=1e-5 * abs(wanted).max())
    assert not host(pair.lora_A.grad).any()
