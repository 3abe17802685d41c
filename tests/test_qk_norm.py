"""qk_norm on the CPU: the reference, the Triton kernels under the interpreter, refusals."""

import math

import pytest
import torch

from hmar_kernels import SpanMask, attention, qk_norm
from hmar_kernels.qk_norm import api, choose
from operator_cases import MAX_LOG_SCALE, assert_accurate, qkv_inputs, run_qk_norm

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_qk_norm_gpu.py runs the kernels")
FP32, FP16, FP64 = torch.float32, torch.float16, torch.float64


def test_reference_equals_the_equations():
    inputs = {name: x.double() for name, x in qkv_inputs(2, 5, 3, 4, dtype=FP64).items()}
    q, k, v = qk_norm(**inputs, max_log_scale=2.0, impl="reference")
    packed = inputs["qkv"].view(2, 5, 3, 3, 4)
    for h in range(3):
        bias = slice(4 * h, 4 * h + 4)
        raw = packed[:, :, 0, h] + inputs["q_bias"][bias]
        scale = math.exp(min(inputs["log_scale"][h], 2.0))
        torch.testing.assert_close(q[:, h], scale * raw / raw.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(k[:, h], packed[:, :, 1, h] / packed[:, :, 1, h].norm(dim=-1, keepdim=True))
        torch.testing.assert_close(v[:, h], packed[:, :, 2, h] + inputs["v_bias"][bias])


def test_reference_gradients_against_finite_differences():
    inputs = qkv_inputs(2, 3, 2, 4, dtype=FP64)
    leaves = [x.double().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *xs: qk_norm(*xs, max_log_scale=2.0, impl="reference"), leaves)


@interpreted
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(2, 7, 3, 16), (1, 1, 1, 5), (1, 33, 2, 64), (2, 3, 2, 80)], ids=str)
def test_triton_under_the_interpreter(shape, dtype, poisoned_memory):
    assert_accurate(run_qk_norm, qkv_inputs(*shape, dtype=dtype))


@interpreted
def test_partial_sums_of_several_programs(poisoned_memory):
    assert_accurate(run_qk_norm, qkv_inputs(2, 2 * api.triton.BACKWARD_ROWS + 3, 2, 16, dtype=FP32))


@interpreted
def test_heads_have_unit_length_and_their_scale():
    q, k, _ = qk_norm(**qkv_inputs(2, 9, 4, 16, dtype=FP32), max_log_scale=MAX_LOG_SCALE, impl="triton")
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 4, 9))
    scale = torch.linspace(-1, 5, 4).clamp_max(MAX_LOG_SCALE).exp()
    torch.testing.assert_close(q.norm(dim=-1), scale[:, None].expand(2, 4, 9))
    assert scale[-1] == pytest.approx(100)


@interpreted
def test_vectors_too_short_to_be_normalised():
    """Zero stays zero, and below 1e-12 the gradient is that of a division by it, as in F.normalize."""
    inputs = qkv_inputs(1, 6, 2, 16, dtype=FP32)
    inputs["q_bias"].zero_()
    inputs["qkv"][:, 1] = 0.0
    inputs["qkv"][:, 3] *= 1e-15
    found, expected = (run_qk_norm(inputs, impl) for impl in ("triton", "reference"))
    assert not found["q"][:, :, 1].any() and not found["k"][:, :, 1].any()
    assert found["d_qkv"][:, 3].abs().max() > 1e10
    for name, actual in found.items():
        torch.testing.assert_close(actual, expected[name], atol=1e-4, rtol=1e-4)


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_heads_do_not_touch_each_other(impl):
    inputs = qkv_inputs(2, 5, 4, 16, dtype=FP32)
    before = run_qk_norm(inputs, impl)
    inputs["log_scale"][1] += 0.5
    inputs["qkv"].view(2, 5, 3, 4, 16)[:, :, :, 1] += 1.0
    after, others = run_qk_norm(inputs, impl), [0, 2, 3]
    for name, dim in (("q", 1), ("k", 1), ("v", 1), ("d_qkv", 3), ("d_q_bias", 0), ("d_log_scale", 0)):
        a, b = before[name], after[name]
        if name == "d_qkv":
            a, b = a.view(2, 5, 3, 4, 16), b.view(2, 5, 3, 4, 16)
        elif name == "d_q_bias":
            a, b = a.view(4, 16), b.view(4, 16)
        unchanged = torch.tensor(others)
        assert torch.equal(a.index_select(dim, unchanged), b.index_select(dim, unchanged)), name
        assert not torch.equal(a, b), name


@interpreted
def test_a_scale_beyond_its_limit_has_no_gradient():
    inputs = qkv_inputs(1, 5, 3, 16, dtype=FP32)
    inputs["log_scale"] = torch.tensor([MAX_LOG_SCALE - 0.1, MAX_LOG_SCALE, MAX_LOG_SCALE + 0.1])
    for impl in ("reference", "triton"):
        assert (run_qk_norm(inputs, impl)["d_log_scale"] != 0).tolist() == [True, True, False]


