"""What the attention kernels are busy with: data files of kind "attention_profile" (written by
`python -m bench.profile_attention`), their tables and plot.

Beside each launch stand the times that its parts take at least, computed from its counters: the products of the pairs
that attend on the tensor cores, the exponentials that it executed, the instructions that it issued, the bytes that it
moved. The variants tried are those of data files of kind "hopper_tiles", in cells that the profile has and passes that
a target depends on: the bounded forward, dq, dk and dv, and both. Of these files only runs from FIRST_RUN on are read
(earlier ones are of kernels that were rewritten since), and only head dim 64: rows do not name their heads, which were
not the same in all runs at 128. Read next: results.py, style.py; bench/profile_attention.py for the method.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .attention import target_of
from .attention_data import CELL, pattern_rank
from .markdown import DASH, number, or_dash, table
from .results import TARGET_GPU, Source, data_files, provenance, write_tables
from .style import save

KIND, VERSIONS = "attention_profile", (1,)
TILES_KIND, TILES_VERSIONS, TILES_HEAD_DIM, FIRST_RUN = "hopper_tiles", (1,), 64, 7

# Of one SM of an H100 in a cycle, and of the memory of the SXM card.
TENSOR_FLOPS, EXPONENTIALS, ISSUED = 4096, 16, 4
DRAM_BYTES_PER_MS = 3.35e9
WARP = 32

# Name of a launch by (pass, bounded), in reading order.
LAUNCHES = {
    ("forward", True): "forward, bounded",
    ("forward", False): "forward, any logits",
    ("backward", None): "backward in one pass",
    ("dq", None): "dq",
    ("dkdv", None): "dk, dv",
}
LEAST = {
    "least_tensor_ms": "tensor cores",
    "least_exponential_ms": "exponentials",
    "least_issue_ms": "issue",
    "least_dram_ms": "DRAM",
}
PERCENTAGES = {
    "tensor_pct": "tensor",
    "exponential_pct": "exp",
    "fma_pct": "FMA",
    "alu_pct": "ALU",
    "issue_pct": "issue",
    "l1_pct": "L1",
    "l2_pct": "L2",
    "dram_pct": "DRAM",
}
# Those of the plot: label and colour.
BARS = {
    "tensor_pct": ("tensor cores", "#0072B2"),
    "exponential_pct": ("exponential units", "#D55E00"),
    "issue_pct": ("issue slots", "#999999"),
    "l2_pct": ("L2", "#00694D"),
    "dram_pct": ("DRAM", "#E69F00"),
}
COLUMNS = ["gpu", "commit", *CELL, "pass", "bounded", "kernel", "ms", "clock_ghz", "instructions_per_cycle"]
COLUMNS += [*PERCENTAGES, "l2_hit_pct", "sm_active_pct", "imbalance", "dram_gb", "dram_tb_per_s", "registers", "blocks"]
COLUMNS += ["pairs", "flops", *LEAST, "bound", "reached", "instructions", "instructions_per_hgmma"]
NUM_OPCODES, NUM_STALLS = 12, 6
# Passes of "hopper_tiles" and their names.
TRIED = {"forward, bounded": "forward, bounded", "both": "backward in two passes", "dq": "dq", "dkdv": "dk, dv"}


def build(data: Path, tables: Path, plots: Path) -> list[Path]:
    """Write the tables and a plot for each file, if there are data; returns their paths."""
    sources = load(data)
    if not sources:
        return []
    written = write_tables(tables, KIND, csv(sources), markdown(sources, data))
    return written + [save(draw(source), plots / f"{source.path.stem}_units.png") for source in sources]


def load(folder: Path) -> list[Source]:
    """All such files of a folder, by name. Raises ValueError for a file of a version unknown here."""
    return [
        Source(path, content["environment"], _derive(pd.DataFrame(content["results"]), content["environment"]))
        for path, content in data_files(folder, KIND, VERSIONS)
        if content["results"]
    ]


def _derive(rows: pd.DataFrame, environment: dict) -> pd.DataFrame:
    rows["gpu"], rows["commit"] = environment["gpu"], environment["commit"]
    rows["bounded"] = rows["bounded"].astype(object).where(rows["bounded"].notna(), None)
    keys = list(zip(rows["pass"], rows["bounded"], strict=True))
    rows["launch"] = [LAUNCHES[key] for key in keys]
    rows["imbalance"] = rows["tensor_max_pct"] / rows["tensor_pct"]
    dram_bytes = rows["dram_read_bytes"] + rows["dram_write_bytes"]
    rows["dram_gb"], rows["dram_tb_per_s"] = dram_bytes / 1e9, dram_bytes / rows["ms"] / 1e9
    rows["instructions_per_hgmma"] = rows["instructions"] / [o.get("HGMMA", math.nan) for o in rows["opcodes"]]
    for column, values in least_times(rows).items():
        rows[column] = values if TARGET_GPU in environment["gpu"] else math.nan
    least = rows[list(LEAST)].astype(float)
    rows["bound"] = [None if times.isna().all() else LEAST[times.idxmax()] for _, times in least.iterrows()]
    rows["reached"] = least.max(axis=1) / rows["ms"]
    order = pd.DataFrame(
        {
            "head_dim": rows["head_dim"],
            "pattern": rows["pattern"].map(pattern_rank),
            "resolution": rows["resolution"],
            "batch": -rows["batch"],
            "heads": rows["heads"],
            "dtype": rows["dtype"],
            "launch": [list(LAUNCHES).index(key) for key in keys],
        }
    )
    return rows.loc[order.sort_values(list(order.columns)).index].reset_index(drop=True)


def least_times(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """ms that a launch takes at least by each of its parts, at its clock on an H100."""
    cycles_per_ms = rows["clock_ghz"] * 1e6 * rows["num_sms"]
    exponentials = WARP * pd.Series([o.get("MUFU", 0) for o in rows["opcodes"]], index=rows.index)
    return {
        "least_tensor_ms": rows["flops"] / TENSOR_FLOPS / cycles_per_ms,
        "least_exponential_ms": exponentials / EXPONENTIALS / cycles_per_ms,
        "least_issue_ms": rows["instructions"] / ISSUED / cycles_per_ms,
        "least_dram_ms": (rows["dram_read_bytes"] + rows["dram_write_bytes"]) / DRAM_BYTES_PER_MS,
    }


def csv(sources: list[Source]) -> str:
    """One line a launch."""
    rows = pd.concat([source.rows for source in sources])
    return rows.to_csv(columns=COLUMNS, index=False, float_format="%.6g", lineterminator="\n")


def markdown(sources: list[Source], data: Path) -> str:
    """For each data file tables of units, least times, instructions and waits; then the tiles tried."""
    parts = [
        "# What the attention kernels are busy with",
        "Made by `reports/build.py` from the data files named below; `bench/profile_attention.py` states the method. "
        "Times are those of a single launch under Nsight Compute, with caches flushed and clocks as the card chose "
        "them: medians of the same kernels are in [attention.md](attention.md).",
    ]
    for source in sources:
        env, rows = source.environment, source.rows
        parts += [
            f"## {env['gpu']}, commit {or_dash(env['commit'])[:10]}",
            f"{provenance(source.path, env, rows)}." + _note(source.path),
            "### Units",
            "Busy shares in per cent of what a unit can do: tensor cores, exponential units, FMA, ALU, issue slots and "
            "L1 (with shared memory) while their SM is active, L2 and DRAM over the whole time. Imbalance is the work "
            "of the tensor cores on the busiest SM over that of the mean one; SM active, how long SMs had work. The "
            "target of a backward is for all of its launches. Beside a backward in one pass dq is that of the last "
            "heads.",
            _units(source),
            "### Least times",
            "ms at the clock of the launch that its parts would take if nothing else did: products of the pairs that "
            f"attend at {TENSOR_FLOPS} FLOPs a cycle and SM, exponentials executed at {EXPONENTIALS}, instructions of "
            f"warps at {ISSUED} (those that poll for data are among them), bytes moved at "
            f"{DRAM_BYTES_PER_MS / 1e9:.2f} TB/s. Reached is the largest of them over the time measured.",
            _least(rows),
            "### Instructions",
            f"The {NUM_OPCODES} most frequent in per cent of all that warps executed, and all of them for each HGMMA.",
            _instructions(rows),
            "### What warps wait for",
            "Cycles from one instruction of a warp to its next, and the largest reasons, without the cycle in which it "
            "is issued. 'not selected': ready, but another warp was issued.",
            _waits(rows),
        ]
    parts += _tried(pd.concat([source.rows for source in sources]), data)
    return "\n\n".join(parts) + "\n"


def _note(path: Path) -> str:
    """What the file says of its rows beside the method, as a sentence."""
    note = json.loads(path.read_text()).get("method", {}).get("note")
    return f" {note[0].upper()}{note[1:]}." if note else ""


def cell_name(row) -> str:
    return f"{row['pattern']} {row['resolution']}, {row['batch']} x {row['heads']} x {row['head_dim']}"


def _units(source: Source) -> str:
    lines = []
    for _, rows in source.rows.groupby(CELL, sort=False):
        backward = rows[rows["pass"] != "forward"]
        for _, row in rows.iterrows():
            lines.append([*_names(row), number(row["ms"]), *_target(source, row, "forward", row["bounded"] is True)])
            lines[-1] += [f"{row['clock_ghz']:.2f}", *(f"{row[field]:.0f}" for field in PERCENTAGES)]
            lines[-1] += [f"{row['l2_hit_pct']:.0f}", number(row["dram_gb"]), f"{row['dram_tb_per_s']:.2f}"]
            lines[-1] += [f"{row['imbalance']:.2f}", f"{row['sm_active_pct']:.0f}"]
        if len(backward):
            first = backward.iloc[0]
            sums = [number(backward["ms"].sum()), *_target(source, first, "backward", True)]
            rest = [DASH, *[DASH] * len(PERCENTAGES), DASH, number(backward["dram_gb"].sum())]
            rest += [f"{backward['dram_gb'].sum() / backward['ms'].sum():.2f}", DASH, DASH]
            lines.append([cell_name(first), "backward, all", *sums, *rest])
    head = ["cell", "launch", "ms", "target, ms", "GHz", *PERCENTAGES.values(), "L2 hits, %", "DRAM, GB", "TB/s"]
    return table([*head, "imbalance", "SM active, %"], lines, left=(0, 1))


def _target(source: Source, row: pd.Series, direction: str, has_one: bool) -> list[str]:
    return [number(target_of(source.environment, row, direction)) if has_one else DASH]


def _names(row: pd.Series) -> list[str]:
    return [cell_name(row), row["launch"]]


def _least(rows: pd.DataFrame) -> str:
    lines = []
    for _, row in rows.iterrows():
        reached = DASH if math.isnan(row["reached"]) else f"{100 * row['reached']:.0f} %"
        least = [number(row[column]) for column in LEAST]
        lines.append([*_names(row), number(row["ms"]), *least, or_dash(row["bound"]), reached])
    return table(["cell", "launch", "measured, ms", *LEAST.values(), "largest", "reached"], lines, left=(0, 1, 7))


def _instructions(rows: pd.DataFrame) -> str:
    lines = []
    for _, row in rows.iterrows():
        most = sorted(row["opcodes"].items(), key=lambda item: (-item[1], item[0]))[:NUM_OPCODES]
        shares = ", ".join(f"{name} {100 * count / row['instructions']:.1f}" for name, count in most)
        lines.append([*_names(row), number(row["instructions"] / 1e6), number(row["instructions_per_hgmma"]), shares])
    return table(["cell", "launch", "millions", "for each HGMMA", "per cent"], lines, left=(0, 1, 4))


def _waits(rows: pd.DataFrame) -> str:
    lines = []
    for _, row in rows.iterrows():
        waits = {name: cycles for name, cycles in row["stalls"].items() if name != "selected"}
        most = sorted(waits.items(), key=lambda item: (-item[1], item[0]))[:NUM_STALLS]
        told = ", ".join(f"{name.replace('_', ' ')} {cycles:.2f}" for name, cycles in most)
        lines.append([*_names(row), number(sum(row["stalls"].values())), told])
    return table(["cell", "launch", "cycles", "largest"], lines, left=(0, 1, 3))


def tile_of(kernel: str) -> str:
    """The tile as "hopper_tiles" names it: warpgroups/columns/stages/row stages/overlap/blocks an SM."""
    arguments = re.search(r"Tile<([^>]*)>", kernel)[1]
    _, _, groups, cols, stages, other, blocks = re.sub(r"\([^)]*\)", "", arguments).replace(" ", "").split(",")
    # The forward has two row stages always, and only it has an overlap.
    rows, overlap = ("2", other) if "Forward" in kernel else (other, "0")
    return "/".join((groups, cols, stages, rows, overlap, blocks))


def _tried(rows: pd.DataFrame, data: Path) -> list[str]:
    parts = []
    for path, content in data_files(data, TILES_KIND, TILES_VERSIONS):
        lines, runs = [], set()
        for _, cell in rows[rows["head_dim"] == TILES_HEAD_DIM].groupby(CELL, sort=False):
            for name in TRIED:
                for run, times in _variants(content["rows"], cell.iloc[0], name):
                    runs.add(run)
                    told = _told(times, name, _tiles(cell))
                    lines.append([cell_name(cell.iloc[0]), TRIED[name], str(run), told])
        if not lines:
            continue
        parts += [
            "## Variants tried",
            f"[{path.name}](../data/{path.name}), {content['gpu']}: {content['method']}. A variant is "
            f"{content['key']}; times in ms, the fastest first, and only those of one run compare. (*) has the tile of "
            "the kernel profiled above, whose code may be younger.",
            "\n".join(f"* Run {n}: {content['notes'][str(n)]}." for n in sorted(runs) if str(n) in content["notes"]),
            table(["cell", "pass", "run", "variants"], lines, left=(0, 1, 3)),
        ]
    return parts


def _tiles(cell: pd.DataFrame) -> dict[str, str]:
    """Tiles of a cell's launches, by passes of "hopper_tiles"."""
    named = {"forward, bounded": "forward, bounded", "dq": "dq", "dk, dv": "dkdv"}
    return {named[row["launch"]]: tile_of(row["kernel"]) for _, row in cell.iterrows() if row["launch"] in named}


