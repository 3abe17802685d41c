"""What a run shows and hears while it goes on: log files, a progress bar, signals to stop.

Read next: train.py, which uses all of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hmar import checkpoint
from hmar.recipe import TrainConfig

SECONDS_BETWEEN_LINES = 10  # of progress, where the output is not a terminal


class StopSignals:
    """Turns SIGINT and SIGTERM into `received`; a second SIGINT raises KeyboardInterrupt at once."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> StopSignals:
        # Python delivers signals to the main thread only; elsewhere the caller has to stop the run.
        in_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self.previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Logs:
    """metrics.jsonl and TensorBoard, cut back to the step at which the run goes on."""

    def __init__(self, folder: Path, step: int):
        self.path, self.step = folder / "metrics.jsonl", step
        self.tensorboard_folder = folder / "tensorboard"

    def __enter__(self) -> Logs:
        from torch.utils.tensorboard import SummaryWriter

        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] <= self.step]
        with checkpoint.replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.file = open(self.path, "a", encoding="utf-8")
        self.writer = SummaryWriter(str(self.tensorboard_folder), purge_step=self.step + 1)
        return self

    def write(self, step: int, row: Mapping[str, float]) -> None:
        try:
            self.file.write(json.dumps({"step": step, **row}) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"could not write {self.path}: {error}. Checkpoints written before are intact.") from error
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # NOTE: what could not be written cannot be written at the end either; the first error is the one that tells.
        with contextlib.suppress(*(() if error is None else (OSError,))):
            self.file.close()
        with contextlib.suppress(*(() if error is None else (OSError,))):
            self.writer.close()


class Display:
    """A progress bar in a terminal, a line now and then elsewhere; nothing if the console is quiet."""

    def __init__(self, console: Console, config: TrainConfig, step: int):
        self.console, self.config = console, config
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task(config.stage, total=config.steps, completed=step, status="")
        self.first_step, self.started = step, time.monotonic()
        self.last_line = -math.inf

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def show(self, step: int, row: Mapping[str, float]) -> None:
        loss = f"loss {row['loss']:.4g}" if "loss" in row else "no finite loss"
        status = f"{loss}  {row['images_per_second']:.3g} images/s  {row['tokens_per_second']:.3g} tokens/s"
        if "mfu" in row:
            status += f"  MFU {row['mfu']:.1%}"
        if "peak_memory_gb" in row:
            status += f"  {row['peak_memory_gb']:.1f} GB"
        self.bar.update(self.task, status=status)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > SECONDS_BETWEEN_LINES or step == self.config.steps):
            left = (now - self.started) / (step - self.first_step) * (self.config.steps - step)
            self.console.print(f"{self.config.stage} {step}/{self.config.steps}  {status}  {left:.0f} s left")
            self.last_line = now


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def loss_curve(run: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a training run's folder, for plotting."""
    rows = read_metrics(run / "metrics.jsonl")
    return [row["step"] for row in rows], [row["loss"] for row in rows]
