"""How good a model's images are: draw many of them, and compare them with real ones.

    images (sample.py)  ->  samples.npz, which ADM's evaluator reads
                        ->  features (extractors.py)  ->  FID, IS, ... (torch-fidelity)  ->  evaluation.json

The images are drawn into output/images as `hmar sample` would, each from its own number and the settings, so a stopped
evaluation goes on, and several processes share the work. The classes take turns in an order of which any beginning is
spread evenly over all of them. Metrics: FID arXiv 1706.08500, IS 1606.03498, KID 1801.01401, precision and recall
1904.06991. Read next: sample.py, extractors.py.
"""

from __future__ import annotations

import json
import math
import os
import platform
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hmar.checkpoint import replacing, temporary_beside
from hmar.data import IMAGE_SUFFIXES, SPLITS, BrokenImageError, open_dataset, read_image
from hmar.extractors import INCEPTION, Extractor, Features, import_torch_fidelity, open_extractor
from hmar.generate import SamplingConfig
from hmar.processes import device_of, know_each_other, sharing_failures
from hmar.recipe import unknown, unstructure
from hmar.sample import ImageSet, Meter, open_image_set, to_pixels

METRICS = ("fid", "is", "kid", "precision", "recall")
COMPARE_FEATURES = ("kid", "precision", "recall")  # these need the reference's features, not only mean and covariance
BUILT_IN_REFERENCES = ("digits", "photographs")
VERSIONS = ("hmar", "torch", "torchvision", "torch-fidelity", "numpy", "scipy", "pillow")
PIECE = 2**24  # bytes of an array that are read at a time


@dataclass(frozen=True)
class MetricsConfig:
    """Which metrics, and how they are computed; the defaults are those of published results.

    metrics: any of METRICS; none of them to draw the images only.
    extractor, extractor_weights: see extractors.py.
    kid_subsets, kid_subset_size: KID is the mean over so many random subsets of so many images of either side.
    is_splits: IS is the mean over so many parts of the generated images.
    neighbours: precision and recall measure the distance to the k-th nearest neighbour.
    seed: of KID's subsets and IS's parts.
    """

    metrics: tuple[str, ...] = METRICS
    extractor: str = INCEPTION
    extractor_weights: str | None = None
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    is_splits: int = 10
    neighbours: int = 3
    seed: int = 2020

    def __post_init__(self):
        object.__setattr__(self, "metrics", tuple(self.metrics))
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(unknown("metric", name, METRICS))
        for name, lowest in (("kid_subsets", 1), ("kid_subset_size", 2), ("is_splits", 1), ("neighbours", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"MetricsConfig.{name} is {getattr(self, name)}, expected at least {lowest}")


class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D] of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


@dataclass
class Reference:
    """What the generated images are compared with: images, or what was computed from images before."""

    source: str
    images: Dataset | None = None
    statistics: Statistics | None = None
    features_ND: Tensor | None = None
    extractor: dict[str, Any] | None = None  # record of the one that made statistics and features, if that is known
    num_classes: int | None = None

    @property
    def count(self) -> int | None:
        """Images to compare with one by one; None if there is only a mean and a covariance."""
        if self.features_ND is not None:
            return len(self.features_ND)
        return None if self.images is None else len(self.images)


@dataclass
class Measured:
    """Numbers by name, and what a reader of them should know."""

    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- the whole evaluation ---------------------------------------------------------------------------------------------


