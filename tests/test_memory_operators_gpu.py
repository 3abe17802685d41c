"""norm_linear and gelu_linear on a GPU: against float64 at models' widths and odd sizes, exactness, tracing, memory."""

import pytest
import torch
import torch.nn.functional as F

from hmar_kernels import gelu_linear, residual_modulated_norm, residual_norm_linear
from hmar_kernels.gelu_linear import api as gelu_api
from hmar_kernels.norm_linear import api as norm_api
from operator_cases import (
    assert_accurate,
    gelu_linear_inputs,
    norm_linear_inputs,
    run_gelu_linear,
    run_norm_linear,
    under_autocast,
)

pytestmark = pytest.mark.gpu

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
KEPT = pytest.mark.parametrize("keep_x", [False, True], ids=["keeps_y", "keeps_x"])


def norm_arguments(inputs):
    gate, scale, shift = inputs["modulation"][:, None].chunk(6, dim=-1)[:3]
    return [t.detach().requires_grad_() for t in (inputs["x"], inputs["branch"], gate, scale, shift, inputs["w1"])]


@KEPT
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(3, 680, 1024, 4096), (2, 680, 1536, 4608), (1, 2240, 1920, 640), (5, 31, 64, 8), (2, 65, 136, 24), (1, 1, 8, 8)],
    ids=str,
)
def test_norm_linear_under_autocast(shape, dtype, keep_x, poisoned_memory):
    """A float32 stream and float32 weights, as in training."""
    inputs = norm_linear_inputs(*shape, x_dtype=FP32, dtype=dtype, weight_dtype=FP32, device="cuda")
    run = run_norm_linear if dtype == FP32 else under_autocast(run_norm_linear, dtype)
    assert_accurate(run, inputs, keep_x)


@KEPT
@DTYPES
def test_norm_linear_in_one_dtype(dtype, keep_x, poisoned_memory):
    """As under FSDP, and where weights themselves are in a low dtype."""
    inputs = norm_linear_inputs(3, 97, 256, 136, x_dtype=dtype, dtype=dtype, device="cuda")
    assert_accurate(run_norm_linear, inputs, keep_x)


@DTYPES
@pytest.mark.parametrize(
    "shape", [(3, 680, 4096, 1024), (2, 680, 6144, 1536), (5, 31, 64, 8), (2, 65, 136, 24), (1, 1, 8, 8)], ids=str
)
def test_gelu_linear_under_autocast(shape, dtype, poisoned_memory):
    *tokens, hidden, columns = shape
    inputs = gelu_linear_inputs(*tokens, hidden=hidden, columns=columns, dtype=dtype, weight_dtype=FP32, device="cuda")
    assert_accurate(run_gelu_linear if dtype == FP32 else under_autocast(run_gelu_linear, dtype), inputs)


@DTYPES
def test_gelu_linear_in_one_dtype(dtype, poisoned_memory):
    inputs = gelu_linear_inputs(3, 97, hidden=264, columns=40, dtype=dtype, device="cuda")
    assert_accurate(run_gelu_linear, inputs)


def test_far_tails():
    x = torch.tensor([[-3e4, -60.0, -12.0, 0.0, 12.0, 60.0, 3e4, 0.0]], device="cuda").requires_grad_()
    out = gelu_linear(x, x.new_zeros(8), torch.eye(8, device="cuda"), x.new_zeros(8), impl="triton")
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out.tolist() == [[0, 0, 0, 0, 12, 60, 3e4, 0]] and dx.tolist() == [[0, 0, 0, 0.5, 1, 1, 1, 0.5]]


def test_offsets_beyond_32_bits():
    """The last rows of a hidden layer of 2.2 10^9 elements: same result as alone."""
    n, f = 360_000, 6144
    x = torch.randn(64, f, device="cuda", dtype=BF16)
    many = torch.zeros(n, f, device="cuda", dtype=BF16)
    many[-64:] = x
    assert many.numel() > 2**31
    bias = torch.randn(f, device="cuda")
    assert torch.equal(gelu_api.triton.forward(many, bias, BF16)[-64:], gelu_api.triton.forward(x, bias, BF16))
    dg = torch.ones_like(many)
    g, dx, _ = gelu_api.triton.backward(dg, many, bias)
    expected_g, expected_dx, _ = gelu_api.triton.backward(torch.ones_like(x), x, bias)
    assert torch.equal(g[-64:], expected_g) and torch.equal(dx[-64:], expected_dx)


