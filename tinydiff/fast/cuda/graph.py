"""A CUDA graph: launches that are recorded once, and repeated by the device without the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cupy

from .cublas import prepare


class Graph:
    """A stream and a memory pool of its own, and the launches that were recorded on them.

    The stream is a non-blocking one, because otherwise any work on the default stream would break the recording. The
    pool is used by nothing else: every replay writes into all memory that the recorded step allocated, even if the step
    has freed it, and a shared pool would give that memory to others. The stream waits for earlier work on the current
    stream, and later work there waits for this stream.
    """

    def __init__(self) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.pool = cupy.cuda.MemoryPool()
        self.graph: Any = None
        self.before, self.after = (cupy.cuda.Event(disable_timing=True) for _ in range(2))

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        outside = cupy.cuda.get_current_stream()
        self.stream.wait_event(outside.record(self.before))
        try:
            with self.stream:
                yield
        finally:
            outside.wait_event(self.stream.record(self.after))

    def run(self, step: Callable[[], Any]) -> Any:
        """The step as it is, on this stream and in this memory."""
        with self._on_stream(), cupy.cuda.using_allocator(self.pool.malloc):
            return step()

    def record(self, step: Callable[[], Any]) -> Any:
        """Run the step's Python code; its launches are recorded, and not run. Errors: those of the step."""
        with self._on_stream(), cupy.cuda.using_allocator(self.pool.malloc):
            prepare()
            self.stream.begin_capture()
            try:
                result = step()
            except BaseException:
                with contextlib.suppress(Exception):  # ending it fails after an error; the error of the step is raised
                    self.stream.end_capture()
                raise
            self.graph = self.stream.end_capture()
        return result

    def replay(self, before: Callable[[], None]) -> None:
        """Run `before`, and then what was recorded, on this stream."""
        with self._on_stream():
            before()
            self.graph.launch(self.stream)
