"""linear_cross_entropy on a GPU: against float64, memory, exactness, tracing, targets out of range."""

import subprocess
import sys

import pytest
import torch

from hmar_kernels import linear_cross_entropy
from hmar_kernels.linear_cross_entropy import api, choose, triton
from operator_cases import assert_accurate, assert_correct_agrees, loss_inputs, run_loss

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2 * 680, 1024, 4096), (9451, 1536, 4096), (1, 64, 2), (333, 72, 1000), (130, 64, 10007)], ids=str
)
def test_against_float64(shape, dtype, weighted, bias, poisoned_memory):
    assert_accurate(run_loss, loss_inputs(*shape, dtype=DTYPES[dtype], device="cuda", weighted=weighted, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks(dtype, monkeypatch, poisoned_memory):
    monkeypatch.setattr(triton, "CHUNK_BYTES", 1)
    assert_accurate(run_loss, loss_inputs(1000, 128, 512, dtype=DTYPES[dtype], device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whether_the_target_has_the_largest_logit(dtype):
    assert_correct_agrees(loss_inputs(680, 1024, 4096, dtype=DTYPES[dtype], device="cuda"))


def test_a_token_of_weight_zero_takes_no_part():
    inputs = loss_inputs(700, 64, 512, dtype=torch.bfloat16, device="cuda")
    before, out = run_loss(inputs, "triton"), inputs["token_weight"] == 0
    inputs["hidden"][out] = 1e38
    after = run_loss(inputs, "triton")
    assert torch.equal(before["loss"], after["loss"]) and not after["d_hidden"][out].any()
    assert torch.equal(before["d_hidden"], after["d_hidden"]) and torch.equal(before["d_bias"], after["d_bias"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_twice(dtype):
    inputs = loss_inputs(4 * 2240, 1024, 4096, dtype=DTYPES[dtype], device="cuda")
    first, second = (run_loss(inputs, "triton") for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_memory_is_that_of_a_chunk():
    """Beside gradients and inputs: one chunk of logits and a few numbers a token."""
    tokens, width, vocabulary, workspace = 64 * 680, 1024, 4096, 40 << 20  # that of cuBLAS
    inputs = loss_inputs(tokens, width, vocabulary, dtype=torch.bfloat16, device="cuda")
    leaves = {name: inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    linear_cross_entropy(**(inputs | leaves), impl="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loss, _ = linear_cross_entropy(**(inputs | leaves), impl="triton")
    extra = torch.cuda.max_memory_allocated() - held
    gradients = 2 * tokens * width + (4 + 2) * vocabulary * (width + 1)
    assert extra <= triton.CHUNK_BYTES + gradients + 32 * tokens + workspace
    assert extra < 0.8 * 2 * tokens * vocabulary  # the logits alone
    assert loss.isfinite()


def test_nothing_waits_for_the_device():
    inputs = loss_inputs(680, 64, 512, dtype=torch.bfloat16, device="cuda")
    leaves = {name: inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    linear_cross_entropy(**(inputs | leaves), impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = linear_cross_entropy(**(inputs | leaves), impl="triton")
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("target", [-1, 12, 1 << 40])
def test_a_target_out_of_range_is_a_clear_error(target):
    """In a process of its own: a device-side assertion ends the use of the device."""
    script = (
        "import torch; from hmar_kernels import linear_cross_entropy\n"
        "hidden, weight = (torch.randn(n, 8, device='cuda') for n in (5, 12))\n"
        f"targets = torch.tensor([0, 1, {target}, 3, 4], device='cuda')\n"
        "linear_cross_entropy(hidden, weight, None, targets, impl='triton')\n"
        "torch.cuda.synchronize()\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "targets must be from 0 to 11" in done.stderr + done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one():
    assert torch.cuda.current_device() == 0
    assert_accurate(run_loss, loss_inputs(333, 72, 1000, dtype=torch.bfloat16, device="cuda:1"))


def test_custom_op_passes_opcheck():
    inputs = list(loss_inputs(70, 64, 100, dtype=torch.bfloat16, device="cuda").values())
    leaves = [x.requires_grad_() for x in inputs[:3]]
    torch.library.opcheck(api._linear_cross_entropy.overload, (*leaves, *inputs[3:], [True, True, True]))


@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_and_cuda_graph(dynamic):
    torch._dynamo.reset()
    inputs = loss_inputs(2 * 680, 256, 4096, dtype=torch.bfloat16, device="cuda")
    names = ("hidden", "weight", "bias")

    def forward(inputs):
        return linear_cross_entropy(**inputs, impl="triton")

    def step(f):
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        loss, correct = f(inputs | leaves)
        return loss, correct, *torch.autograd.grad(loss, list(leaves.values()))

    expected = step(forward)
    for actual, e in zip(step(torch.compile(forward, fullgraph=True, dynamic=dynamic)), expected, strict=True):
        torch.testing.assert_close(actual, e)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(forward)
        with torch.cuda.graph(graph, stream=stream):
            captured = step(forward)
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    for actual, e in zip(captured, expected, strict=True):
        torch.testing.assert_close(actual, e)


def test_under_autocast_weights_keep_their_sums():
    inputs = loss_inputs(680, 256, 512, dtype=torch.float32, device="cuda")
    leaves = {name: inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = linear_cross_entropy(**(inputs | leaves), impl="triton")
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert loss.dtype == torch.float32 and [g.dtype for g in grads] == [torch.float32] * 3
    assert not torch.equal(grads[1], grads[1].bfloat16().float())


def test_auto_takes_triton():
    assert choose(torch.device("cuda"), torch.bfloat16, torch.float32)[0] == "triton"
