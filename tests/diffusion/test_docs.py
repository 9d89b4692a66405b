"""The code in docs/ about diffusion runs as it stands, with small stand-ins for what it takes as given."""

import re
from pathlib import Path

import numpy as np
import pytest
from mixtures import gaussian_score

from tinydiff import Rng, backend, ops
from tinydiff.diffusion import VESDE, Denoiser, process

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("page, blocks", [("samplers.md", 3), ("one_and_two_dimensions.md", 1)])
def test_the_code_of_a_page_runs(page, blocks):
    def net(x, noise, digit=None):
        return ops.sin(x) if digit is None else x * 0.0 + digit.reshape((-1, 1, 1, 1))

    names = {
        "model": gaussian_score(0.2, 0.1, VESDE(25.0)),
        "denoiser": Denoiser(net, 0.5),
        "digits": backend.to_device(np.arange(1000) % 10),
        "net": lambda x, t: ops.sin(x),
        "process": process,
        "x0": Rng(0).normal((4, 28, 28, 1)),
        "rng": Rng(0),
    }
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert len(found) == blocks
    for code in found:
        exec(compile(code, page, "exec"), names)
    assert names["x"].shape == (64, 28, 28, 1)
