"""Options of the benchmarks, the fixtures that share one cell's inputs, and what a run still has to measure.

Read next: `attention_results.py` (the raw JSON), `supervisor.py` (the process that starts the measuring one again if
it dies).
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from argparse import SUPPRESS
from pathlib import Path

import pytest
import torch

from . import attention_results, options, results, rivals, shapes, supervisor
from .attention_results import AttentionResults
from .environment import ceilings, environment
from .subject import DIRECTIONS, Inputs, Subject, device_is_lost, examine, release
from .timing import Stopwatch, clock, quantile

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "reports" / "data"
RUN = pytest.StashKey["Run"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention benchmarks", "lists are separated by commas")

    def takes_list(name: str, kind, help: str) -> None:
        group.addoption(name, action="extend", type=kind, metavar="A,B,...", help=help)

    group.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the harness on a tiny pyramid")
    takes_list("--impl", options.names, f"default: all but reference; known: {', '.join(rivals.IMPLEMENTATIONS)}")
    group.addoption("--rival", action="append", default=[], type=Path, metavar="FILE.py", help="see bench/rivals.py")
    takes_list("--patterns", options.names, f"default: {','.join(shapes.PATTERNS)}; known too: window_N")
    takes_list("--resolutions", options.integers, "pixels; default: 256,512,1024")
    group.addoption("--sides", type=options.integers, metavar="N,N,...", help="a pyramid, not --resolutions")
    takes_list("--batches", options.batches, f"images; default: {shapes.ANCHOR}, that of the resolution")
    group.addoption("--heads", type=int, help="default: those of the resolution, halved at head dim 128")
    takes_list("--head-dims", options.integers, "default: 64,128")
    takes_list("--directions", options.directions, f"default: {','.join(DIRECTIONS)}")
    group.addoption("--dtype", choices=tuple(shapes.DTYPES), default="bfloat16")
    group.addoption("--full", action="store_true", help="batches 8 and 1, and masks of densities in between, as well")
    group.addoption(
        "--seconds", type=options.seconds, default=0.3, help="time to spend on one measurement (default 0.3)"
    )
    group.addoption("--commit", help="commit to record where git cannot be asked")
    group.addoption(
        "--output",
        type=Path,
        metavar="FILE",
        help="raw results; a default run on a GPU goes to reports/data/attention_<gpu>.json without it",
    )
    group.addoption("--continue", action="store_true", help="keep what FILE, or the partial file beside it, holds")
    group.addoption("--minutes", type=float, metavar="M", help="begin nothing new after so long; --continue goes on")
    group.addoption(
        "--patience",
        type=options.seconds,
        default=300.0,
        metavar="S",
        help="kill an implementation silent so long (300 s)",
    )
    group.addoption("--journal", type=Path, help=SUPPRESS)
    group.addoption("--restarted", action="store_true", help=SUPPRESS)


class Run:
    """Choices of this run and the results so far."""

    def __init__(self, config: pytest.Config):
        option = config.getoption
        self.device = torch.device(option("--device"))
        self.missing = None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            self.missing = "no CUDA device; --device cpu tries the harness on a tiny pyramid"
        self.full = option("--full")
        self.everything_of_ours = option("--impl") is None
        try:
            self.cells = shapes.cells(
                patterns=option("--patterns"),
                resolutions=option("--resolutions"),
                sides=option("--sides") and tuple(option("--sides")),
                batches=option("--batches"),
                heads=option("--heads"),
                head_dims=option("--head-dims"),
                dtype=option("--dtype"),
                full=self.full,
                smoke=self.device.type == "cpu",
            )
            self.implementations = rivals.choose(option("--impl"), self.device, option("--rival"))
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        self.directions = [d for d in DIRECTIONS if d in (option("--directions") or DIRECTIONS)]
        self.seconds, self.patience = option("--seconds"), option("--patience")
        self.deadline = time.monotonic() + 60 * option("--minutes") if option("--minutes") is not None else None
        self.commit = option("--commit")
        self.planned: set[tuple] = set()
        narrowed = ("impl", "patterns", "resolutions", "sides", "directions", "batches", "heads", "head_dims")
        self.default = not any(option(name) for name in narrowed) and option("--dtype") == "bfloat16"
        self.output = option("--output")
        self._stopwatch: Stopwatch | None = None
        self.results = AttentionResults(None)

    def journal(self, folder: Path) -> Path:
        """Where results go while the run goes on. A part of a run is kept only where that was asked for."""
        if self.output:
            return results.partial_of(self.output)
        if self.default and self.device.type == "cuda":
            return results.partial_of(DATA / "attention.json")
        return folder / "results.json"

    def destination(self) -> Path | None:
        """Where complete results go; None when nobody wants to keep them."""
        if self.output or self.device.type != "cuda" or not self.default:
            return self.output
        gpu = self.results.head["environment"]["gpu"].lower()
        return DATA / f"attention_{re.sub(r'[^a-z0-9]+', '_', gpu).strip('_')}.json"

    def open(self, journal: Path, keep: bool, restarted: bool) -> None:
        """Take over what an earlier process measured, or begin anew. UsageError when that does not fit together."""
        facts = environment(self.device, self.commit)
        sources = [path for path in (journal, self.output) if path is not None and path.is_file()]
        try:
            if keep and sources:
                self.results = AttentionResults.read(sources[0], journal)
                self.results.check_environment(facts)
                if not restarted:
                    self.results.keep(lambda row: self.is_valid(row, facts["commit"]))
                    self.results.running = []
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        self.results.path = journal
        self.results.head = {
            "environment": facts,
            "ceilings": self.results.head.get("ceilings") or ceilings(self.stopwatch),
            "method": {
                "clock": "device events" if self.device.type == "cuda" else "host clock",
                "seconds_per_measurement": self.seconds,
                "layout": "[B,L,H,D] memory seen as [B,H,L,D]",
                "inputs": "standard normal, scale 1/sqrt(D)",
            },
        }

    @staticmethod
    def is_valid(row: dict, commit: str | None) -> bool:
        """Whether --continue keeps a row: it was measured, and, where it is of ours, on the code of now."""
        return row["status"] == "ok" and (not row["ours"] or row["commit"] == commit)

    @property
    def stopwatch(self) -> Stopwatch:
        """Made on first use: it takes device memory."""
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(self.device)
        return self._stopwatch

    def includes(self, cell: shapes.Cell, implementation: rivals.Implementation) -> bool:
        slow_here = implementation.slow and cell.head_dim != shapes.HEAD_DIM
        return self.full or not slow_here or not self.everything_of_ours

    def without_numbers(self, subject: Subject, direction: str) -> dict:
        name, ours = subject.implementation.name, subject.implementation.ours
        status, reason = subject.status, subject.reason
        return attention_results.row_without_numbers(subject.inputs.cell, name, ours, direction, status, reason)

    def begin(self, cell: shapes.Cell, implementation: rivals.Implementation) -> None:
        """Say what is at work, so that it is known if this process does not survive it."""
        rows = [
            attention_results.row_without_numbers(cell, implementation.name, implementation.ours, d, "crashed", None)
            | {"commit": self.results.head["environment"]["commit"]}
            for d in self.directions
            if attention_results.key(cell, implementation.name, d) in self.planned - set(self.results.rows)
        ]
        self.results.begin(rows)

    def add(
        self, subject: Subject, direction: str, samples: list[float] | None = None, host_seconds: float | None = None
    ) -> None:
        milliseconds = [1e3 * s for s in samples] if samples else None
        measured = {
            "commit": self.results.head["environment"]["commit"],
            "ms": quantile(milliseconds, 0.5) if samples else None,
            "p10_ms": quantile(milliseconds, 0.1) if samples else None,
            "p90_ms": quantile(milliseconds, 0.9) if samples else None,
            "rounds": len(samples) if samples else None,
            "host_us": 1e6 * host_seconds if host_seconds is not None else None,
            "first_call_s": subject.first_call_seconds,
            "peak_bytes": subject.peak_bytes[direction],
            "extra_bytes": subject.extra_bytes[direction],
            "check": subject.deviations,
        }
        self.results.add(self.without_numbers(subject, direction) | measured)

    def add_failure(self, subject: Subject, direction: str) -> None:
        """Record what went wrong. Where the device went with it, this process ends and its supervisor goes on."""
        self.add(subject, direction)
        if subject.status == "failed" and device_is_lost(self.device):
            for row in list(self.results.running):
                self.add(subject, row["direction"])
            print(f"\n{subject.implementation.name} took the device down: {subject.reason}", flush=True)
            os._exit(supervisor.START_AGAIN)

    def broken_rivals(self) -> dict[str, list[str]]:
        """Why those given by a file failed or crashed, for each row of a name. No memory is no failure."""
        found: dict[str, list[str]] = {}
        for row in self.results.rows.values():
            if row["impl"] not in rivals.IMPLEMENTATIONS and row["status"] in ("failed", "crashed"):
                found.setdefault(row["impl"], []).append(row["reason"])
        return found

    def close(self) -> str:
        """Put complete results where they are wanted; says where they are."""
        path = self.destination()
        if self.planned <= set(self.results.rows):
            if path is None:
                return "raw results not kept; --output FILE keeps them"
            self.results.finish(path)
            return f"raw results: {path}"
        if path is None:
            return "incomplete, not kept; --output FILE keeps raw results"
        return f"incomplete: {self.results.path}; the same command with --continue goes on"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Measure in a process of its own, and start it again where an implementation took it down."""
    chosen = config.option
    elsewhere = ("help", "version", "collectonly", "markers", "showfixtures", "show_fixtures_per_test", "cacheshow")
    if chosen.journal or any(getattr(chosen, name, False) for name in elsewhere):
        return None
    run = Run(config)
    if run.missing:
        return None
    command = ["-m", "pytest", *config.invocation_params.args]
    with tempfile.TemporaryDirectory() as folder:
        journal = run.journal(Path(folder).resolve()).absolute()
        if not getattr(chosen, "continue"):
            journal.unlink(missing_ok=True)
        elif not journal.is_file() and not (run.output and run.output.is_file()):
            raise pytest.UsageError(f"--continue: neither {journal} nor the file of --output is there to go on from")
        return supervisor.supervise(command, journal, run.patience, config.invocation_params.dir)


