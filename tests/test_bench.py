"""The parts of the benchmark harness, on the CPU: shapes, work, the check before timing, clocks, rivals, results."""

import argparse
import json
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import conftest, options, rivals, shapes, subject, supervisor, timing, work
from bench.attention_results import AttentionResults
from bench.check import CheckFailed, Oracle, forward_backward
from bench.rivals import IMPLEMENTATIONS, Implementation
from bench.shapes import Cell
from bench.subject import Inputs, examine
from hmar_kernels.accuracy import ROWS
from rival_files import GOOD_RIVAL, written

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SIDES = (1, 2, 3, 4, 6)


def cell(pattern="block_causal", **changes):
    return replace(Cell(pattern, SIDES, batch=2, heads=3, head_dim=16, dtype="bfloat16"), **changes)


# Shapes and work


SIZES = {256: (64, 16, 680), 512: (16, 24, 2240), 1024: (4, 24, 9451)}


def published(batches=(None,)):
    """(pattern, resolution, batch, heads, head dim, length): heads halve where the head dim doubles."""
    return [
        (pattern, resolution, batch or b, h * 64 // d, d, length)
        for batch in batches
        for d in (64, 128)
        for pattern in ("block_diagonal", "block_causal")
        for resolution, (b, h, length) in SIZES.items()
    ]


def listed(cells):
    return [(c.pattern, c.resolution, c.batch, c.heads, c.head_dim, c.length) for c in cells]


def test_a_default_run_has_the_published_cells_at_both_head_dims():
    cells = shapes.cells()
    assert listed(cells) == published() and {c.dtype for c in cells} == {"bfloat16"}
    bytes_at = {d: {work.tensor_bytes(c) for c in cells if c.head_dim == d} for d in (64, 128)}
    assert bytes_at[64] == bytes_at[128]


def test_a_full_run_adds_batches_and_densities_in_between():
    cells = shapes.cells(full=True)
    assert listed(cells)[:36] == published(batches=(None, 8, 1))
    assert listed(cells[36:]) == [(f"window_{n}", 1024, 4, 24, 64, 9451) for n in (2, 4)]
    densities = [c.mask().density for c in (cells[2], *cells[36:], cells[5])]
    assert densities == sorted(densities) and len(set(densities)) == 4


def test_cells_can_be_chosen():
    chosen = shapes.cells(batches=[2, shapes.ANCHOR, 16], head_dims=[128], resolutions=[512], patterns=["window_3"])
    assert listed(chosen) == [("window_3", 512, 2, 12, 128, 2240), ("window_3", 512, 16, 12, 128, 2240)]
    assert listed(shapes.cells(sides=(1, 2, 5), heads=3, head_dims=[32], patterns=["block_causal"])) == [
        ("block_causal", 80, 64, 3, 32, 30)
    ]


# Published figures: FLOPs of the forward in units of 1e9, its fewest bytes in MB.
@pytest.mark.parametrize(
    ("pattern", "resolution", "gigaflops", "megabytes"),
    [("block_diagonal", 256, 29, 357), ("block_causal", 512, 321, 440), ("block_causal", 1024, 1400, 465)],
)
def test_work_of_the_published_cells(pattern, resolution, gigaflops, megabytes):
    c, wide = shapes.cells(patterns=[pattern], resolutions=[resolution])
    assert work.flops(wide, "forward") == work.flops(c, "forward")
    assert work.flops(c, "forward") / 1e9 == pytest.approx(gigaflops, rel=0.01)
    assert work.fewest_bytes(c, "forward") / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert work.flops(c, "backward") == 2.5 * work.flops(c, "forward")
    assert work.fewest_bytes(c, "backward") == 2 * work.fewest_bytes(c, "forward")
    row_statistics = 4 * c.batch * c.heads * c.length
    assert work.fewest_extra_bytes(c, "forward") == work.fewest_bytes(c, "forward") / 4 + row_statistics
    assert work.fewest_extra_bytes(c, "backward") == work.fewest_bytes(c, "forward") + 2 * row_statistics


def test_flops_follow_the_mask_and_not_the_dense_matrix():
    diagonal, causal = cell("block_diagonal"), cell("block_causal")
    assert work.flops(diagonal, "forward") == 4 * sum(n**4 for n in SIDES) * 16 * 2 * 3
    assert work.flops(diagonal, "forward") < work.flops(causal, "forward") < 4 * causal.length**2 * 16 * 2 * 3


@pytest.mark.parametrize(
    "changes", [{"pattern": "dense"}, {"dtype": "int8"}, {"batch": 0}, {"head_dim": 0}, {"sides": (3, 2)}]
)
def test_a_cell_that_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match=r"known|at least 1|never shrink"):
        cell(**changes)


