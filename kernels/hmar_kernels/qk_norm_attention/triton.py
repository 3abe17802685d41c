"""Attention of a packed projection within short images in Triton, in one kernel.

    q = s (q' + b_q) / |q' + b_q|,   k = k' / |k'|,   v = v' + b_v,   out = softmax(q k^T) v

Grid: (blocks of queries, heads, images); a program owns [BLOCK_Q, D] of out and has all keys of its image at once, so
there is no loop; programs of the same image and head normalise the same keys. Norms, logits and sums are float32, q and
k are rounded as they are where they are stored. With OVERLAP the kernel starts while the one before it still runs. With
AHEAD there are more programs behind those of the last image, which ask for the weights of a later layer: memory is idle
while these few attend.

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
# Programs that ask for what comes later, at least, and bytes that each of their threads asks for at a time. These pass
# through a multiprocessor at 35 GB/s (reports/log.md), so all of them have to ask.
AHEAD_PROGRAMS, AHEAD_CHUNK = 120, 1024
AHEAD_STEP = 16  # bytes: of addresses and sizes


@triton.jit
def _rows(ptr, offs_l, offs_d, mask, WIDTH: tl.constexpr):
    """Rows of one head of the packed projection, as float32."""
    return tl.load(ptr + offs_l[:, None] * WIDTH + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _unit(x):
    return x * (1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS))[:, None]


@triton.jit
def _ask(address, size):
    """PTX ISA 8.0, cp.async.bulk.prefetch: `size` bytes from `address` on, both multiples of 16; nothing for less."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _ask_for_part(ptr, skipped, num_bytes, program, num_programs, CHUNK: tl.constexpr, LANES: tl.constexpr):
    address = ptr.to(tl.int64) + skipped
    for begin in range(program.to(tl.int64) * LANES * CHUNK, num_bytes, num_programs.to(tl.int64) * LANES * CHUNK):
        offsets = begin + tl.arange(0, LANES) * CHUNK
        _ask(address + offsets, tl.minimum(num_bytes - offsets, CHUNK).to(tl.int32))


@triton.jit(do_not_specialize=["length", "images", "ahead_skipped", "ahead_bytes"])
def _attention_kernel(
    qkv_ptr,
    q_bias_ptr,
    v_bias_ptr,
    log_scale_ptr,
    out_ptr,
    ahead_ptr,
    length,
    images,
    max_log_scale,
    ahead_skipped,
    ahead_bytes: tl.int64,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    if AHEAD:
        blocks, beyond = tl.num_programs(0) * tl.num_programs(1), tl.program_id(2) - images
        if beyond >= 0:
            program = beyond * blocks + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            num_programs = (tl.num_programs(2) - images) * blocks
            _ask_for_part(ahead_ptr, ahead_skipped, ahead_bytes, program, num_programs, CHUNK, LANES)
            return
    _attend(
        qkv_ptr,
        q_bias_ptr,
        v_bias_ptr,
        log_scale_ptr,
        out_ptr,
        length,
        max_log_scale,
        H,
        D,
        BLOCK_D,
        BLOCK_Q,
        BLOCK_L,
        OVERLAP,
    )


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


def asks(device: torch.device) -> bool:
    """Whether the kernel can ask for what comes later there."""
    return overlaps(device)


def forward(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    max_log_scale: float,
    overlap: bool,
    ahead: torch.Tensor | None = None,
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
    blocks, more, skipped, ahead_bytes = triton.cdiv(length, tile.block_q), 0, 0, 0
    if ahead is not None and asks(qkv.device):
        skipped = -ahead.data_ptr() % AHEAD_STEP
        ahead_bytes = (ahead.nbytes - skipped) // AHEAD_STEP * AHEAD_STEP
        more = triton.cdiv(AHEAD_PROGRAMS, blocks * heads)
    with on_device(qkv):
        _attention_kernel[(blocks, heads, b + more)](
            qkv_ptr=qkv.contiguous(),
            q_bias_ptr=q_bias.contiguous(),
            v_bias_ptr=v_bias.contiguous(),
            log_scale_ptr=log_scale.contiguous(),
            out_ptr=out,
            ahead_ptr=ahead if more else out,
            length=length,
            images=b,
            max_log_scale=max_log_scale,
            ahead_skipped=skipped,
            ahead_bytes=ahead_bytes,
            H=heads,
            D=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_Q=tile.block_q,
            BLOCK_L=block_l,
            OVERLAP=overlap,
            AHEAD=more > 0,
            CHUNK=AHEAD_CHUNK,
            LANES=32 * tile.warps,
            num_warps=tile.warps,
            **({"launch_pdl": True} if overlap else {}),
        )
    return out
