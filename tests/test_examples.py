"""The examples, run as people run them: short, without a GPU, and saying what they claim."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from golden_folder import OTHER_SIZES, write_golden
from hmar import examples

FOLDER = Path(examples.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(name, *arguments, cwd, by_path=False):
    """What the example prints; it must succeed and say nothing on stderr."""
    how = [str(FOLDER / f"{name}.py")] if by_path else ["-m", f"hmar.examples.{name}"]
    command = [sys.executable, *how, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the example of training has run."""
    folder = tmp_path_factory.mktemp("examples")
    printed = run("train", "runs/example", cwd=folder)
    assert re.findall(r"(\S+): 3 steps", printed) == ["tokenizer", "next-scale", "masked"]
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short_and_listed(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert text.count("\n") < 40
    assert f"python -m hmar.examples.{name}" in text.splitlines()[0]
    assert f"python -m hmar.examples.{name}" in examples.__doc__


def test_attention(tmp_path):
    printed = run("attention", "--sides", 1, 2, 4, cwd=tmp_path)
    assert "HMAR: 273 of 441 pairs" in printed and "VAR: 357 of 441 pairs" in printed
    errors = [float(error) for error in re.findall(r"error ([\d.e+-]+)", printed)]
    assert len(errors) == 2 and max(errors) < 1e-5


def test_custom_mask(tmp_path):
    printed = run("custom_mask", "--length", 5, "--reach", 1, cwd=tmp_path)
    assert printed.splitlines()[1:6] == ["##...", "###..", ".###.", "..##.", "...#."]
    assert "hidden key seen: False" in printed


def test_codes(folder):
    printed = run("codes", "runs/example", cwd=folder)
    assert "1442 images x 1 crops in 3 shards" in printed and "VAR on codes: 3 steps" in printed
    codes = json.loads(re.search(r"image 7, class \d: (\[.*\])", printed)[1])
    assert len(codes) == 1 + 4 + 16 and max(codes) < 32


def test_sample(folder):
    assert "10 classes with 4 schedules" in run("sample", "runs/example", "--output", "samples.png", cwd=folder)
    shown = pixels(folder / "samples.png")
    assert shown.shape == (4 * 16, 10 * 16, 3)
    assert run("sample", "runs/example", "--output", "again.png", cwd=folder, by_path=True)
    assert np.array_equal(pixels(folder / "again.png"), shown)


def test_serve(folder):
    printed = run("serve", "runs/example", "--output", "served.png", cwd=folder)
    assert "refused" in printed and "at most 8 may, so 8 more were refused" in printed
    assert "8 images, and 3 previews of the last one" in printed
    assert pixels(folder / "served.png").shape == (2 * 16, 8 * 16, 3)


def test_edit(folder):
    printed = run("edit", "runs/example", "--output", "edits.png", cwd=folder)
    assert "what the hole showed changes nothing: True" in printed
    # Half of the image is known: of 1 + 4 + 16 codes 1, 2 and 8.
    assert "11 of 21 codes were known" in printed
    assert pixels(folder / "edits.png").shape == (4 * 16, 4 * 16, 3)


def test_weights(folder):
    printed = run("weights", "runs/example", "--output", "weights", cwd=folder)
    assert "the same weights: True" in printed and "HMAR in weights/hmar" in printed
    assert (folder / "weights" / "hmar.pth").stat().st_size > 100_000


def test_evaluate(folder):
    printed = run("evaluate", "runs/example", "--output", "evaluation", cwd=folder)
    report = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert f"'fid': {report['metrics']['fid']:.3f}" in printed
    assert np.load(folder / "evaluation" / "samples.npz")["arr_0"].shape == (40, 16, 16, 3)


def test_parity(tmp_path):
    write_golden(tmp_path / "golden", OTHER_SIZES)
    printed = run("parity", "golden", cwd=tmp_path)
    numbers = re.search(r"(\d+) of (\d+) quantities agree", printed)
    assert numbers[1] == numbers[2] and int(numbers[1]) >= 20
