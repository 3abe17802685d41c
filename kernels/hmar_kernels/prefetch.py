"""A tensor asked for ahead of the kernel that reads it: from global memory into the L2 cache.

Layers of few rows take the time in which their weights are read, but a kernel reads only after what comes before its
loads: a launch, its inputs. Asked for on a stream beside the one that computes, weights come meanwhile. Read next:
`hmar/read_ahead.py`, which does that in generation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_device

__all__ = ["prefetch", "unavailable"]

# Bytes that a thread asks for at a time, threads of a program, programs: few, so that they find room beside other
# kernels, and together no more than the 1 MB at a time that keep memory busy.
CHUNK, LANES, PROGRAMS = 1024, 32, 32
STEP = 16  # bytes: of addresses and sizes


def unavailable(device: torch.device) -> str | None:
    """Why `prefetch` cannot run on a device; None when it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (9, 0) else f"it needs compute capability 9.0, got {capability[0]}.{capability[1]}"


def prefetch(x: Tensor) -> None:
    """Queue a kernel on the current stream that asks for all of x; it ends before x has come.

    Args:
        x: on a GPU of compute capability 9.0 or later, contiguous. What is left of it beside whole pieces of 16 bytes
            is not asked for. It is only a hint: results of other kernels do not depend on it.
    Raises:
        ValueError: x is not contiguous, or the device cannot.
    """
    reason = unavailable(x.device)
    if reason is not None:
        raise ValueError(f"prefetch cannot run here: {reason}; without it results are the same")
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got strides {x.stride()} of {list(x.shape)}; x.contiguous() is")
    skipped = -x.data_ptr() % STEP
    num_bytes = (x.nbytes - skipped) // STEP * STEP
    if num_bytes > 0:
        programs = min(PROGRAMS, triton.cdiv(num_bytes, CHUNK * LANES))
        with on_device(x):
            _prefetch_kernel[(programs,)](x, skipped, num_bytes, CHUNK=CHUNK, LANES=LANES, num_warps=1)


@triton.jit
def _ask(address, size):
    """PTX ISA 8.0, cp.async.bulk.prefetch: `size` bytes from `address` on, both multiples of 16; nothing for less."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch_kernel(x_ptr, skipped, num_bytes: tl.int64, CHUNK: tl.constexpr, LANES: tl.constexpr):
    address = x_ptr.to(tl.int64) + skipped
    first, step = tl.program_id(0).to(tl.int64) * LANES * CHUNK, tl.num_programs(0) * LANES * CHUNK
    for begin in range(first, num_bytes, step):
        offsets = begin + tl.arange(0, LANES) * CHUNK
        _ask(address + offsets, tl.minimum(num_bytes - offsets, CHUNK).to(tl.int32))
