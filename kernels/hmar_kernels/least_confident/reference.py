"""The least confident of the hidden codes, stated plainly: a stable sort by confidence, visible codes last but NaN."""

import math

import torch
from torch import Tensor


def forward(confidence: Tensor, hidden: Tensor | None, count: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """confidence, hidden [B,n] -> places and positions [B,count], hidden [B,n]."""
    places = least_confident_first(confidence, hidden)[:, :count]
    still_hidden = torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, places, True)
    return places, places + first, still_hidden


def least_confident_first(confidence: Tensor, hidden: Tensor | None) -> Tensor:
    """All places, int64 [B,n]: hidden ones by rising confidence, then the others, and hidden ones of NaN."""
    keys = confidence if hidden is None else confidence.masked_fill(~hidden, math.inf)
    return keys.argsort(dim=1, stable=True)
