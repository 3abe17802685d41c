"""A kernel's own source of csrc/, compiled for the CPU with a file of cuda_on_cpu/ in the place of csrc/'s."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(folder: Path, driver: str, emulation: str, headers: tuple[str, ...]) -> ctypes.CDLL:
    """cuda_on_cpu/DRIVER.cpp and what it includes of these headers of csrc/; skips where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    for name in ("params.h", *headers):
        shutil.copy(ROOT / "csrc" / name, folder)
    for name in ("cuda_words.h", emulation, f"{driver}.cpp"):
        shutil.copy(ROOT / "tests/cuda_on_cpu" / name, folder)
    library = folder / f"{driver}.so"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-o", library, folder / f"{driver}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
