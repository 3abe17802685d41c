"""The raw results in reports/data: which files are of a kind, and where their numbers come from.

Read next: attention_data.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .markdown import or_dash

TARGET_GPU = "H100"  # of the times and memory that this project set out to reach


@dataclass(frozen=True)
class Source:
    """One data file: where the numbers come from, and a frame of them. Kinds that need more have their own class."""

    path: Path
    environment: dict
    rows: pd.DataFrame


def write_tables(folder: Path, kind: str, csv: str, markdown: str) -> list[Path]:
    """<kind>.csv and <kind>.md of a folder; returns their paths."""
    paths = [folder / f"{kind}.csv", folder / f"{kind}.md"]
    for path, text in zip(paths, (csv, markdown), strict=True):
        path.write_text(text)
    return paths


def data_files(folder: Path, kind: str, versions: tuple[int, ...]) -> Iterator[tuple[Path, dict]]:
    """Path and content of the files of a kind, by name. Raises ValueError for a version that is not known here."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("kind") != kind:
            continue
        if content.get("version") not in versions:
            known = f"version{'s' * (len(versions) > 1)} {' and '.join(map(str, versions))}"
            raise ValueError(f"{path} is of version {content.get('version')}; this script reads {known}")
        yield path, content


def provenance(path: Path, environment: dict, rows: pd.DataFrame) -> str:
    """Data file, commits, date and versions, in Markdown."""
    commits = ", ".join(f"`{or_dash(commit)}`" for commit in rows["commit"].drop_duplicates())
    return (
        f"[{path.name}](../data/{path.name}): commit {commits}, {environment['date'][:10]}, torch "
        f"{environment['torch']}, triton {or_dash(environment['triton'])}, CUDA {or_dash(environment['cuda'])}, "
        f"driver {or_dash(environment['driver'])}"
    )
