"""Data sets by name, resident in memory where they fit, with a validation split held out of training.

`load_data` returns a `Data` of three splits; `Split.batches` goes through one. `DATASETS` lists what can be loaded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import DataError, InputError, RangeError, UnknownNameError
from compressor.training.data.folder import imagefolder
from compressor.training.data.images import CHUNK, RESIDENT_BYTES, Progress, Resident
from compressor.training.data.splits import RawDataset, Request, Split, moments, stratified_split

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in three splits.

    Attributes:
        name: as it was asked for.
        classes: their names, by class index.
        image_shape: `(C, H, W)`.
        train: to learn from.
        validation: held out of training, for every decision.
        test: to be looked at once, at the end.
    """

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    train: Split
    validation: Split
    test: Split

    def normalised(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Data:
        """Return the same images less another mean, over another deviation: one number a channel, of pixels 0 to 255.

        Raises:
            InputError: for another number of channels.
        """
        channels = self.image_shape[0]
        if not len(mean) == len(std) == channels:
            raise InputError(f"{self.name} has images of {channels} channels, and the mean has {len(mean)} numbers")
        parts = {name: replace(getattr(self, name), mean=mean, std=std) for name in ("train", "validation", "test")}
        return replace(self, **parts)


def load_data(
    name: str,
    *,
    seed: int = 0,
    validation: float = 0.1,
    image_size: int | tuple[int, int] | None = None,
    root: Path = Path(".data"),
    download: bool = False,
    on_progress: Progress = lambda done, total: None,
    cache: Path | None = None,
) -> Data:
    """Load a data set by name.

    Args:
        name: `digits`, `cifar10`, `cifar100` or `imagefolder:PATH`.
        seed: of the validation split. The test split does not depend on it.
        validation: share of each class's training images, in `(0, 1)`, that is held out; without effect where a folder
            has `train/`, `val/` and `test/`.
        image_size: height and width in pixels, one number where they are alike. None: digits 32; CIFAR as it is;
            folders as they are if all images have one size up to 64, else 224. Folders: the short side is resized, then
            the centre is cut out.
        root: where CIFAR is kept.
        download: fetch CIFAR if it is not there.
        on_progress: called with the images decoded so far and their number.
        cache: folder that keeps the decoded images of an `imagefolder`, for this run and the next ones; a file that has
            changed is decoded again. None keeps none.

    Raises:
        UnknownNameError: no such data set; says what is close.
        RangeError: a share or size outside its range.
        InputError: `download` for something that is not downloaded, `cache` for something that is not decoded; the
            cache cannot be written.
        DataError: the data is missing, empty or broken; names the folder, class or file.
    """
    kind, _, path = name.partition(":")
    if kind not in DATASETS or bool(path) != (kind == "imagefolder"):
        raise UnknownNameError("data set", name, [*(DATASETS.keys() - {"imagefolder"}), "imagefolder:PATH"])
    if not 0 < validation < 1:
        raise RangeError("validation", validation, "(0, 1)")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size and min(size) < 1:
        raise RangeError("image_size", image_size, "1, 2, 3, ...")
    if download and not kind.startswith("cifar"):
        raise InputError(f"download has no effect on {kind}: leave it out")
    if cache and kind != "imagefolder":
        raise InputError(f"cache has no effect on {kind}: leave it out")
    found = DATASETS[kind](Request(path, size, root, download, on_progress, cache))
    return _finished(name, found, validation, seed)


def _finished(name: str, found: RawDataset, share: float, seed: int) -> Data:
    """Hold the validation split out, then normalise by what is left to train on."""
    train = found.train
    held_out = found.validation
    if held_out is None:
        train, held_out = stratified_split(train, share, seed, found.classes)
    mean, std = moments(train)
    shape = train.images.shape
    # 4 pixels of 32, as is usual on CIFAR; half as much where the object fills the image, as a digit does.
    shift = shape[1] // (8 if found.natural else 16)
    splits = [
        replace(split, mean=mean, std=std, shift=shift, mirror=found.natural) for split in (train, held_out, found.test)
    ]
    return Data(name, found.classes, shape, *splits)


def _digits(request: Request) -> RawDataset:
    """1,797 handwritten digits of 8x8 grey values that come with scikit-learn, enlarged; a quarter is for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    size = request.image_size or (32, 32)
    grey = torch.from_numpy(raw.images).unsqueeze(1) * (255 / 16)
    pixels = F.interpolate(grey, size, mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    classes = tuple(str(name) for name in raw.target_names)
    whole = Split.from_arrays(Resident(pixels), torch.from_numpy(raw.target))
    # Always with the same seed: whoever varies seeds must not learn from another's test images.
    train, test = stratified_split(whole, 0.25, 0, classes)
    return RawDataset(classes, train, test, natural=False)


def _cifar(kind: str, request: Request) -> RawDataset:
    """CIFAR (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32, by torchvision."""
    from torchvision import datasets

    try:
        halves = [getattr(datasets, kind)(request.root, train, download=request.download) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # no network; not there, or damaged
        advice = "check the network" if request.download else "add --download to fetch it"
        raise DataError(f"{kind.lower()} cannot be loaded from {request.root}: {error}; {advice}") from error
    train, test = (
        Split.from_arrays(
            Resident(_enlarged(torch.from_numpy(half.data).permute(0, 3, 1, 2), request)), torch.tensor(half.targets)
        )
        for half in halves
    )
    return RawDataset(tuple(halves[0].classes), train, test)


def _enlarged(pixels: Tensor, request: Request) -> Tensor:
    """Resize `(N, C, H, W)` uint8 images that are all in memory."""
    size = request.image_size
    if size is None or size == pixels.shape[-2:]:
        return pixels.contiguous()
    # CIFAR is always in memory, so that its images may not grow beyond what fits.
    if len(pixels) * 3 * math.prod(size) > RESIDENT_BYTES:
        most = math.isqrt(RESIDENT_BYTES // (3 * len(pixels)))
        raise RangeError("image_size", max(size), f"1 to {most}, or larger with imagefolder:PATH, which stays on disk")
    # In pieces: as float the whole set would take four times the memory of its bytes.
    chunks = [F.interpolate(chunk.float(), size, mode="bilinear") for chunk in torch.split(pixels, CHUNK)]
    return torch.cat([chunk.round().to(torch.uint8) for chunk in chunks])


DATASETS: dict[str, Callable[[Request], RawDataset]] = {
    "digits": _digits,
    "cifar10": partial(_cifar, "CIFAR10"),
    "cifar100": partial(_cifar, "CIFAR100"),
    "imagefolder": imagefolder,
}
