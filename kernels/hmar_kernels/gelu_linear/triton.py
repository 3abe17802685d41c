"""Bias and GELU, forward and backward in Triton.

    forward    u = x + bias;  g = u s,  s = sigmoid(2 z) = (1 + tanh(z)) / 2,  z = sqrt(2 / pi) (u + 0.044715 u^3)
    backward   g once more;  dx = dg (s + 2 u s (1 - s) dz/du);  dbias = sum_N dx

x is [N, F], rows of channels. Grid: groups of rows times blocks of channels. A program of the forward owns one tile;
one of the backward goes down its rows tile by tile, reads x and dg once, and writes g and dx, so that g, which the
weight's gradient needs, is not kept. Arithmetic is float32. The sum over rows is in two stages, partial sums and
`sum_partials`: no atomics, results are bit-equal from run to run.

The equations are stated in reference.py; products, autograd and argument checks live in api.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_device import num_sms, on_device, sum_partials

SQRT_2_OVER_PI, CUBIC = tl.constexpr(0.7978845608028654), tl.constexpr(0.044715)
TILE_ROWS, BLOCK_F, WARPS = 8, 256, 4
# The backward divides the rows among so many programs, but gives each at least LEAST_ROWS. An H100's multiprocessor has
# room for seven at once: of eight, the last would run alone. With 32, partial sums are .6 % of the bytes.
PROGRAMS_PER_SM, LEAST_ROWS = 32, 32


@triton.jit
def _sigmoid_of_2z(u):
    return 1.0 / (1.0 + tl.exp(-2.0 * SQRT_2_OVER_PI * (u + CUBIC * u * u * u)))


@triton.jit
def _forward_kernel(x_ptr, bias_ptr, g_ptr, num_rows, F: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    offs_f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_n = (tl.program_id(0) // blocks).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    offs = offs_n[:, None] * F + offs_f[None, :]
    mask_f = offs_f < F
    mask = (offs_n < num_rows)[:, None] & mask_f[None, :]

    bias = tl.load(bias_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(g_ptr + offs, (u * _sigmoid_of_2z(u)).to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dg_ptr,
    x_ptr,
    bias_ptr,
    g_ptr,
    dx_ptr,
    partials_ptr,
    num_rows,
    rows,
    F: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    group = (tl.program_id(0) // blocks).to(tl.int64)
    offs_f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    row_end = tl.minimum((group + 1) * rows, num_rows)
    bias = tl.load(bias_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)

    dbias = tl.zeros([TILE_ROWS, BLOCK_F], tl.float32)
    for start in range(0, rows, TILE_ROWS):
        offs_n = group * rows + start + tl.arange(0, TILE_ROWS)
        offs = offs_n[:, None] * F + offs_f[None, :]
        mask = (offs_n < row_end)[:, None] & mask_f[None, :]
        u = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dg = tl.load(dg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        s = _sigmoid_of_2z(u)
        tl.store(g_ptr + offs, (u * s).to(g_ptr.dtype.element_ty), mask=mask)
        slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * u * u)
        dx = dg * (s + 2.0 * u * s * (1.0 - s) * slope)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx

    tl.store(partials_ptr + group * F + offs_f, tl.sum(dbias, 0), mask=mask_f)


def forward(x: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [N,F], bias [F] -> g [N,F] in `dtype`."""
    n, f = x.shape
    x, g = x.contiguous(), torch.empty(n, f, dtype=dtype, device=x.device)
    if n:
        with on_device(x):
            _forward_kernel[(triton.cdiv(n, TILE_ROWS) * triton.cdiv(f, BLOCK_F),)](
                x_ptr=x,
                bias_ptr=bias.contiguous(),
                g_ptr=g,
                num_rows=n,
                F=f,
                TILE_ROWS=TILE_ROWS,
                BLOCK_F=BLOCK_F,
                num_warps=WARPS,
            )
    return g


def backward(dg: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dg x [N,F], bias [F] -> g in dg's dtype, dx [N,F], dbias [F]. dx takes dg's place where their dtypes agree."""
    n, f = x.shape
    dg, x, rows = dg.contiguous(), x.contiguous(), backward_rows(n, f, x.device)
    groups = triton.cdiv(n, rows)
    g, dx = torch.empty_like(dg), dg if dg.dtype == x.dtype else torch.empty_like(x)
    partials = torch.empty(1, groups, f, dtype=torch.float32, device=x.device)
    if n:
        with on_device(x):
            _backward_kernel[(groups * triton.cdiv(f, BLOCK_F),)](
                dg_ptr=dg,
                x_ptr=x,
                bias_ptr=bias.contiguous(),
                g_ptr=g,
                dx_ptr=dx,
                partials_ptr=partials,
                num_rows=n,
                rows=rows,
                F=f,
                TILE_ROWS=TILE_ROWS,
                BLOCK_F=BLOCK_F,
                num_warps=WARPS,
            )
    return g, dx, sum_partials(partials, bias.dtype).view(f)


def backward_rows(num_rows: int, channels: int, device: torch.device) -> int:
    """Rows that a program of the backward owns, a multiple of TILE_ROWS."""
    groups = triton.cdiv(PROGRAMS_PER_SM * num_sms(device), triton.cdiv(channels, BLOCK_F))
    return max(LEAST_ROWS, triton.cdiv(triton.cdiv(num_rows, groups), TILE_ROWS) * TILE_ROWS)
