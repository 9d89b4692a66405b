"""The released weights, from safetensors files, into our nets.

    nets = load_nets("weights/stable-diffusion-v1-5")      # a folder with text_encoder, unet, vae, tokenizer, scheduler
    nets = load_nets("v1-5-pruned-emaonly.safetensors")    # or the single file

The files are mapped into memory, and one array after the other is brought to our order of axes and to float32, so a
net needs its own size and little more. With half=True the weights of convolutions and linear layers stay float16 in
memory, and each layer widens its own while it computes.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ... import nn
from ...backend import to_device
from ...engine import Tensor
from ...interop import axes_of, from_bfloat16
from .autoencoder import Autoencoder
from .names import OLD_ATTENTION, configurations, parts_of_single_file, replaced
from .text_encoder import TextEncoder
from .unet import UNet

Progress = Callable[[int, int], object]  # (bytes that are loaded, bytes in all)

PARTS = ("text_encoder", "unet", "vae", "tokenizer", "scheduler")
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
IGNORED = ("embeddings.position_ids",)  # 0 to 76, which older files keep


class Nets(NamedTuple):
    """What the files hold. tokenizer: the folder of vocab.json and merges.txt. scheduler: its configuration."""

    text_encoder: TextEncoder
    unet: UNet
    autoencoder: Autoencoder
    tokenizer: Path
    scheduler: dict[str, Any]


def load_nets(path: Any, *, half: bool = False, progress: Progress | None = None, tokenizer: Any = None) -> Nets:
    """The nets of a folder of parts or of a single file. progress(done, total): called as bytes are loaded. tokenizer:
    the folder of vocab.json and merges.txt, by default `tokenizer` in the folder, or beside the file.

    Errors: FileNotFoundError for what is not there; ValueError for pickled weights, for a file that is truncated or no
    safetensors, for weights of another family (such as SDXL), and for a net whose weights do not fit, with every
    missing, unexpected and wrongly shaped entry; RuntimeError without the package safetensors; MemoryError, with how
    much was needed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}: it should be a folder with {', '.join(PARTS)}, or a file")
    if path.is_dir():
        sources, configs, scheduler = _open_folder(path)
        words = path / "tokenizer" if tokenizer is None else Path(tokenizer)
    else:
        sources, configs, scheduler = _open_single_file(path)
        words = path.parent / "tokenizer" if tokenizer is None else Path(tokenizer)
    for name in ("vocab.json", "merges.txt"):
        if not (words / name).is_file():
            raise FileNotFoundError(f"the words need {str(words / name)!r}, which is not there (CLIP's, about 1 MB)")
    makers: dict[str, Callable[[Any], Any]] = {
        "text_encoder": text_encoder_of, "unet": unet_of, "vae": autoencoder_of
    }  # fmt: skip
    nets = {}
    for part, make in makers.items():
        try:
            nets[part] = make(configs[part])
        except (TypeError, LookupError, AttributeError) as error:  # a list for a number, and the like
            raise ValueError(f"the configuration of the {part} in {str(path)!r} is of no such net: {error}") from error
    wrong = [found for part, net in nets.items() for found in misfits(net, part, sources[part])]
    if wrong:
        raise ValueError(f"the weights in {str(path)!r} do not fit, {len(wrong)} entries:\n  " + "\n  ".join(wrong))
    total, done = sum(e.size for part in nets for e in sources[part].values()), 0
    for part, net in nets.items():
        for size in fill(net, sources[part], half=half):
            done += size
            if progress is not None:
                progress(done, total)
    return Nets(nets["text_encoder"], nets["unet"], nets["vae"], words, scheduler)


# ---------------------------------------------------------------- files


class Entry(NamedTuple):
    """An array of a file: its shape, bytes, and how to read it, as an array of the host."""

    shape: tuple[int, ...]
    size: int
    read: Callable[[], Any]


