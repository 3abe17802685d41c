"""The benchmark of the host's time around an image, with steps that do nothing."""

import json

import torch

from bench import host_time as bench
from hmar.engine import Program


def test_parts_add_up_to_a_call(tmp_path, capsys):
    path, before = tmp_path / "host.json", (Program.load, Program.run, Program.wait)
    bench.main(["--device", "cpu", "--rounds", "3", "--commit", "abc", "--output", str(path)])
    assert (Program.load, Program.run, Program.wait) == before
    content = json.loads(path.read_text())
    (row,) = content["results"]
    assert content["kind"] == "host_time" and tuple(row) == bench.PARTS
    assert all(us > 0 for us in row.values()) and "before" in capsys.readouterr().out


def test_each_part_has_its_own_time(monkeypatch):
    """Of a clock that says how often it was asked: two marks for each of the methods, and the ends."""
    engine = bench.engine_of(torch.device("cpu"))
    ticks = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    found = bench.image(engine, torch.tensor([0]), bench.CELL.sampling())
    assert found == {"before": 2e6, "load": 1e6, "queue": 1e6, "look": 1e6, "wait": 1e6, "after": 1e6}
