"""Who takes part: our implementations and the strongest fair ones that others offer for the same masks.

An implementation is prepared once per cell (masks built, functions compiled) and then called as attend(q, k, v) -> out
on [B,H,L,D]; its backward is autograd's. To add one, write a function that prepares it and one that says where it does
not apply, and list both in IMPLEMENTATIONS. Read `test_attention.py` next for what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hmar_kernels

from .shapes import Cell

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """One way to compute the attention of a cell.

    Attributes:
        prepare: (cell, device) -> attend.
        unavailable: (cell, device) -> why it does not apply there, or None where it does.
        ours: whether it is of this project.
        by_default: whether a run without --impl includes it, on (GPU, CPU).
    """

    name: str
    prepare: Callable[[Cell, torch.device], Attend]
    unavailable: Callable[[Cell, torch.device], str | None]
    ours: bool = False
    by_default: tuple[bool, bool] = (True, False)


def anywhere(cell: Cell, device: torch.device) -> str | None:
    return None


def own_takes(name: str, cell: Cell, device: torch.device) -> str | None:
    x = torch.empty(1, 1, cell.length, cell.head_dim, dtype=cell.torch_dtype, device=device)
    return hmar_kernels.unavailable(name, x, x, x, cell.mask())


def needs_cuda(cell: Cell, device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"needs a CUDA device, got {device.type}"


def own(name: str, cell: Cell, device: torch.device) -> Attend:
    mask = cell.mask()
    return lambda q, k, v: hmar_kernels.attention(q, k, v, mask, impl=name)


def sdpa_dense(cell: Cell, device: torch.device) -> Attend:
    dense = cell.mask().to_dense(device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)


def sdpa_per_scale(cell: Cell, device: torch.device) -> Attend:
    """One dense call for each run of queries that see the same keys; on a GPU, FlashAttention and nothing else."""
    runs = cell.mask().runs

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext():
            parts = [
                F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, start:end], v[:, :, start:end])
                for a, b, start, end in runs
            ]
        return torch.cat(parts, dim=2)

    return attend


def flash_takes(cell: Cell, device: torch.device) -> str | None:
    if device.type == "cuda" and cell.dtype == "float32":
        return "FlashAttention takes bfloat16 and float16, got float32"
    return None


def flex(mode: str | None, cell: Cell, device: torch.device) -> Attend:
    """FlexAttention compiled for this shape alone. fullgraph: a fallback to its unfused form is an error."""
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = cell.mask().to_flex(device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def _of_ours(name: str, **options) -> Implementation:
    return Implementation(name, partial(own, name), partial(own_takes, name), ours=True, **options)


_ENTRIES = [
    _of_ours("reference", by_default=(False, True)),
    *(_of_ours(name) for name in ("triton", "cuda") if name in hmar_kernels.IMPLEMENTATIONS),
    Implementation("flex", partial(flex, None), needs_cuda),
    Implementation(
        "flex_max_autotune", partial(flex, "max-autotune-no-cudagraphs"), needs_cuda, by_default=(False, False)
    ),
    Implementation("varlen_flash", partial(own, "varlen"), partial(own_takes, "varlen")),
    Implementation("flash_per_scale", sdpa_per_scale, flash_takes, by_default=(True, True)),
    Implementation("sdpa_dense", sdpa_dense, anywhere, by_default=(True, True)),
]
IMPLEMENTATIONS = {entry.name: entry for entry in _ENTRIES}
"""By name, in the order in which they run. "varlen_flash" is torch's kernel, called the way hmar_kernels calls it."""


def choose(names: list[str] | None, device: torch.device) -> list[Implementation]:
    """The named implementations, or those of a default run on this device."""
    for name in names or ():
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {name!r}; known are {', '.join(IMPLEMENTATIONS)}")
    if names:
        return [IMPLEMENTATIONS[name] for name in names]
    return [entry for entry in IMPLEMENTATIONS.values() if entry.by_default[0 if device.type == "cuda" else 1]]
