"""Several processes, called ranks, that train one model: on a cluster of CPUs by MPI, on GPUs by NCCL.

    with connected("mpi") as ranks:                       # mpiexec -n 4 python program.py
        train(model, loss, data, optimizer, ..., ranks=ranks)

Every rank has the whole model and works on its share of the microbatches of every batch; the gradients are summed, and
every rank makes the same update. No network code is here: mpi4py and CuPy's NCCL do the sending, and `mpiexec` or
Slurm's `srun` starts the processes and ends all of them if one dies. An implementation is a class with the six members
of `Ranks`: rank, size, sum, start_sum, with which overlap.py sends gradients while the backward pass still runs,
broadcast, and gather, which is also a barrier.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import backend
from .backend import Array, xp

KINDS = ("alone", "mpi", "nccl")
BUCKET = 2**25  # bytes that are sent at a time: enough for the full speed of a network, little beside a large model
PATIENCE = 1.0  # seconds that a rank with an error waits for the others to have one too


class Ranks:
    """One process alone; the interface of all kinds. exact: sum the microbatches one by one in their order, as a single
    process does, so that the number of ranks changes no bit of a training. That sends every microbatch's gradient.
    overlap: send gradients while the backward pass still runs (overlap.py). Errors: ValueError for both."""

    rank, size = 0, 1
    threads: int | None = None  # that each of the ranks on a machine should use; None: all cores

    def __init__(self, exact: bool = False, overlap: bool = False):
        if exact and overlap:
            raise ValueError("exact sums go in the order of the microbatches, so they cannot overlap the backward pass")
        self.exact, self.overlap = exact, overlap

    def sum(self, arrays: Sequence[Array]) -> None:
        """Replace each array, float32 or float64, by its sum over all ranks, in place."""

    def start_sum(self, arrays: Sequence[Array]) -> Callable[[], list[Array]]:
        """Begin to sum over all ranks, arrays of one dtype. What is returned waits for it, and gives new arrays."""
        return lambda: list(arrays)

    def progress(self) -> None:
        """Let sums that have begun go on: MPI works on them while it is called."""

    def broadcast(self, arrays: Sequence[Array], root: int = 0) -> None:
        """Replace each array by that of rank `root`, in place. On all ranks shapes and dtypes must be the same."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, small Python objects, in the order of the ranks. No rank goes on before all came."""
        return [value]

    def require_same(self, **found: Any) -> None:
        """Errors: CannotShare, on every rank, unless all ranks found the same. Each name says what was compared."""
        everyone = self.gather(found)
        for name, mine in everyone[0].items():
            if others := [r for r, theirs in enumerate(everyone) if theirs.get(name) != mine]:
                theirs = everyone[others[0]].get(name)
                said = "" if isinstance(mine, Digest) else f": {theirs!r} instead of {mine!r}"
                which = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(map(str, others))} have"
                raise CannotShare(f"{which} not the same {name.replace('_', ' ').strip()} as rank 0{said}")

    def abort(self, code: int) -> None:
        """End this process, and with it all ranks, now."""

    def all_ended(self, seconds: float) -> bool:
        """Has every rank come here within so many seconds?"""
        return True


ALONE = Ranks()


class CannotShare(ValueError):
    """The ranks do not belong together, or cannot share this work."""


class Digest(int):
    """A number that stands for something long, which a message should not quote."""


