"""The benchmark harness, run for real on the CPU: work formulas, the check before timing, clocks, the raw JSON."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import rivals, shapes, subject, timing, work
from bench.check import CheckFailed, Oracle, forward_backward
from bench.rivals import IMPLEMENTATIONS, Implementation
from bench.shapes import Cell
from bench.subject import Inputs, examine
from hmar_kernels.accuracy import ROWS

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SIDES = (1, 2, 3, 4, 6)


def cell(pattern="block_causal", **changes):
    return replace(Cell(pattern, SIDES, batch=2, heads=3, head_dim=16, dtype="bfloat16"), **changes)


def bench(*arguments):
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", *arguments]
    # Under xdist pytest-benchmark measures nothing, and these runs are not part of it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


# Shapes and work


def test_a_full_run_has_the_six_published_cells():
    found = {(c.pattern, c.resolution, c.batch, c.heads, c.head_dim, c.dtype, c.length) for c in shapes.cells()}
    sizes = {256: (64, 16, 680), 512: (16, 24, 2240), 1024: (4, 24, 9451)}
    assert found == {
        (pattern, resolution, b, h, 64, "bfloat16", length)
        for pattern in ("block_diagonal", "block_causal")
        for resolution, (b, h, length) in sizes.items()
    }


# Published figures: FLOPs of the forward in units of 1e9, its fewest bytes in MB.
@pytest.mark.parametrize(
    ("pattern", "resolution", "gigaflops", "megabytes"),
    [("block_diagonal", 256, 29, 357), ("block_causal", 512, 321, 440), ("block_causal", 1024, 1400, 465)],
)
def test_work_of_the_published_cells(pattern, resolution, gigaflops, megabytes):
    (c,) = shapes.cells(patterns=[pattern], resolutions=[resolution])
    assert work.flops(c, "forward") / 1e9 == pytest.approx(gigaflops, rel=0.01)
    assert work.fewest_bytes(c, "forward") / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert work.flops(c, "backward") == 2.5 * work.flops(c, "forward")
    assert work.fewest_bytes(c, "backward") == 2 * work.fewest_bytes(c, "forward")


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
    for name in ("flex", "flex_max_autotune", "varlen_flash"):
        result = examine(IMPLEMENTATIONS[name], inputs)
        assert result.status == "unavailable" and "CUDA" in result.reason
    causal = examine(IMPLEMENTATIONS["varlen_flash"], Inputs(cell("block_causal"), CPU))
    assert causal.status == "unavailable" and "cu_seqlens" in causal.reason


def test_default_rivals_on_a_gpu_are_the_fair_ones():
    names = {entry.name for entry in rivals.choose(None, torch.device("cuda"))}
    assert {"triton", "flex", "varlen_flash", "flash_per_scale", "sdpa_dense"} <= names
    assert "flex_max_autotune" not in names
    with pytest.raises(ValueError, match="known are reference, triton"):
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
    ],
    ids=["nan", "scaled", "rows_missing", "other_image", "dtype", "gradient"],
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


# The whole harness


def test_a_run_writes_raw_results_that_pytest_benchmark_agrees_with(tmp_path):
    raw, stats = tmp_path / "deep" / "raw.json", tmp_path / "stats.json"
    done = bench(
        "--benchmark-only", "--device", "cpu", "--seconds", "0.01", "--commit", "abc123",
        "--output", str(raw), "--benchmark-json", str(stats),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(raw.read_text())
    assert (content["kind"], content["version"]) == ("attention", 1)
    assert content["environment"]["commit"] == "abc123"
    assert content["environment"]["torch"] == torch.__version__
    assert content["ceilings"]["copy_gb_per_s"] > 0 and content["ceilings"]["matmul_tflops"] > 0
    rows = content["results"]
    names = ["reference", "flash_per_scale", "sdpa_dense"]
    assert [(r["pattern"], r["impl"], r["direction"]) for r in rows] == [
        (pattern, name, direction)
        for pattern in ("block_diagonal", "block_causal")
        for name in names
        for direction in ("forward", "backward")
    ]
    medians = {(b["group"], b["name"]): b["stats"]["median"] for b in json.loads(stats.read_text())["benchmarks"]}
    for row in rows:
        assert row["status"] == "ok" and row["rounds"] >= 10
        assert 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"]
        assert math.isfinite(row["ms"]) and row["peak_bytes"] is None
        assert set(row["check"]) == {"out", "dq", "dk", "dv"}
        group = f"{row['pattern']}-64-b2h3d16-bfloat16 {row['direction']}"
        assert 1e3 * medians[group, row["impl"]] == pytest.approx(row["ms"], rel=1e-4)


def test_a_run_can_be_narrowed(tmp_path):
    raw = tmp_path / "raw.json"
    done = bench(
        "--benchmark-only", "--device", "cpu", "--seconds", "0.01", "--output", str(raw), "--impl", "flex",
        "--impl", "sdpa_dense", "--pattern", "block_causal", "--direction", "forward", "--sides", "1,2,5",
        "--batch", "1", "--heads", "2", "--head-dim", "32", "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(raw.read_text())["results"]
    assert [(r["impl"], r["status"]) for r in rows] == [("flex", "unavailable"), ("sdpa_dense", "ok")]
    assert rows[0]["ms"] is None and "CUDA" in rows[0]["reason"]
    for row in rows:
        assert (row["sides"], row["length"], row["pairs"]) == ([1, 2, 5], 30, 1 + 4 * 5 + 25 * 30)
        assert (row["batch"], row["heads"], row["head_dim"], row["dtype"]) == (1, 2, 32, "float32")


def test_a_mistyped_option_is_explained():
    done = bench("--device", "cpu", "--impl", "flashier")
    assert done.returncode == 4
    assert "unknown implementation 'flashier'; known are reference, triton" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"patterns": ["dense"]}, "known are block_diagonal, block_causal"),
        ({"resolutions": [300]}, "known are 256, 512, 1024"),
        ({"resolutions": [256], "sides": (1, 2)}, "either resolutions or sides"),
    ],
)
def test_unknown_shapes_are_explained(choices, message):
    with pytest.raises(ValueError, match=message):
        shapes.cells(**choices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_suite_skips_and_says_why():
    done = bench("--benchmark-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout and "passed" not in done.stdout
