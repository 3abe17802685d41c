"""The engine learns what a plain float32 loop learns, and the benchmark that says so can say no."""

import json
import math

import pytest

import hmar.train
from bench import loss_curve

SMALL = ("--preset", "tiny", "--depth", "0", "--classes", "4", "--images", "128", "--batch", "16", "--device", "cpu")
SHORT = ("--steps", "20", "--window", "5", "--seeds", "2", "--lr", "3e-3", "--compile", "false")


@pytest.mark.parametrize("stage", ["next-scale", "var"])
def test_the_engine_in_float32_is_the_plain_loop(stage, tmp_path):
    file = tmp_path / "curve.json"
    assert loss_curve.main([*SMALL, *SHORT, "--stage", stage, "--precision", "fp32", "--output", str(file)]) == 0
    curves = json.loads(file.read_text())["curves"]
    for engine, plain in zip(curves["engine"], curves["plain"], strict=True):
        assert engine == pytest.approx(plain, rel=1e-5)
        assert engine[-1] < 0.98 * engine[0]
    assert curves["plain"][0] != pytest.approx(curves["plain"][1], rel=1e-5)


def test_the_engine_in_bf16_is_within_the_spread_of_seeds(tmp_path):
    file = tmp_path / "curve.json"
    assert loss_curve.main([*SMALL, *SHORT, "--precision", "bf16", "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["passed"] and 0 < content["largest_ratio"] < 1
    assert len(content["spread"]) == len(content["deviation"]) == 4


def test_training_that_differs_is_found(monkeypatch, capsys):
    schedule = hmar.train.learning_rate
    monkeypatch.setattr(hmar.train, "learning_rate", lambda step, **options: 0.7 * schedule(step, **options))
    assert loss_curve.main([*SMALL, *SHORT, "--precision", "fp32"]) == 1
    assert "NOT within the spread of seeds" in capsys.readouterr().out


def test_the_verdict():
    plain = [[3.0, 2.0], [3.2, 2.2]]
    verdict = loss_curve.compare([[3.05, 2.05], [3.15, 2.15]], plain, width=1)
    assert verdict["passed"] and verdict["deviation"] == pytest.approx([0.05, 0.05])
    assert verdict["spread"] == pytest.approx([math.sqrt(0.02)] * 2)
    assert not loss_curve.compare([[3.4, 2.0], [3.0, 2.2]], plain, width=1)["passed"]  # one window is enough
    assert not loss_curve.compare([[math.nan, 2.0], [3.2, 2.2]], plain, width=1)["passed"]
    flat = [[3.0, 3.0], [3.2, 3.2]]
    assert not loss_curve.compare(flat, flat, width=1)["passed"]  # nothing was learned
    assert loss_curve.windows([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 6.0, 9.0]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["next-scale", "var"])
def test_fast_training_on_a_gpu_is_within_the_spread_of_seeds(stage, tmp_path):
    arguments = ("--stage", stage, "--batch", "16", "--images", "1024", "--steps", "60", "--seeds", "3")
    assert loss_curve.main([*arguments, "--output", str(tmp_path / "curve.json")]) == 0
