"""The benchmark of the fused operators: its cases, its check, and a run on the CPU."""

import json

import pytest
import torch

from bench import operator_rivals as rivals
from bench import operators, tune_operators
from bench.check import CheckFailed
from bench.timing import Stopwatch
from hmar.pyramid import Pyramid
from hmar_kernels.gelu_linear import triton as gelu_kernels
from hmar_kernels.linear_cross_entropy import triton as loss_kernels
from hmar_kernels.modulated_norm import triton as norm_kernels
from hmar_kernels.qk_norm import triton as qk_kernels

CPU = torch.device("cpu")


def examined(case, function):
    """The rows of `function` in place of the eager implementation of a case."""
    inputs = case.draw(rivals.SMOKE_SHAPES[0], CPU)
    seeds = operators.draw_seeds(case, inputs)
    oracle = operators.Oracle(case, inputs, seeds)
    case.implementations["chunked"] = function
    return operators.examine(case, "chunked", inputs, seeds, oracle, Stopwatch(CPU), 0.001)


def case_of(name):
    return next(case for case in rivals.cases() if case.name == name)


def test_shapes_are_those_of_the_targets():
    assert [str(s) for s in rivals.SHAPES] == ["d16-256-b32", "d24-256-b16", "d16-512-b8", "d24-512-b8", "d24-1024-b2"]
    assert [(s.length, s.width) for s in rivals.SHAPES] == [
        (680, 1024),
        (680, 1536),
        (2240, 1024),
        (2240, 1536),
        (9451, 1536),
    ]
    assert all(s.length == Pyramid.for_resolution(s.resolution).length for s in rivals.SHAPES)


def test_work_of_an_operator():
    shape, elements = rivals.SHAPES[0], 32 * 680 * 1024
    assert case_of("modulated_norm").bytes(shape) == {"forward": 4 * elements, "backward": 6 * elements}
    assert case_of("residual_modulated_norm").bytes(shape) == {"forward": 8 * elements, "backward": 12 * elements}
    weight = 4 * 4 * 1024 * 1024
    forward, backward = 14 * elements + weight, 18 * elements + 2 * weight
    assert case_of("residual_norm_linear").bytes(shape) == {"forward": forward, "backward": backward}
    forward, backward = 10 * elements + weight, 18 * elements + 2 * weight
    assert case_of("gelu_linear").bytes(shape) == {"forward": forward, "backward": backward}
    assert case_of("gelu_linear").flops(shape) == {"forward": 8192 * elements, "backward": 16384 * elements}
    assert case_of("qk_norm").bytes(shape) == {"forward": 12 * elements, "backward": 16 * elements}
    assert case_of("linear_cross_entropy").flops(shape) == {"forward": 8192 * elements, "backward": 16384 * elements}
    both = operators.describe(case_of("qk_norm"), shape, "forward_backward")
    assert (both["bytes"], both["width"], both["flops"]) == (28 * elements, 1024, 0)


