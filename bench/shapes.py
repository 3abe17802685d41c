"""What is measured: patterns, resolutions and sizes. Read `rivals.py` next for who takes part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from hmar.pyramid import Pyramid
from hmar_kernels import SpanMask

PATTERNS = ("block_diagonal", "block_causal")
RESOLUTIONS = (256, 512, 1024)
# Batch and heads per resolution: about the same number of tokens x heads, in the proportions of d16 and d24 models.
BATCH_HEADS = {256: (64, 16), 512: (16, 24), 1024: (4, 24)}
STRIDE = 16  # pixels per side of the last scale's tokens

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Sizes for a run on the CPU, which tries the harness and measures nothing of interest.
SMOKE_SIDES, SMOKE_BATCH_HEADS, SMOKE_HEAD_DIM = (1, 2, 3, 4), (2, 3), 16


@dataclass(frozen=True)
class Cell:
    """One set of inputs that all implementations share."""

    pattern: str
    sides: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    dtype: str

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"unknown pattern {self.pattern!r}; known are {', '.join(PATTERNS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known are {', '.join(DTYPES)}")
        Pyramid(self.sides)  # raises for sides that are none
        for name in ("batch", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def resolution(self) -> int:
        return STRIDE * self.sides[-1]

    @cached_property
    def length(self) -> int:
        return Pyramid(self.sides).length

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @cached_property
    def pairs(self) -> int:
        """(query, key) pairs that attend, in one head of one image."""
        return self.mask().num_pairs

    def mask(self) -> SpanMask:
        """A new mask object each time, so that no implementation finds what another one cached on it."""
        make = SpanMask.block_diagonal if self.pattern == "block_diagonal" else SpanMask.block_causal
        return make(Pyramid(self.sides).sizes)

    def __str__(self) -> str:
        return f"{self.pattern}-{self.resolution}-b{self.batch}h{self.heads}d{self.head_dim}-{self.dtype}"


def cells(
    *,
    patterns: list[str] | None = None,
    resolutions: list[int] | None = None,
    sides: tuple[int, ...] | None = None,
    batch: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    dtype: str = "bfloat16",
    smoke: bool = False,
) -> list[Cell]:
    """The cells of a run. What is not given is that of the full run, or of the smoke run.

    `sides` is a pyramid of any other shape, instead of `resolutions`.
    """
    if sides is not None and resolutions:
        raise ValueError(f"give either resolutions or sides, got {resolutions} and {sides}")
    if sides is None and smoke and not resolutions:
        sides = SMOKE_SIDES
    pyramids = [sides] if sides else [Pyramid.for_resolution(r).sides for r in resolutions or RESOLUTIONS]
    out = []
    for pattern in patterns or PATTERNS:
        for pyramid in pyramids:
            default_batch, default_heads = (
                SMOKE_BATCH_HEADS if smoke else BATCH_HEADS.get(STRIDE * pyramid[-1], BATCH_HEADS[256])
            )
            out.append(
                Cell(
                    pattern=pattern,
                    sides=tuple(pyramid),
                    batch=batch or default_batch,
                    heads=heads or default_heads,
                    head_dim=head_dim or (SMOKE_HEAD_DIM if smoke else 64),
                    dtype=dtype,
                )
            )
    return out
