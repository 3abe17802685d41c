"""The parity command on golden folders of other sizes, on tampered ones and on ones that cannot be used."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from golden_folder import OTHER_SIZES, WIDE_FIRST_SCALE, write_golden
from hmar.parity import KIND_OF_FILE, LIMIT, main, measure_file

SIZES = {"other-sizes": OTHER_SIZES, "wide-first-scale": WIDE_FIRST_SCALE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    return {name: write_golden(root / name, sizes) for name, sizes in SIZES.items()}


def rewrite(path, change):
    """Let change(tensors, metadata) alter a file."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders["other-sizes"], tmp_path / "copy")


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_pass(folders, capsys, tmp_path, name):
    assert main([str(folders[name]), "--output", str(tmp_path / "rows.json")]) == 0
    heading, *lines, verdict = capsys.readouterr().out.splitlines()
    assert heading.split() == ["file", "quantity", "equal", "median", "99", "%", "largest", "error", "limit", "result"]
    assert all(line.endswith("  pass") for line in lines)
    assert verdict == f"{len(lines)} quantities: parity"
    content = json.loads((tmp_path / "rows.json").read_text())
    assert (content["dtype"], len(content["rows"])) == ("float32", len(lines))
    assert {row["file"] for row in content["rows"]} == set(KIND_OF_FILE)
    # Computed in float64 there and in float32 here: equal errors of 0 would mean that nothing was computed.
    assert all(0 < row["largest"] <= LIMIT for row in content["rows"] if row["median"] is not None)


TAMPERED = [
    ("tokenizer", "latent", ["latent"]),
    ("tokenizer", "f_hat.1", ["f_hat after scale 2"]),
    ("tokenizer", "teacher_forcing_input", ["next-scale inputs"]),
    ("tokenizer", "reconstruction", ["image", "image in training"]),
    ("var", "logits", ["logits"]),
    ("var", "generated_idx", ["generated with cache: codes", "generated without cache: codes"]),
    ("var", "generated_image", ["generated with cache: image", "generated without cache: image"]),
    ("hmar_next_scale", "logits", ["logits"]),
    ("hmar_masked", "logits", ["logits"]),
    ("hmar", "generated_idx", ["generated, masked passes: codes"]),
    ("hmar", "generated_f_hat", ["generated, masked passes: f_hat"]),
    ("hmar", "generated_idx_no_mask", ["generated, one pass a scale: codes"]),
    ("hmar", "generated_image_no_mask", ["generated, one pass a scale: image"]),
]


@pytest.mark.parametrize("file, tensor, expected", TAMPERED)
def test_one_wrong_number_fails_its_row_and_no_other(copy, file, tensor, expected):
    def tamper(tensors, metadata):
        last = tensors[tensor].view(-1)
        last[-1] += 1 if last.dtype == torch.int64 else 3e-4 if last[-1] < 0 else -3e-4

    path = copy / f"{file}.safetensors"
    rewrite(path, tamper)
    assert [row.quantity for row in measure_file(path) if not row.passed] == expected


def test_differences_below_the_limit_pass(copy):
    def tamper(tensors, metadata):
        tensors["logits"] += 1e-4

    path = copy / "hmar_masked.safetensors"
    rewrite(path, tamper)
    (row,) = measure_file(path)
    assert row.passed
    assert row.largest == pytest.approx(1e-4, rel=0.1)


@pytest.mark.parametrize("name", ["blocks.1.attn.v_bias", "word_embed.weight", "lvl_embed.weight"])
def test_a_wrong_weight_fails(copy, name):
    def tamper(tensors, metadata):
        tensors[f"w.{name}"][-1] += 0.1

    path = copy / "hmar_masked.safetensors"
    rewrite(path, tamper)
    assert [row.passed for row in measure_file(path)] == [False]


def test_settings_are_those_of_the_metadata(copy):
    """Another guidance or schedule than the file was made with shows, so both are read from it."""
    path = copy / "hmar.safetensors"
    for key, value in (("cfg", 0.1), ("mask_schedule", [[1], [1, 3], [16], [25]]), ("masked_pass_cfg_factor", 9.0)):
        before = path.read_bytes()
        rewrite(path, lambda _, metadata, key=key, value=value: metadata.update({key: json.dumps(value)}))
        failed = [row.quantity for row in measure_file(path) if not row.passed]
        assert "generated, masked passes: codes" in failed
        assert ("generated, one pass a scale: codes" in failed) == (key == "cfg")
        path.write_bytes(before)


