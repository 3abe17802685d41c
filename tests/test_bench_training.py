"""The benchmark of training steps on a tiny model: it measures, refuses wrong results, and goes on where it stopped."""

import json
import sys

import pytest
import torch

import bench.training as training
import hmar.model
from bench.plain import OPERATORS
from bench.results import partial_of
from graph_tape import TapeRecorder
from hmar.pyramid import Pyramid

CPU = ("--device", "cpu", "--steps", "2")


def measure(tmp_path, *arguments):
    file = tmp_path / "training.json"
    status = training.main([*CPU, "--output", str(file), *arguments])
    path = file if file.exists() else partial_of(file)
    return status, json.loads(path.read_text())


def test_every_implementation_is_checked_and_timed(tmp_path):
    status, content = measure(tmp_path)
    rows = content["results"]
    assert (status, content["kind"], content["version"], content["complete"]) == (0, "training", 3, True)
    assert [(row["model"], row["attention"]) for row in rows] == [
        ("hmar", "reference"),
        ("var", "reference"),
        ("hmar", "sdpa_dense"),
        ("var", "sdpa_dense"),
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["forward_ms"] < row["ms"] and row["p10_ms"] <= row["ms"] <= row["p90_ms"]
        assert 0 < row["optimizer_ms"] < row["step_ms"]
        assert set(row["check"]) == {"loss", *training.WATCHED}
        assert all(found["error"] <= found["limit"] for found in row["check"].values())
        # Two patterns: the published attention of one must not pass for the other's.
        assert row["loss"] == pytest.approx(next(r["loss"] for r in rows if r["model"] == row["model"]), rel=1e-3)
    assert rows[0]["flops"] < rows[1]["flops"]


def test_a_wrong_result_is_recorded_and_has_no_time(tmp_path, monkeypatch):
    dense = training.dense_attention
    other = (
        training.Case("var", 64, 3, 2, "bfloat16", "bfloat16", "sdpa_dense", "auto", "false", "false", "none")
        .config()
        .pyramid.block_causal()
    )
    monkeypatch.setattr(training, "dense_attention", lambda mask, *rest: dense(other, *rest))
    status, content = measure(tmp_path, "--models", "hmar", "--attention", "sdpa_dense,reference")
    wrong, right = sorted(content["results"], key=lambda row: row["status"])
    assert status == 1
    assert wrong["status"] == "failed" and wrong["ms"] is None
    assert "CheckFailed" in wrong["reason"] and "is tolerated" in wrong["reason"]
    assert (right["attention"], right["status"]) == ("reference", "ok")


@pytest.mark.parametrize("operators", ["auto", "reference"])
def test_plain_operators_are_used_where_asked_for(operators, tmp_path, monkeypatch):
    used = []

    def record(name, operator):
        return lambda *inputs, **options: used.append((name, options.get("impl"))) or operator(*inputs, **options)

    for name in OPERATORS:
        monkeypatch.setattr(hmar.model, name, record(name, getattr(hmar.model, name)))
    timed = training._time_forward_backward
    during = []

    def watched(*arguments):
        used.clear()
        result = timed(*arguments)
        during.extend(used)
        return result

    monkeypatch.setattr(training, "_time_forward_backward", watched)
    measure(tmp_path, "--models", "hmar", "--attention", "reference", "--operators", operators)
    impl = "reference" if operators == "reference" else None
    # the head's norm, the one that no product follows, always has a branch to add
    assert set(during) == {(name, impl) for name in OPERATORS if name != "modulated_norm"}


@pytest.mark.parametrize("attention", ["reference", "sdpa_dense"])
@pytest.mark.parametrize("recompute", ["mlp", "blocks"])
def test_variants_pass_the_same_check(attention, recompute, tmp_path):
    arguments = ("--attention", attention, "--activation-checkpointing", recompute, "--models", "var", "--ema", "0.9")
    status, content = measure(tmp_path, *arguments)
    assert (status, content["results"][0]["status"], content["results"][0]["ema"]) == (0, "ok", 0.9)


def test_a_run_goes_on_where_its_minutes_ended(tmp_path, monkeypatch, capsys):
    status, content = measure(tmp_path, "--attention", "reference", "--minutes", "0")
    assert (status, content["complete"], content["results"]) == (0, False, [])
    _, content = measure(tmp_path, "--attention", "reference", "--models", "hmar", "--minutes", "0", "--commit", "x")
    measure(tmp_path, "--attention", "reference", "--models", "hmar", "--commit", "x")
    measured = []
    take = training.measure
    monkeypatch.setattr(training, "measure", lambda case, *rest: measured.append(case.model) or take(case, *rest))
    _, content = measure(tmp_path, "--attention", "reference", "--commit", "x", "--continue")
    assert measured == ["var"] and content["complete"] and len(content["results"]) == 2
    assert not partial_of(tmp_path / "training.json").exists()
    measured.clear()
    measure(tmp_path, "--attention", "reference", "--commit", "y", "--continue")  # other code: all again
    assert measured == ["hmar", "var"]


def test_what_a_case_did_to_the_process_is_remembered(tmp_path, monkeypatch):
    def die(*arguments):
        raise SystemExit(3)

    with monkeypatch.context() as broken:
        broken.setattr(training, "measure", die)
        with pytest.raises(SystemExit):
            measure(tmp_path, "--attention", "reference", "--models", "hmar", "--commit", "x")
    status, content = measure(tmp_path, "--attention", "reference", "--models", "hmar", "--commit", "x", "--continue")
    assert status == 1
    assert (content["results"][0]["status"], content["results"][0]["ms"]) == ("crashed", None)


def test_errors_of_one_case_do_not_end_the_run(tmp_path, monkeypatch):
    take = training.measure

    def refuse(case, *rest):
        if case.attention == "reference":
            raise torch.OutOfMemoryError("no room\nat all")
        return take(case, *rest)

    monkeypatch.setattr(training, "measure", refuse)
    _, content = measure(tmp_path, "--models", "hmar", "--attention", "reference,sdpa_dense")
    assert [(row["status"], row["reason"]) for row in content["results"]] == [
        ("out of memory", "OutOfMemoryError: no room"),
        ("ok", None),
    ]


def test_a_cell_has_one_reference_and_its_failure_is_not_the_implementations(tmp_path, monkeypatch):
    take, asked = training.Oracle, []

    def oracle(case, device):
        asked.append(case.model)
        if case.model == "hmar":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
        return take(case, device)

    monkeypatch.setattr(training, "Oracle", oracle)
    status, content = measure(tmp_path, "--attention", "reference,sdpa_dense")
    reason = "the reference: OutOfMemoryError: CUDA out of memory. Tried"
    assert status == 1 and sorted(asked) == ["hmar", "var"]
    assert [(row["model"], row["status"], row["reason"], row["ms"] is None) for row in content["results"]] == [
        ("hmar", "unchecked", reason, True),
        ("var", "ok", None, False),
    ] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cells", "256:16"), "expected resolution:depth:batch"),
        (("--attention", "fast"), "unknown 'fast'; known are auto"),
        (("--compile", "yes"), "unknown 'yes'; known are false, blocks, model"),
        (("--cuda-graphs", "true"), "--cuda-graphs true needs a GPU, the device is cpu"),
    ],
)
def test_wrong_arguments_say_what_is_known(arguments, message, capsys):
    with pytest.raises(SystemExit):
        training.main([*CPU, *arguments])
    assert message in capsys.readouterr().err


