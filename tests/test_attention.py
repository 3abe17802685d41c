"""The attention operator on the CPU: the reference, the Triton kernels under the interpreter, plans, refusals."""

import math
import re
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from attention_cases import assert_accurate, assert_exact_support, draw_inputs, pyramid_mask, run, small_masks
from hmar_kernels import SpanMask, attention, choose, explain
from hmar_kernels.attention import api, hopper
from hmar_kernels.attention import triton as triton_attention
from hmar_kernels.attention.plan import (
    COL_BEGIN,
    COL_END,
    FULL_BEGIN,
    FULL_END,
    ROW_BEGIN,
    ROW_END,
    key_jobs,
    key_plan,
    query_plan,
)

explain_module = import_module("hmar_kernels.attention.explain")  # the package has a function of that name

MASKS = small_masks()
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_attention_gpu.py runs the kernels")


@pytest.mark.parametrize("name", MASKS)
def test_reference_equals_dense_softmax(name):
    mask = MASKS[name]
    q, k, v, do, _ = draw_inputs(mask, 2, 3, 16, torch.float64, "cpu")
    out, lse, dq, dk, dv = run(q, k, v, do, do[..., 0], mask, "reference", with_lse=False)
    sighted = mask.key_end > mask.key_start
    q_, k_, v_ = (x.detach().requires_grad_() for x in (q[:, :, sighted], k, v))
    expected = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask.to_dense()[sighted])
    grads = torch.autograd.grad(expected, (q_, k_, v_), do[:, :, sighted])
    torch.testing.assert_close(out[:, :, sighted], expected)
    for actual, grad in zip((dq[:, :, sighted], dk, dv), grads, strict=True):
        torch.testing.assert_close(actual, grad)
    assert not out[:, :, ~sighted].any() and not dq[:, :, ~sighted].any()
    assert (lse[:, :, ~sighted] == float("-inf")).all()


@pytest.mark.parametrize("name", ["window2", "blind_queries"])
def test_reference_gradients_against_finite_differences(name):
    mask = SpanMask.window([1, 3, 4], 2) if name == "window2" else SpanMask.from_intervals([0, 0, 2], [3, 0, 4])
    q, k, v, _, _ = draw_inputs(mask, 1, 2, 16, torch.float64, "cpu")
    sighted = mask.key_end > mask.key_start

    def f(q, k, v):
        out, lse = attention(q, k, v, mask, impl="reference", return_lse=True)
        return out, lse[:, :, sighted]

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in (q, k, v)])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", MASKS)
def test_triton_kernels_under_the_interpreter(name, dtype, poisoned_memory):
    assert_accurate(draw_inputs(MASKS[name], 1, 2, 32, dtype, "cpu"), MASKS[name], "triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", MASKS)
def test_triton_sees_exactly_the_pairs_of_the_mask(name, dtype):
    assert_exact_support(MASKS[name], "triton", 32, dtype, "cpu")


@interpreted
@pytest.mark.parametrize("change", ["one key less", "one key more"])
def test_the_check_of_pairs_finds_one_wrong_key(change, monkeypatch):
    mask = SpanMask.block_causal([1, 4, 9, 16])
    end = mask.key_end.clone()
    end[13] += 1 if change == "one key more" else -1
    wrong = SpanMask.from_intervals(mask.key_start, end, num_keys=30)
    forward = api.reference.forward
    monkeypatch.setattr(api.reference, "forward", lambda q, k, v, mask, scale: forward(q, k, v, wrong, scale))
    with pytest.raises(AssertionError):
        assert_exact_support(mask, "reference", 32, torch.float16, "cpu")


@interpreted
@pytest.mark.parametrize("head_dim", [16, 24, 80, 128])
def test_triton_head_dims(head_dim, poisoned_memory):
    mask = SpanMask.block_causal([1, 4, 9])
    assert_accurate(draw_inputs(mask, 1, 1, head_dim, torch.float32, "cpu"), mask, "triton")


