"""The operator of transformer blocks: argument checks, choice of implementation.

The mathematics is in reference.py, the kernel for few rows in cuda.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear.reference import statistics
from . import cuda, reference
from .cuda import Table
from .reference import BlockWeights

IMPLEMENTATIONS = ("reference", "cuda")
"""Names that `transformer_blocks(..., impl=...)` takes beside "auto"."""


def transformer_blocks(
    x: Tensor,
    blocks: Sequence[BlockWeights] | Table,
    vectors: Sequence[Sequence[Tensor]],
    *,
    max_log_scale: float = math.inf,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Blocks one after the other, of images whose tokens all see each other: one scale under the block-diagonal mask.

    Args:
        x: [B, L, C], the residual stream.
        blocks: their weights, see `BlockWeights`, or a `Table` of them, which saves "cuda" describing them.
        vectors: of each block two gates, two scales and two shifts [B, 1, C], of attention and of the MLP.
        max_log_scale: the largest log_scale that counts, see `qk_norm_attention`.
        eps: added to the variance of norms.
        impl: "auto", "reference" or "cuda": one kernel that reads weights without a pause, for at most MAX_ROWS rows
            of all images and MAX_IMAGE_ROWS of one, a float32 stream and heads of 64 numbers, on GPUs of compute
            capability 9.0; without a derivative. It has as many blocks as the GPU can hold at once, and waits for a GPU
            that is not otherwise busy. "auto" is "cuda" where it can run. A named implementation runs or raises.
    Returns:
        [B, L, C], and float32 statistics of it [B, L, ceil(C / 64), 2], as `linear` takes and gives them.
    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation cannot take them.
    """
    weights = blocks.blocks if isinstance(blocks, Table) else tuple(blocks)
    _check(x, weights, vectors)
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    if impl != "reference":
        reason = _reason(x, weights, vectors)
        if reason is not None and impl == "cuda":
            raise ValueError(f'impl="cuda" cannot run here: {reason}; impl="reference" would')
        impl = "cuda" if reason is None else "reference"
    if impl == "cuda":
        table = blocks if isinstance(blocks, Table) else Table(weights)
        return cuda.forward(x, table, vectors, float(max_log_scale), eps)
    with torch.autocast(x.device.type, enabled=False):
        y = reference.forward(x, weights, vectors, max_log_scale, eps)
        return y, statistics(y).float()


def _reason(x: Tensor, blocks: Sequence[BlockWeights], vectors: Sequence[Sequence[Tensor]]) -> str | None:
    """Why the kernel cannot run; None when it can."""
    given = (x, *(t for of_block in (*blocks, *vectors) for t in of_block))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "it has no derivative"
    if len({tensor.device for tensor in given}) > 1:
        return "its tensors are on one device, here they are on several"
    sizes = *cuda.widths(blocks[0]), cuda.HEAD_DIM, len(blocks)
    reason = cuda.unavailable_on(x.device, blocks[0].qkv.dtype, *sizes)
    return reason or cuda.refusal(blocks) or cuda.refusal_of_rows(x, vectors, blocks[0].qkv.dtype)


def _check(x: Tensor, blocks: Sequence[BlockWeights], vectors: Sequence[Sequence[Tensor]]) -> None:
    if not blocks or len(vectors) != len(blocks):
        raise ValueError(f"there must be vectors of each block, at least one, got {len(blocks)} and {len(vectors)}")
    width = blocks[0].qkv.shape[-1]
    if x.ndim != 3 or x.shape[-1] != width or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be floats [B, L, {width}] to go with the weights, got {x.dtype} {list(x.shape)}")
    for of_block in vectors:
        shapes = [list(vector.shape) for vector in of_block]
        if shapes != [[x.shape[0], 1, width]] * 6:
            raise ValueError(f"vectors of a block must be six of [{x.shape[0]}, 1, {width}] with x, got {shapes}")
