"""Find the fastest tiles of the fused operators: `python -m bench.tune_operators` on the GPU to tune for.

For every training shape of `operator_rivals.py` and each table of the kernels, every candidate is checked against the
float64 reference, then timed by the method of `timing.py`; the result is a list per shape, fastest first. A new row of
a table in hmar_kernels is written by hand from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from hmar_kernels.gelu_linear import triton as gelu_kernels
from hmar_kernels.linear_cross_entropy import triton as loss_kernels
from hmar_kernels.modulated_norm import triton as norm_kernels
from hmar_kernels.qk_norm import triton as qk_kernels

from . import operator_rivals as rivals
from .environment import environment
from .operators import Oracle, Run, draw_seeds
from .options import names
from .results import rounded
from .subject import ERRORS, release
from .timing import Stopwatch

Change = tuple[str, AbstractContextManager]
"""What is tried, in words, and the context in which the kernels do it."""


@contextmanager
def attributes(module, **values) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def norm_tiles(direction: int) -> Iterator[Change]:
    """Rows of the forward (direction 0) or stages of the backward (1), warps, programs of the backward."""
    firsts, warps = ((1, 2, 4, 8), (2, 4, 8)) if direction == 0 else ((2, 3), (4, 8, 16))
    programs = (norm_kernels.PROGRAMS_PER_SM,) if direction == 0 else (4, 8, 16)
    for first, num_warps, per_sm in itertools.product(firsts, warps, programs):
        tile = norm_kernels.Tile(first, num_warps)
        table = {
            channels: (tile, backward) if direction == 0 else (forward, tile)
            for channels, (forward, backward) in norm_kernels.TILES.items()
        }
        changed = attributes(norm_kernels, TILES=table, PROGRAMS_PER_SM=per_sm)
        yield f"{tile} programs {per_sm}", changed


def qk_tiles(direction: int) -> Iterator[Change]:
    backward_rows = (qk_kernels.BACKWARD_ROWS,) if direction == 0 else (64, 128)
    name, stages = ("FORWARD_TILE", (1,)) if direction == 0 else ("BACKWARD_TILE", (1, 3))
    for rows, warps, num_stages, per_program in itertools.product((8, 16, 32), (4, 8), stages, backward_rows):
        tile = qk_kernels.Tile(rows, warps, num_stages)
        yield f"{tile} of {per_program}", attributes(qk_kernels, BACKWARD_ROWS=per_program, **{name: tile})


def gelu_tiles(direction: int) -> Iterator[Change]:
    programs = (gelu_kernels.PROGRAMS_PER_SM,) if direction == 0 else (8, 16, 32)
    for rows, block, warps, per_sm in itertools.product((4, 8, 16), (256,), (4, 8), programs):
        changed = attributes(gelu_kernels, TILE_ROWS=rows, BLOCK_F=block, WARPS=warps, PROGRAMS_PER_SM=per_sm)
        yield f"{rows} x {block}, {warps} warps, programs {per_sm}", changed


def loss_tiles() -> Iterator[Change]:
    for megabytes, warps in itertools.product((16, 32, 64, 128), (4, 8, 16)):
        changed = attributes(loss_kernels, CHUNK_BYTES=megabytes << 20, WARPS=warps)
        yield f"{megabytes} MB, {warps} warps", changed


TABLES: dict[str, tuple[str, Callable[[], Iterator[Change]]]] = {
    "residual_modulated_norm": ("forward", lambda: norm_tiles(0)),
    "residual_modulated_norm backward": ("backward", lambda: norm_tiles(1)),
    "residual_norm_linear backward": ("backward", lambda: norm_tiles(1)),
    "gelu_linear": ("forward", lambda: gelu_tiles(0)),
    "gelu_linear backward": ("backward", lambda: gelu_tiles(1)),
    "qk_norm": ("forward", lambda: qk_tiles(0)),
    "qk_norm backward": ("backward", lambda: qk_tiles(1)),
    "linear_cross_entropy": ("forward", loss_tiles),
}
"""Table -> (direction that is timed, candidates)."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune_operators", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the tool, interpreted")
    parser.add_argument("--tables", type=names, help=f"default: {','.join(TABLES)}")
    parser.add_argument("--shapes", type=names, help=f"default: {','.join(map(str, rivals.SHAPES))}")
    parser.add_argument("--rounds", type=int, default=15, help="of each candidate (default 15)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON of all figures")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    stopwatch, rows = Stopwatch(device), []
    for shape in rivals.SMOKE_SHAPES if device.type == "cpu" else rivals.SHAPES:
        if str(shape) not in (options.shapes or [str(shape)]):
            continue
        for table, (direction, candidates) in TABLES.items():
            if table not in (options.tables or TABLES):
                continue
            found = try_candidates(table.split()[0], shape, direction, candidates(), stopwatch, options.rounds)
            for name, ms, reason in sorted(found, key=lambda row: math.inf if row[1] is None else row[1]):
                print(f"{shape!s:<14} {table:<34} {name:<44} {reason or f'{ms:8.4f} ms'}", flush=True)
                rows.append({"shape": str(shape), "table": table, "tile": name, "ms": ms, "reason": reason})
            if options.output:
                content = {
                    "kind": "operator_tiles",
                    "environment": environment(device, None),
                    "results": [rounded(row) for row in rows],
                }
                options.output.write_text(json.dumps(content, indent=1) + "\n")


def try_candidates(
    operator: str,
    shape: rivals.Shape,
    direction: str,
    candidates: Iterator[Change],
    stopwatch: Stopwatch,
    rounds: int,
) -> list[tuple[str, float | None, str | None]]:
    """(candidate, milliseconds, why there are none) in the order of the candidates."""
    case = next(case for case in rivals.cases() if case.name == operator)
    inputs = case.draw(shape, stopwatch.device)
    seeds = draw_seeds(case, inputs)
    oracle = Oracle(case, inputs, seeds)
    run = Run(case, case.implementations["triton"], inputs, seeds)
    found = []
    for name, change in candidates:
        with change:
            try:
                oracle.compare(run.results())
                found.append((name, 1e3 * stopwatch.seconds(*run.timed(direction), repeats=rounds), None))
            except ERRORS as error:
                found.append((name, None, f"{type(error).__name__}: {error}".splitlines()[0][:200]))
        release(stopwatch.device)
    return found


if __name__ == "__main__":
    main()
