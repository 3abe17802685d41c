"""The benchmark harness as a whole, run for real on the CPU: raw results, choices, crashes, going on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.attention_results import AttentionResults, row_without_numbers
from bench.environment import environment
from bench.shapes import Cell
from rival_files import GOOD_RIVAL, written

ROOT = Path(__file__).resolve().parents[1]


def bench(*arguments):
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", *arguments]
    # Under xdist pytest-benchmark measures nothing, and these runs are not part of it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


QUICK = ("--benchmark-only", "--device", "cpu", "--seconds", "0.01")
ONE_CELL = ("--patterns", "block_causal", "--sides", "1,2,5", "--impl", "sdpa_dense")


def statuses(path):
    return {(r["impl"], r["direction"]): r["status"] for r in json.loads(path.read_text())["results"]}


def test_a_run_writes_raw_results_that_pytest_benchmark_agrees_with(tmp_path):
    raw, stats = tmp_path / "deep" / "raw.json", tmp_path / "stats.json"
    done = bench(*QUICK, "--commit", "abc123", "--output", str(raw), "--benchmark-json", str(stats))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(raw.read_text())
    assert (content["kind"], content["version"], content["complete"]) == ("attention", 2, True)
    assert list(raw.parent.iterdir()) == [raw]
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
        assert row["status"] == "ok" and row["rounds"] >= 10 and row["commit"] == "abc123"
        assert 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"] and row["host_us"] > 0
        assert math.isfinite(row["ms"]) and row["peak_bytes"] is None
        assert set(row["check"]) == {"out", "dq", "dk", "dv"}
        group = f"{row['pattern']}-64-b2h3d16-bfloat16 {row['direction']}"
        assert 1e3 * medians[group, row["impl"]] == pytest.approx(row["ms"], rel=1e-4)


def test_a_run_can_be_narrowed(tmp_path):
    raw = tmp_path / "raw.json"
    done = bench(
        *QUICK, "--output", str(raw), "--impl", "flex,sdpa_dense", "--patterns", "block_causal,window_2",
        "--directions", "forward", "--sides", "1,2,5", "--batches", "1", "--heads", "2", "--head-dims", "32",
        "--head-dims", "64", "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(raw.read_text())["results"]
    found = {(r["head_dim"], r["pattern"], r["impl"], r["direction"]): r["status"] for r in rows}
    assert found == {
        (head_dim, pattern, impl, "forward"): status
        for head_dim in (32, 64)
        for pattern in ("block_causal", "window_2")
        for impl, status in (("flex", "unavailable"), ("sdpa_dense", "ok"))
    }
    for row in rows:
        assert row["status"] == "ok" or (row["ms"] is None and "CUDA" in row["reason"])
        pairs = 1 + 4 * 5 + 25 * (30 if row["pattern"] == "block_causal" else 29)
        assert (row["sides"], row["length"], row["pairs"]) == ([1, 2, 5], 30, pairs)
        assert (row["batch"], row["heads"], row["dtype"]) == (1, 2, "float32")


def test_a_run_survives_what_implementations_do(tmp_path):
    """One ends the process, one raises in its backward, one has the wrong shape; the others are measured."""
    died = written(tmp_path, "import os\ndef prepare(cell, device):\n    os.abort()", "dies.py")
    text = GOOD_RIVAL.replace("stranger", "shrinks").replace("attn_mask=dense)", "attn_mask=dense)[:, :-1]")
    shrinks = written(tmp_path, text, "shrinks.py")
    raises = written(
        tmp_path,
        "import torch\n"
        "class Fails(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, q, k, v):\n        return q.clone()\n"
        "    @staticmethod\n    def backward(ctx, grad):\n        raise NotImplementedError('backward: not yet')\n"
        "def prepare(cell, device):\n    return Fails.apply\n",
        "raises.py",
    )
    raw = tmp_path / "raw.json"
    files = [option for path in (died, shrinks, raises) for option in ("--rival", str(path))]
    done = bench(*QUICK, *ONE_CELL, *files, "--output", str(raw))
    assert done.returncode == 1, done.stdout + done.stderr  # all is measured first
    for name, reason in (
        ("dies", "the process died of SIGABRT"),
        ("shrinks", "CheckFailed: out is torch.bfloat16 [2, 2, 30, 16]"),
        ("raises", "NotImplementedError: backward: not yet"),
    ):
        assert f"error: {name}, given by --rival, failed in 2 of the rows above: {reason}" in done.stdout
    assert statuses(raw) == {
        (impl, direction): status
        for impl, status in (("sdpa_dense", "ok"), ("dies", "crashed"), ("shrinks", "failed"), ("raises", "failed"))
        for direction in ("forward", "backward")
    }
    rows = {r["impl"]: r for r in json.loads(raw.read_text())["results"]}
    assert rows["dies"]["reason"] == "the process died of SIGABRT" and rows["dies"]["ms"] is None
    assert rows["dies"]["flops"] == rows["sdpa_dense"]["flops"]
    assert rows["shrinks"]["reason"].startswith("CheckFailed: out is torch.bfloat16 [2, 2, 30, 16]")
    assert rows["raises"]["reason"] == "NotImplementedError: backward: not yet"
    assert "crashed: the process died of SIGABRT" in done.stdout


def test_a_rival_that_is_right_or_does_not_apply_fails_no_run(tmp_path):
    rival = ("--rival", str(written(tmp_path, GOOD_RIVAL)), "--impl", "reference", "--sides", "1,2,5")
    done = bench(*QUICK, *rival, "--output", str(tmp_path / "raw.json"))
    assert done.returncode == 0 and "given by --rival" not in done.stdout, done.stdout + done.stderr
    assert statuses(tmp_path / "raw.json")["stranger", "forward"] == "ok"  # block-causal, the last of the two masks


def test_a_killed_run_goes_on(tmp_path):
    """From what the killed process has left: a row that counts, one that failed, something at work."""
    raw, partial = tmp_path / "raw.json", tmp_path / "raw.json.partial"
    raw.write_text("of an earlier run")
    left = AttentionResults(partial)
    left.head = {"environment": environment(torch.device("cpu"), "one"), "ceilings": {"copy_gb_per_s": 7}, "method": {}}
    cell = Cell("block_causal", (1, 2, 5), batch=2, heads=3, head_dim=16, dtype="bfloat16")
    row = row_without_numbers(cell, "sdpa_dense", False, "forward", "ok", None)
    left.add(row | {"commit": "one", "ms": 123.0, "host_us": 4.0})
    left.add(row | {"impl": "flash_per_scale", "status": "failed", "commit": "one"})
    left.begin([row | {"direction": "backward"}])

    command = (*QUICK, "--patterns", "block_causal", "--sides", "1,2,5", "--output", str(raw), "--commit", "one")
    done = bench(*command, "--continue")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout and not partial.exists()
    assert set(statuses(raw).values()) == {"ok"} and len(statuses(raw)) == 6
    content = json.loads(raw.read_text())
    times = {(r["impl"], r["direction"]): r["ms"] for r in content["results"]}
    assert [key for key, ms in times.items() if ms == 123.0] == [("sdpa_dense", "forward")]
    assert content["ceilings"] == {"copy_gb_per_s": 7} and content["complete"] and content["running"] == []


def test_there_must_be_something_to_continue(tmp_path):
    done = bench(*QUICK, "--output", str(tmp_path / "none.json"), "--continue")
    assert done.returncode == 4 and "there to go on from" in done.stdout + done.stderr


def test_a_run_stops_when_its_minutes_are_over(tmp_path):
    raw = tmp_path / "raw.json"
    done = bench(*QUICK, *ONE_CELL, "--output", str(raw), "--minutes", "0")
    assert done.returncode == 0 and "2 skipped" in done.stdout and "minutes of this run are over" in done.stdout
    assert not raw.exists()


def test_a_mistyped_option_is_explained():
    done = bench("--device", "cpu", "--impl", "flashier")
    assert done.returncode == 4
    assert "unknown implementation 'flashier'; known are reference, hopper, hopper_b" in done.stdout + done.stderr
    for option, text, message in (
        ("--impl", ",", "expected at least one name"),
        ("--seconds", "-1", "expected a number of seconds above 0"),
    ):
        done = bench("--device", "cpu", f"{option}={text}")
        assert done.returncode == 4 and f"{option}: {message}" in done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_suite_skips_and_says_why():
    done = bench("--benchmark-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout and "passed" not in done.stdout
