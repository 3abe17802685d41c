"""Several GPUs: data files of kind "scaling" (written by `python -m bench.scaling`) and their tables.

Read next: results.py; bench/scaling.py for the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .markdown import number, or_dash, percent, table, whole
from .results import data_files, provenance, write_tables

KIND, VERSIONS = "scaling", (1,)
COLUMNS = ["gpu", "commit", "model", "preset", "batch_per_gpu", "processes", "parallel", "tokens_per_s", "images_per_s"]
COLUMNS += ["times_one_process", "mfu", "peak_gb"]
MODELS = {"next-scale": "HMAR stage 1", "var": "VAR"}
# Number of GPUs of one host, a process each -> times the speed of one that this project set out to reach.
TARGETS = {2: 1.9}
SAME_SPEED = 1.05
WAYS = ("-", "ddp", "fsdp")


@dataclass(frozen=True)
class Source:
    """One data file of kind "scaling": where the numbers come from, and a frame of them in reading order.

    note: what sets the run apart from the other files; None for nothing.
    """

    path: Path
    environment: dict
    settings: dict
    note: str | None
    rows: pd.DataFrame


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write tables of several GPUs, if there are data; returns their paths."""
    sources = load(data)
    if not sources:
        return []
    written = write_tables(tables, KIND, csv(sources), markdown(sources))
    return written


def load(folder: Path) -> list[Source]:
    """All such files of a folder, by name. Raises ValueError for a file of a version unknown here."""
    sources = []
    for path, content in data_files(folder, KIND, VERSIONS):
        if content["results"]:
            rows = _derive(pd.DataFrame(content["results"]), content["environment"], content["settings"])
            sources.append(Source(path, content["environment"], content["settings"], content.get("note"), rows))
    return sources


def _derive(rows: pd.DataFrame, environment: dict, settings: dict) -> pd.DataFrame:
    """One row a run: those of one batch a GPU together, or of one batch in all where the run kept that."""
    new_names = {
        "tokens_per_second": "tokens_per_s",
        "images_per_second": "images_per_s",
        "speedup": "times_one_process",
        "peak_memory_gb": "peak_gb",
    }
    rows = rows.rename(columns=new_names)
    for column in (*new_names.values(), "mfu"):
        rows[column] = pd.to_numeric(rows[column]).astype("float64")
    rows["gpu"], rows["commit"] = environment["gpu"], environment["commit"]
    rows["model"], rows["preset"] = MODELS[settings["stage"]], settings["preset"]
    rows["batch_per_gpu"] = rows["batch"] // rows["processes"]
    # NOTE: one process shares nothing, whatever way its row was started with.
    rows["parallel"] = rows["parallel"].where(rows["processes"] > 1, "-")
    rows["group"] = rows["batch"] if settings["global_batch"] else rows["batch_per_gpu"]
    order = pd.DataFrame(
        {"group": rows["group"], "processes": rows["processes"], "parallel": rows["parallel"].map(_way_rank)}
    )
    return rows.loc[order.sort_values(list(order.columns)).index].reset_index(drop=True)


def csv(sources: list[Source]) -> str:
    """One line a run."""
    rows = pd.concat([source.rows for source in sources])
    return rows.to_csv(columns=COLUMNS, index=False, float_format="%.6g", lineterminator="\n")


def markdown(sources: list[Source]) -> str:
    """For each data file a table of every run beside that of one process."""
    parts = [
        "# Several GPUs",
        "Made by `reports/build.py` from the data files named below; `bench/scaling.py` states the method: "
        "`hmar train` on codes, whole steps with clipping, optimizer and loader, medians of the log's rows. A process "
        'has a GPU of its own. "Times one process" are tokens a second over those of one process of the same file and '
        "batch (target in brackets). MFU is of model FLOPs; peak GB is that of one GPU.",
        *_bases(sources),
    ]
    for source in sources:
        env, settings = source.environment, source.settings
        label = f"## {env['gpu']}, commit {or_dash(env['commit'])[:10]}"
        parts += [
            f"{label}: {source.note}" if source.note else label,
            f"{provenance(source.path, env, source.rows)}. {settings['steps']} steps, compile {settings['compile']}, "
            f"{settings['workers']} loader processes a GPU"
            + (", the same batch in all with any number of processes." if settings["global_batch"] else "."),
            _table(source.rows),
        ]
    return "\n\n".join(parts) + "\n"


def _bases(sources: list[Source]) -> list[str]:
    """Sentences that tell where one process is not equally fast in files that look alike."""
    alone = pd.concat([source.rows for source in sources]).query("processes == 1")
    sentences = []
    for (gpu, model, preset, batch), rows in alone.groupby(["gpu", "model", "preset", "batch_per_gpu"], sort=False):
        speeds = rows["tokens_per_s"]
        if speeds.max() > SAME_SPEED * speeds.min():
            told = " and ".join(f"{v:.0f} at {or_dash(c)[:10]}" for v, c in zip(speeds, rows["commit"], strict=True))
            sentences.append(
                f"One process is not equally fast in every file: {model}, {preset}, batch {batch} on {gpu} has {told} "
                "tokens/s. Factors of these files do not compare."
            )
    return sentences


def _table(rows: pd.DataFrame) -> str:
    lines = []
    for _, row in rows.iterrows():
        target = TARGETS.get(row["processes"]) if row["gpu"] != "cpu" else None
        lines.append(
            [
                f"{row['model']}, {row['preset']}",
                str(row["batch_per_gpu"]),
                str(row["processes"]),
                row["parallel"],
                whole(row["tokens_per_s"]),
                number(row["images_per_s"]),
                f"{row['times_one_process']:.3f}" + (f" ({target})" if target else ""),
                percent(row["mfu"]),
                number(row["peak_gb"]),
            ]
        )
    head = ["model", "batch a GPU", "processes", "way", "tokens/s", "images/s", "times one process", "MFU", "peak GB"]
    return table(head, lines, left=(0, 3))


def _way_rank(name: str) -> tuple[int, str]:
    return (WAYS.index(name) if name in WAYS else len(WAYS), name)
