"""Lines to a terminal or a pipe, without waiting for who reads them.

A terminal that has been stopped, a pager that waits for a key, an ssh whose network hangs: they take a line when there
is room for it, and until then a write waits. So the lines are written by a thread of its own. In the usual case the
caller waits for it, a moment, so that lines come in the order in which they were said; when the thread does not come
back, nobody waits for it any more.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from queue import SimpleQueue
from typing import TextIO

MOMENT = 0.2  # seconds


class Patient:
    """Writes to a stream. A file on a disk, and what is no file at all, as in a notebook, is written to directly."""

    def __init__(self, stream: TextIO):
        self.stream, self.handle = stream, _waiting_handle(stream)
        self.texts: SimpleQueue[str | None] = SimpleQueue()
        self.idle = threading.Event()
        self.idle.set()
        if self.handle is not None:
            threading.Thread(target=self._work, name="tinydiff-progress", daemon=True).start()

    def write(self, text: str) -> bool:
        """Was it taken? It is not while an earlier text has not been written."""
        if self.handle is None:
            # Nobody reads any more, or the disk of a log is full: no reason to end a training.
            with contextlib.suppress(OSError, ValueError):
                self.stream.write(text)
                self.stream.flush()
            return True
        if not self.idle.is_set():
            return False
        self.put(text)
        self.idle.wait(MOMENT)
        return True

    def put(self, text: str) -> None:
        """Write it after all others, and do not wait at all. May be called in the middle of anything, by a handler of
        signals."""
        self.idle.clear()
        self.texts.put(text)

    def close(self) -> None:
        """Nothing follows. What has been taken is written still, if the program lasts so long."""
        self.texts.put(None)

    def _work(self) -> None:
        while (text := self.texts.get()) is not None:
            data = text.encode(self.stream.encoding or "utf-8", self.stream.errors or "replace")
            with contextlib.suppress(OSError):
                while data:  # past the buffer of the stream, whose lock others may need meanwhile
                    data = data[os.write(self.handle, data) :]  # type: ignore[arg-type]
            if self.texts.empty():
                self.idle.set()


def _waiting_handle(stream: TextIO) -> int | None:
    """Of a terminal, a pipe or a socket; None for what does not make a writer wait."""
    try:
        handle = stream.fileno()
        return None if stat.S_ISREG(os.fstat(handle).st_mode) else handle
    except (AttributeError, OSError, ValueError):
        return None
