"""Stable Diffusion of a few thousand random weights, in the layouts of the released files: a folder of parts, and the
single file. And a vocabulary of CLIP's kind, learned from a few lines."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import Rng, backend, interop
from tinydiff.models.stable_diffusion import weights
from tinydiff.models.stable_diffusion.tokenizer import BYTES, END, LAST, START, split

CORPUS = """a lighthouse in a storm, oil painting. the lighthouse at night! an oil painting of a small red house,
a photograph of a red cat on the house's roof, 1998. the storm over the sea; it's raining in the painting. Two ships
wait for the morning... 日本語 日本, café café naïve: 🏠🏠! highly detailed, masterpiece,
best quality, sharp focus"""
WORDS = 600


def learned_merges(text: str, count: int) -> list[tuple[str, str]]:
    """The `count` pairs that byte-pair encoding joins, one after the other."""
    words = ["".join(BYTES[b] for b in word.encode()) for word in split(text)]
    sequences, merges = [[*word[:-1], word[-1] + LAST] for word in words], []
    for _ in range(count):
        pairs = collections.Counter(pair for s in sequences for pair in zip(s, s[1:]))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for s in sequences:
            i = 0
            while i + 1 < len(s):
                if (s[i], s[i + 1]) == best:
                    s[i : i + 2] = [s[i] + s[i + 1]]
                i += 1
    return merges


def save_words(folder: Path, padding: str = END, length: int = 77) -> None:
    """vocab.json, merges.txt and tokenizer_config.json, with WORDS pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*BYTES.values(), *(c + LAST for c in BYTES.values())]
    merges = learned_merges(CORPUS, WORDS - len(pieces) - 2)
    pieces += ["".join(pair) for pair in merges] + [START, END]
    assert len(set(pieces)) == len(pieces) == WORDS
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    config = {
        "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding, "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def configs(version: int) -> dict[str, dict[str, Any]]:
    two = version == 2
    return {
        "unet": {
            "in_channels": 4, "out_channels": 4, "block_out_channels": [32, 64], "layers_per_block": 1,
            "cross_attention_dim": 64, "attention_head_dim": [1, 1] if two else 8, "use_linear_projection": two,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        },
        "vae": {"block_out_channels": [32, 32], "layers_per_block": 1},
        "text_encoder": {
            "vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
            "intermediate_size": 128, "hidden_act": "gelu" if two else "quick_gelu",
        },
    }  # fmt: skip


MAKERS: dict[str, Any] = {
    "unet": weights.unet_of, "vae": weights.autoencoder_of, "text_encoder": weights.text_encoder_of
}  # fmt: skip


def state(part: str, config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the folder's names, in PyTorch's order of axes."""
    net, rng = MAKERS[part](config), Rng(seed).child(part)
    for name, p in net.named_parameters():
        norm = name.endswith("weight") and p.ndim == 1
        p.data = rng.normal(p.shape) * (0.1 if p.ndim < 2 else 1 / max(1, p.size // p.shape[-1]) ** 0.5) + norm
    return interop.to_torch(net)


def save_folder(folder: Path, version: int = 1, **changes: Any) -> Path:
    """The layout that diffusers writes. changes: of the configuration of a part, unet={...}."""
    from safetensors.numpy import save_file

    for part, config in configs(version).items():
        config.update(changes.get(part, {}))
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        prefix = "text_model." if part == "text_encoder" else ""
        named = {prefix + n: np.ascontiguousarray(a) for n, a in state(part, config).items()}
        save_file(named, folder / part / f"{name}.safetensors")
    save_words(folder / "tokenizer", padding=END if version == 1 else "!")
    (folder / "scheduler").mkdir()
    schedule = {"prediction_type": "epsilon" if version == 1 else "v_prediction", "beta_schedule": "scaled_linear"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return folder


def save_single_file(path: Path, version: int = 1) -> Path:
    """The same weights under the original names, with q, k and v of OpenCLIP in one array, and one block more."""
    from safetensors.numpy import save_file

    found: dict[str, np.ndarray] = {"betas": np.zeros(3, "float32"), "model_ema.decay": np.zeros((), "float32")}
    for name, a in state("unet", configs(version)["unet"]).items():
        found["model.diffusion_model." + _unet_name(name)] = a
    for name, a in state("vae", configs(version)["vae"]).items():
        name, attention = _vae_name(name)
        found["first_stage_model." + name] = a[..., None, None] if attention and a.ndim == 2 else a
    words = state("text_encoder", configs(version)["text_encoder"])
    found |= (
        {f"cond_stage_model.transformer.text_model.{n}": a for n, a in words.items()}
        if version == 1
        else {f"cond_stage_model.model.{n}": a for n, a in _openclip(words).items()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(a) for n, a in found.items()}, path)
    save_words(path.parent / "tokenizer", padding=END if version == 1 else "!")
    return path


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip


def _unet_name(name: str) -> str:
    """For two levels of one block each: input_blocks 0 (conv_in), 1 (block), 2 (stride), 3; output_blocks 0 to 3."""
    fixed = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0",
             "time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}  # fmt: skip
    for old, new in fixed.items():
        if name.startswith(old + "."):
            return new + name[len(old) :]
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, j, *rest = rest
        rest = [RESNET[rest[0]], *rest[1:]] if kind == "resnets" else rest
        return ".".join([f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}", *rest])
    level, kind, j, *rest = rest
    if kind == "downsamplers":
        return f"input_blocks.{2 * int(level) + 2}.0.op.{rest[-1]}"
    if kind == "upsamplers":  # the second thing of its block, or the third behind a transformer
        return f"output_blocks.{2 * int(level) + 1}.1.conv.{rest[-1]}"
    number = 2 * int(level) + (1 if side == "down_blocks" else 0) + int(j)
    rest = [RESNET[rest[0]], *rest[1:]] if kind == "resnets" else rest
    return ".".join(
        [f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}.{int(kind == 'attentions')}", *rest]
    )


def _vae_name(name: str) -> tuple[str, bool]:
    for old, new in {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
                     "mid_block.attentions.0.group_norm": "mid.attn_1.norm", "to_out.0": "proj_out", "to_q": "q",
                     "to_k": "k", "to_v": "v", "mid_block.attentions.0": "mid.attn_1", "conv_shortcut": "nin_shortcut",
                     "conv_norm_out": "norm_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
                     "resnets": "block", "encoder.down_blocks": "encoder.down"}.items():  # fmt: skip
        name = name.replace(old, new)
    for i in range(2):
        name = name.replace(f"decoder.up_blocks.{i}", f"decoder.up.{1 - i}")
    return name, "attn_1" in name and "norm" not in name


def _openclip(words: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {"text_projection": np.zeros((64, 64), "float32"), "logit_scale": np.zeros((), "float32")}
    for name, a in words.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            a = np.concatenate([words[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        for old, new in {"embeddings.token_embedding": "token_embedding", "self_attn.q_proj.": "attn.in_proj_",
                         "embeddings.position_embedding.weight": "positional_embedding", "self_attn": "attn",
                         "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks",
                         "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}.items():  # fmt: skip
            name = name.replace(old, new)
        found[name] = a
    extra = {n.replace("resblocks.1", "resblocks.2"): a for n, a in found.items() if "resblocks.1" in n}
    return found | extra


def host(x: Any) -> np.ndarray:
    return backend.to_host(getattr(x, "_data", x))
