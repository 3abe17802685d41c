"""Files of codes: what `hmar tokenize` writes once and training reads instead of images.

A folder holds `codes.json` (the index: a `CodesIndex`, the list of shards, whether they are all there) and shards of up
to `shard_size` images. A shard has the codes of one crop of neighbouring images of the set; crops come one after
another, so that an epoch, which takes crop `epoch % crops` of every image, reads neighbouring files only, and crops can
be added later. After as many epochs every crop was used once, and if the seed is the training's, these epochs see the
very crops that training on the images would have seen.

A shard, little-endian:

    8 bytes    "HMARCODE"
    32 bytes   SHA-256 of everything behind it
    4 bytes    length of the header
    header     JSON: format version, sides, vocab_size, fingerprints of tokenizer and image set, seed, crop, first
               image, count, broken images
    records    `count` of equal size: L codes of ceil(log2 vocab_size) bits, the first in the lowest bits, padded to
               bytes; then the class in 4 bytes

Shards are written whole or not at all and mapped into memory: any sample is one short copy. Each is checked when a
process first uses it, so an epoch of another crop begins by reading that crop once, which the samples then come from.
Whole bits are near what compression gives: of a tokenizer with 4096 codes, trained on photographs, a code has 10.1 bits
of entropy and takes 12 here, 10.2 by LZMA over a whole set, 13.7 by deflate over each image, which is as much as random
access allows (reports/data/loader_cpu.json).

Read next: tokenize.py, which writes them; stages.py, which trains on them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hmar.checkpoint import replacing
from hmar.data import BrokenImageError, epoch_and_index
from hmar.pyramid import Pyramid
from hmar.recipe import structure, unstructure
from hmar.tokenizer import Tokenizer

FORMAT, VERSION = "hmar codes", 1
INDEX = "codes.json"
MAGIC = b"HMARCODE"
PREFIX_BYTES = len(MAGIC) + 32 + 4
CLASS_BYTES = 4
MAX_BITS = 17  # a code and the up to 7 bits before it lie within 3 bytes


class DamagedShardError(BrokenImageError):
    """A shard that is missing, cut short, altered or of another set; the message names it."""


class Shard(NamedTuple):
    """Which images a file holds the codes of: `count` from `first` on, seen through one crop."""

    crop: int
    first: int
    count: int
    name: str


@dataclass(frozen=True)
class CodesIndex:
    """What a folder of codes was made of.

    sides, vocab_size  of the tokenizer; a code is below vocab_size
    tokenizer, images  fingerprints (`tokenizer_fingerprint`; `fingerprint()` of the data set)
    source, split      the data set by name or folder, for the reader
    seed               decided the random crops; crop i is what epoch i of training on the images would have seen
    num_images, crops  the set has num_images x crops samples
    """

    sides: tuple[int, ...]
    vocab_size: int
    tokenizer: str
    images: str
    source: str
    split: str
    seed: int
    num_images: int
    crops: int
    shard_size: int
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("num_images", "crops", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the samples, to tell whether two folders hold the same ones."""
        names = ("tokenizer", "images", "seed", "num_images", "crops")
        return hashlib.sha256(json.dumps([getattr(self, name) for name in names]).encode()).hexdigest()

    @property
    def shards_per_crop(self) -> int:
        return -(-self.num_images // self.shard_size)

    def shards(self) -> list[Shard]:
        """All shards, crop by crop."""
        return [
            Shard(crop, first, min(self.shard_size, self.num_images - first), f"crop{crop:03d}-{number:05d}.codes")
            for crop in range(self.crops)
            for number, first in enumerate(range(0, self.num_images, self.shard_size))
        ]

    def header(self, shard: Shard) -> dict[str, Any]:
        """What the shard must say of itself."""
        return {
            "version": VERSION,
            "sides": list(self.sides),
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer,
            "images": self.images,
            "seed": self.seed,
            "crop": shard.crop,
            "first": shard.first,
            "count": shard.count,
        }


class RecordLayout:
    """How the codes [L] and the class of an image become bytes, and back.

    Raises ValueError for a vocabulary of more than 2**17 codes.
    """

    def __init__(self, sides: Sequence[int], vocab_size: int):
        self.num_codes = Pyramid(tuple(sides)).length
        self.bits = max(1, (vocab_size - 1).bit_length())
        if self.bits > MAX_BITS:
            raise ValueError(f"vocab_size is {vocab_size}; codes are stored for up to {2**MAX_BITS}")
        self.code_bytes = -(-self.num_codes * self.bits // 8)
        self.num_bytes = self.code_bytes + CLASS_BYTES
        self.word_bytes = -(-(self.bits + 7) // 8)  # that a code may lie in
        starts_L = np.arange(self.num_codes) * self.bits
        self.first_byte_L, self.shift_L = starts_L // 8, (starts_L % 8).astype(np.int32)

    def pack(self, codes_NL: np.ndarray, classes_N: np.ndarray) -> np.ndarray:
        """Records uint8 [N, num_bytes] of integer codes and classes."""
        groups = -(-self.num_codes // 8)  # of 8 codes, which take `bits` whole bytes
        packed_N = np.zeros((len(codes_NL), groups * self.bits + self.word_bytes - 1), np.uint8)
        for phase in range(min(8, self.num_codes)):
            words_N = codes_NL[:, phase::8].astype(np.uint32) << self.shift_L[phase]
            for byte in range(self.word_bytes):
                target_N = packed_N[:, self.first_byte_L[phase] + byte :: self.bits][:, : words_N.shape[1]]
                target_N |= (words_N >> 8 * byte).astype(np.uint8)
        class_bytes_N = classes_N.astype("<u4").view(np.uint8).reshape(-1, CLASS_BYTES)
        return np.concatenate([packed_N[:, : self.code_bytes], class_bytes_N], axis=1)

    def unpack(self, records_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes int64 [N, L] and classes int64 [N] of records uint8 [N, num_bytes]."""
        # NOTE: the last codes may read bytes of the class, whose bits fall to the mask.
        words_NL = records_N[:, self.first_byte_L].astype(np.int32)
        for byte in range(1, self.word_bytes):
            words_NL |= records_N[:, self.first_byte_L + byte].astype(np.int32) << 8 * byte
        codes_NL = (words_NL >> self.shift_L & (1 << self.bits) - 1).astype(np.int64)
        classes_N = np.ascontiguousarray(records_N[:, self.code_bytes :]).view("<u4")[:, 0]
        return codes_NL, classes_N.astype(np.int64)


class CodesFolder(Dataset):
    """The codes in a folder as a data set: items are (codes int64 [L], class), those of (epoch, index) from crop
    `epoch % crops` of image `index`.

    A shard is checked when it is first used. One that is damaged raises DamagedShardError; with on_error="skip" it is
    named in a warning, and the codes of another crop of the same images, or of other images, take the place of its
    own: always the same ones. `skipped` lists the samples met so far to which that happens, also those that loader
    workers have met. Raises ValueError where there is no complete set of codes.
    """

    def __init__(self, root: str | Path, on_error: str = "raise"):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error is {on_error!r}; it must be "raise" or "skip".')
        self.root, self.on_error = Path(root), on_error
        self.index = read_index(self.root)
        self.layout = RecordLayout(self.index.sides, self.index.vocab_size)
        self.shards = self.index.shards()
        self._records: dict[int, np.ndarray] = {}
        self._damaged = torch.zeros(len(self.shards), dtype=torch.uint8).share_memory_()  # written by the workers too
        present = set(os.listdir(self.root))
        for number, shard in enumerate(self.shards):
            if shard.name not in present:
                self._pass_over(number, DamagedShardError(f"{self.root / shard.name} is missing: {_remedy(self.root)}"))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """(crop, image) of every sample of a damaged shard."""
        damaged = (self.shards[number] for number in self._damaged.nonzero().flatten().tolist())
        return [(shard.crop, shard.first + offset) for shard in damaged for offset in range(shard.count)]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """ValueError unless this tokenizer gave these codes."""
        for name, got, expected in (
            ("sides", self.index.sides, tokenizer.pyramid.sides),
            ("vocab_size", self.index.vocab_size, tokenizer.config.vocab_size),
            ("fingerprint", self.index.tokenizer, tokenizer_fingerprint(tokenizer)),
        ):
            if got != expected:
                raise ValueError(
                    f"the codes in {self.root} are of another tokenizer: {name} {got}, expected {expected}. Make codes "
                    "of this one by `hmar tokenize`, or give the tokenizer that they are of as tokenizer_weights"
                )

    def __len__(self) -> int:
        return self.index.num_images

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, int]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """Several items at once, which is what a DataLoader asks for; their codes are unpacked together."""
        records_N = np.empty((len(items), self.layout.num_bytes), np.uint8)
        for record, item in zip(records_N, items, strict=True):
            record[:] = self._record(*epoch_and_index(item, len(self)))
        codes_NL, classes_N = self.layout.unpack(records_N)
        return list(zip(torch.from_numpy(codes_NL), classes_N.tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": {}}

    def _record(self, epoch: int, index: int) -> np.ndarray:
        row, offset = divmod(index, self.index.shard_size)
        for number in self._candidates(epoch % self.index.crops, row):
            records = self._open(number)
            if records is not None:
                return records[offset % len(records)]
        raise DamagedShardError(f"none of the {len(self.shards)} shards in {self.root} is whole: {_remedy(self.root)}")

    def _candidates(self, crop: int, row: int) -> Iterator[int]:
        """The shard asked for, then those that may stand in: other crops of the same images first."""
        crops, rows = self.index.crops, self.index.shards_per_crop
        for next_row in range(rows):
            for next_crop in range(crops):
                yield (crop + next_crop) % crops * rows + (row + next_row) % rows

    def _open(self, number: int) -> np.ndarray | None:
        """The records of a shard, None if it is damaged."""
        if self._damaged[number]:
            return None
        if number not in self._records:
            try:
                self._records[number] = read_shard(self.root, self.index, self.shards[number])[0]
            except DamagedShardError as error:
                self._pass_over(number, error)
                return None
        return self._records[number]

    def _pass_over(self, number: int, error: DamagedShardError) -> None:
        if self.on_error == "raise":
            raise error
        self._damaged[number] = 1
        warnings.warn(f"{error}; passed over", stacklevel=2)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides the codes of an image: weights of encoder and quantizer, sides, groups of the norms.

    The decoder takes no part, nor does the file that the weights came from.
    """
    digest = hashlib.sha256(json.dumps([tokenizer.pyramid.sides, tokenizer.config.norm_groups]).encode())
    for name, tensor in tokenizer.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.", "quantizer.")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_index(root: Path, index: CodesIndex, *, complete: bool, broken: Sequence[str] = ()) -> None:
    """Write codes.json. `broken` names images that could not be read and were replaced by others."""
    content = {"format": FORMAT, "version": VERSION, "complete": complete, **unstructure(index)}
    content |= {"broken": list(broken), "shards": [shard.name for shard in index.shards()]}
    with replacing(root / INDEX) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_index(root: str | Path, *, incomplete: bool = False) -> CodesIndex:
    """The index of a folder of codes. ValueError if there is none, or if shards are still to be written (unless
    `incomplete` allows that)."""
    content = read_index_file(root)
    if not content["complete"] and not incomplete:
        raise ValueError(f"the codes in {root} are not complete: {_remedy(root)}")
    known = {field.name: content.get(field.name) for field in dataclasses.fields(CodesIndex)}
    try:
        return structure(known, CodesIndex)
    except ValueError as error:
        raise ValueError(f"{Path(root) / INDEX}: {error}") from None


def read_index_file(root: str | Path) -> dict[str, Any]:
    """codes.json as it is: the fields of CodesIndex, "complete", "broken" and "shards"."""
    path = Path(root) / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{root} holds no codes: expected a folder with {INDEX}, which `hmar tokenize --output {root}` writes"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "complete" not in content:
        raise ValueError(f"{path} is not the index of a folder of codes")
    if content.get("version") != VERSION:
        raise ValueError(f"{path} is of version {content.get('version')}; this program reads version {VERSION}")
    return content


def write_shard(
    root: Path, index: CodesIndex, shard: Shard, codes_NL: np.ndarray, classes_N: np.ndarray, broken: Sequence[int] = ()
) -> None:
    """Write a shard, whole or not at all. OSError if the disk is full; what was there before stays."""
    assert codes_NL.shape == (shard.count, RecordLayout(index.sides, index.vocab_size).num_codes)
    header = json.dumps(index.header(shard) | {"broken": list(broken)}).encode()
    records_N = RecordLayout(index.sides, index.vocab_size).pack(codes_NL, classes_N)
    content = len(header).to_bytes(4, "little") + header + records_N.tobytes()
    with replacing(root / shard.name) as temporary:
        temporary.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)


def read_shard(root: Path, index: CodesIndex, shard: Shard) -> tuple[np.ndarray, list[int]]:
    """The records uint8 [count, bytes] of a shard, mapped into memory, and the broken images, after checking all of it.

    Raises DamagedShardError.
    """
    path = root / shard.name
    try:
        # NOTE: numpy's and Python's maps keep the file open, and a set of codes has more shards than a process may
        # have open files.
        content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    except FileNotFoundError:
        raise DamagedShardError(f"{path} is missing: {_remedy(root)}") from None
    except (OSError, RuntimeError) as error:
        raise DamagedShardError(f"{path} cannot be read: {error}") from error
    magic, checksum = content[: len(MAGIC)].tobytes(), content[len(MAGIC) : PREFIX_BYTES - 4].tobytes()
    if magic != MAGIC or hashlib.sha256(content[PREFIX_BYTES - 4 :]).digest() != checksum:
        raise DamagedShardError(f"{path} is damaged, its checksum does not fit: {_remedy(root)}")
    start = PREFIX_BYTES + int.from_bytes(content[PREFIX_BYTES - 4 : PREFIX_BYTES].tobytes(), "little")
    header = json.loads(content[PREFIX_BYTES:start].tobytes())
    broken = header.pop("broken")
    if header != index.header(shard):
        raise DamagedShardError(f"{path} belongs to other codes than {root / INDEX}: {_remedy(root)}")
    return content[start:].reshape(shard.count, -1), broken


def find_damage(root: str | Path) -> list[str]:
    """Check every shard of a folder of codes; one sentence for each that is missing or damaged."""
    index, problems = read_index(root, incomplete=True), []
    for shard in index.shards():
        try:
            read_shard(Path(root), index, shard)
        except DamagedShardError as error:
            problems.append(str(error))
    return problems


def _remedy(root: str | Path) -> str:
    return f"the `hmar tokenize --output {root}` that began them, run again, writes what is missing or damaged"
