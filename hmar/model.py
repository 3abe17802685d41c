"""The transformers: VAR, HMAR's two training stages, and HMAR as it generates.

    class, inputs -> TokenEmbedding -> Block x depth -> Head -> logits

`NextScaleTransformer` is VAR with the block-causal mask and HMAR's stage 1 with the block-diagonal one;
`MaskedTransformer` is HMAR's stage 2; `HMAR` is both on one trunk (HMAR, arXiv 2506.04421, section 4; the blocks are
those of VAR, arXiv 2404.02905). Read `hmar.loss` for the targets and `hmar.generate` for sampling.

Shapes: B images, L tokens of the scales at hand, C width, H heads, D head dim, E code dimensions, V codes.
inputs_BLE has no rows for scale 1, whose tokens come from the class: it is n_1^2 shorter when scale 1 is at hand.
`scales` = (first, last) restricts a pass to the scales first..last-1, counted from 0; None means all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hmar.config import ModelConfig
from hmar.pyramid import Pyramid
from hmar_kernels import (
    SpanMask,
    gelu_linear,
    linear_cross_entropy,
    modulated_norm,
    norm_linear,
    qk_norm,
    residual_modulated_norm,
    residual_norm_linear,
)
from hmar_kernels import attention as masked_attention
from hmar_kernels.token_embedding import Known

PATTERNS = ("block_diagonal", "block_causal")
Scales = tuple[int, int]


class LayerCache(Protocol):
    """Keys and values that one block has seen in earlier scales; `hmar.generate.LayerKeysValues` is one."""

    def append(self, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]: ...


class Targets(NamedTuple):
    """What a pass is to predict: codes, int64 [B, L], and weights of the tokens' cross-entropies, float32 [B, L]."""

    codes_BL: Tensor
    weights_BL: Tensor


