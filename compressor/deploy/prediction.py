"""Predictions of an ONNX file, by nothing but what it says about itself.

Shape letters: B images at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor._utils import IMAGE_SUFFIXES, decode
from compressor.deploy.metadata import ImageModel
from compressor.deploy.session import open_file
from compressor.errors import DataError, InputError

_AT_ONCE = 32  # images
_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first, each with its probability in [0, 1]."""

    image: str
    classes: tuple[tuple[str, float], ...]


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Return image files, and those inside folders, in order.

    Raises:
        InputError: something is not there, or no image is.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"there is no file {path}: give images, or folders of them")
    if not found:
        raise InputError("no image in these folders: give files that end in " + ", ".join(sorted(IMAGE_SUFFIXES)))
    return found


def predict(
    file: Path,
    images: Sequence[Path],
    *,
    top: int = 1,
    device: str = "cpu",
    threads: int = 1,
    on_unreadable: Callable[[DataError], None] | None = None,
) -> Iterator[Prediction]:
    """Run images through an ONNX file that `compress` exported, and yield what it says of each.

    Images are brought to the file's size as they were for training: upright, short side to the size, then the centre.

    Args:
        file: with metadata as in `ImageModel`.
        images: files that PIL can read.
        top: how many classes of each.
        device, threads: as for `open_session`.
        on_unreadable: called for an image that cannot be read, which is left out then.

    Raises:
        ArtifactError: no such file, or one that does not say what it takes.
        DataError: an image that cannot be read, without `on_unreadable`.
        InputError: a device that cannot be used.
    """
    session = open_file(file, device, threads=threads)
    about = ImageModel.from_props(session.get_modelmeta().custom_metadata_map, str(file))
    name = session.get_inputs()[0].name
    for some in (images[start : start + _AT_ONCE] for start in range(0, len(images), _AT_ONCE)):
        read: dict[Path, Array] = {}
        for path in some:
            try:
                read[path] = decode(path, about.image_shape[1:])[0]
            except DataError as error:
                if on_unreadable is None:
                    raise
                on_unreadable(error)
        if not read:
            continue
        (out,) = session.run(None, {name: _as_read(np.stack(list(read.values())), about)})
        for path, row in zip(read, out if about.takes_pixels else _softmax(out), strict=True):
            best = np.argsort(-row, kind="stable")[:top].tolist()
            yield Prediction(str(path), tuple((_named(about, index), float(row[index])) for index in best))


def _as_read(pixels: Array, about: ImageModel) -> Array:
    """Return pixels `(B, H, W, 3)` uint8 as the file takes them."""
    if about.image_shape[0] == 1:
        pixels = (pixels @ _LUMA).round().astype(np.uint8)[..., np.newaxis]
    if about.takes_pixels:
        return pixels
    mean, std = (np.array(values, dtype=np.float32) for values in (about.mean, about.std))
    return np.ascontiguousarray(((pixels.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2))


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    shares: Array = powers / powers.sum(1, keepdims=True)
    return shares


def _named(about: ImageModel, index: int) -> str:
    return about.classes[index] if index < len(about.classes) else str(index)
