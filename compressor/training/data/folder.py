"""`imagefolder:PATH`: one folder of images a class, under `train/` and under `test/` or `val/`.

Every image is decoded when the folder is loaded, so that a broken one is named before hours of training, not after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from compressor.errors import DataError
from compressor.training.data.images import CHUNK, RESIDENT_BYTES, Images, OnDisk, Progress, Resident, opened
from compressor.training.data.splits import Found, Part, Request

SMALL = 64  # images of one size up to this are taken as they are
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def imagefolder(request: Request) -> Found:
    """A folder with one folder a class under `train/` and under `test/` or `val/`."""
    folders = _folders(Path(request.path).expanduser())
    parts = {part: _files(folder) for part, folder in folders.items()}
    classes = _checked_classes(folders, parts)
    paths = [path for files in parts.values() for name in classes for path in files[name]]
    images = _read(OnDisk(paths, _size(paths, request.image_size)), request.on_progress)
    found: dict[str, Part] = {}
    for part, files in parts.items():
        counts = torch.tensor([len(files[name]) for name in classes])
        targets = torch.arange(len(classes)).repeat_interleave(counts)
        found[part] = Part.of(images, targets, start=sum(map(len, found.values())))
    return Found(classes, found["train"], found["test"], found.get("validation"))


def _folders(folder: Path) -> dict[str, Path]:
    """Find the parts: `train`, `test`, and `validation` where both `val/` and `test/` are there."""
    if not folder.is_dir():
        raise DataError(f"there is no data folder {folder}: give imagefolder:PATH with train/ and test/ in PATH")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    listed = f"it holds {', '.join(there[:5]) + (', ...' if len(there) > 5 else '') or 'no folders'}"
    if "train" not in there:
        raise DataError(f"{folder} has no train/ ({listed}): put one folder a class into {folder / 'train'}")
    if "test" not in there and "val" not in there:
        raise DataError(f"{folder} has no test/ or val/ ({listed}): one of them must hold the test images")
    if "test" not in there:
        return {"train": folder / "train", "test": folder / "val"}
    names = {"train": "train", "test": "test", **({"validation": "val"} if "val" in there else {})}
    return {part: folder / name for part, name in names.items()}


def _files(folder: Path) -> dict[str, list[Path]]:
    """Give the image files of every class folder, in order."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            files[path.name] = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES)
            if not files[path.name]:
                raise DataError(f"no images in {path}: put some there ({', '.join(sorted(SUFFIXES))})")
    if not files:
        raise DataError(f"{folder} is empty: it must hold one folder of images a class")
    return files


def _checked_classes(folders: Mapping[str, Path], parts: Mapping[str, Mapping[str, list[Path]]]) -> tuple[str, ...]:
    """Give the classes of the training part, in alphabetical order; all parts must have the same."""
    classes = parts["train"]
    for part, files in parts.items():
        if differing := sorted(files.keys() ^ classes.keys()):
            here, there = (part, "train") if differing[0] in files else ("train", part)
            raise DataError(
                f"class folder {folders[here] / differing[0]} has no counterpart in {folders[there]}: all parts must "
                "have the same classes"
            )
    if len(classes) == 1:
        raise DataError(f"{folders['train']} holds one class only ({next(iter(classes))}): it must hold two or more")
    return tuple(classes)


def _size(paths: Sequence[Path], asked: int | None) -> tuple[int, int]:
    """Give height and width of the images: as they are if all are alike and small."""
    if asked is not None:
        return asked, asked
    first = _header(paths[0])
    if max(first) <= SMALL and all(_header(path) == first for path in paths):
        return first
    return 224, 224


def _header(path: Path) -> tuple[int, int]:
    with opened(path) as image:
        return image.height, image.width


def _read(images: OnDisk, on_progress: Progress) -> Images:
    """Decode every image once; keep the pixels if they fit into memory."""
    channels, height, width = images.shape
    fits = len(images) * channels * height * width <= RESIDENT_BYTES
    pixels = torch.empty((len(images) if fits else 0, *images.shape), dtype=torch.uint8)
    for indices in torch.split(torch.arange(len(images)), CHUNK):
        chunk = images.take(indices, torch.device("cpu"))
        if fits:
            pixels[indices] = chunk
        on_progress(int(indices[-1]) + 1, len(images))
    return Resident(pixels) if fits else images