def evaluate(
    model_folder: str | Path,
    output: str | Path,
    *,
    reference: str | Path | None = None,
    count: int = 50_000,
    tokenizer_folder: str | Path | None = None,
    classes: Sequence[int] | None = None,
    sampling: SamplingConfig | None = None,
    config: MetricsConfig | None = None,
    save_reference: str | Path | None = None,
    npz: bool = True,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Draw `count` images, write output/samples.npz, and measure them against a reference: output/evaluation.json.

    Args:
        reference: "digits" or "photographs" (with ":test" for the other split), a folder of images, or an .npz
            (see `open_reference`). Not needed for IS alone.
        classes: the classes that take turns, all by default.
        batch_size: images drawn at once, one of the settings that the images follow from: another size can round a
            pixel otherwise.
        save_reference: .npz for the reference's statistics and features, to be given as `reference` next time.
        npz: whether to write samples.npz (N x H x W x 3 bytes).
        rank, world_size: of several processes this one draws its share. If torch.distributed is initialised
            (`hmar.processes.joined_processes`) they wait for each other and process 0 measures; without, this one
            draws its share only, and a last call with world_size=1 measures.
    Returns:
        What evaluation.json holds; None where this process only drew images.
    Raises:
        ValueError: for bad input, before anything is drawn.
    """
    config = config or MetricsConfig()
    together = know_each_other(rank, world_size, overwrite)
    console = Console(
        stderr=True, quiet=not progress or (together and rank > 0), highlight=False, markup=False, soft_wrap=True
    )
    if count < 1 or batch_size < 1:
        raise ValueError(f"count is {count} and batch size {batch_size}; both must be at least 1")
    output = Path(output)
    images = open_image_set(
        model_folder,
        output / "images",
        tokenizer_folder=tokenizer_folder,
        classes=classes,
        order=spread,
        sampling=sampling,
        device=device_of(device, rank, world_size),
        precision=precision,
        attention=attention,
        console=console,
    )
    images = replace(images, settings={**images.settings, "batch_size": batch_size})
    result_path, npz_path = output / "evaluation.json", output / "samples.npz"
    prepared = None
    with sharing_failures(together):
        if world_size == 1 or (together and rank == 0):
            prepared = _prepare(images, count, reference, config, save_reference)
        if rank == 0 or not together:
            images.claim(overwrite)
            if prepared is not None:
                # Nobody else is writing here; these are what a killed process had begun.
                for stale in (*output.glob(".*.tmp"), *images.output.glob(".*.tmp")):
                    stale.unlink()
            if overwrite:
                result_path.unlink(missing_ok=True)
                npz_path.unlink(missing_ok=True)
    with sharing_failures(together):
        paths = images.draw(count, batch_size, rank=rank, world_size=world_size, whole_batches=True)
    if prepared is None:
        return None

    extractor, opened, measured = prepared
    labels_N = [images.classes[number % len(images.classes)] for number in range(count)]
    with _npz_writer(npz_path if npz else None, labels_N, images.size) as write:
        try:
            files = ImageFiles(paths, images.size, resize=False)
            features = extract(files, extractor, console=console, what="measuring", on_batch=write)
        except BrokenImageError as error:
            raise BrokenImageError(f"{error}; delete it, and the same command draws it again") from error
    if extractor is not None:
        compared = _features_of(opened, extractor, config, console)
        if save_reference is not None:
            _save_reference(Path(save_reference), compared, extractor)
        compute(features, compared, config, measured, images.device)
    per_class = np.unique(labels_N, return_counts=True)[1]
    result = {
        "metrics": measured.metrics,
        "notes": measured.notes,
        "images": {
            "count": count,
            "size": images.size,
            "classes": len(per_class),
            "fewest_of_a_class": int(per_class.min()),
            "most_of_a_class": int(per_class.max()),
            "processes": world_size,
        },
        "sampling": images.settings,
        "model": {"source": str(model_folder), "kind": images.kind, "config": unstructure(images.model.config)},
        "tokenizer": {
            "source": str(images.tokenizer_folder),
            "sides": list(images.tokenizer.pyramid.sides),
            "config": unstructure(images.tokenizer.config),
        },
        "reference": None if opened is None else {"source": opened.source, "images": opened.count},
        "extractor": None if extractor is None else extractor.record,
        "measuring": unstructure(config),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
        "device": torch.cuda.get_device_name(images.device) if images.device.type == "cuda" else "cpu",
    }
    images.write_grid(paths)
    with replacing(result_path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for note in measured.notes:
        console.print(f"note: {note}")
    return result


def spread(classes: Sequence[int]) -> list[int]:
    """The same classes in an order of which every beginning is spread evenly over them (bit-reversed positions).

    Classes that take turns in this order are equally frequent, but for a remainder that lies all over the list: the
    first half of a round of ImageNet's classes is every second one, not the animals.
    """
    if len(set(classes)) < len(classes):
        raise ValueError(f"a class is named twice in {list(classes)}; every class takes part equally often")
    bits = (len(classes) - 1).bit_length()
    positions = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [classes[position] for position in positions if position < len(classes)]


# --- images and references --------------------------------------------------------------------------------------------


class ImageFiles(Dataset):
    """Image files as uint8 [3, size, size].

    With `resize` the shorter side becomes `size` and the middle is cut out (files of that size stay as they are);
    without, another size is an error. Raises BrokenImageError with the file's name.
    """

    def __init__(self, paths: Sequence[Path], size: int, *, resize: bool):
        self.paths, self.size, self.resize = paths, size, resize

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(self.paths[index], shorter_side=self.size if self.resize else None)
        if not self.resize and image.size != (self.size, self.size):
            raise BrokenImageError(f"{self.paths[index]} is of {image.size} pixels, expected {self.size} x {self.size}")
        left, top = ((side - self.size) // 2 for side in image.size)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ImageArray(Dataset):
    """The array arr_0 of an .npz, uint8 [N, H, W, 3], as uint8 [3, H, W]; taken into memory when first used."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype):
        if len(shape) != 4 or shape[3] != 3 or 0 in shape or dtype != np.uint8:
            raise ValueError(f"arr_0 of {path} is {dtype} {shape}, expected images uint8 (N, H, W, 3)")
        self.path, self.shape, self.array_NHWC = path, shape, None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        if self.array_NHWC is None:
            with np.load(self.path, allow_pickle=False) as arrays:
                self.array_NHWC = arrays["arr_0"]
        return torch.from_numpy(self.array_NHWC[index]).permute(2, 0, 1)


class Pixels(Dataset):
    """A data set of data.py as uint8 [3, H, W], without its classes."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(to_pixels(self.dataset[index][0][None])[0]).permute(2, 0, 1)


def open_reference(source: str | Path, size: int) -> Reference:
    """What to compare with, by name or path. `size` is that of the generated images.

    "digits", "photographs": a data set of data.py, its training split; "digits:test" the other.
    A folder: all image files in it and below, the shorter side resized to `size`, the middle cut out. If each lies in a
        sub-folder, these count as classes. grid.png of a folder that `hmar sample` wrote is left out.
    An .npz: mu [D] and sigma [D, D], mean and covariance of features; or arr_0 uint8 [N, H, W, 3], images; or both, as
        ADM's reference batches have it; or what `evaluate` wrote as save_reference. All of it is read and checked.

    Raises ValueError if it is none of these.
    """
    source = str(source)
    name, colon, split = source.partition(":")
    if name in BUILT_IN_REFERENCES:
        if colon and split not in SPLITS:
            raise ValueError(f'the reference is "{source}": {unknown("split", split, SPLITS)}')
        dataset = open_dataset(name, size=size, split=split or SPLITS[0])
        return Reference(source, images=Pixels(dataset), num_classes=dataset.num_classes)
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path)
    if not path.is_dir():
        raise ValueError(
            f'the reference "{source}" is not there: expected a folder of images, an .npz file, or a data set '
            f"({', '.join(BUILT_IN_REFERENCES)})"
        )
    files = _image_files(path)
    if not files:
        raise ValueError(f"the folder {source} holds no image, in it or below: expected {', '.join(IMAGE_SUFFIXES)}")
    folders = {file.relative_to(path).parts[0] if file.parent != path else "" for file in files}
    return Reference(
        source,
        images=ImageFiles(files, size, resize=True),
        num_classes=None if "" in folders else len(folders),
    )


def _image_files(root: Path) -> list[Path]:
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        drawn = {"grid.png"} if "settings.json" in names else set()
        found += [
            Path(folder, name)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and name not in drawn
        ]
    return sorted(found)


def _open_npz(path: Path) -> Reference:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            read = [name for name in ("mu", "sigma", "features", "extractor", "arr_0") if name in names]
            headers = {name: _check_array(archive, name) for name in read}
        with np.load(path, allow_pickle=False) as arrays:
            small = {name: arrays[name] for name in read if name != "arr_0"}
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    images = ImageArray(path, *headers["arr_0"]) if "arr_0" in names else None
    statistics = None
    if {"mu", "sigma"} <= names:
        mu_D, sigma_DD = small["mu"], small["sigma"]
        if mu_D.ndim != 1 or len(mu_D) == 0 or sigma_DD.shape != (len(mu_D), len(mu_D)):
            raise ValueError(f"{path}: mu is {mu_D.shape} and sigma {sigma_DD.shape}, expected (D,) and (D, D)")
        statistics = Statistics(*(_numbers(path, name, small[name]) for name in ("mu", "sigma")))
    if statistics is None and images is None:
        raise ValueError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}: expected mu and sigma, or arr_0 (images), or both"
        )
    features_ND = extractor = None
    if "features" in names:
        features = small["features"]
        if statistics is None:
            raise ValueError(f"{path} holds features without mu and sigma: expected their mean and covariance, too")
        width = len(statistics.mu)
        if features.ndim != 2 or len(features) == 0 or features.shape[1] != width:
            raise ValueError(
                f"{path}: features is {features.dtype} {features.shape}, expected (N, {width}) as mu has it"
            )
        features_ND = torch.from_numpy(_numbers(path, "features", features))
    if "extractor" in names:
        try:
            extractor = json.loads(str(small["extractor"]))
        except ValueError:
            extractor = None
        if not isinstance(extractor, dict):
            raise ValueError(
                f"{path}: extractor is no JSON object; expected what hmar evaluate --save-reference writes"
            )
    return Reference(str(path), images, statistics, features_ND, extractor)


def _check_array(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array in an .npz of which every byte is there, as its checksum says.

    It is read piece by piece: 50 000 images need not fit into memory, and one that claims to be larger than it is must
    not be given a place there.
    """
    with archive.open(f"{name}.npy") as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} has the format {version}, expected what numpy.savez writes")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name} is {dtype}. Object arrays cannot be loaded, expected numbers")
        left = math.prod(shape) * dtype.itemsize
        while left >= 0 and (piece := file.read(PIECE)):
            left -= len(piece)
    if left:
        raise ValueError(f"{name} has {'fewer' if left > 0 else 'more'} numbers than its shape {shape} says")
    return shape, dtype


