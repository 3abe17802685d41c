"""Numbers of one and of two processes, started by torchrun."""

import json

import pytest

from bench import scaling


def test_two_processes_are_measured_beside_one(tmp_path, capfd):
    file = tmp_path / "scaling.json"
    small = ("--preset", "tiny", "--batch", "8", "--steps", "8", "--compile", "false", "--workers", "0")
    arguments = (*small, "--device", "cpu", "--parallel", "ddp", "--global-batch", "--output", str(file))
    assert scaling.main(arguments) == 0
    content = json.loads(file.read_text())
    one, two = content["results"]
    assert (one["processes"], two["processes"], content["kind"]) == (1, 2, "scaling")
    assert one["speedup"] == 1
    assert two["speedup"] == pytest.approx(two["tokens_per_second"] / one["tokens_per_second"], rel=1e-4)
    assert one["batch"] == two["batch"] == 8
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert capfd.readouterr().out.count("tokens/s") == 2


def test_one_process_comes_first(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--processes", "2,4"])
    assert "speed is compared with one process" in capsys.readouterr().err
