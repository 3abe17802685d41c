"""Evaluation: metrics against numpy and scipy on the same features, and the command as people type it."""

import http.server
import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch_fidelity import FeatureExtractorBase, feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from hmar import extractors
from hmar.checkpoint import fingerprint
from hmar.data import Digits
from hmar.evaluate import (
    METRICS,
    ComparedFeatures,
    ImageFiles,
    Measured,
    MetricsConfig,
    Pixels,
    compute,
    evaluate,
    extract,
    open_reference,
    spread,
    statistics_of,
)
from hmar.extractors import INCEPTION, Features, known_extractors, open_extractor, register_extractor
from hmar.sample import ImageSet
from test_cli import ENVIRONMENT, HMAR_COMMAND, TINY, fail, hmar_here, succeed

# What the runs of this file have in common; the number of images is enough for every metric.
SMALL = ("--reference", "digits", "--extractor", "digits", "--kid-subset-size", "40", "--kid-subsets", "5")
SMALL += ("--batch-size", "8", "--device", "cpu")
TWO = {"mu": np.zeros(2), "sigma": np.eye(2)}  # a reference of two features
OWN_EXTRACTOR = """
import torch
from torch.nn import functional as F

class Filters(torch.nn.Module):
    '''Four random filters, the mean and the spread of what they see.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        seen = F.conv2d(images.float() / 255, self.weight).flatten(2)
        return torch.cat([seen.mean(2), seen.std(2)], dim=1)
"""


