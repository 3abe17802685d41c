"""Kernels of csrc compiled at run time: NVRTC through CuPy, and what it made kept on disk.

Under HMAR_CACHE_DIR, else XDG_CACHE_HOME/hmar, else ~/.cache/hmar, one file a kernel, named by a digest of all that
went into it: sources, options, NVRTC's release. Read next: hopper_launch.py, which launches what this makes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PACKAGE = Path(__file__).parents[1]
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")


@dataclass(frozen=True)
class Source:
    """What is compiled for one kernel.

    Attributes:
        text: a few lines that include the kernel's header and name its instance.
        headers: file name -> content, of all that is included.
        names: C++ expressions of what is wanted in the cubin.
        label: the kernel in words.
    """

    text: str
    headers: dict[str, str]
    names: tuple[str, ...]
    label: str

    def digest(self, release: str) -> str:
        everything = json.dumps([release, OPTIONS, self.text, self.headers, self.names])
        return hashlib.sha256(everything.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: its code, and the names there of what its source asked for."""

    cubin: bytes
    names: tuple[str, ...]


class Compiler(Protocol):
    release: str

    def compile(self, source: Source) -> Binary:
        """RuntimeError with the compiler's words where the source does not compile."""


class CupyCompiler:
    """NVRTC as CuPy finds it. ImportError where CuPy is not installed, RuntimeError where it finds no NVRTC."""

    def __init__(self) -> None:
        from cupy.cuda import nvrtc

        self._nvrtc = nvrtc
        self.release = ".".join(map(str, nvrtc.getVersion()))

    def compile(self, source: Source) -> Binary:
        texts, files = [text.encode() for text in source.headers.values()], [name.encode() for name in source.headers]
        program = self._nvrtc.createProgram(source.text, "hmar.cu", texts, files)
        try:
            for name in source.names:
                self._nvrtc.addNameExpression(program, name)
            try:
                self._nvrtc.compileProgram(program, OPTIONS)
            except self._nvrtc.NVRTCError as error:
                log = self._nvrtc.getProgramLog(program)
                raise RuntimeError(f"NVRTC {self.release} does not compile {source.label}: {error}\n{log}") from None
            cubin = _whole_elf(self._nvrtc.getCUBIN(program))
            return Binary(cubin, tuple(self._nvrtc.getLoweredName(program, name) for name in source.names))
        finally:
            self._nvrtc.destroyProgram(program)


def _whole_elf(cubin: bytes) -> bytes:
    # NOTE: CuPy 14 takes a cubin for a string and leaves out its last byte, a zero of the program headers.
    offset, size, count = (int.from_bytes(cubin[a:b], "little") for a, b in ((32, 40), (54, 56), (56, 58)))
    return cubin.ljust(offset + size * count, b"\0")


def source_folder() -> Path:
    """csrc: in the installed package, or beside it in the repository. FileNotFoundError where neither holds it."""
    folders = (PACKAGE / "csrc", PACKAGE.parents[1] / "csrc")
    for folder in folders:
        if (folder / "params.h").exists():
            return folder
    raise FileNotFoundError(f"the kernels' sources are neither in {folders[0]} nor in {folders[1]}; install hmar again")


def read_headers(name: str, folder: Path) -> dict[str, str]:
    """File name -> content of a header of csrc and of all that it includes from there."""
    headers: dict[str, str] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        headers[name] = (folder / name).read_text()
        waiting += set(re.findall(r'^#include "(.+)"$', headers[name], re.MULTILINE)) - headers.keys()
    return dict(sorted(headers.items()))


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if chosen := os.environ.get("HMAR_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hmar"


def compiled(source: Source, compiler: Compiler, folder: Path) -> Binary:
    """The kernel as kept in `folder`, or compiled and then kept there. A damaged file is compiled anew.

    Compiling takes about a second and is told in a line on stderr. A folder that cannot be written is a warning.
    """
    path = folder / f"{source.digest(compiler.release)}.kernel"
    why = ""
    try:
        return _decode(path.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = f" ({path} cannot be used: {error})"
    print(f"hmar: NVRTC {compiler.release} compiles {source.label}{why} ...", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        binary = compiler.compile(source)
    finally:
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    try:
        _write(path, _encode(binary))
    except OSError as error:
        warnings.warn(
            f"the compiled kernel cannot be kept in {folder}, the next process will compile it again: {error}; "
            "the environment variable HMAR_CACHE_DIR names another folder",
            stacklevel=2,
        )
    return binary


def _encode(binary: Binary) -> bytes:
    body = json.dumps(binary.names).encode() + b"\n" + binary.cubin
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _decode(content: bytes) -> Binary:
    digest, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its checksum is wrong")
    names, _, cubin = body.partition(b"\n")
    return Binary(cubin, tuple(json.loads(names)))


def _write(path: Path, content: bytes) -> None:
    """All of the file or nothing of it, whoever else reads or writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
