"""Profiles of the attention kernels: how ncu is called, what is read from it, and which launch is whose."""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from bench import profile_attention as bench
from bench import shapes
from hmar_kernels import attention
from ncu_files import FACTS, NAMES, SAMPLE, rows_of_sample, with_both_forwards

VERSION = "NVIDIA (R) Nsight Compute Command Line Profiler\nVersion 2025.3.1.0 (build 36398880) (public-release)"


def changed(column, change):
    """The sample with the values of a column replaced; None leaves the column out."""
    messages = [line for line in SAMPLE.splitlines() if line.startswith("==")]
    head, *lines = bench.table_of(SAMPLE)
    at = head.index(column)
    for line in (head, *lines):
        if change is None:
            del line[at]
        elif line is not head:
            line[at] = change(line[at])
    return "\n".join([*messages, *(",".join(f'"{cell}"' for cell in line) for line in (head, *lines))]) + "\n"


def test_numbers_of_a_launch_are_those_that_ncu_wrote():
    launches = bench.read_launches(SAMPLE)
    assert [bench.pass_of(x["kernel"]) for x in launches] == ["forward", "dq", "dkdv", "forward", "backward", "dq"]
    first = launches[0]
    assert first["kernel"] == "hopper_forward_kernel<HopperForwardTile<1, 64, 4, 64, 5, 2, 1>>"
    assert first["ms"] == 0.190944 and first["clock_ghz"] == pytest.approx(333934 / 190944)
    assert (first["tensor_pct"], first["tensor_min_pct"], first["tensor_max_pct"]) == (48.81, 45.01, 52.92)
    assert (first["exponential_pct"], first["fma_pct"], first["alu_pct"]) == (50.13, 20.45, 24.78)
    assert (first["issue_pct"], first["l1_pct"], first["l2_pct"], first["dram_pct"]) == (55.33, 45.32, 72.25, 54.86)
    assert first["l2_hit_pct"] == 51.05 and first["instructions_per_cycle"] == 2.21
    assert first["sm_active_pct"] == pytest.approx(100 * 317355.14 / 333934)
    assert (first["dram_read_bytes"], first["dram_write_bytes"]) == (267_747_072, 83_321_088)
    assert (first["num_sms"], first["blocks"], first["registers"]) == (132, 132, 96)
    assert launches[2]["blocks"] == 264 and launches[2]["registers"] == 128


def test_instructions_and_waits_are_kept_by_name():
    first = bench.read_launches(SAMPLE)[0]
    assert first["instructions"] == 97_064_024 == sum(first["opcodes"].values()) == sum(first["categories"].values())
    assert list(first["opcodes"].items())[:2] == [("FADD", 12_060_672), ("FMUL", 11_866_176)]
    assert (first["opcodes"]["HGMMA"], first["opcodes"]["MUFU"]) == (2_555_904, 10_377_744)
    assert first["categories"]["Load/Store"] == 5_651_285 and first["categories"]["Floating Point"] == 38_689_360
    assert list(first["stalls"].items())[:2] == [("wait", 1.59), ("not_selected", 1.04)]
    assert "drain" not in first["stalls"] and "tex_throttle" not in first["stalls"]


@pytest.mark.parametrize(
    ("column", "change", "told"),
    [
        ("dram__bytes_read.sum", None, "did not give these metrics: dram__bytes_read.sum"),
        (
            "lts__t_sector_hit_rate.pct",
            lambda _: "no data",
            "gave 'no data' for lts__t_sector_hit_rate.pct",
        ),
        ("gpu__time_duration.sum", lambda x: "us" if x == "ns" else x, "gave gpu__time_duration.sum in 'us'"),
        ("launch__sm_count", lambda x: "nan" if "132" in x else x, "'nan' for launch__sm_count of hopper_forward"),
        (bench.OPCODES, lambda x: x.partition(" (")[0], "0 parts of 97,064,024 for sass__inst_executed_per_opcode"),
        (bench.OPCODES, lambda x: x.replace("FADD: 12,060,672; ", ""), "do not add up"),
    ],
)
def test_what_ncu_leaves_out_is_told(column, change, told):
    def values_only(value):  # not the unit, unless that is what changes
        return value if change is None or (value in ("", "%") and column != "gpu__time_duration.sum") else change(value)

    with pytest.raises(ValueError, match=told):
        bench.read_launches(changed(column, change and values_only))


