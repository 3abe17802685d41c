"""The run at 256 px on photographs: its classifier, its pictures, and on a GPU all of it for a few steps."""

import json

import pytest
import torch
from PIL import Image

from hmar import photographs
from hmar.data import Photographs


def test_classifier_names_crops_it_was_not_trained_on():
    images, classes = photographs.crops(Photographs(64, "test", seed=1), per_class=5)
    assert (photographs.CropClassifier(seed=0)(images) == classes).float().mean() > 0.95
    shuffled = classes.roll(5)
    assert (photographs.CropClassifier(seed=0)(images) == shuffled).float().mean() < 0.05


def test_psnr_of_a_known_error():
    real = torch.zeros(3, 3, 8, 8)
    assert photographs.psnr(real + 0.2, real) == pytest.approx(20.0, abs=1e-4)


def test_stages_take_the_photographs_and_the_weights_before_them(tmp_path):
    configs = {stage: photographs.stage_config(photographs.Plan(), stage, tmp_path) for stage in photographs.STAGES}
    assert all(config.data.name == "photographs" and config.data.size == 256 for config in configs.values())
    assert configs["tokenizer"].model.pyramid.length == 680
    assert configs["masked"].next_scale_weights == str(tmp_path / "next-scale")


@pytest.mark.gpu
def test_quick_run_writes_everything(tmp_path):
    summary = photographs.run(tmp_path / "report", run_folder=tmp_path / "runs", plan=photographs.QUICK, progress=False)
    assert summary["tokens"] == 680 and summary["classifier_accuracy_on_real_crops"] > 0.95
    assert json.loads((tmp_path / "report/summary.json").read_text()) == summary
    for name in ("reconstruction", "generated", "loss_curves"):
        picture = Image.open(tmp_path / f"report/{name}.png")
        assert min(picture.size) > 300 and len(set(picture.convert("L").getdata())) > 50
