"""The compiled extension hmar_kernels._cuda (csrc/), where it was built: `module` is it or None.

Kernels of attention/cuda.py, attention/hopper.py, blocks/cuda.py, conv2d/hopper.py, linear/cuda.py and
sampling/cuda.py; csrc/bindings.cpp has their signatures.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

module: ModuleType | None = None
_error: str | None = None
try:
    module = importlib.import_module("hmar_kernels._cuda")
except ModuleNotFoundError:
    _error = (
        "the extension hmar_kernels._cuda is not built; "
        "install the package again where nvcc (CUDA 12.0 or newer) is on PATH"
    )
except ImportError as reason:
    _error = f"the extension hmar_kernels._cuda does not load: {reason}"


def unavailable(device: torch.device) -> str | None:
    """Why its kernels cannot run on a CUDA device; None when they can. Looks at no data: traceable."""
    return _reason(device, "load_error")


def hopper_unavailable(device: torch.device) -> str | None:
    """The same of its kernels for sm_90a."""
    return _reason(device, "hopper_load_error")


def _reason(device: torch.device, entry: str) -> str | None:
    if module is None:
        return _error
    error = _load_error(torch.cuda.current_device() if device.index is None else device.index, entry)
    if not error:
        return None
    return f"the extension was built for {module.architectures}, which cannot run on {device}: {error}"


_load_errors: dict[tuple[int, str], str] = {}


@torch.compiler.assume_constant_result
def _load_error(device: int, entry: str) -> str:
    if (device, entry) not in _load_errors:
        found = getattr(module, entry, lambda device: "it has no code for sm_90a, which these kernels are written for")
        _load_errors[device, entry] = found(device)
    return _load_errors[device, entry]
