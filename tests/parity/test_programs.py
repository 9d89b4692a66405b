"""Random programs agree with PyTorch in value, gradient and second gradient. More of them: programs.py."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
import programs  # noqa: E402  which needs PyTorch

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("each_backend")]


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_programs_agree_with_pytorch(first: int) -> None:
    with np.errstate(all="ignore"):
        found = {seed: programs.disagreement(seed) for seed in range(first, first + 20)}
    assert not any(found.values()), {seed: message for seed, message in found.items() if message}
