"""Files that outlive a process: training checkpoints, and folders of weights.

A checkpoint is one file with all that a run needs to go on as if it had never stopped. It is written whole or not at
all (temporary file, fsync, rename), and a damaged one is found by its checksums, named and passed over. That of a
sharded model is a folder (sharded.py). A folder of
weights (model.safetensors and config.json) is what other programs load: a stage that builds on another, sampling, the
user. `from_pretrained` reads either, and published files too. Read next: train.py, which decides what goes into a
checkpoint and when; published.py for the files of others; convert.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import secrets
import shutil
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
from hmar.hub import fetch_weights, is_id
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.published import (
    DTYPES,
    LONG,
    Imported,
    MisfitError,
    check_extent,
    import_published,
    make_module,
    make_outline,
    preset_values,
)
from hmar.pyramid import Pyramid
from hmar.recipe import make_config, structure, unknown, unstructure
from hmar.tokenizer import Tokenizer
from hmar.weightfile import check_dense, first_line, read_weightfile

FORMAT = 1
KINDS = ("tokenizer", "next-scale", "masked", "hmar", "var")
# Where `hmar convert` puts a transformer's tokenizer, within its folder.
TOKENIZER_FOLDER = "tokenizer"
WEIGHTS = "model.safetensors"
# Where new weights wait for the description that makes them valid, see `save_pretrained`.
STAGED = "model.safetensors.new"
# Of a sharded checkpoint: sizes and checksums of its files, and what it holds beside tensors.
MANIFEST, STATE = "manifest.json", "state.pt"
_METADATA = "hmar"
_CHECKED = ("format", "weights_sha256")
_STEP = re.compile(r"step-(\d{8})(\.pt)?")  # a file, or the folder of a sharded one


class DamagedCheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message names it and says why."""


def temporary_beside(path: Path, ending: str = "tmp") -> Path:
    """A hidden name beside `path` that no other thread, process or machine takes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{ending}")


def delete_temporaries(folder: Path, names: str = f"*.{'?' * 16}") -> None:
    """Delete what killed writes of files of such names have left in a folder that nobody else writes to."""
    for stale in folder.glob(f".{names}.tmp"):
        delete_checkpoint(stale)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on the disk for good, if the block succeeds.

    A full disk or another failure leaves `path` as it was and raises OSError.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _rename(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk as errors of their own, whose text names no file.
        raise OSError(f"could not write {path}: {error}. Is the disk full? Files written before are intact.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place if the block succeeds; else nothing is left of it.

    What was in `folder` before is deleted, after the new one has its name.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = temporary_beside(folder), temporary_beside(folder, "old")
    try:
        temporary.mkdir()
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _rename(temporary: Path, path: Path) -> None:
    """Give a file on the disk its name there, for good: a power failure undoes no step before a later one."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, state: Mapping[str, Any], step: int, keep: int) -> Path:
    """Write the state after `step` steps to folder/step-00000100.pt (of step 100) and delete all but the newest `keep`.

    The state may hold tensors, dicts, lists, tuples, numbers and strings: what torch.load(weights_only=True) reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    delete_temporaries(folder, "step-*")
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, "step": step, **state}, temporary)
    delete_old(folder, keep)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, files and folders, newest first."""
    return sorted((path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)), reverse=True)


