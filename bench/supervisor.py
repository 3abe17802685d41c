"""The process that watches the measuring one: an implementation may crash, hang or take the device down.

The measuring process says in the file of results what is at work (`running`). When it dies, or is silent for too long
and is killed, that is recorded as crashed, and a new process goes on with what is left.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from pathlib import Path

from .attention_results import AttentionResults

START_AGAIN = 75
"""Exit status of a measuring process that has recorded all it knows and cannot go on."""
POLL_SECONDS = 0.2


def supervise(command: list[str], journal: Path, patience: float, folder: Path) -> int:
    """Run `python command --journal FILE` to its end, however many processes that takes; returns the exit status."""
    arguments, failed = [*command, "--journal", str(journal)], False
    while True:
        before = _rows(journal)
        status, silent = _run([sys.executable, *arguments], journal, patience, folder)
        reason = _reason(status, silent, patience)
        if reason is None:
            return 128 - status if status < 0 else status or int(failed)
        recorded = _record_crash(journal, reason)
        if not recorded and _rows(journal) == before:  # it would only happen again
            print(f"the measuring process ended before it measured anything: {reason}", file=sys.stderr)
            return 1
        failed |= any(row["ours"] and row["status"] in ("crashed", "failed") for row in _rows(journal))
        print(f"\ngoing on in a new process: {reason}", file=sys.stderr)
        arguments = [*command, "--journal", str(journal), "--restarted"]


def _run(command: list[str], journal: Path, patience: float, folder: Path) -> tuple[int, bool]:
    """(exit status, whether it was killed because nothing came from it)."""
    process = subprocess.Popen(command, cwd=folder)
    terminate = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    started, silent = time.time(), False
    try:
        while True:
            try:
                return process.wait(POLL_SECONDS), silent
            except subprocess.TimeoutExpired:
                news = max(started, journal.stat().st_mtime if journal.exists() else 0.0)
                if time.time() - news > patience:
                    silent = True
                    process.kill()
            except KeyboardInterrupt:
                continue  # the terminal has sent it to the measuring process too, which ends by itself
    finally:
        signal.signal(signal.SIGTERM, terminate)


def _reason(status: int, silent: bool, patience: float) -> str | None:
    """Why the measuring process has to be started again; None when it came to its end, or somebody ended it."""
    if silent:
        return f"killed: no result within {patience:g} s"
    if status == START_AGAIN:
        return "it left the device unusable"
    if status < 0 and -status not in (signal.SIGINT, signal.SIGTERM):
        return f"the process died of {signal.Signals(-status).name}"
    if status > 5:  # pytest's own go to 5
        return f"the process ended with exit status {status}"
    return None


def _record_crash(journal: Path, reason: str) -> bool:
    """Write crashed rows for what was at work; whether there was anything."""
    if not journal.exists():
        return False
    results = AttentionResults.read(journal, journal)
    running = results.running
    for row in running:
        results.add(row | {"reason": reason})
    return bool(running)


def _rows(journal: Path) -> list[dict]:
    return list(AttentionResults.read(journal, journal).rows.values()) if journal.exists() else []


def end_with_parent() -> None:
    """A measuring process must not outlive its supervisor: it would keep the device. Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
