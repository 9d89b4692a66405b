"""What the files of the released Stable Diffusion may be beside one of float32 for each net: written here, of bfloat16,
in several files, damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_diffusion import host, save_folder, save_single_file

from tinydiff import nn
from tinydiff.models.stable_diffusion import names
from tinydiff.models.stable_diffusion.autoencoder import Autoencoder
from tinydiff.models.stable_diffusion.pipeline import StableDiffusion, load_pipeline
from tinydiff.models.stable_diffusion.text_encoder import TextEncoder
from tinydiff.models.stable_diffusion.tokenizer import Tokenizer
from tinydiff.models.stable_diffusion.unet import UNet
from tinydiff.models.stable_diffusion.weights import load_nets, open_safetensors
from tinydiff.models.stable_diffusion.writing import save_folder as write_folder
from tinydiff.models.stable_diffusion.writing import save_single_file as write_single_file

safetensors_numpy = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("numpy_backend")
FILES = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]


def weights_of(sd: StableDiffusion) -> list[Any]:
    return [host(p) for net in (sd.text_encoder, sd.unet, sd.autoencoder) for _, p in net.named_tensors()]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------- written


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_a_folder_that_is_written_is_the_one_that_was_read(version: int, half: bool, tmp_path: Path) -> None:
    """The same names, shapes and numbers, and the same nets, words and schedule when it is read again."""
    given = save_folder(tmp_path / "given", version)
    a = load_pipeline(given, half=half)
    write_folder(a, tmp_path / "made")
    for name in FILES if not half else []:
        x, y = (safetensors_numpy.load_file(path / f"{name}.safetensors") for path in (given, tmp_path / "made"))
        assert same(x, y)
    b = load_pipeline(tmp_path / "made", half=half)
    found = list(zip(weights_of(a), weights_of(b), strict=True))
    assert all(x.dtype == y.dtype and (x == y).all() for x, y in found)
    assert half == any(x.dtype == "float16" for x, _ in found)
    assert a.model.predicts == b.model.predicts == ("noise" if version == 1 else "v")
    assert (a.process.start, a.process.end) == (b.process.start, b.process.end)
    options: Any = dict(height=16, width=8, steps=2, rng=1)
    assert (a.paint("a red house", **options) == b.paint("a red house", **options)).all()


def test_a_single_file_that_is_written_is_the_one_that_was_read(tmp_path: Path) -> None:
    given = save_single_file(tmp_path / "given" / "all.safetensors")
    a = load_pipeline(given)
    write_single_file(a, tmp_path / "made" / "all.safetensors")
    x, y = safetensors_numpy.load_file(given), safetensors_numpy.load_file(tmp_path / "made" / "all.safetensors")
    no_net = {"betas", "model_ema.decay"}
    assert same({n: v for n, v in x.items() if n not in no_net}, y)
    b = load_pipeline(tmp_path / "made" / "all.safetensors")
    assert all((x == y).all() for x, y in zip(weights_of(a), weights_of(b), strict=True))
    with pytest.raises(ValueError, match="single file of version 2 .* use save_folder"):
        write_single_file(load_pipeline(save_folder(tmp_path / "two", 2)), tmp_path / "two.safetensors")


def test_all_names_of_the_full_size_are_found_again() -> None:
    """1130 arrays, as many as the released file of version 1 has for these nets."""
    blank, given = nn.Unfilled(), {}
    for part, net in {
        "unet": UNet(rng=blank),
        "vae": Autoencoder(rng=blank),
        "text_encoder": TextEncoder(rng=blank),
    }.items():
        own = [name for name, _ in net.named_tensors()]
        given |= {file: (part, name) for name, file in names.names_for_single_file(part, own).items()}
    assert len(given) == 1130
    found = {
        file: (part, name) for part, own in names.parts_of_single_file(given).items() for name, file in own.items()
    }
    assert found == given
    assert given["model.diffusion_model.output_blocks.5.2.conv.weight"] == (
        "unet",
        "up_blocks.1.upsamplers.0.conv.weight",
    )
    assert given["first_stage_model.decoder.up.3.block.0.norm1.bias"] == (
        "vae",
        "decoder.up_blocks.0.resnets.0.norm1.bias",
    )


def test_a_tokenizer_comes_back(tmp_path: Path) -> None:
    a = Tokenizer.from_folder(save_folder(tmp_path / "two", 2) / "tokenizer")
    a.save(tmp_path / "words")
    b = Tokenizer.from_folder(tmp_path / "words")
    prompts = ["a lighthouse in a storm, 日本語 🏠!", ""]
    assert b.padding == a.padding != a.end and (a.encode(prompts) == b.encode(prompts)).all()


# ---------------------------------------------------------------- bfloat16, and several files


def test_bfloat16_is_read(tmp_path: Path) -> None:
    """1, -2.5, 2^-133 (subnormal) and 3.140625, by hand from their sign, exponent and seven digits."""
    path = tmp_path / "x.safetensors"
    words = [0x3F80, 0xC020, 0x0001, 0x4049]
    header = json.dumps({"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                         "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [4, 12]}}).encode()  # fmt: skip
    data = np.float32([7]).tobytes() + b"".join(word.to_bytes(2, "little") for word in words)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    entry = open_safetensors(path)["a"]
    found = entry.read()
    assert entry.size == 8 and found.dtype == "float32" and found.tolist() == [[1, -2.5], [2.0**-133, 3.140625]]


def sharded(folder: Path, part: str = "unet", stem: str = "diffusion_pytorch_model") -> Path:
    """The arrays of a part in two files, as diffusers writes large nets; the index."""
    path = folder / part / f"{stem}.safetensors"
    state, files = safetensors_numpy.load_file(path), [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    path.unlink()
    places = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        safetensors_numpy.save_file({n: a for n, a in state.items() if places[n] == file}, path.parent / file)
    index = path.parent / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_several_files_are_one_net(tmp_path: Path) -> None:
    given = save_folder(tmp_path / "one")
    several = Path(shutil.copytree(given, tmp_path / "several"))
    sharded(several)
    sharded(several, "text_encoder", "model")
    a, b = load_pipeline(given), load_pipeline(several)
    assert all((x == y).all() for x, y in zip(weights_of(a), weights_of(b), strict=True))


def places_of(files: dict[str, str]) -> str:
    return json.dumps({"weight_map": files})


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    made = save_folder(tmp_path / "x")
    index = sharded(made)
    good = json.loads(index.read_text())
    name, file = next(iter(good["weight_map"].items()))
    for text, error, message in [
        ("[]", ValueError, r"index\.json' must hold a JSON object"),
        ("{}", ValueError, r"index\.json' has no weight_map"),
        (
            places_of({name: "../vae/x.safetensors"}),
            ValueError,
            r"'\.\./vae/x\.safetensors', which is not in its folder",
        ),
        (places_of({name: "gone.safetensors"}), FileNotFoundError, r"names gone\.safetensors, and there is no such"),
        (places_of({**good["weight_map"], "new.weight": file}), ValueError, "not there: new.weight in"),
    ]:
        index.write_text(text)
        with pytest.raises(error, match=message):
            load_nets(made)
    half = {n: f for n, f in good["weight_map"].items() if f == file}
    index.write_text(json.dumps({"weight_map": half}))
    with pytest.raises(ValueError, match="missing: unet "):
        load_nets(made)
    index.write_text(json.dumps(good))
    whole = (index.parent / file).read_bytes()
    (index.parent / file).write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=f"{file}' .* is cut off or damaged"):
        load_nets(made)


# ---------------------------------------------------------------- what a part says of itself


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("unet/config.json", {"layers_per_block": None}, "layers must be an integer of 1 or more, not None"),
        ("unet/config.json", {"layers_per_block": -1}, "layers must be an integer of 1 or more, not -1"),
        ("unet/config.json", {"down_block_types": 7}, "configuration of the unet in .* is of no such net"),
        ("vae/config.json", {"latent_channels": "4"}, "latent must be an integer"),
        ("text_encoder/config.json", {"num_hidden_layers": []}, "layers must be an integer"),
        ("scheduler/scheduler_config.json", {"prediction_type": []}, r"must predict epsilon or v_prediction, not \[\]"),
        ("tokenizer/tokenizer_config.json", {"pad_token": {}}, r"its pad_token must be a piece, not \{\}"),
        ("tokenizer/vocab.json", {"a": None}, "number of 'a' is no whole number from 0 on: None"),
        ("tokenizer/vocab.json", {"a": 600}, "numbers up to 600, and the text encoder 600 vectors"),
    ],
)  # fmt: skip
def test_a_part_that_says_nonsense(file: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = save_folder(tmp_path / "x")
    (made / file).write_text(json.dumps({**json.loads((made / file).read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load_pipeline(made)
