"""The attention implementations on a GPU: every one against float64, on the published pyramids and on odd masks."""

from dataclasses import replace

import pytest
import torch

from attention_cases import (
    assert_accurate,
    assert_exact_support,
    assert_within_limits,
    draw_inputs,
    oracles,
    pyramid_mask,
    run,
    small_masks,
)
from hmar_kernels import IMPLEMENTATIONS, SpanMask, attention, choose, unavailable
from hmar_kernels.attention import api, hopper

pytestmark = pytest.mark.gpu

MASKS = small_masks()
OURS = ["triton", "cuda", "hopper"]
FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def skip_unless_available(impl, inputs, mask):
    reason = unavailable(impl, *inputs[:3], mask)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
@pytest.mark.parametrize("impl", FAST)
def test_published_pyramids(impl, pattern, resolution, dtype, poisoned_memory):
    mask = pyramid_mask(pattern, resolution)
    batch, heads = {256: (2, 3), 512: (1, 2), 1024: (1, 1)}[resolution]
    inputs = draw_inputs(mask, batch, heads, 64, DTYPES[dtype], "cuda")
    skip_unless_available(impl, inputs, mask)
    # NOTE: variable-length FlashAttention has no gradient of lse.
    assert_accurate(inputs, mask, impl, with_lse=impl != "varlen")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
@pytest.mark.parametrize("impl", OURS)
def test_sees_exactly_the_pairs_of_the_mask(impl, pattern, resolution, head_dim, dtype):
    mask = pyramid_mask(pattern, resolution)
    skip_unless_available(impl, draw_inputs(mask, 1, 1, head_dim, DTYPES[dtype], "cuda"), mask)
    assert_exact_support(mask, impl, head_dim, DTYPES[dtype], "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", OURS)
def test_tensors_on_a_gpu_that_is_not_the_current_one(impl):
    mask = pyramid_mask("block_causal", 256)
    inputs = draw_inputs(mask, 1, 2, 64, torch.bfloat16, "cuda:1")
    skip_unless_available(impl, inputs, mask)
    assert torch.cuda.current_device() == 0
    assert_accurate(inputs, mask, impl)


@pytest.mark.parametrize("impl", OURS)
def test_custom_op_passes_opcheck(impl):
    mask = pyramid_mask("block_causal", 256)
    q, k, v, *_ = draw_inputs(mask, 1, 2, 64, torch.bfloat16, "cuda")
    skip_unless_available(impl, (q, k, v), mask)
    if impl == "hopper":
        bounds = torch.full((2,), 40.0, device="cuda")
        jobs = api._job_arguments(mask, q.device, 64, True, True)
        operator, rest = api._attention_hopper, (*jobs, 0.3, torch.inf, bounds)
    else:
        operator = {"triton": api._attention_triton, "cuda": api._attention_cuda}[impl]
        rest = (*api._plan_arguments(impl, mask, q.device, 64, q.dtype), 0.3)
    tensors, *numbers = rest
    torch.library.opcheck(operator, (*(x.requires_grad_() for x in (q, k, v)), *tensors, *numbers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 96, 128])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("impl", OURS)
def test_odd_masks_and_head_dims(impl, name, head_dim, dtype, poisoned_memory):
    inputs = draw_inputs(MASKS[name], 2, 3, head_dim, DTYPES[dtype], "cuda")
    skip_unless_available(impl, inputs, MASKS[name])
    assert_accurate(inputs, MASKS[name], impl)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("impl", FAST)
def test_packed_qkv(impl, head_dim, poisoned_memory):
    mask = pyramid_mask("block_diagonal", 256)
    inputs = draw_inputs(mask, 2, 4, head_dim, torch.bfloat16, "cuda", packed=True)
    skip_unless_available(impl, inputs, mask)
    assert_accurate(inputs, mask, impl, with_lse=impl != "varlen")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("step", [4.0, 40.0, 400.0])