@interpreted
def test_strided_inputs_and_gradients(poisoned_memory):
    inputs = qkv_inputs(2, 6, 2, 16, dtype=FP32)
    inputs["qkv"] = inputs["qkv"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["q_bias"] = inputs["q_bias"][:1].expand(32)
    results = []
    for impl in ("reference", "triton"):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        q, k, v = qk_norm(**leaves, max_log_scale=MAX_LOG_SCALE, impl=impl)
        seed = torch.arange(2.0 * 2 * 6 * 16).view(2, 2, 16, 6).mT  # head dim not contiguous
        loss = (q * seed).sum() + k.sum() + v.transpose(1, 2).cumsum(1).sum()
        results.append((q, k, v, *torch.autograd.grad(loss, list(leaves.values()))))
    torch.testing.assert_close(results[1], results[0], atol=2e-3, rtol=2e-5)


@interpreted
def test_qkv_is_not_kept_and_its_gradient_is_one_tensor():
    inputs = {name: x.requires_grad_() for name, x in qkv_inputs(2, 8, 2, 16, dtype=FP16).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q, k, v = qk_norm(**inputs, max_log_scale=MAX_LOG_SCALE, impl="triton")
    large = [t for t in kept if t.numel() >= q.numel()]
    assert [t.data_ptr() for t in large] == [q.data_ptr(), k.data_ptr()]
    assert sum(t.numel() for t in kept) == 2 * q.numel() + 2 * 2 * 2 * 8 + 2
    (d_qkv,) = torch.autograd.grad(q.sum() + k.sum() + v.sum(), inputs["qkv"])
    assert d_qkv.is_contiguous() and d_qkv.untyped_storage().nbytes() == inputs["qkv"].untyped_storage().nbytes()


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])
def test_result_goes_into_attention_as_it_is(impl):
    q, k, v = qk_norm(**qkv_inputs(2, 5, 3, 16, dtype=FP32), impl=impl)
    assert all(x.shape == (2, 3, 5, 16) and x.stride(3) == 1 for x in (q, k, v))
    assert attention(q, k, v, SpanMask.causal(5), scale=1.0).transpose(1, 2).is_contiguous()


@interpreted
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_without_graph_breaks(impl, dynamic):
    torch._dynamo.reset()

    def f(inputs):
        q, k, v = qk_norm(**inputs, max_log_scale=MAX_LOG_SCALE, impl=impl)
        return (q @ k.mT) @ v

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, length in ((2, 5), (3, 7)):
        inputs = {name: x.requires_grad_() for name, x in qkv_inputs(batch, length, 3, 16, dtype=FP32).items()}
        results = [f(inputs), compiled(inputs)]
        torch.testing.assert_close(results[1], results[0])
        grads = [torch.autograd.grad(out.square().sum(), list(inputs.values())) for out in results]
        torch.testing.assert_close(grads[1], grads[0])


@interpreted
def test_custom_op_passes_opcheck():
    inputs = [x.requires_grad_() for x in qkv_inputs(2, 3, 2, 16, dtype=FP32).values()]
    torch.library.opcheck(api._qk_norm.overload, (*inputs, MAX_LOG_SCALE))


@interpreted
def test_second_derivatives_are_refused():
    inputs = {name: x.requires_grad_() for name, x in qkv_inputs(1, 2, 1, 16, dtype=FP32).items()}
    q, _, _ = qk_norm(**inputs, impl="triton")
    (d_qkv,) = torch.autograd.grad(q.square().sum(), inputs["qkv"], create_graph=True)
    with pytest.raises(RuntimeError, match="qk_norm_backward"):
        torch.autograd.grad(d_qkv.sum(), inputs["qkv"])


@pytest.mark.parametrize("empty", [(0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])
def test_no_tokens(impl, empty):
    found = run_qk_norm(qkv_inputs(*empty, 2, 16, dtype=FP32), impl)
    assert found["q"].shape == (empty[0], 2, empty[1], 16) and found["d_qkv"].shape == (*empty, 96)
    assert not found["d_q_bias"].any() and not found["d_log_scale"].any()


def test_auto_takes_the_reference_on_cpu_and_says_so():
    assert choose(torch.device("cpu"), FP32) == ("reference", "the plain implementation serves CPU tensors and float64")


def test_bad_arguments_are_refused_with_a_reason():
    good = qkv_inputs(2, 3, 2, 16, dtype=FP32)
    for change, message in [
        (
            {"qkv": good["qkv"].unflatten(2, (3, -1))},
            r"qkv must be \[B, L, 3 H D\], got shape \[2, 3, 3, 32\]; flatten",
        ),
        ({"qkv": good["qkv"][..., :95]}, r"must be \[B, L, 3 H D\], got shape \[2, 3, 95\]"),
        ({"log_scale": torch.zeros(5)}, r"H a divisor of the width 32 of q, got shape \[5\]"),
        ({"log_scale": torch.zeros(())}, r"log_scale must be \[H\]"),
        ({"q_bias": torch.zeros(16)}, r"q_bias must be \[32\] to go with qkv \[2, 3, 96\], got \[16\]"),
        ({"v_bias": torch.zeros(96)}, r"v_bias must be \[32\]"),
        ({"v_bias": torch.zeros(32, dtype=torch.int32)}, "v_bias must be float16, .* got torch.int32"),
        ({"q_bias": torch.zeros(32, device="meta")}, "q_bias must be on qkv's device cpu, got meta"),
        ({"max_log_scale": math.nan}, "max_log_scale must be a number, or math.inf"),
        ({"impl": "fast"}, 'unknown impl "fast": expected "auto", "reference" or "triton"'),
        ({"qkv": good["qkv"].double(), "impl": "triton"}, 'impl="triton" cannot run here: .* not torch.float64'),
    ]:
        with pytest.raises(ValueError, match=message):
            qk_norm(**(good | change))
