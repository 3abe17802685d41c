"""The demo: what it measures, what it writes, and that an interrupted one goes on."""

import csv
import json
import signal
from datetime import date, timedelta

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hmar import demo
from hmar.data import Digits
from hmar.generate import GenerationOutput
from hmar.progress import read_metrics
from hmar.pyramid import Pyramid
from hmar.train import Interrupted, Trainer

PICTURES = (
    "reconstruction",
    "generated_hmar",
    "generated_var",
    "masked_steps",
    "edits",
    "loss_curves",
    "masks",
    "pyramid",
)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def classifier():
    return demo.digit_classifier(32)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A whole demo of a few steps: every stage with the real engine, every picture, the table and the summary."""
    folder = tmp_path_factory.mktemp("demo")
    summary = demo.run(folder / "report", run_folder=folder / "runs", device="cpu", quick=True, progress=False)
    return folder, summary


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_quick_demo_writes_everything(quick):
    folder, _ = quick
    written = sorted(path.name for path in (folder / "report").iterdir())
    assert written == sorted([*(f"{name}.png" for name in PICTURES), "summary.json", "table.csv", "table.md"])


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_not_blank(quick, name):
    with Image.open(quick[0] / "report" / f"{name}.png") as image:
        image.load()
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 300
    inked = (pixels < 250).any(axis=2)
    assert inked.mean() > 0.01 and pixels[inked].std() > 10
    assert not inked[0].any() and not inked[:, 0].any(), "something is cut off at the edge"


def test_summary_is_complete(quick):
    folder, summary = quick
    assert json.loads((folder / "report" / "summary.json").read_text()) == summary
    for name in ("hmar_class_accuracy", "var_class_accuracy", "reconstruction_accuracy"):
        assert 0 <= summary[name] <= 1
    assert summary["classifier_accuracy_on_real_digits"] > 0.97
    assert summary["held_out_digits"] == 355 and summary["generated_digits"] == 20
    assert summary["seconds"] == pytest.approx(sum(summary["seconds_of"].values()), abs=0.5)
    assert set(summary["seconds_of"]) == {*demo.STAGES, "measuring and drawing"}
    machine = summary["machine"]
    assert machine["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert abs(date.fromisoformat(machine["date"]) - date.today()) <= timedelta(days=1)
    assert machine["commit"] is None or len(machine["commit"]) == 40
    by_class = summary["accuracy_by_class"]["hmar"]
    assert len(by_class) == 10 and np.mean(by_class) == pytest.approx(summary["hmar_class_accuracy"], abs=1e-3)


def test_table_compares_hmar_and_var(quick):
    folder, summary = quick
    with open(folder / "report" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    real, decoded, *rows = rows
    assert (real["digits"], decoded["digits"]) == ("real, held out", "real, through the tokenizer")
    assert float(real["diversity"]) == float(real["novelty"]) == 1 and real["passes"] == ""
    assert float(decoded["class accuracy"]) == summary["reconstruction_accuracy"]
    by_name = {row["digits"]: row for row in rows}
    assert len(rows) == len(by_name) == len(summary["masked_steps"]) + 1 and rows[-1]["digits"] == "VAR"
    for row, of_schedule in zip(rows[:-1], summary["masked_steps"], strict=True):
        assert int(row["passes"]) == of_schedule["passes"]
        assert float(row["class accuracy"]) == of_schedule["class_accuracy"]
    assert int(by_name["HMAR without masked passes"]["passes"]) == int(by_name["VAR"]["passes"]) == 4
    assert float(by_name["HMAR, default schedule"]["class accuracy"]) == summary["hmar_class_accuracy"]
    assert float(by_name["VAR"]["class accuracy"]) == summary["var_class_accuracy"]
    assert all(float(row["seconds per image"]) > 0 and int(row["parameters"]) > 1e5 for row in rows)
    text = (folder / "report" / "table.md").read_text().splitlines()
    last = len(rows) + 3  # below the head, its rule and the real digits
    assert len({line.count("|") for line in text[: last + 1]}) == 1 and "VAR" in text[last]


def test_var_gets_the_steps_of_both_hmar_stages(quick):
    folder, summary = quick
    last = {stage: read_metrics(folder / "runs" / stage / "metrics.jsonl")[-1]["step"] for stage in demo.STAGES}
    assert last == summary["training_steps"]
    assert last["var"] == last["next-scale"] + last["masked"]
    assert demo.FULL.steps["var"] == demo.FULL.next_scale_steps + demo.FULL.masked_steps
    configs = [demo.stage_config(demo.FULL, stage, folder) for stage in demo.STAGES[1:]]
    assert len({(c.batch_size, c.optimizer, c.model, c.data) for c in configs}) == 1


def test_masked_steps_go_from_none_to_one_token_a_pass(quick):
    steps = quick[1]["masked_steps"]
    passes = [row["passes"] for row in steps]
    assert passes == sorted(passes) and passes[0] == 4 and passes[-1] == 30
    assert all([sum(scale) for scale in row["codes_per_pass"]] == [1, 4, 9, 16] for row in steps)


def test_edits_are_measured_for_every_hole(quick):
    edits = quick[1]["edits"]
    assert [edit["painted"] for edit in edits] == list(demo.holes(32))
    for edit in edits:
        assert edit["digits"] == 20
        for share in ("without_class_named_as_before", "as_itself_named_as_asked", "as_another_class_named_as_asked"):
            assert 0 <= edit[share] <= 1
        assert edit["mean_squared_error_outside"] > 0
        assert edit["mean_squared_error_outside_of_the_tokenizer_alone"] > 0


def test_holes_cover_what_they_are_called():
    found = {name: hole.float().mean().item() for name, hole in demo.holes(32).items()}
    assert found == {"lower half": 0.5, "right half": 0.5, "the middle": 0.25, "all around the middle": 0.75}
    assert demo.holes(32)["lower half"][16:].all() and demo.holes(32)["right half"][:, 16:].all()
    assert not (demo.holes(32)["the middle"] & demo.holes(32)["all around the middle"]).any()


# --- measuring --------------------------------------------------------------------------------------------------------


def test_classifier_knows_held_out_digits_only_by_their_shape(classifier):
    images, classes = demo.all_images(Digits(32, "test"))
    assert (classifier(images) == classes).float().mean() > 0.97
    upside_down = images.flip(2)
    assert (classifier(upside_down) == classes).float().mean() < 0.7
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (classifier(noise) == classes).float().mean() < 0.3


def test_measure_counts_the_digits_that_were_asked_for(classifier):
    images, classes = demo.all_images(Digits(32, "test"))
    known = images[classifier(images) == classes]
    labels = classes[classifier(images) == classes][:40]
    asked = labels.clone()
    asked[:10] = (asked[:10] + 1) % 10  # ten of forty come out as another digit

    def generate(class_B):
        return GenerationOutput(known[: len(class_B)], None, None)

    measured = demo.measure("fixed", generate, asked, classifier, passes=4)
    assert measured.accuracy == 0.75 and measured.named_N.tolist() == labels.tolist()
    assert measured.seconds_per_image > 0


def test_diversity_is_the_mean_distance_within_a_class():
    images = torch.full((5, 3, 8, 8), -1.0)
    images[1] = 1.0  # distance 8 to the others: 64 features that differ by 1
    classes = torch.tensor([0, 0, 1, 1, 1])
    assert demo.diversity(images, classes) == pytest.approx(8 / 4)  # one pair of class 0, three pairs of class 1
    assert demo.diversity(images[2:], classes[2:]) == 0


def test_novelty_is_the_distance_to_the_nearest_training_digit():
    training = torch.full((2, 3, 8, 8), -1.0)
    training[1] = 1.0
    images = torch.full((2, 3, 8, 8), 0.5)  # 0.25 from the white one in each of 64 features
    assert demo.novelty(images, training) == pytest.approx(8 * 0.25)
    assert demo.novelty(training, training) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("sides", [(1, 2, 3, 4), (1, 2, 4), Pyramid.for_resolution(256).sides])
def test_schedules_of_any_pyramid(sides):
    pyramid = Pyramid(sides)
    found = demo.schedules(pyramid)
    assert next(iter(found)) == "no masked passes" and list(found)[-1] == "one token a pass"
    assert len(found["one token a pass"][-1]) == pyramid.sizes[-1]
    assert all(tuple(map(sum, schedule)) == pyramid.sizes for schedule in found.values())


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """Stands in for the engine: writes a stage's folder, notes the call, and stops like SIGINT where it is told to."""
    calls = []

    def train(config, *, resume, progress):
        calls.append((config.stage, resume))
        (demo.Path(config.output_dir)).mkdir(parents=True, exist_ok=True)
        if config.stage == train.stop_at:
            raise Interrupted(2, 1, demo.Path(config.output_dir))

    train.stop_at = "masked"
    monkeypatch.setattr(demo, "train", train)
    return train, calls