def pytest_configure(config: pytest.Config) -> None:
    run = config.stash[RUN] = Run(config)
    if journal := config.getoption("--journal"):
        supervisor.end_with_parent()
        restarted = config.getoption("--restarted")
        run.open(journal, keep=config.getoption("--continue") or restarted, restarted=restarted)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    run = metafunc.config.stash[RUN]
    if "inputs" in metafunc.fixturenames:
        metafunc.parametrize("inputs", run.cells, indirect=True, ids=str, scope="module")
        metafunc.parametrize("subject", run.implementations, indirect=True, ids=lambda i: i.name, scope="module")
        metafunc.parametrize("direction", run.directions)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run = config.stash[RUN]
    measured, wanted = [], []
    for item in items:
        if item.path.parent != HERE or "subject" not in item.callspec.params:
            continue
        measured.append(item)
        params = item.callspec.params
        key = attention_results.key(params["inputs"], params["subject"].name, params["direction"])
        if run.includes(params["inputs"], params["subject"]):
            run.planned.add(key)
            if key not in run.results.rows:
                wanted.append(item)
    for item in measured:
        if run.missing:
            item.add_marker(pytest.mark.skip(reason=run.missing))
        else:
            item.add_marker(pytest.mark.benchmark(timer=clock(run.device), disable_gc=True))

    # NOTE: pytest regroups tests by their fixtures; back to cell by cell, so that each cell's inputs are made once.
    def place(item: pytest.Item) -> tuple[int, int]:
        params = item.callspec.params
        return run.cells.index(params["inputs"]), run.implementations.index(params["subject"])

    others = [item for item in items if item not in measured]
    left_out = [item for item in measured if item not in wanted]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = [*others, *sorted(wanted, key=place)]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    run = session.config.stash[RUN]
    nothing_left = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and run.planned
    if nothing_left and run.planned <= set(run.results.rows):
        session.exitstatus = pytest.ExitCode.OK
    if run.broken_rivals() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if not run.results.rows:
        return
    terminalreporter.section("median device time" if run.device.type == "cuda" else "median time")
    for row in run.results.rows.values():
        terminalreporter.write_line(_summary_line(row))
    terminalreporter.write_line(run.close())
    for name, reasons in run.broken_rivals().items():
        line = f"error: {name}, given by --rival, failed in {len(reasons)} of the rows above: {reasons[0]}"
        terminalreporter.write_line(line, red=True)