@pytest.fixture(scope="module")
def digits():
    """Features and logits of real digits, as the extractor "digits" sees them: held-out ones and training ones."""
    extractor = open_extractor("digits", logits=True)
    return [extract(Pixels(Digits(32, split)), extractor) for split in ("test", "train")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An HMAR after two steps of each stage, and 60 images of it, drawn and measured by the command."""
    folder = tmp_path_factory.mktemp("evaluate")
    short = (*TINY, "steps=2", "--quiet")
    for command in (
        ("tokenizer", *short, "output_dir=tokenizer"),
        ("next-scale", *short, "output_dir=next-scale", "tokenizer_weights=tokenizer"),
        ("masked", *short, "output_dir=hmar", "tokenizer_weights=tokenizer", "next_scale_weights=next-scale"),
    ):
        succeed("train", *command, cwd=folder, run=hmar_here)
    (folder / "own.py").write_text(OWN_EXTRACTOR)
    result = succeed(*command_line("whole"), cwd=folder, run=hmar_here)
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder


def command_line(output, *more, count=60):
    return ("evaluate", "--model", "hmar", "--output", output, "--count", count, *SMALL, *more)


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").glob("*-class-*.png")}


def read(folder: Path):
    return json.loads((folder / "evaluation.json").read_text())


# --- the metrics ------------------------------------------------------------------------------------------------------


def measure(generated: Features, reference: torch.Tensor, *metrics: str, **settings) -> dict[str, float]:
    measured = Measured()
    compared = ComparedFeatures(statistics_of(reference), reference)
    compute(generated, compared, MetricsConfig(metrics=metrics or METRICS, **settings), measured)
    return measured.metrics


def test_fid_is_the_distance_of_two_gaussians(digits):
    (ours, _), (theirs, _) = digits
    means = [part.numpy().mean(0) for part in (ours, theirs)]
    covariances = [np.cov(part.numpy().T) for part in (ours, theirs)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    # Some cells are black in all digits: eigenvalues of 0 come out as 1e-17, whose root is 1e-9.
    assert measure(Features(ours, None), theirs, "fid")["fid"] == pytest.approx(expected, rel=1e-5)
    assert expected > 0.01


def test_fid_of_the_same_digits_moved_is_the_square_of_the_way(digits):
    ours = digits[0].features_BD
    way = torch.linspace(-1, 2, ours.shape[1], dtype=torch.float64)
    moved = measure(Features(ours + way, None), ours, "fid")["fid"]
    assert moved == pytest.approx(way.square().sum().item(), rel=1e-5)
    assert abs(measure(Features(ours, None), ours, "fid")["fid"]) < 1e-4


def test_inception_score_is_the_exponential_of_the_information_in_each_part(digits):
    logits = digits[0].logits_BC.numpy()
    actual = measure(digits[0], digits[1].features_BD, "is", is_splits=4, seed=7)
    shuffled = logits[np.random.RandomState(7).permutation(len(logits))]
    scores = []
    for part in range(4):
        some = shuffled[part * len(logits) // 4 : (part + 1) * len(logits) // 4]
        p = np.exp(some) / np.exp(some).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert actual == pytest.approx({"is": np.mean(scores), "is_std": np.std(scores)}, rel=1e-9)
    assert 5 < actual["is"] < 10  # digits that look like digits, of ten classes


def polynomial_mmd(x, y):
    """The unbiased estimate of arXiv 1801.01401, equation 4, with the kernel (x y / D + 1)^3, sample by sample."""
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    m = len(x)
    inside = sum(k[i, j] for k in (xx, yy) for i in range(m) for j in range(m) if i != j)
    return inside / (m * (m - 1)) - 2 * xy.mean()


def test_kid_is_the_mean_of_the_mmd_of_subsets(digits):
    (ours, _), (theirs, _) = digits
    actual = measure(digits[0], theirs, "kid", kid_subsets=3, kid_subset_size=50, seed=5)
    random = np.random.RandomState(5)
    expected = []
    for _ in range(3):
        x = ours.numpy()[random.choice(len(ours), 50, replace=False)]
        y = theirs.numpy()[random.choice(len(theirs), 50, replace=False)]
        expected.append(polynomial_mmd(x, y))
    assert actual["kid"] == pytest.approx(np.mean(expected), rel=1e-8)
    assert actual["kid_std"] == pytest.approx(np.std(expected), rel=1e-8)
    darker = measure(Features(ours / 2, None), theirs, "kid", kid_subsets=3, kid_subset_size=50)["kid"]
    assert darker > 10 * abs(actual["kid"])


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_count_images_in_reach_of_a_neighbour(digits, neighbours):
    ours, theirs = digits[0].features_BD.numpy(), digits[1].features_BD.numpy()[:500]
    actual = measure(digits[0], torch.from_numpy(theirs), "precision", "recall", neighbours=neighbours)

    def covered(samples, centres):
        # The distance of a centre to itself comes first.
        reach = np.sort(cdist(centres, centres), axis=1)[:, neighbours]
        return np.mean([(cdist(sample[None], centres)[0] <= reach).any() for sample in samples])

    assert actual["precision"] == pytest.approx(covered(ours, theirs), abs=1e-6)
    assert actual["recall"] == pytest.approx(covered(theirs, ours), abs=1e-6)
    assert 0.1 < actual["precision"] < 1 and 0.1 < actual["recall"] < 1 and actual["precision"] != actual["recall"]
    same = measure(digits[0], digits[0].features_BD, "precision", "recall", neighbours=neighbours)
    assert same == {"precision": 1, "recall": 1}


def test_precision_and_recall_tell_poor_from_monotonous_images(digits):
    real = digits[1].features_BD
    monotonous = measure(Features(real[:20].repeat(5, 1), None), real, "precision", "recall")
    assert monotonous["precision"] == 1 and monotonous["recall"] < 0.2
    noise = torch.rand(100, real.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert measure(Features(noise, None), real, "precision")["precision"] == 0


# --- which images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [1, 2, 7, 10, 1000])
def test_classes_are_balanced_and_the_remainder_is_spread(num_classes):
    order = spread(range(num_classes))
    assert sorted(order) == list(range(num_classes))
    for count in (
        1,
        num_classes // 2,
        num_classes - 1,
        num_classes,
        num_classes + 3,
        5 * num_classes + num_classes // 3,
    ):
        per_class = np.bincount([order[n % num_classes] for n in range(count)], minlength=num_classes)
        assert per_class.max() - per_class.min() <= 1
        more = np.flatnonzero(per_class > count // num_classes)
        if len(more) > 1:
            # Between classes that get one more lie at most twice as many as if they were laid out evenly, and a bit.
            gaps = np.diff([*more, more[0] + num_classes])
            assert gaps.max() <= 2 * num_classes / len(more) + 1


def test_a_class_named_twice_is_refused():
    with pytest.raises(ValueError, match="named twice"):
        spread([3, 4, 3])


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_draws_measures_and_says_how(folder):
    result = read(folder / "whole")
    stdout, stderr = (folder / "stdout").read_text(), (folder / "stderr").read_text()
    assert set(result["metrics"]) == {*METRICS, "is_std", "kid_std"}
    assert f"fid        {result['metrics']['fid']:.6g}\n" in stdout
    assert "sampling 60/60" in stderr and "images/s" in stderr and " s left" in stderr
    assert result["images"]["count"] == 60 and result["images"]["size"] == 16
    assert result["images"]["fewest_of_a_class"] == result["images"]["most_of_a_class"] == 6
    assert result["sampling"]["model"] == fingerprint(folder / "hmar")
    assert result["sampling"]["tokenizer"] == fingerprint(folder / "tokenizer")
    assert result["sampling"]["seed"] == 0 and result["sampling"]["schedule"] == [[1], [1, 3], [16]]
    assert result["model"]["kind"] == "hmar" and result["model"]["config"]["width"] == 32
    assert result["tokenizer"]["sides"] == [1, 2, 4]
    assert result["measuring"]["kid_subset_size"] == 40 and result["measuring"]["seed"] == 2020
    assert result["reference"] == {"source": "digits", "images": 1442}
    assert result["extractor"]["name"] == "digits"
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(result["versions"].values())
    # 60 images cannot fill a covariance of 64 features, and the reader is told.
    assert "FID of 60 images in 64 features" in result["notes"][0] and result["notes"][0] in stderr
    assert (folder / "whole" / "images" / "grid.png").exists()


def test_the_numbers_are_those_of_the_images_in_the_folder(folder):
    files = sorted((folder / "whole" / "images").glob("*-class-*.png"))
    pixels = np.stack([np.asarray(Image.open(path).convert("L")) for path in files])
    extractor = open_extractor("digits", logits=True)
    ours = extract(ImageFiles(files, 16, resize=False), extractor)
    cells = (
        np.stack([np.asarray(Image.open(path)) for path in files]).mean(3).reshape(60, 8, 2, 8, 2).mean((2, 4)) / 255
    )
    np.testing.assert_allclose(ours.features_BD.numpy(), cells.reshape(60, 64), atol=1e-12)
    assert pixels.std() > 0
    theirs = extract(Pixels(Digits(16, "train")), extractor).features_BD
    expected = measure(ours, theirs, kid_subset_size=40, kid_subsets=5)
    assert read(folder / "whole")["metrics"] == pytest.approx(expected, rel=1e-9)


def test_adm_s_evaluator_can_read_the_images(folder):
    path = folder / "whole" / "samples.npz"
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (60, 16, 16, 3)
    for number, (name, data) in enumerate(sorted(drawn(folder / "whole").items())):
        assert name == f"{number:06d}-class-{labels[number]}.png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), images[number])
    assert np.bincount(labels).tolist() == [6] * 10

    # The evaluator does not load the file: it streams the member after reading its header, which must be version 1.
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert file.read(8) == b"\x93NUMPY\x01\x00"
        header = file.read(struct.unpack("<H", file.read(2))[0]).decode()
        assert "'descr': '|u1'" in header and "'fortran_order': False" in header and "(60, 16, 16, 3)" in header
        assert file.read(16 * 16 * 3) == images[0].tobytes()


def test_a_killed_evaluation_goes_on_to_the_same_images(folder):
    command = command_line("parts")
    process = subprocess.Popen(
        [*HMAR_COMMAND, *map(str, command)],
        env=ENVIRONMENT,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(list((folder / "parts" / "images").glob("*-class-*.png"))) < 8:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.stderr.close()
    before = {path: path.stat().st_mtime_ns for path in (folder / "parts" / "images").glob("*-class-*.png")}
    assert 8 <= len(before) < 60
    assert not (folder / "parts" / "evaluation.json").exists()
    (folder / "parts" / "images" / ".000059-class-7.png.1.tmp").write_bytes(b"begun")

    result = succeed(*command, cwd=folder, run=hmar_here)
    assert f"{len(before)} of 60 images are in parts/images already" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Images, file for ADM and metrics agree to the last bit.
    assert drawn(folder / "parts") == drawn(folder / "whole")
    assert (folder / "parts" / "samples.npz").read_bytes() == (folder / "whole" / "samples.npz").read_bytes()
    assert read(folder / "parts")["metrics"] == read(folder / "whole")["metrics"]
    assert not list((folder / "parts").rglob(".*"))


def test_a_larger_count_adds_to_the_images(folder, tmp_path):
    arguments = ("--metrics", "none")
    succeed(*command_line(tmp_path / "more", *arguments, count=33), cwd=folder, run=hmar_here)
    few = drawn(tmp_path / "more")
    succeed(*command_line(tmp_path / "more", *arguments, count=60), cwd=folder, run=hmar_here)
    assert few.items() < drawn(tmp_path / "more").items()
    assert drawn(tmp_path / "more") == drawn(folder / "whole")
    assert read(tmp_path / "more")["metrics"] == {} and read(tmp_path / "more")["extractor"] is None
    assert (tmp_path / "more" / "samples.npz").read_bytes() == (folder / "whole" / "samples.npz").read_bytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_of_torchrun_share_the_images(folder):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    command = (*launcher, "-m", "hmar", *command_line("shared"))
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "sampling, process 0 of 2 32/32" in result.stderr
    assert result.stdout.count("fid ") == 1
    assert drawn(folder / "shared") == drawn(folder / "whole")
    assert read(folder / "shared")["metrics"] == read(folder / "whole")["metrics"]
    assert read(folder / "shared")["images"]["processes"] == 2


def test_processes_that_do_not_know_each_other_draw_their_shares(folder, tmp_path, monkeypatch):
    command = command_line(tmp_path / "shares")
    result = succeed(*command, "--rank", "1", "--world-size", "2", cwd=folder, run=hmar_here)
    assert result.stdout == ""
    assert sorted(int(name[:6]) // 8 for name in drawn(tmp_path / "shares")) == [1] * 8 + [3] * 8 + [5] * 8 + [7] * 4
    assert not (tmp_path / "shares" / "evaluation.json").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    succeed(*command, cwd=folder, run=hmar_here)
    assert drawn(tmp_path / "shares") == drawn(folder / "whole")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    result = succeed(*command, cwd=folder, run=hmar_here)
    assert "60 of 60 images" in result.stderr
    assert read(tmp_path / "shares")["metrics"] == read(folder / "whole")["metrics"]
    assert "rank is 2 of 2" in fail(*command, "--rank", "2", "--world-size", "2", cwd=folder)
    assert "delete the output" in fail(*command, "--rank", "0", "--world-size", "2", "--overwrite", cwd=folder)


# --- references -------------------------------------------------------------------------------------------------------


def metrics_against(folder, reference, *more):
    """The images that are there already, measured anew."""
    if not (folder / "again").exists():
        shutil.copytree(folder / "whole" / "images", folder / "again" / "images")
    succeed(*command_line("again", "--no-npz", "--reference", reference, *more), cwd=folder, run=hmar_here)
    return read(folder / "again")


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """The held-out digits at 16 pixels as PNG files in class folders, and as an array."""
    root = tmp_path_factory.mktemp("digits")
    dataset = Digits(16, "test")
    pixels = np.stack([Pixels(dataset)[i].permute(1, 2, 0).numpy() for i in range(len(dataset))])
    for i, image in enumerate(pixels):
        (root / str(dataset[i][1])).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / str(dataset[i][1]) / f"{i:04d}.png")
    return root, pixels


def test_a_folder_an_array_and_a_data_set_of_the_same_images_are_the_same_reference(folder, digit_files, tmp_path):
    root, pixels = digit_files
    np.savez(tmp_path / "images.npz", pixels)
    expected = metrics_against(folder, "digits:test")
    assert expected["reference"] == {"source": "digits:test", "images": 355}
    by_number = ("--metrics", "fid,precision,recall")  # KID draws by position, and files are sorted otherwise
    for source in (tmp_path / "images.npz", root):
        actual = metrics_against(folder, source, *(() if source == tmp_path / "images.npz" else by_number))
        assert actual["reference"] == {"source": str(source), "images": 355}
        assert actual["metrics"] == pytest.approx(
            {name: expected["metrics"][name] for name in actual["metrics"]}, rel=1e-9
        )


def test_images_of_another_size_are_resized_and_cut(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200  # the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.new("L", (16, 16), 77).save(tmp_path / "grey.png")
    (tmp_path / "settings.json").write_text("{}")
    Image.new("RGB", (99, 99)).save(tmp_path / "grid.png")  # of `hmar sample`, not an image of the set
    reference = open_reference(tmp_path, 16)
    assert len(reference.images) == 2 and reference.num_classes is None
    assert (reference.images[0] == 77).all() and reference.images[0].shape == (3, 16, 16)
    assert (reference.images[1][:, :, 2:-2] >= 199).all()


def test_mean_and_covariance_are_enough_for_fid(folder, digits, tmp_path):
    expected = read(folder / "whole")["metrics"]["fid"]
    theirs = extract(Pixels(Digits(16, "train")), open_extractor("digits")).features_BD.numpy()
    np.savez(tmp_path / "statistics.npz", mu=theirs.mean(0), sigma=np.cov(theirs.T))
    only = ("--metrics", "fid,is")
    result = metrics_against(folder, tmp_path / "statistics.npz", *only)
    assert result["metrics"]["fid"] == pytest.approx(expected, rel=1e-9)
    assert any("does not say its extractor" in note for note in result["notes"])
    message = fail(*command_line("whole", "--reference", tmp_path / "statistics.npz"), cwd=folder)
    assert "mean and covariance alone, which is enough for fid; kid, precision, recall compare image with" in message


def test_reference_batches_of_adm_hold_both(folder, digit_files, tmp_path):
    """Mean and covariance of the whole data set serve FID, the images beside them everything else."""
    _, pixels = digit_files
    theirs = extract(Pixels(Digits(16, "train")), open_extractor("digits")).features_BD.numpy()
    both = tmp_path / "VIRTUAL_digits.npz"
    spatial = {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    np.savez(both, arr_0=pixels, mu=theirs.mean(0), sigma=np.cov(theirs.T), **spatial)
    actual = metrics_against(folder, both)["metrics"]
    whole, images = (metrics_against(folder, source)["metrics"] for source in ("digits", "digits:test"))
    assert actual["fid"] == pytest.approx(whole["fid"], rel=1e-9) != images["fid"]
    assert actual["kid"] == pytest.approx(images["kid"], rel=1e-9) != whole["kid"]

    # Statistics of another width cannot come from this extractor: the images take their place, and a note says so.
    np.savez(both, arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    result = metrics_against(folder, both)
    assert result["metrics"]["fid"] == pytest.approx(images["fid"], rel=1e-9)
    assert any("2048 features" in note and "its images took their place" in note for note in result["notes"])


def test_a_saved_reference_gives_the_same_numbers(folder, tmp_path):
    saved = tmp_path / "new" / "reference.npz"
    expected = metrics_against(folder, "digits", "--save-reference", saved)["metrics"]
    result = metrics_against(folder, saved)
    assert result["metrics"] == pytest.approx(expected, rel=1e-12)
    assert result["reference"] == {"source": str(saved), "images": 1442}
    message = fail(
        *command_line("whole", "--reference", saved, "--extractor", "own.py:Filters", "--metrics", "fid"), cwd=folder
    )
    assert "come from the extractor {'name': 'digits'" in message
    assert "nothing to save" in fail(*command_line("whole", "--save-reference", saved, "--metrics", "is"), cwd=folder)


# --- extractors -------------------------------------------------------------------------------------------------------


def test_an_extractor_of_one_s_own_by_file(folder):
    only = ("--extractor", "own.py:Filters", "--metrics", "fid,kid,precision,recall")
    result = metrics_against(folder, "digits", *only)
    assert result["extractor"]["name"] == "own.py:Filters"
    assert len(result["extractor"]["code_sha256"]) == 64

    # The same filters by hand.
    weight = np.asarray(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)), np.float64)

    def by_hand(images_N3HW):
        patches = np.lib.stride_tricks.sliding_window_view(images_N3HW / 255, (3, 3), axis=(2, 3))
        seen = np.einsum("nchwij,ocij->nohw", patches, weight).reshape(len(images_N3HW), 4, -1)
        return np.concatenate([seen.mean(2), seen.std(2, ddof=1)], axis=1)

    files = sorted((folder / "whole" / "images").glob("*-class-*.png"))
    ours = by_hand(np.stack([np.asarray(Image.open(path)) for path in files]).transpose(0, 3, 1, 2))
    real = Pixels(Digits(16, "train"))
    theirs = by_hand(np.stack([real[i].numpy() for i in range(len(real))]))
    difference = ours.mean(0) - theirs.mean(0)
    covariances = np.cov(ours.T), np.cov(theirs.T)
    expected = difference @ difference + np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert result["metrics"]["fid"] == pytest.approx(expected, rel=1e-3)  # the filters compute in float32

    assert 'no "logits"' in fail(*command_line("whole", "--extractor", "own.py:Filters"), cwd=folder)
    assert "own.py has no Nothing" in fail(*command_line("whole", "--extractor", "own.py:Nothing"), cwd=folder)
    assert 'cannot import the extractor "gone.py:A"' in fail(*command_line("x", "--extractor", "gone.py:A"), cwd=folder)


class Halves(FeatureExtractorBase):
    """torch-fidelity's own protocol: layers by name, some of them asked for."""

    def forward(self, images):
        halves = images.double().flatten(1)[:, :12].chunk(2, dim=1)
        return tuple(halves[self.get_provided_features_list().index(name)] for name in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "first", "second"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "first" if metric == "isc" else "second"


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(extractors, "_registered", dict(extractors._registered))


def test_registered_extractors(registry):
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    register_extractor("halves", lambda: lambda images: images.flatten(1).float())
    assert torch.equal(open_extractor("halves")(images).features_BD, images.flatten(1).double())
    assert open_extractor("halves")(images).logits_BC is None
    with pytest.raises(ValueError, match='cannot be called "halves"'):
        register_extractor("halves", Halves)
    with pytest.raises(ValueError, match="expected a class or a function"):
        register_extractor("number", 3)
    with pytest.raises(ValueError, match="without a colon"):
        register_extractor("a:b", Halves)

    register_extractor("layers", Halves)
    first, second = images.flatten(1)[:, :12].double().chunk(2, dim=1)
    features, logits = open_extractor("layers", logits=True)(images)
    assert torch.equal(features, second) and torch.equal(logits, first)
    assert torch.equal(open_extractor("layers")(images).features_BD, second)
    assert {"halves", "layers", "digits", INCEPTION} <= set(known_extractors())

    register_extractor("weighted", lambda path: lambda images: images.flatten(1).float() * float(path.read_text()))
    for name, problem in (("wrong", lambda x: x.float()), ("nan", lambda x: x.flatten(1) / x.flatten(1) * np.nan)):
        register_extractor(name, lambda problem=problem: problem)
        with pytest.raises(ValueError, match=f"the extractor {name} returned"):
            open_extractor(name)(images)


def test_an_extractor_gets_the_weights_that_the_user_names(registry, tmp_path):
    register_extractor("weighted", lambda path: lambda images: images.flatten(1) * float(path.read_text()))
    (tmp_path / "factor").write_text("2.5")
    extractor = open_extractor("weighted", weights=tmp_path / "factor")
    assert (extractor(torch.full((1, 3, 2, 2), 2, dtype=torch.uint8)).features_BD == 5).all()
    assert len(extractor.record["weights_sha256"]) == 64


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file of weights of the right names and shapes."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        module = FeatureExtractorInceptionV3("random", ["2048"], str(path))
    torch.save(module.state_dict(), path)
    return path


def test_inception_takes_weights_from_a_file(random_inception):
    extractor = open_extractor(INCEPTION, logits=True, weights=random_inception)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = extractor(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    alone = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], str(random_inception))
    expected = alone(images)
    torch.testing.assert_close(features, expected[0].double())
    torch.testing.assert_close(logits, expected[1].double())
    assert extractor.record["layer"] == "2048" and extractor.record["torch-fidelity"]


class Runs:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_weights_are_refused(folder, tmp_path):
    weights = tmp_path / "weights.pth"
    command = command_line("none", "--extractor", INCEPTION, "--extractor-weights", weights)
    assert f"no file {weights}" in fail(*command, cwd=folder)
    weights.write_bytes(b"not a file of torch")
    assert "is damaged or holds more than weights" in fail(*command, cwd=folder)
    weights.write_bytes(pickle.dumps(Runs(tmp_path / "made")))
    assert "is damaged or holds more than weights" in fail(*command, cwd=folder)
    torch.save({"run": Runs(tmp_path / "made")}, weights)
    assert "is damaged or holds more than weights" in fail(*command, cwd=folder)
    assert not (tmp_path / "made").exists()
    torch.save([1, 2], weights)
    assert "holds a list, expected named tensors" in fail(*command, cwd=folder)
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, weights)
    message = fail(*command, cwd=folder)
    assert f"cannot make the extractor {INCEPTION}" in message and "Missing key(s)" in message and len(message) < 1200
    assert not (folder / "none").exists()


