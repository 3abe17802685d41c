"""Tensors asked for ahead: which bytes, by the interpreter; the instruction, compiled; no harm on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from hmar_kernels import prefetch as module
from hmar_kernels.prefetch import prefetch, unavailable

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hmar_kernels import prefetch

constants = {"CHUNK": prefetch.CHUNK, "LANES": prefetch.LANES}
signature = {"x_ptr": "*bf16", "skipped": "i32", "num_bytes": "i64"} | dict.fromkeys(constants, "constexpr")
source = ASTSource(prefetch._prefetch_kernel, signature, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
assert compiled.asm["cubin"]
print(compiled.asm["ptx"])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, kernels are not interpreted")
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("num_bytes, begin", [(15, 0), (16, 0), (70_000, 0), (200_001, 1), (1 << 20, 8)])
def test_every_byte_is_asked_for_once(num_bytes, begin, programs, monkeypatch):
    """In pieces of 16, of the largest part that has them."""
    asked = []
    monkeypatch.setattr(
        module, "_ask", lambda *pairs: asked.extend(zip(*(x.handle.data.tolist() for x in pairs), strict=True))
    )
    monkeypatch.setattr(module, "unavailable", lambda device: None)
    monkeypatch.setattr(module, "PROGRAMS", programs)
    x = torch.zeros(num_bytes + 16, dtype=torch.uint8)
    first = -x.data_ptr() % 16 + begin
    x = x[first : first + num_bytes]
    prefetch(x)
    end = x.data_ptr() + -begin % 16
    for address, size in sorted((address, size) for address, size in asked if size > 0):
        assert address == end and size % 16 == 0 and size <= module.CHUNK
        end += size
    assert 0 <= x.data_ptr() + num_bytes - end < 16


def test_instruction():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("@some cp.async.bulk.prefetch.L2.global") == 1


def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match="prefetch cannot run here: it needs a CUDA device, got cpu"):
        prefetch(torch.zeros(64))
    assert "CUDA device" in unavailable(torch.device("meta"))


def test_gaps_are_refused(monkeypatch):
    monkeypatch.setattr(module, "unavailable", lambda device: None)
    with pytest.raises(ValueError, match=r"x must be contiguous, got strides \(1, 2\) of \[2, 4\]"):
        prefetch(torch.zeros(4, 2).mT[:, :4])


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [1, 7, 8, 12_345, 1 << 20, 5760 * 1920])
@pytest.mark.parametrize("begin", [0, 3])
def test_nothing_is_written_on_a_gpu(numbers, begin):
    device = torch.device("cuda")
    if (reason := unavailable(device)) is not None:
        pytest.skip(reason)
    x = torch.randn(numbers + begin, device=device, dtype=torch.bfloat16)[begin:]
    before = x.clone()
    prefetch(x)
    torch.cuda.synchronize()
    assert torch.equal(x, before)
