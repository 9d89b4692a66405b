"""PyTorch's rivals in a process of their own, one for all cases.

In one process each side would be affected by the settings of the other: tinydiff asks the C library to keep freed
memory, which also makes PyTorch faster, and Python's garbage collector goes through the objects of both.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import Any

import measure


class Apart:
    """The other process. It builds a rival when it is first asked for, and drops those of the case before."""

    def __init__(self, threads: int, compiled: bool):
        command = [sys.executable, __file__, str(threads), "compile" if compiled else ""]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, case: str, rival: str) -> AwayRun:
        run = AwayRun(self, case, rival)
        run()
        return run

    def ask(self, **request: Any) -> float:
        """Seconds per run. Errors: Unavailable, with what the other process says; RuntimeError if it ended."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of PyTorch ended with status {self.process.wait()} at {request}")
        answer = json.loads(line)
        if "unavailable" in answer:
            raise measure.Unavailable(answer["unavailable"])
        return answer["seconds"]

    def close(self) -> None:
        self.process.communicate()


class AwayRun:
    """A rival in the other process."""

    def __init__(self, apart: Apart, case: str, rival: str):
        self.apart, self.request = apart, {"case": case, "rival": rival}

    def seconds(self, repeats: int) -> float:
        return self.apart.ask(**self.request, repeats=repeats)

    def __call__(self) -> None:
        self.seconds(1)


def serve(threads: int, compiled: bool) -> None:
    """Answer each line of JSON with a line of JSON, until there are no more."""
    import cases

    answers, sys.stdout = sys.stdout, sys.stderr  # what compilers print goes elsewhere
    side = cases.torch_side()
    every = {case.name: case for case in cases.cases(cases.Options(threads, compiled))}
    built: dict[tuple[str, str], measure.Run] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["case"], request["rival"]
        try:
            if key not in built:
                if any(case != key[0] for case, _ in built):
                    built.clear()
                    gc.unfreeze()
                side.settings(threads)
                built[key] = every[key[0]].rivals[key[1]]()
                built[key]()  # the first run also makes what is made once
                gc.collect()
                gc.freeze()  # as for tinydiff: measure.py
            answer: dict[str, Any] = {"seconds": measure.timed(built[key], request["repeats"], side.wait)}
        except measure.Unavailable as reason:
            answer = {"unavailable": str(reason)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2] == "compile")
