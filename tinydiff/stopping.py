"""A run is asked to stop: by Ctrl-C, by a scheduler or a container (SIGTERM), by a terminal that closes (SIGHUP)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class Stop:
    """The signal that asked for the end of the loop (0: none), and whether a second one came."""

    signal: int = 0
    twice: bool = False


@contextlib.contextmanager
def stop_signals(stop: Stop, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first signal is only noted, so that the step is finished; the second ends the program at once.

    `say` is called in the middle of anything, a print too, so it must not wait, nor use what it may have interrupted.
    A signal that is ignored stays so: that is how nohup and shells keep it away. Other threads than the main one get no
    signals; there nothing is done.
    """

    def handler(number: int, frame: object) -> None:
        if stop.signal:
            stop.twice = True
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)  # no Python code could stand in its way; saved files are whole at any instant
        stop.signal = number
        name = signal.Signals(number).name
        say(f"\n{name}: this step is finished, then saved (again: stops at once)\n")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: was for number, was in before.items() if was != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, signal.SIG_DFL if was is None else was)  # None: it was not set from Python