def delete_old(folder: Path, keep: int) -> None:
    """Delete all checkpoints in a folder but the newest `keep`."""
    for old in checkpoints(folder)[keep:]:
        delete_checkpoint(old)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, or what is left of one; nothing if it is gone."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that save_checkpoint wrote, on the CPU. Raises DamagedCheckpointError if any byte of it is wrong.

    Of a folder that sharded.save_sharded wrote, it is what lies beside the tensors; those are verified, too.
    """
    if path.is_dir():
        return _load_folder_state(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # NOTE: torch.load does not compare checksums.
            broken = archive.testzip()
        if broken is not None:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: wrong checksum in its part {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} is not a training checkpoint of format {FORMAT}")
    return state


def _load_folder_state(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, facts in manifest["files"].items():
            file = path / name
            if file.stat().st_size != facts["size"] or sha256_of(file) != facts["sha256"]:
                raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} is not as it was written")
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {first_line(error)}") from error


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

    `notes` are kept in config.json beside the kind, the sizes and the checksum of the weights (JSON values). The sizes
    are in model.safetensors too, so that it can be loaded by itself. Returns the folder.

    Weights that are there are replaced together with their config.json, in one step: the new weights wait under
    another name until the new config.json, which knows their checksum, has taken the place of the old one. Who reads
    meanwhile, or after a save that was killed, finds the old pair or the new one.
    """
    folder = Path(folder)
    description = {"format": FORMAT, **_describe(module)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    try:
        with replacing(folder / STAGED) as temporary:
            save_file(tensors, temporary, metadata={_METADATA: json.dumps(description)})
            checksum = sha256_of(temporary)
        with replacing(folder / "config.json") as temporary:
            content = {**description, "weights_sha256": checksum, **notes}
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _rename(folder / STAGED, folder / WEIGHTS)
    except BaseException:
        _settle(folder)
        raise
    return folder


def _settle(folder: Path) -> None:
    """Bring a save that was stopped to its end, or undo it if its description was not yet there."""
    staged = folder / STAGED
    if staged.is_file():
        if _weights_file(folder) == staged:
            _rename(staged, folder / WEIGHTS)
        else:
            staged.unlink()


def _weights_file(folder: Path) -> Path:
    """The weights that config.json describes: model.safetensors, but for the last moment of a save."""
    staged = folder / STAGED
    try:
        if staged.is_file() and sha256_of(staged) == read_description(folder).get("weights_sha256"):
            return staged
    except (OSError, ValueError):  # it has its own name by now, or there is no description yet
        pass
    return folder / WEIGHTS


def from_pretrained(
    source: str | Path,
    *,
    kind: str | None = None,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    part: str | None = None,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    revision: str | None = None,
) -> nn.Module:
    """The module in a file, a folder or a Hugging Face repository, in eval mode and without gradients.

    Args:
        source: a folder that `save_pretrained` wrote, or of a finished run; a checkpoint of a run; a model.safetensors;
            a published .pth, .pt or .safetensors file of VAR or HMAR, or a training checkpoint that contains one; or,
            when nothing here has that name, a Hugging Face id: owner/name of a repository with a folder of weights,
            owner/name/file.pth of one with a published file.
        kind: "tokenizer", "next-scale", "masked", "hmar" or "var"; None for what is there. See `import_published`.
        preset, given: sizes that are known beforehand, see `import_published`. A tokenizer can be given other "sides"
            than it was trained with.
        part: which state dict of a file with several.
        device, attention: where it shall run, and with which implementation of attention.
        revision: branch, tag or commit of the Hugging Face repository.
    Returns:
        Tokenizer, NextScaleTransformer, MaskedTransformer or HMAR.
    Raises:
        ValueError: a sentence that names the file and what is wrong with it; `MisfitError.problems` of its cause lists
            tensors that do not fit. Nothing in a file is ever executed.
        ModuleNotFoundError: a Hugging Face id without huggingface_hub.
    """
    imported = read_pretrained(
        source, kind=kind, preset=preset, given=given, part=part, attention=attention, revision=revision
    )
    return imported.module.to(device).eval().requires_grad_(False)


def read_pretrained(
    source: str | Path,
    *,
    kind: str | None = None,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    part: str | None = None,
    attention: str = "auto",
    revision: str | None = None,
) -> Imported:
    """What `from_pretrained` loads, on the CPU, with where it was found."""
    if kind is not None and kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))
    path = Path(source)
    if not path.exists() and is_id(str(source)):
        path = fetch_weights(str(source), revision)
    if path.is_dir():
        path = _tokenizer_beside(path) if kind == "tokenizer" else path
        module = load_pretrained(path, KINDS if kind is None else (kind,), attention=attention)
        own = _describe(module)
        notes = {name: value for name, value in read_description(path).items() if name not in (*own, *_CHECKED)}
        return Imported(_with_given(path, module, preset, given), own["kind"], str(find_weights(path)), notes=notes)
    if not path.exists():
        raise ValueError(
            f"there is no file or folder {source}, and it has not the form of a Hugging Face id, owner/name"
        )
    tree, metadata = read_weightfile(path)
    try:
        if _METADATA in metadata:
            imported = _import_own(json.loads(metadata[_METADATA]), tree, attention, "the file itself")
        elif isinstance(tree, Mapping) and isinstance(tree.get("config"), str) and {"model", "ema"} <= tree.keys():
            imported = _import_run(tree, part, attention)
        else:
            return import_published(tree, kind=kind, preset=preset, given=given, part=part, attention=attention)
        if kind not in (None, imported.kind):
            raise ValueError(f'it holds weights of kind "{imported.kind}", not "{kind}"')
    except (ValueError, KeyError, TypeError) as error:
        problem = f"it lacks the entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {problem}") from error
    return dataclasses.replace(imported, module=_with_given(path, imported.module, preset, given))


