"""Tiles made from a mask on the host: what each program of a kernel works on.

A plan cuts the rows (queries, or keys for the dk/dv pass) into tiles of at most `block_rows` and says for each which
columns it must visit and which of these need no mask:

    col_begin <= full_begin <= full_end <= col_end
    [full_begin, full_end) is seen by every row of the tile, in whole blocks of `block_cols`: no mask is applied;
    [col_begin, full_begin) in whole blocks, and [full_end, col_end): some rows do not see some columns: masked.

Where many short runs of rows stand side by side (the first scales of a pyramid) one tile takes several of them; where
a run is long the tiles restart at its beginning, so that none straddles it. Which of the two is cheaper is decided by
dynamic programming over the run boundaries. Tiles are ordered by work, longest first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..mask import SpanMask

# Work of a tile in units of one unmasked block: measured to within what the choice of boundaries depends on.
MASKED_BLOCK = 1.25
TILE_OVERHEAD = 1.5
# Beyond this many runs of equal rows (causal masks) boundaries cannot be kept, and tiles are cut at even distances.
MAX_RUNS = 256

ROW_BEGIN, ROW_END, COL_BEGIN, COL_END, FULL_BEGIN, FULL_END = range(6)


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one pass over a mask.

    Attributes:
        tiles: int32 [num_tiles, 6] on the kernel's device, columns row_begin, row_end, col_begin, col_end, full_begin,
            full_end.
        block_rows, block_cols: tile shape the plan was made for; kernels must be launched with the same.
    """

    tiles: torch.Tensor
    block_rows: int
    block_cols: int

    @property
    def num_tiles(self) -> int:
        return len(self.tiles)

    def block_counts(self) -> tuple[int, int]:
        """(blocks without a mask, blocks with one) that all tiles visit together."""
        t = self.tiles.cpu().numpy().astype(np.int64)
        full = (t[:, FULL_END] - t[:, FULL_BEGIN]) // self.block_cols
        masked = (t[:, FULL_BEGIN] - t[:, COL_BEGIN]) // self.block_cols
        masked += -(-(t[:, COL_END] - t[:, FULL_END]) // self.block_cols)
        return int(full.sum()), int(masked.sum())


def query_plan(mask: SpanMask, block_rows: int, block_cols: int, device: torch.device | str) -> TilePlan:
    """Rows are queries, columns are keys: the forward and the dq pass."""
    return mask.cached(
        ("query_plan", block_rows, block_cols, str(device)),
        lambda: _plan(mask.key_start.numpy(), mask.key_end.numpy(), True, block_rows, block_cols, device),
    )


def key_plan(mask: SpanMask, block_rows: int, block_cols: int, device: torch.device | str) -> TilePlan:
    """Rows are keys, columns are queries: the dk/dv pass."""
    return mask.cached(
        ("key_plan", block_rows, block_cols, str(device)),
        lambda: _plan(
            mask.query_start.numpy(), mask.query_end.numpy(), mask.has_exact_transpose, block_rows, block_cols, device
        ),
    )


def _plan(
    start: np.ndarray, end: np.ndarray, exact: bool, block_rows: int, block_cols: int, device: torch.device | str
) -> TilePlan:
    tiles = [_tile(start, end, exact, a, b, block_cols) for a, b in _cut(start, end, exact, block_rows, block_cols)]
    tiles.sort(key=lambda tile: -_work(tile, block_cols))
    return TilePlan(torch.tensor(tiles, dtype=torch.int32).to(device), block_rows, block_cols)


def _tile(
    start: np.ndarray, end: np.ndarray, exact: bool, row_begin: int, row_end: int, block_cols: int
) -> tuple[int, int, int, int, int, int]:
    starts, ends = start[row_begin:row_end], end[row_begin:row_end]
    seeing = ends > starts
    if not seeing.any():
        return row_begin, row_end, 0, 0, 0, 0
    col_begin, col_end = int(starts[seeing].min()), int(ends[seeing].max())
    # NOTE: when intervals are only hulls (`exact` is False) no column is known to be seen by all rows.
    inner_begin, inner_end = (int(starts.max()), int(ends.min())) if exact and seeing.all() else (0, 0)
    full_begin = col_begin + math.ceil((inner_begin - col_begin) / block_cols) * block_cols
    num_full = (inner_end - full_begin) // block_cols
    if inner_end <= inner_begin or num_full <= 0:
        return row_begin, row_end, col_begin, col_end, col_begin, col_begin
    return row_begin, row_end, col_begin, col_end, full_begin, full_begin + num_full * block_cols


def _work(tile: tuple[int, ...], block_cols: int) -> float:
    full = (tile[FULL_END] - tile[FULL_BEGIN]) // block_cols
    masked = (tile[FULL_BEGIN] - tile[COL_BEGIN]) // block_cols + math.ceil(
        (tile[COL_END] - tile[FULL_END]) / block_cols
    )
    return TILE_OVERHEAD + full + MASKED_BLOCK * masked


