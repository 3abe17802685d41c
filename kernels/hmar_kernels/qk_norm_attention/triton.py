"""Attention of a packed projection within short images in Triton, in one kernel.

    q = s (q' + b_q) / |q' + b_q|,   k = k' / |k'|,   v = v' + b_v,   out = softmax(q k^T) v

Grid: (blocks of queries, heads, images); a program owns [BLOCK_Q, D] of out and has all keys of its image at once, so
there is no loop; programs of the same image and head normalise the same keys. Norms, logits and sums are float32, q and
k are rounded as they are where they are stored. With OVERLAP the kernel starts while the one before it still runs.

The equations are stated in reference.py; argument checks live in api.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import triton_device
from ..triton_device import on_device, overlaps

EPS: tl.constexpr = tl.constexpr(1e-12)  # that of F.normalize


class Tile(NamedTuple):
    block_q: int
    warps: int


# Keys padded to a power of two -> tile, of which none spills. By calculation, as few programs as there are
# multiprocessors are worth more than keys that are normalised once.
TILES: dict[int, Tile] = {16: Tile(16, 1), 32: Tile(32, 2), 64: Tile(32, 4), 128: Tile(32, 4), 256: Tile(32, 8)}
MAX_KEYS, MAX_HEAD_DIM = max(TILES), 128


@triton.jit
def _rows(ptr, offs_l, offs_d, mask, WIDTH: tl.constexpr):
    """Rows of one head of the packed projection, as float32."""
    return tl.load(ptr + offs_l[:, None] * WIDTH + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _unit(x):
    return x * (1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS))[:, None]


@triton.jit
def _ask_bulk(address, size):
    return tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _ask_line(address, size):
    return tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _prefetch(ptr, num_bytes, program, programs, MODE: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr):
    address = ptr.to(tl.int64)
    step = programs.to(tl.int64) * LANES * CHUNK
    for begin in range(program.to(tl.int64) * LANES * CHUNK, num_bytes, step):
        offsets = begin + tl.arange(0, LANES) * CHUNK
        size = tl.minimum(num_bytes - offsets, CHUNK).to(tl.int32)
        if MODE == 1:
            _ask_bulk(address + offsets, size)
        else:
            _ask_line(address + offsets, size)


AHEAD = {"weight": None, "mode": 0, "limit": 0, "programs": 128, "chunk": 1024}


@triton.jit(do_not_specialize=["length", "images", "ahead_bytes"])
def _attention_kernel(
    ahead_ptr,
    ahead_bytes: tl.int64,
    images,
    AHEAD: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    qkv_ptr,
    q_bias_ptr,
    v_bias_ptr,
    log_scale_ptr,
    out_ptr,
    length,
    max_log_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    if tl.program_id(2) >= images:
        program = ((tl.program_id(2) - images) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        programs = (tl.num_programs(2) - images) * tl.num_programs(1) * tl.num_programs(0)
        if AHEAD > 0:
            _prefetch(ahead_ptr, ahead_bytes, program, programs, AHEAD, LANES, CHUNK)
    else:
        _attend(qkv_ptr, q_bias_ptr, v_bias_ptr, log_scale_ptr, out_ptr, length, max_log_scale, H, D, BLOCK_D, BLOCK_Q, BLOCK_L, OVERLAP)


@triton.jit
def _attend(
    qkv_ptr,
    q_bias_ptr,
    v_bias_ptr,
    log_scale_ptr,
    out_ptr,
    length,
    max_log_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_l, offs_d = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask_q = (offs_q < length)[:, None] & mask_d[None, :]
    mask_l = (offs_l < length)[:, None] & mask_d[None, :]
    qkv_ptr += b * length * (3 * H * D) + h * D
    dtype = qkv_ptr.dtype.element_ty
    scale = tl.exp(tl.minimum(tl.load(log_scale_ptr + h).to(tl.float32), max_log_scale))
    q_bias = tl.load(q_bias_ptr + h * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    v_bias = tl.load(v_bias_ptr + h * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()

    q = _rows(qkv_ptr, offs_q, offs_d, mask_q, 3 * H * D)
    k = _rows(qkv_ptr + H * D, offs_l, offs_d, mask_l, 3 * H * D)
    v = _rows(qkv_ptr + 2 * H * D, offs_l, offs_d, mask_l, 3 * H * D)
    q = (_unit(q + q_bias[None, :]) * scale).to(dtype)
    k = _unit(k).to(dtype)
    v = (v + v_bias[None, :]).to(dtype)

    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    logits = tl.where((offs_l < length)[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    out = tl.dot(weights.to(dtype), v, input_precision="ieee") / tl.sum(weights, 1)[:, None]
    out_ptr += b * length * (H * D) + h * D
    tl.store(out_ptr + offs_q[:, None] * (H * D) + offs_d[None, :], out.to(dtype), mask=mask_q)


def unavailable(qkv: torch.Tensor, heads: int, *dtypes: torch.dtype) -> str | None:
    """Why the kernel cannot run on such a projection; None when it can."""
    head_dim = qkv.shape[2] // (3 * heads)
    if qkv.shape[1] > MAX_KEYS or head_dim > MAX_HEAD_DIM:
        found = f"{qkv.shape[1]} and {head_dim}"
        return f"it takes images of up to {MAX_KEYS} tokens and head dims up to {MAX_HEAD_DIM}, got {found}"
    return triton_device.unavailable(qkv.device, qkv.dtype, *dtypes)


def select_tile(length: int, head_dim: int) -> tuple[int, Tile]:
    """Keys of a program and its tile. A pure function of its arguments."""
    block_l = next(keys for keys in TILES if length <= keys)
    tile = TILES[block_l]
    # NOTE: keys of twice the width take twice the registers.
    return block_l, tile if head_dim <= 64 else tile._replace(warps=min(8, 2 * tile.warps))


def forward(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    max_log_scale: float,
    overlap: bool,
) -> torch.Tensor:
    """qkv [B,L,3C] -> [B,L,C]."""
    b, length, width = qkv.shape
    heads = log_scale.shape[0]
    head_dim = width // (3 * heads)
    out = torch.empty(b, length, width // 3, dtype=qkv.dtype, device=qkv.device)
    if not out.numel():
        return out
    block_l, tile = select_tile(length, head_dim)
    overlap = overlap and overlaps(qkv.device)
    with on_device(qkv):
        weight, mode = AHEAD["weight"], AHEAD["mode"]
        mode = mode if weight is not None else 0
        blocks = triton.cdiv(length, tile.block_q)
        extra = triton.cdiv(AHEAD["programs"], blocks * heads) if mode else 0
        _attention_kernel[(blocks, heads, b + extra)](
            ahead_ptr=weight if mode else out,
            ahead_bytes=min(weight.nbytes, AHEAD["limit"]) if mode else 0,
            images=b,
            AHEAD=mode,
            CHUNK=AHEAD["chunk"] if mode == 1 else 128,
            LANES=32 * tile.warps,
            qkv_ptr=qkv.contiguous(),
            q_bias_ptr=q_bias.contiguous(),
            v_bias_ptr=v_bias.contiguous(),
            log_scale_ptr=log_scale.contiguous(),
            out_ptr=out,
            length=length,
            max_log_scale=max_log_scale,
            H=heads,
            D=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_Q=tile.block_q,
            BLOCK_L=block_l,
            OVERLAP=overlap,
            num_warps=tile.warps,
            **({"launch_pdl": True} if overlap else {}),
        )
    return out
