"""Benchmark of drawing codes: `python -m bench.sampling` on a CUDA GPU.

The last scale of each pyramid with guidance, and few tokens, bfloat16 logits, as generation has them. Every
implementation is checked before it is timed: its codes lie in the set that truncation keeps, and its confidence is
their probability there. Then the package's method: device events, L2 flushed, warm-up, median and spread. Rivals are
what one writes in torch, with a sort, run eagerly and through torch.compile; they draw from torch's generator, which is
cheaper than numbers by image. Results are one JSON file of kind "sampling", rewritten after every measurement. Read
next: timing.py.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hmar.pyramid import SIDES_BY_RESOLUTION
from hmar_kernels import sample_codes
from hmar_kernels.sampling import reference
from hmar_kernels.sampling.api import KERNELS

from .check import CheckFailed
from .environment import ceilings, environment
from .options import add_device, add_record, find_device, names
from .results import write
from .subject import ERRORS, failure, release, requested_bytes
from .timing import Stopwatch

KIND, VERSION = "sampling", 1
OUTSIDE_SHARE = 2e-3  # codes at the edge of the kept set, which sums in another order move
TOLERANCE = 2e-3
Draw = Callable[[Tensor, Tensor, float, int, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Cell:
    """batch images of `tokens` tokens, of `codes` codes each."""

    resolution: int | None
    batch: int
    tokens: int
    codes: int
    top_k: int
    top_p: float

    def __str__(self) -> str:
        return f"{self.resolution or 'tiny'} x{self.batch}, {self.tokens} tokens, top-k {self.top_k} top-p {self.top_p}"

    @property
    def bytes(self) -> int:
        """Both halves of the logits, read once."""
        return 2 * 2 * self.batch * self.tokens * self.codes


FEW_TOKENS = (1, 16, 100)
TRUNCATIONS = ((0, 0.0), (900, 0.0), (900, 0.96))


def cells(device: torch.device) -> list[Cell]:
    if device.type == "cpu":
        return [Cell(None, 2, 9, 64, *truncation) for truncation in ((0, 0.0), (20, 0.9))]
    sizes = [(256, 1, tokens) for tokens in FEW_TOKENS]
    last = [(256, 1), (256, 16), (512, 16), (1024, 1), (1024, 8)]
    sizes += [(px, batch, SIDES_BY_RESOLUTION[px][-1] ** 2) for px, batch in last]
    return [Cell(*size, 4096, *truncation) for size in sizes for truncation in TRUNCATIONS]


def sorted_draw(
    conditional: Tensor, unconditional: Tensor, guidance: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Guidance, top-k, top-p by a sort, and a draw, as one writes them in torch."""
    logits = (1 + guidance) * conditional.float() - guidance * unconditional.float()
    if top_k:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)
    probs = logits.softmax(-1)
    codes = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
    return codes, probs.gather(-1, codes[..., None]).squeeze(-1)


def ours(impl: str) -> Callable[[Cell, torch.device], Draw]:
    def prepare(cell: Cell, device: torch.device) -> Draw:
        seeds, positions = (torch.arange(n, device=device) for n in (cell.batch, cell.tokens))
        strengths: dict[float, Tensor] = {}

        def draw(conditional, unconditional, guidance, top_k, top_p):
            if guidance not in strengths:
                strengths[guidance] = torch.full((cell.batch,), guidance, device=device)
            options = {"guidance": strengths[guidance], "top_k": top_k, "top_p": top_p, "impl": impl}
            return sample_codes(conditional, unconditional, seeds=seeds, positions=positions, **options)[:2]

        return draw

    return prepare


IMPLEMENTATIONS: dict[str, Callable[[Cell, torch.device], Draw]] = {
    **{impl: ours(impl) for impl in KERNELS},
    "reference": ours("reference"),
    "sort": lambda cell, device: sorted_draw,
    "sort_compiled": lambda cell, device: torch.compile(sorted_draw, dynamic=False),
}


