"""Shared set-up: one thread a process, and without a GPU Triton's interpreter; both before anything imports torch.

One thread, because the tensors here are small, tests run in several processes at once, and results then do not depend
on how many cores the machine has.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN, so that an output element nobody writes is seen."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was_deterministic)