def start(folder, **arguments):
    return demo.run(folder / "report", run_folder=folder, device="cpu", quick=True, progress=False, **arguments)


def test_interrupted_demo_goes_on_where_it_stopped(recorded, tmp_path):
    train, calls = recorded
    with pytest.raises(Interrupted):
        start(tmp_path)
    assert calls == [("tokenizer", False), ("next-scale", False), ("masked", False)]
    spent = json.loads((tmp_path / "demo.json").read_text())["seconds_of"]
    calls.clear()
    train.stop_at = "var"
    with pytest.raises(Interrupted):
        start(tmp_path)
    assert calls == [("tokenizer", True), ("next-scale", True), ("masked", True), ("var", False)]
    now = json.loads((tmp_path / "demo.json").read_text())["seconds_of"]
    assert all(now[stage] > spent[stage] for stage in spent), "the time of both parts counts"


def test_ctrl_c_in_the_last_step_of_a_stage_ends_the_demo(tmp_path, monkeypatch):
    advance, calls = Trainer._advance, []

    def advance_and_signal(self, *arguments):
        advance(self, *arguments)
        calls.append(self.config.stage)
        if self.step == demo.QUICK.tokenizer_steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_advance", advance_and_signal)
    with pytest.raises(Interrupted):
        start(tmp_path)
    assert set(calls) == {"tokenizer"}
    assert (tmp_path / "tokenizer" / "weights").exists() and not (tmp_path / "next-scale").exists()


