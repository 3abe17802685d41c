"""The training engine: one loop for the tokenizer, HMAR's two stages and VAR.

A Stage says what is trained and with which loss; the Trainer owns everything else: data order, precision, optimizer,
schedule, averaged weights, checkpoints, signals, logs. All that is random in a step (dropped labels, masks, restarted
codes, crops) follows from the seed and the step or the image, or from generators that the checkpoint holds, so a run
that was interrupted goes on to the same weights, bit for bit on one device with deterministic operators.

An output folder holds config.yaml, checkpoints/, metrics.jsonl, tensorboard/ and, once finished, weights/.
Read next: checkpoint.py for the files, loss.py for the losses, recipe.py for the configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from hmar import checkpoint
from hmar.data import BrokenImageError, EpochSampler, open_dataset
from hmar.discriminator import PatchDiscriminator
from hmar.loss import TokenizerLoss, draw_mask, masked_loss, next_scale_loss, token_accuracy, token_weights
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer, drop_classes
from hmar.recipe import STAGES, TrainConfig, config_mapping, config_yaml, find_preset, learning_rate, unknown
from hmar.tokenizer import Tokenizer

PRECISIONS = ("auto", "fp32", "bf16")
MAX_SKIPPED_IN_A_ROW = 20
SECONDS_BETWEEN_LINES = 10  # of progress, where the output is not a terminal

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
                difference = "; ".join(_differences({name: saved.get(name)}, {name: current[name]}))
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
                    f"cannot go on from {path}: the weights in {name}={getattr(self.config, name)} are not those that "
                    "the run began with"
                )
        for difference in _differences(saved, current):
            self.console.print(f"this part of the run differs from the part before: {difference}", style="yellow")

    def _write_weights(self) -> Path:
        module = self.stage.module if self.ema is None else self.ema.module
        class_names = list(self.dataset.class_names)
        return self.stage.write(self.folder / "weights", module, steps=self.step, class_names=class_names)


class TokenizerStage:
    """Reconstruction, quantizer loss, optionally perceptual loss and adversary (VAR, eq. 5; VQGAN, section 3.1)."""

    def __init__(self, config: TrainConfig, device: torch.device, perceptual: nn.Module | None = None):
        self.config, self.device = config, device
        self.sources: dict[str, str] = {}
        self.module = Tokenizer(config.tokenizer, config.model.pyramid).to(device)
        weights = config.reconstruction
        discriminator = None
        if weights.adversarial > 0:
            discriminator = PatchDiscriminator(config.tokenizer.image_channels).to(device)
            self.discriminator_optimizer = torch.optim.AdamW(
                parameter_groups(discriminator, config.optimizer.weight_decay),
                betas=config.optimizer.betas,
                eps=config.optimizer.eps,
            )
        self.criterion = TokenizerLoss(
            l1=weights.l1,
            l2=weights.l2,
            perceptual=None if perceptual is None else perceptual.to(device).eval(),
            perceptual_weight=weights.perceptual,
            discriminator=discriminator,
            adversarial_weight=weights.adversarial,
            adversarial_start=weights.adversarial_start,
        )

    def prepare(self, dataset: Dataset, console: Console) -> Dataset:
        return dataset

    def compile(self, enabled: bool) -> None:
        self.forward = torch.compile(self.module) if enabled else self.module

    def loss(self, batch, classes_B, generator, step) -> tuple[Tensor, dict[str, Tensor]]:
        self.images, self.output = batch, self.forward(batch)
        if self.criterion.discriminator is not None:
            self.criterion.discriminator.requires_grad_(False)
        last_weight = self.module.decoder.conv_out.weight
        loss, parts = self.criterion(self.output.reconstruction.float(), batch, step, last_weight)
        parts["quantizer"] = self.output.quantizer_loss
        parts["codebook_use"] = self.module.quantizer.usage(self.output.codes_BL)
        return loss + self.config.reconstruction.quantizer * self.output.quantizer_loss, parts

    def after_step(self, optimizer, ema, generator, step) -> dict[str, float]:
        """Put unused codes back into use; train the adversary on the same images, and return what to log of that."""
        output, self.output = self.output, None
        quantizer = self.module.quantizer
        moved_V = quantizer.restart_unused_codes(output.latent_BEhw.detach(), output.codes_BL, generator)
        # The optimizer's momentum of a moved code, and its average, belong to the place where it was.
        codebook = quantizer.codebook.weight
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[codebook][name].masked_fill_(moved_V[:, None], 0)
        if ema is not None:
            averaged = ema.module.quantizer.codebook.weight
            averaged.data.copy_(torch.where(moved_V[:, None], codebook.data, averaged.data))
        if self.criterion.discriminator is None or step < self.criterion.adversarial_start:
            return {}
        return self._train_discriminator(output.reconstruction.detach().float(), optimizer, step)

    def _train_discriminator(self, reconstruction: Tensor, optimizer, step: int) -> dict[str, float]:
        """A step of the adversary, unless its loss or gradient is not finite; clipped like the tokenizer's."""
        discriminator = self.criterion.discriminator.requires_grad_(True)
        loss = self.criterion.discriminator_loss(reconstruction, self.images, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(discriminator.parameters(), self.config.optimizer.clip or math.inf)
        values = torch.stack([loss.detach().float(), norm.float()]).tolist()
        if all(map(math.isfinite, values)):
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = optimizer.param_groups[0]["lr"]
            self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        return dict(zip(("discriminator_loss", "discriminator_grad_norm"), values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"perceptual": self.criterion.perceptual is not None}
        if self.criterion.discriminator is not None:
            state["discriminator"] = self.criterion.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        had, has = state["perceptual"], self.criterion.perceptual is not None
        if had != has:
            raise ValueError(
                f"the run began {'with' if had else 'without'} a perceptual module and cannot go on "
                f"{'with' if has else 'without'} one: call hmar.train.train(config, resume=True"
                f"{', perceptual=...) with the same module' if had else ')'}"
            )
        if self.criterion.discriminator is not None:
            self.criterion.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def write(self, folder: Path, module: nn.Module, **notes: Any) -> Path:
        return checkpoint.save_pretrained(folder, module, **notes)


class CodesStage:
    """What next-scale prediction, masked prediction and VAR share: codes of a frozen tokenizer, dropped labels."""

    module: nn.Module

    def __init__(self, config: TrainConfig, device: torch.device):
        self.device = device
        self.tokenizer = load_fitting_tokenizer(config, device)
        self.config = dataclasses.replace(config, tokenizer=self.tokenizer.config)
        self.sources = {"tokenizer_weights": checkpoint.fingerprint(config.tokenizer_weights)}
        self.class_drop = config.model.class_drop

    def prepare(self, dataset: Dataset, console: Console) -> Dataset:
        """The data set to train on: with cache_codes, codes in place of images."""
        if dataset.num_classes > self.config.model.num_classes:
            raise ValueError(
                f"the data has {dataset.num_classes} classes, but model.num_classes={self.config.model.num_classes}: "
                f"set model.num_classes={dataset.num_classes}"
            )
        if not self.config.cache_codes:
            return dataset
        with console.status(f"encoding {len(dataset)} images"):
            return CachedCodes(dataset, self.encode, self.config.batch_size, self.device)

    def compile(self, enabled: bool) -> None:
        self.forward = torch.compile(self.module) if enabled else self.module

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Codes [B, L]. In the tokenizer's own precision: they must not depend on the model's."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.encode(images_B3HW)

    def inputs(self, batch: Tensor, classes_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, L], classes [B] with some dropped, and teacher-forced inputs [B, L - n_1^2, E]."""
        codes_BL = batch if batch.ndim == 2 else self.encode(batch)
        classes_B = drop_classes(classes_B, self.class_drop, self.config.model.null_class, generator)
        with torch.no_grad():
            inputs_BLE = self.tokenizer.quantizer.next_scale_inputs(codes_BL)
        return codes_BL, classes_B, inputs_BLE

    def after_step(self, optimizer, ema, generator, step) -> dict[str, float]:
        """Nothing beside the optimizer's step."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state

    def write(self, folder: Path, module: nn.Module, **notes: Any) -> Path:
        return checkpoint.save_pretrained(folder, module, **self._provenance(), **notes)

    def _provenance(self) -> dict[str, str]:
        return {
            "tokenizer_weights": self.config.tokenizer_weights,
            "tokenizer_sha256": self.sources["tokenizer_weights"],
        }


class NextScaleStage(CodesStage):
    """HMAR's stage 1 (block-diagonal, weighted loss; HMAR, section 4.2) and VAR (block-causal, uniform loss)."""

    def __init__(self, config: TrainConfig, device: torch.device):
        super().__init__(config, device)
        hmar = config.stage == "next-scale"
        pattern = "block_diagonal" if hmar else "block_causal"
        self.module = NextScaleTransformer(config.model, pattern=pattern, attention=config.attention).to(device)
        self.weights_L = token_weights(config.model.pyramid).to(device) if hmar else None

    def loss(self, batch, classes_B, generator, step) -> tuple[Tensor, dict[str, Tensor]]:
        codes_BL, classes_B, inputs_BLE = self.inputs(batch, classes_B, generator)
        logits_BLV = self.forward(classes_B, inputs_BLE)
        loss = next_scale_loss(logits_BLV, codes_BL, self.weights_L)
        return loss, {"accuracy": token_accuracy(logits_BLV.detach(), codes_BL)}


class MaskedStage(CodesStage):
    """HMAR's stage 2: mask blocks on the frozen trunk of stage 1 (HMAR, section 4.3)."""

    def __init__(self, config: TrainConfig, device: torch.device):
        super().__init__(config, device)
        self.sources["next_scale_weights"] = checkpoint.fingerprint(config.next_scale_weights)
        self.next_scale = load_stage_one(config)
        self.module = MaskedTransformer.from_next_scale(self.next_scale, attention=config.attention).to(device)

    def loss(self, batch, classes_B, generator, step) -> tuple[Tensor, dict[str, Tensor]]:
        codes_BL, classes_B, inputs_BLE = self.inputs(batch, classes_B, generator)
        with torch.no_grad():
            residuals_BLE = self.tokenizer.quantizer.own_residuals(codes_BL)
        masked_L = draw_mask(self.config.model.pyramid, generator=generator).to(self.device)
        logits_BLV = self.forward(classes_B, inputs_BLE, residuals_BLE, masked_L)
        loss = masked_loss(logits_BLV, codes_BL, masked_L)
        return loss, {"accuracy": token_accuracy(logits_BLV.detach(), codes_BL, masked_L)}

    def write(self, folder: Path, module: nn.Module, **notes: Any) -> Path:
        """The assembled HMAR: trunk, next-scale blocks of stage 1 and the mask blocks trained here."""
        hmar = HMAR.from_stages(self.next_scale, module.cpu())
        return checkpoint.save_pretrained(folder, hmar, **self._provenance(), **notes)


def make_stage(
    config: TrainConfig, device: torch.device, perceptual: nn.Module | None = None
) -> TokenizerStage | CodesStage:
    assert config.stage in STAGES
    if config.stage == "tokenizer":
        return TokenizerStage(config, device, perceptual)
    return MaskedStage(config, device) if config.stage == "masked" else NextScaleStage(config, device)


class CachedCodes(Dataset):
    """Codes [L] and class of every image of a data set without random crops, in memory."""

    def __init__(self, dataset: Dataset, encode, batch_size: int, device: torch.device):
        codes, classes = [], []
        for images_B3HW, classes_B in DataLoader(dataset, batch_size):
            codes.append(encode(images_B3HW.to(device)).cpu())
            classes.append(classes_B)
        self.codes_NL, self.classes_N = torch.cat(codes), torch.cat(classes).tolist()

    def __len__(self) -> int:
        return len(self.codes_NL)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        _, index = item
        return self.codes_NL[index], self.classes_N[index]


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
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def __exit__(self, *exception: object) -> None:
        self.file.close()
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
        self.bar.update(self.task, status=status)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > SECONDS_BETWEEN_LINES or step == self.config.steps):
            left = (now - self.started) / (step - self.first_step) * (self.config.steps - step)
            self.console.print(f"{self.config.stage} {step}/{self.config.steps}  {status}  {left:.0f} s left")
            self.last_line = now


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


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters: decayed ones and others.

    Decay is for the weights of linear layers and convolutions. Biases, norms, tables of positions, scales, classes and
    modulation, the codebook, the mask embedding and the learned scale of q go without.
    """
    decayed, others = [], []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_weight = name == "weight" and isinstance(owner, (nn.Linear, nn.Conv2d))
                (decayed if is_weight else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def open_images(config: TrainConfig) -> Dataset:
    """The training split that config.data describes."""
    data = config.data
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
        worker_init_fn=_leave_signals_to_the_main_process,
        # NOTE: without a generator of its own the loader draws from the global one, and a resumed run draws once more.
        generator=torch.Generator().manual_seed(config.seed),
    )
    batches = iter(loader)
    try:
        for batch, classes_B in batches:
            yield batch.to(device, non_blocking=True), classes_B.to(device, non_blocking=True)
    except BrokenImageError as error:
        # From a worker comes its whole traceback as text; the last line is the message.
        message = str(error).strip().splitlines()[-1].removeprefix("hmar.data.BrokenImageError: ")
        raise BrokenImageError(message) from error
    finally:
        # NOTE: an exception's traceback keeps the iterator alive, and with it its workers, which take no signals.
        if config.data.workers:
            batches._shutdown_workers()


def load_fitting_tokenizer(config: TrainConfig, device: torch.device) -> Tokenizer:
    """The frozen tokenizer of config.tokenizer_weights; ValueError if the model cannot work with it."""
    tokenizer = checkpoint.load_tokenizer(config.tokenizer_weights, device)
    expected = {
        "sides": config.model.sides,
        "vocab_size": config.model.vocab_size,
        "code_dim": config.model.code_dim,
        "image size": config.data.size,
    }
    got = {
        "sides": tokenizer.pyramid.sides,
        "vocab_size": tokenizer.config.vocab_size,
        "code_dim": tokenizer.config.code_dim,
        "image size": tokenizer.image_size,
    }
    for name in expected:
        if got[name] != expected[name]:
            raise ValueError(
                f"the tokenizer in {config.tokenizer_weights} has {name} {got[name]}, the model of preset "
                f"{config.preset} expects {expected[name]}: use the preset and overrides that the tokenizer had"
            )
    if config.tokenizer not in (tokenizer.config, find_preset(config.preset)[0]):
        differences = _differences(
            dataclasses.asdict(tokenizer.config), dataclasses.asdict(config.tokenizer), "tokenizer."
        )
        raise ValueError(
            f"stage {config.stage} takes the tokenizer in {config.tokenizer_weights} as it is, but {differences[0]}: "
            "leave the override out"
        )
    return tokenizer


def load_stage_one(config: TrainConfig) -> NextScaleTransformer:
    """Stage 1 of config.next_scale_weights, with the sizes of config.model (mask_depth may differ), on the CPU."""
    trained = checkpoint.load_pretrained(config.next_scale_weights, ("next-scale",))
    free = {name: getattr(config.model, name) for name in ("mask_depth", "class_drop", "drop_path", "gate_init")}
    if dataclasses.replace(trained.config, **free) != config.model:
        differences = _differences(
            {"model": dataclasses.asdict(trained.config)}, {"model": {**dataclasses.asdict(config.model), **free}}
        )
        raise ValueError(
            f"config.model does not fit the stage 1 in {config.next_scale_weights}: {'; '.join(differences)}"
        )
    stage_one = NextScaleTransformer(config.model, pattern="block_diagonal", attention=config.attention)
    stage_one.load_state_dict(trained.state_dict())
    return stage_one.eval()


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


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, for plotting; a last line cut short by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _not_finite(values: Mapping[str, float]) -> str | None:
    """The first of the named values that is inf or nan, in words."""
    return next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """In words, every entry that differs between two nested mappings with the same keys."""
    found = []
    for name in now:
        key = f"{path}{name}"
        if isinstance(now[name], Mapping) and isinstance(before.get(name), Mapping):
            found += _differences(before[name], now[name], f"{key}.")
        elif before.get(name) != now[name]:
            found.append(f"{key} was {before.get(name)}, now {now[name]}")
    return found


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the workers must live on until the step is finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