def _cut(start: np.ndarray, end: np.ndarray, exact: bool, block_rows: int, block_cols: int) -> list[tuple[int, int]]:
    """The rows of each tile, by least total work."""
    num_rows = len(start)
    change = np.flatnonzero((np.diff(start) != 0) | (np.diff(end) != 0)) + 1
    if len(change) + 1 > MAX_RUNS:
        return [(a, min(a + block_rows, num_rows)) for a in range(0, num_rows, block_rows)]
    run_ends = [*change.tolist(), num_rows]

    best: dict[int, tuple[float, int]] = {num_rows: (0.0, num_rows)}  # row -> (work from here on, end of its tile)
    stack = [0]
    while stack:
        row = stack[-1]
        if row in best:
            stack.pop()
            continue
        limit = min(row + block_rows, num_rows)
        ends = sorted({limit, *(e for e in run_ends if row < e < limit)})
        missing = [e for e in ends if e not in best]
        if missing:
            stack.extend(missing)
            continue
        best[row] = min((_work(_tile(start, end, exact, row, e, block_cols), block_cols) + best[e][0], e) for e in ends)
        stack.pop()

    cut, row = [], 0
    while row < num_rows:
        cut.append((row, best[row][1]))
        row = best[row][1]
    return cut


@dataclass(frozen=True)
class JobPlan:
    """Tiles for kernels whose blocks have several warpgroups of 64 rows each that share their columns (csrc/hopper*).

    Attributes:
        jobs: int32 [num_jobs, fields] on the kernel's device, as csrc/hopper_params.h names the fields: the first
            column and the number of column blocks, then for each warpgroup its rows, the blocks of which it sees a
            column and the blocks of which all its rows see all columns. Fields are padded to a multiple of four.
        groups, block_cols: what the plan was made for.
    """

    jobs: torch.Tensor
    groups: int
    block_cols: int

    @property
    def num_jobs(self) -> int:
        return len(self.jobs)

    @property
    def num_blocks(self) -> int:
        """Column blocks of all jobs, whichever of their groups see them."""
        return int(self.jobs[:, 1].sum())


GROUP_ROWS = 64
NUM_JOB_FIELDS, NUM_GROUP_FIELDS = 2, 6


def query_jobs(mask: SpanMask, groups: int, block_cols: int, device: torch.device | str) -> JobPlan:
    """Rows are queries, columns are keys: the forward and the dq pass."""
    return mask.cached(
        ("query_jobs", groups, block_cols, str(device)),
        lambda: _job_plan(mask.key_start.numpy(), mask.key_end.numpy(), True, groups, block_cols, device),
    )


def key_jobs(mask: SpanMask, groups: int, block_cols: int, device: torch.device | str) -> JobPlan:
    """Rows are keys, columns are queries: the dk/dv pass."""
    return mask.cached(
        ("key_jobs", groups, block_cols, str(device)),
        lambda: _job_plan(
            mask.query_start.numpy(), mask.query_end.numpy(), mask.has_exact_transpose, groups, block_cols, device
        ),
    )


def _job_plan(
    start: np.ndarray, end: np.ndarray, exact: bool, groups: int, block_cols: int, device: torch.device | str
) -> JobPlan:
    tiles = [
        _tile(start, end, exact, a, b, block_cols) for a, b in _cut(start, end, exact, GROUP_ROWS * groups, block_cols)
    ]
    tiles.sort(key=lambda tile: -_work(tile, block_cols))
    num_fields = math.ceil((NUM_JOB_FIELDS + NUM_GROUP_FIELDS * groups) / 4) * 4
    jobs = np.zeros((len(tiles), num_fields), dtype=np.int32)
    for job, (row_begin, row_end, col_begin, col_end, _, _) in zip(jobs, tiles, strict=True):
        fields = [col_begin, math.ceil((col_end - col_begin) / block_cols)]
        for group in range(groups):
            a = min(row_begin + group * GROUP_ROWS, row_end)
            b = min(a + GROUP_ROWS, row_end)
            if a == b:  # nothing to do, but the row where loads begin must be one that exists
                fields += [row_begin, row_begin, 0, 0, 0, 0]
            else:
                fields += [a, b, *_blocks(start[a:b], end[a:b], exact, col_begin, block_cols)]
        job[: len(fields)] = fields
    return JobPlan(torch.from_numpy(jobs).to(device), groups, block_cols)


def _blocks(
    starts: np.ndarray, ends: np.ndarray, exact: bool, first: int, block_cols: int
) -> tuple[int, int, int, int]:
    """Blocks, counted from column `first`, of which the rows see a column, and of which all rows see all columns."""
    seeing = ends > starts
    if not seeing.any():
        return 0, 0, 0, 0
    begin = (int(starts[seeing].min()) - first) // block_cols
    end = math.ceil((int(ends[seeing].max()) - first) / block_cols)
    if exact and seeing.all():
        full_begin = math.ceil((int(starts.max()) - first) / block_cols)
        full_end = (int(ends.min()) - first) // block_cols
        if full_end > full_begin:
            return begin, end, full_begin, full_end
    return begin, end, begin, begin
