"""The sampling operator: truncation against its definition, draws against their distribution, kernels against the
reference (Triton's under its interpreter, and compiled without a GPU; csrc/sample_rows.cuh, as it stands, by the
emulation of cuda_on_cpu/)."""

import ctypes
import json
import math
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl

import kernel_on_cpu
from hmar_kernels import SampledCodes, sample_codes
from hmar_kernels.sampling import choose, cuda, reference
from hmar_kernels.sampling import triton as triton_kernel
from other_process import answer

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_sampling_gpu.py runs the kernel")


def draw_logits(*shape, seed=0, dtype=torch.float32):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def draw(logits, unconditional=None, impl="reference", **options):
    B, n, _ = logits.shape
    options.setdefault("seeds", torch.arange(B) * 2**40 + 5)
    options.setdefault("positions", torch.arange(n))
    return sample_codes(logits, unconditional, impl=impl, **options)


# --- the kernels on the CPU -------------------------------------------------------------------------------------------

POINTERS = ("logits", "unconditional", "guidance", "seeds", "positions", "places", "codes", "confidence", "nonfinite")


class Params(ctypes.Structure):
    """SampleRowsParams of csrc/sample_rows.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in POINTERS[:2]),
        *((f"{name}_strides", ctypes.c_int64 * 2) for name in POINTERS[4:]),
        ("seed_stride", ctypes.c_int64),
        ("wanted_share", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_images", "num_tokens", "num_codes", "top_k", "step")),
        ("inverse_temperature", ctypes.c_float),
        *((name, ctypes.c_bool) for name in ("greedy", "marks_only", "whole_loads")),
    )


class Emulation:
    """What stands in for the extension. last_first: the order of threads. groups: of four codes, that a thread has, 0
    for those of a launch. previous: what the kernel before writes, which this one must not read before it has waited.
    """

    def __init__(self, folder):
        headers = ("sample_rows.cuh", "sample_rows.h", "hopper_params.h")
        self.library = kernel_on_cpu.build(folder, "sample_rows", "hopper_ptx.cuh", headers)
        self.library.sample_rows_on_cpu.restype = ctypes.c_char_p
        self.last_first, self.groups, self.previous, self.calls = False, 0, (), []

    def sample_rows(
        self, *, addresses, row_strides, seed_stride, strides, shape, logit_type, overlap, device, stream, **numbers
    ):
        self.calls.append(numbers | {"overlap": overlap})
        strides = [(ctypes.c_int64 * len(of_one))(*of_one) for of_one in (*row_strides, *strides)]
        names = ("wanted_share", "top_k", "step", "inverse_temperature", "greedy", "marks_only", "whole_loads")
        assert numbers.keys() == set(names)
        share, top_k, step, *others = (numbers[name] for name in names)
        params = Params(*addresses, *strides, seed_stride, share, *shape, top_k, step, *others)
        pieces = [part for tensor in self.previous for part in (tensor.data_ptr(), tensor.numel() * tensor.itemsize)]
        groups = self.groups or (2 if shape[2] <= 4096 else 4)
        failure = self.library.sample_rows_on_cpu(
            ctypes.byref(params),
            logit_type,
            groups,
            (ctypes.c_int64 * len(pieces))(*pieces),
            len(pieces) // 2,
            self.last_first,
        )
        assert failure is None, failure.decode()


@pytest.fixture(scope="module")
def built_emulation(tmp_path_factory):
    return Emulation(tmp_path_factory.mktemp("sample_rows"))


@pytest.fixture
def emulation(built_emulation, monkeypatch):
    """impl="cuda" is then the emulation."""
    monkeypatch.setattr(cuda.extension, "module", built_emulation)
    monkeypatch.setattr(cuda, "unavailable", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    built_emulation.last_first, built_emulation.groups, built_emulation.previous = False, 0, ()
    built_emulation.calls.clear()
    return built_emulation


RUNNABLE = [pytest.param("triton", marks=interpreted), "cuda", "cuda, last thread first"]


def prepared(request):
    impl, *schedule = request.param.split(", ")
    if impl == "cuda":
        request.getfixturevalue("emulation").last_first = bool(schedule)
    return impl


kernel = pytest.fixture(params=RUNNABLE, name="kernel")(prepared)
implementation = pytest.fixture(params=["reference", *RUNNABLE], name="impl")(prepared)


# --- truncation -------------------------------------------------------------------------------------------------------


def truncated_set(logits, top_k, top_p):
    """top-k with ties, then the smallest set of likeliest codes that reaches p, in exact arithmetic."""
    kept = set(range(len(logits)))
    if 0 < top_k < len(logits):
        kth = sorted(logits, reverse=True)[top_k - 1]
        kept = {i for i in kept if logits[i] >= kth}
    if not 0 < top_p < 1:
        return kept
    weights = {i: Fraction(math.exp(logits[i] - max(logits))) for i in kept}
    wanted, reached, chosen = Fraction(top_p) * sum(weights.values()), Fraction(0), set()
    for i in sorted(kept, key=lambda i: (logits[i], i), reverse=True):
        if reached >= wanted:
            break
        chosen.add(i)
        reached += weights[i]
    return chosen


TRUNCATIONS = [(0, 0.0), (5, 0.0), (0, 0.7), (8, 0.6), (1, 0.9), (20, 0.01), (50, 0.999), (0, 1.0), (7, 1e-12)]


@pytest.mark.parametrize("top_k, top_p", TRUNCATIONS)
@pytest.mark.parametrize("distinct", [1000, 4], ids=["distinct", "ties"])
def test_truncation_is_the_set_of_its_definition(top_k, top_p, distinct):
    logits = draw_logits(40, 20, dtype=torch.float64)
    if distinct == 4:
        logits = logits.round().clamp(-1, 2)
    kept = reference.kept_codes(logits, top_k, top_p)
    for row, kept_row in zip(logits.tolist(), kept, strict=True):
        assert set(kept_row.nonzero().flatten().tolist()) == truncated_set(row, top_k, top_p)


def test_truncation_keeps_all_that_tie_with_the_kth():
    kept = reference.kept_codes(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2, 0.0)
    assert kept.tolist() == [False, True, True, True, False]


def test_top_p_takes_equal_codes_from_the_end():
    kept = reference.kept_codes(torch.zeros(8), 0, 0.5)
    assert kept.nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_shares_are_exact_where_the_product_exceeds_64_bits():
    for total, top_p in ((2**52 - 1, 1 - 2**-31), (2**40, 0.3), (2**62 + 12345, 0.96)):
        expected = -(-total * reference.share(top_p) // 2**reference.SHARE_BITS)
        assert reference.wanted_mass(torch.tensor(total), top_p).item() == expected


# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    words = reference.philox(torch.tensor([key]), tuple(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in words) == expected


def test_noise_is_exponential_far_into_both_tails():
    noise = reference.exponential_noise(torch.arange(8), torch.arange(64).expand(8, 64), 0, 4096).flatten().double()
    assert noise.min() > 0 and noise.isfinite().all()
    for below in (1e-5, 1e-3, 0.1, 1.0, 5.0, 12.0):
        expected = -math.expm1(-below) * len(noise)
        deviation = ((noise < below).sum().item() - expected) / math.sqrt(expected * math.exp(-below))
        assert abs(deviation) < 4.5, below


def test_noise_depends_on_seed_position_and_step_and_on_nothing_else():
    seeds, positions = torch.tensor([3, 2**45 + 3]), torch.tensor([[0, 7], [7, 1]])
    noise = reference.exponential_noise(seeds, positions, 2, 10)
    assert torch.equal(noise[0, 1], reference.exponential_noise(seeds[:1], torch.tensor([[7]]), 2, 10)[0, 0])
    assert torch.equal(noise[..., :9], reference.exponential_noise(seeds, positions, 2, 9))
    others = [noise[1, 0], noise[0, 0], reference.exponential_noise(seeds[:1], torch.tensor([[7]]), 3, 10)[0, 0]]
    assert all((other != noise[0, 1]).all() for other in others)


# --- draws ------------------------------------------------------------------------------------------------------------


def chi_square_quantile(degrees, deviations):
    """Wilson and Hilferty's approximation of the chi-square quantile `deviations` of a normal above the mean."""
    return degrees * (1 - 2 / (9 * degrees) + deviations * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.9, "temperature": 1.7}, {"top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("guided", [False, True])
def test_draws_follow_the_distribution(options, guided):
    n, V = 40_000, 12
    conditional, unconditional = draw_logits(2, V).split(1)
    logits = 1.5 * conditional - 0.5 * unconditional if guided else conditional
    halves = [half.expand(1, n, V) for half in ((conditional, unconditional) if guided else (conditional,))]
    codes, confidence, nonfinite = draw(*halves, guidance=0.5 if guided else None, **options)
    x = (logits[0] / options.get("temperature", 1.0)).double()
    kept = sorted(truncated_set(x.tolist(), options.get("top_k", 0), options.get("top_p", 0.0)))
    probs = x[kept].softmax(0)
    counts = torch.bincount(codes[0], minlength=V)
    assert counts[kept].sum() == n
    chi_square = ((counts[kept] - n * probs).square() / (n * probs)).sum()
    assert chi_square < chi_square_quantile(len(kept) - 1, 4)
    assert chi_square > chi_square_quantile(len(kept) - 1, -4)
    expected = torch.zeros(V, dtype=torch.float64).index_put((torch.tensor(kept),), probs)
    torch.testing.assert_close(confidence[0].double(), expected[codes[0]], rtol=1e-5, atol=1e-7)
    assert not nonfinite.any()


def test_draws_of_neighbouring_tokens_steps_and_seeds_are_independent():
    """Pairs of two equally likely codes are uniform on four cells."""
    logits = torch.zeros(64, 500, 2)
    codes = draw(logits, seeds=torch.arange(64)).codes
    other_step = draw(logits, seeds=torch.arange(64), step=1).codes
    for first, second in ((codes[:, :-1], codes[:, 1:]), (codes[:-1], codes[1:]), (codes, other_step)):
        counts = torch.bincount((2 * first + second).flatten(), minlength=4).double()
        expected = counts.sum() / 4
        assert ((counts - expected).square() / expected).sum() < chi_square_quantile(3, 4)


def test_a_draw_does_not_depend_on_its_batch():
    logits = draw_logits(5, 6, 33)
    seeds, positions = torch.tensor([9, 2**61, 0, 9, 4]), torch.arange(6).expand(5, 6)
    whole = draw(logits, seeds=seeds, positions=positions, top_p=0.9)
    for b in range(5):
        for n in range(6):
            one = draw(logits[b : b + 1, n : n + 1], seeds=seeds[b : b + 1], positions=torch.tensor([n]), top_p=0.9)
            assert all(torch.equal(x[0, 0], y[b, n]) for x, y in zip(one, whole, strict=True))


def test_greedy_takes_the_most_likely_with_its_plain_probability():
    logits = draw_logits(2, 5, 9)
    codes, confidence, _ = draw(logits, greedy=True, top_k=1, temperature=0.3)
    assert torch.equal(codes, logits.argmax(-1))
    torch.testing.assert_close(confidence, logits.softmax(-1).amax(-1))
    assert draw(torch.zeros(1, 1, 7), greedy=True).codes.item() == 0, "the first of equals"


# --- logits that are not finite ---------------------------------------------------------------------------------------

BROKEN = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("value", BROKEN)
def test_logits_that_are_not_finite_are_reported(impl, value, greedy):
    conditional, unconditional = draw_logits(2, 3, 9), draw_logits(2, 3, 9, seed=1)
    expected = draw(conditional, unconditional, impl, guidance=0.5, greedy=greedy)
    conditional[0, 1, 8], unconditional[1, 2, 0] = value, value
    actual = draw(conditional, unconditional, impl, guidance=0.5, greedy=greedy)
    assert actual.nonfinite.nonzero().tolist() == [[0, 1], [1, 2]]
    assert actual.codes[actual.nonfinite].tolist() == [0, 0] and actual.confidence[actual.nonfinite].isnan().all()
    for before, after in zip(expected, actual, strict=True):
        assert torch.equal(before[~actual.nonfinite], after[~actual.nonfinite])


def test_guidance_that_overflows_is_reported():
    drawn = draw(torch.full((1, 1, 4), 3e38), torch.full((1, 1, 4), -3e38), guidance=1.0)
    assert drawn.nonfinite.all()


# --- the kernels and the reference ------------------------------------------------------------------------------------


def assert_same_draws(actual, expected):
    assert torch.equal(actual.codes, expected.codes)
    torch.testing.assert_close(actual.confidence, expected.confidence, rtol=1e-5, atol=1e-9)
    assert torch.equal(actual.nonfinite, expected.nonfinite)


@pytest.mark.parametrize("top_k, top_p", TRUNCATIONS)
@pytest.mark.parametrize("num_codes", [3, 37])
def test_kernel_equals_the_reference(kernel, num_codes, top_k, top_p, poisoned_memory):
    halves = draw_logits(2, 2, 2, num_codes)
    seeds, positions = torch.tensor([2**62 + 1, 77]), torch.tensor([[4, 700], [3, 2**31 - 1]])
    for logits in (halves, halves.round().clamp(-1, 2), -halves.abs(), halves.half(), 0 * -halves):
        options = dict(seeds=seeds, positions=positions, guidance=torch.tensor([0.0, 2.5]), top_k=top_k, top_p=top_p)
        expected = draw(*logits, **options, step=3, temperature=0.8)
        assert_same_draws(draw(*logits, impl=kernel, **options, step=3, temperature=0.8), expected)


def assert_written(device, impl):
    """At their places of what is there already, any strides, and nothing else; what was not finite stays so."""
    logits, positions = draw_logits(3, 4, 9).to(device), torch.arange(4, device=device) + 50
    logits[1, 2, 3] = math.nan
    seeds = torch.tensor([3, 2**40, 5], device=device)
    options = {"seeds": seeds, "positions": positions, "top_k": 5}
    drawn = sample_codes(logits, impl=impl, **options)
    for places in (torch.tensor([[6, 0, 3, 5], [0, 1, 2, 3], [3, 6, 5, 4]], device=device), None):
        size = 4 if places is None else 7
        codes = torch.arange(3 * 2 * size, device=device).view(3, 2 * size)[:, ::2] + 100
        confidence = torch.arange(3.0 * size, device=device).view(size, 3).T + 100
        into = SampledCodes(codes, confidence, torch.tensor([True, False, False], device=device))
        at = torch.arange(4, device=device).expand(3, 4) if places is None else places
        expected = codes.scatter(1, at, drawn.codes), confidence.scatter(1, at, drawn.confidence)
        written = sample_codes(logits, impl=impl, into=into, at=places, **options)
        assert written.codes is codes and written.confidence is confidence and written.nonfinite is into.nonfinite
        assert torch.equal(codes, expected[0]) and into.nonfinite.tolist() == [True, True, False]
        torch.testing.assert_close(confidence, expected[1], rtol=0, atol=0, equal_nan=True)


def test_draws_are_written_into_their_places(impl):
    assert_written("cpu", impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_draws_are_written_into_their_places_on_a_gpu(impl):
    if impl == "cuda" and (reason := cuda.unavailable(torch.device("cuda", 0), torch.float32, 9)) is not None:
        pytest.skip(reason)
    assert_written("cuda", impl)


def test_kernel_with_the_published_vocabulary_and_any_strides(kernel):
    logits = draw_logits(4096, 2, 3, dtype=torch.float32).permute(1, 2, 0)
    for options in ({}, {"top_k": 900, "top_p": 0.96}, {"greedy": True}):
        assert_same_draws(draw(logits, impl=kernel, **options), draw(logits, **options))


@pytest.mark.parametrize("top_k, top_p", [(5, 0.0), (0, 0.9), (20, 0.7)])
def test_kernel_with_logits_of_any_size(kernel, top_k, top_p):
    """From the smallest floats to the largest, neighbours that differ in the last bit, and one far above the others."""
    generator = torch.Generator().manual_seed(2)
    signs = torch.randint(2, (1, 1, 40), generator=generator) * 2.0 - 1
    wide = signs * 10 ** (76 * torch.rand(1, 1, 40, generator=generator) - 38)
    near = torch.nextafter(torch.ones(1, 1, 40), 2 * signs)
    alone = torch.cat([1e-3 * wide.sign() + near, torch.full((1, 1, 1), 1e30)], dim=-1)
    for logits in (wide, near, alone, -alone):
        options = {"top_k": top_k, "top_p": top_p}
        assert_same_draws(draw(logits, impl=kernel, **options), draw(logits, **options))


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.51, 0.99])
def test_kernel_keeps_the_same_ties(kernel, top_p):
    """Equal codes, of which top-p cuts through the middle: every code that may be drawn is, and no other."""
    logits = torch.tensor([0.0, -0.0, 1.0, 1.0, -3.0, 1.0, 0.0, 1.0]).expand(1, 40, 8)
    drawn = draw(logits, impl=kernel, top_p=top_p)
    assert set(drawn.codes.flatten().tolist()) == truncated_set(logits[0, 0].tolist(), 0, top_p)
    assert_same_draws(drawn, draw(logits, top_p=top_p))


