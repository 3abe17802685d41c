"""Embedding of tokens in Triton, in one kernel.

    x = W f + b (+ W r or m),   out = x + position + scale

Grid: (blocks of tokens of all images, blocks of channels); a program owns [BLOCK_R, BLOCK_C] of every copy of out and
has all of E at once, so there is no loop. Products and sums are float32, rounded where the reference rounds. With
OVERLAP the kernel starts while the one before it still runs.

The equations are stated in reference.py; argument checks live in api.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import triton_device
from ..triton_device import on_device, overlaps

MAX_DIMS = 128  # of codes: a program holds all of them


class Tile(NamedTuple):
    block_r: int
    block_c: int
    warps: int


# By calculation: of few rows, many programs; of many, whose time goes into writing, weights that are read less often.
FEW_ROWS, FEW, MANY = 256, Tile(16, 64, 2), Tile(64, 64, 4)


@triton.jit
def _codes(ptr, offs_r, mask_r, offs_e, E: tl.constexpr):
    mask = mask_r[:, None] & (offs_e < E)[None, :]
    return tl.load(ptr + offs_r[:, None] * E + offs_e[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows", "length", "copies"])
def _embedding_kernel(
    inputs_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    scale_ptr,
    residuals_ptr,
    hidden_ptr,
    mask_ptr,
    out_ptr,
    rows,
    length,
    copies,
    C: tl.constexpr,
    E: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_e = tl.arange(0, BLOCK_E)
    mask_r, mask_c = offs_r < rows, offs_c < C
    mask_rc = mask_r[:, None] & mask_c[None, :]
    dtype = weight_ptr.dtype.element_ty
    out_dtype = out_ptr.dtype.element_ty

    # what no kernel writes
    weight = tl.trans(_codes(weight_ptr, offs_c, mask_c, offs_e, E))
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    position_ptr += (offs_r % length)[:, None] * C + offs_c[None, :]
    position = tl.load(position_ptr, mask=mask_rc, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if KNOWN:
        unknown = tl.load(mask_ptr + offs_c, mask=mask_c, other=0.0).to(dtype).to(tl.float32)
    if OVERLAP:
        gdc_wait()

    inputs = _codes(inputs_ptr, offs_r, mask_r, offs_e, E).to(dtype)
    x = (tl.dot(inputs, weight, input_precision="ieee") + bias[None, :]).to(dtype).to(tl.float32)
    if KNOWN:
        residuals = _codes(residuals_ptr, offs_r, mask_r, offs_e, E).to(dtype)
        visible = tl.dot(residuals, weight, input_precision="ieee").to(dtype).to(tl.float32)
        hidden = tl.load(hidden_ptr + offs_r, mask=mask_r, other=0) != 0
        x = (x + tl.where(hidden[:, None], unknown[None, :], visible)).to(dtype).to(tl.float32)
    x = (x + position).to(out_dtype).to(tl.float32)
    out = (x + scale[None, :]).to(out_dtype)

    out_ptr += offs_r[:, None] * C + offs_c[None, :]
    for copy in range(copies):
        tl.store(out_ptr + copy * (rows.to(tl.int64) * C), out, mask=mask_rc)


def unavailable(inputs: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why the kernel cannot run on such inputs, with other tensors of these dtypes; None when it can."""
    if inputs.shape[2] > MAX_DIMS:
        return f"it takes codes of up to {MAX_DIMS} dimensions, got {inputs.shape[2]}"
    return triton_device.unavailable(inputs.device, inputs.dtype, *dtypes)


def forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    scale: Tensor,
    residuals: Tensor | None,
    hidden: Tensor | None,
    mask: Tensor | None,
    copies: int,
    overlap: bool,
) -> Tensor:
    """inputs residuals [B,n,E], weight [C,E], bias scale mask [C], position [n,C], hidden [B,n] -> [copies B,n,C]."""
    (batch, length, dims), width = inputs.shape, weight.shape[0]
    dtype = torch.promote_types(weight.dtype, position.dtype)
    out = torch.empty(copies * batch, length, width, dtype=dtype, device=inputs.device)
    rows = batch * length
    if not rows:
        return out
    known = residuals is not None
    tile = FEW if rows <= FEW_ROWS else MANY
    overlap = overlap and overlaps(inputs.device)
    inputs = inputs.contiguous()
    with on_device(inputs):
        _embedding_kernel[(triton.cdiv(rows, tile.block_r), triton.cdiv(width, tile.block_c))](
            inputs_ptr=inputs,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            position_ptr=position.contiguous(),
            scale_ptr=scale.contiguous(),
            residuals_ptr=residuals.contiguous() if known else inputs,
            hidden_ptr=hidden.contiguous() if known else inputs,
            mask_ptr=mask.contiguous() if known else inputs,
            out_ptr=out,
            rows=rows,
            length=length,
            copies=copies,
            C=width,
            E=dims,
            KNOWN=known,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            BLOCK_E=max(16, triton.next_power_of_2(dims)),
            OVERLAP=overlap,
            num_warps=tile.warps,
            **({"launch_pdl": True} if overlap else {}),
        )
    return out
