"""How much arithmetic training on one image, and generating it, is, and what a GPU can do at most.

Model FLOPs in the sense of PaLM (Chowdhery et al., arXiv 2204.02311, appendix B): products of the linear layers and of
attention over the pairs that the mask leaves, a multiply-add being two. Masked pairs, activations computed again and
the kernels' own recomputation get no credit. MFU is model FLOPs per second over the peak. Read next: train.py, which
logs it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from hmar.config import ModelConfig
from hmar.model import MaskedTransformer, NextScaleTransformer

# Dense bf16 tensor-core peak in FLOP/s by a part of the device's name, in whole words, the most specific first. From
# NVIDIA's data sheets of H100 (SXM, NVL, PCIe), H200, GH200, B200, GB200, A100, A30, A40, L4, L40, L40S, RTX 6000 Ada,
# and white papers of GeForce RTX 4090 and 3090 (fp32 accumulation); where a sheet gives the sparse rate, half of it.
PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """The peak of a GPU in FLOP/s, bf16 or fp16 with fp32 accumulation; None for one that is not in the table."""
    return next((peak for part, peak in PEAK_BF16.items() if re.search(rf"\b{part}\b", device_name)), None)


def training_flops(model: NextScaleTransformer | MaskedTransformer) -> float:
    """FLOPs of forward and backward for one image.

    With C width, L tokens, P unmasked pairs, V codes, E code dimensions, r the MLP's ratio and N blocks, forward is

        N (2 L (4 + 2 r) C^2 + 4 P C + 12 C^2) + 2 L C V + 4 C^2 + 2 (L - n_1^2) E C

    (projections and MLP, Q K^T and P V, modulation of a block; head, its modulation, inputs). Backward is twice that: a
    product for the gradient of each operand that has one. The inputs, made of codes, have none. In stage 2 neither
    have class embedding and the trunk's weights: the trunk's gradient only passes through to the mask embedding.
    """
    config: ModelConfig = model.config
    C, L = config.width, config.pyramid.length
    pairs = model.masks[None].num_pairs
    tokens = 2 * L * (4 * C * C + 2 * C * config.hidden_width)
    attention = 4 * pairs * C
    modulation = 0 if config.shared_modulation else 2 * C * 6 * C
    shared = 2 * C * 6 * C if config.shared_modulation else 0
    head, head_modulation = 2 * L * C * config.vocab_size, 2 * C * 2 * C
    inputs = 2 * (L - config.pyramid.sizes[0]) * config.code_dim * C
    if isinstance(model, MaskedTransformer):
        trunk = config.depth - config.mask_depth
        trained = config.mask_depth * (3 * tokens + 3 * attention + 2 * modulation) + 3 * head + 2 * head_modulation
        # Visible codes are a second product of the embedding.
        return trained + trunk * (2 * tokens + 3 * attention + modulation) + shared + 2 * inputs
    return 3 * (config.depth * (tokens + attention + modulation) + shared + head + head_modulation) + 2 * inputs


def utilization(flops_per_second: float, device: torch.device, dtype: torch.dtype | None) -> float | None:
    """MFU of one device: the share of its peak, None for float32 and for devices without a known peak."""
    if device.type != "cuda" or dtype is None:
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else flops_per_second / peak


def generation_flops(
    config: ModelConfig, schedule: Sequence[Sequence[int]], guided_S: Sequence[bool], cached: bool = False
) -> float:
    """FLOPs of the transformer for one image, as `hmar.engine` computes it: the decoder and the quantizer not counted.

    With the letters of `training_flops`, a pass over n tokens that see m keys each, and gives logits of w of them, is

        N (2 n (4 + 2 r) C^2 + 4 n m C) + 2 w C V + 2 n E C

    a row; in masked passes the codes in sight are a second product of the embedding. Every modulation, that of HMAR's
    mask blocks too, is computed once an image and row.

    Args:
        schedule: codes a pass, of every scale (`hmar.generate.resolve_schedule`); passes after a scale's first are
            masked, and have logits of hidden codes alone and no null class.
        guided_S: whether the null class, a second row, takes part in the next-scale pass of each scale.
        cached: whether tokens see earlier scales too, as in VAR, which has no masked passes.
    """
    C, V, sizes = config.width, config.vocab_size, config.pyramid.sizes
    if len(schedule) != len(sizes) or len(guided_S) != len(sizes):
        raise ValueError(f"schedule and guided_S must be of {len(sizes)} scales, got {len(schedule)}, {len(guided_S)}")

    def one_pass(n: int, keys: int, wanted: int, embedded: int) -> float:
        blocks = config.depth * (2 * n * (4 * C * C + 2 * C * config.hidden_width) + 4 * n * keys * C)
        return blocks + 2 * wanted * C * V + 2 * embedded * n * config.code_dim * C

    flops = 0.0
    for k, (n, passes, guided) in enumerate(zip(sizes, schedule, guided_S, strict=True)):
        keys = config.pyramid.offsets[k + 1] if cached else n
        flops += (1 + guided) * one_pass(n, keys, n, int(k > 0))
        flops += sum(one_pass(n, keys, sum(passes[i:]), 2) for i in range(1, len(passes)))
    num_blocks = 1 if config.shared_modulation else config.depth + (0 if cached else config.mask_depth)
    modulation = 2 * C * (6 * C * num_blocks + 2 * C * (1 if cached else 2))
    return flops + (1 + any(guided_S)) * modulation