class NextScaleTransformer(nn.Module):
    """Predicts every scale's codes from the codes of the scales before it.

    Args:
        config: sizes.
        pattern: "block_diagonal" (HMAR: a scale reads its own input only) or "block_causal" (VAR).
        attention: implementation, passed on to `hmar_kernels.attention`.
    """

    def __init__(self, config: ModelConfig, pattern: str = "block_diagonal", attention: str = "auto"):
        super().__init__()
        self.config = config
        self.pattern = pattern
        self.masks = ScaleMasks(config.pyramid, pattern)
        self.embedding = TokenEmbedding(config)
        self.shared_modulation = SharedModulation(config) if config.shared_modulation else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i, attention) for i in range(config.depth))
        self.head = Head(config)

    def forward(
        self,
        class_B: Tensor,
        inputs_BLE: Tensor,
        scales: Scales | None = None,
        caches: Sequence[LayerCache] | None = None,
        targets: Targets | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, L, V]; with targets, which saves storing them, what `Head.loss` returns.

        class_B: int64 class indices, `config.null_class` for none. inputs_BLE: `MultiScaleQuantizer.next_scale_inputs`.
        A block-causal model that starts after scale 1 needs `caches`, one a block, that hold all scales before.
        """
        cond_BC, x_BLC = self.embedding(class_B, inputs_BLE, scales)
        stream = run(self.blocks, Residual(x_BLC), self.shared_modulation(cond_BC), self.masks[scales], caches)
        return self.head(stream, cond_BC) if targets is None else self.head.loss(stream, cond_BC, targets)


class MaskedTransformer(nn.Module):
    """HMAR's stage 2: predicts the hidden codes of a scale from its visible ones and the scales before it.

    Trained are the last `config.mask_depth` blocks, the head and the mask embedding. Everything before them is the
    trunk, shared with next-scale prediction: no gradients, always in evaluation mode.
    """

    def __init__(self, config: ModelConfig, attention: str = "auto"):
        super().__init__()
        self.config = config
        self.masks = ScaleMasks(config.pyramid, "block_diagonal")
        split = config.depth - config.mask_depth
        self.embedding = TokenEmbedding(config)
        self.shared_modulation = SharedModulation(config) if config.shared_modulation else nn.Identity()
        self.trunk = nn.ModuleList(Block(config, i, attention) for i in range(split))
        self.blocks = nn.ModuleList(Block(config, i, attention) for i in range(split, config.depth))
        self.head = Head(config)
        self.mask_embedding_C = init_table(config, config.width)
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    @classmethod
    def from_next_scale(cls, stage1: NextScaleTransformer, attention: str = "auto") -> MaskedTransformer:
        """Start stage 2 from a copy of stage 1's weights, with a fresh mask embedding."""
        if stage1.pattern != "block_diagonal":
            raise ValueError(
                f"Stage 2 starts from a next-scale model with the block_diagonal mask, got {stage1.pattern}."
            )
        model = cls(stage1.config, attention).to(stage1.head.linear.weight)
        state = split_blocks(stage1.state_dict(), len(model.trunk))
        model.load_state_dict({**state, "mask_embedding_C": model.mask_embedding_C.detach()})
        return model

    def _frozen(self) -> tuple[nn.Module, ...]:
        return self.embedding, self.shared_modulation, self.trunk

    def train(self, mode: bool = True) -> MaskedTransformer:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(
        self,
        class_B: Tensor,
        inputs_BLE: Tensor,
        residuals_BLE: Tensor,
        masked: Tensor,
        scales: Scales | None = None,
        targets: Targets | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, L, V], which mean something where `masked` is True; with targets, what `Head.loss` returns.

        residuals_BLE: `MultiScaleQuantizer.own_residuals`, of the shape of inputs_BLE. masked: bool [L] or [B, L], True
        where a code is hidden. Scale 1 is never masked; its entries are ignored.
        """
        known = Known(residuals_BLE, masked, self.mask_embedding_C)
        cond_BC, x_BLC = self.embedding(class_B, inputs_BLE, scales, known)
        modulation, mask = self.shared_modulation(cond_BC), self.masks[scales]
        stream = run(self.trunk, Residual(x_BLC), modulation, mask)
        stream = run(self.blocks, stream, modulation, mask)
        return self.head(stream, cond_BC) if targets is None else self.head.loss(stream, cond_BC, targets)


class HMAR(nn.Module):
    """The model that generates: one trunk, then next-scale blocks with their head or mask blocks with theirs."""

    def __init__(self, config: ModelConfig, attention: str = "auto"):
        super().__init__()
        self.config = config
        self.masks = ScaleMasks(config.pyramid, "block_diagonal")
        split = config.depth - config.mask_depth
        self.embedding = TokenEmbedding(config)
        self.shared_modulation = SharedModulation(config) if config.shared_modulation else nn.Identity()
        self.trunk = nn.ModuleList(Block(config, i, attention) for i in range(split))
        self.next_scale_blocks = nn.ModuleList(Block(config, i, attention) for i in range(split, config.depth))
        self.next_scale_head = Head(config)
        self.mask_blocks = nn.ModuleList(Block(config, i, attention) for i in range(split, config.depth))
        self.mask_head = Head(config)
        self.mask_embedding_C = init_table(config, config.width)

    @classmethod
    def from_stages(cls, next_scale: NextScaleTransformer, masked: MaskedTransformer, attention: str = "auto") -> HMAR:
        """Assemble copies of the two stages' weights; ValueError unless `masked` stands on `next_scale`'s trunk."""
        if next_scale.config != masked.config:
            raise ValueError(f"The stages have different sizes: {next_scale.config} and {masked.config}.")
        stage1 = split_blocks(next_scale.state_dict(), len(masked.trunk))
        stage2 = masked.state_dict()
        state = {"mask_embedding_C": stage2.pop("mask_embedding_C")}
        for name, tensor in stage1.items():
            if name.startswith(("blocks.", "head.")):
                state[f"next_scale_{name}"] = tensor
                state[f"mask_{name}"] = stage2[name]
            elif torch.equal(tensor, stage2[name].to(tensor.device)):
                state[name] = tensor
            else:
                raise ValueError(
                    f"{name} differs between the stages: the masked model was not trained from this next-scale model. "
                    "Start stage 2 with MaskedTransformer.from_next_scale."
                )
        model = cls(next_scale.config, attention).to(next_scale.head.linear.weight)
        model.load_state_dict(state)
        return model

    def next_scale(self, class_B: Tensor, inputs_BLE: Tensor, scales: Scales | None = None) -> Tensor:
        """Logits [B, L, V] of the next-scale branch."""
        cond_BC, x_BLC = self.embedding(class_B, inputs_BLE, scales)
        modulation, mask = self.shared_modulation(cond_BC), self.masks[scales]
        stream = run(self.trunk, Residual(x_BLC), modulation, mask)
        stream = run(self.next_scale_blocks, stream, modulation, mask)
        return self.next_scale_head(stream, cond_BC)

    def masked(
        self,
        class_B: Tensor,
        inputs_BLE: Tensor,
        residuals_BLE: Tensor,
        masked: Tensor,
        scales: Scales | None = None,
        wanted_Bm: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, L, V] of the masked branch; arguments as in `MaskedTransformer.forward`.

        wanted_Bm: int64 positions within the tokens at hand; the logits [B, m, V] are then those of these tokens alone.
        """
        known = Known(residuals_BLE, masked, self.mask_embedding_C)
        cond_BC, x_BLC = self.embedding(class_B, inputs_BLE, scales, known)
        modulation, mask = self.shared_modulation(cond_BC), self.masks[scales]
        stream = run(self.trunk, Residual(x_BLC), modulation, mask)
        stream = run(self.mask_blocks, stream, modulation, mask)
        if wanted_Bm is not None:
            stream = stream.take(wanted_Bm)
        return self.mask_head(stream, cond_BC)