def test_numbers_that_are_not_finite_fail_in_every_precision(copy, capsys):
    def tamper(tensors, metadata):
        tensors["logits"][0, 0, 0] = float("nan")

    rewrite(copy / "hmar_next_scale.safetensors", tamper)
    assert main([str(copy)]) == 1
    assert "inf  2e-04  FAIL" in capsys.readouterr().out
    assert main([str(copy), "--dtype", "bfloat16"]) == 1


def test_low_precision_reports_agreement_without_failing(folders, capsys):
    assert main([str(folders["other-sizes"]), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "agreement in bfloat16, without limits" in out
    assert "pass" not in out.replace("passes", "").replace("one pass", "")
    rows = measure_file(folders["other-sizes"] / "hmar_next_scale.safetensors", dtype="bfloat16")
    # The command must really have computed in low precision.
    assert LIMIT < rows[0].largest < 1
    assert rows[0].equal > 0.5
    assert rows[0].median < rows[0].p99 < rows[0].largest


def test_the_command_and_its_exit_codes(copy, capsys):
    for name in ("tokenizer", "var", "hmar"):
        (copy / f"{name}.safetensors").unlink()
    assert main([str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["file", "hmar_next_scale", "hmar_masked", "2"]

    rewrite(copy / "hmar_masked.safetensors", lambda tensors, _: tensors["logits"].neg_())
    command = [sys.executable, "-m", "hmar.parity", str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.splitlines()[-2].endswith("FAIL")
    assert result.stdout.splitlines()[-1] == "1 of 2 quantities failed"


UNUSABLE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"damaged or cut short"),
    "no-logits": (lambda path: rewrite(path, lambda t, m: t.pop("logits")), r"lacks the tensor logits; it has label"),
    "no-heads": (lambda path: rewrite(path, lambda t, m: m.pop("heads")), r"lacks heads in its metadata"),
    "wrong-depth": (lambda path: rewrite(path, lambda t, m: m.update(depth="4")), r"depth is 3, not 4"),
    "missing": (lambda path: rewrite(path, lambda t, m: t.pop("w.head.bias")), r"missing head.bias \[50\]"),
    "strange": (
        lambda path: rewrite(path, lambda t, m: t.update({"w.strange": torch.zeros(2)})),
        r"unexpected strange \[2\]",
    ),
    "two-labels": (
        lambda path: rewrite(path, lambda t, m: t.update(label=t["label"].repeat(2))),
        r"Classes have shape \(4,\)",
    ),
    "bad-class": (lambda path: rewrite(path, lambda t, m: t.update(label=t["label"] + 99)), r"cannot be used"),
    "too-few-logits": (
        lambda path: rewrite(path, lambda t, m: t.update(logits=t["logits"][:, 1:].contiguous())),
        r"logits has shape .* here and .* in the file",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_files_that_cannot_be_used_are_explained(copy, capsys, case):
    change, message = UNUSABLE[case]
    change(copy / "hmar_next_scale.safetensors")
    (copy / "tokenizer.safetensors").unlink()
    (copy / "var.safetensors").unlink()
    assert main([str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        measure_file(copy / "hmar_next_scale.safetensors")


def test_folders_without_what_is_needed(copy, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "holds no golden file: expected tokenizer.safetensors" in capsys.readouterr().err
    (copy / "tokenizer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*tokenizer\.safetensors"):
        measure_file(copy / "hmar.safetensors")


def test_tensors_that_nothing_is_compared_with_are_named(copy, capsys):
    path = copy / "hmar_masked.safetensors"
    rewrite(path, lambda tensors, _: tensors.update(surplus=torch.zeros(1)))
    assert [row.passed for row in measure_file(path)] == [True]
    assert "nothing is compared with its tensor surplus" in capsys.readouterr().err


@pytest.mark.gpu
def test_agreement_on_a_gpu(folders):
    for file in KIND_OF_FILE:
        rows = measure_file(folders["other-sizes"] / f"{file}.safetensors", device="cuda", dtype="bfloat16")
        assert all(row.passed is None for row in rows)
        assert all(row.equal is None or row.equal > 0.3 for row in rows)
