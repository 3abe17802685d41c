"""Learning curves: data files of kind "loss_curve" (written by `python -m bench.loss_curve`), their tables and plots.

Read next: results.py, style.py; bench/loss_curve.py for the method.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .markdown import number, or_dash, table
from .results import data_files, provenance, write_tables
from .style import plain_log_axis, save

KIND, VERSIONS = "loss_curve", (1,)
COLUMNS = ["gpu", "commit", "stage", "preset", "depth", "batch", "seeds", "first_step", "last_step", "engine", "plain"]
COLUMNS += ["deviation", "spread", "ratio"]
STAGES = {"next-scale": "HMAR stage 1", "var": "VAR"}
# Label, colour and width of the curves: plain lies beneath and is seen as a rim.
LOOKS = {"plain": ("plain loop, float32", "#AAAAAA", 3.0), "engine": ("engine", "#8C1D40", 0.8)}
SPREAD = ("standard deviation of plain over seeds", "#444444", "s")
DEVIATION = ("|engine - plain|, mean over seeds", "#8C1D40", "o")


@dataclass(frozen=True)
class Source:
    """One data file of kind "loss_curve".

    Attributes:
        curves: "engine" and "plain" -> for each seed the loss of every step.
        windows: a frame of one row a window of steps, of COLUMNS.
        largest_ratio, passed: the verdict of the run, see bench/loss_curve.py.
    """

    path: Path
    environment: dict
    settings: dict
    curves: dict[str, list[list[float]]]
    windows: pd.DataFrame
    largest_ratio: float
    passed: bool

    @property
    def title(self) -> str:
        depth = f", {self.settings['depth']} blocks" if self.settings["depth"] else ""
        return f"{STAGES[self.settings['stage']]}, sizes of {self.settings['preset']}{depth}"


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write tables and plots of learning curves, if there are data; returns their paths."""
    sources = load(data)
    if not sources:
        return []
    written = write_tables(tables, KIND, csv(sources), markdown(sources))
    return written + [save(draw(source), plots / f"{source.path.stem}.png") for source in sources]


def load(folder: Path) -> list[Source]:
    """All such files of a folder, by name. Raises ValueError for a file of a version unknown here."""
    sources = []
    for path, content in data_files(folder, KIND, VERSIONS):
        environment, settings, curves = (content[name] for name in ("environment", "settings", "curves"))
        verdict = content["largest_ratio"], content["passed"]
        sources.append(Source(path, environment, settings, curves, _windows(content), *verdict))
    return sources


def _windows(content: dict) -> pd.DataFrame:
    settings, environment, curves = content["settings"], content["environment"], content["curves"]
    firsts = range(0, settings["steps"], settings["window"])
    lasts = [min(first + settings["window"], settings["steps"]) for first in firsts]

    def means(way: str) -> list[float]:
        return [
            statistics.fmean(statistics.fmean(curve[first:last]) for curve in curves[way])
            for first, last in zip(firsts, lasts, strict=True)
        ]

    rows = pd.DataFrame(
        {"first_step": [first + 1 for first in firsts], "last_step": lasts}
        | {way: means(way) for way in ("engine", "plain")}
        | {name: content[name] for name in ("deviation", "spread")}
    )
    rows["ratio"] = rows["deviation"] / rows["spread"]
    rows["gpu"], rows["commit"] = environment["gpu"], environment["commit"]
    for name in ("stage", "preset", "depth", "batch", "seeds"):
        rows[name] = settings[name]
    return rows[COLUMNS]


def csv(sources: list[Source]) -> str:
    """One line a window of steps; depth 0 is that of the preset."""
    rows = pd.concat([source.windows for source in sources])
    return rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def markdown(sources: list[Source]) -> str:
    """For each data file a sentence with the verdict, then every window."""
    parts = [
        "# Learning curves",
        "Made by `reports/build.py` from the data files named below; `bench/loss_curve.py` states the method: the "
        "engine as it trains by default beside a plain loop in float32, from the same weights, on the same batches and "
        'with the same drops. Losses are means over windows of steps, in nats a token. "Deviation" is the mean over '
        'seeds of |engine - plain|, "spread" the standard deviation of plain over seeds.',
    ]
    for source in sources:
        settings = source.settings
        parts += [
            f"## {source.title}: {source.environment['gpu']}",
            f"{provenance(source.path, source.environment, source.windows)}. {settings['seeds']} seeds, batch "
            f"{settings['batch']}, lr {settings['lr']:g}; engine: precision {settings['precision']}, residual stream "
            f"{settings['residual_precision']}, compile {settings['compile']}.",
            sentence(source),
            f"![Losses, and how far they are apart](../plots/{source.path.stem}.png)",
            _table(source.windows),
        ]
    return "\n\n".join(parts) + "\n"


def sentence(source: Source) -> str:
    """The verdict with the largest ratio of deviation to spread."""
    told = "equals that of the plain loop" if source.passed else "**does not equal** that of the plain loop"
    worst = source.windows.loc[source.windows["ratio"].idxmax()] if source.windows["ratio"].notna().any() else None
    where = f" (steps {worst['first_step']} to {worst['last_step']})" if worst is not None else ""
    other = not source.passed and source.largest_ratio <= 1
    return (
        f"The engine's curve of {source.settings['steps']} steps {told} within the spread of seeds: the largest "
        f"deviation in a window is {number(source.largest_ratio)} of the spread{where}; up to 1 is within it."
        + (" But some curve is not finite or does not fall." if other else "")
    )


def _table(rows: pd.DataFrame) -> str:
    lines = [
        [f"{row['first_step']} to {row['last_step']}"]
        + [f"{row[name]:.4f}" for name in ("engine", "plain")]
        + [number(row[name]) for name in ("deviation", "spread", "ratio")]
        for _, row in rows.iterrows()
    ]
    return table(["steps", "engine", "plain", "deviation", "spread", "deviation / spread"], lines, left=(0,))


def draw(source: Source) -> Figure:
    """Losses of every seed, and below them deviation and spread of the windows on a log scale."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7.5), sharex=True, height_ratios=(3, 2))
    for way, (label, colour, width) in LOOKS.items():
        for curve in source.curves[way]:
            above.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=width, label=label)
    rows = source.windows
    middle = (rows["first_step"] + rows["last_step"]) / 2
    for column, (label, colour, marker) in (("spread", SPREAD), ("deviation", DEVIATION)):
        below.plot(middle, rows[column], color=colour, marker=marker, markersize=5, linewidth=1.4, label=label)
    below.set_yscale("log")
    positive = pd.concat([rows["deviation"], rows["spread"]])
    positive = positive[positive > 0]
    if len(positive):
        below.set_ylim(positive.min() / 2, positive.max() * 2)
        plain_log_axis(below.yaxis, *below.get_ylim())
    below.legend(fontsize=8.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    seeds = f", {source.settings['seeds']} seeds"
    handles = [Line2D([], [], color=c, linewidth=max(w, 1.4), label=text + seeds) for text, c, w in LOOKS.values()]
    above.legend(handles=handles, fontsize=8.5, frameon=False, loc="upper right")
    above.set_ylabel("loss of a step, nats a token")
    below.set_ylabel(f"in means of {source.settings['window']} steps,\nnats a token (log scale)")
    below.set_xlabel("step")
    below.set_xlim(0, source.settings["steps"] + 1)
    for ax in (above, below):
        ax.grid(color="#e5e5e5", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    env = source.environment
    figure.suptitle(f"{source.title}, {env['gpu']}, commit {or_dash(env['commit'])[:10]}", fontsize=11)
    figure.tight_layout()
    return figure