@interpreted
def test_triton_with_packed_qkv_and_multi_block_spans(poisoned_memory, monkeypatch):
    tile = triton_attention.Tile(16, 16, 4, 1)
    monkeypatch.setattr(triton_attention, "FLOAT32_TILES", triton_attention.Tiles(tile, tile, tile))
    mask = SpanMask.window([1, 4, 9, 25, 49], 2)
    inputs = draw_inputs(mask, 2, 2, 16, torch.float32, "cpu", packed=True)
    assert not inputs[0].is_contiguous()
    assert_accurate(inputs, mask, "triton")


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_block_diagonal_is_local_to_a_scale(impl):
    """What happens in one scale leaves all other scales' outputs and gradients unchanged to the bit."""
    sizes, touched = [1, 4, 9, 16, 25], slice(5, 14)
    mask = SpanMask.block_diagonal(sizes)
    q, k, v, do, dlse = draw_inputs(mask, 1, 2, 16, torch.float32, "cpu")
    before = run(q, k, v, do, dlse, mask, impl)
    for x in (q, k, v):
        x[:, :, touched] += 1.0
    after = run(q, k, v, do, dlse, mask, impl)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :5], b[:, :, :5]) and torch.equal(a[:, :, 14:], b[:, :, 14:])
        assert not torch.equal(a[:, :, touched], b[:, :, touched])


def test_output_merges_heads_as_a_view():
    mask = SpanMask.causal(5)
    q, k, v, _, _ = draw_inputs(mask, 2, 3, 16, torch.float32, "cpu")
    assert attention(q, k, v, mask).transpose(1, 2).is_contiguous()


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_without_graph_breaks_and_sees_a_changed_mask(impl):
    torch._dynamo.reset()
    sizes = [1, 4, 9]
    q, k, v, _, _ = draw_inputs(SpanMask.causal(14), 1, 2, 16, torch.float32, "cpu")
    q.requires_grad_()

    def f(q, mask):
        return attention(q, k, v, mask, impl=impl).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for mask in (SpanMask.block_diagonal(sizes), SpanMask.block_causal(sizes), SpanMask.block_diagonal(sizes)):
        expected, actual = f(q, mask), compiled(q, mask)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, q), torch.autograd.grad(expected, q))


@interpreted
def test_compiles_with_dynamic_shapes():
    torch._dynamo.reset()

    def f(q, k, v, mask):
        return attention(q, k, v, mask, impl="triton").square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, head_dim, length in ((1, 16, 14), (2, 16, 20), (3, 32, 14)):
        mask = SpanMask.causal(length)
        q, k, v, _, _ = draw_inputs(mask, batch, 2, head_dim, torch.float32, "cpu")
        torch.testing.assert_close(compiled(q, k, v, mask), f(q, k, v, mask))


@interpreted
def test_expanded_inputs_and_gradients_of_stride_zero():
    mask = SpanMask.window([1, 4, 9], 2)
    q, k, v, _, _ = draw_inputs(mask, 1, 1, 16, torch.float32, "cpu")
    k, v = k.expand(2, 3, -1, -1), v.expand(2, 3, -1, -1)
    grads = []
    for impl in ("reference", "triton"):
        leaf = q.repeat(2, 3, 1, 1).requires_grad_()
        out = attention(leaf, k, v, mask, impl=impl)
        grads.append((out, *torch.autograd.grad(out.sum(), leaf)))
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-5)


