"""linear_cross_entropy on the CPU: the reference, the Triton kernel under the interpreter, chunks, refusals."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hmar_kernels import linear_cross_entropy
from hmar_kernels.linear_cross_entropy import api, choose, triton
from operator_cases import assert_accurate, assert_correct_agrees, loss_inputs, run_loss

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, test_linear_cross_entropy_gpu.py runs the kernel"
)
FP32, FP16, FP64 = torch.float32, torch.float16, torch.float64


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 tokens."""
    monkeypatch.setattr(triton, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton, "ROW_MULTIPLE", 16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_reference_equals_the_equations(weighted, bias):
    inputs = loss_inputs(11, 6, 7, dtype=FP64, weighted=weighted, bias=bias)
    loss, correct = linear_cross_entropy(**inputs, impl="reference")
    logits = inputs["hidden"] @ inputs["weight"].T + (inputs["bias"] if bias else 0)
    losses = logits.logsumexp(1) - logits[torch.arange(11), inputs["targets"]]
    weights = inputs["token_weight"].double() if weighted else torch.full((11,), 1 / 11, dtype=FP64)
    torch.testing.assert_close(loss, (losses * weights).sum())
    assert torch.equal(correct, logits.argmax(1) == inputs["targets"])


def test_reference_gradients_against_finite_differences():
    inputs = loss_inputs(5, 4, 6, dtype=FP64)
    names = ("hidden", "weight", "bias")
    leaves = [inputs[name].requires_grad_() for name in names]

    def f(*leaves):
        return linear_cross_entropy(**(inputs | dict(zip(names, leaves, strict=True))), impl="reference")[0]

    assert torch.autograd.gradcheck(f, leaves) and torch.autograd.gradgradcheck(f, leaves)


@interpreted
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "mean"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 3, 1), (37, 24, 50), (16, 8, 64)], ids=str)
def test_triton_under_the_interpreter(shape, dtype, weighted, bias, small_chunks, poisoned_memory):
    assert_accurate(run_loss, loss_inputs(*shape, dtype=dtype, weighted=weighted, bias=bias))


@interpreted
def test_a_vocabulary_of_several_blocks(monkeypatch, poisoned_memory):
    monkeypatch.setattr(triton, "BLOCK_COLUMNS", 32)
    inputs = loss_inputs(19, 8, 101, dtype=FP32)
    assert_accurate(run_loss, inputs)
    assert_correct_agrees(inputs)


@interpreted
def test_whether_the_target_has_the_largest_logit():
    assert_correct_agrees(loss_inputs(60, 16, 12, dtype=FP32))
    # of equal logits the first is taken
    hidden, weight = torch.ones(4, 2), torch.tensor([[0.0, 0], [1, 1], [2, 0], [0, 1]])
    for impl in ("reference", "triton"):
        _, correct = linear_cross_entropy(hidden, weight, None, torch.arange(4), impl=impl)
        assert correct.tolist() == [False, True, False, False]


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_token_of_weight_zero_takes_no_part(impl, small_chunks):
    inputs = loss_inputs(23, 8, 10, dtype=FP32)
    before = run_loss(inputs, impl)
    out = inputs["token_weight"] == 0
    assert 0 < out.sum() < 23 and not before["d_hidden"][out].any() and before["d_hidden"][~out].all()
    inputs["hidden"][out] = 1e30  # finite, with logits that are not
    after = run_loss(inputs, impl)
    assert torch.equal(before["loss"], after["loss"])
    assert torch.equal(before["d_hidden"], after["d_hidden"]) and torch.equal(before["d_bias"], after["d_bias"])


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_all_weights_zero(impl):
    inputs = loss_inputs(5, 8, 10, dtype=FP32)
    inputs["token_weight"].zero_()
    found = run_loss(inputs, impl)
    assert found["loss"] == 0 and not any(found[name].any() for name in ("d_hidden", "d_weight", "d_bias"))