# Implementations


@pytest.mark.parametrize("pattern", shapes.PATTERNS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["reference", "flash_per_scale", "sdpa_dense"])
def test_what_runs_on_a_cpu_passes_its_check(name, dtype, pattern):
    result = examine(IMPLEMENTATIONS[name], Inputs(cell(pattern, dtype=dtype), CPU))
    assert (result.status, result.reason) == ("ok", None)
    assert all(0 <= d["error"] <= d["limit"] < 0.05 for d in result.deviations.values())


def test_what_needs_a_gpu_says_so():
    inputs = Inputs(cell("block_diagonal"), CPU)
    for name in ("flex", "flex_max_autotune", "varlen_flash", "flash4_varlen", "flash4_per_scale"):
        result = examine(IMPLEMENTATIONS[name], inputs)
        assert result.status == "unavailable" and "CUDA" in result.reason
    for name in ("varlen_flash", "flash4_varlen"):
        causal = examine(IMPLEMENTATIONS[name], Inputs(cell("block_causal"), CPU))
        assert causal.status == "unavailable" and "cu_seqlens" in causal.reason


def flash_attention_4(monkeypatch, lse):
    """The interface of flash-attn-4 on [B,L,H,D] and [tokens,H,D], computed by SDPA; some releases return lse too."""

    def dense(q, k, v):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, None) if lse else out

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        edges = cu_seqlens_q.tolist()
        assert edges == cu_seqlens_k.tolist() and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(edges))
        parts = [dense(q[None, a:b], k[None, a:b], v[None, a:b]) for a, b in pairwise(edges)]
        out = torch.cat([p[0][0] if lse else p[0] for p in parts])
        return (out, None) if lse else out

    monkeypatch.setattr(rivals, "_flash_attention_4", lambda: (dense, varlen))


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(
    ("name", "pattern"),
    [("flash4_varlen", "block_diagonal"), ("flash4_per_scale", "block_diagonal"), ("flash4_per_scale", "block_causal")],
)
def test_flash_attention_4_is_called_as_its_interface_wants(monkeypatch, name, pattern, lse):
    flash_attention_4(monkeypatch, lse)
    entry = replace(IMPLEMENTATIONS[name], unavailable=rivals.anywhere)
    result = examine(entry, Inputs(cell(pattern), CPU))
    assert (result.status, result.reason) == ("ok", None)


def test_flash_attention_4_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    rivals._flash_attention_4.cache_clear()
    try:
        reason = rivals.flash_attention_4_takes(False, cell(), SimpleNamespace(type="cuda"))
        assert "flash-attn-4 is not installed" in reason
    finally:
        rivals._flash_attention_4.cache_clear()


def test_an_older_version_without_an_implementation_is_no_error(monkeypatch):
    monkeypatch.setattr(rivals.hmar_kernels, "IMPLEMENTATIONS", ("reference", "triton"))
    assert rivals.IMPLEMENTATIONS["hopper"].unavailable(cell(), CPU) == "this version of hmar_kernels has no hopper"


def test_default_rivals_on_a_gpu_are_the_fair_ones():
    names = {entry.name for entry in rivals.choose(None, torch.device("cuda"))}
    assert names == set(IMPLEMENTATIONS) - {"reference"}
    fair = {"flex", "flex_max_autotune", "varlen_flash", "flash4_varlen", "flash4_per_scale", "flash_per_scale"}
    assert fair | {"triton", "sdpa_dense"} <= names
    with pytest.raises(ValueError, match="known are reference, hopper"):
        rivals.choose(["triton", "flashier"], CPU)


# The check


def implementation(spoil):
    """The reference with something done to its output."""

    def prepare(cell, device):
        attend = rivals.own("reference", cell, device)
        return lambda q, k, v: spoil(attend(q, k, v))

    return Implementation("spoilt", prepare, rivals.anywhere)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.05


