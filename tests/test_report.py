"""Tables and plots are pure functions of the raw JSON: values, order, gaps, errors."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.image import imread

import hmar.model
from bench import operator_rivals, shapes
from bench.attention_results import describe
from bench.loss_curve import compare
from hmar.config import PRESETS
from hmar_kernels import triton_device
from reports import attention, attention_data, attention_plots, build, loss_curve, operators, scaling, training
from reports.attention_data import DIRECTIONS
from reports.markdown import number
from reports.style import LOOKS

COLUMNS = "gpu,commit,pattern,resolution,batch,heads,head_dim,dtype,impl,direction,ms,tflops,gb_per_s,peak_mb"
# Milliseconds of (forward, backward); None stands for what could not be measured, absent for what does not apply.
TIMES = {
    ("block_diagonal", 256): {"sdpa_dense": (8.0, 16.0), "triton": (1.0, 2.0), "varlen_flash": (1.5, 3.0)},
    ("block_causal", 1024): {"flash_per_scale": (6.0, None), "triton": (3.0, 8.0), "sdpa_dense": (None, None)},
}


def result(pattern, resolution, impl, direction, ms):
    flops = 1e9 if direction == "forward" else 2.5e9
    return {
        "pattern": pattern,
        "resolution": resolution,
        "batch": 4,
        "heads": 16,
        "head_dim": 64,
        "dtype": "bfloat16",
        "impl": impl,
        "ours": impl == "triton",
        "direction": direction,
        "status": "ok" if ms else "out of memory",
        "reason": None if ms else "OutOfMemoryError: tried to allocate 2 TiB",
        "ms": ms,
        "p10_ms": ms and 0.98 * ms,
        "p90_ms": ms and 1.03 * ms,
        "flops": flops,
        "bytes": 4e6 if direction == "forward" else 8e6,
        "peak_bytes": 250_000_000 if ms else None,
    }


def content(gpu="NVIDIA Test 9000", commit="0123456789abcdef"):
    results = [
        result(pattern, resolution, impl, direction, ms)
        for (pattern, resolution), times in TIMES.items()
        for impl, pair in times.items()
        for direction, ms in zip(("forward", "backward"), pair, strict=True)
    ]
    inapplicable = result("block_causal", 1024, "varlen_flash", "forward", None)
    results.append(inapplicable | {"status": "unavailable", "reason": "the mask has no cu_seqlens"})
    return {
        "kind": "attention",
        "version": 1,
        "environment": {
            "gpu": gpu,
            "commit": commit,
            "date": "2031-02-03T04:05:06+00:00",
            "torch": "2.11.0",
            "triton": "3.6.0",
            "cuda": "13.0",
            "driver": "580.1",
        },
        "ceilings": {"copy_gb_per_s": 2000.0, "matmul_side": 8192, "matmul_tflops": 500.0},
        "results": results,
    }


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "attention_test.json").write_text(json.dumps(content()))
    (folder / "other.json").write_text(json.dumps({"kind": "something else"}))
    return folder


def make(data, out):
    return build.build(data, out / "tables", out / "plots")


def test_csv_holds_every_measurement_in_the_agreed_columns(data, tmp_path):
    make(data, tmp_path)
    text = (tmp_path / "tables" / "attention.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    table = pd.read_csv(tmp_path / "tables" / "attention.csv")
    assert len(table) == 12 and "varlen_flash" not in set(table[table.pattern == "block_causal"].impl)
    row = table[(table.pattern == "block_diagonal") & (table.impl == "triton")].set_index("direction")
    assert row.loc["forward", "ms"] == 1.0 and row.loc["backward", "ms"] == 2.0
    assert row.loc["forward", "tflops"] == 1.0 and row.loc["backward", "tflops"] == 1.25
    assert row.loc["forward", "gb_per_s"] == 4.0 and row.loc["backward", "gb_per_s"] == 4.0
    assert (row["peak_mb"] == 250.0).all()
    assert (table.gpu == "NVIDIA Test 9000").all() and (table.commit == "0123456789abcdef").all()


def test_what_was_not_measured_is_empty_and_numeric(data, tmp_path):
    make(data, tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "attention.csv")
    numbers = table[["ms", "tflops", "gb_per_s", "peak_mb"]]
    assert all(kind == "float64" for kind in numbers.dtypes)
    dense = table[(table.pattern == "block_causal") & (table.impl == "sdpa_dense")]
    assert len(dense) == 2 and dense[numbers.columns].isna().all(axis=None)


def test_order_is_by_pattern_then_direction_then_implementation(data, tmp_path):
    make(data, tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "attention.csv")
    assert list(table.pattern.unique()) == ["block_diagonal", "block_causal"]
    first = table[table.pattern == "block_diagonal"]
    assert list(first.impl) == ["triton", "varlen_flash", "sdpa_dense"] * 2
    assert list(first.direction) == ["forward"] * 3 + ["backward"] * 3


def table_rows(text):
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def summary(text):
    """(cell, direction) -> the other columns of the summary."""
    return {(line[0].split(",")[0], line[1]): line[2:] for line in table_rows(text) if line[1] in DIRECTIONS}


def test_markdown_compares_with_the_best_rival_and_the_dense_mask(data, tmp_path):
    make(data, tmp_path)
    text = (tmp_path / "tables" / "attention.md").read_text()
    assert "[attention_test.json](../data/attention_test.json)" in text and "0123456789abcdef" in text
    found = summary(text)
    # ours, rival, rival / ours, target, its ratio, dense / ours, floor: max of 4 MB at 2000 GB/s and 1 GFLOP at 500
    # TFLOP/s, floor / ours, extra memory and least
    assert found["block_diagonal 256", "forward"] == [
        "1.00", "triton", "1.50", "varlen_flash", "1.50", "-", "-", "8.00", "0.00200", "0 %", "-", "-",
    ]  # fmt: skip
    assert found["block_causal 1024", "forward"][:5] == ["3.00", "triton", "6.00", "flash_per_scale", "2.00"]
    assert found["block_causal 1024", "backward"][:5] == ["8.00", "triton", "-", "-", "-"]
    row = next(line for line in table_rows(text) if line[0] == "FlashAttention-2, variable length")
    assert row[1:] == ["1.50", "1.47 to 1.54", "1.00", "5.33", "0.667", "2.67", "250", "-", "-"]
    assert "SDPA, dense mask: out of memory. OutOfMemoryError: tried to allocate 2 TiB" in text
    assert "FlashAttention-2, variable length: unavailable. the mask has no cu_seqlens" in text
    assert "nan" not in text.lower()


def with_times(data, gpu="NVIDIA Test 9000", cell=None, **times):
    """The summary of a file whose block-diagonal cell also has these implementations, ms of (forward, backward)."""
    changed = content(gpu=gpu)
    for impl, pair in times.items():
        for direction, ms in zip(DIRECTIONS, pair, strict=True):
            changed["results"].append(result("block_diagonal", 256, impl, direction, ms) | {"ours": True})
    changed["results"] = [row | (cell or {}) for row in changed["results"]]
    (data / "attention_test.json").write_text(json.dumps(changed))
    make(data, data.parent)
    return (data.parent / "tables" / "attention.md").read_text()


def test_of_two_runs_of_one_backward_only_one_is_taken(data):
    found = summary(with_times(data, hopper=(0.7, 1.8), hopper_bounded=(0.6, 1.7)))
    assert found["block_diagonal 256", "forward"][:2] == ["0.600", "hopper_bounded"]
    assert found["block_diagonal 256", "backward"][:5] == ["1.80", "hopper", "3.00", "varlen_flash", "1.67"]
    found = summary(with_times(data, hopper=(0.7, 2.5)))  # not the fastest of ours: said as it is
    assert found["block_diagonal 256", "backward"][:2] == ["2.50", "hopper"]
    for missing in ({}, {"hopper": (0.7, None)}):
        found = summary(with_times(data, hopper_bounded=(0.6, 1.7), **missing))
        assert found["block_diagonal 256", "backward"][:2] == ["1.70", "hopper_bounded"]
    assert summary(with_times(data))["block_diagonal 256", "backward"][:2] == ["2.00", "triton"]


def test_an_implementation_without_a_row_is_named(data, tmp_path):
    changed = content()
    changed["results"].append(result("block_diagonal", 256, "flex_max_autotune", "forward", 0.5))
    (data / "attention_test.json").write_text(json.dumps(changed))
    make(data, tmp_path)
    text = (tmp_path / "tables" / "attention.md").read_text()
    notes = [line for line in text.splitlines() if line.startswith("* Without a row here")]
    autotuned, per_scale = "FlexAttention, max-autotune", "FlashAttention-2, one call a scale"
    varlen = "FlashAttention-2, variable length"
    assert [note.split(": ", 1)[1] for note in notes] == [
        f"{per_scale}.",  # diagonal, forward
        f"{per_scale}; {autotuned}.",  # diagonal, backward
        f"{autotuned}.",  # causal, forward: variable length is there as unavailable
        f"{varlen}; {autotuned}.",
    ]


PEERS = """\
impl,pattern,resolution,batch,heads,length,head_dim,dtype,forward_ms,backward_ms
theirs,block_diagonal,256,4,16,680,64,float16,1.25,
others,block_diagonal,256,4,16,680,64,bfloat16,1.5,3.0
exact,block_diagonal,256,4,16,680,64,float32,0.1,0.1
larger,block_diagonal,256,64,16,680,64,bfloat16,0.1,0.1
wider,block_diagonal,256,4,16,680,128,bfloat16,0.1,0.1
"""


def test_peers_measured_elsewhere_stand_in_the_summary_of_an_h100(data):
    h100 = "NVIDIA H100 80GB HBM3"
    assert "elsewhere, ms" not in with_times(data, gpu=h100)
    (data / "attention_peers_h100.csv").write_text(PEERS)
    text = with_times(data, gpu=h100)
    found = summary(text)
    assert "| best peer elsewhere, ms |  | peer / ours | target, ms |" in text
    assert "[attention_peers_h100.csv](../data/attention_peers_h100.csv)" in text
    assert found["block_diagonal 256", "forward"][4:9] == ["1.50", "1.25", "theirs (float16)", "1.25", "-"]
    assert found["block_diagonal 256", "backward"][4:9] == ["1.50", "3.00", "others", "1.50", "-"]
    assert found["block_causal 1024", "forward"][4:9] == ["2.00", "-", "-", "-", "-"]
    for other in ({"gpu": "NVIDIA A100"}, {"cell": {"batch": 8}}, {"cell": {"head_dim": 128}}):
        assert "elsewhere, ms" not in with_times(data, **({"gpu": h100} | other))
    assert "elsewhere, ms" not in with_times(data, gpu=h100, cell={"dtype": "float32"})


def test_targets_are_for_their_gpu_and_cells_only(data, tmp_path):
    def target(gpu, **cell):
        changed = content(gpu=gpu)
        changed["results"] = [r | cell for r in changed["results"] if r["pattern"] == "block_diagonal"]
        (data / "attention_test.json").write_text(json.dumps(changed))
        make(data, tmp_path)
        found = summary((tmp_path / "tables" / "attention.md").read_text())
        return [found["block_diagonal 256", direction][5:7] for direction in DIRECTIONS]

    anchor = {"batch": 64, "heads": 16}
    assert target("NVIDIA H100 80GB HBM3", **anchor) == [["0.140", "0.14"], ["0.400", "0.20"]]
    assert target("NVIDIA H100 80GB HBM3", batch=8, heads=16) == [["-", "-"]] * 2
    assert target("NVIDIA H100 80GB HBM3", head_dim=128, **anchor) == [["-", "-"]] * 2
    assert target("NVIDIA H100 80GB HBM3", dtype="float16", **anchor) == [["-", "-"]] * 2
    assert target("NVIDIA A100", **anchor) == [["-", "-"]] * 2


def full_run():
    """A version 2 file: two head dims, three batches, densities in between; times are at a share of the roof."""
    rates = {"cuda": 500.0, "triton": 400.0, "flash4_per_scale": 300.0, "flex": 200.0}
    results = []
    for cell in shapes.cells(full=True):
        for impl, rate in rates.items():
            for direction in DIRECTIONS:
                row = describe(cell, direction)
                ms = max(row["flops"] / rate / 1e9, row["bytes"] / (4 * rate) / 1e6)
                extra = row["fewest_extra_bytes"] * (1 if impl == "cuda" else 2)
                results.append(
                    row
                    | {"impl": impl, "ours": impl in ("cuda", "triton"), "status": "ok", "reason": None}
                    | {"commit": "aaaa" if impl == "cuda" else "bbbb", "ms": ms, "p10_ms": ms, "p90_ms": ms}
                    | {"host_us": 12.0, "peak_bytes": 2 * extra, "extra_bytes": extra}
                )
    facts = content()["environment"] | {"flash_attn_4": "4.0.0", "gpu": "NVIDIA H100 80GB HBM3"}
    return content() | {"version": 2, "complete": True, "running": [], "environment": facts, "results": results}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    (folder / "attention_full.json").write_text(json.dumps(full_run()))
    return folder


def panels(figure):
    return {ax.get_title(): ax for ax in figure.axes}


def lines(ax):
    """Points of each line by its colour."""
    return {line.get_color(): list(zip(*line.get_data(), strict=True)) for line in ax.lines}


def test_version_2_has_commits_host_times_and_memory_of_each_row(full, tmp_path):
    (source,) = attention_data.load(full)
    table = pd.read_csv(io.StringIO(attention.csv([source])))
    assert list(table.columns) == COLUMNS.split(",") and len(table) == 38 * 2 * 4
    assert set(table[table.impl == "cuda"].commit) == {"aaaa"} and set(table[table.impl == "flex"].commit) == {"bbbb"}
    assert table[table.impl == "cuda"].tflops.max() == 500 and table[table.impl == "cuda"].gb_per_s.max() == 2000
    text = attention.markdown([source])
    assert "commit `aaaa`, `bbbb`" in text and "flash-attn-4 4.0.0" in text
    row = next(line for line in table_rows(text) if line[0] == "ours: Triton")
    assert row[-2] == f"{2 * source.rows['least_mb'].iloc[0]:.0f}" and row[-1] == "12"
    ours = summary(text)["block_diagonal 1024", "forward"]
    assert ours[1] == "cuda" and ours[3:5] == ["flash4_per_scale", "1.67"] and ours[-2] == ours[-1] != "-"


def test_a_full_run_has_all_plots_for_both_head_dims(full):
    (source,) = attention_data.load(full)
    wanted = {"time", "memory", "roofline", "resolution", "density", "batch_diagonal", "batch_causal"}
    found = dict(attention_plots.draw(source))
    assert set(found) == {*wanted, *(f"{name}_d128" for name in wanted if name != "density"), "density_d128"}
    sizes = {text.get_text() for ax in found["time"].axes for text in ax.get_xticklabels()}
    assert sizes == {"256 px\n64 x 16 x 64", "512 px\n16 x 24 x 64", "1024 px\n4 x 24 x 64"}
    assert len(panels(found["density"])["1024 px, forward"].lines[0].get_xdata()) == 4
    assert len(panels(found["density_d128"])["1024 px, forward"].lines[0].get_xdata()) == 2
    plt.close("all")


def test_lines_are_the_measurements(full):
    (source,) = attention_data.load(full)
    source = source.only(source.rows["head_dim"] == 64)
    blue, black = LOOKS["triton"][1], "black"
    rows = source.rows[(source.rows["pattern"] == "block_causal") & (source.rows["impl"] == "triton")]
    by_batch = lines(panels(attention_plots.draw_batch(source, "block_causal"))["256 px, backward"])
    assert by_batch[blue] == [(1, pytest.approx(400)), (8, pytest.approx(400)), (64, pytest.approx(400))]
    one = rows[(rows["batch"] == 8) & (rows["direction"] == "backward")].set_index("resolution")
    found = panels(attention_plots.draw_resolution(source))
    by_resolution = lines(found["block-causal, backward"])
    assert by_resolution[blue] == [(r, pytest.approx(one.loc[r, "ms"] / 8)) for r in (256, 512, 1024)]
    assert by_resolution[black] == [(r, pytest.approx(one.loc[r, "floor_ms"] / 8)) for r in (256, 512, 1024)]
    memory = lines(found["block-causal, forward + backward"])
    assert [y for _, y in memory[blue]] == pytest.approx([2 * y for _, y in memory[black]])
    density = lines(panels(attention_plots.draw_density(source.only(source.rows["batch"] == 4)))["1024 px, forward"])
    (x0, y0), *_, (x1, y1) = density[blue]
    assert y1 / y0 == pytest.approx(x1 / x0) and 0.2 < x0 < x1 < 0.7
    plt.close("all")


def test_a_batch_that_one_pattern_was_measured_with_is_no_reason_to_leave_the_other_out(full):
    (source,) = attention_data.load(full)
    rows = source.rows
    measured = ~rows["batch"].isin((1, 8)) | (rows["pattern"] == "block_diagonal")
    source = source.only((rows["head_dim"] == 64) & measured)
    for ax in panels(attention_plots.draw_resolution(source)).values():
        assert len(ax.lines) > 1 and ax.get_xlim()[0] < 256 < 1024 < ax.get_xlim()[1]
    plt.close("all")


def test_roofline_has_both_rates_under_both_ceilings(full):
    (source,) = attention_data.load(full)
    figure = attention_plots.draw_roofline(source.only(source.rows["head_dim"] == 64).main_batches())
    assert [ax.get_title() for ax in figure.axes] == ["forward", "backward"] * 2
    for ax, unit in zip(figure.axes, ("TFLOP/s", "TFLOP/s", "GB/s", "GB/s"), strict=True):
        roof = ax.lines[0].get_xydata()
        # 500 TFLOP/s and 2000 GB/s meet at 250 FLOPs a byte
        assert roof[1].tolist() == [250.0, 500.0 if unit == "TFLOP/s" else 2000.0]
        for collection in ax.collections:
            for x, y in collection.get_offsets() if isinstance(collection, PathCollection) else ():
                assert y <= 1.0001 * (min(500, 2 * x) if unit == "TFLOP/s" else min(2000, 500e3 / x))
    assert {"copy 2000 GB/s", "bf16 product 500 TFLOP/s"} <= {t.get_text().strip() for t in figure.axes[2].texts}
    plt.close("all")


def test_points_of_the_roofline_stand_at_their_true_intensity(full):
    (source,) = attention_data.load(full)
    source = source.only(source.rows["head_dim"] == 64).main_batches()
    figure = attention_plots.draw_roofline(source)
    for ax, column in zip(figure.axes, ("tflops", "tflops", "gb_per_s", "gb_per_s"), strict=True):
        rows = source.rows[source.rows["direction"] == ax.get_title()]
        wanted = sorted(zip(rows["flops"] / rows["bytes"], rows[column], strict=True))
        points = [c.get_offsets()[0].tolist() for c in ax.collections if isinstance(c, PathCollection)]
        for found, expected in zip(sorted(points), wanted, strict=True):
            assert found == pytest.approx(expected)
    plt.close("all")


def test_building_twice_gives_identical_files(data, tmp_path):
    first, second = make(data, tmp_path / "a"), make(data, tmp_path / "b")
    assert [p.name for p in first] == [p.name for p in second]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_the_order_of_results_in_the_file_does_not_matter(data, tmp_path):
    make(data, tmp_path / "a")
    shuffled = content()
    shuffled["results"].reverse()
    (data / "attention_test.json").write_text(json.dumps(shuffled))
    make(data, tmp_path / "b")
    for name in ("attention.csv", "attention.md"):
        assert (tmp_path / "a" / "tables" / name).read_text() == (tmp_path / "b" / "tables" / name).read_text()


def test_plots_are_written_for_each_file_of_data(data, tmp_path):
    (data / "attention_zweite.json").write_text(json.dumps(content(gpu="NVIDIA Test 9001")))
    written = make(data, tmp_path)
    plots = {p.stem for p in written if p.suffix == ".png"}
    assert plots == {f"attention_{f}_{p}" for f in ("test", "zweite") for p in ("time", "memory", "roofline")}
    for path in written:
        if path.suffix == ".png":
            image = imread(path)
            assert min(image.shape[:2]) > 500 and image[..., :3].std() > 0.05


def test_bars_are_the_measurements_and_a_missing_one_is_a_gap(data):
    (source,) = attention_data.load(data)
    figure = attention_plots.draw_time(source)
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert set(panels) == {
        f"{pattern}, {direction}"
        for pattern in ("block-diagonal", "block-causal")
        for direction in ("forward", "backward")
    }
    heights = {t: sorted(bar.get_height() for bar in ax.patches) for t, ax in panels.items()}
    assert heights["block-diagonal, forward"] == [1.0, 1.5, 8.0]
    assert heights["block-causal, forward"] == [3.0, 6.0]
    assert heights["block-causal, backward"] == [8.0]
    assert "out of memory" in {text.get_text() for text in panels["block-causal, backward"].texts}
    # The same implementation stands at the same place in its group and has the same colour in every panel.
    ours = {
        title: (round(bar.get_x() % 1, 6), bar.get_facecolor())
        for title, ax in panels.items()
        for bar in ax.patches
        if bar.get_height() == {"block-diagonal, forward": 1.0, "block-diagonal, backward": 2.0}.get(title)
    }
    assert len(set(ours.values())) == 1 and len(ours) == 2


def test_results_without_memory_have_no_memory_plot(data, tmp_path):
    changed = content()
    for row in changed["results"]:
        row["peak_bytes"] = None
    (data / "attention_test.json").write_text(json.dumps(changed))
    assert {p.name for p in make(data, tmp_path)} == {
        "attention.csv",
        "attention.md",
        "attention_test_time.png",
        "attention_test_roofline.png",
    }


def test_an_implementation_from_elsewhere_keeps_its_name(data, tmp_path):
    changed = content()
    changed["results"].append(result("block_diagonal", 256, "newcomer", "forward", 0.5))
    (data / "attention_test.json").write_text(json.dumps(changed))
    make(data, tmp_path)
    text = (tmp_path / "tables" / "attention.md").read_text()
    assert "| newcomer | 0.500 |" in text and "| 0.500 | newcomer | 0.50 |" in text


def test_a_version_from_the_future_is_refused(data, tmp_path):
    (data / "attention_test.json").write_text(json.dumps(content() | {"version": 3}))
    with pytest.raises(ValueError, match="version 3; this script reads versions 1 and 2"):
        make(data, tmp_path)


def test_numbers_have_three_digits():
    shown = {0.0123456: "0.0123", 0.5: "0.500", 1.234: "1.23", 59.76: "59.8", 123.4: "123", 2990.0: "2990"}
    assert {value: number(value) for value in shown} == shown
    assert number(None) == number(float("nan")) == "-"


def test_the_script_runs_alone_and_explains_missing_data(data, tmp_path):
    """Its folder is copied out of the project, and what of that is installed, and torch, cannot be imported."""
    folder, blocked = tmp_path / "reports", ("hmar", "hmar_kernels", "bench", "torch")
    folder.mkdir()
    for module in build.HERE.glob("*.py"):
        shutil.copy(module, folder)
    script = folder / "build.py"

    def run(folder):
        block = f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.argv = sys.argv[1:]; "
        code = block + "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-I", "-c", code, str(script), "--data", str(folder), "--out", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run(data)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_file() for line in done.stdout.splitlines()) and len(done.stdout.splitlines()) == 5
    failed = run(tmp_path / "nowhere")
    assert failed.returncode == 1
    assert "no results" in failed.stderr and "pytest bench" in failed.stderr


def step(model, attention, compiled, ms, resolution=256, recompute="none", operators="auto", **more):
    status = "ok" if ms else "out of memory"
    found = {"ms": ms, "forward_ms": ms and 0.3 * ms, "step_ms": ms and 1.1 * ms, "mfu": ms and 30 / ms}
    memory = {"peak_bytes": ms and int(1e8 * ms), "step_peak_bytes": ms and int(2e8 * ms)}
    size = {"resolution": resolution, "depth": 16, "batch": 32, "dtype": "bfloat16", "commit": "0123456789abcdef"}
    ways = {"attention": attention, "operators": operators, "compile": compiled, "activation_checkpointing": recompute}
    reason = None if ms else "OutOfMemoryError: no room"
    shares = {"optimizer_share": ms and 0.05}
    return {"model": model, **size, **ways, "status": status, "reason": reason, **found, **memory, **shares, **more}


def data_folder(tmp_path, **files):
    """With a data file of each name."""
    data = tmp_path / "data"
    data.mkdir()
    for name, file in files.items():
        (data / f"{name}.json").write_text(json.dumps(file))
    return data


@pytest.fixture
def with_steps(tmp_path):
    rows = [
        step("var", "sdpa_dense", "false", 200.0, operators="reference"),
        step("var", "sdpa_dense", "blocks", 150.0),
        step("var", "auto", "blocks", 90.0),
        step("hmar", "sdpa_dense", "false", None, resolution=512),
        step("hmar", "flex", "blocks", 100.0),
        step("hmar", "auto", "false", 80.0),
        step("hmar", "auto", "blocks", 64.0),
        step("hmar", "auto", "model", None),
        step("hmar", "auto", "blocks", 50.0, recompute="mlp"),
    ]
    file = {"kind": "training", "version": 1, "environment": {"gpu": "NVIDIA H100"}, "results": rows}
    return data_folder(tmp_path, attention=content(), training_test=file)


def test_training_steps_have_a_table_with_the_fastest_of_each(with_steps, tmp_path):
    written = build.build(with_steps, tmp_path / "tables", tmp_path / "plots")
    assert {"training.csv", "training.md", "training_test_steps.png"} <= {path.name for path in written}
    table = pd.read_csv(tmp_path / "tables" / "training.csv")
    assert list(table.columns) == training.COLUMNS
    rows = list(table[["model", "resolution", "attention", "ms", "peak_gb", "mfu"]].itertuples(index=False, name=None))
    assert rows[:5] == [
        ("hmar", 256, "auto", 64.0, 6.4, pytest.approx(30 / 64, rel=1e-5)),  # of three ways to compile; none recomputed
        ("hmar", 256, "flex", 100.0, 10.0, 0.3),
        ("var", 256, "auto", 90.0, 9.0, pytest.approx(1 / 3, rel=1e-5)),
        ("var", 256, "sdpa_dense", 150.0, 15.0, 0.2),
        ("var", 256, "published", 200.0, 20.0, 0.15),
    ]
    assert rows[5][:3] == ("hmar", 512, "sdpa_dense") and all(map(pd.isna, rows[5][3:]))
    assert imread(tmp_path / "plots" / "training_test_steps.png").std() > 0.05


def test_the_page_of_training_steps_has_all_ways_targets_and_reasons(with_steps):
    (rows,) = training.load(with_steps).values()
    page = training.markdown(rows)
    ours = "| HMAR stage 1 | ours | fused | blocks | no | float32 |"
    assert f"{ours} none | 64.0 (65) | 19.2 | 6.40 (12) | 5 % | 12.8 | 47 % |" in page
    assert f"{ours} mlp | 50.0 (65) |" in page
    assert "| HMAR stage 1 | ours | fused | model | no | float32 | none | out of memory |" in page
    assert "SDPA, dense mask, compile false: OutOfMemoryError: no room" in page


def test_training_steps_in_a_graph_have_a_row_of_their_own(tmp_path):
    more = {"residual": "bfloat16", "forward_ms": None}
    rows = [
        step("hmar", "auto", "blocks", 70.0, cuda_graphs="false", residual="bfloat16"),
        step("hmar", "auto", "blocks", 62.0, cuda_graphs="true", **more),
        step("hmar", "sdpa_dense", "false", 99.0, operators="reference", cuda_graphs="true", **more),
    ]
    file = {"kind": "training", "version": 3, "environment": {"gpu": "NVIDIA H100"}, "results": rows}
    (tmp_path / "training_test.json").write_text(json.dumps(file))
    (rows,) = training.load(tmp_path).values()
    page = training.markdown(rows)
    assert "| HMAR stage 1 | ours | fused | blocks | yes | bfloat16 | none | 62.0 (65) | - | 6.20 (12) |" in page
    assert "| HMAR stage 1 | ours | fused | blocks | no | bfloat16 | none | 70.0 (65) | 21.0 |" in page
    assert list(rows["attention"]) == ["auto", "auto", "sdpa_dense"]  # as published it is eager
    assert list(training.fastest_steps(rows)["ms"]) == [62.0, 99.0]


def test_bars_are_the_numbers(with_steps):
    (rows,) = training.load(with_steps).values()
    figure = training.draw_steps(rows)
    heights = sorted(bar.get_height() for bar in figure.axes[0].patches)
    assert heights == [64.0, 90.0, 100.0, 150.0, 200.0]
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["no memory"]
    plt.close(figure)


def test_tables_of_training_steps_go_by_size_over_all_files(with_steps, tmp_path):
    file = json.loads((with_steps / "training_test.json").read_text())
    file["results"] = [step("hmar", "auto", "blocks", 180.0, resolution=size, depth=30) for size in (512, 256)]
    (with_steps / "training_more.json").write_text(json.dumps(file))
    training.build(with_steps, tmp_path, tmp_path)
    headings = [line for line in (tmp_path / "training.md").read_text().splitlines() if line.startswith("##")]
    sizes = ["256 px, d16", "256 px, d30", "512 px, d16", "512 px, d30"]
    assert [heading[3:14] for heading in headings] == sizes
    table = pd.read_csv(tmp_path / "training.csv")[["resolution", "depth"]]
    assert [f"{pixels} px, d{depth}" for pixels, depth in table.drop_duplicates().to_numpy()] == sizes


def test_the_legend_of_training_steps_fits_on_few_cells(tmp_path):
    names = ("auto", "flex", "sdpa_dense", "triton")
    rows = [step("hmar", name, "blocks", 90.0) for name in names]
    rows.append(step("hmar", "sdpa_dense", "false", 99.0, operators="reference"))
    file = {"kind": "training", "version": 1, "environment": {"gpu": "NVIDIA H100"}, "results": rows}
    (tmp_path / "training_test.json").write_text(json.dumps(file))
    figure = training.draw_steps(*training.load(tmp_path).values())
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    plt.close(figure)


def test_training_data_of_another_version_is_refused(with_steps):
    file = with_steps / "training_test.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="is of version 9; this script reads versions 1 and 2 and 3"):
        training.load(with_steps)


# Milliseconds of forward + backward, of which a quarter is the forward; None stands for what ran out of memory.
OPERATOR_TIMES = {
    ("modulated_norm", 256): {"eager": 8.0, "compiled": 3.0, "triton": 2.0},
    ("qk_norm", 256): {"compiled": 3.0, "triton": 2.0},
    ("qk_norm", 512): {"compiled": 3.0, "triton": 4.0},
    ("linear_cross_entropy", 256): {"triton": 5.0, "eager": None, "chunked": 4.0},
    ("gelu_linear", 256): {"triton": 5.0, "compiled": 4.0},
}


def operators_file(times=None, **more):
    rows = []
    for (operator, resolution), of_impl in (times or OPERATOR_TIMES).items():
        for impl, both in of_impl.items():
            for direction, share in (("forward", 0.25), ("backward", 0.75), ("forward_backward", 1.0)):
                ms = both and share * both
                rows.append(
                    {"operator": operator, "resolution": resolution, "depth": 16 if resolution == 256 else 24}
                    | {"batch": 8, "bytes": share * 1e9, "flops": 0, "impl": impl, "direction": direction}
                    | {"status": "ok" if ms else "out of memory", "reason": None if ms else "OutOfMemoryError: no room"}
                    | {"ms": ms, "p10_ms": ms and 0.9 * ms, "p90_ms": ms and 1.1 * ms}
                    | {"extra_bytes": ms and int(1e8 * ms)}
                )
    head = {name: content()[name] for name in ("environment", "ceilings")}
    return {"kind": "operators", "version": 1, "complete": True, **head, "results": rows} | more


@pytest.fixture
def with_operators(tmp_path):
    return data_folder(tmp_path, operators_test=operators_file())


def test_operators_have_a_table_in_reading_order(with_operators, tmp_path):
    written = build.build(with_operators, tmp_path / "tables", tmp_path / "plots")
    assert [path.name for path in written] == ["operators.csv", "operators.md", "operators_test_operators.png"]
    assert imread(written[-1]).std() > 0.05
    found = pd.read_csv(written[0])
    assert list(found.columns) == operators.COLUMNS and len(found) == 3 * 12
    both = found[found.direction == "forward_backward"].set_index(["operator", "resolution", "impl"])
    assert list(both.index[:3]) == [("modulated_norm", 256, name) for name in ("triton", "compiled", "eager")]
    assert both.index[-1] == ("qk_norm", 512, "compiled")
    norm = both.loc["modulated_norm"]
    assert list(norm.ms) == [2.0, 3.0, 8.0] and list(norm.times_compiler) == [1.5, 1.0, 0.375]
    assert list(norm.extra_mb) == [200.0, 300.0, 800.0]
    assert both.loc["linear_cross_entropy"].times_compiler.isna().all()
    assert both.loc[("linear_cross_entropy", 256, "eager")][["ms", "extra_mb"]].isna().all()


def test_the_page_of_operators_says_what_is_faster_and_what_the_model_uses(with_operators):
    (source,) = operators.load(with_operators)
    page = operators.markdown([source])
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("* `") and "step" in line}
    assert lines.keys() == {"modulated_norm", "qk_norm", "linear_cross_entropy", "gelu_linear"}
    faster = "Ours measured faster: 1.50 times as fast as torch.compile (forward + backward), with 0.67 times"
    assert "a training step does not call it" in lines["modulated_norm"] and faster in lines["modulated_norm"]
    assert "the model uses ours (calls in a step: 16 at d16 and 24 at d24)" in lines["qk_norm"]
    slower = "**torch.compile measured faster at 512 px, d24, batch 8**: ours is 0.75 to 1.50 times as fast"
    assert slower in lines["qk_norm"]
    assert "model uses ours" in lines["gelu_linear"] and "Another" not in lines["gelu_linear"]
    assert "**torch.compile measured faster**: ours is 0.80 times as fast" in lines["gelu_linear"]
    assert "Which is faster is not known" in lines["linear_cross_entropy"]
    # one direction, the other, both, spread, ratio, floor: 1 GB at 2000 GB/s, its share, memory
    cells = ["0.500", "1.50", "2.00", "1.80 to 2.20", "1.50", "0.500", "25 %", "50", "200"]
    assert ["`qk_norm`", "16", "ours: Triton", *cells] in table_rows(page)
    assert "* `linear_cross_entropy`, eager: out of memory. OutOfMemoryError: no room" in page
    assert "cut short" not in page and "nan" not in page.lower()


def test_a_faster_implementation_that_is_neither_is_told(with_operators):
    times = {("linear_cross_entropy", 256): {"triton": 5.0, "compiled": 6.0, "chunked": 4.0, "newcomer": 9.0}}
    (with_operators / "operators_test.json").write_text(json.dumps(operators_file(times)))
    (source,) = operators.load(with_operators)
    page = operators.markdown([source])
    assert "Ours measured faster: 1.20 times" in page
    assert "Another implementation is faster than both in some shape" in page
    assert list(source.rows["impl"].unique()) == ["triton", "compiled", "chunked", "newcomer"]


def test_what_a_run_of_operators_did_not_come_to_is_told(with_operators):
    (with_operators / "operators_test.json").write_text(json.dumps(operators_file(complete=False)))
    (source,) = operators.load(with_operators)
    page = operators.markdown([source])
    missing = "no rows of `residual_modulated_norm`, `residual_norm_linear`"
    assert f"The run was cut short: {missing}; none of torch.compile beside `linear_cross_entropy`." in page


def test_bars_of_operators_are_the_measurements(with_operators):
    (source,) = operators.load(with_operators)
    found = panels(operators.draw(source))
    assert list(found) == ["modulated_norm", "gelu_linear", "qk_norm", "linear_cross_entropy"]
    bars = [(bar.get_x() // 1, bar.get_height()) for bar in found["qk_norm"].patches]
    assert bars == [(-1, 2.0), (-1, 0.5), (0, 3.0), (0, 0.75), (0, 4.0), (0, 1.0), (1, 3.0), (1, 0.75)]
    texts = [text.get_text() for text in found["linear_cross_entropy"].texts]
    assert sorted(texts) == ["4.00", "5.00", "not measured", "not measured", "out of memory"]
    plt.close("all")


def test_operators_that_all_failed_have_no_plot(with_operators, tmp_path):
    times = {("qk_norm", 256): {"triton": None, "compiled": None}}
    (with_operators / "operators_test.json").write_text(json.dumps(operators_file(times)))
    written = build.build(with_operators, tmp_path / "tables", tmp_path / "plots")
    assert [path.name for path in written] == ["operators.csv", "operators.md"]
    assert "not known" in written[1].read_text() and ".png" not in written[1].read_text()


def test_operators_of_another_version_are_refused(with_operators):
    (with_operators / "operators_test.json").write_text(json.dumps(operators_file(version=2)))
    with pytest.raises(ValueError, match="is of version 2; this script reads version 1"):
        operators.load(with_operators)


def test_the_calls_of_a_step_are_those_of_the_model(monkeypatch):
    """Of each operator as many as the report says, none with a named implementation, and "auto" is ours on a GPU."""
    calls = dict.fromkeys(operators.CALLS, 0)

    def counted(name, operator):
        def call(*inputs, **options):
            assert "impl" not in options
            calls[name] += 1
            return operator(*inputs, **options)

        return call

    for name in calls:
        monkeypatch.setattr(hmar.model, name, counted(name, getattr(hmar.model, name)))
    _, config = PRESETS["tiny"]
    model = hmar.model.NextScaleTransformer(config)
    length, batch = config.pyramid.length, 2
    inputs = torch.randn(batch, length - config.pyramid.sizes[0], config.code_dim)
    targets = hmar.model.Targets(torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, length))
    model(torch.zeros(batch, dtype=torch.long), inputs, targets=targets)
    assert calls == {name: operators.calls_in_step(name, config.depth) for name in operators.CALLS}
    assert set(operators.CALLS) == set(operator_rivals.NAMES)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert triton_device.choose(torch.device("cuda"), torch.bfloat16, torch.float32)[0] == operators.OURS


# Losses by seed; windows of two steps, of which the last one has one.
PLAIN = [[4.0, 3.0, 2.5, 2.5, 1.0], [4.2, 3.2, 2.3, 2.5, 1.4]]
ENGINE = [[4.0, 3.1, 2.5, 2.5, 1.0], [4.2, 3.3, 2.3, 2.5, 1.1]]


def curve_file(engine=ENGINE, **more):
    settings = {"stage": "next-scale", "preset": "d16-256", "depth": 8, "batch": 32, "steps": 5, "window": 2}
    settings |= {"seeds": 2, "lr": 3e-4, "precision": "auto", "residual_precision": "auto", "compile": "blocks"}
    verdict = compare(engine, PLAIN, settings["window"])
    curves = {"engine": engine, "plain": PLAIN}
    head = {"kind": "loss_curve", "version": 1, "environment": content()["environment"]}
    return {**head, "settings": settings, **verdict, "curves": curves} | more


@pytest.fixture
def with_curves(tmp_path):
    return data_folder(tmp_path, loss_curve_test=curve_file())


def test_learning_curves_have_a_table_of_their_windows(with_curves, tmp_path):
    written = build.build(with_curves, tmp_path / "tables", tmp_path / "plots")
    assert [path.name for path in written] == ["loss_curve.csv", "loss_curve.md", "loss_curve_test.png"]
    assert imread(written[-1]).std() > 0.05
    found = pd.read_csv(written[0])
    assert list(found.columns) == loss_curve.COLUMNS
    assert list(zip(found.first_step, found.last_step, strict=True)) == [(1, 2), (3, 4), (5, 5)]
    assert list(found.plain) == pytest.approx([3.6, 2.45, 1.2])
    assert list(found.engine) == pytest.approx([3.65, 2.45, 1.05])
    assert list(found.deviation) == pytest.approx([0.05, 0.0, 0.15])
    assert list(found.spread) == pytest.approx([0.2 / 2**0.5, 0.1 / 2**0.5, 0.4 / 2**0.5], rel=1e-5)
    assert list(found.ratio) == pytest.approx([0.353553, 0.0, 0.530330], rel=1e-5)


def test_the_page_of_learning_curves_has_the_verdict(with_curves):
    def page(**more):
        (with_curves / "loss_curve_test.json").write_text(json.dumps(curve_file(**more)))
        return loss_curve.markdown(loss_curve.load(with_curves))

    passed = page()
    assert "## HMAR stage 1, sizes of d16-256, 8 blocks: NVIDIA Test 9000" in passed
    verdict = "The engine's curve of 5 steps equals that of the plain loop within the spread of seeds"
    assert f"{verdict}: the largest deviation in a window is 0.530 of the spread (steps 5 to 5)" in passed
    assert ["5 to 5", "1.0500", "1.2000", "0.150", "0.283", "0.530"] in table_rows(passed)
    failed = page(engine=[[4.4, 3.4, 2.5, 2.5, 1.0], [4.6, 3.6, 2.3, 2.5, 1.4]])
    assert "**does not equal** that of the plain loop" in failed and "is 2.83 of the spread (steps 1 to 2)" in failed
    assert "not finite" not in failed
    flat = page(largest_ratio=0.1, passed=False)
    assert "**does not equal**" in flat and "But some curve is not finite or does not fall." in flat
    assert "is inf of the spread" in page(spread=[0.0, 0.1, 0.1], largest_ratio=float("inf"), passed=False)


def test_lines_of_learning_curves_are_the_losses(with_curves):
    (source,) = loss_curve.load(with_curves)
    above, below = loss_curve.draw(source).axes
    assert [list(line.get_ydata()) for line in above.lines] == [*PLAIN, *ENGINE]
    assert list(above.lines[0].get_xdata()) == [1, 2, 3, 4, 5]
    spread, deviation = (line.get_xydata() for line in below.lines)
    assert list(spread[:, 0]) == list(deviation[:, 0]) == [1.5, 3.5, 5.0]
    assert list(deviation[:, 1]) == pytest.approx([0.05, 0.0, 0.15]) and below.get_yscale() == "log"
    low, high = below.get_ylim()
    assert low < 0.05 and high > 0.283
    plt.close("all")


def test_learning_curves_of_another_version_are_refused(with_curves):
    (with_curves / "loss_curve_test.json").write_text(json.dumps(curve_file(version=2)))
    with pytest.raises(ValueError, match="is of version 2; this script reads version 1"):
        loss_curve.load(with_curves)


def scaling_file(runs, commit="0123456789abcdef", **more):
    """runs: (processes, way, batch of all processes, tokens a second, times one process)."""
    results = [
        {"processes": processes, "parallel": way, "batch": batch, "loss": 8.0, "tokens_per_second": tokens}
        | {"images_per_second": tokens / 680, "mfu": 0.25, "peak_memory_gb": 12.5, "speedup": times}
        for processes, way, batch, tokens, times in runs
    ]
    settings = {"stage": "next-scale", "preset": "d16-256", "batch": [32, 48], "global_batch": False, "steps": 80}
    settings |= {"workers": 2, "compile": "blocks"}
    environment = content(gpu="NVIDIA H200", commit=commit)["environment"]
    head = {"kind": "scaling", "version": 1, "environment": environment, "settings": settings}
    return {**head, "results": results} | more


SCALING = [
    (1, "ddp", 48, 340000.0, 1.0),
    (2, "fsdp", 96, 510000.0, 1.5),
    (2, "ddp", 96, 663000.0, 1.95),
    (2, "ddp", 64, 540000.0, 1.8),
    (1, "ddp", 32, 300000.0, 1.0),
]


@pytest.fixture
def with_scaling(tmp_path):
    return data_folder(tmp_path, scaling_test=scaling_file(SCALING))


def test_runs_on_several_gpus_are_grouped_by_the_batch_of_one(with_scaling, tmp_path):
    written = build.build(with_scaling, tmp_path / "tables", tmp_path / "plots")
    assert [path.name for path in written] == ["scaling.csv", "scaling.md"]
    found = pd.read_csv(written[0])
    assert list(found.columns) == scaling.COLUMNS
    rows = found[["batch_per_gpu", "processes", "parallel", "tokens_per_s", "times_one_process"]]
    assert list(rows.itertuples(index=False, name=None)) == [
        (32, 1, "-", 300000, 1.0),
        (32, 2, "ddp", 540000, 1.8),
        (48, 1, "-", 340000, 1.0),
        (48, 2, "ddp", 663000, 1.95),
        (48, 2, "fsdp", 510000, 1.5),
    ]
    ours = "| HMAR stage 1, d16-256 |"
    page = written[1].read_text()
    assert f"{ours} 32 | 1 | - | 300000 | 441 | 1.000 | 25 % | 12.5 |" in page
    assert f"{ours} 48 | 2 | ddp | 663000 | 975 | 1.950 (1.9) | 25 % | 12.5 |" in page
    assert "not equally fast" not in page


def test_runs_with_one_batch_in_all_stay_together(with_scaling):
    file = scaling_file([(1, "ddp", 64, 3e5, 1.0), (4, "ddp", 64, 9e5, 3.0), (2, "ddp", 64, 5e5, 1.7)])
    file["settings"]["global_batch"] = True
    (with_scaling / "scaling_test.json").write_text(json.dumps(file))
    (source,) = scaling.load(with_scaling)
    rows = source.rows[["processes", "batch_per_gpu"]]
    assert list(rows.itertuples(index=False, name=None)) == [(1, 64), (2, 32), (4, 16)]
    assert "the same batch in all" in scaling.markdown([source])


def test_files_of_several_commits_are_told_apart(with_scaling):
    earlier = scaling_file([(1, "ddp", 32, 250000.0, 1.0)], commit="aaaabbbbccccdddd", note="before this and that")
    (with_scaling / "scaling_earlier.json").write_text(json.dumps(earlier))
    sources = scaling.load(with_scaling)
    page = scaling.markdown(sources)
    assert "## NVIDIA H200, commit aaaabbbbcc: before this and that" in page
    assert "## NVIDIA H200, commit 0123456789\n" in page
    told = "HMAR stage 1, d16-256, batch 32 on NVIDIA H200 has 250000 at aaaabbbbcc and 300000 at 0123456789 tokens/s"
    assert told in page and "batch 48 on" not in page
    table = pd.read_csv(io.StringIO(scaling.csv(sources)))
    assert list(table.commit.value_counts().sort_index()) == [5, 1]


def test_processes_on_a_cpu_have_no_target_and_no_mfu(with_scaling):
    file = scaling_file([(1, "ddp", 8, 3e3, 1.0), (2, "ddp", 16, 5e3, 1.7)])
    file["environment"] |= {"gpu": "cpu", "triton": None, "cuda": None, "driver": None}
    for row in file["results"]:
        row["mfu"] = None
    (with_scaling / "scaling_test.json").write_text(json.dumps(file))
    page = scaling.markdown(scaling.load(with_scaling))
    assert "| HMAR stage 1, d16-256 | 8 | 2 | ddp | 5000 | 7.35 | 1.700 | - | 12.5 |" in page


def test_scaling_of_another_version_is_refused(with_scaling):
    (with_scaling / "scaling_test.json").write_text(json.dumps(scaling_file(SCALING, version=2)))
    with pytest.raises(ValueError, match="is of version 2; this script reads version 1"):
        scaling.load(with_scaling)
