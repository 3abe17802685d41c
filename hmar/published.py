"""Published weight files of VAR and HMAR: their tensor names and shapes, to and from this package's modules.

Names are translated by a table of renamings for each kind of module, and strictly: every published tensor is loaded,
checked and dropped, or reported. What a file holds and how large it is are read off its tensors. Read
`hmar.weightfile` for how a file is opened, `hmar.model` and `hmar.tokenizer` for the modules on this side.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from hmar.config import ModelConfig, TokenizerConfig
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.pyramid import SIDES_BY_RESOLUTION, Pyramid
from hmar.recipe import find_preset, structure, unstructure
from hmar.tokenizer import Tokenizer
from hmar.weightfile import Family, StateDict, find_state_dicts, first_line

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

# Names by which the state dicts are found among others; published files have all of them.
_OF_A_TOKENIZER = r"(encoder|decoder|quantize|quant_conv|post_quant_conv)\."
FAMILIES = {
    "transformer": Family(
        ("pos_start", "pos_1LC", "class_emb.weight", "lvl_embed.weight", "word_embed.weight"),
        rf"(?!{_OF_A_TOKENIZER})",
    ),
    "tokenizer": Family(
        (
            "quantize.embedding.weight",
            "quant_conv.weight",
            "post_quant_conv.weight",
            "encoder.conv_in.weight",
            "decoder.conv_in.weight",
        ),
        _OF_A_TOKENIZER,
    ),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_LISTED = 40
# More blocks, scales or the like no file may claim: modules are made of them before all tensors are compared.
MAX_PARTS = 1000
# A pyramid of more tokens is believed only if there is a position for each of them.
LONG = 2**16


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


class MisfitError(ValueError):
    """Weights that do not fit; `problems` has one entry a tensor or setting, and the message lists them."""

    def __init__(self, what: str, problems: list[str]):
        listed = problems[:MAX_LISTED]
        if len(problems) > MAX_LISTED:
            listed.append(f"and {len(problems) - MAX_LISTED} more")
        super().__init__(f"{what}: {'; '.join(listed)}")
        self.problems = problems

    @classmethod
    def summed_up(cls, message: str, problems: list[str]) -> MisfitError:
        """With a message of its own that tells the problems."""
        error = cls("", problems)
        error.args = (message,)
        return error


def load_published(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy published weights into a Tokenizer, NextScaleTransformer, MaskedTransformer or HMAR, as its dtype.

    Raises MisfitError, a ValueError that lists all missing, unexpected and misshapen tensors, those that hold no
    finite floating-point numbers, a `lvl_1L` that belongs to another pyramid and key biases that are not zero.
    """
    check_published(module, weights)
    _copy(module, weights)