@interpreted
def test_gradients_of_tiny_weights_survive_float16():
    """Without the unit, gradients of a weight of 1e-6 would be zero or denormal: 4096 classes share it."""
    inputs = loss_inputs(8, 16, 512, dtype=FP16)
    inputs["token_weight"] = torch.full((8,), 1e-6)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    loss, _ = linear_cross_entropy(**inputs, impl="triton")
    grads = torch.autograd.grad(loss * 2.0**16, leaves)  # as a gradient scaler does
    exact = [x.detach().double().requires_grad_() for x in leaves]
    names = dict(zip(("hidden", "weight", "bias"), exact, strict=True))
    expected = torch.autograd.grad(linear_cross_entropy(**(inputs | names))[0] * 2.0**16, exact)
    for actual, e in zip(grads, expected, strict=True):
        assert (actual.double() - e).norm() < 4e-3 * e.norm()


@interpreted
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_gradients_that_nobody_wants_are_not_computed(frozen, monkeypatch):
    inputs = loss_inputs(9, 8, 10, dtype=FP32)
    found, expected = [], []
    forward = triton.forward
    monkeypatch.setattr(triton, "forward", lambda *a: found.append(forward(*a)) or found[-1])
    names = [name for name in ("hidden", "weight", "bias") if name != frozen]
    for impl in ("reference", "triton"):
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        loss, _ = linear_cross_entropy(**(inputs | leaves), impl=impl)
        expected.append(torch.autograd.grad(loss, list(leaves.values())))
    torch.testing.assert_close(expected[1], expected[0], atol=1e-6, rtol=1e-4)
    sizes = dict(zip(("hidden", "weight", "bias"), (x.numel() for x in found[0][3:]), strict=True))
    assert sizes == {n: inputs[n].numel() if n in names else 0 for n in ("hidden", "weight", "bias")}
    with torch.no_grad():
        linear_cross_entropy(**inputs, impl="triton")
    assert [x.numel() for x in found[1][3:]] == [0, 0, 0]


class LargestTensor(TorchDispatchMode):
    """The most numbers in a result of an operation. (The interpreter of Triton looks at memory as bytes, too.)"""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        sizes = [x.numel() for x in results if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.numel = max([self.numel, *sizes])
        return out


@interpreted
def test_logits_of_all_tokens_never_exist(small_chunks):
    inputs = loss_inputs(160, 4, 64, dtype=FP32)
    with LargestTensor() as largest:
        triton.forward(*inputs.values(), [True, True, True])
    assert largest.numel == 16 * 64 < 160 * 64
    with LargestTensor() as largest:
        linear_cross_entropy(**inputs, impl="reference")
    assert largest.numel == 160 * 64


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "dtype", "rows"),
    [
        (32 * 680, 4096, torch.bfloat16, 7296),  # 3 chunks instead of two of 8192 and a rest
        (2 * 9451, 4096, torch.bfloat16, 6400),
        (32 * 680, 4096, torch.float32, 3712),
        (100, 4096, torch.bfloat16, 128),
        (1000, 1 << 20, torch.float32, 128),  # one multiple is the least
    ],
)
def test_chunks_are_bounded_and_even(tokens, vocabulary, dtype, rows):
    assert triton.chunk_rows(tokens, vocabulary, dtype) == rows
    assert rows == triton.ROW_MULTIPLE or rows * vocabulary * dtype.itemsize <= triton.CHUNK_BYTES


