"""Attention: tables of the data files that attention_data.py reads, ours against the fastest rival first.

Read next: attention_plots.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from .attention_data import CELL, DIRECTIONS, KIND, Source, load
from .attention_plots import HEAD_DIM, draw
from .markdown import DASH, number, or_dash, percent, ratio, table, whole
from .results import TARGET_GPU, provenance, write_tables
from .style import label_of, rank_of, save

COLUMNS = ["gpu", "commit", *CELL, "impl", "direction", "ms", "tflops", "gb_per_s", "peak_mb"]
DENSE = "sdpa_dense"
# What this project set out to reach on one H100: (forward, backward) in ms of (pattern, resolution, batch, heads, head
# dim) in bfloat16.
TARGET_DTYPE = "bfloat16"
TARGETS = {
    ("block_diagonal", 256, 64, 16, 64): (0.140, 0.40),
    ("block_causal", 256, 64, 16, 64): (0.18, 0.60),
    ("block_diagonal", 512, 16, 24, 64): (0.32, 1.0),
    ("block_causal", 512, 16, 24, 64): (0.60, 2.0),
    ("block_diagonal", 1024, 4, 24, 64): (1.00, 3.0),
    ("block_causal", 1024, 4, 24, 64): (2.35, 7.0),
}
# Forms of one implementation whose backward is the same kernels: of these only this one stands for ours in a backward.
# The smaller of two runs of the same kernels would be two draws for ours, against one for a rival.
BACKWARD_OF_OURS = "hopper"
PEERS = "attention_peers_h100.csv"  # peers measured elsewhere on an H100; beside the data files
PEER_DTYPES = ("float16", "bfloat16")  # level in speed: the dtype of the peer need not be that of the cell


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write tables and plots of attention, if there are data; returns their paths."""
    sources = load(data)
    if not sources:
        return []
    written = write_tables(tables, KIND, csv(sources), markdown(sources))
    for source in sources:
        for name, figure in draw(source):
            written.append(save(figure, plots / f"{source.path.stem}_{name}.png"))
    return written


def csv(sources: list[Source]) -> str:
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


