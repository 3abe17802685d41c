"""The raw results of a run: one JSON file, valid after every measurement.

Kind "attention", version 2: environment, ceilings, method, whether the run is complete, and one entry in `results` per
cell, implementation and direction. Numbers that were not measured are null; `status` and `reason` say why.

While a run goes on they lie in a file beside the wanted one, named with `.partial` at the end, which takes its place
when the run is complete. A run that was killed leaves the partial file; `--continue` goes on from it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import work
from .shapes import Cell

KIND, VERSION = "attention", 2
# A file of another machine or other libraries cannot be continued.
FIXED = ("gpu", "driver", "torch", "cuda", "triton", "flash_attn_4")


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def key(cell: Cell, implementation: str, direction: str) -> tuple:
    return cell.pattern, cell.sides, cell.batch, cell.heads, cell.head_dim, cell.dtype, implementation, direction


def key_of(row: dict) -> tuple:
    names = ("pattern", "sides", "batch", "heads", "head_dim", "dtype", "impl", "direction")
    return tuple(tuple(row[name]) if name == "sides" else row[name] for name in names)


def describe(cell: Cell, direction: str) -> dict:
    """What a row says of its cell."""
    return {
        "pattern": cell.pattern,
        "resolution": cell.resolution,
        "sides": list(cell.sides),
        "length": cell.length,
        "pairs": cell.pairs,
        "batch": cell.batch,
        "heads": cell.heads,
        "head_dim": cell.head_dim,
        "dtype": cell.dtype,
        "direction": direction,
        "flops": work.flops(cell, direction),
        "bytes": work.fewest_bytes(cell, direction),
        "fewest_extra_bytes": work.fewest_extra_bytes(cell, direction),
    }


NUMBERS = ("ms", "p10_ms", "p90_ms", "rounds", "host_us", "first_call_s", "peak_bytes", "extra_bytes", "check")


def row_without_numbers(cell: Cell, implementation: str, ours: bool, direction: str, status: str, reason: str) -> dict:
    found = {"impl": implementation, "ours": ours, "status": status, "reason": reason}
    return describe(cell, direction) | found | dict.fromkeys(NUMBERS)


class Results:
    """Rows by (cell, implementation, direction), in a file that is rewritten whenever one is added.

    Attributes:
        head: environment, ceilings and method; filled by the run before the first row.
        running: the rows, without numbers, that the implementation at work has yet to give: what will be said of it
            if the process does not survive it.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.head: dict = {}
        self.rows: dict[tuple, dict] = {}
        self.running: list[dict] = []

    @classmethod
    def read(cls, source: Path, path: Path | None) -> Results:
        """What `source` holds, to be written to `path`. ValueError when it is no file of results of this version."""
        try:
            content = json.loads(source.read_text())
            kind, version = content["kind"], content["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source} cannot be continued: {type(error).__name__}: {error}") from error
        if (kind, version) != (KIND, VERSION):
            raise ValueError(f"{source} holds {kind!r} version {version}; only {KIND!r} version {VERSION} is continued")
        results = cls(path)
        results.head = {name: content[name] for name in ("environment", "ceilings", "method")}
        results.rows = {key_of(row): row for row in content["results"]}
        results.running = content["running"]
        return results

    def check_environment(self, now: dict) -> None:
        """ValueError when the rows come from another machine or other libraries than those of `now`."""
        for name in FIXED:
            then = self.head["environment"].get(name)
            if then != now[name]:
                raise ValueError(
                    f"cannot continue: the results were measured with {name} {then}, here it is {now[name]}"
                )

    def keep(self, wanted) -> None:
        self.rows = {k: row for k, row in self.rows.items() if wanted(row)}

    def begin(self, rows: list[dict]) -> None:
        self.running = rows
        self.write(complete=False)

    def add(self, row: dict) -> None:
        self.rows[key_of(row)] = rounded(row)
        self.running = [other for other in self.running if key_of(other) != key_of(row)]
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        """One result a line; the file is never seen half written."""
        if self.path is None:
            return
        head = {"kind": KIND, "version": VERSION, **self.head, "complete": complete, "running": self.running}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        rows = ",\n".join(f"    {json.dumps(row)}" for row in self.rows.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text("{\n" + "\n".join(lines) + '\n  "results": [\n' + rows + "\n  ]\n}\n")
        os.replace(beside, self.path)

    def finish(self, path: Path) -> None:
        """The complete results at `path`, and no partial file any more."""
        partial, self.path = self.path, path
        self.write(complete=True)
        if partial is not None and partial != path:
            partial.unlink(missing_ok=True)


def rounded(value):
    """Six significant digits are more than any of these is known to."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
