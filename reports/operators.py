"""Fused operators: data files of kind "operators" (written by `python -m bench.operators`), their tables and plots.

Read next: results.py, style.py; bench/operators.py for the method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .markdown import DASH, number, or_dash, percent, ratio, table, whole
from .results import data_files, provenance, write_tables
from .style import FLOOR_LINE, save

KIND, VERSIONS = "operators", (1,)
SHAPE = ["resolution", "depth", "batch"]
DIRECTIONS = ("forward", "backward", "forward_backward")
BOTH = "forward_backward"
COLUMNS = ["gpu", "commit", "operator", *SHAPE, "impl", "direction", "ms", "extra_mb", "times_compiler"]
OURS, COMPILER = "triton", "compiled"
# Order, label and colour of the implementations.
LOOKS = {
    OURS: ("ours: Triton", "#0072B2"),
    COMPILER: ("torch.compile", "#00694D"),
    "separate": ("our norm, torch's linear layer", "#E69F00"),
    "chunked": ("a quarter of the logits at a time", "#CC79A7"),
    "eager": ("eager", "#999999"),
}
# Operator -> (a, b): hmar.model calls it a * depth + b times in a training step, always with impl="auto", which is OURS
# on a GPU that can run it. tests/test_report.py holds this to the model.
CALLS = {
    "modulated_norm": (0, 0),
    "residual_modulated_norm": (0, 1),
    "residual_norm_linear": (2, -1),
    "gelu_linear": (1, 0),
    "qk_norm": (1, 0),
    "linear_cross_entropy": (0, 1),
}


@dataclass(frozen=True)
class Source:
    """One data file of kind "operators": where the numbers come from, and a frame of them in reading order."""

    path: Path
    environment: dict
    complete: bool
    rows: pd.DataFrame

    @property
    def measured(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.rows["ms"].notna().any())

    @property
    def plot(self) -> str:
        return f"{self.path.stem}_operators.png"


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write tables and plots of the operators, if there are data; returns their paths."""
    sources = load(data)
    if not sources:
        return []
    written = write_tables(tables, KIND, csv(sources), markdown(sources))
    return written + [save(draw(source), plots / source.plot) for source in sources if source.measured]


def load(folder: Path) -> list[Source]:
    """All such files of a folder, by name. Raises ValueError for a file of a version unknown here."""
    sources = []
    for path, content in data_files(folder, KIND, VERSIONS):
        if content["results"]:
            rows = _derive(pd.DataFrame(content["results"]), content["environment"], content["ceilings"])
            sources.append(Source(path, content["environment"], content["complete"], rows))
    return sources


def _derive(rows: pd.DataFrame, environment: dict, ceilings: dict) -> pd.DataFrame:
    """Adds what follows from the numbers."""
    for column in ("ms", "p10_ms", "p90_ms", "extra_bytes"):
        rows[column] = pd.to_numeric(rows[column]).astype("float64")
    rows["gpu"], rows["commit"] = environment["gpu"], environment["commit"]
    rows["extra_mb"] = rows["extra_bytes"] / 1e6
    cell = ["operator", *SHAPE, "direction"]
    compiler = rows[rows["impl"] == COMPILER].set_index(cell)["ms"]
    rows["times_compiler"] = rows[cell].merge(compiler, on=cell, how="left")["ms"].to_numpy() / rows["ms"]
    by_bytes = rows["bytes"] / ceilings["copy_gb_per_s"] / 1e6
    by_flops = rows["flops"] / ceilings["matmul_tflops"] / 1e9
    rows["floor_ms"] = pd.concat([by_bytes, by_flops], axis=1).max(axis=1)
    order = pd.DataFrame(
        {
            **{name: rows[name] for name in SHAPE},
            "operator": rows["operator"].map(lambda name: _rank(name, CALLS)),
            "impl": rows["impl"].map(lambda name: _rank(name, LOOKS)),
            "direction": rows["direction"].map(DIRECTIONS.index),
        }
    )
    return rows.loc[order.sort_values(list(order.columns)).index].reset_index(drop=True)


