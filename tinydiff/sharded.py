"""The state of an optimiser, shared out over the ranks: ZeRO, stage 1.

    with connected("mpi") as ranks:
        optimizer = Sharded(Adam, model.parameters(), ranks, lr=1e-3)

Adam keeps two numbers for each weight. With N ranks, each keeps them for an N-th of the weights only, moves those, and
sends them to the others. Beside the weights (P bytes) and their gradients (P), a rank then holds 2 P / N in place of
2 P, and the sending costs one broadcast of P in every step. No bit of the result changes, because a weight moves by a
formula of itself, its gradient and its state.

Source: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models", section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import backend
from .backend import xp
from .changes import note_change
from .distributed import Ranks
from .engine import Tensor
from .optim import Optimizer


class Sharded:
    """An optimiser whose state is shared out: each parameter is moved by one rank, whole.

    make: a class of optimiser, such as Adam; options: its arguments, lr and so on. All ranks must call `step` and
    `state_dict` together. The latter gives, on every rank, the state of all parameters, on the host: it is the
    state_dict of that optimiser in a single process, so a run may go on with other ranks, or without them.
    Errors: ValueError for fewer parameters than ranks, and for one that is given twice; those of the optimiser.
    """

    def __init__(
        self, make: Callable[..., Optimizer], parameters: Iterable[Tensor], ranks: Ranks, lr: float, **options: Any
    ):
        self.parameters, self.ranks = list(parameters), ranks
        first: dict[int, int] = {}
        for i, p in enumerate(self.parameters):
            if first.setdefault(id(p), i) != i:
                raise ValueError(
                    f"Sharded: parameters {first[id(p)]} and {i} are the same Tensor of shape {p.shape}: give it once, "
                    "as model.parameters() does"
                )
        if len(self.parameters) < ranks.size:
            raise ValueError(f"Sharded: {len(self.parameters)} parameters are too few for {ranks.size} ranks")
        self.owner = owners([p.data.nbytes for p in self.parameters], ranks.size)
        self.mine = [i for i, owner in enumerate(self.owner) if owner == ranks.rank]
        self.own = make([self.parameters[i] for i in self.mine], lr=lr, **options)

    @property
    def lr(self) -> float:
        return self.own.lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self.own.lr = lr

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        self.own.step()
        moved = [p.grad is not None for p in self.parameters]
        for rank in range(self.ranks.size):
            theirs = [p.data for p, m, owner in zip(self.parameters, moved, self.owner) if m and owner == rank]
            self.ranks.broadcast(theirs, rank)
            if rank != self.ranks.rank:
                note_change(*theirs)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As Optimizer.state_dict, with the arrays on the host."""
        counts = dict(pair for pairs in self.ranks.gather(list(zip(self.mine, self.own.counts))) for pair in pairs)
        state = {}
        for i, p in enumerate(self.parameters if self.own.state_names else ()):
            owned = self.own.state[self.mine.index(i)] if self.owner[i] == self.ranks.rank else None
            arrays = {name: owned[name] if owned else xp.empty_like(p.data) for name in self.own.state_names}
            self.ranks.broadcast(list(arrays.values()), self.owner[i])
            state[str(i)] = {name: backend.to_host(a).copy() for name, a in arrays.items()}
        return {
            "optimizer": type(self.own).__name__,
            "lr": self.lr,
            "counts": [counts[i] for i in range(len(self.parameters))],
            "state": state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state_dict of a Sharded, or of the optimiser in a single process. Errors: ValueError if it
        does not fit; then nothing is changed."""
        try:
            counts, arrays = state["counts"], state["state"]
            if len(counts) != len(self.parameters):
                raise ValueError(f"it has {len(counts)} parameters, not {len(self.parameters)}")
            own = {str(k): arrays[str(i)] for k, i in enumerate(self.mine) if self.own.state_names}
            mine = {**state, "counts": [counts[i] for i in self.mine], "state": own}
        except (LookupError, TypeError) as error:
            raise ValueError(f"this is no state of an optimiser: {error!r}") from None
        self.own.load_state_dict(mine)


def owners(sizes: list[int], ranks: int) -> list[int]:
    """Which rank has each parameter: from the largest on, each goes to the rank that has least so far. So no rank has
    more than its N-th and the largest parameter."""
    owner, held = [0] * len(sizes), [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = min(range(ranks), key=lambda rank: held[rank])
        held[owner[i]] += sizes[i]
    return owner