def find_weights(folder: str | Path) -> Path:
    """The folder of weights that `folder` is, or that the training run in `folder` has written (folder/weights)."""
    folder = Path(folder)
    for candidate in (folder, folder / "weights"):
        if (candidate / "config.json").is_file():
            return candidate
    if folder.is_file():
        raise ValueError(f"{folder} is a file, expected a folder of weights: hmar convert {folder} FOLDER makes one")
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
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{path}: {unknown('kind', kind, KINDS)}")
    return description


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu"):
    """The Tokenizer in a folder of weights or of a finished run, or the one that `hmar convert` has put into a model's
    folder, in eval mode. Raises ValueError in one sentence."""
    return load_pretrained(_tokenizer_beside(Path(folder)), ("tokenizer",), device)


def load_model(folder: str | Path, device: str | torch.device = "cpu", attention: str = "auto"):
    """The transformer in a folder of weights or of a finished run, in eval mode: NextScaleTransformer (kinds
    "next-scale" and "var"), MaskedTransformer ("masked") or HMAR ("hmar"). Raises ValueError in one sentence."""
    return load_pretrained(folder, KINDS[1:], device, attention)


def load_pretrained(
    folder: str | Path, kinds: tuple[str, ...], device: str | torch.device = "cpu", attention: str = "auto"
) -> nn.Module:
    """The module in a folder of weights, if it is one of `kinds`; every tensor must be there, of the right shape and
    dtype, and finite."""
    folder = find_weights(folder)
    while True:
        written = _stamp(folder)
        try:
            return _load_folder(folder, kinds, attention).to(device).eval().requires_grad_(False)
        except ValueError:
            # A save may have replaced description and weights between the looks at them.
            if _stamp(folder) == written:
                raise


def _load_folder(folder: Path, kinds: tuple[str, ...], attention: str) -> nn.Module:
    description = read_description(folder)
    if description["kind"] not in kinds:
        raise ValueError(f'{folder} holds weights of kind "{description["kind"]}", expected {" or ".join(kinds)}')
    path = _weights_file(folder)
    try:
        tensors = load_file(path)
        # NOTE: in this order, so that it is not the checksum of an earlier file.
        damaged = description.get("weights_sha256", checksum := sha256_of(path)) != checksum
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {folder} holds only a config.json") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {first_line(error)}") from error
    try:
        module = _fill(description, tensors, attention)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks the entry {error}") from None
    except MisfitError as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if damaged:
        raise ValueError(f"{path} is damaged: its checksum is not the one in its config.json")
    return module


