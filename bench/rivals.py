"""Who takes part: our implementations and the strongest fair ones that others offer for the same masks.

An implementation is prepared once per cell (masks built, functions compiled) and then called as attend(q, k, v) -> out
on [B,H,L,D]; its backward is autograd's. One from elsewhere comes as a file, `pytest bench --rival FILE.py`, with

    def prepare(cell, device):         # required; returns attend(q, k, v) -> out, tensors [B,H,L,D]
    def unavailable(cell, device):     # optional; a sentence where it does not apply, None where it does
    NAME = "mine"                      # optional; the name in the results, by default that of the file

A rival given by a file that fails its check, raises or crashes fails the run, once everything is measured. Those of
this module do not; FlashAttention-4 is one of them where it is installed (`__init__.py` says how).

`cell` is a `shapes.Cell`: cell.mask() is a SpanMask (key_start and key_end of each query, to_dense, to_flex,
cu_seqlens), and it has pattern, sides, length, batch, heads, head_dim, dtype and torch_dtype. The scale is 1/sqrt(D).
Read `test_attention.py` next for what is done with implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import util
from pathlib import Path

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
        slow: takes about a minute to prepare: without --impl or --full only cells of head dim 64 have it.
    """

    name: str
    prepare: Callable[[Cell, torch.device], Attend]
    unavailable: Callable[[Cell, torch.device], str | None]
    ours: bool = False
    by_default: tuple[bool, bool] = (True, False)
    slow: bool = False


def anywhere(cell: Cell, device: torch.device) -> str | None:
    return None


def own_takes(name: str, cell: Cell, device: torch.device) -> str | None:
    if name not in hmar_kernels.IMPLEMENTATIONS:  # an older version, which bench.compare looks at
        return f"this version of hmar_kernels has no {name}"
    x = torch.empty(1, 1, cell.length, cell.head_dim, dtype=cell.torch_dtype, device=device)
    return hmar_kernels.unavailable(name, x, x, x, cell.mask())


LOGIT_BOUND = 60.0
"""What hopper_bounded promises: |q.k| / sqrt(head dim) of normal numbers stays below 25."""


