"""Editing without training: in-painting, out-painting and class-conditional editing, with HMAR and VAR.

    hole       True where pixels are to be painted; everything else is known
    blanked    the image with its hole filled smoothly, from known pixels alone
    codes      encode(blanked); those of known tokens are put back at every scale, before f_hat grows
    the rest   drawn by generate.py: in-painting and out-painting with the null class, editing with a class

Nothing of the hole's content can reach the result, for no function ever sees it: the encoder's attention and
normalisation reach over the whole image, so it must be gone before encoding. For the same reason the codes that are put
back are those of the blanked image, and `KnownImage.reconstruct` is what known pixels look like again: exactly so only
up to the decoder, which reaches far as well, and the coarse scales, which belong to the hole too.

Which tokens are known. A position of the latent is known when no pixel of its stride x stride cell is in the hole, and
at the last scale these are the known tokens. A token of a coarser scale stands for the positions that resizing the
latent to its scale averages, and is known when at least `known_share` of them are. A coarse token fixes colour and
layout of everything in its cell: where it is put back, the hole inherits them from the blanked image, and where it is
drawn anew, known pixels in its cell change with it. The default of one half is between the two. With 1, a hole of any
size makes the token of scale 1 unknown and lets the whole picture drift, which gives a class its way; less than a half
holds small known parts, as in out-painting, together. `composite` returns the known pixels as they were in any case.

(VAR, arXiv 2404.02905, section 5.3; HMAR, arXiv 2506.04421, section 5.) Read `hmar.edit_image` for editing a file.

Shapes: B images, C channels, H W pixels, h w latent sides, L tokens of the pyramid, E code dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hmar.generate import KnownCodes, SamplingConfig, evaluating, generate_hmar, generate_var
from hmar.model import HMAR, NextScaleTransformer
from hmar.tokenizer import Tokenizer

FITS = ("refuse", "resize", "crop")
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 lie outside


class EditOutput(NamedTuple):
    images_BCHW: Tensor  # in [-1, 1]
    codes_BL: Tensor  # int64
    f_hat_BEhw: Tensor
    known: KnownImage


class KnownImage:
    """What is known of images with holes, in codes.

    Args:
        images_BCHW: floats in [-1, 1], of the tokenizer's size; pixels in the hole may hold anything, NaN included.
        hole: bool [H, W] for all images or [B, H, W]; True is to be painted.
        known_share: in (0, 1], see the head of this file.

    Attributes:
        blanked_BCHW: the images as the tokenizer sees them, the hole filled with the colours around it.
        hole_BHW, codes: the hole; codes and which of them are known, as `hmar.generate` takes them.

    Raises ValueError for shapes that do not fit, no hole, and holes that leave no token of the last scale known.
    """

    @torch.no_grad()
    def __init__(self, tokenizer: Tokenizer, images_BCHW: Tensor, hole: Tensor, known_share: float = 0.5):
        if not 0 < known_share <= 1:
            raise ValueError(f"known_share is {known_share}; it must lie above 0 and be at most 1.")
        weight = tokenizer.quantizer.codebook.weight
        self.tokenizer = tokenizer
        images_BCHW = images_BCHW.to(weight.device)
        size = tokenizer.image_size
        if not images_BCHW.is_floating_point() or images_BCHW.ndim != 4 or tuple(images_BCHW.shape[2:]) != (size, size):
            raise ValueError(
                f"Images are of {images_BCHW.dtype} and shape {tuple(images_BCHW.shape)}, but this tokenizer's are "
                f"floats in [-1, 1] of shape (batch, channels, {size}, {size}); hmar.edit.fit_image resizes an image "
                "together with its hole."
            )
        self.hole_BHW = _checked_hole(torch.as_tensor(hole, device=weight.device), images_BCHW, tokenizer.config.stride)
        self.images_BCHW = images_BCHW
        self.blanked_BCHW = blank(images_BCHW, self.hole_BHW)
        if not (self.blanked_BCHW.abs() <= 1 + 1e-3).all():
            raise ValueError("Images hold known pixels outside of [-1, 1] or none at all (NaN).")
        # NOTE: codes are an argmin over near ties, so they are taken in full precision even under autocast.
        with torch.autocast(weight.device.type, enabled=False), evaluating(tokenizer):
            codes_BL = tokenizer.encode(self.blanked_BCHW.to(weight.dtype))
        tokens_BL = known_tokens(tokenizer, self.hole_BHW, known_share)
        self.codes = KnownCodes(codes_BL, tokens_BL)

    @torch.no_grad()
    def reconstruct(self) -> Tensor:
        """The blanked images through the tokenizer, [B, C, H, W]: known pixels come back like this, or close to it."""
        with evaluating(self.tokenizer):
            return self.tokenizer.decode(self.codes.codes_BL)

    def composite(self, painted_BCHW: Tensor) -> Tensor:
        """Painted images with the original pixels outside of the hole."""
        return torch.where(self.hole_BHW[:, None], painted_BCHW.to(self.images_BCHW.dtype), self.images_BCHW)


def inpaint(
    model: HMAR | NextScaleTransformer,
    tokenizer: Tokenizer,
    images_BCHW: Tensor,
    hole: Tensor,
    class_B: Tensor | None = None,
    sampling: SamplingConfig | None = None,
    *,
    known_share: float = 0.5,
    composite: bool = False,
    first_image: int = 0,
    seeds_B: Sequence[int] | Tensor | None = None,
    on_scale: Callable[[int, Tensor], None] | None = None,
) -> EditOutput:
    """Paint the holes of images: in-painting without classes, class-conditional editing with them.

    Args:
        model: HMAR, or one that predicts the next scale only (VAR, or HMAR's first stage). HMAR's masked passes see the
            known tokens of a scale while they predict the others; the others learn of them at the next scale.
        images_BCHW: in [-1, 1], of the tokenizer's size; see `fit_image` for other sizes. For several results of one
            image repeat it: `image.expand(5, -1, -1, -1)`.
        hole: bool [H, W] or [B, H, W], True where to paint; `box_hole` makes one of a box. See `KnownImage`.
        class_B: int64 classes; None for the null class, which needs no guidance and ignores `sampling.cfg`.
        sampling: as for `generate_hmar`; a hole's codes are committed in the proportions of the schedule.
        known_share: see the head of this file.
        composite: put the original pixels back outside of the hole. Without, they pass through the tokenizer.
        first_image, seeds_B, on_scale: as for `generate_hmar`.
    """
    known = KnownImage(tokenizer, images_BCHW, hole, known_share)
    return paint(
        model,
        known,
        class_B,
        sampling,
        composite=composite,
        first_image=first_image,
        seeds_B=seeds_B,
        on_scale=on_scale,
    )


def outpaint(
    model: HMAR | NextScaleTransformer,
    tokenizer: Tokenizer,
    images_BCHW: Tensor,
    box: Box,
    class_B: Tensor | None = None,
    sampling: SamplingConfig | None = None,
    *,
    fit: str = "refuse",
    **options,
) -> EditOutput:
    """Paint what lies around images.

    Args:
        box: where on the tokenizer's canvas the images lie, as (x0, y0, x1, y1) in pixels. It may stick out, which
            moves an image: on a canvas of 256 pixels, (128, 0, 384, 256) keeps the left half of an image of 256 pixels
            as the right half of the result.
        fit: what happens to images that have not the size of the box, see `fit_image`.
        options: those of `inpaint`.
    """
    canvas_BCHW, hole_HW = place(images_BCHW, box, tokenizer.image_size, fit)
    return inpaint(model, tokenizer, canvas_BCHW, hole_HW, class_B, sampling, **options)


def paint(
    model: HMAR | NextScaleTransformer,
    known: KnownImage,
    class_B: Tensor | None = None,
    sampling: SamplingConfig | None = None,
    *,
    composite: bool = False,
    first_image: int = 0,
    seeds_B: Sequence[int] | Tensor | None = None,
    on_scale: Callable[[int, Tensor], None] | None = None,
) -> EditOutput:
    """What `inpaint` does once the codes are known, for painting the same images several times."""
    if not isinstance(model, (HMAR, NextScaleTransformer)):
        raise ValueError(f"A {type(model).__name__} cannot paint alone; HMAR and NextScaleTransformer can.")
    sampling = sampling or SamplingConfig()
    batch = len(known.codes.codes_BL)
    if class_B is None:
        class_B = torch.full((batch,), model.config.null_class)
        sampling = dataclasses.replace(sampling, cfg=0.0)
    elif len(class_B) != batch:
        raise ValueError(f"There are {len(class_B)} classes for {batch} images; give one for each.")
    generate = generate_hmar if isinstance(model, HMAR) else generate_var
    output = generate(
        model,
        known.tokenizer,
        class_B,
        sampling,
        on_scale=on_scale,
        first_image=first_image,
        seeds_B=seeds_B,
        known=known.codes,
    )
    images_BCHW = known.composite(output.images_BCHW) if composite else output.images_BCHW
    return EditOutput(images_BCHW, output.codes_BL, output.f_hat_BEhw, known)


def blank(images_BCHW: Tensor, hole_BHW: Tensor) -> Tensor:
    """The images with their holes filled by the colours around them, whatever was there.

    The fill is smooth: a pyramid of averages of known pixels, read from the finest level that knows something. A flat
    colour would stand out as an object of its own, and its coarse codes with it.
    """
    hole_B1HW = hole_BHW[:, None]
    return _grow(torch.where(hole_B1HW, 0, images_BCHW), ~hole_B1HW)


def _grow(values_BCHW: Tensor, known_B1HW: Tensor) -> Tensor:
    """Values where they are known; elsewhere those of a map of half the size, grown in the same way."""
    height, width = values_BCHW.shape[2:]
    if height == width == 1:
        return values_BCHW
    shares_B1hw = F.avg_pool2d(known_B1HW.to(values_BCHW.dtype), 2, ceil_mode=True)
    means_BChw = F.avg_pool2d(values_BCHW, 2, ceil_mode=True) / shares_B1hw.clamp_min(0.25)
    around_BChw = _grow(means_BChw, shares_B1hw > 0)
    return torch.where(known_B1HW, values_BCHW, F.interpolate(around_BChw, size=(height, width), mode="bilinear"))


def known_tokens(tokenizer: Tokenizer, hole_BHW: Tensor, known_share: float = 0.5) -> Tensor:
    """Which tokens of the pyramid are known, bool [B, L]; see the head of this file."""
    hole_B1hw = F.max_pool2d(hole_BHW[:, None].float(), tokenizer.config.stride)
    # NOTE: pooling averages over the same windows as resizing by area, and in float64 a half is a half.
    known_B1hw = 1 - hole_B1hw.double()
    shares = [F.adaptive_avg_pool2d(known_B1hw, side).flatten(1) for side in tokenizer.pyramid.sides]
    return torch.cat(shares, dim=1) >= known_share - 1e-9


def box_hole(height: int, width: int, box: Box) -> Tensor:
    """A hole of the shape of a box, bool [height, width]. Raises ValueError unless the box lies in the image."""
    x0, y0, x1, y1 = _checked_box(box)
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise ValueError(f"The box {x0},{y0},{x1},{y1} leaves the image of {width} x {height} pixels.")
    hole_HW = torch.zeros(height, width, dtype=torch.bool)
    hole_HW[y0:y1, x0:x1] = True
    return hole_HW


def place(images_BCHW: Tensor, box: Box, size: int, fit: str = "refuse") -> tuple[Tensor, Tensor]:
    """Images on a square canvas of `size` pixels, and the hole around them: [B, C, size, size], bool [size, size]."""
    x0, y0, x1, y1 = _checked_box(box)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, size), min(y1, size)
    if left >= right or top >= bottom:
        raise ValueError(f"The box {x0},{y0},{x1},{y1} lies outside of the canvas of {size} x {size} pixels.")
    nothing_HW = torch.zeros(images_BCHW.shape[2:], dtype=torch.bool, device=images_BCHW.device)
    images_BCHW, _ = fit_image(images_BCHW, nothing_HW, (y1 - y0, x1 - x0), fit)
    canvas_BCHW = images_BCHW.new_zeros(*images_BCHW.shape[:2], size, size)
    hole_HW = torch.ones(size, size, dtype=torch.bool, device=images_BCHW.device)
    hole_HW[top:bottom, left:right] = False
    canvas_BCHW[:, :, top:bottom, left:right] = images_BCHW[:, :, top - y0 : bottom - y0, left - x0 : right - x0]
    return canvas_BCHW, hole_HW


def fit_image(
    images_BCHW: Tensor, hole_HW: Tensor, size: tuple[int, int], fit: str = "refuse"
) -> tuple[Tensor, Tensor]:
    """Images and their hole at `size` = (height, width).

    Args:
        fit: for other sizes, "refuse" raises ValueError, "resize" stretches, "crop" cuts the middle of the right
            proportions and resizes that.

    A resized pixel belongs to the hole when it touches the hole at all. The known ones are averages of known pixels
    only, so that the hole's content is gone here too.
    """
    if fit not in FITS:
        raise ValueError(f'fit is "{fit}"; known are {", ".join(FITS)}.')
    height, width = images_BCHW.shape[2:]
    hole_HW = hole_HW.to(images_BCHW.device)
    if tuple(hole_HW.shape) != (height, width):
        raise ValueError(
            f"The mask has {hole_HW.shape[-1]} x {hole_HW.shape[-2]} pixels, but the image has {width} x {height}: the "
            "mask must have the size of the image."
        )
    if (height, width) == tuple(size):
        return images_BCHW, hole_HW
    if fit == "refuse":
        raise ValueError(
            f"The image has {width} x {height} pixels where {size[1]} x {size[0]} fit: resize it, or choose to have it "
            "stretched (fit resize) or cut to these proportions (fit crop)."
        )
    if fit == "crop":
        # The largest part of the wanted proportions; at least one pixel.
        scale = min(height / size[0], width / size[1])
        rows, columns = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        top, left = (height - rows) // 2, (width - columns) // 2
        images_BCHW = images_BCHW[:, :, top : top + rows, left : left + columns]
        hole_HW = hole_HW[top : top + rows, left : left + columns]
        if (rows, columns) == tuple(size):
            return images_BCHW, hole_HW
    known_HW = (~hole_HW).to(images_BCHW.dtype)
    known_BCHW = torch.where(hole_HW, 0, images_BCHW)
    stacked = torch.cat([known_BCHW, known_HW.expand(len(images_BCHW), 1, -1, -1)], dim=1)
    resized = F.interpolate(stacked, size=tuple(size), mode="bilinear", antialias=True)
    sums_BCHW, weights_B1HW = resized[:, :-1], resized[:, -1:]
    resized_hole_HW = F.adaptive_max_pool2d(hole_HW[None, None].float(), tuple(size))[0, 0].bool()
    resized_BCHW = torch.where(resized_hole_HW, 0, sums_BCHW / weights_B1HW.clamp_min(1e-6))
    return resized_BCHW.clamp(-1, 1), resized_hole_HW


def _checked_box(box: Sequence[int]) -> Box:
    whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in box)
    if len(box) != 4 or not whole or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"A box is four whole numbers x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {', '.join(map(str, box))}."
        )
    return tuple(box)


def _checked_hole(hole: Tensor, images_BCHW: Tensor, stride: int) -> Tensor:
    """The hole as bool [B, H, W], if something is to be painted in every image and something is known of it."""
    batch, _, height, width = images_BCHW.shape
    if hole.dtype != torch.bool or hole.shape not in ((height, width), (batch, height, width)):
        raise ValueError(
            f"The hole is of {hole.dtype} and shape {tuple(hole.shape)}; expected torch.bool, True where to paint, of "
            f"shape ({height}, {width}) or ({batch}, {height}, {width})."
        )
    hole_BHW = hole.expand(batch, height, width)
    if not hole_BHW.flatten(1).any(1).all():
        raise ValueError(
            "The hole is empty, so there is nothing to paint; tokenizer.decode(tokenizer.encode(images)) reconstructs."
        )
    if hole_BHW.flatten(1).all(1).any():
        raise ValueError("The hole covers a whole image, so nothing is known of it; that is plain sampling.")
    if F.max_pool2d(hole_BHW[:, None].float(), stride).flatten(1).all(1).any():
        raise ValueError(
            f"The hole touches every token, {stride} x {stride} pixels each, so nothing could be put back; leave some "
            "of them whole."
        )
    return hole_BHW
