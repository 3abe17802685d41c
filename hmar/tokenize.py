"""Codes of a whole image set, made once: `hmar tokenize`.

Every process makes its share of the shards (every `world_size`-th one) and writes each when it is whole. A run that was
stopped, killed or found the disk full goes on with the shards that are missing: batches begin anew with each shard, so
the bytes do not depend on interruptions or on the number of processes.

Read next: codes.py, for the files; data.py, for the images.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from hmar.checkpoint import load_tokenizer
from hmar.codes import (
    INDEX,
    CodesIndex,
    DamagedShardError,
    RecordLayout,
    Shard,
    read_index,
    read_shard,
    tokenizer_fingerprint,
    write_index,
    write_shard,
)
from hmar.data import (
    DATASETS,
    BrokenImageError,
    leave_signals_to_the_main_process,
    open_dataset,
    to_device,
    without_traceback,
)
from hmar.processes import device_of, find_device, know_each_other, sharing_failures, wait_for_all
from hmar.progress import StopSignals
from hmar.recipe import differences
from hmar.sample import Meter
from hmar.tokenizer import Tokenizer

DEFAULT_CROPS = 8  # of images that are cropped at random
# A folder of codes goes on with the same of these.
FIXED = ("tokenizer", "sides", "vocab_size", "images", "num_images", "split", "seed", "shard_size")


class Interrupted(KeyboardInterrupt):
    """The run got SIGINT or SIGTERM; the shard it was at is dropped, those before it are written."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")


def tokenize(
    tokenizer_folder: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    split: str = "train",
    crops: int | None = None,
    center_crop: bool = False,
    seed: int = 0,
    on_error: str = "raise",
    shard_size: int = 4096,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> CodesIndex:
    """Write the codes of all images of a set to a folder, or go on with that.

    Args:
        tokenizer_folder: weights of the tokenizer; its pyramid and stride give the size of the images.
        images: "digits", "photographs", or a folder in ImageNet layout (see hmar.data.open_dataset).
        split: "train" or "test".
        crops: how many random crops of each image; a folder of codes may be given more later. Default: 8, or 1 where
            nothing is random. Epoch e of training reads crop e % crops.
        center_crop: the middle of each image instead.
        seed: decides the random crops. With the seed of a training run, crop i is what its epoch i would cut.
        on_error: a broken image stops the run with its name ("raise"), or the next readable one takes its place
            ("skip"); the index names them.
        batch_size: images encoded at once. Another size may round otherwise and change codes that are near ties.
        rank, world_size: of several processes this one makes its share. If torch.distributed is initialised
            (`hmar.processes.joined_processes`) they wait for each other; without, a last call with world_size=1
            completes the index.
        overwrite: delete other codes in the folder first.
    Returns:
        The index of what is in the folder.
    Raises:
        ValueError: for bad input, before anything is written; and for a folder with other codes.
        BrokenImageError: names an image that cannot be read.
        OSError: if the disk is full. Shards written before are good.
        Interrupted: after SIGINT or SIGTERM.
    """
    together = know_each_other(rank, world_size, overwrite)
    quiet = not progress or (together and rank > 0)
    console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be 0 or more")
    output = Path(output)
    where = find_device(device_of(device, rank, world_size))
    tokenizer = load_tokenizer(tokenizer_folder, where)
    name = str(images) if str(images) in DATASETS and str(images) != "folder" else "folder"
    dataset = open_dataset(
        name,
        size=tokenizer.image_size,
        split=split,
        path=images if name == "folder" else None,
        crop="center" if center_crop else None,
        on_error=on_error,
        seed=seed,
    )
    index = CodesIndex(
        sides=tokenizer.pyramid.sides,
        vocab_size=tokenizer.config.vocab_size,
        tokenizer=tokenizer_fingerprint(tokenizer),
        images=dataset.fingerprint(),
        source=str(images),
        split=split,
        seed=seed if dataset.random_crops else 0,
        num_images=len(dataset),
        crops=_checked_crops(crops, dataset),
        shard_size=shard_size,
        class_names=tuple(dataset.class_names),
    )
    with sharing_failures(together):
        if rank == 0 or not together:
            _claim(output, index, overwrite, alone=world_size == 1 or together)
    mine = index.shards()[rank::world_size]
    missing = [shard for shard in mine if not _is_whole(output, index, shard, console)]
    num_bytes = index.num_images * index.crops * RecordLayout(index.sides, index.vocab_size).num_bytes
    console.print(
        f"{index.num_images} images x {index.crops} crops to {len(index.shards())} shards, {num_bytes / 1e9:.3g} GB; "
        f"{len(mine) - len(missing)} of {len(mine)} are in {output} already"
    )
    what = "encoding" if world_size == 1 else f"encoding, process {rank} of {world_size}"
    total, to_do = (sum(shard.count for shard in shards) for shards in (mine, missing))
    with (
        Meter(console, what, total, total - to_do) as meter,
        contextlib.closing(encode(tokenizer, dataset, missing, batch_size, workers, where, meter)) as encoded,
    ):
        for shard, codes_NL, classes_N in encoded:
            broken = [i for i in getattr(dataset, "broken", ()) if shard.first <= i < shard.first + shard.count]
            write_shard(output, index, shard, codes_NL, classes_N, broken)
    if together:
        wait_for_all()
    with sharing_failures(together):
        if rank == 0 and (together or world_size == 1):
            broken = sorted({i for shard in index.shards() for i in read_shard(output, index, shard)[1]})
            write_index(output, index, complete=True, broken=[str(dataset.path(i)) for i in broken])
            if broken:
                console.print(f"{len(broken)} images could not be read, others took their place: see {output / INDEX}")
    return index


def encode(
    tokenizer: Tokenizer,
    dataset: Dataset,
    shards: list[Shard],
    batch_size: int,
    workers: int,
    device: torch.device,
    meter: Meter,
) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
    """Each shard with its codes [N, L] and classes [N], in the precision in which training encodes images.

    Raises Interrupted after SIGINT or SIGTERM, within a batch.
    """
    batches = (
        [(shard.crop, index) for index in range(first, min(first + batch_size, shard.first + shard.count))]
        for shard in shards
        for first in range(shard.first, shard.first + shard.count, batch_size)
    )
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),
    )
    with StopSignals() as stop:
        loaded = iter(loader)
        encoded = to_device(loaded, device)
        try:
            for shard in shards:
                codes, classes = [], []
                for _ in range(0, shard.count, batch_size):
                    images_B3HW, classes_B = next(encoded)
                    with torch.no_grad(), torch.autocast(device.type, enabled=False):
                        codes.append(tokenizer.encode(images_B3HW).cpu().numpy())
                    classes.append(classes_B.cpu().numpy())
                    meter.advance(len(classes_B))
                    if stop.received:
                        raise Interrupted(stop.received)
                yield shard, np.concatenate(codes), np.concatenate(classes)
        except BrokenImageError as error:
            raise without_traceback(error) from error
        finally:
            # NOTE: an exception's traceback keeps the iterator alive, and with it its workers, which take no signals.
            if workers:
                loaded._shutdown_workers()


