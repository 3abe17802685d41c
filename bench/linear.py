"""Products of few rows: `python -m bench.linear` on a CUDA GPU.

For every number of rows and every layer of a block, "cuda", the kernels for few rows of `hmar_kernels.linear`, where
they take so many, with the statistics that they leave each other, beside "cublas", the operators that larger products
take: checked against the float64 reference, then timed in a CUDA graph of calls one after another, each with a weight
of its own, so many that no cache holds them. Then whole blocks, as the engine runs them, by its choices, with "blocks"
all in one kernel of `hmar_kernels.blocks`, whose result is checked too: what `FEW_ROWS` of the engine is set by.
Printed is the time of one call, and of one block; results are one JSON file of kind "linear".
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hmar.config import ModelConfig
from hmar.engine import ATTENTIONS, Choices, FusedBlock, FusedBlocks
from hmar.model import Attention, Block, Residual
from hmar_kernels import SpanMask, linear, transformer_blocks
from hmar_kernels import blocks as blocks_kernel
from hmar_kernels.blocks import BlockWeights, Table
from hmar_kernels.linear import MAX_NORMED_ROWS, reference
from hmar_kernels.linear.cuda import MAX_ROWS

from .environment import environment
from .options import add_device, add_record, find_device, integers, names
from .results import rounded
from .subject import ERRORS, release

ROWS = (2, 8, 16, 18, 32, 50, 72, 128)
# N and K in widths, and what surrounds the product
LAYERS = {
    "qkv": (3, 1, {"norm"}),
    "proj": (1, 1, {"bias", "residual", "gate"}),
    "fc1": (4, 1, {"bias", "norm", "gelu"}),
    "fc2": (1, 4, {"bias", "residual", "gate"}),
}
WEIGHT_BYTES = 256 << 20  # of all copies of a weight together: several times the L2 cache
REPLAYS, ROUNDS = 5, 7
BLOCKS = 16  # that are timed together


def arguments_of(layer: str, rows: int, width: int, device: torch.device) -> dict:
    (N, K, given), low = LAYERS[layer], torch.bfloat16
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
    return [weight.to(torch.bfloat16, copy=True) for _ in range(copies)]


def check(actual: Tensor | tuple[Tensor, Tensor], weight: Tensor, arguments: dict) -> None:
    """ValueError for a result that is no better than rounding twice, and for statistics that are not those of it."""
    exact = {
        name: tuple(t.double() for t in value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }
    exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in exact.items()}
    expected = linear(weight=weight.double(), **exact, impl="reference")
    eager = linear(weight=weight, **arguments, impl="reference")
    y, *statistics = actual if isinstance(actual, tuple) else (actual,)
    error, allowed = ((y.double() - expected).norm() for y in (y, eager))
    if not error <= 2 * allowed + torch.finfo(eager.dtype).eps * expected.norm():
        raise ValueError(f"error norm {error:.3g}, {allowed:.3g} of eager torch")
    for found in statistics:
        if not torch.allclose(found, reference.statistics(y), rtol=1e-4, atol=1e-4):
            raise ValueError("statistics are not those of the result")


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


def products_of(rows: int, device: torch.device) -> tuple[str, ...]:
    """Of the engine's products those of single layers that take so many rows there."""
    return ("cublas", "cuda") if rows <= MAX_ROWS and device.type == "cuda" else ("cublas",)


def try_layer(layer: str, rows: int, width: int, device: torch.device) -> Iterator[dict]:
    """Microseconds of a call by each implementation."""
    weights, arguments = weights_of(layer, width, device), arguments_of(layer, rows, width, device)
    for impl in products_of(rows, device) if device.type == "cuda" else ("reference",):
        options = {"impl": impl, "overlap": impl == "cuda"}
        if impl == "cuda":
            options["return_statistics"] = "residual" in arguments and rows <= MAX_NORMED_ROWS
            options |= {"statistics": reference.statistics(arguments["x"])} if "norm" in arguments else {}

        def call(weight, options=options):
            return linear(weight=weight, **arguments, **options)

        row = {"layer": layer, "rows": rows, "by": impl, "us": None, "reason": None}
        try:
            check(call(weights[0]), weights[0], arguments)
            row["us"] = microseconds(lambda call=call: [call(weight) for weight in weights], device) / len(weights)
        except ERRORS as error:
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield row


