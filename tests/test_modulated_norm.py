"""modulated_norm on the CPU: the reference, the Triton kernels under the interpreter, refusals."""

import pytest
import torch

from hmar_kernels import modulated_norm, residual_modulated_norm, summed_modulated_norm
from hmar_kernels.modulated_norm import api, choose
from hmar_kernels.modulated_norm import triton as kernels
from hmar_kernels.triton_device import PARTIALS_TILE
from operator_cases import Draw, assert_accurate, assert_parts_add_up, norm_inputs, run_norm, summed_inputs

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_modulated_norm_gpu.py runs them")
FP32, FP16, FP64 = torch.float32, torch.float16, torch.float64


def arguments(inputs):
    """x, branch, gate, scale, shift of `residual_modulated_norm`."""
    gate, scale, shift = inputs["modulation"][:, None].chunk(6, dim=-1)[:3]
    return inputs["x"], inputs["branch"], gate, scale, shift


@pytest.mark.parametrize("keep", [True, False])
def test_reference_equals_the_equations(keep):
    inputs = norm_inputs(2, 5, 12, x_dtype=FP64, dtype=FP64, keep=keep)
    x, branch, gate, scale, shift = arguments(inputs)
    y, h = residual_modulated_norm(*arguments(inputs), keep=inputs["keep"], eps=0.1, impl="reference")
    expected = x + gate * branch * (inputs["keep"][:, None, None] if keep else 1)
    centred = expected - expected.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h, unit * (1 + scale) + shift)
    torch.testing.assert_close(modulated_norm(y, scale, shift, eps=0.1, impl="reference"), h)


def test_reference_gradients_against_finite_differences():
    inputs = norm_inputs(2, 3, 5, x_dtype=FP64, dtype=FP64)
    leaves = [x.detach().requires_grad_() for x in arguments(inputs)]
    assert torch.autograd.gradcheck(
        lambda *xs: residual_modulated_norm(*xs, keep=inputs["keep"], impl="reference"), leaves
    )
    assert torch.autograd.gradcheck(lambda *xs: modulated_norm(*xs, impl="reference"), [leaves[0], *leaves[3:]])


@interpreted
@pytest.mark.parametrize("keep", [True, False], ids=["drop_path", "all"])
@pytest.mark.parametrize(
    ("x_dtype", "dtype"), [(FP32, FP32), (FP16, FP16), (FP32, FP16)], ids=["fp32", "fp16", "fp32+fp16"]
)
@pytest.mark.parametrize("shape", [(2, 7, 16), (1, 1, 5), (3, 35, 48), (2, 33, 130)], ids=str)
def test_triton_under_the_interpreter(shape, x_dtype, dtype, keep, poisoned_memory):
    assert_accurate(run_norm, norm_inputs(*shape, x_dtype=x_dtype, dtype=dtype, keep=keep), dtype)


@interpreted
def test_triton_needs_more_rows_than_one_program_owns_and_wide_ones(poisoned_memory):
    """More partial sums than one step of their sum takes, and channels beyond the table."""
    length = (PARTIALS_TILE + 1) * api.triton.LEAST_ROWS - 3
    assert_accurate(run_norm, norm_inputs(1, length, 20, x_dtype=FP32, dtype=FP32), None)
    assert_accurate(run_norm, norm_inputs(1, 2, 4100, x_dtype=FP32, dtype=FP32), None)


@pytest.mark.parametrize(
    ("batch", "length", "rows"),
    [(32, 680, 21), (16, 680, 11), (8, 2240, 17), (2, 9451, 18), (1, 1, 8), (2000, 680, 680)],
)
def test_programs_of_the_backward_fill_the_gpu(batch, length, rows):
    assert api.triton.backward_rows(batch, length, torch.device("cpu")) == rows


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_tokens_and_images_do_not_touch_each_other(impl):
    inputs = norm_inputs(3, 9, 24, x_dtype=FP32, dtype=FP32)
    before = run_norm(inputs, impl)
    inputs["x"][1, 4] += 1.0
    after = run_norm(inputs, impl)
    others = [i for i in range(9) if i != 4]
    for name, a in before.items():
        b = after[name]
        assert torch.equal(a[::2], b[::2]), name
        if name not in ("d_modulation", "d_branch"):
            assert not torch.equal(a[1, 4], b[1, 4]), name
        if name != "d_modulation":
            assert torch.equal(a[1, others], b[1, others]), name


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_dropped_branch_leaves_no_trace(impl):
    inputs = norm_inputs(2, 6, 10, x_dtype=FP32, dtype=FP32)
    found = run_norm(inputs, impl)
    assert torch.equal(found["y"][0], inputs["x"][0]) and not torch.equal(found["y"][1], inputs["x"][1])
    assert not found["d_branch"][0].any() and found["d_branch"][1].all()
    assert not found["d_modulation"][0, :10].any() and found["d_modulation"][1, :10].all()


