"""The attention operator with HMAR's and VAR's masks, forward and backward: python -m hmar.examples.attention"""

import argparse

import torch

from hmar_kernels import SpanMask, attention

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--sides", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8], help="sides of the token maps")
parser.add_argument("--impl", default="auto", help="reference, triton, cuda, flex or varlen")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
sizes = [side * side for side in options.sides]
masks = {"HMAR": SpanMask.block_diagonal(sizes), "VAR": SpanMask.block_causal(sizes)}

batch, heads, length, head_dim = 2, 4, sum(sizes), 64
qkv = torch.randn(batch, length, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, D], views of one projection
for name, mask in masks.items():
    out, lse = attention(q, k, v, mask, impl=options.impl, return_lse=True)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)

    # The definition: a softmax over the keys that the mask shows.
    scores = (q @ k.transpose(2, 3) / head_dim**0.5).masked_fill(~mask.to_dense(device), -torch.inf)
    error = (out - scores.softmax(-1) @ v).abs().max().item()
    tokens = out.transpose(1, 2).flatten(2)  # [B, L, H D], free: that is how out lies in memory
    print(f"{name}: {mask.num_pairs} of {length**2} pairs, error {error:.1e}, output {list(tokens.shape)}, "
          f"lse {list(lse.shape)}, gradient {list(gradient.shape)}")  # fmt: skip
