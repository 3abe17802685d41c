"""Weights by their Hugging Face id, through the optional package huggingface_hub and its cache.

Read checkpoint.py for what is done with the files.
"""

from __future__ import annotations

import re
from pathlib import Path

from hmar.weightfile import SUFFIXES, first_line

# owner/name, or owner/name/path/of/a/file.pth
_ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:/(.+))?")
FOLDER_FILES = ("config.json", "model.safetensors", "tokenizer/config.json", "tokenizer/model.safetensors")


def is_id(source: str) -> bool:
    """Whether a text has the form of a Hugging Face id, with or without a weight file in the repository."""
    match = _ID.fullmatch(source)
    return match is not None and (match[2] is None or match[2].endswith(SUFFIXES))


def fetch_weights(source: str, revision: str | None = None) -> Path:
    """The local copy of a repository's weights: a folder for owner/name, a file for owner/name/file.pth.

    Downloads what the cache of huggingface_hub lacks; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as everywhere. Raises
    ModuleNotFoundError without huggingface_hub, and ValueError when the repository, revision or file is not to be had.
    """
    match = _ID.fullmatch(source)
    assert match is not None
    repository, file = match.groups()
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"there is no file or folder {source} here, and to get it from Hugging Face the package huggingface_hub is "
            "needed: pip install 'hmar[hub]'"
        ) from None
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=[*FOLDER_FILES]))
    except Exception as error:  # NOTE: errors of its HTTP client come through as they are, and that client has changed.
        raise ValueError(
            f"there is no file or folder {source} here, and Hugging Face did not give it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"the Hugging Face repository {repository} has no config.json of this package; name the file in it, as in "
            f"{repository}/model.pth"
        )
    return folder
