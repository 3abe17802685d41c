"""Kernels of generation compiled for sm_90 and sm_80 without a GPU: types agree, tiles fit, nothing spills."""

import pytest

from other_process import answer

SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hmar_kernels.code_maps import triton as maps
from hmar_kernels.group_norm import triton as group_norm
from hmar_kernels.least_confident import triton as ranks
from hmar_kernels.qk_norm_attention import triton as attention
from hmar_kernels.scaled_softmax import triton as softmax
from hmar_kernels.token_embedding import triton as embedding

FLOATS = ("mean_ptr", "deviation_ptr", "factor_ptr", "offset_ptr", "log_scale_ptr")
SCALARS = ("eps", "max_log_scale", "scale")
VARYING = ("length", "num_positions", "num_chunks", "chunk_size", "channels_per_group", "height", "width", "columns")
VARYING += ("rows", "copies", "count", "first", "codes_stride", "num_codes", "n", "m", "next_side", "codes_ptr")
VARYING += ("num_cached", "capacity")
INTEGERS = {"hidden_ptr": "i1", "still_hidden_ptr": "i1"}
INTEGERS |= dict.fromkeys(("places_ptr", "positions_ptr", "codes_ptr"), "i64")
VARYING += SCALARS
arch, dtype = int(sys.argv[1]), sys.argv[2]
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
overlap = arch >= 90
jobs = {}
for length in attention.TILES:
    for head_dim in (64, 128):
        tile = attention.select_tile(length, head_dim)
        constants = {"H": 16, "D": head_dim, "BLOCK_D": head_dim, "BLOCK_L": tile.block_l, "BLOCK_Q": tile.block_q}
        constants |= {"STAGES": tile.stages, "OVERLAP": overlap}
        for cached in (False, True):
            constants = constants | {"CACHED": cached}
            jobs[f"attention {length} {head_dim} {cached}"] = attention._attention_kernel, constants, tile.warps, []
for tile in (embedding.FEW, embedding.MANY):
    for known in (False, True):
        constants = {"C": 1536, "E": 32, "KNOWN": known, "BLOCK_R": tile.block_r, "BLOCK_C": tile.block_c}
        constants |= {"BLOCK_E": 32, "OVERLAP": overlap}
        floats = ["inputs_ptr", "position_ptr", "scale_ptr", "residuals_ptr", "mask_ptr", "out_ptr"]
        jobs[f"embedding {tile} {known}"] = embedding._embedding_kernel, constants, tile.warps, floats
constants = {"HIDDEN": True, "BLOCK_I": ranks.BLOCK_I, "BLOCK_J": ranks.BLOCK_J}
jobs["ranks"] = ranks._ranks_kernel, constants, ranks.WARPS, ["confidence_ptr"]
for residual in (False, True):
    for block_c in (32, 128):
        constants = {"RESIDUAL": residual, "HAS_SHIFT": residual, "ROWS": group_norm.TILE // block_c}
        constants |= {"BLOCK_C": block_c, "STAGES": group_norm.STAGES}
        jobs[f"statistics {residual} {block_c}"] = group_norm._statistics_kernel, constants, group_norm.WARPS, []
jobs["factors"] = group_norm._factors_kernel, {"HAS_SHIFT": True, "BLOCK_K": 128, "BLOCK_J": 8}, 4, []
jobs["apply"] = group_norm._apply_kernel, {"SILU": True, "BLOCK": group_norm.ELEMENTS, "C": 160}, 8, []
constants = {"C": 160, "CHANNELS": 3, "KERNEL_X": 3, "TAPS": 27, "SILU": True, "STAGES": group_norm.TAP_STAGES}
constants |= {"BLOCK_P": group_norm.TAP_POSITIONS, "BLOCK_C": group_norm.TAP_CHANNELS, "BLOCK_T": 32}
jobs["taps"] = group_norm._taps_kernel, constants, group_norm.TAP_WARPS, ["taps_ptr"]
constants = {"CHANNELS": 3, "KERNEL_Y": 3, "KERNEL_X": 3, "HAS_BIAS": True, "BLOCK": group_norm.GATHERED}
jobs["gather"] = group_norm._gather_kernel, constants, 4, ["taps_ptr"]
for block in (256, 4096, softmax.MAX_COLUMNS):
    jobs[f"softmax {block}"] = softmax._softmax_kernel, {"BLOCK": block}, softmax.num_warps(block), ["x_ptr"]
for block in (16, 32, 64):
    constants = {"TAPS": 96, "BLOCK_M": block, "BLOCK_N": maps.BLOCK_N, "BLOCK_K": maps.BLOCK_K, "OVERLAP": overlap}
    floats = ["table_ptr", "matrix_ptr", "rows_ptr", "f_ptr", "downsample_ptr", "halfway_ptr", "out_ptr"]
    jobs[f"map rows {block}"] = maps._rows_kernel, constants, maps.WARPS, floats
    constants = {"BLOCK_P": block, "BLOCK_N": maps.BLOCK_N, "BLOCK_K": maps.BLOCK_K, "OVERLAP": overlap}
    jobs[f"map downsample {block}"] = maps._downsample_kernel, constants, maps.WARPS, floats
    for adds in (False, True):
        constants = {"E": 32, "ADD": adds, "DOWNSAMPLE": adds, "BLOCK_M": block, "BLOCK_Q": block}
        constants |= {"BLOCK_E": maps.BLOCK_N, "BLOCK_K": maps.BLOCK_K, "OVERLAP": overlap}
        jobs[f"map columns {block} {adds}"] = maps._columns_kernel, constants, maps.WARPS, floats
report = {}
for name, (kernel, constants, warps, floats) in jobs.items():
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], constexprs[i,] = "constexpr", constants[argument]
            continue
        if argument.endswith("_ptr"):
            kind = "fp32" if argument in (*FLOATS, *floats) else dtype
            signature[argument] = "*" + INTEGERS.get(argument, kind)
        else:
            signature[argument] = "fp32" if argument in SCALARS else "i32"
        if argument not in VARYING:
            attributes[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [cuobjdump, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, waits, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
    report[name] = {
        "shared": compiled.metadata.shared,
        "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
        "copies": compiled.asm["ptx"].count("cp.async.c"),
        "waits": bool(waits) + after.count("griddepcontrol.wait"),
        "written_ahead": len(re.findall(r"\\b(st\\.global|red|atom)\\.", before)) if waits else 0,
    }
print(json.dumps(report))
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arch, shared", [(90, 227 << 10), (80, 163 << 10)])
def test_kernels_fit_and_do_not_spill(arch, shared, dtype):
    report = answer(SCRIPT, str(arch), dtype)
    assert len(report) == 2 * 2 * 4 + 8 + 3 + 4 + 1 + 3 * 4
    for name, usage in report.items():
        assert usage["shared"] <= shared and usage["stack"] == 0, (name, usage)
        assert not name.startswith("statistics") or usage["copies"] > 0, f"{name}: loads run ahead"
        overlapping = arch >= 90 and name.startswith(("attention", "embedding", "map columns", "map downsample"))
        assert usage["waits"] == overlapping and usage["written_ahead"] == 0, f"{name}: all programs wait, then write"
