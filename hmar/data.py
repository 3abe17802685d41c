"""Images with a class index: folders in ImageNet layout, and two built-in sets that need no download.

Every data set is a map-style ``torch.utils.data.Dataset`` whose items are ``(image_3HW, class)``: float32 in [-1, 1]
and a Python int. An item is a pure function of (seed, epoch, index), so a run that resumes sees what an uninterrupted
run would have seen, with any number of loader workers. The epoch travels with the index: ``EpochSampler`` yields
``(epoch, index)`` pairs and every ``__getitem__`` takes such a pair or a plain index (epoch 0). ``random_crops`` tells
whether the epoch matters, ``fingerprint()`` whether two sets are of the same images.

Read next: ``tokenizer.py``, where the images go; ``train.py``, which loads them; ``codes.py``, for codes made before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "test")
RESIZE_RATIO = 1.125  # shorter side before the crop, as a multiple of the crop
PHOTOGRAPHS = {  # class name -> package and file
    "astronaut": "skimage/data/astronaut.png",
    "bricks": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cat": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "galaxies": "skimage/data/hubble_deep_field.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "palace": "sklearn/datasets/images/china.jpg",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "tissue": "skimage/data/ihc.png",
}


class BrokenImageError(ValueError):
    """An image file that cannot be read; the message names it."""


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, index)`` without end, every epoch in an order of its own.

    The order of an epoch depends on ``seed`` and the epoch alone. A run that has consumed ``n`` items resumes exactly
    with ``start=n``, inside an epoch or not.

    Of ``world_size`` processes each has its ``rank``. ``batch_size`` is that of all together: the global order, from
    ``start`` on, is cut into batches of so many items, and process r gets the r-th of ``world_size`` equal slices of
    each. So a global batch holds the same items for any number of processes, ``start`` counts the items of all, and a
    run may go on with another number. Raises ValueError for a batch that cannot be divided.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        start: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
    ):
        if length < 1:
            raise ValueError(f"length is {length}; a sampler needs a data set of at least one item.")
        if seed < 0 or start < 0:
            raise ValueError(f"seed is {seed} and start is {start}; both must be 0 or more.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size} processes; it must be from 0 to {world_size - 1}.")
        batch_size = world_size if batch_size is None else batch_size
        if batch_size < 1 or batch_size % world_size:
            fits = max(1, batch_size // world_size) * world_size
            raise ValueError(
                f"batch_size is {batch_size}, which {world_size} processes cannot share equally; {fits} would do."
            )
        self.length, self.seed, self.start = length, seed, start
        self.rank, self.world_size, self.slice = rank, world_size, batch_size // world_size

    def order(self, epoch: int) -> np.ndarray:
        """The indices of one epoch in the order in which they come, int64 [length]."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, first = divmod(self.start, self.length)
        drawn = 0  # by all processes, since the start
        while True:
            indices = self.order(epoch)[first:]
            ranks = np.arange(drawn, drawn + len(indices)) // self.slice % self.world_size
            for index in indices[ranks == self.rank].tolist():
                yield epoch, index
            drawn += len(indices)
            epoch, first = epoch + 1, 0