def _numbers(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """An array of finite real numbers as float64."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {name} is {array.dtype}, expected real numbers")
    array = array.astype(np.float64)
    if bad := int(array.size - np.isfinite(array).sum()):
        raise ValueError(f"{path}: {name} holds {bad} numbers that are not finite, of {array.size}")
    return array


# --- measuring --------------------------------------------------------------------------------------------------------


def extract(
    images: Dataset,
    extractor: Extractor | None,
    *,
    batch_size: int = 64,
    console: Console | None = None,
    what: str = "features",
    on_batch: Callable[[Tensor], None] | None = None,
) -> Features | None:
    """Features of all images, in their order; `on_batch` sees each batch uint8 [B, 3, H, W] on the CPU.

    Without an extractor the images are only read.
    """
    on_gpu = extractor is not None and extractor.device.type == "cuda"
    workers = min(8, os.cpu_count() or 1) if on_gpu and isinstance(images, ImageFiles) else 0
    loader = DataLoader(images, batch_size, num_workers=workers, pin_memory=on_gpu)
    parts = []
    try:
        with Meter(console or Console(quiet=True), what, len(images)) as meter:
            for images_B3HW in loader:
                if on_batch is not None:
                    on_batch(images_B3HW)
                if extractor is not None:
                    parts.append(extractor(images_B3HW))
                meter.advance(len(images_B3HW))
    except BrokenImageError as error:
        # From a worker comes its whole traceback as text; the last line is the message.
        message = str(error).strip().splitlines()[-1].removeprefix("hmar.data.BrokenImageError: ")
        raise BrokenImageError(message) from error
    if extractor is None:
        return None
    features_ND = torch.cat([part.features_BD for part in parts])
    return Features(features_ND, None if parts[0].logits_BC is None else torch.cat([part.logits_BC for part in parts]))


def statistics_of(features_ND: Tensor) -> Statistics:
    """Mean and covariance of features."""
    found = import_torch_fidelity("metric_fid").fid_features_to_statistics(features_ND.double())
    return Statistics(found["mu"], np.atleast_2d(found["sigma"]))


def compute(
    generated: Features,
    reference: ComparedFeatures,
    config: MetricsConfig,
    measured: Measured,
    device: torch.device | str = "cpu",
) -> None:
    """The metrics of config.metrics, by torch-fidelity in float64, put into `measured`.

    The distances of precision and recall are computed on `device`: of 50 000 images these are some 10^10.

    Precision: share of generated images that lie within the reach of a real one, that is, no further from it than its
    k-th nearest real neighbour; recall: the same with the roles exchanged.
    """
    metrics = measured.metrics
    if "fid" in config.metrics:
        ours, theirs = ({"mu": s.mu, "sigma": s.sigma} for s in (statistics_of(generated[0]), reference.statistics))
        found = import_torch_fidelity("metric_fid").fid_statistics_to_metric(ours, theirs, verbose=False)
        metrics["fid"] = found["frechet_inception_distance"]
    if "is" in config.metrics:
        isc = import_torch_fidelity("metric_isc")
        found = isc.isc_features_to_metric(generated.logits_BC, config.is_splits, shuffle=True, rng_seed=config.seed)
        metrics["is"], metrics["is_std"] = found["inception_score_mean"], found["inception_score_std"]
    if "kid" in config.metrics:
        found = import_torch_fidelity("metric_kid").kid_features_to_metric(
            generated.features_BD,
            reference.features_ND,
            kid_subsets=config.kid_subsets,
            kid_subset_size=config.kid_subset_size,
            rng_seed=config.seed,
            verbose=False,
        )
        metrics["kid"], metrics["kid_std"] = (
            found["kernel_inception_distance_mean"],
            found["kernel_inception_distance_std"],
        )
    if {"precision", "recall"} & set(config.metrics):
        found = import_torch_fidelity("metric_prc").prc_features_to_metric(
            generated.features_BD.to(device),
            reference.features_ND.to(device),
            prc_neighborhood=config.neighbours,
            save_cpu_ram=True,
            verbose=False,
        )
        metrics |= {name: found[name] for name in ("precision", "recall") if name in config.metrics}


class ComparedFeatures(NamedTuple):
    """A reference seen through an extractor: what the chosen metrics need of it."""

    statistics: Statistics | None
    features_ND: Tensor | None


def _features_of(
    reference: Reference | None, extractor: Extractor, config: MetricsConfig, console: Console
) -> ComparedFeatures:
    if reference is None:
        return ComparedFeatures(None, None)
    statistics, features_ND = reference.statistics, reference.features_ND
    if _looks_at_images(reference, config):
        features_ND = extract(reference.images, extractor, console=console, what="reference").features_BD
    if "fid" in config.metrics and statistics is None:
        statistics = statistics_of(features_ND)
    return ComparedFeatures(statistics, features_ND)


def _looks_at_images(reference: Reference, config: MetricsConfig) -> bool:
    """Whether features are wanted that only the reference's images can give."""
    wants_features = bool(set(COMPARE_FEATURES) & set(config.metrics))
    wants_statistics = "fid" in config.metrics and reference.statistics is None
    return reference.features_ND is None and (wants_features or wants_statistics)


def _save_reference(path: Path, compared: ComparedFeatures, extractor: Extractor) -> None:
    statistics = compared.statistics or statistics_of(compared.features_ND)
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma, "extractor": np.array(json.dumps(extractor.record))}
    if compared.features_ND is not None:
        # Most extractors compute in float32; then half of the bytes say the same.
        half = compared.features_ND.float()
        arrays["features"] = (
            half if torch.equal(half.double(), compared.features_ND) else compared.features_ND
        ).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _prepare(
    images: ImageSet, count: int, source: str | Path | None, config: MetricsConfig, save_reference: str | Path | None
) -> tuple[Extractor | None, Reference | None, Measured]:
    """Everything that can be wrong with extractor and reference is wrong before the images are drawn."""
    measured = Measured()
    if save_reference is not None and (source is None or set(config.metrics) <= {"is"}):
        raise ValueError("there is nothing to save as a reference: give a reference, and metrics that compare with it")
    if not config.metrics:
        return None, None, measured
    if source is None and set(config.metrics) != {"is"}:
        raise ValueError(
            f"the metrics {', '.join(config.metrics)} compare with real images: give a reference (a folder of images, "
            f"an .npz file, {' or '.join(BUILT_IN_REFERENCES)}); only the metric is needs none"
        )
    import_torch_fidelity()
    extractor = open_extractor(
        config.extractor, logits="is" in config.metrics, weights=config.extractor_weights, device=images.device
    )
    num_features = extractor.num_features(images.size)
    reference = open_reference(source, images.size) if set(config.metrics) != {"is"} else None
    if reference is not None:
        _check_classes(reference, set(images.classes) - {images.model.config.null_class})
        _check_statistics(reference, extractor, num_features, config, measured.notes)
        if reference.images is not None and _looks_at_images(reference, config):
            extractor(reference.images[0][None])  # tells now whether it takes images of their size
    _check_counts(config, count, reference)
    if "fid" in config.metrics and count <= num_features:
        measured.notes.append(
            f"FID of {count} images in {num_features} features: their covariance is not of full rank; "
            "compare only with FIDs of as many images"
        )
    return extractor, reference, measured


