"""The tool that finds tiles of products of few rows, on small layers under the interpreter."""

import json

import pytest
import torch

from bench import tune_linear
from hmar_kernels.linear import triton as kernels

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the tool is for the GPU there")


@interpreted
def test_candidates_are_checked_and_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune_linear, "BLOCKS", 1)
    path = tmp_path / "tiles.json"
    arguments = ["--device", "cpu", "--rows", "18", "--width", "64", "--candidates", "1", "--output", str(path)]
    before = kernels.TILES, kernels.BLOCKS
    tune_linear.main(arguments)
    assert before == (kernels.TILES, kernels.BLOCKS)
    rows = json.loads(path.read_text())["results"]
    assert len(rows) == 4 * 2 + 11 == len(capsys.readouterr().out.splitlines())
    elsewhere = [row for row in rows if row["tile"].startswith("cuda")]
    assert len(elsewhere) == 4 and all("needs a CUDA device" in row["reason"] for row in elsewhere)
    assert all(row["us"] > 0 and row["reason"] is None for row in rows if row not in elsewhere)
    assert sum(row["tile"].startswith("table") for row in rows) == 4


@interpreted
def test_a_wrong_result_is_not_timed(monkeypatch):
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *arguments: forward(*arguments) * 1.05)
    rows = list(tune_linear.try_layer("qkv", 3, 64, torch.device("cpu"), 1))
    assert all(row["us"] is None and "error norm" in row["reason"] for row in rows)


@pytest.mark.parametrize("K", [1024, 1920, 4096])
def test_candidates_fit(K):
    tiles = list(tune_linear.tiles(K))
    assert 6 <= len(tiles) <= 40
    for tile in tiles:
        assert tile.block_k % (16 * tile.groups) == 0
