"""The command as people type it: a process of its own for what works, `main` itself where only the answer matters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hmar.checkpoint import checkpoints, load_model
from hmar.config import PRESETS
from hmar.model import HMAR
from hmar_command import hmar_here
from run_files import assert_same_bits, weights

HMAR_COMMAND = [sys.executable, "-c", "from hmar.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
TINY = ("preset=tiny", "model.num_classes=10", "batch_size=8", "device=cpu")


def hmar(*arguments, cwd=None):
    command = [*HMAR_COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=300)


def succeed(*arguments, cwd=None, run=hmar):
    result = run(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def fail(*arguments, cwd=None, run=hmar_here):
    """Bad input: exit code 2, one line on stderr, no traceback. Returns that line."""
    result = run(*arguments, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which all four stages have been trained for two steps, by the commands in the help text."""
    folder = tmp_path_factory.mktemp("cli")
    short = (*TINY, "steps=2")
    succeed("train", "tokenizer", *short, "output_dir=tokenizer", cwd=folder)
    on_codes = (*short, "tokenizer_weights=tokenizer")
    succeed("train", "next-scale", *on_codes, "output_dir=next-scale", cwd=folder)
    masked = ("output_dir=hmar", "next_scale_weights=next-scale")
    result = succeed("train", "masked", *on_codes, *masked, cwd=folder)
    assert result.stdout == "masked: 2 steps done, weights in hmar/weights\n"
    assert "masked 2/2" in result.stderr
    assert "images/s" in result.stderr
    (folder / "var.yaml").write_text("preset: tiny\nmodel: {num_classes: 10}\nbatch_size: 8\ndevice: cpu\nsteps: 99\n")
    overrides = ("steps=2", "output_dir=var", "tokenizer_weights=tokenizer")
    succeed("train", "var", "--config", "var.yaml", *overrides, cwd=folder)
    return folder


def png_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*-class-*.png")}


def test_help_is_there_at_once_and_names_every_command():
    started = time.monotonic()
    result = succeed("--help")
    elapsed = time.monotonic() - started
    assert all(command in result.stdout for command in ("train", "sample", "evaluate", "demo", "info"))
    imported = "import sys; import hmar.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True).stdout == "False\n"
    assert elapsed < 30
    for command in ("train", "sample", "evaluate", "demo", "info"):
        assert "Usage: " in succeed(command, "--help", run=hmar_here).stdout


def test_sampling_writes_images_and_goes_on_where_it_stopped(folder):
    common = ("sample", "--model", "hmar", "--classes", "0-1,7", "--seed", "3", "--quiet")
    settings = ("--top-k", "20", "--top-p", "0.9", "--schedule", "{2: [1, 3]}")
    succeed(*common, *settings, "--count", "3", "--output", "images", cwd=folder)
    first = png_bytes(folder / "images")
    names = [f"{number:06d}-class-{target}.png" for number, target in enumerate([0, 1, 7] * 3)]
    assert sorted(first) == names
    with Image.open(folder / "images" / names[0]) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    with Image.open(folder / "images" / "grid.png") as grid:
        assert grid.size[0] > 3 * 16 - 1
        assert np.asarray(grid).std() > 0

    # Two images are missing, and more are asked for; those that are there are not touched, and none depends on a batch.
    for name in (names[4], names[8], "grid.png"):
        (folder / "images" / name).unlink()
    untouched = folder / "images" / names[0]
    stamp = untouched.stat().st_mtime_ns
    succeed(*common, *settings, "--count", "4", "--batch-size", "2", "--output", "images", cwd=folder, run=hmar_here)
    second = png_bytes(folder / "images")
    assert len(second) == 12
    assert {name: second[name] for name in names} == first
    assert untouched.stat().st_mtime_ns == stamp
    assert (folder / "images" / "grid.png").exists()

    message = fail(*common, "--count", "3", "--output", "images", cwd=folder)
    assert "made with other settings (top_k was 20, now 0)" in message
    succeed(*common, "--count", "1", "--output", "images", "--overwrite", cwd=folder, run=hmar_here)
    assert len(png_bytes(folder / "images")) == 3


