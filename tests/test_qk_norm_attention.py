"""Attention of a packed projection: the kernel against float64 by the one rule of accuracy, and what it may not see."""

import math

import pytest
import torch

from hmar_kernels import SpanMask, attention, qk_norm, qk_norm_attention
from hmar_kernels.qk_norm_attention import KVCache, choose
from hmar_kernels.qk_norm_attention import triton as kernels
from operator_cases import MAX_LOG_SCALE, assert_within_limits, in_float64, qkv_inputs

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
# images, length, heads, head dim
SHAPES = {
    "one token": (3, 1, 2, 16),
    "odd": (2, 9, 3, 24),
    "full tile": (1, 16, 2, 64),
    "two blocks of queries": (1, 50, 2, 32),
    "several blocks of keys": (1, 150, 2, 32),
    "most keys": (1, 384, 1, 64),
    "wide heads": (1, 100, 1, 128),
}
PUBLISHED = {
    f"{batch} x {side} x {side}, {heads} heads": (batch, side * side, heads, 64)
    for batch, heads in ((2, 16), (32, 16), (2, 30))
    for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 18)
}


def run(inputs, impl, **options):
    return {"out": qk_norm_attention(**inputs, max_log_scale=MAX_LOG_SCALE, impl=impl, **options)}


def assert_accurate(shape, dtype, device="cpu", **options):
    inputs = qkv_inputs(*shape, dtype=dtype, device=device)
    exact = run(in_float64(inputs), "reference")
    assert_within_limits(run(inputs, "triton", **options), exact, run(inputs, "reference"), dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_under_the_interpreter(name, dtype, poisoned_memory):
    assert_accurate(SHAPES[name], dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_reference_is_the_two_operators(name):
    inputs = qkv_inputs(*SHAPES[name], dtype=torch.float64)
    q, k, v = qk_norm(**inputs, max_log_scale=MAX_LOG_SCALE)
    length = q.shape[2]
    expected = attention(q, k, v, SpanMask.block_diagonal([length]), scale=1.0, impl="reference")
    torch.testing.assert_close(run(inputs, "reference")["out"], expected.transpose(1, 2).flatten(2))


# Cached tokens beside a shape.
CACHED = {
    "nothing cached": (0, (2, 3, 2, 16)),
    "one token": (1, (3, 1, 2, 16)),
    "odd": (7, (2, 9, 3, 24)),
    "several blocks": (150, (1, 20, 2, 32)),
    "few of many": (384, (1, 4, 1, 64)),
}
CACHED_SCALES = {
    f"{batch} x {side} x {side} behind {cached}, {heads} heads": (cached, (batch, side * side, heads, 64))
    for batch, heads in ((2, 16), (32, 16), (2, 30))
    for side, cached in ((1, 0), (2, 1), (3, 5), (4, 14), (5, 30), (6, 55), (8, 91), (10, 155), (13, 255), (16, 424))
}


def run_cached(cached, inputs, impl, **options):
    """The last tokens of `inputs` behind the others, whose keys and values are of qk_norm."""
    dtype, spare = inputs["qkv"].dtype, 3
    _, k, v = qk_norm(**inputs, max_log_scale=MAX_LOG_SCALE)
    room = [torch.nn.functional.pad(x, (0, 0, 0, spare)).contiguous() for x in (k, v)]
    for x in room:
        x[:, :, cached:] = float("nan")
    last = inputs | {"qkv": inputs["qkv"][:, cached:].contiguous()}
    cache, before = KVCache(*room, cached), [x[:, :, :cached].clone() for x in room]
    out = qk_norm_attention(**last, max_log_scale=MAX_LOG_SCALE, cache=cache, impl=impl, **options)
    assert out.dtype == dtype and all(x[:, :, -spare:].isnan().all() for x in room), "room behind is not touched"
    assert all(torch.equal(x[:, :, :cached], earlier) for x, earlier in zip(room, before, strict=True))
    return {"out": out, "k": room[0][:, :, cached:-spare], "v": room[1][:, :, cached:-spare]}


def assert_cached_is_accurate(cached, shape, dtype, device="cpu", **options):
    batch, length, heads, head_dim = shape
    inputs = qkv_inputs(batch, cached + length, heads, head_dim, dtype=dtype, device=device)
    exact = run_cached(cached, in_float64(inputs), "reference")
    plain = run_cached(cached, inputs, "reference")
    assert_within_limits(run_cached(cached, inputs, "triton", **options), exact, plain, dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CACHED)
def test_behind_cached_tokens_under_the_interpreter(name, dtype, poisoned_memory):
    assert_cached_is_accurate(*CACHED[name], dtype)


@pytest.mark.parametrize("name", CACHED)
def test_reference_behind_cached_tokens_is_the_end_of_all(name):
    cached, (batch, length, heads, head_dim) = CACHED[name]
    inputs = qkv_inputs(batch, cached + length, heads, head_dim, dtype=torch.float64)
    expected = run(inputs, "reference")["out"][:, cached:]
    _, k, v = qk_norm(**inputs, max_log_scale=MAX_LOG_SCALE)
    actual = run_cached(cached, inputs, "reference")
    for found, wanted in ((actual["out"], expected), (actual["k"], k[:, :, cached:]), (actual["v"], v[:, :, cached:])):
        torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapping"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", CACHED)
def test_behind_cached_tokens_on_a_gpu(name, dtype, overlap, poisoned_memory):
    assert_cached_is_accurate(*CACHED[name], dtype, "cuda", overlap=overlap)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CACHED_SCALES)
