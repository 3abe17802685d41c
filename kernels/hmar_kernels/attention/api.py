"""The attention operator: argument checks, choice of implementation, torch custom ops and autograd.

The mathematics is in reference.py. Read next: plan.py (tiles), triton.py (the kernels behind impl="triton"), cuda.py.
"""

from __future__ import annotations

import math
import operator
from dataclasses import astuple, replace

import torch

from ..custom_op import is_traced
from ..mask import SpanMask
from . import cuda, flex, hopper, reference, triton, varlen
from .plan import TilePlan

IMPLEMENTATIONS = ("reference", "triton", "cuda", "hopper", "flex", "varlen")
"""Names that `attention(..., impl=...)` takes beside "auto"."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SpanMask,
    *,
    scale: float | None = None,
    logit_bound: float | torch.Tensor | None = None,
    deterministic: bool | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T + mask) v, where the mask gives each query one interval of keys.

    Args:
        q: [B, H, Lq, D], any strides (a view into packed qkv is used without a copy).
        k, v: [B, H, Lk, D], any strides, of q's dtype and device.
        mask: SpanMask of Lq queries and Lk keys.
        scale: positive factor on the logits; default 1 / sqrt(D).
        logit_bound: a promise that no |scale q.k| is larger, as for normalised q and k: a number, or one for each head
            as a float32 tensor [H] on q's device, which is read there. impl="hopper" leaves out the running maximum
            where the bound is at most 69 and the dtype bfloat16; others need no bound. A broken promise gives NaN.
        deterministic: gradients that are bit-equal from run to run. Default: as torch.use_deterministic_algorithms
            says. Only impl="hopper" has a faster backward that is not (dq, on masks where queries see many keys) and
            impl="flex" and "varlen" are what torch makes of them.
        impl: "auto" or one of IMPLEMENTATIONS. A named implementation runs or raises; `choose` tells what "auto"
            takes and why.
        return_lse: also return the log-sum-exp of each query's logits; differentiable, but for impl="varlen", whose
            lse is detached.
    Returns:
        out [B, H, Lq, D] in q's dtype, with memory order [B, Lq, H, D], so that merging heads is a view; with
        return_lse also lse [B, H, Lq] (float32; float64 for float64 inputs), -inf for a query that sees no key. Such a
        query's output and gradients are zero.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    check_inputs(q, k, v, mask)
    head_dim = operator.index(q.shape[-1])  # NOTE: makes it a constant where torch.compile has dynamic shapes
    scale = head_dim**-0.5 if scale is None else _number("scale", scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    logit_bound, head_bounds = _check_bound(logit_bound, q)
    if impl == "auto":
        impl, _ = choose(q, k, v, mask)
    else:
        reason = unavailable(impl, q, k, v, mask)
        if reason is not None:
            raise ValueError(
                f'impl="{impl}" cannot run here: {reason}; impl="auto" would take "{choose(q, k, v, mask)[0]}"'
            )

    if impl in ("triton", "cuda"):
        tensors, tiles = _plan_arguments(impl, mask, q.device, head_dim, q.dtype)
        attend = _attention_triton if impl == "triton" else _attention_cuda
        out, lse = attend(q, k, v, *tensors, tiles, scale)
    elif impl == "hopper":
        bounded = head_bounds is not None or logit_bound < math.inf
        tensors, tiles = _job_arguments(mask, q.device, head_dim, bounded, is_deterministic(deterministic))
        out, lse = _attend_hopper(q, k, v, *tensors, tiles, scale, logit_bound, head_bounds)
        lse = hopper.natural_lse(lse) if return_lse else lse
    elif impl == "flex":
        out, lse = flex.forward(q, k, v, mask, scale)
    elif impl == "varlen":
        out, lse = varlen.forward(q, k, v, mask, scale)
    else:
        out, lse = reference.forward(q, k, v, mask, scale)
    return (out, lse) if return_lse else out


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SpanMask) -> tuple[str, str]:
    """What impl="auto" takes for these inputs, and the reason. A pure function of devices, dtypes, shapes and mask."""
    if q.device.type == "cuda" and unavailable("hopper", q, k, v, mask) is None:
        return "hopper", "the fastest of the implementations here in every cell measured on an H100 (reports/tables)"
    reason = unavailable("triton", q, k, v, mask)
    if reason is None and q.device.type == "cuda":
        why = unavailable("hopper", q, k, v, mask)
        return "triton", f"serves every shape on GPUs from compute capability 8.0 on; not the Hopper kernels: {why}"
    if q.device.type == "cuda" and q.dtype != torch.float64:
        return "reference", f"dense and slow: {reason}"
    return "reference", "the plain implementation serves CPU tensors and float64"


def unavailable(impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SpanMask) -> str | None:
    """Why `impl` cannot run on these inputs; None when it can. Unknown names are a ValueError."""
    if impl == "reference":
        return None
    if impl == "triton":
        return triton.unavailable(q.device, q.dtype, q.shape[-1])
    if impl == "cuda":
        return cuda.unavailable(q, k, v)
    if impl == "hopper":
        return hopper.unavailable(q, k, v)
    if impl == "flex":
        return flex.unavailable(q.device, q.dtype, q.shape[-1])
    if impl == "varlen":
        return varlen.unavailable(q.device, q.dtype, q.shape[-1], mask)
    raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SpanMask) -> None:
    """Raise ValueError where q, k, v [B, H, L, D] and the mask do not go together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor [B, H, L, D], got {type(x).__name__}")
    if not isinstance(mask, SpanMask):
        raise ValueError(f"mask must be a SpanMask, got {type(mask).__name__}; SpanMask.full(Lq, Lk) is a dense one")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be [B, H, L, D], got shapes {_shape(q)}, {_shape(k)}, {_shape(v)}")
    b, h, num_queries, d = q.shape
    if d == 0:
        raise ValueError(f"the head dim is 0 in q of shape {_shape(q)}: at least 1 is needed")
    if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (b, h, d):
        raise ValueError(
            f"k and v must both be [{b}, {h}, Lk, {d}] to go with q {_shape(q)}, got {_shape(k)} and {_shape(v)}"
        )
    if (mask.num_queries, mask.num_keys) != (num_queries, k.shape[2]):
        raise ValueError(
            f"the mask is for {mask.num_queries} queries and {mask.num_keys} keys, "
            f"but q has {num_queries} and k has {k.shape[2]}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point or q.dtype.itemsize < 2:
        raise ValueError(
            f"q, k and v must share one dtype (float16, bfloat16, float32 or float64), "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def _number(name: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def _check_bound(bound: float | torch.Tensor | None, q: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """The bound of all heads, and that of each head where it is a tensor."""
    if isinstance(bound, torch.Tensor) and bound.ndim:
        if bound.shape != q.shape[1:2] or bound.dtype != torch.float32 or bound.device != q.device:
            raise ValueError(
                f"logit_bound as a tensor must be float32 [{q.shape[1]}] on {q.device}, one for each head of q, got "
                f"{bound.dtype} {_shape(bound)} on {bound.device}"
            )
        return math.inf, bound.detach().contiguous()
    bound = math.inf if bound is None else _number("logit_bound", bound)
    if not bound >= 0:
        raise ValueError(f"logit_bound must be a number from 0, or None when nothing is known, got {bound}")
    return bound, None


def is_bounded(bound: float | torch.Tensor | None, q: torch.Tensor) -> bool:
    """Whether a logit_bound promises anything. Raises ValueError where `attention` would."""
    of_all, of_heads = _check_bound(bound, q)
    return of_heads is not None or of_all < math.inf


def is_deterministic(wanted: bool | None) -> bool:
    """What the argument `deterministic` asks for."""
    return torch.are_deterministic_algorithms_enabled() if wanted is None else bool(wanted)


def _shape(x: torch.Tensor) -> list[int]:
    return list(x.shape)


# Under torch.compile a mask is a constant: plans are made while tracing, and a mask of other content retraces.
torch.utils._pytree.register_constant(SpanMask)


@torch.compiler.assume_constant_result
def _plan_arguments(
    impl: str, mask: SpanMask, device: torch.device, head_dim: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[int]]:
    """The plan in the form custom ops take: tensors and integers."""
    tiles = triton.select_tiles(triton.capability_of(device), head_dim, dtype, mask)
    if impl == "cuda":
        tiles = replace(tiles, forward=cuda.select_tile(head_dim, mask))
    plan = triton.make_plan(mask, tiles, device)
    tensors = [plan.key_start, plan.key_end, plan.forward.tiles, plan.dq.tiles, plan.dkdv.tiles]
    return tensors, [n for tile in (tiles.forward, tiles.dq, tiles.dkdv) for n in astuple(tile)]


@torch.compiler.assume_constant_result
def _job_arguments(
    mask: SpanMask, device: torch.device, head_dim: int, bounded: bool, deterministic: bool
) -> tuple[list[torch.Tensor], list[int]]:
    """The plan in the form of the Hopper kernels' ops. The integers are the kernels of `hopper.PASSES`, -1 for none."""
    tiles = hopper.select_tiles(head_dim, mask, bounded, deterministic)
    jobs = {name: plan.jobs for name, plan in hopper.make_plans(mask, tiles, device).items()}
    assert jobs.get("backward", jobs["dkdv"]) is jobs["dkdv"], "either backward takes the same jobs"
    tensors = [*mask.intervals(device), jobs["forward"], jobs["dq"], jobs["dkdv"]]
    numbers = hopper.tile_numbers(head_dim, tiles)
    return tensors, [numbers.get(name, -1) for name in hopper.PASSES]


def _unpack_plan(key_start, key_end, forward_tiles, dq_tiles, dkdv_tiles, tiles: list[int]) -> triton.AttentionPlan:
    forward, dq, dkdv = (triton.Tile(*tiles[i : i + 4]) for i in (0, 4, 8))
    return triton.AttentionPlan(
        key_start,
        key_end,
        TilePlan(forward_tiles, forward.rows, forward.cols),
        TilePlan(dq_tiles, dq.rows, dq.cols),
        TilePlan(dkdv_tiles, dkdv.rows, dkdv.cols),
        triton.Tiles(forward, dq, dkdv),
    )


@torch.library.custom_op("hmar_kernels::attention_triton", mutates_args=())
def _attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_start: torch.Tensor,
    key_end: torch.Tensor,
    forward_tiles: torch.Tensor,
    dq_tiles: torch.Tensor,
    dkdv_tiles: torch.Tensor,
    tiles: list[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = _unpack_plan(key_start, key_end, forward_tiles, dq_tiles, dkdv_tiles, tiles)
    return triton.forward(q, k, v, plan, scale)


@torch.library.custom_op("hmar_kernels::attention_cuda", mutates_args=())
def _attention_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_start: torch.Tensor,
    key_end: torch.Tensor,
    forward_tiles: torch.Tensor,
    dq_tiles: torch.Tensor,
    dkdv_tiles: torch.Tensor,
    tiles: list[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return cuda.forward(q, k, v, key_start, key_end, forward_tiles, scale, tile_rows=tiles[0])


@_attention_triton.register_fake
@_attention_cuda.register_fake
def _(q, k, v, key_start, key_end, forward_tiles, dq_tiles, dkdv_tiles, tiles, scale):
    return triton.empty_rows_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hmar_kernels::attention_triton_backward", mutates_args=())
def _attention_triton_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_start: torch.Tensor,
    key_end: torch.Tensor,
    forward_tiles: torch.Tensor,
    dq_tiles: torch.Tensor,
    dkdv_tiles: torch.Tensor,
    tiles: list[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plan = _unpack_plan(key_start, key_end, forward_tiles, dq_tiles, dkdv_tiles, tiles)
    return triton.backward(do, dlse, q, k, v, out, lse, plan, scale)


@_attention_triton_backward.register_fake
def _(do, dlse, q, k, v, out, lse, key_start, key_end, forward_tiles, dq_tiles, dkdv_tiles, tiles, scale):
    return triton.empty_rows_like(q), triton.empty_rows_like(k), triton.empty_rows_like(v)


def _save_for_backward(ctx, inputs, output):
    q, k, v, *plan, tiles, scale = inputs
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.tiles, ctx.scale = tiles, scale
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    q, k, v, out, lse, *plan = ctx.saved_tensors
    do = torch.zeros_like(out) if do is None else do
    gradients = _attention_triton_backward(do, dlse, q, k, v, out, lse, *plan, ctx.tiles, ctx.scale)
    return (*gradients, None, None, None, None, None, None, None)


for _operator in (_attention_triton, _attention_cuda):
    _operator.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("hmar_kernels::attention_hopper", mutates_args=())
def _attention_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_start: torch.Tensor,
    key_end: torch.Tensor,
    forward_jobs: torch.Tensor,
    dq_jobs: torch.Tensor,
    key_jobs: torch.Tensor,
    tiles: list[int],
    scale: float,
    logit_bound: float,
    head_bounds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return hopper.forward(q, k, v, key_start, key_end, forward_jobs, tiles[0], scale, logit_bound, head_bounds)


@_attention_hopper.register_fake
def _(q, k, v, key_start, key_end, forward_jobs, dq_jobs, key_jobs, tiles, scale, logit_bound, head_bounds):
    return triton.empty_rows_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hmar_kernels::attention_hopper_backward", mutates_args=())
def _attention_hopper_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_start: torch.Tensor,
    key_end: torch.Tensor,
    dq_jobs: torch.Tensor,
    key_jobs: torch.Tensor,
    tiles: list[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return hopper.backward(do, dlse, q, k, v, out, lse, key_start, key_end, dq_jobs, key_jobs, tiles[1:], scale)


@_attention_hopper_backward.register_fake
def _(do, dlse, q, k, v, out, lse, key_start, key_end, dq_jobs, key_jobs, tiles, scale):
    return triton.empty_rows_like(q), triton.empty_rows_like(k), triton.empty_rows_like(v)


def _save_for_hopper_backward(ctx, inputs, output):
    q, k, v, key_start, key_end, _, dq_jobs, key_jobs, tiles, scale, _, _ = inputs
    ctx.save_for_backward(q, k, v, *output, key_start, key_end, dq_jobs, key_jobs)
    ctx.tiles, ctx.scale = tiles, scale
    ctx.set_materialize_grads(False)


def _hopper_backward(ctx, do, dlse, backward=_attention_hopper_backward):
    q, k, v, out, lse, *plan = ctx.saved_tensors
    do = torch.zeros_like(out) if do is None else do
    gradients = backward(do, dlse, q, k, v, out, lse, *plan, ctx.tiles, ctx.scale)
    return (*gradients, None, None, None, None, None, None, None, None, None)


_attention_hopper.register_autograd(_hopper_backward, setup_context=_save_for_hopper_backward)


class _HopperAttention(torch.autograd.Function):
    """The same without the operator's dispatch, which takes the host longer than the kernels take at small sizes."""

    @staticmethod
    def forward(ctx, q, k, v, key_start, key_end, forward_jobs, dq_jobs, key_jobs, tiles, scale, bound, head_bounds):
        inputs = (q, k, v, key_start, key_end, forward_jobs, dq_jobs, key_jobs, tiles, scale, bound, head_bounds)
        output = hopper.forward(q, k, v, key_start, key_end, forward_jobs, tiles[0], scale, bound, head_bounds)
        _save_for_hopper_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, do, dlse):
        # Where the gradient is to have one of its own the operator says that there is none.
        seen = torch.is_grad_enabled() or is_traced(*(x for x in (do, dlse) if x is not None))
        return _hopper_backward(ctx, do, dlse, _attention_hopper_backward if seen else _hopper_backward_kernels)


def _hopper_backward_kernels(do, dlse, q, k, v, out, lse, key_start, key_end, dq_jobs, key_jobs, tiles, scale):
    return hopper.backward(do, dlse, q, k, v, out, lse, key_start, key_end, dq_jobs, key_jobs, tiles[1:], scale)


def _attend_hopper(q, k, v, key_start, key_end, forward_jobs, dq_jobs, key_jobs, tiles, scale, bound, head_bounds):
    plan = (key_start, key_end, forward_jobs, dq_jobs, key_jobs, tiles)
    if is_traced(q, k, v):
        return _attention_hopper(q, k, v, *plan, scale, bound, head_bounds)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _HopperAttention.apply(q, k, v, *plan, scale, bound, head_bounds)
    return hopper.forward(q, k, v, key_start, key_end, forward_jobs, tiles[0], scale, bound, head_bounds)
