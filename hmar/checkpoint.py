"""Files that outlive a process: training checkpoints, and folders of weights.

A checkpoint is one file with all that a run needs to go on as if it had never stopped. It is written whole or not at
all (temporary file, fsync, rename), and a damaged one is found by its checksums, named and passed over. A folder of
weights (model.safetensors and config.json) is what other programs load: a stage that builds on another, sampling, the
user. Read next: train.py, which decides what goes into a checkpoint and when.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hmar.config import ModelConfig, TokenizerConfig
from hmar.pyramid import Pyramid
from hmar.recipe import structure, unknown, unstructure

FORMAT = 1
KINDS = ("tokenizer", "next-scale", "masked", "hmar", "var")
_STEP_FILE = re.compile(r"step-(\d{8})\.pt")


class DamagedCheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message names it and says why."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on the disk for good, if the block succeeds.

    A full disk or another failure leaves `path` as it was and raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk as errors of their own, whose text names no file.
        raise OSError(f"could not write {path}: {error}. Is the disk full? Files written before are intact.") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(folder: Path, state: Mapping[str, Any], step: int, keep: int) -> Path:
    """Write the state after `step` steps to folder/step-XXXXXXXX.pt and delete all but the newest `keep`.

    The state may hold tensors, dicts, lists, tuples, numbers and strings: what torch.load(weights_only=True) reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".step-*.tmp"):
        stale.unlink(missing_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, "step": step, **state}, temporary)
    for old in checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("step-*.pt") if _STEP_FILE.fullmatch(path.name)]
    return sorted(found, reverse=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that save_checkpoint wrote, on the CPU. Raises DamagedCheckpointError if any byte of it is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            # NOTE: torch.load does not compare checksums.
            broken = archive.testzip()
        if broken is not None:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: wrong checksum in its part {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {_first_line(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} is not a training checkpoint of format {FORMAT}")
    return state


def newest_checkpoint(
    folder: Path, on_damaged: Callable[[DamagedCheckpointError], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its path; each damaged one on the way is given to `on_damaged`."""
    for path in checkpoints(folder):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpointError as error:
            on_damaged(error)
    return None


def rng_state() -> dict[str, Any]:
    """The state of the process's random generators: Python, numpy, torch on the CPU and on every GPU."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *(item for item in rest)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Inverse of rng_state; GPUs that the state does not know are left alone."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)


def save_pretrained(folder: str | Path, module: nn.Module, **notes: Any) -> Path:
    """Write a Tokenizer, NextScaleTransformer, MaskedTransformer or HMAR as model.safetensors and config.json.

    `notes` are kept in config.json beside the kind and the sizes (JSON values). Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {"format": FORMAT, **_describe(module), **notes}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return folder


def find_weights(folder: str | Path) -> Path:
    """The folder of weights that `folder` is, or that the training run in `folder` has written (folder/weights)."""
    folder = Path(folder)
    for candidate in (folder, folder / "weights"):
        if (candidate / "config.json").is_file():
            return candidate
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: expected a folder of weights or the output folder of a finished run")
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"the run in {folder} has not finished, it holds checkpoints but no weights: go on with it "
            f"(hmar train ... --resume output_dir={folder}) until it has written {folder / 'weights'}"
        )
    raise ValueError(f"{folder} holds no weights: expected config.json and model.safetensors in it or in its weights/")


def read_description(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder of weights: "kind", "tokenizer" and "sides" or "model", and the notes."""
    path = find_weights(folder) / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{path}: {unknown('kind', kind, KINDS)}")
    return description


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu"):
    """The Tokenizer in a folder of weights or of a finished run, in eval mode. Raises ValueError in one sentence."""
    return load_pretrained(folder, ("tokenizer",), device)


def load_model(folder: str | Path, device: str | torch.device = "cpu", attention: str = "auto"):
    """The transformer in a folder of weights or of a finished run, in eval mode: NextScaleTransformer (kinds
    "next-scale" and "var"), MaskedTransformer ("masked") or HMAR ("hmar"). Raises ValueError in one sentence."""
    return load_pretrained(folder, KINDS[1:], device, attention)


def load_pretrained(
    folder: str | Path, kinds: tuple[str, ...], device: str | torch.device = "cpu", attention: str = "auto"
) -> nn.Module:
    """The module in a folder of weights, if it is one of `kinds`; every tensor must be there with the right shape."""
    folder = find_weights(folder)
    description = read_description(folder)
    if description["kind"] not in kinds:
        raise ValueError(f'{folder} holds weights of kind "{description["kind"]}", expected {" or ".join(kinds)}')
    try:
        module = _build(description, attention)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks the entry {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {folder} holds only a config.json") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {_first_line(error)}") from error
    differences = compare_tensors(tensors, module.state_dict())
    if differences:
        raise ValueError(f"{path} does not fit its config.json: {differences}")
    module.load_state_dict(tensors)
    return module.to(device).eval().requires_grad_(False)


def compare_tensors(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """What differs between two sets of named tensors, in words; empty if names and shapes agree."""
    shapes = [
        f"{name} is {tuple(got[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in got and got[name].shape != expected[name].shape
    ]
    groups = (
        ("missing", [name for name in expected if name not in got]),
        ("unexpected", [name for name in got if name not in expected]),
        ("wrong shape", shapes),
    )
    return "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in groups if names)


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of the weights in a folder, to tell whether two folders hold the same ones."""
    with open(find_weights(folder) / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(module: nn.Module) -> dict[str, Any]:
    from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
    from hmar.tokenizer import Tokenizer

    if isinstance(module, Tokenizer):
        return {"kind": "tokenizer", "tokenizer": unstructure(module.config), "sides": list(module.pyramid.sides)}
    if isinstance(module, NextScaleTransformer):
        kind = {"block_diagonal": "next-scale", "block_causal": "var"}[module.pattern]
    elif isinstance(module, (MaskedTransformer, HMAR)):
        kind = "masked" if isinstance(module, MaskedTransformer) else "hmar"
    else:
        raise ValueError(f"cannot save a {type(module).__name__}: expected a Tokenizer or one of the transformers")
    return {"kind": kind, "model": unstructure(module.config)}


def _build(description: Mapping[str, Any], attention: str) -> nn.Module:
    from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
    from hmar.tokenizer import Tokenizer

    if description["kind"] == "tokenizer":
        sides = tuple(description["sides"])
        return Tokenizer(structure(description["tokenizer"], TokenizerConfig), Pyramid(sides))
    config = structure(description["model"], ModelConfig)
    match description["kind"]:
        case "next-scale":
            return NextScaleTransformer(config, pattern="block_diagonal", attention=attention)
        case "var":
            return NextScaleTransformer(config, pattern="block_causal", attention=attention)
        case "masked":
            return MaskedTransformer(config, attention)
    return HMAR(config, attention)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