class Inputs:
    """Logits of a cell, and the distribution that must be drawn from."""

    GUIDANCE = 1.5

    def __init__(self, cell: Cell, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        shape = (2, cell.batch, cell.tokens, cell.codes)
        self.conditional, self.unconditional = torch.randn(
            shape, generator=generator, device=device, dtype=torch.bfloat16
        )
        self.arguments = (self.conditional, self.unconditional, self.GUIDANCE, cell.top_k, cell.top_p)
        self.cell = cell

    def check(self, codes: Tensor, confidence: Tensor) -> dict[str, float]:
        """How far a draw is from the distribution; CheckFailed where too far. Image by image, to save memory."""
        outside, worst = 0, 0.0
        for b in range(self.cell.batch):
            u = self.unconditional[b].float()
            logits = (1 + self.GUIDANCE) * self.conditional[b].float() - self.GUIDANCE * u
            kept = reference.kept_codes(logits, self.cell.top_k, self.cell.top_p)
            probs = logits.masked_fill(~kept, -math.inf).softmax(-1)
            inside = kept.gather(-1, codes[b][:, None]).squeeze(-1)
            expected = probs.gather(-1, codes[b][:, None]).squeeze(-1)
            outside += int((~inside).sum())
            error = ((confidence[b].float() - expected) / expected)[inside].abs()
            if not error.isfinite().all():
                raise CheckFailed("the confidence is not finite")
            worst = max(worst, error.max().item())
        share = outside / codes.numel()
        if share > OUTSIDE_SHARE or worst > TOLERANCE:
            raise CheckFailed(f"{share:.2%} of the codes lie outside of the set, the confidence is off by {worst:.2g}")
        return {"outside": share, "confidence_error": worst}


def examine(name: str, inputs: Inputs, stopwatch: Stopwatch, seconds: float) -> dict:
    """Status and numbers of one implementation in one cell. What it raises is recorded and does not leave here."""
    cell, device = inputs.cell, stopwatch.device
    row = {"status": "ok", "reason": None} | dict.fromkeys(NUMBERS)
    reason = KERNELS[name].unavailable(device, torch.bfloat16, cell.codes) if name in KERNELS else None
    if reason is not None:
        return row | {"status": "unavailable", "reason": reason}
    try:
        started = time.perf_counter()
        draw = IMPLEMENTATIONS[name](cell, device)
        codes, confidence = draw(*inputs.arguments)
        stopwatch.synchronize()
        row["first_call_s"] = time.perf_counter() - started
        row["check"] = inputs.check(codes, confidence)

        def call(_):
            return draw(*inputs.arguments)

        row |= stopwatch.measure(call, lambda: None, seconds)
        if device.type == "cuda":
            held = requested_bytes(device, "current")
            torch.cuda.reset_peak_memory_stats(device)
            call(None)
            row["extra_bytes"] = requested_bytes(device, "peak") - held
    except ERRORS as error:
        row["status"], row["reason"] = failure(error)
    return row


NUMBERS = ("ms", "p10_ms", "p90_ms", "rounds", "host_us", "extra_bytes", "first_call_s", "check")


def line(row: dict) -> str:
    place = f"{row['resolution'] or 'tiny':<5} x{row['batch']:<3} {row['tokens']:>4} tokens"
    place += f" top-k {row['top_k']:<4} top-p {row['top_p']:<5}"
    if row["status"] != "ok":
        return f"{place} {row['impl']:<14} {row['status']}: {row['reason']}"
    memory = "" if row["extra_bytes"] is None else f" {row['extra_bytes'] / 1e6:8.2f} MB"
    rate = row["bytes"] / row["ms"] / 1e6
    return f"{place} {row['impl']:<14} {row['ms']:9.4f} ms {rate:6.0f} GB/s {row['host_us']:6.0f} us host{memory}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sampling", description=__doc__.splitlines()[0])
    add_device(parser)
    parser.add_argument("--impl", type=names, metavar="A,B", help=f"default: {','.join(IMPLEMENTATIONS)}")
    parser.add_argument("--seconds", type=float, default=0.2, help="time to spend on one measurement (default 0.2)")
    add_record(parser)
    options = parser.parse_args(arguments)
    device = find_device(parser, options)
    for name in options.impl or ():
        if name not in IMPLEMENTATIONS:
            parser.error(f"--impl: unknown {name!r}; known are {', '.join(IMPLEMENTATIONS)}")
    stopwatch = Stopwatch(device)
    facts = environment(device, options.commit)
    head = {"kind": KIND, "version": VERSION, "environment": facts, "ceilings": ceilings(stopwatch)}
    head["method"] = {"clock": "device events" if device.type == "cuda" else "host clock", "seconds": options.seconds}
    rows: list[dict] = []
    for cell in cells(device):
        inputs = Inputs(cell, device)
        for impl in options.impl or IMPLEMENTATIONS:
            release(device)
            found = examine(impl, inputs, stopwatch, options.seconds)
            rows.append(asdict(cell) | {"bytes": cell.bytes, "impl": impl, "commit": facts["commit"]} | found)
            print(line(rows[-1]), flush=True)
            write(options.output, {**head, "complete": False}, rows)
        del inputs
    write(options.output, {**head, "complete": True}, rows)
    return int(any(row["status"] == "failed" and row["impl"] in (*KERNELS, "reference") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
