"""The Hopper kernels where the extension is not built: compiled when they are first launched, and launched from here.

`HopperKernels` has the functions that csrc/bindings.cpp gives the extension and does what csrc/hopper.cu does, over the
same kernels; hopper.py takes either. nvrtc.py compiles. Structures are those of csrc/hopper_params.h by their names.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from ctypes import Structure, c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from . import nvrtc

GROUP_ROWS, PANEL_COLUMNS = 64, 64  # csrc/hopper_tile.cuh, csrc/hopper_ptx.cuh


class TensorMap(Structure):
    _fields_ = (("opaque", c_uint64 * 16),)


TENSOR_MAP_ALIGNMENT = 64


class Strides(Structure):
    _fields_ = tuple((name, c_int64) for name in ("batch", "head", "row"))


class HopperWork(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("key_start", "key_end", "jobs", "next_item")),
        *((name, c_int32) for name in ("num_jobs", "num_items", "num_heads", "num_queries", "tail_heads")),
        ("scale", c_float),
    )


class HopperForwardParams(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("q", "k", "v")),
        *(("out", c_void_p), ("out_strides", Strides)),
        *(("lse_log2", c_void_p), ("head_bounds", c_void_p), ("logit_bound", c_float)),
        ("work", HopperWork),
    )


class HopperDqParams(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("q", "k", "v", "out", "d_out")),
        *(("lse_log2", c_void_p), ("d_lse_log2", c_void_p)),
        *(("dq", c_void_p), ("dq_strides", Strides)),
        *(("delta", c_void_p), ("work", HopperWork)),
    )


class HopperDkdvParams(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("q", "k", "v", "d_out")),
        *(("lse_log2", c_void_p), ("delta", c_void_p)),
        *(("dk", c_void_p), ("dv", c_void_p)),
        *(("dk_strides", Strides), ("dv_strides", Strides)),
        ("work", HopperWork),
    )


class HopperBackwardParams(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("q", "k", "v", "d_out")),
        ("sums", TensorMap * 3),
        *(("out", c_void_p), ("d_out_rows", c_void_p), ("out_strides", Strides), ("d_out_strides", Strides)),
        *((name, c_void_p) for name in ("lse_log2", "d_lse_log2", "dq", "dk", "dv")),
        *((name, Strides) for name in ("dq_strides", "dk_strides", "dv_strides")),
        *((name, c_void_p) for name in ("statistics", "progress", "next_chunk", "next_first_chunk")),
        *((name, c_int32) for name in ("num_slots", "num_chunks", "num_first_heads", "num_batch_heads")),
        *((name, c_int32) for name in ("num_last_heads", "first_slot")),
        ("work", HopperWork),
    )


@dataclass(frozen=True)
class Pass:
    """A kernel template: header, name, the tile of an instance ({names} of TILE_FIELDS, and dtype), parameter."""

    header: str
    kernel: str
    tile: str
    params: type[Structure]


TILE_FIELDS = ("head_dim", "groups", "cols", "stages", "row_stages", "overlap", "blocks_per_sm")
"""The numbers that describe a compiled kernel, in the order of `hopper_forward_tiles` and its like."""
DTYPES = ("kFloat16", "kBFloat16")
PASSES = {
    "forward": Pass(
        "hopper_forward.cuh",
        "hopper_forward_kernel",
        "HopperForwardTile<DType::{dtype}, {head_dim}, "
        "{groups}, {cols}, {stages}, Overlap({overlap}), {blocks_per_sm}>",
        HopperForwardParams,
    ),
    "dq": Pass(
        "hopper_backward_dq.cuh",
        "hopper_dq_kernel",
        "HopperDqTile<DType::{dtype}, {head_dim}, {groups}, {cols}, {stages}, {row_stages}, {blocks_per_sm}>",
        HopperDqParams,
    ),
    "dkdv": Pass(
        "hopper_backward_dkdv.cuh",
        "hopper_dkdv_kernel",
        "HopperDkdvTile<DType::{dtype}, {head_dim}, {groups}, {cols}, {stages}, {row_stages}, {blocks_per_sm}>",
        HopperDkdvParams,
    ),
    "backward": Pass(
        "hopper_backward.cuh",
        "hopper_backward_kernel",
        "HopperBackwardTile<DType::{dtype}, {head_dim}, {groups}, {cols}, {stages}, {row_stages}, {blocks_per_sm}>",
        HopperBackwardParams,
    ),
}
# csrc/hopper_params.h: kChunkQueries, kNumQueues, kSumsBoxRows
CHUNK_QUERIES, NUM_QUEUES, SUMS_BOX_ROWS = 32, 4, 16


def make_source(kind: str, tile: Sequence[int], bfloat16: bool, folder: Path) -> nvrtc.Source:
    """The source of one kernel. kind: of PASSES; tile: the numbers that TILE_FIELDS names; folder: csrc."""
    of = PASSES[kind]
    tile_type = of.tile.format(dtype=DTYPES[bfloat16], **dict(zip(TILE_FIELDS, tile, strict=True)))
    return kernel_source(of.header, of.kernel, tile_type, of.params.__name__, folder)


def kernel_source(header: str, kernel: str, tile_type: str, params: str, folder: Path) -> nvrtc.Source:
    """The source of a kernel template of csrc for one tile type, whose parameter has the type named `params`."""
    text = (
        f'#include "{header}"\n'
        "namespace hmar {\n"
        f"using Tile = {tile_type};\n"
        "template <int kSharedBytes, int kNumThreads, int kParamsBytes> __device__ int launch;\n"
        "}\n"
    )
    # The compiler's name for this instance of `launch` tells the numbers to the host.
    numbers = f"sizeof(hmar::Tile::Shared), hmar::Tile::kNumThreads, sizeof(hmar::{params})"
    names = (f"hmar::{kernel}<hmar::Tile>", f"&hmar::launch<{numbers}>")
    return nvrtc.Source(text, nvrtc.read_headers(header, folder), names, tile_type)


@dataclass(frozen=True)
class LaunchNumbers:
    shared_bytes: int
    num_threads: int
    params_bytes: int


def launch_numbers(binary: nvrtc.Binary) -> LaunchNumbers:
    """What the launch of a kernel of `make_source` needs to know."""
    return LaunchNumbers(*(int(number) for number in re.findall(r"Li(\d+)E", binary.names[1])))


class CudaDriver:
    """What launches need of CUDA: CuPy's bindings, and libcuda itself for what CuPy lacks. ImportError, OSError."""

    FLOAT16, FLOAT32, BFLOAT16 = 6, 7, 9  # CUtensorMapDataType
    INTERLEAVE_NONE, L2_PROMOTION_256B, ZERO_OUTSIDE = 0, 3, 0
    SWIZZLE_NONE, SWIZZLE_64B, SWIZZLE_128B = 0, 2, 3
    MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
    RELAXED = 2  # CUstreamCaptureMode

    def __init__(self) -> None:
        from cupy.cuda import driver, function, runtime

        self._driver, self._function, self._runtime = driver, function, runtime
        libcuda = ctypes.CDLL("libcuda.so.1")
        self._exchange_capture_mode = libcuda.cuThreadExchangeStreamCaptureMode
        self._encode = libcuda.cuTensorMapEncodeTiled
        self._encode.argtypes = (c_void_p, c_int, c_uint32, *(c_void_p,) * 5, *(c_int,) * 4)
        self.release: int = runtime.driverGetVersion()  # of CUDA, that the driver was made for: 13000 for 13.0

    def num_sms(self, device: int) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    @contextlib.contextmanager
    def current_device(self, device: int) -> Iterator[None]:
        previous = self._runtime.getDevice()
        self._runtime.setDevice(device)  # NOTE: even if it is the current one: this thread may have no context yet
        try:
            yield
        finally:
            if previous != device:
                self._runtime.setDevice(previous)

    def load(self, cubin: bytes, name: str, shared_bytes: int) -> tuple[object, int]:
        """(module, function) on the current device, also while a stream captures. The module holds the function."""
        mode = c_int(self.RELAXED)
        self._driver.check_status(self._exchange_capture_mode(ctypes.byref(mode)))
        try:
            module = self._function.Module()
            module.load(cubin)
            function = module.get_function(name).ptr
            self._driver.funcSetAttribute(function, self.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        finally:
            self._driver.check_status(self._exchange_capture_mode(ctypes.byref(mode)))
        return module, function

    def describe(
        self, tensor_map: int, bfloat16: bool, data: int, sizes, strides, box, swizzle: int = SWIZZLE_128B
    ) -> None:
        """Writes a tensor map to its address. Sizes and box: innermost dimension first; strides: bytes, of the rest."""
        self._describe(tensor_map, self.BFLOAT16 if bfloat16 else self.FLOAT16, data, sizes, strides, box, swizzle)

    def describe_float32(self, tensor_map: int, data: int, sizes, strides, box) -> None:
        """The same of float32 numbers, whose boxes lie in shared memory row by row."""
        self._describe(tensor_map, self.FLOAT32, data, sizes, strides, box, self.SWIZZLE_NONE)

    def _describe(self, tensor_map: int, dtype: int, data: int, sizes, strides, box, swizzle: int) -> None:
        rank = len(sizes)
        status = self._encode(
            *(tensor_map, dtype, rank, data),
            *((c_uint64 * rank)(*sizes), (c_uint64 * (rank - 1))(*strides)),
            *((c_uint32 * rank)(*box), (c_uint32 * rank)(*(1,) * rank)),
            *(self.INTERLEAVE_NONE, swizzle, self.L2_PROMOTION_256B, self.ZERO_OUTSIDE),
        )
        self._driver.check_status(status)

    def set_zero(self, address: int, num_bytes: int, stream: int) -> None:
        self._runtime.memsetAsync(address, 0, num_bytes, stream)

    def launch(self, function: int, blocks: int, threads: int, shared_bytes: int, stream: int, params: int) -> None:
        """params: address of the kernel's one parameter, which is copied."""
        parameters = (c_void_p * 1)(params)
        self._driver.launchKernel(
            *(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream), ctypes.addressof(parameters), 0
        )


class CompiledKernels:
    """Kernels of csrc that are compiled, and loaded, when they are first asked for."""

    def __init__(self) -> None:
        self._kernels: dict[tuple, tuple] = {}
        self._lock = threading.Lock()

    @cached_property
    def _compiler(self) -> nvrtc.Compiler:
        return nvrtc.CupyCompiler()

    @cached_property
    def _cuda(self) -> CudaDriver:
        return CudaDriver()

    def hopper_load_error(self, device: int) -> str:
        """Why the kernels cannot be compiled and run on a device; empty when they can. Compiles nothing."""
        try:
            release, driver_release = self._compiler.release, self._cuda.release
            nvrtc.source_folder()
        except ImportError as error:
            return (
                "the extension hmar_kernels._cuda was not built with them, and CuPy, which would compile them, does "
                f"not load ({error}); pip install 'hmar[cupy]', or install hmar again where nvcc is on PATH"
            )
        except (OSError, RuntimeError) as error:
            return f"the extension hmar_kernels._cuda was not built with them, and CuPy cannot compile them: {error}"
        if int(release.split(".")[0]) > driver_release // 1000:
            driver = f"{driver_release // 1000}.{driver_release % 1000 // 10}"
            return f"CuPy's NVRTC {release} makes code for newer drivers than this one, of CUDA {driver}"
        return ""

    def _loaded(
        self, key: tuple, source: Callable[[Path], nvrtc.Source], params: type[Structure]
    ) -> tuple[object, int, LaunchNumbers, int]:
        """(module, function, numbers, SMs) of a kernel on the current device, made on first use.

        key: the kernel and the device. source: from the folder of sources. params: its parameter.
        """
        if key not in self._kernels:
            with self._lock:
                if key not in self._kernels:
                    binary = nvrtc.compiled(source(nvrtc.source_folder()), self._compiler, nvrtc.cache_folder())
                    numbers = launch_numbers(binary)
                    assert numbers.params_bytes == _padded_size(params), "csrc/hopper_params.h has changed"
                    loaded = self._cuda.load(binary.cubin, binary.names[0], numbers.shared_bytes)
                    self._kernels[key] = (*loaded, numbers, self._cuda.num_sms(key[-1]))
        return self._kernels[key]


class HopperKernels(CompiledKernels):
    """The extension's functions for Hopper GPUs: hopper_forward, hopper_dq, hopper_dkdv, hopper_backward, their tiles.

    Arguments of the four are as csrc/bindings.cpp names them: addresses, strides and numbers, already checked.

    Args:
        forward, dq, dkdv, backward: the kernels of each pass, as tuples of the numbers that TILE_FIELDS names. The
            index of a kernel is the number by which the functions know it.
    """

    def __init__(
        self, forward: Sequence[tuple], dq: Sequence[tuple], dkdv: Sequence[tuple], backward: Sequence[tuple]
    ) -> None:
        super().__init__()
        self.hopper_forward_tiles, self.hopper_dq_tiles, self.hopper_dkdv_tiles = list(forward), list(dq), list(dkdv)
        self.hopper_backward_tiles = list(backward)

    def hopper_forward(self, tile, shape, plan, q, k, v, out, lse_log2, head_bounds, bound, device, stream) -> None:
        params = aligned(HopperForwardParams)
        params.out, params.out_strides = out[0], Strides(*out[1])
        params.lse_log2, params.head_bounds, params.logit_bound = lse_log2, head_bounds, bound
        rows, columns = {"q": q}, {"k": k, "v": v}
        self._launch("forward", self.hopper_forward_tiles[tile], params, shape, plan, rows, columns, device, stream)

    def hopper_dq(
        self, tile, shape, plan, q, k, v, out, d_out, lse_log2, d_lse_log2, dq, delta, overlap, device, stream
    ) -> None:
        del overlap  # NOTE: CuPy launches no kernel before the one queued before it has ended
        params = aligned(HopperDqParams)
        params.lse_log2, params.d_lse_log2, params.delta = lse_log2, d_lse_log2, delta
        params.dq, params.dq_strides = dq[0], Strides(*dq[1])
        rows, columns = {"q": q, "out": out, "d_out": d_out}, {"k": k, "v": v}
        self._launch("dq", self.hopper_dq_tiles[tile], params, shape, plan, rows, columns, device, stream)

    def hopper_dkdv(self, tile, shape, plan, q, k, v, d_out, lse_log2, delta, dk, dv, device, stream) -> None:
        params = aligned(HopperDkdvParams)
        params.lse_log2, params.delta = lse_log2, delta
        params.dk, params.dk_strides = dk[0], Strides(*dk[1])
        params.dv, params.dv_strides = dv[0], Strides(*dv[1])
        rows, columns = {"k": k, "v": v}, {"q": q, "d_out": d_out}
        self._launch("dkdv", self.hopper_dkdv_tiles[tile], params, shape, plan, rows, columns, device, stream)

    def hopper_backward(
        self,
        tile,
        shape,
        plan,
        q,
        k,
        v,
        out,
        d_out,
        lse_log2,
        d_lse_log2,
        dq,
        dk,
        dv,
        statistics,
        num_slots,
        num_last_heads,
        device,
        stream,
    ) -> None:
        params, num_queries, num_heads = aligned(HopperBackwardParams), shape[4], shape[2] * shape[3]
        if plan[1] * num_heads == 0:
            return
        params.out, params.out_strides = out[0], Strides(*out[1])
        params.d_out_rows, params.d_out_strides = d_out[0], Strides(*d_out[1])
        params.lse_log2, params.d_lse_log2 = lse_log2, d_lse_log2
        params.dq, params.dq_strides = dq[0], Strides(*dq[1])
        params.dk, params.dk_strides = dk[0], Strides(*dk[1])
        params.dv, params.dv_strides = dv[0], Strides(*dv[1])
        params.statistics, params.num_slots, params.num_last_heads = statistics, num_slots, num_last_heads
        params.first_slot = (num_last_heads - num_heads) % num_slots
        params.next_chunk, params.next_first_chunk, params.progress = (plan[3] + 4 * n for n in (1, 2, NUM_QUEUES))
        params.num_chunks, params.num_batch_heads = -(-num_queries // CHUNK_QUERIES), num_heads
        rows, columns, tile = {"k": k, "v": v}, {"q": q, "d_out": d_out}, self.hopper_backward_tiles[tile]
        num_jobs, blocks_per_sm = plan[1], tile[TILE_FIELDS.index("blocks_per_sm")]
        num_blocks = min(num_jobs * num_heads, self._cuda.num_sms(device) * blocks_per_sm)
        params.num_first_heads = min(num_slots, math.ceil(num_blocks / num_jobs))
        with self._cuda.current_device(device):
            for tensor_map, (address, strides) in zip(params.sums, (dq, dk, dv), strict=True):
                sizes = (shape[1] // 2, num_queries, shape[3], shape[2])
                strides, box = _bytes(sizes, strides), (sizes[0], SUMS_BOX_ROWS, 1, 1)
                self._cuda.describe_float32(ctypes.addressof(tensor_map), address, sizes, strides, box)
        num_counters = NUM_QUEUES + 2 * (num_heads + num_last_heads) + 2
        self._launch("backward", tile, params, shape, plan, rows, columns, device, stream, num_counters)

    def _launch(self, kind, tile, params, shape, plan, rows, columns, device, stream, num_counters=2) -> None:
        """rows: the tensors of which a warpgroup holds its own 64 rows; columns: those that come block by block."""
        bfloat16, head_dim, batch_size, num_heads, num_queries, num_keys, key_start, key_end, scale = shape
        jobs, num_jobs, tail_heads, next_item, set_zero = plan
        num_items = num_jobs * batch_size * num_heads
        tile_of = dict(zip(TILE_FIELDS, tile, strict=True))
        assert tile_of["head_dim"] == head_dim
        if num_items == 0:
            return
        params.work = HopperWork(
            *(key_start, key_end, jobs, next_item, num_jobs, num_items, num_heads, num_queries, tail_heads, scale)
        )
        with self._cuda.current_device(device):
            for tensors, box_rows in ((rows, GROUP_ROWS), (columns, tile_of["cols"])):
                for name, (address, strides) in tensors.items():
                    sizes = (head_dim, num_keys if name in ("k", "v") else num_queries, num_heads, batch_size)
                    self._cuda.describe(
                        ctypes.addressof(params) + getattr(type(params), name).offset,
                        bfloat16,
                        address,
                        sizes,
                        _bytes(sizes, strides),
                        (PANEL_COLUMNS, box_rows, 1, 1),
                    )
            _, function, numbers, num_sms = self._kernel(kind, tile, bfloat16, device)
            blocks = min(num_items, num_sms * tile_of["blocks_per_sm"])
            if set_zero:
                self._cuda.set_zero(next_item, 4 * num_counters, stream)
            self._cuda.launch(
                *(function, blocks, numbers.num_threads, numbers.shared_bytes, stream), ctypes.addressof(params)
            )

    def _kernel(self, kind: str, tile: tuple, bfloat16: bool, device: int) -> tuple[object, int, LaunchNumbers, int]:
        return self._loaded(
            (kind, tile, bfloat16, device),
            lambda folder: make_source(kind, tile, bfloat16, folder),
            PASSES[kind].params,
        )


def _bytes(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides of a tensor map of these sizes, innermost first, from those of 16-bit numbers: of batch, head and row."""
    return [2 * stride if size > 1 else 16 for size, stride in zip(sizes[1:], strides[::-1], strict=True)]


def _padded_size(params: type[Structure]) -> int:
    """sizeof in C++, where structures that hold tensor maps are aligned as these are."""
    return -(-ctypes.sizeof(params) // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT


def aligned(params: type[Structure]):
    """A structure of zeros, aligned for its tensor maps and as long as C++ has it."""
    storage = ctypes.create_string_buffer(_padded_size(params) + TENSOR_MAP_ALIGNMENT)
    return params.from_buffer(storage, -ctypes.addressof(storage) % TENSOR_MAP_ALIGNMENT)
