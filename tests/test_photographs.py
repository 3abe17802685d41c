"""The run at 256 px on photographs: its classifier, its pictures, and on a GPU all of it for a few steps."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from hmar import photographs
from hmar.config import PRESETS
from hmar.data import Photographs
from hmar.model import HMAR
from hmar.tokenizer import Tokenizer


def test_classifier_names_crops_it_was_not_trained_on():
    images, classes = photographs.crops(Photographs(64, "test", seed=1), per_class=2)
    named = photographs.crop_classifier(seed=0, per_class=20)(images)
    assert (named == classes).float().mean() > 0.9
    assert (named == classes.roll(2)).float().mean() < 0.05


def test_psnr_of_a_known_error():
    real = torch.zeros(3, 3, 8, 8)
    assert photographs.psnr(real + 0.2, real) == pytest.approx(20.0, abs=1e-4)


def test_stages_take_the_photographs_and_the_weights_before_them(tmp_path):
    configs = {stage: photographs.stage_config(photographs.Plan(), stage, tmp_path) for stage in photographs.STAGES}
    assert all(config.data.name == "photographs" and config.data.size == 256 for config in configs.values())
    assert configs["tokenizer"].model.pyramid.length == 680
    assert configs["masked"].next_scale_weights == str(tmp_path / "next-scale")
    built_on = {stage: config.tokenizer_weights for stage, config in configs.items()}
    assert built_on == {"tokenizer": None, **dict.fromkeys(("next-scale", "masked"), str(tmp_path / "tokenizer"))}


def test_summary_says_what_it_was_measured_with(tmp_path, monkeypatch):
    """The run without its training and at 16 px: a tokenizer and an HMAR of random weights."""
    tokenizer_config, config = PRESETS["tiny"]
    config = dataclasses.replace(config, num_classes=16)
    tokenizer = Tokenizer(tokenizer_config, config.pyramid).eval()
    monkeypatch.setattr(photographs, "train", lambda config, **options: None)
    monkeypatch.setattr(photographs, "load_tokenizer", lambda folder, device: tokenizer)
    monkeypatch.setattr(photographs, "load_model", lambda folder, device: HMAR(config).eval())
    for stage in photographs.STAGES:
        (tmp_path / "runs" / stage).mkdir(parents=True)
        row = {"step": 1, "loss": 1.0, "images_per_second": 2.0}
        (tmp_path / "runs" / stage / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    options = {"plan": photographs.QUICK, "device": "cpu", "progress": False}
    summary = photographs.run(tmp_path / "report", run_folder=tmp_path / "runs", **options)
    assert json.loads((tmp_path / "report/summary.json").read_text()) == summary
    assert {"date", "commit", "device", "threads", "python", "torch", "numpy"} <= summary["machine"].keys()
    assert (summary["generated_crops"], summary["tokens"]) == (16, config.pyramid.length)
    assert_pictures(tmp_path / "report")


def assert_pictures(folder):
    for name in ("reconstruction.jpg", "generated.jpg", "loss_curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300 and len(np.unique(np.asarray(picture.convert("L")))) > 50


@pytest.mark.gpu
def test_quick_run_writes_everything(tmp_path):
    summary = photographs.run(tmp_path / "report", run_folder=tmp_path / "runs", plan=photographs.QUICK, progress=False)
    assert summary["tokens"] == 680 and summary["classifier_accuracy_on_real_crops"] > 0.95
    assert json.loads((tmp_path / "report/summary.json").read_text()) == summary
    assert_pictures(tmp_path / "report")
