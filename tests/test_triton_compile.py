"""Triton kernels compiled for sm_90 and sm_80 without a GPU: every row of the tile table fits, and nothing spills."""

import json
import os
import subprocess
import sys

import pytest
from hmar_kernels.attention.triton import TILES

SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hmar_kernels.attention import triton as attention

head_dim, row, arch = int(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
kernels = {"forward": attention._forward_kernel, "dq": attention._dq_kernel, "dkdv": attention._dkdv_kernel}
report = {}
for name, kernel in kernels.items():
    tile = attention.Tile(**row[name])
    rows, cols = ("BLOCK_N", "BLOCK_M") if name == "dkdv" else ("BLOCK_M", "BLOCK_N")
    constants = {"D": head_dim, "BLOCK_D": head_dim, rows: tile.rows, cols: tile.cols, "HAS_DLSE": False}
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument.endswith("_strides"):
            signature[argument] = ("i32", "i32", "i32", "constexpr")
            constexprs[i, 3] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif argument.endswith("_ptr"):
            vectors = ("lse_ptr", "dlse_ptr", "delta_ptr")
            integers = ("key_start_ptr", "key_end_ptr", "tiles_ptr")
            signature[argument] = "*fp32" if argument in vectors else "*i32" if argument in integers else "*bf16"
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
    report[name] = {
        "registers": registers, "stack": stack, "shared": compiled.metadata.shared,
        "wgmma": sass.count("HGMMA"), "mma": sass.count("HMMA"), "spills": sass.count("STL") + sass.count("LDL"),
    }
print(json.dumps(report))
"""
SHARED_LIMIT = {90: 232_448, 80: 166_912}


@pytest.mark.parametrize("key", TILES, ids=lambda key: f"sm_{key[0]}0-D{key[1]}-{key[2]}")
def test_tile_table_compiles_without_spills(key):
    capability, head_dim, _ = key
    arch = 10 * capability
    row = {name: vars(getattr(TILES[key], name)) for name in ("forward", "dq", "dkdv")}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(head_dim), json.dumps(row), str(arch)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name, usage in json.loads(result.stdout).items():
        assert usage["shared"] <= SHARED_LIMIT[arch], (name, usage)
        assert usage["wgmma" if arch == 90 else "mma"] > 0, (name, usage)
        assert usage["spills"] == 0 and usage["stack"] == 0, (name, usage)
