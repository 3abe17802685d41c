"""Published weight files of VAR and HMAR: their tensor names and shapes, to and from this package's modules.

Names are translated by a table of renamings for each kind of module, and strictly: every published tensor is loaded,
checked and dropped, or reported. Read `hmar.model` and `hmar.tokenizer` for the modules on this side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.tokenizer import Tokenizer

# Our name -> published name: regular expressions, all applied in this order.
TRANSFORMER_NAMES = (
    (r"^embedding\.classes\.", "class_emb."),
    (r"^embedding\.scales\.", "lvl_embed."),
    (r"^embedding\.codes\.", "word_embed."),
    (r"^embedding\.start_LC$", "pos_start"),
    (r"^embedding\.position_LC$", "pos_1LC"),
    (r"^mask_embedding_C$", "mask_embed.weight"),
    (r"^shared_modulation\.linear\.", "shared_ada_lin.1."),
    (r"head\.modulation\.", "head_nm.ada_lin.1."),
    (r"head\.linear\.", "head."),
    (r"\.modulation\.linear\.", ".ada_lin.1."),
    (r"\.modulation\.table_6C$", ".ada_gss"),
    (r"\.attention\.qkv\.", ".attn.mat_qkv."),
    (r"\.attention\.([qv]_bias)_C$", r".attn.\1"),
    (r"\.attention\.log_scale_H$", ".attn.scale_mul_1H11"),
    (r"\.attention\.proj\.", ".attn.proj."),
    (r"\.mlp\.", ".ffn."),
)
# Masked prediction applies the code projection to two inputs under one bias, which is a tensor of its own there.
SEPARATE_BIAS = ((r"^word_embed\.bias$", "word_embed_bias"),)
HMAR_NAMES = (
    (r"^trunk\.", "base_blocks."),
    (r"^next_scale_(blocks|head|head_nm)\.", r"ns_\1."),
)
TOKENIZER_NAMES = (
    (r"^quantizer\.codebook\.", "quantize.embedding."),
    (r"^quantizer\.phis\.", "quantize.quant_resi.qresi_ls."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^(encoder.*)\.resample\.", r"\1.downsample."),
    (r"^(decoder.*)\.resample\.", r"\1.upsample."),
    (r"\.middle\.block_in\.", ".mid.block_1."),
    (r"\.middle\.block_out\.", ".mid.block_2."),
    (r"\.middle\.attention\.", ".mid.attn_1."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.proj\.", ".proj_out."),
    (r"\.shortcut\.", ".nin_shortcut."),
)

# Published tensors with axes of length one that ours do not have: published name -> where they stand.
UNIT_AXES = (
    (r"^pos_start$|^pos_1LC$|^mask_embed\.weight$", (0,)),
    (r"\.ada_gss$", (0, 0)),
    (r"\.scale_mul_1H11$", (0, -1, -1)),
)

# Published tensors that hold no weights: recomputed here, or statistics of the training.
DERIVED = r"^lvl_1L$|^attn_bias_for_masking$|\.attn\.zero_k_bias$|^quantize\.ema_vocab_hit_SV$"


class Published(NamedTuple):
    """Where one of our tensors stands in a published file."""

    name: str
    shape: tuple[int, ...]


def published_layout(module: nn.Module) -> dict[str, Published]:
    """Our tensor name -> published name and shape, for every weight of a tokenizer or transformer."""
    rename = _renamings(module)
    layout = {}
    for ours, parameter in module.named_parameters():
        name = ours
        for pattern, replacement in rename:
            name = re.sub(pattern, replacement, name)
        shape = list(parameter.shape)
        for pattern, axes in UNIT_AXES:
            if re.search(pattern, name):
                for axis in axes:
                    shape.insert(len(shape) if axis == -1 else axis, 1)
        layout[ours] = Published(name, tuple(shape))
    return layout


def load_published(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy published weights into a Tokenizer, NextScaleTransformer, MaskedTransformer or HMAR, as its dtype.

    Raises ValueError that lists all missing, unexpected and misshapen tensors, for a `lvl_1L` that belongs to another
    pyramid and for a key bias that is not zero.
    """
    layout = published_layout(module)
    expected = {published.name: published.shape for published in layout.values()}
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in weights]
    for name, tensor in weights.items():
        if re.search(DERIVED, name):
            problems += _check_derived(module, name, tensor)
        elif name not in expected:
            problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}")
    if problems:
        raise ValueError(f"The weights do not fit this {type(module).__name__}:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for ours, parameter in module.named_parameters():
            parameter.copy_(weights[layout[ours].name].reshape(parameter.shape))


def to_published(module: nn.Module) -> dict[str, Tensor]:
    """The module's weights under their published names and in their published shapes, without derived tensors."""
    layout = published_layout(module)
    return {
        layout[ours].name: parameter.detach().reshape(layout[ours].shape)
        for ours, parameter in module.named_parameters()
    }


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a published file: safetensors, or a flat PyTorch state dict."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} holds no flat mapping of names to tensors; take the state dict out of it first.")
    return dict(weights)


def _renamings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    if isinstance(module, Tokenizer):
        levels = len(module.decoder.levels)
        # NOTE: our decoder levels are numbered as they run, the published ones by resolution.
        flip = tuple((rf"^decoder\.levels\.{i}\.", f"decoder.up.{levels - 1 - i}.") for i in range(levels))
        return flip + TOKENIZER_NAMES
    if isinstance(module, HMAR):
        return TRANSFORMER_NAMES + SEPARATE_BIAS + HMAR_NAMES
    if isinstance(module, MaskedTransformer):
        split = len(module.trunk)
        last = tuple((rf"^blocks\.{i}\.", f"last_blocks.{i + split}.") for i in range(len(module.blocks)))
        return (*last, (r"^(trunk|last_blocks)\.", "blocks."), *TRANSFORMER_NAMES, *SEPARATE_BIAS)
    if isinstance(module, NextScaleTransformer):
        return TRANSFORMER_NAMES
    raise ValueError(
        f"No published layout for {type(module).__name__}; there is one for Tokenizer, NextScaleTransformer, "
        "MaskedTransformer and HMAR."
    )


def _check_derived(module: nn.Module, name: str, tensor: Tensor) -> list[str]:
    if name.endswith("zero_k_bias") and tensor.count_nonzero() > 0:
        return [f"{name} is not zero; keys have no bias here"]
    if name == "lvl_1L" and not torch.equal(tensor.flatten().cpu(), module.embedding.scale_of_token_L.cpu()):
        return [f"{name} describes another pyramid than {module.config.sides}"]
    return []
