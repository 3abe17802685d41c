"""How much arithmetic training on one image is, whatever computes it, and what a GPU can do at most.

Model FLOPs in the sense of PaLM (Chowdhery et al., arXiv 2204.02311, appendix B): products of the linear layers and of
attention over the pairs that the mask leaves, a multiply-add being two. Masked pairs, activations computed again and
the kernels' own recomputation get no credit. MFU is model FLOPs per second over the peak. Read next: train.py, which
logs it.
"""

from __future__ import annotations

import re

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
