"""What the tests start on several ranks: a training of a small net on numbers that a seed gives.

mpiexec -n 4 python tests/scale/program.py OUT [options]; rank 0 writes OUT/weights.npz at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import numpy as np

from tinydiff import Rng, backend, distributed, nn, ops, optim, overlap
from tinydiff.diffusion import VESDE, sample
from tinydiff.distributed import connected
from tinydiff.sharded import Sharded
from tinydiff.training import train


class Net(nn.Module):
    """A convolution, a norm and two linear layers: 8x8 images of one channel to as many."""

    def __init__(self, rng):
        self.conv = nn.Conv2d(1, 8, 3, padding=1, rng=rng)
        self.norm = nn.GroupNorm(2, 8)
        self.a, self.b = nn.Linear(512, 64, rng=rng), nn.Linear(64, 64, rng=rng)

    def forward(self, x):
        h = ops.silu(self.norm(self.conv(x)))  # (N, 8, 8, 8)
        return self.b(ops.silu(self.a(h.reshape(len(h), 512))))  # (N, 64)


def host(a):
    return np.array(backend.to_host(a))


def stand_in():
    """In place of NCCL: what the communicator is asked to send goes through MPI. Device memory is that of the host
    under the emulator, which has one GPU, so all ranks take that."""
    import ctypes
    from types import SimpleNamespace

    from mpi4py import MPI

    kinds = {1: ctypes.c_uint8, 7: ctypes.c_float, 8: ctypes.c_double}  # nccl.h: ncclUint8, ncclFloat32, ncclFloat64

    class Communicator:
        def __init__(self, size, unique, rank):
            assert (size, rank, unique) == (MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD.Get_rank(), ("id", 0))

        def allReduce(self, sent, received, count, kind, op, stream):
            assert sent == received and op == 0
            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, self.memory(sent, count, kind))

        def bcast(self, where, count, kind, root, stream):
            MPI.COMM_WORLD.Bcast(self.memory(where, count, kind), root=root)

        def memory(self, where, count, kind):
            return np.ctypeslib.as_array((kinds[kind] * count).from_address(where))

    cuda = backend.xp.cuda
    several = {"getDeviceCount": MPI.COMM_WORLD.Get_size, "deviceGetPCIBusId": str}
    cuda.runtime = SimpleNamespace(**vars(cuda.runtime) | several)
    device = cuda.Device
    cuda.Device = lambda number=0: device(0)
    cuda.nccl = SimpleNamespace(
        NcclCommunicator=Communicator, get_unique_id=lambda: ("id", MPI.COMM_WORLD.Get_rank()),
        NCCL_UINT8=1, NCCL_FLOAT32=7, NCCL_FLOAT64=8, NCCL_SUM=0,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--parallel", default="mpi")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--bucket", type=int, default=distributed.BUCKET, metavar="BYTES")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stand-in", action="store_true", help="of NCCL, by MPI, on one emulated GPU")
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--microbatch", type=int, default=4)
    parser.add_argument("--die", type=int, nargs=2, metavar=("RANK", "STEP"), help="this rank kills itself")
    parser.add_argument("--fail", type=int, nargs=2, metavar=("RANK", "STEP"), help="this rank raises")
    parser.add_argument("--stop", type=int, nargs=2, metavar=("RANK", "STEP"), help="this rank gets SIGTERM")
    parser.add_argument(
        "--own",
        choices=["data", "batch", "folder", "log", "net", "optimizer", "threads"],
        help="rank 1 has another one",
    )
    args = parser.parse_args()
    if args.stand_in:
        stand_in()

    distributed.BUCKET = args.bucket
    if args.bucket < 2**20:
        overlap.MOST = 10**6
    early = 0  # buckets that were sent before the end of a backward pass

    def on_rule(self, *rest):
        nonlocal early
        before = len(self.sent)
        adjoints = overlapped(self, *rest)
        early += len(self.sent) - before
        return adjoints

    overlapped, overlap.Overlap.on_rule = overlap.Overlap.on_rule, on_rule
    with connected(args.parallel, exact=args.exact, overlap=args.overlap) as ranks:
        model = Net(Rng(0 if ranks.rank == 0 else 1))  # the weights of rank 0 count
        images = host(Rng(7).child("images").normal((64, 8, 8, 1)))
        held_out = host(Rng(7).child("held out").normal((21, 8, 8, 1)))  # no multiple of anything
        differs = args.own if ranks.rank == 1 else None
        if differs == "data":
            images[3, 2, 1, 0] += 1
        make, parameters = optim.Adam, model.parameters()
        if differs == "net":
            model.a, model.b = model.b, model.a  # as many numbers, in another order
        lr = 1e-2 if differs != "optimizer" else 2e-2
        optimizer = Sharded(make, parameters, ranks, lr=lr) if args.sharded else make(parameters, lr=lr)

        def loss(x, rng, sample_offset):
            noise = rng.child("noise").normal(x.shape, sample_offset=sample_offset)
            return ((model(x + noise) - noise.reshape(len(x), 64)) ** 2).mean()

        def at_step(step):
            for kind, given in (("die", args.die), ("fail", args.fail), ("stop", args.stop)):
                if given and [ranks.rank, step] == given:
                    if kind == "fail":
                        raise ArithmeticError("the cause")
                    os.kill(os.getpid(), signal.SIGKILL if kind == "die" else signal.SIGTERM)
            return 1.0

        state = train(
            model, loss, images, optimizer,
            epochs=-(-args.steps // 4), batch_size=args.batch_size + (differs == "batch"),
            microbatch=args.microbatch or None, ema=optim.EMA(model), validation=held_out,
            schedule=at_step, schedule_by="step", save_every=5,
            log_every=3 if differs == "log" else None, resume=args.resume, ranks=ranks,
            threads=1 + (differs == "threads"),
            out=args.out / "apart" if differs == "folder" else args.out / "run",
        )  # fmt: skip
        weights = {name: host(a) for name, a in model.state_dict().items()}
        source = Rng(3)
        samples = sample(lambda x, t: -x, (10, 2), VESDE(2.0), source, steps=3, microbatch=3, ranks=ranks)
        np.savez(
            args.out / f"weights{ranks.rank}.npz", **weights, samples=host(samples), drawn=source.step,
            validation=state.records[-1]["validation"],
        )  # fmt: skip
        (args.out / f"early{ranks.rank}").write_text(str(early))
        return state.exit_code


if __name__ == "__main__":
    sys.exit(main())
