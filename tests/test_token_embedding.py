"""Embedding of tokens: the kernel against float64 by the one rule of accuracy, and what it may not mix."""

import pytest
import torch
import torch.nn as nn

from hmar_kernels import token_embedding
from hmar_kernels.token_embedding import Known, choose
from hmar_kernels.token_embedding import triton as kernels
from operator_cases import Draw, assert_within_limits, in_float64

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
# images, tokens, code dimensions, width
SHAPES = {
    "one token": (1, 1, 32, 64),
    "odd": (3, 5, 7, 50),
    "two blocks of rows": (2, 9, 32, 128),
    "many rows": (3, 100, 16, 65),
    "most dimensions": (1, 4, 128, 64),
}
PUBLISHED = {
    f"{batch} x {side} x {side}, width {width}": (batch, side * side, 32, width)
    for batch, width in ((1, 1024), (3, 1536), (32, 1920))
    for side in (2, 3, 5, 13, 16)
} | {"2 x 64 x 64": (2, 4096, 32, 1536)}
KNOWN = ("residuals", "hidden", "mask")


def embedding_inputs(batch, length, dims, width, *, dtype, device="cpu", known=True):
    """Codes and tables in float32, the linear layer in `dtype`."""
    draw = Draw(device)
    inputs = {
        "inputs": draw(batch, length, dims),
        "weight": draw(width, dims, dtype=dtype) / dims**0.5,
        "bias": draw(width, dtype=dtype),
        "position": draw(length, width),
        "scale": draw(width),
    }
    if known:
        hidden = torch.arange(batch * length, device=device).view(batch, length) % 3 != 1
        inputs |= {"residuals": draw(batch, length, dims), "hidden": hidden, "mask": draw(width)}
    return inputs


def run(inputs, impl, **options):
    given = {name: x for name, x in inputs.items() if name not in KNOWN}
    known = Known(*(inputs[name] for name in KNOWN)) if "mask" in inputs else None
    return {"out": token_embedding(**given, known=known, impl=impl, **options)}


