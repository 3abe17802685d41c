"""Launch of the hand-written kernel that draws codes (csrc/sample_rows.cuh), of an extension built for sm_90a."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from .reference import share, targets, truncates

LOGIT_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # csrc/sample_rows.h, LogitType
MAX_CODES = 8192  # a row must fit into the registers of a block
LOADED = 4  # codes that are read at once


def unavailable(device: torch.device, dtype: torch.dtype, num_codes: int) -> str | None:
    """Why the kernel cannot run; None when it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if dtype not in LOGIT_TYPES:
        return f"logits are {', '.join(map(str, LOGIT_TYPES))}, not {dtype}"
    if num_codes > MAX_CODES:
        return f"a row must fit into registers, at most {MAX_CODES} codes, got {num_codes}"
    return extension.hopper_unavailable(device)


def whole_loads(logits: Tensor) -> bool:
    """Whether every token's logits follow each other, from an address on at which LOADED can be read at once."""
    begins = [stride * (size > 1) for stride, size in zip(logits.stride()[:2], logits.shape[:2], strict=True)]
    aligned = logits.data_ptr() % (LOADED * logits.itemsize) == 0
    return logits.stride(2) == 1 and aligned and not any(begin % LOADED for begin in begins)


def forward(
    logits: Tensor,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    step: int,
    inverse_temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    places: Tensor | None = None,
    overlap: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, n, V], guidance [B], seeds [B], positions [B, n] -> codes, confidence, nonfinite [B, n].

    into, places: as in triton.py. overlap: it may start, and read seeds and positions as they are given here, before
    the kernels queued before it have ended.
    """
    by_k, by_p = truncates(logits.shape[2], top_k, top_p, greedy)
    codes, confidence, nonfinite = targets(logits, into)
    halves = [half for half in (logits, unconditional) if half is not None]
    extension.module.sample_rows(
        addresses=[
            0 if tensor is None else tensor.data_ptr()
            for tensor in (logits, unconditional, guidance, seeds, positions, places, codes, confidence, nonfinite)
        ],
        row_strides=[half.stride() for half in (halves[0], halves[-1])],
        seed_stride=seeds.stride(0),
        strides=[
            (0, 0) if tensor is None else tensor.stride()
            for tensor in (positions, places, codes, confidence, nonfinite)
        ],
        shape=tuple(logits.shape),
        logit_type=LOGIT_TYPES[logits.dtype],
        step=step,
        inverse_temperature=inverse_temperature,
        top_k=top_k if by_k else 0,
        wanted_share=share(top_p) if by_p else 0,
        greedy=greedy,
        marks_only=into is not None,
        whole_loads=all(map(whole_loads, halves)),
        overlap=overlap,
        device=logits.device.index,
        stream=torch.cuda.current_stream(logits.device).cuda_stream,
    )
    return (codes, confidence, nonfinite) if into is None else into
