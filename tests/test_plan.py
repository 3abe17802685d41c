"""Jobs of the Hopper kernels, walked on the host as the kernels walk them (csrc/hopper_tile.cuh, GroupJob).

Plans of tiles (`query_plan`, `key_plan`) are tested in test_attention.py with the kernels that read them.
"""

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from attention_cases import pyramid_mask, small_masks
from hmar_kernels import SpanMask
from hmar_kernels.attention import hopper
from hmar_kernels.attention.plan import GROUP_ROWS, MASKED_BLOCK, key_jobs, query_jobs

MASKS = {
    **small_masks(),
    "long_and_short": SpanMask.block_causal([1, 200, 3, 130, 64, 2]),
    "blind_block": SpanMask.from_intervals([0] * 70 + [0] * 130 + [9] * 50, [40] * 70 + [0] * 130 + [300] * 50, 310),
    "causal_300": SpanMask.causal(300),  # more runs than the planner keeps boundaries for
    **{f"{pattern}_256": pyramid_mask(pattern, 256) for pattern in ("block_diagonal", "block_causal")},
    **{f"{pattern}_512": pyramid_mask(pattern, 512) for pattern in ("block_diagonal", "block_causal")},
}
COLUMN_BEGIN, NUM_BLOCKS, FIELDS_OF_GROUPS, FIELDS_OF_GROUP = 0, 1, 2, 6


