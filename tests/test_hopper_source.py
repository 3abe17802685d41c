"""The Hopper attention kernels' own source on the CPU: every kernel of the tile table, against the reference.

cuda_on_cpu/hopper_ptx.cuh takes the place of the instructions: jobs, rings, descriptors, swizzles, operands in
registers, masks, the heads of the one-pass backward and the launch's parameters are those of csrc and hopper_launch.py.
What it takes for granted of wgmma and the copy engine, and time, is for the tests on a GPU (test_attention_gpu.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import kernel_on_cpu
from attention_cases import assert_within_limits, draw_inputs, oracles, small_masks
from hmar_kernels import SpanMask
from hmar_kernels.attention import hopper, hopper_launch
from hmar_kernels.attention.plan import key_jobs, query_jobs

HEADERS = (
    *("hopper_forward.cuh", "hopper_backward.cuh", "hopper_backward_dq.cuh", "hopper_backward_dkdv.cuh"),
    *("hopper_tile.cuh", "hopper_params.h"),
)
TABLE = hopper.table()
KERNELS = [(kind, tile) for kind, tiles in TABLE.items() for tile in tiles]
LOG2E = math.log2(math.e)
NUM_SMS = 2


def name_of(kind, tile, bfloat16):
    return "_".join(map(str, (kind, *tile, "bf16" if bfloat16 else "fp16")))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper_attention")
    tiles, kernels = [], []
    for number, (kind, tile) in enumerate(KERNELS):
        of = hopper_launch.PASSES[kind]
        for bfloat16 in (False, True):
            fields = dict(zip(hopper_launch.TILE_FIELDS, tile, strict=True))
            alias = f"Tile{number}{'hb'[bfloat16]}"
            tiles.append(f"using {alias} = {of.tile.format(dtype=hopper_launch.DTYPES[bfloat16], **fields)};\n")
            name = name_of(kind, tile, bfloat16)
            kernels.append(f'KERNEL("{name}", {of.kernel}, {alias}, {of.params.__name__})\n')
    (folder / "tiles.inc").write_text("".join(tiles))
    (folder / "kernels.inc").write_text("".join(kernels))
    loaded = kernel_on_cpu.build(folder, "hopper_attention", "hopper_ptx.cuh", HEADERS)
    loaded.run_on_cpu.restype = ctypes.c_char_p
    return loaded


class Driver:
    """hopper_launch.CudaDriver, whose functions are names of kernels."""

    def __init__(self, library, last_thread_first):
        self.library, self.last_thread_first, self.side_by_side = library, last_thread_first, False
        self.late_warp = -1

    def num_sms(self, device):
        return NUM_SMS

    def current_device(self, device):
        return contextlib.nullcontext()

    def describe(self, tensor_map, bfloat16, data, sizes, strides, box):
        rank, array = len(sizes), ctypes.c_uint64 * len(sizes)
        self.library.describe(
            *(ctypes.c_void_p(tensor_map), ctypes.c_void_p(data), rank, array(*sizes)),
            *((ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box)),
        )

    def describe_float32(self, tensor_map, data, sizes, strides, box):
        self.describe(tensor_map, None, data, sizes, strides, box)

    def set_zero(self, address, num_bytes, stream):
        ctypes.memset(address, 0, num_bytes)

    def launch(self, function, blocks, threads, shared_bytes, stream, params):
        schedule = self.last_thread_first, self.side_by_side, self.late_warp
        if function.startswith(b"backward"):
            self._allow_copies(hopper_launch.HopperBackwardParams.from_address(params), int(function.split(b"_")[1]))
        failure = self.library.run_on_cpu(function, ctypes.c_void_p(params), blocks, *schedule)
        assert failure is None, failure.decode()

    def _allow_copies(self, params, head_dim):
        """From out, do, sums and statistics of the next launch only, [batch, head, row, D]: elsewhere they fail."""
        heads, rows = params.work.num_heads, params.work.num_queries
        sizes = params.num_batch_heads // heads, heads, rows
        ranges = [(params.statistics, 8 * params.num_slots * rows)]
        for name in ("out", "d_out", "dq", "dk", "dv"):
            strides = getattr(params, f"{name}_strides")
            last = sum(
                (n - 1) * getattr(strides, field) for n, field in zip(sizes, ("batch", "head", "row"), strict=True)
            )
            ranges.append((getattr(params, "d_out_rows" if name == "d_out" else name), 2 * (last + head_dim)))
        for begin, num_bytes in ranges:
            self.library.allow_copies_from(ctypes.c_void_p(begin), ctypes.c_void_p(begin + num_bytes))


class Kernels(hopper_launch.HopperKernels):
    def __init__(self, library, last_thread_first):
        super().__init__(**TABLE)
        self.__dict__["_cuda"] = Driver(library, last_thread_first)

    def _kernel(self, kind, tile, bfloat16, device):
        name = name_of(kind, tile, bfloat16).encode()
        return None, name, hopper_launch.LaunchNumbers(0, self._cuda.library.num_threads_of(name), 0), NUM_SMS


@pytest.fixture(params=[False, True], ids=["copies at once", "copies late"])
def on_cpu(library, monkeypatch, request):
    """hopper.forward and hopper.backward on CPU tensors, in either order of threads."""
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=NUM_SMS))
    monkeypatch.setattr(hopper, "_kernels", Kernels(library, request.param))
    monkeypatch.setattr(hopper, "_queues", {})
    return monkeypatch


def forward(mask, tile, q, k, v, scale, logit_bound=math.inf):
    jobs = query_jobs(mask, tile[1], tile[2], "cpu").jobs
    number = TABLE["forward"].index(tile)
    return hopper.forward(q, k, v, *mask.intervals("cpu"), jobs, number, scale, logit_bound)


def backward(mask, tiles, q, k, v, out, lse, d_out, d_lse, scale):
    """tiles: of dq, and of dkdv or backward."""
    make = {"dq": query_jobs, "dkdv": key_jobs, "backward": key_jobs}
    jobs = [make[kind](mask, tile[1], tile[2], "cpu").jobs for kind, tile in tiles.items()]
    numbers = [TABLE[kind].index(tiles[kind]) if kind in tiles else -1 for kind in hopper.PASSES[1:]]  # -1: may not run
    # What the kernels are given is of log2 units.
    lse, d_lse = torch.where(lse == -math.inf, math.inf, lse * LOG2E).contiguous(), d_lse / LOG2E
    return hopper.backward(d_out, d_lse, q, k, v, out, lse, *mask.intervals("cpu"), *jobs, numbers, scale)


MASKS = {name: mask for name, mask in small_masks().items() if name in ("random_intervals", "blind_queries", "window2")}
MASKS["pyramid"] = SpanMask.block_diagonal([1, 9, 81, 144])
MASKS["causal pyramid"] = SpanMask.block_causal([1, 36, 64, 130])
SCALE = 0.2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def ids(tile):
    return "-".join(map(str, tile)) if isinstance(tile, tuple) else None


def draw(mask, head_dim, dtype, batch=1, heads=2):
    packed = mask.num_queries == mask.num_keys
    q, k, v, d_out, d_lse = draw_inputs(mask, batch, heads, head_dim, dtype, "cpu", packed=packed)
    return q, k, v, d_out, d_lse * (mask.key_end > mask.key_start)


def check(mask, dtype, head_dim, outputs, tiles, *sizes):
    """outputs: of the forward, or None for those of the reference. tiles: of a backward. sizes: images, heads."""
    inputs = q, k, v, d_out, d_lse = draw(mask, head_dim, dtype, *sizes)
    expected, eager = oracles(inputs, mask, SCALE)
    out, lse = expected[0].to(dtype), expected[1].float()
    if outputs is not None:
        out, lse = outputs(q, k, v)[0], hopper.natural_lse(outputs(q, k, v)[1])
    gradients = [x.to(dtype) for x in expected[2:]]
    if tiles is not None:
        gradients = backward(mask, tiles, q, k, v, out, lse, d_out, d_lse, SCALE)
    assert_within_limits((out, lse, *gradients), expected, eager, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [math.inf, 60.0])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tile", TABLE["forward"], ids=ids)
def test_forward(tile, name, bound, dtype, on_cpu):
    mask = MASKS[name]
    check(mask, DTYPES[dtype], tile[0], lambda q, k, v: forward(mask, tile, q, k, v, SCALE, bound), None)


TWO_PASSES = [{"dq": dq, "dkdv": dkdv} for dq in TABLE["dq"] for dkdv in TABLE["dkdv"] if dq[0] == dkdv[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tiles", TWO_PASSES, ids=lambda tiles: "-".join(map(str, tiles["dkdv"])))
def test_two_passes(tiles, name, dtype, on_cpu):
    check(MASKS[name], DTYPES[dtype], tiles["dq"][0], None, tiles)


def one_pass(tile):
    (dq,) = (dq for dq in TABLE["dq"] if dq[0] == tile[0])
    return {"dq": dq, "backward": tile}


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tile", TABLE["backward"], ids=ids)
def test_one_pass(tile, name, slots, on_cpu):
    on_cpu.setattr(hopper, "LEAST_SHARE", 0)
    on_cpu.setattr(hopper, "num_slots", lambda *_: slots)
    check(MASKS[name], torch.bfloat16, tile[0], None, one_pass(tile))


SUMS_MASKS = {name: MASKS[name] for name in ("causal pyramid", "random_intervals")}
SUMS_MASKS["keys that nobody sees"] = SpanMask.from_intervals([0] * 290, [40] * 290, num_keys=300)


@pytest.mark.parametrize("num_sms", [2, 8], ids=["block after block", "side by side"])
@pytest.mark.parametrize(
    ("batch", "heads", "slots"),
    [(1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 4, 3), (2, 3, 6), (1, 9, 4), (1, 9, 5)],
)
@pytest.mark.parametrize("name", SUMS_MASKS)
@pytest.mark.parametrize("tile", TABLE["backward"], ids=ids)
def test_sums_in_gradients(tile, name, batch, heads, slots, num_sms, on_cpu, poisoned_memory):
    """Of the last heads, written later. Slots for fewer heads than there are, for all, for more than have sums."""
    on_cpu.setattr(hopper, "LEAST_SHARE", 0)
    on_cpu.setattr(hopper, "num_slots", lambda *_: slots)
    on_cpu.setattr(sys.modules[__name__], "NUM_SMS", num_sms)
    on_cpu.setattr(hopper._kernels._cuda, "side_by_side", num_sms == 8)
    mask, made, empty = SUMS_MASKS[name], [], torch.empty
    on_cpu.setattr(torch, "empty", lambda *shape, **options: made.append(empty(*shape, **options)) or made[-1])
    check(mask, torch.bfloat16, tile[0], None, one_pass(tile), batch, heads)
    assert hopper.num_last_heads(slots, batch, heads, mask.num_queries, mask.num_keys) == -(-slots // 3)
    (storage,) = (x for x in made if x.dtype == torch.float32)
    of_heads = 8 * (batch * heads + -(-slots // 3))
    assert 4 * storage.numel() <= 8 * slots * mask.num_queries + of_heads + 56  # statistics and counters


LATE_MASKS = {
    "one block a job": SpanMask.full(60, 384),
    "keys that nobody sees": SUMS_MASKS["keys that nobody sees"],
    "some blocks": SpanMask.from_intervals([0] * 150, [384] * 150, num_keys=384),
}


ROLES = ("computes", "computes, of the second group", "fetches", "counts", "serves")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", LATE_MASKS)
@pytest.mark.parametrize("tile", TABLE["backward"], ids=ids)
def test_one_pass_whatever_warp_is_late(tile, name, role, on_cpu, poisoned_memory):
    """One warp is behind all others by as much as can be, after every arrival at a barrier and every wait."""
    computing = 4 * (tile[1] + (tile[0] == 64))  # warps, with those of dq
    late_warp = dict(zip(ROLES, (0, 5, computing, computing + 1, computing + 2), strict=True))[role]
    on_cpu.setattr(hopper, "LEAST_SHARE", 0)
    on_cpu.setattr(hopper, "num_slots", lambda *_: 3)
    on_cpu.setattr(hopper._kernels._cuda, "side_by_side", True)
    on_cpu.setattr(hopper._kernels._cuda, "late_warp", late_warp)
    check(LATE_MASKS[name], torch.bfloat16, tile[0], None, one_pass(tile), 1, 6)
