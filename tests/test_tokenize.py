"""Tokenizing: the codes are those of the images, whatever happened on the way, and training on them is the same."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hmar import tokenize as module
from hmar.checkpoint import load_tokenizer, save_pretrained
from hmar.cli import app
from hmar.codes import INDEX, CodesFolder, find_damage, read_index_file, tokenizer_fingerprint
from hmar.config import PRESETS
from hmar.data import BrokenImageError, Digits, ImageFolder, Photographs
from hmar.recipe import apply_overrides, make_config
from hmar.stages import CodesStage
from hmar.tokenize import Interrupted, tokenize
from hmar.tokenizer import Encoder, Tokenizer
from hmar.train import Trainer, train
from run_files import assert_same_bits, weights

NUM_IMAGES = 23
SMALL = {"shard_size": 4, "batch_size": 3, "crops": 2, "device": "cpu", "progress": False}
NUM_SHARDS = 2 * 6


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = Tokenizer(PRESETS["tiny"][0], PRESETS["tiny"][1].pyramid)  # images of 16 x 16
    return save_pretrained(tmp_path_factory.mktemp("tokenizer"), tokenizer)


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        path = tmp_path / "images" / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def whole(tokenizer_folder, images, tmp_path):
    """What an uninterrupted run of one process writes."""
    tokenize(tokenizer_folder, images, tmp_path / "whole", **SMALL)
    return tmp_path / "whole"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def signal_after(monkeypatch, count, number=signal.SIGTERM):
    """The process signals itself once so many shards are written."""
    write_shard, written = module.write_shard, []

    def write_and_signal(*arguments):
        write_shard(*arguments)
        written.append(arguments)
        if len(written) == count:
            signal.raise_signal(number)

    monkeypatch.setattr(module, "write_shard", write_and_signal)


def hmar(*arguments, **options):
    command = [sys.executable, "-m", "hmar", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# --- what is written --------------------------------------------------------------------------------------------------


def assert_codes_of(codes, dataset, tokenizer, epochs):
    for epoch in range(epochs):
        for i in range(len(dataset)):
            image_3HW, target = dataset[(epoch, i)]
            codes_L, codes_target = codes[(epoch, i)]
            assert torch.equal(codes_L, tokenizer.encode(image_3HW[None])[0]) and codes_target == target


@torch.no_grad()
def test_codes_are_those_of_the_crops_that_training_would_cut(tokenizer_folder, images, tmp_path):
    index = tokenize(tokenizer_folder, images, tmp_path / "codes", seed=5, **SMALL)
    tokenizer = load_tokenizer(tokenizer_folder)
    codes = CodesFolder(tmp_path / "codes")
    assert codes.index == index and (index.num_images, index.crops, index.seed) == (NUM_IMAGES, 2, 5)
    assert codes.class_names == ("cats", "dogs") and index.tokenizer == tokenizer_fingerprint(tokenizer)
    assert_codes_of(codes, ImageFolder(images, 16, seed=5), tokenizer, epochs=2)
    first, second = ([codes[(epoch, i)][0].tolist() for i in range(NUM_IMAGES)] for epoch in range(2))
    assert first != second and codes[(2, 3)][0].tolist() == first[3]


@torch.no_grad()
def test_centre_crops_and_the_other_split(tokenizer_folder, images, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    options = SMALL | {"crops": None}
    index = tokenize(tokenizer_folder, images, tmp_path / "centre", center_crop=True, **options)
    assert index.crops == 1
    assert_codes_of(CodesFolder(tmp_path / "centre"), ImageFolder(images, 16, crop="center"), tokenizer, epochs=1)
    index = tokenize(tokenizer_folder, images, tmp_path / "test", split="test", **options)
    assert index.crops == 1 and index.split == "test"


@torch.no_grad()
def test_photographs(tokenizer_folder, tmp_path, monkeypatch):
    dataset = Photographs(16, crops_per_photograph=2)
    monkeypatch.setattr(module, "open_dataset", lambda *arguments, **options: dataset)
    tokenize(tokenizer_folder, "photographs", tmp_path / "codes", **SMALL)
    assert_codes_of(CodesFolder(tmp_path / "codes"), dataset, load_tokenizer(tokenizer_folder), epochs=2)


def test_random_crops_are_eight_unless_said_otherwise(tokenizer_folder, images, tmp_path):
    assert tokenize(tokenizer_folder, images, tmp_path / "codes", **SMALL | {"crops": None}).crops == 8


def test_workers_do_not_change_a_byte(tokenizer_folder, images, whole, tmp_path):
    tokenize(tokenizer_folder, images, tmp_path / "codes", workers=2, **SMALL)
    assert contents(tmp_path / "codes") == contents(whole)


# --- stopped, killed, damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    number, workers, tokenizer_folder, images, whole, tmp_path, monkeypatch
):
    codes = tmp_path / "codes"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_after(patch, 5, number)
        with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught:
            tokenize(tokenizer_folder, images, codes, workers=workers, **SMALL)
    assert caught.value.signal_number == number and signal.getsignal(number) == before
    assert len(list(codes.glob("*.codes"))) == 5 and not list(codes.glob(".*"))
    with pytest.raises(ValueError, match="not complete"):
        CodesFolder(codes)
    kept = {path: path.stat().st_mtime_ns for path in codes.glob("*.codes")}
    tokenize(tokenizer_folder, images, codes, **SMALL)
    assert contents(codes) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_run_stopped_once_and_killed_once_goes_on_to_the_same_bytes(tokenizer_folder, tmp_path, capsys):
    """As commands: SIGTERM after three shards, SIGKILL at whatever the process does after six."""
    codes = tmp_path / "codes"
    command = ["tokenize", "--tokenizer", tokenizer_folder, "--images", "digits", "--output", codes, "--device", "cpu"]
    command = [sys.executable, "-m", "hmar", *map(str, command), "--shard-size", "16", "--workers", "1"]

    def run_until(shards, number):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(list(codes.glob("*.codes"))) < shards and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        return process.communicate(timeout=60)[1], process.returncode

    printed, code = run_until(3, signal.SIGTERM)
    assert "stopped by SIGTERM: the same command goes on with the shards that are missing" in printed
    assert code == 128 + signal.SIGTERM and not list(codes.glob(".*"))
    _, code = run_until(6, signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = len(list(codes.glob("*.codes")))
    assert 6 <= done < 91 and not read_index_file(codes)["complete"]
    (codes / ".crop000-00089.codes.0123456789abcdef.tmp").write_bytes(b"begun")
    options = {"shard_size": 16, "device": "cpu"}
    tokenize(tokenizer_folder, "digits", codes, **options)
    printed = capsys.readouterr().err
    assert f"1442 images x 1 crops to 91 shards, 2.6e-05 GB; {done} of 91 are in {codes} already" in printed
    assert re.search(r"encoding 1442/1442 +[\d.e+]+ images/s", printed)
    tokenize(tokenizer_folder, "digits", tmp_path / "whole", progress=False, **options)
    assert contents(codes) == contents(tmp_path / "whole")


def test_damaged_and_missing_shards_are_made_again(tokenizer_folder, images, whole, tmp_path, capsys):
    codes = shutil.copytree(whole, tmp_path / "codes")
    path = codes / "crop001-00002.codes"
    path.write_bytes(path.read_bytes()[:-1])
    (codes / "crop000-00000.codes").unlink()
    assert len(find_damage(codes)) == 2
    tokenize(tokenizer_folder, images, codes, **SMALL | {"progress": True})
    assert contents(codes) == contents(whole)
    printed = capsys.readouterr().err
    assert f"{path} is damaged" in printed and "10 of 12 are in" in printed


def test_a_full_disk_is_an_error_that_leaves_the_finished_shards(tokenizer_folder, images, tmp_path):
    """The system refuses files as large as a shard, while a second crop is added."""
    for i in range(100):
        Image.new("RGB", (18, 18), (i, 2 * i, 0)).save(images / "cats" / f"plain{i}.png")
    codes, whole = tmp_path / "codes", tmp_path / "whole"
    options = SMALL | {"shard_size": 200}
    tokenize(tokenizer_folder, images, codes, **options | {"crops": 1})
    tokenize(tokenizer_folder, images, whole, **options)
    path = codes / "crop000-00000.codes"
    limit = path.stat().st_size - 1
    assert (whole / INDEX).stat().st_size < limit

    arguments = ["--tokenizer", tokenizer_folder, "--images", images, "--output", codes, "--crops", 2]
    arguments += ["--shard-size", 200, "--batch-size", 3, "--device", "cpu", "--quiet"]
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    result = hmar("tokenize", *arguments, **limited)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"could not write .*/crop001-00000\.codes: .* Is the disk full\?", result.stderr)
    assert sorted(path.name for path in codes.iterdir()) == [INDEX, path.name]
    assert path.read_bytes() == (whole / path.name).read_bytes() and not read_index_file(codes)["complete"]
    tokenize(tokenizer_folder, images, codes, **options)
    assert contents(codes) == contents(whole)


def test_crops_can_be_added(tokenizer_folder, images, whole, tmp_path):
    codes = tmp_path / "codes"
    tokenize(tokenizer_folder, images, codes, **SMALL | {"crops": 1})
    kept = {path.name: path.stat().st_mtime_ns for path in codes.glob("*.codes")}
    assert len(kept) == 6
    tokenize(tokenizer_folder, images, codes, **SMALL)
    assert contents(codes) == contents(whole)
    assert {name: (codes / name).stat().st_mtime_ns for name in kept} == kept
    with pytest.raises(ValueError, match="holds 2 crops, asked for 1: crops can be added, not taken"):
        tokenize(tokenizer_folder, images, codes, **SMALL | {"crops": 1})


# --- several processes ------------------------------------------------------------------------------------------------


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hmar"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_processes_of_torchrun_share_the_shards(tokenizer_folder, images, whole, tmp_path):
    codes = tmp_path / "codes"
    arguments = ["tokenize", "--tokenizer", tokenizer_folder, "--images", images, "--output", codes, "--crops", 2]
    arguments += ["--shard-size", 4, "--batch-size", 3, "--device", "cpu"]
    result = torchrun(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"codes of {NUM_IMAGES} images x 2 crops in {codes}\n"
    assert "encoding, process 0 of 2" in result.stderr and "process 1 of 2" not in result.stderr
    assert contents(codes) == contents(whole)


def test_a_broken_image_of_one_process_ends_all(tokenizer_folder, images, tmp_path):
    (images / "dogs" / "3.png").write_bytes(b"")
    codes = tmp_path / "codes"
    arguments = ["--tokenizer", tokenizer_folder, "--images", images, "--output", codes, "--device", "cpu"]
    result = torchrun("tokenize", *arguments, "--crops", 1, "--shard-size", 12)
    assert result.returncode != 0 and f"error: Cannot read the image {images / 'dogs' / '3.png'}" in result.stderr
    assert not read_index_file(codes)["complete"]


def test_processes_that_do_not_know_each_other(tokenizer_folder, images, whole, tmp_path):
    codes = tmp_path / "codes"
    shares = []
    for rank in (1, 0, 2):
        tokenize(tokenizer_folder, images, codes, rank=rank, world_size=3, **SMALL)
        shares.append({path.name for path in codes.glob("*.codes")})
    assert [len(share) for share in shares] == [4, 8, 12]
    assert not read_index_file(codes)["complete"]
    arguments = ["--tokenizer", tokenizer_folder, "--images", images, "--output", codes, "--crops", 2]
    arguments += ["--shard-size", 4, "--batch-size", 3, "--device", "cpu", "--rank", 1, "--world-size", 3]
    printed = CliRunner().invoke(app, ["tokenize", *map(str, arguments)]).output
    assert "process 1 has done its share; without --rank and --world-size this command completes" in printed
    tokenize(tokenizer_folder, images, codes, **SMALL)
    assert contents(codes) == contents(whole)
    with pytest.raises(ValueError, match="rank is 2 of 2 processes"):
        tokenize(tokenizer_folder, images, codes, rank=2, world_size=2, **SMALL)
    with pytest.raises(ValueError, match="cannot overwrite: delete the output folder first"):
        tokenize(tokenizer_folder, images, codes, rank=1, world_size=2, overwrite=True, **SMALL)


@pytest.mark.gpu
def test_a_gpu_gives_the_codes_of_the_cpu_and_the_same_bytes_again(
    tokenizer_folder, images, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = SMALL | {"device": "cuda", "workers": 1}
    tokenize(tokenizer_folder, images, tmp_path / "once", **options)
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(Interrupted):
            tokenize(tokenizer_folder, images, tmp_path / "again", **options)
    tokenize(tokenizer_folder, images, tmp_path / "again", **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    ours, expected = (
        torch.stack([codes[(epoch, i)][0] for epoch in range(2) for i in range(NUM_IMAGES)])
        for codes in (CodesFolder(tmp_path / "once"), CodesFolder(whole))
    )
    assert (ours == expected).float().mean() > 0.99  # near ties may fall the other way


# --- broken images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_with_its_name(workers, tokenizer_folder, images, whole, tmp_path):
    path = images / "dogs" / "3.png"
    good = path.read_bytes()
    path.write_bytes(good[:50] + bytes(len(good) - 50))
    with pytest.raises(BrokenImageError) as caught:
        tokenize(tokenizer_folder, images, tmp_path / "codes", workers=workers, **SMALL)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(good)
    tokenize(tokenizer_folder, images, tmp_path / "codes", **SMALL)
    assert contents(tmp_path / "codes") == contents(whole)


@torch.no_grad()
def test_broken_images_are_replaced_and_listed_when_asked(tokenizer_folder, images, tmp_path, monkeypatch):
    broken = [images / "cats" / "0.png", images / "dogs" / "9.png"]
    for path in broken:
        path.write_bytes(b"")
    codes = tmp_path / "codes"
    with monkeypatch.context() as patch:
        signal_after(patch, 8)
        with pytest.raises(Interrupted):
            tokenize(tokenizer_folder, images, codes, on_error="skip", workers=1, **SMALL)
    tokenize(tokenizer_folder, images, codes, on_error="skip", **SMALL)
    assert read_index_file(codes)["broken"] == [str(path) for path in broken]  # also those that the first run met
    dataset = ImageFolder(images, 16, on_error="skip")
    assert_codes_of(CodesFolder(codes), dataset, load_tokenizer(tokenizer_folder), epochs=2)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_other_codes_are_not_overwritten_unasked(tokenizer_folder, images, whole, tmp_path):
    def refused(match, *, tokenizer=tokenizer_folder, **options):
        before = contents(whole)
        with pytest.raises(ValueError, match=match):
            tokenize(tokenizer, images, whole, **SMALL | options)
        assert contents(whole) == before

    refused(r"holds other codes: seed was 0, now 1\. .*--overwrite", seed=1)
    refused("shard_size was 4, now 5", shard_size=5)
    torch.manual_seed(1)
    other = save_pretrained(tmp_path / "other", Tokenizer(PRESETS["tiny"][0], PRESETS["tiny"][1].pyramid))
    refused("holds other codes: tokenizer was", tokenizer=other)
    Image.new("RGB", (20, 20)).save(images / "dogs" / "3.png")
    refused("holds other codes: images was")
    tokenize(tokenizer_folder, images, whole, overwrite=True, **SMALL | {"shard_size": 20})
    assert len(list(whole.glob("*.codes"))) == 4 and len(CodesFolder(whole)) == NUM_IMAGES


def test_bad_input_is_refused_before_anything_is_written(tokenizer_folder, images, tmp_path):
    codes = tmp_path / "codes"
    for options, match in (
        ({"crops": 0}, "crops is 0; it must be at least 1"),
        ({"shard_size": 0}, "shard_size is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"workers": -1}, "workers is -1; it must be 0 or more"),
        ({"center_crop": True}, "crops is 2, but these images are not cropped at random"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"split": "val"}, "split is 'val'"),
        ({"device": "tpu"}, 'device="tpu" is not'),
    ):
        with pytest.raises(ValueError, match=match):
            tokenize(tokenizer_folder, images, codes, **SMALL | options)
    with pytest.raises(ValueError, match="crops is 2, but these images are not cropped at random"):
        tokenize(tokenizer_folder, "digits", codes, **SMALL)
    with pytest.raises(ValueError, match="has crops of its own"):
        tokenize(tokenizer_folder, "digits", codes, center_crop=True, **SMALL)
    with pytest.raises(ValueError, match="does not exist"):
        tokenize(tokenizer_folder, tmp_path / "nowhere", codes, **SMALL)
    assert not codes.exists()
    codes.mkdir()
    (codes / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"codes is not empty \(thesis\.tex\) and holds no codes"):
        tokenize(tokenizer_folder, images, codes, **SMALL)


@pytest.mark.parametrize("kind", ["folder", "photographs", "digits"])
def test_fingerprints_tell_image_sets_apart(kind, images):
    if kind == "folder":
        same, others = (ImageFolder(images, 16) for _ in range(2)), [ImageFolder(images, 8)]
        others.append(ImageFolder(images, 16, crop="center"))
        fingerprints = [one.fingerprint() for one in (*same, *others)]
        (images / "dogs" / "3.png").rename(images / "dogs" / "03.png")
        fingerprints.append(ImageFolder(images, 16).fingerprint())
        Image.new("RGB", (20, 20)).save(images / "dogs" / "03.png")
        fingerprints.append(ImageFolder(images, 16).fingerprint())
    elif kind == "photographs":
        sets = (Photographs(16), Photographs(16), Photographs(16, "test"), Photographs(16, crops_per_photograph=1))
        fingerprints = [one.fingerprint() for one in sets]
    else:
        fingerprints = [one.fingerprint() for one in (Digits(16), Digits(16), Digits(16, "test"), Digits(8))]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints[1:])) == len(fingerprints) - 1


# --- training ---------------------------------------------------------------------------------------------------------


def configure(stage, folder, tokenizer_folder, *overrides):
    base = [f"stage={stage}", f"output_dir={folder}", "preset=tiny", "model.num_classes=2", "device=cpu"]
    base += [f"tokenizer_weights={tokenizer_folder}", "steps=8", "batch_size=4", "log_every=4", "checkpoint_every=100"]
    return make_config(apply_overrides({}, [*base, *overrides]))


@pytest.fixture(scope="module")
def next_scale_folder(tokenizer_folder, tmp_path_factory):
    """A stage 1, for stage 2 to start from."""
    folder = tmp_path_factory.mktemp("next-scale")
    overrides = ("data.name=digits", "model.num_classes=10", "steps=1")
    return train(configure("next-scale", folder, tokenizer_folder, *overrides), progress=False).weights


@pytest.mark.parametrize("stage", ["next-scale", "masked", "var"])
def test_training_on_codes_is_training_on_the_images(
    stage, tokenizer_folder, next_scale_folder, images, whole, tmp_path, monkeypatch
):
    """The same weights to the bit over two epochs, which see different crops; and the encoder does not run."""
    overrides = ["model.num_classes=10", "steps=11"]
    overrides += [f"next_scale_weights={next_scale_folder}"] if stage == "masked" else []
    on = {"images": f"data={{name: folder, path: {images}}}", "codes": f"data={{name: codes, path: {whole}}}"}
    train(configure(stage, tmp_path / "a", tokenizer_folder, *overrides, on["images"]), progress=False)
    monkeypatch.setattr(Encoder, "forward", None)
    train(configure(stage, tmp_path / "b", tokenizer_folder, *overrides, on["codes"]), progress=False)
    assert_same_bits(weights(tmp_path / "b"), weights(tmp_path / "a"))


@pytest.mark.parametrize("options", [(), ("accumulate=2", "activation_checkpointing=mlp", "ema=0.9")])
def test_a_resumed_run_on_codes_ends_with_the_same_bits_whatever_the_workers(
    options, tokenizer_folder, whole, tmp_path, monkeypatch
):
    def run(name, workers=0, resume=False):
        data = f"data={{name: codes, path: {whole}, workers: {workers}}}"
        config = configure("next-scale", tmp_path / name, tokenizer_folder, data, *options)
        return train(config, progress=False, resume=resume)

    run("uninterrupted")
    advance = Trainer._advance

    def advance_and_signal(self, *arguments):
        advance(self, *arguments)
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", advance_and_signal)
        with pytest.raises(Exception, match="stopped by SIGTERM after step 3"):
            run("resumed", workers=2)
    run("resumed", workers=1, resume=True)
    assert_same_bits(weights(tmp_path / "resumed"), weights(tmp_path / "uninterrupted"))


def test_a_run_does_not_go_on_with_other_codes(tokenizer_folder, images, whole, tmp_path):
    data = f"data={{name: codes, path: {whole}}}"
    train(configure("next-scale", tmp_path / "run", tokenizer_folder, data), progress=False)
    tokenize(tokenizer_folder, images, whole, **SMALL | {"crops": 3})
    with pytest.raises(ValueError, match=r"cannot go on from .*: the files in data\.path=.*whole are not those that"):
        train(configure("next-scale", tmp_path / "run", tokenizer_folder, data), resume=True, progress=False)


def test_training_refuses_codes_that_do_not_fit(tokenizer_folder, whole, tmp_path):
    def refused(match, *overrides, weights=tokenizer_folder):
        data = f"data={{name: codes, path: {whole}}}"
        with pytest.raises(ValueError, match=match):
            train(configure("var", tmp_path / "run", weights, data, *overrides), progress=False)

    torch.manual_seed(1)
    other = save_pretrained(tmp_path / "other", Tokenizer(PRESETS["tiny"][0], PRESETS["tiny"][1].pyramid))
    refused("whole are of another tokenizer: fingerprint", weights=other)
    refused("the data has 2 classes, but model.num_classes=1", "model.num_classes=1")
    refused("cache_codes=true has no effect on data.name", "cache_codes=true")
    refused('data.path is missing: data.name "codes"', "data.path=null")
    with pytest.raises(ValueError, match="stage tokenizer trains on images"):
        make_config(
            {"stage": "tokenizer", "output_dir": "run", "preset": "tiny", "data": {"name": "codes", "path": "c"}}
        )
    (whole / "crop000-00000.codes").unlink()
    refused(r"crop000-00000\.codes is missing: .*hmar tokenize")
    index = json.loads((whole / INDEX).read_text())
    (whole / INDEX).write_text(json.dumps(index | {"complete": False}))
    refused("are not complete")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_stops_training_with_its_name_or_is_counted(workers, tokenizer_folder, whole, tmp_path):
    path = whole / "crop000-00001.codes"
    path.write_bytes(path.read_bytes()[:-1])
    data = f"data={{name: codes, path: {whole}, workers: {workers}}}"
    with pytest.raises(ValueError) as caught:
        train(configure("var", tmp_path / "strict", tokenizer_folder, data), progress=False)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    config = configure("var", tmp_path / "lenient", tokenizer_folder, data, "data.on_error=skip")
    if workers:
        metrics = train(config, progress=False).metrics
    else:
        with pytest.warns(UserWarning, match=f"{path.name} is damaged.*passed over"):
            metrics = train(config, progress=False).metrics
    assert metrics["skipped_images"] == 4


def test_only_the_quantizer_stays_on_the_device(tokenizer_folder, whole, tmp_path, monkeypatch):
    """As seen from the modules that are moved; with images the whole tokenizer stays."""
    moved = []
    monkeypatch.setattr(Tokenizer, "to", lambda self, device: moved.append(str(device)) or self)
    data = f"data={{name: codes, path: {whole}}}"
    stage = Trainer(
        configure("var", tmp_path / "run", tokenizer_folder, data), resume=False, overwrite=False, console=None
    ).stage
    moved.clear()
    assert isinstance(stage, CodesStage) and isinstance(stage.prepare(CodesFolder(whole), None), CodesFolder)
    assert moved == ["cpu"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_info_describes_codes_and_their_damage(whole):
    printed = CliRunner().invoke(app, ["info", str(whole)], env={"COLUMNS": "200"}).output
    assert re.search(rf"samples +{NUM_IMAGES} images x 2 crops, 2 classes", printed)
    assert "12 of 12 whole" in printed and re.search(r"complete +yes", printed) and '"cats", "dogs"' in printed
    path = whole / "crop001-00002.codes"
    path.write_bytes(path.read_bytes()[:-1])
    printed = CliRunner().invoke(app, ["info", str(whole)], env={"COLUMNS": "200"}).output
    assert "11 of 12 whole" in printed and path.name in printed
