"""gelu_linear on the CPU: the reference, the Triton kernels under the interpreter, what is kept, refusals."""

import pytest
import torch

from hmar_kernels import gelu_linear
from hmar_kernels.gelu_linear import api
from operator_cases import Draw, assert_accurate, gelu_linear_inputs, run_gelu_linear, under_autocast

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_memory_operators_gpu.py runs them")
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def test_reference_equals_the_equations():
    x, bias, weight, out_bias = gelu_linear_inputs(2, 5, hidden=12, columns=3, dtype=FP64).values()
    u = x + bias
    hidden = u / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    torch.testing.assert_close(
        gelu_linear(x, bias, weight, out_bias, impl="reference"), hidden @ weight.T + out_bias, atol=1e-12, rtol=1e-12
    )


def test_reference_gradients_against_finite_differences():
    leaves = [x.requires_grad_() for x in gelu_linear_inputs(3, 2, hidden=5, columns=4, dtype=FP64).values()]
    assert torch.autograd.gradcheck(lambda *xs: gelu_linear(*xs, impl="reference"), leaves)


@interpreted
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(2, 7, 16, 5), (1, 1, 3, 1), (1, 45, 300, 24), (3, 33, 256, 8)], ids=str)
def test_triton_under_the_interpreter(shape, dtype, poisoned_memory):
    *tokens, hidden, columns = shape
    inputs = gelu_linear_inputs(*tokens, hidden=hidden, columns=columns, dtype=dtype)
    assert_accurate(run_gelu_linear, inputs)


@interpreted
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_float32_weights_under_autocast(dtype, poisoned_memory):
    inputs = gelu_linear_inputs(2, 20, hidden=70, columns=9, dtype=dtype, weight_dtype=FP32)
    run = under_autocast(run_gelu_linear, dtype)
    assert_accurate(run, inputs)
    found = run(inputs, "triton")
    assert found["out"].dtype == found["d_x"].dtype == dtype
    assert found["d_weight"].dtype == found["d_bias"].dtype == found["d_out_bias"].dtype == FP32


@interpreted
def test_groups_of_rows_add_up():
    """More rows than one program owns, the last group not full."""
    n = 2 * api.triton.backward_rows(70, 8, torch.device("cpu")) + 3
    assert api.triton.backward_rows(n, 8, torch.device("cpu")) < n / 2
    assert_accurate(run_gelu_linear, gelu_linear_inputs(1, n, hidden=8, columns=4, dtype=FP32))


@pytest.mark.parametrize(
    ("rows", "channels", "expected"), [(21760, 4096, 88), (17920, 6144, 104), (1, 4096, 32), (0, 64, 32)]
)
def test_programs_of_the_backward_fill_the_gpu(rows, channels, expected):
    assert api.triton.backward_rows(rows, channels, torch.device("cpu")) == expected


@interpreted
def test_far_tails():
    """GELU is 0 or its argument there, and its slope 0 or 1; nothing overflows."""
    x = torch.tensor([[-3e4, -60.0, -12.0, 0.0, 12.0, 60.0, 3e4]]).requires_grad_()
    arguments = torch.zeros(7), torch.eye(7), torch.zeros(7)
    out = gelu_linear(x, *arguments, impl="triton")
    assert out.tolist() == [[0, 0, 0, 0, 12, 60, 3e4]]
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.tolist() == [[0, 0, 0, 0.5, 1, 1, 1]]


@interpreted
def test_only_the_input_is_kept():
    inputs = gelu_linear_inputs(2, 8, hidden=16, columns=4, dtype=FP16, weight_dtype=FP32)
    x, bias, weight, out_bias = (t.requires_grad_() for t in inputs.values())
    kept = []
    with (
        torch.autocast("cpu", FP16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        gelu_linear(x, bias, weight, out_bias, impl="triton")
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, bias, weight))


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_strided_inputs(impl, poisoned_memory):
    inputs = gelu_linear_inputs(3, 6, hidden=10, columns=4, dtype=FP32)
    expected = run_gelu_linear(inputs, "reference")
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    torch.testing.assert_close(run_gelu_linear(inputs, impl), expected, atol=2e-5, rtol=2e-5)
    leaves = [t.requires_grad_() for t in inputs.values()]
    out = gelu_linear(*leaves, impl=impl)
    # NOTE: gradients of stride 0 reach the backward.
    found = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(
        found, torch.autograd.grad(gelu_linear(*leaves, impl="reference").sum(), leaves), atol=2e-5, rtol=2e-5
    )


@interpreted
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_without_graph_breaks(impl, dynamic):
    torch._dynamo.reset()

    def f(inputs):
        return gelu_linear(**inputs, impl=impl).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 7):
        inputs = gelu_linear_inputs(2, tokens, hidden=12, columns=6, dtype=FP32)
        leaves = [x.requires_grad_() for x in inputs.values()]
        torch.testing.assert_close(
            torch.autograd.grad(compiled(inputs), leaves), torch.autograd.grad(f(inputs), leaves)
        )


@interpreted
def test_custom_ops_pass_opcheck():
    inputs = gelu_linear_inputs(2, 3, hidden=8, columns=4, dtype=FP32)
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(api._gelu_linear.overload, (*leaves, FP32))


@interpreted
def test_second_derivatives_are_refused():
    x, *others = gelu_linear_inputs(1, 2, hidden=4, columns=4, dtype=FP32).values()
    out = gelu_linear(x.requires_grad_(), *others, impl="triton")
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gelu_linear_backward"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])
def test_no_tokens(impl):
    found = run_gelu_linear(gelu_linear_inputs(0, 3, hidden=8, columns=4, dtype=FP32), impl)
    assert found["out"].shape == (0, 3, 4) and found["d_x"].shape == (0, 3, 8)
    assert not any(found[f"d_{name}"].any() for name in ("bias", "weight", "out_bias"))


def test_bad_arguments_are_refused_with_a_reason():
    draw = Draw("cpu")
    x, bias, weight, out_bias = draw(2, 8), draw(8), draw(4, 8), draw(4)
    for arguments, options, message in [
        ((x[:, :7], bias, weight, out_bias), {}, r"got \[2, 7\] and \[4, 8\]"),
        ((x, bias, weight[:0], out_bias[:0]), {}, "at least one channel"),
        ((x, bias[:4], weight, out_bias), {}, r"bias must be \[8\] to go with weight \[4, 8\], got \[4\]"),
        ((x, bias, weight, bias), {}, r"out_bias must be \[4\]"),
        ((x, bias, weight.to("meta"), out_bias), {}, "weight must be on x's device cpu, got meta"),
        ((x.long(), bias, weight, out_bias), {}, "x must be float16"),
        ((x, bias, weight, out_bias), {"impl": "fast"}, 'unknown impl "fast"'),
        ((x.double(), bias, weight, out_bias), {"impl": "triton"}, "not torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            gelu_linear(*arguments, **options)