def _check_classes(reference: Reference, classes: set[int]) -> None:
    if reference.num_classes is not None and 1 < len(classes) != reference.num_classes:
        raise ValueError(
            f"the reference {reference.source} has {reference.num_classes} classes, but images of {len(classes)} "
            "classes are generated: expected a reference of the same classes, or as many --classes; a folder whose "
            "images are not in folders of their own says nothing of classes"
        )


def _check_statistics(
    reference: Reference, extractor: Extractor, num_features: int, config: MetricsConfig, notes: list[str]
) -> None:
    """Mean, covariance and features of a file must come from the extractor, unless images in it can replace them."""
    if reference.statistics is None:
        return
    width = len(reference.statistics.mu)
    problem = None
    if reference.extractor is not None and reference.extractor != extractor.record:
        problem = f"come from the extractor {reference.extractor}, not from {extractor.record}"
    elif width != num_features:
        problem = f"are of {width} features, but the extractor {extractor.name} has {num_features}"
    if problem is None:
        if reference.extractor is None and "fid" in config.metrics:
            notes.append(
                f"FID compares with the mean and covariance in {reference.source}, which does not say its extractor"
            )
    elif reference.images is None:
        raise ValueError(
            f"mean and covariance in {reference.source} {problem}: take the extractor they come from, or a reference "
            "of images"
        )
    else:
        notes.append(f"mean and covariance in {reference.source} {problem}; its images took their place")
        reference.statistics = reference.features_ND = None


