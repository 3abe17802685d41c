"""The raw results of a run: one JSON file, valid after every measurement.

Its kind and version, environment, method, whether the run is complete, and one row a measurement in `results`. Numbers
that were not measured are null; `status` and `reason` say why.

While a run goes on they lie in a file beside the wanted one, named with `.partial` at the end, which takes its place
when the run is complete. A run that was killed leaves the partial file; `--continue` goes on from it. Read next:
attention_results.py and training.py, the kinds that can be continued.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

# A file of another machine or other libraries cannot be continued.
FIXED = ("gpu", "driver", "torch", "cuda", "triton", "flash_attn_4")


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def rounded(value):
    """Six significant digits are more than any of these is known to."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(path: Path | None, head: dict, rows: Iterable[dict]) -> None:
    """`head` and one result a line; the file is never seen half written. No file without a path."""
    if path is None:
        return
    lines = "\n".join(f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items())
    body = ",\n".join(f"    {json.dumps(rounded(row))}" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text("{\n" + lines + '\n  "results": [\n' + body + "\n  ]\n}\n")
    os.replace(beside, path)


class Results:
    """Rows by key, in a file that is rewritten whenever one is added. A kind of results is a subclass.

    Attributes:
        kind, version: of the file.
        key_of: what tells a row from the others.
        head: environment, method and the like; filled by the run before the first row.
        running: the rows, without numbers, that the measurement at work has yet to give: what will be said of it if
            the process does not survive it.
    """

    kind: str
    version: int
    key_of: Callable[[dict], tuple]

    def __init__(self, path: Path | None):
        self.path = path
        self.head: dict = {}
        self.rows: dict[tuple, dict] = {}
        self.running: list[dict] = []

    @classmethod
    def read(cls, source: Path, path: Path | None) -> Results:
        """What `source` holds, to be written to `path`. ValueError when it is no file of this kind and version."""
        try:
            content = json.loads(source.read_text())
            kind, version = content["kind"], content["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source} cannot be continued: {type(error).__name__}: {error}") from error
        if (kind, version) != (cls.kind, cls.version):
            wanted = f"{cls.kind!r} version {cls.version}"
            raise ValueError(f"{source} holds {kind!r} version {version}; only {wanted} is continued")
        results = cls(path)
        results.rows = {cls.key_of(row): row for row in content.pop("results")}
        results.running = content.pop("running")
        results.head = {name: x for name, x in content.items() if name not in ("kind", "version", "complete")}
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
        self.rows[self.key_of(row)] = rounded(row)
        self.running = [other for other in self.running if self.key_of(other) != self.key_of(row)]
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        head = {"kind": self.kind, "version": self.version, **self.head, "complete": complete, "running": self.running}
        write(self.path, head, self.rows.values())

    def finish(self, path: Path) -> None:
        """The complete results at `path`, and no partial file any more."""
        partial, self.path = self.path, path
        self.write(complete=True)
        if partial is not None and partial != path:
            partial.unlink(missing_ok=True)
