"""A kernel's own source of csrc/, compiled for the CPU with a file of cuda_on_cpu/ in the place of csrc/'s."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(folder: Path, kernel: str, emulation: str = "ptx.cuh", headers: tuple[str, ...] = ()) -> ctypes.CDLL:
    """csrc/KERNEL.cuh with headers of csrc/, driven by cuda_on_cpu/KERNEL.cpp; skips where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    for name in (f"{kernel}.cuh", "params.h", *headers):
        shutil.copy(ROOT / "csrc" / name, folder)
    for name in (emulation, f"{kernel}.cpp"):
        shutil.copy(ROOT / "tests/cuda_on_cpu" / name, folder)
    library = folder / f"{kernel}.so"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-o", library, folder / f"{kernel}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
