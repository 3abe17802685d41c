"""The CUDA extension without a GPU: what ptxas says, the kernel's own source run on the CPU, argument checks.

The emulation (cuda_on_cpu/) checks index maps, masks, pipelining and arithmetic against the reference; it
stands in for no GPU test: those are in test_attention_gpu.py.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernel_on_cpu
from hmar_kernels import SpanMask
from hmar_kernels import extension as extension_module
from hmar_kernels.attention import cuda, hopper, reference
from hmar_kernels.attention.hopper_launch import PASSES, TILE_FIELDS
from hmar_kernels.attention.plan import query_plan
from hmar_kernels.blocks import cuda as blocks_cuda
from hmar_kernels.conv2d import hopper as conv_hopper
from hmar_kernels.linear import cuda as linear_cuda
from hmar_kernels.sampling import cuda as sampling_cuda

ROOT = Path(__file__).parents[1]
TARGETS = {
    "attention_forward": ("80", "90a"),
    "linear_rows": ("90a",),
    "block_rows": ("90a",),
    "sample_rows": ("90a",),
    "hopper": ("90a",),
    "hopper_conv": ("90a",),
}
"""csrc/*.cu -> the architectures that it is compiled for, as in CMakeLists.txt."""
ARCHITECTURES = TARGETS["attention_forward"]
# So that the blocks an SM that csrc/attention_forward.cu names fit into 65536 registers, 128 threads each.
REGISTER_LIMIT = {(64, 64): 128, (64, 128): 255, (128, 64): 255, (128, 128): 255}
TYPES = ("float16", "bfloat16")  # as csrc/params.h numbers them
PYRAMID_SIZES = [1, 4, 9, 16, 25, 36, 64]  # 155 tokens


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


@pytest.fixture(scope="module")
def ptxas_output(tmp_path_factory) -> dict[tuple[str, str], str]:
    """(source, architecture) -> what nvcc and ptxas say of it."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on PATH or under CUDA_HOME")  # test_nvrtc.py looks at spills and products, too
    assert {source.stem for source in (ROOT / "csrc").glob("*.cu")} == set(TARGETS)
    folder = tmp_path_factory.mktemp("cubins")
    jobs = {
        (source, arch): subprocess.Popen(
            [
                *(nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", "-cubin"),
                *("-o", folder / f"{source}_{arch}.cubin", ROOT / "csrc" / f"{source}.cu"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source, architectures in TARGETS.items()
        for arch in architectures
    }
    output = {target: job.communicate()[0] for target, job in jobs.items()}
    for (source, arch), job in jobs.items():
        assert job.returncode == 0, f"{source}.cu does not compile for sm_{arch}:\n{output[source, arch]}"
    return output


def kernels_of(output: str):
    """(mangled name, registers and spilled bytes) of each kernel."""
    for entry in output.split("Compiling entry function")[1:]:
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups()
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        yield re.search(r"'(\w+)'", entry)[1], {"registers": registers, "spilled": int(stores) + int(loads)}


@pytest.fixture(scope="module")
def ptxas_report(ptxas_output) -> dict[tuple[str, str, int, int], dict[str, int]]:
    """(architecture, type, head dim, rows a tile) -> registers and spilled bytes."""
    report = {}
    for arch in ARCHITECTURES:
        for name, numbers in kernels_of(ptxas_output["attention_forward", arch]):
            dtype, head_dim, rows = re.search(r"ForwardTileILNS_\d+DTypeE(\d)ELi(\d+)ELi(\d+)E", name).groups()
            report[arch, TYPES[int(dtype)], int(head_dim), int(rows)] = numbers
    return report


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("head_dim", "rows"), cuda.TILES)
def test_kernels_compile_without_spills(ptxas_report, arch, dtype, head_dim, rows):
    entry = ptxas_report[arch, dtype, head_dim, rows]
    assert entry["spilled"] == 0
    assert 0 < entry["registers"] <= REGISTER_LIMIT[head_dim, rows]


def test_all_compiled_kernels_are_known(ptxas_report):
    assert {key[2:] for key in ptxas_report} == set(cuda.TILES)


def test_kernels_of_few_rows_compile_without_spills(ptxas_output):
    """They are those of linear/cuda.py's table, with a norm and without. Two blocks an SM, for the next kernel's to
    find room beside the running one's; a norm of its own fits between two without."""
    report, found, shares, norms = (
        dict(kernels_of(ptxas_output["linear_rows", "90a"])),
        set(),
        {0: set(), 1: set()},
        set(),
    )
    for name, numbers in report.items():
        tile = re.search(r"LinearRowsTileILNS_\d+DTypeE(\d)ELi(\d+)ELb(\d)E", name)
        assert numbers["spilled"] == 0, (name, numbers)
        if tile is None:
            norms.add(256 * -(-numbers["registers"] // 8) * 8)
            continue
        found.add(tuple(map(int, tile.groups())))
        num_threads = 416 if tile[3] == "1" else 192
        shares[int(tile[3])].add(num_threads * -(-numbers["registers"] // 8) * 8)
    assert 2 * max(shares[1]) <= 65536 and 2 * max(shares[0]) + max(norms) <= 65536, (shares, norms)
    tiles = [(rows, 0) for rows in linear_cuda.ROWS] + [(rows, 1) for rows in linear_cuda.NORMED_ROWS]
    assert found == {(dtype, *tile) for dtype in range(len(TYPES)) for tile in tiles}
    assert len(report) == len(found) + len(TYPES)  # and those of norms


def hopper_instance(name: str) -> tuple:
    """(pass, type, template numbers) of a mangled kernel name."""
    kernel, dtype, numbers = re.match(r"_ZN4hmar\d+hopper_(\w+?)_kernelI\w+?DTypeE(\d)E(\w+?)EEEv", name).groups()
    return kernel, TYPES[int(dtype)], *(int(n) for n in re.findall(r"L(?:i|NS_\d+[A-Za-z]+E)(\d+)E?", numbers))


def hopper_instances() -> set[tuple]:
    """What hopper.py's table names: of each kernel the template's numbers, for both types."""
    instances = set()
    assert hopper.table().keys() == PASSES.keys()
    for kernel, tiles in hopper.table().items():
        fields = re.findall(r"{(\w+)}", PASSES[kernel].tile)[1:]  # but for the type
        for tile in tiles:
            numbers = dict(zip(TILE_FIELDS, tile, strict=True))
            instances |= {(kernel, dtype, *(numbers[field] for field in fields)) for dtype in TYPES}
    return instances


@pytest.fixture(scope="module")
def hopper_report(ptxas_output) -> dict[tuple, dict[str, int]]:
    """(pass, type, head dim, warpgroups, columns, stages, overlap or row stages, blocks an SM) -> registers, spills."""
    return {hopper_instance(name): numbers for name, numbers in kernels_of(ptxas_output["hopper", "90a"])}


def test_hopper_kernels_are_those_of_the_table(hopper_report):
    assert set(hopper_report) == hopper_instances()


def test_hopper_kernels_compile_without_spills(hopper_report):
    for instance, numbers in hopper_report.items():
        kernel, _, head_dim, groups, *_, blocks_per_sm = instance
        # Beside the groups of the tile one that fetches; in the one-pass backward of head dim 64 also one for dq.
        num_threads = 128 * (groups + 1 + ((kernel, head_dim) == ("backward", 64)))
        # A thread's registers at the launch: what an SM has, shared by its blocks, in steps of eight.
        at_launch = 65536 // (blocks_per_sm * num_threads) // 8 * 8
        assert numbers == {"registers": min(at_launch, 255) // 8 * 8, "spilled": 0}, instance


@pytest.mark.parametrize("source", ["hopper", "hopper_conv", "linear_rows", "block_rows"])
def test_hopper_products_overlap(ptxas_output, source):
    """ptxas notes (C7510, C7511, C7512, C7514) every kernel in which it waits for each wgmma on its own."""
    assert not [line for line in ptxas_output[source, "90a"].splitlines() if "wgmma" in line]


def test_transformer_blocks_compile_without_spills(ptxas_output):
    """They are those of blocks/cuda.py's table, for both types. A few addresses may lie in memory."""
    found = set()
    for name, numbers in kernels_of(ptxas_output["block_rows", "90a"]):
        tile = re.search(r"BlockRowsTileILNS_\d+DTypeE(\d)ELi(\d+)E", name)
        assert numbers["spilled"] <= {"8": 0, "16": 64, "32": 96}[tile[2]], (name, numbers)
        found.add(tuple(map(int, tile.groups())))
    assert found == {(dtype, rows) for dtype in range(len(TYPES)) for rows in blocks_cuda.ROWS}


def test_draws_compile_without_spills(ptxas_output):
    """Of every type of logits, two blocks an SM of the smaller ones: 512 threads each."""
    found = set()
    for name, numbers in kernels_of(ptxas_output["sample_rows", "90a"]):
        logit_type, groups = map(int, re.search(r"LogitTypeE(\d)ELi(\d+)E", name).groups())
        found.add((logit_type, groups))
        assert numbers["spilled"] == 0 and numbers["registers"] <= {2: 64, 4: 128}[groups], (name, numbers)
    assert found == {(logit_type, groups) for logit_type in sampling_cuda.LOGIT_TYPES.values() for groups in (2, 4)}


def test_hopper_convolutions_compile_without_spills(ptxas_output):
    """They are those of conv2d/hopper.py's table, for both types. At the launch 384 threads share 65536 registers."""
    found = set()
    for name, numbers in kernels_of(ptxas_output["hopper_conv", "90a"]):
        numbers_of = r"DTypeE(\d)ELNS_\d+ResolutionE(\d)ELi(\d+)ELi(\d+)ELi(\d+)E"
        values = re.search(rf"HopperConvTileILNS_\d+{numbers_of}", name)
        found.add(tuple(map(int, values.groups())))
        assert numbers == {"registers": 168, "spilled": 0}, name
    assert found == {(dtype, *map(int, tile)) for dtype in range(len(TYPES)) for tile in conv_hopper.TILES}


class Params(ctypes.Structure):
    """AttentionForwardParams of csrc/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "key_start", "key_end", "plan")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int32) for name in ("batch_size", "num_heads", "num_queries", "num_tiles")),
        ("scale", ctypes.c_float),
    )


@pytest.fixture(scope="module")
def source_on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention_forward")
    built = kernel_on_cpu.build(folder, "attention_forward", "ptx.cuh", ("attention_forward.cuh",))
    entry = built.attention_forward_on_cpu
    entry.restype = ctypes.c_char_p
    entry.argtypes = [
        *(ctypes.POINTER(Params), ctypes.c_int, ctypes.c_int),
        *(ctypes.POINTER(ctypes.c_void_p), ctypes.c_bool, ctypes.c_bool),
    ]

    def run(q, k, v, mask, scale, *, tile_rows, tiles=None, copies_at_once=False, last_warp_first=False):
        b, h, num_queries, d = q.shape
        key_start, key_end = mask.key_start.int().contiguous(), mask.key_end.int().contiguous()
        if tiles is None:
            tiles = query_plan(mask, tile_rows, cuda.TILES[d, tile_rows], "cpu").tiles
        # NaN everywhere, and behind the rows that the kernel may write
        storage = torch.full((b, num_queries + tile_rows, h, d), math.nan, dtype=q.dtype)
        lse_storage = torch.full((b * h * num_queries + tile_rows,), math.nan)
        out = storage[:, :num_queries].transpose(1, 2)
        lse = lse_storage[: b * h * num_queries].view(b, h, num_queries)
        strides = [(ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v, out)]
        pointers = [x.data_ptr() for x in (q, k, v, out, lse, key_start, key_end, tiles)]
        params = Params(*pointers, *strides, b, h, num_queries, len(tiles), scale)
        readable = []
        for x in (q, k, v):
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            readable += [x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()]
        failure = entry(params, d, tile_rows, (ctypes.c_void_p * 6)(*readable), copies_at_once, last_warp_first)
        assert failure is None, failure.decode()
        assert storage[:, num_queries:].isnan().all() and lse_storage[b * h * num_queries :].isnan().all()
        return out, lse

    return run


def packed_qkv(b, h, num_queries, num_keys, d, seed=0):
    """q, k, v as views of one [B, L, 3, H, D] tensor where lengths agree, so that no stride is the dense one."""
    generator = torch.Generator().manual_seed(seed)
    length = max(num_queries, num_keys)
    qkv = torch.randn(b, length, 3, h, d, generator=generator).bfloat16().permute(2, 0, 3, 1, 4)
    return qkv[0, :, :, :num_queries], qkv[1, :, :, :num_keys], qkv[2, :, :, :num_keys]


def random_intervals() -> SpanMask:
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, 150, (90,), generator=generator)
    end = (start + torch.randint(0, 90, (90,), generator=generator)).clamp(max=150)
    end[::7] = start[::7]  # rows without keys
    return SpanMask.from_intervals(start.int(), end.int(), num_keys=150)


MASKS = {
    "diagonal": lambda: SpanMask.block_diagonal(PYRAMID_SIZES),
    "block-causal": lambda: SpanMask.block_causal(PYRAMID_SIZES),
    "causal-133": lambda: SpanMask.causal(133),
    "full-70x260": lambda: SpanMask.full(70, 260),
    "one-query": lambda: SpanMask.full(1, 5),
    "random": random_intervals,
    "no-keys": lambda: SpanMask.from_intervals(torch.zeros(3).int(), torch.zeros(3).int(), num_keys=20),
}


def assert_close_to_reference(out, lse, q, k, v, mask, scale):
    expected, expected_lse = reference.forward(q.double(), k.double(), v.double(), mask, scale)
    eager, _ = reference.forward(q, k, v, mask, scale)
    eager_error = (eager.double() - expected).abs().max()
    ulps = 2 * torch.finfo(q.dtype).eps * expected.abs().max()
    assert torch.isfinite(out).all()
    assert (out.double() - expected).abs().max() <= 2 * eager_error + ulps
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("head_dim", "rows"), cuda.TILES)
@pytest.mark.parametrize("name", MASKS)
def test_kernel_source_on_cpu(source_on_cpu, name, head_dim, rows):
    mask = MASKS[name]()
    q, k, v = packed_qkv(1, 2, mask.num_queries, mask.num_keys, head_dim)
    scale = head_dim**-0.5
    out, lse = source_on_cpu(q, k, v, mask, scale, tile_rows=rows)
    assert_close_to_reference(out, lse, q, k, v, mask, scale)
    no_keys = mask.key_end <= mask.key_start
    assert (out[:, :, no_keys] == 0).all() and (lse[:, :, no_keys] == -math.inf).all()


@pytest.mark.parametrize(("head_dim", "rows"), cuda.TILES)
def test_kernel_source_takes_any_full_range(source_on_cpu, head_dim, rows):
    """Tiles whose unmasked keys begin and end anywhere, not in whole blocks."""
    mask = SpanMask.from_intervals([i // 3 for i in range(150)], [i + 101 for i in range(150)], num_keys=250)
    tiles = []
    for begin in range(0, 150, rows - 3):
        end = min(begin + rows - 3, 150)
        tiles.append([begin, end, begin // 3, end + 100, (end - 1) // 3, begin + 101])
    q, k, v = packed_qkv(1, 1, 150, 250, head_dim)
    out, lse = source_on_cpu(q, k, v, mask, 0.3, tile_rows=rows, tiles=torch.tensor(tiles, dtype=torch.int32))
    assert_close_to_reference(out, lse, q, k, v, mask, 0.3)


@pytest.mark.parametrize("scale", [4.0, 30.0], ids="scale-{}".format)
def test_kernel_source_rescales(source_on_cpu, scale):
    """Keys sorted so that every block raises the maximum by more, and by less, than the lazy rescaling lets pass."""
    mask = SpanMask.full(64, 320)
    q, k, v = packed_qkv(2, 1, 64, 320, 64, seed=1)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(2)), dim=0)
    q = (0.1 * q + direction).bfloat16()
    k = (0.02 * k + torch.linspace(-1, 1, 320)[:, None] * direction).bfloat16()
    out, lse = source_on_cpu(q, k, v, mask, scale, tile_rows=64)
    assert_close_to_reference(out, lse, q, k, v, mask, scale)


@pytest.mark.parametrize("rows", [64, 128])
def test_kernel_source_has_no_races(source_on_cpu, rows):
    """Copies land at once or as late as they may, warps run first to last or last to first: bit-equal."""
    mask = SpanMask.block_causal(PYRAMID_SIZES)
    q, k, v = packed_qkv(1, 1, 155, 155, 64)
    schedules = [(False, False), (False, True), (True, False), (True, True)]
    results = [
        source_on_cpu(q, k, v, mask, 0.2, tile_rows=rows, copies_at_once=at_once, last_warp_first=reverse)
        for at_once, reverse in schedules
    ]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize(
    ("mask", "changed"),
    [
        (SpanMask.block_diagonal(PYRAMID_SIZES), slice(5, 14)),
        (SpanMask.from_intervals([0] * 64, [100 + 28 * (i % 2) for i in range(64)]), slice(100, 128)),
    ],
    ids=["diagonal", "neighbours"],
)
def test_kernel_source_is_local(source_on_cpu, rows, mask, changed):
    """Keys and values change so much that the rows that see them rescale: all other rows stay bit-equal."""
    q, k, v = packed_qkv(1, 1, mask.num_queries, mask.num_keys, 64)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, changed] *= 50
    v2[:, :, changed] = 3e38
    before, lse_before = source_on_cpu(q, k, v, mask, 0.2, tile_rows=rows)
    after, lse_after = source_on_cpu(q, k2, v2, mask, 0.2, tile_rows=rows)
    sees = mask.to_dense()[:, changed].any(-1)
    assert torch.equal(before[:, :, ~sees], after[:, :, ~sees])
    assert torch.equal(lse_before[:, :, ~sees], lse_after[:, :, ~sees])
    assert not torch.equal(before[:, :, sees], after[:, :, sees])


def arguments(**changed):
    """Arguments of cuda.forward that only lack a GPU."""
    mask = SpanMask.block_diagonal([1, 4])
    q, k, v = (torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16) for _ in range(3))
    plan = query_plan(mask, 128, 64, "cpu").tiles
    return {
        **dict(q=q, k=k, v=v, key_start=mask.key_start, key_end=mask.key_end, plan=plan, scale=1.0, tile_rows=128),
        **changed,
    }


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(k=zeros(1, 2, 5, 32)), "expected q"),
        (dict(v=zeros(1, 2, 6, 64)), "expected q"),
        (dict(v=zeros(1, 2, 5, 64, dtype=torch.float16)), "share one dtype"),
        (dict(key_start=zeros(4, dtype=torch.int32)), r"key_start must be .* \[5\]"),
        (dict(key_end=zeros(5, dtype=torch.int64)), "key_end must be .* int32"),
        (dict(plan=zeros(1, 5, dtype=torch.int32)), "plan must be"),
        (dict(key_start=torch.zeros(5, dtype=torch.int32, device="meta")), "must be on q's device"),
        (dict(scale=-1.0), "scale must be positive"),
        (dict(tile_rows=32), r"one of \[64, 128\]"),
        ({}, "cannot run the CUDA forward"),
    ],
    ids=["head-dim", "length", "dtype", "key-start", "key-end", "plan", "device", "scale", "tile-rows", "no-gpu"],
)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        cuda.forward(**arguments(**changed))


@pytest.fixture
def extension():
    if extension_module.module is None:
        pytest.skip(extension_module.unavailable(torch.device("cuda", 0)))
    return extension_module.module


def test_extension_describes_itself(extension):
    assert re.fullmatch(r"\d+\.\d+\.\d+", extension.__version__)
    assert re.fullmatch(r"(\d+[af]?(-real|-virtual)?,?)+|native|all|all-major", extension.architectures)
    assert re.fullmatch(r"\d+\.\d+", extension.cuda_version)
    assert extension.attention_forward_tiles == cuda.TILES
    if hasattr(extension, "hopper_load_error"):
        assert tuple(extension.linear_rows_kernels) == linear_cuda.ROWS
        assert tuple(extension.block_rows_kernels) == blocks_cuda.ROWS
        assert extension.max_sampled_codes == sampling_cuda.MAX_CODES


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (zeros(1, 2, 5, 64, dtype=torch.float32), "float16 and bfloat16"),
        (zeros(1, 2, 5, 32), r"head dims \[64, 128\]"),
        (zeros(1, 2, 64, 5).transpose(2, 3), "contiguous last dimension"),
        (zeros(1, 2, 5, 68)[..., :64], "multiples of 8"),
        (zeros(5 * 64 * 2 + 1)[1:].view(1, 2, 5, 64), "storage offset"),
        (zeros(1, 2, 5, 64), "run on CUDA tensors, got cpu"),
    ],
    ids=["dtype", "head-dim", "transposed", "row-stride", "offset", "cpu"],
)
def test_unavailable_names_the_reason(extension, q, message):
    assert re.search(message, cuda.unavailable(q, q, q))
    with pytest.raises(ValueError, match=message):
        cuda.forward(**arguments(q=q, k=q, v=q))


def test_unavailable_without_extension(monkeypatch):
    monkeypatch.setattr(extension_module, "module", None)
    monkeypatch.setattr(extension_module, "_error", "not built here")
    q = zeros(1, 2, 5, 64)
    assert cuda.unavailable(q, q, q) == "not built here"


def test_what_the_extension_says_of_a_device(monkeypatch):
    errors, hopper_errors = {0: "", 1: "no code for it"}, {0: "", 1: "nothing for sm_90a"}
    built = SimpleNamespace(load_error=errors.get, hopper_load_error=hopper_errors.get, architectures="80")
    monkeypatch.setattr(extension_module, "module", built)
    monkeypatch.setattr(extension_module, "_load_errors", {})
    for unavailable, found in (
        (extension_module.unavailable, errors),
        (extension_module.hopper_unavailable, hopper_errors),
    ):
        assert unavailable(torch.device("cuda", 0)) is None
        reason = f"the extension was built for 80, which cannot run on cuda:1: {found[1]}"
        assert unavailable(torch.device("cuda", 1)) == reason
    del built.hopper_load_error
    extension_module._load_errors.clear()
    assert extension_module.unavailable(torch.device("cuda", 0)) is None
    assert "no code for sm_90a" in extension_module.hopper_unavailable(torch.device("cuda", 0))


def test_unavailable_can_be_traced(extension, monkeypatch):
    """Under fullgraph the question is asked while tracing, and the answer becomes a constant."""

    def double_if_available(q):
        return q * (1 if cuda.unavailable(q, q, q) else 2)

    q = torch.ones(1, 2, 5, 64, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(double_if_available, fullgraph=True, backend="eager")(q), q)

    built = SimpleNamespace(load_error=lambda device: "no code for it", architectures="80")
    monkeypatch.setattr(extension_module, "module", built)
    monkeypatch.setattr(extension_module, "_load_errors", {})
    device = torch.device("cuda", 0)
    compiled = torch.compile(
        lambda q: q * (2 if extension_module.unavailable(device) else 1), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(q), 2 * q)
