"""Data sets: what is in the splits, what augmentation does to an image, which folders are refused in which words."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from compressor import _utils as pictures
from compressor.errors import DataError, InputError, RangeError, UnknownNameError
from compressor.training.data import folder
from compressor.training.data import images as on_disk
from compressor.training.data import sources as data
from compressor.training.data.augmentation import Augmentation
from compressor.training.data.cached import Cached
from compressor.training.data.images import OnDisk, Resident
from compressor.training.data.sources import Data, load_data
from compressor.training.data.splits import Split

CLASSES = ("ant", "bee")


def paint(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> np.ndarray[Any, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def make_folder(root: Path, splits: tuple[str, ...] = ("train", "test"), each: int = 4, **options: Any) -> Path:
    """Write `each` images for every split and class; their seeds count up in the order of the splits."""
    seeds = itertools.count()
    for split, name, index in itertools.product(splits, CLASSES, range(each)):
        paint(root / split / name / f"{index}.png", next(seeds), **options)
    return root


def painted(seeds: Iterable[int], scratch: Path) -> Tensor:
    """Return the pixels that `paint` writes for these seeds."""
    return torch.stack([torch.tensor(paint(scratch / "scratch.png", seed)).permute(2, 0, 1) for seed in seeds])


def raw(split: Split) -> Tensor:
    """Take all normalised images of a split back to pixel values."""
    images = torch.cat([images for images, _ in split.batches(3)])
    return images * torch.tensor(split.std).view(-1, 1, 1) + torch.tensor(split.mean).view(-1, 1, 1)


def labels(split: Split) -> list[int]:
    return [int(target) for _, targets in split.batches(3) for target in targets]


# -- digits


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def test_digits_is_complete_and_stratified(digits: Data) -> None:
    from sklearn.datasets import load_digits

    splits = [digits.train, digits.validation, digits.test]
    assert sorted(int(i) for split in splits for i in split.indices) == list(range(1797))
    assert (digits.classes, digits.image_shape) == (tuple("0123456789"), (3, 32, 32))
    whole = np.bincount(load_digits().target)
    for split, share in zip(splits, (0.75 * 0.9, 0.75 * 0.1, 0.25), strict=True):
        assert np.abs(np.bincount(split.targets) - share * whole).max() <= 1.5
        assert split.targets.tolist() == load_digits().target[split.indices].tolist()


def test_digits_are_enlarged_not_redrawn(digits: Data) -> None:
    from sklearn.datasets import load_digits

    small = torch.nn.functional.avg_pool2d(raw(digits.test)[:, 0], 4).numpy()
    original = load_digits().images[digits.test.indices] * 255 / 16
    correlations = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, original, strict=True)]
    assert min(correlations) > 0.9


def test_training_split_is_normalised(digits: Data) -> None:
    images = torch.cat([images for images, _ in digits.train.batches(100)]).double()
    assert images.mean().abs() < 1e-5
    assert (images.std(unbiased=False) - 1).abs() < 1e-5


def test_seed_moves_validation_and_never_test(digits: Data) -> None:
    other, again = load_data("digits", seed=1), load_data("digits")
    assert other.test.indices.tolist() == digits.test.indices.tolist()
    assert other.validation.indices.tolist() != digits.validation.indices.tolist()
    assert again.validation.indices.tolist() == digits.validation.indices.tolist()
    assert len(load_data("digits", validation=0.5).validation) == pytest.approx(0.5 * 0.75 * 1797, abs=6)


def test_image_size() -> None:
    assert load_data("digits", image_size=8).image_shape == (3, 8, 8)


# -- batches


def test_batches_cover_the_split_once(digits: Data) -> None:
    sizes = [len(targets) for _, targets in digits.test.batches(64)]
    assert sizes == [64] * 7 + [2]
    assert [len(targets) for _, targets in digits.test.batches(64, drop_last=True)] == [64] * 7
    assert labels(digits.test) == digits.test.targets.tolist()
    shuffled = [int(t) for _, targets in digits.test.batches(64, shuffle=torch.Generator()) for t in targets]
    assert shuffled != labels(digits.test)
    assert sorted(shuffled) == sorted(labels(digits.test))


def test_images_and_targets_stay_together_when_shuffled(digits: Data) -> None:
    plain = {
        image.numpy().tobytes(): int(t)
        for images, ts in digits.test.batches(50)
        for image, t in zip(images, ts, strict=True)
    }
    for images, targets in digits.test.batches(50, shuffle=torch.Generator().manual_seed(3)):
        assert [plain[image.numpy().tobytes()] for image in images] == targets.tolist()


def test_generator_state_is_all_the_randomness(digits: Data) -> None:
    generator = torch.Generator().manual_seed(4)
    state = generator.get_state()
    before = torch.get_rng_state()
    first = list(digits.test.batches(100, shuffle=generator, augment=Augmentation()))
    generator.set_state(state)
    second = list(digits.test.batches(100, shuffle=generator, augment=Augmentation()))
    third = list(digits.test.batches(100, shuffle=generator, augment=Augmentation()))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert not torch.equal(first[0][0], third[0][0])
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_needs_a_generator(digits: Data) -> None:
    with pytest.raises(InputError, match=r"pass shuffle=torch.Generator\(\) as well"):
        next(digits.test.batches(4, augment=Augmentation()))


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    shift=st.integers(0, 3),
    mirror=st.booleans(),
    seed=st.integers(0, 99),
)
def test_augmented_image_is_a_moved_and_perhaps_mirrored_original(
    height: int, width: int, shift: int, mirror: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 256, (5, 3, height, width), generator=generator, dtype=torch.uint8)
    split = Split(Resident(pixels), torch.arange(5), torch.arange(5), (0.0,) * 3, (1.0,) * 3, shift, mirror)
    images, targets = next(split.batches(5, shuffle=generator, augment=Augmentation()))
    for image, target in zip(images, targets, strict=True):
        original = pixels[target].float()
        versions = [original, original.flip(2)] if mirror else [original]
        assert any(torch.equal(image, moved) for version in versions for moved in every_move(version, shift))


def every_move(image: Tensor, shift: int) -> list[Tensor]:
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image, [shift] * 4)
    offsets = itertools.product(range(2 * shift + 1), repeat=2)
    return [padded[:, y : y + height, x : x + width] for y, x in offsets]


def test_every_move_and_mirror_occurs() -> None:
    pixels = torch.arange(1, 28).to(torch.uint8).view(1, 3, 3, 3).repeat(400, 1, 1, 1)
    split = Split(Resident(pixels), torch.arange(400), torch.zeros(400), (0.0,) * 3, (1.0,) * 3, shift=1, mirror=True)
    images, _ = next(split.batches(400, shuffle=torch.Generator().manual_seed(0), augment=Augmentation()))
    assert len({image.numpy().tobytes() for image in images}) == 2 * 9


def test_natural_images_are_mirrored_and_digits_are_not(digits: Data, tmp_path: Path) -> None:
    natural = load_data(f"imagefolder:{make_folder(tmp_path, size=(32, 32))}")
    assert (natural.train.shift, natural.train.mirror) == (4, True)
    assert (digits.train.shift, digits.train.mirror) == (2, False)


# -- folders


def test_images_need_not_be_square(tmp_path: Path) -> None:
    asked = load_data(f"imagefolder:{make_folder(tmp_path, size=(32, 32))}", image_size=(8, 12))
    assert asked.image_shape == (3, 8, 12)
    assert next(iter(asked.train.batches(2)))[0].shape == (2, 3, 8, 12)
    assert load_data("digits", image_size=(8, 12)).image_shape == (3, 8, 12)


def test_folder_gives_its_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    make_folder(tmp_path)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/ant/._0.png").write_text("no image either")
    (tmp_path / "train/.cache").mkdir()
    seen: list[tuple[int, int]] = []
    found = load_data(f"imagefolder:{tmp_path}", validation=0.25, on_progress=lambda *done: seen.append(done))
    assert (found.classes, found.image_shape) == (CLASSES, (3, 8, 8))
    assert [len(split) for split in (found.train, found.validation, found.test)] == [6, 2, 8]
    assert labels(found.validation) == [0, 1]
    assert labels(found.test) == [0] * 4 + [1] * 4
    assert torch.equal(raw(found.test).round().to(torch.uint8), painted(range(8, 16), tmp_path))
    assert seen[-1] == (16, 16)
    assert "1 files in" in caplog.text  # notes.txt; the hidden file and folder count for nothing


def test_folder_normalises_by_what_is_trained_on(tmp_path: Path) -> None:
    found = load_data(f"imagefolder:{make_folder(tmp_path)}")
    pixels = found.train.images.take(found.train.indices, torch.device("cpu")).double()
    assert found.train.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert found.train.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist())
    assert found.test.mean == found.validation.mean == found.train.mean


def test_own_validation_split(tmp_path: Path) -> None:
    found = load_data(f"imagefolder:{make_folder(tmp_path, ('train', 'test', 'val'), each=3)}")
    assert [len(split) for split in (found.train, found.validation, found.test)] == [6, 6, 6]
    assert found.test.indices.tolist() == list(range(6, 12))
    assert found.validation.indices.tolist() == list(range(12, 18))


def test_val_alone_is_the_test_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    found = load_data(f"imagefolder:{make_folder(tmp_path, ('train', 'val'))}", validation=0.5)
    assert "has no test/: val/ is the test split" in caplog.text
    assert [len(split) for split in (found.train, found.validation, found.test)] == [4, 4, 8]
    assert torch.equal(raw(found.test).round().to(torch.uint8), painted(range(8, 16), tmp_path))


@pytest.mark.parametrize(
    ("odd", "asked", "shape"),
    [((8, 8), None, (3, 8, 8)), ((8, 9), None, (3, 224, 224)), ((8, 9), 16, (3, 16, 16)), ((8, 8), 4, (3, 4, 4))],
)
def test_folder_image_size(
    tmp_path: Path, odd: tuple[int, int], asked: int | None, shape: tuple[int, int, int]
) -> None:
    make_folder(tmp_path)
    paint(tmp_path / "test/bee/odd.png", 0, size=odd)
    assert load_data(f"imagefolder:{tmp_path}", image_size=asked).image_shape == shape


def test_small_images_need_not_be_square(tmp_path: Path) -> None:
    found = load_data(f"imagefolder:{make_folder(tmp_path, size=(5, 9))}")
    assert found.image_shape == (3, 5, 9)
    expected = torch.tensor(paint(tmp_path / "scratch.png", 8, size=(5, 9))).permute(2, 0, 1)
    assert torch.equal(raw(found.test)[0].round().to(torch.uint8), expected)


def test_constant_channel_stays_finite(tmp_path: Path) -> None:
    make_folder(tmp_path, each=2)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(path)
    images, _ = next(load_data(f"imagefolder:{tmp_path}").train.batches(2))
    assert images.abs().max() == 0


def test_large_images_of_one_size_are_resized(tmp_path: Path) -> None:
    found = load_data(f"imagefolder:{make_folder(tmp_path, each=2, size=(65, 70))}")
    assert found.image_shape == (3, 224, 224)


def test_resize_takes_the_centre(tmp_path: Path) -> None:
    make_folder(tmp_path, each=2)
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 18:42] = 200  # a little wider than the square in the middle: resizing looks at neighbours
    Image.fromarray(pixels).save(tmp_path / "test/ant/wide.png")
    found = load_data(f"imagefolder:{tmp_path}", image_size=10)
    assert (raw(found.test)[2] - 200).abs().max() < 1e-3


def test_grey_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    make_folder(tmp_path, each=2)
    image = Image.fromarray(np.full((8, 8), 77, np.uint8))
    for mode in ("L", "P", "1", "RGBA", "LA"):
        image.convert(mode).save(tmp_path / f"train/ant/{mode}.png")
    assert load_data(f"imagefolder:{tmp_path}").image_shape == (3, 8, 8)


def test_on_disk_gives_the_same_batches_as_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    resident = load_data(f"imagefolder:{tmp_path}")
    monkeypatch.setattr(folder, "RESIDENT_BYTES", 16 * 3 * 8 * 8 - 1)
    lazy = load_data(f"imagefolder:{tmp_path}")
    assert isinstance(resident.train.images, Resident)
    assert isinstance(lazy.train.images, OnDisk)
    runs = [
        split.batches(4, shuffle=torch.Generator().manual_seed(1), augment=Augmentation())
        for split in (resident.train, lazy.train)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


# -- decoded once


def test_kept_images_are_those_on_disk_and_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "data")
    resident = load_data(f"imagefolder:{tmp_path / 'data'}")
    monkeypatch.setattr(folder, "RESIDENT_BYTES", 0)
    decoded: list[Path] = []
    decode = on_disk.decode

    def counted(path: Path, size: tuple[int, int]) -> Any:
        decoded.append(path)
        return decode(path, size)

    monkeypatch.setattr(on_disk, "decode", counted)

    def run() -> list[tuple[Tensor, Tensor]]:
        found = load_data(f"imagefolder:{tmp_path / 'data'}", cache=tmp_path / "cache")
        assert isinstance(found.train.images, Cached)
        return list(found.train.batches(4, shuffle=torch.Generator().manual_seed(1), augment=Augmentation()))

    first = run()
    assert len(decoded) == len(resident.train.images)
    shuffle = torch.Generator().manual_seed(1)
    expected = list(resident.train.batches(4, shuffle=shuffle, augment=Augmentation()))
    for kept in (first, run(), run()):
        for (x, y), (a, b) in zip(kept, expected, strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)
    assert len(decoded) == len(resident.train.images)  # the second and the third run decoded nothing
    # A file that has changed is decoded again, and no other.
    changed = tmp_path / "data" / "train" / "ant" / "0.png"
    paint(changed, 99)
    os.utime(changed, (1, 1))
    decoded.clear()
    again = load_data(f"imagefolder:{tmp_path / 'data'}", cache=tmp_path / "cache")
    assert decoded == [changed]
    everything = again.train.images.take(torch.arange(len(again.train.images)), torch.device("cpu"))
    assert (everything == painted([99], tmp_path)[0]).flatten(1).all(1).any()


def test_a_damaged_cache_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that lost its end has no pixels: what its stamps say must not count."""
    make_folder(tmp_path / "data")
    expected = load_data(f"imagefolder:{tmp_path / 'data'}").train.images
    monkeypatch.setattr(folder, "RESIDENT_BYTES", 0)
    load_data(f"imagefolder:{tmp_path / 'data'}", cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    again = load_data(f"imagefolder:{tmp_path / 'data'}", cache=tmp_path / "cache").train.images
    everything = torch.arange(len(expected))
    cpu = torch.device("cpu")
    assert torch.equal(again.take(everything, cpu), expected.take(everything, cpu))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "data")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot keep images in .*file.*give --cache another folder"):
        load_data(f"imagefolder:{tmp_path / 'data'}", cache=tmp_path / "file")
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"GiB are needed, and the disk has less"):
        load_data(f"imagefolder:{tmp_path / 'data'}", cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"cache has no effect on digits"):
        load_data("digits", cache=tmp_path)