def test_kernel_takes_the_likeliest_of_near_ties(impl):
    """Logits so near each other that all their weights round to 1."""
    logits = torch.tensor([1e-9, 3e-9, 2e-9, 3e-9, -1e-9]).expand(1, 2, 5)
    assert draw(logits, impl=impl, greedy=True).codes.tolist() == [[1, 1]]


@pytest.mark.parametrize("top_k, top_p", [(700, 0.0), (0, 0.6), (900, 0.3)])
def test_kernel_with_many_equal_codes(kernel, top_k, top_p):
    """More of them than are compared with each other: bins are divided until they hold one value alone."""
    logits = draw_logits(1, 2, 1000).clamp(-0.5, 0.5)
    assert_same_draws(draw(logits, impl=kernel, top_k=top_k, top_p=top_p), draw(logits, top_k=top_k, top_p=top_p))
    # And neighbours, among others far away
    crowded = (1 + torch.arange(1000) * 2.0**-23).view(1, 1, 1000)
    crowded[..., 0], crowded[..., 1] = -3e38, 3.0
    assert_same_draws(draw(crowded, impl=kernel, top_k=top_k, top_p=top_p), draw(crowded, top_k=top_k, top_p=top_p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_cuda_kernel_reads_whole_and_single_codes(emulation, dtype):
    """Rows that begin at multiples of four numbers, and others; the larger kernel; what comes before is waited for."""
    storage = draw_logits(2, 2, 3, 72, dtype=dtype)
    for halves, whole in ((storage, True), (storage[..., 1:66], False), (storage[..., :66], True)):
        for emulation.groups in (2, 4):
            guidance, places = torch.tensor([1.5, 0.5]), torch.tensor([[2, 0, 4], [1, 3, 0]])
            into = SampledCodes(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5), torch.zeros(2).bool())
            emulation.previous = (storage, guidance, places)
            draw(*halves, impl="cuda", guidance=guidance, top_k=20, into=into, at=places, overlap=True)
            expected = draw(*halves, guidance=guidance, top_k=20)
            found = SampledCodes(into.codes.gather(1, places), into.confidence.gather(1, places), expected.nonfinite)
            assert_same_draws(found, expected)
            assert not into.nonfinite.any() and (into.codes == 0).sum() >= 4
            assert (emulation.calls[-1]["whole_loads"], emulation.calls[-1]["overlap"]) == (whole, True)


def test_seeds_are_read_where_they_are(kernel):
    """A copy of them might still be under way where a kernel begins before its end."""
    logits, table = draw_logits(3, 4, 9), torch.tensor([[2**40, 1], [7, 2], [5, 3]])
    for seeds in (table[:, 0], torch.tensor([6]).expand(3)):
        assert_same_draws(draw(logits, impl=kernel, seeds=seeds, top_p=0.9), draw(logits, seeds=seeds, top_p=0.9))


@pytest.mark.parametrize(
    "options, codes, reason",
    [
        ({"top_k": 900}, 4096, None),
        ({"top_p": 0.96}, 4096, None),
        ({"top_k": 900, "top_p": 0.96, "greedy": True}, 4096, "nothing is truncated"),
        ({"top_k": 4096, "top_p": 1.0}, 4096, "nothing is truncated"),
        ({}, 8192, "nothing is truncated"),
        ({"top_k": 900}, 8192, "up to 4096 codes, got 8192"),
    ],
    ids=str,
)
def test_auto_takes_the_faster_kernel(monkeypatch, options, codes, reason):
    """Of those that can run; it says why."""
    logits = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 2, codes))
    monkeypatch.setattr(cuda, "unavailable", lambda *arguments: None)
    monkeypatch.setattr(triton_kernel, "unavailable", lambda *arguments: None)
    impl, why = choose(logits, **options)
    assert impl == ("cuda" if reason is None else "triton") and (reason or "without a search") in why
    monkeypatch.setattr(cuda, "unavailable", lambda *arguments: "not built")
    impl, why = choose(logits, **options)
    assert impl == "triton" and (reason or "not built") in why
    monkeypatch.setattr(triton_kernel, "unavailable", lambda *arguments: "too old")
    assert choose(logits, **options) == ("reference", "too old")
    assert choose(torch.zeros(1, 2, 8))[0] == "reference"


