"""The training engine: one loop for the tokenizer, HMAR's two stages and VAR, in one process or in many.

A Stage (stages.py) says what is trained and with which loss; the Trainer owns everything else: data order, precision,
optimizer, schedule, averaged weights, checkpoints, signals, logs. All that is random in a step (dropped labels, drop
paths, masks, restarted codes, crops) follows from the seed and the step or the image, or from generators that the
checkpoint holds, so a run that was interrupted goes on to the same weights, bit for bit on one device with
deterministic operators, and the number of processes changes rounding only.

The host never waits for the device within a step, nor on one GPU the device for the host, if forward and backward are
to be one CUDA graph (cuda_graphs.py). Figures are read when a row of the log is due, every 100 steps and before a
checkpoint. Steps that are not finite have changed nothing by then (optimizer.py); only the tokenizer's host has to know
at once, because it moves codes after a step.

An output folder holds config.yaml, checkpoints/, metrics.jsonl, tensorboard/ and, once finished, weights/.
Read next: stages.py for what is trained, optimizer.py for the end of a step, parallelize.py, cuda_graphs.py and
processes.py for what is put around the model, checkpoint.py for the files, recipe.py for the configuration.
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
from torch.utils.data import DataLoader, Dataset

from hmar import checkpoint
from hmar.codes import CodesFolder
from hmar.cuda_graphs import CapturedStep, Recorder
from hmar.data import (
    BrokenImageError,
    EpochSampler,
    leave_signals_to_the_main_process,
    open_dataset,
    to_device,
    without_traceback,
)
from hmar.flops import training_flops, utilization
from hmar.optimizer import AveragedWeights, LossScale, Optimizer, assign, finite, whole
from hmar.parallelize import Parallel, checkpoint_activations, compile_objective, narrow_residual_stream
from hmar.processes import Processes, find_device
from hmar.progress import Display, Logs, StopSignals
from hmar.recipe import TrainConfig, config_mapping, config_yaml, differences, learning_rate, unknown, with_steps
from hmar.sharded import load_tensors, save_sharded
from hmar.stages import Draws, make_stage, parameter_groups

PRECISIONS = ("auto", "fp32", "bf16")
MAX_SKIPPED_IN_A_ROW = 20
MAX_STEPS_UNREAD = 100

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

    Under torchrun this is one of several processes that share the run: see config.parallel. All of them return, or
    raise.

    Raises ValueError for bad input, NonFiniteError, Interrupted after SIGINT or SIGTERM, OSError if nothing can be
    written.
    """
    processes = Processes.join()
    try:
        quiet = not progress or not processes.first
        console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        return Trainer(
            config,
            resume=resume,
            overwrite=overwrite,
            console=console,
            perceptual=perceptual,
            processes=processes,
        ).run()
    except Interrupted:
        raise
    except BaseException as error:
        processes.fail(error)
        raise
    finally:
        processes.close()


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
        processes: Processes | None = None,
    ):
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other: one goes on with the run, the other deletes it")
        self.processes = processes = processes or Processes()
        self.console = console
        self.folder = Path(config.output_dir)
        self.device = find_device(config.device, processes)
        check_division(config, processes)
        captures = captures_steps(config, self.device, processes)
        dtype = find_training_precision(config.precision, self.device)
        self.dtype = dtype
        self.autocast = functools.partial(torch.autocast, self.device.type, dtype, enabled=dtype is not None)
        if perceptual is not None and config.stage != "tokenizer":
            raise ValueError(f"a perceptual module has no effect in stage {config.stage}, only in stage tokenizer")
        if not resume:
            processes.first_does(lambda: make_room(self.folder, overwrite))

        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.dataset = open_images(config)
        self.stage = make_stage(with_steps(config, len(self.dataset)), self.device, perceptual)
        self.config = config = self.stage.config
        self.stage.module.train()
        self.flops = None if config.stage == "tokenizer" else training_flops(self.stage.module)
        if narrows_residual_stream(config, dtype):
            narrow_residual_stream(self.stage.objective, torch.bfloat16)
        checkpoint_activations(self.stage.objective, config.activation_checkpointing)
        compile_objective(self.stage.objective, config.compile)
        self.parallel = Parallel(self.stage.objective, config.parallel, config.shard_size, processes, dtype, captures)
        self.stage.forward = self.parallel.forward
        self.loss_scale = LossScale(dtype == torch.float16, self.device)
        self.optimizer = Optimizer(
            parameter_groups(self.stage.module, config.optimizer.weight_decay),
            config.optimizer,
            self.loss_scale,
            self.parallel.total_norm,
        )
        self.averaged = AveragedWeights(self.stage.module, config.ema) if config.ema else None
        recorder = Recorder(self.device) if captures else None
        self.micro_batch = CapturedStep(self.stage.modules, recorder)
        self.step = 0
        self.samples = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.unread: list[tuple[int, tuple[str, ...], Tensor, Mapping[str, float]]] = []
        self.interval = Interval()
        self.last_row: dict[str, float] = {}
        self.rng: dict[str, Any] | None = None
        if resume:
            self._restore()

    def run(self) -> TrainResult:
        """Train from where the run stands to its last step."""
        config, processes = self.config, self.processes
        dataset = self.stage.prepare(self.dataset, self.console)
        batches = load_batches(dataset, config, self.samples, self.device, processes)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            StopSignals() as stop,
            Logs(self.folder, self.step) if processes.first else contextlib.nullcontext() as logs,
            Display(self.console, config, self.step) as display,
            contextlib.closing(batches),
            contextlib.ExitStack() as at_end,
        ):
            at_end.callback(self.micro_batch.forget)
            if processes.first:
                checkpoint.delete_temporaries(self.folder)
                checkpoint.delete_temporaries(self.folder / "weights")
                with checkpoint.replacing(self.folder / "config.yaml") as temporary:
                    temporary.write_text(config_yaml(config), encoding="utf-8")
            # Last of all, so that nothing of the set-up draws from the generators of a resumed run.
            if self.rng is not None:
                checkpoint.set_rng_state(self.rng)
            self.interval.start(self.device)
            while self.step < config.steps:
                self._advance(*next(batches))
                at_end = self.step == config.steps
                if self.step % config.log_every == 0 or at_end:
                    self.last_row = self._row()
                    if logs is not None:
                        logs.write(self.step, self.last_row)
                    display.show(self.step, self.last_row)
                display.advance(self.step)
                signal_number = processes.agree(stop.received)
                if self.step % config.checkpoint_every == 0 or at_end or signal_number:
                    path = self._save()
                if signal_number and not at_end:
                    raise Interrupted(signal_number, self.step, path)
            weights = self._write_weights()
            if signal_number := processes.agree_now(stop.received):  # the caller may have more to run, and must not
                raise Interrupted(signal_number, self.step, weights, finished=True)
        return TrainResult(self.step, weights, self.last_row)

    def _advance(self, batch: Tensor, classes_B: Tensor) -> None:
        """One optimisation step on images [B, 3, H, W] or codes [B, L] and their classes [B]: this process's share."""
        config, stage = self.config, self.stage
        lr = learning_rate(
            self.step,
            steps=config.steps,
            peak=config.optimizer.lr,
            warmup=config.optimizer.warmup,
            flat=config.optimizer.flat,
            start_ratio=config.optimizer.start_ratio,
            final_ratio=config.optimizer.final_ratio,
        )
        draws = stage.draw(step_generator(config.seed, self.step), config.batch_size)
        own = self.processes.share(config.batch_size)
        size = len(classes_B) // config.accumulate
        figures = []
        for i in range(config.accumulate):
            images = slice(i * size, (i + 1) * size)
            micro = draws.of(slice(own.start + images.start, own.start + images.stop), self.device)
            arguments = (batch[images], classes_B[images], micro.dropped_B, micro.drop_path_DB, micro.masked_L)
            with self.parallel.synchronizing(i == config.accumulate - 1) as averaged:
                names, values = self.micro_batch(self._forward_backward, *arguments, accumulate=i > 0, kind=averaged)
            figures.append(values)
        figures = self.processes.mean(torch.stack(figures).mean(0))
        norm, found_inf = self.optimizer.step(figures[0], lr)
        after = {}
        if stage.after_step is not None and not found_inf.item():
            with self.autocast():
                after = stage.after_step(self.optimizer, self.averaged, draws, self.step)
        if self.averaged is not None:
            self.averaged.update(found_inf)
        self.unread.append((self.step, (*names, "grad_norm"), torch.cat([figures, norm[None]]), after))
        self.interval.lr = lr
        self.interval.images += config.batch_size
        self.samples += config.batch_size
        self.step += 1
        if len(self.unread) == MAX_STEPS_UNREAD:
            self._read()

    def _forward_backward(
        self,
        batch: Tensor,
        classes_B: Tensor,
        dropped_B: Tensor | None,
        drop_path_DB: Tensor | None,
        masked_L: Tensor | None,
    ) -> tuple[tuple[str, ...], Tensor]:
        """A micro-batch, whose gradients are added to those that are there: names and values of what is logged.

        May be captured into a CUDA graph: all that differs from step to step is in the arguments or on the device.
        """
        with self.autocast():
            loss, parts = self.stage.loss(batch, classes_B, Draws(dropped_B, drop_path_DB, masked_L), self.step)
        self.parallel.backward(loss * (self.loss_scale.value / self.config.accumulate))
        return ("loss", *parts), torch.stack([value.detach().float() for value in (loss, *parts.values())])

    def _read(self) -> None:
        """Wait for the device and take over the figures of the steps since the last time; NonFiniteError by them."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        values = iter(torch.cat([figures for _, _, figures, _ in unread]).tolist())
        for step, names, _, after in unread:
            row = {name: next(values) for name in names}
            problem = _not_finite({"the loss": row["loss"], "the gradient's norm": row["grad_norm"]})
            if problem is None:
                problem = _not_finite({f"the {name.replace('_', ' ')}": value for name, value in after.items()})
                self.interval.add({**row, **after} if problem is None else row)
            if problem is None:
                self.skipped_in_a_row = 0
            else:
                # A gradient too large for fp16 only tells that the loss was scaled too much.
                self._skip(problem, step, overflow=self.loss_scale.enabled and math.isfinite(row["loss"]))

    def _skip(self, what: str, step: int, overflow: bool) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.config.on_nonfinite == "raise" and not overflow:
            raise NonFiniteError(
                f"{what} at step {step}: the run stops here; checkpoints before it are in "
                f"{self.folder / 'checkpoints'}. A lower optimizer.lr or precision=fp32 may help; on_nonfinite=skip "
                "leaves such steps out"
            )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(f"{what} at step {step}, the {MAX_SKIPPED_IN_A_ROW}th in a row: the run stops here")

    def _row(self) -> dict[str, float]:
        """The averages since the last row; starts a new interval."""
        self._read()
        row = self.interval.averages()
        row["tokens_per_second"] = row["images_per_second"] * self.config.model.pyramid.length
        if self.flops is not None:
            flops_per_second = row["images_per_second"] * self.flops / self.processes.size
            row["model_tflops_per_second"] = flops_per_second / 1e12
            mfu = utilization(flops_per_second, self.device, self.dtype)
            if mfu is not None:
                row["mfu"] = mfu
        if self.device.type == "cuda":
            row["peak_memory_gb"] = self.micro_batch.peak_bytes(self.device) / 1e9
        if self.loss_scale.enabled:
            row["loss_scale"] = self.loss_scale.value.item()
        row["skipped_steps"] = self.skipped
        if self.config.data.on_error == "skip":
            row["skipped_images"] = len(getattr(self.dataset, "skipped", ()))
        self.interval = Interval()
        self.interval.start(self.device)
        return row

    def _save(self) -> Path:
        self._read()
        if self.processes.mean(finite(self.optimizer.parameters).float()).item() != 1:
            raise NonFiniteError(
                f"a weight is not finite after step {self.step}: the run stops here; checkpoints before it are in "
                f"{self.folder / 'checkpoints'}"
            )
        folder = self.folder / "checkpoints"
        state = {
            "config": json.dumps(config_mapping(self.config)),
            "samples": self.samples,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "sources": self.stage.sources,
            "stage": self.stage.state_dict(),
            "interval": self.interval.state(),
            "last_row": self.last_row,
            "rng": checkpoint.rng_state(),
        }
        if self.parallel.sharded:
            return save_sharded(folder, self._tensors(), state, self.step, self.config.keep, self.processes)
        model = self.stage.module.state_dict()
        state |= {"model": model, "optimizer": self.optimizer.adamw.state_dict(), "ema": None}
        state["loss_scale"] = self.loss_scale.state_dict()
        if self.averaged is not None:
            # In the names of torch's AveragedModel, with the frozen weights as their own average.
            averages = self.averaged.averages
            state["ema"] = {f"module.{name}": averages.get(name, tensor) for name, tensor in model.items()}
            state["ema"]["n_averaged"] = self.averaged.num_averaged
        return self.processes.first_does(lambda: checkpoint.save_checkpoint(folder, state, self.step, self.config.keep))

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of the run where they lie, by the names that they have in a sharded checkpoint."""
        module = self.stage.module
        tensors = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            for entry, tensor in self.optimizer.adamw.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{entry}"] = tensor
        tensors |= {f"loss_scale.{name}": tensor for name, tensor in self.loss_scale.state_dict().items()}
        if self.averaged is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.averaged.averages.items()}
            tensors["ema.n_averaged"] = self.averaged.num_averaged
        return tensors

    def _restore(self) -> None:
        folder = self.folder / "checkpoints"
        states: dict[Path, dict[str, Any]] = {}

        def find() -> tuple[Path | None, list[str]]:
            damaged: list[str] = []
            found = checkpoint.newest_checkpoint(folder, lambda error: damaged.append(str(error)))
            if found is None:
                return None, damaged
            path, states[path] = found
            return path, damaged

        path, damaged = self.processes.first_does(find)
        for error in damaged:
            self.console.print(f"{error}; passed over", style="yellow")
        if path is None and damaged:
            raise ValueError(f"no checkpoint in {folder} is whole: start again with --overwrite (overwrite=True)")
        if path is None:
            self.console.print(f"no checkpoint in {folder}: starting from the beginning")
            return
        is_sharded = path.is_dir()
        if path not in states:
            states[path] = checkpoint.load_checkpoint(path)
        state = states.pop(path)
        self._compare(path, json.loads(state["config"]), state["sources"])
        self.stage.load_state_dict(state["stage"])
        if is_sharded:
            load_tensors(path, self._tensors())
        else:
            self._load_whole(state)
        self.step, self.samples = state["step"], state["samples"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.interval.load_state(state["interval"])
        self.last_row = state["last_row"]
        self.rng = state["rng"]
        going_on = "the run is complete" if self.step >= self.config.steps else "going on"
        self.console.print(f"{going_on}: {path} holds the state after step {self.step}")

    def _load_whole(self, state: Mapping[str, Any]) -> None:
        """The tensors of a checkpoint of one file."""
        for name, tensor in self.stage.module.state_dict().items():
            assign(tensor, state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if "loss_scale" in state:
            self.loss_scale.load_state_dict(state["loss_scale"])
        if self.averaged is not None:
            self.averaged.load(state["ema"])

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
        state = self.stage.module.state_dict()
        if self.averaged is not None:
            state |= self.averaged.averages
        state = {name: whole(tensor).cpu() for name, tensor in state.items()}
        class_names = list(self.dataset.class_names)
        return self.processes.first_does(
            lambda: self.stage.write(self.folder / "weights", state, steps=self.step, class_names=class_names)
        )


class Interval:
    """What is averaged from one row of the log to the next: sums and counts by name."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.images = 0
        self.lr = 0.0
        self.started = time.perf_counter()

    def start(self, device: torch.device) -> None:
        """Start the clock, and the watch over the device's memory."""
        self.started = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

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


def find_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, None for float32: "auto" is bf16 on GPUs that have it and float32 on the CPU.

    Raises ValueError for a name that is not known.
    """
    if name not in PRECISIONS:
        raise ValueError(unknown("precision", name, PRECISIONS))
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16}[name]


def find_training_precision(name: str, device: torch.device) -> torch.dtype | None:
    """`find_precision`, and "fp16", whose loss has to be scaled."""
    return torch.float16 if name == "fp16" else find_precision(name, device)


def narrows_residual_stream(config: TrainConfig, dtype: torch.dtype | None) -> bool:
    """Whether a run that computes in `dtype` has a bfloat16 residual stream; ValueError if it cannot but is to."""
    possible = dtype == torch.bfloat16 and config.stage != "tokenizer"
    if config.residual_precision == "bf16" and not possible:
        raise ValueError(
            f"residual_precision=bf16 is for transformers that compute in bf16, got stage={config.stage} "
            f"precision={config.precision} on {config.device}: leave it out, or set precision=bf16"
        )
    return possible and config.residual_precision != "fp32"


def captures_steps(config: TrainConfig, device: torch.device, processes: Processes) -> bool:
    """Whether forward and backward run as CUDA graphs; ValueError if they cannot but are to."""
    shared = processes.size > 1
    possible = device.type == "cuda" and config.stage != "tokenizer" and (not shared or config.parallel == "ddp")
    if config.cuda_graphs is True and not possible:
        ways = f"parallel={config.parallel} of {processes.size} processes" if shared else "one process"
        raise ValueError(
            f"cuda_graphs=true is for GPUs that share nothing but gradients, got {ways} on {device}: auto is on "
            "wherever it can be, as with parallel=ddp"
        )
    return possible and config.cuda_graphs is not False


def check_division(config: TrainConfig, processes: Processes) -> None:
    """ValueError unless the processes can share a batch equally, in micro-batches, and the stage can be shared."""
    if processes.size == 1:
        return
    if config.stage == "tokenizer":
        raise ValueError(
            f"stage tokenizer trains in one process, not in {processes.size}: its adversary and restarted codes look "
            "at whole batches"
        )
    parts = processes.size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} is that of all {processes.size} processes, expected a multiple of "
            f"{parts} (processes x accumulate), such as {max(1, config.batch_size // parts) * parts}"
        )
    if config.parallel != "ddp" and config.compile == "model":
        raise ValueError(
            f"compile=model and parallel={config.parallel} exclude each other: shards are gathered between blocks, "
            "where one graph for all cannot be; use compile=blocks"
        )
    shard = config.shard_size or processes.per_host
    if config.parallel == "hsdp" and processes.size % shard:
        raise ValueError(f"shard_size={shard} does not divide the {processes.size} processes")


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
    dataset: Dataset, config: TrainConfig, start: int, device: torch.device, processes: Processes
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end from the start-th sample of the run on, this process's share of each; the same ones for any
    number of workers."""
    division = {"rank": processes.rank, "world_size": processes.size, "batch_size": config.batch_size}
    loader = DataLoader(
        dataset,
        config.batch_size // processes.size,
        sampler=EpochSampler(len(dataset), config.seed, start, **division),
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