def markdown(sources: list[Source]) -> str:
    """For each data file a summary of ours against the best rival, then every cell in full.

    Peers measured elsewhere are read from the file PEERS beside the data file, where there is one.
    """
    parts = [
        "# Attention",
        "Made by `reports/build.py` from the data files named below; `bench/__init__.py` states the method. "
        "Times are medians of device time. TFLOP/s count unmasked pairs only, GB/s the fewest bytes that must move. "
        'Peak memory is that of one forward, or one forward + backward, inputs included; "extra" is without them, and '
        '"least" what outputs, gradients, lse and delta take. "Floor" is what the device needs at its measured copy '
        "and matrix-product rates, whichever is longer. A ratio above 1 means that the row is that many times faster. "
        '"Host" is the time of the host for a call. In the summary "ours" is the fastest of ours. Bounded logits have '
        "a forward of their own but not a backward: of the two runs of the Hopper backward the summary takes that of "
        f"`{BACKWARD_OF_OURS}`, be it the slower.",
    ]
    for source in sources:
        env, ceilings = source.environment, source.ceilings
        parts += [
            f"## {env['gpu']}",
            f"{provenance(source.path, env, source.rows)}, flash-attn-4 {or_dash(env.get('flash_attn_4'))}. Ceilings: "
            f"copy {ceilings['copy_gb_per_s']:.0f} GB/s, bf16 {ceilings['matmul_side']}³ product "
            f"{ceilings['matmul_tflops']:.4g} TFLOP/s.",
            _summary(source),
            _about_peers(source),
        ]
        for cell, rows in _by_cell(source):
            parts.append(f"### {cell['pattern']} {cell['resolution']}, {_size(cell)}, {cell['dtype']}")
            for direction in DIRECTIONS:
                part = rows[rows["direction"] == direction]
                if len(part):
                    parts += [_cell_table(part), _notes(part, source)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(source: Source) -> str:
    """The fastest of ours against the fastest rival, the best peer elsewhere, the target, the dense mask, the floor."""
    lines, peers = [], _peers(source)
    for cell, rows in _by_cell(source):
        for direction in DIRECTIONS:
            part = rows[(rows["direction"] == direction)]
            ours, rival = _ours(part, direction), _fastest(part[~part["ours"]])
            if ours is None and rival is None:
                continue
            time = ours["ms"] if ours is not None else math.nan
            target = target_of(source.environment, cell, direction)
            line = [
                f"{cell['pattern']} {cell['resolution']}, {_size(cell)}",
                direction,
                number(time),
                ours["impl"] if ours is not None else DASH,
                number(rival["ms"] if rival is not None else None),
                rival["impl"] if rival is not None else DASH,
                ratio(rival["ms"] / time if rival is not None else None),
            ]
            if peers is not None:
                line += _peer_columns(peers, cell, direction, time)
            line += [
                number(target),
                ratio(target / time),
                ratio((_time_of(part, DENSE) or math.nan) / time),
                number(part["floor_ms"].iloc[0]),
                percent(part["floor_ms"].iloc[0] / time),
                whole(ours["extra_mb"] if ours is not None else math.nan),
                whole(part["least_mb"].iloc[0]),
            ]
            lines.append(line)
    head = ["cell", "direction", "ours, ms", "", "best rival, ms", "", "rival / ours"]
    if peers is not None:
        head += ["best peer elsewhere, ms", "", "peer / ours"]
    head += ["target, ms", "target / ours", "dense SDPA / ours", "floor, ms", "floor / ours", "extra MB", "least"]
    return table(head, lines, left=(0, 1, 3, 5) if peers is None else (0, 1, 3, 5, 8))


def _ours(rows: pd.DataFrame, direction: str) -> pd.Series | None:
    """The row that stands for ours in one direction of a cell: the fastest, but in a backward that of
    BACKWARD_OF_OURS where it has a time."""
    ours = rows[rows["ours"]]
    if direction == "backward":
        alone = _fastest(ours[ours["impl"] == BACKWARD_OF_OURS])
        if alone is not None:
            return alone
    return _fastest(ours)


def _peers(source: Source) -> pd.DataFrame | None:
    """Peers measured elsewhere, times in ms, in cells that the source has too; None where there are none."""
    path = source.path.with_name(PEERS)
    if TARGET_GPU not in source.environment["gpu"] or not path.is_file():
        return None
    peers = pd.read_csv(path)
    peers = peers[peers["dtype"].isin(PEER_DTYPES) & (peers["head_dim"] == HEAD_DIM)]
    same = [name for name in CELL if name != "dtype"]
    cells = source.rows.loc[source.rows["dtype"].isin(PEER_DTYPES), same].drop_duplicates()
    peers = peers.merge(cells, on=same)
    return peers if len(peers) else None


def _peer_columns(peers: pd.DataFrame, cell: dict, direction: str, time: float) -> list[str]:
    """Time of the fastest peer in ms, its name, and its time as a multiple of `time`; dashes where none fits."""
    fits = peers[[name for name in CELL if name != "dtype"]].eq([cell[n] for n in CELL if n != "dtype"]).all(axis=1)
    fits &= cell["dtype"] in PEER_DTYPES
    times = peers.loc[fits, f"{direction}_ms"].dropna()
    if not len(times):
        return [DASH] * 3
    best = peers.loc[times.idxmin()]
    other = f" ({best['dtype']})" if best["dtype"] != cell["dtype"] else ""
    return [number(times.min()), best["impl"] + other, ratio(times.min() / time)]


def _about_peers(source: Source) -> str:
    if _peers(source) is None:
        return ""
    return (
        f'"Best peer elsewhere" is the fastest of [{PEERS}](../data/{PEERS}), measured elsewhere on an H100: another '
        "machine, another run. Its dtype is named where it is not that of the cell."
    )


def target_of(environment: dict, cell: dict, direction: str) -> float:
    """In ms; NaN where none was set."""
    if TARGET_GPU not in environment["gpu"] or cell["dtype"] != TARGET_DTYPE:
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
                label_of(row["impl"]),
                number(row["ms"]),
                f"{number(row['p10_ms'])} to {number(row['p90_ms'])}" if measured else DASH,
                ratio(rival["ms"] / row["ms"] if measured and rival is not None else None),
                ratio(dense / row["ms"] if measured and dense else None),
                number(row["tflops"]),
                number(row["gb_per_s"]),
                whole(row["peak_mb"]),
                whole(row["extra_mb"]),
                whole(row["host_us"]),
            ]
        )
    head = [direction, "ms", "p10 to p90", "vs best rival", "vs dense SDPA", "TFLOP/s", "GB/s", "peak MB", "extra MB"]
    return table([*head, "host, us"], lines, left=(0,))


def _notes(rows: pd.DataFrame, source: Source) -> str:
    """Why rows have no time, and which implementations of the file have no row among these."""
    failed = rows[rows["status"] != "ok"]
    notes = [f"* {label_of(r['impl'])}: {r['status']}. {r['reason']}" for _, r in failed.iterrows()]
    absent = sorted(set(source.rows["impl"]) - set(rows["impl"]), key=rank_of)
    if absent:
        notes.append(f"* Without a row here, though elsewhere in this file: {'; '.join(map(label_of, absent))}.")
    return "\n".join(notes)


def _size(cell: dict) -> str:
    return f"{cell['batch']} images x {cell['heads']} heads x {cell['head_dim']}"


def _by_cell(source: Source) -> Iterator[tuple[dict, pd.DataFrame]]:
    for cell, rows in source.rows.groupby(CELL, sort=False):
        yield dict(zip(CELL, cell, strict=True)), rows


def _fastest(rows: pd.DataFrame) -> pd.Series | None:
    measured = rows.dropna(subset="ms")
    return measured.loc[measured["ms"].idxmin()] if len(measured) else None


def _time_of(rows: pd.DataFrame, name: str) -> float | None:
    times = rows.loc[rows["impl"] == name, "ms"].dropna()
    return float(times.iloc[0]) if len(times) else None