class TokenEmbedding(nn.Module):
    """Class and inputs to tokens: W f_hat + b (or class + start) + position + scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pyramid = config.pyramid
        self.classes = nn.Embedding(config.num_classes + 1, config.width)  # NOTE: the last row is "no class"
        self.codes = nn.Linear(config.code_dim, config.width)
        self.scales = nn.Embedding(self.pyramid.num_scales, config.width)
        self.start_LC = init_table(config, self.pyramid.sizes[0], config.width)
        self.position_LC = init_table(config, self.pyramid.length, config.width)
        scale_of_token = [k for k, size in enumerate(self.pyramid.sizes) for _ in range(size)]
        self.register_buffer("scale_of_token_L", torch.tensor(scale_of_token), persistent=False)
        # Of the residual stream, which begins here; None for that of the sums below. The trainer's.
        self.stream_dtype: torch.dtype | None = None
        for module in (self.classes, self.codes, self.scales):
            init_linear(module, config)

    def forward(
        self, class_B: Tensor, inputs_BLE: Tensor, scales: Scales | None = None, known: Known | None = None
    ) -> tuple[Tensor, Tensor]:
        """The class embedding [B, C], which conditions every block, and the tokens [B, L, C].

        known: what masked prediction adds to the tokens of inputs_BLE, see `known_codes`.
        """
        first, last = scales or (0, self.pyramid.num_scales)
        span = slice(self.pyramid.offsets[first], self.pyramid.offsets[last])
        self._check(class_B, inputs_BLE, first, span)
        cond_BC = self.classes(class_B)
        x_BLC = self.codes(inputs_BLE)
        if known is not None:
            x_BLC = x_BLC + known_codes(self.codes.weight, *known)
        if first == 0:
            x_BLC = torch.cat([cond_BC[:, None] + self.start_LC, x_BLC], dim=1)
        x_BLC = x_BLC + self.position_LC[span] + self.scales(self.scale_of_token_L[span])
        return cond_BC, x_BLC if self.stream_dtype is None else x_BLC.to(self.stream_dtype)

    def _check(self, class_B: Tensor, inputs_BLE: Tensor, first: int, span: slice) -> None:
        num_inputs = span.stop - (self.pyramid.sizes[0] if first == 0 else span.start)
        expected = (class_B.shape[0], num_inputs, self.codes.in_features)
        if class_B.ndim != 1 or inputs_BLE.shape != expected:
            raise ValueError(
                f"Classes have shape {tuple(class_B.shape)} and inputs {tuple(inputs_BLE.shape)}; expected "
                f"(batch,) and (batch, {num_inputs}, {self.codes.in_features}) for tokens {span.start} to {span.stop} "
                f"of the pyramid {self.pyramid.sides}, where scale 1 has no inputs."
            )


class Residual(NamedTuple):
    """The tokens between blocks: x + gate branch, not added yet, because the next layer norm does that in one pass.

    Attributes:
        x_BLC: the residual stream, which keeps its dtype from block to block.
        branch_BLC, gate_B1C: what is added to it; None for nothing.
        statistics_BLT2: of x_BLC, where nothing is added and `hmar_kernels.linear` left them.
    """

    x_BLC: Tensor
    branch_BLC: Tensor | None = None
    gate_B1C: Tensor | None = None
    statistics_BLT2: Tensor | None = None

    def norm(self, scale_B1C: Tensor, shift_B1C: Tensor) -> tuple[Tensor, Tensor]:
        """y = x + gate branch, and LN(y) (1 + scale) + shift."""
        if self.branch_BLC is None:
            return self.x_BLC, modulated_norm(self.x_BLC, scale_B1C, shift_B1C)
        return residual_modulated_norm(self.x_BLC, self.branch_BLC, self.gate_B1C, scale_B1C, shift_B1C)

    def norm_linear(
        self, scale_B1C: Tensor, shift_B1C: Tensor, weight_MC: Tensor, keep_x: bool = False
    ) -> tuple[Tensor, Tensor]:
        """y, and its norm times the weight [B, L, M]; keep_x: what the backward keeps, see `residual_norm_linear`."""
        if self.branch_BLC is None:
            return self.x_BLC, norm_linear(self.x_BLC, scale_B1C, shift_B1C, weight_MC)
        added = self.x_BLC, self.branch_BLC, self.gate_B1C
        return residual_norm_linear(*added, scale_B1C, shift_B1C, weight_MC, keep_x=keep_x)

    def take(self, wanted_Bm: Tensor) -> Residual:
        """The tokens at these positions of each image."""
        index_Bm1 = wanted_Bm[..., None]
        branch_BLC = None if self.branch_BLC is None else self.branch_BLC.take_along_dim(index_Bm1, dim=1)
        return Residual(self.x_BLC.take_along_dim(index_Bm1, dim=1), branch_BLC, self.gate_B1C)


class Block(nn.Module):
    """Attention and MLP, each normalised, shifted, scaled and gated by the class (adaptive layer norm)."""

    def __init__(self, config: ModelConfig, index: int, attention: str):
        super().__init__()
        self.modulation = SharedModulationTable(config) if config.shared_modulation else BlockModulation(config)
        self.attention = Attention(config, attention)
        self.mlp = MLP(config)
        self.drop_path = DropPath(config.drop_path * index / max(1, config.depth - 1))

    def forward(self, stream: Residual, cond: Tensor, mask: SpanMask, cache: LayerCache | None = None) -> Residual:
        gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp = self.modulation(cond)
        # NOTE: a branch is dropped by its gate, which is small and is multiplied anyway.
        x_BLC, branch_BLC = self.attention(stream, scale_attn, shift_attn, mask, cache)
        stream = Residual(x_BLC, branch_BLC, self.drop_path(gate_attn))
        x_BLC, branch_BLC = self.mlp(stream, scale_mlp, shift_mlp)
        return Residual(x_BLC, branch_BLC, self.drop_path(gate_mlp))


class BlockModulation(nn.Module):
    """A block's six vectors [B, 1, C] from the class embedding [B, C]: two gates, two scales, two shifts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, 6 * config.width)
        init_linear(self.linear, config)
        scale_gates(self.linear.weight, config)

    def forward(self, cond_BC: Tensor) -> Sequence[Tensor]:
        return self.linear(F.silu(cond_BC))[:, None].chunk(6, dim=-1)


