"""The benchmark of products of few rows, on the CPU, where the reference is all there is."""

import json

import pytest
import torch

from bench import linear as bench


def test_layers_and_blocks_are_checked_and_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "BLOCKS", 1)
    path = tmp_path / "linear.json"
    arguments = ["--device", "cpu", "--rows", "2,16", "--width", "64", "--commit", "abc", "--output", str(path)]
    bench.main(arguments)
    content = json.loads(path.read_text())
    rows = content["results"]
    assert content["kind"] == "linear" and content["environment"]["commit"] == "abc"
    assert [(row["layer"], row["rows"]) for row in rows] == [
        (of, n) for of in ("block", *bench.LAYERS) for n in (2, 16)
    ]
    assert all(row["us"] > 0 and row["reason"] is None and row["width"] == 64 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_a_wrong_result_is_not_timed(monkeypatch):
    linear, device = bench.linear, torch.device("cpu")
    assert [row["reason"] for row in bench.try_layer("qkv", 3, 64, device)] == [None]

    def wrong(**options):
        return linear(**options) * (1.05 if "overlap" in options else 1)  # what is timed, not what it is held against

    monkeypatch.setattr(bench, "linear", wrong)
    (row,) = bench.try_layer("qkv", 3, 64, device)
    assert row["us"] is None and "error norm" in row["reason"]


def test_wrong_statistics_are_not_timed():
    arguments = bench.arguments_of("proj", 3, 64, torch.device("cpu"))
    (weight,) = bench.weights_of("proj", 64, torch.device("cpu"))
    y, statistics = bench.linear(weight=weight, **arguments, return_statistics=True)
    bench.check((y, statistics), weight, arguments)
    with pytest.raises(ValueError, match="statistics are not those of the result"):
        bench.check((y, statistics.flip(1)), weight, arguments)


def test_rows_that_are_not_few_are_left_to_cublas():
    found = [bench.products_of(rows, torch.device("cuda")) for rows in (32, 33)]
    assert found == [("cublas", "cuda"), ("cublas",)]
