"""The README's commands and code, run as they are written (training cut to a few steps)."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hmar import examples
from hmar.cli import app
from hmar.recipe import apply_overrides, make_config, read_stage_config
from published_files import write_published_files

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = "steps=2 batch_size=4 log_every=1 checkpoint_every=2"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(language):
    lines = [line.split("  #")[0].strip() for block in blocks(language) for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run(line, folder):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, env=environment)


def test_hmar_commands_run_in_their_order(tmp_path):
    write_published_files(tmp_path)
    ours = [line for line in commands("bash") if line.startswith("hmar ")]
    assert any(" masked " in line for line in ours) and any(line.startswith("hmar sample") for line in ours)
    for line in ours:
        result = run(f"{line} {SHORT}" if line.startswith("hmar train") else line, tmp_path)
        assert result.returncode == 0, f"{line}\n{result.stderr[-2000:]}"
    assert len(list((tmp_path / "samples").glob("*.png"))) == 21
    assert (tmp_path / "edits/grid.png").exists() and (tmp_path / "runs/evaluation/evaluation.json").exists()
    assert (tmp_path / "weights/hmar/model.safetensors").exists() and (tmp_path / "exported.pth").exists()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_code_runs(code, tmp_path):
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_make_targets_exist():
    wanted = {shlex.split(line)[1] for line in commands("bash") + commands("console") if line.startswith("make ")}
    wanted |= set(re.findall(r"`make ([\w-]+)", README))
    assert {"demo", "test", "test-gpu", "report", "bench", "bench-compare"} <= wanted
    for target in wanted:
        result = run(f"make --dry-run {target} BASE=HEAD", ROOT)
        assert result.returncode == 0, result.stderr


def test_commands_for_many_gpus_are_understood():
    lines = [shlex.split(line) for line in commands("console") if "torchrun" in line]
    assert {words[words.index("hmar") + 1] for words in lines} == {"tokenize", "train", "evaluate"}
    for words in lines:
        name, *arguments = words[words.index("hmar") + 1 :]
        options = typer.main.get_command(app).commands[name].make_context(name, arguments).params
        if name == "train":
            stage = options["stage"]
            make_config(apply_overrides(read_stage_config(options["config"], stage), [f"stage={stage}"]))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_modules_that_are_run_by_name_tell_their_options(monkeypatch, capsys):
    wanted = sorted(set(re.findall(r"python -m ([\w.]+)", README)))
    assert "bench.tune_attention" in wanted
    for module in wanted:
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        # NOTE: in this process, because importing torch in one for each takes minutes.
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        # Examples take a folder; some of them write nothing else.
        wanted_option = "folder" if module.startswith("hmar.examples.") else "--output"
        assert not ended.value.code and wanted_option in capsys.readouterr().out, module


def test_commands_of_examples_are_those_that_the_examples_tell():
    named = re.findall(r"`(python -m hmar\.examples\.[^`]*)`", README)
    told = [re.split(r"\s{2,}", line.strip())[0] for line in examples.__doc__.splitlines()]
    assert {"python -m hmar.examples.train runs/example", "python -m hmar.examples.serve runs/example"} <= set(named)
    assert set(named) <= set(told)


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_files_named_in_the_path_of_an_image_exist():
    for name in re.findall(r"`((?:hmar|kernels|csrc|bench)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name
