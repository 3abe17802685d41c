"""A mask of one's own, from the interval of keys that each query sees: python -m hmar.examples.custom_mask"""

import argparse

import torch

from hmar_kernels import SpanMask, attention

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--length", type=int, default=24, help="tokens")
parser.add_argument("--reach", type=int, default=3, help="how far to the left and right a token sees")
options = parser.parse_args()

# Query i sees the keys key_start[i] up to, without it, key_end[i]: here a band, in which no token sees the last one.
tokens = torch.arange(options.length)
key_start = (tokens - options.reach).clamp_min(0).clamp_max(options.length - 2)
key_end = (tokens + options.reach + 1).clamp_max(options.length - 1)
mask = SpanMask.from_intervals(key_start, key_end, num_keys=options.length)
print(f"{mask}: density {mask.density:.2f}")
for row in mask.to_dense():
    print("".join("#" if seen else "." for seen in row.tolist()))

device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = (torch.randn(1, 2, options.length, 64, device=device) for _ in range(3))
out = attention(q, k, v, mask)
changed = v.clone()
changed[:, :, -1] = 1e6  # nobody sees the last key
print("hidden key seen:", not torch.equal(attention(q, k, changed, mask), out))
