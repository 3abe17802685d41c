"""Find the fastest tiles for products of few rows: `python -m bench.tune_linear` on the GPU to tune for.

For every number of rows and every layer of a block, each candidate is checked against the float64 reference, then timed
in a CUDA graph of calls one after another, each with a weight of its own, so many that no cache holds them; beside them
"cublas", the operators that larger products take, and "cuda", whose tile follows from the rows. Then whole blocks, as
the engine runs them, by its choices: what the thresholds of the engine are set by. Printed is the time of one call, and
of one block. A new row of `hmar_kernels/linear/triton.py` is written by hand from it. `--candidates 0` times the table
as it is; most of a run with candidates is their compilation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from hmar.config import ModelConfig
from hmar.engine import ATTENTIONS, PRODUCTS, Choices, FusedBlock
from hmar.model import Block, Residual
from hmar_kernels import SpanMask, linear
from hmar_kernels.linear import triton as kernels

from .environment import environment
from .options import integers, names
from .results import rounded
from .subject import ERRORS, release
from .tune_operators import attributes

ROWS = (2, 9, 16, 18, 32, 50, 128)
# N and K in widths, and what surrounds the product
LAYERS = {
    "qkv": (3, 1, {"norm"}),
    "proj": (1, 1, {"bias", "residual", "gate"}),
    "fc1": (4, 1, {"bias", "norm", "gelu"}),
    "fc2": (1, 4, {"bias", "residual", "gate"}),
}
WEIGHT_BYTES = 256 << 20  # of all copies of a weight together: several times the L2 cache
SHARED_BYTES = 227 << 10
REPLAYS, ROUNDS = 5, 7
BLOCKS = 16  # that are timed together


def precision(device: torch.device) -> torch.dtype:
    # NOTE: Triton's interpreter cannot multiply bfloat16.
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def tiles(K: int) -> Iterator[kernels.Tile]:
    """Candidates whose tiles fit into shared memory."""
    block_k = 1 << (K - 1).bit_length()
    whole = [(min(block_k, 1024), 8, splits, 1, 8) for splits in (1, 2, 4, 8) if block_k <= 1024 * splits]
    looped = [(k, 4, splits, stages, 4) for k in (256, 512) for splits in (1, 4) for stages in (3, 4)]
    for block_n, (k, groups, splits, stages, warps) in itertools.product(
        (16, 32, 64), whole + (looped if block_k > 1024 else [])
    ):
        k = min(k, max(16 * groups, block_k // splits))
        if 2 * stages * k * (kernels.ROWS + block_n) <= SHARED_BYTES:
            yield kernels.Tile(block_n, k, groups, splits, stages, warps)


def arguments_of(layer: str, rows: int, width: int, device: torch.device) -> dict:
    (N, K, given), low = LAYERS[layer], precision(device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = low) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    N, K = N * width, K * width
    arguments = {
        "x": draw(1, rows, K, dtype=torch.float32 if "norm" in given else low),
        "bias": draw(N),
        "norm": (0.1 * draw(1, 1, K), 0.1 * draw(1, 1, K)),
        "residual": draw(1, rows, N, dtype=torch.float32),
        "gate": 0.1 * draw(1, 1, N),
        "gelu": True,
    }
    return {name: value for name, value in arguments.items() if name in given | {"x"}}


def weights_of(layer: str, width: int, device: torch.device) -> list[Tensor]:
    N, K, _ = LAYERS[layer]
    copies = max(1, WEIGHT_BYTES // (2 * N * K * width**2)) if device.type == "cuda" else 1
    weight = torch.randn(N * width, K * width, device=device) / math.sqrt(K * width)
    return [weight.to(precision(device), copy=True) for _ in range(copies)]


def check(actual: Tensor, weight: Tensor, arguments: dict) -> None:
    """ValueError for a result that is no better than rounding twice."""
    exact = {
        name: tuple(t.double() for t in value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }
    exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in exact.items()}
    expected = linear(weight=weight.double(), **exact, impl="reference")
    eager = linear(weight=weight, **arguments, impl="reference")
    error, allowed = ((y.double() - expected).norm() for y in (actual, eager))
    if not error <= 2 * allowed + torch.finfo(eager.dtype).eps * expected.norm():
        raise ValueError(f"error norm {error:.3g}, {allowed:.3g} of eager torch")


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, captured on a GPU; the median of ROUNDS."""
    run()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    samples = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * begin.elapsed_time(end) / REPLAYS)
    return sorted(samples)[ROUNDS // 2]


def try_layer(layer: str, rows: int, width: int, device: torch.device, few: int | None) -> Iterator[dict]:
    """Microseconds of a call: the table's tile, cuBLAS, then the candidates (`few` of them)."""
    weights, arguments = weights_of(layer, width, device), arguments_of(layer, rows, width, device)
    N, K = weights[0].shape
    counters = torch.zeros(4 * N, dtype=torch.int32, device=device)
    options = {"impl": "triton", "overlap": True, "counters": counters}
    chosen = kernels.select_tile(N, K)
    candidates: list[tuple[str, dict, kernels.Tile | None]] = [("table " + str(tuple(chosen)), options, None)]
    if device.type == "cuda":
        candidates.append(("cublas", {"impl": "cublas"}, None))
        candidates.append(("cuda", {"impl": "cuda", "overlap": True}, None))
    candidates += [(str(tuple(tile)), options, tile) for tile in itertools.islice(tiles(K), few)]
    for name, how, tile in candidates:
        change = nullcontext()
        if tile is not None:
            change = attributes(kernels, TILES={kernels.WIDE: tile}, BLOCKS=1 << 30)
        row = {"layer": layer, "rows": rows, "tile": name, "us": None, "reason": None}
        with change:
            try:
                check(linear(weight=weights[0], **arguments, **how), weights[0], arguments)

                def run(how=how):
                    for weight in weights:
                        linear(weight=weight, **arguments, **how)

                row["us"] = microseconds(run, device) / len(weights)
            except ERRORS as error:
                row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield row


def try_blocks(rows: int, width: int, device: torch.device) -> Iterator[dict]:
    """Microseconds of a block by the engine's choices, of BLOCKS with weights of their own."""
    config = ModelConfig(depth=2, width=width, num_heads=width // 64)
    mask, cond = SpanMask.block_diagonal([rows]), torch.randn(1, width, device=device)
    with torch.device(device):
        blocks = [Block(config, 1, "auto").eval().requires_grad_(False) for _ in range(BLOCKS)]
    for block in blocks:
        block.attention.bound_H = block.attention.logit_bound()
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(precision(device))
        vectors = tuple(0.1 * torch.randn(6, 1, 1, width, device=device).to(precision(device)))
        block.modulation.forward = lambda cond, vectors=vectors: vectors
    x = torch.randn(1, rows, width, device=device)
    counters = torch.zeros(4 * width, dtype=torch.int32, device=device)
    for products, attention, overlap in itertools.product(PRODUCTS, ATTENTIONS, (False, True)):
        if products == "cublas" and attention == "separate" and overlap:
            continue
        choices = Choices(products, attention, overlap, counters)
        fused = [FusedBlock(block, choices) for block in blocks]

        def run(fused=fused):
            stream = Residual(x)
            for block in fused:
                stream = block(stream, cond, mask)

        row = {"layer": "block", "rows": rows, "tile": f"{products} {attention}{' overlap' * overlap}"}
        try:
            with torch.autocast(device.type, precision(device), cache_enabled=False):
                row |= {"us": microseconds(run, device) / BLOCKS, "reason": None}
        except ERRORS as error:
            row |= {"us": None, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        yield row


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune_linear", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the tool, interpreted")
    parser.add_argument("--rows", type=integers, metavar="N,N", default=list(ROWS), help=f"default: {ROWS}")
    parser.add_argument("--layers", type=names, metavar="A,B", help=f"default: {','.join(LAYERS)},block")
    parser.add_argument("--width", type=int, default=1024, help="of the model (default 1024, d16)")
    parser.add_argument("--candidates", type=int, metavar="N", help="the first N only; 0 times the table as it is")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON of all figures")
    options = parser.parse_args(arguments)
    device, results = torch.device(options.device), []
    layers = options.layers or [*LAYERS, "block"]
    if unknown := set(layers) - {*LAYERS, "block"}:
        parser.error(f"unknown layers {', '.join(sorted(unknown))}: known are {', '.join(LAYERS)}, block")
    # NOTE: whole blocks first, so that a run that is cut short has them.
    for layer, rows in itertools.product(sorted(layers, key=lambda layer: layer != "block"), options.rows):
        found = (
            try_blocks(rows, options.width, device)
            if layer == "block"
            else try_layer(layer, rows, options.width, device, options.candidates)
        )
        for row in sorted(found, key=lambda row: math.inf if row["us"] is None else row["us"]):
            us = row["reason"] or f"{row['us']:8.2f} us"
            print(f"{row['rows']:>4} rows {row['layer']:<6} {row['tile']:<52} {us}", flush=True)
            results.append(rounded(row))
        release(device)
        if options.output:
            content = {"kind": "linear_tiles", "environment": environment(device, None), "results": results}
            options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
