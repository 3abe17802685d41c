"""`hmar sample`: schedules, ramps and seeds as they are typed, and what they do to the files."""

import contextlib
import dataclasses
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hmar.checkpoint import save_pretrained
from hmar.cli import main
from hmar.config import PRESETS
from hmar.model import HMAR
from hmar.sample import open_image_set, parse_ramp, parse_schedule, to_pixels
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


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def assert_same_up_to_rounding(actual, expected):
    """PNG files by name, of which another batch size may round some pixels differently."""
    assert actual.keys() == expected.keys()
    for name, png in actual.items():
        assert np.abs(pixels(png) - pixels(expected[name])).max() <= 1, name


def test_the_same_seed_is_the_same_image_in_every_folder(folder, tmp_path):
    code, err, first = sample(folder, tmp_path / "a", "--seeds", "5,9-11", "--classes", "0,2", "--batch-size", "3")
    assert (code, err) == (0, "")
    assert set(first) == {f"seed-{seed}-class-{target}.png" for seed in (5, 9, 10, 11) for target in (0, 2)}
    assert len(set(first.values())) == 8
    _, _, second = sample(folder, tmp_path / "b", "--seeds", "11,5", "--classes", "2", "--batch-size", "1")
    assert_same_up_to_rounding(second, {name: first[name] for name in ("seed-11-class-2.png", "seed-5-class-2.png")})
    _, _, third = sample(folder, tmp_path / "c", "--seed", "5", "--classes", "0")
    assert_same_up_to_rounding(third, {"000000-class-0.png": first["seed-5-class-0.png"]})
    _, _, more = sample(folder, tmp_path / "b", "--seeds", "5,11,9", "--classes", "2")
    assert {name: more[name] for name in second} == second
    assert_same_up_to_rounding(more, {name: first[name] for name in more})
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["seed"] == "in the names of the files"


@pytest.mark.parametrize("seeds", [None, list(range(3, 10))], ids=["numbers", "seeds"])
def test_one_batch_size_is_one_image_to_the_bit(folder, tmp_path, seeds):
    """Whatever was drawn before, in whichever process and order, and which images of its batch are there already."""
    opened = open_image_set(folder / "hmar", tmp_path / "one", classes=[0, 3], seeds=seeds, device="cpu")
    batches = [range(first, first + 4) for first in range(0, 12, 4)]
    expected = {batch: opened.generate(batch) for batch in batches}
    again = open_image_set(folder / "hmar", tmp_path / "one", classes=[0, 3], seeds=seeds, device="cpu")
    for batch in reversed(batches):
        assert torch.equal(again.generate(batch), expected[batch])
    opened.claim(overwrite=False)
    paths = opened.draw(14, batch_size=4)
    content = [path.read_bytes() for path in paths]
    assert all(
        np.array_equal(pixels(content[number]), to_pixels(expected[batch])[number - batch[0]])
        for batch in batches
        for number in batch
    )
    shared = dataclasses.replace(opened, output=tmp_path / "shared")
    shared.claim(overwrite=False)
    for rank in (2, 0, 1):
        shared.draw(14, batch_size=4, rank=rank, world_size=3)
    assert [path.read_bytes() for path in map(shared.path, range(14))] == content
    for number in (0, 5, 6, 13):
        paths[number].unlink()
    opened.draw(14, batch_size=4)
    assert [path.read_bytes() for path in paths] == content


def test_other_batch_sizes_are_the_same_images_up_to_rounding(folder, tmp_path):
    opened = open_image_set(folder / "hmar", tmp_path, classes=[0, 1, 2, 3], device="cpu")
    expected = opened.generate(range(24))
    for size in (1, 2, 3, 5, 8, 16):
        parts = [opened.generate(range(first, min(first + size, 24))) for first in range(0, 24, size)]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-4)
        difference = np.abs(to_pixels(torch.cat(parts)).astype(int) - to_pixels(expected))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


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
