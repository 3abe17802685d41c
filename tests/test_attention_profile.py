"""The report of profiles of the attention kernels: tables and plot from what ncu measured, and the variants tried."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.image import imread

from bench import profile_attention as bench
from ncu_files import FACTS, SAMPLE, rows_of_sample
from reports import attention_profile as report
from reports import build

H100 = FACTS["gpu"]


def data_folder(tmp_path, rows=None, gpu=H100, **more):
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    content = {"kind": bench.KIND, "version": bench.VERSION, "environment": FACTS | {"gpu": gpu}, **more}
    rows = rows_of_sample() if rows is None else rows
    (folder / "attention_profile_test.json").write_text(json.dumps(content | {"results": rows}))
    return folder


def table_rows(text, heading):
    """Cells of the table under a heading, without its head."""
    part = text.split(f"{heading}\n", 1)[1]
    lines = [line for line in re.split(r"\n#+ ", part)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_csv_has_a_line_a_launch(tmp_path):
    data = data_folder(tmp_path)
    written = build.build(data, tmp_path / "tables", tmp_path / "plots")
    assert [path.name for path in written] == [
        "attention_profile.csv", "attention_profile.md", "attention_profile_test_units.png",
    ]  # fmt: skip
    table = pd.read_csv(written[0])
    assert list(table.columns) == report.COLUMNS and len(table) == 8
    # Diagonal before causal; the bounded forward first.
    assert list(table["pass"]) == ["forward", "forward", "backward", "dq", "forward", "forward", "dq", "dkdv"]
    assert [str(x) for x in table["bounded"]][:3] == ["True", "False", "nan"]
    causal = table.iloc[4]
    assert causal["ms"] == 0.190944 and causal["dram_gb"] == 0.351068 and causal["registers"] == 96
    assert causal["dram_tb_per_s"] == pytest.approx(0.351068 / 0.190944, rel=1e-5)
    assert causal["imbalance"] == pytest.approx(52.92 / 48.81, rel=1e-5)
    assert causal["instructions_per_hgmma"] == pytest.approx(97_064_024 / 2_555_904, rel=1e-5)
    assert imread(written[2])[..., :3].std() > 0.05


def test_least_times_are_those_of_each_unit_alone(tmp_path):
    unit = {"clock_ghz": 1.0, "num_sms": 2, "ms": 8.0}
    counts = {
        "flops": 2 * 4096 * 1_000_000,  # a ms of two SMs at 1 GHz
        "opcodes": {"MUFU": 2 * 1_000_000, "HGMMA": 100},  # 32 of 16 a cycle: 2 ms
        "instructions": 2 * 12_000_000,  # of 4 a cycle: 3 ms
        "dram_read_bytes": int(3.35e9),
        "dram_write_bytes": int(3 * 3.35e9),  # 4 ms in all
    }
    (source,) = report.load(data_folder(tmp_path, rows_of_sample(**unit, **counts)))
    row = source.rows.iloc[0]
    assert [row[column] for column in report.LEAST] == pytest.approx([1, 2, 3, 4])
    assert row["bound"] == "DRAM" and row["reached"] == pytest.approx(0.5)
    (line, *_) = table_rows(report.markdown([source], tmp_path), "### Least times")
    assert line[2:] == ["8.00", "1.00", "2.00", "3.00", "4.00", "DRAM", "50 %"]
    (source,) = report.load(data_folder(tmp_path, gpu="NVIDIA Test 9000"))  # whose units are not known
    assert source.rows[list(report.LEAST)].isna().all(axis=None)
    assert table_rows(report.markdown([source], tmp_path), "### Least times")[0][3:] == ["-"] * 6


def test_the_sample_is_as_far_from_its_units_as_its_counters_say(tmp_path):
    """ncu's own shares of the whole time, which are not in the sample: 46.67 % tensor cores, 47.92 % exponentials."""
    (source,) = report.load(data_folder(tmp_path))
    causal = source.rows.iloc[4]
    assert causal["least_exponential_ms"] / causal["ms"] == pytest.approx(0.4792, rel=0.02)
    assert causal["least_tensor_ms"] / causal["ms"] == pytest.approx(0.4667 / 1.12, rel=0.02)  # tiles hold 12 % more
    assert causal["least_dram_ms"] / causal["ms"] == pytest.approx(causal["dram_pct"] / 100, rel=0.002)


def test_the_page_has_targets_units_instructions_and_waits(tmp_path):
    (source,) = report.load(data_folder(tmp_path))
    text = report.markdown([source], tmp_path)
    assert "[attention_profile_test.json](../data/attention_profile_test.json)" in text and "0123456789abcdef" in text
    units = {(line[0].split(",")[0], line[1]): line[2:] for line in table_rows(text, "### Units")}
    assert units["block_causal 256", "forward, bounded"] == [
        "0.191", "0.180", "1.75", "49", "50", "20", "25", "55", "45", "72", "55", "51", "0.351", "1.84", "1.08", "95",
    ]  # fmt: skip
    assert units["block_causal 256", "forward, any logits"][:2] == ["0.191", "-"]
    assert units["block_causal 256", "backward, all"][:2] == ["0.654", "0.600"]
    assert units["block_diagonal 1024", "backward, all"][:2] == ["2.76", "3.00"]
    assert units["block_diagonal 1024", "dq"][0] == "0.0822" and len(units) == 10
    mix = table_rows(text, "### Instructions")[4]
    assert (
        mix[2:4] == ["97.1", "38.0"]
        and mix[4].startswith("FADD 12.4, FMUL 12.2, MUFU 10.7")
        and mix[4].count(",") == 11
    )
    waits = table_rows(text, "### What warps wait for")[4]
    assert waits[2] == "7.63" and waits[3].startswith("wait 1.59, not selected 1.04, long scoreboard 0.86")
    assert "nan" not in text.lower() and "Variants" not in text