def _variants(rows: list[dict], cell: pd.Series, name: str) -> list[tuple[int, dict[str, float]]]:
    """(run, ms by variant) of a cell and pass, where a run has several. Runs without a batch took that of the cells."""
    found = []
    for row in rows:
        place = row["pattern"], row["resolution"], row["head_dim"], row.get("batch", cell["batch"])
        if row["run"] < FIRST_RUN or place != tuple(cell[["pattern", "resolution", "head_dim", "batch"]]):
            continue
        times = {key: statistics.mean(ms) if isinstance(ms, list) else ms for key, ms in row["ms"].items()}
        if row["pass"] == "forward" and name == "forward, bounded":  # runs that tell them apart by the variant's name
            times = {key.removesuffix(" bounded"): ms for key, ms in times.items() if key.endswith(" bounded")}
        elif row["pass"] != name:
            continue
        if len(times) > 1:
            found.append((row["run"], times))
    return sorted(found, key=lambda item: item[0])


def _told(times: dict[str, float], name: str, tiles: dict[str, str]) -> str:
    def is_profiled(variant: str) -> bool:
        kind, _, tile = variant.rpartition(" ")
        of = ("dkdv" if kind == "dk/dv" else "dq") if name == "both" else name
        return tile == tiles.get(of) and (name != "both" or "dkdv" in tiles)

    ranked = sorted(times, key=lambda variant: (times[variant], variant))
    told = [f"{variant} {number(times[variant])}" + " (*)" * is_profiled(variant) for variant in ranked]
    return ", ".join([f"**{told[0]}**", *told[1:]])


