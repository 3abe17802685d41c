"""Generation: data files of kind "generation" (written by `python -m bench.generation`), their tables and plots.

Beside H100 data stand times of the published code that others measured (`PEERS`, a file of its own).

Read next: results.py, style.py; bench/generation.py for the method.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .markdown import DASH, number, or_dash, ratio, table
from .results import TARGET_GPU, Source, data_files, provenance, write_tables
from .style import FLOOR_LINE, save

KIND, VERSIONS = "generation", (1,)
CELL = ["model", "engine", "schedule", "resolution", "depth", "batch"]
COLUMNS = ["gpu", "commit", *CELL, "ms", "images_per_s", "peak_gb"]
PARTS = ("transformer", "sampling", "quantizer", "decode")
# The published code on an H100, measured elsewhere: ms of a batch with decode, and GB. Rows by `impl`, in this order.
PEERS = "generation_peers_h100.csv"
PEER_COLUMNS = ["impl", "resolution", "depth", "batch", "ms", "peak_gb"]
PEER_NAMES = {
    "official_var_fp16_autocast": "official VAR, measured elsewhere",
    "official_hmar_without_masked_passes_fp16_autocast": "official HMAR, without masked passes, measured elsewhere",
    "official_hmar_masked_tf32": "official HMAR, measured elsewhere",
}
BLOCK_ROWS = 32  # up to which the kernel of whole blocks takes a pass; two rows a token, with the null class
# What this project set out to reach on one H100, with decode, HMAR with default schedules: ms of (resolution, depth,
# batch).
TARGETS = {
    (256, 16, 1): 12,
    (256, 16, 16): 45,
    (256, 30, 1): 25,
    (256, 30, 16): 150,
    (512, 24, 1): 30,
    (512, 24, 16): 300,
    (1024, 24, 1): 90,
    (1024, 24, 8): 800,
}
LOOKS = {
    ("hmar", "optimised", "default"): ("HMAR, optimised", "#D55E00", "*"),
    ("hmar", "optimised", "none"): ("HMAR, optimised, one pass a scale", "#F0A07A", "h"),
    ("hmar", "eager", "default"): ("HMAR, eager", "#0072B2", "o"),
    ("hmar", "eager", "none"): ("HMAR, eager, one pass a scale", "#8FC1E3", "s"),
    ("var", "optimised", "none"): ("VAR, optimised", "#00694D", "D"),
    ("var", "eager", "none"): ("VAR, eager", "#999999", "X"),
}


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write tables and plots of generation, if there are data; returns their paths."""
    sources = load(data)
    if not sources:
        return []
    written = write_tables(tables, KIND, csv(sources), markdown(sources, load_peers(data)))
    for source in sources:
        written.append(save(draw(source), plots / f"{source.path.stem}_batch.png"))
        if (figure := draw_scales(source)) is not None:
            written.append(save(figure, plots / f"{source.path.stem}_scales.png"))
    return written


def load(folder: Path) -> list[Source]:
    """All such files of a folder, by name. Raises ValueError for a file of a version unknown here."""
    sources = []
    for path, content in data_files(folder, KIND, VERSIONS):
        rows = pd.DataFrame(content["results"])
        rows = rows.reindex(
            columns=rows.columns.union(["sides", "transformer_tflop"], sort=False)
        )  # not of older files
        rows["gpu"] = content["environment"]["gpu"]
        for name in ("ms", "p10_ms", "p90_ms", "images_per_s", "peak_gb", "graph_gb"):
            rows[name] = rows[name].astype(float)
        look = [tuple(key) for key in rows[["model", "engine", "schedule"]].to_numpy()]
        rows["order"] = [list(LOOKS).index(key) for key in look]
        rows = rows.sort_values(["resolution", "depth", "batch", "order"], kind="stable").reset_index(drop=True)
        sources.append(Source(path, content["environment"], rows))
    return sources


