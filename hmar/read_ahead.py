"""Weights asked for while the layers before them compute, on a stream beside: see `hmar_kernels.prefetch`.

The engine (engine.py) says which weights follow which layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hmar_kernels.prefetch import prefetch


class ReadAhead:
    """A stream that reads weights into the L2 cache as far as the stream that computes has come.

    Args:
        device: a GPU that `hmar_kernels.prefetch.unavailable` has nothing against.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self._asked = False

    def ask(self, weights: Sequence[Tensor]) -> None:
        """For weights, contiguous, once all is done that the current stream has been given so far."""
        if not weights:
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for weight in weights:
                prefetch(weight)
        self._asked = True

    def join(self) -> None:
        """The current stream goes on after what was asked. Each pass does, since a capture cannot end before."""
        if self._asked:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            self._asked = False
