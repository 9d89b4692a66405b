"""jvp, jacobian and hvp against PyTorch's."""

from __future__ import annotations

from typing import Any

from test_functional import A, U, X, close, f, total

from tinydiff import functional


def test_the_same_as_pytorch(torch: Any, numpy_backend: str) -> None:
    a = torch.from_numpy(A)

    def theirs(x: Any) -> Any:
        return torch.exp(torch.sin(x) @ a) * torch.tanh(x)[:, :2]

    x, u = torch.from_numpy(X), torch.from_numpy(U)
    close(functional.jacobian(f, X), torch.autograd.functional.jacobian(theirs, x).numpy())
    for found, wanted in (
        (functional.jvp(f, X, U), torch.autograd.functional.jvp(theirs, x, u)),
        (functional.hvp(total, X, U), torch.autograd.functional.hvp(lambda x: (theirs(x) ** 2).sum(), x, u)),
    ):
        for ours, one in zip(found, wanted, strict=True):
            close(ours, one.numpy())