@pytest.mark.parametrize("model", ["next-scale", "var"])
def test_sampling_from_next_scale_models(folder, tmp_path, model):
    arguments = ("--model", model, "--tokenizer", "tokenizer", "--output", tmp_path)
    result = succeed("sample", *arguments, "--classes", "5", "--count", "2", cwd=folder, run=hmar_here)
    assert sorted(png_bytes(tmp_path)) == ["000000-class-5.png", "000001-class-5.png"]
    assert "2/2" in result.stderr
    assert "images/s" in result.stderr
    message = fail("sample", *arguments, "--schedule", "2", cwd=folder)
    assert f'model of kind "{model}", which has no masked passes' in message


def test_sampling_errors(folder, tmp_path):
    common = ("sample", "--model", "hmar", "--output", tmp_path / "none")
    assert "classes [99]: expected numbers from 0 to 9, or 10" in fail(*common, "--classes", "0,99", cwd=folder)
    assert '--classes is "a": expected numbers' in fail(*common, "--classes", "a", cwd=folder)
    assert '"{1: 2}" is not a schedule' in fail(*common, "--schedule", "{1: 2}", cwd=folder)
    assert "add up to 4" in fail(*common, "--schedule", "{2: [1, 1]}", cwd=folder)
    assert "known: auto, fp32, bf16" in fail(*common, "--precision", "fp16", cwd=folder)
    assert "holds a tokenizer" in fail("sample", "--model", "tokenizer", "--output", tmp_path / "none", cwd=folder)
    assert "no folder nowhere" in fail("sample", "--model", "nowhere", "--output", tmp_path / "none", cwd=folder)
    assert "no folder tokenizer of the tokenizer, with which" in fail(
        "sample", "--model", folder / "hmar", "--output", tmp_path / "none", cwd=tmp_path
    )
    assert not (tmp_path / "none").exists()


def test_info_shows_the_installation_a_preset_and_a_folder(folder):
    shown = succeed("info").stdout
    for expected in (torch.__version__, "triton", "reference: available", "d16-256", "digits-32"):
        assert expected in shown
    shown = succeed("info", "d16-256", run=hmar_here).stdout
    assert "680" in shown
    assert "310," in shown  # million parameters of VAR d16
    shown = succeed("info", "hmar", cwd=folder, run=hmar_here).stdout
    assert "hmar/weights" in shown
    parameters = f"{sum(p.numel() for p in HMAR(PRESETS['digits-32'][1]).parameters()):,}"
    assert parameters in succeed("info", "digits-32", run=hmar_here).stdout
    assert f"{sum(p.numel() for p in load_model(folder / 'hmar').parameters()):,}" in shown
    assert isinstance(load_model(folder / "hmar"), HMAR)
    assert 'unknown preset "d17-256": did you mean d1' in fail("info", "d17-256")


def test_mistakes_are_answered_in_one_sentence(folder, tmp_path):
    short = (*TINY, f"output_dir={tmp_path / 'run'}")
    message = fail("train", "tokenizer", *short, "optimizer.lrr=1", run=hmar)
    assert 'unknown key "optimizer.lrr": did you mean optimizer.lr' in message
    assert "known: optimizer.lr, optimizer.betas" in message
    assert "known: d16-256" in fail("train", "tokenizer", "preset=d99", "output_dir=x")
    assert "known: tokenizer, next-scale, masked, var" in fail("train", "tokenizers", *short)
    assert "known: auto, reference, triton" in fail(
        "train", "var", *short, "attention=fast", f"tokenizer_weights={folder / 'tokenizer'}"
    )
    missing = fail("train", "var", *short, "tokenizer_weights=nowhere")
    assert "no folder nowhere" in missing
    assert "already holds a run" in fail("train", "tokenizer", *TINY, "output_dir=tokenizer", cwd=folder)
    assert "no configuration file nothing.yaml" in fail("train", "tokenizer", "--config", "nothing.yaml", cwd=folder)
    assert not (tmp_path / "run").exists()
    usage = hmar_here("train")
    assert usage.returncode == 2
    assert "Missing argument" in usage.stderr
    traced = hmar("train", "tokenizer", *short, "optimizer.lrr=1", "--traceback")
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr
    assert 'ValueError: unknown key "optimizer.lrr"' in traced.stderr


