"""The hand-written kernels for Hopper GPUs (sm_90a; csrc/hopper*): argument checks, allocation and launch.

Backward comes in two ways. In two passes: dq with the statistics of every query, then dk and dv; every result is
written by one warpgroup, so all are bit-equal from run to run. In one pass, where queries see many keys: five products
instead of seven, but dq is summed in any order. The sums lie in gradients that are not written yet; dq of the last
heads, after which there are none, comes from the first of the two passes. Jobs come from plan.py;
csrc/hopper_forward.cuh tells how it works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .. import extension
from ..mask import SpanMask
from . import cuda
from .hopper_launch import NUM_QUEUES, HopperKernels
from .plan import JobPlan, key_jobs, query_jobs
from .triton import empty_rows_like

DTYPES = cuda.DTYPES
HEAD_DIMS = (64, 128)


class Tile(NamedTuple):
    """A compiled kernel: warpgroups of 64 rows, columns a block, blocks and jobs in shared memory, thread blocks an SM.

    overlap (forward): 0, every warpgroup waits for its products and others fill the gaps; 1, products overlap with the
    next block's exponentials and warpgroups take turns; 2, the same in no order.
    """

    groups: int
    cols: int
    stages: int
    row_stages: int = 2
    overlap: int = 0
    blocks_per_sm: int = 1


@dataclass(frozen=True)
class Tiles:
    """Kernels of the passes; `bounded` is the forward where logits have a bound.

    backward: the one that computes dq, dk and dv in one pass, for the jobs of dkdv, where there are enough heads; dq
    then is for the last ones. None where the two passes are always taken.
    """

    forward: Tile
    bounded: Tile
    dq: Tile
    dkdv: Tile
    backward: Tile | None = None

    @property
    def passes(self) -> dict[str, Tile]:
        """What may run, by the names of `table`."""
        return {name: getattr(self, name) for name in PASSES if getattr(self, name) is not None}


PASSES = ("forward", "dq", "dkdv", "backward")


SHORT, MEDIUM, LONG = "short", "medium", "long"
MEDIUM_SPAN, LONG_SPAN = 512, 2048
TILES: dict[tuple[int, str], Tiles] = {
    (64, SHORT): Tiles(
        Tile(4, 64, 5, overlap=2), Tile(4, 64, 5, overlap=2), Tile(3, 64, 4), Tile(1, 64, 4, blocks_per_sm=2)
    ),
    (64, MEDIUM): Tiles(Tile(3, 128, 2), Tile(4, 64, 5, overlap=2), Tile(3, 64, 4), Tile(2, 64, 4), Tile(2, 64, 4)),
    (64, LONG): Tiles(Tile(3, 128, 2), Tile(4, 96, 3), Tile(3, 64, 4), Tile(2, 64, 4), Tile(2, 64, 4)),
    (128, SHORT): Tiles(Tile(2, 64, 3, overlap=1), Tile(2, 64, 3, overlap=1), Tile(2, 64, 3, 1), Tile(2, 64, 2)),
    (128, MEDIUM): Tiles(Tile(2, 128, 2, overlap=1), Tile(2, 128, 2, overlap=1), Tile(2, 64, 3, 1), Tile(2, 64, 2)),
    (128, LONG): Tiles(
        Tile(2, 128, 2, overlap=1), Tile(2, 128, 2, overlap=1), Tile(2, 64, 3, 1), Tile(2, 64, 2, 1), Tile(2, 64, 3, 1)
    ),
}
"""(head dim, span class by mean keys a query) -> kernels: the fastest measured on an H100 (reports/log.md)."""


def table() -> dict[str, list[tuple[int, ...]]]:
    """All kernels that TILES names, by pass: (head dim, fields of Tile)."""
    fields = {"forward": ("forward", "bounded"), "dq": ("dq",), "dkdv": ("dkdv",), "backward": ("backward",)}
    rows = {
        name: [(d, getattr(tiles, field)) for (d, _), tiles in TILES.items() for field in of_pass]
        for name, of_pass in fields.items()
    }
    return {name: list(dict.fromkeys((d, *t) for d, t in row if t is not None)) for name, row in rows.items()}


# The extension where it was built with them; else what compiles the table's kernels when they are first launched.
_kernels = extension.module if hasattr(extension.module, "hopper_backward") else HopperKernels(**table())


def select_tiles(head_dim: int, mask: SpanMask, bounded: bool = False, deterministic: bool = False) -> Tiles:
    """The kernels for a mask. A pure function of its arguments.

    bounded: for logits with a bound; deterministic: a backward that is bit-equal from run to run.
    """
    span = mask.num_pairs / mask.num_queries
    tiles = TILES[head_dim, SHORT if span < MEDIUM_SPAN else MEDIUM if span < LONG_SPAN else LONG]
    tiles = replace(tiles, forward=tiles.bounded) if bounded else tiles
    return replace(tiles, backward=None) if deterministic else tiles


def tile_numbers(head_dim: int, tiles: Tiles) -> dict[str, int]:
    """The numbers by which `_kernels` knows the kernels of each pass that may run."""
    return {
        name: getattr(_kernels, f"hopper_{name}_tiles").index((head_dim, *tile)) for name, tile in tiles.passes.items()
    }


def make_plans(mask: SpanMask, tiles: Tiles, device: torch.device | str) -> dict[str, JobPlan]:
    """Jobs of each pass that may run; made once per mask, kernels and device, then kept on the mask."""
    make = {"forward": query_jobs, "dq": query_jobs, "dkdv": key_jobs, "backward": key_jobs}
    return {name: make[name](mask, tile.groups, tile.cols, device) for name, tile in tiles.passes.items()}


TAIL_JOBS, ONE_PASS_TAIL_JOBS = 2, 1


def tail_heads(num_jobs: int, num_heads: int, num_blocks: int, tail_jobs: int = TAIL_JOBS) -> int:
    """Of how many heads, the last of num_heads, the jobs alternate, so that num_blocks thread blocks end together.

    Heads come one after the other, each with its longest jobs first, and those of the last one would begin when there
    is little else left to do. So the last jobs, tail_jobs a block, are taken by length whatever their head. More of
    them would crowd the L2 cache (reports/data/hopper_tail_h100.json).
    """
    return min(num_heads, math.ceil(tail_jobs * num_blocks / num_jobs))


JOBS_AHEAD = 2.2
HEADS_AHEAD = 2


def num_slots(num_jobs: int, num_heads: int, num_sms: int) -> int:
    """Heads for which the one-pass backward has room at a time, of num_heads with num_jobs jobs each.

    Enough that no SM waits: heads of the jobs under way (JOBS_AHEAD an SM, as these are of unequal lengths), one that
    is rounded and one that is made ready. Fewer cost time, more only memory (reports/data/hopper_one_pass_h100.json).
    """
    return min(num_heads, HEADS_AHEAD + math.ceil(JOBS_AHEAD * num_sms / num_jobs))


LEAST_SHARE = 4
FEW_SLOTS = 6


def num_last_heads(num_slots: int, batch_size: int, num_heads: int, num_queries: int, num_keys: int) -> int:
    """How many heads, the last ones, have the sums of the one-pass backward in their dq, dk and dv: num_slots together.

    Half of a head's sums are there, the others where its dq will be. dq of the last heads takes a pass of its own, so
    that they shall be few among all batch_size * num_heads. Zero where they are not, where the last image has not so
    many, or where there are fewer keys than queries: then sums have no room, and the two passes are taken. A head that
    has two slots waits for heads not far before it, which costs more than another head in that pass unless heads are
    long, so that there are few slots (reports/log.md).
    """
    num_last = math.ceil(num_slots / (3 if num_slots <= FEW_SLOTS else 2))
    enough = LEAST_SHARE * num_last <= batch_size * num_heads and num_last <= num_heads and num_queries <= num_keys
    return num_last if enough else 0


def unavailable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels cannot run on these tensors [B, H, L, D]; None when they can. Looks at no data: traceable."""
    reason = cuda.refusal(q, k, v)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(q.device)
    if capability != (9, 0):
        return f"the Hopper kernels need compute capability 9.0, got {capability[0]}.{capability[1]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _readable(x):
            return f"the copy engine reads no tensor with a stride of 0: {name}.contiguous() works"
    error = _load_error(q.device.index)
    return f"the Hopper kernels cannot run on {q.device}: {error}" if error else None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_start: torch.Tensor,
    key_end: torch.Tensor,
    jobs: torch.Tensor,
    tile: int,
    scale: float,
    logit_bound: float = math.inf,
    head_bounds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T + mask) v for query i and the keys [key_start[i], key_end[i]).

    Args:
        q: [B, H, Lq, D], float16 or bfloat16, D of 64 or 128, last dimension contiguous, rows 16-byte aligned.
        k, v: [B, H, Lk, D], like q.
        key_start, key_end: int32 [Lq] on q's device.
        jobs: int32 [num_jobs, fields], of `plan.query_jobs` for the kernel. Its content is trusted.
        tile: number of the kernel, see `tile_numbers`.
        scale: positive factor on the logits.
        logit_bound: no |scale q k| is larger, as the caller promises; infinity promises nothing.
        head_bounds: the same for each head, float32 [H] on q's device; takes the place of logit_bound.
    Returns:
        out [B, H, Lq, D] (memory order [B, Lq, H, D]) in q's dtype and lse_log2 [B, H, Lq] float32, the log-sum-exp of
        the logits in log2 units, which is what the backward reads (`natural_lse` converts); a query without keys has
        out = 0 and lse_log2 = +inf.
    Raises:
        ValueError: a tensor does not start at a multiple of 16 bytes.
        RuntimeError: the launch failed; the CUDA error is named.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16:
            raise ValueError(
                f"{name} must start at a multiple of 16 bytes, got {x.data_ptr():#x}; {name}.clone() works"
            )
    b, h, num_queries, _ = q.shape
    out = empty_rows_like(q)
    lse_log2 = torch.empty(b, h, num_queries, dtype=torch.float32, device=q.device)
    if k.shape[2] == 0:
        return out.zero_(), lse_log2.fill_(math.inf)
    queue = _queue(q)
    _kernels.hopper_forward(
        tile,
        _shape(q, k, key_start, key_end, scale),
        _plan("forward", tile, jobs, q, *queue),
        *(_view(x) for x in (q, k, v, out)),
        lse_log2.data_ptr(),
        0 if head_bounds is None else head_bounds.data_ptr(),
        logit_bound,
        q.device.index,
        torch.cuda.current_stream(q.device).cuda_stream,
    )
    return out, lse_log2


