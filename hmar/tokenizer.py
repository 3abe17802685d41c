"""The tokenizer: images <-> codes of the pyramid.

    image -> Encoder -> 3x3 conv -> MultiScaleQuantizer -> 3x3 conv -> Decoder -> image

A convolutional VQGAN (arXiv 2012.09841, appendix A) with self-attention where the maps are smallest. Losses live in
`hmar.loss`; what is done with the codes in `hmar.model`.

Shapes: B images, C channels, H W pixels, h w latent positions, E code dimensions, L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hmar.config import TokenizerConfig
from hmar.pyramid import Pyramid
from hmar.quantizer import MultiScaleQuantizer
from hmar_kernels import group_norm


class TokenizerOutput(NamedTuple):
    """What a training step of the tokenizer needs."""

    reconstruction: Tensor  # [B, 3, H, W], not clamped
    quantizer_loss: Tensor  # scalar
    codes_BL: Tensor  # int64
    latent_BEhw: Tensor  # before quantisation, for MultiScaleQuantizer.restart_unused_codes


class Tokenizer(nn.Module):
    """Images [B, 3, side x stride, side x stride] in [-1, 1] to codes [B, L] and back."""

    def __init__(self, config: TokenizerConfig, pyramid: Pyramid):
        super().__init__()
        self.config = config
        self.pyramid = pyramid
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(config, pyramid)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)
        self.decoder = Decoder(config)

    @property
    def image_size(self) -> int:
        return self.pyramid.side * self.config.stride

    def latent(self, images_BCHW: Tensor) -> Tensor:
        """The latent [B, E, h, w] that is quantised."""
        expected = (self.config.image_channels, self.image_size, self.image_size)
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected:
            raise ValueError(
                f"Images have shape {tuple(images_BCHW.shape)}, expected (batch, {', '.join(map(str, expected))}): the "
                f"pyramid {self.pyramid.sides} with stride {self.config.stride}."
            )
        return self.quant_conv(self.encoder(images_BCHW))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes [B, L] (int64) of images in [-1, 1]."""
        return self.quantizer.encode(self.latent(images_BCHW))

    def decode(self, codes_BL: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of codes [B, L]."""
        return self.decode_f_hat(self.quantizer.f_hats(codes_BL)[-1])

    def decode_f_hat(self, f_hat_BEhw: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of a quantised latent, which may also be one of an early scale."""
        return self.decoder(self.post_quant_conv(f_hat_BEhw)).clamp(-1, 1)

    def forward(self, images_BCHW: Tensor) -> TokenizerOutput:
        """Encode, quantise straight-through, decode. The reconstruction is not clamped, so that it keeps gradients."""
        latent_BEhw = self.latent(images_BCHW)
        f_hat_BEhw, quantizer_loss, codes_BL = self.quantizer(latent_BEhw)
        reconstruction = self.decoder(self.post_quant_conv(f_hat_BEhw))
        return TokenizerOutput(reconstruction, quantizer_loss, codes_BL, latent_BEhw)


class Encoder(nn.Module):
    """Images [B, 3, H, W] to [B, E, H / stride, W / stride]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = config.level_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                config,
                width_in=widths[i - 1] if i > 0 else config.channels,
                width_out=width,
                num_blocks=config.num_res_blocks,
                attention=i == last,
                resample=Downsample(width) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.middle = Middle(config, widths[-1])
        self.norm_out = norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.levels:
            x_BCHW = level(x_BCHW)
        x_BCHW = self.middle(x_BCHW)
        return self.conv_out(self.norm_out(x_BCHW, silu=True))


class Decoder(nn.Module):
    """Latents [B, E, h, w] to images; its levels run from the smallest maps to the largest."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = config.level_channels[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.code_dim, widths[0], 3, padding=1)
        self.middle = Middle(config, widths[0])
        self.levels = nn.ModuleList(
            Level(
                config,
                width_in=widths[max(i - 1, 0)],
                width_out=width,
                num_blocks=config.num_res_blocks + 1,
                attention=i == 0,
                resample=Upsample(width) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        x_BChw = self.middle(self.conv_in(x_BChw))
        for level in self.levels:
            x_BChw = level(x_BChw)
        return self.conv_out(self.norm_out(x_BChw, silu=True))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where asked for, then a change of resolution."""

    def __init__(
        self,
        config: TokenizerConfig,
        width_in: int,
        width_out: int,
        num_blocks: int,
        attention: bool,
        resample: nn.Module | None,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(config, width_in if j == 0 else width_out, width_out) for j in range(num_blocks)
        )
        self.attentions = nn.ModuleList(
            SpatialAttention(config, width_out) if attention else nn.Identity() for _ in range(num_blocks)
        )
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x_BChw: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x_BChw = attention(block(x_BChw))
        return self.resample(x_BChw)


class Middle(nn.Module):
    """Block, attention, block between encoder levels and latent, and between latent and decoder levels."""

    def __init__(self, config: TokenizerConfig, width: int):
        super().__init__()
        self.block_in = ResidualBlock(config, width, width)
        self.attention = SpatialAttention(config, width)
        self.block_out = ResidualBlock(config, width, width)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.block_out(self.attention(self.block_in(x_BChw)))


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, config: TokenizerConfig, width_in: int, width_out: int):
        super().__init__()
        self.norm1 = norm(config, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = norm(config, width_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x_BChw: Tensor) -> Tensor:
        h_BChw = self.conv1(self.norm1(x_BChw, silu=True))
        h_BChw = self.conv2(self.dropout(self.norm2(h_BChw, silu=True)))
        return self.shortcut(x_BChw) + h_BChw


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual."""

    def __init__(self, config: TokenizerConfig, width: int):
        super().__init__()
        self.norm = norm(config, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        q_BLC, k_BLC, v_BLC = self.qkv(self.norm(x_BChw)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        out_BLC = F.scaled_dot_product_attention(q_BLC, k_BLC, v_BLC)
        return x_BChw + self.proj(out_BLC.transpose(1, 2).reshape(x_BChw.shape))


class Downsample(nn.Module):
    """Halve both sides: a 3x3 convolution of stride 2, padded on the right and below only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.conv(F.pad(x_BChw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: repeat every position, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BChw, scale_factor=2, mode="nearest"))


class GroupNorm(nn.GroupNorm):
    """Group norm with SiLU behind it where asked for; one operator on channels-last images."""

    def forward(self, x_BChw: Tensor, silu: bool = False) -> Tensor:
        return group_norm(x_BChw, self.num_groups, self.weight, self.bias, eps=self.eps, silu=silu)


def norm(config: TokenizerConfig, width: int) -> GroupNorm:
    return GroupNorm(config.norm_groups, width, eps=1e-6)
