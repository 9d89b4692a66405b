"""The two sides of the benchmarks compute the same: losses, samplers and ops."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, interop

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cases  # noqa: E402  which lie in that folder
import ours  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("numpy_backend")]


@pytest.fixture
def theirs(numpy_backend: str) -> Any:
    return cases.torch_side()


def pair(theirs: Any, name: str) -> tuple[Any, Any]:
    """A net and its twin with the same weights, none of them zero."""
    net, twin, rng = ours.net_of(name), theirs.net_of(name), Rng(3)
    for p in net.parameters():
        p.data = rng.normal(p.shape) * (0.1 if p.ndim > 1 else 0.5)
    twin.load_state_dict({key: torch.tensor(value) for key, value in interop.to_torch(net).items()})
    return net, twin


@pytest.mark.parametrize("name", ["concat", "add", "conditional", "latent", "quickstart", "autoencoder"])
def test_the_twins_have_the_same_loss(theirs: Any, name: str) -> None:
    (net, twin), n = pair(theirs, name), 5
    batch = ours.batch_of(name, n)
    value = ours.loss_of(name, net)(*batch, rng=Rng(7), sample_offset=0)

    rng = Rng(7)  # draws as the loss does: uniform, (normal,) noise
    draws = [] if name == "autoencoder" else [rng.uniform((n, 5) if name == "quickstart" else n)]
    draws += [rng.normal((n, 1, 1, 1)).ravel()] if name == "quickstart" else []
    draws += [] if name == "autoencoder" else [rng.normal(batch[0].shape).transpose(0, 3, 1, 2)]
    their_batch = theirs.batch_of(name, n, torch.contiguous_format)
    their_draws = tuple(torch.tensor(np.ascontiguousarray(a)) for a in draws)
    assert len(theirs.draw(name, their_batch[0])) == len(their_draws)
    their_value = theirs.loss(name, twin, their_batch, their_draws)
    assert float(value.data) == pytest.approx(their_value.item(), rel=1e-4)


def test_the_quickstarts_net_is_that_of_the_quickstart() -> None:
    assert ours.net_of("quickstart").net.count() == 504_228  # docs/results.md


@pytest.mark.parametrize("name", ["euler_maruyama", "heun"])
def test_the_twins_sample_by_the_same_algorithm(theirs: Any, monkeypatch: Any, name: str) -> None:
    """With noise that is a half everywhere both are deterministic."""
    net, twin = pair(theirs, "quickstart" if name == "heun" else "concat")
    monkeypatch.setattr(ours, "net_of", lambda _: net)
    monkeypatch.setattr(theirs, "net_of", lambda _: twin)
    monkeypatch.setattr(Rng, "normal", lambda self, shape, dtype="float32", sample_offset=0: np.full(shape, 0.5, dtype))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.5))
    x = ours.sampler(name, 3, 4, 1)()
    y = theirs.sampler(name, 3, 4, torch.contiguous_format)().numpy().transpose(0, 2, 3, 1)
    assert abs(x - y).max() < 1e-3 * abs(y).max()


@pytest.mark.parametrize("op", list(cases.all_ops()), ids=lambda op: op.name)
def test_an_op_is_the_same_on_both_sides(theirs: Any, op: Any) -> None:
    x = op.mine(*op.inputs(2))
    inputs = [torch.tensor(np.ascontiguousarray(a)) for a in op.their_inputs(2)]
    y = op.their(theirs.F)(*inputs).numpy()
    y = y.transpose(0, 2, 3, 1) if op.images else y
    assert x.shape == y.shape and abs(x - y).max() < 1e-4 * abs(y).max()