def test_reading_ahead_stops_with_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, each=8)
    monkeypatch.setattr(folder, "RESIDENT_BYTES", 0)
    found = load_data(f"imagefolder:{tmp_path}")
    taken: list[int] = []
    take = OnDisk.take
    monkeypatch.setattr(OnDisk, "take", lambda own, indices, device: (taken.append(1), take(own, indices, device))[1])
    batches = found.train.batches(1)
    for expected, (x, _) in zip(range(2), batches, strict=False):
        assert x.shape[0] == 1
        assert len(taken) <= expected + 4
    batches.close()  # type: ignore[attr-defined]
    before = len(taken)
    assert before < len(found.train)
    # A broken image is named where it is used.
    _broken(tmp_path)
    with pytest.raises(DataError, match=r"test/bee/3.png"):
        list(found.test.batches(2))


# -- random parts, other colours


@pytest.mark.parametrize("how", [Augmentation(crop=0.2), Augmentation(jitter=0.4), Augmentation(crop=0.5, jitter=0.2)])
def test_an_image_looks_alike_whoever_reads_it(how: Augmentation, digits: Data) -> None:
    """Of a batch each of two processes reads its half: together it is what one reads."""
    before = torch.get_rng_state()

    def read(rows: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        batches = digits.train.batches(8, shuffle=generator, augment=how, rows=rows)
        next(batches)
        return next(batches)  # the second: the first must have drawn as much

    whole = read(lambda batch: batch)
    halves = [read(lambda batch, part=part: batch.chunk(2)[part]) for part in range(2)]  # type: ignore[misc]
    assert torch.equal(torch.cat([half[0] for half in halves]), whole[0])
    assert torch.equal(torch.cat([half[1] for half in halves]), whole[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_part_has_at_least_the_area_asked_for() -> None:
    """A picture of its own coordinates: what is seen of it says which part was cut out."""
    side = 64
    rising = torch.arange(side).float().mul(255 / (side - 1)).round().to(torch.uint8)
    pixels = torch.stack([rising.expand(side, side), rising[:, None].expand(side, side), torch.zeros(side, side)])
    split = Split(
        Resident(pixels.to(torch.uint8).repeat(200, 1, 1, 1)), torch.arange(200), torch.zeros(200), (0.0,) * 3,
        (1.0,) * 3, shift=3, mirror=True,
    )  # fmt: skip
    seen, _ = next(split.batches(200, shuffle=torch.Generator().manual_seed(0), augment=Augmentation(crop=0.25)))
    widths = (seen[:, 0].amax((1, 2)) - seen[:, 0].amin((1, 2))) / 255
    heights = (seen[:, 1].amax((1, 2)) - seen[:, 1].amin((1, 2))) / 255
    areas = widths * heights
    assert areas.min() > 0.25 - 0.06
    assert areas.max() > 0.85
    assert areas.std() > 0.1
    mirrored = seen[:, 0, 0, 0] > seen[:, 0, 0, -1]
    assert 60 < int(mirrored.sum()) < 140


def test_jitter_changes_the_brightness_by_no_more_than_asked() -> None:
    pixels = torch.full((100, 3, 4, 4), 100, dtype=torch.uint8)
    split = Split(Resident(pixels), torch.arange(100), torch.zeros(100), (0.0,) * 3, (1.0,) * 3)
    seen, _ = next(split.batches(100, shuffle=torch.Generator().manual_seed(0), augment=Augmentation(jitter=0.3)))
    # Grey of one value has no contrast and no saturation: what is left is the factor of the brightness.
    assert seen.std((1, 2, 3)).max() == 0
    assert 69 <= seen.min() < 80
    assert 120 < seen.max() <= 131


def _broken(root: Path) -> None:
    path = root / "test/bee/3.png"
    path.write_bytes(path.read_bytes()[:-80])


def _no_image(root: Path) -> None:
    (root / "train/ant/0.png").write_text("not a picture")


def _deep(root: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "train/ant/0.png")


def _without(*names: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        for name in names:
            for path in sorted((root / name).rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            (root / name).rmdir()

    return remove


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("train", "test", "."), "there is no data folder {root}: give imagefolder:PATH with train/ and test/"),
        (
            _without("train", "test"),
            "{root} has no train/ (it holds no folders): put one folder a class into {root}/train",
        ),
        (_without("train"), "{root} has no train/ (it holds test)"),
        (_without("test"), "{root} has no test/ or val/ (it holds train)"),
        (_without("train/ant", "train/bee"), "{root}/train is empty: it must hold one folder of images a class"),
        (_without("test/ant"), "class folder {root}/train/ant has no counterpart in {root}/test"),
        (_without("train/ant"), "class folder {root}/test/ant has no counterpart in {root}/train"),
        (_without("train/ant", "test/ant"), "{root}/train holds one class only (bee)"),
        (lambda root: (root / "train/cat").mkdir(), "no images in {root}/train/cat: put some there (.bmp, .gif"),
        (_broken, "cannot read image {root}/test/bee/3.png: "),
        (_no_image, "cannot read image {root}/train/ant/0.png: cannot identify image file"),
        (_deep, "{root}/train/ant/0.png has more than 8 bits a channel (mode I;16): convert it to 8 bits"),
    ],
)
def test_folder_is_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    root = make_folder(tmp_path / "photos")
    spoil(root)
    with pytest.raises(DataError) as caught:
        load_data(f"imagefolder:{root}")
    assert message.format(root=root) in str(caught.value)


def test_class_with_one_image_cannot_be_split(tmp_path: Path) -> None:
    make_folder(tmp_path, each=1)
    with pytest.raises(DataError, match="class 'ant' has 1 training image: it needs 2 or more"):
        load_data(f"imagefolder:{tmp_path}")


# -- CIFAR


class FakeCifar:
    """What torchvision's CIFAR10 gives, for five images."""

    classes = CLASSES

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        self.data = np.arange(5 * 32 * 32 * 3, dtype=np.int64).astype(np.uint8).reshape(5, 32, 32, 3)
        self.targets = [0, 0, 1, 1, 1]


def test_cifar_has_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    found = load_data("cifar10", validation=0.2)
    assert (found.classes, found.image_shape) == (CLASSES, (3, 32, 32))
    assert [len(split) for split in (found.train, found.validation, found.test)] == [3, 2, 5]
    expected = torch.from_numpy(FakeCifar(Path(), True, False).data).permute(0, 3, 1, 2)
    assert torch.equal(raw(found.test).round().to(torch.uint8), expected)


def test_cifar_is_enlarged_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    assert load_data("cifar10", image_size=40).image_shape == (3, 40, 40)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 5 * 3 * 36 * 36)
    with pytest.raises(RangeError, match="image_size = 40 is out of range: give image_size in 1 to 36, or larger with"):
        load_data("cifar10", image_size=40)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(name, root=tmp_path)
    assert f"{name} cannot be loaded from {tmp_path}" in str(caught.value)
    assert str(caught.value).endswith("add --download to fetch it")


# -- names and ranges


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load_data("digit"), UnknownNameError, "unknown data set 'digit': did you mean 'digits'?"),
        (lambda: load_data("imagefolder"), UnknownNameError, "did you mean 'imagefolder:PATH'?"),
        (lambda: load_data("imagefolder:"), UnknownNameError, "did you mean 'imagefolder:PATH'?"),
        (lambda: load_data("digits:here"), UnknownNameError, "did you mean 'digits'"),
        (lambda: load_data("mnist"), UnknownNameError, "known: cifar10, cifar100, digits, imagefolder:PATH"),
        (
            lambda: load_data("digits", validation=0),
            RangeError,
            "validation = 0 is out of range: give validation in (0, 1)",
        ),
        (lambda: load_data("digits", validation=1.0), RangeError, "validation = 1.0"),
        (lambda: load_data("digits", image_size=0), RangeError, "image_size = 0"),
        (lambda: load_data("digits", download=True), InputError, "download has no effect on digits: leave it out"),
    ],
)
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_a_user_can_add_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(request: data.Request) -> data.RawDataset:
        split = Split.from_arrays(Resident(torch.zeros(6, 1, 4, 4, dtype=torch.uint8)), torch.tensor([0, 1] * 3))
        return data.RawDataset(CLASSES, split, split)

    monkeypatch.setitem(data.DATASETS, "mine", mine)
    assert load_data("mine").image_shape == (1, 4, 4)


