"""Pictures of masks and of the tiles that the kernels make of them, for kernels.md: `python -m reports.plan_pictures`.

Writes plots/kernels_*.png and tables/plans.md: pure functions of hmar_kernels' masks and plans, made on the CPU.
`draw_intervals` and `draw_plan` draw any SpanMask and TilePlan of your own.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from hmar.pyramid import SIDES_BY_RESOLUTION, Pyramid
from hmar_kernels import SpanMask
from hmar_kernels.attention.plan import (
    COL_BEGIN,
    COL_END,
    FULL_BEGIN,
    FULL_END,
    ROW_BEGIN,
    ROW_END,
    TilePlan,
    key_plan,
    query_plan,
)

HERE = Path(__file__).resolve().parent
TINY, SMALL = Pyramid((1, 2, 3, 4)), Pyramid((1, 2, 3, 4, 5, 6))
SMALL_TILE, TILE, EVEN_TILE = (16, 16), (64, 64), (128, 128)
PATTERNS = ("block-diagonal", "block-causal")

# Okabe and Ito, told apart by colour-blind eyes: one colour a scale, in turn.
SCALES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
FULL, ATTENDING, IN_VAIN = "#0072B2", "#E69F00", "#FBE3B5"
EDGE, BOUNDARY = "white", "#777777"


def mask_of(pyramid: Pyramid, pattern: str) -> SpanMask:
    return pyramid.block_diagonal() if pattern == "block-diagonal" else pyramid.block_causal()


def draw_intervals(ax: Axes, mask: SpanMask, pyramid: Pyramid) -> None:
    """Each query's interval of keys as one bar, coloured by the query's scale; queries downwards, keys to the right."""
    gap = 0.16 if mask.num_queries < 100 else 0.0
    for k, (begin, end) in enumerate(pairwise(pyramid.offsets)):
        starts, ends = mask.key_start[begin:end].tolist(), mask.key_end[begin:end].tolist()
        bars = [
            Rectangle((a, row + gap / 2), b - a, 1 - gap)
            for row, (a, b) in enumerate(zip(starts, ends, strict=True), begin)
            if b > a
        ]
        ax.add_collection(PatchCollection(bars, facecolor=SCALES[k % len(SCALES)], edgecolor="none", antialiased=False))
    _frame(ax, mask, pyramid, "keys", "queries")


def draw_plan(ax: Axes, mask: SpanMask, plan: TilePlan, pyramid: Pyramid, *, of_keys: bool = False) -> None:
    """The blocks that the tiles of a plan visit, drawn on the mask.

    Blocks without a mask in one colour; in blocks with a mask, pairs that attend in another and those computed in vain
    in a pale shade of it. White is not visited. The number of a tile is its place in the order of launch, from 0.

    Args:
        of_keys: the plan is a key_plan: its rows are keys, drawn as columns.
    """
    full, masked = [], []
    for tile in plan.tiles.tolist():
        rows = tile[ROW_BEGIN], tile[ROW_END]
        for begin in range(tile[FULL_BEGIN], tile[FULL_END], plan.block_cols):
            full.append((rows, (begin, begin + plan.block_cols)))
        for begin, end in ((tile[COL_BEGIN], tile[FULL_BEGIN]), (tile[FULL_END], tile[COL_END])):
            masked += [(rows, (a, min(a + plan.block_cols, end))) for a in range(begin, end, plan.block_cols)]

    def rectangle(rows: tuple[int, int], cols: tuple[int, int]) -> Rectangle:
        (top, bottom), (left, right) = (cols, rows) if of_keys else (rows, cols)
        return Rectangle((left, top), right - left, bottom - top)

    def fill(rectangles: list[Rectangle], colour: str, line: float) -> None:
        ax.add_collection(PatchCollection(rectangles, facecolor=colour, edgecolor=EDGE, linewidth=line))

    width = 0.8 if mask.num_queries < 200 else 0.5
    fill([rectangle(*block) for block in masked], IN_VAIN, 0)
    attending = [
        Rectangle((max(x, start), max(y, top)), w, h)
        for block in masked
        for x, y, w_block, h_block in [_box(rectangle(*block))]
        for top, bottom, start, end in mask.runs
        for w in [min(x + w_block, end) - max(x, start)]
        for h in [min(y + h_block, bottom) - max(y, top)]
        if w > 0 and h > 0
    ]
    fill(attending, ATTENDING, 0)
    fill([rectangle(*block) for block in full], FULL, 0)
    for rows, cols in (*full, *masked):
        outline = rectangle(rows, cols)
        outline.set(fill=False, edgecolor=EDGE, linewidth=width)
        ax.add_patch(outline)
    _frame(ax, mask, pyramid, "keys", "queries")
    for number, tile in enumerate(plan.tiles.tolist()):
        outline = rectangle((tile[ROW_BEGIN], tile[ROW_END]), (tile[COL_BEGIN], tile[COL_END]))
        outline.set(fill=False, edgecolor="black", linewidth=0.9, zorder=3)
        ax.add_patch(outline)
        middle = (tile[ROW_BEGIN] + tile[ROW_END]) / 2
        if of_keys:
            at, shift, place = (middle, tile[COL_BEGIN]), (0, 2), ("center", "bottom")
        else:
            at, shift, place = (tile[COL_END], middle), (3, 0), ("left", "center")
        style = {"textcoords": "offset points", "ha": place[0], "va": place[1], "fontsize": 7.5}
        ax.annotate(str(number), at, xytext=shift, annotation_clip=False, **style)


def even_grid(mask: SpanMask, block_rows: int, block_cols: int) -> TilePlan:
    """The plan of a kernel that cuts rows and columns at multiples of its tile, whatever the mask."""
    tiles = []
    for begin in range(0, mask.num_queries, block_rows):
        end = min(begin + block_rows, mask.num_queries)
        starts, ends = mask.key_start[begin:end], mask.key_end[begin:end]
        first, last = int(starts.min()) // block_cols * block_cols, int(ends.max())
        inner = math.ceil(int(starts.max()) / block_cols) * block_cols
        inner_end = int(ends.min()) // block_cols * block_cols
        tiles.append((begin, end, first, last, *((inner, inner_end) if inner_end > inner else (first, first))))
    return TilePlan(torch.tensor(tiles, dtype=torch.int32), block_rows, block_cols)


def useful_share(mask: SpanMask, plan: TilePlan) -> float:
    """Pairs that attend, of all that the products of a plan compute."""
    return mask.num_pairs / (sum(plan.block_counts()) * plan.block_rows * plan.block_cols)


def _box(rectangle: Rectangle) -> tuple[float, float, float, float]:
    return rectangle.get_x(), rectangle.get_y(), rectangle.get_width(), rectangle.get_height()


def _frame(ax: Axes, mask: SpanMask, pyramid: Pyramid, xlabel: str, ylabel: str) -> None:
    """Boundaries of scales, and the side of each scale that has the room for it."""
    length = pyramid.length
    for offset in pyramid.offsets[1:-1]:
        for line in (ax.axhline, ax.axvline):
            line(offset, color=BOUNDARY, linewidth=0.5, linestyle=(0, (2, 2)), zorder=2)
    places, names = [], []
    for side, (begin, end) in zip(pyramid.sides, pairwise(pyramid.offsets), strict=True):
        if end - begin > 0.028 * length:
            places.append((begin + end) / 2)
            names.append(f"{side}²")
    ax.set_xticks(places, names, fontsize=8)
    ax.set_yticks(places, names, fontsize=8)
    ax.tick_params(length=0)
    ax.set(xlim=(0, mask.num_keys), ylim=(mask.num_queries, 0), aspect="equal")
    ax.set_xlabel(f"{xlabel}, by scale", fontsize=9)
    ax.set_ylabel(f"{ylabel}, by scale", fontsize=9)


def _finish(figure: Figure) -> None:
    handles = [
        Patch(color=FULL, label="block without a mask"),
        Line2D([], [], color="black", linewidth=0.9, label="tile, with its place in the launch"),
        Patch(color=ATTENDING, label="block with a mask: pairs that attend"),
        Patch(color=IN_VAIN, label="block with a mask: pairs computed in vain"),
    ]
    figure.legend(handles=handles, loc="upper center", ncols=2, frameon=False, fontsize=9, bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout(rect=(0, 0, 1, 0.95), h_pad=2, w_pad=2.5)


def intervals_figure() -> Figure:
    """Both patterns of a tiny pyramid and of the 256 px one, each query's interval a bar."""
    figure, axes = plt.subplots(2, 2, figsize=(9.2, 9.6), layout="constrained")
    named = {"30 tokens (sides 1, 2, 3, 4)": TINY, "256 px, 680 tokens": Pyramid.for_resolution(256)}
    for line, (name, pyramid) in zip(axes, named.items(), strict=True):
        for ax, pattern in zip(line, PATTERNS, strict=True):
            mask = mask_of(pyramid, pattern)
            draw_intervals(ax, mask, pyramid)
            ax.set_title(f"{pattern}, {name}\n{100 * mask.density:.0f} % of pairs attend", fontsize=10)
    return figure


