"""modulated_norm's Triton kernels on a GPU: against float64 at the models' widths and odd sizes, exactness, tracing."""

import pytest
import torch

from hmar_kernels import modulated_norm, residual_modulated_norm
from hmar_kernels.modulated_norm import api, choose
from operator_cases import assert_accurate, assert_parts_add_up, norm_inputs, run_norm

pytestmark = pytest.mark.gpu

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "fp32+bf16": (FP32, BF16),
    "fp32+fp16": (FP32, FP16),
}


def block(inputs, impl):
    x, branch, modulation = inputs["x"], inputs["branch"], inputs["modulation"]
    gate, scale, shift, scale_after, shift_after, _ = modulation[:, None].chunk(6, dim=-1)
    branch = branch * modulated_norm(x, scale, shift, dtype=branch.dtype, impl=impl)
    keep, dtype = inputs["keep"], branch.dtype
    return residual_modulated_norm(x, branch, gate, scale_after, shift_after, keep=keep, dtype=dtype, impl=impl)


@pytest.mark.parametrize("keep", [True, False], ids=["drop_path", "all"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("width", [1024, 1280, 1536, 1920, 2304])
def test_widths_of_the_models(width, dtypes, keep, poisoned_memory):
    x_dtype, dtype = DTYPES[dtypes]
    inputs = norm_inputs(3, 680, width, x_dtype=x_dtype, dtype=dtype, device="cuda", keep=keep)
    assert_accurate(run_norm, inputs, dtype)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(
    "parts, batch, length, width",
    [(1, 2, 25, 1536), (2, 2, 100, 1024), (2, 1, 9, 2304), (3, 2, 169, 1920), (4, 3, 300, 64)],
)
def test_parts_add_up(parts, batch, length, width, dtypes, poisoned_memory):
    assert_parts_add_up(parts, batch, length, width, *DTYPES[dtypes], device="cuda")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 33, 5), (5, 31, 64), (2, 65, 130), (1, 2240, 1536), (2, 7, 4100), (70, 3, 48)], ids=str
)
def test_odd_sizes(shape, dtypes, poisoned_memory):
    x_dtype, dtype = DTYPES[dtypes]
    assert_accurate(run_norm, norm_inputs(*shape, x_dtype=x_dtype, dtype=dtype, device="cuda"), dtype)


def test_offsets_beyond_32_bits(poisoned_memory):
    """The last image of a stream of 2.4 10^9 elements: same result as alone."""
    inputs = norm_inputs(1, 9451, 2304, x_dtype=BF16, dtype=BF16, device="cuda", keep=False)
    scale, shift = inputs["modulation"][:, None].chunk(6, dim=-1)[:2]
    many = inputs["x"].expand(110, -1, -1).contiguous()
    assert many.numel() > 2**31
    h = modulated_norm(many, scale.expand(110, -1, -1), shift.expand(110, -1, -1), impl="triton")
    assert torch.equal(h[-1], modulated_norm(inputs["x"], scale, shift, impl="triton")[0])


def test_large_mean_and_tiny_variance(poisoned_memory):
    """Statistics in two passes over registers: the mean does not eat the bits of the variance."""
    inputs = norm_inputs(2, 64, 1024, x_dtype=FP32, dtype=FP32, device="cuda")
    inputs["x"] = 300 + 0.01 * inputs["x"]
    inputs["branch"] *= 0.01
    assert_accurate(run_norm, inputs, FP32)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp32+bf16"])
def test_bit_equal_twice(dtypes):
    x_dtype, dtype = DTYPES[dtypes]
    inputs = norm_inputs(8, 2240, 1536, x_dtype=x_dtype, dtype=dtype, device="cuda")
    first, second = (run_norm(inputs, "triton", dtype) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_tokens_and_images_do_not_touch_each_other():
    inputs = norm_inputs(3, 100, 1536, x_dtype=FP32, dtype=BF16, device="cuda")
    before = run_norm(inputs, "triton", BF16)
    inputs["x"][1, 40] += 1.0
    after = run_norm(inputs, "triton", BF16)
    others = torch.tensor([i for i in range(100) if i != 40])
    for name, a in before.items():
        assert torch.equal(a[::2], after[name][::2]), name
        if name != "d_modulation":
            assert torch.equal(a[1, others], after[name][1, others]), name
    assert not torch.equal(before["y"][1, 40], after["y"][1, 40])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one():
    assert torch.cuda.current_device() == 0
    assert_accurate(run_norm, norm_inputs(2, 33, 64, x_dtype=FP32, dtype=BF16, device="cuda:1"), BF16)


def test_custom_ops_pass_opcheck():
    inputs = norm_inputs(2, 33, 48, x_dtype=FP32, dtype=BF16, device="cuda")
    gate, scale, shift = (x.detach().requires_grad_() for x in inputs["modulation"][:, None].chunk(6, dim=-1)[:3])
    x, branch = inputs["x"].requires_grad_(), inputs["branch"].requires_grad_()
    torch.library.opcheck(api._norm.overload, (x, scale, shift, 1e-6, BF16))
    torch.library.opcheck(api._residual_norm.overload, (x, branch, gate, inputs["keep"], scale, shift, 1e-6, BF16))


@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_and_cuda_graph(dynamic):
    torch._dynamo.reset()
    inputs = norm_inputs(2, 680, 1024, x_dtype=FP32, dtype=BF16, device="cuda")
    names = ("x", "branch", "modulation")

    def step(f):
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        y, h = f(inputs | leaves, "triton")
        return y, h, *torch.autograd.grad((y, h), list(leaves.values()), (torch.ones_like(y), torch.ones_like(h)))

    exact = [x.double() for x in step(block)]
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for actual, expected in zip(step(compiled), exact, strict=True):
        assert (actual.double() - expected).norm() <= 0.01 * expected.norm()

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(block)
        with torch.cuda.graph(graph, stream=stream):
            captured = step(block)
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    for actual, expected in zip(captured, step(block), strict=True):
        assert torch.equal(actual, expected)


def test_auto_takes_triton_and_says_why():
    assert choose(torch.device("cuda"), FP32, BF16)[0] == "triton"
    impl, reason = choose(torch.device("cuda"), torch.float64)
    assert impl == "reference" and "not torch.float64" in reason
