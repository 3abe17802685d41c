"""qk_norm's Triton kernels on a GPU: against float64, exactness, with attention, tracing."""

import pytest
import torch

from hmar_kernels import SpanMask, attention, qk_norm
from hmar_kernels.qk_norm import api, choose
from operator_cases import MAX_LOG_SCALE, assert_accurate, gradients, qkv_inputs, run_qk_norm

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = [(3, 680, 16, 64), (2, 2240, 24, 64), (1, 9451, 36, 64)]
SHAPES = [*MODELS, (2, 680, 8, 128), (1, 1, 1, 64), (2, 33, 3, 48), (5, 129, 2, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_of_the_models_and_odd_ones(shape, dtype, poisoned_memory):
    assert_accurate(run_qk_norm, qkv_inputs(*shape, dtype=DTYPES[dtype], device="cuda"))


def test_offsets_beyond_32_bits(poisoned_memory):
    inputs = qkv_inputs(1, 9451, 36, 64, dtype=torch.bfloat16, device="cuda")
    many = inputs | {"qkv": inputs["qkv"].expand(34, -1, -1).contiguous()}
    assert many["qkv"].numel() > 2**31
    found = qk_norm(**many, impl="triton")
    for actual, expected in zip(found, qk_norm(**inputs, impl="triton"), strict=True):
        assert torch.equal(actual[-1], expected[0])


def test_vectors_too_short_to_be_normalised(poisoned_memory):
    inputs = qkv_inputs(1, 40, 2, 64, dtype=torch.float32, device="cuda")
    inputs["q_bias"].zero_()
    inputs["qkv"][:, 1] = 0.0
    inputs["qkv"][:, 3] *= 1e-15
    found, expected = (run_qk_norm(inputs, impl) for impl in ("triton", "reference"))
    assert not found["q"][:, :, 1].any() and not found["k"][:, :, 1].any()
    for name, actual in found.items():
        torch.testing.assert_close(actual, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_twice(dtype):
    inputs = qkv_inputs(8, 2240, 16, 64, dtype=DTYPES[dtype], device="cuda")
    first, second = (run_qk_norm(inputs, "triton") for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_strided_gradients(poisoned_memory):
    """As other attention implementations may return them: [B,H,L,D] in memory, and of stride 0."""
    inputs = qkv_inputs(2, 70, 3, 64, dtype=torch.bfloat16, device="cuda")
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    q, k, v = qk_norm(**leaves, max_log_scale=MAX_LOG_SCALE, impl="triton")
    dq = torch.randn_like(q)
    results = [
        torch.autograd.grad((q, k, v), list(leaves.values()), seeds, retain_graph=True)
        for seeds in (
            (dq.contiguous(), torch.ones_like(k), torch.ones_like(v)),
            (dq.mT.contiguous().mT, k.new_ones(1, 1, 1, 1).expand_as(k), v.new_ones(1, 1, 1, 1).expand_as(v)),
        )
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_with_attention(impl):
    """The chain of both operators against float64; attention's "auto" takes q, k, v as they are."""
    mask = SpanMask.block_diagonal([n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)])
    inputs = qkv_inputs(2, 680, 4, 64, dtype=torch.bfloat16, device="cuda")
    inputs["log_scale"] = torch.full((4,), 1.4, device="cuda")

    def run(inputs, impl, attend):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        q, k, v = qk_norm(**leaves, max_log_scale=MAX_LOG_SCALE, impl=impl)
        outputs = {"out": attention(q, k, v, mask, scale=1.0, impl=attend).transpose(1, 2).flatten(2)}
        return outputs | gradients(outputs, leaves)

    exact = run({name: x.double() for name, x in inputs.items()}, "reference", "reference")
    for name, actual in run(inputs, impl, "auto").items():
        assert (actual.double() - exact[name]).norm() <= 0.02 * exact[name].norm(), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one():
    assert torch.cuda.current_device() == 0
    assert_accurate(run_qk_norm, qkv_inputs(2, 33, 2, 64, dtype=torch.bfloat16, device="cuda:1"))


def test_custom_op_passes_opcheck():
    inputs = [x.requires_grad_() for x in qkv_inputs(2, 33, 2, 64, dtype=torch.bfloat16, device="cuda").values()]
    torch.library.opcheck(api._qk_norm.overload, (*inputs, MAX_LOG_SCALE))


@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_and_cuda_graph(dynamic):
    torch._dynamo.reset()
    inputs = qkv_inputs(2, 680, 16, 64, dtype=torch.bfloat16, device="cuda")

    def forward(leaves):
        return qk_norm(**leaves, max_log_scale=MAX_LOG_SCALE, impl="triton")

    def step(f):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        outputs = f(leaves)
        seeds = [torch.ones_like(x) for x in outputs]
        return *outputs, *torch.autograd.grad(outputs, list(leaves.values()), seeds)

    expected = step(forward)
    for actual, e in zip(step(torch.compile(forward, fullgraph=True, dynamic=dynamic)), expected, strict=True):
        assert torch.equal(actual, e)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(forward)
        with torch.cuda.graph(graph, stream=stream):
            captured = step(forward)
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    assert all(torch.equal(actual, e) for actual, e in zip(captured, expected, strict=True))


def test_auto_takes_triton():
    assert choose(torch.device("cuda"), torch.bfloat16, torch.float32)[0] == "triton"