def one_nan(out):
    out = out.clone()
    out[1, 0, 5, 3] = float("nan")  # not in an (image, head) that is compared with the oracle
    return out


def zero_last_rows(out):
    return torch.cat([out[:, :, :-ROWS], torch.zeros_like(out[:, :, -ROWS:])], dim=2)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (one_nan, "out has 1 non-finite"),
        (lambda out: out * 1.05, "out is off by"),
        (zero_last_rows, "out is off by"),
        (lambda out: out.roll(1, dims=0), "out is off by"),
        (lambda out: out.float(), "out is torch.float32"),
        (WrongGradient.apply, "dq is off by"),
        (lambda out: out[:, :, :-1], "out is torch.bfloat16 [2, 3, 65, 16], expected torch.bfloat16 [2, 3, 66, 16]"),
        (lambda out: (out, None), "attend(q, k, v) returned tuple, expected one tensor"),
        (torch.Tensor.detach, "must be differentiable"),
    ],
    ids=["nan", "scaled", "rows_missing", "other_image", "dtype", "gradient", "shape", "tuple", "detached"],
)
def test_a_wrong_result_is_never_timed(spoil, reason):
    result = examine(implementation(spoil), Inputs(cell(), CPU))
    assert result.status == "failed" and reason in result.reason
    assert result.attend is None


def test_the_rule_protects_rows_with_small_outputs():
    """Late rows of a large pyramid average thousands of values: their outputs are far below those of early rows."""
    c = Cell("block_causal", (1, 2, 3, 24), batch=1, heads=1, head_dim=16, dtype="bfloat16")
    inputs = Inputs(c, CPU)
    attend = rivals.own("reference", c, CPU)
    out, *gradients = forward_backward(attend, inputs.q, inputs.k, inputs.v, inputs.do)
    assert out[:, :, -ROWS:].abs().mean() < 0.1 * out.abs().max()
    inputs.oracle.compare((out, *gradients))
    with pytest.raises(CheckFailed, match="out is off by"):
        inputs.oracle.compare((zero_last_rows(out), *gradients))


def test_the_oracle_is_float64_and_covers_first_and_last_head():
    inputs = Inputs(cell(), CPU)
    oracle = Oracle(inputs.q, inputs.k, inputs.v, inputs.do, inputs.cell.mask())
    assert oracle.pairs[0] == (0, 0) and oracle.pairs[-1] == (1, 2)
    assert all(x.dtype == torch.float64 for pair in oracle.expected for x in pair)


def test_errors_of_an_implementation_are_recorded():
    def explode(cell, device):
        raise RuntimeError("no kernel image\nand a long trace")

    def exhaust(cell, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    inputs = Inputs(cell(), CPU)
    failed = examine(Implementation("x", explode, rivals.anywhere), inputs)
    assert (failed.status, failed.reason) == ("failed", "RuntimeError: no kernel image")
    exhausted = examine(Implementation("x", exhaust, rivals.anywhere), inputs)
    assert exhausted.status == "out of memory"
    assert exhausted.peak_bytes == dict.fromkeys(subject.DIRECTIONS)
    left = examine(Implementation("x", lambda cell, device: sys.exit("no licence"), rivals.anywhere), inputs)
    assert (left.status, left.reason) == ("failed", "SystemExit: no licence")
    nothing = examine(Implementation("x", lambda cell, device: None, rivals.anywhere), inputs)
    assert "prepare returned NoneType, expected a function" in nothing.reason


# Time


def test_quantiles_interpolate():
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.quantile([1.0, 2.0], 0.1) == pytest.approx(1.1)
    assert timing.quantile([7.0], 0.9) == 7.0


def test_the_host_clock_measures_the_call_and_not_its_preparation(monkeypatch):
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds

    def prepared(durations):
        durations = iter(durations)
        return lambda: work(1000.0) or next(durations)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    watch = timing.Stopwatch(CPU)
    assert watch.host_seconds(work, prepared([3.0, 1.0, 50.0, 2.0, 4.0])) == 3.0
    assert watch.seconds(work, prepared([70.0, 80.0, 5.0, 60.0, 4.0])) == 5.0  # two rounds before the three that count


def test_overhead_is_that_of_a_call_among_several_and_waits_for_nothing_in_between(monkeypatch):
    now, waits = 0.0, []

    def work(seconds):
        nonlocal now
        now += seconds

    durations = iter([1.0] * timing.OVERHEAD_CALLS + [2.0] * 100)  # the first loop is faster than the others
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    watch = timing.Stopwatch(CPU)
    monkeypatch.setattr(watch, "synchronize", lambda: waits.append(now))
    assert watch.overhead_seconds(work, lambda: work(1000.0) or next(durations)) == 2.0
    assert len(waits) == timing.OVERHEAD_LOOPS + 1


@pytest.mark.gpu
def test_the_device_clock_measures_the_device_and_not_the_host():
    watch = timing.Stopwatch(torch.device("cuda"))
    x = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def fill_then_linger(_):
        x.zero_()
        time.sleep(0.005)

    def linger_between(_):
        x.zero_()
        time.sleep(0.005)
        x.zero_()

    alone = watch.seconds(lambda _: x.zero_())
    assert watch.seconds(fill_then_linger) < 1.5 * alone + 0.002
    assert watch.seconds(linger_between) < 3 * alone + 0.002


@pytest.mark.gpu
def test_peak_memory_counts_outputs_gradients_and_inputs():
    c = Cell("block_diagonal", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), batch=8, heads=4, head_dim=64, dtype="bfloat16")
    result = examine(IMPLEMENTATIONS["triton"], Inputs(c, torch.device("cuda")))
    assert result.status == "ok", result.reason
    tensor = work.tensor_bytes(c)
    assert 4 * tensor <= result.peak_bytes["forward"] < 4.3 * tensor  # q k v out, row statistics
    assert 8 * tensor <= result.peak_bytes["backward"] < 8.6 * tensor


