"""Attention: data files of kind "attention" (written by `pytest bench`), with what follows from their numbers.

Read next: attention.py for the tables, attention_plots.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from .results import data_files
from .style import rank_of

KIND, VERSIONS = "attention", (1, 2)
CELL = ["pattern", "resolution", "batch", "heads", "head_dim", "dtype"]
PATTERNS = ("block_diagonal", "block_causal")
DIRECTIONS = ("forward", "backward")
MAIN_BATCH = {256: 64, 512: 16, 1024: 4}  # by resolution: about as many tokens in each; the batches of the targets


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
        return sorted(measured, key=rank_of)

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
    for path, content in data_files(folder, KIND, VERSIONS):
        rows = _derive(pd.DataFrame(content["results"]), content["environment"], content["ceilings"])
        sources.append(Source(path, content["environment"], content["ceilings"], rows))
    return sources


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
            "pattern": rows["pattern"].map(pattern_rank),
            "resolution": rows["resolution"],
            "batch": -rows["batch"],
            "heads": rows["heads"],
            "dtype": rows["dtype"],
            "direction": rows["direction"].map(DIRECTIONS.index),
            "impl": rows["impl"].map(rank_of),
        }
    )
    return rows.loc[order.sort_values(list(order.columns)).index].reset_index(drop=True)


def pattern_rank(pattern: str) -> tuple[int, str]:
    return (PATTERNS.index(pattern) if pattern in PATTERNS else len(PATTERNS), pattern)
