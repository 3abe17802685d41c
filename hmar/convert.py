"""Weights from one form into another: published files, training checkpoints and folders of weights.

`convert` writes a folder of weights, or a file under the published names, whole or not at all. Read checkpoint.py for
what can be read, published.py for the names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hmar.checkpoint import (
    FORMAT,
    KINDS,
    STAGED,
    TOKENIZER_FOLDER,
    WEIGHTS,
    fingerprint,
    read_pretrained,
    replacing,
    replacing_folder,
    save_pretrained,
)
from hmar.config import TokenizerConfig
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.published import Imported, to_published
from hmar.tokenizer import Tokenizer

FILE_SUFFIXES = (".pth", ".pt", ".safetensors")


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    kind: str | None = None,
    tokenizer: str | Path | None = None,
    next_scale: str | Path | None = None,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    part: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Read weights as `hmar.checkpoint.from_pretrained` does and write them anew.

    Args:
        source, kind, preset, given, part, revision: see `from_pretrained`.
        destination: a folder for `save_pretrained`'s form; a file ending in .pth, .pt or .safetensors for the published
            names and shapes, as a flat state dict.
        tokenizer: anything that holds the tokenizer of a transformer. It is fitted to the transformer's pyramid and
            written into the folder too, where `hmar sample` finds it.
        next_scale: anything that holds stage 1, when the source holds stage 2: both are assembled to HMAR.
        overwrite: replace what `convert` or `save_pretrained` wrote there before, unless other things are there too.
    Returns:
        What was found and written, in sentences.
    Raises:
        ValueError: for bad input, before anything is written. OSError: when it cannot be written; nothing is left then.
    """
    destination = Path(destination)
    to_file = destination.suffix in FILE_SUFFIXES
    _check_destination(destination, to_file, overwrite)
    if to_file and tokenizer is not None:
        raise ValueError(f"{destination} is a file and takes no tokenizer beside the model: leave --tokenizer out")
    imported = read_pretrained(source, kind=kind, preset=preset, given=given, part=part, revision=revision)
    sentences = [f"{source}: {describe(imported.module)}, from {imported.origin}"]
    if tokenizer is None:
        sentences += [f"{source} also holds {other}, which was left out" for other in imported.others]
    module: nn.Module = imported.module
    if next_scale is not None:
        stage_one = read_pretrained(next_scale, kind="next-scale")
        sentences.append(f"{next_scale}: {describe(stage_one.module)}, from {stage_one.origin}")
        module = assemble(stage_one, imported)
        sentences.append(f"assembled: {describe(module)}")
    beside = None
    if tokenizer is not None:
        if isinstance(module, Tokenizer):
            raise ValueError(f"{source} holds a tokenizer itself: --tokenizer is for transformers")
        beside = read_pretrained(tokenizer, kind="tokenizer", given={"sides": list(module.config.sides)})
        _check_fit(module, beside.module, source, tokenizer)
        sentences.append(f"{tokenizer}: {describe(beside.module)}, from {beside.origin}")
    if to_file:
        _write_published(destination, module)
    else:
        notes = {**imported.notes, "converted_from": Path(source).name}
        _write_folder(destination, module, beside, notes)
    return [*sentences, f"written: {destination}"]


def assemble(next_scale: Imported, masked: Imported) -> HMAR:
    """HMAR from stage 1 and stage 2.

    Stage 2's mask_depth stands if all blocks before it are those of stage 1. A published stage 2 does not tell it:
    where more blocks were trained than assumed, the first one that differs tells. Raises ValueError if they are not
    these stages, or if stage 2 was not trained on this stage 1.
    """
    stage1, stage2 = next_scale.module, masked.module
    if not isinstance(stage1, NextScaleTransformer) or not isinstance(stage2, MaskedTransformer):
        raise ValueError(
            f'HMAR is assembled from weights of the kinds "masked" and "next-scale", got "{masked.kind}" and '
            f'"{next_scale.kind}"'
        )
    blocks = [*stage2.trunk, *stage2.blocks]
    if len(stage1.blocks) != len(blocks):
        raise ValueError(f"stage 1 has {len(stage1.blocks)} blocks, but stage 2 has {len(blocks)}")
    shared = 0
    while shared < len(stage2.trunk) and _equal(stage1.blocks[shared], blocks[shared]):
        shared += 1
    mask_depth = len(blocks) - shared
    regrouped = MaskedTransformer(dataclasses.replace(stage2.config, mask_depth=mask_depth))
    state = {name: tensor for name, tensor in stage2.state_dict().items() if not name.startswith(("trunk.", "blocks."))}
    for i, block in enumerate(blocks):
        prefix = f"trunk.{i}." if i < shared else f"blocks.{i - shared}."
        state |= {prefix + name: tensor for name, tensor in block.state_dict().items()}
    regrouped.load_state_dict(state)
    # Training settings may differ between the stages; from_stages compares the sizes.
    free = {name: getattr(stage2.config, name) for name in ("drop_path", "class_drop", "gate_init")}
    stage1.config = dataclasses.replace(stage1.config, mask_depth=mask_depth, **free)
    return HMAR.from_stages(stage1, regrouped)


