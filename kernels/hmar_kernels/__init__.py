"""Fused operators of transformers over pyramids of image tokens.

attention: block-sparse attention. Read `mask.py` first (which tokens see which), then `attention/api.py`.
modulated_norm, qk_norm, linear_cross_entropy: what surrounds it; norm_linear, gelu_linear: the same with the products
behind, keeping less for the backward; linear, qk_norm_attention, blocks: for generation, where rows are few;
token_embedding: before the blocks there; sampling: from logits to codes; least_confident: which of them are predicted
again; code_maps: from codes to the latent, and to what the next scale reads; group_norm, conv2d, scaled_softmax: for
the decoder. Each in `api.py` of its folder.
"""

from .attention import IMPLEMENTATIONS, attention, choose, explain, unavailable
from .blocks import transformer_blocks
from .code_maps import accumulate_codes_, map_codes
from .conv2d import conv2d, conv_transpose2d
from .gelu_linear import gelu_linear
from .group_norm import group_norm, group_norm_conv, residual_group_norm
from .least_confident import least_confident
from .linear import linear, linear_parts
from .linear_cross_entropy import linear_cross_entropy
from .mask import SpanMask
from .modulated_norm import modulated_norm, residual_modulated_norm, summed_modulated_norm
from .norm_linear import norm_linear, residual_norm_linear
from .qk_norm import qk_norm
from .qk_norm_attention import qk_norm_attention
from .sampling import SampledCodes, sample_codes
from .scaled_softmax import scaled_softmax
from .token_embedding import token_embedding

__all__ = [
    "IMPLEMENTATIONS",
    "SampledCodes",
    "SpanMask",
    "accumulate_codes_",
    "attention",
    "choose",
    "conv2d",
    "conv_transpose2d",
    "explain",
    "gelu_linear",
    "group_norm",
    "group_norm_conv",
    "least_confident",
    "linear",
    "linear_cross_entropy",
    "linear_parts",
    "map_codes",
    "modulated_norm",
    "norm_linear",
    "qk_norm",
    "qk_norm_attention",
    "residual_group_norm",
    "residual_modulated_norm",
    "residual_norm_linear",
    "sample_codes",
    "scaled_softmax",
    "summed_modulated_norm",
    "token_embedding",
    "transformer_blocks",
    "unavailable",
]
