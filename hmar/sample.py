"""A folder of generated images: one PNG an image, a grid of the first ones, and the settings they were made with.

An image follows from the settings and its own number alone, so a run that was stopped goes on with the images that are
missing, and a larger count adds to those that are there. Read serve.py for how batches are made of requests, and
generate.py for how an image is drawn.

How exactly it follows: the random numbers of an image depend on its seed or number and on nothing else. But libraries
choose their kernels by the size of a batch, and these round differently. With one batch size (and one type of device,
precision and set of versions) an image is the same to the bit, in whichever process, order and run its batch is drawn.
With another batch size, or in a last batch that is smaller, it is the same up to rounding: equal codes, and pixels
within 1/255, unless a draw was so near a tie that rounding turned it, which changes details of that image (rare in
float32, less so in bf16). Equal bits for all batch sizes would take computations of one size, however few images are
wanted.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from hmar.checkpoint import (
    TOKENIZER_FOLDER,
    find_weights,
    fingerprint,
    load_model,
    load_tokenizer,
    read_description,
    replacing,
)
from hmar.engine import Engine
from hmar.generate import KnownCodes, RampLike, SamplingConfig, ScheduleLike, resolve_ramp, resolve_schedule
from hmar.model import HMAR, NextScaleTransformer
from hmar.processes import find_device
from hmar.progress import SECONDS_BETWEEN_LINES
from hmar.serve import Request, Server
from hmar.tokenizer import Tokenizer
from hmar.train import find_precision

GRID_ROWS, GRID_COLUMNS = 10, 20
NUM_WRITERS = 4  # threads that compress and write images while the next batch is drawn
BATCHES_AHEAD = 2  # requested at a time, so that the device never waits for the disk


def sample(
    model_folder: str | Path,
    output: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    classes: Sequence[int] | None = None,
    count: int = 1,
    seeds: Sequence[int] | None = None,
    sampling: SamplingConfig | None = None,
    batch_size: int = 16,
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write `count` images of each class (all classes by default) as output/NNNNNN-class-C.png, and output/grid.png.

    With `seeds`, one image of each class for each of them, as output/seed-S-class-C.png; `count` and `sampling.seed`
    then say nothing. The classes share a seed, and the same seed is the same image in every folder (up to rounding, see
    the head of this file), so that no seed and no class may be named twice.

    Images that are there already are kept if they were made with the same settings (output/settings.json); other
    settings are an error unless `overwrite`, which deletes the images. Without tokenizer_folder the tokenizer is the
    one that the model was trained with. Returns the paths of all images. Raises ValueError for bad input.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count is {count} and batch size {batch_size}; both must be at least 1")
    images = open_image_set(
        model_folder,
        output,
        tokenizer_folder=tokenizer_folder,
        classes=classes,
        seeds=seeds,
        sampling=sampling,
        device=device,
        precision=precision,
        attention=attention,
        console=Console(stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True),
    )
    images.claim(overwrite)
    # Round by round of all classes, so that a larger count continues the numbers.
    rounds = count if seeds is None else len(seeds)
    paths = images.draw(rounds * len(images.classes), batch_size)
    images.write_grid(paths)
    return paths


def open_image_set(
    model_folder: str | Path,
    output: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    classes: Sequence[int] | None = None,
    order: Callable[[Sequence[int]], list[int]] = list,
    seeds: Sequence[int] | None = None,
    sampling: SamplingConfig | None = None,
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    console: Console | None = None,
) -> ImageSet:
    """The images of a model and a sampling configuration, to be drawn into the folder `output`; writes nothing yet.

    `order` puts the classes into the order in which they take turns.
    """
    sampling = sampling or SamplingConfig()
    if seeds is not None and (len(set(seeds)) < max(1, len(seeds)) or min(seeds) < 0):
        raise ValueError(f"seeds are {list(seeds)}: expected different non-negative numbers")
    console = console or Console(quiet=True)
    torch_device = find_device(device)
    dtype = find_precision(precision, torch_device)
    description = read_description(model_folder)
    if description["kind"] == "masked":
        raise ValueError(f"{model_folder} holds the masked stage alone: sample from the assembled model (kind hmar)")
    if description["kind"] == "tokenizer":
        raise ValueError(f"{model_folder} holds a tokenizer: give it as --tokenizer, and a trained model as --model")
    tokenizer_folder = _tokenizer_of(model_folder, description, tokenizer_folder, console)
    # The engine keeps what it computes with on the device: in half precision that is another copy.
    model = load_model(model_folder, "cpu" if dtype is not None else torch_device, attention)
    tokenizer = load_tokenizer(tokenizer_folder, torch_device)
    config = model.config
    classes = list(range(config.num_classes)) if classes is None else list(classes)
    unknown = [target for target in classes if not 0 <= target <= config.null_class]
    if unknown or not classes:
        raise ValueError(
            f"classes {unknown or '(none)'}: expected numbers from 0 to {config.num_classes - 1}, or "
            f"{config.null_class} for no class in particular"
        )
    twice = [target for target in classes if classes.count(target) > 1]
    if seeds is not None and twice:
        raise ValueError(
            f"class {twice[0]} is named twice, and with seeds both would be seed-S-class-{twice[0]}.png, the same "
            "image: name each class once, or take a count instead of seeds for several images of a class"
        )
    classes = order(classes)
    settings = {
        "model": fingerprint(model_folder),
        "tokenizer": fingerprint(tokenizer_folder),
        "classes": classes,
        "cfg": sampling.cfg,
        "cfg_ramp": list(resolve_ramp(config.pyramid, sampling.cfg_ramp)),
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "temperature": sampling.temperature,
        "masked_cfg_factor": sampling.masked_cfg_factor,
        "seed": sampling.seed if seeds is None else "in the names of the files",
        "greedy": sampling.greedy,
        "precision": "fp32" if dtype is None else "bf16",
    }
    if description["kind"] == "hmar":
        settings["schedule"] = [list(passes) for passes in resolve_schedule(config.pyramid, sampling.schedule)]
    elif sampling.schedule not in (None, "default", "none"):
        raise ValueError(
            f'{model_folder} holds a model of kind "{description["kind"]}", which has no masked passes: '
            "leave the schedule out"
        )
    return ImageSet(
        Path(output),
        classes,
        settings,
        sampling,
        description["kind"],
        model,
        tokenizer,
        Path(tokenizer_folder),
        torch_device,
        dtype,
        console,
        seeds,
    )


@dataclass(frozen=True)
class ImageSet:
    """Numbered images in a folder. Image n is of class classes[n % len(classes)] and follows from n and `settings`.

    With `seeds` it follows from seeds[n // len(classes)], which its file is named after, instead of n.
    """

    output: Path
    classes: list[int]
    settings: dict[str, Any]
    sampling: SamplingConfig
    kind: str
    model: HMAR | NextScaleTransformer
    tokenizer: Tokenizer
    tokenizer_folder: Path
    device: torch.device
    dtype: torch.dtype | None
    console: Console
    seeds: Sequence[int] | None = None
    known: KnownCodes | None = None  # put back in every image, see hmar.edit

    @property
    def size(self) -> int:
        """Height and width of an image."""
        return self.tokenizer.pyramid.side * self.tokenizer.config.stride

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer, device=self.device, dtype=self.dtype)

    def path(self, number: int) -> Path:
        name = f"{number:06d}" if self.seeds is None else f"seed-{self.seeds[number // len(self.classes)]}"
        return self.output / f"{name}-class-{self.classes[number % len(self.classes)]}.png"

    def claim(self, overwrite: bool) -> None:
        """Make sure that the images in the folder were made with these settings, or delete them with `overwrite`."""
        self.output.mkdir(parents=True, exist_ok=True)
        _claim(self.output, self.settings, overwrite)

    def draw(
        self, count: int, batch_size: int, *, rank: int = 0, world_size: int = 1, whole_batches: bool = False
    ) -> list[Path]:
        """Write those of the first `count` images that are missing; returns the paths of all.

        Of several processes each draws every `world_size`-th batch. A batch always holds the same numbers, also where
        some of them are there already, so that a run that was stopped goes on to the same bits. With `whole_batches`
        the last batch is as large as the others, though not all of it is kept, so that a larger count adds to the same
        bits, too.
        """
        paths = [self.path(number) for number in range(count)]
        present = {entry.name for entry in os.scandir(self.output)}
        assert not (whole_batches and self.seeds), "there is no image beyond the last seed"
        ends = (first + batch_size for first in range(0, count, batch_size))
        batches = [range(end - batch_size, end if whole_batches else min(end, count)) for end in ends]
        batches = batches[rank::world_size]
        mine = sum(number < count for batch in batches for number in batch)
        missing = sum(path.name not in present for batch in batches for path in paths[batch.start : batch.stop])
        if missing < mine:
            self.console.print(f"{mine - missing} of {mine} images are in {self.output} already")
        wanted = {batch: [n for n in batch if n < count and paths[n].name not in present] for batch in batches}
        ahead: deque[tuple[range, list[Future]]] = deque()
        writing: list[Future] = []
        what = "sampling" if world_size == 1 else f"sampling, process {rank} of {world_size}"
        with (
            Meter(self.console, what, mine, mine - missing) as meter,
            ThreadPoolExecutor(NUM_WRITERS) as writers,
            self._server(batch_size if whole_batches else min(batch_size, count)) as server,
        ):
            for batch in [*filter(wanted.get, batches), *[None] * BATCHES_AHEAD]:
                if batch is not None:
                    ahead.append((batch, server.submit(*self.requests(batch))))
                if ahead and (batch is None or len(ahead) == BATCHES_AHEAD):
                    numbers, futures = ahead.popleft()
                    pixels_BHWC = to_pixels(self.finished(futures))
                    # The images of the batch before were compressed and written meanwhile.
                    _finish(writing, meter)
                    writing = [writers.submit(_write, paths[n], pixels_BHWC[n - numbers[0]]) for n in wanted[numbers]]
            _finish(writing, meter)
        return paths

    def generate(self, numbers: range) -> Tensor:
        """The images of neighbouring numbers, as one batch: [B, 3, H, W] in [-1, 1]."""
        with self._server(len(numbers)) as server:
            return self.finished(server.submit(*self.requests(numbers)))

    def requests(self, numbers: range) -> list[Request]:
        """What is asked of the engine for these images."""
        requests = []
        for number in numbers:
            turn, place = divmod(number, len(self.classes))
            seed, image = (self.sampling.seed, number) if self.seeds is None else (self.seeds[turn], 0)
            requests.append(Request(self.classes[place], seed, image, self.sampling, self.known))
        return requests

    def finished(self, futures: Sequence[Future]) -> Tensor:
        """The images of requests, [B, 3, H, W] in [-1, 1]; waits for them."""
        return torch.stack([future.result().image_CHW for future in futures])

    def _server(self, batch_size: int) -> Server:
        # NOTE: of one size only, so that a smaller last batch has the same bits on a GPU.
        return Server(self.engine, batch_sizes=(batch_size,), max_waiting=BATCHES_AHEAD * batch_size)

    def write_grid(self, paths: Sequence[Path]) -> None:
        """grid.png: the first images, a column a class."""
        _write_grid(paths, min(len(self.classes), GRID_COLUMNS), len(self.classes), self.output / "grid.png")


class Meter:
    """How far a count of images is: a bar in a terminal, a line now and then elsewhere, nothing if quiet."""

    def __init__(self, console: Console, what: str, total: int, done: int = 0):
        self.console, self.what, self.total, self.done = console, what, total, done
        self.first_done, self.last_line = done, time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task(what, total=total, completed=done, rate="")

    def __enter__(self) -> Meter:
        self.started = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    @property
    def images_per_second(self) -> float:
        """Since the start, without the images that were there before."""
        return (self.done - self.first_done) / max(time.monotonic() - self.started, 1e-9)

    def advance(self, count: int) -> None:
        self.done += count
        rate = self.images_per_second
        self.bar.update(self.task, completed=self.done, rate=f"{rate:.3g} images/s")
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > SECONDS_BETWEEN_LINES or self.done == self.total):
            left = f"{(self.total - self.done) / rate:.0f} s left" if rate else ""
            self.console.print(f"{self.what} {self.done}/{self.total}  {rate:.3g} images/s  {left}")
            self.last_line = now


def parse_schedule(text: str) -> ScheduleLike:
    """A schedule as people type it: a name, a number of passes for every scale, or YAML lists of codes per pass."""
    schedule = _yaml(text)
    if isinstance(schedule, int) and not isinstance(schedule, bool):
        return f"even-{schedule}"
    by_side = isinstance(schedule, dict) and all(isinstance(passes, list) for passes in schedule.values())
    by_scale = isinstance(schedule, list) and all(isinstance(passes, list) for passes in schedule)
    if not (isinstance(schedule, str) or by_side or by_scale):
        raise ValueError(
            f'"{text}" is not a schedule: expected default, none, one-token, even-N, cosine-N, a number of passes, or '
            "lists as in {2: [1, 3], 3: [1, 1, 2, 5]}"
        )
    return schedule


def parse_ramp(text: str) -> RampLike:
    """A guidance ramp as people type it: a name, or a YAML list of factors."""
    ramp = _yaml(text)
    numbers = isinstance(ramp, list) and all(isinstance(factor, (int, float)) for factor in ramp)
    if not (isinstance(ramp, str) or numbers):
        raise ValueError(
            f'"{text}" is not a guidance ramp: expected linear, constant, cosine, or a list as in [0, 0.5, 1]'
        )
    return ramp


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def to_pixels(images_BCHW: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8 [B, H, W, C]."""
    return images_BCHW.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def _tokenizer_of(
    model_folder: str | Path, description: dict[str, Any], given: str | Path | None, console: Console
) -> str | Path:
    """The tokenizer's folder: the given one, or the one that the model's notes name. Says so if it is another one."""
    folder = given or description.get("tokenizer_weights")
    beside = find_weights(model_folder) / TOKENIZER_FOLDER
    if given is None and folder == TOKENIZER_FOLDER and beside.is_dir():
        folder = beside
    if folder is None:
        raise ValueError(
            f"{model_folder} does not say which tokenizer it was trained with: give its folder as --tokenizer"
        )
    if not Path(folder).is_dir():
        was = "" if given else f", with which {model_folder} was trained"
        raise ValueError(f"no folder {folder} of the tokenizer{was}: give the tokenizer's folder as --tokenizer")
    expected = description.get("tokenizer_sha256")
    if expected and fingerprint(folder) != expected:
        console.print(f"{folder} is not the tokenizer that {model_folder} was trained with: expect poor images")
    return folder


def _claim(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make sure that the images in `output` were made with these settings."""
    path = output / "settings.json"
    images = [*output.glob("[0-9]*-class-*.png"), *output.glob("seed-*-class-*.png")]
    remedy = "choose another output folder, or delete them by --overwrite"
    if overwrite:
        for image in images:
            image.unlink()
    elif path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cannot tell how the images in {output} were made, {path}: {error}; {remedy}") from error
        changed = [name for name in settings | before if before.get(name) != settings.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{output} holds images made with other settings ({name} was {before.get(name)}, now "
                f"{settings.get(name)}): {remedy}"
            )
    elif images:
        raise ValueError(f"{output} holds {len(images)} images but no settings.json that says how: {remedy}")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, pixels_HWC: np.ndarray) -> None:
    with replacing(path) as temporary:
        Image.fromarray(pixels_HWC).save(temporary, format="PNG")


def _finish(writing: Sequence[Future], meter: Meter) -> None:
    for written in writing:
        written.result()
    if writing:
        meter.advance(len(writing))


def _write_grid(paths: Sequence[Path], columns: int, stride: int, path: Path) -> None:
    """The first images, a column a class."""
    rows = [paths[start : start + columns] for start in range(0, len(paths), stride)][:GRID_ROWS]
    side = Image.open(paths[0]).size[0]
    gap = max(1, side // 32)
    pitch = side + gap
    grid = Image.new("RGB", (columns * pitch - gap, len(rows) * pitch - gap), "white")
    for i, row in enumerate(rows):
        for j, image_path in enumerate(row):
            with Image.open(image_path) as image:
                grid.paste(image, (j * pitch, i * pitch))
    with replacing(path) as temporary:
        grid.save(temporary, format="PNG")
