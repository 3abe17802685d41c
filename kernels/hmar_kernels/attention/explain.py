"""What `attention` does with given inputs, in words: the implementation, its tiles, why the others were not taken."""

from __future__ import annotations

import torch

from ..mask import SpanMask
from . import api, hopper, triton
from .plan import GROUP_ROWS, NUM_GROUP_FIELDS, NUM_JOB_FIELDS, JobPlan, TilePlan, key_plan, query_plan


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SpanMask,
    *,
    logit_bound: float | torch.Tensor | None = None,
    deterministic: bool | None = None,
) -> str:
    """A few lines for people: what impl="auto" takes for these inputs [B, H, L, D] and why, the tiles of each pass with
    the share of their work that attends, and of every other implementation why it was not taken. Launches nothing.

    Raises ValueError where `attention` would.
    """
    api.check_inputs(q, k, v, mask)
    impl, reason = api.choose(q, k, v, mask)
    lines = [
        f'impl="auto" takes {impl}: {reason}',
        f"mask: {mask.num_queries} queries x {mask.num_keys} keys, {mask.num_pairs} pairs attend ({mask.density:.1%})",
        *_tiles(impl, q, mask, api.is_bounded(logit_bound, q), api.is_deterministic(deterministic)),
    ]
    for name in api.IMPLEMENTATIONS:
        if name != impl:
            lines.append(f"{name}: {api.unavailable(name, q, k, v, mask) or 'could run here'}")
    return "\n".join(lines)


def _tiles(impl: str, q: torch.Tensor, mask: SpanMask, bounded: bool, deterministic: bool) -> list[str]:
    if impl == "hopper":
        tiles = hopper.select_tiles(q.shape[-1], mask, bounded, deterministic)
        plans = hopper.make_plans(mask, tiles, "cpu")
        names = {"dkdv": "dk and dv", "backward": "dq, dk and dv"}
        if tiles.backward is not None:
            num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
            one_pass = hopper.one_pass_heads(q.shape, mask.num_keys, plans["backward"].num_jobs, num_sms)[1] > 0
            del plans["dkdv" if one_pass else "backward"]
            if one_pass:
                names["dq"] = "dq of some heads"
        return [
            _line(
                *(names.get(name, name), f"{tile.groups} x {GROUP_ROWS}", tile.cols, plan.num_jobs),
                *(_visited(plan, skips=name != "backward"), mask),
            )
            for name, plan in plans.items()
            for tile in (tiles.passes[name],)
        ]
    if impl == "triton":
        tiles = triton.select_tiles(triton.capability_of(q.device), q.shape[-1], q.dtype, mask)
        passes = {
            "forward": query_plan(mask, tiles.forward.rows, tiles.forward.cols, "cpu"),
            "dq": query_plan(mask, tiles.dq.rows, tiles.dq.cols, "cpu"),
            "dk and dv": key_plan(mask, tiles.dkdv.rows, tiles.dkdv.cols, "cpu"),
        }
        return [
            _line(name, str(plan.block_rows), plan.block_cols, plan.num_tiles, _visited(plan), mask)
            for name, plan in passes.items()
        ]
    return []


def _line(name: str, rows: str, cols: int, count: int, visited: tuple[int, int, int], mask: SpanMask) -> str:
    full, masked, block_pairs = visited
    share = mask.num_pairs / max(1, (full + masked) * block_pairs)
    return (
        f"{name}: {count} tiles of {rows} rows a head, {full} blocks of {cols} columns without a mask and {masked} "
        f"with one; {share:.0%} of their pairs attend"
    )


def _visited(plan: JobPlan | TilePlan, skips: bool = True) -> tuple[int, int, int]:
    """Blocks without a mask, blocks with one, pairs in a block. skips: groups of rows skip blocks they do not see."""
    if isinstance(plan, TilePlan):
        return *plan.block_counts(), plan.block_rows * plan.block_cols
    parts = plan.jobs[:, NUM_JOB_FIELDS : NUM_JOB_FIELDS + NUM_GROUP_FIELDS * plan.groups]
    begin, end, full_begin, full_end = parts.unflatten(1, (plan.groups, NUM_GROUP_FIELDS))[..., 2:].unbind(-1)
    full = int((full_end - full_begin).sum())
    visited = int((end - begin).sum()) if skips else plan.groups * plan.num_blocks
    return full, visited - full, GROUP_ROWS * plan.block_cols
