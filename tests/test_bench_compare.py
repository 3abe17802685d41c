"""`make bench-compare` on the CPU, in a repository of its own whose two commits differ in speed, or in being right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compare
from bench.shapes import Cell

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "kernels/hmar_kernels/attention/reference.py"
QUICK = ("--device", "cpu", "--seconds", "0.04", "--turns", "2", "--sides", "1,2,3", "--patterns", "block_causal")


def git(folder, *arguments):
    names = [part for key in ("user.name", "user.email") for part in ("-c", f"{key}=x")]
    done = subprocess.run(["git", *names, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def spoil(folder, line):
    """Put a line at the beginning of the forward of the reference, which the check's oracle is too."""
    path = folder / REFERENCE
    text = path.read_text()
    docstring_end = text.index('"""', text.index('"""', text.index("def forward(")) + 3) + 3
    path.write_text(f"{text[:docstring_end]}\n    {line}{text[docstring_end:]}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Commits: "empty" has no kernels, "slow" sleeps in every forward, "broken" raises, "fast" is as it should be."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "--quiet")
    (folder / ".gitignore").write_text("runs\n__pycache__\n")
    sleep = "__import__('time').sleep(0.005)"
    for tag, line in (("empty", None), ("slow", sleep), ("broken", "1 / 0"), ("fast", None)):
        if tag != "empty":
            for name in ("kernels", "bench"):
                shutil.rmtree(folder / name, ignore_errors=True)
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            (folder / "hmar").mkdir(exist_ok=True)
            for name in ("__init__", "pyramid"):
                shutil.copy(ROOT / "hmar" / f"{name}.py", folder / "hmar")
            if line:
                spoil(folder, line)
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", tag)
        git(folder, "tag", tag)
    return folder


def run(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{folder / 'kernels'}", "TMPDIR": str(folder.parent)}
    command = [sys.executable, "-m", "bench.compare", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment)


def assert_clean(folder):
    assert len(git(folder, "worktree", "list").splitlines()) == 1
    assert not list(folder.parent.glob("bench-compare-*"))
    assert git(folder, "status", "--porcelain") == ""


def test_the_slower_commit_is_measured_as_slower(repository):
    done = run(repository, "slow", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((repository / "runs" / "bench_compare.json").read_text())
    assert (content["kind"], content["version"]) == ("attention_comparison", 1)
    assert content["old"]["commit"] == git(repository, "rev-parse", "slow")
    assert content["new"] == {
        "name": "working tree", "commit": git(repository, "rev-parse", "fast"), "installed": False, "note": None,
    }  # fmt: skip
    forward, backward = content["results"]
    assert (forward["impl"], forward["direction"], forward["sides"]) == ("reference", "forward", [1, 2, 3])
    assert forward["old_ms"] > 5 and forward["ratio"] == pytest.approx(forward["old_ms"] / forward["new_ms"], rel=1e-3)
    assert forward["smallest_ratio"] > 5 and forward["old_host_us"] > 5_000
    assert 0.2 < backward["ratio"] < 5 and backward["smallest_ratio"] <= backward["largest_ratio"]
    table = [line for line in done.stdout.splitlines() if "reference" in line]
    assert len(table) == 2 and f"{forward['ratio']:.3f}" in table[0]
    assert_clean(repository)


def test_a_commit_that_fails_is_told_apart(repository):
    output = repository.parent / "compared.json"
    done = run(repository, "slow", "--head", "broken", *QUICK, "--directions", "forward", "--output", str(output))
    assert done.returncode == 1
    (row,) = json.loads(output.read_text())["results"]
    assert (row["old_status"], row["new_status"], row["ratio"]) == ("ok", "failed", None)
    assert "new: failed, ZeroDivisionError" in done.stdout
    assert_clean(repository)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere", "'nowhere' is no commit of"),
        ("", "expected a git ref or a folder with a checkout, got ''"),
        ("--all", "the following arguments are required: BASE"),
        ("empty", "'empty' has no kernels/hmar_kernels"),
    ],
)
def test_a_bad_base_is_explained(repository, base, message):
    done = run(repository, base, *QUICK)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert_clean(repository)


def test_default_implementations_are_named_in_the_help(capsys):
    assert compare.implementations(None, torch.device("cuda")) == ["hopper", "hopper_bounded", "triton", "cuda"]
    with pytest.raises(SystemExit):
        compare.parse(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert "default:hopper,hopper_bounded,triton,cuda(CPU:reference)" in text


@pytest.mark.parametrize(
    ("option", "message"), [("--impl=,", "expected at least one name"), ("--seconds=-1", "seconds above 0")]
)
def test_a_malformed_option_is_explained(capsys, option, message):
    with pytest.raises(SystemExit) as ended:
        compare.parse(["HEAD", "--device", "cpu", option])
    assert ended.value.code == 2 and message in capsys.readouterr().err


class Scripted:
    """A side whose answers are given."""

    def __init__(self, name, milliseconds, calls, fail_at=None):
        self.name, self.milliseconds, self.calls, self.fail_at = name, iter(milliseconds), calls, fail_at

    def ask(self, action, **arguments):
        self.calls.append((self.name, action))
        if action == "prepare":
            return {"status": "ok", "reason": None, "extra_bytes": {"forward": 7}}
        if self.fail_at == self.calls.count((self.name, "measure")):
            return {"status": "crashed", "reason": "gone"}
        return {"samples": [next(self.milliseconds) / 1e3] * 3, "host_us": 4.0}


CELL = Cell("block_causal", (1, 2), batch=1, heads=1, head_dim=16, dtype="bfloat16")


def test_sides_take_turns_and_the_spread_is_among_the_turns():
    calls = []
    old, new = Scripted("old", [4, 6, 5], calls), Scripted("new", [2, 2, 5], calls)
    (row,) = compare.compare(CELL, "triton", ["forward"], old, new, 3, 0.3)
    assert [name for name, action in calls if action == "measure"] == ["old", "new", "new", "old", "old", "new"]
    assert (row["old_ms"], row["new_ms"], row["ratio"]) == (5, 2, 2.5)
    assert (row["smallest_ratio"], row["largest_ratio"]) == (pytest.approx(1), pytest.approx(3))
    assert row["old_extra_bytes"] == 7 and row["flops"] == 4 * 21 * 16


def test_a_side_that_dies_in_the_middle_has_no_time():
    calls = []
    old, new = Scripted("old", [4, 6, 5], calls), Scripted("new", [2], calls, fail_at=2)
    (row,) = compare.compare(CELL, "triton", ["forward"], old, new, 3, 0.3)
    assert (row["old_ms"], row["new_ms"], row["ratio"], row["new_status"]) == (5, None, None, "crashed")
    assert calls.count(("new", "measure")) == 2 and "new: crashed, gone" in compare.line(row)


def test_a_process_that_ends_is_a_crash_and_the_next_question_starts_another(tmp_path):
    process = compare.Process(compare.Tree(tmp_path, "nothing", None), "cpu")  # no package in there
    try:
        for _ in range(2):
            answer = process.ask("prepare", cell={}, impl="reference")
            assert answer["status"] == "crashed" and "the process of nothing ended" in answer["reason"]
    finally:
        process.close()