@interpreted
def test_the_logits_and_hidden_are_not_kept():
    inputs = loss_inputs(40, 8, 64, dtype=FP16)
    leaves = {name: inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(**(inputs | leaves), impl="triton")
    assert sorted(t.numel() for t in kept) == sorted([1, *(x.numel() for x in leaves.values())])
    assert not {t.data_ptr() for t in kept} & {x.data_ptr() for x in leaves.values()}


@interpreted
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_autocast_rounds_operands_but_not_the_gradient_of_the_weights(impl):
    inputs = loss_inputs(9, 8, 10, dtype=FP32)
    low = {name: inputs[name].bfloat16() for name in ("hidden", "weight", "bias")}
    leaves = {name: inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(**(inputs | leaves), impl=impl)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert loss.dtype == FP32 and [g.dtype for g in grads] == [FP32] * 3
    expected, _ = linear_cross_entropy(**(inputs | low), impl="reference")
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-2)
    if impl == "triton":
        assert not torch.equal(grads[1], grads[1].bfloat16().float())


@interpreted
def test_strided_inputs(small_chunks, poisoned_memory):
    inputs = loss_inputs(20, 8, 12, dtype=FP32)
    inputs["hidden"] = inputs["hidden"].T.contiguous().T
    inputs["weight"] = inputs["weight"].repeat(1, 2)[:, ::2]
    inputs["targets"] = inputs["targets"].repeat_interleave(2)[::2]
    inputs["token_weight"] = inputs["token_weight"][:1].expand(20)
    assert_accurate(run_loss, inputs)


@interpreted
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_without_graph_breaks(impl, dynamic):
    torch._dynamo.reset()

    def f(inputs):
        return linear_cross_entropy(**inputs, impl=impl)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 13):
        inputs = loss_inputs(tokens, 8, 10, dtype=FP32)
        leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        results = [f(inputs), compiled(inputs)]
        torch.testing.assert_close(results[1], results[0])
        grads = [torch.autograd.grad(2 * loss, leaves) for loss, _ in results]
        torch.testing.assert_close(grads[1], grads[0])


@interpreted
def test_custom_op_passes_opcheck():
    inputs = list(loss_inputs(7, 8, 10, dtype=FP32).values())
    leaves = [x.requires_grad_() for x in inputs[:3]]
    torch.library.opcheck(api._linear_cross_entropy.overload, (*leaves, *inputs[3:], [True, True, True]))


@interpreted
def test_second_derivatives_are_refused():
    inputs = loss_inputs(7, 8, 10, dtype=FP32)
    inputs["hidden"].requires_grad_()
    loss, _ = linear_cross_entropy(**inputs, impl="triton")
    with pytest.raises(RuntimeError, match='no second derivative; impl="reference" has one'):
        torch.autograd.grad(loss.square(), inputs["hidden"], create_graph=True)


def test_auto_takes_the_reference_on_cpu_and_says_so():
    assert choose(torch.device("cpu"), FP32) == ("reference", "the plain implementation serves CPU tensors and float64")


def test_bad_arguments_are_refused_with_a_reason():
    good = loss_inputs(6, 8, 10, dtype=FP32)
    for change, message in [
        ({"hidden": good["hidden"].view(2, 3, 8)}, r"hidden must be \[N, C\].*flatten\(0, 1\)"),
        ({"hidden": good["hidden"][:0]}, "none of them empty"),
        ({"weight": good["weight"].T}, r"got \[6, 8\] and \[8, 10\]"),
        ({"bias": torch.zeros(8)}, r"bias must be \[10\]"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets must be \[6\] .* got \[5\]"),
        ({"targets": good["targets"].int()}, r"targets must be int64, got torch.int32; targets.long\(\) works"),
        ({"targets": good["targets"] + 4}, "targets must be from 0 to 9, got values from 4 to 12"),
        ({"targets": good["targets"] - 1}, "targets must be from 0 to 9, got values from -1 to 7"),
        ({"targets": good["targets"].to("meta")}, "targets must be on hidden's device cpu, got meta"),
        ({"weight": good["weight"].half()}, "without autocast .* got torch.float32, torch.float16, torch.float32"),
        ({"token_weight": torch.ones(6, dtype=torch.bool)}, "token_weight must be float16, .* got torch.bool"),
        ({"token_weight": torch.ones(6, requires_grad=True)}, r"token_weight.detach\(\) works"),
        ({"impl": "fast"}, 'unknown impl "fast": expected "auto", "reference" or "triton"'),
        ({"token_weight": good["token_weight"].double(), "impl": "triton"}, "cannot run here: .* not torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**(good | change))
    assert math.isfinite(linear_cross_entropy(**good)[0])