def _check_counts(config: MetricsConfig, count: int, reference: Reference | None) -> None:
    """Whether there are enough images on both sides for every metric."""
    if "is" in config.metrics and count < 2 * config.is_splits:
        raise ValueError(
            f"IS of {config.is_splits} parts needs at least {2 * config.is_splits} images, got {count}: generate more, "
            "take fewer parts (--is-splits), or leave is out of the metrics"
        )
    if "fid" in config.metrics and count < 2:
        raise ValueError("FID needs at least 2 images: generate more, or leave fid out of the metrics")
    compared = [name for name in COMPARE_FEATURES if name in config.metrics]
    if not compared:
        return
    if reference.count is None:
        raise ValueError(
            f"{reference.source} holds mean and covariance alone, which is enough for fid; {', '.join(compared)} "
            "compare image with image: give a reference of images, or leave them out of the metrics"
        )
    for number, what in ((count, "generated images"), (reference.count, f"images in {reference.source}")):
        if "kid" in config.metrics and number < config.kid_subset_size:
            raise ValueError(
                f"KID draws subsets of {config.kid_subset_size} images, but there are {number} {what}: take more, "
                f"subsets of at most {number} (--kid-subset-size), or leave kid out of the metrics"
            )
        if {"precision", "recall"} & set(compared) and number <= config.neighbours:
            raise ValueError(
                f"precision and recall look at {config.neighbours} nearest neighbours and need more images than that, "
                f"but there are {number} {what}: take more, or leave both out of the metrics"
            )


# --- files and processes ----------------------------------------------------------------------------------------------


@contextmanager
def _npz_writer(path: Path | None, labels_N: Sequence[int], size: int) -> Iterator[Callable[[Tensor], None] | None]:
    """A function that takes batches of images uint8 [B, 3, H, W] for arr_0 of an .npz, [N, H, W, 3]; arr_1 holds the
    classes. The batches go straight to the disk: 50 000 images of 256 x 256 are 10 GB. None without a path."""
    if path is None:
        yield None
        return
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels_N), size, size, 3)}
    # NOTE: not inside of `replacing`, which would take any error of an extractor for one of the disk.
    begun = temporary_beside(path)
    try:
        # Uncompressed members of a fixed date: ADM's evaluator streams them, and equal images give equal files.
        with zipfile.ZipFile(begun, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                yield lambda images_B3HW: file.write(images_B3HW.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
                npy.write_array(file, np.asarray(labels_N, dtype=np.int64))
        with replacing(path) as temporary:
            os.replace(begun, temporary)
    finally:
        begun.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