def test_a_captured_case_takes_whole_steps_apart_from_the_optimizer(tmp_path, monkeypatch):
    """On a tape: the same check, no time of the forward alone."""
    kept = training.CapturedStep

    def captured(modules, recorder):
        recorders.append(TapeRecorder(modules))
        return kept(modules, recorders[-1] if len(recorders) > 2 else None)  # the first two are the oracle's

    recorders = []
    monkeypatch.setattr(training, "CapturedStep", captured)
    monkeypatch.setattr(sys.modules["hmar_kernels.linear_cross_entropy.api"], "check_inputs", lambda *inputs: None)
    status, content = measure(tmp_path, "--models", "hmar", "--attention", "reference")
    (row,) = content["results"]
    assert (status, row["status"], row["forward_ms"]) == (0, "ok", None)
    assert row["ms"] > 0 and 0 < row["optimizer_ms"] < row["step_ms"]
    assert [recorder.records for recorder in recorders] == [0, 0, 1]


@pytest.mark.parametrize("model", ["hmar", "var"])
def test_parts_of_a_batch_give_the_whole(model, monkeypatch):
    """Three images at a time, two and one, one by one."""
    case = training.Case(model, 32, 2, 3, "float32", "float32", *("reference",) * 2, "false", "false", "none")
    found = []
    for images in (3, 2, 1):
        step = training.Step(case, torch.device("cpu"))
        monkeypatch.setattr(training, "PART_TOKENS", images * step.model.config.pyramid.length)
        found.append(step.in_parts())
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [0, 2, 3])
def test_reference_attention_of_some_heads_at_a_time(limit, monkeypatch):
    """Of five heads; results and gradients are those of all heads at once, and no logits are kept."""
    mask = Pyramid((1, 2, 3)).block_causal()
    length = mask.num_queries
    generator = torch.Generator().manual_seed(0)
    *inputs, do = (torch.randn(2, 5, length, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in inputs)
    expected = training.attention(q, k, v, mask, scale=0.3, impl="reference")
    expected_gradients = torch.autograd.grad(expected, (q, k, v), do)

    heads, kept = [], []
    take = training.attention
    monkeypatch.setattr(
        training, "attention", lambda q, *rest, **more: heads.append(q.shape[1]) or take(q, *rest, **more)
    )
    monkeypatch.setattr(training, "PART_LOGIT_BYTES", limit * 2 * 4 * length**2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        actual = training.reference_by_heads(q, k, v, mask, scale=0.3, logit_bound=1.0, impl="reference")
    parts = {0: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[limit]
    assert heads == parts and not any(shape[-1] == length for shape in kept)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (q, k, v), do), expected_gradients)
    assert sorted(heads) == sorted(2 * parts)  # each once more for its backward


def test_a_reference_of_some_heads_at_a_time_is_the_same_reference(monkeypatch):
    case = training.Case("var", 32, 2, 2, "bfloat16", "bfloat16", *("reference",) * 2, "false", "false", "none")
    whole = training.Oracle(case, torch.device("cpu"))
    monkeypatch.setattr(training, "PART_LOGIT_BYTES", 0)
    calls = []
    take = training.checkpoint
    monkeypatch.setattr(training, "checkpoint", lambda *inputs, **how: calls.append(1) or take(*inputs, **how))
    parts = training.Oracle(case, torch.device("cpu"))
    assert len(calls) == 2 * 2 * 2 * 2  # precisions, blocks, heads, and again for the blocks' backward
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.limits == pytest.approx(whole.limits, rel=0.02)
    for name, gradient in parts.gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-4, atol=1e-6)