def draw(source: Source) -> Figure:
    """Busy shares of the units, a panel a cell and a group of bars a launch; patterns side by side."""
    by_size = source.rows.sort_values(["head_dim", "resolution"], kind="stable")
    panels = list(by_size.groupby(CELL, sort=False))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.4 * columns, 2.5 * lines + 1.1), squeeze=False, sharey=True)
    figure.set_layout_engine("constrained")
    width, most = 0.8 / len(BARS), max(len(rows) for _, rows in panels)
    for ax, (_, rows) in zip(axes.flat, panels, strict=False):
        for i, (field, (label, colour)) in enumerate(BARS.items()):
            places = [place + (i - (len(BARS) - 1) / 2) * width for place in range(len(rows))]
            ax.bar(places, rows[field], width, color=colour, label=label)
        labels = [f"{row['launch']}\n{number(row['ms'])} ms" for _, row in rows.iterrows()]
        ax.set_xticks(range(len(rows)), labels, fontsize=8)
        ax.set_title(cell_name(rows.iloc[0]).replace("_", "-").replace(",", " px,"), fontsize=10)
        ax.set_xlim(-0.5, most - 0.5)  # bars of one width in all panels
        ax.set_ylim(0, 100)
        ax.grid(axis="y", color="#dddddd", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel("busy, %")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(BARS), fontsize=9, frameon=False)
    commit = or_dash(source.environment["commit"])[:10]
    figure.suptitle(f"Units of the attention kernels, {source.environment['gpu']}, commit {commit}", fontsize=11)
    return figure
