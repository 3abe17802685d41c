"""The compiled extension hmar_kernels._cuda (csrc/), where it was built: `module` is it or None, `error` says why.

Kernels of attention/cuda.py, attention/hopper.py and linear/cuda.py; csrc/bindings.cpp has their signatures.
"""

from __future__ import annotations

import importlib
from types import ModuleType

module: ModuleType | None = None
error: str | None = None
try:
    module = importlib.import_module("hmar_kernels._cuda")
except ModuleNotFoundError:
    error = (
        "the extension hmar_kernels._cuda is not built; "
        "install the package again where nvcc (CUDA 12.0 or newer) is on PATH"
    )
except ImportError as reason:
    error = f"the extension hmar_kernels._cuda does not load: {reason}"