def csv(sources: list[Source]) -> str:
    """One line a measurement; times_compiler: how many times as fast as torch.compile. What failed or ran out of
    memory has empty numbers; what does not apply has no line."""
    rows = pd.concat([source.rows for source in sources])
    rows = rows[rows["status"] != "unavailable"]
    rounded = rows.assign(
        ms=rows["ms"].round(5), extra_mb=rows["extra_mb"].round(1), times_compiler=rows["times_compiler"].round(3)
    )
    return rounded[COLUMNS].to_csv(index=False, lineterminator="\n")


def markdown(sources: list[Source]) -> str:
    """For each data file which of ours and the compiler's is faster and which the model uses, then every shape."""
    parts = [
        "# Operators beside attention",
        "Made by `reports/build.py` from the data files named below; `bench/operators.py` states the method. Times are "
        "medians of device time; `torch.compile` and eager run the same plain operator. A ratio above 1 means that the "
        "row is that many times faster. What counts is both directions in one call: an operator may do work of the "
        'backward in the forward. "Calls" are those of a training step of the model. "Floor" is what the device '
        'needs at its measured copy and matrix-product rates, whichever is longer. "Extra MB" is the most that a call '
        "holds beside its inputs.",
    ]
    for source in sources:
        parts += [f"## {source.environment['gpu']}", f"{provenance(source.path, source.environment, source.rows)}."]
        if not source.complete:
            parts.append(_gaps(source))
        parts.append("\n".join(verdict(name, rows) for name, rows in _by_operator(source.rows)))
        if source.measured:
            parts.append(f"![Time of every operator](../plots/{source.plot})")
        for shape, rows in source.rows.groupby(SHAPE, sort=False):
            parts.append(f"### {_shape_label(shape)}")
            parts += [_shape_table(rows), _notes(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(name: str, rows: pd.DataFrame) -> str:
    """A line that says whether the model uses ours, and which of ours and the compiler's measured faster."""
    compared = _compared(rows)
    if compared.empty:
        return f"* `{name}`: {_use(name, rows)}. Which is faster is not known: not both were measured."
    found = compared[COMPILER] / compared[OURS]
    memory = _range(compared["extra_ours"] / compared["extra_compiler"])
    lines = [f"* `{name}`: {_use(name, rows)}."]
    if (found > 1).all():
        lines.append(f"Ours measured faster: {_range(found)} times as fast as torch.compile")
    elif (found <= 1).all():
        lines.append(f"**torch.compile measured faster**: ours is {_range(found)} times as fast")
    else:
        slow = ", ".join(_shape_label(shape) for shape in found.index[found <= 1])
        lines.append(f"**torch.compile measured faster at {slow}**: ours is {_range(found)} times as fast")
    lines.append("(forward + backward)" + (f", with {memory} times its extra memory." if memory else "."))
    others = _times(rows).drop(columns=[OURS, COMPILER]).min(axis=1).reindex(compared.index)
    if (others < compared[[OURS, COMPILER]].min(axis=1)).any():
        lines.append("Another implementation is faster than both in some shape: see the table.")
    return " ".join(lines)


def _compared(rows: pd.DataFrame) -> pd.DataFrame:
    """By shape ms of both directions of ours and of the compiler, and their extra memory, where both were measured."""
    found = _times(rows)[[OURS, COMPILER]]
    extra = _times(rows, "extra_mb")
    return found.assign(extra_ours=extra[OURS], extra_compiler=extra[COMPILER]).dropna(subset=[OURS, COMPILER])


def _times(rows: pd.DataFrame, column: str = "ms") -> pd.DataFrame:
    """Numbers of forward + backward by shape (index, in order) and implementation."""
    both = rows[rows["direction"] == BOTH]
    found = both.pivot(index=SHAPE, columns="impl", values=column)
    return found.reindex(columns=list(dict.fromkeys((OURS, COMPILER, *found.columns))))


def _use(name: str, rows: pd.DataFrame) -> str:
    if name not in CALLS:
        return "not an operator of a training step"
    depths = sorted(rows["depth"].unique())
    calls = [calls_in_step(name, depth) for depth in depths]
    if not any(calls):
        return "a training step does not call it"
    told = " and ".join(f"{n} at d{depth}" for n, depth in zip(calls, depths, strict=True))
    return f"the model uses ours (calls in a step: {told})"


def calls_in_step(name: str, depth: int) -> int:
    """How often a training step of a model of this depth calls an operator of CALLS."""
    by_block, others = CALLS[name]
    return by_block * depth + others


def _gaps(source: Source) -> str:
    """What a run that was cut short did not come to."""
    missing = [name for name in CALLS if name not in set(source.rows["operator"])]
    alone = [name for name, rows in _by_operator(source.rows) if COMPILER not in set(rows["impl"])]
    told = [f"no rows of {', '.join(f'`{name}`' for name in missing)}"] if missing else []
    told += [f"none of torch.compile beside {', '.join(f'`{name}`' for name in alone)}"] if alone else []
    return f"The run was cut short: {'; '.join(told) or 'shapes may be missing'}."


def _shape_table(rows: pd.DataFrame) -> str:
    lines = []
    for name, of_operator in _by_operator(rows[rows["status"] != "unavailable"]):
        for impl in dict.fromkeys(of_operator["impl"]):
            cells = {direction: _cell(of_operator, impl, direction) for direction in DIRECTIONS}
            both = cells[BOTH]
            depth = int(of_operator["depth"].iloc[0])
            measured = not math.isnan(both["ms"])
            lines.append(
                [
                    f"`{name}`",
                    str(calls_in_step(name, depth)) if name in CALLS else DASH,
                    _label(impl),
                    *(number(cells[direction]["ms"]) for direction in DIRECTIONS),
                    f"{number(both['p10_ms'])} to {number(both['p90_ms'])}" if measured else DASH,
                    ratio(both["times_compiler"]),
                    number(both["floor_ms"]),
                    percent(both["floor_ms"] / both["ms"]),
                    whole(cells["forward"]["extra_mb"]),
                    whole(both["extra_mb"]),
                ]
            )
    head = ["operator", "calls", "", "forward, ms", "backward, ms", "both, ms", "p10 to p90", "torch.compile / row"]
    return table([*head, "floor, ms", "floor / row", "extra MB forward", "extra MB both"], lines, left=(0, 2))


def _cell(rows: pd.DataFrame, impl: str, direction: str) -> pd.Series:
    """The row of an implementation; numbers are NaN where there is none."""
    found = rows[(rows["impl"] == impl) & (rows["direction"] == direction)]
    return found.iloc[0] if len(found) else pd.Series(math.nan, index=rows.columns)


def _notes(rows: pd.DataFrame) -> str:
    missing = rows[(rows["status"] != "ok") & (rows["direction"] == BOTH)]
    lines = [f"* `{r['operator']}`, {_label(r['impl'])}: {r['status']}. {r['reason']}" for _, r in missing.iterrows()]
    return "\n".join(lines)


def draw(source: Source) -> Figure:
    """Forward + backward of every operator as bars in groups of one shape, the forward alone in full colour."""
    rows = source.rows
    measured = rows.dropna(subset="ms")
    names = [name for name in CALLS if name in set(measured["operator"])]
    names += [name for name in measured["operator"].unique() if name not in CALLS]
    shapes = list(dict.fromkeys(measured[SHAPE].itertuples(index=False, name=None)))
    impls = sorted(measured["impl"].unique(), key=lambda name: _rank(name, LOOKS))
    columns = min(len(names), 3 if len(shapes) > 1 else 6)
    lines = math.ceil(len(names) / columns)
    width = max(7.0, columns * max(2.3, 0.24 * len(impls) * len(shapes) + 0.9))
    figure, axes = plt.subplots(lines, columns, figsize=(width, 3.2 * lines + 1.3), squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        _draw_panel(ax, rows[rows["operator"] == name], shapes)
        ax.set_title(name, fontsize=9.5)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    for ax in axes[:, 0]:
        ax.set_ylabel("time, ms")
    handles = [Patch(color=_colour(name), label=_label(name)) for name in impls]
    handles += [
        Patch(color="#555555", label="forward"),
        Patch(color="#555555", alpha=0.45, label="forward + backward"),
        Line2D([], [], label="floor of both (measured rates)", **FLOOR_LINE),
    ]
    _finish(figure, handles, source)
    return figure


def _draw_panel(ax: Axes, rows: pd.DataFrame, shapes: list[tuple]) -> None:
    impls = sorted({*rows.loc[rows["status"] != "unavailable", "impl"], COMPILER}, key=lambda name: _rank(name, LOOKS))
    bar = 0.84 / len(impls)
    for group, shape in enumerate(shapes):
        cells = rows[(rows[SHAPE] == list(shape)).all(axis=1)]
        for n, impl in enumerate(impls):
            x, both = group - 0.42 + (n + 0.5) * bar, _cell(cells, impl, BOTH)
            if not math.isnan(both["ms"]):
                ax.bar(x, both["ms"], bar * 0.94, color=_colour(impl), alpha=0.45, linewidth=0, zorder=3)
                ax.bar(x, _cell(cells, impl, "forward")["ms"], bar * 0.94, color=_colour(impl), zorder=4)
                place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom"}
                ax.annotate(number(both["ms"]), (x, both["ms"]), rotation=90, fontsize=7, zorder=5, **place)
            elif impl == COMPILER or both["status"] in ("failed", "out of memory"):
                reason = both["status"] if isinstance(both["status"], str) else "not measured"
                place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "zorder": 6}
                behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                ax.annotate(reason, (x, 0.02), rotation=90, fontsize=7, color=_colour(impl), bbox=behind, **place)
        floors = cells.loc[cells["direction"] == BOTH, "floor_ms"]
        if len(floors):
            ax.hlines(floors.iloc[0], group - 0.46, group + 0.46, zorder=5, **FLOOR_LINE)
    ax.set_ylim(0, 1.2 * rows.loc[rows["direction"] == BOTH, "ms"].max())
    ax.set_xlim(-0.6, len(shapes) - 0.4)
    labels = [f"{resolution} px d{depth}\nbatch {batch}" for resolution, depth, batch in shapes]
    ax.set_xticks(range(len(shapes)), labels, fontsize=7.5)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7, zorder=0)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, handles: list, source: Source) -> None:
    width, height = figure.get_size_inches()
    columns = max(1, min(len(handles), int(width // 2.6)))
    legend_lines = math.ceil(len(handles) / columns)
    env = source.environment
    title = f"Operators of a training step, {env['gpu']}, commit {or_dash(env['commit'])[:10]}"
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top").set_in_layout(False)
    anchor = (0.5, 1 - 0.38 / height)
    legend = figure.legend(
        handles=handles, loc="upper center", ncols=columns, frameon=False, fontsize=8.5, bbox_to_anchor=anchor
    )
    legend.set_in_layout(False)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.48 + 0.22 * legend_lines) / height))


def _by_operator(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for name in sorted(rows["operator"].unique(), key=lambda name: _rank(name, CALLS)):
        yield name, rows[rows["operator"] == name]


def _range(values: pd.Series) -> str:
    """Smallest to largest; empty where there is none."""
    values = values.dropna()
    if values.empty:
        return ""
    low, high = ratio(values.min()), ratio(values.max())
    return low if low == high else f"{low} to {high}"


def _shape_label(shape: tuple) -> str:
    resolution, depth, batch = shape
    return f"{resolution} px, d{depth}, batch {batch}"


def _rank(name: str, known: dict) -> tuple[int, str]:
    return (list(known).index(name) if name in known else len(known), name)


def _label(name: str) -> str:
    return LOOKS[name][0] if name in LOOKS else name


def _colour(name: str) -> str:
    return LOOKS[name][1] if name in LOOKS else "#444444"
