"""Several processes train one model: the same bits as one process, and one end for all when one of them dies.

Every test starts real processes with mpiexec (tests/scale/program.py), more of them than there are cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, backend, ops, optim, saving
from tinydiff.__main__ import main
from tinydiff.backend import to_host
from tinydiff.data.batches import Batches
from tinydiff.distributed import ALONE, CannotShare, Digest, Ranks, buckets, code, connect, connected, digest
from tinydiff.engine import Tensor
from tinydiff.microbatch import gradients
from tinydiff.observers import Observer, observing
from tinydiff.sharded import Sharded, owners

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the mpich wheel has no mpiexec for Windows")
PROGRAM = Path(__file__).with_name("program.py")
PATH = os.pathsep.join([str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH", "")])
EMULATED = os.environ.get("TINYDIFF_BACKEND") == "cupy"
host_only = pytest.mark.skipif(EMULATED, reason="the same on every backend, and slow on an emulated one")
STEPS = "12" if EMULATED else "52"  # a multiple of 4


def started(n: int, program: Path | str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program on n ranks; n = 0: in a single process without mpiexec."""
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = [str(beside) if beside.exists() else "mpiexec", "-n", str(n)] if n else []
    return subprocess.run(
        [*mpiexec, sys.executable, str(program), *options],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": PATH, **environment},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def start(n: int, out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The small training of program.py."""
    out.mkdir(exist_ok=True)
    return started(n, PROGRAM, str(out), *options, *([] if n else ["--parallel", "alone"]), **environment)


def trained(n: int, out: Path, *options: str, **environment: str) -> list[dict[str, np.ndarray]]:
    """The weights of each rank after training."""
    done = start(n, out, "--steps", STEPS, *options, **environment)
    assert done.returncode == 0, done.stderr
    return [dict(np.load(out / f"weights{rank}.npz")) for rank in range(max(n, 1))]


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What one process without MPI learns."""
    return trained(0, tmp_path_factory.mktemp("one") / "run")[0]


@pytest.mark.parametrize("n, options", [(2, ["--exact"]), (4, ["--exact", "--sharded"])])
def test_in_the_exact_mode_no_bit_depends_on_the_number_of_ranks(
    n: int, options: list[str], one: dict[str, np.ndarray], tmp_path: Path
) -> None:
    for weights in trained(n, tmp_path / "run", *options):
        assert equal(weights, one)


@host_only
def test_nor_without_the_c_loops(tmp_path: Path) -> None:
    (alone,) = trained(0, tmp_path / "one", "--steps", "12", TINYDIFF_CC="0")
    for weights in trained(4, tmp_path / "four", "--exact", "--steps", "12", TINYDIFF_CC="0"):
        assert equal(weights, alone)


@host_only
def test_otherwise_they_differ_by_rounding_and_the_ranks_agree(one: dict[str, np.ndarray], tmp_path: Path) -> None:
    ranks = trained(4, tmp_path / "run")
    assert all(equal(weights, ranks[0]) for weights in ranks)
    for name, values in one.items():
        np.testing.assert_allclose(ranks[0][name], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mpi"] if not EMULATED else ["mpi", "nccl"])
@pytest.mark.parametrize("batch", ["16", "60"])
def test_sums_that_overlap_the_backward_pass_are_the_same(kind: str, batch: str, tmp_path: Path) -> None:
    """Buckets of one or two parameters; of two ranks, a sum has the same bits in any order. With batches of 60 of the
    64 images, rank 1 has no microbatch of the last one, and sends nothing early."""
    options = ["--parallel", kind, *(["--stand-in"] if kind == "nccl" else []), "--batch-size", batch]
    whole = trained(2, tmp_path / "whole", *options)[0]
    for weights in trained(2, tmp_path / "overlap", *options, "--overlap", "--bucket", "4000"):
        assert equal(weights, whole)
    assert all(int((tmp_path / "overlap" / f"early{rank}").read_text()) > 0 for rank in range(2))


@host_only
def test_sums_that_overlap_on_three_ranks_with_a_sharded_optimiser(one: dict[str, np.ndarray], tmp_path: Path) -> None:
    for weights in trained(3, tmp_path / "run", "--overlap", "--sharded", "--bucket", "4000"):
        for name, values in one.items():
            np.testing.assert_allclose(weights[name], values, rtol=0, atol=1e-6)
    assert all(int((tmp_path / "run" / f"early{rank}").read_text()) > 0 for rank in range(3))


def test_a_rank_that_is_killed_ends_all_and_the_job_goes_on_with_fewer(
    one: dict[str, np.ndarray], tmp_path: Path
) -> None:
    done = start(4, tmp_path, "--exact", "--die", "2", "9")
    assert done.returncode != 0
    assert saving.load(tmp_path / "run" / "checkpoint.npz")["run"]["step"] == 5
    for weights in trained(2, tmp_path, "--exact", "--resume"):
        assert equal(weights, one)


@host_only
def test_the_cause_of_an_end_is_said_once(tmp_path: Path) -> None:
    done = start(4, tmp_path, "--fail", "3", "9")
    assert done.returncode == 1
    assert done.stderr.count("ArithmeticError: the cause") == 1 and "rank 3 of 4 ended" in done.stderr


@host_only
def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(tmp_path: Path) -> None:
    done = start(3, tmp_path, "--stop", "1", "6")
    assert done.returncode == 143
    assert "interrupted after step 7" in done.stderr  # the step in which it came is finished
    assert saving.load(tmp_path / "run" / "checkpoint.npz")["run"]["step"] == 7


@host_only
@pytest.mark.parametrize(
    "options, message",
    [
        (["--own", "data"], "rank 1 has not the same data as rank 0"),
        (["--own", "batch"], "rank 1 has not the same batch size as rank 0: 17 instead of 16"),
        (["--own", "log"], "rank 1 has not the same log every as rank 0: 3 instead of None"),
        (["--own", "net"], "rank 1 has not the same model as rank 0"),
        (["--own", "optimizer"], "rank 1 has not the same lr as rank 0: 0.02 instead of 0.01"),
        (["--own", "optimizer", "--sharded"], "rank 1 has not the same lr as rank 0: 0.02 instead of 0.01"),
        (["--own", "threads"], "rank 1 has not the same threads as rank 0: 2 instead of 1"),
        (["--own", "folder"], "must be a folder that all ranks see"),
        (["--batch-size", "1"], "a batch of 1 is too small for 2 ranks"),
        (["--batch-size", "8", "--microbatch", "8"], "too few for 2 ranks: choose microbatch=4 or less"),
        (["--resume"], "Error: nothing to resume"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, list) else "",
)
def test_what_cannot_work_is_said_once_before_the_first_step(options: list[str], message: str, tmp_path: Path) -> None:
    done = start(2, tmp_path, *options)
    assert done.returncode == 1 and done.stderr.count(message) == 1, done.stderr
    assert "loss" not in done.stderr.splitlines()[-1] and "step 4" not in done.stderr


# ---------------------------------------------------------------- NCCL


@pytest.mark.skipif(not EMULATED, reason="NCCL joins GPUs; here its code runs on an emulated one")
def test_nccl_with_a_stand_in_of_its_communicator(one: dict[str, np.ndarray], tmp_path: Path) -> None:
    for weights in trained(2, tmp_path, "--parallel", "nccl", "--stand-in", "--exact"):
        assert equal(weights, one)
    for weights in trained(2, tmp_path, "--parallel", "nccl", "--stand-in", "--sharded"):
        for name, values in one.items():
            np.testing.assert_allclose(weights[name], values, rtol=0, atol=1e-6)


@pytest.mark.skipif(not EMULATED, reason="needs a GPU, or an emulated one")
def test_nccl_wants_a_gpu_for_each_rank(tmp_path: Path) -> None:
    done = start(2, tmp_path, "--parallel", "nccl")
    assert done.returncode == 1
    assert done.stderr.count("NCCL needs a GPU for each rank, but 2 ranks on") == 1


# ---------------------------------------------------------------- without other processes


def test_kinds_that_cannot_be_used_here(numpy_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown kind of ranks 'gloo': choose one of alone, mpi, nccl"):
        connect("gloo")
    with pytest.raises(RuntimeError, match="the backend is 'numpy': TINYDIFF_BACKEND=cupy"):
        connect("nccl")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    with pytest.raises(RuntimeError, match=r"pip install 'tinydiff\[mpi\]'"):
        connect("mpi")
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "3")
    with pytest.raises(SystemExit) as end, connected("mpi"):  # rank 0 says it
        pass
    assert end.value.code == 1


class Pretended(Ranks):
    """Rank 0 of several: what the others have is what rank 0 has, but for the differences that are given."""

    def __init__(self, *differences: dict[str, Any]):
        super().__init__()
        self.size, self.differences = 1 + len(differences), differences

    def gather(self, value: Any) -> list[Any]:
        return [value, *(value | other for other in self.differences)]


def test_ranks_with_other_code_or_settings_are_named() -> None:
    with pytest.raises(CannotShare, match="^ranks 1, 3 have not the same tinydiff as rank 0$"):
        Pretended({"tinydiff": Digest(7)}, {}, {"tinydiff": Digest(7)}).require_same(tinydiff=code(), seed=0)
    with pytest.raises(CannotShare, match="^rank 1 has not the same batch size as rank 0: 9 instead of 8$"):
        Pretended({"batch_size": 9}).require_same(tinydiff=code(), batch_size=8)
    Pretended({}, {}).require_same(tinydiff=code(), batch_size=8)


def test_a_digest_sees_every_number_and_the_order() -> None:
    a = np.arange(1000.0).reshape(100, 10)
    b = a.copy()
    b[57, 3] += 1e-9
    assert len({digest(a), digest(b), digest(a[::-1]), digest(a, a), digest(a.astype("float32"))}) == 5
    assert digest(a) == digest(a.copy())


def test_a_program_of_its_own_is_found(tmp_path: Path) -> None:
    """As where the loss is another one on rank 1."""
    for name, sign in (("one", ""), ("other", "-")):
        (tmp_path / f"{name}.py").write_text(
            "from tinydiff import nn, optim\nfrom tinydiff.distributed import connected\n"
            "from tinydiff.training import train\nimport numpy as np\n"
            "net = nn.Linear(2, 1, rng=0)\n"
            "with connected('mpi') as ranks:\n"
            f"    train(net, lambda x, rng, sample_offset: {sign}(net(x) ** 2).mean(), np.ones((8, 2), 'float32'),\n"
            "          optim.SGD(net.parameters(), lr=0.1), epochs=1, batch_size=8, microbatch=2, ranks=ranks)\n"
        )
    done = started(1, str(tmp_path / "one.py"), ":", "-n", "1", sys.executable, str(tmp_path / "other.py"))
    assert done.returncode == 1 and done.stderr.count("rank 1 has not the same program as rank 0") == 1, done.stderr
    assert started(2, str(tmp_path / "one.py")).returncode == 0


@pytest.mark.parametrize("where, local", [("0", "MPI_LOCALRANKID"), ("1", "MPI_LOCALRANKID"), ("1", "SLURM_LOCALID")])
def test_a_machine_without_mpi_says_so_and_the_others_do_not_wait(where: str, local: str, tmp_path: Path) -> None:
    """Its first rank, as its launcher names it, ends the job. Slurm does not set MPICH's variable."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nif os.environ['PMI_RANK'] == '{where}':\n    sys.modules['mpi4py'] = None\n"
        f"    del os.environ['MPI_LOCALRANKID']\n    os.environ['{local}'] = '0'\n"
        "from tinydiff.distributed import connected\nwith connected('mpi') as ranks:\n    ranks.gather(0)\n"
    )
    done = started(2, program)
    assert done.returncode != 0 and done.stderr.count(f"rank {where} on ") == 1 and "needs mpi4py" in done.stderr


