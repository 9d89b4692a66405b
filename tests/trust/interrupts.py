"""Exceptions at random instants, as Ctrl-C makes them: what do they leave behind?

    python tests/trust/interrupts.py --minutes 1

A timer raises after 20 to 500 microseconds, wherever the program then is, over and over again. Afterwards nothing may
hang, the BLAS must have its threads back, and nodes must be recorded as before. After a `with no_grad():` of the user's
this is only counted: Python looks for signals on the way into `__exit__`, before its first line, so one
or two in a hundred of these exceptions leave the mode as it was inside, until an outer `with` ends.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import signal
import sys
import threading
import time

import numpy as np

import tinydiff as td
from tinydiff import modes, nn, ops
from tinydiff.fast import threads
from tinydiff.microbatch import blas_threads, over_microbatches

HANGS = 20  # seconds without progress; a busy machine may take a few


class Interrupt(BaseException):
    pass


def interrupt(*_args):
    raise Interrupt


net, x = nn.Linear(4, 4, rng=0), td.tensor(np.ones((8, 4), "float32"))


def in_threads():
    assert [rows.start for rows in over_microbatches(lambda rows: rows, 16, 4, 2)] == [0, 4, 8, 12]


def in_turn():
    assert [rows.start for rows in over_microbatches(lambda rows: rows, 16, 4, 1)] == [0, 4, 8, 12]


def in_pieces():
    assert threads.at_once(lambda i: i, 3, 2) == [0, 1, 2]


many = np.ones((400, 400), "float32")


def product():
    threads.matmul(many, many)


def blas():
    with blas_threads(1):
        net(x)


def backward():
    ops.mean(ops.square(net(x))).backward()


def no_grad():
    with td.no_grad():
        net(x)


@td.no_grad()
def decorated():
    net(x)


WORK = [in_threads, in_turn, in_pieces, product, blas, backward, no_grad, decorated]


def interrupted(work, seconds, rng, alive):
    """(exceptions, how often they left the BLAS with a limit, how often the mode)"""
    blas_of = threads._blas()
    before = blas_of[0]() if blas_of else 0
    count = limited = off = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 5e-4))
            while True:
                work()
                alive[0] = time.monotonic()
                if not signal.getitimer(signal.ITIMER_REAL)[0]:  # it came in a destructor, where Python drops it
                    break
        except Interrupt:
            count += 1
        while True:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                break
            except Interrupt:
                pass
        if threads._limits or blas_of and blas_of[0]() != before:
            gc.collect()
            limited += 1
            threads._limits.clear()
            if blas_of:
                blas_of[1](before)
        if not modes.grad_enabled():
            off += 1
            while not modes.grad_enabled():
                modes.recording.set(modes.recording.get()[2])
    return count, limited, off


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    alive, doing = [time.monotonic()], [""]

    def watch():
        while True:
            time.sleep(0.2)
            if time.monotonic() - alive[0] > HANGS:
                print(f"{doing[0]}: HANGS", flush=True)
                faulthandler.dump_traceback()
                os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    rng, bad = random.Random(args.seed), 0
    for work in WORK:
        doing[0], alive[0] = work.__name__, time.monotonic()
        count, limited, off = interrupted(work, args.minutes * 60 / len(WORK), rng, alive)
        print(f"{work.__name__}: {count} exceptions, {limited} left a limit of the BLAS, {off} no_grad", flush=True)
        bad += limited + (0 if work is no_grad else off)
    sys.stdout.flush()
    os._exit(bool(bad))  # a thread may wait for ever


if __name__ == "__main__":
    main()
