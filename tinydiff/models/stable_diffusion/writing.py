"""The nets as safetensors files, in both layouts that `weights` reads: what was trained here can be painted elsewhere.

    save_folder(sd, "my_weights")                            # text_encoder, unet, vae, tokenizer, scheduler
    save_single_file(sd, "my_weights/all.safetensors")       # the original names, and a folder `tokenizer` beside it

A safetensors file is the length of its header in eight bytes, the header, which is JSON and says of each array its
dtype, its shape and where its bytes are, and then the bytes. So it is written here one array after the other, which
takes no more memory than the largest of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ... import nn
from ...backend import Array, to_host
from ...interop import axes_of
from ...saving import write_atomically
from .names import configurations, names_for_single_file
from .pipeline import StableDiffusion
from .weights import file_shape

DTYPES = {"float16": ("F16", 2), "float32": ("F32", 4), "float64": ("F64", 8)}


class Output(NamedTuple):
    """An array to be written: ours, the order of its axes in the file, and its shape there."""

    array: Array
    axes: tuple[int, ...]
    shape: tuple[int, ...]


def save_folder(sd: StableDiffusion, path: Any) -> None:
    """A folder of parts, as diffusers writes and reads it. Files that are there are replaced.

    Errors: OSError for what cannot be written; ValueError for weights of a dtype that is none of the files'.
    """
    path, nets = Path(path), {"text_encoder": sd.text_encoder, "unet": sd.unet, "vae": sd.autoencoder}
    for part, net in nets.items():
        stem, prefix = ("model", "text_model.") if part == "text_encoder" else ("diffusion_pytorch_model", "")
        arrays = {prefix + name: output for name, output in outputs_of(net).items()}
        write_safetensors(path / part / f"{stem}.safetensors", arrays)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    for part, config in {**configurations_of(sd), "scheduler": _schedule(sd)}.items():
        kind = config.get("_class_name", "CLIPTextModel")
        index[part] = ["transformers" if part == "text_encoder" else "diffusers", kind]
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        _write_json(path / part / name, config)
    _write_json(path / "model_index.json", {**index, "tokenizer": ["transformers", "CLIPTokenizer"]})
    sd.tokenizer.save(path / "tokenizer")


def save_single_file(sd: StableDiffusion, path: Any) -> None:
    """The original single file of version 1, and the folder `tokenizer` beside it.

    Errors: OSError; ValueError for version 2, whose file has a block of the text encoder that is not read here, and for
    weights of a dtype that is none of the files'.
    """
    if sd.text_encoder.activation != "quick_gelu":
        raise ValueError(
            "the single file of version 2 has a block of the text encoder that is not read here, so it cannot be "
            "written: use save_folder"
        )
    nets, path = {"text_encoder": sd.text_encoder, "unet": sd.unet, "vae": sd.autoencoder}, Path(path)
    arrays = {}
    for part, net in nets.items():
        found = outputs_of(net)
        for ours, name in names_for_single_file(part, found).items():
            output = found[ours]
            if part == "vae" and ".attn_1." in name and len(output.shape) == 2:  # they are 1x1 convolutions there
                output = output._replace(shape=(*output.shape, 1, 1))
            arrays[name] = output
    write_safetensors(path, arrays)
    sd.tokenizer.save(path.parent / "tokenizer")


def outputs_of(net: nn.Module) -> dict[str, Output]:
    """Every weight of a net, under its own name, for a file."""
    axes, found = dict(axes_of(net)), {}
    for name, p in net.named_tensors():
        order = axes.get(name, tuple(range(p.ndim)))
        found[name] = Output(p._data, tuple(order.index(i) for i in range(p.ndim)), file_shape(p.shape, order))
    return found


def write_safetensors(path: Path, arrays: Mapping[str, Output]) -> None:
    """Errors: OSError; ValueError for a dtype that is not in DTYPES."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, output in arrays.items():
        if (dtype := str(output.array.dtype)) not in DTYPES:
            raise ValueError(f"{name} is of {dtype}: weights are written as {', '.join(DTYPES)}")
        kind, size = DTYPES[dtype]
        start, end = end, end + output.array.size * size
        header[name] = {"dtype": kind, "shape": output.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays begin at a multiple of 8 bytes

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for array, axes, _ in arrays.values():
            host = to_host(array).transpose(axes)
            file.write(host.astype(host.dtype.newbyteorder("<"), copy=False).tobytes())

    write_atomically(path, write)


def configurations_of(sd: StableDiffusion) -> dict[str, dict[str, Any]]:
    """The config.json of each net: what the shapes say, and what they do not."""
    nets = sd.unet, sd.autoencoder, sd.text_encoder
    found = configurations(*({name: output.shape for name, output in outputs_of(net).items()} for net in nets))
    unet, vae, text = found["unet"], found["vae"], found["text_encoder"]
    levels, below = zip(sd.unet.down_blocks, unet["down_block_types"]), sd.unet.mid_block.attentions[0]
    heads = [(level.attentions or [below])[0].transformer_blocks[0].attn1.heads for level, _ in levels]
    unet |= {
        "_class_name": "UNet2DConditionModel", "attention_head_dim": heads, "sample_size": 64,
        "norm_num_groups": sd.unet.conv_norm_out.num_groups,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(unet["down_block_types"])],
    }  # fmt: skip
    levels_of_vae = len(vae["block_out_channels"])
    vae |= {
        "_class_name": "AutoencoderKL", "scaling_factor": sd.autoencoder.scaling, "sample_size": 512,
        "norm_num_groups": sd.autoencoder.decoder.conv_norm_out.num_groups,
        "down_block_types": ["DownEncoderBlock2D"] * levels_of_vae,
        "up_block_types": ["UpDecoderBlock2D"] * levels_of_vae,
    }  # fmt: skip
    end, start = sd.tokenizer.end, sd.tokenizer.start
    text |= {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": sd.text_encoder.activation,
        "num_attention_heads": sd.text_encoder.encoder["layers"][0].self_attn.heads,
        "layer_norm_eps": sd.text_encoder.final_layer_norm.eps, "bos_token_id": start, "eos_token_id": end,
        "pad_token_id": sd.tokenizer.padding,
    }  # fmt: skip
    return found


def _schedule(sd: StableDiffusion) -> dict[str, Any]:
    predicts = {"noise": "epsilon", "v": "v_prediction"}[sd.model.predicts]
    return {
        "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": sd.process.start,
        "beta_end": sd.process.end, "num_train_timesteps": 1000, "prediction_type": predicts, "clip_sample": False,
        "timestep_spacing": "trailing",
    }  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=2).encode()))
