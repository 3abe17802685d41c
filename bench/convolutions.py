"""The decoder's convolutions one by one: `python -m bench.convolutions` on a CUDA GPU.

Each distinct 3x3 convolution of the published decoder, and each upsampling as a transposed convolution, in bfloat16,
channels-last: torch's (cuDNN with its benchmark on) beside every kernel of `hmar_kernels.conv2d`. Rows of the output
at the top, in the middle and at the bottom of the first and the last image are held against float64, then a call is
timed by the method of `timing.py`. At the end, by implementation, the time of all convolutions of a decoding. "auto" is
what `hmar_kernels.conv2d` takes by itself, "hopper" the kernel that it counts to be faster, "with-norm" the same with
statistics for the norm behind it, "hopper-2" the kernel of two blocks. Results are one JSON file, kind "convolutions".
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from hmar.config import PRESETS, TokenizerConfig
from hmar.tokenizer import Decoder, Upsample
from hmar_kernels import conv2d, conv_transpose2d
from hmar_kernels.conv2d import hopper, packed_taps, reference

from .check import CheckFailed
from .environment import environment
from .options import add_device, add_record, find_device, integers, names
from .results import write
from .subject import ERRORS, failure
from .timing import Stopwatch

KIND, VERSION = "convolutions", 1
CELLS = ((256, 16), (256, 1), (1024, 1))  # pixels a side, images
CHECKED_ROWS = 6


class Convolution(NamedTuple):
    """Of a map [side, side, in_channels]; doubled: the transposed one."""

    side: int
    in_channels: int
    out_channels: int
    doubled: bool

    @property
    def flops(self) -> int:
        """Of one image."""
        products = self.side**2 * self.in_channels * self.out_channels
        return 2 * products * (16 if self.doubled else 9)

    def __str__(self) -> str:
        return (
            f"{self.side:>5} {self.in_channels:>4} -> {self.out_channels:<4} {'doubled' if self.doubled else 'same':<8}"
        )


def convolutions(config: TokenizerConfig, pixels: int) -> Counter[Convolution]:
    """Of a decoding, with how often each is called. The last one, to colours, is part of a norm and not among them."""
    found: Counter[Convolution] = Counter()
    with torch.device("meta"):
        decoder = Decoder(config)
        latent = torch.zeros(1, config.code_dim, pixels // config.stride, pixels // config.stride)
    upsampling = {module.conv for module in decoder.modules() if isinstance(module, Upsample)}

    def count(module: nn.Conv2d, inputs: tuple[Tensor], _) -> None:
        doubled = module in upsampling
        side = inputs[0].shape[-1] // (2 if doubled else 1)
        found[Convolution(side, module.in_channels, module.out_channels, doubled)] += 1

    for module in decoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module is not decoder.conv_out:
            module.register_forward_hook(count)
    decoder(latent)
    return found


def draw(of: Convolution, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Map and weight as the kernels read them."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    x = torch.randn(images, of.side, of.side, of.in_channels, **options).permute(0, 3, 1, 2)
    shape = (of.in_channels, of.out_channels, 4, 4) if of.doubled else (of.out_channels, of.in_channels, 3, 3)
    weight = torch.randn(shape, **options) / math.sqrt(of.in_channels * (4 if of.doubled else 9))
    return x, packed_taps(weight) if of.doubled else weight.contiguous(memory_format=torch.channels_last)


def check(actual: Tensor, of: Convolution, x: Tensor, weight: Tensor) -> float:
    """The error of some rows, relative to their norm. CheckFailed where it is more than rounding."""
    plain, factor = (reference.conv_transpose2d, 2) if of.doubled else (reference.conv2d, 1)
    worst, eps = 0.0, torch.finfo(actual.dtype).eps
    for image in {0, len(x) - 1}:
        for first in {0, max(0, of.side // 2 - 1), max(0, of.side - CHECKED_ROWS)}:
            last = min(first + CHECKED_ROWS, of.side)
            above = max(first - 1, 0)
            part = plain(x[image : image + 1, :, above : last + 1].double(), weight.double(), None)
            expected = part[0, :, factor * (first - above) : factor * (last - above)]
            error = (actual[image, :, factor * first : factor * last].double() - expected).norm() / expected.norm()
            if not error <= eps:
                raise CheckFailed(f"rows {first} to {last} of image {image} are off by {error:.3g}, not by {eps:.3g}")
            worst = max(worst, error.item())
    return worst


def implementations(of: Convolution, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    operator = conv_transpose2d if of.doubled else conv2d
    found = {"torch": lambda x, weight: operator(x, weight, impl="reference")}
    if device.type == "cuda":
        for impl in ("auto", "hopper"):
            found[impl] = lambda x, weight, impl=impl: operator(x, weight, impl=impl)
        found["with-norm"] = lambda x, weight: hopper.with_statistics(x, weight, doubled=of.doubled)[0]
        for tile in hopper.TILES:
            if tile.doubled == of.doubled:
                found[f"hopper-{tile.blocks}"] = lambda x, weight, tile=tile: hopper.forward(x, weight, None, tile)[0]
    return found


NUMBERS = ("ms", "p10_ms", "p90_ms", "rounds", "host_us", "error")


def examine(
    of: Convolution,
    impl: str,
    run: Callable[[Tensor, Tensor], Tensor],
    images: int,
    stopwatch: Stopwatch,
    budget: float,
) -> dict:
    """What is known of one implementation. What it raises is recorded and does not leave here."""
    found = {"status": "ok", "reason": None, **dict.fromkeys(NUMBERS)}
    try:
        x, weight = draw(of, images, stopwatch.device)
        if of.doubled and impl == "torch":
            weight = weight.contiguous(memory_format=torch.channels_last)  # as the decoder has it then
        found["error"] = check(run(x, weight), of, x, weight)
        found |= stopwatch.measure(lambda _: run(x, weight), lambda: None, budget)
    except ERRORS as error:
        found["status"], found["reason"] = failure(error)
    return found


def line(row: dict, of: Convolution) -> str:
    place = f"{row['pixels']:>5} px x{row['images']:<3} {row['calls']:>2} x {of} {row['impl']:<9}"
    if row["status"] != "ok":
        return f"{place} {row['status']}: {row['reason']}"
    return f"{place} {row['ms']:8.4f} ms {row['flops'] / row['ms'] / 1e9:6.1f} TFLOP/s {row['host_us']:5.0f} us host"


def totals(rows: list[dict]) -> dict[str, float]:
    """Milliseconds of all convolutions of a decoding, of the implementations that could do all."""
    whole = {row["impl"] for row in rows} - {row["impl"] for row in rows if row["ms"] is None}
    return {impl: sum(row["calls"] * row["ms"] for row in rows if row["impl"] == impl) for impl in sorted(whole)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.convolutions", description=__doc__.splitlines()[0])
    add_device(parser)
    parser.add_argument("--resolutions", type=integers, metavar="N,N", help="pixels; default: all of CELLS")
    parser.add_argument("--images", type=integers, metavar="N,N", help="images at once, for every resolution")
    parser.add_argument("--impl", type=names, help="default: torch, auto, hopper, with-norm, and every kernel by name")
    parser.add_argument("--seconds", type=float, default=0.2, help="time to spend on one measurement (default 0.2)")
    add_record(parser)
    options = parser.parse_args(arguments)
    device = find_device(parser, options)
    torch.backends.cudnn.benchmark = True
    config, cells = PRESETS["tiny" if device.type == "cpu" else "d16-256"][0], CELLS
    if device.type == "cpu":
        cells = ((4 * config.stride, 2),)
    if options.resolutions or options.images:
        known = {pixels: [images for other, images in cells if other == pixels] for pixels, _ in cells}
        wanted = options.resolutions or known
        cells = [(pixels, images) for pixels in wanted for images in options.images or known.get(pixels, [1])]
    stopwatch = Stopwatch(device)
    head = {
        "kind": KIND,
        "version": VERSION,
        "environment": environment(device, options.commit),
        "method": {
            "clock": "device events" if device.type == "cuda" else "host clock",
            "seconds_per_measurement": options.seconds,
            "inputs": "standard normal, bfloat16, channels-last; weights of unit gain",
        },
    }
    rows: list[dict] = []
    for pixels, images in cells:
        begin = len(rows)
        for of, calls in sorted(convolutions(config, pixels).items()):
            for impl, run in implementations(of, device).items():
                if options.impl and impl not in options.impl:
                    continue
                described = {"pixels": pixels, "images": images, "calls": calls, **of._asdict(), "impl": impl}
                found = examine(of, impl, run, images, stopwatch, options.seconds)
                rows.append(described | {"flops": images * of.flops} | found)
                print(line(rows[-1], of), flush=True)
            write(options.output, {**head, "complete": False}, rows)
        for impl, ms in totals(rows[begin:]).items():
            print(f"{pixels:>5} px x{images:<3} all convolutions by {impl:<9} {ms:8.3f} ms", flush=True)
    write(options.output, {**head, "complete": True}, rows)
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
