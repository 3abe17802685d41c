"""What is measured: patterns, resolutions and sizes. Read `rivals.py` next for who takes part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hmar.pyramid import Pyramid
from hmar_kernels import SpanMask

PATTERNS = ("block_diagonal", "block_causal")
"""Those of the two models. "window_N" (a token sees the last N scales) is known too: densities between them."""
WINDOW = re.compile(r"window_([1-9]\d*)")
RESOLUTIONS = (256, 512, 1024)
# Anchors, batch and heads per resolution at head dim 64: about the same number of tokens x heads, in the proportions of
# d16 and d24 models.
BATCH_HEADS = {256: (64, 16), 512: (16, 24), 1024: (4, 24)}
ANCHOR = "anchor"  # the batch of that table, among the batches of a run
HEAD_DIM, HEAD_DIMS = 64, (64, 128)
FULL_BATCHES = (ANCHOR, 8, 1)
FULL_WINDOWS, WINDOW_RESOLUTION = ("window_2", "window_4"), 1024
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
        if self.pattern not in PATTERNS and not WINDOW.fullmatch(self.pattern):
            raise ValueError(
                f"unknown pattern {self.pattern!r}; known are {', '.join(PATTERNS)}, window_1, window_2, ..."
            )
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
        sizes = Pyramid(self.sides).sizes
        if window := WINDOW.fullmatch(self.pattern):
            return SpanMask.window(sizes, int(window[1]))
        return SpanMask.block_diagonal(sizes) if self.pattern == "block_diagonal" else SpanMask.block_causal(sizes)

    def __str__(self) -> str:
        return f"{self.pattern}-{self.resolution}-b{self.batch}h{self.heads}d{self.head_dim}-{self.dtype}"


def cells(
    *,
    patterns: Sequence[str] | None = None,
    resolutions: Sequence[int] | None = None,
    sides: tuple[int, ...] | None = None,
    batches: Sequence[int | str] | None = None,
    heads: int | None = None,
    head_dims: Sequence[int] | None = None,
    dtype: str = "bfloat16",
    full: bool = False,
    smoke: bool = False,
) -> list[Cell]:
    """The cells of a run, the most telling first. What is not given is that of the default run.

    Args:
        sides: a pyramid of any other shape, instead of `resolutions`.
        batches: images; ANCHOR stands for those of BATCH_HEADS.
        heads: default those of BATCH_HEADS at head dim 64; as many fewer as head dims are larger, so that tensors keep
            their size.
        full: batches of 8 and 1 and masks between the two patterns too.
        smoke: small sizes, which try the harness on a CPU.
    """
    if sides is not None and resolutions:
        raise ValueError(f"give either resolutions or sides, got {list(resolutions)} and {sides}")
    if sides is None and smoke and not resolutions:
        sides = SMOKE_SIDES
    pyramids = [sides] if sides else [Pyramid.for_resolution(r).sides for r in resolutions or RESOLUTIONS]
    head_dims = head_dims or ([SMOKE_HEAD_DIM] if smoke else HEAD_DIMS)
    batches = batches or (FULL_BATCHES if full else [ANCHOR])

    def cell(pattern: str, pyramid: tuple[int, ...], batch: int | str, head_dim: int) -> Cell:
        anchor_batch, anchor_heads = BATCH_HEADS.get(STRIDE * pyramid[-1], BATCH_HEADS[256])
        if smoke:
            anchor_batch, anchor_heads = SMOKE_BATCH_HEADS
        else:
            anchor_heads = max(1, anchor_heads * HEAD_DIM // max(1, head_dim))
        return Cell(
            pattern=pattern,
            sides=tuple(pyramid),
            batch=anchor_batch if batch == ANCHOR else batch,
            heads=anchor_heads if heads is None else heads,
            head_dim=head_dim,
            dtype=dtype,
        )

    out = [
        cell(pattern, pyramid, batch, head_dim)
        for batch in batches
        for head_dim in head_dims
        for pattern in patterns or PATTERNS
        for pyramid in pyramids
    ]
    if full and not patterns:
        between = [p for p in pyramids if STRIDE * p[-1] == WINDOW_RESOLUTION]
        out += [cell(pattern, p, batches[0], head_dims[0]) for p in between for pattern in FULL_WINDOWS]
    return list(dict.fromkeys(out))
