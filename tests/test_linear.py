"""The linear operator: the kernels for few rows and cuBLAS's epilogue against float64 by the one rule of accuracy.

The source of the kernels runs on the CPU in test_linear_rows_source.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hmar_kernels import extension, linear, linear_parts
from hmar_kernels.linear import MAX_NORMED_ROWS, cuda, reference, unavailable_on

# rows, N, K
SHAPES = {"one row": (1, 40, 70), "odd": (7, 33, 129), "full tile": (16, 32, 256), "blocks": (70, 48, 300)}
# images, length, N, K: part of a chunk of inputs, chunks that a cluster does not share evenly, rings that turn over, as
# many rows as each kernel takes and one more
FUSED = {
    "part of a chunk": (2, 3, 40, 8),
    "some chunks": (2, 5, 33, 1112),
    "many chunks": (3, 3, 20, 4192),
    **{f"{rows} rows": (1, rows, 200, 712) for rows in (1, 4, 5, 8, 9, 16, 17, 32)},
    "images of many rows": (4, 7, 140, 1160),
}
LAYERS = {"norm": (3, 1), "residual": (1, 1), "norm, GELU": (4, 1), "residual of the MLP": (1, 4)}  # N, K in widths
FUSED_PUBLISHED = {
    f"{batch} x {length} of width {C}, {name}": ((batch, length, N * C, K * C), name.removesuffix(" of the MLP"))
    for batch, length in ((2, 1), (2, 4), (1, 9), (2, 8), (2, 9), (1, 25), (2, 16))
    for C in (1024, 1536, 1920, 2304)
    for name, (N, K) in LAYERS.items()
}
PUBLISHED = {f"{rows} of d16": (rows, 3072, 1024) for rows in (1, 2, 18, 64, 128)} | {"wide": (32, 1920, 7680)}


def inputs(shape, dtype, device="cpu"):
    rows, N, K = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((rows, K), (N, K), (N,)))
    return [t.to(device, dtype) for t in (x, weight / K**0.5, bias)]


def assert_accurate(shape, dtype, impl, gelu, biased, device="cpu"):
    x, weight, bias = inputs(shape, dtype, device)
    bias = bias if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    eager = F.linear(x, weight, bias)
    eager = F.gelu(eager, approximate="tanh") if gelu else eager
    actual = linear(x[None], weight, bias, gelu=gelu, impl=impl)
    assert actual.dtype == dtype and actual.shape == (1, *expected.shape) and actual.isfinite().all()
    error, allowed = ((y.double() - expected).norm() for y in (actual[0], eager))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_a_product_add_up_to_it(parts):
    x, weight, _ = inputs((6, 7, 20), torch.float64)
    found = linear_parts(x.view(2, 3, 20), weight, parts)
    assert found.shape == (parts, 2, 3, 7)
    torch.testing.assert_close(found.sum(0), F.linear(x, weight).view(2, 3, 7))
    k = 20 // parts
    torch.testing.assert_close(found[-1], F.linear(x[:, -k:], weight[:, -k:]).view(2, 3, 7))


def test_parts_that_do_not_divide_are_refused():
    x, weight, _ = inputs((6, 7, 20), torch.float32)
    for parts in (0, 3):
        with pytest.raises(ValueError, match=f"parts is {parts}; it must divide K, which is 20"):
            linear_parts(x, weight, parts)
    with pytest.raises(ValueError, match="one floating dtype"):
        linear_parts(x.double(), weight, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("gelu, biased", [(False, False), (False, True), (True, True), (True, False)])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *PUBLISHED.values()], ids=str)
def test_cublas_on_a_gpu(shape, gelu, biased, dtype, poisoned_memory):
    assert_accurate(shape, dtype, "cublas", gelu, biased, "cuda")


def fused_inputs(shape, dtype, device="cpu", stream=torch.float32):
    """Modulation as chunks of one tensor, and a residual stream with more bits than the products."""
    batch, length, N, K = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(device, dtype)

    scale, shift, gate = (0.5 * draw(batch, 1, 2 * K + N)).split((K, K, N), dim=-1)
    return {
        "x": 2 * draw(batch, length, K, dtype=stream) + 1,
        "weight": draw(N, K) / K**0.5,
        "bias": draw(N),
        "norm": (scale, shift),
        "residual": draw(batch, length, N, dtype=stream),
        "gate": gate,
    }


def in_float64(arguments):
    return {
        name: tuple(t.double() for t in value) if isinstance(value, tuple) else value.double()
        for name, value in arguments.items()
    }


KINDS = {
    "norm": {"bias": None, "residual": None, "gate": None},
    "norm, GELU": {"residual": None, "gate": None, "gelu": True},
    "residual": {"norm": None},
    "all": {"gelu": True},
}


def fused_cell(shape, kind, dtype, device="cpu"):
    """Arguments, and the exact result with the error of the plain implementation in their dtypes."""
    arguments, changes = fused_inputs(shape, dtype, device), dict(KINDS[kind])
    gelu = changes.pop("gelu", False)
    arguments = {name: value for name, value in (arguments | changes).items() if value is not None}
    if "norm" not in arguments:
        arguments["x"] = arguments["x"].to(dtype)
    expected = linear(**in_float64(arguments), gelu=gelu, impl="reference")
    eager = linear(**arguments, gelu=gelu, impl="reference")
    return arguments | {"gelu": gelu}, expected, eager


def assert_fused_is_accurate(shape, kind, dtype, impl, device="cpu", **options):
    """Also with statistics, where they make the norm part of the product."""
    arguments, expected, eager = fused_cell(shape, kind, dtype, device)
    few = impl == "cuda" and "norm" in arguments and shape[0] * shape[1] <= MAX_NORMED_ROWS
    outputs = []
    for statistics in (None, reference.statistics(arguments["x"])) if few else (None,):
        actual = linear(**arguments, statistics=statistics, impl=impl, **options)
        assert actual.dtype == eager.dtype and actual.shape == expected.shape and actual.isfinite().all()
        error, allowed = ((y.double() - expected).norm() for y in (actual, eager))
        assert error <= 2 * allowed + torch.finfo(eager.dtype).eps * expected.norm()
        outputs.append(actual)
    return outputs


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cublas", "cuda"])
@pytest.mark.parametrize(
    "shape, kind", [*((shape, "all") for shape in FUSED.values()), *FUSED_PUBLISHED.values()], ids=str
)
def test_fused_on_a_gpu(shape, kind, impl, poisoned_memory):
    """The kernels for few rows to the bit whether they overlap or run in turn."""
    actual = assert_fused_is_accurate(shape, kind, torch.bfloat16, impl, "cuda")
    if impl == "cuda":
        overlapping = assert_fused_is_accurate(shape, kind, torch.bfloat16, impl, "cuda", overlap=True)
        assert all(torch.equal(*pair) for pair in zip(actual, overlapping, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FUSED.values(), ids=FUSED)
def test_fused_on_a_gpu_in_half_precision(shape, poisoned_memory):
    assert_fused_is_accurate(shape, "all", torch.float16, "cuda", "cuda", overlap=True)


@pytest.mark.gpu
@pytest.mark.parametrize("length, given", [(16, False), (4, True)])
def test_rows_on_a_gpu_depend_on_no_others(length, given, poisoned_memory):
    """Rows of x that are NaN leave the outputs of all others as they are, to the bit."""
    arguments = fused_inputs((2, length, 1536, 1536), torch.bfloat16, "cuda")

    def run():
        statistics = reference.statistics(arguments["x"]) if given else None
        return linear(**arguments, statistics=statistics, impl="cuda")

    expected = run()
    arguments["x"][1, 3] = torch.nan
    actual = run()
    assert actual[1, 3].isnan().all()
    actual[1, 3] = expected[1, 3]
    assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1, 40, 64), (2, 3, 136, 712), (2, 4, 1920, 1920)], ids=str)
def test_statistics_on_a_gpu(shape, dtype, poisoned_memory):
    """Of y as it is stored; a norm of it by them is that of a kernel of its own."""
    batch, length, N, _ = shape
    arguments = fused_inputs(shape, torch.bfloat16, "cuda", dtype)
    y, statistics = linear(**arguments, impl="cuda", return_statistics=True)
    assert torch.equal(y, linear(**arguments, impl="cuda")) and statistics.dtype == torch.float32
    torch.testing.assert_close(statistics.double(), reference.statistics(y.double()), rtol=1e-5, atol=1e-5)
    following = fused_inputs((batch, length, 72, N), torch.bfloat16, "cuda")
    call = {"weight": following["weight"], "norm": following["norm"], "impl": "cuda"}
    for overlap in (False, True):
        expected = linear(y, **call, overlap=overlap)
        actual = linear(y, **call, statistics=statistics, overlap=overlap)
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(2, 1), (1, 5), (2, 4), (1, 9), (2, 9), (1, 25), (2, 16)], ids=str)
def test_overlapping_kernels_in_a_graph(rows):
    """A chain whose kernels read what the one before wrote and reuse the memory of those before that, replayed with
    other inputs: to the bit what the same kernels give in turn."""
    batch, length = rows
    width, layers = 1920, 6
    wide = [fused_inputs((batch, length, 4 * width, width), torch.bfloat16, "cuda") for _ in range(layers)]
    narrow = [fused_inputs((batch, length, width, 4 * width), torch.bfloat16, "cuda") for _ in range(layers)]

    def chain(x, overlap):
        options = {"impl": "cuda", "overlap": overlap}
        statistics = None
        for up, down in zip(wide, narrow, strict=True):
            h = linear(x, up["weight"], up["bias"], norm=up["norm"], statistics=statistics, gelu=True, **options)
            surroundings = {"residual": x, "gate": down["gate"], "return_statistics": True}
            x, statistics = linear(h, down["weight"], down["bias"], **surroundings, **options)
        return x

    x = wide[0]["x"].clone()
    chain(x, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x, True)
    for seed in range(20):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, chain(x, False)), seed


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    x, weight, bias = inputs(SHAPES["full tile"], torch.bfloat16, "cuda")
    for impl in ("cublas", "cuda"):
        compiled = torch.compile(lambda x, impl=impl: linear(x, weight, bias, gelu=True, impl=impl), fullgraph=True)
        torch.testing.assert_close(compiled(x), linear(x, weight, bias, gelu=True, impl=impl), rtol=2e-2, atol=1e-2)


def test_auto_on_the_cpu_is_the_layer():
    x, weight, bias = (t.requires_grad_() for t in inputs(SHAPES["odd"], torch.float64))
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: linear(*t, gelu=True), (x[:2, :4], weight[:3, :4], bias[:3]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 5)}, r"got \[3, 5\] and \[2, 4\]"),
        ({"bias": torch.zeros(3)}, r"bias must be \[2\]"),
        ({"x": torch.zeros(3, 4).half()}, "of one floating dtype"),
        ({"gate": torch.zeros(1, 1, 2)}, "residual and gate go together"),
        ({"norm": (torch.zeros(3, 1, 4),) * 2}, r"x must be \[B, L, K\]"),
        (
            {"x": torch.zeros(2, 3, 4), "norm": (torch.zeros(2, 1, 4), torch.zeros(2, 4))},
            r"shift must be floats \[2, 1, 4\]",
        ),
        ({"statistics": torch.zeros(1, 3, 1, 2)}, "statistics are for a norm"),
        (
            {"x": torch.zeros(1, 3, 4), "norm": (torch.zeros(1, 1, 4),) * 2, "statistics": torch.zeros(1, 3, 2)},
            r"statistics must be float32 \[1, 3, 1, 2\] to go with x \[1, 3, 4\]",
        ),
        ({"impl": "cutlass"}, "unknown impl"),
        ({"impl": "cublas"}, "needs a CUDA device"),
        ({"impl": "cuda", "weight": torch.zeros(2, 4, requires_grad=True)}, "no derivative"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(2, 4), "bias": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=message):
        linear(**arguments)


@pytest.fixture
def calls(monkeypatch):
    """What the extension is called with, which here is none: (name, arguments), in order."""
    made = []
    module = SimpleNamespace(
        linear_rows=lambda **given: made.append(("linear_rows", given)),
        norm_rows=lambda **given: made.append(("norm_rows", given)),
    )
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(cuda, "unavailable", lambda *_, residual: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return made


@pytest.mark.parametrize("length, given", [(3, False), (4, False), (5, True)])
def test_a_norm_without_statistics_or_of_more_rows_is_a_kernel_of_its_own(calls, length, given):
    arguments = fused_inputs((2, length, 139, 712), torch.bfloat16)
    statistics = {"statistics": reference.statistics(arguments["x"])} if given else {}
    _, found = linear(**arguments, **statistics, impl="cuda", return_statistics=True)
    (first, norm), (second, call) = calls
    assert (first, second) == ("norm_rows", "linear_rows")
    assert (norm["num_rows"], norm["num_inputs"], norm["image_rows"]) == (2 * length, 712, length) and norm["float_x"]
    assert norm["x"] == arguments["x"].data_ptr() and norm["h"] == call["x"]
    assert not any(call["norm"]) and not call["float_x"]
    assert found.shape == (2, length, 3, 2) and found.data_ptr() == call["statistics"]


@pytest.mark.parametrize("length", [1, 4])
def test_a_norm_of_few_rows_with_statistics_is_part_of_the_product(calls, length):
    arguments = fused_inputs((2, length, 139, 712), torch.bfloat16)
    given = reference.statistics(arguments["x"])
    y = linear(**arguments, impl="cuda", statistics=given)
    ((name, call),) = calls
    assert name == "linear_rows" and call["norm"][0] == given.data_ptr() and call["x"] == arguments["x"].data_ptr()
    assert y.shape == (2, length, 139) and call["statistics"] == 0
    odd = torch.zeros(given.numel() + 1)[1:].view(given.shape)
    linear(**arguments, impl="cuda", statistics=odd)
    assert odd.data_ptr() % 8 and calls[1][1]["norm"][0] % 8 == 0


def test_calls_of_the_kernels_are_traced(calls):
    arguments = fused_inputs((2, 3, 139, 712), torch.bfloat16)
    x, weight = arguments.pop("x"), arguments.pop("weight")

    def layer(x):
        y, statistics = linear(x, weight, **arguments, impl="cuda", return_statistics=True)
        return linear(x, weight, norm=arguments["norm"], impl="cuda"), y, statistics

    shapes = [output.shape for output in torch.compile(layer, fullgraph=True, backend="eager")(x)]
    assert shapes == [(2, 3, 139), (2, 3, 139), (2, 3, 3, 2)]
    assert [name for name, _ in calls] == ["norm_rows", "linear_rows"] * 2


def test_copies_of_weights_are_waited_for(calls):
    """A kernel that may overlap reads weights at once, so it may not where they are copied just before it."""
    arguments = fused_inputs((1, 2, 16, 64), torch.bfloat16)
    storage = torch.zeros(16 * 64 + 1, dtype=torch.bfloat16)
    layouts = {
        "weight": (arguments["weight"].t().contiguous().t(), storage[1:].view(16, 64)),
        "bias": (torch.zeros(32, dtype=torch.bfloat16)[::2],),
    }
    for name, tensors in layouts.items():
        for tensor in tensors:
            linear(**(arguments | {name: tensor}), impl="cuda", overlap=True)
            assert {call["overlap"] for _, call in calls} == {False}
            calls.clear()
    linear(**(arguments | {"x": arguments["x"].mT.contiguous().mT}), impl="cuda", overlap=True)
    assert {call["overlap"] for _, call in calls} == {True}


def test_why_the_kernels_for_few_rows_cannot_run():
    assert "needs a CUDA device, got cpu" in unavailable_on(torch.device("cpu"), torch.bfloat16, 64)
    device = torch.device("cuda", 0)
    assert "float16 or bfloat16, not torch.float32" in unavailable_on(device, torch.float32, 64)
    assert "multiple of 8, got 12" in unavailable_on(device, torch.bfloat16, 12)
