"""Softmax of scaled rows: the kernel against float64 by the one rule of accuracy, and what it refuses."""

import math

import pytest
import torch

from hmar_kernels import scaled_softmax
from hmar_kernels.scaled_softmax import MAX_COLUMNS
from operator_cases import assert_within_limits

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
SHAPES = {"one": (3, 1), "odd": (2, 5, 37), "full": (4, 256), "long": (2, 1000), "none": (0, 8)}
SCALE = 0.3


def assert_accurate(shape, dtype, device="cpu"):
    x = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    exact = {"weights": scaled_softmax(x.double(), SCALE, impl="reference")}
    found = {"weights": scaled_softmax(x, SCALE, dtype=dtype, impl="triton")}
    plain = {"weights": scaled_softmax(x, SCALE, dtype=dtype, impl="reference")}
    assert found["weights"].dtype == dtype and found["weights"].is_contiguous()
    if x.numel():
        assert_within_limits(found, exact, plain, dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_under_the_interpreter(name, dtype, poisoned_memory):
    assert_accurate(SHAPES[name], dtype)


def assert_rows_are_apart(device):
    """A row far from zero, one of equal numbers and one with all weight on a number: each as if it were alone."""
    x = torch.full((3, 70), 1e4, device=device)
    x[1] = -3.0
    x[2, 5] = 2e4
    weights = scaled_softmax(x.t().contiguous().t(), 2.0, impl="triton")
    expected = torch.full((3, 70), 1 / 70, device=device)
    expected[2] = torch.eye(70, device=device)[5]
    torch.testing.assert_close(weights, expected)


@interpreted
def test_rows_are_apart():
    assert_rows_are_apart("cpu")


@interpreted
def test_traced_without_a_graph_break():
    x = torch.randn(3, 20)
    compiled = torch.compile(lambda: scaled_softmax(x, SCALE, impl="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), scaled_softmax(x, SCALE, impl="triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 64, 4096), (2, 3, MAX_COLUMNS)], ids=str)
def test_kernel_on_a_gpu(shape, dtype, poisoned_memory):
    assert_accurate(shape, dtype, "cuda")


@pytest.mark.gpu
def test_rows_are_apart_on_a_gpu():
    assert_rows_are_apart("cuda")


def test_derivative_is_the_references():
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scaled_softmax(x, SCALE), x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 0)}, r"L at least 1.*\[2, 0\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "int64"),
        ({"dtype": torch.int32}, "int32"),
        ({"scale": math.inf}, "finite"),
        ({"impl": "cuda"}, "unknown impl"),
        ({"impl": "triton", "x": torch.zeros(1, MAX_COLUMNS + 1)}, f"up to {MAX_COLUMNS}"),
        ({"impl": "triton", "x": torch.zeros(3, requires_grad=True)}, "no derivative"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scaled_softmax(**{"x": torch.zeros(2, 3)} | change)
