"""How much work attention is, whatever computes it: FLOPs of unmasked pairs and the fewest bytes that must move."""

from .shapes import Cell

# QK^T and PV forward; QK^T again, dO V^T, dV, dK, dQ backward: five matrix products instead of two.
BACKWARD_FLOPS = 2.5
# q k v in, o out; q k v o do in, dq dk dv out. Row statistics (4 bytes a row) are not counted.
TENSORS = {"forward": 4, "backward": 8}


def flops(cell: Cell, direction: str) -> float:
    """4 x pairs x D x B x H forward (a multiply-add is two), 2.5 times that backward."""
    forward = 4 * cell.pairs * cell.head_dim * cell.batch * cell.heads
    return forward if direction == "forward" else BACKWARD_FLOPS * forward


def fewest_bytes(cell: Cell, direction: str) -> int:
    """Every input read once and every output written once."""
    return TENSORS[direction] * tensor_bytes(cell)


def fewest_extra_bytes(cell: Cell, direction: str) -> int:
    """What one call must allocate beside its inputs: the output and the lse of each row; dq, dk, dv and delta too for
    forward + backward."""
    tensors, statistics = (1, 1) if direction == "forward" else (4, 2)
    return tensors * tensor_bytes(cell) + statistics * 4 * cell.batch * cell.heads * cell.length


def tensor_bytes(cell: Cell) -> int:
    """Bytes of one [B,H,L,D] tensor."""
    return cell.batch * cell.heads * cell.length * cell.head_dim * cell.torch_dtype.itemsize
