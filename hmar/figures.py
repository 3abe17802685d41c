"""Pictures for reports: grids of images, loss curves, attention masks, the pyramid of an image.

Every function takes numbers and returns a matplotlib ``Figure`` that belongs to no window; ``save`` writes it as PNG.
Colours are those of Okabe and Ito, which people with colour-blindness can tell apart. Read next: ``demo.py``, which
draws all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from hmar.pyramid import Pyramid

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CELL_INCHES = 0.62  # side of one image in a grid
DPI = 140
FRAME_PIXELS = 2


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format that the name ends with, PNG or (for photographs, a quarter of the bytes) JPEG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 90, "optimize": True} if path.suffix == ".jpg" else None
    figure.savefig(path, dpi=DPI, facecolor="white", bbox_inches="tight", pad_inches=0.1, pil_kwargs=options)
    return path


def image_grid(
    images_RC3HW: torch.Tensor,
    *,
    title: str,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    framed_RC: torch.Tensor | None = None,
    note: str = "",
    row_gaps: Sequence[int] = (),
    cell_inches: float = CELL_INCHES,
) -> Figure:
    """A table of images in [-1, 1], float [R, C, 3, H, W].

    Args:
        row_labels, column_labels: R and C labels, or none.
        framed_RC: bool [R, C]; those images get a vermilion frame (say in ``note`` what it means).
        note: a line under the grid.
        row_gaps: rows above which there is a wider gap, to set groups apart.
        cell_inches: side of one image in print.
    """
    num_rows, num_columns, _, height, width = images_RC3HW.shape
    images = images_RC3HW.detach().float().cpu().clamp(-1, 1).add(1).div(2).permute(0, 1, 3, 4, 2).numpy()
    zoom = max(1, round(96 / height))  # whole factors keep the pixels of small images square and crisp
    images = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    height, width = height * zoom, width * zoom
    frame, gap = FRAME_PIXELS * 2, 4
    step_y, step_x = height + 2 * frame + gap, width + 2 * frame + gap
    tops = np.arange(num_rows) * step_y + gap
    for row in row_gaps:
        tops[row:] += height // 4
    canvas = np.ones((int(tops[-1]) + step_y, num_columns * step_x + gap, 3), np.float32)
    colour = np.array([int(VERMILION[i : i + 2], 16) / 255 for i in (1, 3, 5)], np.float32)
    for row, top in enumerate(tops):
        for column in range(num_columns):
            left = column * step_x + gap
            if framed_RC is not None and framed_RC[row, column]:
                canvas[top : top + height + 2 * frame, left : left + width + 2 * frame] = colour
            canvas[top + frame : top + frame + height, left + frame : left + frame + width] = images[row, column]

    inches = cell_inches / step_x
    figure = Figure(figsize=(canvas.shape[1] * inches + 1.6, canvas.shape[0] * inches + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="antialiased", aspect="equal")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=8)
    if note:
        axes.set_xlabel(note, loc="left", fontsize=8.5, color="0.25", labelpad=6)
    middle = frame + height / 2
    axes.set_yticks(tops + middle if row_labels else [], row_labels or None)
    axes.set_xticks(np.arange(num_columns) * step_x + gap + frame + width / 2 if column_labels else [])
    if column_labels:
        axes.set_xticklabels(column_labels)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("bottom")
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    return figure


def loss_curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, title: str, note: str = ""
) -> Figure:
    """One panel per entry, each with named curves of (steps, losses); raw values pale, a running mean on top."""
    figure = Figure(figsize=(4.1 * len(panels), 3.4), layout="constrained")
    for axes, (panel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for colour, (name, (steps, losses)) in zip((BLUE, ORANGE, GREEN, PURPLE, SKY), curves.items(), strict=False):
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            few = "o" if len(losses) < 3 else None
            axes.plot(steps, running_mean(losses), color=colour, linewidth=1.8, label=name, marker=few)
        axes.set_title(panel, loc="left", fontsize=10)
        axes.set_xlabel("training step", fontsize=9)
        axes.set_ylabel("loss", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.92", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color="0.25")
    return figure


def masks(pyramids: Mapping[str, Pyramid], *, title: str) -> Figure:
    """The two attention masks of each named pyramid: HMAR's block-diagonal and VAR's block-causal."""
    figure = Figure(figsize=(3.5 * 2 * len(pyramids), 4.1), layout="constrained")
    axes = iter(figure.subplots(1, 2 * len(pyramids), squeeze=False)[0])
    for name, pyramid in pyramids.items():
        for kind, mask, colour in (
            ("HMAR, block-diagonal", pyramid.block_diagonal(), BLUE),
            ("VAR, block-causal", pyramid.block_causal(), ORANGE),
        ):
            panel = next(axes)
            mask.draw(panel, color=colour)
            pairs = f"{mask.num_pairs:,} pairs, {mask.density:.0%} of the matrix"
            panel.set_title(f"{kind}\n{name}, {mask.num_queries} tokens\n{pairs}", loc="left", fontsize=9)
            panel.tick_params(labelsize=8)
            panel.set_xlabel("key token", fontsize=9)
            panel.set_ylabel("query token", fontsize=9)
            for offset in pyramid.offsets[1:-1]:
                panel.axhline(offset, color="0.85", linewidth=0.5, zorder=0)
                panel.axvline(offset, color="0.85", linewidth=0.5, zorder=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def pyramid(images_S3HW: torch.Tensor, shape: Pyramid, *, title: str, note: str = "") -> Figure:
    """One image after every scale of its pyramid, float [S, 3, H, W] in [-1, 1], with the token grid drawn over it."""
    columns = min(5, shape.num_scales)
    rows = -(-shape.num_scales // columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    size = images_S3HW.shape[-1]
    for panel in panels:
        panel.set_axis_off()
    for k, (panel, side) in enumerate(zip(panels, shape.sides, strict=False)):
        image = images_S3HW[k].detach().float().cpu().clamp(-1, 1).add(1).div(2).permute(1, 2, 0).numpy()
        panel.imshow(image, extent=(0, size, size, 0), interpolation="nearest")
        for line in np.linspace(0, size, side + 1):
            panel.plot((0, size), (line, line), color=SKY, linewidth=0.5)
            panel.plot((line, line), (0, size), color=SKY, linewidth=0.5)
        panel.set(xlim=(-1, size + 1), ylim=(size + 1, -1))
        tokens = "1 token" if side == 1 else f"{side * side} tokens"
        panel.set_title(f"scale {k + 1}: {side} x {side}\n{tokens}", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color="0.25")
    return figure


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve; the window shrinks towards both ends."""
    values = np.asarray(values, dtype=float)
    reach = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