def test_weights_that_cannot_be_had(folder, tmp_path, monkeypatch):
    """Nothing listens at the address: as without a network. The message says what works."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    url = f"http://127.0.0.1:{free_port()}/weights-inception-12345678.pth"
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", url)
    message = fail(*command_line("none", "--extractor", INCEPTION), cwd=folder)
    kept_at = tmp_path / "hub" / "checkpoints" / "weights-inception-12345678.pth"
    assert f"are not at {kept_at} and could not be downloaded" in message
    for hint in (f"Download {url}", "--extractor-weights", "--extractor digits", "file.py:Name", "--metrics none"):
        assert hint in message
    assert not (folder / "none").exists()


def test_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    content = b"weights"
    good = "9a129038"  # the first digits of the SHA-256 of the content
    served = tmp_path / "served"
    served.mkdir()
    for checksum in (good, "00000000"):
        (served / f"weights-{checksum}.pth").write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(served))

        def log_message(self, *arguments):
            requests.append(self.path)

    requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", f"{address}/weights-{good}.pth")
        for _ in range(2):
            assert extractors._weights_file(INCEPTION, None).read_bytes() == content
        assert requests == [f"/weights-{good}.pth"]
        monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", f"{address}/weights-00000000.pth")
        with pytest.raises(ValueError, match=r"could not be downloaded .*invalid hash value"):
            extractors._weights_file(INCEPTION, None)
        assert [path.name for path in (tmp_path / "torch" / "hub" / "checkpoints").iterdir()] == [f"weights-{good}.pth"]
    finally:
        server.shutdown()
        server.server_close()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", "30"), "KID draws subsets of 40 images, but there are 30 generated images"),
        (("--kid-subset-size", "2000", "--count", "2000"), "but there are 1442 images in digits"),
        (("--count", "0"), "count is 0"),
        (("--count", "10", "--metrics", "is"), "IS of 10 parts needs at least 20 images, got 10"),
        (("--count", "1", "--metrics", "fid"), "FID needs at least 2 images"),
        (("--count", "3", "--metrics", "precision"), "look at 3 nearest neighbours and need more images than that"),
        (("--metrics", "fid,fidd"), 'unknown metric "fidd": did you mean fid'),
        (("--kid-subsets", "0"), "kid_subsets is 0, expected at least 1"),
        (("--extractor", "inceptoin"), 'unknown extractor "inceptoin": known: digits, inception-v3-compat, vgg16'),
        (("--reference", "photographs"), "photographs has 16 classes, but images of 10 classes are generated"),
        (("--classes", "0-4"), "digits has 10 classes, but images of 5 classes are generated"),
        (("--classes", "0,11"), "classes [11]: expected numbers from 0 to 9, or 10"),
        (("--classes", "0,1,0"), "a class is named twice"),
        (("--reference", "digits:validation"), 'unknown split "validation"'),
        (("--reference", "nowhere"), 'the reference "nowhere" is not there: expected a folder of images, an .npz'),
        (("--reference", "hmar/weights"), "the folder hmar/weights holds no image"),
        (("--model", "tokenizer"), "tokenizer holds a tokenizer"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, tuple) else "",
)
def test_bad_input_is_answered_before_anything_is_drawn(folder, arguments, message):
    assert message in fail(*command_line("none"), *arguments, cwd=folder)
    assert not (folder / "none").exists()


def test_metrics_that_compare_need_a_reference(folder, tmp_path):
    own = ("evaluate", "--model", "hmar", "--extractor", "digits", "--count", "60", "--output", tmp_path / "none")
    own += ("--batch-size", "8")
    assert "compare with real images: give a reference" in fail(*own, cwd=folder)
    assert not (tmp_path / "none").exists()
    succeed(*own, "--metrics", "is", cwd=folder, run=hmar_here)
    assert read(tmp_path / "none")["metrics"]["is"] == read(folder / "whole")["metrics"]["is"]
    assert read(tmp_path / "none")["reference"] is None


def test_the_images_of_other_settings_are_not_touched(folder):
    before = drawn(folder / "whole")
    message = fail(*command_line("whole", "--cfg", "2"), cwd=folder)
    assert "whole/images holds images made with other settings (cfg was 1.5, now 2.0)" in message
    assert "batch_size was 8, now 9" in fail(*command_line("whole", "--batch-size", "9"), cwd=folder)
    assert "classes was" in fail(*command_line("whole", "--classes", "0-4", "--metrics", "is"), cwd=folder)
    assert drawn(folder / "whole") == before


def test_overwriting_starts_anew(folder, tmp_path):
    command = command_line(tmp_path / "out", "--metrics", "none", count=20)
    succeed(*command, cwd=folder, run=hmar_here)
    before = drawn(tmp_path / "out")
    succeed(*command, "--seed", "1", "--overwrite", cwd=folder, run=hmar_here)
    after = drawn(tmp_path / "out")
    assert before.keys() == after.keys() and all(before[name] != after[name] for name in before)
    assert read(tmp_path / "out")["sampling"]["seed"] == 1


def test_a_broken_image_is_named_and_drawn_again(folder, tmp_path):
    command = command_line(tmp_path / "out", "--metrics", "none", count=20)
    succeed(*command, cwd=folder, run=hmar_here)
    good = drawn(tmp_path / "out")
    broken = sorted((tmp_path / "out" / "images").glob("*-class-*.png"))[7]
    broken.write_bytes(broken.read_bytes()[:100])
    (tmp_path / "out" / "samples.npz").unlink()
    result = hmar_here(*command, cwd=folder)
    assert result.returncode == 2
    assert f"Cannot read the image {broken}" in result.stderr and "the same command draws it again" in result.stderr
    assert not (tmp_path / "out" / "samples.npz").exists()
    broken.unlink()
    succeed(*command, cwd=folder, run=hmar_here)
    assert drawn(tmp_path / "out") == good


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "holds a: expected mu and sigma, or arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu is \(3,\) and sigma \(4, 4\), expected \(D,\) and \(D, D\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, r"arr_0 of .* is uint8 \(2, 4, 4\), expected images uint8"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "is float32"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"arr_0 of .* is uint8 \(0, 4, 4, 3\), expected images uint8"),
        ({"mu": np.array([object()]), "sigma": np.eye(1)}, "Object arrays cannot be loaded"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu is \(0,\) and sigma \(0, 0\), expected"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu is <U1, expected real numbers"),
        ({"mu": np.zeros(2), "sigma": np.eye(2) + 1j}, "sigma is complex128, expected real numbers"),
        ({**TWO, "features": np.zeros(2)}, r"features is float64 \(2,\), expected \(N, 2\)"),
        ({**TWO, "features": np.zeros((5, 3))}, r"features is float64 \(5, 3\), expected \(N, 2\)"),
        ({**TWO, "features": np.zeros((0, 2))}, r"features is float64 \(0, 2\), expected \(N, 2\)"),
        ({**TWO, "features": np.array([[1, np.nan], [0, 0]])}, "features holds 1 numbers that are not finite"),
        ({**TWO, "features": np.full((3, 2), np.inf, np.float32)}, "features holds 6 numbers that are not finite"),
        ({**TWO, "features": np.zeros((3, 2), bool)}, "features is bool, expected real numbers"),
        ({**TWO, "features": np.array([[object(), 1]])}, "Object arrays cannot be loaded"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "features": np.zeros((2, 2))}, "features without mu and sigma"),
        ({**TWO, "extractor": np.array("{")}, "extractor is no JSON object"),
        ({**TWO, "extractor": np.array("[1]")}, "extractor is no JSON object"),
        ({**TWO, "extractor": np.zeros(3)}, "extractor is no JSON object"),
    ],
)
def test_files_that_are_no_reference(arrays, message, tmp_path):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_reference(tmp_path / "file.npz", 16)
    (tmp_path / "file.npz").write_bytes((tmp_path / "file.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match="cannot read"):
        open_reference(tmp_path / "file.npz", 16)


@pytest.mark.parametrize("name", ["arr_0", "features", "mu"])
@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_read_to_the_end_before_anything_is_drawn(folder, tmp_path, name, compressed):
    """A file may be whole as an archive and yet have a broken or short array in it."""
    arrays = {**TWO, "features": np.ones((500, 2)), "arr_0": np.ones((200, 32, 32, 3), np.uint8)}
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "whole.npz", **arrays)
    open_reference(tmp_path / "whole.npz", 32)
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        place = archive.getinfo(f"{name}.npy")
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[place.header_offset + 60 + place.compress_size - 10] ^= 255
    (tmp_path / "broken.npz").write_bytes(content)
    message = fail(*command_line("none", "--reference", tmp_path / "broken.npz"), cwd=folder)
    assert f"cannot read {tmp_path / 'broken.npz'}" in message
    with zipfile.ZipFile(tmp_path / "short.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for other, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{other}.npy", buffer.getvalue()[:-8] if other == name else buffer.getvalue())
    message = fail(*command_line("none", "--reference", tmp_path / "short.npz"), cwd=folder)
    assert f"{name} has fewer numbers than its shape" in message
    assert not (folder / "none").exists()


@pytest.mark.parametrize("name", ["arr_0", "features", "mu", "sigma"])
def test_an_array_that_claims_to_be_huge_costs_nothing(tmp_path, name):
    shapes = {"arr_0": (10**12, 32, 32, 3), "features": (10**13, 2), "mu": (10**14,), "sigma": (10**7, 10**7)}
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        for other, array in {**TWO, name: None}.items():
            buffer = io.BytesIO()
            if other == name:
                descr = "|u1" if name == "arr_0" else "<f8"
                np.lib.format.write_array_header_1_0(
                    buffer, {"descr": descr, "fortran_order": False, "shape": shapes[name]}
                )
            else:
                np.save(buffer, array)
            archive.writestr(f"{other}.npy", buffer.getvalue())
    with pytest.raises(ValueError, match=f"{name} has fewer numbers than its shape"):
        open_reference(tmp_path / "huge.npz", 32)


def test_images_that_the_extractor_cannot_take_are_refused_before_anything_is_drawn(folder, tmp_path):
    (tmp_path / "square.py").write_text(
        "def Squares():\n"
        "    def look(images):\n"
        "        if images.shape[2:] != (32, 32):\n"
        "            raise ValueError('I look at 32 x 32 pixels')\n"
        "        return images.double().mean((2, 3))\n"
        "    return look\n"
    )
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((60, 16, 32, 3), np.uint8))
    more = ("--extractor", f"{tmp_path / 'square.py'}:Squares", "--metrics", "fid")
    message = fail(*command_line("none", "--reference", tmp_path / "wide.npz", *more), cwd=folder)
    assert "I look at 32 x 32 pixels" in message
    assert not (folder / "none").exists()


def test_an_array_under_the_name_of_an_archive_is_no_reference(tmp_path):
    with open(tmp_path / "file.npz", "wb") as file:
        np.save(file, np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="cannot read"):
        open_reference(tmp_path / "file.npz", 16)


def test_the_last_batch_is_as_large_as_the_others(folder, monkeypatch):
    """Another batch size may round otherwise, and then a larger count would not add to the same bits."""
    sizes = []
    ask = ImageSet.requests
    monkeypatch.setattr(ImageSet, "requests", lambda self, batch: (sizes.append(len(batch)), ask(self, batch))[1])
    succeed(*command_line("odd", "--metrics", "none", count=33), cwd=folder, run=hmar_here)
    assert len(drawn(folder / "odd")) == 33
    assert len(set(sizes)) == 1 and sum(sizes) > 33


def test_statistics_of_another_extractor_are_refused(folder, tmp_path):
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    message = fail(*command_line("none", "--reference", tmp_path / "inception.npz", "--metrics", "fid"), cwd=folder)
    assert "are of 2048 features, but the extractor digits has 64" in message


def test_without_torch_fidelity_the_message_says_how_to_install_it(folder, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install 'hmar[metrics]'" in fail(*command_line("none"), cwd=folder)


def test_from_python(folder, tmp_path):
    result = evaluate(
        folder / "hmar",
        tmp_path,
        reference="digits",
        count=60,
        tokenizer_folder=folder / "tokenizer",
        config=MetricsConfig(extractor="digits", kid_subset_size=40, kid_subsets=5),
        batch_size=8,
        device="cpu",
        npz=False,
        progress=False,
    )
    assert result == read(tmp_path)
    assert result["metrics"] == read(folder / "whole")["metrics"]
    assert not (tmp_path / "samples.npz").exists()


@pytest.mark.gpu
def test_a_stopped_evaluation_goes_on_on_a_gpu(folder, tmp_path):
    command = (*command_line(tmp_path / "gpu"), "--device", "cuda", "--batch-size", "16")
    succeed(*command, cwd=folder, run=hmar_here)
    expected, metrics = drawn(tmp_path / "gpu"), read(tmp_path / "gpu")["metrics"]
    for name in list(expected)[10:40:3]:
        (tmp_path / "gpu" / "images" / name).unlink()
    succeed(*command, cwd=folder, run=hmar_here)
    assert drawn(tmp_path / "gpu") == expected
    assert read(tmp_path / "gpu")["metrics"] == pytest.approx(metrics, rel=1e-9)