def open_safetensors(path: Path) -> dict[str, Entry]:
    """Every array of a file by its name; none is read yet. Errors: as load_nets."""
    if path.suffix in PICKLES:
        raise ValueError(
            f"{str(path)!r} is a pickle, which runs code of whoever made it when it is loaded, so it is refused: take "
            "the .safetensors file of the same release"
        )
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise RuntimeError("weights are read by the package safetensors: pip install 'tinydiff[weights]'") from error
    try:
        file, header = safe_open(path, framework="numpy"), functools.cache(lambda: _header(path))
        return {name: _entry(file, header, name, path) for name in file.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{str(path)!r} ({size:,} bytes) is no safetensors file, or is cut off or damaged: {error}. Get it again"
        ) from error


KINDS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What the file says of its arrays, and where the first one begins. The package, which has checked it, does not
    tell where an array lies, and NumPy has no bfloat16."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _entry(file: Any, header: Callable[[], tuple[dict[str, Any], int]], name: str, path: Path) -> Entry:
    part = file.get_slice(name)
    shape, kind = tuple(part.get_shape()), part.get_dtype()
    size = KINDS.get(kind, 1)
    for n in shape:
        size *= n

    def read() -> Any:
        if kind == "BF16":
            entries, start = header()
            begin, end = entries[name]["data_offsets"]
            with path.open("rb") as own:
                own.seek(start + begin)
                return from_bfloat16(own.read(end - begin), shape)
        if kind not in ("F16", "F32", "F64"):
            raise ValueError(f"{name} in {str(path)!r} is of {kind}: weights must be of F16, BF16, F32 or F64")
        return file.get_tensor(name)

    return Entry(shape, size, read)


def _open_folder(path: Path) -> tuple[dict[str, dict[str, Entry]], dict[str, Any], dict[str, Any]]:
    index = path / "model_index.json"
    kind = read_json(index).get("_class_name", "") if index.is_file() else ""
    if (path / "text_encoder_2").exists() or any(name in str(kind) for name in ("XL", "Diffusion3", "Flux")):
        raise ValueError(
            f"{str(path)!r} is of another family ({kind or 'it has a text_encoder_2'}): versions 1 and 2 of Stable "
            "Diffusion are read here"
        )
    missing = [part for part in PARTS if not (path / part).is_dir()]
    if missing:
        raise FileNotFoundError(f"the folder {str(path)!r} has no {', '.join(missing)}: {', '.join(PARTS)} are needed")
    sources, configs = {}, {}
    for part in ("text_encoder", "unet", "vae"):
        configs[part] = read_json(path / part / "config.json")
        entries = _open_part(path / part)
        names = {n: n.removeprefix("text_model.") for n in entries}
        if part == "vae":
            names = {n: replaced(n, OLD_ATTENTION) if "attentions" in n else n for n in names}
        sources[part] = {ours: entries[n] for n, ours in names.items()}
    return sources, configs, read_json(path / "scheduler" / "scheduler_config.json")