def test_flex_compiles_every_shape_for_itself(monkeypatch):
    """A shared compiled function would stop compiling after eight shapes and run dense instead."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    real = torch.compile
    monkeypatch.setattr(api.flex.torch, "compile", lambda f, **options: real(f, backend=backend, **options))
    for length in range(16, 28):
        mask = SpanMask.causal(length)
        q, k, v, _, _ = draw_inputs(mask, 1, 1, 16, torch.float32, "cpu")
        for _ in range(2):
            out, lse = api.flex.forward(q, k, v, mask, 0.25)
        expected = api.reference.forward(q, k, v, mask, 0.25)
        torch.testing.assert_close((out, lse), expected, atol=1e-5, rtol=1e-5)
    assert len(compiled) == 12


@interpreted
def test_custom_op_passes_opcheck():
    mask = SpanMask.window([1, 4, 9], 2)
    q, k, v, _, _ = draw_inputs(mask, 1, 2, 16, torch.float32, "cpu")
    tensors, tiles = api._plan_arguments("triton", mask, q.device, 16, q.dtype)
    arguments = (*(x.requires_grad_() for x in (q, k, v)), *tensors, tiles, 0.3)
    torch.library.opcheck(api._attention_triton, arguments)


@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("block_cols", [16, 32])
@pytest.mark.parametrize("make_plan", [query_plan, key_plan])
@pytest.mark.parametrize("name", MASKS)
def test_plans_visit_every_pair_once_and_mask_what_they_must(name, make_plan, block_rows, block_cols):
    mask = MASKS[name]
    dense = mask.to_dense() if make_plan is query_plan else mask.to_dense().T
    visits = torch.zeros(dense.shape, dtype=torch.int64)
    rows_owned = torch.zeros(len(dense), dtype=torch.int64)
    plan = make_plan(mask, block_rows, block_cols, "cpu")
    for tile in plan.tiles.tolist():
        rows, full = slice(tile[ROW_BEGIN], tile[ROW_END]), slice(tile[FULL_BEGIN], tile[FULL_END])
        assert 0 < tile[ROW_END] - tile[ROW_BEGIN] <= block_rows
        assert tile[COL_BEGIN] <= tile[FULL_BEGIN] <= tile[FULL_END] <= tile[COL_END]
        assert (tile[FULL_BEGIN] - tile[COL_BEGIN]) % block_cols == 0
        assert (tile[FULL_END] - tile[FULL_BEGIN]) % block_cols == 0
        assert dense[rows, full].all()
        visits[rows, tile[COL_BEGIN] : tile[COL_END]] += 1
        rows_owned[rows] += 1
    assert (rows_owned == 1).all()
    assert (visits <= 1).all() and (visits[dense] == 1).all()


def test_longest_tiles_come_first():
    tiles = query_plan(pyramid_mask("block_causal", 512), 64, 64, "cpu").tiles
    spans = tiles[:, COL_END] - tiles[:, COL_BEGIN]
    assert (spans[:20] >= spans[-10:].max()).all() and spans[0] == 2240


def test_plan_wastes_little_of_the_matrix_work():
    """Useful pairs over computed ones: 64x64 tiles at even distances reach 0.75 at 256 px."""
    for resolution, least in ((256, 0.84), (512, 0.96), (1024, 0.99)):
        mask = pyramid_mask("block_diagonal", resolution)
        assert mask.num_pairs / (sum(query_plan(mask, 64, 64, "cpu").block_counts()) * 64 * 64) > least


def test_auto_takes_the_reference_on_cpu_and_says_so():
    mask = SpanMask.causal(5)
    q, k, v, _, _ = draw_inputs(mask, 1, 1, 16, torch.float32, "cpu")
    assert choose(q, k, v, mask) == ("reference", "the plain implementation serves CPU tensors and float64")


def test_bad_arguments_are_refused_with_a_reason():
    mask = SpanMask.causal(5)
    q, k, v, _, _ = draw_inputs(mask, 2, 3, 16, torch.float32, "cpu")
    for arguments, options, message in [
        ((q[..., :0], k[..., :0], v[..., :0], mask), {}, "head dim is 0"),
        ((q[0], k, v, mask), {}, r"must be \[B, H, L, D\]"),
        ((q, k[:, :2], v, mask), {}, r"must both be \[2, 3, Lk, 16\]"),
        ((q, k[:, :, :4], v[:, :, :4], mask), {}, "5 queries and 5 keys, but q has 5 and k has 4"),
        ((q, k.double(), v, mask), {}, "share one dtype"),
        ((q.long(), k.long(), v.long(), mask), {}, "share one dtype"),
        ((q, k.to("meta"), v, mask), {}, "one device"),
        ((q, k, v, mask.to_dense()), {}, "must be a SpanMask, got Tensor"),
        ((None, k, v, mask), {}, r"q must be a tensor \[B, H, L, D\], got NoneType"),
        ((q, k, v.tolist(), mask), {}, r"v must be a tensor \[B, H, L, D\], got list"),
        ((q, k, v, mask), {"scale": -1.0}, "positive and finite"),
        ((q, k, v, mask), {"scale": "x"}, "scale must be a number, got 'x'"),
        ((q, k, v, mask), {"logit_bound": "a"}, "logit_bound must be a number, got 'a'"),
        ((q, k, v, mask), {"impl": "fast"}, 'unknown impl "fast"'),
        ((q, k, v, mask), {"impl": "varlen"}, "not block-diagonal"),
        ((q, k, v, mask), {"impl": "flex"}, "needs a CUDA device"),
        ((q, k, v, mask), {"impl": "cuda"}, "cannot run here: (the extension|the CUDA kernels)"),
        ((q, k, v, mask), {"impl": "hopper"}, "cannot run here: (the extension|the CUDA kernels)"),
        ((q, k, v, mask), {"logit_bound": -1.0}, "must be a number from 0, or None"),
        ((q, k, v, mask), {"logit_bound": math.nan}, "must be a number from 0, or None"),
        ((q, k, v, mask), {"logit_bound": torch.ones(2)}, r"must be float32 \[3\] on cpu"),
        ((q, k, v, mask), {"logit_bound": torch.ones(3).double()}, r"must be float32 \[3\] on cpu"),
        ((q.double(), k.double(), v.double(), mask), {"impl": "triton"}, "not torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(*arguments, **options)


def test_explain_names_the_choice_and_what_speaks_against_the_others():
    mask = pyramid_mask("block_diagonal", 256)
    q, k, v, *_ = draw_inputs(mask, 1, 2, 64, torch.float32, "cpu")
    chosen, size, *others = explain(q, k, v, mask).splitlines()
    assert chosen == f'impl="auto" takes reference: {choose(q, k, v, mask)[1]}'
    assert size == "mask: 680 queries x 680 keys, 110468 pairs attend (23.9%)"
    assert [line.split(":")[0] for line in others] == ["triton", "cuda", "hopper", "flex", "varlen"]
    assert "needs a CUDA device" in others[3]
    with pytest.raises(ValueError, match="the mask is for 680 queries"):
        explain(q[:, :, 1:], k, v, mask)


@pytest.fixture
def of_an_h100(monkeypatch):
    """Passes for CPU tensors are those for tensors of an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("name", "resolution", "passes"),
    [
        ("hopper", 512, ["forward", "dq", "dk and dv"]),
        ("hopper", 1024, ["forward", "dq of some heads", "dq, dk and dv"]),
        ("triton", 512, ["forward", "dq", "dk and dv"]),
    ],
)
def test_explained_tiles_cover_the_mask(name, resolution, passes, head_dim, bounded, of_an_h100):
    """On a GPU the lines of explain are these; the blocks they count hold every pair that attends."""
    mask = pyramid_mask("block_causal", resolution)
    q = torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16).expand(1, 12, mask.num_queries, -1)
    lines = explain_module._tiles(name, q, mask, bounded, False)
    assert [line.split(":")[0] for line in lines] == passes
    for line in lines:
        full, masked = map(int, re.search(r"(\d+) blocks of \d+ columns without a mask and (\d+) with", line).groups())
        share = int(re.search(r"(\d+)% of their pairs", line)[1])
        assert full > masked > 0 and 85 <= share <= 100


