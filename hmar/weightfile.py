"""Weight files as they come: opened without running anything in them, and searched for state dicts.

A file is safetensors or what torch.save wrote, perhaps cut short, damaged or hostile; whatever is wrong with it becomes
one sentence. Training checkpoints wrap their state dicts in dictionaries and names in prefixes; both are taken off and
reported. Read next: published.py, which says what the tensors found here are.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")

# Parts of a name that DistributedDataParallel, AveragedModel, torch.compile, FSDP and activation checkpoints put in.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Of AveragedModel: how many states it has averaged.
COUNTERS = ("n_averaged",)


class Family(NamedTuple):
    """State dicts of one kind: a few names that tell that one is there, and how all its names begin (a regular
    expression), which matters only where the state dict of another family lies among them."""

    markers: tuple[str, ...]
    names: str


@dataclass(frozen=True)
class StateDict:
    """Tensors found in a file, by name without wrappers and prefix.

    family: which markers they answered to. where: path of their dictionary, as trainer.var_wo_ddp; empty for the file
    itself. prefix: what stood before every name; wrappers: which of WRAPPERS were taken out of the names. mixed:
    tensors of another family stood among them, behind the same prefix.
    """

    family: str
    where: str
    prefix: str
    wrappers: tuple[str, ...]
    tensors: dict[str, Tensor]
    mixed: bool = False

    @property
    def part(self) -> str:
        """What it is chosen by: path, prefix and, where that does not tell, family; empty for a plain file."""
        return ".".join(filter(None, (self.where, self.prefix.rstrip("."), self.family if self.mixed else "")))

    def __str__(self) -> str:
        removed = [f"{wrapper}." for wrapper in self.wrappers] + ([self.prefix] if self.prefix else [])
        place = self.where or "the file itself"
        place = f"{place} (names without {' and '.join(removed)})" if removed else place
        return f"{place}, tensors of a {self.family}" if self.mixed else place


def read_weightfile(path: str | Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, on the CPU, and its metadata (safetensors only).

    Nothing in the file is executed. Raises ValueError with one sentence if there is no such file, or if it is not of a
    known format, cut short, damaged (torch.save's checksums are compared; safetensors has none) or asks for more than
    tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: fetch the file itself (git lfs pull)")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is not a weight file: expected what torch.save writes, or a .safetensors file")
    return _read_torch(path, zipped=start.startswith(b"PK")), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut short: {first_line(error)}") from error


def _read_torch(path: Path, zipped: bool) -> Any:
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                # NOTE: torch.load does not compare checksums.
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"wrong checksum in its part {broken}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        asks_for = f"{wanted[1]}, which is code and not data" if wanted else "more than tensors and plain values"
        raise ValueError(
            f"{path} was refused and nothing in it was run: its pickle is damaged or hostile, for it asks for "
            f"{asks_for} (if you trust it, load it where it was made and save its state dict alone)"
        ) from error
    except Exception as error:  # NOTE: there is no error that a damaged pickle or archive could not raise.
        raise ValueError(f"{path} is damaged or cut short: {first_line(error)}") from error


def find_state_dicts(tree: Any, families: Mapping[str, Family]) -> list[StateDict]:
    """Every state dict of a known family among nested dictionaries and lists.

    A group of tensors belongs to a family when two of its markers are there behind the same prefix. If it belongs to
    several, each gets the tensors that begin as its own do (`mixed`). Tensors beside it that carry no known prefix are
    kept under their own name, so that a strict load reports them. Raises ValueError for names that collide and for
    tensors that are not dense.
    """
    found = []
    for where, named in _dictionaries_of_tensors(tree):
        tensors, wrappers = _unwrap(named, where)
        groups: Counter[tuple[str, str]] = Counter()
        for name in tensors:
            for family in families:
                for marker in families[family].markers:
                    if name == marker or name.endswith(f".{marker}"):
                        groups[family, name.removesuffix(marker)] += 1
        known = [group for group, count in groups.items() if count >= 2]
        members: dict[str, dict[str, Tensor]] = {prefix: {} for _, prefix in known}
        for name, tensor in tensors.items() if known else ():
            check_dense(name, tensor)
            prefix = max((p for p in members if name.startswith(p)), key=len, default=None)
            for owner in members if prefix is None else (prefix,):
                members[owner][name.removeprefix(owner)] = tensor
        shared = {prefix for prefix, count in Counter(prefix for _, prefix in known).items() if count > 1}
        for family, prefix in sorted(known, key=lambda group: list(families).index(group[0])):
            named = members[prefix]
            if prefix in shared:
                named = {name: tensor for name, tensor in named.items() if re.match(families[family].names, name)}
            found.append(StateDict(family, where, prefix, wrappers, named, prefix in shared))
    return found


def _dictionaries_of_tensors(tree: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    waiting, seen = [("", tree)], set()
    while waiting:
        where, node = waiting.pop(0)
        if id(node) in seen or not isinstance(node, (Mapping, list, tuple)):
            continue
        seen.add(id(node))
        items = list(node.items() if isinstance(node, Mapping) else enumerate(node))
        named = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
        if named:
            yield where, named
        waiting += [(f"{where}.{key}".lstrip("."), value) for key, value in items if not isinstance(value, Tensor)]


def _unwrap(named: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    tensors: dict[str, Tensor] = {}
    removed = set()
    for name, tensor in named.items():
        parts = name.split(".")
        removed.update(part for part in parts if part in WRAPPERS)
        short = ".".join(part for part in parts if part not in WRAPPERS)
        if short in COUNTERS:
            continue
        if short in tensors:
            raise ValueError(f"{where or 'the file'} holds {short} twice, once as {name}: it mixes two state dicts")
        tensors[short] = tensor
    return tensors, tuple(wrapper for wrapper in WRAPPERS if wrapper in removed)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless a tensor holds a number for every entry that its shape claims."""
    # NOTE: a tensor of a few bytes may claim any shape by strides of zero, and modules are built from these shapes.
    # A meta tensor claims its size without holding it.
    held = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided and not tensor.is_meta else 0
    if held < tensor.numel() * tensor.element_size():
        raise ValueError(f"{name} {list(tensor.shape)} is not a dense tensor with a number for every entry")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
