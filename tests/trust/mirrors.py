"""Mirrors that say anything: a download ends with the published bytes, or with a reason, in bounded time and memory.

    python tests/trust/mirrors.py --count 5000

A server on 127.0.0.1 sends a sound reply that is damaged at random, in its header or its body; now and then it sends it
in drops, hangs up in the middle, or goes on for ever.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import importlib
import logging
import socket
import threading
import time
import tracemalloc
from collections import Counter

import numpy as np
from readers import damaged, idx

mnist = importlib.import_module("tinydiff.data.mnist")

FILE = "train-labels-idx1-ubyte"
BLOB = gzip.compress(idx(np.arange(600, dtype=np.uint32).astype(np.uint8) % 10))
SOURCE = mnist.Source("MNIST", (), {FILE: hashlib.md5(gzip.decompress(BLOB)).hexdigest()}, "idx")
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BLOB), BLOB)
REPLIES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BLOB) + BLOB,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    b"HTTP/1.0 200 OK\r\n\r\n" + BLOB,
    b"HTTP/1.1 302 Found\r\nLocation: /elsewhere.gz\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=x\r\nContent-Length: 2\r\n\r\nno",
]
PATIENCE, LIMIT = 0.3, 2**20  # seconds and bytes, in place of those for a real mirror


class Server:
    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/{FILE}.gz"
        self.reply, self.how = b"", "whole"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):  # it was closed
            while True:
                threading.Thread(target=self.answer, args=(self.listener.accept()[0],), daemon=True).start()

    def answer(self, connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(2**16)
            if self.how == "in drops":
                for i in range(len(self.reply)):
                    connection.sendall(self.reply[i : i + 1])
                    time.sleep(0.02)
                return
            connection.sendall(self.reply)
            while self.how == "for ever":
                connection.sendall(bytes(2**16))


def run(server: Server, seed: int, number: int) -> str:
    """How the download ended. Errors: AssertionError if it is not as it should be."""
    draw = np.random.default_rng((seed, number))
    server.reply = damaged(REPLIES[draw.integers(len(REPLIES))], draw)
    server.how = str(draw.choice(["whole", "in drops", "for ever"], p=[0.96, 0.02, 0.02]))
    start = time.monotonic()
    tracemalloc.start()
    try:
        blob, failure = mnist._fetch(server.url)
        failure = failure or mnist._damage(blob, FILE, SOURCE)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    finally:
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
    took = time.monotonic() - start
    assert failure or gzip.decompress(blob) == gzip.decompress(BLOB), "other data were taken"
    assert peak < 16, f"{peak:.0f} MB"
    assert took < 20 * PATIENCE, f"{took:.1f} s"
    return failure.partition(":")[0] if failure else "the published bytes"


@contextlib.contextmanager
def server():
    before = mnist.PATIENCE, mnist.PUBLISHED
    mnist.PATIENCE, mnist.PUBLISHED = PATIENCE, LIMIT
    started = Server()
    try:
        yield started
    finally:
        mnist.PATIENCE, mnist.PUBLISHED = before
        with contextlib.suppress(OSError):
            started.listener.shutdown(socket.SHUT_RDWR)
        started.listener.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    numbers = range(args.count) if args.only is None else [args.only]
    mnist.log.setLevel(logging.ERROR)  # which says every PATIENCE seconds that it still waits
    start, wrong, ends = time.monotonic(), 0, Counter()
    with server() as mirror:
        for number in numbers:
            try:
                ends[run(mirror, args.seed, number)] += 1
            except AssertionError as error:
                wrong += 1
                print(f"reply {number}: {error}", flush=True)
    for how, count in ends.most_common(12):
        print(f"{count:6} {how}")
    print(f"{len(numbers)} replies, {wrong} wrong, {time.monotonic() - start:.0f} s")
    return wrong > 0


if __name__ == "__main__":
    raise SystemExit(main())
