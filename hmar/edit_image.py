"""An image file edited: read, fitted to the model, painted some number of times, written as PNG files.

The folder is an image set like those of `hmar.sample`: one PNG a result, grid.png, settings.json, and a command that
was stopped goes on. Read edit.py for how the hole is painted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from hmar.checkpoint import replacing
from hmar.data import read_image
from hmar.edit import KnownImage, box_hole, fit_image, place
from hmar.generate import SamplingConfig
from hmar.sample import ImageSet, open_image_set, to_pixels

WHITE = 128  # a mask's pixels at least this bright are the hole


def edit_image(
    model_folder: str | Path,
    image_path: str | Path,
    output: str | Path,
    *,
    mask: str | Path | None = None,
    box: Sequence[int] | None = None,
    around: Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    count: int = 1,
    seeds: Sequence[int] | None = None,
    sampling: SamplingConfig | None = None,
    fit: str = "refuse",
    known_share: float = 0.5,
    composite: bool = False,
    tokenizer_folder: str | Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Paint a part of an image, `count` times for each class, as output/NNNNNN-class-C.png, and output/input.png.

    Args:
        mask: image file of the image's size, white where to paint.
        box: the hole as x0, y0, x1, y1 in pixels of the image.
        around: paint around the image, which lies in this box of the model's canvas, see `hmar.edit.outpaint`.
            One of mask, box and around is needed.
        classes: None paints without a class (files are named after the null class).
        fit, known_share, composite: see `hmar.edit`. With `fit` the result has the model's size, not the image's.

    The rest is as for `hmar.sample.sample`. Returns the paths of the results. Raises ValueError for bad input, before
    anything is written.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count is {count} and batch size {batch_size}; both must be at least 1")
    given = [name for name, value in (("mask", mask), ("box", box), ("around", around)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"got {' and '.join(given) or 'no hole'}: give one of mask, box and around")
    images_1CHW, hole_HW = _read(image_path, mask, box)
    sampling = sampling or SamplingConfig()
    opened = open_image_set(
        model_folder,
        output,
        tokenizer_folder=tokenizer_folder,
        classes=classes,
        seeds=seeds,
        sampling=sampling if classes is not None else dataclasses.replace(sampling, cfg=0.0),
        device=device,
        precision=precision,
        attention=attention,
        console=Console(stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True),
    )
    size = opened.tokenizer.image_size
    if around is not None:
        images_1CHW, hole_HW = place(images_1CHW, tuple(around), size, fit)
    else:
        images_1CHW, hole_HW = fit_image(images_1CHW, hole_HW, (size, size), fit)
    known = KnownImage(opened.tokenizer, images_1CHW.to(opened.device), hole_HW, known_share)
    parts = {field.name: getattr(opened, field.name) for field in dataclasses.fields(opened)}
    parts["classes"] = list(classes) if classes is not None else [opened.model.config.null_class]
    parts["settings"] = {
        **opened.settings,
        "classes": parts["classes"],
        "known_pixels": _fingerprint(to_pixels(known.blanked_BCHW), known.hole_BHW.cpu().numpy()),
        "known_share": known_share,
        "composite": composite,
    }
    parts["known"] = known.codes
    edits = EditedImages(**parts, pasted=known if composite else None)
    edits.claim(overwrite)
    with replacing(edits.output / "input.png") as temporary:
        Image.fromarray(to_pixels(known.blanked_BCHW)[0]).save(temporary, format="PNG")
    paths = edits.draw((count if seeds is None else len(seeds)) * len(edits.classes), batch_size)
    edits.write_grid(paths)
    return paths


@dataclass(frozen=True)
class EditedImages(ImageSet):
    """An image set in which known codes are put back, and known pixels too if wanted."""

    pasted: KnownImage | None = None

    def finished(self, futures: Sequence[Future]) -> Tensor:
        images_BCHW = super().finished(futures)
        return images_BCHW if self.pasted is None else self.pasted.composite(images_BCHW)


def _read(image_path: str | Path, mask: str | Path | None, box: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The image in [-1, 1], [1, 3, H, W], and its hole, bool [H, W], which is empty without a mask and a box."""
    pixels_HWC = np.array(read_image(image_path))
    images_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float().div(127.5).sub(1)
    height, width = pixels_HWC.shape[:2]
    if mask is not None:
        return images_1CHW, torch.from_numpy(np.array(read_image(mask).convert("L")) >= WHITE)
    if box is not None:
        return images_1CHW, box_hole(height, width, tuple(box))
    return images_1CHW, torch.zeros(height, width, dtype=torch.bool)


def _fingerprint(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