def natural_lse(lse_log2: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp in natural units, -inf for a query without keys, from what `forward` returns. Differentiable."""
    return torch.where(lse_log2 == math.inf, -math.inf, lse_log2 * math.log(2))


def backward(
    d_out: torch.Tensor,
    d_lse_log2: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse_log2: torch.Tensor,
    key_start: torch.Tensor,
    key_end: torch.Tensor,
    dq_jobs: torch.Tensor,
    key_jobs: torch.Tensor,
    tiles: list[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq, dk, dv of `forward`, from d_out [B, H, Lq, D] and, unless None, d_lse_log2 [B, H, Lq].

    Each has the shape and dtype of its tensor and memory order [B, L, H, D]. Arguments are as in `forward`; key_jobs
    come from `plan.key_jobs`, dq_jobs from `plan.query_jobs`. tiles: numbers of the kernels for dq, for dk and dv, and
    for all in one pass, which is taken where there are enough heads (`one_pass_heads`); -1 for none.
    """
    dq, dk, dv = empty_rows_like(q), empty_rows_like(k), empty_rows_like(v)
    if k.shape[2] == 0:
        return dq.zero_(), dk, dv
    if q.shape[2] == 0:
        return dq, dk.zero_(), dv.zero_()
    if d_out.data_ptr() % 16 or not (cuda._aligned(d_out) and _readable(d_out)):
        d_out = d_out.clone(memory_format=torch.contiguous_format)
    if d_lse_log2 is not None:
        d_lse_log2 = d_lse_log2.contiguous()
    intervals, (dq_tile, dkdv_tile, tile) = (key_start, key_end), tiles
    slots, last = 0, 0
    if tile >= 0:
        num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
        slots, last = one_pass_heads(q.shape, k.shape[2], len(key_jobs), num_sms)
    if last == 0:
        assert dkdv_tile >= 0, "two passes need a kernel for dk and dv"
        delta, queue = torch.empty_like(lse_log2), _queue(q)
        of_all = d_out, d_lse_log2, q, k, v, out, lse_log2, intervals, scale, dq
        _dq_pass(dq_tile, dq_jobs, queue, *of_all, delta.data_ptr(), overlap=False)
        _kernels.hopper_dkdv(
            dkdv_tile,
            _shape(q, k, *intervals, scale),
            _plan("dkdv", dkdv_tile, key_jobs, q, *queue),
            *(_view(x) for x in (q, k, v, d_out)),
            *(lse_log2.data_ptr(), delta.data_ptr()),
            *(_view(dk), _view(dv)),
            *_where(q),
        )
        return dq, dk, dv

    b, h, num_queries, _ = q.shape
    num_counters = NUM_QUEUES + 2 * (b * h + last)
    num_before = math.ceil((num_counters + 2) / 4) * 4
    num_statistics = math.ceil(slots * num_queries / 2) * 4
    storage = torch.empty(num_before + num_statistics, dtype=torch.float32, device=q.device)
    _kernels.hopper_backward(
        tile,
        _shape(q, k, *intervals, scale),
        _plan("backward", tile, key_jobs, q, storage, True, min(slots, 2 * last), ONE_PASS_TAIL_JOBS),
        *(_view(x) for x in (q, k, v, out, d_out)),
        *_lse_addresses(lse_log2, d_lse_log2),
        *(_view(x) for x in (dq, dk, dv)),
        *(storage[num_before:].data_ptr(), slots, last),
        *_where(q),
    )
    of_last = slice(b - 1, b), slice(h - last, h)
    of_heads = (None if x is None else x[of_last] for x in (d_out, d_lse_log2))
    q, k, v, out, lse_log2, dq_of_last = (x[of_last] for x in (q, k, v, out, lse_log2, dq))
    queue = storage[num_counters:], False
    rest = *of_heads, q, k, v, out, lse_log2, intervals, scale, dq_of_last
    _dq_pass(dq_tile, dq_jobs, queue, *rest, 0, overlap=True)
    return dq, dk, dv


def one_pass_heads(q_shape: tuple[int, ...], num_keys: int, num_jobs: int, num_sms: int) -> tuple[int, int]:
    """`num_slots` and `num_last_heads` for q [B, H, L, D]; where the latter is 0 the backward takes two passes."""
    batch_size, num_heads, num_queries, _ = q_shape
    slots = num_slots(num_jobs, batch_size * num_heads, num_sms)
    return slots, num_last_heads(slots, batch_size, num_heads, num_queries, num_keys)


def _dq_pass(
    tile, jobs, queue, d_out, d_lse_log2, q, k, v, out, lse_log2, intervals, scale, dq, delta, overlap
) -> None:
    """delta: the address of room for that of all queries, or 0. queue: as of `_queue`.

    overlap: it may begin while the kernel before it ends, until when dq is in use.
    """
    _kernels.hopper_dq(
        tile,
        _shape(q, k, *intervals, scale),
        _plan("dq", tile, jobs, q, *queue),
        *(_view(x) for x in (q, k, v, out, d_out)),
        *_lse_addresses(lse_log2, d_lse_log2),
        *(_view(dq), delta, overlap),
        *_where(q),
    )


def _lse_addresses(lse_log2: torch.Tensor, d_lse_log2: torch.Tensor | None) -> tuple[int, int]:
    return lse_log2.data_ptr(), 0 if d_lse_log2 is None else d_lse_log2.data_ptr()


def _where(q: torch.Tensor) -> tuple[int, int]:
    return q.device.index, torch.cuda.current_stream(q.device).cuda_stream


def _shape(q, k, key_start, key_end, scale) -> tuple:
    b, h, num_queries, d = q.shape
    starts, ends = key_start.data_ptr(), key_end.data_ptr()
    return q.dtype == torch.bfloat16, d, b, h, num_queries, k.shape[2], starts, ends, scale


def _plan(
    name: str,
    tile: int,
    jobs: torch.Tensor,
    q: torch.Tensor,
    counters: torch.Tensor,
    set_zero: bool,
    most_heads: int | None = None,
    tail_jobs: int = TAIL_JOBS,
) -> tuple[int, int, int, int, bool]:
    *_, blocks_per_sm = getattr(_kernels, f"hopper_{name}_tiles")[tile]
    num_heads = q.shape[0] * q.shape[1] if most_heads is None else most_heads
    num_blocks = blocks_per_sm * torch.cuda.get_device_properties(q.device).multi_processor_count
    tail = tail_heads(len(jobs), num_heads, num_blocks, tail_jobs)
    return jobs.data_ptr(), len(jobs), tail, counters.data_ptr(), set_zero


_queues: dict[tuple[torch.device, int], torch.Tensor] = {}


def _queue(q: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A launch's two counters of items, to be held until it is queued, and whether it must set them to zero.

    Launches on a stream follow each other and leave their counters zero, so each stream has one pair for all of them.
    Graphs may run at the same time on any stream: each captured launch has a pair of its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(2, dtype=torch.int32, device=q.device), True
    key = q.device, torch.cuda.current_stream(q.device).cuda_stream
    if key not in _queues:
        _queues[key] = torch.zeros(2, dtype=torch.int32, device=q.device)
    return _queues[key], False


def _view(x: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()[:3]


def _readable(x: torch.Tensor) -> bool:
    return all(stride != 0 for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)


_load_errors: dict[int, str] = {}


@torch.compiler.assume_constant_result
def _load_error(device: int) -> str:
    if device not in _load_errors:
        _load_errors[device] = _kernels.hopper_load_error(device)
    return _load_errors[device]
