"""`imagefolder:PATH`: one folder of images a class, under `train/` and under `test/` or `val/`.

Every image is decoded when the folder is loaded, so that a broken one is named before hours of training, not after.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from compressor._utils import IMAGE_SUFFIXES, opened, upright_size
from compressor.errors import DataError
from compressor.training.data.cached import Cached
from compressor.training.data.images import CHUNK, RESIDENT_BYTES, Images, OnDisk, Progress, Resident
from compressor.training.data.splits import RawDataset, Request, Split

logger = logging.getLogger(__name__)

SMALL = 64  # images of one size up to this are taken as they are
_BY_MACOS = "__MACOSX"  # what its archives hold beside every folder


def imagefolder(request: Request) -> RawDataset:
    """A folder with one folder a class under `train/` and under `test/` or `val/`."""
    folders = _folders(Path(request.path).expanduser())
    listings = {split: _files(folder) for split, folder in folders.items()}
    classes = _checked_classes(folders, listings)
    # One list of images for all splits, which then differ in their indices alone.
    paths = [path for files in listings.values() for name in classes for path in files[name]]
    on_disk = OnDisk(paths, _size(paths, request.image_size))
    images = _read(Cached(on_disk, request.cache) if request.cache else on_disk, request.on_progress)
    found: dict[str, Split] = {}
    for split, files in listings.items():
        counts = torch.tensor([len(files[name]) for name in classes])
        targets = torch.arange(len(classes)).repeat_interleave(counts)
        found[split] = Split.from_arrays(images, targets, start=sum(map(len, found.values())))
    return RawDataset(classes, found["train"], found["test"], found.get("validation"))


def _folders(folder: Path) -> dict[str, Path]:
    """Find the splits: `train`, `test`, and `validation` where both `val/` and `test/` are there."""
    if not folder.is_dir():
        raise DataError(f"there is no data folder {folder}: give imagefolder:PATH with train/ and test/ in PATH")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    listed = f"it holds {', '.join(there[:5]) + (', ...' if len(there) > 5 else '') or 'no folders'}"
    if "train" not in there:
        raise DataError(f"{folder} has no train/ ({listed}): put one folder a class into {folder / 'train'}")
    if "test" not in there and "val" not in there:
        raise DataError(f"{folder} has no test/ or val/ ({listed}): one of them must hold the test images")
    if "test" not in there:
        # ImageNet's layout: what is called val there is what papers report, and no decision may look at it.
        logger.info("%s has no test/: val/ is the test split, and validation images are taken out of train/", folder)
        return {"train": folder / "train", "test": folder / "val"}
    names = {"train": "train", "test": "test", **({"validation": "val"} if "val" in there else {})}
    return {split: folder / name for split, name in names.items()}


def _files(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of every class folder, in order."""
    files = {}
    there = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if loose := [path for path in there if not path.is_dir()]:
        logger.warning("%d files in %s belong to no class and are left out, %s say", len(loose), folder, loose[0].name)
    for path in there:
        if path.name == _BY_MACOS:
            logger.warning("%s is what an archive leaves behind, not a class, and is left out", path)
        elif path.is_dir():
            files[path.name] = _images_in(path)
            if not files[path.name]:
                raise DataError(f"no images in {path}: put some there ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if not files:
        raise DataError(f"{folder} is empty: it must hold one folder of images a class")
    return files


def _images_in(folder: Path) -> list[Path]:
    """Return the images in a class folder and below, in order; what is left out is said."""
    # Hidden files and folders are left out without a word: some systems leave a `._name` beside every image.
    there = [path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    if links := [path for path in there if path.is_symlink() and path.is_dir()]:
        logger.warning("linked folders are not followed: %s", ", ".join(map(str, links)))
    others = [path for path in there if path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        logger.warning("%d files in %s are no images and are left out, %s say", len(others), folder, others[0].name)
    return sorted(path for path in there if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES)


def _checked_classes(folders: Mapping[str, Path], listings: Mapping[str, Mapping[str, list[Path]]]) -> tuple[str, ...]:
    """Return the classes of the train split, in alphabetical order; all splits must have the same."""
    classes = listings["train"]
    for split, files in listings.items():
        if differing := sorted(files.keys() ^ classes.keys()):
            here, there = (split, "train") if differing[0] in files else ("train", split)
            raise DataError(
                f"class folder {folders[here] / differing[0]} has no counterpart in {folders[there]}: all splits must "
                "have the same classes"
            )
    if len(classes) == 1:
        raise DataError(f"{folders['train']} holds one class only ({next(iter(classes))}): it must hold two or more")
    return tuple(classes)


def _size(paths: Sequence[Path], asked: tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width of the images: as they are if all are alike and small."""
    if asked is not None:
        return asked
    first = _header(paths[0])
    if max(first) <= SMALL and all(_header(path) == first for path in paths):
        return first
    logger.info("the images are large or of several sizes: all become 224x224")
    return 224, 224  # what torchvision's classifiers are made for


def _header(path: Path) -> tuple[int, int]:
    with opened(path) as image:
        return upright_size(image)


def _read(images: OnDisk | Cached, on_progress: Progress) -> Images:
    """Decode every image once, but for those whose pixels are kept; hold all in memory if they fit."""
    channels, height, width = images.shape
    # Decoded even where the pixels are not kept: a broken image must be named now.
    fits = len(images) * channels * height * width <= RESIDENT_BYTES
    pixels = torch.empty((len(images) if fits else 0, *images.shape), dtype=torch.uint8)
    unread = torch.arange(len(images)) if fits else images.unread()
    for number, indices in enumerate(torch.split(unread, CHUNK) if len(unread) else ()):
        chunk = images.take(indices, torch.device("cpu"))
        if fits:
            pixels[indices] = chunk
        on_progress(number * CHUNK + len(indices), len(unread))
    if images.transparent:
        logger.warning("images with transparent parts, %s say, are put on white", images.transparent)
    if not fits and isinstance(images, OnDisk):
        logger.info(
            "%d images do not fit into memory: they are decoded again for every batch; --cache FOLDER keeps their "
            "pixels",
            len(images),
        )
    return Resident(pixels) if fits else images
