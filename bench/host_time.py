"""What the host does around the graphs of an image: `python -m bench.host_time` on a CUDA GPU.

One image of d16 at 256 px, with the settings of `generation.py`, again and again, device idle before. Microseconds of
the host's clock, medians: `before` the arguments are there, `load` copying them, `queue` the graphs and the copies of
what they give, `look` at the weights for changes, `wait` for the device, `after` it. On the CPU (--device cpu) layers
are narrow and all steps are replaced by nothing, so that what the host does beside them is left. Results are one JSON
file of kind "host_time".
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from hmar.config import PRESETS
from hmar.engine import Engine, Program
from hmar.generate import SamplingConfig
from hmar.model import HMAR
from hmar.tokenizer import Tokenizer

from .environment import environment
from .generation import Cell, Subject, synchronize
from .options import add_device, add_record, find_device
from .results import write

KIND, VERSION = "host_time", 1
CELL = Cell("hmar", "optimised", "default", 256, 16, 1)
PARTS = ("before", "load", "queue", "look", "wait", "after")
MARKED = {"load": Program.load, "queue": Program.run, "wait": Program.wait}


def engine_of(device: torch.device) -> Engine:
    if device.type == "cuda":
        subject = Subject(CELL, device)
        subject.optimise()
        return subject.engine
    tokenizer_config, config = PRESETS["d16-256"]
    config = replace(config, width=64, num_heads=1)
    tokenizer = Tokenizer(replace(tokenizer_config, channels=32), config.pyramid).eval()
    engine = Engine(HMAR(config).eval(), tokenizer, dtype=torch.bfloat16)
    engine.generate(torch.tensor([0]), CELL.sampling())
    for segment in next(iter(engine.programs.values())).segments:
        segment.steps = []
    engine.captures = True
    return engine


@contextmanager
def marked(marks: list[tuple[str, float]]) -> Iterator[None]:
    """Within it marks get (part, time) at the end of each part of `Engine.generate`."""

    def mark(part: str, method):
        def call(*arguments):
            marks.append(("look" if part == "wait" else "before", time.perf_counter()))
            result = method(*arguments)
            marks.append((part, time.perf_counter()))
            return result

        return call

    for part, method in MARKED.items():
        setattr(Program, method.__name__, mark(part, method))
    try:
        yield
    finally:
        for method in MARKED.values():
            setattr(Program, method.__name__, method)


def image(engine: Engine, class_B: torch.Tensor, sampling: SamplingConfig) -> dict[str, float]:
    """Microseconds of each part."""
    marks: list[tuple[str, float]] = []
    synchronize(engine.device)
    with marked(marks):
        last = time.perf_counter()
        engine.generate(class_B, sampling)
        marks.append(("after", time.perf_counter()))
    found = dict.fromkeys(PARTS, 0.0)
    for part, now in marks:
        found[part] += 1e6 * (now - last)
        last = now
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__.splitlines()[0])
    add_device(parser)
    parser.add_argument("--rounds", type=int, default=100, help="images (default 100)")
    add_record(parser)
    options = parser.parse_args(arguments)
    device = find_device(parser, options)
    engine, class_B, sampling = engine_of(device), torch.tensor([0]), CELL.sampling()
    for _ in range(5):
        image(engine, class_B, sampling)
    rounds = [image(engine, class_B, sampling) for _ in range(options.rounds)]
    row = {part: statistics.median(found[part] for found in rounds) for part in PARTS}
    print(", ".join(f"{part} {us:.1f}" for part, us in row.items()), "us")
    head = {"kind": KIND, "version": VERSION, "environment": environment(device, options.commit)}
    write(options.output, head | {"method": {"rounds": options.rounds, "unit": "us, median"}}, [row])


if __name__ == "__main__":
    main()