# -- what cameras, designers and archives leave behind


def test_a_picture_stands_as_its_camera_was_held(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", size=(6, 9))
    path = root / "train" / "ant" / "0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    grey = np.zeros((6, 9, 3), dtype=np.uint8)
    grey[:, 6:] = 255  # the right third is white: at the bottom when it is turned clockwise
    Image.fromarray(grey).save(path, exif=exif, quality=100)
    pixels, _ = pictures.decode(path, (9, 6))
    assert pixels[7:].min() > 200
    assert pixels[:5].max() < 50
    with pictures.opened(path) as picture:
        assert pictures.upright_size(picture) == (9, 6)


def test_transparent_parts_are_white_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "data")
    hidden = np.zeros((8, 8, 4), dtype=np.uint8)
    hidden[:4] = (255, 0, 0, 255)
    Image.fromarray(hidden).save(root / "train" / "ant" / "0.png")
    pixels, is_transparent = pictures.decode(root / "train" / "ant" / "0.png", (8, 8))
    assert is_transparent
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[7, 0].tolist() == [255, 255, 255]
    load_data(f"imagefolder:{root}")
    assert "images with transparent parts, " in caplog.text


def test_what_is_no_image_of_a_class_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "data", each=4)
    for extra in (
        "train/loose.png",
        "train/ant/.ipynb_checkpoints/0.png",
        "train/__MACOSX/0.png",
        "train/.cache/0.png",
    ):
        paint(root / extra, 99)
    (root / "train" / "ant" / "notes.txt").touch()
    (root / "train" / "bee" / "more").symlink_to(root / "train" / "ant")
    found = load_data(f"imagefolder:{root}", validation=0.25)
    assert found.classes == CLASSES
    assert len(found.train) + len(found.validation) == 8
    for said in (
        "1 files in",
        "loose.png say",
        "__MACOSX is what an archive",
        "notes.txt say",
        "linked folders are not",
    ):
        assert said in caplog.text