def needs_cuda(cell: Cell, device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"needs a CUDA device, got {device.type}"


def own(name: str, cell: Cell, device: torch.device, logit_bound: float | None = None) -> Attend:
    mask, options = cell.mask(), {} if logit_bound is None else {"logit_bound": logit_bound}
    return lambda q, k, v: hmar_kernels.attention(q, k, v, mask, impl=name, **options)


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


@cache
def _flash_attention_4() -> tuple[Callable, Callable] | str:
    """(dense, variable-length) attention of the package flash-attn-4 on [B,L,H,D], or why there is none."""
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ModuleNotFoundError as error:
        return f"flash-attn-4 is not installed ({error})"
    except Exception as error:  # it imports compilers and drivers of its own
        return f"flash-attn-4 does not load: {type(error).__name__}: {error}"
    return flash_attn_func, flash_attn_varlen_func


def flash_attention_4_takes(varlen: bool, cell: Cell, device: torch.device) -> str | None:
    if varlen and cell.mask().cu_seqlens() is None:
        return "the mask is not block-diagonal, so it has no cu_seqlens"
    if device.type != "cuda":
        return f"needs a CUDA device, got {device.type}"
    if cell.dtype == "float32":
        return "FlashAttention takes bfloat16 and float16, got float32"
    found = _flash_attention_4()
    return found if isinstance(found, str) else None


def _only_output(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Some releases return (out, lse), others out."""
    return result[0] if isinstance(result, tuple) else result


def flash_attention_4_varlen(cell: Cell, device: torch.device) -> Attend:
    """Each block of each image is a sequence of its own."""
    _, attend_varlen = _flash_attention_4()
    offsets, _ = cell.mask().cu_seqlens()
    starts = offsets[:-1] + cell.length * torch.arange(cell.batch, dtype=torch.int32)[:, None]
    edges = torch.cat([starts.flatten(), starts.new_tensor([cell.batch * cell.length])]).to(device)
    longest = int(offsets.diff().max())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = attend_varlen(*tokens, cu_seqlens_q=edges, cu_seqlens_k=edges, max_seqlen_q=longest, max_seqlen_k=longest)
        return _only_output(out).unflatten(0, (cell.batch, cell.length)).transpose(1, 2)

    return attend


def flash_attention_4_per_scale(cell: Cell, device: torch.device) -> Attend:
    """One dense call for each run of queries that see the same keys."""
    attend_dense, _ = _flash_attention_4()
    runs = cell.mask().runs

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        parts = [_only_output(attend_dense(q[:, a:b], k[:, start:end], v[:, start:end])) for a, b, start, end in runs]
        return torch.cat(parts, dim=1).transpose(1, 2)

    return attend


def load_rival(path: Path) -> Implementation:
    """The implementation that a file defines; the protocol is in this module's docstring.

    Raises ValueError when there is no such file, it raises while it is loaded, or it does not follow the protocol.
    """
    if not path.is_file():
        raise ValueError(f"--rival {path}: there is no such file")
    spec = util.spec_from_file_location(f"bench_rival_{path.stem}", path)
    if spec is None:
        raise ValueError(f"--rival {path}: expected a Python file, whose name ends in .py")
    module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--rival {path} raises when it is loaded: {type(error).__name__}: {error}") from error
    prepare, takes = getattr(module, "prepare", None), getattr(module, "unavailable", anywhere)
    name = getattr(module, "NAME", path.stem)
    if not callable(prepare):
        raise ValueError(f"--rival {path} has no function prepare(cell, device) that returns attend(q, k, v) -> out")
    if not callable(takes):
        raise ValueError(f"--rival {path}: unavailable is {type(takes).__name__}, expected a function of cell, device")
    if not isinstance(name, str) or not name or "," in name:
        raise ValueError(f"--rival {path}: NAME is {name!r}, expected a string without commas")
    return Implementation(name, prepare, takes, by_default=(True, True))


def _of_ours(name: str, **options) -> Implementation:
    return Implementation(name, partial(own, name), partial(own_takes, name), ours=True, **options)


_ENTRIES = [
    _of_ours("reference", by_default=(False, True)),
    _of_ours("hopper"),
    Implementation(
        "hopper_bounded",
        partial(own, "hopper", logit_bound=LOGIT_BOUND),
        partial(own_takes, "hopper"),
        ours=True,
    ),
    _of_ours("triton"),
    _of_ours("cuda"),
    Implementation("flex", partial(flex, None), needs_cuda),
    Implementation("varlen_flash", partial(own, "varlen"), partial(own_takes, "varlen")),
    Implementation("flash4_varlen", flash_attention_4_varlen, partial(flash_attention_4_takes, True)),
    Implementation("flash4_per_scale", flash_attention_4_per_scale, partial(flash_attention_4_takes, False)),
    Implementation("flash_per_scale", sdpa_per_scale, flash_takes, by_default=(True, True)),
    Implementation("sdpa_dense", sdpa_dense, anywhere, by_default=(True, True)),
    Implementation("flex_max_autotune", partial(flex, "max-autotune-no-cudagraphs"), needs_cuda, slow=True),
]
IMPLEMENTATIONS = {entry.name: entry for entry in _ENTRIES}
"""By name, in the order in which they run. "varlen_flash" is torch's kernel, called the way hmar_kernels calls it."""


def choose(names: list[str] | None, device: torch.device, files: Sequence[Path] = ()) -> list[Implementation]:
    """The named implementations, or those of a default run on this device; those of `files` always."""
    known = dict(IMPLEMENTATIONS)
    for path in files:
        rival = load_rival(path)
        if rival.name in known:
            raise ValueError(f"--rival {path}: the name {rival.name!r} is taken; NAME = ... in the file gives another")
        known[rival.name] = rival
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown implementation {name!r}; known are {', '.join(known)}")
    if not names:
        return [entry for entry in known.values() if entry.by_default[0 if device.type == "cuda" else 1]]
    return [entry for name, entry in known.items() if name in names or name not in IMPLEMENTATIONS]