def check_published(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The checks of `load_published` alone, for a module that may be on the meta device."""
    expected = {published.name: published.shape for published in published_layout(module).values()}
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in weights]
    for name, tensor in weights.items():
        if re.search(DERIVED, name):
            problems += _check_derived(module, name, tensor)
        elif name not in expected:
            problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{name} has dtype {tensor.dtype}, expected floating-point numbers")
        elif not tensor.float().isfinite().all():
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        raise MisfitError(f"the weights do not fit this {type(module).__name__}", problems)


def to_published(module: nn.Module) -> dict[str, Tensor]:
    """The module's weights under their published names and in their published shapes.

    The derived tensors are there too, so that the published code and `read_config` find all they look for; the
    statistics of the codebook's use, which nothing reads, are zero.
    """
    layout = published_layout(module)
    weights = {
        layout[ours].name: parameter.detach().reshape(layout[ours].shape)
        for ours, parameter in module.named_parameters()
    }
    if isinstance(module, Tokenizer):
        size = (module.pyramid.num_scales, module.config.vocab_size)
        return {**weights, "quantize.ema_vocab_hit_SV": torch.zeros(size)}
    pattern = getattr(module, "pattern", "block_diagonal")
    for name in list(weights):
        if name.endswith(".attn.v_bias"):
            weights[name.replace("v_bias", "zero_k_bias")] = torch.zeros_like(weights[name])
    weights["lvl_1L"] = _scale_of_token(module.config.pyramid)[None]
    weights["attn_bias_for_masking"] = _attention_bias(module.config.pyramid, pattern)
    return weights


def find_published(tree: Any) -> list[StateDict]:
    """The published state dicts in what a file holds: a flat one, or a training checkpoint's nested ones."""
    return find_state_dicts(tree, FAMILIES)


def recognise(found: StateDict, given: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The kinds of module that a state dict may be, that of its own first.

    VAR and HMAR's stage 1 have the same tensors; the stored attention mask tells them apart, and without one both are
    possible. VAR's weights may also start stage 1 ("next-scale"). Raises ValueError for a mask that is neither.
    """
    weights = found.tensors
    if found.family == "tokenizer":
        return ("tokenizer",)
    if any(name.startswith(("base_blocks.", "ns_blocks.", "mask_blocks.")) for name in weights):
        return ("hmar",)
    if "mask_embed.weight" in weights:
        return ("masked",)
    bias = weights.get("attn_bias_for_masking")
    if bias is None:
        return ("var", "next-scale")
    pyramid = Pyramid(_sides_of_transformer(weights, given or {}))
    patterns = _patterns_of(bias, pyramid)
    for pattern, kinds in (("block_causal", ("var", "next-scale")), ("block_diagonal", ("next-scale",))):
        if pattern in patterns:
            return kinds
    raise ValueError(
        f"attn_bias_for_masking {list(bias.shape)} is neither VAR's block-causal mask nor HMAR's block-diagonal one "
        f"over the pyramid {pyramid.sides}"
    )


def read_config(
    kind: str, weights: Mapping[str, Tensor], given: Mapping[str, Any] | None = None
) -> tuple[TokenizerConfig | ModelConfig, tuple[int, ...]]:
    """Sizes read off published tensors: the configuration, and the sides of the pyramid.

    given: values of the configuration, and "sides", that are known beforehand. They decide where the tensors do not
    tell (a tokenizer's sides, a lone stage 2's mask_depth, drop-path) and must agree with the tensors where they do.

    Raises MisfitError, a ValueError, where they disagree, and ValueError where the pyramid cannot be told or blocks
    seem to be missing. Sizes whose tensors are missing are the published ones, for `check_published` to report them.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    told = _told_by_tokenizer(weights) if kind == "tokenizer" else _told_by_transformer(weights, given)
    differences = [
        f"{name} is {_plain(told[name])}, not {_plain(given[name])}"
        for name in told
        if name in given and _plain(told[name]) != _plain(given[name])
    ]
    if differences:
        raise MisfitError("the tensors have other sizes than asked for", differences)
    values = {**given, **told}
    if kind == "tokenizer":
        sides = values.pop("sides", None) or _sides_of_tokenizer(weights)
        return structure(values, TokenizerConfig), Pyramid(tuple(sides)).sides
    config = structure(values, ModelConfig)
    if "depth" not in given and config.head_dim == 64 and config.depth != config.num_heads:
        raise ValueError(
            f"it holds {config.depth} blocks of {config.num_heads} heads, but published models have as many blocks as "
            f"heads, so blocks seem to be missing or surplus; if that is how it was made, say depth={config.depth}"
        )
    return config, config.sides


@dataclass(frozen=True)
class Imported:
    """A module made from a file or folder.

    origin: where its tensors stood; others: what else was found there; notes: what its config.json says beside sizes.
    """

    module: nn.Module
    kind: str
    origin: str
    others: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


def import_published(
    tree: Any,
    *,
    kind: str | None = None,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    part: str | None = None,
    attention: str = "auto",
) -> Imported:
    """The module whose published weights a file holds, flat or inside a training checkpoint.

    Args:
        tree: what `hmar.weightfile.read_weightfile` read.
        kind: "tokenizer", "var", "next-scale", "masked" or "hmar"; None for what the file holds, and of a transformer
            and a tokenizer the transformer. "next-scale" for VAR's weights makes them the start of stage 1.
        preset: name of a preset that it must have the sizes of.
        given: see `read_config`; wins over the preset.
        part: one state dict where the file has several: its path, as "trainer.var_wo_ddp", with the prefix of its names
            or its family behind that where the path does not tell it from others (the error lists them).
    Raises:
        ValueError: no or several state dicts of that kind, a tokenizer and a transformer that nothing tells apart, or
            anything that `read_config` or `check_published` reports.
    """
    found = [state for state in find_published(tree) if part in (None, state.where, state.part)]
    if not found:
        raise ValueError(_nothing_found(tree, part))
    values = preset_values("transformer", preset) | dict(given or {})
    kinds = {id(state): recognise(state, values) for state in found}
    if kind is not None:
        fitting = [state for state in found if kind in kinds[id(state)]]
    else:
        fitting = [state for state in found if state.family == "transformer"] or found
        mixed = [state.part for state in found if state.mixed and state.where == fitting[0].where]
        if len(mixed) > 1:
            choices = " or ".join(f"--part {name}" for name in mixed)
            raise ValueError(
                "it holds a transformer and a tokenizer whose names have nothing that separates them: choose one by "
                f"its part: {choices} (part= in Python), or by its kind"
            )
    if not fitting:
        held = ", ".join(f"{kinds[id(state)][0]} in {state}" for state in found)
        raise ValueError(f'it holds no weights for kind "{kind}", but {held}')
    if len(fitting) > 1:
        parts = [state.part or '"", the file itself' for state in fitting]
        raise ValueError(
            f"it holds several state dicts that fit ({', '.join(parts)}): choose one by its part, as in --part "
            f"{parts[-1]} (part= in Python)"
        )
    (state,) = fitting
    if kind is None and len(kinds[id(state)]) > 1 and "attn_bias_for_masking" not in state.tensors:
        raise ValueError('it does not tell VAR from HMAR\'s stage 1: say kind "var" or "next-scale"')
    kind = kind or kinds[id(state)][0]
    values = preset_values(state.family, preset) | dict(given or {})
    config, sides = read_config(kind, state.tensors, values)
    check_extent(config, sides)
    position = state.tensors.get("pos_1LC")
    length = Pyramid(sides).length
    if kind != "tokenizer" and length > LONG and (position is None or position.shape[1:2] != (length,)):
        got = "is missing" if position is None else f"has shape {list(position.shape)}"
        raise MisfitError(
            "the weights do not fit their pyramid", [f"pos_1LC {got}, expected {[1, length, config.width]}"]
        )
    check_published(make_outline(kind, config, sides, attention), state.tensors)
    module = make_module(kind, config, sides, attention)
    _copy(module, state.tensors)
    others = tuple(f"{kinds[id(other)][0]} in {other}" for other in found if other is not state)
    return Imported(module, kind, str(state), others)


def check_extent(config: TokenizerConfig | ModelConfig, sides: tuple[int, ...]) -> None:
    """Raises ValueError for sizes that would make a module of very many parts, or of none."""
    counts = {"scales": len(sides)}
    if isinstance(config, ModelConfig):
        counts |= {"depth": config.depth}
        if config.width < 1:
            raise ValueError(f"width is {config.width}, expected at least 1")
    else:
        counts |= {"num_phis": config.num_phis, "blocks": len(config.multipliers) * config.num_res_blocks}
    for name, count in counts.items():
        if count > MAX_PARTS:
            raise ValueError(f"it asks for {name} {count}, expected at most {MAX_PARTS}")


def make_outline(kind: str, config: TokenizerConfig | ModelConfig, sides: tuple[int, ...], attention: str) -> nn.Module:
    """The module of a kind on the meta device: names and shapes without numbers. ValueError if there cannot be one."""
    try:
        with torch.device("meta"):
            return make_module(kind, config, sides, attention)
    except (RuntimeError, ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"it asks for sizes that no tensor can have: {first_line(error)}") from error


def make_module(kind: str, config: TokenizerConfig | ModelConfig, sides: tuple[int, ...], attention: str) -> nn.Module:
    """The module of a kind, with initial weights."""
    match kind:
        case "tokenizer":
            return Tokenizer(config, Pyramid(sides))
        case "next-scale":
            return NextScaleTransformer(config, pattern="block_diagonal", attention=attention)
        case "var":
            return NextScaleTransformer(config, pattern="block_causal", attention=attention)
        case "masked":
            return MaskedTransformer(config, attention)
    return HMAR(config, attention)


@torch.no_grad()
def _copy(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    layout = published_layout(module)
    for ours, parameter in module.named_parameters():
        parameter.copy_(weights[layout[ours].name].reshape(parameter.shape))


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


def _scale_of_token(pyramid: Pyramid) -> Tensor:
    return torch.tensor([k for k, size in enumerate(pyramid.sizes) for _ in range(size)])


def _attention_bias(pyramid: Pyramid, pattern: str) -> Tensor:
    """The published form of a mask: [1, 1, L, L], 0 where a token may look and -inf elsewhere."""
    scale_L = _scale_of_token(pyramid)
    query_L1, key_1L = scale_L[:, None], scale_L[None]
    allowed_LL = query_L1 >= key_1L if pattern == "block_causal" else query_L1 == key_1L
    return torch.zeros(allowed_LL.shape).masked_fill(~allowed_LL, -math.inf)[None, None]


def _patterns_of(bias: Tensor, pyramid: Pyramid) -> set[str]:
    """The patterns whose mask over the pyramid this is, found by looking at it: none is made to compare it with, for
    the pyramid is only what a file claims to have."""
    if tuple(bias.shape) != (1, 1, pyramid.length, pyramid.length):
        return set()
    patterns = {"block_causal", "block_diagonal"}
    for start, stop in pairwise(pyramid.offsets):
        rows = bias[0, 0, start:stop]
        if not (rows[:, start:stop] == 0).all() or not (rows[:, stop:] == -math.inf).all():
            return set()
        for pattern, value in (("block_causal", 0), ("block_diagonal", -math.inf)):
            if not (rows[:, :start] == value).all():
                patterns.discard(pattern)
    return patterns


def _check_derived(module: nn.Module, name: str, tensor: Tensor) -> list[str]:
    if name.startswith("quantize.") != isinstance(module, Tokenizer):
        return [f"unexpected {name} {list(tensor.shape)}"]
    if name.endswith("zero_k_bias") and tensor.count_nonzero() > 0:
        return [f"{name} is not zero; keys have no bias here"]
    if name == "lvl_1L" and not torch.equal(tensor.flatten().cpu(), _scale_of_token(module.config.pyramid)):
        return [f"{name} describes another pyramid than {module.config.sides}"]
    return []


def _told_by_transformer(weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    width = _size(weights, 2, 1, "class_emb.weight", "lvl_embed.weight", "head.weight", "ns_head.weight")
    classes = _size(weights, 2, 0, "class_emb.weight")
    hidden = _size(weights, 2, 0, "*.ffn.fc1.weight")
    depth, mask_depth = _count(weights, r"(?:base_)?blocks"), _count(weights, r"(?:ns|mask)_blocks")
    if depth + mask_depth == 0:
        raise ValueError("it holds no blocks")
    told = {
        "depth": depth + mask_depth,
        "width": width,
        "num_heads": _size(weights, 4, 1, "*.attn.scale_mul_1H11"),
        "mlp_ratio": hidden / width if hidden and width else None,
        "num_classes": classes - 1 if classes else None,
        "vocab_size": _size(weights, 2, 0, "*head.weight") or _size(weights, 1, 0, "*head.bias"),
        "code_dim": _size(weights, 2, 1, "word_embed.weight"),
        "sides": _sides_of_transformer(weights, given),
        "mask_depth": mask_depth or None,
        "shared_modulation": "shared_ada_lin.1.weight" in weights,
    }
    return {name: value for name, value in told.items() if value is not None}


def _told_by_tokenizer(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    channels = _size(weights, 1, 0, "encoder.conv_in.bias", "encoder.down.0.block.0.norm1.*")
    levels = _count(weights, r"encoder\.down")
    widths = [_size(weights, 4, 0, f"encoder.down.{i}.block.*.conv?.weight") for i in range(levels)]
    told = {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths) if channels and all(widths) else None,
        "num_res_blocks": _count(weights, r"encoder\.down\.0\.block") or None,
        "code_dim": _size(weights, 2, 1, "quantize.embedding.weight") or _size(weights, 4, 0, "*quant_conv.weight"),
        "vocab_size": _size(weights, 2, 0, "quantize.embedding.weight"),
        "image_channels": _size(weights, 4, 1, "encoder.conv_in.weight"),
        "num_phis": _count(weights, r"quantize\.quant_resi\.qresi_ls") or None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _sides_of_transformer(weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> tuple[int, ...]:
    if "lvl_1L" in weights:
        scales, counts = weights["lvl_1L"].flatten().unique_consecutive(return_counts=True)
        sides = tuple(math.isqrt(count) for count in counts.tolist())
        if scales.tolist() != list(range(len(sides))) or [side * side for side in sides] != counts.tolist():
            raise ValueError("lvl_1L does not count the tokens of square scales, one scale after another")
        return Pyramid(sides).sides
    if "sides" in given:
        return Pyramid(tuple(given["sides"])).sides
    num_scales, length = _size(weights, 2, 0, "lvl_embed.weight"), _size(weights, 3, 1, "pos_1LC")
    for sides in SIDES_BY_RESOLUTION.values():
        if (len(sides), Pyramid(sides).length) == (num_scales, length):
            return sides
    raise ValueError(
        f"it does not tell its pyramid: there is no lvl_1L, and no published pyramid has {num_scales} scales of "
        f"{length} tokens in all; say sides=[1,2,3,4], with the sides it has"
    )


def _sides_of_tokenizer(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The published tokenizer's, which was trained at 256 pixels; the weights themselves serve any pyramid."""
    num_scales = _size(weights, 2, 0, "quantize.ema_vocab_hit_SV")
    if num_scales != len(SIDES_BY_RESOLUTION[256]):
        scales = "the sides of its scales" if num_scales is None else f"the sides of its {num_scales} scales"
        raise ValueError(f"a tokenizer does not tell {scales}: say sides=[1,2,3,4], with the sides it shall have")
    return SIDES_BY_RESOLUTION[256]


def _size(weights: Mapping[str, Tensor], ndim: int, axis: int, *names: str) -> int | None:
    """The most common size of an axis among the tensors of these names (with wildcards) that have `ndim` axes."""
    found = [name for pattern in names for name in fnmatch.filter(weights, pattern)]
    sizes = Counter(weights[name].shape[axis] for name in found if weights[name].ndim == ndim)
    return sizes.most_common(1)[0][0] if sizes else None


def _count(weights: Mapping[str, Tensor], name: str) -> int:
    """One more than the largest N of the tensors called name.N."""
    numbers = [int(match[1]) for key in weights if (match := re.match(rf"{name}\.(\d{{1,3}})\.", key))]
    return max(numbers, default=-1) + 1


def preset_values(family: str, preset: str | None) -> dict[str, Any]:
    """What a preset says about a "tokenizer" or "transformer", for `read_config`; nothing without a preset."""
    if preset is None:
        return {}
    tokenizer, model = find_preset(preset)
    if family == "transformer":
        return unstructure(model)
    return {**unstructure(tokenizer), "sides": list(model.sides)}


def _nothing_found(tree: Any, part: str | None) -> str:
    places = [state.part or "the file itself" for state in find_published(tree)]
    if part is not None and places:
        return f'it has no part "{part}" with weights; it has {", ".join(places)}'
    names = list(tree) if isinstance(tree, Mapping) else []
    entries = f"entries called {', '.join(map(str, names[:5]))}" if names else f"only a {type(tree).__name__}"
    return f"it holds no weights of a VAR or HMAR tokenizer or transformer, but {entries}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