def test_a_run_on_the_cpu_leaves_checked_results(tmp_path, capsys):
    output = tmp_path / "operators.json"
    options = ["--device", "cpu", "--impl", "chunked,eager", "--seconds", "0.001", "--commit", "abc"]
    assert operators.main([*options, "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert (content["kind"], content["complete"], content["environment"]["commit"]) == ("operators", True, "abc")
    assert not list(tmp_path.glob("*.new"))
    rows = {(row["operator"], row["impl"], row["direction"]): row for row in content["results"]}
    expected = {(n, "eager", d) for n in rivals.NAMES for d in operators.DIRECTIONS}
    expected |= {("linear_cross_entropy", "chunked", d) for d in operators.DIRECTIONS}
    assert rows.keys() == expected and len(content["results"]) == len(rows)
    for (operator, _, _), row in rows.items():
        assert row["status"] == "ok", row["reason"]
        assert row["ms"] > 0 and row["p10_ms"] <= row["ms"] <= row["p90_ms"] and row["rounds"] >= 10
        leaves = {f"d_{name}" for name in case_of(operator).leaves}
        assert leaves < row["check"].keys()
        assert all(0 <= d["error"] <= d["limit"] < 0.1 for d in row["check"].values())
    assert "linear_cross_entropy" in capsys.readouterr().out


def test_a_wrong_result_is_never_timed():
    case = case_of("modulated_norm")
    eager = case.implementations["eager"]
    for function, reason in (
        (lambda inputs: {"h": eager(inputs)["h"] * 1.05}, "h is off by 0.0"),
        (lambda inputs: {"h": eager(inputs)["h"] / 0}, "h has non-finite values"),
        (lambda inputs: {"h": eager(inputs)["h"].float()}, "h is torch.float32"),
        # right values, wrong gradient
        (lambda inputs: {"h": eager({n: 2 * x - x.detach() for n, x in inputs.items()})["h"]}, "d_x is off by"),
    ):
        rows = examined(case, function)
        assert [row["direction"] for row in rows] == list(operators.DIRECTIONS)
        for row in rows:
            assert (row["status"], row["ms"]) == ("failed", None)
            assert row["reason"].startswith(f"{CheckFailed.__name__}: {reason}"), row["reason"]
    assert {row["status"] for row in examined(case, eager)} == {"ok"}


def test_kernels_that_cannot_run_are_unavailable(monkeypatch):
    monkeypatch.setattr(operators, "unavailable", lambda device, dtype: f"no {dtype} on {device}")
    rows = operators.examine(case_of("qk_norm"), "triton", {}, {}, None, Stopwatch(CPU), 0.001)
    assert {(row["status"], row["reason"], row["ms"]) for row in rows} == {
        ("unavailable", "no torch.bfloat16 on cpu", None)
    }


def test_what_an_implementation_raises_is_recorded():
    def exhausted(inputs):
        raise torch.OutOfMemoryError("no room\nand more")

    rows = examined(case_of("qk_norm"), exhausted)
    assert {(row["status"], row["reason"]) for row in rows} == {("out of memory", "OutOfMemoryError: no room")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU the kernels run under the interpreter")
def test_tiles_are_tried_checked_and_put_back(tmp_path, capsys):
    def in_use():
        return qk_kernels.FORWARD_TILE, qk_kernels.BACKWARD_TILE, qk_kernels.BACKWARD_ROWS

    output, before = tmp_path / "tiles.json", in_use()
    tune_operators.main(["--device", "cpu", "--tables", "qk_norm", "--rounds", "1", "--output", str(output)])
    content = json.loads(output.read_text())
    rows = content["results"]
    assert (content["kind"], len(rows)) == ("operator_tiles", 6)
    assert all(row["reason"] is None and row["ms"] > 0 for row in rows)
    assert [row["ms"] for row in rows] == sorted(row["ms"] for row in rows)
    assert before == in_use()
    assert capsys.readouterr().out.count("qk_norm") == 6


@pytest.mark.parametrize("table", tune_operators.TABLES)
def test_candidates_include_what_is_in_use(table):
    found = [name for name, _ in tune_operators.TABLES[table][1]()]
    assert len(found) == len(set(found)) >= 4
    backward = table.endswith("backward")
    norm = f"{norm_kernels.TILES[1024][backward]} programs {norm_kernels.PROGRAMS_PER_SM}"
    qk = qk_kernels.BACKWARD_TILE if backward else qk_kernels.FORWARD_TILE
    gelu = gelu_kernels
    in_use = {
        "residual_modulated_norm": norm,
        "residual_norm_linear": norm,
        "gelu_linear": f"{gelu.TILE_ROWS} x {gelu.BLOCK_F}, {gelu.WARPS} warps, programs {gelu.PROGRAMS_PER_SM}",
        "qk_norm": f"{qk} of {qk_kernels.BACKWARD_ROWS}",
        "linear_cross_entropy": f"{loss_kernels.CHUNK_BYTES >> 20} MB, {loss_kernels.WARPS} warps",
    }
    assert in_use[table.split()[0]] in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "fastest"], "--impl: unknown 'fastest'; known are triton, compiled, chunked, separate, eager"),
        (["--operators", "norm"], "--operators: unknown 'norm'; known are modulated_norm"),
        (["--shapes", "d16"], "--shapes: unknown 'd16'; known are d2-64-b2"),
    ],
)
def test_unknown_names_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        operators.main(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err