def test_published_scales_behind_cached_ones_on_a_gpu(name, poisoned_memory):
    assert_cached_is_accurate(*CACHED_SCALES[name], torch.bfloat16, "cuda", overlap=True)


@interpreted
def test_cache_traced_without_a_graph_break():
    inputs = qkv_inputs(2, 9, 2, 32, dtype=torch.float16)
    k, v = (torch.zeros(2, 2, 20, 32, dtype=torch.float16) for _ in range(2))
    expected = qk_norm_attention(**inputs, cache=KVCache(k.clone(), v.clone(), 4), impl="triton")

    def attend():
        return qk_norm_attention(**inputs, cache=KVCache(k, v, 4), impl="triton")

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(), expected)
    assert k[:, :, 4:13].any() and not k[:, :, 13:].any() and not v[:, :, :4].any()


def assert_tokens_are_apart(device, dtype):
    """A perturbed image leaves the others as they were, to the bit; a query leaves all tokens but its own, a head its
    channels."""
    inputs = qkv_inputs(3, 20, 2, 32, dtype=dtype, device=device)
    before = run(inputs, "triton")["out"]
    inputs["qkv"][1, 4, :32] += 1
    changed = run(inputs, "triton")["out"] != before
    assert changed[1, 4, :32].any() and changed.sum() == changed[1, 4, :32].sum()
    inputs["qkv"][2] += torch.arange(192, device=device)
    after = run(inputs, "triton")["out"]
    assert torch.equal(after[0], before[0]) and not torch.equal(after[2], before[2])


@interpreted
def test_tokens_are_apart():
    assert_tokens_are_apart("cpu", torch.float16)


@interpreted
def test_traced_without_a_graph_break():
    inputs = qkv_inputs(2, 9, 2, 32, dtype=torch.float16)
    compiled = torch.compile(lambda: run(inputs, "triton")["out"], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), run(inputs, "triton")["out"])