def test_cuda_kernel_with_its_largest_vocabulary(emulation):
    logits = draw_logits(1, 1, cuda.MAX_CODES)
    for options in ({"top_p": 0.9}, {"top_k": 4000, "top_p": 0.5}):
        assert_same_draws(draw(logits, impl="cuda", **options), draw(logits, **options))


def test_cuda_kernel_needs_its_device():
    with pytest.raises(ValueError, match="it needs a CUDA device, got cpu"):
        draw(torch.zeros(1, 1, 8), impl="cuda")
    assert "at most 8192 codes, got 8193" in cuda.unavailable(torch.device("cuda", 0), torch.float32, 8193)
    assert "not torch.float64" in cuda.unavailable(torch.device("cuda", 0), torch.float64, 8)


def test_operator_is_traceable():
    op = torch.ops.hmar_kernels.sample_codes
    with torch._subclasses.FakeTensorMode():
        logits, seeds = torch.empty(2, 3, 16), torch.empty(2, dtype=torch.int64)
        codes, confidence, nonfinite = op(
            logits, None, None, seeds, torch.empty(2, 3, dtype=torch.int64), 0, 1.0, 0, 0.0, False, True, "cuda"
        )
    assert (codes.dtype, confidence.dtype, nonfinite.dtype) == (torch.int64, torch.float32, torch.bool)
    assert codes.shape == confidence.shape == nonfinite.shape == (2, 3)


COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hmar_kernels.sampling import triton as sampling

kernel, report = sampling._sample_kernel, []
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
integers = {"seeds": "i64", "positions": "i64", "places": "i64", "codes": "i64", "nonfinite": "i1"}
types = {"guidance": "fp32", "confidence": "fp32", **integers}
for arch, dtype, truncated, greedy, into in json.loads(sys.argv[1]):
    constants = {"GUIDED": True, "GREEDY": greedy, "TOP_K": truncated, "TOP_P": truncated, "BLOCK_V": 4096}
    constants |= {"PLACED": into, "INTO": into}
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument.endswith("_strides"):
            last = 2 if argument in ("logits_strides", "unconditional_strides") else 1
            signature[argument] = ("i32",) * last + ("constexpr",)
            constexprs[i, last] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(last)}
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + types.get(argument.removesuffix("_ptr"), dtype)
            attributes[i,] = [["tt.divisibility", 16]]
        elif argument in constants:
            signature[argument] = "constexpr"
            constexprs[i,] = constants[argument]
        else:
            signature[argument] = "fp32" if argument == "inverse_temperature" else "i32"
    attributes[kernel.arg_names.index("num_codes"),] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": sampling.num_warps(4096), "enable_fp_fusion": False},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = "".join(
            subprocess.run([cuobjdump, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    stack = int(re.search(r"STACK:(\\d+)", text).group(1))
    wide = text.count("LDG.E.64" if dtype == "bf16" else "LDG.E.128")
    report.append({"stack": stack, "spills": text.count("STL"), "shared": compiled.metadata.shared, "wide": wide})
print(json.dumps(report))
"""


def test_kernel_compiles_for_gpus_without_spills():
    """Rows stay in registers, are read in wide loads, and shared memory serves reductions alone."""
    jobs = [(80, "bf16", True, False, False), (90, "fp32", True, False, True), (90, "bf16", False, True, True)]
    report = answer(COMPILE, json.dumps(jobs))
    assert len(report) == len(jobs)
    for usage in report:
        assert usage["stack"] == usage["spills"] == 0 and usage["shared"] <= 256 and usage["wide"] >= 4, usage


# --- refusals ---------------------------------------------------------------------------------------------------------


def empty(*shape):
    codes = torch.zeros(*shape, dtype=torch.int64)
    return SampledCodes(codes, torch.zeros(*shape), torch.zeros(shape[0], dtype=torch.bool))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(2, 3, 0)}, "logits must be floats"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, "logits must be floats"),
        ({"unconditional": torch.zeros(2, 3, 5), "guidance": 1.0}, "shape and dtype"),
        ({"unconditional": torch.zeros(2, 3, 4)}, "unconditional is given without guidance"),
        ({"guidance": 1.0}, "guidance is given without unconditional"),
        ({"unconditional": torch.zeros(2, 3, 4), "guidance": torch.ones(3)}, r"float32 \[2\]"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must be int64 \[2\]"),
        ({"seeds": torch.zeros(2)}, r"seeds must be int64 \[2\]"),
        ({"positions": torch.arange(4)}, r"positions must be int64 \[3\]"),
        ({"step": -1}, "step is -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"impl": "cublas"}, "unknown impl"),
        ({"impl": "triton", "logits": torch.zeros(2, 3, 4, dtype=torch.float64)}, "not torch.float64"),
        ({"at": torch.zeros(2, 3, dtype=torch.int64)}, "at is given without into"),
        ({"into": empty(2, 4)}, r"into.codes must be torch.int64 \[2, 3\]"),
        ({"into": empty(2, 4), "at": torch.zeros(3, dtype=torch.int64)}, r"at must be torch.int64 \[2, 3\]"),
        ({"into": empty(2, 3)._replace(nonfinite=torch.zeros(2, 3))}, r"into.nonfinite must be torch.bool \[2\]"),
        ({"into": empty(2, 3)._replace(confidence=torch.zeros(2, 3, device="meta"))}, "into.confidence is on meta"),
    ],
)
def test_bad_input_is_refused(change, message):
    options = {"logits": torch.zeros(2, 3, 4), "impl": "auto"} | change
    with pytest.raises(ValueError, match=message):
        draw(**options)


@interpreted
@pytest.mark.parametrize("top_k, top_p", [(1000, 0.99), (900, 0.96), (650, 0.99)])
def test_reductions_over_a_row_are_few(top_k, top_p, monkeypatch):
    """All warps of a program wait for each other at each."""
    calls, rows = Counter(), 8
    for name in ("sum", "min", "max"):
        reduce = getattr(tl, name)
        monkeypatch.setattr(tl, name, lambda *a, name=name, reduce=reduce, **o: calls.update([name]) or reduce(*a, **o))
    draw(draw_logits(1, rows, 4096), impl="triton", top_k=top_k, top_p=top_p)
    assert 20 * rows < calls.total() < 32 * rows