def small_plan_figure() -> Figure:
    """Tiles of queries and tiles of keys of a small pyramid."""
    figure, axes = plt.subplots(2, 2, figsize=(9.2, 10.2))
    for line, pattern in zip(axes, PATTERNS, strict=True):
        mask = mask_of(SMALL, pattern)
        for ax, of_keys in zip(line, (False, True), strict=True):
            plan = (key_plan if of_keys else query_plan)(mask, *SMALL_TILE, "cpu")
            draw_plan(ax, mask, plan, SMALL, of_keys=of_keys)
            owner = "keys: dk, dv" if of_keys else "queries: forward, dq"
            ax.set_title(f"{pattern}, tiles of {SMALL_TILE[0]} {owner}", fontsize=10, pad=8)
    _finish(figure)
    return figure


def published_plan_figure() -> Figure:
    """The 256 px pyramid: an even grid of large tiles beside the planned tiles."""
    pyramid = Pyramid.for_resolution(256)
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 10.6))
    for line, pattern in zip(axes, PATTERNS, strict=True):
        mask = mask_of(pyramid, pattern)
        plans = {
            f"even grid, {EVEN_TILE[0]} x {EVEN_TILE[1]}": even_grid(mask, *EVEN_TILE),
            f"plan, {TILE[0]} x {TILE[1]}": query_plan(mask, *TILE, "cpu"),
        }
        for ax, (name, plan) in zip(line, plans.items(), strict=True):
            draw_plan(ax, mask, plan, pyramid)
            share = f"{100 * useful_share(mask, plan):.0f} % of the matrix work is of use"
            ax.set_title(f"{pattern}, {name}\n{share}", fontsize=10, pad=6)
    _finish(figure)
    return figure


