"""The Hopper kernels as NVRTC compiles them, on a GPU: the tests of test_attention_gpu.py, and bit-equality to nvcc's.

Run with -s to see what is compiled. Kernels are kept in a folder of their own for the time of the tests.
"""

import pytest
import torch

import test_attention_gpu as same_tests
from attention_cases import assert_within_limits, draw_inputs, oracles, pyramid_mask, run, small_masks
from hmar_kernels import SpanMask, attention, extension
from hmar_kernels.attention import hopper, hopper_launch

pytestmark = pytest.mark.gpu

MASKS = {
    **small_masks(),
    **{f"{pattern}_256": pyramid_mask(pattern, 256) for pattern in ("block_diagonal", "block_causal")},
    **{f"{pattern}_1024": pyramid_mask(pattern, 1024) for pattern in ("block_diagonal", "block_causal")},
}
PATTERNS = ["block_diagonal", "block_causal"]
DTYPES = ["bf16", "fp16"]
one_pass = same_tests.one_pass


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HMAR_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="module")
def compiled():
    kernels = hopper_launch.HopperKernels(**hopper.table())
    capability = torch.cuda.get_device_capability()
    reason = f"compute capability {capability}" if capability != (9, 0) else kernels.hopper_load_error(0)
    if reason:
        pytest.skip(reason)
    return kernels


@pytest.fixture
def nvrtc(compiled, monkeypatch):
    """impl="hopper" is what NVRTC compiled."""
    use(compiled, monkeypatch)
    return compiled


def use(kernels, monkeypatch):
    monkeypatch.setattr(hopper, "_kernels", kernels)
    monkeypatch.setattr(hopper, "_load_errors", {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_published_pyramids(nvrtc, pattern, resolution, dtype, poisoned_memory):
    same_tests.test_published_pyramids("hopper", pattern, resolution, dtype, poisoned_memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sees_exactly_the_pairs_of_the_mask(nvrtc, pattern, resolution, head_dim, dtype):
    same_tests.test_sees_exactly_the_pairs_of_the_mask("hopper", pattern, resolution, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", same_tests.MASKS)
def test_odd_masks(nvrtc, name, head_dim, dtype, poisoned_memory):
    same_tests.test_odd_masks_and_head_dims("hopper", name, head_dim, dtype, poisoned_memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["random_intervals", "one_token", "block_causal_512"])
@pytest.mark.parametrize("bound", ["number", "by_head"])
def test_bounded_logits(nvrtc, bound, name, head_dim, dtype, poisoned_memory):
    same_tests.test_bounded_logits(bound, name, head_dim, dtype, poisoned_memory)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_qkv(nvrtc, head_dim, poisoned_memory):
    same_tests.test_packed_qkv("hopper", head_dim, poisoned_memory)


def test_large_logits_stay_finite(nvrtc):
    same_tests.test_large_logits_stay_finite("hopper")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bit_equal_twice(nvrtc, pattern):
    same_tests.test_bit_equal_twice("hopper", pattern)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("asked_by", ["argument", "torch"])
def test_bit_equal_twice_where_the_backward_would_be_in_one_pass(nvrtc, asked_by, head_dim):
    same_tests.test_bit_equal_twice_where_the_backward_would_be_in_one_pass(asked_by, head_dim)


def test_torch_compile_and_cuda_graph(nvrtc):
    same_tests.test_torch_compile_and_cuda_graph("hopper")


def test_custom_op_passes_opcheck(nvrtc):
    same_tests.test_custom_op_passes_opcheck("hopper")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", same_tests.ONE_PASS_MASKS)
def test_one_pass(nvrtc, one_pass, name, head_dim, dtype, poisoned_memory):
    same_tests.test_one_pass(one_pass, name, head_dim, dtype, True, poisoned_memory)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_one_pass_with_few_slots(nvrtc, one_pass, slots, head_dim, poisoned_memory, monkeypatch):
    same_tests.test_one_pass_with_few_slots(one_pass, slots, "block_causal_512", head_dim, poisoned_memory, monkeypatch)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_pass_under_torch_compile_and_in_a_cuda_graph(nvrtc, one_pass, head_dim):
    same_tests.test_one_pass_under_torch_compile_and_in_a_cuda_graph(one_pass, head_dim)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one(nvrtc):
    same_tests.test_tensors_on_a_gpu_that_is_not_the_current_one("hopper")
    assert torch.cuda.current_device() == 0


def run_both(compiled, monkeypatch, inputs, mask, **options):
    """Results of the extension and of what NVRTC compiled."""
    if not hasattr(extension.module, "hopper_forward"):
        pytest.skip("the extension is not built with the Hopper kernels: nothing to compare with")
    if compiled._compiler.release != extension.module.cuda_version:
        pytest.skip(f"nvcc {extension.module.cuda_version} and NVRTC {compiled._compiler.release} are of two releases")
    results = []
    for kernels in (extension.module, compiled):
        use(kernels, monkeypatch)
        results.append(run(*inputs, mask, "hopper", **options))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("logit_bound", [None, 60.0])
@pytest.mark.parametrize("name", MASKS)
def test_bit_equal_to_the_extension(compiled, monkeypatch, name, logit_bound, head_dim, dtype):
    mask = MASKS[name]
    q, k, *rest = draw_inputs(mask, 2, 3, head_dim, same_tests.DTYPES[dtype], "cuda")
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    options = dict(scale=50.0, logit_bound=logit_bound, deterministic=True)
    for expected, actual in zip(*run_both(compiled, monkeypatch, (q, k, *rest), mask, **options), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_one_pass_is_that_of_the_extension(compiled, one_pass, monkeypatch, name, head_dim, dtype):
    """Bit-equal but for dq, which is right in both."""
    mask = MASKS[name]
    inputs = draw_inputs(mask, 1, 2, head_dim, same_tests.DTYPES[dtype], "cuda")
    results = run_both(compiled, monkeypatch, inputs, mask, deterministic=False)
    for i in (0, 1, 3, 4):
        assert torch.equal(results[0][i], results[1][i])
    expected, eager = oracles(inputs, mask)
    for actual in results:
        assert_within_limits(actual, expected, eager, mask)


def test_first_launch_may_be_captured_and_compiles_nothing_twice(nvrtc, monkeypatch):
    """Kernels from the disk, loaded while a stream captures, on a stream that is not the default one."""
    mask = SpanMask.causal(300)
    q, k, v, _, _ = draw_inputs(mask, 1, 2, 64, torch.bfloat16, "cuda")
    expected = attention(q, k, v, mask, impl="hopper")
    fresh = hopper_launch.HopperKernels(**hopper.table())
    fresh.hopper_load_error(0)
    monkeypatch.setattr(fresh._compiler, "compile", lambda source: pytest.fail("compiled though it is on the disk"))
    use(fresh, monkeypatch)
    hopper._load_error(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, mask, impl="hopper")
    out.zero_()
    for _ in range(2):  # the counter of items starts anew
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_launches_go_to_the_current_stream(nvrtc):
    """A stream that is kept busy: what is launched there waits, what is on the default stream does not."""
    mask = SpanMask.causal(300)
    q, k, v, _, _ = draw_inputs(mask, 1, 2, 64, torch.bfloat16, "cuda")
    expected = attention(q, k, v, mask, impl="hopper")
    stream, late = torch.cuda.Stream(), torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        out = attention(late, k, v, mask, impl="hopper")
    stream.synchronize()
    assert torch.equal(out, expected)
