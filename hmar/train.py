"""The training engine: one loop for the tokenizer, HMAR's two stages and VAR.

A Stage (stages.py) says what is trained and with which loss; the Trainer owns everything else: data order, precision,
optimizer, schedule, averaged weights, checkpoints, signals, logs. All that is random in a step (dropped labels, masks,
restarted codes, crops) follows from the seed and the step or the image, or from generators that the checkpoint holds,
so a run that was interrupted goes on to the same weights, bit for bit on one device with deterministic operators.

An output folder holds config.yaml, checkpoints/, metrics.jsonl, tensorboard/ and, once finished, weights/.
Read next: stages.py for what is trained, checkpoint.py for the files, recipe.py for the configuration.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import random
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from hmar import checkpoint
from hmar.codes import CodesFolder
from hmar.data import (
    BrokenImageError,
    EpochSampler,
    leave_signals_to_the_main_process,
    open_dataset,
    to_device,
    without_traceback,
)
from hmar.progress import Display, Logs, StopSignals
from hmar.recipe import TrainConfig, config_mapping, config_yaml, differences, learning_rate, unknown
from hmar.stages import make_stage, parameter_groups

PRECISIONS = ("auto", "fp32", "bf16")
MAX_SKIPPED_IN_A_ROW = 20

# A resumed run may differ from its checkpoint in anything but these.
FIXED_ON_RESUME = ("stage", "seed", "tokenizer", "model", "reconstruction", "ema")


class NonFiniteError(RuntimeError):
    """Loss or gradients became inf or nan; the message names the step."""


class Interrupted(Exception):
    """The run got SIGINT or SIGTERM, finished its step and saved a checkpoint; after the last step, the weights."""

    def __init__(self, signal_number: int, step: int, path: Path, finished: bool = False):
        self.signal_number, self.step, self.path, self.finished = signal_number, step, path, finished
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}, saved {path}")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind; `metrics` is the last row of metrics.jsonl."""

    step: int
    weights: Path
    metrics: Mapping[str, float]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    perceptual: nn.Module | None = None,
) -> TrainResult:
    """Run one stage to its end and write its weights.

    resume goes on from the newest good checkpoint in config.output_dir (from the start if there is none); overwrite
    deletes an earlier run there; without either, an earlier run is an error. Seeds the process's random generators.

    perceptual adds a term to the tokenizer's loss, with the weight config.reconstruction.perceptual: a module of
    (reconstruction, images), both float32 [B, 3, H, W] in [-1, 1], that returns a distance per image or a scalar. It is
    moved to the run's device, frozen and put into eval mode. It is the caller's and no part of the checkpoint: a
    resumed run has to be given the same one again, and is refused without any.

    Raises ValueError for bad input, NonFiniteError, Interrupted after SIGINT or SIGTERM, OSError if nothing can be
    written.
    """
    console = Console(stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True)
    return Trainer(config, resume=resume, overwrite=overwrite, console=console, perceptual=perceptual).run()


