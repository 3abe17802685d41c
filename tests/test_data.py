"""Data sets: what an item is, that it depends on (seed, epoch, index) alone, and what bad input says."""

import pickle
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hmar.data import (
    BrokenImageError,
    Digits,
    EpochSampler,
    ImageFolder,
    Photographs,
    digit_pixels,
    open_dataset,
    read_image,
    to_device,
)


def ramp(width, height, channels=3):
    """A picture in which red tells the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return pixels[..., 0] if channels == 1 else pixels


@pytest.fixture
def folder(tmp_path):
    """Two classes, three files each, in the suffixes and modes that occur in the wild."""
    root = tmp_path / "images"
    for name in ("n02", "n01"):
        (root / name).mkdir(parents=True)
    Image.fromarray(ramp(40, 30)).save(root / "n01" / "a.JPEG", quality=95)
    Image.fromarray(ramp(30, 60)).save(root / "n01" / "b.png")
    Image.fromarray(ramp(20, 20, channels=1)).save(root / "n01" / "c.bmp")
    for name in ("d.JPEG", "e.JPG", "f.jpeg"):
        Image.fromarray(ramp(64, 48)).save(root / "n02" / name, format="JPEG", quality=95)
    (root / "n02" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    return root


def damage(path):
    """Cut a file in the middle, as an interrupted download does."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


# --- image folders ----------------------------------------------------------------------------------------------------


def test_folder_classes_are_the_sorted_folder_names(folder):
    dataset = ImageFolder(folder, 16)
    assert dataset.class_names == ("n01", "n02") and dataset.num_classes == 2
    assert [dataset.path(i).name for i in range(len(dataset))] == [
        "a.JPEG",
        "b.png",
        "c.bmp",
        "d.JPEG",
        "e.JPG",
        "f.jpeg",
    ]
    assert [dataset[i][1] for i in range(len(dataset))] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("size", [8, 16, 50])
@pytest.mark.parametrize("crop", ["random", "center"])
def test_folder_items_are_square_float_images(folder, size, crop):
    for image, target in ImageFolder(folder, size, crop=crop):
        assert image.shape == (3, size, size) and image.dtype == torch.float32 and image.is_contiguous()
        assert image.min() >= -1 and image.max() <= 1 and image.std() > 0.01
        assert isinstance(target, int)


