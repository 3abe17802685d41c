"""Plots of attention: time, memory and roofline of the main batches, and lines against resolution, batch and density.

Read next: style.py.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .attention_data import CELL, DIRECTIONS, PATTERNS, Source
from .markdown import number, or_dash
from .style import FLOOR_LINE, colour_of, label_of, look_of, plain_log_axis, rank_of

MEMORY_TITLES = {"forward": "forward", "backward": "forward + backward"}
HEAD_DIM = 64  # plots of other head dims say so in their name


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """Every plot that the rows have something for, with its name."""
    for head_dim in source.rows["head_dim"].drop_duplicates().sort_values():
        part = source.only(source.rows["head_dim"] == head_dim)
        models = part.only(part.rows["pattern"].isin(PATTERNS))
        plots = {
            "time": draw_time(models.main_batches()),
            "memory": draw_memory(models.main_batches()),
            "roofline": draw_roofline(models.main_batches()),
            "resolution": draw_resolution(models),
            "density": draw_density(part.main_batches()),
            **{f"batch_{pattern.removeprefix('block_')}": draw_batch(models, pattern) for pattern in PATTERNS},
        }
        for name, figure in plots.items():
            if figure is not None:
                yield name if head_dim == HEAD_DIM else f"{name}_d{head_dim}", figure


def draw_time(source: Source) -> Figure | None:
    """Median times as bars in groups of one cell, on a log scale, with the floor of each group."""
    return _draw_bars(source, "ms", "time, ms (log scale)", {d: d for d in DIRECTIONS}, log=True, floor=True)


def draw_memory(source: Source) -> Figure | None:
    """Peak memory of one call as bars."""
    return _draw_bars(source, "peak_mb", "peak memory, MB", MEMORY_TITLES, log=False, floor=False)


def _draw_bars(
    source: Source, column: str, ylabel: str, titles: dict[str, str], *, log: bool, floor: bool
) -> Figure | None:
    rows = source.rows
    if rows[column].isna().all():
        return None
    patterns = [p for p in PATTERNS if (rows["pattern"] == p).any()]
    directions = [d for d in DIRECTIONS if (rows["direction"] == d).any()]
    names = source.implementations
    groups = rows[CELL[1:]].drop_duplicates().to_dict("records")
    width = max(9.0, 0.30 * len(names) * len(groups) * len(patterns) + 2)
    figure, axes = plt.subplots(
        len(directions), len(patterns), figsize=(width, 3.3 * len(directions) + 1.4), sharey="row", squeeze=False
    )
    bar = 0.84 / len(names)
    for i, direction in enumerate(directions):
        for j, pattern in enumerate(patterns):
            ax = axes[i][j]
            panel = rows[(rows["direction"] == direction) & (rows["pattern"] == pattern)]
            for g, group in enumerate(groups):
                cell = panel[(panel[CELL[1:]] == pd.Series(group)).all(axis=1)].set_index("impl", drop=False)
                for n, name in enumerate(names):
                    if name in cell.index:
                        _draw_bar(ax, g - 0.42 + (n + 0.5) * bar, bar, cell.loc[name], column)
                if floor and len(cell):
                    ax.hlines(cell["floor_ms"].iloc[0], g - 0.45, g + 0.45, color="black", linewidth=1.4, zorder=4)
            ax.set_xticks(range(len(groups)), [_group_label(group) for group in groups])
            ax.set_xlim(-0.55, len(groups) - 0.45)
            ax.tick_params(axis="x", length=0)
            ax.set_title(f"{_words(pattern)}, {titles[direction]}", fontsize=11)
            ax.grid(axis="y", color="#dddddd", linewidth=0.7, zorder=0)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            if i == len(directions) - 1:
                ax.set_xlabel("resolution; images x heads x head dim", fontsize=9)
            if j == 0:
                ax.set_ylabel(ylabel)
        _set_bar_scale(axes[i], rows[rows["direction"] == direction], column, log, floor)
    handles = [Patch(color=colour_of(name), label=label_of(name)) for name in names]
    if floor:
        handles.append(Line2D([], [], color="black", linewidth=1.4, label="floor (measured copy and product rates)"))
    what = "Attention time" if column == "ms" else "Attention peak memory"
    _finish(figure, handles, f"{what}, {_origin(source)}")
    return figure


def _draw_bar(ax: Axes, x: float, width: float, row: pd.Series, column: str) -> None:
    value = row[column]
    if not math.isnan(value):
        ax.bar(x, value, width * 0.94, color=colour_of(row["impl"]), zorder=3)
        text = number(value) if column == "ms" else f"{value:.0f}"
        ax.annotate(
            text,
            (x, value),
            xytext=(0, 2),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=7,
            zorder=5,
        )
    elif row["status"] in ("failed", "out of memory"):
        ax.annotate(
            row["status"],
            (x, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=7,
            color=colour_of(row["impl"]),
        )


def _set_bar_scale(axes, rows: pd.DataFrame, column: str, log: bool, floor: bool) -> None:
    """One scale for a row of panels, with room above the bars for their numbers."""
    top = rows[column].max()
    if math.isnan(top):
        return
    for ax in axes:
        if not log:
            ax.set_ylim(0, top * 1.22)
            continue
        low = min(rows[column].min(), rows["floor_ms"].min() if floor else math.inf)
        bottom = low / 1.6
        ax.set_yscale("log")
        ax.set_ylim(bottom, top * (top / bottom) ** 0.16)
        plain_log_axis(ax.yaxis, *ax.get_ylim())


def draw_roofline(source: Source) -> Figure | None:
    """TFLOP/s, and below it GB/s, against FLOPs per byte, under the two measured ceilings."""
    rows = source.rows.dropna(subset="ms")
    directions = [d for d in DIRECTIONS if (rows["direction"] == d).any()]
    if not directions:
        return None
    copy, product = source.ceilings["copy_gb_per_s"], source.ceilings["matmul_tflops"]
    intensity = rows["flops"] / rows["bytes"]
    ridge = 1e3 * product / copy
    left, right = min(intensity.min(), ridge) / 1.7, max(intensity.max(), ridge) * 1.7
    # the room below the points is for the names of the cells
    scales = {
        "tflops": (rows["tflops"].min() / 5, product * 2.2, "TFLOP/s of unmasked pairs"),
        "gb_per_s": (rows["gb_per_s"].min() / 2, copy * 2.2, "GB/s of bytes that must move"),
    }
    figure, axes = plt.subplots(
        2, len(directions), figsize=(6.2 * len(directions), 10.5), sharex=True, sharey="row", squeeze=False
    )
    for i, (column, (bottom, top, ylabel)) in enumerate(scales.items()):
        for ax, direction in zip(axes[i], directions, strict=True):
            part = rows[rows["direction"] == direction]
            ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
            _draw_points(ax, part, column, source.implementations)
            _draw_ceilings(ax, column, copy, product, left, right)
            for at, cells in part.groupby(part["flops"] / part["bytes"], sort=True):
                roof = min(product, copy * at / 1e3)
                height = roof if column == "tflops" else 1e3 * roof / at
                ax.vlines(at, bottom, height, color="#cccccc", linewidth=0.8, zorder=1)
                if column == "tflops":
                    _name_cells(ax, at, bottom, cells)
            plain_log_axis(ax.xaxis, left, right)
            plain_log_axis(ax.yaxis, bottom, top)
            ax.tick_params(labelbottom=True)
            ax.set_title(direction, fontsize=11)
            ax.set_xlabel("FLOPs of unmasked pairs per byte that must move")
            ax.grid(axis="y", color="#eeeeee", linewidth=0.7, zorder=0)
            ax.spines[["top", "right"]].set_visible(False)
        axes[i][0].set_ylabel(ylabel)
    _finish(figure, _handles(source), f"Attention against the measured ceilings, {_origin(source)}")
    return figure


def _draw_points(ax: Axes, rows: pd.DataFrame, column: str, names: list[str]) -> None:
    """Every point at its true place. Those later in `names` are smaller and in front, so that less is hidden."""
    for _, row in rows.iterrows():
        marker, rank = look_of(row["impl"])[2], names.index(row["impl"])
        area = 70 - 48 * rank / max(1, len(names) - 1)  # points², of most markers
        ax.scatter(
            row["flops"] / row["bytes"],
            row[column],
            s=area * {"*": 1.9, "h": 1.5}.get(marker, 1),
            marker=marker,
            color=colour_of(row["impl"]),
            edgecolor="white",
            linewidth=0.6,
            zorder=3 + rank / 100,
        )


def _draw_ceilings(ax: Axes, column: str, copy: float, product: float, left: float, right: float) -> None:
    """The two straight lines of the roof, with their names; one of them slopes."""
    ridge = 1e3 * product / copy
    texts = {"copy": f"copy {copy:.0f} GB/s", "product": f"bf16 product {product:.4g} TFLOP/s"}
    if column == "tflops":
        corners = [(left, copy * left / 1e3), (ridge, product), (right, product)]
        level, sloping = "product", "copy"
        ax.text(right, product * 1.06, texts[level] + " ", ha="right", fontsize=8)
        near = max(left * 1.1, 1.15e3 * ax.get_ylim()[0] / copy)
        at, rise = (near, copy * near / 1e3 * 1.1), copy / 1e3
    else:
        corners = [(left, copy), (ridge, copy), (right, 1e3 * product / right)]
        level, sloping = "copy", "product"
        ax.text(left, copy * 1.06, " " + texts[level], ha="left", fontsize=8)
        at, rise = (ridge * 1.15, copy / 1.15 * 1.1), -copy / ridge / 1.15**2
    ax.plot(*zip(*corners, strict=True), color="black", linewidth=1.4, zorder=2)
    # An angle in units of the data: the panel's shape changes when the figure is laid out.
    angle = math.degrees(math.atan(rise))
    ax.text(*at, texts[sloping], rotation=angle, rotation_mode="anchor", transform_rotates_text=True, fontsize=8)


def _name_cells(ax: Axes, at: float, bottom: float, cells: pd.DataFrame) -> None:
    labels = sorted({_cell_label(row) for _, row in cells.iterrows()})
    ax.annotate(
        "\n".join(labels),
        (at, bottom),
        xytext=(-2, 4),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=7.5,
        color="#444444",
    )


def draw_resolution(source: Source) -> Figure | None:
    """Time and memory of an image against its resolution: at the largest batch that all resolutions of both patterns
    were measured with, or at the main batch of each."""
    rows = source.rows.dropna(subset="ms")
    patterns = [p for p in PATTERNS if rows[rows["pattern"] == p]["resolution"].nunique() > 1]
    if not patterns:
        return None
    places = ["pattern", "resolution"]
    number = len(rows[places].drop_duplicates())
    shared = [b for b, part in rows.groupby("batch") if len(part[places].drop_duplicates()) == number]
    chosen = source.only(source.rows["batch"] == max(shared)) if shared else source.main_batches()
    panels = [
        [
            Panel(f"{_words(pattern)}, {title}", _pick(chosen.rows, pattern, direction), column, guide, ylabel)
            for pattern in patterns
        ]
        for title, direction, column, guide, ylabel in _per_image_rows(chosen.rows)
    ]
    batches = f"batch {max(shared)}" if shared else "main batch of each"
    title = f"Attention against resolution, {batches}, {_origin(source)}"
    return _draw_lines(source, panels, "resolution", "resolution, px", title)


def draw_density(source: Source) -> Figure | None:
    """Time and memory of an image against the share of pairs that attend."""
    rows = source.rows.dropna(subset="ms")
    resolutions = [r for r, part in rows.groupby("resolution") if part["density"].nunique() > 1]
    if not resolutions:
        return None
    panels = [
        [
            Panel(
                f"{resolution} px, {title}",
                _pick(rows, None, direction, resolution),
                column,
                guide,
                ylabel,
                log=not column.startswith("extra"),
            )
            for resolution in resolutions
        ]
        for title, direction, column, guide, ylabel in _per_image_rows(rows)
    ]
    title = f"Attention against density of the mask, {_origin(source)}"
    return _draw_lines(source, panels, "density", "share of pairs that attend", title)


def draw_batch(source: Source, pattern: str) -> Figure | None:
    """Speed, and memory of an image, against the number of images."""
    rows = source.rows[source.rows["pattern"] == pattern].dropna(subset="ms")
    resolutions = [r for r, part in rows.groupby("resolution") if part["batch"].nunique() > 1]
    if not resolutions:
        return None
    kinds = [(d, d, "tflops", "floor_tflops", "TFLOP/s") for d in DIRECTIONS]
    panels = [
        [
            Panel(
                f"{resolution} px, {title}",
                _pick(rows, pattern, direction, resolution),
                column,
                guide,
                ylabel,
                log=not column.startswith("extra"),
            )
            for resolution in resolutions
        ]
        for title, direction, column, guide, ylabel in [*kinds, *_per_image_rows(rows)[2:]]
    ]
    title = f"Attention against batch, {_words(pattern)}, {_origin(source)}"
    return _draw_lines(source, panels, "batch", "images", title)


@dataclass(frozen=True)
class Panel:
    """Lines of `column`, one an implementation, and one of `guide`, which is what the device or the data need."""

    title: str
    rows: pd.DataFrame
    column: str
    guide: str
    ylabel: str
    log: bool = True


def _per_image_rows(rows: pd.DataFrame) -> list[tuple[str, str, str, str, str]]:
    """(title, direction, column, guide, label) of the rows of panels: both times, and memory where it was read."""
    kinds = [(d, d, "ms_per_image", "floor_ms_per_image", "ms an image") for d in DIRECTIONS]
    if rows["extra_mb"].notna().any():
        kinds.append(
            (MEMORY_TITLES["backward"], "backward", "extra_mb_per_image", "least_mb_per_image", "extra MB an image")
        )
    return kinds


def _pick(rows: pd.DataFrame, pattern: str | None, direction: str, resolution: int | None = None) -> pd.DataFrame:
    keep = rows["direction"] == direction
    if pattern is not None:
        keep &= rows["pattern"] == pattern
    if resolution is not None:
        keep &= rows["resolution"] == resolution
    return rows[keep]


def _draw_lines(source: Source, panels: list[list[Panel]], x: str, xlabel: str, title: str) -> Figure:
    figure, axes = plt.subplots(
        len(panels), len(panels[0]), figsize=(4.6 * len(panels[0]) + 1, 3.4 * len(panels) + 1.6), squeeze=False
    )
    for line, panels_of_line in zip(axes, panels, strict=True):
        for ax, panel in zip(line, panels_of_line, strict=True):
            rows = panel.rows.dropna(subset=panel.column)
            for name in sorted(rows["impl"].unique(), key=rank_of, reverse=True):
                part = rows[rows["impl"] == name].sort_values(x)
                ours, marker = bool(part["ours"].iloc[0]), look_of(name)[2]
                ax.plot(
                    part[x],
                    part[panel.column],
                    color=colour_of(name),
                    marker=marker,
                    markersize=9 if marker == "*" else 7 if ours else 6,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    linewidth=(2.0, 4.0)[name != "cuda"] if ours else 1.2,  # level lines show as a rim
                    zorder=4 if ours else 3,
                )
            guide = panel.rows.dropna(subset=panel.guide).drop_duplicates(x).sort_values(x)
            ax.plot(guide[x], guide[panel.guide], zorder=5, **FLOOR_LINE)
            ax.set_xscale("log" if x != "density" else "linear")
            values = pd.concat([rows[panel.column], guide[panel.guide]])
            if panel.log:
                ax.set_yscale("log")
                ax.set_ylim(values.min() / 1.4, values.max() * 1.4)
                plain_log_axis(ax.yaxis, *ax.get_ylim())
            else:
                ax.set_ylim(0, values.max() * 1.1)
            if x != "density":
                ticks = sorted(rows[x].unique())
                ax.xaxis.set_major_locator(FixedLocator(ticks))
                ax.xaxis.set_minor_locator(NullLocator())
                ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.set_title(panel.title, fontsize=11)
            ax.set_ylabel(panel.ylabel)
            ax.set_xlabel(xlabel)
            ax.grid(color="#e5e5e5", linewidth=0.7, zorder=0)
            ax.spines[["top", "right"]].set_visible(False)
    limit = Line2D(
        [], [], color="black", linewidth=1.2, linestyle=(0, (4, 2)), label="floor: measured rates, least bytes"
    )
    _finish(figure, [*_handles(source), limit], title)
    return figure


def _handles(source: Source) -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", marker=look_of(n)[2], markersize=7, color=colour_of(n), label=label_of(n))
        for n in source.implementations
    ]


def _finish(figure: Figure, handles: list, title: str) -> None:
    width, height = figure.get_size_inches()
    columns = max(1, min(len(handles), int(width // 2.6)))
    lines = math.ceil(len(handles) / columns)
    title_lines = textwrap.wrap(title, width=int(10 * width))
    figure.suptitle("\n".join(title_lines), fontsize=12, y=1 - 0.12 / height, va="top").set_in_layout(False)
    top = 0.42 + 0.2 * (len(title_lines) - 1)  # inches from the top to the legend
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        bbox_to_anchor=(0.5, 1 - top / height),
    ).set_in_layout(False)
    figure.tight_layout(rect=(0, 0, 1, 1 - (top + 0.08 + 0.24 * lines) / height))


def _words(pattern: str) -> str:
    return pattern.replace("_", "-")


def _group_label(group: dict) -> str:
    return f"{group['resolution']} px\n{group['batch']} x {group['heads']} x {group['head_dim']}"


def _cell_label(row: pd.Series) -> str:
    return f"{_words(row['pattern']).removeprefix('block-')} {row['resolution']}"


def _origin(source: Source) -> str:
    dtypes = " and ".join(source.rows["dtype"].unique())
    return f"{source.environment['gpu']}, {dtypes}, commit {or_dash(source.environment['commit'])[:10]}"
