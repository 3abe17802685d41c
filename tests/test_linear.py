"""The linear operator: the kernel for few rows and cuBLAS's epilogue against float64 by the one rule of accuracy."""

import pytest
import torch
import torch.nn.functional as F

from hmar_kernels import linear
from hmar_kernels.linear import cuda
from hmar_kernels.linear import triton as kernels

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
# rows, N, K
SHAPES = {"one row": (1, 40, 70), "odd": (7, 33, 129), "full tile": (16, 32, 256), "blocks": (70, 48, 300)}
# images, length, N, K: one block of K, several, splits; more rows than a tile
FUSED = {
    "one block": (2, 3, 40, 70),
    "blocks of K": (2, 5, 33, 1100),
    "splits": (3, 3, 20, 2600),
    "two blocks of rows": (2, 9, 24, 90),
    "splits of more rows": (1, 70, 36, 2700),
    "many blocks of K": (1, 4, 20, 4200),
}
LAYERS = {"norm": (3, 1), "residual": (1, 1), "norm, GELU": (4, 1), "residual of the MLP": (1, 4)}  # N, K in widths
FUSED_PUBLISHED = {
    f"{batch} x {length} of d{C // 64}, {name}": ((batch, length, N * C, K * C), name.removesuffix(" of the MLP"))
    for batch, length in ((2, 1), (1, 9), (2, 9), (2, 25), (2, 64))
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


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("gelu, biased", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_under_the_interpreter(name, gelu, biased, dtype, poisoned_memory):
    assert_accurate(SHAPES[name], dtype, "triton", gelu, biased)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("gelu, biased", [(False, False), (False, True), (True, True), (True, False)])
@pytest.mark.parametrize("impl", ["triton", "cublas"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *PUBLISHED.values()], ids=str)
def test_implementations_on_a_gpu(shape, impl, gelu, biased, dtype, poisoned_memory):
    assert_accurate(shape, dtype, impl, gelu, biased, "cuda")


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


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_kernel_under_the_interpreter(name, kind, dtype, poisoned_memory):
    """Bit-equal twice with the same counters, which are left as they were."""
    counters = torch.zeros(64, dtype=torch.int32)
    calls = [assert_fused_is_accurate(FUSED[name], kind, dtype, "triton", counters=counters) for _ in range(2)]
    assert torch.equal(*calls) and not counters.any()


@interpreted
@pytest.mark.parametrize("name", ["one block", "splits"])
def test_traced_without_a_graph_break(name):
    """To the bit, whoever's counters are given."""
    arguments, counters = fused_inputs(FUSED[name], torch.float16), torch.zeros(64, dtype=torch.int32)

    def f(x):
        return linear(**arguments | {"x": x}, gelu=True, impl="triton", counters=counters)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["x"]), f(arguments["x"])) and not counters.any()


@interpreted
def test_nothing_cancels_where_the_mean_is_large():
    for name in ("one block", "blocks of K"):
        arguments = fused_inputs(FUSED[name], torch.float32)
        arguments["x"] += 3000
        exact = linear(**in_float64(arguments))
        torch.testing.assert_close(linear(**arguments, impl="triton").double(), exact, rtol=0, atol=3e-3)


@interpreted
def test_rows_do_not_see_each_other():
    """Perturbing one row, or the modulation of one image, changes that alone."""
    arguments = fused_inputs(FUSED["one block"], torch.float16)
    before = linear(**arguments, impl="triton")
    arguments["x"][1, 2, 0] += 1
    after = linear(**arguments, impl="triton")
    changed = (after != before).any(-1)
    assert changed[1, 2] and changed.sum() == 1
    arguments["norm"][1][0] += 1
    assert torch.equal((linear(**arguments, impl="triton") != after).any(-1).any(-1), torch.tensor([True, False]))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapping"])
@pytest.mark.parametrize("shape, kind", [*((shape, "all") for shape in FUSED.values()), *FUSED_PUBLISHED.values()])
def test_fused_kernel_on_a_gpu(shape, kind, overlap, poisoned_memory):
    actual = assert_fused_is_accurate(shape, kind, torch.bfloat16, "triton", "cuda", overlap=overlap)
    if not overlap:
        assert_fused_is_accurate(shape, kind, torch.bfloat16, "cublas", "cuda")
    if shape[0] * shape[1] <= cuda.MAX_ROWS and shape[3] % cuda.STEP == 0:
        first = assert_fused_is_accurate(shape, kind, torch.bfloat16, "cuda", "cuda", overlap=overlap)
        assert torch.equal(first, assert_fused_is_accurate(shape, kind, torch.bfloat16, "cuda", "cuda"))
    assert torch.equal(actual, assert_fused_is_accurate(shape, kind, torch.bfloat16, "triton", "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("rows", [(2, 1), (2, 4), (2, 9), (2, 16)], ids=str)
def test_overlapping_kernels_in_a_graph(rows, impl):
    """A chain whose kernels read what the one before wrote and reuse the memory of those before that, replayed with
    other inputs: to the bit what the same kernels give in turn."""
    batch, length = rows
    width, layers = 1024, 6
    wide = [fused_inputs((batch, length, 4 * width, width), torch.bfloat16, "cuda") for _ in range(layers)]
    narrow = [fused_inputs((batch, length, width, 4 * width), torch.bfloat16, "cuda") for _ in range(layers)]
    counters = torch.zeros(4096, dtype=torch.int32, device="cuda")

    def chain(x, overlap):
        options = {"impl": impl, "overlap": overlap, "counters": counters}
        for up, down in zip(wide, narrow, strict=True):
            h = linear(x, up["weight"], up["bias"], norm=up["norm"], gelu=True, **options)
            x = linear(h, down["weight"], down["bias"], residual=x, gate=down["gate"], **options)
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
    assert not counters.any()


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    x, weight, bias = inputs(SHAPES["full tile"], torch.bfloat16, "cuda")
    for impl in ("triton", "cublas", "cuda"):
        compiled = torch.compile(lambda x, impl=impl: linear(x, weight, bias, gelu=True, impl=impl), fullgraph=True)
        torch.testing.assert_close(compiled(x), linear(x, weight, bias, gelu=True, impl=impl), rtol=2e-2, atol=1e-2)


def test_auto_on_the_cpu_is_the_layer():
    x, weight, bias = (t.requires_grad_() for t in inputs(SHAPES["odd"], torch.float64))
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: linear(*t, gelu=True), (x[:2, :4], weight[:3, :4], bias[:3]))


def test_tiles_suit_columns():
    for width in (1024, 1536, 1920, 2304):
        for N, K in ((3, 1), (1, 1), (4, 1), (1, 4)):
            tile = kernels.select_tile(N * width, K * width)
            blocks = -(-N * width // tile.block_n)
            assert blocks <= kernels.BLOCKS or tile.block_n == kernels.MAX_BLOCK_N
            for rows, row_blocks in ((1, 1), (16, 1), (17, 2), (50, 4)):
                counters = kernels.num_counters(rows, N * width, K * width)
                assert counters == (row_blocks * blocks if tile.splits > 1 else 0)


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
        ({"impl": "cutlass"}, "unknown impl"),
        ({"impl": "cublas"}, "needs a CUDA device"),
        ({"impl": "triton", "weight": torch.zeros(2, 4, requires_grad=True)}, "no derivative"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(2, 4), "bias": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=message):
        linear(**arguments)
