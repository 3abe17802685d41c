"""norm_linear on the CPU: the reference, the Triton kernels under the interpreter, what is kept, refusals."""

import pytest
import torch

from hmar_kernels import modulated_norm, norm_linear, residual_modulated_norm, residual_norm_linear
from hmar_kernels.norm_linear import api
from operator_cases import Draw, assert_accurate, norm_linear_inputs, run_norm_linear, under_autocast

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_memory_operators_gpu.py runs them")
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
KEPT = pytest.mark.parametrize("keep_x", [False, True], ids=["keeps_y", "keeps_x"])


def arguments(inputs):
    """x, branch, gate, scale, shift, weight of `residual_norm_linear`."""
    gate, scale, shift = inputs["modulation"][:, None].chunk(6, dim=-1)[:3]
    return inputs["x"], inputs["branch"], gate, scale, shift, inputs["w1"]


def test_reference_is_the_norm_and_a_linear_layer():
    x, branch, gate, scale, shift, weight = arguments(norm_linear_inputs(2, 5, 12, 7, x_dtype=FP64, dtype=FP64))
    y, h = residual_modulated_norm(x, branch, gate, scale, shift, eps=0.1)
    actual_y, out = residual_norm_linear(x, branch, gate, scale, shift, weight, eps=0.1)
    torch.testing.assert_close(actual_y, y)
    torch.testing.assert_close(out, h @ weight.T)
    expected = modulated_norm(x, scale, shift, eps=0.1) @ weight.T
    torch.testing.assert_close(norm_linear(x, scale, shift, weight, eps=0.1), expected)


@interpreted
@KEPT
@pytest.mark.parametrize(
    ("x_dtype", "dtype"), [(FP32, FP32), (FP16, FP16), (FP32, FP16)], ids=["fp32", "fp16", "fp32+fp16"]
)
@pytest.mark.parametrize("shape", [(2, 7, 16, 5), (1, 1, 5, 1), (3, 35, 48, 20)], ids=str)
def test_triton_under_the_interpreter(shape, x_dtype, dtype, keep_x, poisoned_memory):
    assert_accurate(run_norm_linear, norm_linear_inputs(*shape, x_dtype=x_dtype, dtype=dtype), keep_x)


@interpreted
@KEPT
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_float32_weights_under_autocast(dtype, keep_x, poisoned_memory):
    inputs = norm_linear_inputs(2, 20, 40, 9, x_dtype=FP32, dtype=dtype, weight_dtype=FP32)
    run = under_autocast(run_norm_linear, dtype)
    assert_accurate(run, inputs, keep_x)
    found = run(inputs, "triton")
    assert found["out"].dtype == found["out_after"].dtype == dtype
    assert found["y"].dtype == found["d_w1"].dtype == found["d_w2"].dtype == FP32


