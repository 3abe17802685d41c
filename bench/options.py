"""The command line: lists separated by commas, and what the benchmarks have in common."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

import torch

from .shapes import ANCHOR
from .subject import DIRECTIONS


def names(text: str) -> list[str]:
    found = [name for name in (part.strip() for part in text.split(",")) if name]
    if not found:
        # NOTE: an empty list would read as an option that was not given, and run everything.
        raise ArgumentTypeError(f"expected at least one name, several with commas between them; got {text!r}")
    return found


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in names(text)]
    except ValueError:
        raise ArgumentTypeError(f"expected integers and commas, such as 64,128; got {text!r}") from None


def batches(text: str) -> list[int | str]:
    return [part if part == ANCHOR else integers(part)[0] for part in names(text)]


def directions(text: str) -> list[str]:
    for name in (found := names(text)):
        if name not in DIRECTIONS:
            raise ArgumentTypeError(f"unknown direction {name!r}; known are {', '.join(DIRECTIONS)}")
    return found


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"expected a number of seconds above 0, such as 0.3; got {text!r}")
    return value


def add_record(parser: ArgumentParser) -> None:
    """--commit and --output."""
    parser.add_argument("--commit", help="commit to record where git cannot be asked")
    parser.add_argument("--output", type=Path, metavar="FILE", help="raw results")


def add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the harness on tiny sizes")


def find_device(parser: ArgumentParser, chosen: Namespace) -> torch.device:
    """That of --device; ends with an error where there is none."""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the harness on tiny sizes")
    return torch.device(chosen.device)
