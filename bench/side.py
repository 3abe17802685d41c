"""One of the two processes that `compare.py` lets measure in turn: this harness over the kernels of another folder.

    python -P bench/side.py FOLDER_WITH_hmar_kernels

Reads one JSON command a line from its input, writes one JSON answer a line. `prepare` checks an implementation in a
cell, `measure` times one direction of it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIN_ROUNDS, MAX_ROUNDS = 5, 100


def import_kernels_from(folder: Path) -> None:
    """Make `hmar_kernels` that of `folder`, whatever is installed, and the rest that of this checkout."""
    sys.path[:0] = [str(folder), str(ROOT)]
    # NOTE: an editable installation answers for the package before sys.path is looked at.
    for finder in list(sys.meta_path):
        if finder not in (BuiltinImporter, FrozenImporter, PathFinder):
            spec = finder.find_spec("hmar_kernels", None)
            if spec is not None and not Path(spec.origin or "").is_relative_to(folder):
                sys.meta_path.remove(finder)
    import hmar_kernels

    found = Path(hmar_kernels.__file__).resolve()
    if not found.is_relative_to(folder):
        raise ImportError(f"hmar_kernels comes from {found}, expected {folder}")


class Side:
    """Answers to the commands."""

    def __init__(self, device: str):
        import torch

        from bench.timing import Stopwatch

        self.device = torch.device(device)
        self.stopwatch = Stopwatch(self.device)
        self.inputs = self.subject = None

    def prepare(self, cell: dict, impl: str) -> dict:
        from bench.rivals import choose
        from bench.shapes import Cell
        from bench.subject import Inputs, examine, release

        self.subject = None
        cell = Cell(**(cell | {"sides": tuple(cell["sides"])}))
        if self.inputs is None or self.inputs.cell != cell:
            self.inputs = None
            release(self.device)
            self.inputs = Inputs(cell, self.device)
        else:
            release(self.device)
        (implementation,) = choose([impl], self.device)
        self.subject = examine(implementation, self.inputs)
        return {"status": self.subject.status, "reason": self.subject.reason, "extra_bytes": self.subject.extra_bytes}

    def measure(self, direction: str, seconds: float) -> dict:
        call, prepare = self.subject.timed(direction)
        host = self.stopwatch.host_seconds(call, prepare)
        overhead = self.stopwatch.overhead_seconds(call, prepare)
        estimate = self.stopwatch.seconds(call, prepare)
        rounds = min(max(math.ceil(seconds / estimate), MIN_ROUNDS), MAX_ROUNDS)
        samples = self.stopwatch.samples(call, prepare, host, rounds)
        return {"samples": samples, "host_us": 1e6 * overhead}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    import_kernels_from(Path(sys.argv[1]).resolve())
    from bench.supervisor import end_with_parent

    end_with_parent()
    side = None
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("action")
        try:
            if action == "start":
                side, answer = Side(**command), {}
            else:
                answer = getattr(side, action)(**command)
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            answer = {"status": "failed", "reason": f"{type(error).__name__}: {message[0]}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
