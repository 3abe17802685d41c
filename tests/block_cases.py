"""Transformer blocks for tests of `hmar_kernels.blocks`: weights of a trained model's size, logits that matter."""

from __future__ import annotations

import torch

from hmar_kernels.blocks import BlockWeights


def case(images, length, width, hidden_width, depth, dtype=torch.bfloat16, device="cpu", seed=0):
    """x [images, length, width] float32, blocks, their vectors, and max_log_scale, which some heads pass."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, scale=1.0, to=dtype):
        return (scale * torch.randn(*size, generator=generator)).to(device, to)

    heads = width // 64
    blocks = [
        BlockWeights(
            qkv=draw(3 * width, width, scale=width**-0.5),
            q_bias=draw(width, scale=0.3, to=torch.float32),
            v_bias=draw(width, to=torch.float32),
            log_scale=1.5 + draw(heads, to=torch.float32),
            proj=draw(width, width, scale=width**-0.5),
            proj_bias=draw(width),
            fc1=draw(hidden_width, width, scale=width**-0.5),
            fc1_bias=draw(hidden_width),
            fc2=draw(width, hidden_width, scale=hidden_width**-0.5),
            fc2_bias=draw(width),
        )
        for _ in range(depth)
    ]
    # NOTE: as modulation gives them, side by side.
    vectors = [list(draw(images, 1, 6 * width, scale=0.5).split(width, dim=-1)) for _ in range(depth)]
    x = draw(images, length, width, to=torch.float32) + 3 * draw(images, length, 1, to=torch.float32)
    return x, blocks, vectors, 2.0