def test_centre_crop_follows_the_recipe(folder):
    """Shorter side to 1.125 x size with Lanczos, then the middle, written out with Pillow alone."""
    image, _ = ImageFolder(folder, 16, crop="center")[1]
    resized = Image.open(folder / "n01" / "b.png").resize((18, 36), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(resized.crop((1, 10, 17, 26)))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(image, expected)


def test_random_crops_reach_both_ends_and_do_not_flip(folder):
    dataset = ImageFolder(folder, 16)
    first_red = torch.stack([dataset[(epoch, 3)][0][0, 0] for epoch in range(100)])  # red tells the column
    assert (first_red.diff(dim=1) > -0.02).all()  # a flipped image would fall from left to right
    starts = first_red[:, 0]
    assert starts.min() < -0.9 and starts.max() > -0.35  # 24 columns: 8 of slack, a third of the ramp


def test_item_is_a_function_of_seed_epoch_and_index(folder):
    one, two = ImageFolder(folder, 16, seed=5), ImageFolder(folder, 16, seed=5)
    [two[i] for i in range(6)]  # reading other items first changes nothing
    assert torch.equal(one[(3, 4)][0], two[(3, 4)][0])
    crops = {one[(epoch, 4)][0].numpy().tobytes() for epoch in range(20)}
    other_seed = {ImageFolder(folder, 16, seed=6)[(epoch, 4)][0].numpy().tobytes() for epoch in range(20)}
    assert len(crops) > 3 and crops != other_seed
    assert torch.equal(one[4][0], one[(0, 4)][0]) and torch.equal(one[-1][0], one[5][0])
    with pytest.raises(IndexError, match="Item 6 of a data set of 6"):
        one[6]


def test_large_jpeg_is_the_same_picture_when_decoded_small(tmp_path):
    Image.fromarray(ramp(1600, 1200)).save(tmp_path / "large.jpg", quality=95)
    actual = np.array(read_image(tmp_path / "large.jpg", shorter_side=72), dtype=float)
    expected = np.array(Image.fromarray(ramp(1600, 1200)).resize((96, 72), Image.Resampling.LANCZOS), dtype=float)
    assert actual.shape == (72, 96, 3) and np.abs(actual - expected).max() < 6


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(tmp_path / "deep.png")
    assert abs(np.array(read_image(tmp_path / "deep.png")).mean() - 127.5) < 2


def test_camera_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    Image.fromarray(ramp(40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (30, 40)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "png"])
def test_broken_file_stops_with_its_name(folder, kind):
    path = folder / "n02" / "e.JPG"
    if kind == "cut":
        damage(path)
    elif kind == "png":
        path = damage(folder / "n01" / "b.png")
    else:
        path.write_bytes(b"" if kind == "empty" else b"<html>404</html>")
    dataset = ImageFolder(folder, 16)
    index = [dataset.path(i) for i in range(6)].index(path)
    with pytest.raises(BrokenImageError) as caught:
        dataset[index]
    assert str(path) in str(caught.value)
    dataset[(index + 1) % 6]  # the others still work


def test_broken_file_stops_a_loader_with_workers_with_its_name(folder):
    path = damage(folder / "n02" / "e.JPG")
    loader = DataLoader(ImageFolder(folder, 16), batch_size=3, num_workers=2)
    with pytest.raises(BrokenImageError, match=path.name):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_are_skipped_and_counted_when_asked(folder, num_workers):
    broken = [damage(folder / "n02" / "e.JPG"), damage(folder / "n02" / "f.jpeg")]
    dataset = ImageFolder(folder, 16, on_error="skip")
    loader = DataLoader(dataset, batch_size=3, sampler=range(6), num_workers=num_workers)
    for _ in range(2):  # the second pass meets them again and counts them once
        images, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert images.shape == (6, 3, 16, 16)
        assert targets.tolist() == [0, 0, 0, 1, 0, 0]  # the next readable file, from the start again after the last
    assert dataset.skipped == broken and dataset.broken == [4, 5]


def test_skipping_does_not_depend_on_what_was_read_before(folder):
    damage(folder / "n02" / "e.JPG")
    fresh, used = (ImageFolder(folder, 16, on_error="skip") for _ in range(2))
    [used[i] for i in range(6)]
    assert torch.equal(fresh[(1, 4)][0], used[(1, 4)][0])


def test_a_folder_of_broken_files_ends_with_an_error(folder):
    for path in folder.glob("n0*/*"):
        path.write_bytes(b"")
    with pytest.raises(BrokenImageError, match="None of the 6 image files"):
        ImageFolder(folder, 16, on_error="skip")[0]


def test_folder_errors_say_what_is_wrong(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; expected a folder with one sub-folder"):
        ImageFolder(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        ImageFolder(folder / "n01" / "a.JPEG", 16)
    with pytest.raises(ValueError, match=r"n01 has no sub-folders; expected one per class"):
        ImageFolder(folder / "n01", 16)
    (folder / "n03").mkdir()
    with pytest.raises(ValueError, match=r"n03 holds no image.*\.jpeg"):
        ImageFolder(folder, 16)
    with pytest.raises(ValueError, match="crop is 'middle'"):
        ImageFolder(folder, 16, crop="middle")
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        ImageFolder(folder, 16, on_error="ignore")
    with pytest.raises(ValueError, match=r"size is 0"):
        ImageFolder(folder, 0)


# --- built-in sets ----------------------------------------------------------------------------------------------------


def test_digit_splits_share_nothing_and_are_stratified():
    (train, train_targets), (test, test_targets) = digit_pixels("train"), digit_pixels("test")
    assert len(train) + len(test) == 1797 and train.shape[1:] == (8, 8)
    assert test_targets.bincount().min() >= 34 and test_targets.bincount().max() <= 36
    ids = torch.cat([train, test]).flatten(1)
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().images / 16).float().flatten(1)
    assert torch.equal(torch.unique(ids, dim=0), torch.unique(original, dim=0))
    assert torch.equal(digit_pixels("test")[0], test)
    assert train_targets.unique().tolist() == list(range(10))


@pytest.mark.parametrize("size", [4, 8, 20, 32])
def test_digits_at_any_size_are_the_digits(size):
    dataset = Digits(size, "test")
    image, target = dataset[7]
    assert image.shape == (3, size, size) and image.dtype == torch.float32
    assert dataset.num_classes == len(dataset.class_names) == 10 and target == int(dataset.targets_N[7])
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert -1 <= image.min() < -0.5 and 0.3 < image.max() <= 1
    if size > 8:
        small = torch.nn.functional.interpolate(image[None], (8, 8), mode="area")[0, 0]
        original = dataset.pixels_N88[7] * 2 - 1
        assert torch.corrcoef(torch.stack([small.flatten(), original.flatten()]))[0, 1] > 0.97
    if size == 8:
        torch.testing.assert_close(image[0], dataset.pixels_N88[7] * 2 - 1, atol=1 / 127, rtol=0)


def test_photographs_are_photographs():
    dataset = Photographs(24, crops_per_photograph=2)
    assert len(dataset) == 32 and dataset.num_classes == 16
    assert {"astronaut", "cat", "coffee", "rocket", "motorcycle", "palace", "flower"} <= set(dataset.class_names)
    items = [dataset[i] for i in range(32)]
    assert [target for _, target in items] == [*range(16), *range(16)]
    for image, _ in items:
        assert image.shape == (3, 24, 24) and image.dtype == torch.float32 and image.std() > 0.01
        assert image.min() >= -1 and image.max() <= 1
    colour = [(image[0] - image[2]).abs().mean() for image, _ in items]
    assert max(colour) > 0.3  # the astronaut's suit; a grey-only set would have 0


def test_photograph_crops_change_with_epoch_and_seed_only():
    dataset = Photographs(16, crops_per_photograph=2)
    assert torch.equal(dataset[(2, 5)][0], Photographs(16, crops_per_photograph=2)[(2, 5)][0])
    assert not torch.equal(dataset[(2, 5)][0], dataset[(3, 5)][0])
    assert not torch.equal(dataset[5][0], dataset[21][0])
    assert not torch.equal(dataset[5][0], Photographs(16, crops_per_photograph=2, seed=1)[5][0])
    held = Photographs(16, "test", crops_per_photograph=2)
    assert torch.equal(held[(0, 5)][0], held[(9, 5)][0]) and not torch.equal(held[5][0], dataset[5][0])


def test_photographs_are_enlarged_beyond_their_pixels():
    image, _ = Photographs(640, crops_per_photograph=1)[3]  # the cat is 300 pixels high
    assert image.shape == (3, 640, 640) and image.min() >= -1 and image.max() <= 1


def test_photograph_errors():
    with pytest.raises(ValueError, match="scale is"):
        Photographs(16, scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="crops_per_photograph is 0"):
        Photographs(16, crops_per_photograph=0)
    with pytest.raises(ValueError, match="split is 'validation'"):
        Photographs(16, "validation")


# --- by name ----------------------------------------------------------------------------------------------------------


def test_open_dataset(folder):
    assert len(open_dataset("digits", size=16, split="test")) == 355
    assert open_dataset("photographs", size=16, seed=3).seed == 3
    train, test = (open_dataset("folder", size=16, split=s, path=folder, on_error="skip") for s in ("train", "test"))
    assert (train.crop, test.crop, train.on_error) == ("random", "center", "skip")
    assert (train.random_crops, test.random_crops, Digits(8).random_crops) == (True, False, False)
    assert (Photographs(8).random_crops, Photographs(8, "test").random_crops) == (True, False)
    centre = open_dataset("folder", size=16, path=folder, crop="center")
    assert torch.equal(centre[2][0], test[2][0]) and not centre.random_crops
    with pytest.raises(ValueError, match=r"no data set 'cifar'. Known ones: digits, folder, photographs"):
        open_dataset("cifar", size=16)
    with pytest.raises(ValueError, match='"folder" needs a path'):
        open_dataset("folder", size=16)
    with pytest.raises(ValueError, match="built in and takes no path"):
        open_dataset("digits", size=16, path=folder)
    with pytest.raises(ValueError, match="'photographs' has crops of its own; crop=\"center\" is for folders"):
        open_dataset("photographs", size=16, crop="center")


def test_a_divided_folder_gives_each_split_its_own_files(folder, tmp_path):
    root = tmp_path / "divided"
    root.mkdir()
    folder.rename(root / "train")
    with pytest.raises(ValueError, match="no test or val folder"):
        open_dataset("folder", size=16, split="test", path=root)
    (root / "val" / "n01").mkdir(parents=True)
    Image.fromarray(ramp(20, 20)).save(root / "val" / "n01" / "x.png")
    assert len(open_dataset("folder", size=16, path=root)) == 6
    assert len(open_dataset("folder", size=16, split="test", path=root)) == 1


@pytest.fixture
def divided(folder, tmp_path):
    """train and val with the classes n01 and n02."""
    root = tmp_path / "divided"
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "val")
    return root


def test_folders_beside_splits_do_not_become_classes(divided):
    for name in ("annotations", "meta"):
        (divided / name).mkdir()
        Image.fromarray(ramp(20, 20)).save(divided / name / "x.png")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=r"train, val beside annotations, meta, .*move annotations, meta .*/train"):
            open_dataset("folder", size=16, split=split, path=divided)
    assert open_dataset("folder", size=16, path=divided / "train").class_names == ("n01", "n02")