@interpreted
@pytest.mark.parametrize("layout", ["channels_first", "shared_vectors", "expanded"])
def test_strided_inputs(layout, poisoned_memory):
    inputs = norm_inputs(2, 6, 12, x_dtype=FP32, dtype=FP32)
    x, branch, gate, scale, shift = arguments(inputs)
    if layout == "channels_first":
        x, branch = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, branch))
    elif layout == "shared_vectors":  # as SharedModulation gives them: [B, 6, C] in chunks of dim 1
        gate, scale, shift = inputs["modulation"].unflatten(1, (6, 12)).chunk(6, dim=1)[:3]
    else:
        gate, scale = (t[:1].expand(2, -1, -1) for t in (gate, scale))
        shift = shift[:, :, :1].expand(-1, -1, 12)
    results = []
    for impl in ("reference", "triton"):
        leaves = [t.detach().requires_grad_() for t in (x, branch, gate, scale, shift)]
        y, h = residual_modulated_norm(*leaves, impl=impl)
        # NOTE: gradients of stride 0 reach the backward, and none where a result has no use.
        results.append((y, h, *torch.autograd.grad(h.sum() + y.sum(), leaves)))
        y, h = residual_modulated_norm(*leaves, impl=impl)
        results[-1] += torch.autograd.grad(h.sum(), leaves, retain_graph=True)
        results[-1] += torch.autograd.grad(y.sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)


@interpreted
def test_only_what_the_backward_needs_is_kept():
    inputs = norm_inputs(2, 8, 16, x_dtype=FP32, dtype=FP16, keep=False)
    x, branch, gate, scale, shift = (t.detach().requires_grad_() for t in arguments(inputs))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = residual_modulated_norm(x, branch, gate, scale, shift, dtype=FP16, impl="triton")
        after, kept[:] = list(kept), []
        modulated_norm(x, scale, shift, dtype=FP16, impl="triton")
    large = [t.data_ptr() for t in after if t.numel() >= x.numel()]
    assert sorted(large) == sorted([y.data_ptr(), branch.data_ptr()])
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]
    assert sum(t.numel() for t in after if t.dtype == FP32) == y.numel() + 2 * 2 * 8


@interpreted
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP32, FP16), (FP16, FP16)], ids=["fp32", "fp32+fp16", "fp16"])
@pytest.mark.parametrize("parts, shape", [(1, (2, 5, 12)), (2, (1, 9, 130)), (3, (3, 1, 64))], ids=str)
def test_parts_add_up(parts, shape, dtypes, poisoned_memory):
    assert_parts_add_up(parts, *shape, *dtypes)


@interpreted
def test_many_rows_of_parts_take_the_tiles_of_all(monkeypatch, poisoned_memory):
    monkeypatch.setattr(kernels, "FEW_ROWS_PER_SM", 0)
    assert_parts_add_up(2, 2, 11, 24, FP32, FP32)


def test_one_part_without_a_bias_is_the_branch():
    inputs = norm_inputs(2, 5, 12, x_dtype=FP64, dtype=FP64, keep=False)
    x, branch, gate, scale, shift = arguments(inputs)
    found = summed_modulated_norm(x, branch[None], torch.zeros(12, dtype=FP64), gate, scale, shift, eps=0.1)
    expected = residual_modulated_norm(*arguments(inputs), eps=0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@interpreted
def test_parts_compile_without_graph_breaks():
    inputs = summed_inputs(2, 2, 3, 8, FP32, FP32)
    f = lambda: summed_modulated_norm(**inputs, impl="triton")  # noqa: E731
    assert all(map(torch.equal, torch.compile(f, fullgraph=True, backend="aot_eager")(), f()))


@interpreted
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_without_graph_breaks(impl, dynamic):
    torch._dynamo.reset()

    def f(inputs):
        x, branch, gate, scale, shift = arguments(inputs)
        h = modulated_norm(x, scale, shift, impl=impl)
        return residual_modulated_norm(x, branch + h, gate, scale, shift, keep=inputs["keep"], impl=impl)[1]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 5, 12), (3, 7, 12)):
        inputs = norm_inputs(*shape, x_dtype=FP32, dtype=FP32)
        inputs["x"].requires_grad_()
        actual, expected = compiled(inputs), f(inputs)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), inputs["x"]),
            torch.autograd.grad(expected.square().sum(), inputs["x"]),
        )


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_result_has_the_dtype_that_a_linear_layer_wants(impl):
    inputs = norm_inputs(2, 3, 8, x_dtype=FP32, dtype=FP16)
    x, branch, gate, scale, shift = arguments(inputs)
    y, h = residual_modulated_norm(x, branch, gate, scale, shift, impl=impl)
    assert (y.dtype, h.dtype) == (FP32, FP32)
    y, h = residual_modulated_norm(x.half(), branch, gate, scale, shift, keep=inputs["keep"], impl=impl)
    assert (y.dtype, h.dtype) == (FP16, FP16)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = residual_modulated_norm(x, branch, gate, scale, shift, impl=impl)
        assert (y.dtype, h.dtype) == (FP32, torch.bfloat16)
        assert modulated_norm(x, scale, shift, impl=impl).dtype == torch.bfloat16
        assert modulated_norm(x, scale, shift, dtype=FP32, impl=impl).dtype == FP32


