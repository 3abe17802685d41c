"""Triton kernels compiled for sm_90 and sm_80 without a GPU: every row of the tile table fits, and nothing spills.

Beside the table in bf16: fp16, a padded head dim with the gradient of lse, and the float32 tiles. And what a launch of
one pyramid compiles serves others, whatever their sizes.
"""

import json
from dataclasses import astuple

import pytest

from hmar_kernels.attention.triton import FLOAT32_TILES, SHORT, TILES
from other_process import answer

SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hmar_kernels.attention import triton as attention

arch, jobs = int(sys.argv[1]), json.loads(sys.argv[2])
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
kernels = {"forward": attention._forward_kernel, "dq": attention._dq_kernel, "dkdv": attention._dkdv_kernel}
report = []
for head_dim, name, shape, dtype, has_dlse in jobs:
    kernel, tile = kernels[name], attention.Tile(*shape)
    rows, cols = ("BLOCK_N", "BLOCK_M") if name == "dkdv" else ("BLOCK_M", "BLOCK_N")
    constants = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "HAS_DLSE": has_dlse}
    constants |= {rows: tile.rows, cols: tile.cols}
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument.endswith("_strides"):
            signature[argument] = ("i32", "i32", "i32", "constexpr")
            constexprs[i, 3] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif argument.endswith("_ptr"):
            vectors = ("lse_ptr", "dlse_ptr", "delta_ptr")
            integers = ("key_start_ptr", "key_end_ptr", "tiles_ptr")
            signature[argument] = "*fp32" if argument in vectors else "*i32" if argument in integers else "*" + dtype
            attributes[i,] = [["tt.divisibility", 16]]
        elif argument in constants:
            signature[argument] = "constexpr"
            constexprs[i,] = constants[argument]
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([cuobjdump, "-sass", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups())
    report.append({
        "head_dim": head_dim,
        "pass": name,
        "tile": shape,
        "dtype": dtype,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "wgmma": sass.count("HGMMA"),
        "mma": sass.count("HMMA"),
        "spills": sass.count("STL") + sass.count("LDL"),
    })
print(json.dumps(report))
"""
SHARED_LIMIT = {90: 232_448, 80: 166_912}


@pytest.mark.parametrize("capability", [8, 9])
def test_tile_table_compiles_without_spills(capability):
    arch = 10 * capability
    passes = ("forward", "dq", "dkdv")
    rows = {(head_dim, tiles) for (major, head_dim, _), tiles in TILES.items() if major == capability}
    jobs = {(head_dim, n, astuple(getattr(tiles, n)), "bf16", False) for head_dim, tiles in rows for n in passes}
    short = TILES[capability, 64, SHORT]
    jobs |= {(64, "dkdv", astuple(short.dkdv), "fp16", False), (48, "dq", astuple(short.dq), "bf16", True)}
    jobs |= {(64, n, astuple(getattr(FLOAT32_TILES, n)), "fp32", True) for n in passes}
    report = answer(SCRIPT, str(arch), json.dumps(sorted(jobs)))
    assert len(report) == len(jobs)
    for usage in report:
        assert usage["shared"] <= SHARED_LIMIT[arch], usage
        if usage["dtype"] != "fp32":  # NOTE: float32 runs outside the matrix units; it has to fit, not to be fast
            assert usage["wgmma" if arch == 90 else "mma"] > 0, usage
            assert usage["spills"] == 0 and usage["stack"] == 0, usage


KEYS_SCRIPT = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from hmar_kernels import SpanMask
from hmar_kernels.attention import triton as attention

backend, keys = make_backend(GPUTarget("cuda", 90, 32)), []

class Launched:
    # stands for a kernel: what Triton would look up its compiled version by, instead of a launch
    def __init__(self, kernel):
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid):
        return lambda **arguments: keys[-1].append(str(self.bind(**arguments)[1:]))

for name in ("_forward_kernel", "_dq_kernel", "_dkdv_kernel"):
    setattr(attention, name, Launched(getattr(attention, name)))
for sizes, batch, heads in json.loads(sys.argv[1]):
    keys.append([])
    mask, length = SpanMask.block_causal(sizes), sum(sizes)
    tiles = attention.select_tiles(9, 64, torch.bfloat16, mask)
    plan = attention.make_plan(mask, tiles, "cpu")
    q, k, v, do = (torch.empty(batch, length, heads, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    out, lse = attention.forward(q, k, v, plan, 0.125)
    attention.backward(do, None, q, k, v, out, lse, plan, 0.125)
print(json.dumps(keys))
"""


def test_one_compiled_version_serves_other_pyramids_and_heads():
    """Numbers of tokens, heads and tiles that are one, divisible by 16, and neither."""
    launches = [([1, 4, 9], 2, 3), ([16], 2, 16), ([1], 2, 1), ([1, 4, 9, 16, 25, 36, 64, 100, 169, 256], 4, 24)]
    first, *others = answer(KEYS_SCRIPT, json.dumps(launches))
    assert len(first) == len(set(first)) == 3  # one a pass
    assert all(keys == first for keys in others)