def test_a_damaged_image_stops_the_run_with_its_name(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "good.png")
    (tmp_path / "images" / "dogs" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    run = ("train", "tokenizer", "preset=tiny", "steps=2", "batch_size=4", "output_dir=run", "data.name=folder")
    assert f"Cannot read the image {Path('images/dogs/bad.png')}" in fail(*run, "data.path=images", cwd=tmp_path)
    result = succeed(
        *run, "data.path=images", "data.on_error=skip", "--overwrite", "--quiet", cwd=tmp_path, run=hmar_here
    )
    assert result.stderr == ""
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_images"] == 1


def test_a_damaged_checkpoint_is_named_and_weights_are_complete_again(folder, tmp_path):
    run = ("train", "var", *TINY, "steps=4", "checkpoint_every=1", f"tokenizer_weights={folder / 'tokenizer'}")
    succeed(*run, "output_dir=run", cwd=tmp_path, run=hmar_here)
    path = tmp_path / "run" / "weights" / "model.safetensors"
    expected = load_file(path)
    newest, older = checkpoints(tmp_path / "run" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-100])
    path.unlink()  # the loaded tensors still map the old file
    path.write_bytes(b"")
    assert "model.safetensors is damaged or cut short" in fail("info", "run", cwd=tmp_path)
    result = succeed("train", "var", "--resume", "output_dir=run", cwd=tmp_path)
    assert f"{newest.relative_to(tmp_path)} is damaged" in result.stderr
    assert "passed over" in result.stderr
    assert f"{older.relative_to(tmp_path)} holds the state after step 3" in result.stderr
    actual = load_file(path)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def interrupt(arguments, folder: Path, number: int, rows: int) -> subprocess.CompletedProcess:
    """Run until metrics.jsonl has so many rows, then send the signal."""
    metrics = folder / "metrics.jsonl"
    process = subprocess.Popen(
        [*HMAR_COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < rows:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_an_interrupted_process_goes_on_to_the_same_weights(folder, tmp_path):
    """Interrupted at any step: the rate is constant, so that a run that would be far longer is the same until there."""
    constant = ("optimizer.warmup=0", "optimizer.flat=1")
    run = ["train", "next-scale", *TINY, *constant, "log_every=1", "model.drop_path=0.1", "data.workers=1"]
    run.append(f"tokenizer_weights={folder / 'tokenizer'}")

    parts = tmp_path / "parts"
    first = interrupt([*run, "steps=1000000", f"output_dir={parts}"], parts, signal.SIGINT, rows=10)
    assert first.returncode == 130, first.stderr
    assert "stopped by SIGINT after step" in first.stderr
    resume = f"hmar train next-scale --resume output_dir={parts}"
    assert resume in first.stderr
    assert "Traceback" not in first.stderr
    assert not (parts / "weights").exists()
    done = json.loads((parts / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert done >= 10

    second = interrupt(resume.split()[1:], parts, signal.SIGTERM, rows=done + 10)
    assert second.returncode == 143, second.stderr
    assert f"holds the state after step {done}" in second.stderr
    steps = json.loads((parts / "metrics.jsonl").read_text().splitlines()[-1])["step"] + 20
    succeed(*resume.split()[1:], f"steps={steps}", "--quiet")
    succeed(*run, f"steps={steps}", f"output_dir={tmp_path / 'whole'}", "--quiet")
    assert_same_bits(weights(parts), weights(tmp_path / "whole"))
    logged = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, steps + 1))