def test_a_class_may_be_called_train(folder):
    (folder / "n01").rename(folder / "train")
    dataset = open_dataset("folder", size=16, path=folder)
    assert dataset.class_names == ("n02", "train") and len(dataset) == 6


def test_a_test_folder_without_classes_gives_way_to_val(divided):
    (divided / "test").mkdir()
    held_out = divided / "test" / "ILSVRC2012_test_00000001.png"
    Image.fromarray(ramp(20, 20)).save(held_out)
    assert open_dataset("folder", size=16, split="test", path=divided).root == divided / "val"
    (divided / "test" / "empty").mkdir()
    assert open_dataset("folder", size=16, split="test", path=divided).root == divided / "val"
    (divided / "test" / "n01").mkdir()
    held_out.rename(divided / "test" / "n01" / "x.png")
    (divided / "test" / "empty").rmdir()
    assert open_dataset("folder", size=16, split="test", path=divided).root == divided / "test"
    shutil.rmtree(divided / "val")
    (divided / "test" / "n01" / "x.png").unlink()
    with pytest.raises(ValueError, match=r"has test, but without a sub-folder of images per class, .*test/class"):
        open_dataset("folder", size=16, split="test", path=divided)


# --- order ------------------------------------------------------------------------------------------------------------


def test_sampler_visits_everything_once_an_epoch_in_new_order():
    pairs = list(islice(EpochSampler(10, seed=1), 30))
    for epoch in range(3):
        epochs, indices = zip(*pairs[10 * epoch : 10 * epoch + 10], strict=True)
        assert set(epochs) == {epoch} and sorted(indices) == list(range(10))
    assert len({tuple(i for _, i in pairs[a : a + 10]) for a in (0, 10, 20)}) == 3
    assert pairs == list(islice(EpochSampler(10, seed=1), 30)) != list(islice(EpochSampler(10, seed=2), 30))