def load_peers(folder: Path) -> pd.DataFrame:
    """Times of the published code: `PEER_COLUMNS` of `PEERS`, no rows without that file. Raises ValueError for an
    implementation unknown here."""
    path = folder / PEERS
    if not path.exists():
        return pd.DataFrame(columns=PEER_COLUMNS)
    peers = pd.read_csv(path)
    if unknown := sorted(set(peers["impl"]) - set(PEER_NAMES)):
        raise ValueError(f"{path} has {', '.join(unknown)}; this script knows {', '.join(PEER_NAMES)}")
    peers = peers.sort_values("impl", key=lambda names: names.map(list(PEER_NAMES).index), kind="stable")
    return peers[PEER_COLUMNS].reset_index(drop=True)


def csv(sources: list[Source]) -> str:
    """One line a measurement, so what two data files measured at one commit has two lines that differ in their numbers
    alone (VAR's eight images at 1024 px). What failed or ran out of memory has empty numbers. ms of a batch, GB of 2^30
    bytes. Not among them: what was measured elsewhere (`PEERS`)."""
    rows = pd.concat([source.rows for source in sources])
    rounded = rows.assign(
        ms=rows["ms"].round(3), images_per_s=rows["images_per_s"].round(3), peak_gb=rows["peak_gb"].round(3)
    )
    return rounded[COLUMNS].to_csv(index=False, lineterminator="\n")


def markdown(sources: list[Source], peers: pd.DataFrame) -> str:
    """For each data file a table of every size: engines against each other and the published code, the targets, and
    where the time goes."""
    parts = [
        "# Generation",
        "Made by `reports/build.py` from the data files named below; `bench/generation.py` states the method. From "
        "classes to pixels, random weights of the published sizes; ms is the median time of a batch. A ratio above 1 "
        "means that the row is that many times faster. Parts are timed alone, so they need not add up to the whole.",
        "Optimised is `hmar.engine`. Eager is this repo's eager path: the plain functions of `hmar.generate`, float32 "
        "weights under bfloat16 autocast, HMAR's masked passes with the null class. It is not the published code.",
        "Peak GB is the most memory that was allocated at once (`torch.cuda.max_memory_allocated`, 2^30 bytes), with "
        "weights and capture. Graphs GB is the pool that is reserved for the captured graphs; weights come on top. "
        "The pool can be larger than the peak, for what is free in it counts as well. At 036a70c and before, peaks of "
        "rows that were measured after other batches in one process are up to 1 GB too large: cuBLAS kept 32 MiB "
        "for each program's stream (since 0339662 an engine has one stream).",
    ]
    for source in sources:
        env = source.environment
        parts += [f"## {env['gpu']}", f"{provenance(source.path, env, source.rows)}."]
        if not source.rows["parts_ms"].notna().any():
            parts += _batch_tables(source.rows)
            continue
        official = peers if TARGET_GPU in env["gpu"] else peers.iloc[:0]
        if len(official):
            parts.append(
                f"Measured elsewhere, not by `bench/generation.py`: the official VAR and HMAR code on an H100, with "
                f"decode ([{PEERS}](../data/{PEERS}); VAR, and HMAR without masked passes, under float16 autocast, "
                "HMAR with them in TF32; GB as given there). HMAR was not measured at every size."
            )
        for (resolution, depth, batch), rows in source.rows.groupby(["resolution", "depth", "batch"], sort=False):
            of_size = (official["resolution"] == resolution) & (official["depth"] == depth)
            parts.append(f"### {resolution:.0f} px, d{depth}, batch {batch}")
            parts += [_size_table(rows, official[of_size & (official["batch"] == batch)]), _notes(rows)]
        parts += _counts(source.rows)
    return "\n\n".join(part for part in parts if part) + "\n"