class ImageFolder(Dataset):
    """Images in ImageNet layout, ``root/class_name/*.JPEG``; classes are the sorted folder names.

    The shorter side is resized to 1.125 x ``size``, then a ``size`` x ``size`` square is cut: anywhere with
    ``crop="random"``, in the middle with ``crop="center"``. No flip.

    A file that cannot be read raises ``BrokenImageError`` with its name. With ``on_error="skip"`` the next readable
    file takes its place, always the same one; ``skipped`` lists the files met so far, also those that loader workers
    have met.
    """

    def __init__(self, root: str | Path, size: int, crop: str = "random", on_error: str = "raise", seed: int = 0):
        if crop not in ("random", "center"):
            raise ValueError(f'crop is {crop!r}; it must be "random" or "center".')
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error is {on_error!r}; it must be "raise" or "skip".')
        self.root, self.size, self.crop = Path(root), _checked_size(size), crop
        self.on_error, self.seed = on_error, _checked_seed(seed)
        self.class_names = _class_folders(self.root)
        self.num_classes = len(self.class_names)
        files, classes = [], []
        for index, name in enumerate(self.class_names):
            found = _image_files(self.root, name)
            if not found:
                raise ValueError(
                    f"{self.root / name} holds no image. Every folder in {self.root} is a class and needs at least one "
                    f"file that ends in {', '.join(IMAGE_SUFFIXES)} (upper or lower case)."
                )
            files += found
            classes += [index] * len(found)
        # Arrays, not lists: worker processes would copy a million Python objects as soon as they touch them.
        self._files = np.array(files, dtype=np.bytes_)
        self._classes = np.array(classes, dtype=np.int32)
        self._broken = torch.zeros(len(files), dtype=torch.uint8).share_memory_()  # written by the workers too

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> Path:
        """The file of one item."""
        return self.root / os.fsdecode(bytes(self._files[index]))

    @property
    def broken(self) -> list[int]:
        """The items whose files were found broken so far with ``on_error="skip"``, in order."""
        return self._broken.nonzero().flatten().tolist()

    @property
    def skipped(self) -> list[Path]:
        """The broken files met so far with ``on_error="skip"``, each once."""
        return [self.path(index) for index in self.broken]

    @property
    def random_crops(self) -> bool:
        return self.crop == "random"

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes in bytes, of the crop and its size."""
        digest = hashlib.sha256(f"folder {self.size} {self.crop} {RESIZE_RATIO}".encode())
        for index, name in enumerate(self._files.tolist()):
            try:
                size = self.path(index).stat().st_size
            except OSError:  # reading it will fail, or pass over it
                size = -1
            digest.update(b"%b\0%d\0" % (name, size))
        return digest.hexdigest()

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = epoch_and_index(item, len(self))
        generator = np.random.default_rng((self.seed, epoch, index))
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if self._broken[candidate]:
                continue
            try:
                image = read_image(self.path(candidate), shorter_side=round(RESIZE_RATIO * self.size))
            except BrokenImageError:
                if self.on_error == "raise":
                    raise
                self._broken[candidate] = 1
                continue
            return _to_tensor(self._cut(image, generator)), int(self._classes[candidate])
        raise BrokenImageError(f"None of the {len(self)} image files in {self.root} can be read.")

    def _cut(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        slack = np.array(image.size) - self.size
        left, top = slack // 2 if self.crop == "center" else generator.integers(0, slack, endpoint=True)
        return image.crop((int(left), int(top), int(left) + self.size, int(top) + self.size))


class Digits(Dataset):
    """The handwritten digits of scikit-learn: 1797 images of 8 x 8 in 10 classes, smoothly enlarged to any size.

    One digit in five of every class, chosen once and for all, is the "test" split; the rest is "train". Strokes are
    white (1) on black (-1), equal in the three channels. Nothing is random. The enlarged images are kept in memory as
    one uint8 channel: ``length x size x size`` bytes.
    """

    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))
    random_crops = False

    def __init__(self, size: int, split: str = "train"):
        self.size, self.split = _checked_size(size), _checked_split(split)
        self.pixels_N88, self.targets_N = digit_pixels(split)
        image_N1HW = self.pixels_N88[:, None]
        if size < 8:
            image_N1HW = F.interpolate(image_N1HW, (size, size), mode="area")
        elif size > 8:  # black around the digit lets strokes that touch its edge end softly
            image_N1HW = F.interpolate(F.pad(image_N1HW, (8, 8, 8, 8)), (3 * size, 3 * size), mode="bicubic")
            image_N1HW = image_N1HW[:, :, size : 2 * size, size : 2 * size]
        self._image_N1HW = image_N1HW.mul(255).round().clamp(0, 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.targets_N)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        _, index = epoch_and_index(item, len(self))
        image_1HW = self._image_N1HW[index].float().div(127.5).sub(1)
        return image_1HW.repeat(3, 1, 1), int(self.targets_N[index])

    def fingerprint(self) -> str:
        """SHA-256 of all pixels and classes."""
        digest = hashlib.sha256(f"digits {self.size}".encode())
        digest.update(self._image_N1HW.numpy().tobytes() + self.targets_N.numpy().tobytes())
        return digest.hexdigest()


class Photographs(Dataset):
    """Crops of the real photographs that scikit-learn and scikit-image ship; the class is the photograph.

    An item is a square whose side is drawn uniformly from ``scale`` x the shorter side of the photograph, at a random
    place, resized to ``size`` x ``size`` (enlarged where the square is smaller). Item i is of photograph
    ``i % num_classes``; an epoch has ``crops_per_photograph`` crops of each.

    The "train" crops change from epoch to epoch. The "test" crops are fixed and drawn apart from them, but from the
    same photographs: they tell how well the photographs are fitted, not how a model does on others.
    """

    class_names = tuple(PHOTOGRAPHS)
    num_classes = len(PHOTOGRAPHS)

    def __init__(
        self,
        size: int,
        split: str = "train",
        *,
        crops_per_photograph: int = 256,
        scale: tuple[float, float] = (0.5, 1.0),
        seed: int = 0,
    ):
        if crops_per_photograph < 1:
            raise ValueError(f"crops_per_photograph is {crops_per_photograph}; it must be at least 1.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}; it must be (low, high) with 0 < low <= high <= 1.")
        self.size, self.split, self.seed = _checked_size(size), _checked_split(split), _checked_seed(seed)
        self.crops_per_photograph, self.scale = crops_per_photograph, scale
        self._photographs = [read_image(_packaged_file(name)) for name in PHOTOGRAPHS.values()]

    def __len__(self) -> int:
        return self.num_classes * self.crops_per_photograph

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = epoch_and_index(item, len(self))
        if self.split == "test":
            epoch = 0
        generator = np.random.default_rng((self.seed, SPLITS.index(self.split), epoch, index))
        target = index % self.num_classes
        photograph = self._photographs[target]
        side = generator.uniform(*self.scale) * min(photograph.size)
        left, top = generator.uniform(0, 1, 2) * (np.array(photograph.size) - side)
        square = photograph.resize(
            (self.size, self.size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
        return _to_tensor(square), target

    @property
    def random_crops(self) -> bool:
        return self.split == "train"

    def fingerprint(self) -> str:
        """SHA-256 of the photographs and of how squares are drawn from them."""
        settings = (self.size, self.split, self.crops_per_photograph, self.scale)
        digest = hashlib.sha256(f"photographs {settings}".encode())
        for photograph in self._photographs:
            digest.update(f"{photograph.size}".encode() + photograph.tobytes())
        return digest.hexdigest()


DATASETS = ("digits", "folder", "photographs")


def open_dataset(
    name: str,
    *,
    size: int,
    split: str = "train",
    path: str | Path | None = None,
    crop: str | None = None,
    on_error: str = "raise",
    seed: int = 0,
) -> Dataset:
    """Open a data set by name: "digits", "folder" or "photographs"; images are ``size`` x ``size``.

    A folder is either divided (``path/train/class_name/*`` and ``path/test/...`` or ``path/val/...``, nothing else
    beside them) or not (``path/class_name/*``, used for both splits); "train" crops at random, "test" in the middle,
    unless ``crop`` says "random" or "center". "test" is ``path/test`` if that has class folders with images, else
    ``path/val``. ``seed`` decides random crops. Raises ValueError for a name that is not known, for splits beside other
    folders, and for a ``crop`` of a built-in set.
    """
    _checked_split(split)
    if name not in DATASETS:
        raise ValueError(f"There is no data set {name!r}. Known ones: {', '.join(DATASETS)}.")
    if name == "folder":
        if path is None:
            raise ValueError('The data set "folder" needs a path: a folder with one sub-folder of images per class.')
        crop = crop or ("random" if split == "train" else "center")
        return ImageFolder(_split_folder(Path(path), split), size, crop=crop, on_error=on_error, seed=seed)
    if path is not None:
        raise ValueError(f"The data set {name!r} is built in and takes no path; got {str(path)!r}.")
    if crop is not None:
        raise ValueError(f'The data set {name!r} has crops of its own; crop="{crop}" is for folders of images.')
    return Digits(size, split) if name == "digits" else Photographs(size, split, seed=seed)


def read_image(path: str | Path, shorter_side: int | None = None) -> Image.Image:
    """Read one file as RGB, upright, its shorter side resized to ``shorter_side`` pixels if that is given.

    Raises ``BrokenImageError`` with the name of a file that is missing, cut off or not an image.
    """
    try:
        with Image.open(path) as image:
            if shorter_side is not None:
                image.draft("RGB", (2 * shorter_side, 2 * shorter_side))  # large JPEGs are decoded at 1/2, 1/4 or 1/8
            image.load()
            image = _to_rgb(ImageOps.exif_transpose(image))
    # Pillow's decoders raise all of these on damaged files: SyntaxError for PNG chunks, the others for headers.
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, Image.DecompressionBombError) as error:
        raise BrokenImageError(f"Cannot read the image {path}: {error}") from error
    if shorter_side is None:
        return image
    ratio = shorter_side / min(image.size)
    size = tuple(max(shorter_side, round(side * ratio)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def to_device(batches: Iterable[tuple[torch.Tensor, ...]], device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches on a device. To a GPU they are copied on a stream of their own, beside the kernels that are queued.

    A copy runs beside the kernels only from pinned memory (``DataLoader(pin_memory=True)``), and ahead of the step
    only if the caller does not wait for the device after each.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
        if stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for tensor in moved:
                tensor.record_stream(current)  # its memory is reused only after the caller's kernels
        yield moved


def leave_signals_to_the_main_process(worker: int) -> None:
    """worker_init_fn of a DataLoader: Ctrl-C reaches the whole process group, and workers must live on until the main
    process has come to an end of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def without_traceback(error: BrokenImageError) -> BrokenImageError:
    """The same error with its sentence alone: from a loader's worker comes its whole traceback as text."""
    kind = type(error)
    return kind(str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: "))


def digit_pixels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits of a split as scikit-learn ships them: float32 [N, 8, 8] from 0 to 1, and int64 classes [N]."""
    _package_folder("sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    generator = np.random.default_rng(0)
    is_test = np.zeros(len(digits.target), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(digits.target == digit)
        is_test[generator.permutation(members)[: len(members) // 5]] = True
    chosen = is_test if _checked_split(split) == "test" else ~is_test
    return torch.from_numpy(digits.images[chosen] / 16).float(), torch.from_numpy(digits.target[chosen]).long()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, whose range is not known; 8 or 16 bits a channel work")
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    image_HW3 = torch.from_numpy(np.array(image))
    return image_HW3.permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def epoch_and_index(item: int | tuple[int, int], length: int) -> tuple[int, int]:
    epoch, index = item if isinstance(item, tuple) else (0, item)
    if not -length <= index < length:
        raise IndexError(f"Item {index} of a data set of {length}.")
    return epoch, index % length


def _class_folders(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        state = "is a file, not a folder" if root.exists() else "does not exist"
        raise ValueError(f"The image folder {root} {state}; expected a folder with one sub-folder of images per class.")
    with os.scandir(root) as entries:
        names = tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))
    if not names:
        raise ValueError(
            f"{root} has no sub-folders; expected one per class, as in {root}/class_name/image.jpg (ImageNet layout)."
        )
    return names


def _image_files(root: Path, class_name: str) -> list[bytes]:
    found = []
    for folder, _, names in os.walk(root / class_name, followlinks=True):
        found += [
            os.fsencode(os.path.relpath(os.path.join(folder, name), root))
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _split_folder(path: Path, split: str) -> Path:
    """The folder of class folders that serves a split; `path` itself where it is not divided."""
    if not path.is_dir():
        return path
    names = _class_folders(path)
    splits = [name for name in names if name in ("train", "val", "test")]
    others = [name for name in names if name not in splits]
    # Beside other classes, "train" may be one itself, of locomotives; then it holds images and no folders.
    divided = [name for name in splits if _has_folders(path / name)] if others else splits
    if not divided:
        return path
    if others:
        raise ValueError(
            f"{path} holds {', '.join(divided)} beside {', '.join(others)}, so it is not clear what its classes are: "
            f"move {', '.join(others)} elsewhere if {', '.join(divided)} are splits, or give {path / divided[0]} "
            "alone; a folder of classes must not have one with sub-folders called train, val or test."
        )
    if split == "train":
        if "train" in splits:
            return path / "train"
        raise ValueError(f'{path} is divided into splits but has no train folder, asked for "train".')
    held_out = [name for name in ("test", "val") if name in splits]
    for name in held_out:
        if _has_classes(path / name):  # ImageNet's test folder has images without classes; its val folder serves then
            return path / name
    if not held_out:
        raise ValueError(f'{path} is divided into splits but has no test or val folder, asked for "{split}".')
    raise ValueError(
        f"{path} has {' and '.join(held_out)}, but without a sub-folder of images per class, as in "
        f'{path / held_out[-1]}/class_name/image.jpg; asked for "{split}".'
    )


def _has_folders(path: Path) -> bool:
    with os.scandir(path) as entries:
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def _has_classes(path: Path) -> bool:
    return _has_folders(path) and any(_image_files(path, name) for name in _class_folders(path))


def _packaged_file(name: str) -> Path:
    package, _, rest = name.partition("/")
    path = _package_folder(package) / rest
    if not path.is_file():
        raise ValueError(f"The installed {package} ships no {rest}; scikit-image 0.24 and scikit-learn 1.5 do.")
    return path


def _package_folder(package: str) -> Path:
    """The folder of an installed optional package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = {"sklearn": "scikit-learn", "skimage": "scikit-image"}[package]
        raise ModuleNotFoundError(f"This data set needs {distribution}: pip install 'hmar[demo]'.", name=package)
    return Path(spec.origin).parent


def _checked_size(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size is {size!r}; it must be a whole number of pixels, at least 1.")
    return size


def _checked_split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; it must be "train" or "test".')
    return split


def _checked_seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more.")
    return seed