def test_explained_passes_are_those_that_run(of_an_h100):
    """Two passes when determinism is asked for or heads are few; in one pass groups skip no block."""
    mask = pyramid_mask("block_causal", 1024)
    q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16).expand(1, 12, mask.num_queries, -1)
    for x, deterministic in ((q, True), (q[:, :7], False)):
        names = [line.split(":")[0] for line in explain_module._tiles("hopper", x, mask, False, deterministic)]
        assert names == ["forward", "dq", "dk and dv"]
    line = explain_module._tiles("hopper", q, mask, False, False)[-1]
    full, masked = map(int, re.search(r"(\d+) blocks of 64 columns without a mask and (\d+) with", line).groups())
    jobs = key_jobs(mask, 2, 64, "cpu").jobs
    assert line.startswith("dq, dk and dv") and full + masked == 2 * int(jobs[:, 1].sum())


@interpreted
@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_every_implementation_takes_deterministic(impl):
    mask = SpanMask.window([1, 4, 9], 2)
    inputs = draw_inputs(mask, 1, 2, 16, torch.float32, "cpu")
    expected = run(*inputs, mask, impl)
    for deterministic in (False, True):
        for a, b in zip(run(*inputs, mask, impl, deterministic=deterministic), expected, strict=True):
            assert torch.equal(a, b)
    for other in ("cuda", "hopper", "flex", "varlen"):
        with pytest.raises(ValueError, match=f'impl="{other}" cannot run here'):
            attention(*inputs[:3], mask, impl=other, deterministic=True)