def test_no_machine_has_mpi(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nsys.modules['mpi4py'] = None\n"
        "from tinydiff.distributed import connected\nwith connected('mpi') as ranks:\n    ranks.gather(0)\n"
    )
    done = started(3, program)
    assert done.returncode != 0 and done.stderr.count("needs mpi4py") == 1 and "rank 0 on " in done.stderr


def test_a_launcher_of_another_mpi(tmp_path: Path) -> None:
    """Four processes that know nothing of each other would each train alone, and write over each other."""
    program = "from tinydiff.distributed import connect; connect('mpi')"
    env = {
        **os.environ,
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "0",
        "PYTHONPATH": PATH,
    }
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "started 4 processes, but mpi4py finds one alone" in done.stderr


def test_buckets_hold_every_array_once(each_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinydiff.distributed.BUCKET", 40)
    xp = backend.xp
    arrays = [xp.zeros(n, dtype) for n, dtype in ((4, "float32"), (6, "float32"), (1, "float64"), (20, "float32"))]
    assert list(buckets(arrays)) == [[0, 1], [3], [2]]
    assert list(buckets(arrays, 200)) == [[0, 1, 3], [2]]


class Doubling(Ranks):
    """Two ranks with the same gradients. It notes how far the backward pass was when a bucket was sent."""

    size = 2

    def __init__(self, count: Counter[str]):
        super().__init__(overlap=True)
        self.count, self.sent = count, []

    def sum(self, arrays: Any) -> None:
        self.sent.append((self.count["rules"], [a.shape for a in arrays]))
        for a in arrays:
            a += a

    def start_sum(self, arrays: Any) -> Any:
        self.sent.append((self.count["rules"], [a.shape for a in arrays]))
        summed = [2 * a for a in arrays]
        return lambda: summed


class Rules(Observer):
    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def on_rule(self, run: Any, node: Any, g: Any, wanted: Any, create_graph: bool) -> Any:
        self.count["rules"] += 1
        return run(node, g, wanted, create_graph)


def test_a_bucket_is_sent_when_its_gradients_are_final_and_not_later(
    each_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is used twice, one with a hook, one inside a checkpoint, and one that the loss does not depend on."""
    monkeypatch.setattr("tinydiff.overlap.MOST", 10**6)
    monkeypatch.setattr("tinydiff.distributed.BUCKET", 1)  # a bucket for each parameter
    sizes = {"unused": 2, "hooked": 3, "twice": 4, "kept": 5, "last": 6}
    weights = {name: Tensor(Rng(n).normal((n, n)), requires_grad=True) for name, n in sizes.items()}
    weights["hooked"].register_hook(lambda g: 3 * g)
    x = {name: Rng(n).normal((8, n)) for name, n in sizes.items()}

    def loss(rows: Any, rng: Any, sample_offset: int) -> Any:
        def of(name: str) -> Any:
            return ops.silu(Tensor(x[name][sample_offset : sample_offset + len(rows)]) @ weights[name]).mean()

        used = of("hooked") + of("twice") * of("twice")
        kept = tinydiff.checkpoint(lambda: of("kept") * of("kept"))
        return used + kept + of("last")

    batch, parameters = backend.xp.zeros((8, 1), "float32"), list(weights.values())
    gradients(loss, parameters, batch, Rng(0), size=2)
    plain = [to_host(p.grad.data) for p in parameters]
    with observing(Rules()) as rules:
        ranks = Doubling(rules.count)
        gradients(loss, parameters, batch, Rng(0), size=2, threads=1, ranks=ranks)
    # Of this rank are the first and the third of four microbatches.
    own = [slice(0, 2), slice(4, 6)]
    found = [to_host(p.grad.data) for p in parameters]
    total = [0.0] * len(parameters)
    for rows in own:
        value = loss(batch[rows], Rng(0), rows.start) * 0.25
        total = [t + to_host(g.data) for t, g in zip(total, tinydiff.grad(value, parameters))]
    for name, g, expected in zip(weights, found, total):
        np.testing.assert_allclose(g, 2 * expected, rtol=1e-5, atol=1e-7, err_msg=name)
    assert not np.allclose(plain[1], found[1])  # the halves of the batch differ
    assert ranks.sent.pop()[1] == [()], "the loss, after all gradients"
    when = {shapes[0][0]: rule for rule, shapes in ranks.sent}
    end = rules.count["rules"]
    assert list(when) == [6, 5, 4, 3, 2]  # the parameters in reverse
    assert when[6] < when[5] < when[4] < end and when[3] == when[2] == end


def test_a_rank_without_a_microbatch_sends_the_same_buckets(
    numpy_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinydiff.overlap.MOST", 10**6)
    monkeypatch.setattr("tinydiff.distributed.BUCKET", 1)
    weights = [Tensor(np.ones((n, n), "float32"), requires_grad=True) for n in (2, 3)]
    ranks = Doubling(Counter())
    ranks.rank = 1
    gradients(lambda rows, rng, sample_offset: (weights[0] * weights[0]).sum(), weights, np.ones((1, 1)), Rng(0),
              threads=1, ranks=ranks)  # fmt: skip
    assert [shapes for _, shapes in ranks.sent] == [[(3, 3)], [(2, 2)], [()]], "those of a rank that has one"
    assert all((to_host(w.grad.data) == 0).all() for w in weights)


def test_parameters_that_share_an_array_are_both_summed(numpy_backend: str) -> None:
    array = np.ones((2, 2), "float32")
    weights = [Tensor(array, requires_grad=True) for _ in range(2)]
    gradients(lambda rows, rng, sample_offset: (weights[0] * 3 + weights[1]).sum(), weights, np.ones((2, 1)), Rng(0),
              size=1, threads=1, ranks=Doubling(Counter()))  # fmt: skip
    assert [to_host(w.grad.data)[0, 0] for w in weights] == [3, 1]


def test_one_microbatch_overlaps_whatever_the_threads(numpy_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several of them, in several threads, everything is sent at the end."""
    monkeypatch.setattr("tinydiff.overlap.MOST", 10**6)
    monkeypatch.setattr("tinydiff.distributed.BUCKET", 1)
    weights = [Tensor(np.ones((n, n), "float32"), requires_grad=True) for n in (2, 3)]

    def loss(rows: Any, rng: Any, sample_offset: int) -> Any:
        return ops.silu(ops.silu(weights[0].sum() * rows.sum()) * weights[1]).sum()

    early = {}
    for size in (4, 2):
        with observing(Rules()) as rules:
            ranks = Doubling(rules.count)
            gradients(loss, weights, np.ones((8, 1), "float32"), Rng(0), size=size, threads=2, ranks=ranks)
        early[size] = sum(rule < rules.count["rules"] for rule, _ in ranks.sent)
    assert early[4] > 0 and early[2] == 0


def test_exact_sums_do_not_overlap() -> None:
    with pytest.raises(ValueError, match="they cannot overlap the backward pass"):
        connect("alone", exact=True, overlap=True)


def test_options_of_several_processes_are_errors_for_one(
    numpy_backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "glyphs", "--exact"]) == 2
    assert "--exact and --overlap are about the sums of several processes" in capsys.readouterr().err


def test_rows_of_a_batch_are_read_when_they_are_asked_for() -> None:
    array, order = np.arange(20).reshape(10, 2), Batches(10, 4)
    rows = order.rows(array, 1)
    assert (len(rows), rows.shape, rows.nbytes) == (4, (4, 2), 8 * array.itemsize)
    np.testing.assert_array_equal(rows[1:3], array[order.indices(1)[1:3]])


def test_no_owner_has_more_than_its_share_and_the_largest_parameter() -> None:
    sizes = [9, 3, 3, 5, 1, 7, 2, 2]
    owner = owners(sizes, 3)
    held = [sum(size for size, o in zip(sizes, owner) if o == rank) for rank in range(3)]
    assert sum(held) == sum(sizes) and max(held) <= sum(sizes) / 3 + max(sizes)
    assert owners(sizes, 1) == [0] * 8


def test_a_sharded_optimiser_of_one_rank_is_the_optimiser(each_backend: str) -> None:
    def moved(make: Any) -> tuple[list[float], dict[str, Any]]:
        weights = [Tensor(backend.xp.ones(n, "float32"), requires_grad=True) for n in (2, 3)]
        optimizer = make(weights)
        for w in weights:
            w.grad = Tensor(backend.xp.ones(w.shape, "float32"))
        optimizer.step()
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        return [backend.scalar(w.data.sum()) for w in weights], state

    plain, state = moved(lambda weights: optim.Adam(weights, lr=0.1))
    sharded, its_state = moved(lambda weights: Sharded(optim.Adam, weights, ALONE, lr=0.1))
    assert plain == sharded
    assert state["counts"] == its_state["counts"] and state["optimizer"] == its_state["optimizer"]


def test_sharded_refuses_a_parameter_that_is_given_twice(numpy_backend: str) -> None:
    weights = [Tensor(backend.xp.ones(n, "float32"), requires_grad=True) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"Sharded: parameters 0 and 2 are the same Tensor of shape \(2,\)"):
        Sharded(optim.Adam, [*weights, weights[0]], ALONE, lr=0.1)


def test_sharded_refuses_more_ranks_than_parameters_and_the_state_of_others(numpy_backend: str) -> None:
    class Three(Ranks):
        size = 3

    weights = [Tensor(backend.xp.ones(2, "float32"), requires_grad=True)]
    with pytest.raises(ValueError, match="1 parameters are too few for 3 ranks"):
        Sharded(optim.Adam, weights, Three(), lr=0.1)
    optimizer = Sharded(optim.SGD, weights, ALONE, lr=0.1)
    with pytest.raises(ValueError, match="it has 2 parameters, not 1"):
        optimizer.load_state_dict({"optimizer": "SGD", "lr": 0.1, "counts": [0, 0], "state": {}})
    with pytest.raises(ValueError, match="no state of an optimiser"):
        optimizer.load_state_dict({})


@host_only
def test_a_chapter_on_two_ranks_speaks_and_writes_once(tmp_path: Path) -> None:
    quickstart = PROGRAM.parents[2] / "examples" / "quickstart.py"
    small = ["--images", "32", "--batch-size", "16", "--channels", "8", "16", "--steps", "2"]
    done = started(2, quickstart, "--parallel", "mpi", "--out", str(tmp_path / "run"), *small)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("32 images; pictures go to") == 1 and done.stderr.count("samples.png after") == 1
    assert saving.load(tmp_path / "run" / "checkpoint.npz")["run"]["step"] == 2
    small[3] = "1"
    done = started(2, quickstart, "--parallel", "mpi", "--out", str(tmp_path / "small"), *small)
    assert done.returncode == 1
    message = "train: a batch of 1 is too small for 2 ranks: choose a larger batch_size"
    assert done.stderr.splitlines()[1:] == [message]  # the first says how many parameters and images there are


@host_only
def test_the_commands_train_and_sample_on_two_ranks(tmp_path: Path) -> None:
    small = ["--images", "32", "--batch-size", "16", "--microbatch", "8", "--channels", "8", "16"]
    saved = []
    for n, parallel in ((0, "alone"), (2, "mpi")):
        out = tmp_path / f"{n}"
        done = started(
            n,
            "-m",
            "tinydiff",
            "train",
            "glyphs",
            "--parallel",
            parallel,
            "--out",
            str(out),
            *small,
            *["--exact"] * bool(n),
        )
        assert done.returncode == 0 and done.stderr.count("now: python -m tinydiff sample") == 1, done.stderr
        picture = ["--count", "1", "--steps", "2", "--microbatch", "2", "--out", str(out / "grid.png")]
        done = started(n, "-m", "tinydiff", "sample", str(out / "checkpoint.npz"), "--parallel", parallel, *picture)
        assert done.returncode == 0 and done.stdout.splitlines() == [str(out / "grid.png")], done.stderr
        saved.append((saving.load(out / "checkpoint.npz")["model"], (out / "grid.png").read_bytes()))
    assert equal(saved[0][0], saved[1][0]) and saved[0][1] == saved[1][1]
    done = started(2, "-m", "tinydiff", "sample", str(tmp_path / "none.npz"), "--parallel", "mpi")
    assert done.returncode == 1 and done.stderr.count("none.npz") == 1 and "Traceback" not in done.stderr
