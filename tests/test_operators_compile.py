"""Triton kernels of the fused operators compiled for sm_90 and sm_80 without a GPU: all fit, and nothing spills."""

import json

import pytest

from other_process import answer

SCRIPT = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOATS = ("eps", "max_log_scale", "lr", "beta1", "beta2")
arch, jobs = int(sys.argv[1]), json.loads(sys.argv[2])
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
report = []
for module, name, pointers, constants, warps in jobs:
    kernel = getattr(importlib.import_module("hmar_kernels." + module), name)
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            constexprs[i,] = constants[argument]
        elif argument.endswith("_strides"):
            signature[argument] = ("i32", "i32", "i32")
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + pointers.get(argument, pointers["default"])
            attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
            if argument.endswith("_stride"):
                attributes[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "enable_fp_fusion": not module.startswith("modulated_norm")},
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
        "kernel": module + "." + name,
        "constants": constants,
        "pointers": pointers,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "spills": sass.count("STL") + sass.count("LDL"),
    })
print(json.dumps(report))
"""
SHARED_PER_BLOCK = 80 << 10  # two blocks a multiprocessor of sm_80
MOST_REGISTERS = 128  # of two-byte dtypes: four blocks of four warps a multiprocessor, at least
FLOAT32_STREAM = {
    "default": "bf16",
    **dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "keep_ptr"), "fp32"),
    **dict.fromkeys(("mean_ptr", "rstd_ptr", "partials_ptr"), "fp32"),
}


def jobs_of_modulated_norm():
    """d16, d24 and d36 (two that are no power of two) as under autocast; other dtypes and no residual at one width."""
    from hmar_kernels.modulated_norm import triton

    def jobs(width, pointers, **flags):
        block = triton._padded(width)
        constants = {"C": width, "BLOCK_C": block, "HAS_KEEP": True, "HAS_BRANCH": True}
        constants |= {"GIVES_H": False, "FROM_X": False} | flags
        constants |= {"PARTS": int(constants["HAS_BRANCH"]), "HAS_BIAS": False}
        forward, backward = triton.select_tiles(block)
        module = "modulated_norm.triton"
        if not constants["GIVES_H"]:
            yield module, "_forward_kernel", pointers, constants | {"ROWS": forward.rows_or_stages}, forward.warps
        constants |= {"STAGES": backward.rows_or_stages, "HAS_DY": True}
        yield module, "_backward_kernel", pointers, constants, backward.warps

    for width in (1024, 1536, 2304):
        yield from jobs(width, FLOAT32_STREAM)
        yield from jobs(width, FLOAT32_STREAM, HAS_KEEP=False, GIVES_H=True, FROM_X=True)
    yield from jobs(1536, FLOAT32_STREAM, HAS_KEEP=False, HAS_BRANCH=False)
    yield from jobs(1536, FLOAT32_STREAM | {"default": "fp32"})
    for width, parts in ((1024, 4), (1920, 3)):
        block = triton._padded(width)
        for tile in (triton.few_rows_tile(block), triton.select_tiles(block)[0]):
            constants = {"C": width, "BLOCK_C": block, "HAS_KEEP": False, "PARTS": parts, "HAS_BIAS": True}
            constants |= {"ROWS": tile.rows_or_stages}
            yield "modulated_norm.triton", "_forward_kernel", FLOAT32_STREAM, constants, tile.warps


def jobs_of_gelu_linear():
    from hmar_kernels.gelu_linear import triton

    tiles = {"TILE_ROWS": triton.TILE_ROWS, "BLOCK_F": triton.BLOCK_F}
    for width, dtype in ((4096, "bf16"), (6144, "fp16"), (100, "fp32")):
        pointers = {"default": dtype, "bias_ptr": "fp32", "partials_ptr": "fp32"}
        for name in ("_forward_kernel", "_backward_kernel"):
            yield "gelu_linear.triton", name, pointers, tiles | {"F": width}, triton.WARPS


def jobs_of_qk_norm():
    from hmar_kernels.qk_norm import triton

    vectors = dict.fromkeys(("q_bias_ptr", "v_bias_ptr", "log_scale_ptr", "norms_ptr", "partials_ptr"), "fp32")
    for head_dim, dtype in ((64, "bf16"), (64, "fp32"), (128, "fp16")):
        constants = {"H": 16, "D": head_dim, "BLOCK_D": head_dim}
        pointers = vectors | {"default": dtype}
        tile = triton.FORWARD_TILE
        forward = constants | {"ROWS": triton.tile_rows(tile, head_dim)}
        yield "qk_norm.triton", "_forward_kernel", pointers, forward, tile.warps
        tile = triton.BACKWARD_TILE
        backward = constants | {"TILE_ROWS": triton.tile_rows(tile, head_dim), "STAGES": tile.stages}
        yield "qk_norm.triton", "_backward_kernel", pointers, backward, tile.warps


def jobs_of_linear_cross_entropy():
    from hmar_kernels.linear_cross_entropy import triton

    pointers = {"targets_ptr": "i64", "weights_ptr": "fp32", "losses_ptr": "fp32", "correct_ptr": "i1"}
    for vocabulary, dtype, gradient in ((4096, "bf16", True), (5000, "fp32", True), (4096, "fp16", False)):
        constants = {"V": vocabulary, "BLOCK_V": triton.BLOCK_COLUMNS, "HAS_GRADIENT": gradient}
        yield "linear_cross_entropy.triton", "_rows_kernel", pointers | {"default": dtype}, constants, triton.WARPS


def jobs_of_adamw():
    from hmar_kernels.adamw import triton

    pointers = dict.fromkeys(("addresses_ptr", "sizes_ptr", "chunks_ptr"), "i64") | {"default": "fp32"}
    for aligned in (False, True):
        constants = {"ALIGNED": aligned, "CHUNK": triton.CHUNK, "BLOCK": triton.BLOCK}
        yield "adamw.triton", "adamw_kernel", pointers, constants, triton.WARPS


def jobs_of_partial_sums():
    from hmar_kernels import triton_device

    tiles = {"PARTIALS_TILE": triton_device.PARTIALS_TILE, "COLUMNS_TILE": triton_device.COLUMNS_TILE}
    yield "triton_device", "_sum_kernel", {"default": "fp32", "out_ptr": "bf16"}, tiles, 4
    tiles = {"SUM_ROWS": triton_device.SUM_ROWS, "SUM_COLUMNS": triton_device.SUM_COLUMNS, "N": 1536}
    pointers = {"default": "bf16", "partials_ptr": "fp32"}
    yield "triton_device", "_column_sums_kernel", pointers, tiles, triton_device.SUM_WARPS


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(arch):
    families = (
        jobs_of_modulated_norm,
        jobs_of_gelu_linear,
        jobs_of_qk_norm,
        jobs_of_linear_cross_entropy,
        jobs_of_adamw,
        jobs_of_partial_sums,
    )
    jobs = [job for family in families for job in family()]
    report = answer(SCRIPT, str(arch), json.dumps(jobs))
    assert len(report) == len(jobs)
    for usage in report:
        assert usage["shared"] <= SHARED_PER_BLOCK, usage
        assert usage["registers"] <= MOST_REGISTERS or usage["pointers"]["default"] == "fp32", usage
        assert usage["spills"] == 0 and usage["stack"] == 0, usage