def _open_part(folder: Path) -> dict[str, Entry]:
    """The arrays of a net, which are in one file, or in several, with an index that says which is where."""
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    for kind in ("", ".fp16"):
        if (file := folder / f"{stem}{kind}.safetensors").is_file():
            return open_safetensors(file)
        if (index := folder / f"{stem}.safetensors.index{kind}.json").is_file():
            return _open_shards(index)
    pickles = [p for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    if pickles:
        open_safetensors(pickles[0])  # says why not
    raise FileNotFoundError(f"there is no {stem}.safetensors in {str(folder)!r}, nor {stem}.fp16.safetensors")


def _open_shards(index: Path) -> dict[str, Entry]:
    """Errors: ValueError for an index that is none, or names an array that its file does not have; FileNotFoundError
    for files that are not there."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{str(index)!r} has no weight_map, of the file in which each array is")
    files = sorted(set(places.values()))
    if outside := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{str(index)!r} names the file {outside[0]!r}, which is not in its folder")
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise FileNotFoundError(f"{str(index)!r} names {', '.join(missing)}, and there is no such file")
    found = {file: open_safetensors(index.parent / file) for file in files}
    if lacking := [f"{name} in {file}" for name, file in places.items() if name not in found[file]]:
        raise ValueError(f"{str(index)!r} names arrays that are not there: {', '.join(lacking[:9])}")
    return {name: found[file][name] for name, file in places.items()}


def _open_single_file(path: Path) -> tuple[dict[str, dict[str, Entry]], dict[str, Any], dict[str, Any]]:
    entries = open_safetensors(path)
    families = {
        "conditioner.embedders": "SDXL", "joint_blocks": "Stable Diffusion 3", "double_blocks": "Flux",
        "lora_unet": "a LoRA, which is loaded on top of weights (--lora)", "cap_embedder": "Lumina",
    }  # fmt: skip
    for name in entries:
        for mark, family in families.items():
            if mark in name:
                raise ValueError(
                    f"{str(path)!r} is of another family, by its entry {name!r} {family}: versions 1 and 2 of Stable "
                    "Diffusion are read here"
                )
    sources = {
        part: {ours: _third(entries, file) for ours, file in names.items()}
        for part, names in parts_of_single_file(entries).items()
    }
    if empty := [part for part, source in sources.items() if not source]:
        raise ValueError(
            f"{str(path)!r} has no weights of {', '.join(empty)} under the names of the original single file; its "
            f"first entries are {', '.join(list(entries)[:3])}"
        )
    shapes = ({n: e.shape for n, e in sources[part].items()} for part in ("unet", "vae", "text_encoder"))
    try:
        configs = configurations(*shapes)
    except (LookupError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no Stable Diffusion of version 1 or 2: it lacks {error}") from error
    predicts = "v_prediction" if configs["unet"]["use_linear_projection"] else "epsilon"
    return sources, configs, {"prediction_type": predicts}


def _third(entries: Mapping[str, Entry], name: str) -> Entry:
    """The array of that name, or with "#i" at its end the i-th third of its rows."""
    file, _, i = name.partition("#")
    whole = entries[file]
    if not i:
        return whole
    rows = whole.shape[0] // 3
    part = slice(int(i) * rows, (int(i) + 1) * rows)
    return Entry((rows, *whole.shape[1:]), whole.size // 3, lambda: whole.read()[part])


def read_json(path: Path) -> dict[str, Any]:
    """Errors: FileNotFoundError, or ValueError with the name of the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # brackets in brackets
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, not {found!r:.80}")
    return found


# ---------------------------------------------------------------- into the nets


def misfits(net: nn.Module, part: str, source: Mapping[str, Entry]) -> list[str]:
    """Every missing, unexpected and wrongly shaped entry, a line for each."""
    own, found = dict(net.named_parameters()), []
    axes = dict(axes_of(net))
    for name, p in own.items():
        if name not in source:
            found.append(f"missing: {part} {name} {file_shape(p.shape, axes.get(name))}")
        elif _plain(source[name].shape, p.ndim) != file_shape(p.shape, axes.get(name)):
            wanted = file_shape(p.shape, axes.get(name))
            found.append(f"wrongly shaped: {part} {name} is {source[name].shape}, not {wanted}")
    return found + [f"unexpected: {part} {n} {e.shape}" for n, e in source.items() if n not in own and n not in IGNORED]


def fill(net: nn.Module, source: Mapping[str, Entry], *, half: bool = False) -> Iterable[int]:
    """Load all weights; after each one yields the bytes that it had in the file."""
    axes = dict(axes_of(net))
    layers = {f"{path}.weight": layer for path, layer in net.named_modules()}
    for name, p in net.named_parameters():
        try:
            array = source[name].read()
            array = array.reshape(_plain(array.shape, p.ndim)).transpose(axes.get(name, tuple(range(p.ndim))))
            layer: Any = layers.get(name)
            if half and type(layer) in NARROW:
                layer.__class__ = NARROW[type(layer)]
                layer.weight = Tensor(to_device(array.astype("float16", order="C")))
            else:
                p.data = to_device(array.astype(str(p.dtype), order="C"))
        except MemoryError as error:
            total = sum(q.size for q in net.parameters()) * (2 if half else 4)
            remedy = "" if half else "; half=True (--half) keeps them in half of that"
            raise MemoryError(
                f"out of memory at {name} {p.shape}: the weights of this net take {total / 1e9:.1f} GB{remedy}"
            ) from error
        yield source[name].size


def _plain(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The shape without the 1x1 kernel of a convolution, where ours is a linear layer: (C, C, 1, 1) -> (C, C)."""
    return shape[:2] if ndim == 2 and shape[2:] == (1, 1) else tuple(shape)


def file_shape(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape in PyTorch's order of axes."""
    if axes is None:
        return tuple(shape)
    return tuple(shape[axes.index(i)] for i in range(len(axes)))


class _Narrow:
    """A layer whose weight is kept in float16, and widened for as long as the layer computes. It is not trained."""

    weight: Any

    def forward(self, x: Any) -> Any:
        wide = copy.copy(self)  # of its own, for threads
        wide.weight = Tensor(self.weight._data.astype(x.dtype))
        return super(_Narrow, wide).forward(x)  # type: ignore[misc]


class NarrowLinear(_Narrow, nn.Linear):
    """A Linear with a weight of float16."""


class NarrowConv2d(_Narrow, nn.Conv2d):
    """A Conv2d with a weight of float16."""


NARROW: dict[type, type] = {nn.Linear: NarrowLinear, nn.Conv2d: NarrowConv2d}


# ---------------------------------------------------------------- nets from the folder's configurations

SAME: dict[str, dict[str, Any]] = {  # what a configuration may say, if it says it, because the nets here have only that
    "unet": {
        "act_fn": "silu", "addition_embed_type": None, "class_embed_type": None, "num_class_embeds": None,
        "encoder_hid_dim": None, "transformer_layers_per_block": 1, "time_embedding_type": "positional",
        "resnet_time_scale_shift": "default", "dual_cross_attention": False, "only_cross_attention": False,
        "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "norm_eps": 1e-5,
        "downsample_padding": 1, "mid_block_scale_factor": 1, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "time_cond_proj_dim": None,
    },
    "vae": {
        "act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": True,
        "use_post_quant_conv": True, "mid_block_add_attention": True,
    },
    "text_encoder": {},
}  # fmt: skip


def _check(part: str, config: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Errors: ValueError for a configuration that the nets here do not have, or one that does not say enough."""
    for name, wanted in SAME[part].items():
        if name in config and config[name] != wanted:
            raise ValueError(
                f"the {part} is of another family: its configuration says {name}={config[name]!r}, and versions 1 and "
                f"2 of Stable Diffusion have {wanted!r}"
            )
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"the configuration of the {part} does not say {', '.join(missing)}")


def unet_of(config: Mapping[str, Any]) -> UNet:
    """A U-Net of this configuration, whose weights are to be filled."""
    _check("unet", config, ["block_out_channels", "cross_attention_dim", "attention_head_dim"])
    kinds = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    if unknown := [kind for kind in kinds if kind not in ("CrossAttnDownBlock2D", "DownBlock2D")]:
        raise ValueError(f"the unet is of another family: its blocks are {', '.join(unknown)}")
    return UNet(
        config.get("in_channels", 4),
        config.get("out_channels", 4),
        config["block_out_channels"],
        layers=config.get("layers_per_block", 2),
        context=config["cross_attention_dim"],
        heads=config["attention_head_dim"],  # a number of heads, whatever it is called
        attention=[kind == "CrossAttnDownBlock2D" for kind in kinds],
        linear=config.get("use_linear_projection", False),
        groups=config.get("norm_num_groups", 32),
        rng=nn.Unfilled(),
    )


def autoencoder_of(config: Mapping[str, Any]) -> Autoencoder:
    """An autoencoder of this configuration, whose weights are to be filled."""
    _check("vae", config, ["block_out_channels"])
    return Autoencoder(
        config.get("in_channels", 3),
        config.get("out_channels", 3),
        config["block_out_channels"],
        latent=config.get("latent_channels", 4),
        layers=config.get("layers_per_block", 2),
        groups=config.get("norm_num_groups", 32),
        scaling=config.get("scaling_factor", 0.18215),
        rng=nn.Unfilled(),
    )


def text_encoder_of(config: Mapping[str, Any]) -> TextEncoder:
    """A text encoder of this configuration, whose weights are to be filled."""
    _check("text_encoder", config, ["hidden_size", "num_hidden_layers", "num_attention_heads"])
    return TextEncoder(
        config.get("vocab_size", 49408),
        config.get("max_position_embeddings", 77),
        config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config.get("intermediate_size"),
        activation=config.get("hidden_act", "quick_gelu"),
        eps=config.get("layer_norm_eps", 1e-5),
        rng=nn.Unfilled(),
    )