def _stamp(folder: Path) -> tuple[int | bool, ...] | None:
    """Changes with every step of a save that changes which files are the weights."""
    try:
        status = (folder / "config.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size, (folder / STAGED).exists()


def check_tensors(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises MisfitError unless two sets of named tensors agree in names, shapes and dtypes and all numbers are finite.

    `expected` may be on the meta device. Where it has floating-point numbers any of DTYPES will do, if its own dtype
    can hold them.
    """
    groups: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in got],
        "unexpected": [name for name in got if name not in expected],
    }
    for name, tensor in expected.items():
        if name not in got:
            continue
        dtypes = (tensor.dtype, *(dtype for dtype in DTYPES if tensor.is_floating_point() and dtype != tensor.dtype))
        if got[name].shape != tensor.shape:
            problem = f"{name} is {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
            groups.setdefault("wrong shape", []).append(problem)
        elif got[name].dtype not in dtypes:
            others = f", or {', '.join(map(str, dtypes[1:]))}, which are converted" if dtypes[1:] else ""
            problem = f"{name} is {got[name].dtype}, expected {dtypes[0]}{others}"
            groups.setdefault("wrong dtype", []).append(problem)
        elif bad := int(got[name].numel() - got[name].to(dtypes[0]).isfinite().sum()):
            problem = f"{name} holds {bad} numbers that are NaN or infinite, of {got[name].numel()}"
            groups.setdefault("not finite", []).append(problem)
    problems = [problem for names in groups.values() for problem in names]
    if problems:
        listed = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in groups.items() if names)
        remedy = ": take weights from before the training diverged" if "not finite" in groups else ""
        raise MisfitError.summed_up(listed + remedy, problems)


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of the weights in a folder, to tell whether two folders hold the same ones."""
    return sha256_of(_weights_file(find_weights(folder)))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_beside(folder: Path) -> Path:
    """The tokenizer's folder within that of a converted model, if there is one; else the folder."""
    inner = folder / TOKENIZER_FOLDER
    return inner if (inner / "config.json").is_file() and (folder / "config.json").is_file() else folder


def _import_own(description: Any, tensors: Mapping[str, Any], attention: str, origin: str) -> Imported:
    """A module from tensors under this package's names."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))
    try:
        return Imported(_fill(description, tensors, attention), kind, origin)
    except MisfitError as error:
        raise MisfitError.summed_up(f"its tensors do not fit its description: {error}", error.problems) from None


def _import_run(state: Mapping[str, Any], part: str | None, attention: str) -> Imported:
    """The module in a checkpoint of a run: its moving average if it has one, unless `part` says "model"."""
    mapping = json.loads(state["config"])
    if not isinstance(mapping, dict):
        raise ValueError(f"its configuration is {mapping!r}, expected sections with keys")
    config = make_config(mapping)
    part = part or ("model" if state["ema"] is None else "ema")
    if part not in ("model", "ema") or state[part] is None:
        raise ValueError(f'it has no part "{part}"; it has model{"" if state["ema"] is None else " and ema"}')
    tensors = state[part]
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f'its part "{part}" is no state dict')
    if part == "ema":
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items() if name != "n_averaged"}
    if config.stage == "tokenizer":
        description = {"tokenizer": unstructure(config.tokenizer), "sides": list(config.model.sides)}
    else:
        description = {"model": unstructure(config.model)}
    return _import_own({"kind": config.stage, **description}, tensors, attention, part)


def _with_given(path: Path, module: nn.Module, preset: str | None, given: Mapping[str, Any] | None) -> nn.Module:
    """The module, if it has the given sizes; a tokenizer is fitted to the given sides."""
    is_tokenizer = isinstance(module, Tokenizer)
    wanted = preset_values("tokenizer" if is_tokenizer else "transformer", preset) | dict(given or {})
    wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}
    sides = wanted.pop("sides", None) if is_tokenizer else None
    has = unstructure(module.config)
    for name in wanted:
        if name not in has:
            raise ValueError(unknown("key", name, [*has, "sides"] if is_tokenizer else has))
    differences = [f"{name} is {has[name]}, not {wanted[name]}" for name in wanted if wanted[name] != has[name]]
    if differences:
        raise MisfitError(f"{path} has other sizes than asked for", differences)
    if sides is None or tuple(sides) == module.pyramid.sides:
        return module
    fitted = Tokenizer(module.config, Pyramid(tuple(sides)))
    fitted.load_state_dict(module.state_dict())
    return fitted


def _describe(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, Tokenizer):
        return {"kind": "tokenizer", "tokenizer": unstructure(module.config), "sides": list(module.pyramid.sides)}
    if isinstance(module, NextScaleTransformer):
        kind = {"block_diagonal": "next-scale", "block_causal": "var"}[module.pattern]
    elif isinstance(module, (MaskedTransformer, HMAR)):
        kind = "masked" if isinstance(module, MaskedTransformer) else "hmar"
    else:
        raise ValueError(f"cannot save a {type(module).__name__}: expected a Tokenizer or one of the transformers")
    return {"kind": kind, "model": unstructure(module.config)}


def _fill(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], attention: str) -> nn.Module:
    """The module of a description with these tensors; MisfitError if they are not its own.

    Nothing of the size that a description claims is made before the tensors turn out to have that size.
    """
    kind = description["kind"]
    if kind == "tokenizer":
        config, sides = structure(description["tokenizer"], TokenizerConfig), Pyramid(tuple(description["sides"])).sides
    else:
        config = structure(description["model"], ModelConfig)
        sides = config.sides
    check_extent(config, sides)
    for name, tensor in tensors.items():
        check_dense(name, tensor)
    if kind != "tokenizer" and config.pyramid.length > LONG:
        position = {"embedding.position_LC": torch.empty(config.pyramid.length, config.width, device="meta")}
        check_tensors({name: tensors[name] for name in position if name in tensors}, position)
    check_tensors(tensors, make_outline(kind, config, sides, attention).state_dict())
    module = make_module(kind, config, sides, attention)
    module.load_state_dict(tensors)
    return module


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