def test_other_endings_of_pictures_are_read(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    for name in ("a.gif", "b.jfif", "c.WEBP"):
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(
            root / "train" / "ant" / name, format="JPEG" if "jfif" in name else None
        )
    found = load_data(f"imagefolder:{root}", validation=0.2)
    assert len(found.train) + len(found.validation) == 11


def lopsided(counts: list[int]) -> Split:
    """Return a split with so many images of every class; every pixel of an image is its index."""
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pixels = torch.arange(len(targets), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return replace(Split.from_arrays(Resident(pixels.clone()), targets), mean=(0.0,), std=(1.0,))


def test_balanced_classes_come_equally_often_and_images_of_a_class_too() -> None:
    split, generator = lopsided([90, 9, 1]), torch.Generator().manual_seed(0)
    seen = torch.zeros(3)
    images = torch.zeros(100)
    for _ in range(60):
        for x, y in split.batches(25, shuffle=generator, balanced=True):
            assert len(y) == 25
            seen += torch.bincount(y, minlength=3)
            images += torch.bincount(x[:, 0, 0, 0].long(), minlength=100)
            assert torch.equal(split.targets[x[:, 0, 0, 0].long()], y)
    # 6,000 draws: a third is 2,000 with a deviation of 37.
    assert (seen - 2000).abs().max() < 150
    assert images[:90].min() > 0
    assert (images[90:99] - 222).abs().max() < 70


def test_the_images_of_a_balanced_batch_can_be_named_afterwards() -> None:
    split, generator = lopsided([30, 3]), torch.Generator().manual_seed(5)
    state = generator.get_state()
    for number, (x, _) in enumerate(split.batches(8, shuffle=generator, balanced=True)):
        assert split.chosen(number, 8, state, balanced=True).tolist() == x[:, 0, 0, 0].tolist()


def test_balance_needs_a_generator() -> None:
    with pytest.raises(InputError, match="balanced=True draws at random: pass shuffle="):
        next(lopsided([2, 2]).batches(2, balanced=True))


def test_an_opener_that_others_put_in_place_of_pils_hides_no_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics looks for a plugin where PIL cannot identify a file, and that is not there."""
    original = Image.open

    def patched(*args: Any, **kwargs: Any) -> Image.Image:
        try:
            return original(*args, **kwargs)
        except Image.UnidentifiedImageError:
            raise ModuleNotFoundError("No module named 'pi_heif'")  # noqa: B904

    monkeypatch.setattr(Image, "open", patched)
    path = tmp_path / "0.png"
    path.write_text("no image")
    message = r"cannot read image .*0\.png: cannot identify image file .*; repair or remove it"
    with pytest.raises(DataError, match=message), pictures.opened(path):
        pass