def _summary_line(row: dict) -> str:
    place = f"{row['pattern']} {row['resolution']} {row['batch']}x{row['heads']}x{row['head_dim']} {row['dtype']}"
    if row["status"] == "ok":
        rate = f"{row['flops'] / row['ms'] / 1e9:8.2f} TFLOP/s {row['bytes'] / row['ms'] / 1e6:7.0f} GB/s"
        peak = f"{row['peak_bytes'] / 1e6:8.0f} MB" if row["peak_bytes"] else ""
        result = f"{row['ms']:9.4f} ms {rate} {row['host_us']:7.0f} us host {peak}"
    else:
        result = f"{row['status']}: {row['reason']}"
    return f"{place:<42} {row['direction']:<8} {row['impl']:<17} {result}"


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    return request.config.stash[RUN]


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest, run: Run):
    run.stopwatch  # noqa: B018 - its buffer is held before the first memory reading
    _check_time(run)
    yield Inputs(request.param, run.device)
    release(run.device)


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, run: Run, inputs: Inputs):
    _check_time(run)
    run.begin(inputs.cell, request.param)
    yield examine(request.param, inputs)
    release(run.device)


def _check_time(run: Run) -> None:
    if run.deadline is not None and time.monotonic() > run.deadline:
        pytest.skip("the minutes of this run are over")