def test_demo_can_start_anew(recorded, tmp_path):
    _, calls = recorded
    with pytest.raises(Interrupted):
        start(tmp_path)
    calls.clear()
    with pytest.raises(Interrupted):
        start(tmp_path, resume=False)
    assert [resume for _, resume in calls] == [False, False, False]


def ledger(folder, resume, **plan):
    opened = demo.Ledger(folder, {"steps": 1, **plan})
    opened.open(resume, QUIET)
    return opened


def test_finished_demo_starts_anew_unless_asked_to_keep(tmp_path):
    def trained():
        return (tmp_path / "var").exists()

    ledger(tmp_path, None).finish()
    (tmp_path / "var").mkdir()
    ledger(tmp_path, True).finish()
    assert trained()
    ledger(tmp_path, None)
    assert not trained()


def test_demo_with_other_settings_is_not_continued(tmp_path):
    ledger(tmp_path, None)
    (tmp_path / "var").mkdir()
    with pytest.raises(ValueError, match="other settings"):
        ledger(tmp_path, True, steps=2)
    ledger(tmp_path, None, steps=2)
    assert not (tmp_path / "var").exists()


def test_demo_does_not_touch_runs_that_are_not_its_own(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match=r"holds tokenizer but no demo\.json"):
        ledger(tmp_path, False)
    assert (tmp_path / "tokenizer").exists()
