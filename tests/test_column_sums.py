"""Sums of columns, which bias gradients are: against float64 at odd sizes, the same bits twice."""

import pytest
import torch

from hmar_kernels.triton_device import LEAST_ROWS, SUM_COLUMNS, SUM_ROWS, column_sums

SHAPES = pytest.mark.parametrize(
    "shape",
    [(1, 1), (LEAST_ROWS + 1, SUM_COLUMNS + 3), (5 * SUM_ROWS - 1, 40), (0, 7), (3000, 2 * SUM_COLUMNS)],
    ids=str,
)


def check(rows, columns, dtype, out_dtype, device):
    torch.manual_seed(0)
    x = (torch.randn(rows, columns + 1, device=device) + 1).to(dtype)[:, 1:]  # rows that do not lie side by side
    sums = column_sums(x, out_dtype)
    assert sums.dtype == out_dtype and torch.equal(sums, column_sums(x, out_dtype))
    rounding = torch.finfo(out_dtype).eps + 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(sums.double(), x.double().sum(0), rtol=rounding, atol=rounding * rows**0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernel runs there")
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_under_the_interpreter(shape, dtype, poisoned_memory):
    check(*shape, dtype, torch.float32, "cpu")
    check(*shape, torch.float32, dtype, "cpu")


@pytest.mark.gpu
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_on_a_gpu(shape, dtype, poisoned_memory):
    check(*shape, dtype, torch.float32, "cuda")
    check(*shape, torch.float32, dtype, "cuda")


@pytest.mark.gpu
def test_memory_is_that_of_partial_sums():
    x = torch.randn(20000, 4096, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    column_sums(x, torch.float32)
    assert torch.cuda.max_memory_allocated() - held < x.nbytes / 40