def test_bit_equal_twice():
    norms = norm_linear_inputs(8, 680, 1536, 4608, x_dtype=FP32, dtype=BF16, weight_dtype=FP32, device="cuda")
    hidden = gelu_linear_inputs(8, 680, hidden=6144, columns=1536, dtype=BF16, weight_dtype=FP32, device="cuda")
    for run, inputs in ((run_norm_linear, norms), (run_gelu_linear, hidden)):
        first, second = (under_autocast(run, BF16)(inputs, "triton") for _ in range(2))
        assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_y_is_the_same_again():
    """Whether the backward keeps y or x, the residual stream's gradient and the weight's are bit-equal: the sum that is
    formed once more is rounded as the first one was."""
    inputs = norm_linear_inputs(4, 680, 1536, 1536, x_dtype=FP32, dtype=BF16, weight_dtype=FP32, device="cuda")
    with_y, with_x = (under_autocast(run_norm_linear, BF16)(inputs, "triton", keep_x) for keep_x in (False, True))
    for name in with_y:
        assert torch.equal(with_y[name], with_x[name]), name


def test_less_is_held_than_by_separate_operators():
    """The norm's result and GELU's are not: 2 C and 8 C bytes a token, and no rounded weight."""
    b, length, c = 8, 680, 1024
    leaves = norm_arguments(norm_linear_inputs(b, length, c, 4 * c, x_dtype=FP32, dtype=BF16, device="cuda"))
    leaves[-1] = leaves[-1].detach().float().requires_grad_()
    x, bias, weight, out_bias = (
        t.requires_grad_()
        for t in gelu_linear_inputs(
            b, length, hidden=4 * c, columns=c, dtype=BF16, weight_dtype=FP32, device="cuda"
        ).values()
    )

    def held(call):
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", BF16):
            result = call()
        return torch.cuda.memory_allocated() - before, result

    def separate():
        y, h = residual_modulated_norm(*leaves[:-1])
        return y, F.linear(h, leaves[-1])

    tokens, rounded = b * length, 2 * 4 * c * c
    fused, apart = (held(call)[0] for call in (lambda: residual_norm_linear(*leaves), separate))
    assert apart - fused >= 0.99 * (2 * tokens * c + rounded)
    fused, apart = (
        held(call)[0]
        for call in (
            lambda: gelu_linear(x, bias, weight, out_bias),
            lambda: F.linear(F.gelu(x + bias.bfloat16(), approximate="tanh"), weight, out_bias),
        )
    )
    assert apart - fused >= 0.99 * (2 * tokens * 4 * c + rounded)


def test_custom_ops_pass_opcheck():
    x, branch, gate, scale, shift, weight = norm_arguments(
        norm_linear_inputs(2, 33, 48, 16, x_dtype=FP32, dtype=BF16, weight_dtype=FP32, device="cuda")
    )
    torch.library.opcheck(norm_api._norm_linear.overload, (x, scale, shift, weight, 1e-6, BF16))
    for keep_x in (False, True):
        torch.library.opcheck(
            norm_api._residual_norm_linear.overload,
            (x, branch, gate, scale, shift, weight, 1e-6, BF16, keep_x),
        )
    inputs = gelu_linear_inputs(2, 33, hidden=48, columns=16, dtype=BF16, weight_dtype=FP32, device="cuda")
    torch.library.opcheck(gelu_api._gelu_linear.overload, (*(t.requires_grad_() for t in inputs.values()), BF16))


@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_and_cuda_graph(dynamic):
    torch._dynamo.reset()
    inputs = norm_linear_inputs(2, 680, 1024, 4096, x_dtype=FP32, dtype=BF16, weight_dtype=FP32, device="cuda")
    leaves = norm_arguments(inputs)
    _, bias, weight, out_bias = gelu_linear_inputs(
        1, 1, hidden=4096, columns=1024, dtype=BF16, weight_dtype=FP32, device="cuda"
    ).values()
    tensors = [*leaves, bias, weight, out_bias]

    def mlp(x, branch, gate, scale, shift, weight, *others):
        y, hidden = residual_norm_linear(x, branch, gate, scale, shift, weight, keep_x=True, impl="triton")
        return y, gelu_linear(hidden, *others, impl="triton")

    def step(f):
        # NOTE: leaves of its own. A gradient is accumulated on the stream on which its leaf was first used, and a
        # result that is still alive keeps that: the default stream cannot wait for a capture.
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.autocast("cuda", BF16):
            y, out = f(*leaves)
        return y, out, *torch.autograd.grad((y, out), leaves, (torch.ones_like(y), torch.ones_like(out)))

    exact = [x.double() for x in step(mlp)]
    compiled = torch.compile(mlp, fullgraph=True, dynamic=dynamic)
    for actual, expected in zip(step(compiled), exact, strict=True):
        assert (actual.double() - expected).norm() <= 0.01 * expected.norm()

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(mlp)
        with torch.cuda.graph(graph, stream=stream):
            captured = step(mlp)
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    for actual, expected in zip(captured, step(mlp), strict=True):
        assert torch.equal(actual, expected)
