"""Is the result right? Nothing is timed before it has passed here.

The oracle is the project's reference in float64 on the very inputs of the benchmark, the tolerance that of
`hmar_kernels.accuracy`. A float64 reference of whole batches would not fit. Some (image, head) pairs are compared; all
values must be finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hmar_kernels import SpanMask, attention
from hmar_kernels.accuracy import limits, row_group_norms

NAMES = ("out", "dq", "dk", "dv")


class CheckFailed(Exception):
    """An implementation's result is wrong; the message says which tensor, and by how much."""


@dataclass(frozen=True)
class Deviation:
    """The error of one tensor where it is nearest to its limit (or over it), both relative to the result's norm."""

    error: float
    limit: float

    @property
    def passes(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.limit


def forward_backward(attend: Callable, q, k, v, do) -> tuple[torch.Tensor, ...]:
    """(out, dq, dk, dv) of attend(q, k, v) for the output gradient `do`, all [B,H,L,D]."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    if not isinstance(out, torch.Tensor):
        raise CheckFailed(f"attend(q, k, v) returned {type(out).__name__}, expected one tensor like q")
    _same_kind("out", out, q)
    if not out.requires_grad:
        raise CheckFailed("out has no gradient: attend(q, k, v) must be differentiable by autograd")
    return out.detach(), *torch.autograd.grad(out, (q, k, v), do)


def _same_kind(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        got, expected = (f"{x.dtype} {list(x.shape)}" for x in (tensor, like))
        raise CheckFailed(f"{name} is {got}, expected {expected}")


class Oracle:
    """float64 results of the first, middle and last (image, head), and the error eager low precision makes there."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, mask: SpanMask):
        batch, heads = q.shape[:2]
        last = batch * heads - 1  # NOTE: the last pair would show an offset that overflows 32 bits
        self.pairs = [divmod(i, heads) for i in sorted({0, last // 2, last})]
        self.like = q.detach()
        self.expected: list[tuple[torch.Tensor, ...]] = []
        self.limits: list[list[torch.Tensor]] = []

        def reference(q, k, v):
            return attention(q, k, v, mask, impl="reference")

        for b, h in self.pairs:
            low = [x[b : b + 1, h : h + 1] for x in (q, k, v, do)]
            expected = forward_backward(reference, *(x.double() for x in low))
            eager = forward_backward(reference, *low)
            self.expected.append(expected)
            self.limits.append([limits(x[0, 0], e[0, 0]) for x, e in zip(expected, eager, strict=True)])

    def compare(self, actual: tuple[torch.Tensor, ...]) -> dict[str, Deviation]:
        """Deviations of whole-batch (out, dq, dk, dv). Raises CheckFailed where one is over its limit or not finite."""
        deviations = {}
        for name, tensor in zip(NAMES, actual, strict=True):
            _same_kind(name, tensor, self.like)
            finite = int(torch.isfinite(tensor).sum())
            if finite < tensor.numel():
                raise CheckFailed(f"{name} has {tensor.numel() - finite} non-finite values of {tensor.numel()}")
            deviations[name] = max(
                (self._deviation(i, NAMES.index(name), tensor[b, h]) for i, (b, h) in enumerate(self.pairs)),
                key=lambda d: d.error / d.limit,
            )
            if not deviations[name].passes:
                d = deviations[name]
                raise CheckFailed(f"{name} is off by {d.error:.3g} of its norm, at most {d.limit:.3g} is tolerated")
        return deviations

    def _deviation(self, pair: int, index: int, actual: torch.Tensor) -> Deviation:
        expected, limit = self.expected[pair][index][0, 0], self.limits[pair][index]
        error = row_group_norms(actual - expected)
        worst = int((error / limit).argmax())
        norm = row_group_norms(expected)[worst]
        return Deviation(float(error[worst] / norm), float(limit[worst] / norm))


def poison(like: torch.Tensor, count: int) -> None:
    """Leave `count` blocks of NaN in the allocator's cache, so that an output nobody writes is seen to be so."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(count)]
    del blocks