def digest(*arrays: Any) -> Digest:
    """A number that changes with any byte of the arrays."""
    value = 0
    for a in arrays:
        for start in range(0, len(a), max(1, len(a) // 64)):  # in pieces, so that a mapped file is not read at once
            rows = backend.to_host(a[start : start + max(1, len(a) // 64)])
            value = zlib.crc32(rows.tobytes(), zlib.crc32(f"{rows.shape} {rows.dtype}".encode(), value))
    return Digest(value)


def code() -> Digest:
    """A number that changes with the source of tinydiff."""
    home = Path(__file__).parent
    files = sorted(p for p in home.rglob("*") if p.suffix in (".py", ".c", ".h", ".cu", ".cuh"))
    value = 0
    for path in files:
        value = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(home)).encode(), value))
    return Digest(value)


def program() -> Digest:
    """A number that changes with the file of the program, where the net and the loss may be; 0 without one."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    return Digest(zlib.crc32(Path(path).read_bytes()) if path and Path(path).is_file() else 0)


def summary_of(model: Any) -> Digest:
    """A number that changes with the order, names, shapes and dtypes of its Tensors, and which of them learn."""
    found = [(name, t.shape, str(t.dtype), t.requires_grad) for name, t in model.named_tensors()]
    return Digest(zlib.crc32(repr(found).encode()))


# ---------------------------------------------------------------- MPI


class MPIRanks(Ranks):
    """The processes that mpiexec or srun has started. Arrays on a GPU go through the memory of the host."""

    def __init__(self, MPI: Any, exact: bool = False, overlap: bool = False):
        super().__init__(exact, overlap)
        self.mpi, self.comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        self.ends = self.comm.Dup()  # apart from the rest: a rank with an error may come while others sum
        local = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.first = local.bcast(self.rank)  # of the ranks on this machine
        self.local_rank, self.local_size = local.Get_rank(), local.Get_size()
        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        cores = set().union(*local.allgather(mine))  # the launcher may have bound each rank to some of them
        threads = min(self.gather(max(1, len(cores) // self.local_size)))  # the same on every machine
        self.threads = threads if self.size > 1 else None
        self.under_way: list[tuple[Any, Any]] = []  # requests, and the memory that they read and write
        local.Free()

    def sum(self, arrays: Sequence[Array]) -> None:
        for bucket in in_buckets(arrays):
            host = _packed(bucket)
            self.comm.Allreduce(self.mpi.IN_PLACE, host, op=self.mpi.SUM)
            _unpack(host, bucket)
            del host  # or it would be in memory beside the next

    def start_sum(self, arrays: Sequence[Array]) -> Callable[[], list[Array]]:
        host = _packed(list(arrays))
        request = self.comm.Iallreduce(self.mpi.IN_PLACE, host, op=self.mpi.SUM)
        self.under_way.append((request, host))

        def wait() -> list[Array]:
            request.Wait()
            self.progress()
            return _parts(backend.to_device(host), arrays)

        return wait

    def progress(self) -> None:
        self.under_way = [(request, host) for request, host in self.under_way if not request.Test()]

    def broadcast(self, arrays: Sequence[Array], root: int = 0) -> None:
        for bucket in in_buckets(arrays):
            host = _packed(bucket)
            self.comm.Bcast(host, root=root)
            if self.rank != root:
                _unpack(host, bucket)
            del host

    def gather(self, value: Any) -> list[Any]:
        return self.comm.allgather(value)

    def abort(self, code: int) -> None:
        self.comm.Abort(code)

    def all_ended(self, seconds: float) -> bool:
        request, until = self.ends.Ibarrier(), time.monotonic() + seconds
        while not (done := request.Test()) and time.monotonic() < until:
            time.sleep(0.01)
        return done


def buckets(arrays: Sequence[Array], size: int | None = None) -> Iterator[list[int]]:
    """The places of the arrays in lists of one dtype and of about `size` bytes (BUCKET), in the same order on every
    rank."""
    size = BUCKET if size is None else size
    for dtype in dict.fromkeys(a.dtype for a in arrays):
        bucket: list[int] = []
        filled = 0
        for i, a in enumerate(arrays):
            if a.dtype != dtype:
                continue
            if bucket and filled + a.nbytes > size:
                yield bucket
                bucket, filled = [], 0
            bucket.append(i)
            filled += a.nbytes
        if bucket:
            yield bucket


def in_buckets(arrays: Sequence[Array]) -> Iterator[list[Array]]:
    return ([arrays[i] for i in bucket] for bucket in buckets(arrays))


def _flat(bucket: list[Array]) -> Array:
    return xp.concatenate([a.reshape(-1) for a in bucket])  # (sum of sizes,)


def _packed(bucket: list[Array]) -> Any:
    return backend.to_host(_flat(bucket))


def _unpack(flat: Any, bucket: list[Array]) -> None:
    for a, part in zip(bucket, _parts(backend.to_device(flat), bucket)):
        a[...] = part


def _parts(flat: Array, bucket: Sequence[Array]) -> list[Array]:
    """Views of it, with the shapes of the arrays of a bucket."""
    parts, start = [], 0
    for a in bucket:
        parts.append(flat[start : start + a.size].reshape(a.shape))
        start += a.size
    return parts


# ---------------------------------------------------------------- NCCL


class NCCLRanks(MPIRanks):
    """One GPU for each rank. Arrays go from GPU to GPU by NCCL; the processes are started, and everything else is
    agreed on, by MPI."""

    def __init__(self, MPI: Any, exact: bool = False, overlap: bool = False):
        super().__init__(MPI, exact, overlap)
        try:
            self._join()
        except Exception as error:
            if not self.all_ended(PATIENCE):  # the others wait for this one
                print(f"rank {self.rank} of {self.size} cannot begin: {error}", file=sys.__stderr__, flush=True)
                self.abort(1)
            raise

    def _join(self) -> None:
        cuda = xp.cuda
        # Slurm may show each rank one GPU of its own, as device 0.
        device = self.local_rank % cuda.runtime.getDeviceCount()
        everywhere = self.gather((self.first, cuda.runtime.deviceGetPCIBusId(device)))
        first, gpu = where = max(everywhere, key=everywhere.count)
        if everywhere.count(where) > 1:
            raise RuntimeError(
                f"NCCL needs a GPU for each rank, but {everywhere.count(where)} ranks on the machine of rank {first} "
                f"have the one at {gpu}: start fewer there, or use 'mpi'"
            )
        cuda.Device(device).use()
        if not hasattr(cuda, "nccl") or not getattr(cuda.nccl, "available", True):
            raise RuntimeError("this CuPy has no NCCL: install NVIDIA's package nvidia-nccl, or use 'mpi'")
        self.nccl = cuda.nccl
        unique = self.comm.bcast(self.nccl.get_unique_id() if self.rank == 0 else None)
        self.channel = self.nccl.NcclCommunicator(self.size, unique, self.rank)
        self.beside = cuda.Stream(non_blocking=True)  # where sums are while the stream of the ops goes on

    def sum(self, arrays: Sequence[Array]) -> None:
        for bucket in in_buckets(arrays):
            flat = _flat(bucket)
            self._all_reduce(flat, self._stream())
            _unpack(flat, bucket)

    def _all_reduce(self, flat: Array, stream: int) -> None:
        where = flat.data.ptr
        kind = self.nccl.NCCL_FLOAT64 if flat.dtype == "float64" else self.nccl.NCCL_FLOAT32
        self.channel.allReduce(where, where, flat.size, kind, self.nccl.NCCL_SUM, stream)

    def start_sum(self, arrays: Sequence[Array]) -> Callable[[], list[Array]]:
        flat = _flat(list(arrays))
        self.beside.wait_event(xp.cuda.get_current_stream().record())  # until the gradients are there
        self._all_reduce(flat, self.beside.ptr)
        done = self.beside.record()

        def wait() -> list[Array]:
            xp.cuda.get_current_stream().wait_event(done)
            return _parts(flat, arrays)

        return wait

    def broadcast(self, arrays: Sequence[Array], root: int = 0) -> None:
        for bucket in in_buckets(arrays):
            flat = _flat(bucket)
            self.channel.bcast(flat.data.ptr, flat.nbytes, self.nccl.NCCL_UINT8, root, self._stream())
            if self.rank != root:
                _unpack(flat, bucket)

    def _stream(self) -> int:
        return xp.cuda.get_current_stream().ptr


# ---------------------------------------------------------------- beginning and end

# Where launchers write how many processes they have started, and which of them this is: MPICH, Open MPI, Slurm.
LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
# And which of those on this machine. Slurm sets PMI_RANK for MPICH, but none of MPICH's names for this.
LOCAL = ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


def launched() -> tuple[int, int]:
    """How many processes a launcher says that it has started, and which of them this is; (1, 0) without one."""
    for size, rank in LAUNCHERS:
        if size in os.environ and rank in os.environ:
            return int(os.environ[size]), int(os.environ[rank])
    return 1, 0


def first_here() -> bool:
    """Is this the first process on its machine, as far as its launcher says?"""
    return next((os.environ[name] for name in LOCAL if name in os.environ), str(launched()[1])) == "0"


def connect(kind: str, exact: bool = False, overlap: bool = False) -> Ranks:
    """The ranks of this job: "alone", "mpi" or "nccl". For a whole program, see `connected`.
    Errors: ValueError for another kind, and those of Ranks; RuntimeError if the kind cannot be used here."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of ranks {kind!r}: choose one of {', '.join(KINDS)}")
    if kind == "alone":
        return Ranks(exact, overlap)
    if kind == "nccl" and backend.active().name != "cupy":
        raise RuntimeError(f"'nccl' joins GPUs, but the backend is {backend.active().name!r}: TINYDIFF_BACKEND=cupy")
    try:
        MPI = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        raise RuntimeError(f"{kind!r} needs mpi4py and an MPI ({error}): pip install 'tinydiff[mpi]'") from error
    started, size = launched()[0], MPI.COMM_WORLD.Get_size()
    if started > 1 and size == 1:
        raise RuntimeError(
            f"the launcher has started {started} processes, but mpi4py finds one alone: they belong to different "
            "kinds of MPI. Use the mpiexec beside this Python, or with Slurm srun --mpi=pmi2"
        )
    return (MPIRanks if kind == "mpi" else NCCLRanks)(MPI, exact, overlap)


@contextlib.contextmanager
def connected(kind: str, *, exact: bool = False, overlap: bool = False) -> Iterator[Ranks]:
    """Inside, the ranks of this job. An error of one of them ends all, within seconds, with its cause; one that all
    have is printed by rank 0 alone. Errors: as connect, on rank 0; the other ranks only end. Without an MPI the first
    process of each machine says why, and is killed, which ends the job: the others may wait for it."""
    try:
        ranks = connect(kind, exact, overlap)
    except (ValueError, RuntimeError) as error:
        started, rank = launched()
        if started > 1 and first_here() and kind in KINDS and not sys.modules.get("mpi4py.MPI"):
            time.sleep(PATIENCE if rank else 0)  # if all have this error, rank 0 has ended the job by then
            print(f"rank {rank} on {platform.node()}: {error}", file=sys.__stderr__, flush=True)
            os.kill(os.getpid(), signal.SIGABRT)  # any other end a launcher takes for that of this process alone
        if rank:
            raise SystemExit(1) from None
        raise
    try:
        yield ranks
    except BaseException as error:
        if ranks.size == 1 or isinstance(error, SystemExit) and not error.code:
            raise
        _end(ranks, error)


def _end(ranks: Ranks, error: BaseException) -> None:
    """Print the error once, and end this process, or all if this is the only one with an error."""
    number = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    number = 130 if isinstance(error, KeyboardInterrupt) else number
    together = ranks.all_ended(PATIENCE + min(0.2 * ranks.rank, 3))  # one rank after the other, so that one speaks
    if not (together and ranks.rank):
        if isinstance(error, SystemExit):
            text = error.code if isinstance(error.code, str) else ""
        else:
            text = "".join(traceback.format_exception(error)).rstrip()
        if not together:
            text = f"rank {ranks.rank} of {ranks.size} ended: {text or f'exit code {number}'}"
        if text:
            print(text, file=sys.__stderr__, flush=True)
    if not together:
        ranks.abort(number)
    raise SystemExit(number)
