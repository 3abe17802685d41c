"""Training steps: data files of kind "training" (written by `python -m bench.training`), their tables and plots.

Read next: results.py, style.py; bench/training.py for the method.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .markdown import DASH, number, or_dash, percent, table
from .results import TARGET_GPU, data_files, write_tables
from .style import FLOOR_LINE, look_of, rank_of, save

KIND, VERSIONS = "training", (1, 2, 3)
SIZE = ["resolution", "depth", "batch"]
COLUMNS = ["gpu", "commit", "model", "attention", *SIZE, "ms", "peak_gb", "mfu"]
CELL = ["gpu", "commit", "model", "attention", *SIZE, "dtype"]
# The dense mask with plain operators and without a compiler.
PUBLISHED = "published"
MODELS = {"hmar": "HMAR stage 1", "var": "VAR"}
# (model, resolution, depth, batch) -> (ms, GB) of forward + backward on one H100 that this project set out to reach.
TARGETS = {
    ("hmar", 256, 16, 32): (65, 12),
    ("hmar", 256, 24, 16): (100, 16),
    ("hmar", 512, 16, 8): (60, 11),
    ("hmar", 512, 24, 8): (170, 22),
    ("hmar", 1024, 24, 2): (235, 24),
}


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write tables and plots of training steps, if there are data; returns their paths."""
    sources = load(data)
    if not sources:
        return []
    rows = pd.concat(sources.values()).sort_values(SIZE, kind="stable", ignore_index=True)
    written = write_tables(tables, KIND, csv(rows), markdown(rows))
    for path, of_file in sources.items():
        written.append(save(draw_steps(of_file), plots / f"{path.stem}_steps.png"))
    return written


def load(folder: Path) -> dict[Path, pd.DataFrame]:
    """Rows of all training data files of a folder. Raises ValueError for a file of a version unknown here."""
    frames = {}
    for path, content in data_files(folder, KIND, VERSIONS):
        if not content["results"]:
            continue
        rows = pd.DataFrame(content["results"])
        if "residual" not in rows:  # version 1
            rows["residual"] = "float32"
        if "cuda_graphs" not in rows:  # versions 1 and 2
            rows["cuda_graphs"] = "false"
        for column in ("ms", "forward_ms", "step_ms", "optimizer_share", "peak_bytes", "step_peak_bytes", "mfu"):
            rows[column] = pd.to_numeric(rows[column]).astype("float64")
        rows["gpu"] = content["environment"]["gpu"]
        as_published = {"attention": "sdpa_dense", "operators": "reference", "compile": "false", "cuda_graphs": "false"}
        published = (rows[list(as_published)] == list(as_published.values())).all(axis=1)
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
                "cuda_graphs": rows["cuda_graphs"],
                "residual": rows["residual"],
                "activation_checkpointing": rows["activation_checkpointing"],
            }
        )
        frames[path] = rows.loc[order.sort_values(list(order.columns)).index].reset_index(drop=True)
    return frames


