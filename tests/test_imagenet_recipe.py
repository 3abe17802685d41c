"""The recipes for ImageNet: the paper's numbers, and the whole chain on a small set of images with the same files."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hmar.checkpoint import load_model, read_description
from hmar.cli import app
from hmar.model import HMAR
from hmar.recipe import make_config, read_stage_config, recipes, with_steps

# HMAR, arXiv 2506.04421: epochs of both stages, global batch, peak learning rate, ratio of the last one to it.
PAPER = {16: (200, 100, 768, 3e-4, 0.1), 20: (250, 100, 768, 3e-4, 0.1)}
PAPER |= {24: (350, 100, 768, 2.4e-4, 0.01), 30: (350, 100, 1024, 3.2e-4, 0.01)}
IMAGES = 1_281_167


@pytest.mark.parametrize("depth", PAPER)
def test_the_recipes_are_those_of_the_paper(depth):
    first, second, batch, lr, final = PAPER[depth]
    name = f"imagenet-256-d{depth}"
    stages = {
        stage: make_config({**read_stage_config(name, stage), "stage": stage}) for stage in ("next-scale", "masked")
    }
    for stage, epochs in zip(stages, (first, second), strict=True):
        config = stages[stage]
        assert (config.epochs, config.batch_size, config.model.depth) == (epochs, batch, depth)
        assert with_steps(config, IMAGES).steps == -(-epochs * IMAGES // batch)
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.final_ratio, optimizer.betas) == (lr, final, (0.9, 0.95))
        assert (optimizer.weight_decay, optimizer.clip) == (0.05, 2.0)
        assert (optimizer.warmup, optimizer.flat, optimizer.start_ratio) == (0.02, 0.05, 0.005)
        assert batch % (8 * config.accumulate) == 0
    assert stages["masked"].next_scale_weights == stages["next-scale"].output_dir
    assert stages["masked"].data == stages["next-scale"].data


def test_recipes_are_found_by_name():
    assert list(recipes()) == [f"imagenet-256-d{depth}" for depth in PAPER]
    with pytest.raises(
        ValueError, match=r"no configuration file imagenet-256, and unknown recipe .*did you mean imagenet"
    ):
        read_stage_config("imagenet-256", "var")


def test_keys_of_a_stage_win_over_the_others(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 5\noptimizer: {lr: 1e-3, clip: 1}\nstages: {var: {steps: 7, optimizer: {lr: 2e-3}}}\n")
    assert read_stage_config(file, "var") == {"steps": 7, "optimizer": {"lr": 2e-3, "clip": 1}}
    assert read_stage_config(file, "masked") == {"steps": 5, "optimizer": {"lr": 1e-3, "clip": 1}}
    file.write_text("stages: {vra: {}}\n")
    with pytest.raises(ValueError, match=r'run.yaml: unknown stage "vra": did you mean var\?'):
        read_stage_config(file, "var")
    file.write_text("stages: 3\n")
    with pytest.raises(ValueError, match="expected a section of keys for each stage"):
        read_stage_config(file, "var")


EXTRACTOR = """
import torch

class Thumbnails(torch.nn.Module):
    size = None

    def forward(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2)
        return small.flatten(1)
"""


@pytest.fixture
def hmar_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def call(*arguments):
        result = runner.invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return call


def test_the_chain_from_images_to_evaluation(tmp_path, hmar_command):
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    sizes = ("preset=tiny", "model.num_classes=2", "device=cpu")
    images = ("data={name: folder, path: images}", "steps=4", "batch_size=4")
    hmar_command("train", "tokenizer", "output_dir=weights/tokenizer", *sizes, *images)
    codes = ("--images", "images", "--output", "data/imagenet-256-codes", "--crops", "2", "--device", "cpu")
    hmar_command("tokenize", "--tokenizer", "weights/tokenizer", *codes)
    smaller = ("epochs=3", "batch_size=4", "compile=false", "data.workers=0", "log_every=1")
    for stage in ("next-scale", "masked"):
        said = hmar_command("train", stage, "--config", "imagenet-256-d16", *sizes, *smaller)
        assert f"{stage}: 9 steps done" in said  # three times twelve images, four a step
    run = "runs/imagenet-256-d16/hmar"
    assert isinstance(load_model(run), HMAR)
    assert read_description(run)["class_names"] == ["cats", "dogs"]
    (tmp_path / "thumbnails.py").write_text(EXTRACTOR)
    drawn = ("--model", run, "--reference", "images", "--count", "8", "--output", "evaluation", "--device", "cpu")
    hmar_command("evaluate", *drawn, "--metrics", "fid", "--extractor", "thumbnails.py:Thumbnails")
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert evaluation["metrics"]["fid"] >= 0