@interpreted
def test_custom_ops_pass_opcheck():
    inputs = norm_inputs(2, 3, 8, x_dtype=FP32, dtype=FP32)
    x, branch, gate, scale, shift = (t.detach().requires_grad_() for t in arguments(inputs))
    torch.library.opcheck(api._norm.overload, (x, scale, shift, 1e-6, FP32))
    arguments_ = (x, branch, gate, inputs["keep"], scale, shift, 1e-6, FP16)
    torch.library.opcheck(api._residual_norm.overload, arguments_)


@interpreted
def test_second_derivatives_are_refused():
    inputs = norm_inputs(1, 2, 4, x_dtype=FP32, dtype=FP32)
    x, _, _, scale, shift = arguments(inputs)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(modulated_norm(x, scale, shift, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modulated_norm_backward"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("empty", [(0, 3, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])
def test_no_tokens(impl, empty):
    found = run_norm(norm_inputs(*empty, x_dtype=FP32, dtype=FP32), impl)
    assert found["h_after"].shape == found["d_x"].shape == empty
    assert found["d_modulation"].shape == (empty[0], 48) and not found["d_modulation"].any()


def test_auto_takes_the_reference_on_cpu_and_says_so():
    assert choose(torch.device("cpu"), FP32) == ("reference", "the plain implementation serves CPU tensors and float64")


def test_bad_arguments_are_refused_with_a_reason():
    draw = Draw("cpu")
    x, vector = draw(2, 3, 8), draw(2, 1, 8)
    for positional, options, message in [
        ((x[0], vector, vector), {}, r"x must be \[B, L, C\] with at least one channel, got shape \[3, 8\]"),
        ((x[..., :0], vector, vector), {}, "at least one channel"),
        ((x, vector[:, 0], vector), {}, r"scale must be \[2, 1, 8\].*got \[2, 8\]; unsqueeze\(1\)"),
        ((x, vector, vector[:1]), {}, r"shift must be \[2, 1, 8\].*got \[1, 1, 8\]"),
        ((x, vector.to("meta"), vector), {}, "scale must be on x's device cpu, got meta"),
        ((x.long(), vector, vector), {}, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        ((x, vector, vector), {"dtype": torch.int8}, "dtype must be float16"),
        ((x, vector, vector), {"impl": "fast"}, 'unknown impl "fast": expected "auto", "reference" or "triton"'),
        ((x.double(), vector, vector), {"impl": "triton"}, 'impl="triton" cannot run here: .* not torch.float64'),
    ]:
        with pytest.raises(ValueError, match=message):
            modulated_norm(*positional, **options)
    for positional, options, message in [
        ((x, x[:, :2], vector, vector, vector), {}, r"branch must be \[2, 3, 8\]"),
        ((x, x, vector[..., :4], vector, vector), {}, r"gate must be \[2, 1, 8\]"),
        ((x, x, vector, vector, vector), {"keep": torch.ones(3)}, r"keep must be \[2\]"),
        ((x, x, vector, vector, vector), {"keep": torch.ones(2, dtype=torch.bool)}, "keep must be float16"),
        ((x, x, vector, vector, vector), {"keep": torch.ones(2, requires_grad=True)}, "keep.detach"),
    ]:
        with pytest.raises(ValueError, match=message):
            residual_modulated_norm(*positional, **options)
    parts, bias = x[None], x[0, 0]
    for change, message in [
        ({"parts": x}, r"parts must be \[P, B, L, C\].*\[2, 3, 8\]"),
        ({"parts": parts[:0]}, "at least one part"),
        ({"parts": parts[..., :4]}, r"branch must be \[2, 3, 8\]"),
        ({"bias": bias[:3]}, r"bias must be floats \[8\]"),
        ({"bias": bias.long()}, "bias must be floats.*int64"),
        ({"impl": "triton", "bias": bias.clone().requires_grad_()}, "no derivative"),
    ]:
        with pytest.raises(ValueError, match=message):
            given = {"parts": parts, "bias": bias, "gate": vector, "scale": vector, "shift": vector}
            summed_modulated_norm(x, **given | change)
