"""The hand-written CUDA forward (csrc/attention_forward.cuh): argument checks, allocation and launch.

The extension hmar_kernels._cuda is built at install time when nvcc is at hand; `unavailable` tells in words why it
cannot run. Backward goes through the kernels of triton.py, from the lse saved here. Tiles come from plan.py.
"""

from __future__ import annotations

import torch

from .. import extension
from ..mask import SpanMask
from .triton import Tile

TILES = {(64, 64): 64, (64, 128): 64, (128, 64): 64, (128, 128): 32}
"""(head dim, rows a tile) -> keys a block, for the kernels in the extension: plans are best made for these."""

SHORT_SPAN = 512
"""Masks of fewer keys a query on average take tiles of 64 rows, others 128: short spans waste less that way."""

DTYPES = (torch.float16, torch.bfloat16)
PLAN_COLUMNS = 6
MAX_BLOCKS = 2**31 - 1


def unavailable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why `forward` cannot run on these tensors [B, H, L, D]; None when it can. Looks at no data: traceable."""
    if extension.module is None:
        return extension.unavailable(q.device)
    return refusal(q, k, v) or extension.unavailable(q.device)


def refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why none of the CUDA kernels takes these tensors, whatever is built; None when there is no such reason."""
    head_dims = sorted({head_dim for head_dim, _ in TILES})
    if q.dtype not in DTYPES:
        return f"the CUDA kernels take float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] not in head_dims:
        return f"the CUDA kernels take head dims {head_dims}, got {q.shape[-1]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _aligned(x):
            return (
                f"the CUDA kernels read rows in 16-byte pieces: {name} needs a contiguous last dimension, other "
                f"strides and the storage offset in multiples of 8 elements, got strides {tuple(x.stride())} and "
                f"offset {x.storage_offset()}; {name}.contiguous() works"
            )
    if q.device.type != "cuda":
        return f"the CUDA kernels run on CUDA tensors, got {q.device}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return None


def select_tile(head_dim: int, mask: SpanMask) -> Tile:
    """Tile shape of the kernel that serves this head dim and mask best. A pure function of its arguments."""
    rows = 64 if mask.num_pairs < SHORT_SPAN * mask.num_queries else 128
    return Tile(rows, TILES[head_dim, rows], warps=rows // 16, stages=2)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_start: torch.Tensor,
    key_end: torch.Tensor,
    plan: torch.Tensor,
    scale: float,
    *,
    tile_rows: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-sparse attention: query i sees the keys [key_start[i], key_end[i]).

    Args:
        q: [B, H, Lq, D], float16 or bfloat16, D of 64 or 128, last dimension contiguous, rows 16-byte aligned.
        k, v: [B, H, Lk, D], like q.
        key_start, key_end: int32 [Lq], on q's device; 0 <= key_start, key_end <= Lk.
        plan: int32 [num_tiles, 6] on q's device, the tiles of `plan.query_plan`: every query in exactly one tile of at
            most tile_rows rows. Its content is trusted.
        scale: positive factor on the logits.
        tile_rows: 64 or 128, the most rows a tile of the plan has.
    Returns:
        out [B, H, Lq, D] (memory order [B, Lq, H, D]) in q's dtype and lse [B, H, Lq] float32, natural logarithm; a
        query without keys has out = 0 and lse = -inf.
    Raises:
        ValueError: the tensors do not fit together, or the kernels cannot run here.
        RuntimeError: the launch failed; the CUDA error is named.
    """
    _check(q, k, v, key_start, key_end, plan, scale, tile_rows)
    reason = unavailable(q, k, v)
    if reason is not None:
        raise ValueError(f"cannot run the CUDA forward: {reason}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16:
            raise ValueError(
                f"{name} must start at a multiple of 16 bytes, got {x.data_ptr():#x}; {name}.clone() works"
            )
    b, h, num_queries, d = q.shape
    if len(plan) * b * h > MAX_BLOCKS:
        raise ValueError(f"{len(plan)} tiles x {b * h} heads exceed {MAX_BLOCKS} blocks of a launch; split the batch")

    out = torch.empty(b, num_queries, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(b, h, num_queries, dtype=torch.float32, device=q.device)
    extension.module.attention_forward(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        key_start=key_start.data_ptr(),
        key_end=key_end.data_ptr(),
        plan=plan.data_ptr(),
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        out_strides=out.stride()[:3],
        batch_size=b,
        num_heads=h,
        num_queries=num_queries,
        num_tiles=len(plan),
        head_dim=d,
        tile_rows=tile_rows,
        bfloat16=q.dtype == torch.bfloat16,
        scale=scale,
        device=q.device.index,
        stream=torch.cuda.current_stream(q.device).cuda_stream,
    )
    return out, lse


def _check(q, k, v, key_start, key_end, plan, scale, tile_rows) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(
            f"expected q [B, H, Lq, D] and k, v [B, H, Lk, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, x in (("k", k), ("v", v), ("key_start", key_start), ("key_end", key_end), ("plan", plan)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    for name, x, shape in (
        ("key_start", key_start, (q.shape[2],)),
        ("key_end", key_end, (q.shape[2],)),
        ("plan", plan, (len(plan), PLAN_COLUMNS)),
    ):
        if x.dtype != torch.int32 or x.shape != shape or not x.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous int32 tensor of shape {list(shape)}, got {x.dtype} {list(x.shape)}"
            )
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    rows = sorted({rows for _, rows in TILES})
    if tile_rows not in rows:
        raise ValueError(f"tile_rows must be one of {rows}, got {tile_rows}")


def _aligned(x: torch.Tensor) -> bool:
    steps = (stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    # NOTE: Dynamo cannot trace storage_offset; what it hides there, `forward` sees in the address.
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    return x.stride(-1) == 1 and offset % 8 == 0 and all(step % 8 == 0 for step in steps)
