"""A kernel's own source of csrc/, compiled for the CPU with cuda_on_cpu/ptx.cuh in the place of csrc/ptx.cuh."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(folder: Path, kernel: str) -> ctypes.CDLL:
    """csrc/KERNEL.cuh, driven by cuda_on_cpu/KERNEL.cpp; skips where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    for source in (
        f"csrc/{kernel}.cuh",
        "csrc/params.h",
        "tests/cuda_on_cpu/ptx.cuh",
        f"tests/cuda_on_cpu/{kernel}.cpp",
    ):
        shutil.copy(ROOT / source, folder)
    library = folder / f"{kernel}.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, folder / f"{kernel}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
