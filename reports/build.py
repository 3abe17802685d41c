"""Tables and plots of the benchmarks: `make report`, or `python reports/build.py`.

Reads every reports/data/*.json of kind "attention" (written by `pytest bench`) and writes tables/attention.csv,
tables/attention.md and, for each data file, plots/<file>_<what>.png: time, memory and roofline of the largest batch,
speed and memory against resolution, batch and density. Head dims beside 64 have plots of their own, named
<file>_<what>_d128.png. Files of kind "training" (`python -m bench.training`) give tables/training.csv,
tables/training.md and plots/<file>_steps.png, those of kind "generation" (`python -m bench.generation`)
tables/generation.csv, tables/generation.md and plots/<file>_batch.png. A pure function of the data: no measuring, no
GPU, and nothing of this project is imported.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

HERE = Path(__file__).resolve().parent
KIND, VERSIONS = "attention", (1, 2)
CELL = ["pattern", "resolution", "batch", "heads", "head_dim", "dtype"]
COLUMNS = ["gpu", "commit", *CELL, "impl", "direction", "ms", "tflops", "gb_per_s", "peak_mb"]
PATTERNS = ("block_diagonal", "block_causal")
DIRECTIONS = ("forward", "backward")
MEMORY_TITLES = {"forward": "forward", "backward": "forward + backward"}
DENSE = "sdpa_dense"
DASH = "-"
HEAD_DIM = 64  # plots of other head dims say so in their name

MAIN_BATCH = {256: 64, 512: 16, 1024: 4}  # by resolution: about as many tokens in each; the batches of the targets

# What this project set out to reach on one H100: (forward, backward) in ms of (pattern, resolution, batch, heads, head
# dim) in bfloat16.
TARGET_GPU, TARGET_DTYPE = "H100", "bfloat16"
TARGETS = {
    ("block_diagonal", 256, 64, 16, 64): (0.140, 0.40),
    ("block_causal", 256, 64, 16, 64): (0.18, 0.60),
    ("block_diagonal", 512, 16, 24, 64): (0.32, 1.0),
    ("block_causal", 512, 16, 24, 64): (0.60, 2.0),
    ("block_diagonal", 1024, 4, 24, 64): (1.00, 3.0),
    ("block_causal", 1024, 4, 24, 64): (2.35, 7.0),
}

# Order, label, colour (told apart by colour-blind eyes; light and dark of one hue for two ways to call one library) and
# marker of each implementation. Ours are the two strong ones; what is not listed comes last.
LOOKS = {
    "hopper_bounded": ("ours: Hopper, bounded logits", "#8C1D40", "D"),
    "hopper": ("ours: Hopper", "#D55E00", "*"),
    "cuda": ("ours: CUDA for sm_80", "#F0A07A", "h"),
    "triton": ("ours: Triton", "#0072B2", "o"),
    "reference": ("ours: plain reference", "#000000", "P"),
    "flash4_varlen": ("FlashAttention-4, variable length", "#6A3D9A", "^"),
    "flash4_per_scale": ("FlashAttention-4, one call a scale", "#B9A3D6", "v"),
    "varlen_flash": ("FlashAttention-2, variable length", "#E69F00", "<"),
    "flash_per_scale": ("FlashAttention-2, one call a scale", "#F6D27E", ">"),
    "flex_max_autotune": ("FlexAttention, max-autotune", "#00694D", "D"),
    "flex": ("FlexAttention", "#7CCBAE", "s"),
    "sdpa_dense": ("SDPA, dense mask", "#999999", "X"),
}
TRAINING_VERSIONS = (1,)
TRAINING_COLUMNS = ["gpu", "commit", "model", "attention", "resolution", "depth", "batch", "ms", "peak_gb", "mfu"]
TRAINING_CELL = ["gpu", "commit", "model", "attention", "resolution", "depth", "batch", "dtype"]
# The dense mask with plain operators and without a compiler.
PUBLISHED = "published"
MODELS = {"hmar": "HMAR stage 1", "var": "VAR"}
# (model, resolution, depth, batch) -> (ms, GB) of forward + backward on one H100 that this project set out to reach.
TRAINING_TARGETS = {
    ("hmar", 256, 16, 32): (65, 12),
    ("hmar", 256, 24, 16): (100, 16),
    ("hmar", 512, 16, 8): (60, 11),
    ("hmar", 512, 24, 8): (170, 22),
    ("hmar", 1024, 24, 2): (235, 24),
}

FLOOR_LINE = {"color": "black", "linewidth": 1.2, "linestyle": (0, (4, 2))}
OTHER_LOOKS = (("#CC79A7", "h"), ("#8C564B", "p"), ("#444444", "d"))


@dataclass(frozen=True)
class Source:
    """One data file: where the numbers come from, and a frame of them with derived columns, in reading order."""

    path: Path
    environment: dict
    ceilings: dict
    rows: pd.DataFrame

    @property
    def implementations(self) -> list[str]:
        """Those with at least one number, in order."""
        measured = self.rows.dropna(subset="ms")["impl"].unique()
        return sorted(measured, key=_rank)

    def only(self, keep: pd.Series) -> Source:
        """The rows where `keep` is true."""
        return replace(self, rows=self.rows[keep].reset_index(drop=True))

    def main_batches(self) -> Source:
        """One batch a pattern, resolution, head dim and dtype: that of MAIN_BATCH, or else the largest."""
        rows = self.rows
        same = [rows[name] for name in ("pattern", "resolution", "head_dim", "dtype")]
        rank = rows["batch"].where(rows["batch"] != rows["resolution"].map(MAIN_BATCH), math.inf)
        return self.only(rank == rank.groupby(same).transform("max"))


def load(folder: Path) -> list[Source]:
    """All attention data files of a folder, by name. Raises ValueError for a file of a version unknown here."""
    sources = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("kind") != KIND:
            continue
        if content.get("version") not in VERSIONS:
            raise ValueError(f"{path} is of version {content.get('version')}; this script reads versions 1 and 2")
        rows = _derive(pd.DataFrame(content["results"]), content["environment"], content["ceilings"])
        sources.append(Source(path, content["environment"], content["ceilings"], rows))
    return sources


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write all tables and plots; returns their paths."""
    sources = load(data)
    if not sources:
        raise ValueError(f"no attention results in {data}; `pytest bench --benchmark-only` on a GPU writes them")
    tables.mkdir(parents=True, exist_ok=True)
    plots.mkdir(parents=True, exist_ok=True)
    written = [tables / "attention.csv", tables / "attention.md"]
    written[0].write_text(attention_csv(sources))
    written[1].write_text(attention_markdown(sources))
    written += build_generation(data, tables, plots)
    for source in sources:
        for name, figure in draw(source):
            written.append(plots / f"{source.path.stem}_{name}.png")
            figure.savefig(written[-1], dpi=140, metadata={"Software": None})
            plt.close(figure)
    return written + build_training(data, tables, plots)


