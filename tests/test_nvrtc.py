"""Kernels compiled at run time, without a GPU: sources under NVRTC, cache on disk, structures, what a launch is told.

NVRTC itself needs no GPU: it comes with PyTorch's CUDA builds, or with CuPy. test_nvrtc_gpu.py runs what it makes.
"""

import contextlib
import ctypes
import inspect
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hmar_kernels import SpanMask, attention
from hmar_kernels.attention import cuda, hopper, hopper_launch, nvrtc
from hmar_kernels.conv2d import hopper as conv_hopper
from hmar_kernels.conv2d import hopper_launch as conv_launch

ROOT = Path(__file__).parents[1]
DTYPES = ("float16", "bfloat16")
PASSES = tuple(hopper_launch.PASSES)
KERNELS = sorted((kind, tile) for kind, tiles in hopper.table().items() for tile in tiles)
IDS = [f"{kind}-{'-'.join(map(str, tile))}" for kind, tile in KERNELS]


def table_kernels():
    return hopper_launch.HopperKernels(**hopper.table())


class BindingsCompiler:
    """nvrtc.CupyCompiler over NVIDIA's own bindings, which PyTorch brings along; keeps what NVRTC says."""

    def __init__(self, *options):
        from cuda.bindings import nvrtc as api

        self._api = api
        self.release = ".".join(map(str, self._call(api.nvrtcVersion)))
        self.options = [option.encode() for option in (*nvrtc.OPTIONS, *options)]
        self.log = ""

    def _call(self, function, *arguments):
        status, *results = function(*arguments)
        if status != self._api.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{function.__name__}: {status.name}")
        return results[0] if len(results) == 1 else results

    def _read(self, program, size_of, read):
        content = b" " * self._call(size_of, program)
        self._call(read, program, content)
        return content

    def compile(self, source):
        api, headers = self._api, source.headers
        texts, files = [text.encode() for text in headers.values()], [name.encode() for name in headers]
        program = self._call(api.nvrtcCreateProgram, source.text.encode(), b"hmar.cu", len(headers), texts, files)
        for name in source.names:
            self._call(api.nvrtcAddNameExpression, program, name.encode())
        status = api.nvrtcCompileProgram(program, len(self.options), self.options)[0]
        self.log = self._read(program, api.nvrtcGetProgramLogSize, api.nvrtcGetProgramLog).decode()
        if status != api.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(self.log)
        names = tuple(self._call(api.nvrtcGetLoweredName, program, name.encode()).decode() for name in source.names)
        return nvrtc.Binary(self._read(program, api.nvrtcGetCUBINSize, api.nvrtcGetCUBIN), names)


@pytest.fixture(scope="module")
def real_compiler():
    try:
        return BindingsCompiler("--ptxas-options=-v")
    except (ImportError, RuntimeError, OSError) as error:
        # NOTE: it comes with PyTorch's CUDA builds, so that in continuous integration nothing goes unchecked unseen.
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"no NVRTC through cuda-bindings: {error}")


def test_the_dq_pass_writes_nothing_of_others_before_it_waits():
    """It may begin before the kernel that has sums in the same dq has ended: where it is called and how, see below."""
    text = (ROOT / "csrc" / "hopper_backward_dq.cuh").read_text()
    body = text[text.index("void compute_dq(") :]
    assert text.count("params.dq,") == text.count("store_rows<") == 1
    assert 0 < body.index("wait_for_previous();") < body.index("store_rows<")
    assert "if (params.delta != nullptr) params.delta[" in text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "tile"), KERNELS, ids=IDS)
