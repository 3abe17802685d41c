"""`hmar sample`: schedules, ramps and seeds as they are typed, and what they do to the files."""

import contextlib
import io
import json
import sys

import pytest
import torch

from hmar.checkpoint import save_pretrained
from hmar.cli import main
from hmar.config import PRESETS
from hmar.model import HMAR
from hmar.sample import parse_ramp, parse_schedule
from hmar.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights of HMAR and its tokenizer."""
    folder = tmp_path_factory.mktemp("sample")
    tokenizer_config, config = PRESETS["tiny"]
    torch.manual_seed(0)
    tokenizer, model = Tokenizer(tokenizer_config, config.pyramid), HMAR(config)
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    save_pretrained(folder / "tokenizer", tokenizer)
    save_pretrained(folder / "hmar", model, tokenizer_weights=str(folder / "tokenizer"))
    return folder


def sample(folder, output, *arguments):
    """Exit code and standard error of `hmar sample`, and the images it wrote."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    common = ("--model", folder / "hmar", "--output", output, "--quiet", "--device", "cpu")
    sys.argv = ["hmar", "sample", *map(str, (*common, *arguments))]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = argv
    return ended.value.code or 0, err.getvalue(), {p.name: p.read_bytes() for p in output.glob("*-class-*.png")}


def test_schedules_and_ramps_as_typed():
    assert [parse_schedule(text) for text in ("none", "one-token", "cosine-8", "4")] == [
        "none",
        "one-token",
        "cosine-8",
        "even-4",
    ]
    assert parse_schedule("{2: [1, 3]}") == {2: [1, 3]} and parse_schedule("[[1], [4]]") == [[1], [4]]
    assert parse_ramp("cosine") == "cosine" and parse_ramp("[0, 0.5, 1]") == [0, 0.5, 1]
    for text in ("{1: 2}", "true", "[1, 2", "[1, 2]", "2.5", ""):
        with pytest.raises(ValueError, match="is not a schedule"):
            parse_schedule(text)
    for text in ("3", "[a, b]", "{1: 2}", "[1, 2"):
        with pytest.raises(ValueError, match="is not a guidance ramp"):
            parse_ramp(text)


def test_the_same_seed_is_the_same_image_in_every_folder(folder, tmp_path):
    code, err, first = sample(folder, tmp_path / "a", "--seeds", "5,9-11", "--classes", "0,2", "--batch-size", "3")
    assert (code, err) == (0, "")
    assert set(first) == {f"seed-{seed}-class-{target}.png" for seed in (5, 9, 10, 11) for target in (0, 2)}
    _, _, second = sample(folder, tmp_path / "b", "--seeds", "11,5", "--classes", "2", "--batch-size", "1")
    assert second == {name: first[name] for name in ("seed-11-class-2.png", "seed-5-class-2.png")}
    _, _, third = sample(folder, tmp_path / "c", "--seed", "5", "--classes", "0")
    assert third["000000-class-0.png"] == first["seed-5-class-0.png"]
    _, _, more = sample(folder, tmp_path / "b", "--seeds", "5,11,9", "--classes", "2")
    assert more == second | {"seed-9-class-2.png": first["seed-9-class-2.png"]}
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["seed"] == "in the names of the files"


def test_a_class_named_twice_gives_two_images_where_they_differ(folder, tmp_path):
    """Numbered images draw from numbers of their own; with seeds the two would be one image, and one file."""
    code, err, images = sample(folder, tmp_path / "a", "--classes", "2,2", "--count", "2")
    assert (code, err) == (0, "")
    assert set(images) == {f"{number:06d}-class-2.png" for number in range(4)}
    assert len(set(images.values())) == 4


def test_ramps_and_schedules_change_the_images_and_are_noted(folder, tmp_path):
    written = {}
    for ramp in ("linear", "constant", "[0, 0.5, 1]"):
        for schedule in ("none", "one-token"):
            output = tmp_path / f"{ramp}-{schedule}"
            code, err, images = sample(
                folder, output, "--cfg", 4, "--classes", "0-3", "--cfg-ramp", ramp, "--schedule", schedule
            )
            assert (code, err) == (0, "")
            settings = json.loads((output / "settings.json").read_text())
            assert settings["cfg_ramp"] == ([1, 1, 1] if ramp == "constant" else [0, 0.5, 1])
            assert len(settings["schedule"][2]) == (1 if schedule == "none" else 16)
            written[ramp, schedule] = images
    for schedule in ("none", "one-token"):
        assert written["linear", schedule] == written["[0, 0.5, 1]", schedule] != written["constant", schedule]
    assert written["linear", "none"] != written["linear", "one-token"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--seeds", "1,1"), "seeds are [1, 1]: expected different"),
        (("--seeds", "x"), '--seeds is "x": expected numbers'),
        (
            ("--seeds", "5", "--classes", "2,3,2"),
            "class 2 is named twice, and with seeds both would be seed-S-class-2.png",
        ),
        (("--cfg-ramp", "steep"), "known are linear, constant, cosine"),
        (("--cfg-ramp", "[1, 2]"), "2 factors, but the pyramid (1, 2, 4) has 3"),
        (("--schedule", "even-0"), "known are default, none, one-token, even-N and cosine-N"),
        (("--temperature", "0"), "temperature is 0"),
    ],
)
def test_mistakes_are_one_sentence(folder, tmp_path, arguments, message):
    code, err, images = sample(folder, tmp_path / "none", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and not images
    assert not (tmp_path / "none").exists()