class Trainer:
    """One run: holds the model being trained and the position in the run. Use `train` unless you need the parts."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool,
        overwrite: bool,
        console: Console,
        perceptual: nn.Module | None = None,
    ):
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other: one goes on with the run, the other deletes it")
        self.config = config
        self.console = console
        self.folder = Path(config.output_dir)
        self.device = find_device(config.device)
        dtype = find_precision(config.precision, self.device)
        self.autocast = functools.partial(torch.autocast, self.device.type, dtype, enabled=dtype is not None)
        if perceptual is not None and config.stage != "tokenizer":
            raise ValueError(f"a perceptual module has no effect in stage {config.stage}, only in stage tokenizer")
        if not resume:
            make_room(self.folder, overwrite)

        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.dataset = open_images(config)
        self.stage = make_stage(config, self.device, perceptual)
        self.config = config = self.stage.config
        self.stage.module.train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.stage.module, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=self.device.type == "cuda",
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ema = None
        if config.ema:
            self.ema = AveragedModel(self.stage.module, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.step = 0
        self.samples = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.interval = Interval()
        self.last_row: dict[str, float] = {}
        self.rng: dict[str, Any] | None = None
        if resume:
            self._restore()

    def run(self) -> TrainResult:
        """Train from where the run stands to its last step."""
        config = self.config
        dataset = self.stage.prepare(self.dataset, self.console)
        batches = load_batches(dataset, config, self.samples, self.device)
        self.stage.compile(config.compile)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            StopSignals() as stop,
            Logs(self.folder, self.step) as logs,
            Display(self.console, config, self.step) as display,
            contextlib.closing(batches),
        ):
            with checkpoint.replacing(self.folder / "config.yaml") as temporary:
                temporary.write_text(config_yaml(config), encoding="utf-8")
            # Last of all, so that nothing of the set-up draws from the generators of a resumed run.
            if self.rng is not None:
                checkpoint.set_rng_state(self.rng)
            self.interval.started = time.perf_counter()
            while self.step < config.steps:
                self._advance(*next(batches))
                at_end = self.step == config.steps
                if self.step % config.log_every == 0 or at_end:
                    self.last_row = self._row()
                    logs.write(self.step, self.last_row)
                    display.show(self.step, self.last_row)
                display.advance(self.step)
                if self.step % config.checkpoint_every == 0 or at_end or stop.received:
                    path = self._save()
                if stop.received and not at_end:
                    raise Interrupted(stop.received, self.step, path)
            weights = self._write_weights()
            if stop.received:  # the caller may have more to run, and must not
                raise Interrupted(stop.received, self.step, weights, finished=True)
        return TrainResult(self.step, weights, self.last_row)

    def _advance(self, batch: Tensor, classes_B: Tensor) -> None:
        """One optimisation step on images [B, 3, H, W] or codes [B, L] and their classes [B]."""
        config, optimizer = self.config, self.optimizer
        lr = learning_rate(
            self.step,
            steps=config.steps,
            peak=config.optimizer.lr,
            warmup=config.optimizer.warmup,
            flat=config.optimizer.flat,
            start_ratio=config.optimizer.start_ratio,
            final_ratio=config.optimizer.final_ratio,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = step_generator(config.seed, self.step)
        with self.autocast():
            loss, parts = self.stage.loss(batch, classes_B, generator, self.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip or math.inf)
        loss_value, norm_value, *part_values = torch.stack(
            [value.detach().float() for value in (loss, norm, *parts.values())]
        ).tolist()
        problem = _not_finite({"the loss": loss_value, "the gradient's norm": norm_value})
        if problem is None:
            optimizer.step()
            with self.autocast():
                after = self.stage.after_step(optimizer, self.ema, generator, self.step)
            if self.ema is not None:
                self.ema.update_parameters(self.stage.module)
            row = {"loss": loss_value, "grad_norm": norm_value, **dict(zip(parts, part_values, strict=True))}
            problem = _not_finite({f"the {name.replace('_', ' ')}": value for name, value in after.items()})
            self.interval.add({**row, **after} if problem is None else row)
        if problem is None:
            self.skipped_in_a_row = 0
        else:
            self._skip(problem)
        optimizer.zero_grad(set_to_none=True)
        self.interval.lr = lr
        self.interval.images += len(classes_B)
        self.samples += len(classes_B)
        self.step += 1

    def _skip(self, what: str) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.config.on_nonfinite == "raise":
            raise NonFiniteError(
                f"{what} at step {self.step}: the run stops here; checkpoints before it are in "
                f"{self.folder / 'checkpoints'}. A lower optimizer.lr or precision=fp32 may help; on_nonfinite=skip "
                "leaves such steps out"
            )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{what} at step {self.step}, the {MAX_SKIPPED_IN_A_ROW}th in a row: the run stops here"
            )

    def _row(self) -> dict[str, float]:
        """The averages since the last row; starts a new interval."""
        row = self.interval.averages()
        row["tokens_per_second"] = row["images_per_second"] * self.config.model.pyramid.length
        row["skipped_steps"] = self.skipped
        if self.config.data.on_error == "skip":
            row["skipped_images"] = len(getattr(self.dataset, "skipped", ()))
        self.interval = Interval()
        return row

    def _save(self) -> Path:
        state = {
            "config": json.dumps(config_mapping(self.config)),
            "samples": self.samples,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "sources": self.stage.sources,
            "model": self.stage.module.state_dict(),
            "stage": self.stage.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "interval": self.interval.state(),
            "last_row": self.last_row,
            "rng": checkpoint.rng_state(),
        }
        return checkpoint.save_checkpoint(self.folder / "checkpoints", state, self.step, self.config.keep)

    def _restore(self) -> None:
        folder = self.folder / "checkpoints"
        damaged = []
        found = checkpoint.newest_checkpoint(folder, damaged.append)
        for error in damaged:
            self.console.print(f"{error}; passed over", style="yellow")
        if found is None and damaged:
            raise ValueError(f"no checkpoint in {folder} is whole: start again with --overwrite (overwrite=True)")
        if found is None:
            self.console.print(f"no checkpoint in {folder}: starting from the beginning")
            return
        path, state = found
        self._compare(path, json.loads(state["config"]), state["sources"])
        self.stage.module.load_state_dict(state["model"])
        self.stage.load_state_dict(state["stage"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.samples = state["step"], state["samples"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.interval.load_state(state["interval"])
        self.last_row = state["last_row"]
        self.rng = state["rng"]
        going_on = "the run is complete" if self.step >= self.config.steps else "going on"
        self.console.print(f"{going_on}: {path} holds the state after step {self.step}")

    def _compare(self, path: Path, saved: Mapping[str, Any], sources: Mapping[str, str]) -> None:
        """Refuse to go on as another run; name what else differs."""
        current = config_mapping(self.config)
        for name in FIXED_ON_RESUME:
            if current[name] != saved.get(name):
                difference = "; ".join(differences({name: saved.get(name)}, {name: current[name]}))
                raise ValueError(f"cannot go on from {path} with another configuration: {difference}")
        for name in ("name", "size"):
            if current["data"][name] != saved["data"][name]:
                raise ValueError(
                    f"cannot go on from {path} with other data: data.{name} was {saved['data'][name]}, "
                    f"now {current['data'][name]}"
                )
        for name, sha256 in self.stage.sources.items():
            if sources.get(name) != sha256:
                raise ValueError(
                    f"cannot go on from {path}: the files in {name}={attrgetter(name)(self.config)} are not those that "
                    "the run began with"
                )
        for difference in differences(saved, current):
            self.console.print(f"this part of the run differs from the part before: {difference}", style="yellow")

    def _write_weights(self) -> Path:
        module = self.stage.module if self.ema is None else self.ema.module
        class_names = list(self.dataset.class_names)
        return self.stage.write(self.folder / "weights", module, steps=self.step, class_names=class_names)


class Interval:
    """What is averaged from one row of the log to the next: sums and counts by name."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.images = 0
        self.lr = 0.0
        self.started = time.perf_counter()

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def averages(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        row = {name: total / self.counts[name] for name, total in self.sums.items()}
        return {**row, "lr": self.lr, "images_per_second": self.images / seconds}

    def state(self) -> dict[str, Any]:
        """All but the clock and the images counted by it."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def find_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N"; ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device="{name}" is not a device: expected auto, cpu, cuda or cuda:N') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device="{name}" is not supported: expected auto, cpu, cuda or cuda:N')
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f'device="{name}" is not there: torch finds {torch.cuda.device_count()} GPUs; use device=cpu')
    return device


def find_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, None for float32: "auto" is bf16 on GPUs that have it and float32 on the CPU.

    Raises ValueError for a name that is not known.
    """
    if name not in PRECISIONS:
        raise ValueError(unknown("precision", name, PRECISIONS))
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16}[name]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of one step's draws: a function of seed and step alone."""
    words = np.random.SeedSequence((seed, step)).generate_state(2, np.uint32).tolist()
    return torch.Generator().manual_seed(words[0] << 32 | words[1])


