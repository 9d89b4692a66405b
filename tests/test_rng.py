"""Random numbers by counter: the words, the numbers made from them, and that a draw depends on its address alone."""

from __future__ import annotations

import copy
import json
import math
import pickle
import threading
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import backend
from tinydiff import rng as numpy_random
from tinydiff.microbatch import over_microbatches
from tinydiff.rng import as_rng, in_microbatch

pytestmark = pytest.mark.usefixtures("each_backend")


def host(a: Any) -> np.ndarray:
    assert backend.active().is_array(a), "a draw is an array of the device"
    return backend.to_host(a)


# ---------------------------------------------------------------- the words

MASK = 2**64 - 1


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x64-10 by the paper (Salmon et al. 2011, section 3.3 and figure 4), on Python's integers."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        p, q = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (q >> 64) ^ b ^ k, q & MASK, (p >> 64) ^ d ^ m, p & MASK
        k, m = (k + 0x9E3779B97F4A7C15) & MASK, (m + 0xBB67AE8584CAA73B) & MASK
    return a, b, c, d


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers, from the authors' Random123 library (tests/kat_vectors)
        ((0, 0, 0, 0), (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
        ((MASK,) * 4, (MASK,) * 2, (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        ),
    ],
)
def test_known_answers(counter: Any, key: Any, words: Any) -> None:
    assert philox(counter, key) == words


@pytest.mark.parametrize(
    ("seed", "stream", "step", "sample_offset"),
    [(0, 0, 0, 0), (7, 0, 3, 0), (2**64 - 1, 2**63 + 5, 0, 1), (1, 2, 2**40, 1000)],
)
def test_the_words_are_those_at_the_documented_counter(seed: int, stream: int, step: int, sample_offset: int) -> None:
    """Row i has 13 elements and takes the blocks 2 n and 2 n + 1, n = sample_offset + i; a block holds eight words."""
    rng = td.Rng(seed, stream=stream, step=step)
    u = host(rng.uniform((3, 13), "float64", sample_offset=sample_offset))
    for i in range(3):
        words: list[int] = []
        for block in (2 * (sample_offset + i), 2 * (sample_offset + i) + 1):
            for word in philox((block, step, 0, 0), (seed, stream)):
                words += [word & 0xFFFFFFFF, word >> 32]
        np.testing.assert_array_equal(u[i], [(w >> 8) / 2**24 for w in words[:13]])


def test_normals_are_box_and_muller() -> None:
    z = host(td.Rng(3).normal((1, 8), "float64"))[0]
    words = np.array(
        [half for word in philox((0, 0, 0, 0), (3, 0)) for half in (word & 0xFFFFFFFF, word >> 32)], "float64"
    )
    radius = np.sqrt(-2 * np.log((words[::2] + 0.5) / 2**32))
    angle = 2 * np.pi * words[1::2] / 2**32
    np.testing.assert_allclose(
        z, np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("word", [0, 1, 2**32 - 1])
def test_the_rarest_words_give_finite_normals_and_uniforms_below_1(word: int) -> None:
    words = np.full((1, 8), word, "uint32")
    if backend.name == "cupy":
        normal, uniform, integers = (of_words_on_the_device(words, kind) for kind in ("normal", "uniform", "integers"))
    else:
        normal, uniform = numpy_random.normals_of(words), numpy_random.uniforms_of(words)
        integers = numpy_random.integers_of(words, 2**31)
    assert abs(normal).max() < 6.8
    assert (0 <= uniform).all() and (uniform < 1).all()
    assert integers.max() == word >> 1


def of_words_on_the_device(words: np.ndarray, kind: str) -> np.ndarray:
    """What the kernels make of given words, eight of them, whatever Philox would give."""
    from tinydiff.fast.cuda import launch

    xp, out = backend.xp, "long long" if kind == "integers" else "float"
    signature = f'extern "C" __global__ void of_words(const unsigned int* words, {out}* values)'
    call = "integers(words, 1u << 31, values);" if kind == "integers" else f"{kind}s(words, values);"
    code = launch.text_of(launch.FOLDER / "random.cu") + signature + f" {{ {call} }}"
    values = xp.zeros((1, 8), "int64" if kind == "integers" else "float32")
    xp.RawKernel(code, "of_words")((1,), (1,), (xp.asarray(words), values))
    return backend.to_host(values)


def test_integers_scale_a_word() -> None:
    n = host(td.Rng(3).integers(10, (1, 8)))[0]
    words = [half for word in philox((0, 0, 0, 0), (3, 0)) for half in (word & 0xFFFFFFFF, word >> 32)]
    np.testing.assert_array_equal(n, [w * 10 >> 32 for w in words])
    assert n.dtype == "int64"


# ---------------------------------------------------------------- distributions
# The seeds are fixed: a test passes always or never.


def kolmogorov_smirnov(cumulative: np.ndarray) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and the given one, at sorted values."""
    n = len(cumulative)
    return math.sqrt(n) * max((np.arange(1, n + 1) / n - cumulative).max(), (cumulative - np.arange(n) / n).max())


@pytest.mark.parametrize("seed", range(4))
def test_normals_are_normal(seed: int) -> None:
    z = host(td.Rng(seed).normal((100, 1000), "float64")).ravel()
    n = z.size
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # E z^k and the variance of z^k
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(spread / n)
    phi = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in np.sort(z)])
    assert kolmogorov_smirnov(phi) < 1.95, "exceeded with probability 0.001"
    assert 4 < abs(z).max() < 6.7 and len(np.unique(z)) > 0.98 * n


@pytest.mark.parametrize("seed", range(4))
def test_uniforms_are_uniform(seed: int) -> None:
    u = host(td.Rng(seed).uniform((100, 1000), "float64")).ravel()
    assert u.min() >= 0 and u.max() < 1
    assert kolmogorov_smirnov(np.sort(u)) < 1.95
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.size)


@pytest.mark.parametrize("n", [1, 2, 7, 10, 1000])
def test_integers_are_uniform(n: int) -> None:
    draws = host(td.Rng(n).integers(n, (100, 1000))).ravel()
    counts = np.bincount(draws, minlength=n)
    assert len(counts) == n
    expected = draws.size / n
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), n - 1
    assert abs(chi2 - freedom) <= 4 * math.sqrt(2 * freedom), "four standard deviations"


def test_integers_reach_both_ends_of_a_wide_range() -> None:
    draws = host(td.Rng(0).integers(2**31, (1000, 8)))
    assert draws.min() < 2**21 and 2**31 - 2**21 < draws.max() < 2**31


def test_addresses_are_independent() -> None:
    """Rows, steps, streams, seeds and the two of a pair are uncorrelated."""
    n = 40_000
    base = td.Rng(0)
    draws = [host(base.normal((1, n), "float64"))[0] for _ in range(3)]
    draws += [
        host(r.normal((1, n), "float64"))[0]
        for r in (td.Rng(1), base.child("a"), base.child("b"), base.child(0), base.child("0"))
    ]
    draws += [host(td.Rng(0).normal((2, n), "float64"))[1], draws[0][::-1], np.roll(draws[0], 1), np.roll(draws[0], 8)]
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert abs(correlations).max() < 4.5 / math.sqrt(n)
    pairs = draws[0].reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4.5 / math.sqrt(n / 2)
    assert abs(np.corrcoef((pairs**2).T)[0, 1]) < 4.5 / math.sqrt(n / 2)


# ---------------------------------------------------------------- addresses

DRAWS = {
    "normal": lambda rng, shape, **o: rng.normal(shape, **o),
    "uniform": lambda rng, shape, **o: rng.uniform(shape, **o),
    "integers": lambda rng, shape, **o: rng.integers(100, shape, **o),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("row", [(), (1,), (7,), (8,), (9,), (4, 3, 2)])
def test_a_sample_is_the_same_alone_and_in_any_batch(draw: Any, row: tuple[int, ...]) -> None:
    whole = host(draw(td.Rng(5, step=2), (64, *row)))
    for sample_offset, count in ((0, 64), (0, 1), (17, 1), (30, 34)):
        np.testing.assert_array_equal(
            host(draw(td.Rng(5, step=2), (count, *row), sample_offset=sample_offset)),
            whole[sample_offset : sample_offset + count],
        )


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_is_a_function_of_its_step(draw: Any) -> None:
    rng = td.Rng(9)
    draws = [host(draw(rng, (4, 5))) for _ in range(3)]
    assert rng.step == 3
    for step, expected in enumerate(draws):
        np.testing.assert_array_equal(host(draw(td.Rng(9, step=step), (4, 5))), expected)
    assert not np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[1], draws[2])
    rng = td.Rng(9)
    rng.uniform((1000, 3))  # whatever was drawn before
    np.testing.assert_array_equal(host(draw(rng, (4, 5))), draws[1])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_shapes(draw: Any) -> None:
    for shape, expected in (
        (3, (3,)),
        ((), ()),
        ((0,), (0,)),
        ((2, 0, 3), (2, 0, 3)),
        ([2, 3], (2, 3)),
        (np.int64(3), (3,)),
    ):
        assert draw(td.Rng(0), shape).shape == expected


def test_dtypes() -> None:
    assert td.Rng(0).normal(3).dtype == td.Rng(0).uniform(3).dtype == "float32"
    for dtype in ("float64", np.float64, np.dtype("float64"), float, "float32"):
        wide, narrow = host(td.Rng(0).normal((5, 5), dtype)), host(td.Rng(0).normal((5, 5)))
        assert wide.dtype == dtype
        np.testing.assert_array_equal(wide, narrow.astype(dtype))


@pytest.mark.parametrize("dtype", ["int32", "bool", "float16", "complex64", int, None])
def test_a_draw_is_of_floats_of_32_or_64_bits(dtype: Any) -> None:
    """A normal as an integer would be 0 or 1, and one in float16 has lost most of its digits."""
    rng = td.Rng(0)
    for draw in (rng.normal, rng.uniform):
        with pytest.raises(TypeError, match=f"in float32 or float64, not in {dtype!r}"):
            draw(3, dtype)
    assert rng.step == 0


def test_a_state_goes_round() -> None:
    rng = td.Rng(11).child("loader")
    rng.normal(3)
    state = json.loads(json.dumps(rng.state()))
    again = td.Rng(**state)
    assert repr(again) == repr(rng) and (again.seed, again.step) == (11, 1)
    np.testing.assert_array_equal(host(again.normal((2, 3))), host(rng.normal((2, 3))))


def test_a_copy_starts_where_its_source_is_and_goes_its_own_way() -> None:
    rng = td.Rng(11, stream=3, step=5)
    other = rng.copy()
    assert other.state() == rng.state()
    first = host(other.normal((2, 3)))
    assert (other.step, rng.step) == (6, 5)
    np.testing.assert_array_equal(host(rng.normal((2, 3))), first)


def test_every_backend_draws_what_the_host_draws() -> None:
    """The words bit for bit, so uniforms and integers too; normals to the last digits of log and cos."""
    for columns in (1, 7, 8, 20, 1000):
        for address in ((7, 0, 3, 0), (2**64 - 1, 2**63 + 5, 2**64 - 1, 1), (1, 2, 2**40, 1000)):
            (seed, stream, step, sample_offset), source = address, np.array(address[:3], "uint64")
            words = numpy_random.words(source, 5, -(-columns // 8), sample_offset)[:, :columns]
            draw = lambda: td.Rng(seed, stream=stream, step=step)  # noqa: B023, E731
            shape = (5, columns)
            np.testing.assert_array_equal(
                host(draw().uniform(shape, sample_offset=sample_offset)), numpy_random.uniforms_of(words)
            )
            np.testing.assert_array_equal(
                host(draw().integers(2**31, shape, sample_offset=sample_offset)), numpy_random.integers_of(words, 2**31)
            )
            whole = numpy_random.normals_of(numpy_random.words(source, 5, -(-columns // 8), sample_offset))[:, :columns]
            np.testing.assert_allclose(
                host(draw().normal(shape, sample_offset=sample_offset)), whole, rtol=1e-5, atol=2e-6
            )


def test_children() -> None:
    rng = td.Rng(4)
    a = rng.child("noise")
    rng.normal(3)
    assert rng.child("noise").state() == a.state(), "whatever the parent has drawn"
    streams = {rng.child(name).stream for name in ["noise", "nois", "", 0, 1, "0", "1", "noise/a"]}
    streams |= {a.child("a").stream, a.child("noise").stream, rng.stream}
    assert len(streams) == 11
    assert rng.child(np.int64(1)).state() == rng.child(1).state()
    assert td.Rng(5).child("noise").stream == a.stream and td.Rng(5).child("noise").seed == 5
    with pytest.raises(TypeError, match=r"the name must be a str or an int, not 1\.5"):
        rng.child(1.5)  # type: ignore[arg-type]


def test_a_permutation_is_one_and_comes_again() -> None:
    for n in (0, 1, 2, 10, 1000):
        order = td.Rng(6).permutation(n)
        assert isinstance(order, np.ndarray)
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
        np.testing.assert_array_equal(td.Rng(6).permutation(n), order)
    rng = td.Rng(6)
    assert not np.array_equal(rng.permutation(1000), rng.permutation(1000)) and rng.step == 2


def test_every_order_is_as_likely() -> None:
    """6000 permutations of 3: each of the 6 orders 1000 times, within four standard deviations."""
    rng, counts = td.Rng(8), {}
    for _ in range(6000):
        order = tuple(rng.permutation(3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and all(abs(c - 1000) < 4 * math.sqrt(1000 * 5 / 6) for c in counts.values())


def test_threads_draw_the_same_numbers() -> None:
    expected = host(td.Rng(2).normal((64, 10)))
    parts: list[Any] = [None] * 4

    def work(i: int) -> None:
        parts[i] = host(td.Rng(2).normal((16, 10), sample_offset=16 * i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_no_seed_is_a_new_one_each_time() -> None:
    a, b = td.Rng(), td.Rng()
    assert a.seed != b.seed
    np.testing.assert_array_equal(host(td.Rng(a.seed).normal(3)), host(a.normal(3)))
    assert as_rng(a) is a and as_rng(5).seed == 5 and as_rng(None).seed != as_rng(None).seed


def test_no_global_state_is_read_or_changed() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = host(td.Rng(1).normal(8))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(1)
    np.testing.assert_array_equal(host(td.Rng(1).normal(8)), first)


COPIES = {
    "method": lambda rng: rng.copy(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda rng: copy.deepcopy([rng])[0],
    "pickle": lambda rng: pickle.loads(pickle.dumps(rng)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_belongs_to_the_microbatch_in_which_it_is_made(copied: Any) -> None:
    rng = td.Rng(11, stream=3, step=5)
    here = copied(rng)
    assert type(here) is td.Rng and here is not rng and here.state() == rng.state()

    def part(rows: slice) -> Any:
        with pytest.raises(RuntimeError, match="is shared by the microbatches"):
            here.normal(1)
        mine = copied(rng)
        with in_microbatch(slice(0, 1)), pytest.raises(RuntimeError, match="is shared by the microbatches"):
            mine.normal(1)
        return host(mine.normal((1, 3), sample_offset=rows.start))

    parts = list(over_microbatches(part, 4, 1, threads=2))
    np.testing.assert_array_equal(np.concatenate(parts), host(td.Rng(11, stream=3, step=5).normal((4, 3))))
    assert rng.step == 5


# ---------------------------------------------------------------- errors


def test_errors_quote_the_value() -> None:
    for seed in (-1, 2**64, 1.5, "0", True):
        with pytest.raises(ValueError, match=f"seed must be an int from 0 to .*, not {seed!r}"):
            td.Rng(seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stream must be an int from 0 .* not -2"):
        td.Rng(0, stream=-2)
    with pytest.raises(ValueError, match="step must be an int from 0 .* not -3"):
        td.Rng(0, step=-3)
    rng = td.Rng(0)
    for draw in DRAWS.values():
        with pytest.raises(ValueError, match=r"shape \(2, -1\) must be an integer of 0 or more, not -1"):
            draw(rng, (2, -1))
        for shape in (2.0, (2, 2.5), None, "2"):
            with pytest.raises(ValueError, match="shape .* must be an integer of 0 or more, not"):
                draw(rng, shape)
        for offset in (-5, 1.5, None):
            with pytest.raises(
                ValueError, match=f"sample_offset must be an integer from 0 to 1099511627776, not {offset}"
            ):
                draw(rng, 2, sample_offset=offset)
    for n in (0, -3, 2**31 + 1, 2.5, None):
        with pytest.raises(ValueError, match=rf"integers\(n\): n must be an integer from 1 to {2**31}, not {n}"):
            rng.integers(n, 3)  # type: ignore[arg-type]
    for n in (-4, 2.5):
        with pytest.raises(ValueError, match=rf"permutation\(n\): n must be an integer of 0 or more, not {n}"):
            rng.permutation(n)  # type: ignore[arg-type]
    assert rng.step == 0, "a draw that failed was none"


def test_integers_of_numpy_are_integers() -> None:
    i = np.int64
    for draw in DRAWS.values():
        found = draw(td.Rng(i(3), stream=np.uint8(4), step=i(5)), (i(2), np.uint8(3)), sample_offset=i(6))
        known = draw(td.Rng(3, stream=4, step=5), (2, 3), sample_offset=6)
        np.testing.assert_array_equal(host(found), host(known))
        assert draw(td.Rng(0), np.array([2, 3])).shape == (2, 3)
    np.testing.assert_array_equal(td.Rng(0).permutation(i(5)), td.Rng(0).permutation(5))
    np.testing.assert_array_equal(host(td.Rng(0).integers(i(9), 5)), host(td.Rng(0).integers(9, 5)))
