"""Drawing codes: data files of kind "sampling" (written by `python -m bench.sampling`), their table and plot.

Read next: results.py, style.py; bench/sampling.py for the method.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .markdown import DASH, number, or_dash, ratio, table
from .results import Source, data_files, provenance, write_tables
from .style import FLOOR_LINE, plain_log_axis, save

KIND, VERSIONS = "sampling", (1,)
TRUNCATION = ["top_k", "top_p"]
CELL = ["resolution", "batch", "tokens", *TRUNCATION]
COLUMNS = ["gpu", "commit", *CELL, "impl", "us", "gb_per_s", "extra_kb", "host_us"]
# Order, label, colour and marker of the implementations; those of ours first, and the reference, which takes no part.
LOOKS = {
    "cuda": ("ours: CUDA for sm_90a", "#D55E00", "*"),
    "triton": ("ours: Triton", "#0072B2", "o"),
    "reference": ("ours: plain reference", "#000000", "P"),
    "sort_compiled": ("a sort in torch, compiled", "#00694D", "D"),
    "sort": ("a sort in torch", "#999999", "X"),
}
RIVALS = ("sort_compiled", "sort")


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write the table and a plot for each file, if there are data; returns their paths."""
    sources = load(data)
    if not sources:
        return []
    written = write_tables(tables, KIND, csv(sources), markdown(sources))
    return written + [save(draw(source), plots / f"{source.path.stem}.png") for source in sources]


def load(folder: Path) -> list[Source]:
    """All such files of a folder, by name. Raises ValueError for a file of a version unknown here."""
    sources = []
    for path, content in data_files(folder, KIND, VERSIONS):
        if not content["results"]:
            continue
        rows = pd.DataFrame(content["results"])
        for name in ("ms", "p10_ms", "p90_ms", "extra_bytes", "host_us"):
            rows[name] = rows[name].astype(float)
        rows["gpu"] = content["environment"]["gpu"]
        rows["rows"] = rows["batch"] * rows["tokens"]
        rows["us"] = 1e3 * rows["ms"]
        rows["read_us"] = rows["bytes"] / content["ceilings"]["copy_gb_per_s"] / 1e3
        rows["gb_per_s"] = rows["bytes"] / rows["us"] / 1e3
        rows["extra_kb"] = rows["extra_bytes"] / 1e3
        rows["order"] = rows["impl"].map(list(LOOKS).index)
        rows = rows.sort_values([*TRUNCATION, "rows", "resolution", "order"], kind="stable").reset_index(drop=True)
        sources.append(Source(path, content["environment"], rows))
    return sources


def csv(sources: list[Source]) -> str:
    """One line a measurement. What failed has empty numbers."""
    digits = {"us": 2, "gb_per_s": 2, "extra_kb": 3, "host_us": 1}
    return (
        pd.concat([source.rows for source in sources]).round(digits)[COLUMNS].to_csv(index=False, lineterminator="\n")
    )


def markdown(sources: list[Source]) -> str:
    """For each data file and truncation a table of every size: times, memory, and how far ahead of torch ours is."""
    parts = [
        "# Drawing codes",
        "Made by `reports/build.py` from the data files named below; `bench/sampling.py` states the method. A draw is "
        "guidance, truncation, a code and its confidence for every row of logits, of which an image has one a token; "
        "us is the device's median time with caches flushed, the launch included; 'read' is the time to read the "
        "logits at the speed of a copy. Extra memory is what a call takes beside its arguments. A ratio above 1 means "
        "that the fastest of ours is that many times faster than the fastest in torch.",
    ]
    for source in sources:
        env = source.environment
        parts += [f"## {env['gpu']}", f"{provenance(source.path, env, source.rows)}."]
        names = [name for name in LOOKS if name in set(source.rows["impl"])]
        for (top_k, top_p), rows in source.rows.groupby(TRUNCATION, sort=False):
            head = ["image", "batch", "tokens", *(f"{LOOKS[name][0]}, us" for name in names)]
            head += ["torch / ours", "read, us", "extra kB: ours", "torch"]
            lines = []
            for (resolution, batch, tokens), cell in rows.groupby(CELL[:3], sort=False, dropna=False):
                by_impl = {row["impl"]: row for _, row in cell.iterrows()}
                ours, theirs = _fastest(by_impl, ("cuda", "triton")), _fastest(by_impl, RIVALS)
                lines.append(
                    [
                        DASH if pd.isna(resolution) else f"{resolution:.0f} px",
                        f"{batch}",
                        f"{tokens}",
                        *(number(by_impl[name]["us"]) if name in by_impl else DASH for name in names),
                        DASH if ours is None or theirs is None else ratio(theirs["us"] / ours["us"]),
                        number(cell["read_us"].iloc[0]),
                        DASH if ours is None else number(ours["extra_kb"]),
                        DASH if theirs is None else number(theirs["extra_kb"]),
                    ]
                )
            parts += [f"### {truncation_name(top_k, top_p)}", table(head, lines, left=(0,))]
        parts.append("\n".join(f"* {r['impl']}: {r['status']}. {r['reason']}" for r in _failed(source.rows)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _fastest(by_impl: dict[str, pd.Series], names: tuple[str, ...]) -> pd.Series | None:
    measured = [by_impl[name] for name in names if name in by_impl and not pd.isna(by_impl[name]["us"])]
    return min(measured, key=lambda row: row["us"], default=None)


def _failed(rows: pd.DataFrame) -> list[pd.Series]:
    return [row for _, row in rows[rows["status"] != "ok"].iterrows()]


def truncation_name(top_k: int, top_p: float) -> str:
    kept = ([f"top-k {top_k}"] if top_k else []) + ([f"top-p {top_p:g}"] if top_p else [])
    return ", ".join(kept) or "No truncation"


def draw(source: Source) -> Figure:
    """Time of a draw against its rows, a column for each truncation, and the time to read the logits once."""
    kinds = list(source.rows.groupby(TRUNCATION, sort=False))
    figure, axes = plt.subplots(1, len(kinds), figsize=(max(7, 4 * len(kinds) + 1), 4.6), squeeze=False, sharey=True)
    figure.set_layout_engine("constrained")
    for ax, ((top_k, top_p), rows) in zip(axes[0], kinds, strict=True):
        for name, (label, colour, marker) in LOOKS.items():
            line = rows[rows["impl"] == name].dropna(subset="us")
            if len(line):
                ax.plot(line["rows"], line["us"], color=colour, marker=marker, label=label, linewidth=1.4)
        floor = rows.drop_duplicates("rows")
        ax.plot(floor["rows"], floor["read_us"], label="logits read once", **FLOOR_LINE)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(truncation_name(top_k, top_p), fontsize=11)
        ax.set_xlabel(f"rows of {source.rows['codes'].iloc[0]} logits")
        ax.grid(color="#dddddd", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
        plain_log_axis(ax.xaxis, rows["rows"].min(), rows["rows"].max())
    low, high = source.rows["us"].min() / 10, 2 * source.rows["us"].max()
    axes[0][0].set_ylim(low, high)
    plain_log_axis(axes[0][0].yaxis, low, high)
    axes[0][0].set_ylabel("us")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    commit = or_dash(source.environment["commit"])[:10]
    figure.suptitle(f"Drawing codes, {source.environment['gpu']}, commit {commit}")
    return figure