def open_images(config: TrainConfig) -> Dataset:
    """The training split that config.data describes."""
    data = config.data
    if data.name == "codes":
        return CodesFolder(data.path, on_error=data.on_error)
    return open_dataset(
        data.name, size=data.size, split="train", path=data.path, on_error=data.on_error, seed=config.seed
    )


def load_batches(
    dataset: Dataset, config: TrainConfig, start: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end from the start-th sample of the run on; the same ones for any number of workers."""
    loader = DataLoader(
        dataset,
        config.batch_size,
        sampler=EpochSampler(len(dataset), config.seed, start),
        num_workers=config.data.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
        # NOTE: without a generator of its own the loader draws from the global one, and a resumed run draws once more.
        generator=torch.Generator().manual_seed(config.seed),
    )
    batches = iter(loader)
    try:
        yield from to_device(batches, device)
    except BrokenImageError as error:
        raise without_traceback(error) from error
    finally:
        # NOTE: an exception's traceback keeps the iterator alive, and with it its workers, which take no signals.
        if config.data.workers:
            batches._shutdown_workers()


def make_room(folder: Path, overwrite: bool) -> None:
    """Make sure that no earlier run is in the folder; with overwrite, delete its files and nothing else.

    A run that failed before its first checkpoint left nothing to go on with: what it logged is deleted.
    """
    ours = [folder / name for name in ("config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "weights")]
    found = [path for path in ours if path.exists()]
    if not found:
        return
    # Without metrics.jsonl, which every run begins with, config.yaml may be anybody's.
    logged = (folder / "metrics.jsonl").exists()
    left_over = logged and not checkpoint.checkpoints(folder / "checkpoints") and not (folder / "weights").exists()
    if not overwrite and not left_over:
        raise ValueError(
            f"{folder} already holds a run ({', '.join(path.name for path in found)}): go on with it by --resume, "
            "delete it by --overwrite, or choose another output_dir"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _not_finite(values: Mapping[str, float]) -> str | None:
    """The first of the named values that is inf or nan, in words."""
    return next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)
