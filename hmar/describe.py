"""What `hmar info` shows: the installation, the presets, a preset, a folder of weights or of codes.

Everything returns a renderable of rich; nothing is printed here."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import nn

from hmar.checkpoint import find_weights, load_pretrained, read_description
from hmar.codes import RecordLayout, find_damage, read_index, read_index_file
from hmar.config import PRESETS, ModelConfig, TokenizerConfig
from hmar.model import NextScaleTransformer
from hmar.pyramid import Pyramid
from hmar.recipe import find_preset, unstructure
from hmar.tokenizer import Tokenizer
from hmar_kernels import IMPLEMENTATIONS, SpanMask, choose, unavailable


def describe_installation() -> Table:
    """Versions, GPU, and which attention implementations run here, with the reason for those that do not."""
    table = _pairs("installation")
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    for package in ("hmar", "triton", "numpy"):
        table.add_row(package, _version(package))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        memory = properties.total_memory / 2**30
        table.add_row("GPU", f"{properties.name}, {memory:.0f} GiB, compute capability {capability}")
    else:
        table.add_row("GPU", f"none that torch can use (torch was built for CUDA {torch.version.cuda})")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.empty(1, 1, 5, 64, dtype=dtype, device=device)
    patterns = {"block-diagonal": SpanMask.block_diagonal([1, 4]), "block-causal": SpanMask.block_causal([1, 4])}
    for pattern, mask in patterns.items():
        table.add_row(f"attention, {pattern}", f"auto takes {': '.join(choose(q, q, q, mask))}")
        for name in IMPLEMENTATIONS:
            reason = unavailable(name, q, q, q, mask)
            table.add_row("", f"{name}: {'available' if reason is None else f'not here, {reason}'}")
    return table


def describe_presets() -> Table:
    """One line a preset."""
    table = Table(
        title="presets (parameters in millions; VAR is as large as next-scale)",
        title_justify="left",
        box=SIMPLE,
        collapse_padding=True,
    )
    table.add_column("preset", no_wrap=True)
    for heading in ("image", "tokens", "blocks", "width", "tokenizer", "next-scale", "HMAR"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, (tokenizer, model) in PRESETS.items():
        table.add_row(
            name,
            f"{model.sides[-1] * tokenizer.stride}",
            str(model.pyramid.length),
            str(model.depth),
            str(model.width),
            *(f"{count / 1e6:.0f}" if count > 1e8 else f"{count / 1e6:.2g}" for count in _parameters(tokenizer, model)),
        )
    return table


def describe_preset(name: str) -> Table:
    """Everything that a preset sets. ValueError with the known names for an unknown one."""
    tokenizer, model = find_preset(name)
    table = _pairs(f"preset {name}")
    table.add_row("image", f"{model.sides[-1] * tokenizer.stride} x {model.sides[-1] * tokenizer.stride}")
    table.add_row("tokens", str(model.pyramid.length))
    for heading, count in zip(("tokenizer", "next-scale or VAR", "HMAR"), _parameters(tokenizer, model), strict=True):
        table.add_row(f"parameters, {heading}", f"{count:,}")
    _add_settings(table, {"tokenizer": unstructure(tokenizer), "model": unstructure(model)})
    return table


def describe_weights(folder: str | Path) -> Table:
    """What a folder of weights (or of a finished run) holds; loads it, so that damage shows. ValueError if so."""
    description = read_description(folder)
    module = load_pretrained(folder, (description["kind"],))
    table = _pairs(str(find_weights(folder)))
    table.add_row("parameters", f"{_count(module):,}")
    _add_settings(table, description)
    return table


def describe_codes(folder: str | Path) -> Table:
    """What a folder of codes holds; reads all of it, so that damage shows. ValueError if there are no codes."""
    index, content = read_index(folder, incomplete=True), read_index_file(folder)
    layout, shards = RecordLayout(index.sides, index.vocab_size), index.shards()
    problems = find_damage(folder)
    table = _pairs(str(folder))
    table.add_row("samples", f"{index.num_images:,} images x {index.crops} crops, {len(index.class_names)} classes")
    size = index.num_images * index.crops * layout.num_bytes
    table.add_row("size", f"{layout.num_bytes} bytes a sample, {size / 1e9:.3g} GB in all")
    table.add_row("shards", f"{len(shards) - len(problems)} of {len(shards)} whole")
    for problem in problems[:10]:
        table.add_row("", problem)
    if len(problems) > 10:
        table.add_row("", f"... and {len(problems) - 10} more")
    table.add_row("complete", "yes" if content["complete"] else "no, the same `hmar tokenize` goes on")
    table.add_row("broken images", f"{len(content['broken'])} replaced by others")
    _add_settings(table, unstructure(index))
    return table


def _parameters(tokenizer: TokenizerConfig, model: ModelConfig) -> tuple[int, int, int]:
    """Sizes of tokenizer, next-scale transformer and HMAR, counted without memory for them."""
    with torch.device("meta"):
        next_scale = NextScaleTransformer(model)
    # HMAR has the last blocks and the head a second time, and the mask embedding.
    second = _count(next_scale.blocks[-model.mask_depth :]) + _count(next_scale.head) + model.width
    return _tokenizer_parameters(tokenizer), _count(next_scale), _count(next_scale) + second


@functools.lru_cache
def _tokenizer_parameters(config: TokenizerConfig) -> int:
    with torch.device("meta"):
        return _count(Tokenizer(config, Pyramid((1,))))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _pairs(title: str) -> Table:
    return Table(show_header=False, title=title, title_justify="left", box=SIMPLE)


def _add_settings(table: Table, settings: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _add_settings(table, value, f"{prefix}{name}.")
        else:
            table.add_row(f"{prefix}{name}", _short(value))


def _short(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str) and len(list(value)) > 20:
        values = list(value)
        return f"{', '.join(map(str, values[:10]))}, ... ({len(values)} in all)"
    return value if isinstance(value, str) else json.dumps(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
