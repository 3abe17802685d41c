"""Lists on the command line, separated by commas: the types that conftest.py and compare.py give their options."""

from __future__ import annotations

from argparse import ArgumentTypeError

from .shapes import ANCHOR
from .subject import DIRECTIONS


def names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


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