def _size_table(rows: pd.DataFrame, official: pd.DataFrame) -> str:
    """official: rows of `load_peers` of this size; ms, images a second and GB are all they have."""

    def time_of(model: str, engine: str, schedule: str) -> float:
        found = rows[(rows["model"] == model) & (rows["engine"] == engine) & (rows["schedule"] == schedule)]["ms"]
        return found.iloc[0] if len(found) else math.nan

    found = official[official["impl"] == "official_var_fp16_autocast"]["ms"]
    official_var = found.iloc[0] if len(found) else math.nan
    lines = []
    for _, row in rows.iterrows():
        is_goal = (row["model"], row["engine"], row["schedule"]) == ("hmar", "optimised", "default")
        on_goal_gpu = TARGET_GPU in row["gpu"]
        size = (row["resolution"], row["depth"], row["batch"])
        target = TARGETS.get(size, math.nan) if is_goal and on_goal_gpu else math.nan
        found = row["parts_ms"] if isinstance(row["parts_ms"], dict) else {}
        lines.append(
            [
                LOOKS[row["model"], row["engine"], row["schedule"]][0],
                number(row["ms"]),
                f"{number(row['p10_ms'])} to {number(row['p90_ms'])}" if not math.isnan(row["ms"]) else DASH,
                number(row["images_per_s"]),
                number(row["peak_gb"]),
                number(row["graph_gb"]),
                number(target),
                ratio(target / row["ms"]),
                ratio(official_var / row["ms"]),
                ratio(time_of("var", "eager", "none") / row["ms"]),
                ratio(time_of("var", "optimised", "none") / row["ms"]),
                *(number(found.get(part)) for part in PARTS),
            ]
        )
    head = ["", "ms", "p10 to p90", "images/s", "peak GB", "graphs GB", "target, ms", "target / ours"]
    head += ["official VAR / row", "VAR eager / row", "VAR optimised / row", *(f"{part}, ms" for part in PARTS)]
    for _, row in official.iterrows():
        line = dict.fromkeys(head, DASH) | {"": PEER_NAMES[row["impl"]], "ms": number(row["ms"])}
        line |= {"images/s": number(1e3 * row["batch"] / row["ms"]), "peak GB": number(row["peak_gb"])}
        lines.append(list((line | {"official VAR / row": ratio(official_var / row["ms"])}).values()))
    return table(head, lines, left=(0,))


def _batch_tables(rows: pd.DataFrame) -> list[str]:
    """Time and memory against the batch alone, for a run without times of parts: a table for each size of model and
    image, with a group of columns for each engine."""
    parts = []
    for (resolution, depth), of_size in rows.groupby(["resolution", "depth"], sort=False):
        present = {tuple(key) for key in of_size[["model", "engine", "schedule"]].to_numpy()}
        groups = [key for key in LOOKS if key in present]
        head = ["batch"]
        for key in groups:
            head += [f"{LOOKS[key][0]}: ms", "images/s", "peak GB", "graphs GB"]
        lines = []
        for batch, of_batch in of_size.groupby("batch"):
            by_key = {(row["model"], row["engine"], row["schedule"]): row for _, row in of_batch.iterrows()}
            line = [f"{batch}"]
            for key in groups:
                row = by_key.get(key)
                if row is None:
                    line += [DASH] * 4
                elif row["status"] != "ok":
                    line += [row["status"], DASH, DASH, DASH]
                else:
                    line += [number(row[name]) for name in ("ms", "images_per_s", "peak_gb", "graph_gb")]
            lines.append(line)
        parts += [f"### {resolution:.0f} px, d{depth}, against the batch", table(head, lines, left=())]
    return parts


