"""Linear layer and weighted cross-entropy over chunks of tokens, with the gradients computed in the forward.

    for each chunk of rows:
        z = x W^T + b                                           cuBLAS, into one buffer of CHUNK_BYTES for all chunks
        loss_n, correct_n;  z <- w_n (softmax(z) - onehot(target_n))                        `_rows_kernel`, in place
        dx = z W;  dW += z^T x;  db += sum_n z                                cuBLAS, dW and db summed in float32

Grid: one program a token; it reads its row of logits twice, from cache the second time. Row maxima, sums, losses and
all gradients before rounding are float32.

NOTE: why not keep hidden and recompute the logits in the backward: that is four matrix products of 2 N C V FLOPs
instead of three (d16, 256 px, 32 images: .25 ms of .75 at 720 TFLOP/s) and saves nothing, because dx takes the place of
hidden; float32 dW adds 4 C V bytes (17 MB). A kernel that fuses product and softmax would save writing and reading the
logits, 2 x 178 MB there, .12 ms at 3 TB/s and less where a chunk stays in L2, and loses more on products slower than
those of cuBLAS.

Weights are divided by `unit`, the power of two below the largest, before anything is rounded, and gradients multiplied
by it in the backward: those of one token among 10^5 would be zero in float16.

The equations are stated in reference.py; autograd and argument checks live in api.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..triton_device import column_sums, on_device

CHUNK_BYTES = 64 << 20
# Chunks are multiples of it, for whole tiles of matrix products.
ROW_MULTIPLE = 128
BLOCK_COLUMNS, WARPS = 4096, 8
SIGN_AND_EXPONENT = -(1 << 23)  # all bits of a float32 but those of its mantissa


@triton.jit
def _rows_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    correct_ptr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    offs_v = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    weight = tl.load(weights_ptr + row)
    # NOTE: a target out of range has its own assertion; here it only must not be an address.
    in_range = (target >= 0) & (target < V)
    target_logit = tl.load(logits_ptr + target, mask=in_range, other=0.0).to(tl.float32)

    row_max = float("-inf")
    row_sum = 0.0
    num_above = 0
    for start in range(0, V, BLOCK_V):
        cols = start + offs_v
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        block_max = tl.maximum(row_max, tl.max(z, 0))
        row_sum = row_sum * tl.exp(row_max - block_max) + tl.sum(tl.exp(z - block_max), 0)
        row_max = block_max
        not_above = (z < target_logit) | ((z == target_logit) & (cols >= target)) | (cols >= V)
        num_above += tl.sum((~not_above).to(tl.int32), 0)
    lse = row_max + tl.log(row_sum)
    counts = weight != 0.0
    tl.store(losses_ptr + row, tl.where(counts, weight * (lse - target_logit), 0.0))
    tl.store(correct_ptr + row, num_above == 0)

    if HAS_GRADIENT:
        for start in range(0, V, BLOCK_V):
            cols = start + offs_v
            z = tl.load(logits_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            dz = weight * (tl.exp(z - lse) - tl.where(cols == target, 1.0, 0.0))
            dz = tl.where(counts, dz, 0.0)
            tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), mask=cols < V)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weight: torch.Tensor | None,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N,C], weight [V,C], bias [V] or None, targets [N], token_weight [N] or None; products in hidden's dtype.

    Returns loss [] float32, correct bool [N], unit [] float32, and the gradients of hidden, weight and bias for a
    gradient of 1 / unit of the loss, in their dtypes; empty where `wanted`, one bool each, says so.
    """
    (n, _), vocabulary, dtype = hidden.shape, weight.shape[0], hidden.dtype
    if targets.is_cuda:
        low, high = targets.aminmax()
        torch._assert_async((low >= 0) & (high < vocabulary), f"targets must be from 0 to {vocabulary - 1}")
    weights, unit = _unit_weights(hidden, token_weight)
    hidden, targets = hidden.contiguous(), targets.contiguous()
    # NOTE: contiguous, so that the bias is added within the product.
    matrix, vector = weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype).contiguous()
    wants_hidden, wants_weight, wants_bias = wanted
    d_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(matrix, dtype=torch.float32) if wants_weight else weight.new_empty(0)
    d_bias = torch.zeros_like(vector, dtype=torch.float32) if wants_bias else weight.new_empty(0)
    losses = torch.empty(n, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(n, dtype=torch.bool, device=hidden.device)

    rows = chunk_rows(n, vocabulary, dtype)
    buffer = torch.empty(min(rows, n), vocabulary, dtype=dtype, device=hidden.device)
    for begin in range(0, n, rows):
        chunk = slice(begin, min(begin + rows, n))
        x, z = hidden[chunk], buffer[: chunk.stop - begin]
        if vector is None:
            torch.mm(x, matrix.T, out=z)
        else:
            torch.addmm(vector, x, matrix.T, out=z)
        with on_device(hidden):
            _rows_kernel[(len(z),)](
                logits_ptr=z,
                targets_ptr=targets[chunk],
                weights_ptr=weights[chunk],
                losses_ptr=losses[chunk],
                correct_ptr=correct[chunk],
                V=vocabulary,
                BLOCK_V=min(BLOCK_COLUMNS, triton.next_power_of_2(vocabulary)),
                HAS_GRADIENT=any(wanted),
                num_warps=WARPS,
            )
        if wants_hidden:
            torch.mm(z, matrix, out=d_hidden[chunk])
        if wants_weight:
            _add_product(d_weight, z.T, x)
        if wants_bias:
            d_bias += column_sums(z, torch.float32)
    d_weight, d_bias = d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)
    return losses.sum() * unit, correct, unit, d_hidden, d_weight, d_bias


def chunk_rows(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: logits of at most CHUNK_BYTES (but for one multiple), chunks of about the same size."""
    most = max(ROW_MULTIPLE, CHUNK_BYTES // (vocabulary * dtype.itemsize))
    return ROW_MULTIPLE * math.ceil(num_tokens / math.ceil(num_tokens / most) / ROW_MULTIPLE)


def _unit_weights(hidden: torch.Tensor, token_weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 weights of at most 2, and the power of two that they were divided by."""
    if token_weight is None:
        token_weight = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
    token_weight = token_weight.float().contiguous()
    largest = token_weight.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    unit = (largest.view(torch.int32) & SIGN_AND_EXPONENT).view(torch.float32)
    return token_weight / unit, unit


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b in float32, whatever the dtype of a and b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
