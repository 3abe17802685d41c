"""Options of the benchmarks, the fixtures that share one cell's inputs, and the raw JSON written at the end.

The JSON holds kind "attention", version 1, environment, ceilings, method, and one entry in `results` per cell,
implementation and direction. Numbers that were not measured are null; `status` and `reason` say why.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from . import rivals, shapes, work
from .environment import ceilings, environment
from .subject import DIRECTIONS, Inputs, Subject, examine, release
from .timing import Stopwatch, clock, quantile

KIND, VERSION = "attention", 1
HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "reports" / "data"
RUN = pytest.StashKey["Run"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention benchmarks", "what is measured (default: all of it)")
    group.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the harness on a tiny pyramid")
    group.addoption("--impl", action="append", metavar="NAME", help=f"repeatable: {', '.join(rivals.IMPLEMENTATIONS)}")
    group.addoption("--pattern", action="append", metavar="NAME", help=f"repeatable: {', '.join(shapes.PATTERNS)}")
    group.addoption("--resolution", action="append", type=int, metavar="PIXELS", help="repeatable: 256, 512, 1024")
    group.addoption("--sides", metavar="N,N,...", help="a pyramid of these sides instead of --resolution")
    group.addoption("--direction", action="append", choices=DIRECTIONS, help="repeatable")
    group.addoption("--batch", type=int, help="images")
    group.addoption("--heads", type=int)
    group.addoption("--head-dim", type=int)
    group.addoption("--dtype", choices=tuple(shapes.DTYPES), default="bfloat16")
    group.addoption("--seconds", type=float, default=0.3, help="time to spend on one measurement (default 0.3)")
    group.addoption("--commit", help="commit to record where git cannot be asked")
    group.addoption(
        "--output",
        type=Path,
        metavar="FILE",
        help="raw results; a run of everything on a GPU goes to reports/data/attention_<gpu>.json by default",
    )


class Run:
    """Choices of this run and the results so far."""

    def __init__(self, config: pytest.Config):
        option = config.getoption
        self.device = torch.device(option("--device"))
        self.missing = None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            self.missing = "no CUDA device; --device cpu tries the harness on a tiny pyramid"
        try:
            self.cells = shapes.cells(
                patterns=option("--pattern"),
                resolutions=option("--resolution"),
                sides=_sides(option("--sides")),
                batch=option("--batch"),
                heads=option("--heads"),
                head_dim=option("--head-dim"),
                dtype=option("--dtype"),
                smoke=self.device.type == "cpu",
            )
            self.implementations = rivals.choose(option("--impl"), self.device)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        self.directions = [d for d in DIRECTIONS if d in (option("--direction") or DIRECTIONS)]
        self.seconds = option("--seconds")
        self.commit = option("--commit")
        self.results: list[dict] = []
        narrowed = ("impl", "pattern", "resolution", "sides", "direction", "batch", "heads", "head_dim")
        self.everything = not any(option(name) for name in narrowed) and option("--dtype") == "bfloat16"
        self._output = option("--output")
        self._stopwatch: Stopwatch | None = None

    @property
    def stopwatch(self) -> Stopwatch:
        """Made on first use: it takes device memory."""
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(self.device)
        return self._stopwatch

    def output(self, gpu: str) -> Path | None:
        """Where the results go: a part of a run overwrites nothing unless told so."""
        planned = len(self.cells) * len(self.implementations) * len(self.directions)
        if self._output or self.device.type != "cuda" or not self.everything or len(self.results) < planned:
            return self._output
        return DATA / f"attention_{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"

    def add(self, subject: Subject, direction: str, samples: list[float] | None, host_seconds: float | None) -> None:
        cell = subject.inputs.cell
        milliseconds = [1e3 * s for s in samples] if samples else None
        row = {
            "pattern": cell.pattern,
            "resolution": cell.resolution,
            "sides": list(cell.sides),
            "length": cell.length,
            "pairs": cell.pairs,
            "batch": cell.batch,
            "heads": cell.heads,
            "head_dim": cell.head_dim,
            "dtype": cell.dtype,
            "impl": subject.implementation.name,
            "ours": subject.implementation.ours,
            "direction": direction,
            "status": subject.status,
            "reason": subject.reason,
            "ms": quantile(milliseconds, 0.5) if samples else None,
            "p10_ms": quantile(milliseconds, 0.1) if samples else None,
            "p90_ms": quantile(milliseconds, 0.9) if samples else None,
            "rounds": len(samples) if samples else None,
            "host_ms": 1e3 * host_seconds if host_seconds is not None else None,
            "first_call_s": subject.first_call_seconds,
            "flops": work.flops(cell, direction),
            "bytes": work.fewest_bytes(cell, direction),
            "peak_bytes": subject.peak_bytes[direction],
            "extra_bytes": subject.extra_bytes[direction],
            "check": subject.deviations,
        }
        self.results.append({k: _rounded(v) for k, v in row.items()})

    def write(self) -> Path | None:
        """The raw JSON, one result a line. Returns where it is, None when nobody wanted it."""
        facts = environment(self.device, self.commit)
        path = self.output(facts["gpu"])
        if path is None:
            return None
        head = {
            "kind": KIND,
            "version": VERSION,
            "environment": facts,
            "ceilings": ceilings(self.stopwatch),
            "method": {
                "clock": "device events" if self.device.type == "cuda" else "host clock",
                "seconds_per_measurement": self.seconds,
                "layout": "[B,L,H,D] memory seen as [B,H,L,D]",
                "inputs": "standard normal, scale 1/sqrt(D)",
            },
        }
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in head.items()]
        rows = ",\n".join(f"    {json.dumps(row)}" for row in self.results)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + "\n".join(lines) + '\n  "results": [\n' + rows + "\n  ]\n}\n")
        return path


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUN] = Run(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    run = metafunc.config.stash[RUN]
    if "inputs" in metafunc.fixturenames:
        metafunc.parametrize("inputs", run.cells, indirect=True, ids=str, scope="module")
        metafunc.parametrize("subject", run.implementations, indirect=True, ids=lambda i: i.name, scope="module")
        metafunc.parametrize("direction", run.directions)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run = config.stash[RUN]
    measured = [item for item in items if item.path.parent == HERE and "subject" in item.callspec.params]
    for item in measured:
        if run.missing:
            item.add_marker(pytest.mark.skip(reason=run.missing))
        else:
            item.add_marker(pytest.mark.benchmark(timer=clock(run.device), disable_gc=True))

    # NOTE: pytest regroups tests by their fixtures; back to cell by cell, so that each cell's inputs are made once.
    def place(item: pytest.Item) -> tuple[int, int]:
        params = item.callspec.params
        return run.cells.index(params["inputs"]), run.implementations.index(params["subject"])

    ordered = iter(sorted(measured, key=place))
    items[:] = [next(ordered) if item in measured else item for item in items]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if not run.results:
        return
    terminalreporter.section("median device time" if run.device.type == "cuda" else "median time")
    for row in run.results:
        place = f"{row['pattern']} {row['resolution']} {row['batch']}x{row['heads']}x{row['head_dim']} {row['dtype']}"
        if row["status"] == "ok":
            peak = f"{row['peak_bytes'] / 1e6:8.0f} MB" if row["peak_bytes"] else ""
            rate = f"{row['flops'] / row['ms'] / 1e9:8.2f} TFLOP/s {row['bytes'] / row['ms'] / 1e6:7.0f} GB/s"
            result = f"{row['ms']:9.4f} ms {rate} {peak}"
        else:
            result = f"{row['status']}: {row['reason']}"
        terminalreporter.write_line(f"{place:<42} {row['direction']:<8} {row['impl']:<17} {result}")
    path = run.write()
    terminalreporter.write_line(f"raw results: {path}" if path else "raw results not kept; --output FILE keeps them")


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    return request.config.stash[RUN]


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest, run: Run):
    run.stopwatch  # noqa: B018 - its buffer is held before the first memory reading
    yield Inputs(request.param, run.device)
    release(run.device)


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, run: Run, inputs: Inputs):
    yield examine(request.param, inputs)
    release(run.device)


def _sides(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--sides takes integers and commas, such as 1,2,3,4; got {text!r}") from None


def _rounded(value):
    """Six significant digits are more than any of these is known to."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
