"""The decoder as the engine runs it: the arithmetic of `hmar.tokenizer.Decoder` in fewer passes over the maps.

    convolution            cuDNN's without its bias, which torch adds in a pass of its own
    norm1, norm_out        add residual, branch and biases in the pass that takes their statistics, where conv2 did not
    norm2                  has the bias of the convolution before it in its factors
    norm_out, conv_out     of few channels: each position is multiplied once, for all of its neighbours
    attention              scores in chunks; of 640 channels in one head SDPA has no fused kernel
    upsampling             repeat and convolve, or one transposed convolution of 4 taps a pixel instead of 9
    3x3 convolutions       cuDNN's, or of large maps the hand-written ones of `hmar_kernels.conv2d`, which make norm and
                           SiLU of what they read, add the residual and make statistics of what they write

Passes over a map of one residual block (reads and writes of the whole map; the first number is that of the modules, the
last one that of hand-written convolutions):

    norm1, silu   3 -> 2 -> 0, statistics in conv2 before       conv1   2, bias 2 -> 0
    norm2, silu   3 -> 3 -> 0, statistics in conv1              conv2   2, bias 2 -> 0       residual   3 -> 3 -> 1

17 -> 12 -> 5. At 256 px a bfloat16 map of 160 channels is 21 MB an image, and three blocks and their upsampling run on
it.

Weights are those of the decoder, read in place; what is derived from them is made by `derive`. No gradients. Read
`hmar.engine` for who calls it.

Shapes: B images, C channels, h w positions, L = h w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hmar.tokenizer import Decoder, Level, ResidualBlock, SpatialAttention, Upsample
from hmar_kernels import conv2d, group_norm, group_norm_conv, residual_group_norm, scaled_softmax
from hmar_kernels.conv2d import (
    choose,
    conv2d_with_statistics,
    conv_transpose2d_with_statistics,
    packed_taps,
    unavailable_on,
)
from hmar_kernels.group_norm import (
    ChunkStatistics,
    NormFactors,
    group_norm_factors,
    residual_group_norm_factors,
)

SCORE_BYTES = 256 << 20  # of attention's scores, at once
CONVOLUTIONS = {"torch": "reference", "hopper": "auto"}
"""Of a decoder -> the implementation of `hmar_kernels.conv2d`, where "auto" can take "hopper"."""


class Unsummed(NamedTuple):
    """A map x + branch + shift, not added yet, because the next norm does that in the pass of its statistics.

    statistics: of x, where the convolution that made it has them.
    """

    x_BChw: Tensor
    branch_BChw: Tensor | None = None
    shift_C: Tensor | None = None
    statistics: ChunkStatistics | None = None

    def norm(self, norm: nn.GroupNorm, silu: bool = False) -> tuple[Unsummed, Tensor]:
        """The map, added up where that costs nothing, and its norm."""
        arguments, options = (norm.num_groups, norm.weight, norm.bias), {"shift": self.shift_C, "eps": norm.eps}
        if self.branch_BChw is None:
            return self, group_norm(self.x_BChw, *arguments, **options, silu=silu, statistics=self.statistics)
        x_BChw, h_BChw = residual_group_norm(self.x_BChw, self.branch_BChw, *arguments, **options, silu=silu)
        return Unsummed(x_BChw), h_BChw

    def before(self, conv: nn.Conv2d, norm: nn.GroupNorm, impl: str) -> tuple[Unsummed, Tensor, NormFactors | None]:
        """The map, added up where that costs nothing, and what `conv2d` takes for the convolution of its norm and SiLU:
        the norm, or a map and factors where the kernel applies them to what it reads."""
        if impl != "auto" or choose(self.x_BChw, conv.weight, doubled=False)[0] != "hopper":
            return *self.norm(norm, silu=True), None
        arguments, options = (norm.num_groups, norm.weight, norm.bias), {"shift": self.shift_C, "eps": norm.eps}
        if self.branch_BChw is None:
            factors = group_norm_factors(self.x_BChw, *arguments, **options, statistics=self.statistics)
            return self, self.x_BChw, factors
        x_BChw, factors = residual_group_norm_factors(self.x_BChw, self.branch_BChw, *arguments, **options)
        return Unsummed(x_BChw), x_BChw, factors

    def convolved_norm(self, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
        """The convolution of its norm and SiLU."""
        return group_norm_conv(
            self.x_BChw,
            norm.num_groups,
            norm.weight,
            norm.bias,
            conv.weight,
            conv.bias,
            branch=self.branch_BChw,
            shift=self.shift_C,
            eps=norm.eps,
            silu=True,
            statistics=self.statistics,
        )

    def total(self) -> Tensor:
        x_BChw = self.x_BChw if self.branch_BChw is None else self.x_BChw + self.branch_BChw
        return x_BChw if self.shift_C is None else x_BChw + self.shift_C[:, None, None]

    def plus(self, branch_BChw: Tensor, shift_C: Tensor) -> Unsummed:
        """With a branch more, of a map without one."""
        assert self.branch_BChw is None, "a norm comes before every branch, and adds the last one"
        return Unsummed(self.x_BChw, branch_BChw, shift_C if self.shift_C is None else self.shift_C + shift_C)


class FusedDecoder(nn.Module):
    """Latents [B, E, h, w] to images, as the decoder it is made of gives them.

    Args:
        decoder: whose weights are used, in their place. Call `derive` after they have changed.
        transposed: whether to upsample by transposed convolutions.
        convolutions: "torch", or "hopper" for those of `hmar_kernels.conv2d` where its "auto" takes them: 3x3 ones of
            large maps, and transposed ones. Default: "hopper" where it can run.
    Raises:
        ValueError: "hopper" cannot run on the decoder's device, or in its dtype.
    """

    def __init__(self, decoder: Decoder, transposed: bool = False, convolutions: str | None = None):
        super().__init__()
        self.decoder = decoder
        reason = unavailable_on(decoder.conv_in.weight.device, decoder.conv_in.weight.dtype)
        if convolutions == "hopper" and reason is not None:
            raise ValueError(f'convolutions="hopper" cannot run here: {reason}; convolutions="torch" would')
        self.impl = CONVOLUTIONS[convolutions or ("torch" if reason else "hopper")]
        self.upsamples = nn.ModuleList(
            (TransposedUpsample if transposed else RepeatUpsample)(level.resample, self.impl)
            for level in decoder.levels
            if isinstance(level.resample, Upsample)
        )

    def derive(self) -> None:
        """Make what follows from the weights again, in place."""
        for upsample in self.upsamples:
            upsample.derive()

    def forward(self, x_BChw: Tensor) -> Tensor:
        x = x_BChw
        for _, stage in self.stages():
            x = stage(x)
        return x

    def stages(self) -> Iterator[tuple[str, Callable]]:
        """What is computed one after another, with names: each takes what the one before returns."""
        yield "middle", self._middle
        for i, level in enumerate(self.decoder.levels):
            yield f"level {i + 1}", partial(blocks_of, level, impl=self.impl)
            if i < len(self.upsamples):
                yield f"upsample {i + 1}", partial(self._upsample, i)
        yield "out", self._out

    def _middle(self, x_BChw: Tensor) -> Unsummed:
        conv_in, middle = self.decoder.conv_in, self.decoder.middle
        x = Unsummed(convolved(conv_in, x_BChw, self.impl), None, conv_in.bias)
        x = residual_block(middle.block_in, x, self.impl)
        return residual_block(middle.block_out, spatial_attention(middle.attention, x), self.impl)

    def _upsample(self, i: int, x: Unsummed) -> Unsummed:
        return self.upsamples[i](x.total())

    def _out(self, x: Unsummed) -> Tensor:
        return x.convolved_norm(self.decoder.norm_out, self.decoder.conv_out)


def blocks_of(level: Level, x: Unsummed, impl: str) -> Unsummed:
    for block, attention in zip(level.blocks, level.attentions, strict=True):
        x = residual_block(block, x, impl)
        if isinstance(attention, SpatialAttention):
            x = spatial_attention(attention, x)
    return x


def residual_block(block: ResidualBlock, x: Unsummed, impl: str) -> Unsummed:
    x, h_BChw, norm = x.before(block.conv1, block.norm1, impl)
    h_BChw, statistics = conv2d_with_statistics(h_BChw, block.conv1.weight, norm=norm, impl=impl)
    h = Unsummed(h_BChw, None, block.conv1.bias, statistics)
    _, h_BChw, norm = h.before(block.conv2, block.norm2, impl)
    if isinstance(block.shortcut, nn.Conv2d):
        x = pointwise(block.shortcut, x)
    if norm is None:
        return x.plus(convolved(block.conv2, h_BChw, impl), block.conv2.bias)
    conv2, added = block.conv2, {"residual": x.x_BChw, "shift": x.shift_C}
    x_BChw, statistics = conv2d_with_statistics(h_BChw, conv2.weight, conv2.bias, norm=norm, **added, impl=impl)
    return Unsummed(x_BChw, statistics=statistics)


def pointwise(conv: nn.Conv2d, x: Unsummed) -> Unsummed:
    """The 1x1 convolution of a map without a branch; a shift passes through it as a vector."""
    shift_C = conv.bias if x.shift_C is None else F.linear(x.shift_C, conv.weight.flatten(1), conv.bias)
    return Unsummed(F.conv2d(x.x_BChw, conv.weight), None, shift_C)


def spatial_attention(module: SpatialAttention, x: Unsummed) -> Unsummed:
    x, h_BChw = x.norm(module.norm)
    h_BLC = h_BChw.permute(0, 2, 3, 1).flatten(1, 2)
    q_BLC, k_BLC, v_BLC = F.linear(h_BLC, module.qkv.weight.flatten(1), module.qkv.bias).chunk(3, dim=2)
    out_BLC = F.linear(attended(q_BLC, k_BLC, v_BLC), module.proj.weight.flatten(1))
    out_BChw = out_BLC.unflatten(1, h_BChw.shape[2:]).permute(0, 3, 1, 2)
    return x.plus(out_BChw, module.proj.bias)


def attended(q_BLC: Tensor, k_BLC: Tensor, v_BLC: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of one head, with scores and softmax in float32 (or float64, of such inputs)."""
    # NOTE: of 640 channels SDPA computes everything in float32 on a GPU, at a tenth of the speed of bfloat16.
    batch, length, channels = q_BLC.shape
    scores_dtype = torch.promote_types(q_BLC.dtype, torch.float32)
    rows = max(1, SCORE_BYTES // (batch * length * scores_dtype.itemsize))
    k_BCL, parts = k_BLC.transpose(1, 2), []
    for part_BRC in q_BLC.split(min(rows, length), dim=1):
        if part_BRC.is_cuda and part_BRC.dtype != scores_dtype:
            scores_BRL = torch.bmm(part_BRC, k_BCL, out_dtype=scores_dtype)
        else:
            scores_BRL = torch.bmm(part_BRC.to(scores_dtype), k_BCL.to(scores_dtype))
        weights_BRL = scaled_softmax(scores_BRL, 1 / math.sqrt(channels), dtype=v_BLC.dtype)
        parts.append(torch.bmm(weights_BRL, v_BLC))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class RepeatUpsample(nn.Module):
    """`Upsample` with its bias left for the next norm."""

    def __init__(self, upsample: Upsample, impl: str = "reference"):
        super().__init__()
        self.conv, self.impl = upsample.conv, impl

    def derive(self) -> None:
        """Nothing follows from the weights."""

    def forward(self, x_BChw: Tensor) -> Unsummed:
        repeated_BCHW = F.interpolate(x_BChw, scale_factor=2, mode="nearest")
        return Unsummed(convolved(self.conv, repeated_BCHW, self.impl), None, self.conv.bias)


class TransposedUpsample(nn.Module):
    """The same as one transposed convolution of 4x4 taps and stride 2.

    Of the three taps of a 3x3 convolution two fall onto the same repeated position: output 2i sees w_0 x_{i-1} +
    (w_1 + w_2) x_i, and 2i + 1 sees (w_0 + w_1) x_i + w_2 x_{i+1}. The sums are made in float64 and rounded once.
    """

    def __init__(self, upsample: Upsample, impl: str = "reference"):
        super().__init__()
        self.conv, self.impl = upsample.conv, impl
        weight = self._transposed()
        channels_last = self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        weight = packed_taps(weight) if impl == "auto" else weight.contiguous(memory_format=layout)
        self.register_buffer("weight", weight, persistent=False)

    def derive(self) -> None:
        self.weight.copy_(self._transposed())

    def _transposed(self) -> Tensor:
        # A transposed convolution spreads x_i over outputs 2i - 1 .. 2i + 2, tap t onto output 2i - 1 + t.
        # taps of x_i: in 2i - 1 as the right neighbour, in 2i and 2i + 1 as the position itself, in 2i + 2 as the left
        weight = self.conv.weight.detach()
        spread = weight.new_tensor(((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)), dtype=torch.float64)
        taps = torch.einsum("ys,oisr,xr->ioyx", spread, weight.double(), spread)
        return taps.to(weight.dtype)

    def forward(self, x_BChw: Tensor) -> Unsummed:
        out_BCHW, statistics = conv_transpose2d_with_statistics(x_BChw, self.weight, impl=self.impl)
        return Unsummed(out_BCHW, None, self.conv.bias, statistics)


def convolved(conv: nn.Conv2d, x_BChw: Tensor, impl: str) -> Tensor:
    """The 3x3 convolution without its bias."""
    return conv2d(x_BChw, conv.weight, impl=impl)