def describe(module: nn.Module) -> str:
    """Kind and sizes of a module in a few words."""
    count = f"{sum(parameter.numel() for parameter in module.parameters()):,} parameters"
    if isinstance(module, Tokenizer):
        config, sides = module.config, module.pyramid.sides
        sizes = f"channels {config.channels} x {list(config.multipliers)}, {config.vocab_size} codes"
        return f"tokenizer, {sizes}, {module.image_size} pixels, pyramid {list(sides)}, {count}"
    config = module.config
    kinds = {"block_causal": "VAR", "block_diagonal": "HMAR stage 1"}
    kind = kinds.get(getattr(module, "pattern", None), "HMAR" if isinstance(module, HMAR) else "HMAR stage 2")
    split = f" ({config.mask_depth} of them twice)" if isinstance(module, HMAR) else ""
    return (
        f"{kind}, {config.depth} blocks{split} of width {config.width} with {config.num_heads} heads, "
        f"{config.num_classes} classes, {config.vocab_size} codes, pyramid {list(config.sides)}, {count}"
    )


def _equal(ours: nn.Module, theirs: nn.Module) -> bool:
    other = theirs.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in ours.state_dict().items())


def _check_fit(model: nn.Module, tokenizer: Tokenizer, source: str | Path, tokenizer_source: str | Path) -> None:
    for name in ("vocab_size", "code_dim"):
        ours, theirs = getattr(model.config, name), getattr(tokenizer.config, name)
        if ours != theirs:
            raise ValueError(f"{source} has {name} {ours}, but the tokenizer in {tokenizer_source} has {theirs}")


def _check_destination(destination: Path, to_file: bool, overwrite: bool) -> None:
    """Refuse to write over anything but earlier weights, and over those unless `overwrite`."""
    if not destination.exists() or (destination.is_dir() and not to_file and not any(destination.iterdir())):
        return
    problem = "" if to_file == destination.is_file() else f", which are a {'file' if to_file else 'folder'}"
    if destination.is_dir() and not problem and (foreign := _foreign(destination)) is not None:
        problem = f": {foreign} was not written by hmar"
    if problem:
        raise ValueError(f"{destination} is there and is no such weights{problem}; choose another destination")
    if not overwrite:
        raise ValueError(f"{destination} is there already: replace it by --overwrite or choose another destination")


def _foreign(folder: Path) -> Path | None:
    """Something in a folder that neither `convert` nor `save_pretrained` has put there; None if it is all theirs."""
    config = folder / "config.json"
    try:
        description = json.loads(config.read_text(encoding="utf-8"))
        ours = description["format"] == FORMAT and description["kind"] in KINDS and "weights_sha256" in description
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        ours = False
    if not ours:
        return config if config.exists() else next(folder.iterdir(), folder)
    for path in sorted(folder.iterdir()):
        if path.name == TOKENIZER_FOLDER and path.is_dir() and not path.is_symlink():
            if (foreign := _foreign(path)) is not None:
                return foreign
        elif path.name not in ("config.json", WEIGHTS, STAGED) and not fnmatch(path.name, ".*.tmp"):
            return path
    return None


def _write_folder(folder: Path, module: nn.Module, beside: Imported | None, notes: dict[str, Any]) -> None:
    with replacing_folder(folder) as temporary:
        if beside is not None:
            inner = save_pretrained(temporary / TOKENIZER_FOLDER, beside.module)
            notes |= {"tokenizer_weights": TOKENIZER_FOLDER, "tokenizer_sha256": fingerprint(inner)}
        save_pretrained(temporary, module, **notes)


def _write_published(path: Path, module: nn.Module) -> None:
    if isinstance(module, Tokenizer):
        for name in ("norm_groups", "phi_ratio"):
            ours, theirs = getattr(module.config, name), getattr(TokenizerConfig, name)
            if ours != theirs:
                raise ValueError(
                    f"the tokenizer has {name} {ours}, which the published form has no place for and takes to be "
                    f"{theirs}: convert it to a folder"
                )
    tensors = {name: tensor.contiguous() for name, tensor in to_published(module).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary)
        else:
            torch.save(tensors, temporary)
