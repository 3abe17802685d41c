"""Find the fastest tile shapes of the Triton attention: `python -m bench.tune_attention` on the GPU to tune for.

For each cell of `shapes.py` and each pass (forward, dq, dk/dv) every candidate is checked against the float64
reference, then timed by the method of `timing.py`; the result is a table per cell, and a JSON of all figures with
--output. A new row of `TILES` in hmar_kernels/attention/triton.py is written by hand from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from hmar_kernels import SpanMask
from hmar_kernels.attention import reference
from hmar_kernels.attention import triton as kernels

from .shapes import ANCHOR, cells
from .timing import Stopwatch

PASSES = ("forward", "dq", "dkdv")
# rows, columns, warps; each with every number of stages
SHAPES = {
    "forward": [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)],
    "dq": [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 32, 8), (128, 64, 8)],
    "dkdv": [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8)],
}
STAGES = {"forward": (2, 3, 4), "dq": (2, 3), "dkdv": (1, 2, 3)}
DEFAULT = kernels.Tile(64, 64, 4, 2)


def candidates(name: str) -> list[kernels.Tile]:
    return [kernels.Tile(*shape, stages) for shape, stages in itertools.product(SHAPES[name], STAGES[name])]


class Passes:
    """The three passes as functions of a tile shape, on inputs of one cell."""

    def __init__(self, mask: SpanMask, batch: int, heads: int, head_dim: int, dtype: torch.dtype):
        def draw(length: int) -> torch.Tensor:
            return torch.randn(batch, length, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2)

        self.mask, self.scale = mask, head_dim**-0.5
        self.q, self.k, self.v = draw(mask.num_queries), draw(mask.num_keys), draw(mask.num_keys)
        self.do = draw(mask.num_queries)
        default = self._plan("forward", DEFAULT)
        self.out, self.lse = kernels.forward(self.q, self.k, self.v, default, self.scale)
        self.delta = (self.out.float() * self.do.float()).sum(-1)

    def _plan(self, name: str, tile: kernels.Tile) -> kernels.AttentionPlan:
        tiles = {other: DEFAULT for other in PASSES} | {name: tile}
        return kernels.make_plan(self.mask, kernels.Tiles(**tiles), "cuda")

    def call(self, name: str, tile: kernels.Tile) -> tuple[torch.Tensor, ...]:
        plan = self._plan(name, tile)
        if name == "forward":
            return kernels.forward(self.q, self.k, self.v, plan, self.scale)
        if name == "dq":
            return kernels.backward_dq(self.do, None, self.q, self.k, self.v, self.out, self.lse, plan, self.scale)
        return kernels.backward_dkdv(self.do, self.q, self.k, self.v, self.lse, self.delta, plan, self.scale)

    def timed(self, name: str, tile: kernels.Tile, _: None) -> tuple[torch.Tensor, ...]:
        return self.call(name, tile)

    def expected(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """What each pass computes, in float64, for the last head of the last image."""
        q, k, v, do = (x[-1:, -1:].double().requires_grad_() for x in (self.q, self.k, self.v, self.do))
        out, lse = reference.forward(q, k, v, self.mask, self.scale)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
        return {"forward": (out.detach(), lse.detach()), "dq": (dq,), "dkdv": (dk, dv)}


def error(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Largest of the relative errors in the Frobenius norm; infinite where a value is not finite."""
    errors = []
    for a, e in zip(actual, expected, strict=False):
        difference = (a[-1:, -1:].double() - e).norm() / e.norm()
        errors.append(float(difference) if bool(a.isfinite().all()) else float("inf"))
    return max(errors)


def compile_one(job: tuple[str, kernels.Tile, int, str]) -> None:
    """Fill Triton's disk cache; failures show up again, with their reason, when the candidate is timed."""
    name, tile, head_dim, dtype = job
    try:
        Passes(SpanMask.block_causal([1, 64, 100]), 1, 2, head_dim, getattr(torch, dtype)).call(name, tile)
    except Exception:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--resolution", type=int, action="append", help="default: all")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile ahead")
    parser.add_argument("--output", help="JSON file for all figures")
    args = parser.parse_args()

    jobs = [(name, tile, args.head_dim, args.dtype) for name in PASSES for tile in candidates(name)]
    print(f"compiling {len(jobs)} candidates", flush=True)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        list(pool.map(compile_one, jobs))

    watch = Stopwatch(torch.device("cuda"))
    rows = []
    for cell in cells(
        resolutions=args.resolution,
        batches=[args.batch or ANCHOR],
        heads=args.heads,
        head_dims=[args.head_dim],
        dtype=args.dtype,
    ):
        torch.manual_seed(0)
        passes = Passes(cell.mask(), cell.batch, cell.heads, cell.head_dim, cell.torch_dtype)
        expected = passes.expected()
        for name in PASSES:
            results = []
            for tile in candidates(name):
                row = {"cell": str(cell), "pass": name, **vars(tile)}
                try:
                    off = error(passes.call(name, tile), expected[name])
                    if off > 0.02:
                        raise ArithmeticError(f"relative error {off:.3g}")
                    row["ms"] = 1e3 * watch.seconds(partial(passes.timed, name, tile), repeats=9)
                    results.append(row)
                except Exception as failure:
                    row["failure"] = f"{type(failure).__name__}: {failure}"[:200]
                rows.append(row)
            results.sort(key=lambda row: row["ms"])
            best = ", ".join(f"{r['rows']}x{r['cols']} w{r['warps']} s{r['stages']} {r['ms']:.3f}" for r in results[:4])
            print(f"{cell!s:48} {name:8} {best}", flush=True)
        passes = expected = None
        torch.cuda.empty_cache()
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
