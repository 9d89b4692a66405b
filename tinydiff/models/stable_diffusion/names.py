"""The names of the weights in the single file, as the authors' code (CompVis, Stability AI: "ldm") wrote it, and the
nets that they are of.

    model.diffusion_model.input_blocks.1.1.proj_in.weight  ->  unet          down_blocks.0.attentions.0.proj_in.weight
    first_stage_model.decoder.up.3.block.0.norm1.weight    ->  vae           decoder.up_blocks.0.resnets.0.norm1.weight
    cond_stage_model.transformer.text_model.encoder...     ->  text_encoder  encoder...                     (version 1)
    cond_stage_model.model.transformer.resblocks.0.ln_1... ->  text_encoder  encoder.layers.0.layer_norm1...      (2)

The file has no configuration: sizes are read off the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

PREFIXES = {
    "unet": r"model\.diffusion_model\.",
    "vae": r"first_stage_model\.",
    "text_encoder": r"cond_stage_model\.(?:transformer\.(?:text_model\.)?|model\.)",
}

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
UNET = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
VAE = {
    "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k", "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0", "norm_out": "conv_norm_out",
    "nin_shortcut": "conv_shortcut", "downsample.conv": "downsamplers.0.conv", "upsample.conv": "upsamplers.0.conv",
}  # fmt: skip
OPENCLIP = {
    "token_embedding": "embeddings.token_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm", "transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1",
    "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.": "self_attn.",
}  # fmt: skip
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of folders before 2023


def replaced(name: str, table: Mapping[str, str]) -> str:
    """The name with each part that the table knows replaced: whole parts between dots."""
    for old, new in table.items():
        end = "" if old.endswith(".") else r"(?=\.|$)"
        name = re.sub(rf"(?:(?<=\.)|^){re.escape(old)}{end}", new, name)
    return name


def parts_of_single_file(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each net its names, ours -> the file's. What belongs to no net (the schedule, averages of the weights) is
    left out, and so is what the nets here do not have: the last block of OpenCLIP, and its projection. OpenCLIP has q,
    k and v in one array: a name that ends in "#0", "#1" or "#2" means that third of it."""
    names = list(names)
    found: dict[str, dict[str, str]] = {part: {} for part in PREFIXES}
    inner = {part: {re.sub(f"^{p}", "", n): n for n in names if re.match(p, n)} for part, p in PREFIXES.items()}
    blocks = max((int(m[1]) for n in inner["unet"] if (m := re.match(r"input_blocks\.(\d+)\.", n))), default=0)
    # input_blocks: one, then at each level `layers` blocks and a downsampler, but for the last level
    downs = [int(m[1]) for n in inner["unet"] if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", n))]
    layers = downs[0] - 1 if downs else blocks
    found["unet"] = {_of_unet(n, layers): file for n, file in inner["unet"].items()}
    levels = 1 + max((int(m[1]) for n in inner["vae"] if (m := re.match(r"decoder\.up\.(\d+)", n))), default=0)
    found["vae"] = {_of_vae(n, levels): file for n, file in inner["vae"].items() if n.startswith(VAE_PARTS)}
    if any(n.startswith("transformer.resblocks") for n in inner["text_encoder"]):
        found["text_encoder"] = _of_openclip(inner["text_encoder"])
    else:
        found["text_encoder"] = inner["text_encoder"]
    return found


VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def _of_unet(name: str, layers: int) -> str:
    if m := re.match(r"input_blocks\.(\d+)\.(\d+)\.(.*)", name):
        level, j = divmod(int(m[1]) - 1, layers + 1)
        if int(m[1]) > 0:
            if j == layers:
                return f"down_blocks.{level}.downsamplers.0.conv.{m[3].removeprefix('op.')}"
            return f"down_blocks.{level}.{('resnets', 'attentions')[int(m[2])]}.{j}.{replaced(m[3], RESNET)}"
    if m := re.match(r"output_blocks\.(\d+)\.(\d+)\.(.*)", name):
        level, j = divmod(int(m[1]), layers + 1)
        if m[3].startswith("conv."):
            return f"up_blocks.{level}.upsamplers.0.{m[3]}"
        return f"up_blocks.{level}.{('resnets', 'attentions')[int(m[2])]}.{j}.{replaced(m[3], RESNET)}"
    return replaced(replaced(name, UNET), RESNET)


def _of_vae(name: str, levels: int) -> str:
    if m := re.match(r"(encoder|decoder)\.(down|up)\.(\d+)\.(.*)", name):
        level = int(m[3]) if m[2] == "down" else levels - 1 - int(m[3])
        name = f"{m[1]}.{m[2]}_blocks.{level}." + re.sub(r"^block\.", "resnets.", m[4])
    return replaced(name, VAE)


def _of_openclip(inner: Mapping[str, str]) -> dict[str, str]:
    last = max(int(m[1]) for n in inner if (m := re.match(r"transformer\.resblocks\.(\d+)", n)))
    found = {}
    for name, file in inner.items():
        if name.startswith((f"transformer.resblocks.{last}.", "text_projection", "logit_scale", "attn_mask")):
            continue
        ours = replaced(name, OPENCLIP)
        if m := re.match(r"(.*)\.in_proj_(weight|bias)$", ours):
            found.update({f"{m[1]}.{qkv}_proj.{m[2]}": f"{file}#{i}" for i, qkv in enumerate("qkv")})
        else:
            found[ours] = file
    return found


# ---------------------------------------------------------------- and back


def names_for_single_file(part: str, names: Iterable[str]) -> dict[str, str]:
    """For each name of a net, ours, the original one; the other way round than parts_of_single_file. The text encoder
    is that of version 1."""
    names = list(names)
    if part == "text_encoder":
        return {n: f"cond_stage_model.transformer.text_model.{n}" for n in names}
    if part == "vae":
        levels = 1 + max(int(m[1]) for n in names if (m := re.match(r"decoder\.up_blocks\.(\d+)", n)))
        return {n: f"first_stage_model.{_vae_to_file(n, levels)}" for n in names}
    layers = 1 + max(int(m[1]) for n in names if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", n)))
    attention = {m[1] for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions", n))}
    return {n: f"model.diffusion_model.{_unet_to_file(n, layers, attention)}" for n in names}


def _unet_to_file(name: str, layers: int, attention: set[str]) -> str:
    """attention: the levels on the way up that have it, whose upsampler is the third thing of its block."""
    if m := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        side, level, kind, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
        first = level * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{1 + (m[2] in attention)}.{rest}"
        block = f"input_blocks.{1 + first + j}" if side == "down" else f"output_blocks.{first + j}"
        return f"{block}.1.{rest}" if kind == "attentions" else f"{block}.0.{replaced(rest, _turned(RESNET))}"
    middle = name.startswith("mid_block.resnets")
    name = replaced(name, _turned(UNET))
    return replaced(name, _turned(RESNET)) if middle else name


def _vae_to_file(name: str, levels: int) -> str:
    if m := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.*)", name):
        level = int(m[3]) if m[2] == "down" else levels - 1 - int(m[3])
        name = f"{m[1]}.{m[2]}.{level}.{re.sub('^resnets', 'block', m[4])}"
    return replaced(name, _turned(VAE))


def _turned(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


# ---------------------------------------------------------------- sizes from shapes, in PyTorch's order of axes


def configurations(unet: Shapes, vae: Shapes, text: Shapes) -> dict[str, dict[str, Any]]:
    """What the folder's config.json would say. The number of heads leaves no trace in the shapes: a text encoder has
    heads of 64, a U-Net 8 heads in version 1 and heads of 64 in version 2, which is the one with linear maps."""
    channels = _widths(unet, "down_blocks.{}.resnets.0.conv1.weight")
    attention = [f"down_blocks.{i}.attentions.0.norm.weight" in unet for i in range(len(channels))]
    linear = len(unet["mid_block.attentions.0.proj_in.weight"]) == 2
    width, context = (text[f"embeddings.{n}_embedding.weight"] for n in ("token", "position"))
    return {
        "unet": {
            "block_out_channels": channels, "in_channels": unet["conv_in.weight"][1],
            "out_channels": unet["conv_out.weight"][0], "use_linear_projection": linear,
            "layers_per_block": _count(unet, "down_blocks.0.resnets.{}.conv1.weight"),
            "cross_attention_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
            "attention_head_dim": [max(1, w // 64) for w in channels] if linear else 8,
            "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attention],
        },
        "vae": {
            "block_out_channels": _widths(vae, "encoder.down_blocks.{}.resnets.0.conv1.weight"),
            "layers_per_block": _count(vae, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
            "in_channels": vae["encoder.conv_in.weight"][1], "out_channels": vae["decoder.conv_out.weight"][0],
            "latent_channels": vae["decoder.conv_in.weight"][1],
        },
        "text_encoder": {
            "vocab_size": width[0], "hidden_size": width[1], "max_position_embeddings": context[0],
            "num_attention_heads": max(1, width[1] // 64), "hidden_act": "gelu" if linear else "quick_gelu",
            "num_hidden_layers": _count(text, "encoder.layers.{}.layer_norm1.weight"),
            "intermediate_size": text["encoder.layers.0.mlp.fc1.weight"][0],
        },
    }  # fmt: skip


def _count(shapes: Shapes, name: str) -> int:
    i = 0
    while name.format(i) in shapes:
        i += 1
    return i


def _widths(shapes: Shapes, name: str) -> list[int]:
    return [shapes[name.format(i)][0] for i in range(_count(shapes, name))]
