"""The linear operator: the kernels for few rows and cuBLAS's epilogue against float64 by the one rule of accuracy.

The source of the kernels runs on the CPU in test_linear_rows_source.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hmar_kernels import extension, linear
from hmar_kernels.linear import cuda, reference, unavailable_on

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
    for batch, length in ((2, 1), (1, 9), (2, 8), (2, 9), (1, 25), (2, 16))
    for C in (1024, 1536, 1920, 2304)
    for name, (N, K) in LAYERS.items()
}
PUBLISHED = {
    f"{batch} x {length} of d{C // 64}, {name}": ((batch, length, N * C, K * C), name.removesuffix(" of the MLP"))
    for batch, length in ((2, 1), (1, 4), (1, 9), (2, 8))
    for C in (1024, 1920)
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
    arguments, expected, eager = fused_cell(shape, kind, dtype, device)
    actual = linear(**arguments, impl=impl, **options)
    assert actual.dtype == eager.dtype and actual.shape == expected.shape and actual.isfinite().all()
    error, allowed = ((y.double() - expected).norm() for y in (actual, eager))
    assert error <= 2 * allowed + torch.finfo(eager.dtype).eps * expected.norm()
    return actual


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
        assert torch.equal(actual, overlapping)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FUSED.values(), ids=FUSED)
def test_fused_on_a_gpu_in_half_precision(shape, poisoned_memory):
    assert_fused_is_accurate(shape, "all", torch.float16, "cuda", "cuda", overlap=True)


@pytest.mark.gpu
def test_rows_on_a_gpu_depend_on_no_others(poisoned_memory):
    """Rows of x that are NaN leave the outputs of all others as they are, to the bit."""
    arguments = fused_inputs((2, 16, 1536, 1536), torch.bfloat16, "cuda")
    expected = linear(**arguments, impl="cuda")
    arguments["x"][1, 7] = torch.nan
    actual = linear(**arguments, impl="cuda")
    assert actual[1, 7].isnan().all()
    actual[1, 7] = expected[1, 7]
    assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1, 40, 64), (2, 3, 136, 712), (2, 16, 1920, 1920)], ids=str)
def test_statistics_on_a_gpu(shape, dtype, poisoned_memory):
    """Of y as it is stored; a norm of it by them is the one by those of the kernel that reads y."""
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
@pytest.mark.parametrize("rows", [(2, 1), (1, 9), (2, 9), (1, 25), (2, 16)], ids=str)
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
        row_statistics=lambda **given: made.append(("row_statistics", given)),
    )
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(cuda, "unavailable", lambda *_, residual: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return made


def test_statistics_are_found_where_none_are_given(calls):
    arguments = fused_inputs((2, 3, 139, 712), torch.bfloat16)
    y, statistics = linear(**arguments, impl="cuda", return_statistics=True)
    (first, found), (second, call) = calls
    assert (first, second) == ("row_statistics", "linear_rows")
    assert (found["num_rows"], found["num_inputs"], found["num_tiles"], found["float_x"]) == (6, 712, 12, True)
    assert call["norm"][0] == found["statistics"] and call["x"] == found["x"] == arguments["x"].data_ptr()
    assert statistics.shape == (2, 3, 3, 2) and statistics.data_ptr() == call["statistics"]
    calls.clear()
    given = reference.statistics(arguments["x"])
    y = linear(**arguments, impl="cuda", statistics=given)
    ((name, call),) = calls
    assert name == "linear_rows" and call["norm"][0] == given.data_ptr()
    assert y.shape == (2, 3, 139) and call["statistics"] == 0


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