def test_targets_are_for_their_gpu_and_sizes(tmp_path):
    for more, gpu in (({"batch": 8}, H100), ({"dtype": "float16"}, H100), ({}, "NVIDIA A100")):
        (source,) = report.load(data_folder(tmp_path, rows_of_sample(**more), gpu=gpu))
        assert {line[3] for line in table_rows(report.markdown([source], tmp_path), "### Units")} == {"-"}


TILES = {
    "kind": "hopper_tiles",
    "version": 1,
    "gpu": H100,
    "method": "medians",
    "key": "numbers",
    "notes": {"7": "seven", "12": "twelve", "3": "three"},
}
CAUSAL = {"resolution": 256, "pattern": "block_causal", "head_dim": 64}
TRIED = [
    {"run": 3, "pass": "forward", **CAUSAL, "ms": {"1/1 bounded": 0.1, "2/2 bounded": 0.2}},
    {"run": 7, "pass": "forward", **CAUSAL, "ms": {"4/64/5/2/2/1 bounded": 0.25, "2/2 bounded": 0.2, "2/2": 0.3}},
    {
        "run": 12,
        "pass": "forward, bounded",
        **CAUSAL,
        "batch": 64,
        "ms": {"table 9/9": [0.5, 0.7], "4/64/5/2/2/1": 0.4},
    },
    {"run": 12, "pass": "forward, bounded", **CAUSAL, "batch": 8, "ms": {"5/5": [0.5, 0.7], "6/6": [0.4, 0.4]}},
    {"run": 12, "pass": "forward", **CAUSAL, "batch": 64, "ms": {"7/7": 0.5, "8/8": 0.4}},
    {"run": 12, "pass": "dq", **CAUSAL, "ms": {"3/64/4/2/0/1": 0.3}},
    {"run": 9, "pass": "both", **CAUSAL, "ms": {"table": 0.7, "dk/dv 1/64/4/2/0/2": 0.6, "dq 1/64/4/2/0/2": 0.8}},
    {"run": 12, "pass": "dkdv", **(CAUSAL | {"resolution": 512}), "ms": {"1/1": 0.1, "2/2": 0.2}},
    {"run": 12, "pass": "both", **(CAUSAL | {"head_dim": 128}), "ms": {"1/1": 0.1, "2/2": 0.2}},
]


def test_variants_tried_stand_by_cell_pass_and_run(tmp_path):
    data = data_folder(tmp_path)
    (data / "tiles.json").write_text(json.dumps(TILES | {"rows": TRIED}))
    text = report.markdown(report.load(data), data)
    cell = "block_causal 256, 64 x 16 x 64"
    assert table_rows(text, "## Variants tried") == [
        [cell, "forward, bounded", "7", "**2/2 0.200**, 4/64/5/2/2/1 0.250 (*)"],
        [cell, "forward, bounded", "12", "**4/64/5/2/2/1 0.400 (*)**, table 9/9 0.600"],
        [cell, "backward in two passes", "9", "**dk/dv 1/64/4/2/0/2 0.600 (*)**, table 0.700, dq 1/64/4/2/0/2 0.800"],
    ]
    assert "Run 7: seven." in text and "Run 12: twelve." in text and "three" not in text


def test_the_committed_variants_are_read(tmp_path):
    committed = Path(report.__file__).with_name("data") / "hopper_tiles_h100.json"
    places = (("block_causal", 256, 64), ("block_diagonal", 512, 16), ("block_diagonal", 1024, 4))
    places = [dict(zip(("pattern", "resolution", "batch"), place, strict=True)) for place in places]
    data = data_folder(tmp_path, [row | place for row in rows_of_sample()[:4] for place in places])
    shutil.copy(committed, data)
    found = {
        (line[0].split(",")[0], line[1], line[2]): line[3]
        for line in table_rows(report.markdown(report.load(data), data), "## Variants tried")
    }
    assert found["block_causal 256", "forward, bounded", "12"].startswith("**4/64/5/2/2/1 0.197 (*)**, ")
    assert found["block_causal 256", "backward in two passes", "9"].startswith("**dk/dv 1/64/4/2/0/2 0.643 (*)**, ")
    assert ("block_diagonal 1024", "forward, bounded", "7") in found
    assert found["block_diagonal 512", "backward in two passes", "9"].count(", ") == 6


def test_tiles_are_named_as_in_the_table():
    kernels = [launch["kernel"] for launch in bench.read_launches(SAMPLE)]
    assert [report.tile_of(kernel) for kernel in kernels] == [
        "4/64/5/2/2/1", "3/64/4/2/0/1", "1/64/4/2/0/2", "4/96/3/2/0/1", "2/64/4/2/0/1", "3/64/4/2/0/1",
    ]  # fmt: skip
    with_casts = "hopper_forward_kernel<HopperForwardTile<(DType)1, 64, 2, 128, 2, (Overlap)1, 1>>"
    assert report.tile_of(with_casts) == "2/128/2/2/1/1"


def test_bars_are_the_percentages(tmp_path):
    (source,) = report.load(data_folder(tmp_path))
    figure = report.draw(source)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["block-causal 256 px, 64 x 16 x 64", "block-diagonal 1024 px, 4 x 24 x 64"]
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert len(heights) == 5 * 4 and heights[:4] == [48.81, 48.81, 49.08, 52.62] and heights[16] == 54.86
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels[0] == "forward, bounded\n0.191 ms" and labels[3] == "dk, dv\n0.344 ms"
    plt.close(figure)


def test_a_version_from_the_future_is_refused(tmp_path):
    with pytest.raises(ValueError, match="of version 2; this script reads version 1"):
        report.load(data_folder(tmp_path, version=2))