def _counts(rows: pd.DataFrame) -> list[str]:
    """What VAR's operations are of HMAR's, beside what its time is, where both are optimised; nothing without them."""
    lines = []
    done = rows[(rows["engine"] == "optimised") & rows["parts_ms"].notna() & rows["transformer_tflop"].notna()]
    for (resolution, depth, batch), of_size in done.groupby(["resolution", "depth", "batch"], sort=False):
        by_model = {(row["model"], row["schedule"]): row for _, row in of_size.iterrows()}
        var = by_model.get(("var", "none"))
        for schedule, name in (("default", "default"), ("none", "one pass a scale")):
            hmar = by_model.get(("hmar", schedule))
            if hmar is None or var is None:
                continue
            ours, theirs = hmar["transformer_tflop"], var["transformer_tflop"]
            transformer = var["parts_ms"]["transformer"] / hmar["parts_ms"]["transformer"]
            size = f"{resolution:.0f} px, d{depth}, batch {batch}"
            numbers = number(ours), number(theirs), ratio(theirs / ours), ratio(transformer)
            lines.append([size, name, *numbers, ratio(var["ms"] / hmar["ms"])])
    if not lines:
        return []
    head = ["", "HMAR's passes", "HMAR, TFLOP", "VAR, TFLOP", "VAR / HMAR by operations", "by the transformer's time"]
    return [
        "### Operations and times of HMAR and VAR",
        "Operations of the transformer for one image (`hmar.flops.generation_flops`), HMAR's masked passes without the "
        "null class: how many times VAR's are HMAR's is what operations alone would give. Beside it the same of the "
        "times, both optimised. Besides its operations VAR reads and writes a cache; masked passes read all weights "
        "once more, which at batch 1 is what most scales wait for.",
        table([*head, "by the whole image's"], lines, left=(0, 1)),
        "What is optimised of VAR is not all that is optimised of HMAR: with a cache it does not get the kernel of "
        "whole blocks (`hmar_kernels.transformer_blocks`), and `hmar_kernels.qk_norm_attention` where scales are short "
        "for all that they see." + _lead(rows),
    ]


def _lead(rows: pd.DataFrame) -> str:
    """How much of HMAR's lead over VAR, one image, both optimised, no masked passes, the scales are that the kernel of
    whole blocks takes; nothing without times of scales."""
    found = []
    timed = rows[(rows["engine"] == "optimised") & (rows["schedule"] == "none") & (rows["batch"] == 1)]
    timed = timed[timed["scales_ms"].notna() & timed["sides"].notna()]
    for (resolution, depth), of_size in timed.groupby(["resolution", "depth"], sort=False):
        by_model = {row["model"]: row for _, row in of_size.iterrows()}
        if set(by_model) != {"hmar", "var"}:
            continue
        hmar, var = by_model["hmar"], by_model["var"]
        few = sum(2 * side**2 <= BLOCK_ROWS for side in hmar["sides"])
        apart = sum(var["scales_ms"][:few]) - sum(hmar["scales_ms"][:few])
        found.append(f"{number(apart)} of {number(var['ms'] - hmar['ms'])} ms (d{depth}, {resolution:.0f} px)")
    if not found:
        return ""
    return (
        f" Of what HMAR is ahead with one image and without masked passes, the scales of at most {BLOCK_ROWS} rows, "
        f"which that kernel takes, are {', '.join(found)}."
    )


def _notes(rows: pd.DataFrame) -> str:
    missing = rows[rows["status"] != "ok"]
    return "\n".join(
        f"* {LOOKS[r['model'], r['engine'], r['schedule']][0]}: {r['status']}. {r['reason']}"
        for _, r in missing.iterrows()
    )


