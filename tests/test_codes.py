"""Files of codes: bytes and back, which crop an epoch sees, and what happens to a folder that is damaged."""

import json
import os
import pickle
import resource
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hmar.codes import (
    INDEX,
    CodesFolder,
    CodesIndex,
    DamagedShardError,
    RecordLayout,
    find_damage,
    read_index,
    read_shard,
    tokenizer_fingerprint,
    write_index,
    write_shard,
)
from hmar.config import PRESETS
from hmar.data import without_traceback
from hmar.pyramid import SIDES_BY_RESOLUTION, Pyramid
from hmar.tokenizer import Tokenizer

SIDES, VOCAB_SIZE = (1, 2, 3), 1000  # 14 codes of 10 bits: records do not end at a byte
INDEX_OF_TEN = CodesIndex(
    sides=SIDES,
    vocab_size=VOCAB_SIZE,
    tokenizer="t" * 64,
    images="i" * 64,
    source="somewhere",
    split="train",
    seed=3,
    num_images=10,
    crops=3,
    shard_size=4,
    class_names=("ant", "bee"),
)


def drawn(index, crop):
    """The codes [N, L] and classes [N] that `folder` holds for one crop."""
    generator = np.random.default_rng(crop)
    codes_NL = generator.integers(0, index.vocab_size, (index.num_images, Pyramid(index.sides).length))
    return codes_NL, np.arange(index.num_images) % len(index.class_names)


def write(root, index):
    for shard in index.shards():
        codes_NL, classes_N = drawn(index, shard.crop)
        held = slice(shard.first, shard.first + shard.count)
        write_shard(root, index, shard, codes_NL[held], classes_N[held], broken=[shard.first] if shard.first else [])
    write_index(root, index, complete=True)
    return root


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "codes").mkdir()
    return write(tmp_path / "codes", INDEX_OF_TEN)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    return path


