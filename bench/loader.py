"""How fast the loader delivers training data: `python -m bench.loader`, from codes and from JPEG images.

The loader is the one of training: EpochSampler, a DataLoader with 0 or more workers, `to_device`. Every sample is drawn
from the whole set, in shuffled order. What is read comes from the page cache, as in all epochs of a set that fits into
memory. A row gives items a second over `--seconds` after the first batches, and the longest wait for one. Before that
the first batch is compared with the items themselves.

Without --codes and --images the data are made: random codes of the pyramid, and 500 x 375 crops of the built-in
photographs as JPEG files (quality 90; ImageNet's images are mostly of that size). With --codes FOLDER the JSON also
says how many bits a code takes there, by entropy, as stored and with general compressors. On a GPU, "copy" has the
time of a training step's worth of kernels alone, with copies on the same stream, and with `to_device`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hmar.codes import CodesFolder, CodesIndex, RecordLayout, write_index, write_shard
from hmar.data import PHOTOGRAPHS, EpochSampler, ImageFolder, Photographs, leave_signals_to_the_main_process, to_device
from hmar.pyramid import SIDES_BY_RESOLUTION

from .environment import environment
from .options import add_record
from .results import rounded, write

KIND, VERSION = "loader", 1
WARM_UP = 4  # batches
STEP_MS = 20.0  # of kernels that a copy runs beside


def make_codes(root: Path, resolution: int, count: int) -> Path:
    """Uniformly random codes of a published pyramid; throughput does not depend on their values."""
    sides, vocab_size = SIDES_BY_RESOLUTION[resolution], 4096
    index = CodesIndex(
        sides=sides,
        vocab_size=vocab_size,
        tokenizer="none",
        images="none",
        source="random numbers",
        split="train",
        seed=0,
        num_images=count,
        crops=1,
        shard_size=4096,
        class_names=tuple(map(str, range(1000))),
    )
    root.mkdir()
    generator = np.random.default_rng(0)
    length = RecordLayout(sides, vocab_size).num_codes
    for shard in index.shards():
        codes_NL = generator.integers(0, vocab_size, (shard.count, length), dtype=np.int32)
        write_shard(root, index, shard, codes_NL, generator.integers(0, 1000, shard.count))
    write_index(root, index, complete=True)
    return root


def make_images(root: Path, count: int) -> Path:
    """JPEG files of 500 x 375 pixels cut from the built-in photographs, a folder for each."""
    photographs = Photographs(500, crops_per_photograph=-(-count // len(PHOTOGRAPHS)))
    for i in range(count):
        image_3HW, target = photographs[i]
        pixels_HW3 = image_3HW[:, :375].add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        path = root / photographs.class_names[target] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HW3).save(path, quality=90)
    return root


def batches(dataset: Dataset, batch_size: int, workers: int, device: torch.device) -> Iterator[tuple]:
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(len(dataset), seed=0),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
    )
    return to_device(loader, device)


def measure_loader(dataset: Dataset, batch_size: int, workers: int, device: torch.device, seconds: float) -> dict:
    """Items a second and the longest wait for a batch, after the first ones, checked."""
    loaded = batches(dataset, batch_size, workers, device)
    data, classes_B = next(loaded)
    for i, item in enumerate(itertools.islice(EpochSampler(len(dataset), seed=0), batch_size)):
        expected, target = dataset[item]
        if not torch.equal(data[i].cpu(), expected) or classes_B[i] != target:
            raise AssertionError(f"item {i} of the first batch is not {item} of the data set")
    for _ in range(WARM_UP + workers):
        next(loaded)
    waits, started = [], time.perf_counter()
    while not waits or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        next(loaded)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        waits.append(time.perf_counter() - before)
    return {
        "items_per_s": len(waits) * batch_size / (time.perf_counter() - started),
        "longest_wait_ms": 1e3 * max(waits),
        "batches": len(waits),
    }


def measure_copies(batch_size: int, length: int, rounds: int = 50) -> dict:
    """Milliseconds a step of about STEP_MS of kernels: alone, with the batch copied on its stream, and by to_device."""
    device = torch.device("cuda")
    cycles = int(STEP_MS * 1e-3 * torch.cuda.get_device_properties(device).clock_rate * 1e3)
    codes_BL = torch.randint(4096, (batch_size, length)).pin_memory()
    images_B3HW = torch.randn(batch_size, 3, 256, 256).pin_memory()

    def step_ms(steps: Iterable) -> float:
        # NOTE: _sleep counts clocks, of which an idle GPU makes fewer a second until it has been busy for a while.
        for _ in range(WARM_UP):
            torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in steps:
            torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / rounds

    found = {}
    for name, batch in (("codes", codes_BL), ("images", images_B3HW)):
        queue = [(batch,)] * rounds
        same_stream = (batch.to(device, non_blocking=True) for _ in range(rounds))
        found[name] = {
            "bytes": batch.nbytes,
            "alone_ms": step_ms(range(rounds)),
            "same_stream_ms": step_ms(same_stream),
            "to_device_ms": step_ms(to_device(queue, device)),
        }
    return found


def measure_storage(codes: CodesFolder, count: int) -> dict:
    """Bits that a code takes by various means, over the first `count` images."""
    codes_NL = torch.stack([item[0] for item in codes.__getitems__(range(min(count, len(codes))))]).numpy()
    frequencies = np.bincount(codes_NL.ravel()) / codes_NL.size
    frequencies = frequencies[frequencies > 0]
    words_NL = codes_NL.astype("<u2" if codes.index.vocab_size <= 1 << 16 else "<u4")
    deflated = sum(len(zlib.compress(record.tobytes(), 9)) for record in words_NL)
    return {
        "images": len(codes_NL),
        "codes_an_image": codes_NL.shape[1],
        "codes_used": len(frequencies),
        "entropy_bits": float(-(frequencies * np.log2(frequencies)).sum()),
        "stored_bits": 8 * codes.layout.code_bytes / codes_NL.shape[1],
        "lzma_of_all_bits": 8 * len(lzma.compress(words_NL.tobytes())) / codes_NL.size,
        "deflate_of_all_bits": 8 * len(zlib.compress(words_NL.tobytes(), 9)) / codes_NL.size,
        "deflate_of_each_image_bits": 8 * deflated / codes_NL.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=Path, help="folder that `hmar tokenize` wrote; default: random codes")
    parser.add_argument("--images", type=Path, help="folder in ImageNet layout; default: made of the photographs")
    parser.add_argument("--resolution", type=int, default=256, choices=sorted(SIDES_BY_RESOLUTION))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--count", type=int, default=100_000, help="images of random codes")
    parser.add_argument("--files", type=int, default=512, help="JPEG files to make")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_record(parser)
    args = parser.parse_args()
    device = torch.device(args.device)

    content = {"kind": KIND, "version": VERSION, "environment": environment(device, args.commit)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        codes = CodesFolder(args.codes or make_codes(root / "codes", args.resolution, args.count))
        images = ImageFolder(args.images or make_images(root / "images", args.files), args.resolution)
        for source, dataset in (("codes", codes), ("images", images)):
            for workers in args.workers:
                row = {"source": source, "codes_an_image": codes.layout.num_codes, "resolution": args.resolution}
                row |= {"batch": args.batch_size, "workers": workers, "cpus": os.cpu_count()}
                row |= measure_loader(dataset, args.batch_size, workers, device, args.seconds)
                rows.append(row)
                print(
                    f"{source:7}{workers:3} workers {row['items_per_s']:10,.0f} items/s, longest wait "
                    f"{row['longest_wait_ms']:.1f} ms",
                    flush=True,
                )
        if args.codes:
            content["storage"] = rounded({"source": codes.index.source, **measure_storage(codes, 4096)})
            print(json.dumps(content["storage"]))
        if device.type == "cuda":
            content["copy"] = rounded(measure_copies(args.batch_size, codes.layout.num_codes))
            print(json.dumps(content["copy"]))
    write(args.output, content, rows)


if __name__ == "__main__":
    main()