def draw(source: Source) -> Figure:
    """Images a second and the peak of memory allocated, GB of 2^30 bytes, against the batch: a column for each size of
    model and image."""
    room = source.environment.get("gpu_memory_bytes")
    room = None if room is None else room / 2**30
    sizes = source.rows[["resolution", "depth"]].drop_duplicates().to_dict("records")
    figure, axes = plt.subplots(
        2, len(sizes), figsize=(max(7, 3.6 * len(sizes) + 1), 7), squeeze=False, layout="constrained"
    )
    for j, size in enumerate(sizes):
        rows = source.rows[(source.rows["resolution"] == size["resolution"]) & (source.rows["depth"] == size["depth"])]
        for i, (column, label) in enumerate((("images_per_s", "images / s"), ("peak_gb", "peak memory allocated, GB"))):
            ax = axes[i][j]
            for above, (key, (name, colour, marker)) in enumerate(reversed(LOOKS.items())):
                model, engine, schedule = key
                line = rows[(rows["model"] == model) & (rows["engine"] == engine) & (rows["schedule"] == schedule)]
                too_large = line[line["status"] == "out of memory"].head(1)
                line = line.dropna(subset=column)
                look = {"color": colour, "zorder": 3 + above}
                if len(line):
                    ax.plot(line["batch"], line[column], marker=marker, label=name, linewidth=1.4, **look)
                if i == 1 and room is not None and len(too_large):
                    ax.plot(too_large["batch"], [room], linestyle="", marker="x", markersize=8, **look)
            if i == 1 and room is not None and (rows["status"] == "out of memory").any():
                ax.axhline(room, label="memory of the GPU; a cross: did not fit", **FLOOR_LINE)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            low, high = ax.get_ylim()
            locator = LogLocator(subs=(1, 2, 5))
            few = sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 3
            ax.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)) if few else locator)
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.grid(color="#dddddd", linewidth=0.7)
            ax.spines[["top", "right"]].set_visible(False)
            if i == 0:
                ax.set_title(f"{size['resolution']:.0f} px, d{size['depth']}", fontsize=11)
            else:
                ax.set_xlabel("batch")
            if j == 0:
                ax.set_ylabel(label)
    _legend(figure)
    figure.suptitle(f"Generation, {source.environment['gpu']}, commit {_commits(source)}")
    return figure


def _commits(source: Source) -> str:
    """Of the rows, in their order."""
    return ", ".join(or_dash(commit)[:10] for commit in source.rows["commit"].drop_duplicates())


def _legend(figure: Figure) -> None:
    """One for all axes, below them."""
    labelled = {
        label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    names = [name for name, _, _ in LOOKS.values()]
    labelled = dict(sorted(labelled.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def draw_scales(source: Source) -> Figure | None:
    """Where the time of an image goes: the scales with all their passes, and decoding, of the optimised engines. A
    column for each size of model and image, a row for its smallest and its largest batch. None without such times."""
    timed = source.rows[source.rows["scales_ms"].map(lambda times: isinstance(times, list))]
    timed = timed[timed["sides"].notna()]
    if not len(timed):
        return None
    sizes = list(timed.groupby(["resolution", "depth"], sort=False))
    figure, axes = plt.subplots(
        2, len(sizes), figsize=(max(7, 4 * len(sizes) + 1), 7), squeeze=False, layout="constrained"
    )
    for j, ((resolution, depth), rows) in enumerate(sizes):
        sides = rows["sides"].iloc[0]
        ticks = [*range(len(sides)), 1.09 * len(sides)]  # decoding apart
        for i, batch in enumerate((rows["batch"].min(), rows["batch"].max())):
            ax, of_batch = axes[i][j], rows[rows["batch"] == batch]
            width = 0.8 / max(1, len(of_batch))
            for place, (_, row) in enumerate(of_batch.iterrows()):
                name, colour, _ = LOOKS[row["model"], row["engine"], row["schedule"]]
                at = [tick + (place - (len(of_batch) - 1) / 2) * width for tick in ticks]
                ax.bar(at, row["scales_ms"], width, color=colour, label=name)
            ax.set_xticks(ticks, [*map(str, sides), "decode"], fontsize=8)
            ax.grid(axis="y", color="#dddddd", linewidth=0.7)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_title(f"{resolution:.0f} px, d{depth}, batch {batch}", fontsize=11)
            if i == 1:
                ax.set_xlabel("side of the scale")
            if j == 0:
                ax.set_ylabel("ms")
    _legend(figure)
    figure.suptitle(f"Time of an image by scale, {source.environment['gpu']}, commit {_commits(source)}")
    return figure
