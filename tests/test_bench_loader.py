"""The benchmark of the loader: what it writes, and that it looks at what it times."""

import json
import sys

import pytest
import torch

from bench import loader
from hmar.codes import CodesFolder


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """The JSON of a short run."""

    def run(*arguments):
        output = tmp_path / "loader.json"
        short = ["--seconds", "0.01", "--batch-size", "4", "--device", "cpu", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["loader", *short, *map(str, arguments)])
        loader.main()
        return json.loads(output.read_text())

    return run


def test_rows_of_codes_and_images_that_were_made(measure, capsys):
    content = measure("--workers", 0, 1, "--count", 50, "--files", 16)
    assert (content["kind"], content["version"], content["environment"]["gpu"]) == ("loader", 1, "cpu")
    rows = content["results"]
    assert [(row["source"], row["workers"]) for row in rows] == [(s, w) for s in ("codes", "images") for w in (0, 1)]
    for row in rows:
        assert row["batches"] >= 1 and row["items_per_s"] > 0 and row["longest_wait_ms"] > 0
        assert row["codes_an_image"] == 680 and row["resolution"] == 256
    assert "storage" not in content and "copy" not in content
    assert capsys.readouterr().out.count("items/s") == 4


def test_bits_of_given_codes(measure, tmp_path):
    codes = loader.make_codes(tmp_path / "codes", 256, 40)
    storage = measure("--codes", codes, "--workers", 0, "--files", 16)["storage"]
    # Random codes cannot be compressed; 27,200 of them do not show the entropy of 4096 equally likely ones in full.
    assert storage["stored_bits"] == 12 and 11.8 < storage["entropy_bits"] < 12 and storage["images"] == 40
    for name in ("lzma_of_all_bits", "deflate_of_all_bits", "deflate_of_each_image_bits"):
        assert storage[name] > 12


def test_a_loader_that_mixes_items_up_is_not_timed(tmp_path, monkeypatch):
    dataset = CodesFolder(loader.make_codes(tmp_path / "codes", 256, 40))
    plain = CodesFolder.__getitems__
    monkeypatch.setattr(
        CodesFolder, "__getitems__", lambda self, items: plain(self, items if len(items) == 1 else items[::-1])
    )
    with pytest.raises(AssertionError, match="item 0 of the first batch is not"):
        loader.measure_loader(dataset, 4, 0, torch.device("cpu"), 0.01)


@pytest.mark.gpu
def test_copies_beside_kernels():
    found = loader.measure_copies(64, 680, rounds=5)
    for times in found.values():
        assert 0.5 * loader.STEP_MS < times["alone_ms"] < times["same_stream_ms"] * 1.05
        assert times["to_device_ms"] < times["alone_ms"] * 1.2
