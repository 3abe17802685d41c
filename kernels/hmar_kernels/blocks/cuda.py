"""Launch of the hand-written kernel of transformer blocks (csrc/block_rows.cuh), of an extension built for sm_90a."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extension
from ..linear.cuda import DTYPES, empty_statistics, misaligned
from .reference import BlockWeights

ROWS = (8, 16, 32)  # of the kernels, at most
MAX_IMAGE_ROWS = 16  # of one image, for a warp attends a head of whole images
MAX_ROWS, MAX_BLOCKS = max(ROWS), 64
FLOATS = ("q_bias", "v_bias", "log_scale")  # which are float32
HEAD_DIM, STEP, SPLITS = 64, 64, 4  # widths are multiples of STEP, at least SPLITS of them


class Table:
    """Weights of transformer blocks as the kernel finds them: described once, read where they are at every launch.

    Args:
        blocks: their weights, contiguous, on a GPU of compute capability 9.0. They are kept; what is written into them
            later counts, what takes their place in a module does not.
    Raises:
        ValueError: the kernel cannot take them; `refusal` says why.
    """

    def __init__(self, blocks: Sequence[BlockWeights]):
        reason = refusal(blocks)
        if reason is None:
            reason = unavailable_on(
                blocks[0].qkv.device, blocks[0].qkv.dtype, *widths(blocks[0]), HEAD_DIM, len(blocks)
            )
        if reason is not None:
            raise ValueError(f"the kernel of transformer blocks cannot run here: {reason}")
        self.blocks = tuple(blocks)
        first = blocks[0]
        self.device, self.dtype, (self.width, self.hidden_width) = first.qkv.device, first.qkv.dtype, widths(first)
        described = extension.module.describe_blocks(
            blocks=[
                (
                    *(t.data_ptr() for t in (block.qkv, block.proj, block.fc1, block.fc2)),
                    *(0, *(t.data_ptr() for t in (block.proj_bias, block.fc1_bias, block.fc2_bias))),
                    *(t.data_ptr() for t in (block.q_bias, block.v_bias, block.log_scale)),
                )
                for block in self.blocks
            ],
            width=self.width,
            hidden_width=self.hidden_width,
            bfloat16=self.dtype == torch.bfloat16,
            device=self.device.index,
        )
        self.described = torch.frombuffer(bytearray(described), dtype=torch.uint8).to(self.device)
        # NOTE: of launches, which follow each other on a stream.
        self.counters = torch.zeros(2, dtype=torch.int32, device=self.device)


def widths(block: BlockWeights) -> tuple[int, int]:
    """Of the residual stream and of the MLP."""
    return block.qkv.shape[1], block.fc1.shape[0]


def unavailable_on(
    device: torch.device, dtype: torch.dtype, width: int, hidden_width: int, head_dim: int, blocks: int
) -> str | None:
    """Why the kernel cannot run on a device with so many blocks of such weights; None when it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if head_dim != HEAD_DIM:
        return f"heads have {HEAD_DIM} numbers, here {head_dim}"
    return refusal_of_sizes(dtype, width, hidden_width, blocks) or extension.hopper_unavailable(device)


def refusal_of_sizes(dtype: torch.dtype, width: int, hidden_width: int, blocks: int) -> str | None:
    if dtype not in DTYPES:
        return f"its weights are float16 or bfloat16, not {dtype}"
    if not 1 <= blocks <= MAX_BLOCKS:
        return f"it takes 1 to {MAX_BLOCKS} blocks, got {blocks}"
    for name, size in (("width", width), ("MLP's width", hidden_width)):
        if size % STEP or size < SPLITS * STEP:
            return f"the {name} is a multiple of {STEP}, at least {SPLITS * STEP}, got {size}"
    return None


def refusal(blocks: Sequence[BlockWeights]) -> str | None:
    """Why the kernel does not take such weights, wherever they are."""
    if not blocks:
        return f"it takes 1 to {MAX_BLOCKS} blocks, got 0"
    (width, hidden_width), dtype = widths(blocks[0]), blocks[0].qkv.dtype
    if (reason := refusal_of_sizes(dtype, width, hidden_width, len(blocks))) is not None:
        return reason
    shapes = dict(qkv=(3 * width, width), proj=(width, width), fc1=(hidden_width, width), fc2=(width, hidden_width))
    shapes |= dict(proj_bias=(width,), fc1_bias=(hidden_width,), fc2_bias=(width,))
    shapes |= dict(q_bias=(width,), v_bias=(width,), log_scale=(width // HEAD_DIM,))
    for block in blocks:
        for name, shape in shapes.items():
            tensor = getattr(block, name)
            wanted = torch.float32 if name in FLOATS else dtype
            if tensor.shape != shape or tensor.dtype != wanted:
                return f"{name} is {wanted} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                return f"{name} is contiguous and starts at a multiple of 16 bytes, here it does not"
    return None


def refusal_of_rows(x: Tensor, vectors: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> str | None:
    """Why the kernel does not take such rows with weights of this dtype."""
    if x.dtype != torch.float32:
        return f"the residual stream is float32, got {x.dtype}"
    if (rows := x.shape[:-1].numel()) > MAX_ROWS:
        return f"it has few rows, at most {MAX_ROWS}, got {rows}"
    if x.shape[1] > MAX_IMAGE_ROWS:
        return f"images have at most {MAX_IMAGE_ROWS} rows, got {x.shape[1]}"
    for vector in (vector for of_block in vectors for vector in of_block):
        if vector.dtype != dtype:
            return f"gates, scales and shifts are {dtype} as the weights, not {vector.dtype}"
    return None


def forward(
    x: Tensor, table: Table, vectors: Sequence[Sequence[Tensor]], max_log_scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """x [B, L, C], vectors [B, 1, C] -> y [B, L, C] and its statistics [B, L, C / 64, 2]."""
    rows, length, x = x.shape[:-1].numel(), x.shape[1], x.contiguous()
    strides = {vector.stride(0) for of_block in vectors for vector in of_block}
    if len(strides) > 1 or any(misaligned(v) or v.stride(-1) != 1 for of_block in vectors for v in of_block):
        vectors = [[vector.clone(memory_format=torch.contiguous_format) for vector in given] for given in vectors]
        strides = {x.shape[-1]}
    y = torch.empty_like(x)
    statistics = empty_statistics(y)
    between = torch.empty(
        rows, 3 * table.width + max(table.width, table.hidden_width), dtype=table.dtype, device=x.device
    )
    extension.module.block_rows(
        table=table.described.data_ptr(),
        vectors=[[vector.data_ptr() for vector in of_block] for of_block in vectors],
        x=x.data_ptr(),
        y=y.data_ptr(),
        statistics=statistics.data_ptr(),
        between=between.data_ptr(),
        counters=table.counters.data_ptr(),
        vector_stride=strides.pop(),
        max_log_scale=max_log_scale,
        eps=eps,
        num_rows=rows,
        image_rows=length,
        width=table.width,
        hidden_width=table.hidden_width,
        kernel_rows=next(most for most in ROWS if rows <= most),
        bfloat16=table.dtype == torch.bfloat16,
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return y, statistics
