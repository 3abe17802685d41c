"""Files for `--rival`, as a user of the benchmarks would write them."""

GOOD_RIVAL = """
import torch.nn.functional as F

NAME = "stranger"

def unavailable(cell, device):
    return "block-causal only" if cell.pattern == "block_diagonal" else None

def prepare(cell, device):
    dense = cell.mask().to_dense(device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
"""


def written(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return path
