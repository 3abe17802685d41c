"""The generation benchmark on the CPU, and its tables: pure functions of the raw JSON."""

import json

import pandas as pd
import pytest
import torch

from bench import generation, sampling
from bench.check import CheckFailed
from bench.generation import Cell, Rows, check, choose_cells, empty_row
from hmar.config import PRESETS
from hmar.engine import DECODERS
from reports import generation as report
from reports import sampling as sampling_report

COLUMNS = "gpu,commit,model,engine,schedule,resolution,depth,batch,ms,images_per_s,peak_gb"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A whole run on the tiny model."""
    path = tmp_path_factory.mktemp("bench") / "deep" / "generation.json"
    arguments = ["--device", "cpu", "--seconds", "0", "--commit", "abc", "--batches", "1,2", "--output", str(path)]
    assert generation.main(arguments) == 0
    return path


def test_a_run_measures_every_engine(written):
    content = json.loads(written.read_text())
    assert (content["kind"], content["version"], content["complete"]) == ("generation", 1, True)
    assert list(written.parent.iterdir()) == [written]
    rows = content["results"]
    series = [
        ("hmar", "optimised", "default"),
        ("hmar", "eager", "default"),
        ("hmar", "eager", "none"),
        ("hmar", "optimised", "none"),
        ("var", "eager", "none"),
        ("var", "optimised", "none"),
    ]
    found = [(r["model"], r["engine"], r["schedule"], r["batch"]) for r in rows]
    assert found == [(*names, batch) for names in series for batch in (1, 2)]
    for row in rows:
        assert row["status"] == "ok" and row["commit"] == "abc" and row["rounds"] >= 5
        assert 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"], rel=1e-4)
        if row["engine"] == "optimised":
            assert row["same_codes"] >= 0.9 and set(row["parts_ms"]) == set(report.PARTS)
            assert len(row["scales_ms"]) == 4 and min(row["scales_ms"]) > 0
            assert len(row["sides"]) == 3 and 0 < row["transformer_tflop"] < 1e-3
            stages = ["post_quant_conv", "middle", *decoder_names(len(PRESETS["tiny"][0].multipliers)), "out"]
            assert list(row["decoder_ms"]) == stages and min(row["decoder_ms"].values()) > 0


def test_a_brief_run_has_times_and_memory_alone(tmp_path):
    path = tmp_path / "brief.json"
    arguments = ["--device", "cpu", "--seconds", "0", "--batches", "1", "--engines", "optimised", "--brief"]
    assert generation.main([*arguments, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert len(rows) == 3 and all(row["status"] == "ok" and row["ms"] > 0 and row["sides"] for row in rows)
    assert all(row[name] is None for row in rows for name in ("parts_ms", "scales_ms", "decoder_ms"))


def test_long_batches_have_fewer_rounds(monkeypatch):
    monkeypatch.setattr(generation, "single", lambda call, device: call())
    rounds = {seconds: len(generation.seconds(lambda s=seconds: s, None, 2.0)) for seconds in (0.01, 1.0, 6.0, 40.0)}
    assert rounds == {0.01: generation.MAX_ROUNDS, 1.0: generation.MIN_ROUNDS, 6.0: 3, 40.0: 1}


def decoder_names(levels):
    return [f"{name} {i}" for i in range(1, levels + 1) for name in ("level", "upsample")][:-1]


@pytest.mark.parametrize("decoder", DECODERS)
def test_stages_of_a_decoder_make_its_images(decoder):
    """What is timed stage by stage is what decoding computes."""
    cell = Cell("hmar", "optimised", "default", None, 2, 2)
    subject = generation.Subject(cell, torch.device("cpu"), {"decoder": decoder})
    subject.optimise()
    x, factor = generation.first_latents(subject.engine, 2)
    with torch.no_grad():
        expected = subject.engine.decode(x)
        for _, stage in generation.decoder_stages(subject.engine):
            x = stage(x)
    assert factor == 1 and torch.equal(x.clamp(-1, 1), expected)


def test_a_variant_is_recorded_and_has_a_file_of_its_own(tmp_path, monkeypatch, capsys):
    given = []

    def run_cell(subjects, cell, device, budget, commit, variant, brief):
        given.append(variant)
        return empty_row(cell, "out of memory", "too large", commit)

    monkeypatch.setattr(generation, "run_cell", run_cell)
    path = tmp_path / "variant.json"
    arguments = ["--device", "cpu", "--models", "var", "--engines", "optimised", "--output", str(path)]
    variant = ["--decoder", "transposed", "--attention", "separate", "--compile-decoder", "inductor"]
    variant += ["--convolutions", "hopper", "--no-cudnn-benchmark", "--no-overlap"]
    assert generation.main([*arguments, *variant]) == 0
    expected = {"decoder": "transposed", "attention": "separate", "compile_decoder": "inductor"}
    expected |= {"convolutions": "hopper", "cudnn_benchmark": False, "overlap": False}
    assert given == [expected] and json.loads(path.read_text())["method"]["variant"] == expected
    with pytest.raises(SystemExit):
        generation.main([*arguments, "--continue"])
    assert "a file of its own" in capsys.readouterr().err


def test_a_run_goes_on_where_it_ended(written, tmp_path, monkeypatch, capsys):
    """After its minutes, and after a crash, which is recorded and not tried again."""
    path = tmp_path / "part.json"
    arguments = ["--device", "cpu", "--seconds", "0", "--commit", "abc", "--batches", "1", "--output", str(path)]
    assert generation.main([*arguments, "--minutes", "0"]) == 0
    assert "--continue goes on" in capsys.readouterr().out and not path.exists()
    content = json.loads(written.read_text())
    cells = [Cell("hmar", "eager", schedule, None, 2, 1) for schedule in ("default", "none")]
    kept = [row for row in content["results"] if generation.cell_of(row) == cells[0]]
    rows = Rows(path.with_name("part.json.partial"), {k: content[k] for k in ("environment", "method")})
    rows.add(cells[0], kept[0])
    rows.write(complete=False, running=cells[1])
    measured = []

    def run_cell(subjects, cell, *_):
        measured.append(cell)
        return empty_row(cell, "ok", None, "abc") | {"ms": 1.0, "images_per_s": 1.0}

    monkeypatch.setattr(generation, "run_cell", run_cell)
    assert generation.main([*arguments, "--continue"]) == 1
    results = {generation.cell_of(row): row for row in json.loads(path.read_text())["results"]}
    assert results[cells[0]] == kept[0] and results[cells[1]]["status"] == "crashed"
    assert len(results) == 6 and len(measured) == 4 and not set(cells) & set(measured)


def test_results_of_other_code_are_not_continued(written, capsys):
    arguments = ["--device", "cpu", "--commit", "other", "--output", str(written), "--continue"]
    with pytest.raises(SystemExit):
        generation.main(arguments)
    assert "measured with commit abc, here it is other" in capsys.readouterr().err


def test_larger_batches_are_left_out_after_one_that_does_not_fit(tmp_path, monkeypatch):
    def run_cell(subjects, cell, *_):
        status = "out of memory" if cell.batch >= 2 else "ok"
        return empty_row(cell, status, None, "abc") | {"ms": 1.0, "images_per_s": 1.0}

    monkeypatch.setattr(generation, "run_cell", run_cell)
    path = tmp_path / "full.json"
    generation.main(["--device", "cpu", "--batches", "1,2,4", "--models", "var", "--output", str(path)])
    found = [(row["batch"], row["status"], row["reason"]) for row in json.loads(path.read_text())["results"]]
    assert found == 2 * [
        (1, "ok", None),
        (2, "out of memory", None),
        (4, "out of memory", "a smaller batch did not fit"),
    ]


def test_wrong_images_are_not_timed():
    cell = Cell("hmar", "optimised", "default", None, 2, 2)
    subject = generation.Subject(cell, torch.device("cpu"))
    expected = subject.expected(cell)
    subject.optimise()
    assert check(subject, cell, expected) >= 0.9
    with pytest.raises(generation.CheckFailed, match="of the codes are those of the eager engine"):
        check(subject, cell, expected._replace(codes_BL=expected.codes_BL + 1))
    generate = subject.generate
    subject.generate = lambda *a: generate(*a)._replace(f_hat_BEhw=expected.f_hat_BEhw + 1)
    with pytest.raises(generation.CheckFailed, match="f_hat"):
        check(subject, cell, expected)
    subject.generate = lambda *a: generate(*a)._replace(images_BCHW=expected.images_BCHW * torch.nan)
    with pytest.raises(generation.CheckFailed, match="not finite"):
        check(subject, cell, expected)


def test_cells_of_a_gpu():
    class Options:
        device, models, engines, schedules = "cuda", None, None, None
        resolutions = depths = batches = None
        full = False

    cells = choose_cells(Options)
    assert len(cells) == len(set(cells)) == 4 * 2 * (4 + 2)
    assert (
        Cell("hmar", "optimised", "default", 1024, 24, 8) in cells
        and Cell("var", "eager", "none", 256, 30, 16) in cells
    )
    Options.resolutions, Options.depths, Options.full = (512,), (16,), True
    assert {(c.resolution, c.depth) for c in choose_cells(Options)} == {(512, 16)}
    assert {c.batch for c in choose_cells(Options)} == set(generation.FULL_BATCHES)
    assert Cell("hmar", "eager", "default", 256, 16, 1).sampling().masked_cfg_factor == 1e-6
    assert Cell("hmar", "optimised", "default", 256, 30, 1).sampling().top_k == 650


# --- tables -----------------------------------------------------------------------------------------------------------


def table_lines(markdown):
    return [[part.strip() for part in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


@pytest.fixture
def data(tmp_path):
    rows = []
    for batch in (16, 1):
        for factor, key in enumerate(report.LOOKS, start=1):
            cell = Cell(*key, 256, 16, batch)
            row = empty_row(cell, "ok", None, "0123456789") | {"ms": 20.0 * factor, "p10_ms": 19.0, "p90_ms": 21.0}
            row |= {"images_per_s": 1e3 * batch / row["ms"], "peak_gb": 2.5}
            if cell.engine == "optimised":
                row["graph_gb"] = 3.25
                row |= {"parts_ms": dict.fromkeys(report.PARTS, 1.25), "transformer_tflop": 0.5 * factor}
                row |= {"sides": [1, 2, 4], "scales_ms": [1.0, 2.0, 3.0, 0.5]}
            rows.append(row)
    rows[5] |= {"status": "out of memory", "reason": "no room", "ms": None, "images_per_s": None, "peak_gb": None}
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "commit": "0123456789", "date": "2031-02-03T04:05:06+00:00"}
    facts |= {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "driver": "580.1"}
    content = {"kind": "generation", "version": 1, "environment": facts, "method": {}, "results": rows}
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "generation_test.json").write_text(json.dumps(content))
    return folder


def test_tables_and_plots(data, tmp_path):
    paths = report.build(data, tmp_path, tmp_path)
    plots = ["generation_test_batch.png", "generation_test_scales.png"]
    assert [path.name for path in paths] == ["generation.csv", "generation.md", *plots]
    text = paths[0].read_text()
    assert text.splitlines()[0] == COLUMNS
    table = pd.read_csv(paths[0])
    assert len(table) == 12 and list(table.batch) == [1] * 6 + [16] * 6
    lost = table[(table.batch == 16) & (table.model == "var") & (table.engine == "eager")]
    assert len(lost) == 1 and lost[["ms", "images_per_s", "peak_gb"]].isna().all(axis=None)
    assert table.ms.dtype == "float64" and (table.gpu == "NVIDIA H100 80GB HBM3").all()
    markdown = paths[1].read_text()
    lines = table_lines(markdown)
    best = [line for line in lines if line[0] == "HMAR, optimised"]
    # ms, spread, images/s, memory and that of graphs, target, its ratio, official VAR / ours (no such file here), VAR
    # eager / ours, VAR optimised / ours, four parts
    numbers = ["20.0", "19.0 to 21.0", "50.0", "2.50", "3.25", "12.0", "0.60", "-", "6.00", "5.00", *["1.25"] * 4]
    assert best[0][1:] == numbers
    assert best[1][6:11] == ["45.0", "2.25", "-", "-", "5.00"]
    assert [line[5] for line in lines if line[0] == "HMAR, eager"] == ["-", "-"]
    assert "official VAR, measured" not in markdown and "Measured elsewhere" not in markdown
    assert "VAR, eager: out of memory. no room" in markdown and "nan" not in markdown.lower()
    counts = [line for line in lines if line[0].startswith("256 px, d16, batch 1")]
    # HMAR's and VAR's operations, their ratio, that of the transformers' times and of the images'
    assert counts[0] == ["256 px, d16, batch 1", "default", "0.500", "2.50", "5.00", "1.00", "5.00"]
    assert [line[1] for line in counts] == ["default", "one pass a scale"] * 2
    assert all(path.stat().st_size > 10_000 for path in paths[2:])
    scales = report.draw_scales(report.load(data)[0])
    bars = [patch.get_height() for patch in scales.axes[0].patches]
    assert bars == [1.0, 2.0, 3.0, 0.5] * 3
    assert [label.get_text() for label in scales.axes[0].get_xticklabels()] == ["1", "2", "4", "decode"]


@pytest.fixture
def peers(data):
    """Times of the published code beside the data, in an order that is not that of the tables; one size is not in the
    data."""
    path = data / report.PEERS
    rows = [
        ("hmar_masked_tf32", 1, 60.0, 4.5),
        ("var_fp16_autocast", 1, 90.0, 3.5),
        ("var_fp16_autocast", 8, 99.0, 9.0),
    ]
    lines = [f"generate_with_decode,official_{name},256,{batch},16,{ms},1,{gb}" for name, batch, ms, gb in rows]
    path.write_text("\n".join(["work,impl,resolution,batch,depth,ms,images_per_s,peak_gb", *lines]))
    return path


def test_published_code_measured_elsewhere_stands_in_the_tables(data, peers, tmp_path):
    report.build(data, tmp_path, tmp_path)
    markdown = (tmp_path / "generation.md").read_text()
    lines = table_lines(markdown)
    assert f"[{report.PEERS}](../data/{report.PEERS})" in markdown
    at = lines[0].index("official VAR / row")
    official = [line for line in lines if line[0].startswith("official")]
    # 90 and 60 ms of one image; nothing is known of sixteen, and eight are not in the data
    numbers = {"ms": "90.0", "images/s": "11.1", "peak GB": "3.50", "official VAR / row": "1.00"}
    assert official[0][0] == "official VAR, measured elsewhere"
    assert official[0][1:] == [numbers.get(name, "-") for name in lines[0][1:]]
    assert official[1][0] == "official HMAR, measured elsewhere" and official[1][1] == "60.0"
    assert official[1][at] == "1.50" and len(official) == 2
    assert [line[at] for line in lines if line[0] == "HMAR, optimised"] == ["4.50", "-"]
    assert [line[at] for line in lines if line[0] == "VAR, eager"] == ["0.75", "-"]
    assert "official" not in (tmp_path / "generation.csv").read_text() and "nan" not in markdown.lower()


def test_published_code_stands_beside_the_gpu_on_which_it_was_measured(data, peers, tmp_path):
    path = data / "generation_test.json"
    path.write_text(path.read_text().replace("NVIDIA H100 80GB HBM3", "NVIDIA Test 9000"))
    report.build(data, tmp_path, tmp_path)
    assert "elsewhere" not in (tmp_path / "generation.md").read_text()


def test_an_unknown_implementation_measured_elsewhere_is_refused(data, peers, tmp_path):
    peers.write_text(peers.read_text().replace("official_var_fp16_autocast", "official_var_fp8"))
    with pytest.raises(ValueError, match=r"_h100\.csv has official_var_fp8; this script knows official_var_fp16"):
        report.build(data, tmp_path, tmp_path)


def test_a_line_a_measurement_though_two_files_have_one_cell(data):
    (data / "generation_again.json").write_text((data / "generation_test.json").read_text())
    assert report.csv(report.load(data)).count("\n") == 1 + 2 * 12


def test_what_the_kernel_of_whole_blocks_gives_hmar_alone_is_told(data, tmp_path):
    """Sides 1, 2 and 4 have 2, 8 and 32 rows, which it takes; decoding is not a scale, 6 has 72 rows."""
    path = data / "generation_test.json"
    content = json.loads(path.read_text())
    for row in content["results"]:
        if row["engine"] == "optimised":
            var = row["model"] == "var"
            row |= {
                "sides": [1, 2, 4, 6],
                "scales_ms": [1.0, 2.0, 3.0, 5.0, 0.5] if var else [0.5, 1.0, 2.0, 2.0, 0.25],
            }
    path.write_text(json.dumps(content))
    report.build(data, tmp_path, tmp_path)
    markdown = (tmp_path / "generation.md").read_text()
    # one image: VAR 100 ms, HMAR without masked passes 40
    assert "does not get the kernel of whole blocks" in markdown
    assert "which that kernel takes, are 2.50 of 60.0 ms (d16, 256 px)." in markdown
    for row in content["results"]:
        row["scales_ms"] = None
    path.write_text(json.dumps(content))
    report.build(data, tmp_path, tmp_path)
    markdown = (tmp_path / "generation.md").read_text()
    assert "does not get the kernel of whole blocks" in markdown and "which that kernel takes" not in markdown


def test_files_without_counts_have_their_tables(data, tmp_path):
    """As they were written before operations were."""
    path = data / "generation_test.json"
    content = json.loads(path.read_text())
    for row in content["results"]:
        del row["transformer_tflop"], row["sides"]
    path.write_text(json.dumps(content))
    assert len(report.build(data, tmp_path, tmp_path)) == 3
    assert "Operations" not in (tmp_path / "generation.md").read_text()


def test_brief_files_have_their_tables(data, tmp_path):
    path = data / "generation_test.json"
    content = json.loads(path.read_text())
    for row in content["results"]:
        row["parts_ms"] = row["scales_ms"] = None
    path.write_text(json.dumps(content))
    assert len(report.build(data, tmp_path, tmp_path)) == 3
    markdown = (tmp_path / "generation.md").read_text()
    assert "Operations" not in markdown and markdown.count("256 px, d16, against the batch") == 1
    lines = table_lines(markdown)
    assert [line[0] for line in lines] == ["batch", "--:", "1", "16"]
    assert lines[0][1:5] == ["HMAR, optimised: ms", "images/s", "peak GB", "graphs GB"]
    assert lines[2][1:5] == ["20.0", "50.0", "2.50", "3.25"] and len(lines[2]) == 1 + 4 * len(report.LOOKS)
    assert lines[3][1:5] == ["20.0", "800", "2.50", "3.25"] and lines[3][-4:] == ["out of memory", "-", "-", "-"]


def test_plots_tell_what_did_not_fit(data):
    source = report.load(data)[0]
    source.environment["gpu_memory_bytes"] = 80 << 30
    source.rows.loc[11, "commit"] = "abcdef"
    speed, memory = report.draw(source).axes
    assert (speed.get_ylabel(), memory.get_ylabel()) == ("images / s", "peak memory allocated, GB")
    assert memory.figure.get_suptitle() == "Generation, NVIDIA H100 80GB HBM3, commit 0123456789, abcdef"
    crosses = [line for line in memory.lines if line.get_marker() == "x"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in crosses] == [([16], [80.0])]
    labels = [text.get_text() for text in memory.figure.legends[0].get_texts()]
    assert labels == [*(name for name, _, _ in report.LOOKS.values()), "memory of the GPU; a cross: did not fit"]


def test_without_data_there_are_no_tables(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    assert report.build(tmp_path, tmp_path, tmp_path) == []


def test_an_unknown_version_is_refused(data):
    path = data / "generation_test.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 2; this script reads version 1"):
        report.load(data)


# --- drawing codes ----------------------------------------------------------------------------------------------------


def test_sampling_benchmark_checks_and_times_every_implementation(tmp_path):
    path = tmp_path / "sampling.json"
    impls = ["--impl", "reference,sort"]
    assert (
        sampling.main(["--device", "cpu", "--seconds", "0.001", "--commit", "abc", "--output", str(path), *impls]) == 0
    )
    content = json.loads(path.read_text())
    assert (content["kind"], content["complete"], len(content["results"])) == ("sampling", True, 4)
    for row in content["results"]:
        assert row["status"] == "ok" and 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"], row
        assert row["check"]["outside"] == 0 and row["check"]["confidence_error"] < 1e-4


@pytest.fixture
def draws(tmp_path):
    rows = []
    for batch, top_k, top_p in ((16, 0, 0.0), (1, 0, 0.0), (1, 900, 0.96)):
        for factor, impl in enumerate(sampling_report.LOOKS, start=1):
            cell = {"resolution": 256, "batch": batch, "tokens": 100, "codes": 4096, "top_k": top_k, "top_p": top_p}
            times = {"ms": 0.02 * factor, "p10_ms": 0.01, "p90_ms": 0.2, "rounds": 9, "host_us": 50.0}
            facts = {"bytes": 6_000_000, "commit": "0123456789", "status": "ok", "reason": None, "extra_bytes": 1300}
            rows.append(cell | times | facts | {"impl": impl})
    rows[-1] |= {"status": "failed", "reason": "no sort today", "ms": None, "extra_bytes": None, "host_us": None}
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "commit": "0123456789", "date": "2031-02-03T04:05:06+00:00"}
    facts |= {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "driver": "580.1"}
    content = {"kind": "sampling", "version": 1, "environment": facts, "ceilings": {"copy_gb_per_s": 3000.0}}
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "draws.json").write_text(json.dumps(content | {"results": rows}))
    return folder


def test_draws_have_a_table_and_a_plot(draws, tmp_path):
    paths = sampling_report.build(draws, tmp_path, tmp_path)
    assert [path.name for path in paths] == ["sampling.csv", "sampling.md", "draws.png"]
    table = pd.read_csv(paths[0])
    assert list(table.columns[-5:]) == ["impl", "us", "gb_per_s", "extra_kb", "host_us"]
    assert list(table.batch) == [1] * 5 + [16] * 5 + [1] * 5 and table.us.isna().sum() == 1
    markdown = paths[1].read_text()
    lines = [
        [part.strip() for part in line.strip("|").split("|")] for line in markdown.splitlines() if line[:6] == "| 256 "
    ]
    times = ["20.0", "40.0", "60.0", "80.0", "100"]
    # ours, the reference, torch compiled and not; how far ahead, the time to read, memory of ours and of torch
    assert lines[0] == ["256 px", "1", "100", *times, "4.00", "2.00", "1.30", "1.30"]
    assert lines[2] == ["256 px", "1", "100", *times[:4], "-", "4.00", "2.00", "1.30", "1.30"]
    assert "### No truncation" in markdown and "### top-k 900, top-p 0.96" in markdown
    assert "* sort: failed. no sort today" in markdown and "nan" not in markdown.lower()
    figure = sampling_report.draw(sampling_report.load(draws)[0])
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["ours: Triton"] == [40.0, 40.0] and lines["logits read once"] == [2.0, 2.0]
    assert figure.axes[0].get_xlabel() == "rows of 4096 logits"


def test_draws_measured_on_a_cpu_have_a_table_too(tmp_path):
    (tmp_path / "data").mkdir()
    arguments = ["--device", "cpu", "--seconds", "0.001", "--impl", "reference", "--commit", "abc"]
    assert sampling.main([*arguments, "--output", str(tmp_path / "data" / "draws.json")]) == 0
    assert len(sampling_report.build(tmp_path / "data", tmp_path, tmp_path)) == 3
    assert "nan" not in (tmp_path / "sampling.md").read_text().lower()


def test_draws_of_another_version_are_refused(draws):
    path = draws / "draws.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 2; this script reads version 1"):
        sampling_report.load(draws)


@pytest.mark.parametrize("wrong", ["code", "confidence", "nan"])
def test_sampling_benchmark_finds_wrong_draws(wrong):
    cell = sampling.Cell(None, 2, 9, 64, 5, 0.0)
    inputs = sampling.Inputs(cell, torch.device("cpu"))
    codes, confidence = sampling.sorted_draw(*inputs.arguments)
    inputs.check(codes, confidence)
    if wrong == "code":
        logits = 2.5 * inputs.conditional.float() - 1.5 * inputs.unconditional.float()
        codes[1, 3] = logits[1, 3].argmin()
    else:
        confidence[1, 3] *= 1.01 if wrong == "confidence" else torch.nan
    with pytest.raises(CheckFailed):
        inputs.check(codes, confidence)