class SharedModulation(nn.Module):
    """One such linear for all blocks (d36): [B, C] -> [B, 6, C]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, 6 * config.width)
        init_linear(self.linear, config)

    def forward(self, cond_BC: Tensor) -> Tensor:
        return self.linear(F.silu(cond_BC)).unflatten(-1, (6, -1))


class SharedModulationTable(nn.Module):
    """What a block adds to the shared vectors."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.table_6C = nn.Parameter(torch.randn(6, config.width) / math.sqrt(config.width))
        scale_gates(self.table_6C, config)

    def forward(self, shared_B6C: Tensor) -> Sequence[Tensor]:
        return (shared_B6C + self.table_6C).chunk(6, dim=1)


class Attention(nn.Module):
    """softmax(s q k^T) v with q and k of unit length and a learned s per head, over the keys the mask allows.

    Takes the residual stream with the scale and shift of its norm; gives the stream and what to add to it.
    """

    MAX_LOG_SCALE = math.log(100)

    def __init__(self, config: ModelConfig, impl: str):
        super().__init__()
        self.impl = impl
        self.bound_H: Tensor | None = None  # what `logit_bound` gives, where it is known to stay; the engine's
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_bias_C = nn.Parameter(torch.zeros(config.width))
        self.v_bias_C = nn.Parameter(torch.zeros(config.width))
        self.log_scale_H = nn.Parameter(torch.full((config.num_heads,), math.log(4)))
        self.proj = nn.Linear(config.width, config.width)
        for linear in (self.qkv, self.proj):
            init_linear(linear, config)
        scale_residual(self.proj, config)

    def forward(
        self, stream: Residual, scale_B1C: Tensor, shift_B1C: Tensor, mask: SpanMask, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        x_BLC, qkv_BLM = stream.norm_linear(scale_B1C, shift_B1C, self.qkv.weight)
        return x_BLC, self.proj(self.attended(qkv_BLM, mask, cache))

    def attended(self, qkv_BLM: Tensor, mask: SpanMask, cache: LayerCache | None = None) -> Tensor:
        """Attention of q, k and v side by side [B, L, 3 C], of all heads [B, L, C]."""
        q_BHLD, k_BHLD, v_BHLD = qk_norm(
            qkv_BLM, self.q_bias_C, self.v_bias_C, self.log_scale_H, max_log_scale=self.MAX_LOG_SCALE
        )
        if cache is not None:
            k_BHLD, v_BHLD = cache.append(k_BHLD, v_BHLD)
        bound_H = self.logit_bound() if self.bound_H is None else self.bound_H
        out_BHLD = masked_attention(q_BHLD, k_BHLD, v_BHLD, mask, scale=1.0, logit_bound=bound_H, impl=self.impl)
        return out_BHLD.transpose(1, 2).flatten(2)

    def logit_bound(self) -> Tensor:
        """Of each head [H], float32: no product of q and k, of unit length and scaled, is larger."""
        return self.log_scale_H.detach().clamp_max(self.MAX_LOG_SCALE).exp().float()


class MLP(nn.Module):
    """Two linear layers with GELU between them; takes and gives what attention does."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden_width)
        self.fc2 = nn.Linear(config.hidden_width, config.width)
        for linear in (self.fc1, self.fc2):
            init_linear(linear, config)
        scale_residual(self.fc2, config)

    def forward(self, stream: Residual, scale_B1C: Tensor, shift_B1C: Tensor) -> tuple[Tensor, Tensor]:
        # NOTE: stream.x_BLC is kept by attention's norm, which gave it.
        x_BLC, hidden_BLM = stream.norm_linear(scale_B1C, shift_B1C, self.fc1.weight, keep_x=True)
        return x_BLC, gelu_linear(hidden_BLM, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Head(nn.Module):
    """Layer norm scaled and shifted by the class, then logits over the codebook."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.vocab_size)
        for linear, factor in ((self.modulation, 0.5), (self.linear, 0.02)):
            init_linear(linear, config)
            linear.weight.data.mul_(factor)

    def forward(self, stream: Residual, cond_BC: Tensor) -> Tensor:
        return self.linear(self._norm(stream, cond_BC))

    def loss(self, stream: Residual, cond_BC: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Weighted sum of the tokens' cross-entropies, a scalar, and whether the most likely code is the true one, bool
        [B, L]. The logits of all tokens are never stored."""
        h_BLC, (codes_BL, weights_BL) = self._norm(stream, cond_BC), targets
        loss, correct = linear_cross_entropy(
            h_BLC.flatten(0, 1), self.linear.weight, self.linear.bias, codes_BL.flatten(), weights_BL.flatten()
        )
        return loss, correct.view_as(codes_BL)

    def _norm(self, stream: Residual, cond_BC: Tensor) -> Tensor:
        _, h_BLC = stream.norm(*self.modulation(F.silu(cond_BC))[:, None].chunk(2, dim=-1))
        return h_BLC


class DropPath(nn.Module):
    """Leave out a residual branch for whole images with probability p in training, and scale the others up.

    `factor_B`, of 0 and 1 / (1 - p), is what a caller that draws for itself has drawn for the images at hand, as the
    trainer does; None draws here.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.factor_B: Tensor | None = None

    def forward(self, x_BLC: Tensor) -> Tensor:
        if not self.training:
            return x_BLC
        # NOTE: with factors given, p is not read, so that one compiled graph serves blocks of every p.
        factor_B = self.factor_B
        if factor_B is None:
            if self.p == 0:
                return x_BLC
            factor_B = (torch.rand(x_BLC.shape[0], device=x_BLC.device) >= self.p) / (1 - self.p)
        return x_BLC * factor_B[:, None, None].to(x_BLC.dtype)


class ScaleMasks:
    """The masks of one pattern over one pyramid, by (first, last) scale; None is the whole pyramid.

    The whole pyramid and single scales, which is what training and generation use, are made at once, so that looking
    them up is all a compiled model does.
    """

    def __init__(self, pyramid: Pyramid, pattern: str):
        if pattern not in PATTERNS:
            raise ValueError(f"No attention pattern is called {pattern!r}; known are {', '.join(PATTERNS)}.")
        self.pyramid = pyramid
        self.pattern = pattern
        self.masks = {(k, k + 1): self._make(k, k + 1) for k in range(pyramid.num_scales)}
        self.masks[None] = self.masks[0, pyramid.num_scales] = getattr(pyramid, pattern)()

    def __getitem__(self, scales: Scales | None) -> SpanMask:
        if scales not in self.masks:
            self.masks[scales] = self._make(*scales)
        return self.masks[scales]

    def _make(self, first: int, last: int) -> SpanMask:
        sizes, offsets = self.pyramid.sizes, self.pyramid.offsets
        if self.pattern == "block_diagonal":
            return SpanMask.block_diagonal(sizes[first:last])
        ends = [offsets[k + 1] for k in range(first, last) for _ in range(sizes[k])]
        return SpanMask.from_intervals([0] * len(ends), ends)


def run(
    blocks: nn.ModuleList, stream: Residual, cond: Tensor, mask: SpanMask, caches: Sequence[LayerCache] | None = None
) -> Residual:
    for block, cache in zip(blocks, caches or [None] * len(blocks), strict=True):
        stream = block(stream, cond, mask, cache)
    return stream


def known_codes(weight_CE: Tensor, residuals_BLE: Tensor, masked: Tensor, mask_embedding_C: Tensor) -> Tensor:
    """What masked prediction adds to a token: W own residual where the code is visible, else the mask embedding."""
    masked = masked[..., masked.shape[-1] - residuals_BLE.shape[1] :]
    visible_BLC = F.linear(residuals_BLE, weight_CE)
    return torch.where(masked[..., None], mask_embedding_C.to(visible_BLC.dtype), visible_BLC)


def split_blocks(state: dict[str, Tensor], split: int) -> dict[str, Tensor]:
    """A next-scale state dict with its first `split` blocks renamed to the trunk."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            i = int(index)
            name = f"trunk.{i}.{rest}" if i < split else f"blocks.{i - split}.{rest}"
        renamed[name] = tensor
    return renamed


def init_std(config: ModelConfig) -> float:
    return math.sqrt(1 / (3 * config.width))


def init_table(config: ModelConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=init_std(config)))


def init_linear(module: nn.Linear | nn.Embedding, config: ModelConfig) -> None:
    nn.init.trunc_normal_(module.weight, std=init_std(config))
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


def scale_residual(linear: nn.Linear, config: ModelConfig) -> None:
    """Make 2 depth residual branches add up to the variance of one."""
    linear.weight.data.div_(math.sqrt(2 * config.depth))


def scale_gates(weight: Tensor, config: ModelConfig) -> None:
    """Start modulation near the identity: gate rows (the first third) x gate_init, the others x 0.5."""
    gates = weight.shape[0] // 3
    weight.data[:gates].mul_(config.gate_init)
    weight.data[gates:].mul_(0.5)