def assert_items(dataset, items, expected):
    """`expected` is (crop, image) of each item."""
    for item, (crop, image) in zip(items, expected, strict=True):
        codes_NL, classes_N = drawn(dataset.index, crop)
        codes_L, target = dataset[item]
        assert codes_L.dtype == torch.int64 and codes_L.tolist() == codes_NL[image].tolist()
        assert target == classes_N[image] and isinstance(target, int)


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 32, 128, 257, 1000, 4096, 4097, 2**16, 2**17])
def test_records_are_the_codes_in_as_few_bits_as_they_need(vocab_size):
    layout = RecordLayout(SIDES, vocab_size)
    generator = np.random.default_rng(0)
    codes_NL = generator.integers(0, vocab_size, (5, 14))
    codes_NL[0], codes_NL[1] = vocab_size - 1, 0
    classes_N = np.array([0, 1, 999, 2**31, 2**32 - 1])
    records_N = layout.pack(codes_NL, classes_N)
    bits = max(1, (vocab_size - 1).bit_length())
    for record, codes, target in zip(records_N, codes_NL.tolist(), classes_N.tolist(), strict=True):
        number = sum(code << bits * position for position, code in enumerate(codes))
        assert record.tobytes() == number.to_bytes(-(-14 * bits // 8), "little") + target.to_bytes(4, "little")
    codes, classes = layout.unpack(records_N)
    assert codes.dtype == classes.dtype == np.int64
    assert np.array_equal(codes, codes_NL) and np.array_equal(classes, classes_N)


def test_published_sizes():
    assert [RecordLayout(sides, 4096).num_bytes for sides in SIDES_BY_RESOLUTION.values()] == [1024, 3364, 14181]
    with pytest.raises(ValueError, match="vocab_size is 131073; codes are stored for up to 131072"):
        RecordLayout(SIDES, 2**17 + 1)


# --- items ------------------------------------------------------------------------------------------------------------


def test_an_epoch_has_the_next_crop_of_every_image(folder):
    dataset = CodesFolder(folder)
    assert len(dataset) == 10 and dataset.class_names == ("ant", "bee") and dataset.num_classes == 2
    for epoch in range(7):
        assert_items(dataset, [(epoch, i) for i in range(10)], [(epoch % 3, i) for i in range(10)])
    assert_items(dataset, [7, -1, (1, -1)], [(0, 7), (0, 9), (1, 9)])
    with pytest.raises(IndexError, match="Item 10 of a data set of 10"):
        dataset[10]
    assert dataset.skipped == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loaders_give_the_same_batches(folder, num_workers, context):
    items = [(epoch, i) for epoch in range(4) for i in (3, 9, 0, 5, 2)]
    context = context if num_workers else None
    loader = DataLoader(
        CodesFolder(folder), batch_size=8, sampler=items, num_workers=num_workers, multiprocessing_context=context
    )
    codes_BL, classes_B = (torch.cat(parts) for parts in zip(*loader, strict=True))
    expected = CodesFolder(folder)
    assert codes_BL.shape == (20, 14) and codes_BL.dtype == torch.int64
    for item, codes_L, target in zip(items, codes_BL, classes_B.tolist(), strict=True):
        assert torch.equal(codes_L, expected[item][0]) and target == expected[item][1]


def test_a_dataset_that_was_read_can_be_pickled(folder):
    dataset = CodesFolder(folder)
    before = dataset[(1, 4)][0]
    content = pickle.dumps(dataset)
    assert len(content) < 3000 and torch.equal(pickle.loads(content)[(1, 4)][0], before)


def test_more_shards_than_a_process_may_have_open_files(tmp_path):
    index = replace(INDEX_OF_TEN, num_images=100, crops=2, shard_size=1)
    write(tmp_path, index)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        dataset = CodesFolder(tmp_path)
        assert_items(dataset, [(1, i) for i in range(100)], [(1, i) for i in range(100)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- damage -----------------------------------------------------------------------------------------------------------


def header_bytes(path):
    return int.from_bytes(path.read_bytes()[40:44], "little")


def other_set(path):
    """A whole shard, but of another seed."""
    index = replace(INDEX_OF_TEN, seed=4)
    shard = next(shard for shard in index.shards() if shard.name == path.name)
    write_shard(path.parent, index, shard, drawn(index, 0)[0][: shard.count], np.zeros(shard.count, int))


DAMAGE = {
    "magic": lambda path: flip(path, 0),
    "checksum": lambda path: flip(path, 8),
    "header's length": lambda path: flip(path, 41),
    "header": lambda path: flip(path, 60),
    "first record": lambda path: flip(path, 44 + header_bytes(path)),
    "last byte": lambda path: flip(path, -1),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "of another set": other_set,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named_and_refused_or_passed_over(folder, kind):
    path = folder / "crop001-00001.codes"  # images 4 to 7
    DAMAGE[kind](path)
    with pytest.raises(DamagedShardError, match=r"crop001-00001\.codes .*hmar tokenize --output"):
        CodesFolder(folder)[(1, 5)]
    assert [str(path) in problem for problem in find_damage(folder)] == [True]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = CodesFolder(folder, on_error="skip")
        assert_items(dataset, [(1, 5), (4, 7), (1, 3), (2, 5)], [(2, 5), (2, 7), (1, 3), (2, 5)])
    assert len(caught) == 1 and str(path) in str(caught[0].message) and "passed over" in str(caught[0].message)
    assert dataset.skipped == [(1, 4), (1, 5), (1, 6), (1, 7)]


def test_where_all_crops_of_an_image_are_damaged_another_image_stands_in(folder):
    for crop in range(3):
        flip(folder / f"crop{crop:03d}-00000.codes", -1)
    with pytest.warns(UserWarning, match="passed over"):
        dataset = CodesFolder(folder, on_error="skip")
        assert_items(dataset, [(1, 2)], [(1, 6)])
    flip(folder / "crop001-00001.codes", -1)
    with pytest.warns(UserWarning, match="passed over"):
        dataset = CodesFolder(folder, on_error="skip")
        assert_items(dataset, [(1, 2)], [(2, 6)])
    for path in folder.glob("*-0000[12].codes"):
        path.write_bytes(b"")
    with pytest.raises(DamagedShardError, match="none of the 9 shards"), pytest.warns(UserWarning):
        CodesFolder(folder, on_error="skip")[0]


def test_the_last_shard_is_shorter_and_stands_in_all_the_same(folder):
    for path in folder.glob("*-0000[01].codes"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"):
        dataset = CodesFolder(folder, on_error="skip")
        assert_items(dataset, [0, 1, 2, 3], [(0, 8), (0, 9), (0, 8), (0, 9)])


def test_workers_tell_of_damage_in_one_sentence(folder):
    flip(folder / "crop000-00001.codes", -1)
    with pytest.raises(DamagedShardError) as caught:
        list(DataLoader(CodesFolder(folder), batch_size=2, num_workers=1))
    message = str(without_traceback(caught.value))
    assert message.startswith(str(folder / "crop000-00001.codes")) and "\n" not in message
    dataset = CodesFolder(folder, on_error="skip")
    list(DataLoader(dataset, batch_size=2, num_workers=2))
    assert [sample[1] for sample in dataset.skipped] == [4, 5, 6, 7]


def test_broken_images_are_kept_with_the_shard(folder):
    assert [read_shard(folder, INDEX_OF_TEN, shard)[1] for shard in INDEX_OF_TEN.shards()[:3]] == [[], [4], [8]]


# --- the index --------------------------------------------------------------------------------------------------------


def test_index_survives_a_round_trip_and_lists_the_shards(folder):
    assert read_index(folder) == INDEX_OF_TEN
    content = json.loads((folder / INDEX).read_text())
    assert content["complete"] and sorted(content["shards"]) == sorted(path.name for path in folder.glob("*.codes"))
    changes = {"seed": 4, "crops": 2, "images": "other", "tokenizer": "other", "num_images": 9}
    for name, value in changes.items():
        assert replace(INDEX_OF_TEN, **{name: value}).fingerprint() != INDEX_OF_TEN.fingerprint()
    assert replace(INDEX_OF_TEN, source="moved").fingerprint() == INDEX_OF_TEN.fingerprint()


def test_a_set_that_is_not_complete_is_refused(folder):
    write_index(folder, INDEX_OF_TEN, complete=False)
    with pytest.raises(ValueError, match=r"are not complete: the `hmar tokenize --output .*codes`"):
        CodesFolder(folder)
    assert read_index(folder, incomplete=True) == INDEX_OF_TEN


def test_index_errors(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no codes: expected a folder with codes\.json"):
        CodesFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match='on_error is \'ignore\'; it must be "raise" or "skip"'):
        CodesFolder(folder, on_error="ignore")
    content = json.loads((folder / INDEX).read_text())
    for wrong, message in (
        ("{", "cannot read"),
        ("[]", "is not the index of a folder of codes"),
        (json.dumps(content | {"version": 2}), "is of version 2; this program reads version 1"),
        (json.dumps(content | {"crops": "three"}), "crops: expected a whole number, got 'three'"),
        (json.dumps(content | {"shard_size": 0}), "shard_size is 0; it must be at least 1"),
    ):
        (folder / INDEX).write_text(wrong)
        with pytest.raises(ValueError, match=message):
            CodesFolder(folder)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(PRESETS["tiny"][0], PRESETS["tiny"][1].pyramid)


def test_fingerprint_is_of_what_decides_the_codes(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tokenizer) == before
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias += 1
    assert tokenizer_fingerprint(tokenizer) == before
    for tensor in (
        tokenizer.encoder.conv_in.bias,
        tokenizer.quant_conv.bias,
        tokenizer.quantizer.codebook.weight,
        next(tokenizer.quantizer.phis.parameters()),
    ):
        with torch.no_grad():
            tensor += 1
        after = tokenizer_fingerprint(tokenizer)
        assert after != before
        before = after
    other = Tokenizer(tokenizer.config, Pyramid((1, 3, 4)))
    other.load_state_dict(tokenizer.state_dict())
    assert tokenizer_fingerprint(other) != before
    other = Tokenizer(replace(tokenizer.config, norm_groups=2), tokenizer.pyramid)
    other.load_state_dict(tokenizer.state_dict())
    assert tokenizer_fingerprint(other) != before


def test_codes_of_another_tokenizer_are_refused(tmp_path, tokenizer):
    index = replace(
        INDEX_OF_TEN,
        sides=tokenizer.pyramid.sides,
        vocab_size=tokenizer.config.vocab_size,
        tokenizer=tokenizer_fingerprint(tokenizer),
    )
    write(tmp_path, index)
    CodesFolder(tmp_path).check_tokenizer(tokenizer)
    with torch.no_grad():
        tokenizer.quant_conv.bias += 1
    with pytest.raises(ValueError, match=r"of another tokenizer: fingerprint .*as tokenizer_weights"):
        CodesFolder(tmp_path).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=r"of another tokenizer: sides \(1, 2, 4\), expected \(1, 4\)"):
        CodesFolder(tmp_path).check_tokenizer(Tokenizer(tokenizer.config, Pyramid((1, 4))))
