"""What the numbers were measured on: versions, commit, and the two ceilings of the device."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .timing import Stopwatch

COPY_BYTES = {"cuda": 1 << 30, "cpu": 16 << 20}
MATMUL_SIDE = {"cuda": 8192, "cpu": 256}


def environment(device: torch.device, commit: str | None) -> dict:
    """Names and versions. `commit` replaces the answer of git where there is no repository."""
    triton = None
    if device.type == "cuda":
        import triton as triton_module

        triton = triton_module.__version__
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "triton": triton,
        "flash_attn_4": _version("flash-attn-4"),
        "python": platform.python_version(),
        "commit": commit or _git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def ceilings(stopwatch: Stopwatch) -> dict:
    """Device copy in GB/s (bytes read + written) and a square bf16 matrix product of random numbers in TFLOP/s."""
    size, side = COPY_BYTES[stopwatch.device.type], MATMUL_SIDE[stopwatch.device.type]
    return {
        "copy_bytes": size,
        "copy_gb_per_s": round(2 * size / _copy_seconds(stopwatch, size) / 1e9, 1),
        "matmul_side": side,
        "matmul_tflops": round(2 * side**3 / _matmul_seconds(stopwatch, side) / 1e12, 3),
    }


def _copy_seconds(stopwatch: Stopwatch, size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=stopwatch.device).random_()
    target = torch.empty_like(source)
    return stopwatch.seconds(lambda _: target.copy_(source), repeats=11)


def _matmul_seconds(stopwatch: Stopwatch, side: int) -> float:
    a, b = (torch.randn(side, side, device=stopwatch.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    return stopwatch.seconds(lambda _: a @ b, repeats=21)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def _git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" when tracked files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parents[1]
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)

    head = git("rev-parse", "HEAD")
    if head.returncode != 0:
        return None
    dirty = git(
        "status", "--porcelain", "--untracked-files=no", "--", "bench", "csrc", "hmar", "kernels"
    ).stdout.strip()
    return head.stdout.strip() + ("-dirty" if dirty else "")