@interpreted
def test_large_logits_do_not_overflow():
    """A scale of 100, all logits far below it: keys opposite to the query."""
    inputs = qkv_inputs(1, 5, 1, 16, dtype=torch.float32)
    inputs["qkv"][..., :16], inputs["qkv"][..., 16:32] = 3.0, -2.0
    inputs["q_bias"].zero_()
    inputs["log_scale"].fill_(math.log(100))
    torch.testing.assert_close(run(inputs, "triton"), run(inputs, "reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_on_a_gpu(name, dtype, poisoned_memory):
    assert_accurate(SHAPES[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapping"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_on_a_gpu(name, overlap, poisoned_memory):
    assert_accurate(PUBLISHED[name], torch.bfloat16, "cuda", overlap=overlap)


@pytest.mark.gpu
def test_tokens_are_apart_on_a_gpu():
    assert_tokens_are_apart("cuda", torch.bfloat16)


@pytest.mark.gpu
def test_in_a_graph_and_compiled_on_a_gpu():
    inputs = qkv_inputs(2, 25, 16, 64, dtype=torch.bfloat16, device="cuda")
    expected = run(inputs, "triton")["out"]
    compiled = torch.compile(lambda: run(inputs, "auto")["out"], fullgraph=True)()
    assert torch.equal(run(inputs, "triton", overlap=True)["out"], expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = inputs["qkv"] * 2
        captured = run(inputs | {"qkv": packed / 2}, "triton", overlap=True)["out"]
    graph.replay()
    assert torch.equal(compiled, expected) and torch.equal(captured, expected)


def test_auto_is_the_reference_where_the_kernel_cannot_run():
    inputs = qkv_inputs(1, 385, 1, 16, dtype=torch.float32)
    impl, reason = choose(**inputs)
    assert impl == "reference" and "up to 384 tokens" in reason
    leaves = {name: x.double().requires_grad_() for name, x in qkv_inputs(1, 3, 1, 4, dtype=torch.float64).items()}
    assert torch.autograd.gradcheck(lambda *x: qk_norm_attention(*x), tuple(leaves.values()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.zeros(2, 5, 7)}, r"qkv must be \[B, L, 3 H D\]"),
        ({"q_bias": torch.zeros(3)}, r"q_bias must be \[16\]"),
        ({"impl": "cuda"}, "unknown impl"),
        ({"impl": "triton", "qkv": torch.zeros(1, 385, 48)}, "up to 384 tokens"),
        ({"impl": "triton", "v_bias": torch.zeros(16, requires_grad=True)}, "no derivative"),
        ({"cache": KVCache(torch.zeros(2, 2, 9, 4), torch.zeros(2, 2, 9, 8), 0)}, r"the cache's k must be contiguous"),
        ({"cache": KVCache(torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 8, 8), 0)}, r"the cache's v must be contiguous"),
        ({"cache": KVCache(torch.zeros(2, 2, 9, 8).half(), torch.zeros(2, 2, 9, 8), 0)}, "got torch.float16"),
        ({"cache": KVCache(*torch.zeros(2, 2, 2, 9, 8), 5)}, "there is none for 5 more"),
        ({"cache": KVCache(*[torch.zeros(2, 2, 9, 8)] * 2, 0)}, "the same memory"),
        ({"cache": KVCache(*torch.zeros(2, 2, 2, 9, 8, requires_grad=True), 0)}, "no_grad"),
        ({"cache": KVCache(*torch.zeros(2, 2, 2, 8, 9).mT, 0)}, "contiguous"),
        ({"cache": KVCache(*torch.zeros(2, 2, 2, 9, 8), -1)}, "there is none for 5 more"),
        ({"cache": KVCache(*torch.zeros(2, 2, 2, 9, 8), 0), "q_bias": torch.zeros(16, requires_grad=True)}, "no_grad"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = qkv_inputs(2, 5, 2, 8, dtype=torch.float32) | change
    with pytest.raises(ValueError, match=message):
        qk_norm_attention(**arguments)


def test_tiles_are_of_few_padded_keys():
    for side in range(1, 20):
        tile = kernels.select_tile(side * side, 64)
        padded = -(-side * side // tile.block_l) * tile.block_l
        assert tile.block_q <= tile.block_l and (padded - side * side < 64)
    assert kernels.select_tile(19 * 19, 128).warps == 8
