"""The pyramid of token maps: which scales an image has and where each scale's tokens stand in the sequence.

Every module takes one `Pyramid` instead of a list of sides of its own. Read `hmar.quantizer` next for what the
scales hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from hmar_kernels.mask import SpanMask

# Sides for square images of so many pixels with a tokenizer of stride 16 (VAR, section 3; HMAR, section 4).
SIDES_BY_RESOLUTION = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclass(frozen=True)
class Pyramid:
    """Token maps of sides n_1 <= ... <= n_K, laid out one after another as L = sum n_k^2 tokens.

    Scales are counted from 0 in code. Raises ValueError when the sides are not non-decreasing positive integers.
    """

    sides: tuple[int, ...]

    def __post_init__(self):
        sides = tuple(self.sides)
        object.__setattr__(self, "sides", sides)
        if not sides:
            raise ValueError("A pyramid needs at least one side, got none; (1, 2, 3, 4) would do.")
        for side in sides:
            if isinstance(side, bool) or not isinstance(side, int) or side < 1:
                raise ValueError(
                    f"Sides of a pyramid are positive integers, got {side!r} in {sides}; (1, 2, 3, 4) would do."
                )
        if any(later < earlier for earlier, later in pairwise(sides)):
            raise ValueError(f"Sides of a pyramid never shrink, got {sides}; {tuple(sorted(sides))} would do.")

    @classmethod
    def for_resolution(cls, pixels: int) -> Pyramid:
        """The published pyramid for square images of 256, 512 or 1024 pixels (tokenizer stride 16)."""
        if pixels not in SIDES_BY_RESOLUTION:
            known = ", ".join(map(str, SIDES_BY_RESOLUTION))
            raise ValueError(
                f"No published pyramid for {pixels} pixels; known are {known}. Pyramid(sides) takes any other list."
            )
        return cls(SIDES_BY_RESOLUTION[pixels])

    @property
    def num_scales(self) -> int:
        return len(self.sides)

    @property
    def side(self) -> int:
        """Side of the last and largest scale, which is the latent's."""
        return self.sides[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.sides)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First token of each scale, then the length: K + 1 numbers."""
        offsets = [0]
        for size in self.sizes:
            offsets.append(offsets[-1] + size)
        return tuple(offsets)

    @property
    def length(self) -> int:
        return sum(self.sizes)

    def slice(self, k: int) -> slice:
        """Tokens of scale k (from 0) within the sequence."""
        if not 0 <= k < self.num_scales:
            raise ValueError(f"Scale {k} is not in this pyramid; its {self.num_scales} scales are counted from 0.")
        return slice(self.offsets[k], self.offsets[k + 1])

    def block_diagonal(self) -> SpanMask:
        """HMAR's mask: a token sees exactly the tokens of its own scale."""
        return self._block_diagonal

    def block_causal(self) -> SpanMask:
        """VAR's mask: a token sees the tokens of its own and all earlier scales."""
        return self._block_causal

    @cached_property
    def _block_diagonal(self) -> SpanMask:
        return SpanMask.block_diagonal(self.sizes)

    @cached_property
    def _block_causal(self) -> SpanMask:
        return SpanMask.block_causal(self.sizes)