def fastest_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each model, size and attention the fastest way to compile it, with all activations kept."""
    kept = rows[rows["activation_checkpointing"] == "none"]
    best = kept.sort_values("ms", kind="stable", na_position="last").groupby(CELL, sort=False, dropna=False)
    return kept.loc[sorted(best.head(1).index)]


def csv(rows: pd.DataFrame) -> str:
    """One line a model, size and attention; what failed or ran out of memory has empty numbers."""
    return fastest_steps(rows).to_csv(columns=COLUMNS, index=False, float_format="%.6g", lineterminator="\n")


def markdown(rows: pd.DataFrame) -> str:
    parts = [
        "# Training steps",
        "Forward + backward of model and loss, ms and peak GB (targets in brackets), what clipping and AdamW add, and "
        "MFU of model FLOPs. How it is measured: [bench/training.py](../../bench/training.py).",
    ]
    for cell, of_cell in rows.groupby(["gpu", "commit", *SIZE], sort=False, dropna=False):
        gpu, commit, resolution, depth, batch = cell
        parts.append(f"## {resolution} px, d{depth}, batch {batch}: {gpu}, commit {or_dash(commit)[:10]}")
        lines = []
        for _, row in of_cell.iterrows():
            goal = TARGETS.get((row["model"], resolution, depth, batch), (None, None)) if TARGET_GPU in gpu else ()
            ms, gb = (
                f"{number(row[column])}" + (f" ({target})" if target else "")
                for column, target in zip(("ms", "peak_gb"), goal or (None, None), strict=True)
            )
            operators = {"auto": "fused", "reference": "plain"}[row["operators"]]
            captured = {"true": "yes", "false": "no"}[row["cuda_graphs"]]
            ways = [MODELS[row["model"]], _label(row), operators, row["compile"], captured, row["residual"]]
            ways.append(row["activation_checkpointing"])
            if row["status"] != "ok":
                lines.append([*ways, row["status"], *[DASH] * 5])
                continue
            more = [number(row["forward_ms"]), gb, percent(row["optimizer_share"]), number(row["step_peak_gb"])]
            lines.append([*ways, ms, *more, percent(row["mfu"])])
        ways = ["model", "attention", "operators", "compile", "CUDA graph", "residual", "recomputed"]
        head = [*ways, "ms", "forward", "GB", "optimizer", "GB with it", "MFU"]
        parts.append(table(head, lines, left=range(len(ways))))
        reasons = of_cell[of_cell["status"] != "ok"]
        parts += [f"{_label(row)}, compile {row['compile']}: {row['reason']}" for _, row in reasons.iterrows()]
    return "\n\n".join(parts) + "\n"


def draw_steps(rows: pd.DataFrame) -> Figure:
    """Time and memory of each model and size, one bar an attention; lines are targets."""
    rows = fastest_steps(rows)
    cells = list(dict.fromkeys(rows[["model", "resolution", "depth", "batch"]].itertuples(index=False, name=None)))
    names = sorted(rows["attention"].unique(), key=_attention_rank)
    width = 0.8 / len(names)
    figure, panels = plt.subplots(2, 1, figsize=(max(6, 2 * len(names), 1.1 * len(cells) + 2), 7), sharex=True)
    for ax, column, label, index in zip(panels, ("ms", "peak_gb"), ("ms", "peak GB"), (0, 1), strict=True):
        for position, cell in enumerate(cells):
            same = rows[(rows[["model", "resolution", "depth", "batch"]] == list(cell)).all(axis=1)]
            for offset, name in enumerate(names):
                left = position - 0.4 + offset * width
                found = same.loc[same["attention"] == name]
                if found.empty:
                    continue
                value = found[column].iloc[0]
                _, colour, _ = _attention_look(name)
                if math.isnan(value):
                    reason = {"out of memory": "no memory"}.get(found["status"].iloc[0], found["status"].iloc[0])
                    ax.text(left + width / 2, 0, f" {reason}", rotation=90, ha="center", va="bottom", fontsize=7)
                else:
                    ax.bar(left, value, width, align="edge", color=colour)
            target = TARGETS.get(cell)
            if target is not None and rows["gpu"].str.contains(TARGET_GPU).all():
                ax.hlines(target[index], position - 0.45, position + 0.45, **FLOOR_LINE)
        ax.set_xlim(-0.6, len(cells) - 0.4)
        ax.set_ylabel(label)
        ax.grid(axis="y", linewidth=0.4)
        ax.set_axisbelow(True)
    panels[1].set_xticks(range(len(cells)))
    labels = [f"{MODELS[model]}\n{pixels} px d{depth}\nbatch {batch}" for model, pixels, depth, batch in cells]
    panels[1].set_xticklabels(labels, fontsize=7)
    handles = [Patch(color=_attention_look(name)[1], label=_attention_look(name)[0]) for name in names]
    commits = " and ".join(dict.fromkeys(commit[:7] for commit in rows["commit"].dropna()))
    figure.suptitle(f"Forward + backward, {', '.join(rows['gpu'].unique())}, commit {commits or '-'}", fontsize=10)
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.96), ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def _attention_look(name: str) -> tuple[str, str, str]:
    own = {"auto": ("ours", "#8C1D40", "D"), PUBLISHED: ("dense mask, as published", "#444444", "s")}
    return own.get(name) or look_of(name)


def _label(row: pd.Series) -> str:
    return _attention_look(row["attention"])[0]


def _attention_rank(name: str) -> tuple[int, str]:
    return (-1, name) if name == "auto" else rank_of(name)
