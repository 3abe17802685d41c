"""SpanMask against dense matrices written out by hand."""

import copy
import pickle

import pytest
import torch

from attention_cases import PYRAMIDS, pyramid_mask, small_masks
from hmar_kernels import SpanMask

SIZES = [1, 4, 9, 16]


def scale_of_token(sizes):
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def test_block_diagonal_is_same_scale():
    scale = scale_of_token(SIZES)
    assert torch.equal(SpanMask.block_diagonal(SIZES).to_dense(), scale[:, None] == scale[None, :])


def test_block_causal_is_earlier_or_same_scale():
    scale = scale_of_token(SIZES)
    assert torch.equal(SpanMask.block_causal(SIZES).to_dense(), scale[:, None] >= scale[None, :])


@pytest.mark.parametrize("num_scales", [1, 2, 3, 4, 9])
def test_window_is_the_last_scales(num_scales):
    distance = scale_of_token(SIZES)[:, None] - scale_of_token(SIZES)[None, :]
    expected = (distance >= 0) & (distance < num_scales)
    assert torch.equal(SpanMask.window(SIZES, num_scales).to_dense(), expected)


def test_causal_and_full():
    assert torch.equal(SpanMask.causal(7).to_dense(), torch.ones(7, 7).tril().bool())
    assert SpanMask.full(3, 5).to_dense().all()


@pytest.mark.parametrize(
    ("resolution", "length", "diagonal", "causal"),
    [(256, 680, 110_468, 286_434), (512, 2240, 1_522_100, 3_269_850), (1024, 9451, 24_587_383, 56_954_392)],
)
def test_pair_counts_of_the_published_pyramids(resolution, length, diagonal, causal):
    assert sum(n * n for n in PYRAMIDS[resolution]) == length
    assert pyramid_mask("block_diagonal", resolution).num_pairs == diagonal
    assert pyramid_mask("block_causal", resolution).num_pairs == causal


@pytest.mark.parametrize("name", small_masks())
def test_intervals_transpose_and_density_agree_with_dense(name):
    mask = small_masks()[name]
    dense = mask.to_dense()
    assert mask.num_pairs == dense.sum()
    assert mask.density == pytest.approx(dense.float().mean().item())
    exact = True
    for j in range(mask.num_keys):
        queries = dense[:, j].nonzero().flatten().tolist()
        hull = (queries[0], queries[-1] + 1) if queries else (0, 0)
        assert (int(mask.query_start[j]), int(mask.query_end[j])) == hull
        exact &= len(queries) == hull[1] - hull[0]
    assert mask.has_exact_transpose == exact


def test_random_intervals_have_an_inexact_transpose():
    assert not small_masks()["random_intervals"].has_exact_transpose


def test_cu_seqlens_only_for_disjoint_blocks():
    queries, keys = SpanMask.block_diagonal(SIZES).cu_seqlens()
    assert queries.tolist() == keys.tolist() == [0, 1, 5, 14, 30]
    assert queries.dtype == torch.int32
    assert SpanMask.block_causal(SIZES).cu_seqlens() is None
    assert SpanMask.causal(5).cu_seqlens() is None
    assert [x.tolist() for x in SpanMask.full(3, 5).cu_seqlens()] == [[0, 3], [0, 5]]
    assert SpanMask.from_intervals([0, 0], [2, 2], num_keys=3).cu_seqlens() is None


@pytest.mark.parametrize("name", ["block_causal", "random_intervals"])
def test_flex_form_has_the_same_pairs(name):
    mask = small_masks()[name]
    flex = mask.to_flex("cpu")
    q, kv = torch.meshgrid(torch.arange(mask.num_queries), torch.arange(mask.num_keys), indexing="ij")
    assert torch.equal(flex.mask_mod(0, 0, q, kv), mask.to_dense())
    assert flex.seq_lengths == (mask.num_queries, mask.num_keys)
    assert mask.to_flex("cpu") is flex


def test_masks_compare_by_content_and_survive_copies():
    a, b = SpanMask.block_diagonal(SIZES), SpanMask.window(SIZES, 1)
    assert a == b and hash(a) == hash(b) and a != SpanMask.block_causal(SIZES)
    a.to_flex("cpu")
    assert pickle.loads(pickle.dumps(a)) == a
    assert copy.deepcopy(a) == a


def test_draw_covers_the_attending_pairs():
    import matplotlib.pyplot as plt

    mask = SpanMask.block_causal(SIZES)
    ax = mask.draw()
    area = sum(path.get_extents().width * path.get_extents().height for path in ax.collections[0].get_paths())
    plt.close(ax.figure)
    assert area == pytest.approx(mask.num_pairs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanMask.block_diagonal([1, 0, 4]), "positive"),
        (lambda: SpanMask.block_diagonal([]), "non-empty"),
        (lambda: SpanMask.block_causal([1.5, 2.0]), "integers"),
        (lambda: SpanMask.window([1, 4], 0), "at least 1 scale"),
        (lambda: SpanMask.causal(0), "at least 1"),
        (lambda: SpanMask.from_intervals([0], [0]), "num_keys must be at least 1"),
        (lambda: SpanMask.from_intervals([0, 1], [1]), "2 entries and key_end 1"),
        (lambda: SpanMask.from_intervals([0, 3], [1, 2]), r"query 1 has the key interval \[3, 2\)"),
        (lambda: SpanMask.from_intervals([0], [9], num_keys=8), "<= 8"),
        (lambda: SpanMask.from_intervals([-1], [1]), "expected 0 <= start"),
    ],
)
def test_bad_masks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
