"""A folder of generated images: one PNG an image, a grid of the first ones, and the settings they were made with.

An image follows from the settings and its own number alone, so a run that was stopped goes on with the images that are
missing, and a larger count adds to those that are there. Read generate.py for how an image is drawn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from hmar.checkpoint import fingerprint, load_model, load_tokenizer, read_description, replacing
from hmar.generate import SamplingConfig, ScheduleLike, even_schedule, generate_hmar, generate_var, resolve_schedule
from hmar.pyramid import Pyramid
from hmar.train import find_device, find_precision

GRID_ROWS, GRID_COLUMNS = 10, 20


def sample(
    model_folder: str | Path,
    output: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    classes: Sequence[int] | None = None,
    count: int = 1,
    sampling: SamplingConfig | None = None,
    batch_size: int = 16,
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write `count` images of each class (all classes by default) as output/NNNNNN-class-C.png, and output/grid.png.

    Images that are there already are kept if they were made with the same settings (output/settings.json); other
    settings are an error unless `overwrite`, which deletes the images. Without tokenizer_folder the tokenizer is the
    one that the model was trained with. Returns the paths of all images. Raises ValueError for bad input.
    """
    sampling = sampling or SamplingConfig()
    console = Console(stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True)
    torch_device = find_device(device)
    dtype = find_precision(precision, torch_device)
    if count < 1 or batch_size < 1:
        raise ValueError(f"count is {count} and batch size {batch_size}; both must be at least 1")
    description = read_description(model_folder)
    if description["kind"] == "masked":
        raise ValueError(f"{model_folder} holds the masked stage alone: sample from the assembled model (kind hmar)")
    if description["kind"] == "tokenizer":
        raise ValueError(f"{model_folder} holds a tokenizer: give it as --tokenizer, and a trained model as --model")
    tokenizer_folder = _tokenizer_of(model_folder, description, tokenizer_folder, console)
    model = load_model(model_folder, torch_device, attention)
    tokenizer = load_tokenizer(tokenizer_folder, torch_device)
    config = model.config
    classes = list(range(config.num_classes)) if classes is None else list(classes)
    unknown = [target for target in classes if not 0 <= target <= config.null_class]
    if unknown or not classes:
        raise ValueError(
            f"classes {unknown or '(none)'}: expected numbers from 0 to {config.num_classes - 1}, or "
            f"{config.null_class} for no class in particular"
        )
    settings = {
        "model": fingerprint(model_folder),
        "tokenizer": fingerprint(tokenizer_folder),
        "classes": classes,
        "cfg": sampling.cfg,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "temperature": sampling.temperature,
        "masked_cfg_factor": sampling.masked_cfg_factor,
        "seed": sampling.seed,
        "greedy": sampling.greedy,
        "precision": "fp32" if dtype is None else "bf16",
    }
    if description["kind"] == "hmar":
        generate = generate_hmar
        settings["schedule"] = [list(passes) for passes in resolve_schedule(config.pyramid, sampling.schedule)]
    else:
        generate = generate_var
        if sampling.schedule not in (None, "default", "none"):
            raise ValueError(
                f'{model_folder} holds a model of kind "{description["kind"]}", which has no masked passes: '
                "leave the schedule out"
            )

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _claim(output, settings, overwrite)
    # Round by round of all classes, so that a larger count continues the numbers.
    paths = [output / f"{n:06d}-class-{classes[n % len(classes)]}.png" for n in range(count * len(classes))]
    missing = [n for n, path in enumerate(paths) if not path.exists()]
    if len(missing) < len(paths):
        console.print(f"{len(paths) - len(missing)} of {len(paths)} images are in {output} already")
    bar = Progress(
        TextColumn("sampling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not progress,
    )
    started, drawn = time.perf_counter(), 0
    with bar:
        task = bar.add_task("sampling", total=len(paths), completed=len(paths) - len(missing), rate="")
        for first, last in _runs(missing, batch_size):
            class_B = torch.tensor([classes[n % len(classes)] for n in range(first, last)], device=torch_device)
            with torch.autocast(torch_device.type, dtype, enabled=dtype is not None):
                images_BCHW = generate(model, tokenizer, class_B, sampling, first_image=first).images_BCHW
            for path, pixels_HWC in zip(paths[first:last], to_pixels(images_BCHW), strict=True):
                with replacing(path) as temporary:
                    Image.fromarray(pixels_HWC).save(temporary, format="PNG")
            drawn += last - first
            bar.update(task, advance=last - first, rate=f"{drawn / (time.perf_counter() - started):.3g} images/s")
    _write_grid(paths, min(len(classes), GRID_COLUMNS), len(classes), output / "grid.png")
    return paths


def parse_schedule(text: str, model_folder: str | Path) -> ScheduleLike:
    """A schedule as people type it: a name, a number of passes for every scale, or YAML lists of codes per pass."""
    try:
        schedule = yaml.safe_load(text)
    except yaml.YAMLError:
        schedule = None
    if isinstance(schedule, int) and not isinstance(schedule, bool):
        model = read_description(model_folder).get("model")
        if model is None:
            raise ValueError(f"{model_folder} holds no transformer, so it has no passes to schedule")
        return even_schedule(Pyramid(tuple(model["sides"])), schedule)
    by_side = isinstance(schedule, dict) and all(isinstance(passes, list) for passes in schedule.values())
    by_scale = isinstance(schedule, list) and all(isinstance(passes, list) for passes in schedule)
    if not (isinstance(schedule, str) or by_side or by_scale):
        raise ValueError(
            f'"{text}" is not a schedule: expected default, none, a number of passes, or lists as in '
            "{2: [1, 3], 3: [1, 1, 2, 5]}"
        )
    return schedule


def to_pixels(images_BCHW: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8 [B, H, W, C]."""
    return images_BCHW.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def _tokenizer_of(
    model_folder: str | Path, description: dict[str, Any], given: str | Path | None, console: Console
) -> str | Path:
    """The tokenizer's folder: the given one, or the one that the model's notes name. Says so if it is another one."""
    folder = given or description.get("tokenizer_weights")
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
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings | before if before.get(name) != settings.get(name)]
        if changed and not overwrite:
            name = changed[0]
            raise ValueError(
                f"{output} holds images made with other settings ({name} was {before.get(name)}, now "
                f"{settings.get(name)}): choose another output folder, or delete them by --overwrite"
            )
    if overwrite:
        for image in output.glob("[0-9]*-class-*.png"):
            image.unlink()
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _runs(numbers: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges [first, last) of neighbours, none longer than `longest`."""
    position = 0
    while position < len(numbers):
        end = position + 1
        while end < len(numbers) and end - position < longest and numbers[end] == numbers[end - 1] + 1:
            end += 1
        yield numbers[position], numbers[end - 1] + 1
        position = end


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
