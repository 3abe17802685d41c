"""What ncu of CUDA 13.0 wrote on an H100: ncu_attention.csv, with fewer columns.

It has forward (bounded) and backward of block-causal 256 px and of block-diagonal 1024 px, where the dq pass was for
three heads.
"""

from pathlib import Path
from unittest import mock

from bench import profile_attention
from hmar_kernels.attention import hopper

SAMPLE = Path(__file__).with_name("ncu_attention.csv").read_text()
NAMES = "block_causal-256,block_diagonal-1024"
FACTS = {"gpu": "NVIDIA H100 80GB HBM3", "commit": "0123456789abcdef", "date": "2031-02-03T04:05:06+00:00"}
FACTS |= {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "driver": "580.1"}


def with_both_forwards():
    """The sample as the steps of the profile make it: each forward stands for both."""
    lines = SAMPLE.splitlines(keepends=True)
    return "".join(line * (2 if "hopper_forward_kernel" in line else 1) for line in lines)


def rows_of_sample(**more):
    launches = profile_attention.read_launches(with_both_forwards())
    with mock.patch.object(hopper, "num_last_heads", lambda *_: 3):
        return [row | more for row in profile_attention.rows_of(profile_attention.cells_of(NAMES), launches)]
