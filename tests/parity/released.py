"""The packages in which the released Stable Diffusion is usually run, and their nets at a reduced width in the
configurations of both versions."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, whatever is asked for
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

WORDS = 600  # tokens of the small vocabulary, see tests/models/small_diffusion.py

# What differs between the versions, as the folders' config.json have it.
UNET = {
    1: {"cross_attention_dim": 24, "attention_head_dim": 2, "use_linear_projection": False},
    2: {"cross_attention_dim": 32, "attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True},
}
TEXT = {
    1: {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 2, "hidden_act": "quick_gelu"},
    2: {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "hidden_act": "gelu"},
}


def unet(version: int, **options: Any) -> Any:
    torch.manual_seed(version)
    given = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4, "sample_size": 8, **UNET[version], **options}
    return stirred(UNet2DConditionModel(**given))


def autoencoder(**options: Any) -> Any:
    torch.manual_seed(3)
    return stirred(
        AutoencoderKL(
            block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=64, **options,
        )
    )  # fmt: skip


def text_encoder(version: int, size: int = WORDS) -> Any:
    torch.manual_seed(version)
    config = CLIPTextConfig(
        vocab_size=size, num_hidden_layers=2, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
        attn_implementation="sdpa", **TEXT[version],
    )  # fmt: skip
    return stirred(CLIPTextModel(config))


def stirred(net: Any) -> Any:
    """Zeros and ones that many weights begin with would hide what comes before them."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()
