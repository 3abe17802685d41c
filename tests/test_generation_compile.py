"""Kernels of generation compiled for sm_90 and sm_80 without a GPU: types agree, tiles fit, nothing spills."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hmar_kernels.group_norm import triton as group_norm
from hmar_kernels.linear import triton as linear

FLOATS = ("mean_ptr", "deviation_ptr", "factor_ptr", "offset_ptr")
VARYING = ("num_rows", "num_positions", "num_chunks", "chunk_size", "channels_per_group")
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
jobs = {}
for rows, tile in linear.TILES.items():
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages}
    jobs[f"linear {rows}"] = linear._linear_kernel, constants | {"HAS_BIAS": True, "GELU": True}, 4
for residual in (False, True):
    constants = {"RESIDUAL": residual, "HAS_SHIFT": residual, "ROWS": group_norm.ROWS, "BLOCK_C": 32}
    jobs[f"statistics {residual}"] = group_norm._statistics_kernel, constants, 4
jobs["factors"] = group_norm._factors_kernel, {"HAS_SHIFT": True, "BLOCK_K": 128, "BLOCK_J": 8}, 4
jobs["apply"] = group_norm._apply_kernel, {"SILU": True, "BLOCK": group_norm.ELEMENTS}, 8
report = {}
for name, (kernel, constants, warps) in jobs.items():
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], constexprs[i,] = "constexpr", constants[argument]
            continue
        pointer = "*fp32" if argument in FLOATS else "*" + sys.argv[2]
        signature[argument] = pointer if argument.endswith("_ptr") else "fp32" if argument == "eps" else "i32"
        if argument != "eps" and argument not in VARYING:
            attributes[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", int(sys.argv[1]), 32),
        options={"num_warps": warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [cuobjdump, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, copies = int(re.search(r"STACK:(\\d+)", usage)[1]), compiled.asm["ptx"].count("cp.async.c")
    report[name] = {"shared": compiled.metadata.shared, "stack": stack, "copies": copies}
print(json.dumps(report))
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arch, shared", [(90, 227 << 10), (80, 163 << 10)])
def test_kernels_fit_and_do_not_spill(arch, shared, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str(arch), dtype]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)
    assert len(report) == 7
    for name, usage in report.items():
        assert usage["shared"] <= shared and usage["stack"] == 0, name
        assert not name.startswith("linear") or usage["copies"] > 0, f"{name}: loads run ahead"
