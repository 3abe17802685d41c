"""Which query may see which key: one interval of keys per query.

`SpanMask` is the only description of sparsity in this package. Both masks of next-scale image models have this form
(VAR, arXiv 2404.02905, section 3; HMAR, arXiv 2506.04421, section 4): a token of scale k sees the tokens of scale k
(block-diagonal), or those of scales 1..k (block-causal). Kernels never see names of patterns, only the intervals.

Read next: `attention/plan.py` (tiles made from the intervals), `attention/api.py` (the operator).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask


class SpanMask:
    """A sparse attention mask: query i sees the keys key_start[i] <= j < key_end[i], and no others.

    Attributes:
        key_start, key_end: int32 CPU tensors [num_queries]. An empty interval is stored as (0, 0).
        query_start, query_end: int32 CPU tensors [num_keys], the transpose: key j is seen by queries inside
            query_start[j] <= i < query_end[j]. For every mask of `block_diagonal`, `block_causal`, `window`, `causal`
            and `full` these are exactly the queries that see j (`has_exact_transpose`); for other intervals they are
            the smallest interval that holds them all.
        num_queries, num_keys: lengths.

    Masks are immutable and compare by content. Plans and device copies are cached on the object: make a mask once
    and pass it, as `hmar.pyramid.Pyramid` does.
    """

    def __init__(self, key_start: np.ndarray, key_end: np.ndarray, num_keys: int) -> None:
        empty = key_end <= key_start
        key_start = np.where(empty, 0, key_start).astype(np.int32)
        key_end = np.where(empty, 0, key_end).astype(np.int32)
        query_start, query_end = _transpose(key_start, key_end, num_keys)
        self.num_queries = len(key_start)
        self.num_keys = num_keys
        self.key_start, self.key_end = torch.from_numpy(key_start), torch.from_numpy(key_end)
        self.query_start, self.query_end = torch.from_numpy(query_start), torch.from_numpy(query_end)
        digest = hashlib.sha256(key_start.tobytes() + key_end.tobytes())
        self.key = f"{self.num_queries}x{num_keys}-{digest.hexdigest()[:16]}"
        self._cache: dict = {}

    @classmethod
    def from_intervals(
        cls, key_start: torch.Tensor | Sequence[int], key_end: torch.Tensor | Sequence[int], num_keys: int | None = None
    ) -> SpanMask:
        """Any mask of one key interval per query.

        Args:
            key_start, key_end: integers [num_queries], half-open intervals; start == end means the query sees nothing.
            num_keys: number of keys; default is the largest key_end.
        Raises:
            ValueError: intervals of different lengths, not integers, reversed, or outside [0, num_keys].
        """
        start, end = _int_vector(key_start, "key_start"), _int_vector(key_end, "key_end")
        if len(start) != len(end):
            raise ValueError(
                f"key_start has {len(start)} entries and key_end {len(end)}: one of each per query is needed"
            )
        if num_keys is None:
            num_keys = int(end.max())
        _check_length(num_keys, "num_keys")
        bad = np.flatnonzero((start < 0) | (end < start) | (end > num_keys))
        if len(bad):
            i = bad[0]
            raise ValueError(
                f"query {i} has the key interval [{start[i]}, {end[i]}); expected 0 <= start <= end <= {num_keys}"
            )
        return cls(start, end, num_keys)

    @classmethod
    def block_diagonal(cls, sizes: Sequence[int]) -> SpanMask:
        """HMAR's mask: a token of block k sees exactly block k. `sizes` are tokens per block (n*n for a scale)."""
        return cls.window(sizes, num_scales=1)

    @classmethod
    def block_causal(cls, sizes: Sequence[int]) -> SpanMask:
        """VAR's mask: a token of block k sees blocks 0..k. `sizes` are tokens per block (n*n for a scale)."""
        return cls.window(sizes, num_scales=len(sizes))

    @classmethod
    def window(cls, sizes: Sequence[int], num_scales: int) -> SpanMask:
        """A token of block k sees the last `num_scales` blocks up to and with its own.

        num_scales = 1 is `block_diagonal`, num_scales = len(sizes) is `block_causal`.
        """
        sizes = _int_vector(sizes, "sizes")
        if not (sizes > 0).all():
            raise ValueError(f"block sizes must be positive, got {sizes.tolist()}")
        if num_scales < 1:
            raise ValueError(f"a window spans at least 1 scale, got {num_scales}")
        ends = np.cumsum(sizes)
        starts = ends - sizes
        first = np.maximum(np.arange(len(sizes)) - (num_scales - 1), 0)
        return cls(np.repeat(starts[first], sizes), np.repeat(ends, sizes), int(ends[-1]))

    @classmethod
    def causal(cls, length: int) -> SpanMask:
        """Token i sees tokens 0..i."""
        _check_length(length, "length")
        return cls(np.zeros(length, np.int32), np.arange(1, length + 1), length)

    @classmethod
    def full(cls, num_queries: int, num_keys: int) -> SpanMask:
        """Every query sees every key."""
        _check_length(num_queries, "num_queries")
        _check_length(num_keys, "num_keys")
        return cls(np.zeros(num_queries, np.int32), np.full(num_queries, num_keys), num_keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpanMask) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"SpanMask({self.num_queries} queries x {self.num_keys} keys, density {self.density:.3f})"

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_cache"} | {"_cache": {}}

    def __deepcopy__(self, memo: dict) -> SpanMask:
        return self

    @cached_property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs that attend."""
        return int((self.key_end.long() - self.key_start.long()).sum())

    @property
    def density(self) -> float:
        """Share of the dense num_queries x num_keys matrix that attends."""
        return self.num_pairs / (self.num_queries * self.num_keys)

    @cached_property
    def has_exact_transpose(self) -> bool:
        """Whether every key is seen by one interval of queries without a gap."""
        return int((self.query_end.long() - self.query_start.long()).sum()) == self.num_pairs

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int, int], ...]:
        """Maximal runs of queries with one and the same key interval: (row_start, row_end, key_start, key_end)."""
        start, end = self.key_start.numpy(), self.key_end.numpy()
        change = np.flatnonzero((np.diff(start) != 0) | (np.diff(end) != 0)) + 1
        edges = [0, *change.tolist(), self.num_queries]
        return tuple((a, b, int(start[a]), int(end[a])) for a, b in pairwise(edges))

    def intervals(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """(key_start, key_end) on `device`, int32 [num_queries] each, copied once and kept."""
        return self.cached(("intervals", str(device)), lambda: (self.key_start.to(device), self.key_end.to(device)))

    def cached(self, key: tuple, make):
        """The value of make() for `key`, made on first use and kept for the life of the mask."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def to_dense(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mask as a bool tensor [num_queries, num_keys], True where the query sees the key."""
        start, end = self.intervals(device)
        keys = torch.arange(self.num_keys, device=device, dtype=torch.int32)
        return (keys >= start[:, None]) & (keys < end[:, None])

    def to_flex(self, device: torch.device | str) -> BlockMask:
        """The mask for torch.nn.attention.flex_attention (block size 128), made once per device."""
        from torch.nn.attention.flex_attention import create_block_mask

        start, end = self.intervals(device)

        def mask_mod(b, h, q_idx, kv_idx):
            return (kv_idx >= start[q_idx]) & (kv_idx < end[q_idx])

        return self.cached(
            ("flex", str(device)),
            lambda: create_block_mask(mask_mod, None, None, self.num_queries, self.num_keys, device=device),
        )

    def cu_seqlens(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Offsets (queries, keys) for variable-length attention, int32 CPU [num_blocks + 1] each.

        They exist when runs of queries use disjoint, consecutive key intervals that cover all keys, as in
        `block_diagonal`; otherwise (as in `block_causal`) the result is None.
        """
        edge = 0
        for _, _, start, end in self.runs:
            if start != edge or end == start:
                return None
            edge = end
        if edge != self.num_keys:
            return None
        queries = [0, *(run[1] for run in self.runs)]
        keys = [0, *(run[3] for run in self.runs)]
        return torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32)

    def draw(self, ax: Axes | None = None, *, color: str = "#0072B2") -> Axes:
        """Draw the mask with matplotlib: queries downwards, keys to the right, coloured where a pair attends."""
        import matplotlib.pyplot as plt
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        ax = ax or plt.subplots(figsize=(4, 4), layout="constrained")[1]
        spans = [Rectangle((start, a), end - start, b - a) for a, b, start, end in self.runs if end > start]
        ax.add_collection(PatchCollection(spans, facecolor=color, edgecolor="white", linewidth=0.3))
        ax.set(xlim=(0, self.num_keys), ylim=(self.num_queries, 0), aspect="equal", xlabel="key", ylabel="query")
        return ax


def _transpose(key_start: np.ndarray, key_end: np.ndarray, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    query_start, query_end = np.zeros(num_keys, np.int32), np.zeros(num_keys, np.int32)
    for i in range(len(key_start)):
        query_end[key_start[i] : key_end[i]] = i + 1
    for i in reversed(range(len(key_start))):
        query_start[key_start[i] : key_end[i]] = i
    return query_start, query_end


def _int_vector(values: torch.Tensor | Sequence[int], name: str) -> np.ndarray:
    vector = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if vector.ndim != 1 or len(vector) == 0 or not np.issubdtype(vector.dtype, np.integer):
        raise ValueError(f"{name} must be a non-empty vector of integers, got {vector.dtype} of shape {vector.shape}")
    return vector.astype(np.int64)


def _check_length(length: int, name: str) -> None:
    if length < 1:
        raise ValueError(f"{name} must be at least 1, got {length}")
