"""Checkpoints of a sharded model: a folder that all processes write, each its part, and any number can read.

    step-00000100/           .metadata and __RANK_N.distcp: tensors, in the format of torch.distributed.checkpoint
      state.pt               everything else
      manifest.json          size and SHA-256 of all files

The folder gets its name when everything is on the disk, the manifest last, so that one that has the name is whole
unless it was damaged later; checkpoint.load_checkpoint looks. Tensors are saved and loaded where they lie, as plain or
sharded ones (DTensor): the number of processes and the kind of sharding may differ. All processes need to see the same
folder.
Read next: checkpoint.py, which finds and verifies checkpoints, those of one file too.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from hmar.checkpoint import (
    FORMAT,
    MANIFEST,
    STATE,
    delete_checkpoint,
    delete_old,
    delete_temporaries,
    sha256_of,
    sync_folder,
    temporary_beside,
)
from hmar.processes import Processes
from hmar.weightfile import first_line


def save_sharded(
    folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], step: int, keep: int, processes: Processes
) -> Path:
    """Write a checkpoint, as folder/step-00000100 at step 100, and delete all but the newest `keep`; by all processes.

    tensors: plain ones, equal everywhere, or DTensors. state: the rest, that of the first process counts; what
    torch.load(weights_only=True) reads. An OSError of one process is raised in all; earlier checkpoints stay.
    """
    path = folder / f"step-{step:08d}"
    temporary = processes.first_does(lambda: _make_temporary(path))
    try:
        _all_do(processes, path, lambda: _write_tensors(tensors, temporary))
        files = _all_do(
            processes, path, lambda: _write_own(temporary, {"format": FORMAT, "step": step, **state}, processes)
        )
        manifest = {name: facts for part in files for name, facts in part.items()}
        processes.first_does(lambda: _complete(path, temporary, manifest, step))
    except BaseException:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if processes.first:
        delete_old(folder, keep)
    return path


def load_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, plain or sharded, in place; called by all processes. ValueError if one is missing there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path))
        except CheckpointException as error:
            reason = first_line(next(iter(error.failures.values()))[0])
            raise ValueError(f"checkpoint {path} does not fit this run: {reason}") from error


def _make_temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_temporaries(path.parent, "step-*")
    temporary = temporary_beside(path)
    temporary.mkdir()
    return temporary


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        # NOTE: this reports an error of one process in all, so `_all_do` has nothing to wait for in vain.
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, overwrite=True))


def _write_own(folder: Path, state: Mapping[str, Any], processes: Processes) -> dict[str, dict[str, Any]]:
    """Size and checksum of the files that this process has written, which are on the disk then."""
    own = list(folder.glob(f"__{processes.rank}_*"))
    if processes.first:
        torch.save(dict(state), folder / STATE)
        own += [folder / STATE, folder / ".metadata"]
    for path in own:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in own}


def _complete(path: Path, temporary: Path, files: Mapping[str, Any], step: int) -> None:
    with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "step": step, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    if path.exists():  # damaged, or this run would not be here again
        delete_checkpoint(path)
    os.replace(temporary, path)
    sync_folder(path.parent)


def _all_do(processes: Processes, path: Path, action: Callable[[], Any]) -> list[Any]:
    """What the action gives in each process; OSError in all if it fails in one."""
    result = problem = None
    try:
        result = action()
    except CheckpointException as error:
        problem = first_line(next(iter(error.failures.values()))[0])
    except (OSError, RuntimeError) as error:
        problem = first_line(error)
    results = processes.gather((result, problem))
    for rank, (_, problem) in enumerate(results):
        if problem is not None:
            problem += f" (process {rank})"
            raise OSError(f"could not write {path}: {problem}. Is the disk full? Files written before are intact.")
    return [result for result, _ in results]
