"""Launch of the hand-written kernels for few rows (csrc/linear_rows.cuh), of an extension that was built for sm_90a."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from .reference import TILE

DTYPES = (torch.float16, torch.bfloat16)
ROWS = (8, 16, 32)  # of the kernels, at most
# The same of those with a norm within. NOTE: measured at widths of 1024, 1536 and 1920 (reports/data/
# linear_rows_h100.json, a67dd7c and 6aacedc): us a block with the norm within and as a kernel of its own, of 8 rows
# 21.6, 34.2, 44.0 and 26.1, 36.5, 47.2; of 18 rows 28.6, 50.9, 64.4 and 29.4, 43.8, 53.0.
NORMED_ROWS = (8,)
MAX_ROWS, MAX_NORMED_ROWS, MAX_NORMED_INPUTS, STEP = max(ROWS), max(NORMED_ROWS), 8192, 8
STATISTICS_BYTES = 8  # of a tile, read at once


def unavailable(x: Tensor, weight: Tensor, *vectors: Tensor | None, residual: Tensor | None = None) -> str | None:
    """Why the kernels cannot run on these tensors; None when they can. vectors: bias, scale, shift and gate."""
    return unavailable_on(x.device, weight.dtype, x.shape[-1]) or refusal(x, weight, *vectors, residual=residual)


def unavailable_on(device: torch.device, dtype: torch.dtype, num_inputs: int) -> str | None:
    """Why the kernels cannot run on a device with weights of this dtype and rows of so many numbers."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    return refusal_of_weights(dtype, num_inputs) or extension.hopper_unavailable(device)


def refusal_of_weights(dtype: torch.dtype, num_inputs: int) -> str | None:
    if dtype not in DTYPES:
        return f"its weights are float16 or bfloat16, not {dtype}"
    return f"K is a multiple of {STEP}, got {num_inputs}" if num_inputs % STEP else None


def refusal(x: Tensor, weight: Tensor, *vectors: Tensor | None, residual: Tensor | None = None) -> str | None:
    """Why the kernels do not take such tensors, wherever they are."""
    if (reason := refusal_of_weights(weight.dtype, x.shape[-1])) is not None:
        return reason
    for tensor in (x, residual):
        if tensor is not None and tensor.dtype not in (weight.dtype, torch.float32):
            return f"x and residual are float32 or {weight.dtype} as the weight, not {tensor.dtype}"
    for tensor in vectors:
        if tensor is not None and tensor.dtype != weight.dtype:
            return f"bias, scale, shift and gate are {weight.dtype} as the weight, not {tensor.dtype}"
    rows, K = x.shape[:-1].numel(), x.shape[-1]
    if rows > MAX_ROWS:
        return f"it has few rows, at most {MAX_ROWS}, got {rows}"
    if K > MAX_NORMED_INPUTS and any(tensor is not None for tensor in vectors[1:3]):
        return f"K is at most {MAX_NORMED_INPUTS} with a norm, got {K}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    gelu: bool,
    eps: float,
    return_statistics: bool,
    overlap: bool,
) -> list[Tensor]:
    """x [B, L, K], weight [N, K], bias [N], scale shift [B, 1, K], statistics [B, L, ceil(K / 64), 2], residual
    [B, L, N], gate [B, 1, N] -> y [B, L, N], and its statistics [B, L, ceil(N / 64), 2] if wanted."""
    (batch, length, K), (N, _), rows = x.shape, weight.shape, x.shape[0] * x.shape[1]
    given, x = (weight, bias), _aligned(x.contiguous())
    weight = _aligned(weight.contiguous())
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    common = {
        "bfloat16": weight.dtype == torch.bfloat16,
        # NOTE: a copy may still be under way where the kernel reads weights without a wait.
        "overlap": overlap and weight is given[0] and bias is given[1],
        "device": x.device.index,
        "stream": torch.cuda.current_stream(x.device).cuda_stream,
    }
    norm = (0, 0, 0, 0, 0, 0.0)
    if scale is not None:
        scale, shift = _aligned(scale), _aligned(shift)
        if statistics is not None and rows <= MAX_NORMED_ROWS:
            statistics = statistics.contiguous()
            statistics = statistics.clone() if statistics.data_ptr() % STATISTICS_BYTES else statistics
            norm = (*(t.data_ptr() for t in (statistics, scale, shift)), scale.stride(0), shift.stride(0), eps)
        else:
            x = _normed(x, scale, shift, weight.dtype, eps, common)
    y = torch.empty(batch, length, N, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    outputs = [y, empty_statistics(y)] if return_statistics else [y]
    extension.module.linear_rows(
        x=x.data_ptr(),
        norm=norm,
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        gate=0 if gate is None else gate.data_ptr(),
        y=y.data_ptr(),
        statistics=outputs[1].data_ptr() if return_statistics else 0,
        gate_stride=0 if gate is None else gate.stride(0),
        num_rows=rows,
        num_inputs=K,
        num_outputs=N,
        image_rows=length,
        float_x=x.dtype == torch.float32,
        float_residual=residual is not None and residual.dtype == torch.float32,
        gelu=gelu,
        kernel_rows=next(most for most in ROWS if rows <= most),
        **common,
    )
    return outputs


def empty_statistics(y: Tensor) -> Tensor:
    """For `reference.statistics` of y."""
    return y.new_empty(*y.shape[:-1], -(-y.shape[-1] // TILE), 2, dtype=torch.float32)


def _normed(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, eps: float, common: dict) -> Tensor:
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    extension.module.norm_rows(
        x=x.data_ptr(),
        scale=scale.data_ptr(),
        shift=shift.data_ptr(),
        h=h.data_ptr(),
        scale_stride=scale.stride(0),
        shift_stride=shift.stride(0),
        num_rows=x.shape[:-1].numel(),
        num_inputs=x.shape[-1],
        image_rows=x.shape[1],
        eps=eps,
        float_x=x.dtype == torch.float32,
        **common,
    )
    return h


def misaligned(x: Tensor) -> bool:
    """Whether rows of x, or x itself, do not start at multiples of 16 bytes."""
    return x.data_ptr() % 16 > 0 or any(stride * x.itemsize % 16 for stride in x.stride()[:-1])


def _aligned(x: Tensor) -> Tensor:
    """With rows that start at multiples of 16 bytes: x, or a copy."""
    return x.clone(memory_format=torch.contiguous_format) if misaligned(x) else x