def test_sources_compile_without_spills(real_compiler, kind, tile, dtype):
    source = hopper_launch.make_source(kind, tile, dtype == "bfloat16", ROOT / "csrc")
    binary = real_compiler.compile(source)
    kernel, _ = binary.names
    assert re.fullmatch(rf"_ZN4hmar\d+hopper_{kind}_kernelI.+DTypeE{DTYPES.index(dtype)}E.+", kernel)
    assert binary.cubin.startswith(b"\x7fELF") and kernel.encode() in binary.cubin
    numbers = hopper_launch.launch_numbers(binary)
    fields = dict(zip(hopper_launch.TILE_FIELDS, tile, strict=True))
    # Beside the groups of the tile one that fetches; in the one-pass backward of head dim 64 also one for dq.
    assert numbers.num_threads == 128 * (fields["groups"] + 1 + (kind == "backward" and fields["head_dim"] == 64))
    assert numbers.params_bytes == hopper_launch._padded_size(hopper_launch.PASSES[kind].params)
    # An SM of an H100 has 228 KiB, of which each block takes 1 KiB for itself, and 1 KiB is lost to alignment.
    assert 0 < numbers.shared_bytes <= (228 // fields["blocks_per_sm"] - 1) * 1024
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", real_compiler.log)
    assert spills == [("0", "0")]
    assert "wgmma" not in real_compiler.log  # ptxas names it where it serialises products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", conv_hopper.TILES, ids=lambda tile: "-".join(str(int(number)) for number in tile))
def test_convolutions_compile_without_spills(real_compiler, tile, dtype):
    source = conv_launch.make_source(tile, dtype == "bfloat16", ROOT / "csrc")
    binary = real_compiler.compile(source)
    assert binary.cubin.startswith(b"\x7fELF") and binary.names[0].encode() in binary.cubin
    numbers = hopper_launch.launch_numbers(binary)
    assert numbers.num_threads == 384
    assert numbers.params_bytes == hopper_launch._padded_size(conv_launch.HopperConvParams)
    assert 0 < numbers.shared_bytes <= 227 * 1024
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", real_compiler.log) == [("0", "0")]
    assert "wgmma" not in real_compiler.log


def test_host_constants_are_those_of_the_sources(real_compiler):
    text = (
        '#include "hopper_tile.cuh"\nnamespace hmar {\n'
        f"static_assert(kGroupRows == {hopper_launch.GROUP_ROWS} && kPanelColumns == {hopper_launch.PANEL_COLUMNS});\n"
        f"static_assert(alignof(TensorMap) == {hopper_launch.TENSOR_MAP_ALIGNMENT} && sizeof(RowStatistics) == 8);\n"
        f"static_assert(kChunkQueries == {hopper_launch.CHUNK_QUERIES} && sizeof(HeadProgress) == 8);\n"
        f"static_assert(kNumQueues == {hopper_launch.NUM_QUEUES});\n"
        "static_assert(int(DType::kFloat16) == 0 && int(DType::kBFloat16) == 1);\n"
        "static_assert(sizeof(uint8_t) == 1 && sizeof(uint16_t) == 2 && sizeof(uint32_t) == 4);\n"
        "static_assert(sizeof(int32_t) == 4 && sizeof(int64_t) == 8 && sizeof(uint64_t) == 8);\n"
        "__global__ void infinity(float* x) { *x = INFINITY; }\n}\n"
    )
    headers = nvrtc.read_headers("hopper_tile.cuh", ROOT / "csrc")
    real_compiler.compile(nvrtc.Source(text, headers, ("hmar::infinity",), "constants"))
    broken = nvrtc.Source(text.replace("kGroupRows ==", "kGroupRows !="), headers, ("hmar::infinity",), "constants")
    with pytest.raises(RuntimeError, match="static assertion failed"):
        real_compiler.compile(broken)


def code_of(cubin):
    """The instructions in an ELF file of one kernel: other sections hold names with random parts."""
    table, size, count, strings = (
        int.from_bytes(cubin[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62), (62, 64))
    )
    fields = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    text = [field for field in fields if cubin[fields[strings][4] + field[0] :].startswith(b".text.")]
    ((_, _, _, _, offset, length),) = text
    return cubin[offset : offset + length]


def test_cupy_compiles_the_same_code(real_compiler):
    pytest.importorskip("cupy")
    compiler = nvrtc.CupyCompiler()
    kind, tile = KERNELS[0]
    source = hopper_launch.make_source(kind, tile, True, ROOT / "csrc")
    binary, expected = compiler.compile(source), BindingsCompiler().compile(source)
    if compiler.release == real_compiler.release:
        assert len(binary.cubin) == len(expected.cubin) and binary.names == expected.names
        assert code_of(binary.cubin) == code_of(expected.cubin)
    assert hopper_launch.launch_numbers(binary) == hopper_launch.launch_numbers(expected)
    with pytest.raises(RuntimeError, match=r'NVRTC \d+\.\d+ does not compile nonsense: .*(\n.*)+"x" is undefined'):
        compiler.compile(nvrtc.Source("int y = x;", {}, (), "nonsense"))


def test_driver_constants():
    driver = pytest.importorskip("cuda.bindings.driver")
    ours = hopper_launch.CudaDriver
    assert driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 == ours.FLOAT16
    assert driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 == ours.BFLOAT16
    assert driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE == ours.INTERLEAVE_NONE
    for swizzle in ("64B", "128B"):
        name = f"SWIZZLE_{swizzle}"
        assert getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_{name}") == getattr(ours, name)
    assert driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B == ours.L2_PROMOTION_256B
    assert driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE == ours.ZERO_OUTSIDE
    shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert shared == ours.MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED == ours.RELAXED


STRUCTURES = (
    "TensorMap",
    "Strides",
    "HopperWork",
    *(the_pass.params.__name__ for the_pass in hopper_launch.PASSES.values()),
)


def test_structures_lie_as_in_cpp(tmp_path):
    """Every field at the same offset, none missing: the sizes of structures agree as well."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    lines, expected = [], []
    for name in STRUCTURES:
        structure = getattr(hopper_launch, name)
        for field, kind in structure._fields_:
            lines.append(f'std::printf("%zu %zu\\n", offsetof({name}, {field}), sizeof({name}::{field}));')
            expected.append((getattr(structure, field).offset, ctypes.sizeof(kind)))
        lines.append(f'std::printf("%zu 0\\n", sizeof({name}));')
        holds_maps = any(kind is hopper_launch.TensorMap for _, kind in structure._fields_)
        expected.append((hopper_launch._padded_size(structure) if holds_maps else ctypes.sizeof(structure), 0))
    program = tmp_path / "layout.cpp"
    program.write_text(
        '#include <cstddef>\n#include <cstdio>\n#include "hopper_params.h"\nusing namespace hmar;\n'
        "int main() {\n" + "\n".join(lines) + "\n}\n"
    )
    binary = tmp_path / "layout"
    command = [compiler, "-std=c++17", "-Wno-invalid-offsetof", "-I", ROOT / "csrc", program, "-o", binary]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    assert [tuple(map(int, line.split())) for line in output.splitlines()] == expected


# --- the cache on disk ----------------------------------------------------------------------------------------------


class FakeCompiler:
    def __init__(self, release="13.0"):
        self.release, self.calls = release, 0

    def compile(self, source):
        self.calls += 1
        if "broken" in source.text:
            raise RuntimeError("does not compile")
        launch = "_ZN4hmar6launchILi99328ELi384ELi512EEE"
        return nvrtc.Binary(f"\x7fELF {source.text}\n{self.calls}".encode(), ("kernel", launch))


def fake_source(text="code", header="int x;"):
    return nvrtc.Source(text, {"a.h": header}, ("k", "l"), "HopperTile<64>")


def test_second_use_compiles_nothing(tmp_path, capfd):
    folder = tmp_path / "not" / "there" / "yet"
    first, compiler = FakeCompiler(), FakeCompiler()
    binary = nvrtc.compiled(fake_source(), first, folder)
    err = capfd.readouterr().err
    assert re.fullmatch(r"hmar: NVRTC 13\.0 compiles HopperTile<64> \.\.\. \d+\.\d s\n", err)
    assert nvrtc.compiled(fake_source(), compiler, folder) == binary
    assert (first.calls, compiler.calls) == (1, 0)
    assert capfd.readouterr().err == ""
    assert [path.suffix for path in folder.iterdir()] == [".kernel"]


@pytest.mark.parametrize(
    ("source", "release"),
    [(fake_source("other"), "13.0"), (fake_source(header="int y;"), "13.0"), (fake_source(), "13.1")],
    ids=["text", "header", "release"],
)
def test_whatever_changes_compiles_anew(tmp_path, source, release):
    nvrtc.compiled(fake_source(), FakeCompiler(), tmp_path)
    compiler = FakeCompiler(release)
    nvrtc.compiled(source, compiler, tmp_path)
    assert compiler.calls == 1 and len(list(tmp_path.iterdir())) == 2


def test_options_are_part_of_the_key(monkeypatch):
    before = fake_source().digest("13.0")
    monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--use_fast_math"))
    assert fake_source().digest("13.0") != before


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:-1], lambda b: b[:80], lambda b: b[:-3] + b"x" + b[-2:], lambda b: b"\xff" + b[1:]],
    ids=["empty", "one-byte-short", "cut", "code", "checksum"],
)
def test_damaged_file_is_compiled_anew_and_replaced(tmp_path, capfd, damage):
    binary = nvrtc.compiled(fake_source(), FakeCompiler(), tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    compiler = FakeCompiler()
    assert nvrtc.compiled(fake_source(), compiler, tmp_path) == binary
    assert compiler.calls == 1 and path.read_bytes() == whole
    assert "cannot be used: its checksum is wrong" in capfd.readouterr().err


def test_failure_leaves_nothing_behind(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="does not compile"):
        nvrtc.compiled(fake_source("broken"), FakeCompiler(), tmp_path)
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err.endswith(" s\n")


def test_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="HMAR_CACHE_DIR names another folder"):
        binary = nvrtc.compiled(fake_source(), FakeCompiler(), tmp_path / "file")
    assert binary.names[0] == "kernel"


def test_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nvrtc.compiled(fake_source(), FakeCompiler(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HMAR_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert nvrtc.cache_folder() == tmp_path / ".cache" / "hmar"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert nvrtc.cache_folder() == tmp_path / "xdg" / "hmar"
    monkeypatch.setenv("HMAR_CACHE_DIR", str(tmp_path / "chosen"))
    assert nvrtc.cache_folder() == tmp_path / "chosen"


def test_sources_are_found_and_read_with_what_they_include(monkeypatch, tmp_path):
    assert nvrtc.source_folder() == ROOT / "csrc"
    headers = nvrtc.read_headers("hopper_backward_dq.cuh", ROOT / "csrc")
    assert {"hopper_tile.cuh", "hopper_ptx.cuh", "hopper_params.h", "params.h", "ptx.cuh"} < headers.keys()
    assert "hopper_forward.cuh" not in headers  # a change of one pass does not recompile the others
    installed = tmp_path / "site-packages" / "hmar_kernels"
    monkeypatch.setattr(nvrtc, "PACKAGE", installed)
    with pytest.raises(FileNotFoundError, match="install hmar again"):
        nvrtc.source_folder()
    (installed / "csrc").mkdir(parents=True)
    (installed / "csrc" / "params.h").write_text("")
    assert nvrtc.source_folder() == installed / "csrc"


def test_install_without_a_compiler_holds_the_sources(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake on PATH")
    environment = {"PATH": os.path.dirname(cmake), "HOME": str(tmp_path), "CXX": "/none", "CUDACXX": "/none"}
    for command in (["-S", ROOT, "-B", tmp_path / "build"], ["--install", tmp_path / "build", "--prefix", tmp_path]):
        done = subprocess.run([cmake, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    installed = tmp_path / "hmar_kernels" / "csrc"
    for the_pass in hopper_launch.PASSES.values():
        assert nvrtc.read_headers(the_pass.header, installed) == nvrtc.read_headers(the_pass.header, ROOT / "csrc")


# --- what a launch is told ------------------------------------------------------------------------------------------


class FakeDriver:
    """Records what is asked of CUDA; a tensor map holds the address of its tensor."""

    release = 13000

    def __init__(self):
        self.maps, self.float32_maps, self.loads, self.calls = {}, {}, [], []

    def num_sms(self, device):
        return 5

    def current_device(self, device):
        return contextlib.nullcontext()

    def load(self, cubin, name, shared_bytes):
        self.loads.append((name, shared_bytes))
        return object(), f"function of {name}"

    def describe(self, tensor_map, bfloat16, data, sizes, strides, box):
        assert tensor_map % 64 == 0
        ctypes.c_uint64.from_address(tensor_map).value = data
        self.maps[data] = (bfloat16, tuple(sizes), tuple(strides), tuple(box))

    def describe_float32(self, tensor_map, data, sizes, strides, box):
        assert tensor_map % 64 == 0
        number = len(self.float32_maps) + 1
        ctypes.c_uint64.from_address(tensor_map).value = number
        self.float32_maps[number] = data, tuple(sizes), tuple(strides), tuple(box)

    def set_zero(self, address, num_bytes, stream):
        self.calls.append(("zero", address, num_bytes, stream))

    def launch(self, function, blocks, threads, shared_bytes, stream, params):
        assert params % 64 == 0
        kind = re.search(r"hopper_(\w+)_kernel", function)[1]
        structure = hopper_launch.PASSES[kind].params
        copy = structure.from_buffer_copy(ctypes.string_at(params, hopper_launch._padded_size(structure)))
        self.calls.append((kind, blocks, threads, shared_bytes, stream, copy))


class LaunchCompiler(FakeCompiler):
    def compile(self, source):
        kind = re.search(r"hopper_(\w+)_kernel", source.names[0])[1]
        size = hopper_launch._padded_size(hopper_launch.PASSES[kind].params)
        names = (source.names[0], f"_ZN4hmar6launchILi99328ELi384ELi{size}EEE")
        return nvrtc.Binary(super().compile(source).cubin, names)


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """hopper.py on CPU tensors, over the kernels of its table and a driver that only records."""
    monkeypatch.setenv("HMAR_CACHE_DIR", str(tmp_path))
    kernels = table_kernels()
    kernels._compiler, kernels._cuda = LaunchCompiler(), FakeDriver()
    monkeypatch.setattr(hopper, "_kernels", kernels)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=42))
    properties = SimpleNamespace(multi_processor_count=kernels._cuda.num_sms(None))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(hopper, "_queues", {})
    return kernels


def test_every_kernel_of_the_table_has_a_number(kernels):
    seen = set()
    for (head_dim, _), tiles in hopper.TILES.items():
        for chosen in (tiles, replace(tiles, forward=tiles.bounded)):
            numbers = hopper.tile_numbers(head_dim, chosen)
            assert list(numbers) == list(chosen.passes)  # the forward first: what api.py passes on
            for kind, number in numbers.items():
                row = getattr(kernels, f"hopper_{kind}_tiles")[number]
                assert row == (head_dim, *getattr(chosen, kind))
                seen.add((kind, row))
    assert seen == set(KERNELS)


def bytes_of(x):
    return [2 * x.stride(dim) if x.shape[dim] > 1 else 16 for dim in (2, 1, 0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=DTYPES)
@pytest.mark.parametrize(("batch", "heads"), [(2, 3), (1, 1)])
def test_launches_of_forward_and_backward(kernels, batch, heads, dtype, capfd):
    mask = SpanMask.block_causal([40, 100, 200])
    head_dim, bfloat16 = 64, dtype == torch.bfloat16
    tiles = hopper.select_tiles(head_dim, mask)
    plans = hopper.make_plans(mask, tiles, "cpu")
    numbers = hopper.tile_numbers(head_dim, tiles)
    starts, ends = mask.intervals("cpu")
    q, k, v = torch.zeros(batch, 340, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    bounds = torch.ones(heads)
    driver = kernels._cuda

    of_forward = plans["forward"].jobs, numbers["forward"]
    out, lse_log2 = hopper.forward(q, k, v, starts, ends, *of_forward, 0.5, 40.0, bounds)
    (launch,), driver.calls = driver.calls, []
    kind, blocks, threads, shared_bytes, stream, params = launch
    items = plans["forward"].num_jobs * batch * heads
    assert (kind, threads, shared_bytes, stream) == ("forward", 384, 99328, 42)
    assert blocks == min(items, 5 * tiles.forward.blocks_per_sm)
    (((of_device, of_stream), queue),) = hopper._queues.items()
    assert (of_device, of_stream, queue.tolist()) == (
        q.device,
        42,
        [0, 0],
    ) and params.work.next_item == queue.data_ptr()
    maps = {"q": q, "k": k, "v": v}
    for name, x in maps.items():
        assert getattr(params, name).opaque[0] == x.data_ptr()
        box = (64, 64 if name == "q" else tiles.forward.cols, 1, 1)
        assert driver.maps[x.data_ptr()] == (bfloat16, (head_dim, 340, heads, batch), tuple(bytes_of(x)), box)
    addresses = out.data_ptr(), lse_log2.data_ptr(), bounds.data_ptr()
    assert (params.out, params.lse_log2, params.head_bounds) == addresses
    assert params.logit_bound == 40.0
    strides = params.out_strides
    assert (strides.batch, strides.head, strides.row) == out.stride()[:3]
    work = params.work
    assert (work.key_start, work.key_end) == (starts.data_ptr(), ends.data_ptr())
    assert work.jobs == plans["forward"].jobs.data_ptr()
    assert (work.num_jobs, work.num_items, work.num_heads) == (plans["forward"].num_jobs, items, heads)
    assert (work.num_queries, work.scale) == (340, 0.5)
    assert work.tail_heads == hopper.tail_heads(work.num_jobs, batch * heads, 5 * tiles.forward.blocks_per_sm)

    driver.maps.clear()
    d_out, d_lse_log2 = torch.zeros_like(out), torch.zeros_like(lse_log2)
    rest = (starts, ends, plans["dq"].jobs, plans["dkdv"].jobs, [numbers["dq"], numbers["dkdv"], -1], 0.5)
    dq, dk, dv = hopper.backward(d_out, d_lse_log2, q, k, v, out, lse_log2, *rest)
    launch_dq, launch_dkdv = driver.calls
    params, later = launch_dq[-1], launch_dkdv[-1]
    assert (launch_dq[0], launch_dkdv[0]) == ("dq", "dkdv")
    assert params.work.next_item == later.work.next_item == queue.data_ptr() and len(hopper._queues) == 1
    assert (params.work.jobs, later.work.jobs) == (plans["dq"].jobs.data_ptr(), plans["dkdv"].jobs.data_ptr())
    assert (params.lse_log2, params.d_lse_log2) == (lse_log2.data_ptr(), d_lse_log2.data_ptr())
    assert later.lse_log2 == lse_log2.data_ptr() and params.delta == later.delta
    assert (params.dq, later.dk, later.dv) == (dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
    for x, y in ((dq, params.dq_strides), (dk, later.dk_strides), (dv, later.dv_strides)):
        assert (y.batch, y.head, y.row) == x.stride()[:3]
    for name, x in (("q", q), ("k", k), ("v", v), ("d_out", d_out)):
        assert getattr(params, name).opaque[0] == getattr(later, name).opaque[0] == x.data_ptr()
        box = (64, 64 if name in ("k", "v") else tiles.dkdv.cols, 1, 1)  # the last description is that of dk/dv
        assert driver.maps[x.data_ptr()] == (bfloat16, (head_dim, 340, heads, batch), tuple(bytes_of(x)), box)
    assert len(driver.loads) == 3 and kernels._compiler.calls == 3

    hopper.forward(q, k, v, starts, ends, *of_forward, 0.5)
    assert len(driver.loads) == 3 and capfd.readouterr().err.count("compiles") == 3


def test_captured_launches_have_counters_of_their_own(kernels, monkeypatch):
    """A graph may run beside anything else: it sets to zero what no other launch counts with."""
    mask, driver = SpanMask.block_causal([40, 100]), kernels._cuda
    tiles = hopper.select_tiles(64, mask)
    plans, numbers = hopper.make_plans(mask, tiles, "cpu"), hopper.tile_numbers(64, tiles)
    starts, ends = mask.intervals("cpu")
    q, k, v = torch.zeros(3, 1, 2, 140, 64, dtype=torch.bfloat16).unbind(0)
    out, lse_log2 = hopper.forward(q, k, v, starts, ends, plans["forward"].jobs, numbers["forward"], 0.5)
    ((*_, plain),) = driver.calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    driver.calls = []
    hopper.forward(q, k, v, starts, ends, plans["forward"].jobs, numbers["forward"], 0.5)
    rest = (starts, ends, plans["dq"].jobs, plans["dkdv"].jobs, [numbers["dq"], numbers["dkdv"], -1], 0.5)
    hopper.backward(torch.zeros_like(out), None, q, k, v, out, lse_log2, *rest)
    assert [call[0] for call in driver.calls] == ["zero", "forward", "zero", "dq", "zero", "dkdv"]
    for zero, (*_, params) in zip(driver.calls[::2], driver.calls[1::2], strict=True):
        assert zero == ("zero", params.work.next_item, 8, 42) and params.work.next_item != plain.work.next_item
    assert len(hopper._queues) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=DTYPES)
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize(
    ("batch", "heads", "slots", "last"),
    [(2, 3, 2, 1), (2, 4, 5, 2), (1, 1, 1, 1), (2, 3, 6, 2)],
)
def test_launch_of_the_backward_in_one_pass(kernels, batch, heads, slots, last, head_dim, dtype, monkeypatch):
    mask, length, driver = SpanMask.block_causal([40, 100, 200]), 340, kernels._cuda
    tile = hopper.TILES[head_dim, hopper.LONG].backward
    tiles = replace(hopper.select_tiles(head_dim, mask), backward=tile)
    plan = hopper.make_plans(mask, tiles, "cpu")["backward"]
    numbers, dq_jobs = hopper.tile_numbers(head_dim, tiles), hopper.make_plans(mask, tiles, "cpu")["dq"].jobs
    starts, ends = mask.intervals("cpu")
    q, k, v = torch.zeros(batch, length, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    out = torch.zeros(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)
    d_out = torch.zeros(batch, heads, length, head_dim + 8, dtype=dtype)[..., :head_dim]  # strides unlike those of out
    lse_log2, d_lse_log2 = torch.zeros(2, batch, heads, length).unbind(0)
    asked, made, empty = [], [], torch.empty
    monkeypatch.setattr(hopper, "num_slots", lambda *numbers: asked.append(numbers) or slots)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: made.append(empty(*shape, **options)) or made[-1])
    sizes_of_last = []
    monkeypatch.setattr(hopper, "num_last_heads", lambda *numbers: sizes_of_last.append(numbers) or last)
    arguments = q, k, v, out, lse_log2, starts, ends, dq_jobs, plan.jobs, [numbers["dq"], -1, numbers["backward"]], 0.5
    dq, dk, dv = hopper.backward(d_out, d_lse_log2, *arguments)
    assert asked == [(plan.num_jobs, batch * heads, driver.num_sms(0))]
    assert sizes_of_last == [(slots, batch, heads, length, length)]

    zero, (kind, blocks, threads, shared_bytes, stream, params), *dq_launches = driver.calls
    work, items = params.work, plan.num_jobs * batch * heads
    assert (kind, threads, shared_bytes, stream) == ("backward", 384, 99328, 42)
    assert blocks == min(items, 5 * tile.blocks_per_sm)
    assert (params.out, params.d_out_rows) == (out.data_ptr(), d_out.data_ptr())
    assert (params.lse_log2, params.d_lse_log2) == (lse_log2.data_ptr(), d_lse_log2.data_ptr())
    assert (params.dq, params.dk, params.dv) == (dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
    for name, x in (("out", out), ("d_out", d_out), ("dq", dq), ("dk", dk), ("dv", dv)):
        strides = getattr(params, f"{name}_strides")
        assert (strides.batch, strides.head, strides.row) == x.stride()[:3]
    for name, x in (("q", q), ("k", k), ("v", v), ("d_out", d_out)):
        assert getattr(params, name).opaque[0] == x.data_ptr()
        box = (64, 64 if name in ("k", "v") else tile.cols, 1, 1)
        sizes = (head_dim, length, heads, batch)
        assert driver.maps[x.data_ptr()] == (dtype == torch.bfloat16, sizes, tuple(bytes_of(x)), box)
    assert (work.key_start, work.key_end, work.jobs) == (starts.data_ptr(), ends.data_ptr(), plan.jobs.data_ptr())
    assert (work.num_jobs, work.num_items, work.num_heads) == (plan.num_jobs, items, heads)
    assert (work.num_queries, work.scale) == (length, 0.5) and 1 <= work.tail_heads <= slots
    assert (params.num_slots, params.num_chunks, params.num_batch_heads) == (slots, 11, batch * heads)
    first_items = min(driver.num_sms(0) * tile.blocks_per_sm, items)
    assert params.num_first_heads == min(slots, len({item // plan.num_jobs for item in range(first_items)}))

    # Counters of items and of chunks, two a head, with some for heads that are not there, and two of the dq pass, all
    # zeroed; the statistics.
    num_zeroed = 4 * (hopper_launch.NUM_QUEUES + 2 * (batch * heads + last) + 2)
    assert zero == ("zero", work.next_item, num_zeroed, 42)
    queues = params.next_chunk, params.next_first_chunk, params.progress
    assert queues == (work.next_item + 4, work.next_item + 8, work.next_item + 16)
    assert params.statistics % 8 == 0
    (storage,) = (x for x in made if x.dtype == torch.float32)
    parts = [(work.next_item, num_zeroed), (params.statistics, 8 * slots * length)]
    assert storage.nbytes <= num_zeroed + 8 * slots * length + 24
    end = storage.data_ptr()
    for begin, num_bytes in parts:
        assert begin >= end
        end = begin + num_bytes
    assert end <= storage.data_ptr() + 4 * storage.numel()

    # Sums: the gradients as float32, in boxes of a warp's rows and half of the columns.
    assert (params.num_last_heads, params.first_slot) == (last, (last - batch * heads) % slots)
    for tensor_map, x in zip(params.sums, (dq, dk, dv), strict=True):
        sizes = (head_dim // 2, length, heads, batch)
        strides = [2 * x.stride(dim) if n > 1 else 16 for dim, n in zip((2, 1, 0), sizes[1:], strict=True)]
        found = driver.float32_maps[tensor_map.opaque[0]]
        assert found == (x.data_ptr(), sizes, tuple(strides), (head_dim // 2, 16, 1, 1))

    # The pass for dq of the last heads, which zeroes nothing.
    assert len(dq_launches) == 1
    for kind, _, _, _, _, of_last in dq_launches:
        assert (kind, of_last.work.num_items) == ("dq", len(dq_jobs) * last)
        assert of_last.delta is None and of_last.work.next_item == work.next_item + num_zeroed - 8
        assert of_last.dq == dq[-1:, heads - last :].data_ptr()
        first_row = (batch * heads - last) * length
        assert of_last.lse_log2 == lse_log2.data_ptr() + 4 * first_row
        assert of_last.d_lse_log2 == d_lse_log2.data_ptr() + 4 * first_row
        for name, x in (("q", q), ("k", k), ("v", v), ("out", out), ("d_out", d_out)):
            assert getattr(of_last, name).opaque[0] == x[-1:, heads - last :].data_ptr()

    hopper.backward(d_out, None, *arguments)
    assert all(call[-1].d_lse_log2 is None for call in driver.calls[-2:] if call[0] != "zero")
    assert len(driver.loads) == 2


def test_nothing_is_launched_for_an_empty_batch(kernels):
    mask = SpanMask.causal(70)
    tiles = replace(hopper.select_tiles(64, mask), backward=hopper.TILES[64, hopper.LONG].backward)
    q = torch.zeros(0, 2, 70, 64, dtype=torch.bfloat16)
    plans, numbers = hopper.make_plans(mask, tiles, "cpu"), hopper.tile_numbers(64, tiles)
    intervals = mask.intervals("cpu")
    out, lse = hopper.forward(q, q, q, *intervals, plans["forward"].jobs, numbers["forward"], 1.0)
    rest = plans["dq"].jobs, plans["dkdv"].jobs, [numbers[name] for name in hopper.PASSES[1:]], 1.0
    hopper.backward(out, lse, q, q, q, out, lse, *intervals, *rest)
    assert not kernels._cuda.calls and not kernels._cuda.loads


@pytest.mark.parametrize("one_pass", [False, True])
def test_gradient_of_the_output_that_starts_between_sixteen_bytes_is_copied(kernels, one_pass, monkeypatch):
    monkeypatch.setattr(hopper, "LEAST_SHARE", 0)
    mask = SpanMask.causal(70)
    tiles = hopper.select_tiles(64, mask)
    tiles = replace(tiles, backward=hopper.TILES[64, hopper.LONG].backward) if one_pass else tiles
    q = torch.zeros(1, 2, 70, 64, dtype=torch.bfloat16)
    d_out, lse = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape), torch.zeros(1, 2, 70)
    plans, numbers = hopper.make_plans(mask, tiles, "cpu"), hopper.tile_numbers(64, tiles)
    numbers = [numbers.get(name, -1) for name in hopper.PASSES[1:]]
    jobs = plans["dq"].jobs, plans["backward" if one_pass else "dkdv"].jobs
    assert d_out.is_contiguous() and d_out.data_ptr() % 16
    hopper.backward(d_out, None, q, q, q, q, lse, *mask.intervals("cpu"), *jobs, numbers, 1.0)
    assert kernels._cuda.maps and all(address % 16 == 0 for address in kernels._cuda.maps)
    assert one_pass == ("backward" in [call[0] for call in kernels._cuda.calls])


@pytest.fixture
def on_hopper(kernels, monkeypatch):
    """CPU tensors pass for those of a Hopper GPU."""
    monkeypatch.setattr(cuda, "refusal", lambda q, k, v: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "_load_errors", {})
    return kernels


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "deterministic", "by_torch", "passes"),
    [
        (2100, 8, None, False, ["backward", "dq"]),
        (2100, 8, False, False, ["backward", "dq"]),
        (2100, 8, False, True, ["backward", "dq"]),
        (2100, 8, None, True, ["dq", "dkdv"]),
        (2100, 8, True, False, ["dq", "dkdv"]),
        (2100, 3, None, False, ["dq", "dkdv"]),
        (70, 8, None, False, ["dq", "dkdv"]),
    ],
)
def test_passes_that_attention_takes(on_hopper, length, heads, deterministic, by_torch, passes, compiled, monkeypatch):
    torch._dynamo.reset()
    overlaps, launch_dq = [], on_hopper.hopper_dq
    arguments = list(inspect.signature(launch_dq).parameters)

    def record(*given):
        overlaps.append(given[arguments.index("overlap")])
        launch_dq(*given)

    monkeypatch.setattr(on_hopper, "hopper_dq", record)
    mask = SpanMask.full(8, length)
    q, k, v = (torch.zeros(1, heads, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (8, length, length))

    def forward(q, k, v):
        return attention(q, k, v, mask, impl="hopper", deterministic=deterministic)

    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(by_torch)
    try:
        out = (torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward)(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    assert [call[0] for call in on_hopper._cuda.calls if call[0] != "zero"] == ["forward", *passes]
    assert overlaps == [passes == ["backward", "dq"]], "only what the kernel before it does not write may be read early"


def test_compiled_attention_sees_a_changed_setting(on_hopper):
    torch._dynamo.reset()
    mask = SpanMask.full(8, 2100)
    q, k, v = (torch.zeros(1, 8, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (8, 2100, 2100))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask, impl="hopper").sum(), backend="aot_eager")
    taken, was_deterministic = [], torch.are_deterministic_algorithms_enabled()
    try:
        for deterministic in (False, True, False):
            torch.use_deterministic_algorithms(deterministic)
            on_hopper._cuda.calls.clear()
            torch.autograd.grad(compiled(q, k, v), (q, k, v))
            taken.append([call[0] for call in on_hopper._cuda.calls if call[0] != "zero"][1:])
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    assert taken == [["backward", "dq"], ["dq", "dkdv"], ["backward", "dq"]]


def test_threads_load_a_kernel_once(kernels):
    tile = kernels.hopper_dq_tiles[0]
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(kernels._kernel("dq", tile, True, 0))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels._cuda.loads) == 1 and loaded[0] is loaded[1] is loaded[2]
    kernels._kernel("dq", tile, True, 1)  # on another device: loaded there, from the file
    kernels._kernel("dq", tile, False, 0)  # of another dtype: another kernel
    assert len(kernels._cuda.loads) == 3 and kernels._compiler.calls == 2


# --- why it cannot run ----------------------------------------------------------------------------------------------


def test_without_cupy_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    reason = table_kernels().hopper_load_error(0)
    assert "pip install 'hmar[cupy]'" in reason and "nvcc" in reason


@pytest.mark.parametrize(
    ("release", "driver", "message"),
    [
        ("13.0", 13000, ""),
        ("13.2", 13000, ""),
        ("12.9", 13000, ""),
        ("13.0", 12080, "newer drivers than .* CUDA 12.8$"),
    ],
)
def test_newer_compilers_than_the_driver_are_refused(kernels, release, driver, message):
    kernels._compiler.release, kernels._cuda.release = release, driver
    reason = kernels.hopper_load_error(0)
    assert re.search(message, reason) and bool(reason) == bool(message)
    assert kernels._compiler.calls == 0


def test_missing_sources_are_a_reason(kernels, monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "PACKAGE", tmp_path / "a" / "b")
    assert "CuPy cannot compile them: the kernels' sources are neither in" in kernels.hopper_load_error(0)


def test_unavailable_passes_the_reason_on(on_hopper, monkeypatch):
    """On a Hopper GPU, whether or not the extension is there."""
    q = torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16)
    assert hopper.unavailable(q, q, q) is None
    monkeypatch.setattr(hopper, "_load_errors", {})
    monkeypatch.setattr(on_hopper, "hopper_load_error", lambda device: "no CuPy")
    assert hopper.unavailable(q, q, q) == "the Hopper kernels cannot run on cpu: no CuPy"
    assert "stride of 0" in hopper.unavailable(q.expand(3, -1, -1, -1), q, q)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.0, got 8.0" in hopper.unavailable(q, q, q)