def plan_table() -> str:
    """Markdown: what planning saves for every published pyramid."""
    lines = [
        "# Tiles of the published pyramids",
        "",
        "Made by `reports/plan_pictures.py`; no measurement. Tiles of queries, as the forward and dq passes use them. "
        '"Of use" is the share of the pairs which attend among those that the visited blocks hold; an even grid cuts '
        "rows and columns at multiples of the tile.",
        "",
        "| pyramid | pattern | rows x columns | tiles | blocks without mask | with mask | of use | of use, even grid |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for resolution in SIDES_BY_RESOLUTION:
        pyramid = Pyramid.for_resolution(resolution)
        for pattern in PATTERNS:
            mask = mask_of(pyramid, pattern)
            for shape in ((64, 64), (128, 64), (128, 128)):
                plan, even = query_plan(mask, *shape, "cpu"), even_grid(mask, *shape)
                full, masked = plan.block_counts()
                shares = [f"{100 * useful_share(mask, p):.0f} %" for p in (plan, even)]
                cells = [f"{resolution} px", pattern, f"{shape[0]} x {shape[1]}", plan.num_tiles, full, masked, *shares]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def build(out: Path) -> list[Path]:
    """Write all pictures and the table under `out`; returns their paths."""
    written = []
    figures = {"intervals": intervals_figure, "plan_small": small_plan_figure, "plan_256": published_plan_figure}
    (out / "plots").mkdir(parents=True, exist_ok=True)
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for name, make in figures.items():
        figure = make()
        written.append(out / "plots" / f"kernels_{name}.png")
        figure.savefig(written[-1], dpi=140, metadata={"Software": None})
        plt.close(figure)
    written.append(out / "tables" / "plans.md")
    written[-1].write_text(plan_table())
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of masks and tile plans.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder that gets plots/ and tables/")
    for path in build(parser.parse_args().output):
        print(path)


if __name__ == "__main__":
    main()