def build_training(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Tables and plots of training steps; none without such data."""
    sources = load_training(data)
    if not sources:
        return []
    rows = pd.concat(sources.values(), ignore_index=True)
    written = [tables / "training.csv", tables / "training.md"]
    written[0].write_text(training_csv(rows))
    written[1].write_text(training_markdown(rows))
    for path, of_file in sources.items():
        written.append(plots / f"{path.stem}_steps.png")
        figure = draw_steps(of_file)
        figure.savefig(written[-1], dpi=140, metadata={"Software": None})
        plt.close(figure)
    return written


# Tables


def attention_csv(sources: list[Source]) -> str:
    """One line a measurement. What failed or ran out of memory has empty numbers; what does not apply has no line."""
    rows = pd.concat([source.rows for source in sources])
    rows = rows[rows["status"] != "unavailable"]
    rounded = rows.assign(
        ms=rows["ms"].round(5),
        tflops=rows["tflops"].round(2),
        gb_per_s=rows["gb_per_s"].round(1),
        peak_mb=rows["peak_mb"].round(1),
    )
    return rounded[COLUMNS].to_csv(index=False, lineterminator="\n")


def attention_markdown(sources: list[Source]) -> str:
    """For each data file a summary of ours against the best rival, then every cell in full."""
    parts = [
        "# Attention",
        "Made by `reports/build.py` from the data files named below; `bench/__init__.py` states the method. "
        "Times are medians of device time. TFLOP/s count unmasked pairs only, GB/s the fewest bytes that must move. "
        'Peak memory is that of one forward, or one forward + backward, inputs included; "extra" is without them, and '
        '"least" what outputs, gradients, lse and delta take. "Floor" is what the device needs at its measured copy '
        "and matrix-product rates, whichever is longer. A ratio above 1 means that the row is that many times faster. "
        '"Host" is the time of the host for a call.',
    ]
    for source in sources:
        env, ceilings = source.environment, source.ceilings
        commits = ", ".join(f"`{_text(commit)}`" for commit in source.rows["commit"].drop_duplicates())
        parts += [
            f"## {env['gpu']}",
            f"[{source.path.name}](../data/{source.path.name}): commit {commits}, {env['date'][:10]}, "
            f"torch {env['torch']}, triton {_text(env['triton'])}, CUDA {_text(env['cuda'])}, driver "
            f"{_text(env['driver'])}, flash-attn-4 {_text(env.get('flash_attn_4'))}. Ceilings: copy "
            f"{ceilings['copy_gb_per_s']:.0f} GB/s, bf16 {ceilings['matmul_side']}³ product "
            f"{ceilings['matmul_tflops']:.4g} TFLOP/s.",
            _summary(source),
        ]
        for cell, rows in _by_cell(source):
            parts.append(f"### {cell['pattern']} {cell['resolution']}, {_size(cell)}, {cell['dtype']}")
            for direction in DIRECTIONS:
                part = rows[rows["direction"] == direction]
                if len(part):
                    parts += [_cell_table(part), _notes(part)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(source: Source) -> str:
    """The fastest of ours against the fastest rival, the target, the dense mask and the floor."""
    lines = []
    for cell, rows in _by_cell(source):
        for direction in DIRECTIONS:
            part = rows[(rows["direction"] == direction)]
            ours, rival = _fastest(part[part["ours"]]), _fastest(part[~part["ours"]])
            if ours is None and rival is None:
                continue
            time = ours["ms"] if ours is not None else math.nan
            target = _target(source, cell, direction)
            lines.append(
                [
                    f"{cell['pattern']} {cell['resolution']}, {_size(cell)}",
                    direction,
                    _number(time),
                    ours["impl"] if ours is not None else DASH,
                    _number(rival["ms"] if rival is not None else None),
                    rival["impl"] if rival is not None else DASH,
                    _ratio(rival["ms"] / time if rival is not None else None),
                    _number(target),
                    _ratio(target / time),
                    _ratio((_time_of(part, DENSE) or math.nan) / time),
                    _number(part["floor_ms"].iloc[0]),
                    _percent(part["floor_ms"].iloc[0] / time),
                    _megabytes(ours["extra_mb"] if ours is not None else math.nan),
                    _megabytes(part["least_mb"].iloc[0]),
                ]
            )
    head = ["cell", "direction", "ours, ms", "", "best rival, ms", "", "rival / ours", "target, ms", "target / ours"]
    head += ["dense SDPA / ours", "floor, ms", "floor / ours", "extra MB", "least"]
    return _table(head, lines, left=(0, 1, 3, 5))


def _target(source: Source, cell: dict, direction: str) -> float:
    """NaN where none was set."""
    if TARGET_GPU not in source.environment["gpu"] or cell["dtype"] != TARGET_DTYPE:
        return math.nan
    target = TARGETS.get(tuple(cell[name] for name in CELL if name != "dtype"))
    return target[DIRECTIONS.index(direction)] if target else math.nan


def _cell_table(rows: pd.DataFrame) -> str:
    direction = rows["direction"].iloc[0]
    rival, dense = _fastest(rows[~rows["ours"]]), _time_of(rows, DENSE)
    lines = []
    for _, row in rows[rows["status"] != "unavailable"].iterrows():
        measured = not math.isnan(row["ms"])
        lines.append(
            [
                _label(row["impl"]),
                _number(row["ms"]),
                f"{_number(row['p10_ms'])} to {_number(row['p90_ms'])}" if measured else DASH,
                _ratio(rival["ms"] / row["ms"] if measured and rival is not None else None),
                _ratio(dense / row["ms"] if measured and dense else None),
                _number(row["tflops"]),
                _number(row["gb_per_s"]),
                _megabytes(row["peak_mb"]),
                _megabytes(row["extra_mb"]),
                _megabytes(row["host_us"]),
            ]
        )
    head = [direction, "ms", "p10 to p90", "vs best rival", "vs dense SDPA", "TFLOP/s", "GB/s", "peak MB", "extra MB"]
    return _table([*head, "host, us"], lines, left=(0,))


def _notes(rows: pd.DataFrame) -> str:
    missing = rows[rows["status"] != "ok"]
    return "\n".join(f"* {_label(r['impl'])}: {r['status']}. {r['reason']}" for _, r in missing.iterrows())


def _table(head: list[str], lines: list[list[str]], left: tuple[int, ...]) -> str:
    rule = [":--" if i in left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


# Plots


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
    handles = [Patch(color=_colour(name), label=_label(name)) for name in names]
    if floor:
        handles.append(Line2D([], [], color="black", linewidth=1.4, label="floor (measured copy and product rates)"))
    what = "Attention time" if column == "ms" else "Attention peak memory"
    _finish(figure, handles, f"{what}, {_origin(source)}")
    return figure


def _draw_bar(ax: Axes, x: float, width: float, row: pd.Series, column: str) -> None:
    value = row[column]
    if not math.isnan(value):
        ax.bar(x, value, width * 0.94, color=_colour(row["impl"]), zorder=3)
        text = _number(value) if column == "ms" else f"{value:.0f}"
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
            color=_colour(row["impl"]),
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
        _plain_log_axis(ax.yaxis, *ax.get_ylim())


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
            _plain_log_axis(ax.xaxis, left, right)
            _plain_log_axis(ax.yaxis, bottom, top)
            ax.tick_params(labelbottom=True)
            ax.set_title(direction, fontsize=11)
            ax.set_xlabel("FLOPs of unmasked pairs per byte that must move")
            ax.grid(axis="y", color="#eeeeee", linewidth=0.7, zorder=0)
            ax.spines[["top", "right"]].set_visible(False)
        axes[i][0].set_ylabel(ylabel)
    _finish(figure, _handles(source), f"Attention against the measured ceilings, {_origin(source)}")
    return figure


def _draw_points(ax: Axes, rows: pd.DataFrame, column: str, names: list[str]) -> None:
    for _, row in rows.iterrows():
        marker = _look(row["impl"])[2]
        # NOTE: set apart a little, so that equal results do not hide each other.
        ax.scatter(
            row["flops"] / row["bytes"] * 1.03 ** (names.index(row["impl"]) - (len(names) - 1) / 2),
            row[column],
            s=95 if marker == "*" else 48,
            marker=marker,
            color=_colour(row["impl"]),
            edgecolor="white",
            linewidth=0.6,
            zorder=4 if row["ours"] else 3,
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
    """Time and memory of an image against its resolution: at the largest batch that all resolutions were measured with,
    or at the main batch of each."""
    rows = source.rows.dropna(subset="ms")
    patterns = [p for p in PATTERNS if rows[rows["pattern"] == p]["resolution"].nunique() > 1]
    if not patterns:
        return None
    shared = [b for b, part in rows.groupby("batch") if part["resolution"].nunique() == rows["resolution"].nunique()]
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
            for name in sorted(rows["impl"].unique(), key=_rank, reverse=True):
                part = rows[rows["impl"] == name].sort_values(x)
                ours, marker = bool(part["ours"].iloc[0]), _look(name)[2]
                ax.plot(
                    part[x],
                    part[panel.column],
                    color=_colour(name),
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
                _plain_log_axis(ax.yaxis, *ax.get_ylim())
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
        Line2D([], [], linestyle="", marker=_look(n)[2], markersize=7, color=_colour(n), label=_label(n))
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


def _plain_log_axis(axis, low: float, high: float) -> None:
    """Ticks at 1, 2, 5 and their multiples of ten, written as plain numbers."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = high / low > 1e4
    ticks = [m * 10.0**e for e in exponents for m in ((1,) if few else (1, 2, 5)) if low <= m * 10.0**e <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# Reading


def _derive(rows: pd.DataFrame, environment: dict, ceilings: dict) -> pd.DataFrame:
    """Adds what follows from the numbers. Rows of version 1 have no commit, host_us and fewest_extra_bytes."""
    for column in ("ms", "p10_ms", "p90_ms", "peak_bytes", "extra_bytes", "fewest_extra_bytes", "host_us", "host_ms"):
        rows[column] = pd.to_numeric(rows[column]).astype("float64") if column in rows else math.nan
    rows["gpu"] = environment["gpu"]
    if "commit" not in rows:
        rows["commit"] = environment["commit"]
    rows["host_us"] = rows["host_us"].fillna(1e3 * rows["host_ms"])
    rows["tflops"] = rows["flops"] / rows["ms"] / 1e9
    rows["gb_per_s"] = rows["bytes"] / rows["ms"] / 1e6
    if "length" in rows:
        tensor = rows["bytes"] / rows["direction"].map({"forward": 4, "backward": 8})
        statistics = 4 * rows["batch"] * rows["heads"] * rows["length"]
        forward = tensor + statistics  # out, lse; dq, dk, dv and delta too
        least = forward.where(rows["direction"] == "forward", 4 * tensor + 2 * statistics)
        rows["fewest_extra_bytes"] = rows["fewest_extra_bytes"].fillna(least)
    rows["peak_mb"], rows["extra_mb"] = rows["peak_bytes"] / 1e6, rows["extra_bytes"] / 1e6
    rows["least_mb"] = rows["fewest_extra_bytes"] / 1e6
    rows["density"] = rows["pairs"] / rows["length"] ** 2 if "pairs" in rows else math.nan
    for column in ("ms", "extra_mb", "least_mb"):
        rows[f"{column}_per_image"] = rows[column] / rows["batch"]
    by_bytes, by_flops = (
        rows["bytes"] / ceilings["copy_gb_per_s"] / 1e6,
        rows["flops"] / ceilings["matmul_tflops"] / 1e9,
    )
    rows["floor_ms"] = pd.concat([by_bytes, by_flops], axis=1).max(axis=1)
    rows["floor_ms_per_image"] = rows["floor_ms"] / rows["batch"]
    rows["floor_tflops"] = rows["flops"] / rows["floor_ms"] / 1e9
    order = pd.DataFrame(
        {
            "head_dim": rows["head_dim"],
            "pattern": rows["pattern"].map(_pattern_rank),
            "resolution": rows["resolution"],
            "batch": -rows["batch"],
            "heads": rows["heads"],
            "dtype": rows["dtype"],
            "direction": rows["direction"].map(DIRECTIONS.index),
            "impl": rows["impl"].map(_rank),
        }
    )
    return rows.loc[order.sort_values(list(order.columns)).index].reset_index(drop=True)


def _by_cell(source: Source):
    for cell, rows in source.rows.groupby(CELL, sort=False):
        yield dict(zip(CELL, cell, strict=True)), rows


def _fastest(rows: pd.DataFrame) -> pd.Series | None:
    measured = rows.dropna(subset="ms")
    return measured.loc[measured["ms"].idxmin()] if len(measured) else None


def _time_of(rows: pd.DataFrame, name: str) -> float | None:
    times = rows.loc[rows["impl"] == name, "ms"].dropna()
    return float(times.iloc[0]) if len(times) else None


# Words


def _rank(name: str) -> tuple[int, str]:
    return (list(LOOKS).index(name) if name in LOOKS else len(LOOKS), name)


def _pattern_rank(pattern: str) -> tuple[int, str]:
    return (PATTERNS.index(pattern) if pattern in PATTERNS else len(PATTERNS), pattern)


def _look(name: str) -> tuple[str, str, str]:
    return LOOKS.get(name) or (name, *OTHER_LOOKS[sum(name.encode()) % len(OTHER_LOOKS)])


def _label(name: str) -> str:
    return _look(name)[0]


def _colour(name: str) -> str:
    return _look(name)[1]


def _words(pattern: str) -> str:
    return pattern.replace("_", "-")


def _size(cell: dict) -> str:
    return f"{cell['batch']} images x {cell['heads']} heads x {cell['head_dim']}"


def _group_label(group: dict) -> str:
    return f"{group['resolution']} px\n{group['batch']} x {group['heads']} x {group['head_dim']}"


def _cell_label(row: pd.Series) -> str:
    return f"{_words(row['pattern']).removeprefix('block-')} {row['resolution']}"


def _origin(source: Source) -> str:
    dtypes = " and ".join(source.rows["dtype"].unique())
    return f"{source.environment['gpu']}, {dtypes}, commit {_text(source.environment['commit'])[:10]}"


def _text(value: str | None) -> str:
    return DASH if value is None else value


def _number(value: float | None) -> str:
    """Three significant digits, never in powers of ten."""
    if value is None or math.isnan(value):
        return DASH
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _megabytes(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.0f}"


def _percent(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.0f} %"


def _ratio(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.2f}"


# Training steps


def load_training(folder: Path) -> dict[Path, pd.DataFrame]:
    """Rows of all training data files of a folder. Raises ValueError for a file of a version unknown here."""
    frames = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("kind") != "training" or not content["results"]:
            continue
        if content.get("version") not in TRAINING_VERSIONS:
            raise ValueError(f"{path} is of version {content.get('version')}; this script reads version 1")
        rows = pd.DataFrame(content["results"])
        for column in ("ms", "forward_ms", "step_ms", "optimizer_share", "peak_bytes", "step_peak_bytes", "mfu"):
            rows[column] = pd.to_numeric(rows[column]).astype("float64")
        rows["gpu"] = content["environment"]["gpu"]
        published = (
            (rows["attention"] == "sdpa_dense") & (rows["operators"] == "reference") & (rows["compile"] == "false")
        )
        rows.loc[published, "attention"] = PUBLISHED
        rows["peak_gb"], rows["step_peak_gb"] = rows["peak_bytes"] / 1e9, rows["step_peak_bytes"] / 1e9
        order = pd.DataFrame(
            {
                "resolution": rows["resolution"],
                "depth": rows["depth"],
                "batch": rows["batch"],
                "model": rows["model"].map(list(MODELS).index),
                "attention": rows["attention"].map(_attention_rank),
                "operators": rows["operators"],
                "compile": rows["compile"],
                "activation_checkpointing": rows["activation_checkpointing"],
            }
        )
        frames[path] = rows.loc[order.sort_values(list(order.columns)).index].reset_index(drop=True)
    return frames


def fastest_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each model, size and attention the fastest way to compile it, with all activations kept."""
    kept = rows[rows["activation_checkpointing"] == "none"]
    best = kept.sort_values("ms", kind="stable", na_position="last").groupby(TRAINING_CELL, sort=False, dropna=False)
    return kept.loc[sorted(best.head(1).index)]


def training_csv(rows: pd.DataFrame) -> str:
    """One line a model, size and attention; what failed or ran out of memory has empty numbers."""
    return fastest_steps(rows).to_csv(columns=TRAINING_COLUMNS, index=False, float_format="%.6g", lineterminator="\n")


def training_markdown(rows: pd.DataFrame) -> str:
    parts = [
        "# Training steps",
        "Forward + backward of model and loss, ms and peak GB (targets in brackets), what clipping and AdamW add, and "
        "MFU of model FLOPs. How it is measured: [bench/training.py](../../bench/training.py).",
    ]
    for cell, of_cell in rows.groupby(["gpu", "commit", "resolution", "depth", "batch"], sort=False, dropna=False):
        gpu, commit, resolution, depth, batch = cell
        parts.append(f"## {resolution} px, d{depth}, batch {batch}: {gpu}, commit {_text(commit)[:10]}")
        lines = []
        for _, row in of_cell.iterrows():
            goal = TRAINING_TARGETS.get((row["model"], resolution, depth, batch), (None, None)) if "H100" in gpu else ()
            ms, gb = (
                f"{_number(row[column])}" + (f" ({target})" if target else "")
                for column, target in zip(("ms", "peak_gb"), goal or (None, None), strict=True)
            )
            operators = {"auto": "fused", "reference": "plain"}[row["operators"]]
            ways = [MODELS[row["model"]], _attention(row), operators, row["compile"], row["activation_checkpointing"]]
            if row["status"] != "ok":
                lines.append([*ways, row["status"], *[DASH] * 5])
                continue
            more = [_number(row["forward_ms"]), gb, _percent(row["optimizer_share"]), _number(row["step_peak_gb"])]
            lines.append([*ways, ms, *more, _percent(row["mfu"])])
        ways = ["model", "attention", "operators", "compile", "recomputed"]
        head = [*ways, "ms", "forward", "GB", "optimizer", "GB with it", "MFU"]
        parts.append(_table(head, lines, left=range(len(ways))))
        reasons = of_cell[of_cell["status"] != "ok"]
        parts += [f"{_attention(row)}, compile {row['compile']}: {row['reason']}" for _, row in reasons.iterrows()]
    return "\n\n".join(parts) + "\n"


def draw_steps(rows: pd.DataFrame) -> Figure:
    """Time and memory of each model and size, one bar an attention; lines are targets."""
    rows = fastest_steps(rows)
    cells = list(dict.fromkeys(rows[["model", "resolution", "depth", "batch"]].itertuples(index=False, name=None)))
    names = sorted(rows["attention"].unique(), key=_attention_rank)
    width = 0.8 / len(names)
    figure, panels = plt.subplots(2, 1, figsize=(max(6, 1.1 * len(cells) + 2), 7), sharex=True)
    for ax, column, label, index in zip(panels, ("ms", "peak_gb"), ("ms", "peak GB"), (0, 1), strict=True):
        for position, cell in enumerate(cells):
            same = rows[(rows[["model", "resolution", "depth", "batch"]] == list(cell)).all(axis=1)]
            for offset, name in enumerate(names):
                left = position - 0.4 + offset * width
                found = same.loc[same["attention"] == name]
                if found.empty:
                    continue
                value = found[column].iloc[0]
                _, colour, _ = _training_look(name)
                if math.isnan(value):
                    reason = {"out of memory": "no memory"}.get(found["status"].iloc[0], found["status"].iloc[0])
                    ax.text(left + width / 2, 0, f" {reason}", rotation=90, ha="center", va="bottom", fontsize=7)
                else:
                    ax.bar(left, value, width, align="edge", color=colour)
            target = TRAINING_TARGETS.get(cell)
            if target is not None and rows["gpu"].str.contains("H100").all():
                ax.hlines(target[index], position - 0.45, position + 0.45, **FLOOR_LINE)
        ax.set_xlim(-0.6, len(cells) - 0.4)
        ax.set_ylabel(label)
        ax.grid(axis="y", linewidth=0.4)
        ax.set_axisbelow(True)
    panels[1].set_xticks(range(len(cells)))
    labels = [f"{MODELS[model]}\n{pixels} px d{depth}\nbatch {batch}" for model, pixels, depth, batch in cells]
    panels[1].set_xticklabels(labels, fontsize=7)
    handles = [Patch(color=_training_look(name)[1], label=_training_look(name)[0]) for name in names]
    figure.legend(handles=handles, loc="upper center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    return figure


def _training_look(name: str) -> tuple[str, str, str]:
    own = {"auto": ("ours", "#8C1D40", "D"), PUBLISHED: ("dense mask, as published", "#444444", "s")}
    return own.get(name) or _look(name)


def _attention(row: pd.Series) -> str:
    return _training_look(row["attention"])[0]


def _attention_rank(name: str) -> tuple[int, str]:
    return (-1, name) if name == "auto" else _rank(name)


# Generation

GENERATION_KIND, GENERATION_VERSION = "generation", 1
GENERATION_CELL = ["model", "engine", "schedule", "resolution", "depth", "batch"]
GENERATION_COLUMNS = ["gpu", "commit", *GENERATION_CELL, "ms", "images_per_s", "peak_gb"]
PARTS = ("transformer", "sampling", "quantizer", "decode")
# What this project set out to reach on one H100, with decode, HMAR with default schedules: ms of (resolution, depth,
# batch).
GENERATION_TARGETS = {
    (256, 16, 1): 12,
    (256, 16, 16): 45,
    (256, 30, 1): 25,
    (256, 30, 16): 150,
    (512, 24, 1): 30,
    (512, 24, 16): 300,
    (1024, 24, 1): 90,
    (1024, 24, 8): 800,
}
GENERATION_LOOKS = {
    ("hmar", "optimised", "default"): ("HMAR, optimised", "#D55E00", "*"),
    ("hmar", "optimised", "none"): ("HMAR, optimised, one pass a scale", "#F0A07A", "h"),
    ("hmar", "eager", "default"): ("HMAR, eager", "#0072B2", "o"),
    ("hmar", "eager", "none"): ("HMAR, eager, one pass a scale", "#8FC1E3", "s"),
    ("var", "optimised", "none"): ("VAR, optimised", "#00694D", "D"),
    ("var", "eager", "none"): ("VAR, eager", "#999999", "X"),
}


@dataclass(frozen=True)
class GenerationSource:
    """One data file of kind "generation": where the numbers come from, and a frame of them."""

    path: Path
    environment: dict
    rows: pd.DataFrame


def load_generation(folder: Path) -> list[GenerationSource]:
    """All such files of a folder, by name. Raises ValueError for a file of a version unknown here."""
    sources = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("kind") != GENERATION_KIND:
            continue
        if content.get("version") != GENERATION_VERSION:
            raise ValueError(
                f"{path} is of version {content.get('version')}; this script reads version {GENERATION_VERSION}"
            )
        rows = pd.DataFrame(content["results"])
        rows["gpu"] = content["environment"]["gpu"]
        for name in ("ms", "p10_ms", "p90_ms", "images_per_s", "peak_gb", "graph_gb"):
            rows[name] = rows[name].astype(float)
        look = [tuple(key) for key in rows[["model", "engine", "schedule"]].to_numpy()]
        rows["order"] = [list(GENERATION_LOOKS).index(key) for key in look]
        rows = rows.sort_values(["resolution", "depth", "batch", "order"], kind="stable").reset_index(drop=True)
        sources.append(GenerationSource(path, content["environment"], rows))
    return sources


def build_generation(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Tables and plots of generation, if there is data; returns their paths."""
    sources = load_generation(data)
    if not sources:
        return []
    written = [tables / "generation.csv", tables / "generation.md"]
    written[0].write_text(generation_csv(sources))
    written[1].write_text(generation_markdown(sources))
    for source in sources:
        written.append(plots / f"{source.path.stem}_batch.png")
        figure = draw_generation(source)
        figure.savefig(written[-1], dpi=140, metadata={"Software": None})
        plt.close(figure)
    return written


def generation_csv(sources: list[GenerationSource]) -> str:
    """One line a measurement. What failed or ran out of memory has empty numbers."""
    rows = pd.concat([source.rows for source in sources])
    rounded = rows.assign(
        ms=rows["ms"].round(3), images_per_s=rows["images_per_s"].round(3), peak_gb=rows["peak_gb"].round(3)
    )
    return rounded[GENERATION_COLUMNS].to_csv(index=False, lineterminator="\n")


def generation_markdown(sources: list[GenerationSource]) -> str:
    """For each data file a table of every size: engines against each other, the targets, and where the time goes."""
    parts = [
        "# Generation",
        "Made by `reports/build.py` from the data files named below; `bench/generation.py` states the method. From "
        "classes to pixels, random weights of the published sizes; ms is the median time of a batch. A ratio above 1 "
        "means that the row is that many times faster. Parts are timed alone, so they need not add up to the whole.",
    ]
    for source in sources:
        env = source.environment
        commits = ", ".join(f"`{_text(commit)}`" for commit in source.rows["commit"].drop_duplicates())
        parts += [
            f"## {env['gpu']}",
            f"[{source.path.name}](../data/{source.path.name}): commit {commits}, {env['date'][:10]}, torch "
            f"{env['torch']}, triton {_text(env['triton'])}, CUDA {_text(env['cuda'])}, driver {_text(env['driver'])}.",
        ]
        for (resolution, depth, batch), rows in source.rows.groupby(["resolution", "depth", "batch"], sort=False):
            parts.append(f"### {resolution:.0f} px, d{depth}, batch {batch}")
            parts += [_generation_table(rows), _generation_notes(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _generation_table(rows: pd.DataFrame) -> str:
    def time_of(model: str, engine: str, schedule: str) -> float:
        found = rows[(rows["model"] == model) & (rows["engine"] == engine) & (rows["schedule"] == schedule)]["ms"]
        return found.iloc[0] if len(found) else math.nan

    lines = []
    for _, row in rows.iterrows():
        is_goal = (row["model"], row["engine"], row["schedule"]) == ("hmar", "optimised", "default")
        on_goal_gpu = TARGET_GPU in row["gpu"]
        size = (row["resolution"], row["depth"], row["batch"])
        target = GENERATION_TARGETS.get(size, math.nan) if is_goal and on_goal_gpu else math.nan
        found = row["parts_ms"] if isinstance(row["parts_ms"], dict) else {}
        lines.append(
            [
                GENERATION_LOOKS[row["model"], row["engine"], row["schedule"]][0],
                _number(row["ms"]),
                f"{_number(row['p10_ms'])} to {_number(row['p90_ms'])}" if not math.isnan(row["ms"]) else DASH,
                _number(row["images_per_s"]),
                _number(row["peak_gb"]),
                _number(target),
                _ratio(target / row["ms"]),
                _ratio(time_of("var", "eager", "none") / row["ms"]),
                _ratio(time_of("var", "optimised", "none") / row["ms"]),
                *(_number(found.get(part)) for part in PARTS),
            ]
        )
    head = ["", "ms", "p10 to p90", "images/s", "peak GB", "target, ms", "target / ours", "VAR eager / row"]
    return _table([*head, "VAR optimised / row", *(f"{part}, ms" for part in PARTS)], lines, left=(0,))


def _generation_notes(rows: pd.DataFrame) -> str:
    missing = rows[rows["status"] != "ok"]
    return "\n".join(
        f"* {GENERATION_LOOKS[r['model'], r['engine'], r['schedule']][0]}: {r['status']}. {r['reason']}"
        for _, r in missing.iterrows()
    )


def draw_generation(source: GenerationSource) -> Figure:
    """Images a second and peak memory against the batch, a column for each size of model and image."""
    sizes = source.rows[["resolution", "depth"]].drop_duplicates().to_dict("records")
    figure, axes = plt.subplots(2, len(sizes), figsize=(3.6 * len(sizes) + 1, 7), squeeze=False, layout="constrained")
    for j, size in enumerate(sizes):
        rows = source.rows[(source.rows["resolution"] == size["resolution"]) & (source.rows["depth"] == size["depth"])]
        for i, (column, label) in enumerate((("images_per_s", "images / s"), ("peak_gb", "peak memory, GB"))):
            ax = axes[i][j]
            for key, (name, colour, marker) in GENERATION_LOOKS.items():
                model, engine, schedule = key
                line = rows[
                    (rows["model"] == model) & (rows["engine"] == engine) & (rows["schedule"] == schedule)
                ].dropna(subset=column)
                if len(line):
                    ax.plot(line["batch"], line[column], color=colour, marker=marker, label=name, linewidth=1.4)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.grid(color="#dddddd", linewidth=0.7)
            ax.spines[["top", "right"]].set_visible(False)
            if i == 0:
                ax.set_title(f"{size['resolution']:.0f} px, d{size['depth']}", fontsize=11)
            else:
                ax.set_xlabel("batch")
            if j == 0:
                ax.set_ylabel(label)
    labelled = {
        label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"Generation, {source.environment['gpu']}, commit {_text(source.environment['commit'])[:10]}")
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and plots of the benchmarks.")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of raw results")
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets tables/ and plots/")
    options = parser.parse_args(arguments)
    try:
        written = build(options.data, options.out / "tables", options.out / "plots")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
