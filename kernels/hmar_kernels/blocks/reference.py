"""Transformer blocks with adaptive layer norms, stated plainly by the operators that they are made of:

    a = attention((LN(x) (1 + s1) + t1) W_qkv^T)      x = x + g1 (a W_proj^T + b_proj)
    h = gelu((LN(x) (1 + s2) + t2) W_fc1^T + b_fc1)   x = x + g2 (h W_fc2^T + b_fc2)

with the attention of `qk_norm_attention/reference.py`, of each image's tokens among themselves, and the layers of
`linear/reference.py`. Any dtype, any device; differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..linear.reference import forward as linear
from ..qk_norm_attention.reference import forward as attention


class BlockWeights(NamedTuple):
    """Of a block: qkv [3 C, C], proj [C, C], fc1 [M, C], fc2 [C, M] and biases of one dtype; q_bias and v_bias [C] and
    log_scale [H] of their own."""

    qkv: Tensor
    q_bias: Tensor
    v_bias: Tensor
    log_scale: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


def forward(
    x: Tensor, blocks: Sequence[BlockWeights], vectors: Sequence[Sequence[Tensor]], max_log_scale: float, eps: float
) -> Tensor:
    """x [B, L, C]; vectors of each block: two gates, two scales, two shifts [B, 1, C]."""
    for block, (gate_1, gate_2, scale_1, scale_2, shift_1, shift_2) in zip(blocks, vectors, strict=True):
        qkv = linear(x, block.qkv, None, (scale_1, shift_1), eps=eps)
        attended = attention(qkv, block.q_bias, block.v_bias, block.log_scale, max_log_scale)
        x = linear(attended, block.proj, block.proj_bias, residual=x, gate=gate_1)
        hidden = linear(x, block.fc1, block.fc1_bias, (scale_2, shift_2), gelu=True, eps=eps)
        x = linear(hidden, block.fc2, block.fc2_bias, residual=x, gate=gate_2)
    return x