def test_errors_that_are_tolerated():
    """Twice what eager bf16 is off by; of few numbers, whose error is a matter of chance, twice what others may."""
    case = training.Case("var", 32, 2, 2, "bfloat16", "bfloat16", *("reference",) * 2, "false", "false", "none")
    oracle = training.Oracle(case, torch.device("cpu"))
    few = "blocks.0.attention.log_scale_H"
    limits = {name: limit for name, limit in oracle.limits.items() if name not in ("loss", few)}
    assert all(1e-3 < limit < 0.1 for limit in limits.values())
    assert oracle.limits[few] >= 2 * max(limits.values()) - 1e-3

    def shifted(name, factor):
        gradients = dict(oracle.gradients)
        by = torch.randn(gradients[name].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gradients[name] = gradients[name] + by * (factor * oracle.limits[name] * gradients[name].norm() / by.norm())
        return gradients

    for name in (few, *limits):
        assert oracle.compare(oracle.loss, shifted(name, 0.9))[name]["error"] > 0
        with pytest.raises(training.CheckFailed, match=f"{name} is off by"):
            oracle.compare(oracle.loss, shifted(name, 1.1))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["true", "false"])
@pytest.mark.parametrize("attention", ["auto", "flex", "sdpa_dense"])
def test_a_compiled_case_on_a_gpu(attention, graphs, tmp_path):
    file = tmp_path / "training.json"
    ways = ("--attention", attention, "--compile", "blocks", "--cuda-graphs", graphs)
    arguments = ("--cells", "256:3:2", "--steps", "3", *ways)
    assert training.main([*arguments, "--output", str(file)]) == 0
    for row in json.loads(file.read_text())["results"]:
        assert row["status"] == "ok" and row["step_peak_bytes"] > row["peak_bytes"] > 0