# Rivals from files


def test_a_file_defines_a_rival(tmp_path):
    path = written(tmp_path, GOOD_RIVAL)
    chosen = rivals.choose(["triton"], CPU, [path])
    assert [entry.name for entry in chosen] == ["triton", "stranger"] and not chosen[1].ours
    assert rivals.choose(None, CPU, [path])[-1].name == "stranger"
    assert examine(chosen[1], Inputs(cell("block_causal"), CPU)).status == "ok"
    assert examine(chosen[1], Inputs(cell("block_diagonal"), CPU)).reason == "block-causal only"
    nameless = written(tmp_path, GOOD_RIVAL.replace('NAME = "stranger"', ""))
    assert rivals.load_rival(nameless).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("def attend(q, k, v):\n    return q", r"has no function prepare\(cell, device\)"),
        ("import flashier", "raises when it is loaded: ModuleNotFoundError: No module named 'flashier'"),
        ("raise SystemExit(3)", "raises when it is loaded: SystemExit: 3"),
        ("def prepare(cell, device)\n    pass", "raises when it is loaded: SyntaxError"),
        (GOOD_RIVAL.replace("stranger", "triton"), "the name 'triton' is taken"),
        (GOOD_RIVAL.replace('"stranger"', "7"), "NAME is 7, expected a string"),
        (GOOD_RIVAL + "unavailable = True", "unavailable is bool, expected a function"),
    ],
)
def test_a_file_that_defines_no_rival_is_explained(tmp_path, text, message):
    path = tmp_path / "mine.py" if text is None else written(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        rivals.choose(None, CPU, [path])


# Results, processes, options


def test_results_of_another_machine_are_not_continued(tmp_path):
    path = tmp_path / "raw.json"
    results = AttentionResults(path)
    here = dict.fromkeys(("gpu", "driver", "torch", "cuda", "triton", "flash_attn_4"), "x")
    results.head = {"environment": here, "ceilings": {}, "method": {}}
    results.write(complete=False)
    read = AttentionResults.read(path, path)
    read.check_environment(here | {"commit": "another"})
    with pytest.raises(ValueError, match=r"measured with torch x, here it is 9\.0"):
        read.check_environment(here | {"torch": "9.0"})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    with pytest.raises(ValueError, match="version 1; only 'attention' version 2 is continued"):
        AttentionResults.read(path, path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be continued: JSONDecodeError"):
        AttentionResults.read(path, path)


def test_only_measurements_of_this_code_are_kept():
    row = {"status": "ok", "ours": True, "commit": "a"}
    assert conftest.Run.is_valid(row, "a") and not conftest.Run.is_valid(row, "b")
    assert conftest.Run.is_valid(row | {"ours": False}, "b") and not conftest.Run.is_valid(
        row | {"status": "crashed"}, "a"
    )


# What the measuring process does, in a script without torch: each start takes the next of its acts.
ACTS = """
import json, os, pathlib, signal, sys, time
journal = pathlib.Path(sys.argv[sys.argv.index("--journal") + 1])
started = journal.with_name("started")
count = int(started.read_text()) if started.exists() else 0
started.write_text(str(count + 1))
assert ("--restarted" in sys.argv) == (count > 0)
row = lambda impl: {"pattern": "p", "sides": [1], "batch": 1, "heads": 1, "head_dim": 1, "dtype": "d", "impl": impl,
                    "direction": "forward", "ours": impl == "triton", "status": "crashed", "reason": None}
if journal.exists():
    content = json.loads(journal.read_text())
else:
    content = {"kind": "attention", "version": 2, "environment": {}, "ceilings": {}, "method": {}, "results": []}
def write(running, rows=()):
    content["running"], content["results"] = running, content["results"] + list(rows)
    journal.write_text(json.dumps(content))
"""


@pytest.mark.parametrize(
    ("acts", "status", "recorded"),
    [
        # it hangs, is killed, and the next process ends well: that ours crashed is in the exit status
        (["write([row('triton')]); time.sleep(600)", "pass"], 1, {"triton": "killed: no result within 1 s"}),
        (["write([row('flex')]); time.sleep(600)", "pass"], 0, {"flex": "killed: no result within 1 s"}),
        (["write([row('flex')]); os.kill(os.getpid(), 11)", "sys.exit(1)"], 1, {"flex": "the process died of SIGSEGV"}),
        (["write([row('flex')]); os._exit(9)", "pass"], 0, {"flex": "the process ended with exit status 9"}),
        # the device is lost: the process has written the row itself
        (["write([], [row('flex')]); os._exit(75)", "pass"], 0, {"flex": None}),
        # it was ended on purpose
        (["write([row('flex')]); os.kill(os.getpid(), 15)", "1 / 0"], 143, {}),
        (["write([row('flex')]); sys.exit(2)", "1 / 0"], 2, {}),
        # it dies before it begins anything: trying again would not help
        (["os.abort()", "1 / 0"], 1, None),
        (["write([row('a')]); os.abort()", "os.abort()"], 1, {"a": "the process died of SIGABRT"}),
    ],
)
def test_the_supervisor_goes_on_after_a_crash(tmp_path, acts, status, recorded):
    script, journal = tmp_path / "acts.py", tmp_path / "raw.json.partial"
    script.write_text(ACTS + "".join(f"if count == {i}:\n    {act}\n" for i, act in enumerate(acts)))
    assert supervisor.supervise([str(script)], journal, 1.0, tmp_path) == status
    assert journal.exists() == (recorded is not None)
    if recorded is not None:
        assert {r["impl"]: r["reason"] for r in json.loads(journal.read_text())["results"]} == recorded


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (options.names, ",", "expected at least one name, several with commas between them; got ','"),
        (options.names, "", "expected at least one name"),
        (options.integers, " , ", "expected at least one name"),
        (options.seconds, "-0.5", "expected a number of seconds above 0, such as 0.3; got '-0.5'"),
        (options.seconds, "0", "expected a number of seconds above 0"),
        (options.seconds, "nan", "expected a number of seconds above 0"),
        (options.seconds, "soon", "expected a number of seconds above 0"),
        (options.integers, "64,x", "expected integers and commas, such as 64,128; got '64,x'"),
        (options.batches, "anker", "expected integers and commas"),
        (options.directions, "forward,sideways", "unknown direction 'sideways'; known are forward, backward"),
    ],
)
def test_a_malformed_option_is_explained(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"patterns": ["dense"]}, "known are block_diagonal, block_causal, window_1"),
        ({"patterns": ["window_0"]}, "unknown pattern 'window_0'"),
        ({"resolutions": [300]}, "known are 256, 512, 1024"),
        ({"resolutions": [256], "sides": (1, 2)}, "either resolutions or sides"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"head_dims": [0]}, "head_dim must be at least 1"),
    ],
)
def test_unknown_shapes_are_explained(choices, message):
    with pytest.raises(ValueError, match=message):
        shapes.cells(**choices)