@pytest.mark.parametrize("start", [0, 3, 9, 10, 11, 25])
def test_sampler_resumes_anywhere(start):
    pairs = list(islice(EpochSampler(10, seed=1), 40))
    assert list(islice(EpochSampler(10, seed=1, start=start), 40 - start)) == pairs[start:]


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_share_every_global_batch(start, world_size):
    """The r-th slice of each batch of 6, in the order of one process; epochs of 10 end inside of batches."""
    whole = list(islice(EpochSampler(10, seed=1, start=start), 60))
    share = 6 // world_size
    for rank in range(world_size):
        sampler = EpochSampler(10, seed=1, start=start, rank=rank, world_size=world_size, batch_size=6)
        got = list(islice(sampler, 10 * share))
        for batch in range(10):
            expected = whole[6 * batch : 6 * batch + 6][rank * share : (rank + 1) * share]
            assert got[batch * share : (batch + 1) * share] == expected


def test_a_run_goes_on_with_another_number_of_processes():
    def batches(start, world_size, count):
        shares = {"world_size": world_size, "batch_size": 4}
        processes = [iter(EpochSampler(10, 1, start, rank=rank, **shares)) for rank in range(world_size)]
        return [[item for process in processes for item in islice(process, 4 // world_size)] for _ in range(count)]

    assert batches(0, 1, 9) == batches(0, 2, 3) + batches(12, 4, 3) + batches(24, 1, 3)


def test_sampler_errors():
    for wrong in ({"length": 0}, {"length": 3, "start": -1}, {"length": 3, "seed": -1}):
        with pytest.raises(ValueError):
            EpochSampler(**wrong)
    with pytest.raises(ValueError, match="rank is 2 of 2 processes; it must be from 0 to 1"):
        EpochSampler(3, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size is 7, which 2 processes cannot share equally; 6 would do"):
        EpochSampler(3, world_size=2, batch_size=7)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_continues_bit_by_bit(folder, num_workers):
    """Batches 2 and 3 of an uninterrupted run equal the first two of a run that starts after batch 1."""

    def batches(start, count):
        dataset = ImageFolder(folder, 16, seed=2)
        sampler = EpochSampler(len(dataset), seed=2, start=start)
        return list(islice(DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=num_workers), count))

    whole, resumed = batches(0, 4), batches(8, 2)
    for (expected_images, expected_targets), (images, targets) in zip(whole[2:], resumed, strict=True):
        assert torch.equal(images, expected_images) and torch.equal(targets, expected_targets)
    assert not torch.equal(whole[0][0], whole[1][0])


def test_datasets_can_be_sent_to_spawned_workers(folder):
    for dataset in (Digits(8), Photographs(8, crops_per_photograph=1)):
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[(1, 3)][0], dataset[(1, 3)][0])
    damage(folder / "n02" / "e.JPG")
    dataset = ImageFolder(folder, 16, on_error="skip")
    loader = DataLoader(dataset, batch_size=6, num_workers=1, multiprocessing_context="spawn")
    images, _ = next(iter(loader))
    assert len(images) == 6 and len(dataset.skipped) == 1


# --- to the device ----------------------------------------------------------------------------------------------------


def test_batches_stay_as_they_are_on_the_cpu():
    batches = [(torch.arange(3), torch.ones(2)), (torch.zeros(1), torch.ones(1))]
    moved = list(to_device(batches, torch.device("cpu")))
    assert [[id(tensor) for tensor in batch] for batch in moved] == [[id(tensor) for tensor in b] for b in batches]


@pytest.mark.gpu
def test_batches_are_copied_while_the_caller_computes():
    """Every batch is right though its memory is used again, and copies do not wait for kernels queued before them."""
    device = torch.device("cuda")
    batches = [(torch.full((1 << 22,), float(i)).pin_memory(), torch.tensor([i]).pin_memory()) for i in range(16)]
    sums = []
    for batch, targets in to_device(batches, device):
        assert batch.device.type == targets.device.type == "cuda"
        torch.cuda._sleep(2_000_000)
        sums.append(batch.double().mean() + targets[0])
        del batch, targets
    assert torch.stack(sums).tolist() == [2.0 * i for i in range(16)]

    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # a quarter of a second or more
    kernels = torch.cuda.Event()
    kernels.record()
    copies = to_device(batches[:1], device)
    with torch.cuda.stream(torch.cuda.Stream()):
        batch, _ = next(copies)
        torch.cuda.current_stream().synchronize()
    assert not kernels.query()
    assert batch[-1].item() == 0.0