def test_logits_that_grow_with_the_keys(step, head_dim, dtype, poisoned_memory):
    """Sums of probabilities run over after some blocks, after each, and to infinity within one; rows do so alone."""
    mask = SpanMask.full(200, 1500)
    q, k, v, do, dlse = draw_inputs(mask, 1, 2, head_dim, DTYPES[dtype], "cuda")
    skip_unless_available("hopper", (q, k, v), mask)
    q[..., 0], k[..., 0] = 8.0 * head_dim**0.5, torch.arange(1500, device="cuda") // 128 * (step / 8)
    q[:, :, 50:60, 0] = 0.0
    assert_accurate((q, k, v, do, dlse), mask, "hopper")
    before = attention(q, k, v, mask, impl="hopper", return_lse=True)
    q[:, :, :50, 0] = q[:, :, 60:, 0] = 0.0
    for old, new in zip(before, attention(q, k, v, mask, impl="hopper", return_lse=True), strict=True):
        assert torch.equal(old[:, :, 50:60], new[:, :, 50:60]) and not torch.equal(old, new)


@pytest.mark.parametrize("impl", OURS)
def test_large_logits_stay_finite(impl):
    """q and k of length 100 give logits up to 100 after L2 normalisation with the largest learned scale."""
    mask = pyramid_mask("block_causal", 256)
    q, k, *rest = draw_inputs(mask, 1, 2, 64, torch.bfloat16, "cuda")
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1).bfloat16() for x in (q, k))
    skip_unless_available(impl, (q, k, rest[0]), mask)
    assert_accurate((q, k, *rest), mask, impl, scale=100.0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
# NOTE: not blind_queries. Where one key of few outweighs the others under a scale of 100, dq cancels, but for delta,
# which knows `out` only as it was rounded; the eager gradient that the rule measures by does not take that way.
@pytest.mark.parametrize("name", [*sorted(set(MASKS) - {"blind_queries"}), "block_causal_512"])
@pytest.mark.parametrize("bound", ["number", "by_head"])
def test_bounded_logits(bound, name, head_dim, dtype, poisoned_memory):
    """Unit vectors under scales from 0.5 to 100: bounded heads and heads that need the running maximum side by side."""
    mask = MASKS.get(name) or pyramid_mask("block_causal", 512)
    q, k, v, do, dlse = draw_inputs(mask, 2, 3, head_dim, torch.float32, "cuda")
    scales = torch.tensor([0.5, 60.0, 100.0] if bound == "by_head" else [4.0, 30.0, 60.0], device="cuda")
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    inputs = [x.to(DTYPES[dtype]) for x in (q * scales[:, None, None], k, v, do)]
    skip_unless_available("hopper", inputs, mask)
    logit_bound = scales if bound == "by_head" else 60.0
    assert_accurate((*inputs, dlse), mask, "hopper", scale=1.0, logit_bound=logit_bound)


@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
@pytest.mark.parametrize("impl", OURS)
def test_bit_equal_twice(impl, pattern):
    mask = pyramid_mask(pattern, 512)
    inputs = draw_inputs(mask, 4, 8, 64, torch.bfloat16, "cuda")
    skip_unless_available(impl, inputs, mask)
    twice = [run(*inputs, mask, impl, deterministic=True) for _ in range(2)]
    for first, second in zip(*twice, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("asked_by", ["argument", "torch"])
def test_bit_equal_twice_where_the_backward_would_be_in_one_pass(asked_by, head_dim):
    mask = pyramid_mask("block_causal", 1024)
    inputs = draw_inputs(mask, 2, 4, head_dim, torch.bfloat16, "cuda")
    skip_unless_available("hopper", inputs, mask)
    assert hopper.select_tiles(head_dim, mask).backward is not None
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(asked_by == "torch", warn_only=True)
    try:
        deterministic = True if asked_by == "argument" else None
        twice = [run(*inputs, mask, "hopper", deterministic=deterministic) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    for first, second in zip(*twice, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("impl", OURS)
def test_block_diagonal_is_local_to_a_scale(impl):
    mask, touched = pyramid_mask("block_diagonal", 256), slice(91, 155)
    q, k, v, do, dlse = draw_inputs(mask, 1, 2, 64, torch.bfloat16, "cuda")
    skip_unless_available(impl, (q, k, v), mask)
    before = run(q, k, v, do, dlse, mask, impl)
    for x in (q, k, v):
        x[:, :, touched] += 1.0
    for a, b in zip(before, run(q, k, v, do, dlse, mask, impl), strict=True):
        assert torch.equal(a[:, :, :91], b[:, :, :91]) and torch.equal(a[:, :, 155:], b[:, :, 155:])
        assert not torch.equal(a[:, :, touched], b[:, :, touched])


@pytest.mark.parametrize("impl", OURS)
def test_torch_compile_and_cuda_graph(impl):
    torch._dynamo.reset()
    mask = pyramid_mask("block_causal", 256)
    q, k, v, do, _ = draw_inputs(mask, 2, 2, 64, torch.bfloat16, "cuda")
    skip_unless_available(impl, (q, k, v), mask)
    q.requires_grad_()

    def step(q):
        out = attention(q, k, v, mask, impl=impl)
        return out, torch.autograd.grad(out, q, do)[0]

    def forward(q):
        return attention(q, k, v, mask, impl=impl)

    expected_out, expected_dq = step(q)
    out = torch.compile(forward, fullgraph=True)(q)
    assert torch.equal(out, expected_out)
    assert torch.equal(torch.autograd.grad(out, q, do)[0], expected_dq)

    # NOTE: a leaf of its own on the capturing stream, since autograd remembers where a leaf was first used
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        leaf = q.detach().clone().requires_grad_()
        step(leaf)
        with torch.cuda.graph(graph, stream=stream):
            out, dq = step(leaf)
    torch.cuda.current_stream().wait_stream(stream)
    out = out.detach()
    out.zero_()
    dq.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected_out) and torch.equal(dq, expected_dq)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_launches_one_after_the_other_and_side_by_side(head_dim):
    """Counters of items are left zero by each launch: streams have their own, the launches of one follow each other."""
    masks = [pyramid_mask("block_causal", 256), pyramid_mask("block_diagonal", 512), SpanMask.full(70, 300)]
    cases = [(draw_inputs(mask, 1, 2, head_dim, torch.bfloat16, "cuda", seed), mask) for seed, mask in enumerate(masks)]
    skip_unless_available("hopper", *cases[0])

    def run(inputs, mask):
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        out = attention(q, k, v, mask, impl="hopper", deterministic=True)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])

    expected = [run(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    found = []
    for round_ in range(10):
        for i, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                case = (i + round_) % len(cases)
                found.append((case, run(*cases[case])))
    torch.cuda.synchronize()
    for case, results in found:
        assert all(torch.equal(actual, wanted) for actual, wanted in zip(results, expected[case], strict=True))


# --- the backward in one pass ---------------------------------------------------------------------------------------

# NOTE: poisoned_memory turns deterministic algorithms on, so that deterministic=False has to be said.
ONE_PASS_MASKS = {**MASKS, "block_causal_512": pyramid_mask("block_causal", 512)}


@pytest.fixture
def one_pass(monkeypatch):
    """impl="hopper" takes the backward in one pass for every mask and few heads, and fails where it takes another, or
    where no head has sums; but not where there are fewer keys than queries."""
    tiles = hopper.TILES
    everywhere = {
        key: replace(of, dkdv=tiles[key[0], hopper.LONG].dkdv, backward=tiles[key[0], hopper.LONG].backward)
        for key, of in tiles.items()
    }
    monkeypatch.setattr(hopper, "TILES", everywhere)
    monkeypatch.setattr(hopper, "LEAST_SHARE", 0)
    heads_of = hopper.one_pass_heads

    def in_one_pass(q_shape, num_keys, *numbers):
        slots, last = heads_of(q_shape, num_keys, *numbers)
        assert 0 < last < q_shape[0] * q_shape[1] or num_keys < q_shape[2], "a backward in two passes"
        return slots, last

    monkeypatch.setattr(hopper, "one_pass_heads", in_one_pass)


def gradients(q, k, v, do, dlse, mask):
    """(out, lse, dq, dk, dv) as `run` has them where every query has keys; never waits for the device."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, mask, impl="hopper", return_lse=True, deterministic=False)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), (do, dlse))


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ONE_PASS_MASKS)
def test_one_pass(one_pass, name, head_dim, dtype, with_lse, poisoned_memory):
    mask = ONE_PASS_MASKS[name]
    inputs = draw_inputs(mask, 2, 3, head_dim, DTYPES[dtype], "cuda")
    skip_unless_available("hopper", inputs, mask)
    assert_accurate(inputs, mask, "hopper", with_lse=with_lse, deterministic=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_one_pass_on_the_largest_pyramid(one_pass, pattern, head_dim, dtype, poisoned_memory):
    mask = pyramid_mask(pattern, 1024)
    inputs = draw_inputs(mask, 1, 2, head_dim, DTYPES[dtype], "cuda")
    skip_unless_available("hopper", inputs, mask)
    assert_accurate(inputs, mask, "hopper", deterministic=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_one_pass_sees_exactly_the_pairs_of_the_mask(one_pass, pattern, resolution, head_dim, dtype):
    mask = pyramid_mask(pattern, resolution)
    skip_unless_available("hopper", draw_inputs(mask, 1, 1, head_dim, DTYPES[dtype], "cuda"), mask)
    assert_exact_support(mask, "hopper", head_dim, DTYPES[dtype], "cuda", heads=2)  # the first one has sums


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_one_pass_with_packed_qkv(one_pass, pattern, head_dim, poisoned_memory):
    mask = pyramid_mask(pattern, 256)
    inputs = draw_inputs(mask, 2, 4, head_dim, torch.bfloat16, "cuda", packed=True)
    skip_unless_available("hopper", inputs, mask)
    assert_accurate(inputs, mask, "hopper", deterministic=False)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["block_causal", "random_intervals", "blind_queries", "block_causal_512"])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_one_pass_with_few_slots(one_pass, slots, name, head_dim, poisoned_memory, monkeypatch):
    """Fewer than the six heads: slots are taken over, and the last ones of a launch are not full."""
    mask, asked = ONE_PASS_MASKS[name], []
    monkeypatch.setattr(hopper, "num_slots", lambda *numbers: asked.append(numbers) or slots)
    inputs = draw_inputs(mask, 2, 3, head_dim, torch.bfloat16, "cuda")
    skip_unless_available("hopper", inputs, mask)
    assert_accurate(inputs, mask, "hopper", deterministic=False)
    assert len(asked) == 1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("slots", [2, 6])
def test_one_pass_many_times(one_pass, slots, head_dim, poisoned_memory, monkeypatch):
    """All but dq is bit-equal every time, and dq is right every time."""
    monkeypatch.setattr(hopper, "num_slots", lambda *numbers: slots)
    mask = pyramid_mask("block_causal", 512)
    inputs = draw_inputs(mask, 2, 3, head_dim, torch.bfloat16, "cuda")
    skip_unless_available("hopper", inputs, mask)
    expected, eager = oracles(inputs, mask)
    results = [run(*inputs, mask, "hopper", deterministic=False) for _ in range(30)]
    for actual in results:
        assert_within_limits(actual, expected, eager, mask)
        for i in (0, 1, 3, 4):
            assert torch.equal(actual[i], results[0][i])


@pytest.mark.parametrize("resolution", [512, 1024])
def test_dk_and_dv_of_one_pass_are_bit_equal_from_run_to_run(resolution):
    """With more chunks to serve than warps hold at first, so that who serves a chunk is a matter of time."""
    mask = pyramid_mask("block_diagonal", resolution)
    inputs = q, k, _, _, _ = draw_inputs(mask, 4, 24, 64, torch.bfloat16, "cuda")
    skip_unless_available("hopper", inputs, mask)
    num_jobs = hopper.make_plans(mask, hopper.select_tiles(64, mask), "cpu")["backward"].num_jobs
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    assert hopper.one_pass_heads(q.shape, k.shape[2], num_jobs, num_sms)[1] > 0
    first = gradients(*inputs, mask)
    for _ in range(20):
        again = gradients(*inputs, mask)
        assert torch.equal(again[3], first[3]) and torch.equal(again[4], first[4])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("resolution", [256, 1024])
def test_one_pass_on_two_streams_at_once(one_pass, resolution, head_dim):
    """At 256 px both launches fit on the GPU side by side; at 1024 px they compete for it."""
    mask = pyramid_mask("block_causal", resolution)
    inputs = [draw_inputs(mask, 1, 2, head_dim, torch.bfloat16, "cuda", seed) for seed in (0, 1)]
    skip_unless_available("hopper", inputs[0], mask)
    of_inputs = [oracles(own, mask) for own in inputs]
    gradients(*inputs[0], mask)  # compiles, and brings the plan to the device
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)
        results = []
        for stream, own in zip(streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                results.append(gradients(*own, mask))
        torch.cuda.synchronize()
        for actual, (expected, eager) in zip(results, of_inputs, strict=True):
            assert_within_limits(actual, expected, eager, mask)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_pass_under_torch_compile_and_in_a_cuda_graph(one_pass, head_dim):
    torch._dynamo.reset()
    mask = pyramid_mask("block_causal", 256)
    inputs = draw_inputs(mask, 2, 3, head_dim, torch.bfloat16, "cuda")
    skip_unless_available("hopper", inputs, mask)
    expected, eager = oracles(inputs, mask)

    def forward(q, k, v):
        return attention(q, k, v, mask, impl="hopper", return_lse=True)

    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out, lse = torch.compile(forward, fullgraph=True)(q, k, v)
    actual = out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), inputs[3:])
    assert_within_limits(actual, expected, eager, mask)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        gradients(*inputs, mask)
        with torch.cuda.graph(graph, stream=stream):
            captured = gradients(*inputs, mask)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):  # all counters start anew
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_within_limits(captured, expected, eager, mask)


@pytest.mark.parametrize(
    ("resolution", "batch", "heads", "head_dim"),
    [(1024, 2, 24, 64), (1024, 1, 24, 64), (1024, 2, 24, 128), (1024, 1, 12, 128), (512, 4, 24, 64), (512, 1, 24, 64)],
)
@pytest.mark.parametrize("pattern", ["block_diagonal", "block_causal"])
def test_the_backward_takes_no_memory_of_its_own(pattern, resolution, batch, heads, head_dim):
    """Forward and backward: at most out, gradients, lse and delta. Every head's gradients are those of two passes."""
    mask = pyramid_mask(pattern, resolution)
    inputs = q, k, v, do, _ = draw_inputs(mask, batch, heads, head_dim, torch.bfloat16, "cuda")
    skip_unless_available("hopper", inputs, mask)
    assert hopper.select_tiles(head_dim, mask).backward is not None
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def gradients(deterministic):
        out = attention(q, k, v, mask, impl="hopper", deterministic=deterministic)
        return torch.autograd.grad(out, (q, k, v), do)

    def requested_bytes(when):
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]

    expected = gradients(True)
    gradients(False)  # compiles, and brings the plan to the device
    held = requested_bytes("current")
    torch.cuda.reset_peak_memory_stats()
    actual = gradients(False)
    counters = 40 + 10 * batch * heads  # two a head, of which some are not there: at most a quarter
    assert requested_bytes("peak") - held <= 4 * q.nbytes + 2 * 4 * q[..., 0].numel() + counters
    for x, y in zip(actual, expected, strict=True):
        assert ((x - y).float().norm(dim=(2, 3)) <= 0.01 * y.float().norm(dim=(2, 3))).all()


def test_one_pass_op_passes_opcheck(one_pass):
    mask = pyramid_mask("block_causal", 256)
    q, k, v, *_ = draw_inputs(mask, 1, 2, 64, torch.bfloat16, "cuda")
    skip_unless_available("hopper", (q, k, v), mask)
    tensors, tiles = api._job_arguments(mask, q.device, 64, False, False)
    arguments = (*(x.requires_grad_() for x in (q, k, v)), *tensors, tiles, 0.3, torch.inf, None)
    torch.library.opcheck(api._attention_hopper, arguments)


def test_auto_explains_itself():
    mask = SpanMask.causal(64)
    q, k, v, _, _ = draw_inputs(mask, 1, 1, 64, torch.bfloat16, "cuda")
    impl, reason = choose(q, k, v, mask)
    assert impl != "reference" and reason
    assert choose(q.double(), k.double(), v.double(), mask)[0] == "reference"
