"""Softmax of scaled rows in Triton: every score is read once and every weight written once.

    y = exp(scale x - max) / sum exp(scale x - max)

Grid: one program a row, which it keeps in registers. Arithmetic is float32, whatever the dtypes are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_device import on_device

MAX_COLUMNS = 16384  # a row must fit into the registers of a program
COLUMNS_PER_WARP, MAX_WARPS = 512, 16


@triton.jit
def _softmax_kernel(x_ptr, y_ptr, columns, scale, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < columns
    begin = tl.program_id(0).to(tl.int64) * columns
    x = tl.load(x_ptr + begin + offs, mask=mask, other=0.0).to(tl.float32) * scale
    x = tl.where(mask, x, float("-inf"))
    weights = tl.exp(x - tl.max(x, 0))
    y = weights / tl.sum(weights, 0)
    tl.store(y_ptr + begin + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def num_warps(block: int) -> int:
    return max(1, min(MAX_WARPS, block // COLUMNS_PER_WARP))


def forward(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """x [..., L] -> [..., L] in `dtype`."""
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    if x.numel():
        with on_device(x):
            _softmax_kernel[(x.numel() // columns,)](
                x_ptr=x.contiguous(),
                y_ptr=y,
                columns=columns,
                scale=scale,
                BLOCK=block,
                num_warps=num_warps(block),
            )
    return y