def test_launches_belong_to_the_cells_in_their_order():
    rows = rows_of_sample()
    assert [(row["pattern"], row["pass"], row["bounded"]) for row in rows] == [
        ("block_causal", "forward", False),
        ("block_causal", "forward", True),
        ("block_causal", "dq", None),
        ("block_causal", "dkdv", None),
        ("block_diagonal", "forward", False),
        ("block_diagonal", "forward", True),
        ("block_diagonal", "backward", None),
        ("block_diagonal", "dq", None),
    ]
    pairs, later = 286_434 * 64 * 16, 24_587_383
    assert [row["pairs"] for row in rows] == [pairs] * 4 + [later * 96] * 3 + [later * 3]
    assert [row["flops"] / 64 for row in rows[:4]] == [4 * pairs, 4 * pairs, 6 * pairs, 8 * pairs]
    # The one pass left dq of the last three heads to a pass of its own.
    assert rows[6]["flops"] == 64 * (10 * later * 96 - 2 * later * 3) and rows[7]["flops"] == 64 * 6 * later * 3
    assert {k: rows[0][k] for k in ("resolution", "batch", "heads", "head_dim", "dtype")} == {
        "resolution": 256, "batch": 64, "heads": 16, "head_dim": 64, "dtype": "bfloat16",
    }  # fmt: skip


def test_products_executed_are_just_above_those_of_the_pairs():
    """An HGMMA counts four times, once a warp: of 64 x 64 x 16, or 64 x 96 x 16 in a part of one kernel."""
    rows = rows_of_sample()
    for row in rows[:4] + rows[6:]:
        assert 1 < row["opcodes"]["HGMMA"] * 2 * 64 * 64 * 16 / 4 / row["flops"] < 1.3, row["pass"]


@pytest.mark.parametrize(
    ("names", "text", "told"),
    [
        (NAMES, SAMPLE, "block_causal-256.*expected launches of forward, forward, dq, dkdv, ncu has forward, dq, dkdv"),
        (
            "block_diagonal-256",
            with_both_forwards(),
            "4 launches more than the cells make, the first of hopper_forward",
        ),
        (NAMES + ",block_causal-256", with_both_forwards(), "block_causal-256.*, ncu has none"),
        (
            "block_diagonal-1024",
            with_both_forwards(),
            "forward, forward, backward, dq, ncu has forward, forward, dq, d",
        ),
        ("block_causal-256", with_both_forwards().replace("hopper_dq", "hopper_conv"), "hopper_conv.* is none of the"),
    ],
)
def test_launches_that_do_not_fit_the_cells_are_refused(names, text, told):
    with pytest.raises(ValueError, match=told):
        bench.rows_of(bench.cells_of(names), bench.read_launches(text))


def test_cells_have_the_names_that_they_print():
    wanted = bench.default_cells()
    assert bench.cells_of(",".join(map(str, wanted))) == wanted
    assert [(cell.head_dim, cell.resolution) for cell in wanted[-2:]] == [(128, 1024)] * 2 and len(wanted) == 8
    assert bench.cell_of("block_causal-256") in wanted
    for name in ("block_causal", "diagonal-256", "block_causal-300", "block_causal-256-b64h16d64-float32"):
        with pytest.raises(ArgumentTypeError, match=name):
            bench.cell_of(name)


def test_kernels_are_warmed_up_before_they_are_watched(monkeypatch, capsys):
    happened = []

    def attend(q, k, v, mask, scale, impl, logit_bound=None):
        assert impl == "hopper" and q.shape == (2, 3, 30, 16) and not q.is_contiguous()
        happened.append("bounded" if logit_bound else "forward")
        return attention(q, k, v, mask, scale=scale, impl="reference")

    @contextlib.contextmanager
    def watched():
        happened.append("begin")
        yield
        happened.append("end")

    monkeypatch.setattr(bench, "attention", attend)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "profile", watched)
    (cell, *_) = shapes.cells(smoke=True)
    bench.call_each([cell], torch.device("cpu"))
    assert happened == ["forward", "bounded", "wait", "begin", "forward", "bounded", "wait", "end"]
    assert capsys.readouterr().out == f"1 of 1: {cell}\n"


def fake_ncu(folder, body):
    """An `ncu` that runs `body`, which may use `log` and `target`."""
    folder.mkdir(exist_ok=True)
    path = folder / "ncu"
    start = f"import sys, subprocess\nif '--version' in sys.argv:\n    print({VERSION!r})\n    sys.exit()\n"
    start += "at = sys.argv.index('--log-file') + 1\nlog, target = open(sys.argv[at], 'w'), sys.argv[at + 1:]\n"
    path.write_text(f"#!{sys.executable}\n{start}{body}")
    path.chmod(0o755)
    return path


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command with an ncu of its own and as if there were a GPU: exit status."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "environment", lambda device, commit: FACTS | {"commit": commit})
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)

    def run(body, *arguments):
        monkeypatch.setenv("PATH", str(fake_ncu(tmp_path / "bin", body).parent), prepend=os.pathsep)
        return bench.main(["--cells", NAMES, "--commit", "abc", *arguments])

    return run