def try_blocks(rows: int, width: int, device: torch.device) -> Iterator[dict]:
    """Microseconds of a block by the engine's choices, of BLOCKS with weights of their own.

    Even rows are those of two images, as of one with guidance.
    """
    config = ModelConfig(depth=2, width=width, num_heads=width // 64)
    images = 1 + (rows % 2 == 0)
    mask, cond = SpanMask.block_diagonal([rows // images]), torch.randn(images, width, device=device)
    with torch.device(device):
        blocks = [Block(config, 1, "auto").eval().requires_grad_(False) for _ in range(BLOCKS)]
    for block in blocks:
        block.attention.bound_H = block.attention.logit_bound()
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)
        vectors = tuple(0.1 * torch.randn(6, images, 1, width, device=device).bfloat16())
        block.modulation.forward = lambda cond, vectors=vectors: vectors
    x = torch.randn(images, rows // images, width, device=device)
    on_gpu = device.type == "cuda"
    for products, attention, overlap in itertools.product(
        products_of(rows, device), ATTENTIONS if on_gpu else ("separate",), (False, True)
    ):
        if products == "cublas" and attention == "separate" and overlap:
            continue
        choices = Choices(MAX_ROWS if products == "cuda" else 0, attention, overlap)
        fused = [FusedBlock(block, choices) for block in blocks]

        def run(fused=fused):
            stream = Residual(x)
            for block in fused:
                stream = block(stream, cond, mask)

        by = f"{products} {attention}{' overlap' * overlap}"
        row = {"layer": "block", "rows": rows, "by": by}
        try:
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                row |= {"us": microseconds(run, device) / BLOCKS, "reason": None}
        except ERRORS as error:
            row |= {"us": None, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        yield row
    if on_gpu and rows <= blocks_kernel.MAX_ROWS:
        row = {"layer": "block", "rows": rows, "by": "blocks", "us": None, "reason": None}
        try:
            together = FusedBlocks([FusedBlock(block, Choices(MAX_ROWS, "fused", True)) for block in blocks])
            vectors = [block.modulation(cond) for block in blocks]
            refusal = blocks_kernel.refusal_of_rows(x, vectors, together.table.dtype)
            if refusal is not None:
                raise ValueError(refusal)

            def run_together():
                return together(Residual(x), cond, mask).x_BLC

            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                check_blocks(run_together(), x, together.table, vectors)
                row["us"] = microseconds(run_together, device) / BLOCKS
        except ERRORS as error:
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield row


def check_blocks(y: Tensor, x: Tensor, table: Table, vectors: list[tuple[Tensor, ...]]) -> None:
    """ValueError for a result that is no better than rounding twice."""
    exact = [BlockWeights(*(t.double() for t in block)) for block in table.blocks]
    options = {"max_log_scale": Attention.MAX_LOG_SCALE, "impl": "reference"}
    expected, _ = transformer_blocks(x.double(), exact, [[t.double() for t in given] for given in vectors], **options)
    eager, _ = transformer_blocks(x, table.blocks, vectors, **options)
    error, allowed = ((t.double() - expected).norm() for t in (y, eager))
    if not error <= 2 * allowed:
        raise ValueError(f"error norm {error:.3g}, {allowed:.3g} of eager torch")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__.splitlines()[0])
    add_device(parser)
    parser.add_argument("--rows", type=integers, metavar="N,N", default=list(ROWS), help=f"default: {ROWS}")
    parser.add_argument("--layers", type=names, metavar="A,B", help=f"default: {','.join(LAYERS)},block")
    parser.add_argument("--width", type=int, default=1024, help="of the model (default 1024, d16)")
    add_record(parser)
    options = parser.parse_args(arguments)
    device, results = find_device(parser, options), []
    layers = options.layers or [*LAYERS, "block"]
    if unknown := set(layers) - {*LAYERS, "block"}:
        parser.error(f"unknown layers {', '.join(sorted(unknown))}: known are {', '.join(LAYERS)}, block")
    # NOTE: whole blocks first, so that a run that is cut short has them.
    for layer, rows in itertools.product(sorted(layers, key=lambda layer: layer != "block"), options.rows):
        found = (try_blocks if layer == "block" else partial(try_layer, layer))(rows, options.width, device)
        for row in sorted(found, key=lambda row: math.inf if row["us"] is None else row["us"]):
            us = row["reason"] or f"{row['us']:8.2f} us"
            print(f"{row['rows']:>4} rows {row['layer']:<6} {row['by']:<24} {us}", flush=True)
            results.append(rounded({"width": options.width} | row))
        release(device)
        if options.output:
            content = {"kind": "linear", "environment": environment(device, options.commit), "results": results}
            options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
