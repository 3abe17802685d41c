"""Tables and plots of the attention benchmarks: `make report`, or `python reports/build.py`.

Reads every reports/data/*.json of kind "attention" (written by `pytest bench`) and writes tables/attention.csv,
tables/attention.md and, for each data file, plots/<file>_{time,memory,roofline}.png. A pure function of the data: no
measuring, no GPU, and nothing of this project is imported.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
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

# Order, label, colour (Okabe and Ito: told apart by colour-blind eyes) and marker of each implementation. Ours are the
# two strong ones; what is not listed comes last in grey.
LOOKS = {
    "cuda": ("ours: CUDA", "#D55E00", "*"),
    "triton": ("ours: Triton", "#0072B2", "o"),
    "reference": ("ours: plain reference", "#000000", "P"),
    "flex": ("FlexAttention", "#009E73", "s"),
    "flex_max_autotune": ("FlexAttention, max-autotune", "#8FD3B6", "D"),
    "varlen_flash": ("variable-length FlashAttention", "#E69F00", "^"),
    "flash_per_scale": ("FlashAttention, one call a scale", "#CC79A7", "v"),
    "sdpa_dense": ("SDPA, dense mask", "#999999", "X"),
}
OTHER_LOOK = ("#555555", "h")


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

    @property
    def cells(self) -> pd.DataFrame:
        return self.rows[CELL].drop_duplicates()


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
    for source in sources:
        for name, draw in (("time", draw_time), ("memory", draw_memory), ("roofline", draw_roofline)):
            figure = draw(source)
            if figure is not None:
                written.append(plots / f"{source.path.stem}_{name}.png")
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
        'Peak memory is that of one forward, or one forward + backward, inputs included. "Floor" is what the device '
        "needs at its measured copy and matrix-product rates, whichever is longer. A ratio above 1 means that the row "
        "is that many times faster.",
    ]
    for source in sources:
        env, ceilings = source.environment, source.ceilings
        parts += [
            f"## {env['gpu']}",
            f"[{source.path.name}](../data/{source.path.name}): commit `{_text(env['commit'])}`, {env['date'][:10]}, "
            f"torch {env['torch']}, triton {_text(env['triton'])}, CUDA {_text(env['cuda'])}, driver "
            f"{_text(env['driver'])}. Ceilings: copy {ceilings['copy_gb_per_s']:.0f} GB/s, bf16 "
            f"{ceilings['matmul_side']}³ product {ceilings['matmul_tflops']:.4g} TFLOP/s.",
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
    lines = []
    for cell, rows in _by_cell(source):
        for direction in DIRECTIONS:
            part = rows[(rows["direction"] == direction)]
            ours, rival = _fastest(part[part["ours"]]), _fastest(part[~part["ours"]])
            if ours is None and rival is None:
                continue
            ratio = rival["ms"] / ours["ms"] if ours is not None and rival is not None else None
            dense = _time_of(part, DENSE)
            lines.append(
                [
                    f"{cell['pattern']} {cell['resolution']}, {_size(cell)}",
                    direction,
                    _number(ours["ms"] if ours is not None else None),
                    ours["impl"] if ours is not None else DASH,
                    _number(rival["ms"] if rival is not None else None),
                    rival["impl"] if rival is not None else DASH,
                    _ratio(ratio),
                    _ratio(dense / ours["ms"] if dense and ours is not None else None),
                    _number(part["floor_ms"].iloc[0]),
                ]
            )
    head = [
        "cell",
        "direction",
        "ours, ms",
        "",
        "best rival, ms",
        "",
        "rival / ours",
        "dense SDPA / ours",
        "floor, ms",
    ]
    return _table(head, lines, left=(0, 1, 3, 5))


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
                f"{row['peak_mb']:.0f}" if not math.isnan(row["peak_mb"]) else DASH,
            ]
        )
    head = [direction, "ms", "p10 to p90", "vs best rival", "vs dense SDPA", "TFLOP/s", "GB/s", "peak MB"]
    return _table(head, lines, left=(0,))


def _notes(rows: pd.DataFrame) -> str:
    missing = rows[rows["status"] != "ok"]
    return "\n".join(f"* {_label(r['impl'])}: {r['status']}. {r['reason']}" for _, r in missing.iterrows())


def _table(head: list[str], lines: list[list[str]], left: tuple[int, ...]) -> str:
    rule = [":--" if i in left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


# Plots


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
    """TFLOP/s against FLOPs per byte, under the two measured ceilings."""
    rows = source.rows.dropna(subset="ms")
    directions = [d for d in DIRECTIONS if (rows["direction"] == d).any()]
    if not directions:
        return None
    copy, product = source.ceilings["copy_gb_per_s"], source.ceilings["matmul_tflops"]
    intensity = rows["flops"] / rows["bytes"]
    ridge = 1e3 * product / copy
    left, right = min(intensity.min(), ridge) / 1.7, max(intensity.max(), ridge) * 1.7
    bottom, top = rows["tflops"].min() / 5, product * 2.2  # the room below is for the names of the cells
    names = source.implementations
    figure, axes = plt.subplots(1, len(directions), figsize=(6.2 * len(directions), 6.2), sharey=True, squeeze=False)
    for ax, direction in zip(axes[0], directions, strict=True):
        ax.plot([left, ridge, right], [copy * left / 1e3, product, product], color="black", linewidth=1.4, zorder=2)
        ax.text(right, product * 1.06, f"bf16 product {product:.4g} TFLOP/s ", ha="right", fontsize=8)
        part = rows[rows["direction"] == direction]
        for at, cells in part.groupby(part["flops"] / part["bytes"], sort=True):
            roof = min(product, copy * at / 1e3)
            ax.vlines(at, bottom, roof, color="#cccccc", linewidth=0.8, zorder=1)
            for _, row in cells.iterrows():
                _, _, marker = _look(row["impl"])
                # NOTE: set apart a little, so that equal results do not hide each other.
                ax.scatter(
                    at * 1.03 ** (names.index(row["impl"]) - (len(names) - 1) / 2),
                    row["tflops"],
                    s=95 if marker == "*" else 48,
                    marker=marker,
                    color=_colour(row["impl"]),
                    edgecolor="white",
                    linewidth=0.6,
                    zorder=4 if row["ours"] else 3,
                )
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
        ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        angle = ax.transData.transform([(left, copy * left / 1e3), (ridge, product)])
        slope = math.degrees(math.atan2(angle[1][1] - angle[0][1], angle[1][0] - angle[0][0]))
        near = max(left * 1.1, 1.15e3 * bottom / copy)
        ax.text(
            near,
            copy * near / 1e3 * 1.1,
            f"copy {copy:.0f} GB/s",
            rotation=slope,
            rotation_mode="anchor",
            fontsize=8,
        )
        _plain_log_axis(ax.xaxis, left, right)
        _plain_log_axis(ax.yaxis, bottom, top)
        ax.set_title(direction, fontsize=11)
        ax.set_xlabel("FLOPs of unmasked pairs per byte that must move")
        ax.grid(axis="y", color="#eeeeee", linewidth=0.7, zorder=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("TFLOP/s of unmasked pairs")
    handles = [
        Line2D([], [], linestyle="", marker=_look(n)[2], markersize=7, color=_colour(n), label=_label(n)) for n in names
    ]
    _finish(figure, handles, f"Attention against the measured ceilings, {_origin(source)}")
    return figure


def _finish(figure: Figure, handles: list, title: str) -> None:
    width, height = figure.get_size_inches()
    columns = max(1, min(len(handles), int(width // 2.6)))
    lines = math.ceil(len(handles) / columns)
    figure.suptitle(title, fontsize=12, y=1 - 0.12 / height, va="top").set_in_layout(False)
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        bbox_to_anchor=(0.5, 1 - 0.42 / height),
    ).set_in_layout(False)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.5 + 0.24 * lines) / height))


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
    for column in ("ms", "p10_ms", "p90_ms", "peak_bytes"):
        rows[column] = pd.to_numeric(rows[column]).astype("float64")
    rows["gpu"], rows["commit"] = environment["gpu"], environment["commit"]
    rows["tflops"] = rows["flops"] / rows["ms"] / 1e9
    rows["gb_per_s"] = rows["bytes"] / rows["ms"] / 1e6
    rows["peak_mb"] = rows["peak_bytes"] / 1e6
    by_bytes, by_flops = (
        rows["bytes"] / ceilings["copy_gb_per_s"] / 1e6,
        rows["flops"] / ceilings["matmul_tflops"] / 1e9,
    )
    rows["floor_ms"] = pd.concat([by_bytes, by_flops], axis=1).max(axis=1)
    order = pd.DataFrame(
        {
            "pattern": rows["pattern"].map(PATTERNS.index),
            **{name: rows[name] for name in CELL[1:]},
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


def _look(name: str) -> tuple[str, str, str]:
    return LOOKS.get(name, (name, *OTHER_LOOK))


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


def _ratio(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and plots of the attention benchmarks.")
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