@interpreted
@KEPT
def test_what_is_kept(keep_x):
    inputs = norm_linear_inputs(2, 9, 16, 48, x_dtype=FP32, dtype=FP16, weight_dtype=FP32)
    x, branch, gate, scale, shift, weight = (t.detach().requires_grad_() for t in arguments(inputs))
    kept = []
    with (
        torch.autocast("cpu", FP16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y, _ = residual_norm_linear(x, branch, gate, scale, shift, weight, keep_x=keep_x, impl="triton")
    pointers = {t.data_ptr() for t in kept if t.numel() != 2 * 2 * 9}  # but for the statistics
    expected = x if keep_x else y
    assert pointers == {t.data_ptr() for t in (expected, branch, gate, scale, shift, weight)}
    assert len(kept) == 7


@interpreted
def test_both_ways_of_keeping_agree_and_y_is_kept_where_x_has_fewer_bits():
    for x_dtype in (FP32, FP16):
        inputs = norm_linear_inputs(2, 9, 24, 8, x_dtype=x_dtype, dtype=FP32)
        torch.testing.assert_close(run_norm_linear(inputs, "triton", True), run_norm_linear(inputs, "triton", False))


@interpreted
@KEPT
def test_a_result_without_use_has_no_share(keep_x):
    """Gradients of stride 0, and of y or out alone."""
    leaves = [t.detach().requires_grad_() for t in arguments(norm_linear_inputs(2, 6, 12, 5, x_dtype=FP32, dtype=FP32))]
    results = []
    for impl in ("reference", "triton"):
        y, out = residual_norm_linear(*leaves, keep_x=keep_x, impl=impl)
        found = [*torch.autograd.grad(out.sum(), leaves, retain_graph=True)]
        found += torch.autograd.grad(y.sum(), leaves, retain_graph=True, materialize_grads=True)
        found += torch.autograd.grad(y.sum() + out.sum(), leaves)
        results.append(found)
    torch.testing.assert_close(results[1], results[0], atol=5e-5, rtol=5e-5)


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_without_graph_breaks(impl):
    torch._dynamo.reset()

    def f(inputs):
        x, branch, gate, scale, shift, weight = arguments(inputs)
        out = norm_linear(x, scale, shift, weight, impl=impl)
        y, after = residual_norm_linear(x, branch + out, gate, scale, shift, inputs["w2"], keep_x=True, impl=impl)
        return (y * after).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for tokens in (5, 7):
        inputs = norm_linear_inputs(2, tokens, 12, 12, x_dtype=FP32, dtype=FP32)
        leaves = [x.requires_grad_() for x in inputs.values()]
        torch.testing.assert_close(
            torch.autograd.grad(compiled(inputs), leaves), torch.autograd.grad(f(inputs), leaves)
        )


@interpreted
def test_custom_ops_pass_opcheck():
    inputs = norm_linear_inputs(2, 3, 8, 6, x_dtype=FP32, dtype=FP32)
    x, branch, gate, scale, shift, weight = (t.detach().requires_grad_() for t in arguments(inputs))
    torch.library.opcheck(api._norm_linear.overload, (x, scale, shift, weight, 1e-6, FP32))
    for keep_x in (False, True):
        torch.library.opcheck(
            api._residual_norm_linear.overload, (x, branch, gate, scale, shift, weight, 1e-6, FP16, keep_x)
        )


@pytest.mark.parametrize("empty", [(0, 3, 8, 4), (2, 0, 8, 4)], ids=str)
@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])
def test_no_tokens(impl, empty):
    found = run_norm_linear(norm_linear_inputs(*empty, x_dtype=FP32, dtype=FP32), impl)
    assert found["out_after"].shape == (*empty[:2], 4) and found["d_x"].shape == empty[:3]
    assert found["d_w2"].shape == (4, 8) and not found["d_w2"].any()


def test_bad_arguments_are_refused_with_a_reason():
    draw = Draw("cpu")
    x, vector, weight = draw(2, 3, 8), draw(2, 1, 8), draw(4, 8)
    for positional, options, message in [
        ((x, vector, vector, weight.T), {}, r"weight must be \[M, 8\] to go with x \[2, 3, 8\], got \[8, 4\]"),
        ((x, vector, vector, weight[:0]), {}, r"weight must be \[M, 8\]"),
        ((x, vector, vector, weight.to("meta")), {}, "weight must be on x's device cpu, got meta"),
        ((x, vector, vector, weight.long()), {}, "weight must be float16"),
        ((x, vector[:, 0], vector, weight), {}, r"scale must be \[2, 1, 8\]"),
        ((x, vector, vector, weight), {"impl": "fast"}, 'unknown impl "fast"'),
    ]:
        with pytest.raises(ValueError, match=message):
            norm_linear(*positional, **options)
    with pytest.raises(ValueError, match=r"branch must be \[2, 3, 8\]"):
        residual_norm_linear(x, x[:, :2], vector, vector, vector, weight)
    with pytest.raises(ValueError, match=r"weight must be \[M, 8\]"):
        residual_norm_linear(x, x, vector, vector, vector, weight.T)