def test_the_command_writes_a_row_a_launch(command, tmp_path, capsys):
    (tmp_path / "written.csv").write_text(with_both_forwards())
    body = f"log.write(open({str(tmp_path / 'written.csv')!r}).read())\nimport json\nprint(json.dumps(sys.argv[1:]))\n"
    output = tmp_path / "out" / "profile.json"
    assert command(body, "--output", str(output)) == 0
    content = json.loads(output.read_text())
    assert (content["kind"], content["version"], content["environment"]["commit"]) == ("attention_profile", 1, "abc")
    assert content["method"] == {"tool": "ncu 2025.3.1.0", "clock_control": "none", "cache_control": "all"}
    assert len(content["results"]) == 8 and content["results"][7]["ms"] == 0.082208
    assert len(output.read_text().splitlines()) == 8 + 8  # a row a line
    assert os.listdir(output.parent) == ["profile.json"]
    printed, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "block_diagonal-1024-b4h24d64" in lines[6] and "2.6770 ms at 1.74 GHz" in lines[6]
    options = json.loads(printed)  # how ncu was called
    asked = options[options.index("--metrics") + 1].split(",")
    assert set(asked) == set(bench.METRICS) and set(asked) <= set(bench.table_of(SAMPLE)[0])
    assert options[options.index("--profile-from-start") + 1] == "off"
    kernels = re.compile(options[options.index("--kernel-name") + 1].removeprefix("regex:"))
    assert all(kernels.fullmatch(f"hopper_{name}_kernel") for name in ("forward", "dq", "dkdv", "backward"))
    assert options[-3] == "--steps" and bench.cells_of(options[-1]) == bench.cells_of(NAMES)


PERMISSION = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (f"log.write({PERMISSION!r})\nsys.exit(1)", ["exit status 1", PERMISSION, "run this as root"]),
        (f"log.write({PERMISSION!r})", [PERMISSION, "NVreg_RestrictProfilingToAdminUsers=0"]),
        ("log.write('==WARNING== No kernels were profiled.')", ["profiled no kernel. It said", "No kernels were prof"]),
        ("print('==ERROR== Failed to find metric x')\nsys.exit(9)", ["exit status 9", "Failed to find metric x"]),
        ("sys.exit(3)", ["exit status 3. It said nothing"]),
        (f"log.write({SAMPLE!r})", ["expected launches of forward, forward, dq, dkdv"]),
    ],
)
def test_a_profile_that_failed_says_what_ncu_said(command, tmp_path, capsys, body, told):
    output = tmp_path / "profile.json"
    assert command(body, "--output", str(output)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and not output.exists()
    for words in told:
        assert words in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="the steps run where there is a GPU")
def test_steps_that_fail_are_told_with_their_words(command, tmp_path, capsys):
    body = "status = subprocess.call(target)\n"
    body += "log.write(f'==ERROR== The application returned an error code ({status}).')\nsys.exit(status)\n"
    assert command(body, "--output", str(tmp_path / "profile.json")) == 1
    printed = capsys.readouterr()
    assert "error: ncu failed with exit status 2" in printed.err and "returned an error code (2)" in printed.err
    assert "no CUDA device: counters are those of a GPU" in printed.out


def test_an_interrupt_ends_ncu_and_writes_nothing(command, tmp_path, monkeypatch, capsys):
    """Interrupted while ncu and a process of its own run."""

    def interrupt(line, **_):
        (tmp_path / "process").write_text(line)
        raise KeyboardInterrupt

    body = "import time\nother = subprocess.Popen(['sleep', '600'])\nprint(other.pid, flush=True)\ntime.sleep(600)\n"
    monkeypatch.setattr(bench, "print", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        bench.run([str(fake_ncu(tmp_path / "bin", body)), "--log-file", str(tmp_path / "log")])
    status = Path(f"/proc/{(tmp_path / 'process').read_text()}/stat")
    patience = time.monotonic() + 30
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < patience, "the process of ncu goes on"
        time.sleep(0.01)
    monkeypatch.undo()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "environment", lambda *_: FACTS)
    monkeypatch.setattr(bench, "find_ncu", interrupted)
    assert bench.main(["--output", str(tmp_path / "profile.json")]) == 130
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "profile.json").exists()


def test_ncu_is_looked_for_on_the_path_and_in_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name.startswith("/usr/local") else found(name))
    places = f"neither on PATH nor at {tmp_path}/toolkit/bin/ncu nor at /usr/local/cuda/bin/ncu; the CUDA toolkit has"
    with pytest.raises(ValueError, match=places):
        bench.find_ncu()
    (tmp_path / "toolkit").mkdir()
    assert fake_ncu(tmp_path / "toolkit" / "bin", "") == Path(bench.find_ncu())
    assert fake_ncu(tmp_path / "bin", "") == Path(bench.find_ncu())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_nothing_is_started_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.subprocess, "Popen", None)
    for arguments in ([], ["--steps"]):
        with pytest.raises(SystemExit) as ended:
            bench.main(arguments)
        assert ended.value.code == 2 and "no CUDA device" in capsys.readouterr().err
