"""Where Triton kernels can run, and sums that several operators end with: of partial results, and of columns.

NOTE: torch's sum over the rows of a matrix reaches half of a copy's bandwidth at training shapes, and takes a workspace
of 138 MB on an H100, whatever the width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PARTIALS_TILE, COLUMNS_TILE = 64, 32
# Of column_sums: a tile, and among how many programs rows are divided, each of which gets at least LEAST_ROWS.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 16, 256, 4
PROGRAMS_PER_SM, LEAST_ROWS = 8, 64


def unavailable(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on tensors of these dtypes on `device`; None when they can."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"the Triton kernels take float16, bfloat16 or float32, not {dtype}"
    if device.type == "cpu":
        interpreted = not isinstance(_sum_kernel, triton.JITFunction)
        return None if interpreted else "the Triton kernels need a CUDA device (or TRITON_INTERPRET=1 for tests)"
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def choose(device: torch.device, *dtypes: torch.dtype) -> tuple[str, str]:
    """What impl="auto" takes of "triton" and "reference" for tensors of these dtypes, and the reason."""
    reason = unavailable(device, *dtypes)
    if device.type == "cuda" and reason is None:
        return "triton", "one pass over memory, on GPUs from compute capability 8.0 on"
    if device.type == "cuda":
        return "reference", f"the plain implementation: {reason}"
    return "reference", "the plain implementation serves CPU tensors and float64"


def select(impl: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The implementation that `impl` names; ValueError with the reason when it cannot run on such tensors."""
    if impl == "auto":
        return choose(device, *dtypes)[0]
    if impl not in ("reference", "triton"):
        raise ValueError(f'unknown impl "{impl}": expected "auto", "reference" or "triton"')
    reason = unavailable(device, *dtypes) if impl == "triton" else None
    if reason is not None:
        raise ValueError(f'impl="{impl}" cannot run here: {reason}; impl="auto" would take "reference"')
    return impl


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever device the tensors are on: makes it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before the end of the one before it (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _sum_kernel(
    partials_ptr, out_ptr, num_partials, num_columns, PARTIALS_TILE: tl.constexpr, COLUMNS_TILE: tl.constexpr
):
    group = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * COLUMNS_TILE + tl.arange(0, COLUMNS_TILE)
    offs_p = tl.arange(0, PARTIALS_TILE)
    mask_n = offs_n < num_columns
    partials_ptr += group * num_partials * num_columns

    acc = tl.zeros([PARTIALS_TILE, COLUMNS_TILE], tl.float32)
    for start in range(0, num_partials, PARTIALS_TILE):
        rows = start + offs_p
        ptrs = partials_ptr + rows.to(tl.int64)[:, None] * num_columns + offs_n[None, :]
        acc += tl.load(ptrs, mask=(rows < num_partials)[:, None] & mask_n[None, :], other=0.0)
    tl.store(out_ptr + group * num_columns + offs_n, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=mask_n)


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 [G, P, N] -> [G, N] in `dtype`, summed over P in an order that is always the same."""
    groups, num_partials, num_columns = partials.shape
    out = torch.empty(groups, num_columns, dtype=dtype, device=partials.device)
    with on_device(partials):
        _sum_kernel[(triton.cdiv(num_columns, COLUMNS_TILE), groups)](
            partials_ptr=partials,
            out_ptr=out,
            num_partials=num_partials,
            num_columns=num_columns,
            PARTIALS_TILE=PARTIALS_TILE,
            COLUMNS_TILE=COLUMNS_TILE,
        )
    return out


@triton.jit
def _column_sums_kernel(
    x_ptr, partials_ptr, num_rows, rows, N: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr
):
    group = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)
    mask_n = offs_n < N
    row_end = tl.minimum((group + 1) * rows, num_rows)

    acc = tl.zeros([SUM_ROWS, SUM_COLUMNS], tl.float32)
    for start in range(0, rows, SUM_ROWS):
        offs_r = group * rows + start + tl.arange(0, SUM_ROWS)
        ptrs = x_ptr + offs_r[:, None] * N + offs_n[None, :]
        acc += tl.load(ptrs, mask=(offs_r < row_end)[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    tl.store(partials_ptr + group * N + offs_n, tl.sum(acc, 0), mask=mask_n)


def column_sums(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[M, N] -> [N] in `dtype`, summed in float32 in an order that is always the same."""
    num_rows, num_columns = x.shape
    columns = triton.cdiv(num_columns, SUM_COLUMNS)
    rows = max(LEAST_ROWS, triton.cdiv(num_rows * columns, PROGRAMS_PER_SM * num_sms(x.device)))
    rows = triton.cdiv(rows, SUM_ROWS) * SUM_ROWS
    groups = triton.cdiv(num_rows, rows)
    partials = torch.empty(1, groups, num_columns, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            _column_sums_kernel[(columns, groups)](
                x_ptr=x.contiguous(),
                partials_ptr=partials,
                num_rows=num_rows,
                rows=rows,
                N=num_columns,
                SUM_ROWS=SUM_ROWS,
                SUM_COLUMNS=SUM_COLUMNS,
                num_warps=SUM_WARPS,
            )
    return sum_partials(partials, dtype)[0]


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter on a CPU stands for an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