def _checked_crops(crops: int | None, dataset: Dataset) -> int:
    if crops is None:
        return DEFAULT_CROPS if dataset.random_crops else 1
    if crops < 1:
        raise ValueError(f"crops is {crops}; it must be at least 1")
    if crops > 1 and not dataset.random_crops:
        raise ValueError(f"crops is {crops}, but these images are not cropped at random: all would be equal; use 1")
    return crops


def _claim(output: Path, index: CodesIndex, overwrite: bool, alone: bool) -> None:
    """Make the folder this set's: its index is there and says that the set is not complete, unless it is.

    ValueError for a folder with other codes, fewer crops than it has, or other files.
    """
    output.mkdir(parents=True, exist_ok=True)
    if overwrite:
        (output / INDEX).unlink(missing_ok=True)
        for path in output.glob("crop*.codes"):
            path.unlink()
    if alone:
        # Nobody else is writing here; these are what a killed process had begun.
        for stale in (*output.glob(".crop*.tmp"), *output.glob(f".{INDEX}.*.tmp")):
            stale.unlink()
    if not (output / INDEX).exists():
        strangers = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
        if strangers:
            raise ValueError(f"{output} is not empty ({strangers[0]}) and holds no codes: choose a folder of its own")
        write_index(output, index, complete=False)
        return
    before = read_index(output, incomplete=True)
    fixed = [{name: getattr(which, name) for name in FIXED} for which in (before, index)]
    if found := differences(*fixed):
        raise ValueError(
            f"{output} holds other codes: {'; '.join(found)}. Choose another folder, or delete them by --overwrite "
            "(overwrite=True)"
        )
    if before.crops > index.crops:
        raise ValueError(f"{output} holds {before.crops} crops, asked for {index.crops}: crops can be added, not taken")
    if before.crops < index.crops:
        write_index(output, index, complete=False)


def _is_whole(output: Path, index: CodesIndex, shard: Shard, console: Console) -> bool:
    if not (output / shard.name).exists():
        return False
    try:
        read_shard(output, index, shard)
    except DamagedShardError as error:
        console.print(f"{error}; made again", style="yellow")
        return False
    return True