def assert_accurate(shape, dtype, known, device="cpu", **options):
    inputs = embedding_inputs(*shape, dtype=dtype, device=device, known=known)
    exact = run(in_float64(inputs), "reference", copies=2)
    assert_within_limits(run(inputs, "triton", copies=2, **options), exact, run(inputs, "reference", copies=2), dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_under_the_interpreter(name, known, dtype, poisoned_memory):
    assert_accurate(SHAPES[name], dtype, known)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_on_a_gpu(name, known, dtype, poisoned_memory):
    assert_accurate(SHAPES[name], dtype, known, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapping"])
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_on_a_gpu(name, known, overlap, poisoned_memory):
    assert_accurate(PUBLISHED[name], torch.bfloat16, known, "cuda", overlap=overlap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_reference_is_the_sum_of_its_layers(dtype):
    inputs = embedding_inputs(2, 3, 5, 8, dtype=dtype)
    inputs |= {name: inputs[name].to(dtype) for name in ("inputs", "residuals", "mask")}
    weight, hidden = inputs["weight"], inputs["hidden"]
    x = nn.functional.linear(inputs["inputs"], weight, inputs["bias"])
    visible = nn.functional.linear(inputs["residuals"], weight)
    for b, n in ((b, n) for b in range(2) for n in range(3)):
        x[b, n] += inputs["mask"] if hidden[b, n] else visible[b, n]
    assert hidden.any() and not hidden.all()
    assert torch.equal(run(inputs, "reference")["out"], x + inputs["position"] + inputs["scale"])


def assert_exact(device):
    """What is exact: sums of small whole numbers, in an order in which every rounding shows; the copies are equal."""
    shape = {"dtype": torch.float16, "device": device}
    inputs = embedding_inputs(3, 21, 9, 70, **shape)
    whole = {name: (4 * x.float()).round().to(x.dtype) for name, x in inputs.items() if x.is_floating_point()}
    whole["bias"] += 4096  # of which float16 has every fourth number
    inputs |= whole
    expected, actual = (run(inputs, impl, copies=3)["out"] for impl in ("reference", "triton"))
    assert actual.shape == (9, 21, 70) and torch.equal(actual, expected)
    assert torch.equal(actual[:3], actual[3:6]) and torch.equal(actual[:3], actual[6:])
    unrounded = run(in_float64(inputs), "reference", copies=3)["out"]
    assert not torch.equal(actual.double(), unrounded)
    before = actual.clone()
    inputs["residuals"][1, 4] += 1
    inputs["hidden"][1, 4], inputs["hidden"][2, 7] = False, ~inputs["hidden"][2, 7]
    changed = (run(inputs, "triton", copies=3)["out"] != before).any(2)
    assert changed.nonzero().tolist() == [[b + 3 * c, n] for c in range(3) for b, n in ((1, 4), (2, 7))]


@interpreted
def test_roundings_and_copies():
    assert_exact("cpu")


@pytest.mark.gpu
def test_roundings_and_copies_on_a_gpu():
    assert_exact("cuda")


@interpreted
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_traced_without_a_graph_break(known):
    inputs = embedding_inputs(2, 9, 8, 32, dtype=torch.float16, known=known)
    compiled = torch.compile(lambda: run(inputs, "triton", copies=2)["out"], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), run(inputs, "triton", copies=2)["out"])


@pytest.mark.gpu
def test_in_a_graph_and_strided_on_a_gpu():
    inputs = embedding_inputs(2, 25, 32, 1024, dtype=torch.bfloat16, device="cuda")
    expected = run(inputs, "auto", copies=2)["out"]
    strided = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    run(inputs, "triton", overlap=True)
    with torch.cuda.graph(graph):
        doubled = inputs["inputs"] * 2
        captured = run(inputs | {"inputs": doubled / 2}, "triton", copies=2, overlap=True)["out"]
    graph.replay()
    first, given = torch.cuda.CUDAGraph(), inputs["inputs"].clone()
    with torch.cuda.graph(first):
        alone = run(inputs | {"inputs": given}, "triton", copies=2, overlap=True)["out"]
    for factor in (3, 1):
        torch.mul(inputs["inputs"], factor, out=given)
        first.replay()
    assert torch.equal(alone, expected), "as the first kernel of a graph, after one that writes what it reads"
    assert torch.equal(captured, expected) and torch.equal(run(strided, "triton", copies=2)["out"], expected)


@interpreted
def test_strides_do_not_matter():
    inputs = embedding_inputs(2, 5, 8, 20, dtype=torch.float16)
    strided = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items()}
    assert torch.equal(run(strided, "triton")["out"], run(inputs, "triton")["out"])


def test_auto_is_the_reference_where_the_kernel_cannot_run():
    inputs = embedding_inputs(1, 2, kernels.MAX_DIMS + 1, 16, dtype=torch.float32, known=False)
    impl, reason = choose(**inputs)
    assert impl == "reference" and "up to 128 dimensions" in reason
    inputs = {name: x.double() for name, x in embedding_inputs(1, 2, 3, 4, dtype=torch.float64, known=False).items()}
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: token_embedding(*x), leaves)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"inputs": torch.zeros(2, 5, 7)}, r"weight \[C, E\]"),
        ({"bias": torch.zeros(3)}, r"bias must be \[16\]"),
        ({"position": torch.zeros(4, 16)}, r"position must be \[5, 16\]"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.bool)}, r"hidden must be \[2, 5\]"),
        ({"hidden": torch.zeros(2, 5)}, "hidden must be bool"),
        ({"scale": torch.zeros(16).half()}, "position and scale must have one dtype"),
        ({"weight": torch.zeros(16, 8).half()}, "weight and bias must have one dtype"),
        ({"bias": torch.zeros(16, device="meta")}, "bias is on meta"),
        ({"copies": 0}, "at least one"),
        ({"impl": "cuda"}, "unknown impl"),
        ({"impl": "triton", "mask": torch.zeros(16).double()}, "not torch.float64"),
        ({"impl": "triton", "scale": torch.zeros(16, requires_grad=True)}, "no derivative"),
    ],
)
def test_bad_input_is_refused(change, message):
    options = {"impl": "auto"} | {name: value for name, value in change.items() if name in ("impl", "copies")}
    tensors = {name: value for name, value in change.items() if name not in options}
    with pytest.raises(ValueError, match=message):
        run(embedding_inputs(2, 5, 8, 16, dtype=torch.float32) | tensors, **options)