def test_slots_of_the_backward_in_one_pass():
    """Room for some heads, for at most all; for more of them where a head has fewer jobs or there are more SMs."""
    for num_jobs in (1, 8, 74, 10_000):
        assert hopper.num_slots(num_jobs, 1, 132) == 1
        for num_heads in (2, 7, 512):
            assert 1 <= hopper.num_slots(num_jobs, num_heads, 132) <= num_heads
    by_jobs = [hopper.num_slots(num_jobs, 100_000, 132) for num_jobs in (1, 4, 16, 64, 256)]
    assert all(more > fewer for more, fewer in pairwise(by_jobs))
    assert hopper.num_slots(16, 100_000, 66) < hopper.num_slots(16, 100_000, 132)
    assert hopper.num_slots(74, 512, 132) * 74 > 132, "not even a job for every SM"


def test_heads_in_whose_gradients_others_have_their_sums():
    """Where they are few among all, of one image, and as long as what they hold; with room for every slot."""
    for slots in (1, 2, 5, 6, 21):
        last = hopper.num_last_heads(slots, 4, 96, 700, 700)
        most = 3 if slots <= 6 else 2
        assert slots / most <= last < slots / most + 1
    assert hopper.num_last_heads(6, 4, 12, 9451, 9451) == 2, "1024 px, head dim 128"
    assert hopper.num_last_heads(6, 1, 24, 9451, 9451) == 2, "1024 px, head dim 64, one image"
    assert hopper.num_last_heads(19, 4, 24, 2240, 2240) == 10, "512 px, head dim 64"
    assert hopper.num_last_heads(6, 1, 12, 9451, 9451) == 2, "1024 px, head dim 128, one image"
    assert hopper.num_last_heads(19, 1, 24, 2240, 2240) == 0, "ten of 24 heads"
    assert hopper.num_last_heads(9, 96, 2, 700, 700) == 0, "of two images"
    assert hopper.num_last_heads(6, 4, 96, 701, 700) == 0, "fewer keys"


def test_heads_whose_jobs_alternate():
    """Jobs for every block, whatever their number, of heads that there are."""
    for num_jobs, num_blocks in ((1, 132), (7, 264), (76, 132), (10_000, 132)):
        tail = hopper.tail_heads(num_jobs, 100_000, num_blocks)
        assert tail * num_jobs >= hopper.TAIL_JOBS * num_blocks > (tail - 1) * num_jobs
        assert hopper.tail_heads(num_jobs, 100_000, num_blocks, 1) <= tail
        assert [hopper.tail_heads(num_jobs, heads, num_blocks) for heads in (1, 2)] == [1, min(2, tail)]


def test_head_dim_out_of_range_is_refused_by_triton():
    mask = SpanMask.causal(5)
    for head_dim in (8, 136):
        q, k, v, _, _ = draw_inputs(mask, 1, 1, head_dim, torch.float32, "cpu")
        with pytest.raises(ValueError, match=f"head dims 16 to 128, not {head_dim}"):
            attention(q, k, v, mask, impl="triton")
