"""The benchmark of the decoder's convolutions, on the CPU, where torch's are all there is."""

import json

import pytest
import torch

from bench import convolutions as bench
from bench.check import CheckFailed
from bench.convolutions import Convolution, check, draw, totals
from hmar.config import PRESETS
from hmar_kernels import conv2d, conv_transpose2d


def test_a_run_on_the_tiny_decoder(tmp_path, capsys):
    path = tmp_path / "convolutions.json"
    assert bench.main(["--device", "cpu", "--seconds", "0", "--commit", "abc", "--output", str(path)]) == 0
    content = json.loads(path.read_text())
    assert (content["kind"], content["version"], content["complete"]) == ("convolutions", 1, True)
    rows = content["results"]
    assert {row["impl"] for row in rows} == {"torch"} and {row["doubled"] for row in rows} == {False, True}
    assert all(row["ms"] > 0 and row["error"] < 0.008 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1


def test_convolutions_of_the_published_decoder():
    """An image of 256 px is 394 GFLOP with nine taps a pixel of the repeated maps; four of them do."""
    found = bench.convolutions(PRESETS["d16-256"][0], 256)
    assert found[Convolution(256, 160, 160, False)] == 6 and found[Convolution(16, 32, 640, False)] == 1
    assert found[Convolution(16, 640, 640, False)] == 4 + 6 and found[Convolution(128, 160, 160, True)] == 1
    assert {(of.side, of.in_channels) for of in found if of.doubled} == {(16, 640), (32, 320), (64, 320), (128, 160)}
    nine = sum(calls * of.flops * (9 / 4 if of.doubled else 1) for of, calls in found.items())
    assert 0.9 * 394e9 < nine < 394e9
    larger = bench.convolutions(PRESETS["d16-256"][0], 1024)
    assert sum(c * of.flops for of, c in larger.items()) == 16 * sum(c * of.flops for of, c in found.items())


@pytest.mark.parametrize(
    "of", [Convolution(side, 8, 16, doubled) for side in (1, 4, 20) for doubled in (False, True)], ids=str
)
def test_wrong_rows_are_found(of):
    x, weight = draw(of, 2, torch.device("cpu"))
    right = (conv_transpose2d if of.doubled else conv2d)(x, weight, impl="reference")
    assert 0 < check(right, of, x, weight) < 0.004
    for row in (0, -1):
        wrong = right.clone()
        wrong[-1, :, row] += 0.1
        with pytest.raises(CheckFailed, match="of image 1 are off by"):
            check(wrong, of, x, weight)


def test_totals_are_of_what_could_do_all():
    rows = [dict(impl="a", calls=2, ms=1.5), dict(impl="a", calls=1, ms=1), dict(impl="b", calls=2, ms=None)]
    assert totals([*rows, dict(impl="b", calls=1, ms=1)]) == {"a": 4.0}
