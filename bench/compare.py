"""Compare the kernels of two commits: `make bench-compare BASE=<git ref>`, or `python -m bench.compare BASE`.

BASE is checked out into a temporary git worktree. Two processes, one over its kernels and one over those of the working
tree (or of --head REF), measure the same cells on the same device in turn: old, new, new, old, ... The harness is that
of this checkout on both sides, so only `hmar_kernels` differs. On a GPU the checked out package is installed into a
temporary folder first, which builds its CUDA kernels as a user would get them; where that fails, its sources are used
as they lie, and the result says so. A folder with a checkout can stand for a git ref where there is no git.

Every output and gradient is checked before it is timed. The table and the JSON (kind "attention_comparison", version 1)
have the median times, old / new (above 1: new is faster) and the smallest and largest ratio among the turns, which tell
what is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import options, rivals
from .attention_results import describe
from .environment import environment
from .results import rounded
from .shapes import DTYPES, Cell, cells
from .subject import DIRECTIONS

KIND, VERSION = "attention_comparison", 1
ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0  # seconds until a side that says nothing is killed


class NoSuchCommit(ValueError):
    """What was given is no commit of this repository; the message says what would do."""


@dataclass(frozen=True)
class Tree:
    """Kernels to measure: the folder that holds the package, and where they are from."""

    folder: Path
    name: str
    commit: str | None
    installed: bool = False
    note: str | None = None

    def facts(self) -> dict:
        return {"name": self.name, "commit": self.commit, "installed": self.installed, "note": self.note}


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


@contextlib.contextmanager
def checked_out(reference: str, device: str) -> Iterator[Tree]:
    """The kernels of a git ref, in a worktree that is gone afterwards; or of a folder, which is left as it is."""
    if reference and (Path(reference) / "kernels" / "hmar_kernels").is_dir():
        yield Tree(Path(reference).resolve() / "kernels", reference, None)
        return
    if not reference or shutil.which("git") is None:
        raise NoSuchCommit(f"expected a git ref or a folder with a checkout, got {reference!r}; BASE=HEAD~1 would do")
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    if found.returncode != 0:
        raise NoSuchCommit(
            f"{reference!r} is no commit of {ROOT} and no folder with a checkout; "
            "a branch, a tag, a hash or HEAD~1 would do"
        )
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as folder:
        worktree = Path(folder) / "tree"
        added = git("worktree", "add", "--detach", "--force", str(worktree), commit)
        if added.returncode != 0:
            raise NoSuchCommit(f"git cannot check out {reference!r}: {added.stderr.strip()}")
        try:
            if not (worktree / "kernels" / "hmar_kernels").is_dir():
                raise NoSuchCommit(f"{reference!r} has no kernels/hmar_kernels; a later commit would do")
            tree = Tree(worktree / "kernels", reference, commit)
            yield _installed(tree, worktree, Path(folder) / "site") if device == "cuda" else tree
        finally:
            git("worktree", "remove", "--force", str(worktree))
            git("worktree", "prune")


def _installed(tree: Tree, worktree: Path, site: Path) -> Tree:
    """The same, installed by pip into `site`, or with a note why that failed."""
    print(f"installing {tree.name}", flush=True)
    has_backend = all(importlib.util.find_spec(name) for name in ("scikit_build_core", "pybind11"))
    isolation = ["--no-build-isolation"] if has_backend else []
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--retries",
        "1",
        *isolation,
        "--target",
        str(site),
    ]
    done = subprocess.run([*command, str(worktree)], capture_output=True, text=True)
    if done.returncode == 0 and (site / "hmar_kernels").is_dir():
        return Tree(site, tree.name, tree.commit, installed=True)
    lines = (done.stderr or done.stdout).strip().splitlines() or ["pip installed no hmar_kernels"]
    return Tree(tree.folder, tree.name, tree.commit, note=f"not installed, used as sources: {lines[-1]}"[:300])


class Process:
    """A measuring process of `side.py`; started when it is first asked something, and again after it died."""

    def __init__(self, tree: Tree, device: str):
        self.tree, self.device = tree, device
        self.process: subprocess.Popen | None = None

    def ask(self, action: str, **arguments) -> dict:
        """Its answer. {"status": "crashed", ...} when it dies or is silent."""
        if self.process is None:
            command = [sys.executable, "-P", str(ROOT / "bench" / "side.py"), str(self.tree.folder)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            started = self._ask({"action": "start", "device": self.device})
            if started:
                return started
        return self._ask({"action": action, **arguments})

    def _ask(self, command: dict) -> dict:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                if not selector.select(PATIENCE):
                    return self._crashed(f"killed: no result within {PATIENCE:g} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return self._crashed(f"the process of {self.tree.name} ended with exit status {self.process.wait()}")
        return json.loads(line)

    def _crashed(self, reason: str) -> dict:
        self.close()
        return {"status": "crashed", "reason": reason}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def compare(
    cell: Cell, impl: str, directions: list[str], old: Process, new: Process, turns: int, seconds: float
) -> Iterator[dict]:
    """One row a direction. `seconds` is what each side spends on it, in `turns` parts."""
    sides = {"old": old, "new": new}
    # NOTE: one after the other, because both need the device.
    prepared = {name: side.ask("prepare", cell=asdict(cell), impl=impl) for name, side in sides.items()}
    for direction in directions:
        row = describe(cell, direction) | {"impl": impl}
        for name, answer in prepared.items():
            extra = (answer.get("extra_bytes") or {}).get(direction)
            row |= {f"{name}_status": answer["status"], f"{name}_reason": answer["reason"], f"{name}_ms": None}
            row |= {f"{name}_host_us": None, f"{name}_extra_bytes": extra}
        working = [name for name in sides if prepared[name]["status"] == "ok"]
        samples = {name: [] for name in working}
        overheads = {name: [] for name in working}
        for turn in range(turns):
            for name in working if turn % 2 == 0 else working[::-1]:
                if prepared[name]["status"] != "ok":
                    continue
                answer = sides[name].ask("measure", direction=direction, seconds=seconds / turns)
                if "samples" in answer:
                    samples[name].append(1e3 * statistics.median(answer["samples"]))
                    overheads[name].append(answer["host_us"])
                else:
                    prepared[name] = answer
                    row |= {f"{name}_status": answer["status"], f"{name}_reason": answer["reason"]}
        for name in working:
            if prepared[name]["status"] == "ok":
                row |= {f"{name}_ms": statistics.median(samples[name])}
                row |= {f"{name}_host_us": statistics.median(overheads[name])}
        both = row["old_ms"] is not None and row["new_ms"] is not None
        ratios = [a / b for a, b in zip(samples["old"], samples["new"], strict=True)] if both else []
        row |= {"ratio": row["old_ms"] / row["new_ms"] if both else None}
        row |= {"smallest_ratio": min(ratios, default=None), "largest_ratio": max(ratios, default=None)}
        yield row


HEAD = f"{'cell':<44} {'direction':<9} {'impl':<10} {'old, ms':>9} {'new, ms':>9} {'old/new':>8}  {'of turns':<13}"


def line(row: dict) -> str:
    place = f"{row['pattern']} {row['resolution']} {row['batch']}x{row['heads']}x{row['head_dim']} {row['dtype']}"
    start = f"{place:<44} {row['direction']:<9} {row['impl']:<10}"
    times = [f"{row[f'{side}_ms']:9.4f}" if row[f"{side}_ms"] else f"{'-':>9}" for side in ("old", "new")]
    if row["ratio"] is not None:
        spread = f"{row['smallest_ratio']:.3f}-{row['largest_ratio']:.3f}"
        host = f"host {row['old_host_us']:.0f} -> {row['new_host_us']:.0f} us"
        return f"{start} {' '.join(times)} {row['ratio']:8.3f}  {spread:<13} {host}"
    sides = [side for side in ("old", "new") if row[f"{side}_status"] != "ok"]
    return f"{start} {' '.join(times)}  " + "; ".join(f"{s}: {row[f'{s}_status']}, {row[f'{s}_reason']}" for s in sides)


def implementations(chosen: list[str] | None, device: torch.device) -> list[str]:
    """Names of the chosen ones, or of all of ours that a default run has on this device."""
    return [entry.name for entry in rivals.choose(chosen, device) if entry.ours or chosen]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description="Compare the kernels of two commits.")
    parser.add_argument("base", metavar="BASE", help="git ref of the old kernels, or a folder with a checkout")
    parser.add_argument("--head", metavar="REF", help="git ref of the new ones (default: the working tree)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries it on a tiny pyramid")
    by_default = {device: ",".join(implementations(None, torch.device(device))) for device in ("cuda", "cpu")}
    parser.add_argument(
        "--impl",
        action="extend",
        type=options.names,
        help=f"default: {by_default['cuda']} (CPU: {by_default['cpu']}); rivals can be named too",
    )
    parser.add_argument("--patterns", action="extend", type=options.names)
    parser.add_argument("--resolutions", action="extend", type=options.integers)
    parser.add_argument("--sides", type=options.integers, help="a pyramid of these sides, not --resolutions")
    parser.add_argument("--batches", action="extend", type=options.batches)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--head-dims", action="extend", type=options.integers)
    parser.add_argument("--directions", action="extend", type=options.directions)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument(
        "--seconds", type=options.seconds, default=0.4, help="for each side of each measurement (default 0.4)"
    )
    parser.add_argument("--turns", type=int, default=4, help="how often the sides take turns (default 4)")
    parser.add_argument("--output", type=Path, help="JSON (default: runs/bench_compare.json)")
    chosen = parser.parse_args(arguments)
    if chosen.turns < 1:
        parser.error(f"--turns must be at least 1, got {chosen.turns}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the comparison on a tiny pyramid")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that worktrees are removed
    device = torch.device(chosen.device)
    try:
        measured = cells(
            patterns=chosen.patterns,
            resolutions=chosen.resolutions,
            sides=chosen.sides and tuple(chosen.sides),
            batches=chosen.batches,
            heads=chosen.heads,
            head_dims=chosen.head_dims,
            dtype=chosen.dtype,
            smoke=chosen.device == "cpu",
        )
        names = implementations(chosen.impl, device)
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(checked_out(chosen.base, chosen.device))
            facts = environment(device, None)
            new = (
                stack.enter_context(checked_out(chosen.head, chosen.device))
                if chosen.head
                else Tree(ROOT / "kernels", "working tree", facts["commit"])
            )
            rows = _run(measured, names, chosen, old, new)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = chosen.output or ROOT / "runs" / "bench_compare.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"kind": KIND, "version": VERSION, "environment": facts, "old": old.facts(), "new": new.facts()}
    path.write_text(json.dumps(content | {"results": rows}, indent=1) + "\n")
    print(f"raw results: {path}")
    return int(any(row["old_status"] == "ok" and row["new_status"] in ("failed", "crashed") for row in rows))


def _run(measured: list[Cell], names: list[str], chosen: argparse.Namespace, old: Tree, new: Tree) -> list[dict]:
    for side, tree in (("old", old), ("new", new)):
        print(f"{side}: {tree.name} {tree.commit or ''} {tree.note or ''}".rstrip())
    print(HEAD, flush=True)
    directions = [d for d in DIRECTIONS if d in (chosen.directions or DIRECTIONS)]
    rows = []
    with contextlib.ExitStack() as stack:
        processes = [Process(tree, chosen.device) for tree in (old, new)]
        for process in processes:
            stack.callback(process.close)
        for cell in measured:
            for name in names:
                for row in compare(cell, name, directions, *processes, chosen.turns, chosen.seconds):
                    rows.append({k: rounded(v) for k, v in row.items()})
                    print(line(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