def groups_of(job, groups):
    fields = FIELDS_OF_GROUPS + FIELDS_OF_GROUP * groups
    assert len(job) == -(-fields // 4) * 4 and not any(job[fields:])
    return [job[i : i + FIELDS_OF_GROUP] for i in range(FIELDS_OF_GROUPS, fields, FIELDS_OF_GROUP)]


def walk(jobs, groups, block_cols, seen):
    """What the kernels add up for each row: bool [rows, columns]. `seen`: the mask, rows first."""
    num_rows, num_cols = seen.shape
    added = np.zeros(seen.shape, bool)
    owners = np.zeros(num_rows, int)
    for job in jobs:
        for row_begin, row_end, begin, end, full_begin, full_end in groups_of(job, groups):
            assert 0 <= row_begin < num_rows and row_begin <= row_end <= min(row_begin + GROUP_ROWS, num_rows)
            assert 0 <= begin <= end <= job[NUM_BLOCKS]
            owners[row_begin:row_end] += 1
            for block in range(begin, end):
                first = job[COLUMN_BEGIN] + block * block_cols
                rows, cols = slice(row_begin, row_end), slice(first, first + block_cols)
                assert not added[rows, cols].any(), "a block comes twice"
                if full_begin <= block < full_end:
                    assert first + block_cols <= num_cols, "columns that do not exist would be counted"
                    added[rows, cols] = True
                else:
                    added[rows, cols] = seen[rows, cols]
    assert (owners == 1).all(), "every row belongs to one warpgroup"
    return added


def assert_jobs_are_right(mask, make_jobs, groups, block_cols):
    seen = mask.to_dense().numpy()
    seen = seen if make_jobs is query_jobs else seen.T
    plan = make_jobs(mask, groups, block_cols, "cpu")
    assert plan.jobs.dtype == torch.int32 and plan.jobs.is_contiguous()
    assert (plan.num_jobs, plan.groups, plan.block_cols) == (len(plan.jobs), groups, block_cols)
    jobs = plan.jobs.tolist()
    assert np.array_equal(walk(jobs, groups, block_cols, seen), seen)

    work = []
    for job in jobs:
        parts = groups_of(job, groups)
        # Fetched is what some row sees, from its first column to its last, in whole blocks.
        rows = np.concatenate([np.arange(part[0], part[1]) for part in parts])
        columns = np.flatnonzero(seen[rows].any(0))
        begin, end = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
        assert job[COLUMN_BEGIN] == begin and job[NUM_BLOCKS] == -(-(end - begin) // block_cols)
        for row_begin, row_end, first, last, full_begin, full_end in parts:
            columns = np.flatnonzero(seen[row_begin:row_end].any(0)) - begin
            visited = (columns[0] // block_cols, columns[-1] // block_cols + 1) if len(columns) else (0, 0)
            assert (first, last) == visited
            assert full_begin == full_end or first <= full_begin < full_end <= last
        owned = [part for part in parts if part[1] > part[0]]
        full = min(part[5] for part in owned) - max(part[4] for part in owned)
        full = max(full, 0)
        work.append(full + MASKED_BLOCK * (job[NUM_BLOCKS] - full))
    assert all(longer >= shorter for longer, shorter in pairwise(work))


@pytest.mark.parametrize("block_cols", [64, 128])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("make_jobs", [query_jobs, key_jobs])
@pytest.mark.parametrize("name", MASKS)
def test_jobs_add_up_exactly_the_mask(name, make_jobs, groups, block_cols):
    assert_jobs_are_right(MASKS[name], make_jobs, groups, block_cols)


@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
def test_jobs_of_the_kernels_chosen_at_1024(pattern, head_dim):
    mask = pyramid_mask(pattern, 1024)
    make_jobs = {"forward": query_jobs, "dq": query_jobs, "dkdv": key_jobs, "backward": key_jobs}
    shapes = set()
    for bounded, deterministic in product((False, True), repeat=2):
        tiles = hopper.select_tiles(head_dim, mask, bounded, deterministic)
        plans = hopper.make_plans(mask, tiles, "cpu")
        assert plans.keys() == tiles.passes.keys()
        for name, tile in tiles.passes.items():
            shape = make_jobs[name], tile.groups, tile.cols
            assert plans[name] is shape[0](mask, *shape[1:], "cpu")
            shapes.add(shape)
    for shape in shapes:
        assert_jobs_are_right(mask, *shape)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
def test_one_pass_is_for_long_spans_that_need_not_be_deterministic(head_dim, bounded):
    two_passes = {"forward", "dq", "dkdv"}
    either = two_passes | {"backward"}
    for resolution, passes in ((256, two_passes), (512, either if head_dim == 64 else two_passes), (1024, either)):
        mask = pyramid_mask("block_causal", resolution)
        assert hopper.select_tiles(head_dim, mask, bounded).passes.keys() == passes
        deterministic = hopper.select_tiles(head_dim, mask, bounded, deterministic=True)
        assert deterministic.passes.keys() == two_passes
        assert deterministic.forward == hopper.select_tiles(head_dim, mask, bounded).forward


def test_either_backward_takes_the_same_jobs():
    """Which of them runs is known when the heads are counted, after the plan has been made."""
    either = [tiles for tiles in hopper.TILES.values() if tiles.backward is not None]
    assert either
    for tiles in either:
        assert (tiles.backward.groups, tiles.backward.cols) == (tiles.dkdv.groups, tiles.dkdv.cols)


def test_full_blocks_of_pyramids_need_no_mask():
    """Work without a mask is the bulk where spans are long: else the planner would be right but useless."""
    for resolution, least in ((256, 0.35), (512, 0.75), (1024, 0.9)):
        jobs = query_jobs(pyramid_mask("block_causal", resolution), 2, 64, "cpu").jobs.tolist()
        parts = [part for job in jobs for part in groups_of(job, 2)]
        visited, full = sum(p[3] - p[2] for p in parts), sum(p[5] - p[4] for p in parts)
        assert full / visited > least, (resolution, full / visited)


@pytest.mark.parametrize("field", ["full_end", "block_begin", "block_end", "row_end"])
def test_the_walk_finds_a_wrong_field(field):
    """What the checks above rest on: one number off by one is found."""
    mask = MASKS["block_causal_256"]
    seen = mask.to_dense().numpy()
    jobs = query_jobs(mask, 2, 64, "cpu").jobs.tolist()
    group = next(i for i in (FIELDS_OF_GROUPS, FIELDS_OF_GROUPS + FIELDS_OF_GROUP) if jobs[0][i + 5] > jobs[0][i + 4])
    offset, step = {"row_end": (1, -1), "block_begin": (2, 1), "block_end": (3, -1), "full_end": (5, 1)}[field]
    jobs[0][group + offset] += step
    try:
        found = not np.array_equal(walk(jobs, 2, 64, seen), seen)
    except AssertionError:
        found = True
    assert found
